"""The speech encoder: samples to what was said, frame by frame of the video, by wav2vec 2.0.

The network is `transformers.Wav2Vec2Model`, walked here step by step, because the diffusion model
wants two things that its `forward` does not give alike in every release: features brought to the
video's frame rate before the transformer sees them, and the output of every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.tensors import Layout, Piece

MIN_SAMPLES = 400  # the convolutions' field of view: 25 ms
POSITIONS = "encoder.pos_conv_embed.conv"

# Parts of a pre-training or recognition checkpoint beside the encoder, and the mask token of training.
IGNORED_PREFIXES = ("quantizer.", "project_q.", "project_hid.", "lm_head.", "masked_spec_embed")


def build_speech(config: Mapping[str, Any]) -> Any:
    """The network on the meta device, from the words of its folder's config.json ({}: the base size).

    Raises ModelError for a variant that normalises elsewhere than the released one.
    """
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    if config.get("model_type", "wav2vec2") != "wav2vec2" or config.get("do_stable_layer_norm", False):
        raise ModelError(
            f"the speech encoder is a {config.get('model_type')!r} with do_stable_layer_norm="
            f"{config.get('do_stable_layer_norm', False)}; a wav2vec2 without it is needed, "
            "as TencentGameMate/chinese-wav2vec2-base"
        )
    try:
        sizes = Wav2Vec2Config(**{**config, "apply_spec_augment": False, "mask_time_prob": 0.0})
        sizes.mask_feature_prob = 0.0  # without masking there is no mask token to load
        with torch.device("meta"):
            module = Wav2Vec2Model(sizes)
    except Exception as error:  # whatever wrong values make of the library's own checks
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ModelError(f"the speech encoder's config.json has a wrong value: {reason}") from error
    return module.eval()


def speech_layout(module: nn.Module) -> Layout:
    """Names are transformers' own, see `speech_name` for the older ones."""
    return Layout({name: Piece(name) for name in module.state_dict()})


def speech_name(key: str) -> str | None:
    """A released tensor's name in the network; None for one that belongs to another part.

    Checkpoints with a head carry the prefix `wav2vec2.`; weight normalisation was stored as
    weight_g and weight_v before torch 2.1.
    """
    name = key.removeprefix("wav2vec2.")
    if name.startswith(IGNORED_PREFIXES):
        return None
    parts = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    for old, new in parts.items():
        if name == f"{POSITIONS}.{old}":
            return f"{POSITIONS}.{new}"
    return name


def fold_weight_norm(module: nn.Module) -> None:
    """Compute the normalised weight of the position convolution once, not in every call.

    In float64: a sum in float32 depends on how many threads share it.
    """
    convolution = module.get_submodule(POSITIONS)
    if nn.utils.parametrize.is_parametrized(convolution, "weight"):
        dtype = next(convolution.parameters()).dtype
        nn.utils.parametrize.remove_parametrizations(convolution.double(), "weight")
        convolution.to(dtype).weight.requires_grad_(False)


def features_of(module: Any, samples: Tensor, n_frames: int) -> Tensor:
    """Outputs of every block at each of `n_frames` frames, of samples [B, N]: [B, n_frames, layers, dim].

    The samples are taken as they are; `SpeechEncoder` normalises them first. Frame 0 is the
    first sample's and the last frame the last one's (align_corners).
    """
    heard = module.feature_extractor(samples)  # [B, channels, about N / 320]
    at_frames = F.interpolate(heard, size=n_frames, mode="linear", align_corners=True)
    x, _ = module.feature_projection(rearrange(at_frames, "b c t -> b t c"))
    x = module.encoder.layer_norm(x + module.encoder.pos_conv_embed(x))
    outputs = []
    for block in module.encoder.layers:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x  # a tuple in transformers 4
        outputs.append(x)
    return torch.stack(outputs, dim=2)


Run: TypeAlias = Callable[[str, object, Callable[..., Tensor], Tensor], Tensor]
"""Calls function(x): name, what the function reads besides, the function, x."""


class SpeechEncoder:
    """Samples to features. `run` may record what it calls: always the same launches for sounds of one length."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.run: Run = lambda _name, _given, function, x: function(x)

    @torch.no_grad()
    def encode(self, samples: Tensor, n_frames: int) -> Tensor:
        """Samples float32 [N] at 16 kHz, N >= 400, as features [n_frames, layers, dim].

        Brought to zero mean and unit variance first, as the network was trained; the result is in
        the network's number format.
        """
        assert samples.ndim == 1, samples.shape
        return self.encode_each(samples[None], n_frames)[0]

    @torch.no_grad()
    def encode_each(self, samples: Tensor, n_frames: int) -> Tensor:
        """`encode` for B sounds of one length: float32 [B, N] to [B, n_frames, layers, dim]."""
        assert samples.shape[1] >= MIN_SAMPLES, samples.shape
        weight = next(self.module.parameters())

        def hear(x: Tensor) -> Tensor:
            wide = x.double()  # a sum in float32 depends on how many threads share it
            mean, var = wide.mean(1, keepdim=True), wide.var(1, correction=0, keepdim=True)
            x = (x - mean.float()) / torch.sqrt(var.float() + 1e-7)
            return features_of(self.module, x.to(weight.dtype), n_frames)

        x = samples.to(weight.device, torch.float32)
        return self.run(f"speech to {n_frames} frames", self.module, hear, x)
