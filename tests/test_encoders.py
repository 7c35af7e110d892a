"""Encoders: parity with the reference cases and with transformers' own forward, and the released names."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, Wav2Vec2Model

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models import image, speech, text
from flashtalk_cli.models.export import released_tensors, write_byte_tokenizer
from flashtalk_cli.models.tensors import Layout, MemorySource, View, fill
from flashtalk_cli.models.weights import fill_random

FOLDER = Path(
    os.environ.get("FLASHTALK_REFERENCE") or Path(__file__).resolve().parents[2] / "shared" / "reference"
)
CPU = torch.device("cpu")


def case(name: str) -> Any:
    path = FOLDER / "reference.py"
    if not (FOLDER / f"{name}.npz").is_file():
        pytest.skip(f"no case {name} in {FOLDER}")
    spec = importlib.util.spec_from_file_location("encoder_reference", path)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name, FOLDER)


def weights_of(a_case: Any) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in a_case.state_dict().items()}


def agrees(ours: Tensor, theirs: np.ndarray) -> None:
    assert tuple(ours.shape) == theirs.shape
    assert np.abs(ours.numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()


@torch.no_grad()
def test_text_rows_are_the_reference_s() -> None:
    reference = case("t5")
    module = text.text_module(weights_of(reference))
    ids, mask = (torch.from_numpy(reference.arrays[key]) for key in ("ids", "mask"))
    agrees(text.encode_ids(module, ids, mask), reference.arrays["output"])


@torch.no_grad()
def test_image_tokens_are_the_reference_s() -> None:
    reference = case("clip")
    module = image.image_module(weights_of(reference), reference.config["num_heads"])
    agrees(image.tokens(module, torch.from_numpy(reference.inputs()["image"])), reference.arrays["output"])


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
def test_speech_features_are_the_reference_s(folded: bool) -> None:
    """Also with the weight normalisation of the position convolution computed beforehand.

    The case's sound is a tenth of what its name draws: so the outputs agree to the last bit.
    """
    reference = case("wav2vec")
    module = speech.build_speech(reference.config)
    source = View.of(MemorySource(weights_of(reference)), speech.speech_name)
    fill(module, speech.speech_layout(module), source, CPU, torch.float32)
    if folded:
        speech.fold_weight_norm(module)
    samples = 0.1 * torch.from_numpy(reference.inputs()["wave"])
    ours = speech.features_of(module, samples, reference.meta["seq_len"])[0]
    agrees(ours, reference.arrays["output"])


@pytest.fixture(scope="module")
def keys() -> dict[str, dict[str, list[int]]]:
    path = FOLDER / "soulx_14b_keys.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text())


def test_every_released_text_tensor_has_a_place(keys: dict) -> None:
    """The released sizes are read from the shapes, every tensor is used, and none is left over."""
    shapes = {key: tuple(shape) for key, shape in keys["t5"].items()}
    params = text.TextParams.from_shapes(shapes)
    assert params == text.TextParams()
    layout = text.text_layout(params)
    assert layout.shapes(text.build_text(params)) == shapes
    assert not layout.unused


def test_every_released_image_tensor_has_a_place(keys: dict) -> None:
    """As above; the last block, the norm behind it and the head are known and not used."""
    shapes = {key.removeprefix("visual."): tuple(shape) for key, shape in keys["clip_visual"].items()}
    params = image.ImageParams.from_shapes(shapes, heads=16)
    assert params == image.ImageParams()
    module = image.build_image(params)
    layout = image.image_layout(module, params)
    assert layout.shapes(module) == shapes
    assert set(layout.unused) == {
        key for key in shapes if key.startswith(("head", "post_norm", "transformer.31."))
    }


def test_speech_names_old_and_new() -> None:
    """A pre-training checkpoint's prefix, its old names of weight normalisation, and its other parts."""
    assert speech.speech_name("wav2vec2.encoder.layer_norm.bias") == "encoder.layer_norm.bias"
    new = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    for prefix in ("", "wav2vec2."):
        assert speech.speech_name(f"{prefix}encoder.pos_conv_embed.conv.weight_g") == f"{new}0"
        assert speech.speech_name(f"{prefix}encoder.pos_conv_embed.conv.weight_v") == f"{new}1"
    for other in (
        "quantizer.codevectors",
        "project_hid.weight",
        "lm_head.bias",
        "wav2vec2.masked_spec_embed",
    ):
        assert speech.speech_name(other) is None
    assert speech.speech_name("encoder.surprise") == "encoder.surprise"


