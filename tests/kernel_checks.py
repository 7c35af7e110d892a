"""Fused kernels against the plain code: parity on fresh random inputs of odd sizes, outputs poisoned.

test_kernels.py runs these: on a GPU as they are; without one through Triton's interpreter, which computes
what a kernel says and tells nothing of its speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flashtalk_cli.models import dit as dit_module
from flashtalk_cli.models import fp8, rope, vae_blocks
from flashtalk_cli.models.attention import SDPA, CrossKeys, KeyValue, PromptKeys
from flashtalk_cli.models.attention_fp8 import hadamard, normed_scales
from flashtalk_cli.models.audio import FoldBounds
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.fp8 import Rows
from flashtalk_cli.models.kernels import frames as kernel_frames
from flashtalk_cli.models.kernels import heads as kernel_heads
from flashtalk_cli.models.kernels.ops import FUSED
from flashtalk_cli.models.token_ops import PLAIN
from flashtalk_cli.models.vae import Vae, VaeParams
from flashtalk_cli.parallel.sequence import Sequence
from flashtalk_cli.parallel.spatial import WHOLE, Border, Tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((1, 5, 48), (2, 3, 130))  # videos, tokens, channels
EPS = 1e-6
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is given to write is full of NaN before."""

    def full(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: made(*args, **kwargs).fill_(float("nan"))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, full(getattr(owner, name)))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def assert_near_e4m3(ours: Tensor, theirs: Tensor, slack: Tensor | float = 0.0, apart: float = 0.1) -> None:
    """Up to a rounding, and `slack`; the same but for a share of `apart`."""
    assert ours.dtype == theirs.dtype == torch.float8_e4m3fn
    assert ours.shape == theirs.shape
    a, b = ours.float(), theirs.float()
    # Triton's interpreter (3.9) forgets to carry where e4m3 rounds up to a power of two: 1.97 becomes 1.
    odd = (a.frexp().mantissa.abs() != 0.5) & (b.frexp().mantissa.abs() != 0.5)
    known = odd if INTERPRETED else torch.ones_like(odd)
    assert ((a - b).abs() <= b.abs() / 7 + 2**-9 + slack)[known].all()
    assert (a != b)[known].float().mean() < apart  # where the numbers before were on both sides of a half


