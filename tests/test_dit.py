"""The DiT: released names, an independent implementation, and what must not depend on how it is run.

The cases of the released program itself are in test_reference.py.
"""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flashtalk_cli.errors import DeviceError, ModelError
from flashtalk_cli.models import rope
from flashtalk_cli.models.attention import SDPA, choose_kernel
from flashtalk_cli.models.audio import AudioProjector
from flashtalk_cli.models.dit import EIGHT_BITS, EXACT_BLOCKS, AudioContext, Context, DiT, DitParams, Layout
from flashtalk_cli.models.fp8 import check_device
from flashtalk_cli.models.layers import lay_together
from flashtalk_cli.models.token_ops import PLAIN
from flashtalk_cli.parallel.mesh import make_mesh
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.sequence import Attend, Sequence
from flashtalk_cli.parallel.spatial import WHOLE
from flashtalk_cli.parallel.split import split

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("FLASHTALK_REFERENCE") or ROOT.parent / "shared" / "reference")
CPU = torch.device("cpu")
SMALL = DitParams(
    dim=48,
    ffn_dim=64,
    num_heads=4,
    num_layers=2,
    freq_dim=16,
    text_dim=20,
    text_len=10,
    intermediate_dim=8,
    output_dim=24,
    context_tokens=3,
    audio_layers=2,
    audio_dim=5,
    image_dim=14,
)


def random_dit(params: DitParams = SMALL, seed: int = 0) -> DiT:
    """Weights of sensible size, and none of them a constant that could hide a mistake."""
    random = torch.Generator().manual_seed(seed)
    dit = DiT(params).eval()
    for name, weight in dit.named_parameters():
        std = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        mean = 1.0 if re.search(r"norm|proj\.[04]\.weight", name) and name.endswith("weight") else 0.0
        weight.data = torch.randn(weight.shape, generator=random) * (std if weight.ndim > 1 else 0.1) + mean
    return dit


@dataclass(frozen=True)
class Inputs:
    """What a DiT is given, drawn from a seed."""

    x: Tensor
    t: Tensor
    y: Tensor
    text: Tensor
    image: Tensor
    windows: Tensor

    @classmethod
    def draw(
        cls, p: DitParams, b: int = 1, latents: int = 3, h: int = 6, w: int = 4, seed: int = 1
    ) -> Inputs:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        frames = 1 + p.vae_scale * (latents - 1)
        return cls(
            x=normal(b, p.out_dim, latents, h, w),
            t=torch.rand(b, generator=random) * 1000,
            y=normal(b, p.in_dim - p.out_dim, latents, h, w),
            text=normal(b, min(7, p.text_len), p.text_dim),
            image=normal(b, 9, p.image_dim),
            windows=normal(b, frames, p.audio_window, p.audio_layers, p.audio_dim),
        )

    def row(self, i: int) -> Inputs:
        """One of the batch, as a batch of one."""
        return Inputs(*(getattr(self, name)[i : i + 1] for name in self.__dataclass_fields__))

    def through(self, dit: DiT, par: Sequence | None = None) -> Tensor:
        context, audio = dit.condition(self.text, self.image), dit.hear(self.windows)
        return dit(self.x, self.t, self.y, context, audio, par or Sequence())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


# Names and sizes


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
    assert DitParams.from_config({"patch_size": [1, 4, 4]}).patch_size == (1, 4, 4)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"qk_norm": False}, "qk_norm is False"),
        ({"dim": "wide"}, "dim is 'wide'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 4.0}, "num_heads is 4.0, expected a positive size like 40"),
        ({"eps": True}, "eps is True"),
        ({"patch_size": 2}, r"patch_size is 2, expected .* like \(1, 2, 2\)"),
        ({"dim": 100, "num_heads": 8}, "dim 100 does not divide into 8 heads"),
        ({"patch_size": [1, 2]}, r"patch_size is \[1, 2\]"),
    ],
)
def test_a_config_of_another_model_is_refused(config: dict[str, Any], says: str) -> None:
    """Fault: one line with the key and its value."""
    with pytest.raises(ModelError, match=says):
        DitParams.from_config(config)


# Against an independent implementation

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


# What must not matter