def same_parameters(stock: Any, ours: Any) -> MemorySource:
    return MemorySource({key: value for key, value in stock.state_dict().items() if key in ours.state_dict()})


def seeded(module: Any) -> Any:
    fill_random(module, CPU, torch.float32, seed=3)
    return module


@torch.no_grad()
def test_speech_features_are_transformers_own_hidden_states() -> None:
    """At the rate of the convolutions, nothing is interpolated: transformers' hidden states but the first."""
    module = seeded(speech.build_speech(tiny_model.SPEECH_CONFIG))
    samples = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    stock = Wav2Vec2Model(module.config).eval()
    stock.load_state_dict(module.state_dict())
    output = stock(samples, output_hidden_states=True)
    n_frames = output.last_hidden_state.shape[1]
    theirs = torch.stack(output.hidden_states[1:], dim=2)[0]
    torch.testing.assert_close(speech.features_of(module, samples, n_frames)[0], theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_image_tokens_are_transformers_own_hidden_state_before_the_last_block() -> None:
    """A whole CLIP under the same weights: its hidden states but one from the end."""
    p = tiny_model.IMAGE
    config = CLIPVisionConfig(
        hidden_size=p.dim,
        intermediate_size=p.ffn_dim,
        num_hidden_layers=p.layers,
        num_attention_heads=p.heads,
        image_size=p.image_px,
        patch_size=p.patch_px,
        hidden_act="gelu",
    )
    stock = CLIPVisionModel(config).eval()
    ours = image.build_image(p)
    fill(ours, Layout.same_names(ours), same_parameters(stock, ours), CPU, torch.float32)
    pixels = torch.randn(2, 3, p.image_px, p.image_px, generator=torch.Generator().manual_seed(0))
    theirs = stock(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(image.tokens(ours, pixels), theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_padding_changes_no_text_row() -> None:
    """A prompt alone and the same one padded beside a longer one have the same rows."""
    module = seeded(text.build_text(tiny_model.TEXT))
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    together = text.encode_ids(module, ids, mask)
    alone = text.encode_ids(module, ids[1:, :7], mask[1:, :7])
    torch.testing.assert_close(together[1, :7], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a \n\t person\u3000talks ", "a person talks"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("donâ€™t", "don't"),
        ("&lt;b&gt;", "<b>"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(prompt: str, cleaned: str) -> None:
    assert text.clean(prompt) == cleaned


@given(st.text(max_size=60))
def test_cleaning_twice_is_cleaning_once_of_white_space(prompt: str) -> None:
    """Whatever the prompt, no white space is left at its ends or doubled within."""
    cleaned = text.clean(prompt)
    assert cleaned == " ".join(cleaned.split())


def test_tokens_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    """A long prompt keeps its end token, a short one is not padded, an empty one is the end token."""
    vocabulary = write_byte_tokenizer(tmp_path)
    tokenise = text.load_tokenizer(tmp_path / "google" / "umt5-xxl", 16, vocabulary)
    assert tokenise("") == [1]
    assert len(tokenise("hello")) == 6
    long = tokenise("é" * 100)
    assert len(long) == 16
    assert long[-1] == 1
    assert all(3 <= token < vocabulary for token in long[:-1])


def test_a_tokenizer_that_cannot_serve_is_told(tmp_path: Path) -> None:
    """Absent, broken, or with more tokens than the text encoder has rows."""
    folder = tmp_path / "google" / "umt5-xxl"
    with pytest.raises(ModelError, match="no tokenizer"):
        text.load_tokenizer(folder, 16, 300)
    vocabulary = write_byte_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=f"{vocabulary} tokens, the text encoder 100"):
        text.load_tokenizer(folder, 16, 100)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        text.load_tokenizer(folder, 16, 300)


def test_pictures_are_normalised_as_clip_was_trained() -> None:
    """White and black at any canvas size become (1 - mean) / std and (0 - mean) / std at the model's size."""
    mean, std = torch.tensor(image.CLIP_MEAN), torch.tensor(image.CLIP_STD)
    for level, value in ((1.0, 1.0), (-1.0, 0.0)):
        pixels = image.normalise(torch.full((3, 96, 64), level), 28)
        assert pixels.shape == (1, 3, 28, 28)
        expected = ((value - mean) / std)[None, :, None, None].expand_as(pixels)
        torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def test_shrinking_a_picture_does_not_smooth_it() -> None:
    """No antialiasing: of a board whose squares are the picture's pixels, shrunk to a third, black and white stay."""
    board = ((torch.arange(84)[:, None] + torch.arange(84)) % 2) * 2.0 - 1
    std = torch.tensor(image.CLIP_STD)[:, None, None]
    levels = image.normalise(board.expand(3, -1, -1), 28)[0] * std
    assert levels.amax() - levels.amin() > 0.99


@torch.no_grad()
def test_speech_does_not_depend_on_loudness() -> None:
    """Samples are brought to unit variance: half as loud gives the same features, silence finite ones."""
    encoder = speech.SpeechEncoder(seeded(speech.build_speech(tiny_model.SPEECH_CONFIG)))
    samples = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    loud, quiet = encoder.encode(samples, 7), encoder.encode(samples / 2 + 0.1, 7)
    assert loud.shape == (7, 3, 32)
    torch.testing.assert_close(loud, quiet, rtol=1e-3, atol=1e-3)
    assert encoder.encode(torch.zeros(4000), 7).isfinite().all()


def test_a_speech_encoder_of_another_kind_is_told() -> None:
    with pytest.raises(ModelError, match="do_stable_layer_norm=True"):
        speech.build_speech({"do_stable_layer_norm": True})
    with pytest.raises(ModelError, match="'hubert'"):
        speech.build_speech({"model_type": "hubert"})
    with pytest.raises(ModelError, match="wrong value"):
        speech.build_speech({"conv_dim": [1, 2]})


def test_a_speech_config_may_have_words_of_its_past() -> None:
    """Keys of fairseq, of training and of old releases are passed over; masking makes no mask token."""
    past = {
        **{
            "architectures": ["Wav2Vec2ForPreTraining"],
            "transformers_version": "4.16.0.dev0",
            "model_type": "wav2vec2",
        },
        **{"torch_dtype": "float32", "gradient_checkpointing": False, "apply_spec_augment": True},
        **{
            "mask_time_prob": 0.05,
            "mask_feature_prob": 0.1,
            "mask_channel_length": 10,
            "mask_channel_prob": 0.0,
        },
        **{"freeze_feat_extract_train": True, "num_feat_extract_layers": 7, "feat_extract_norm": "group"},
        **{"conv_bias": False, "do_stable_layer_norm": False, "proj_codevector_dim": 256, "vocab_size": 32},
    }
    module = speech.build_speech({**past, **tiny_model.SPEECH_CONFIG})
    plain = speech.build_speech(tiny_model.SPEECH_CONFIG)
    assert module.state_dict().keys() == plain.state_dict().keys()


def test_released_tensors_and_back() -> None:
    """Writing a module under the released names and reading it again gives its parameters, split and all."""
    params = tiny_model.IMAGE
    module = seeded(image.build_image(params))
    layout = image.image_layout(module, params)
    again = image.image_module(released_tensors(module, layout), params.heads)
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