def assert_near(ours: Tensor | Rows, theirs: Tensor | Rows, rounding: float | None = None) -> None:
    """Equal up to a rounding of the dtype; of e4m3 numbers, up to one where the float32 ones differ by theirs."""
    if isinstance(ours, Rows) and isinstance(theirs, Rows):
        torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-2, atol=0)
        assert_near_e4m3(ours.values, theirs.values)
        return
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    assert ours.dtype == theirs.dtype
    rounding = rounding or {torch.float32: 2e-5, torch.bfloat16: 2**-7}[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * float(theirs.float().std()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantise", [False, True])
@torch.no_grad()
def test_norm_of_each_video_by_its_own_vectors(size: tuple, dtype: torch.dtype, quantise: bool) -> None:
    b, n, dim = size
    x = draw(b, n, dim, dtype=dtype) + 3
    for videos in {1, b}:
        weight, bias = draw(videos, 6, dim)[:, 2:3], draw(videos, 6, dim)[:, 4:5]  # chunks of one tensor
        if videos == 1:
            weight, bias = weight.flatten().to(dtype), bias.flatten().to(dtype)
        result = FUSED.norm(x, weight, bias, EPS, quantise=quantise)
        assert_near(result, PLAIN.norm(x, weight, bias, EPS, quantise=quantise))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_what_a_video_has_one_vector_of(dtype: torch.dtype) -> None:
    """A product in float32 with weights of any dtype; a block's modulation, and how long its tokens can be."""
    layer = nn.Linear(530, 37).to(DEVICE, dtype)
    x = draw(3, 530)
    assert_near(FUSED.linear_float32(layer, x), PLAIN.linear_float32(layer, x))
    own, time = draw(1, 6, 130, dtype=dtype), draw(3, 12, 130)[:, 6:]
    for reach in (False, True):
        (ours, longest), (theirs, expected) = (ops.modulate(own, time, reach=reach) for ops in (FUSED, PLAIN))
        assert_near(ours, theirs)
        assert (longest is None) == (expected is None) == (not reach)
        if reach:
            assert_near(longest, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_sum_and_its_norm(size: tuple, dtype: torch.dtype, gated: bool) -> None:
    b, n, dim = size
    x, y = draw(b, n, dim, dtype=dtype), draw(b, n, dim, dtype=dtype)
    gate = draw(b, 6, dim)[:, 1:2] if gated else None
    before = x.clone()
    assert_near(FUSED.add(x, y, gate), PLAIN.add(x, y, gate))
    weight, bias = draw(1, 1, dim), draw(1, 1, dim)
    for quantise in (False, True):
        total, normal = FUSED.add_norm(x, y, gate, weight, bias, EPS, quantise=quantise)
        assert_near(total, PLAIN.add(x, y, gate))
        assert_near(normal, PLAIN.norm(total, weight, bias, EPS, quantise=quantise))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("b", "grid", "heads", "head_dim"), [(1, (2, 3, 2), 3, 16), (2, (3, 1, 3), 5, 22)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_norm_and_rotation(b: int, grid: tuple, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    n, dim = grid[0] * grid[1] * grid[2], heads * head_dim
    table = rope.rotation_table(grid, head_dim, DEVICE)
    q, k = draw(b, n, 2 * dim, dtype=dtype).chunk(2, dim=-1)  # as one product for both leaves them
    weight = draw(dim, dtype=dtype)
    for x in (q, k, q.contiguous()):
        ours = FUSED.rms_rotate(x, weight, table, head_dim, EPS)
        assert ours.is_contiguous()
        assert_near(ours, PLAIN.rms_rotate(x, weight, table, head_dim, EPS))


@pytest.mark.parametrize(("b", "groups"), [(1, 2), (2, 3), (2, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_rows_in_groups_of_heads(b: int, groups: int, dtype: torch.dtype) -> None:
    """Normed and turned, copied, joined and quantised: to and from what ranks exchange, group by group."""
    grid, heads, head_dim = (2, 1, 3), 6, 22
    n, dim = 6, heads * head_dim
    table, weight = rope.rotation_table(grid, head_dim, DEVICE), draw(dim, dtype=dtype)
    x = draw(b, n, 3 * dim, dtype=dtype)[..., dim : 2 * dim]
    rooms = [torch.empty(groups, b, n, 3, dim // groups, dtype=dtype, device=DEVICE) for _ in range(2)]
    views = [rearrange(room, "u b n three c -> b n three u c").unbind(2) for room in rooms]
    for ops, (q, v, other) in zip((FUSED, PLAIN), views, strict=True):
        ops.rms_rotate(x, weight, table, head_dim, EPS, q)
        ops.place(x, v)
        assert other.isnan().all()
    ours, theirs = views
    assert_near(ours[0], theirs[0])
    assert torch.equal(ours[1].flatten(2), x)
    assert torch.equal(FUSED.place(ours[1], torch.empty_like(ours[1].flatten(2))), x)
    assert_near(FUSED.rows(ours[0]), PLAIN.rows(ours[0]))


@pytest.mark.parametrize(
    ("heads", "keys", "width", "dim"), [(3, 5, 12, 40), (2, 32, 64, 130), (1, 32, 128, 272), (2, 67, 24, 48)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_attention_to_speech(heads: int, keys: int, width: int, dim: int, dtype: torch.dtype) -> None:
    """Folding of a slice of wider keys, by a weight either way round; and the softmax over each head's keys."""
    frames, tokens = 2, 7
    x = draw(frames, keys, 2, heads, width, dtype=dtype)[:, :, 1]
    weight, bias = draw(heads, width, dim, dtype=dtype), draw(dim, dtype=dtype)
    if not (INTERPRETED and dtype == torch.bfloat16):  # whose products the interpreter makes of the bits
        for w in (weight, weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
            for b in (None, bias):
                assert_near(FUSED.fold(x, w, b), PLAIN.fold(x, w, b))
            bounds, exact = FoldBounds.of(w, w, bias), (x.float(), w.float())  # nothing rounded on the way
            scales = bounds.of_keys(x)
            assert_near(FUSED.fold_keys(x, w, scales), PLAIN.fold_keys(*exact, scales))
            scales = bounds.of_values(x)
            assert_near(
                FUSED.fold_values(x, w, bias, scales), PLAIN.fold_values(*exact, bias.float(), scales)
            )
    scores, owed = (
        draw(frames, tokens, heads * keys, dtype=dtype, scale=3),
        draw(frames, heads, keys, dtype=dtype),
    )
    assert_near(FUSED.softmax(scores.clone(), owed, 0.3), PLAIN.softmax(scores.clone(), owed, 0.3))
    for skipped in (0, 3):  # tokens of the first frame that another rank has
        run = scores.flatten(0, 1)[skipped:].contiguous()
        ours, plain = (ops.softmax_rows(run, owed, 0.3, tokens, skipped) for ops in (FUSED, PLAIN))
        assert torch.equal(ours.scales, plain.scales)
        assert_near(ours, plain)


@pytest.mark.parametrize("runs", [(7, 32, 32, 1), (16,), (5, 300)])
@torch.no_grad()
def test_products_by_groups_in_eight_bits(runs: tuple[int, ...]) -> None:
    """Runs of any lengths, each by a weight of its own, against the same numbers in float32."""
    x = fp8.quantise_rows(draw(sum(runs), 64))
    weight = fp8.quantise_rows(draw(len(runs), 48, 64))
    expected = torch.cat(
        [
            part @ one.T
            for part, one in zip(x.in_float32().split(list(runs)), weight.in_float32(), strict=True)
        ]
    )
    found = fp8.grouped(x, weight, fp8.Runs.of(runs, DEVICE), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert_near(found.float(), expected, 2**-6)  # bfloat16, and sums of fewer bits


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "text", "times", "image"),
    [
        (130, 2, 22, 3, 1, 65),
        (5, 3, 64, 65, 400, 1),
        (129, 1, 128, 1, 7, 257),
        (333, 3, 128, 64, 449, 257),
        (130, 1, 64, 17, 2, 511),
        (40, 2, 128, 300, 1, 257),
    ],
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("quantise", [False, True])
@torch.no_grad()
def test_attention_to_prompt_and_picture(
    tokens: int,
    heads: int,
    width: int,
    text: int,
    times: int,
    image: int,
    dtype: torch.dtype,
    quantise: bool,
) -> None:
    """Keys beyond a block, one key, an empty row that counts often, slices of wider tensors, queries of any length.

    Keys of half precision are held while queries go by, as far as there is room: the last size is beyond it.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter makes products of bfloat16's bits")
    q = draw(2, tokens, 2, heads, width, dtype=dtype, scale=3)[:, :, 1]
    k, v = draw(2, text, heads, 2 * width, dtype=dtype, scale=2).chunk(2, dim=-1)
    prompt, picture = PromptKeys(k, v, times), KeyValue(*draw(2, 2, image, heads, width, dtype=dtype))
    scale = (v.abs().amax((1, 2, 3)) + picture.v.abs().amax((1, 2, 3))).float() / fp8.LARGEST
    ours = FUSED.cross_attention(q, EPS, CrossKeys(prompt, picture, scale), SDPA, quantise=quantise)
    exact = CrossKeys(PromptKeys(k.float(), v.float(), times), KeyValue(*(x.float() for x in picture)), scale)
    expected = PLAIN.cross_attention(q.float(), EPS, exact, SDPA, quantise=quantise)
    rounding = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    if quantise:
        assert isinstance(ours, Rows)
        assert ours.values.shape == (2, tokens, heads * width)
        assert torch.equal(ours.scales, expected.scales)
        off = rounding * expected.in_float32().std() / scale
        apart = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
        assert_near_e4m3(ours.values, expected.values, off[:, None, None], apart)
        return
    assert ours.shape == (2, tokens, heads * width)
    assert_near(ours, expected.to(dtype), rounding)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_rows_in_eight_bits(size: tuple, dtype: torch.dtype) -> None:
    x = draw(*size, dtype=dtype) * torch.logspace(-6, 6, size[1], device=DEVICE)[:, None].to(dtype)
    x[0, 0] = 0
    assert_near(FUSED.rows(x), PLAIN.rows(x))
    layer = nn.Linear(size[2], 80).to(DEVICE, dtype)
    given = draw(*size, dtype=dtype)
    assert_near(FUSED.gelu(layer, given, quantise=True), PLAIN.gelu(layer, given, quantise=True))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_gelu_of_a_layer(dtype: torch.dtype) -> None:
    """On a CPU torch's fused form is the other GELU, so only a GPU can show this one."""
    layer, x = nn.Linear(64, 128).to(DEVICE, dtype), draw(2, 24, 64, dtype=dtype)
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("needs a CUDA device")
    assert_near(FUSED.gelu(layer, x), PLAIN.gelu(layer, x))


def exchanged(b: int, n: int, groups: int, channels: int) -> tuple[Tensor, list[Tensor]]:
    """What ranks exchange, in e4m3, and its q, k and v [B, n, groups, channels of a group]."""
    room = torch.empty(groups, b, n, 3, channels, dtype=torch.float8_e4m3fn, device=DEVICE)
    return room, list(rearrange(room, "u b n three c -> three b n u c").unbind(0))


# Videos, tokens, groups, heads of a group, head_dim. Heads of 16, 32, 64 and 128 channels are mixed.
HEADS = [(1, 67, 1, 9, 16), (2, 35, 3, 1, 22), (2, 5, 2, 6, 32), (1, 33, 5, 2, 64), (1, 19, 2, 20, 128)]


@pytest.mark.parametrize(("b", "n", "groups", "heads", "width"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_heads_normed_turned_and_mixed_in_eight_bits(
    monkeypatch: pytest.MonkeyPatch, b: int, n: int, groups: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    """Slices of wider rows; each video by its own scales, and all by the same; alone, and into what is exchanged.

    By as few programs as on one multiprocessor: so each takes one block of tokens after another.
    """
    monkeypatch.setattr(kernel_heads, "machine", lambda device: (1, 0))
    mixed = hadamard(width, DEVICE, dtype) is not None
    assert mixed == (width != 22)
    if INTERPRETED and dtype == torch.bfloat16 and mixed:
        pytest.skip("the interpreter makes products of bfloat16's bits")
    dim = groups * heads * width
    x = draw(b, n, 3 * dim, dtype=dtype)[..., dim : 2 * dim]
    x[0, 0, 1:] = 0  # the whole norm in one channel
    weight, table = draw(dim, dtype=dtype), rope.rotation_table((1, n, 1), width, DEVICE)
    for videos in {1, b}:
        scales = normed_scales(weight, groups * heads) * draw(2, videos, groups * heads).exp()[1]
        expected = PLAIN.rms_rotate(x, weight, table, width, EPS, scales=scales)
        assert expected.shape == x.shape
        assert not expected.float().isnan().any()
        ours = FUSED.rms_rotate(x, weight, table, width, EPS, scales=scales)
        assert ours.is_contiguous()
        # What bfloat16 rounds the other way before, mixing spreads over the head, whose length it keeps.
        length = expected.float().unflatten(-1, (-1, width)).norm(dim=-1).repeat_interleave(width, -1)
        slack, apart = (2**-8 * length, 0.15) if dtype == torch.bfloat16 else (0.0, 0.1)
        assert_near_e4m3(ours, expected, slack, apart)
        places = [exchanged(b, n, groups, heads * width) for _ in range(2)]
        for ops, (_, (q, k, v)) in zip((FUSED, PLAIN), places, strict=True):
            assert ops.rms_rotate(x, weight, table, width, EPS, k, scales) is k
            assert q.float().isnan().all()
            assert v.float().isnan().all()
            assert_near_e4m3(k.flatten(2), expected, slack, apart)


@pytest.mark.parametrize(("b", "n", "groups", "heads", "width"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_heads_in_eight_bits(b: int, n: int, groups: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """Heads of very different size, one of them zero; what is beyond the largest number becomes that."""
    dim = groups * heads * width
    sizes = torch.logspace(-4, 4, groups * heads, device=DEVICE).repeat_interleave(width).to(dtype)
    x = (draw(b, n, 3 * dim, dtype=dtype) * sizes.repeat(3))[..., dim : 2 * dim]
    x[..., :width] = 0
    for videos in {1, b}:
        peaks = x.float().abs().unflatten(-1, (groups * heads, width)).amax((1, 3))[:videos]
        scales = peaks.clamp_min(fp8.SMALLEST_PEAK) / fp8.LARGEST
        scales[:, -1] /= 3
        expected = PLAIN.place(x, scales=scales)
        assert expected.float().abs().amax() == fp8.LARGEST
        ours = FUSED.place(x, None, scales)
        assert ours.is_contiguous()
        assert_near_e4m3(ours, expected)
        loud = x.float().abs() > fp8.LARGEST * scales.repeat_interleave(width, 1)[:, None]
        assert loud.any()
        assert (ours.float()[loud] == x.float()[loud].sign() * fp8.LARGEST).all()
        places = [exchanged(b, n, groups, heads * width) for _ in range(2)]
        for ops, (_, (q, k, v)) in zip((FUSED, PLAIN), places, strict=True):
            assert ops.place(x, v, scales) is v
            assert q.float().isnan().all()
            assert k.float().isnan().all()
            assert_near_e4m3(v.flatten(2), expected)


@torch.no_grad()
def test_a_layer_in_eight_bits() -> None:
    """Parity with the layer it was made of, within what e4m3 numbers leave; and with its own numbers."""
    layer, x = nn.Linear(64, 96).to(DEVICE, torch.bfloat16), draw(2, 32, 64, dtype=torch.bfloat16)
    small = fp8.Fp8Linear(layer.weight, layer.bias, torch.bfloat16)
    rows = PLAIN.rows(x)
    exact = rows.in_float32() @ (small.weight.float() * small.scale).T + small.bias.float()
    assert_near(small(rows), exact.bfloat16())
    assert (small(rows).float() - layer(x).float()).norm() < 0.05 * layer(x).float().norm()


@pytest.mark.parametrize("videos", [1, 3])
@pytest.mark.parametrize("arranged", [True, False])  # as loaded, and as while training
@torch.no_grad()
def test_a_whole_network(videos: int, arranged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity: velocities of one video and of three, each at its own time, with every kernel and without one."""
    torch.manual_seed(0)
    sizes = DitParams(
        dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=4,
        intermediate_dim=8, output_dim=8, context_tokens=2, audio_layers=2, audio_dim=6, image_dim=10,
    )  # fmt: skip
    dit = DiT(sizes).eval().to(DEVICE)
    for weight in dit.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    if arranged:
        dit.arrange(eight_bits=False)
    context = dit.condition(draw(videos, 3, 8), draw(videos, 5, 10))
    heard = dit.hear(draw(videos, 9, 5, 2, 6))
    x, y = draw(videos, 16, 3, 4, 6), draw(videos, 20, 3, 4, 6)
    t = torch.linspace(100, 900, videos, device=DEVICE)
    velocities = []
    for ops in (FUSED, PLAIN):
        monkeypatch.setattr(dit_module, "token_ops", lambda _, ops=ops: ops)
        velocities.append(dit(x, t, y, context, heard, Sequence()))
    torch.testing.assert_close(*velocities, rtol=1e-3, atol=1e-3 * float(velocities[1].std()))


# The VAE's passes between convolutions


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fused way on this device too."""
    monkeypatch.setattr(vae_blocks, "fused", lambda x: not torch.is_grad_enabled())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("frames", "first"), [(1, True), (1, False), (4, False)])
@torch.no_grad()
def test_norm_and_stacking(dtype: torch.dtype, frames: int, first: bool) -> None:
    x, channels = draw(2, frames, 3, 5, 12, dtype=dtype), 12
    norm, bias = vae_blocks.RmsNorm(channels).to(DEVICE, dtype), draw(channels, dtype=dtype)
    norm.gamma.data = draw(*norm.gamma.shape, dtype=dtype)
    past = None if first else draw(2, 2, 3, 5, channels, dtype=dtype)
    for owed in (None, bias):
        y = x if owed is None else (x.float() + bias.float())
        normal = torch.nn.functional.rms_norm(y.float(), (channels,), norm.gamma.flatten().float(), eps=1e-24)
        expected, kept = vae_blocks.with_past(torch.nn.functional.silu(normal).to(dtype), past)
        for room in ((0, 0), (1, 1), (0, 1), (2, 1)):
            ours, ours_kept = kernel_frames.norm_stack(x, owed, norm.gamma.flatten(), past, room)
            assert_near(ours, F.pad(vae_blocks.stack_frames(expected), (0, 0, *room, *room)))
            assert_near(ours_kept, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_bias_that_is_owed(dtype: torch.dtype) -> None:
    y, x, bias = draw(1, 2, 3, 5, 12, dtype=dtype), draw(1, 2, 3, 5, 12, dtype=dtype), draw(12, dtype=dtype)
    expected = (y.float() + x.float() + bias.float()).to(dtype)
    assert_near(kernel_frames.add_bias(y, bias, x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_doubled_pixels(dtype: torch.dtype) -> None:
    """Parity of the whole up-convolution with the picture repeated and convolved."""
    conv, x = vae_blocks.UpConv(10, 6, (3, 3)).to(DEVICE, dtype), draw(2, 2, 3, 5, 10, dtype=dtype)
    corners, bias = draw(2, 2, 4, 6, 24, dtype=dtype), conv.bias
    pixels = corners.unflatten(-1, (2, 2, 6)).permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 2, 8, 12, 6)
    expected = (pixels[:, :, 1:-1, 1:-1].float() + bias.float()).to(dtype)
    assert_near(kernel_frames.interleave(corners, bias), expected)
    assert conv(x, WHOLE).shape == (2, 2, 6, 10, 6)


class Framed(Tiles):
    """Whole frames, handled as a tile of a grid is: with room around them, which is zero where nobody fills it."""

    def halo(self, x: Tensor, before: int, after: int) -> tuple[Tensor, Border]:
        return F.pad(x, (0, 0, before, after, before, after)), (0, 0)

    def room(self, before: int, after: int) -> Border:
        return before, after


@pytest.mark.parametrize("tiles", [WHOLE, Framed()], ids=["whole", "framed"])
def test_a_whole_decoder(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    """Parity: decoded with every kernel and without one, in float32, in pieces of time."""
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # 10 bits, which torch lets convolutions have
    torch.manual_seed(0)
    vae = Vae(VaeParams(dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1)).eval().to(DEVICE)
    latents = draw(1, 16, 2, 1, 1)
    expected, _ = vae.decode(latents)  # with gradients, so plainly
    state, video = None, []
    with torch.no_grad():
        for piece in latents.split(1, dim=2):
            frames, state = vae.decode(piece, state, tiles)
            video.append(frames)
    torch.testing.assert_close(torch.cat(video, dim=2), expected.detach(), rtol=1e-3, atol=1e-4)