@settings(max_examples=6, deadline=None)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_keys_and_values_in_one_product(dtype: torch.dtype) -> None:
    """Parity: laid together, layers keep names and values, compute the same, and lay down no second copy."""
    dit, given_ = random_dit().to(dtype), Inputs.draw(SMALL)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    with torch.no_grad():
        expected = given_.through(dit)
        for block in dit.blocks:
            lay_together([block.self_attn.q, block.self_attn.k, block.self_attn.v])
        products: list[Tensor] = []
        hook = nn.modules.module.register_module_forward_hook(lambda m, *_: products.append(m))
        together = given_.through(dit)
        hook.remove()
    assert relative_error(together, expected) < (1e-5 if dtype == torch.float32 else 0.02)
    assert not any(block.self_attn.q in products for block in dit.blocks), "each on its own"
    assert {name: tensor.shape for name, tensor in dit.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
    assert gradients_of(dit.float(), given_).keys() == before.keys()


# Precision and gradients


def test_blocks_in_eight_bits() -> None:
    """Parity within what e4m3 leaves, in half the memory; what is small or precise stays as it was."""
    dit = random_dit(replace(SMALL, dim=64, ffn_dim=128)).bfloat16()
    given_ = Inputs.draw(dit.params)
    held = sum(a.nbytes for a in dit.blocks[0].state_dict().values())
    with torch.no_grad():
        expected = given_.through(dit)
        dit.arrange(eight_bits=True)
        small = given_.through(dit)
    error = float((small - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.08
    quantised = {n for n, a in dit.state_dict().items() if a.dtype == torch.float8_e4m3fn}
    first = range(len(dit.blocks) - EXACT_BLOCKS)
    assert quantised == {f"blocks.{index}.{layer}.weight" for index in first for layer in EIGHT_BITS}
    assert sum(a.nbytes for a in dit.blocks[0].state_dict().values()) < 0.9 * held


@pytest.mark.parametrize(
    "layers",
    ["self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2", "self_attn.q self_attn.k self_attn.v"],
)
@torch.no_grad()
def test_any_one_layer_in_eight_bits(layers: str) -> None:
    """Contract: which layers are quantised is data: each of them alone gets its rows, the others their tensors."""
    dit = random_dit(replace(SMALL, dim=64, ffn_dim=128))
    given_ = Inputs.draw(dit.params)
    expected = given_.through(dit)
    for block in dit.blocks:
        block.arrange(layers.split())
    assert 1e-5 < relative_error(given_.through(dit), expected) < 0.08


def test_eight_bits_want_a_gpu_that_has_them() -> None:
    """Fault: one line with the mend."""
    with pytest.raises(DeviceError, match="this run uses 'cpu': take 'auto'"):
        check_device(CPU)


def test_bfloat16_stays_near_float32() -> None:
    """Parity: rounding everywhere but in norms, rotation, gates and time costs little."""
    given_, dit = Inputs.draw(SMALL, b=2), random_dit()
    with torch.no_grad():
        exact = given_.through(dit)
        rounded = given_.through(dit.bfloat16())
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_a_gpu_computes_what_a_cpu_does(dtype: torch.dtype, bound: float) -> None:
    """Parity: CPU and GPU take other ways through rotation and modulation; the result is one."""
    params = replace(SMALL, dim=256)  # heads of 64, which every kernel takes
    given_, dit = Inputs.draw(params), random_dit(params)
    cuda = torch.device("cuda")
    on_gpu = Inputs(*(getattr(given_, name).to(cuda) for name in Inputs.__dataclass_fields__))
    with torch.no_grad():
        expected = given_.through(dit)
        dit.to(cuda, dtype).kernel = choose_kernel("auto", cuda, dtype)
        result = on_gpu.through(dit).cpu()
    assert ((result - expected).norm() / expected.norm()) < bound, dit.kernel.name


def test_time_is_embedded_in_float32_whatever_the_weights() -> None:
    """Contract: neighbouring times stay apart in bfloat16, where 999 and 1000 are one number."""
    dit = random_dit().bfloat16()
    rounded_weights, _ = dit._embed_time(torch.tensor([999.0, 1000.0]))
    exact, _ = dit.float()._embed_time(torch.tensor([999.0, 1000.0]))
    torch.testing.assert_close(rounded_weights, exact)
    assert (exact[0] - exact[1]).abs().max() > 1e-2


def gradients_of(dit: DiT, given_: Inputs) -> dict[str, Tensor]:
    dit.zero_grad()
    given_.through(dit).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in dit.named_parameters() if weight.grad is not None}


def test_gradients_reach_every_weight_and_are_right() -> None:
    """Parity: along a random direction in weights, the gradient predicts the change of the loss."""
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    gradients = gradients_of(dit, given_)
    assert gradients.keys() == dict(dit.named_parameters()).keys()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())

    random = torch.Generator().manual_seed(2)
    for weight in dit.parameters():
        weight.requires_grad_(False)
    for part in ("self_attn", "cross_attn", "audio", "ffn", "modulation", "embedding"):
        named = {n: w for n, w in dit.named_parameters() if part in n}
        step = {n: g / g.norm() + torch.randn(g.shape, generator=random) * 0.01 for n, g in gradients.items()}
        predicted = sum(float((gradients[n] * step[n]).sum()) for n in named)
        losses = []
        for sign in (1, -1):
            for n, w in named.items():
                w += sign * 1e-3 * step[n]
            losses.append(float(given_.through(dit).double().square().mean()))
            for n, w in named.items():
                w -= sign * 1e-3 * step[n]
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(predicted, rel=0.02), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_blocks_changes_no_gradient(dtype: torch.dtype) -> None:
    """Parity: activation checkpointing gives the same gradients from fewer kept activations."""
    dit, given_ = random_dit().to(dtype), Inputs.draw(SMALL, latents=2, h=8, w=8)
    kept: list[int] = []

    def measured() -> dict[str, Tensor]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a: sizes.append(a.numel()) or a, lambda a: a):
            out = given_.through(dit)
        kept.append(sum(sizes))
        dit.zero_grad()
        out.square().mean().backward()
        return {name: w.grad.clone() for name, w in dit.named_parameters() if w.grad is not None}

    plain = measured()
    dit.recompute = True
    torch.testing.assert_close(measured(), plain)
    assert kept[1] < kept[0]


