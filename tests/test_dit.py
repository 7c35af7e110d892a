"""The DiT: released names, an independent implementation, and what must not depend on how it is run.

The cases of the released program itself are in test_reference.py.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import SMALL, Inputs, random_dit, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.hooks import RemovableHandle

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.dit import AudioContext, Context, DiT, DitParams
from flashtalk_cli.models.token_ops import PLAIN
from flashtalk_cli.parallel.sequence import Sequence

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("FLASHTALK_REFERENCE") or ROOT.parent / "shared" / "reference")


def released_shapes() -> dict[str, tuple[int, ...]]:
    path = FOLDER / "soulx_14b_keys.json"
    if not path.is_file():
        pytest.skip(f"no list of the released tensors in {FOLDER}")
    return {key: tuple(shape) for key, shape in json.loads(path.read_text())["dit"].items()}


def test_the_released_checkpoint_fits_exactly() -> None:
    """Contract: every released tensor has a parameter of its name and shape, and no parameter is left over."""
    released = released_shapes()
    config = {"_packer": "x", "model_type": "i2v", "qk_norm": True, "dim": 5120, "patch_size": [1, 2, 2]}
    with torch.device("meta"):
        dit = DiT(DitParams.from_config(config))
    ours = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
    assert ours.keys() == released.keys()
    assert ours == released


def test_a_config_is_read_in_the_released_words() -> None:
    """Contract: sizes are taken, missing ones keep the released default, all other keys are passed over."""
    params = DitParams.from_config({"dim": 96, "num_heads": 4, "_note": 1, "window_size": [-1, -1]})
    assert params == DitParams(dim=96, num_heads=4)
    assert DitParams.from_config({}) == DitParams()
    assert DitParams.from_config({"patch_size": [1, 2, 2]}).patch_size == (1, 2, 2)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"qk_norm": False}, "qk_norm is False"),
        ({"dim": "wide"}, "dim is 'wide'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 4.0}, "num_heads is 4.0, expected a positive size like 40"),
        ({"eps": True}, "eps is True"),
        ({"patch_size": 2}, r"patch_size is 2, this model has \(1, 2, 2\)"),
        ({"patch_size": [1, 3, 3]}, r"patch_size is \[1, 3, 3\], this model has \(1, 2, 2\)"),
        ({"vae_scale": 2}, "vae_scale is 2, this model has 4"),
        ({"audio_window": 3}, "audio_window is 3, this model has 5"),
        ({"in_dim": [36]}, r"in_dim is \[36\]"),
        ({"out_dim": 8}, "out_dim is 8, this model has 16"),
        ({"freq_dim": 15}, "freq_dim 15 is odd"),
        ({"dim": 100, "num_heads": 8}, "dim 100 does not divide into 8 heads"),
        ({"patch_size": [1, 2]}, r"patch_size is \[1, 2\]"),
    ],
)
def test_a_config_of_another_model_is_refused(config: dict[str, Any], says: str) -> None:
    """Fault: one line with the key and its value."""
    with pytest.raises(ModelError, match=says):
        DitParams.from_config(config)


DIFFUSERS_NAMES = (
    (r"^time_embedding\.(0|2)", {"0": "linear_1", "2": "linear_2"}, "condition_embedder.time_embedder.{}"),
    (r"^text_embedding\.(0|2)", {"0": "linear_1", "2": "linear_2"}, "condition_embedder.text_embedder.{}"),
    (r"^time_projection\.(1)", {"1": "time_proj"}, "condition_embedder.{}"),
    (
        r"^img_emb\.proj\.(\d)",
        {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"},
        "condition_embedder.image_embedder.{}",
    ),
    (r"^head\.(head|modulation)", {"head": "proj_out", "modulation": "scale_shift_table"}, "{}"),
    (r"\.(modulation)$", {"modulation": "scale_shift_table"}, ".{}"),
    (r"\.(self_attn|cross_attn)", {"self_attn": "attn1", "cross_attn": "attn2"}, ".{}"),
    (r"\.(q|k|v|o)\.", {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}, ".{}."),
    (
        r"\.(k_img|v_img|norm_k_img)\.",
        {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"},
        ".{}.",
    ),
    (r"\.(norm3)\.", {"norm3": "norm2"}, ".{}."),
    (r"\.ffn\.(0|2)", {"0": "net.0.proj", "2": "net.2"}, ".ffn.{}"),
)


def diffusers_name(key: str) -> str:
    for pattern, words, form in DIFFUSERS_NAMES:
        key = re.sub(pattern, lambda m, words=words, form=form: form.format(words[m[1]]), key)  # type: ignore[misc]
    return key


def test_without_audio_it_is_the_wan_transformer_of_diffusers() -> None:
    """Parity: same weights, same output, image cross-attention included, when the audio adds nothing."""
    diffusers = pytest.importorskip("diffusers")
    p = replace(SMALL, text_len=512)  # diffusers finds the image tokens behind 512 text rows
    theirs = diffusers.WanTransformer3DModel(
        patch_size=p.patch_size,
        num_attention_heads=p.num_heads,
        attention_head_dim=p.head_dim,
        in_channels=p.in_dim,
        out_channels=p.out_dim,
        text_dim=p.text_dim,
        freq_dim=p.freq_dim,
        ffn_dim=p.ffn_dim,
        num_layers=p.num_layers,
        image_dim=p.image_dim,
        added_kv_proj_dim=p.dim,
        eps=p.eps,
    ).eval()
    ours = random_dit(p)
    for name, weight in ours.named_parameters():
        if "audio_cross_attn.proj" in name:
            nn.init.zeros_(weight)
    shared = {
        diffusers_name(key): value
        for key, value in ours.state_dict().items()
        if not re.search(r"audio|norm_x", key)
    }
    theirs.load_state_dict(shared)

    given_ = Inputs.draw(p, b=2)
    rows = nn.functional.pad(given_.text, (0, 0, 0, p.text_len - given_.text.shape[1]))
    with torch.no_grad():
        expected = theirs(torch.cat([given_.x, given_.y], 1), given_.t, rows, given_.image).sample
        assert relative_error(given_.through(ours), expected) < 1e-4


@settings(max_examples=6)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_any_size_and_each_of_a_batch_by_itself(latents: int, rows: int, columns: int, b: int) -> None:
    """Property: videos of a batch, each with its own time, do not see each other; any size works."""
    dit = random_dit()
    batch = Inputs.draw(SMALL, b, latents, 2 * rows, 2 * columns)
    with torch.no_grad():
        together = batch.through(dit)
        assert together.shape == batch.x.shape
        assert together.dtype == torch.float32
        for i in range(b):
            assert relative_error(together[i : i + 1], batch.row(i).through(dit)) < 1e-4


def test_modulation_is_one_formula() -> None:
    """Parity: the one-pass form for one video on a CPU equals the general form, values and gradients."""
    x, shift, scale = torch.randn(1, 5, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    given_ = [a.requires_grad_() for a in (x, shift, scale)]
    one, two = (
        PLAIN.norm(x, 1 + scale, shift, 1e-6),
        PLAIN.norm(*(torch.cat([a, a]) for a in (x, 1 + scale, shift)), 1e-6)[:1],
    )
    torch.testing.assert_close(one, two)
    weight = torch.randn_like(one)
    gradients = [torch.autograd.grad((out * weight).sum(), given_) for out in (one, two)]
    torch.testing.assert_close(*gradients)


def test_prompt_rows_are_padded_with_zeros_that_count() -> None:
    """Contract: a short prompt is the same as one padded by hand; the padding is attended to."""
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    by_hand = nn.functional.pad(given_.text, (0, 0, 0, SMALL.text_len - given_.text.shape[1]))
    with torch.no_grad():
        expected = given_.through(dit)
        torch.testing.assert_close(replace(given_, text=by_hand).through(dit), expected)
        torch.testing.assert_close(replace(given_, text=given_.text[0]).through(dit), expected)
        unpadded = DiT(replace(SMALL, text_len=given_.text.shape[1]))
        unpadded.load_state_dict(dit.state_dict())
        assert relative_error(given_.through(unpadded), expected) > 1e-3


def test_a_step_computes_no_keys_of_what_does_not_change() -> None:
    """Contract: keys and values of text, image and audio belong to condition and hear, not to a step."""
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    context, audio = dit.condition(given_.text, given_.image), dit.hear(given_.windows)
    constant = r"cross_attn\.(k|v|k_img|v_img|norm_k\w*|kv_linear)$|^(text_embedding|img_emb|audio_proj)"
    called: list[str] = []

    def note(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda *_: called.append(name))

    hooks = [note(n, m) for n, m in dit.named_modules() if re.search(constant, n) and "self_attn" not in n]
    assert len(hooks) > 8 * SMALL.num_layers
    with torch.no_grad():
        dit(given_.x, given_.t, given_.y, context, audio, Sequence())
        assert not called
        dit.condition(given_.text, given_.image)
        assert called


def test_conditions_are_values() -> None:
    """Contract: nobody can change what a session was prepared with."""
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    context, audio = dit.condition(given_.text, given_.image), dit.hear(given_.windows)
    for value, name in ((context, "blocks"), (audio, "blocks")):
        assert isinstance(value, (Context, AudioContext))
        with pytest.raises(AttributeError):
            setattr(value, name, ())
