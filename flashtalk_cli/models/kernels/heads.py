"""Queries, keys and values in e4m3, under scales that are known before; see models/attention_fp8.py.

Queries and keys: a program stays on its multiprocessor and takes one block of tokens after another, whole rows of
them. A block is held in registers: squares are summed, and then tile of heads by tile it is turned, mixed by the
tensor cores and stored. The next blocks come into shared memory meanwhile. So memory is read once, and is always
being read. The norm is applied last, to what is stored.

The matrix of signs of twice the size is [H, H; H, -H]. Taken over the two numbers of a pair, that is the pair's sum and
its difference, each mixed with those of the other pairs by a matrix of half the size. A rotation by other angles gives
sum and difference at once: so that level of the matrix costs nothing, and products are half as large.

Numbers stay bfloat16 until the tensor cores sum them, for a thread computes two such at once. Those roundings are a
tenth of e4m3's: its error on Gaussian data grows from 2.65 to 2.66 % (measured).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.models.attention_fp8 import hadamard
from flashtalk_cli.models.fp8 import LARGEST
from flashtalk_cli.models.kernels.cross import machine
from flashtalk_cli.models.kernels.rows import _grouped

# Queries and keys: tokens of a block, few enough for the registers of four warps; and, by bytes a number, heads of a
# tile, so many that each warp has rows of its own for the tensor cores, and blocks that are in registers or fetched.
# In float32 no tensor core multiplies, and the tiles would need more than there is.
TOKENS, TURNED_WARPS = 2, 4
TURNED_HEADS, STAGES = {2: 32, 4: 8}, {2: 3, 4: 1}
FEWEST = 8  # heads of a tile, for a product of tiles takes 16 rows; and to how many squares are added up in a thread
PROGRAMS, REGISTERS = 3, 168  # of a multiprocessor, and of a thread where so many programs share it
# Values: heads of a tile, and its numbers by bytes of one.
PLACED_HEADS, NUMBERS, WARPS = 8, {2: 8192, 4: 2048}, 8


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    value,
    inverse,
    first,
    end,
    out,
    left,
    row_step,
    group_step,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """A tile [heads from `first` to before `end` x tokens, channels], each row times its `inverse`, as e4m3.

    Heads lie in groups of GROUP, group_step apart. `left`: tokens that there are from the tile's first on. WHOLE: a
    tile has no heads and channels but those that there are.
    """
    row, channel = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    head, token = first + row // TOKENS, row % TOKENS
    value = tl.clamp(value.to(tl.float32) * inverse[:, None], -LARGEST, LARGEST)
    to = head * WIDTH
    if GROUP < HEADS:
        to = (head // GROUP).to(tl.int64) * group_step + head % GROUP * WIDTH
    inside = (token < left)[:, None]
    if not WHOLE:
        inside = inside & (head < end)[:, None] & (channel < WIDTH)[None, :]
    at = (to + token * row_step)[:, None] + channel[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _tiles(  # type: ignore[no-untyped-def]
    x,
    rows,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TAKEN: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Of rows that begin at x + rows, tiles [heads, rows, channels], with zeros for what is not there.

    Each has TAKEN heads but for the first, which has what is left by those: it begins at FIRST, that is before 0.
    """
    channel, tiles = tl.arange(0, WIDE), ()
    for first in tl.static_range(FIRST, HEADS, TAKEN):
        head = max(first, 0) + tl.arange(0, TAKEN if first >= 0 else REST)
        at = (head * WIDTH)[:, None, None] + rows[None, :, None] + channel[None, None, :]
        if WHOLE:
            tile = tl.load(x + at)
        else:
            inside = (head < first + TAKEN)[:, None, None] & (channel < WIDTH)[None, None, :]
            tile = tl.load(x + at, inside, other=0.0)
        tiles = tiles + (tile.to(TYPE),)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _squares(x, FEWEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of [heads, tokens, channels], added up over those heads that are in a thread together: of FEWEST at most."""
    x = x * x
    for _ in tl.static_range(2):
        if x.shape[0] > FEWEST:
            x = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1], x.shape[2]))
            a, b = tl.split(tl.permute(x, (1, 2, 3, 0)))
            x = a + b
    return x


@triton.jit
def _turn(x, cos, sin, half, MIX: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs (2i, 2i + 1) of [heads, tokens, channels] turned, rounded, and with MIX mixed: [heads x tokens, channels].

    With MIX cos and sin are the angle's sum and difference of both, and half that matrix for sums and for differences.
    """
    ROWS: tl.constexpr = x.shape[0] * x.shape[1]
    PAIRS: tl.constexpr = x.shape[2] // 2
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], PAIRS, 2)))
    if MIX:
        more, less = (a * cos + b * sin).to(TYPE), (a * sin - b * cos).to(TYPE)
        a = tl.dot(tl.reshape(more, (ROWS, PAIRS)), half, input_precision="ieee")
        b = tl.dot(tl.reshape(less, (ROWS, PAIRS)), half, input_precision="ieee")
        turned = tl.join(a, b)
    else:
        turned = tl.join(a * cos - b * sin, a * sin + b * cos).to(TYPE)
    return tl.reshape(turned, (ROWS, 2 * PAIRS))