# Rotary embedding


def test_rotation_is_that_of_complex_numbers() -> None:
    """Parity: pairs of neighbours turn by the angles of frame, row and column, in that order of frequencies."""
    (t, h, w), head_dim = (3, 2, 4), 22  # 11 frequencies: 5 for the frame, 3 for row and column
    x = torch.randn(2, t * h * w, 3, head_dim)
    turned = torch.view_as_complex(
        rope.rotate(x, rope.rotation_table((t, h, w), head_dim, CPU)).unflatten(-1, (-1, 2))
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    for token in range(t * h * w):
        place = (token // (h * w), token // w % h, token % w)
        angles = [place[axis] / 10_000 ** (i / n) for axis, n in enumerate((5, 3, 3)) for i in range(n)]
        expected = pairs[:, token] * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        torch.testing.assert_close(turned[:, token], expected.to(turned.dtype))


def test_both_forms_of_the_rotation_agree() -> None:
    """Parity: the form for compilers computes what the CPU's does."""
    table = rope.rotation_table((2, 3, 2), 16, CPU)[:, None]
    pairs = torch.randn(2, 12, 3, 8, 2)
    torch.testing.assert_close(rope._as_reals(pairs, table), rope._as_complex(pairs, table))


def test_a_table_is_made_once_and_serves_training_after_inference() -> None:
    """Contract: one table a grid, usable where gradients are kept although inference made it."""
    rope.rotation_table.cache_clear()
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    with torch.inference_mode():
        given_.through(dit)
        given_.through(dit)
    assert rope.rotation_table.cache_info().misses == 1
    gradients_of(dit, given_)
    assert rope.rotation_table.cache_info().misses == 1


# Audio


@pytest.mark.parametrize(("window", "scale"), [(5, 4), (3, 4), (7, 4), (5, 2), (5, 8)])
def test_a_latent_frame_hears_the_windows_of_its_frames(window: int, scale: int) -> None:
    """Golden: which frame of which window reaches the latent frame, and in what order."""
    projector = AudioProjector(
        audio_window=window,
        vae_scale=scale,
        audio_layers=1,
        audio_dim=1,
        intermediate_dim=4,
        output_dim=4,
        context_tokens=2,
    )
    frames = 1 + 2 * scale
    at = torch.arange(frames)[:, None] * 100 + torch.arange(window)  # value: frame, place in its window
    heard = projector._belonging(at[None, 1:, :, None, None].float())[0].int().tolist()
    half = window // 2
    for group, row in enumerate(heard):
        first = 1 + group * scale
        expected = [first * 100 + i for i in range(half + 1)]
        expected += [f * 100 + half for f in range(first + 1, first + scale - 1)]
        expected += [(first + scale - 1) * 100 + i for i in range(half, window)]
        assert row == expected
    assert projector(at[None, :, :, None, None].float()).shape == (1, 3, 2, 4)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_run_of_tokens_hears_what_it_hears_in_the_whole(data: st.DataObject) -> None:
    """Property: a rank whose tokens begin or end inside a frame, padding included, gets its slice of the whole."""
    frames, size, b = 4, 5, 2
    start = data.draw(st.integers(0, frames * size - 1))
    stop = data.draw(st.integers(start + 1, frames * size))
    padding = data.draw(st.integers(0, 3))
    layer = random_dit().blocks[0].audio_cross_attn
    x = torch.randn(b, frames * size, SMALL.dim)
    audio = layer.keys(torch.randn(b, frames, SMALL.context_tokens, SMALL.output_dim))
    whole = Layout(torch.empty(0), size, (0, frames * size), frames * size, Sequence(), SDPA)
    run = torch.cat([x[:, start:stop], torch.full((b, padding, SMALL.dim), torch.nan)], dim=1)
    with torch.no_grad():
        expected = layer(x, audio, whole)[:, start:stop]
        heard = layer(run, audio, replace(whole, span=(start, stop)))
    assert heard.shape == run.shape
    assert heard.isfinite().all()
    torch.testing.assert_close(heard[:, : stop - start], expected)


def test_audio_attention_by_definition() -> None:
    """Golden: kv_linear holds keys, then values, head by head; a frame's tokens hear that frame only."""
    layer, frames, size = random_dit().blocks[0].audio_cross_attn, 3, 4
    x, tokens = torch.randn(1, frames * size, SMALL.dim), torch.randn(1, frames, 5, SMALL.output_dim)
    width, d = SMALL.dim, SMALL.head_dim
    weight, bias = layer.kv_linear.weight, layer.kv_linear.bias
    out = torch.empty_like(x)
    for token in range(frames * size):
        q, heard = layer.q_linear(x[0, token]), tokens[0, token // size]
        k, v = heard @ weight[:width].T + bias[:width], heard @ weight[width:].T + bias[width:]
        for head in (slice(i * d, (i + 1) * d) for i in range(SMALL.num_heads)):
            out[0, token, head] = torch.softmax(k[:, head] @ q[head] / d**0.5, 0) @ v[:, head]
    layout = Layout(torch.empty(0), size, (0, frames * size), frames * size, Sequence(), SDPA)
    torch.testing.assert_close(layer(x, layer.keys(tokens), layout), layer.proj(out))


# Sharing a sequence


@dataclass
class Meeting:
    """Where the ranks of a pretended group lay down tensors and pick up everybody's."""

    size: int
    laid: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.laid, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=60)

    def exchange(self, rank: int, what: Any) -> list[Any]:
        self.laid[rank] = what
        self.barrier.wait()
        everybody = list(self.laid)
        self.barrier.wait()
        return everybody


@dataclass(frozen=True)
class ThreadSequence(Sequence):
    """A sequence over threads: runs of equal length, the last one padded."""

    size: int
    rank: int
    meeting: Meeting
    length: int

    @property
    def run(self) -> int:
        return -(-self.length // self.size)

    def span(self, length: int) -> tuple[int, int]:
        return self.rank * self.run, min(length, (self.rank + 1) * self.run)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        padded = torch.cat([x, x.narrow(dim, 0, self.run * self.size - x.shape[dim])], dim)
        return padded.narrow(dim, self.rank * self.run, self.run)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x), dim).narrow(dim, 0, length)

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        return kernel(q, self.gather(k, 1, length), self.gather(v, 1, length))


@pytest.mark.parametrize("size", [2, 4, 5])
def test_ranks_together_compute_what_one_computes(size: int) -> None:
    """Parity: shard, attend and gather are all that ranks need, whole frames held or not, padding or not."""
    dit, given_ = random_dit(), Inputs.draw(SMALL, latents=3, h=4, w=6)
    length = 3 * 2 * 3
    meeting = Meeting(size)
    results: list[Tensor | None] = [None] * size

    def run(rank: int) -> None:
        with torch.no_grad():
            results[rank] = given_.through(dit, ThreadSequence(size, rank, meeting, length))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        expected = given_.through(dit)
    for result in results:
        assert result is not None
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_one_rank_is_the_identity() -> None:
    """Contract: nothing is copied, padded or changed when nobody shares the work."""
    mesh = make_mesh(Ranks(torch.device("cpu")), split(1, heads=4, height=2, width=3))
    x = torch.randn(2, 3)
    assert mesh.tiles is WHOLE
    assert mesh.sequence.shard(x, 0) is x
    assert mesh.sequence.gather(x, 1, 3) is x
    assert mesh.sequence.attend(lambda q, k, v: v, x, x, x, 3) is x
    assert mesh.sequence.span(7) == (0, 7)


def test_conditions_are_values() -> None:
    """Contract: nobody can change what a session was prepared with."""
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    context, audio = dit.condition(given_.text, given_.image), dit.hear(given_.windows)
    for value, name in ((context, "text"), (audio, "blocks")):
        assert isinstance(value, (Context, AudioContext))
        with pytest.raises(AttributeError):
            setattr(value, name, ())