@triton.jit
def _rms_rotate_heads(  # type: ignore[no-untyped-def]
    x,
    weight,
    table,
    signs,
    scales,
    out,
    n_tokens,
    blocks,
    video_step,
    row_step,
    out_video_step,
    out_row_step,
    out_group_step,
    scale_step,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TAKEN: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
    FEWEST: tl.constexpr,
    MIX: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """RMS norm over the full width, pairs (2i, 2i + 1) turned, heads mixed, e4m3. Grid (programs, videos)."""
    TYPE: tl.constexpr = x.dtype.element_ty
    COMPUTED: tl.constexpr = TYPE if MIX and x.dtype.element_ty == tl.bfloat16 else tl.float32
    video = tl.program_id(1).to(tl.int64)
    x += video * video_step
    out += video * out_video_step
    scales += video * scale_step
    token, channel, pair = tl.arange(0, TOKENS), tl.arange(0, WIDE), tl.arange(0, WIDE // 2)
    half = None
    if MIX:
        there = (pair < WIDTH // 2)[:, None] & (pair < WIDTH // 2)[None, :]
        half = tl.load(signs + pair[:, None] * WIDTH + pair[None, :], there, other=0.0)
    row = tl.zeros((1,), tl.int32)  # of weights there is one
    weights, inverses = _tiles(weight, row, HEADS, WIDTH, WIDE, TAKEN, FIRST, REST, WHOLE, COMPUTED), ()
    for tile in tl.static_range(len(weights)):
        head = max(FIRST + tile * TAKEN, 0) + tl.arange(0, weights[tile].shape[0])
        scale = tl.load(scales + head, head < HEADS, other=1.0)
        inverses = inverses + ((WIDTH**-0.5 if MIX else 1.0) / scale,)  # type: ignore[assignment]  # noqa: RUF005
    far = tl.full((), TOKENS, tl.int64)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        begin, left = block * far, n_tokens - block * TOKENS
        here = tl.minimum(token, left - 1)  # where there is no token, the last once more
        tiles = _tiles(
            x + begin * row_step, here * row_step, HEADS, WIDTH, WIDE, TAKEN, FIRST, REST, WHOLE, COMPUTED
        )
        squares = _squares(tiles[0], FEWEST)
        for tile in tl.static_range(1, len(tiles)):
            squares += _squares(tiles[tile], FEWEST)
        norm = tl.rsqrt(tl.sum(tl.sum(squares.to(tl.float32), 2), 0) / (HEADS * WIDTH) + eps)
        at = (here * WIDTH)[None, :, None] + channel[None, None, :]
        angle = tl.load(table + begin * WIDTH + at, (channel < WIDTH)[None, None, :], other=0.0)
        cos, sin = tl.split(tl.reshape(angle, (1, TOKENS, WIDE // 2, 2)))
        if MIX:
            cos, sin = cos + sin, cos - sin
        cos, sin = cos.to(COMPUTED), sin.to(COMPUTED)
        for tile in tl.static_range(len(tiles)):
            value = _turn(tiles[tile] * weights[tile], cos, sin, half, MIX, TYPE)
            inverse = tl.reshape(inverses[tile][:, None] * norm[None, :], (value.shape[0],))
            _store(
                value, inverse, max(FIRST + tile * TAKEN, 0), FIRST + (tile + 1) * TAKEN, out + begin * out_row_step,
                left, out_row_step, out_group_step, HEADS, WIDTH, OUT_GROUP, TOKENS, WHOLE, LARGEST,
            )  # fmt: skip


@triton.jit
def _place_heads(  # type: ignore[no-untyped-def]
    x,
    scales,
    out,
    n_tokens,
    video_step,
    row_step,
    out_video_step,
    out_row_step,
    out_group_step,
    scale_step,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TAKEN: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Heads over their scales, as e4m3. Grid (blocks of tokens, tiles of heads, videos)."""
    video, begin = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * TOKENS
    left, first = n_tokens - tl.program_id(0) * TOKENS, tl.program_id(1) * TAKEN
    x += video * video_step + begin * row_step
    out += video * out_video_step + begin * out_row_step
    row, channel = tl.arange(0, TAKEN * TOKENS), tl.arange(0, WIDE)
    head, token = first + row // TOKENS, row % TOKENS
    inside = ((head < HEADS) & (token < left))[:, None] & (channel < WIDTH)[None, :]
    value = tl.load(x + (head * WIDTH + token * row_step)[:, None] + channel[None, :], inside, other=0.0)
    inverse = 1.0 / tl.load(scales + video * scale_step + head, head < HEADS, other=1.0)
    _store(
        value, inverse, first, HEADS, out, left, out_row_step, out_group_step,
        HEADS, WIDTH, OUT_GROUP, TOKENS, False, LARGEST,
    )  # fmt: skip


def rms_rotate(
    x: Tensor, weight: Tensor, table: Tensor, scales: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """RMS norm of x [B, n, dim] over its full width * weight [dim], each head's pairs turned and its channels mixed.

    table: float32 [n, head_dim / 2, 2], cosine and sine. scales: float32 [B or 1, heads]. Heads that have no
    matrix to be mixed by stay as they are. `out`, where given, may be [B, n, groups, channels of a group] and
    lie apart in all but the last.
    """
    videos, n_tokens, _ = x.shape
    heads, width = _widths(x, scales)
    assert width % 2 == 0, width
    assert x.dtype != torch.float16, "what is not normed yet may be beyond its range"
    signs = hadamard(width, x.device, x.dtype)
    out = _room(x) if out is None else out
    steps = (*x.stride()[:2], *_grouped(out).steps)
    taken = TURNED_HEADS[x.itemsize]
    assert taken <= 4 * FEWEST, "squares are halved twice"
    wide = max(32, triton.next_power_of_2(width))  # a product adds up 16 pairs or more
    over = heads % taken
    rest = max(FEWEST, triton.next_power_of_2(over))
    cut = (taken, over - taken if over else 0, rest, width == wide and over in (0, rest))
    blocks, (processors, _) = triton.cdiv(n_tokens, TOKENS), machine(x.device)
    programs = min(blocks, triton.cdiv(PROGRAMS * processors, videos))
    _rms_rotate_heads[(programs, videos)](
        *(x, weight, table.contiguous(), signs, scales, out),
        *(n_tokens, blocks, *steps, _scale_step(scales, videos), eps),
        *(heads, width, wide, _grouped(out).width // width, TOKENS, *cut),
        *(FEWEST, signs is not None, LARGEST),
        num_warps=TURNED_WARPS,
        num_stages=STAGES[x.itemsize],
        maxnreg=REGISTERS,
    )
    return out


def place(x: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """Each head of x [B, n, dim] over its scale, float32 [B or 1, heads]; `out` as in `rms_rotate`."""
    videos, n_tokens, _ = x.shape
    heads, width = _widths(x, scales)
    wide, taken = triton.next_power_of_2(width), min(PLACED_HEADS, triton.next_power_of_2(heads))
    tokens = max(NUMBERS[x.itemsize] // wide, 16) // taken
    out = _room(x) if out is None else out
    steps = (*x.stride()[:2], *_grouped(out).steps)
    _place_heads[(triton.cdiv(n_tokens, tokens), triton.cdiv(heads, taken), videos)](
        *(x, scales, out, n_tokens, *steps, _scale_step(scales, videos)),
        *(heads, width, wide, _grouped(out).width // width, tokens, taken, LARGEST),
        num_warps=WARPS,
    )
    return out


def _scale_step(scales: Tensor, videos: int) -> int:
    """How far apart the scales of two videos lie."""
    assert len(scales) in (1, videos), (scales.shape, videos)
    assert scales.stride(1) == 1, scales.stride()
    return scales.stride(0) if len(scales) > 1 else 0


def _room(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)


def _widths(x: Tensor, scales: Tensor) -> tuple[int, int]:
    """Heads, and channels of one."""
    heads, dim = scales.shape[-1], x.shape[2]
    assert x.stride(2) == 1, x.stride()
    assert dim % heads == 0, (dim, heads)
    return heads, dim // heads
