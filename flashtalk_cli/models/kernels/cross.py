"""Attention to the prompt and to the picture, summed: few keys, and queries read once for both.

Queries come as a product left them, and not normed: a token's scores are divided by what its queries would be, one
number for all heads, and no normed queries are written. In eight bits the result is written under a scale that the
values give beforehand, since no mean of them is larger than they are.

A library's kernel takes one set of keys, and pads 257 of them to 352. It also takes every empty row of a prompt
by itself, of which there are hundreds: here they are one key that counts so many times (see PromptKeys).

All keys and values of a head fit into a multiprocessor's shared memory, if they are as few as the released model's
(64 rows of a prompt, 257 of a picture): so a program loads them once, by the copy engine, and takes one block of
queries of that head after another. More keys are taken piece by piece for every block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashtalk_cli.models.attention import CrossKeys
from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK, Rows
from flashtalk_cli.models.kernels.rows import inverse_rms

# By bytes a number: tokens of a program, and keys that it takes at once. In float32 no tensor core multiplies, and
# the larger tiles would need 7 kB a thread beyond its registers.
TILES = {2: (128, 64), 4: (64, 16)}
WARPS, STAGES = 8, 3
# Where keys are held: those of the picture come in pieces, the last of which is as wide as it must be. A block's sums
# and a piece's scores, weights and addresses have to share a thread's registers.
HELD_TOKENS, HELD_WARPS, HELD_STAGES, PIECE = 128, 8, 1, 64
HOPPER = (132, 227 * 1024)  # multiprocessors, and bytes of shared memory that a program may have there
OWN = 2048  # bytes of them that are Triton's


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    n_keys,
    key_step,
    value_step,
    scale,
    last,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """softmax(q k^T scale, and `last` on the last key, as powers of two) v: float32 [TOKENS, WIDE].

    scale: of each token.
    """
    channel = tl.arange(0, WIDE)
    peak = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    out = tl.zeros((TOKENS, WIDE), tl.float32)
    for first in range(0, n_keys, KEYS):
        key = first + tl.arange(0, KEYS)
        there = (key < n_keys)[:, None] & (channel < WIDTH)[None, :]
        k = tl.load(keys + key[:, None] * key_step + channel[None, :], there, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale[:, None]
        score += tl.where(key == n_keys - 1, last, 0.0)[None, :]
        score = tl.where((key < n_keys)[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        kept = tl.exp2(peak - higher)
        v = tl.load(values + key[:, None] * value_step + channel[None, :], there, other=0.0)
        out = out * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        peak = higher
    return out * (1 / total)[:, None]


@triton.jit
def _cross(  # type: ignore[no-untyped-def]
    x,
    text_k,
    text_v,
    image_k,
    image_v,
    out,
    n_tokens,
    n_text,
    n_image,
    x_steps,
    text_k_steps,
    text_v_steps,
    image_k_steps,
    image_v_steps,
    norms,
    scale,
    last,
    out_scale,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Tokens of a head. Steps go from a video, a token and a head to the next. Grid (tokens, heads, videos)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head, video, channel = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.arange(0, WIDE)
    there = (token < n_tokens)[:, None] & (channel < WIDTH)[None, :]
    at = video * x_steps[0] + head * x_steps[2] + token[:, None] * x_steps[1] + channel[None, :]
    q = tl.load(x + at, there, other=0.0)
    scale *= tl.load(norms + video * n_tokens + token, token < n_tokens, other=0.0)
    text_k += video * text_k_steps[0] + head * text_k_steps[2]
    text_v += video * text_v_steps[0] + head * text_v_steps[2]
    image_k += video * image_k_steps[0] + head * image_k_steps[2]
    image_v += video * image_v_steps[0] + head * image_v_steps[2]
    said = _attend(
        q, text_k, text_v, n_text, text_k_steps[1], text_v_steps[1], scale, last, WIDTH, WIDE, TOKENS, KEYS
    )
    seen = _attend(
        q,
        image_k,
        image_v,
        n_image,
        image_k_steps[1],
        image_v_steps[1],
        scale,
        0.0,
        WIDTH,
        WIDE,
        TOKENS,
        KEYS,
    )
    to = ((video * n_tokens + token) * tl.num_programs(1) + head)[:, None] * WIDTH + channel[None, :]
    value = _quantised(said + seen, out_scale, video, QUANTISE, LARGEST, SMALLEST)
    tl.store(out + to, value.to(out.dtype.element_ty), there)


@triton.jit
def _quantised(  # type: ignore[no-untyped-def]
    value, scale, video, QUANTISE: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr
):
    """Over the video's scale, where it is to be e4m3."""
    if QUANTISE:
        inverse = 1 / tl.maximum(tl.load(scale + video), SMALLEST)
        value = tl.clamp(value * inverse, -LARGEST, LARGEST)
    return value


@triton.jit
def _load(x, video, first, head, ROWS: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a head from `first` on: [ROWS, WIDE], zeros where there are none."""
    return tl.reshape(x.load([video, head, first, 0]), (ROWS, WIDE))


@triton.jit
def _hold(  # type: ignore[no-untyped-def]
    x, last, video, head, WIDE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, REST: tl.constexpr
):
    """All rows of a head: so many pieces, and REST by what loads fewer."""
    held = ()
    for index in tl.static_range(PIECES):
        held = held + (_load(x, video, index * PIECE, head, PIECE, WIDE),)  # type: ignore[assignment]  # noqa: RUF005
    if REST:
        held = held + (_load(last, video, PIECES * PIECE, head, REST, WIDE),)  # type: ignore[assignment]  # noqa: RUF005
    return held


@triton.jit
def _seen(q, ks, vs, n_keys, scale, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """softmax(q k^T scale) v of pieces of keys and values, a scale a token: float32 [tokens, WIDE]."""
    for index in tl.static_range(len(ks)):
        score = tl.dot(q, tl.trans(ks[index]), input_precision="ieee")
        if index == len(ks) - 1:
            key = index * PIECE + tl.arange(0, score.shape[1])
            score = tl.where((key < n_keys)[None, :], score, float("-inf"))
        if index == 0:
            peak = tl.max(score, 1) * scale
            weight = tl.exp2(score * scale[:, None] - peak[:, None])
            total = tl.sum(weight, 1)
            out = tl.dot(weight.to(vs[0].dtype), vs[0], input_precision="ieee")
        else:
            higher = tl.maximum(peak, tl.max(score, 1) * scale)
            weight = tl.exp2(score * scale[:, None] - higher[:, None])
            kept = tl.exp2(peak - higher)
            total = total * kept + tl.sum(weight, 1)
            out = tl.dot(weight.to(vs[0].dtype), vs[index], out * kept[:, None], input_precision="ieee")
            peak = higher
    return out * (1 / total)[:, None]


@triton.jit
def _said(q, ks, vs, out, n_keys, scale, last, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of the prompt, added to `out`: divided by its sum before its products, not after."""
    scores = ()
    for index in tl.static_range(len(ks)):
        key = index * PIECE + tl.arange(0, ks[index].shape[0])
        owed = tl.where(key == n_keys - 1, last, tl.where(key < n_keys, 0.0, float("-inf")))
        score = tl.dot(q, tl.trans(ks[index]), input_precision="ieee") * scale[:, None] + owed[None, :]
        scores = scores + (score,)  # type: ignore[assignment]  # noqa: RUF005
    peak = tl.max(scores[0], 1)  # type: ignore[misc]
    for index in tl.static_range(1, len(scores)):
        peak = tl.maximum(peak, tl.max(scores[index], 1))
    weights = ()
    total = tl.zeros_like(peak)
    for index in tl.static_range(len(scores)):
        weight = tl.exp2(scores[index] - peak[:, None])
        total += tl.sum(weight, 1)
        weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
    inverse = 1 / total
    for index in tl.static_range(len(weights)):
        weight = (weights[index] * inverse[:, None]).to(vs[0].dtype)
        out = tl.dot(weight, vs[index], out, input_precision="ieee")
    return out


@triton.jit
def _cross_held(  # type: ignore[no-untyped-def]
    x,
    text_k,
    text_v,
    image_k,
    image_v,
    out,
    text_rest_k,
    text_rest_v,
    image_rest_k,
    image_rest_v,
    norms,
    n_tokens,
    n_text,
    n_image,
    scale,
    last,
    out_scale,
    heads,
    blocks,
    run,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    PIECE: tl.constexpr,
    TEXT_PIECES: tl.constexpr,
    TEXT_REST: tl.constexpr,
    PIECES: tl.constexpr,
    REST: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """`run` blocks of tokens, all of a head before those of the next. Grid (runs, videos).

    Tensors come as descriptors of their tiles.
    """
    video, begin = tl.program_id(1), tl.program_id(0) * run
    end = tl.minimum(begin + run, blocks * heads)
    for head in range(begin // blocks, tl.cdiv(end, blocks)):
        said_k = _hold(text_k, text_rest_k, video, head, WIDE, PIECE, TEXT_PIECES, TEXT_REST)
        said_v = _hold(text_v, text_rest_v, video, head, WIDE, PIECE, TEXT_PIECES, TEXT_REST)
        seen_k = _hold(image_k, image_rest_k, video, head, WIDE, PIECE, PIECES, REST)
        seen_v = _hold(image_v, image_rest_v, video, head, WIDE, PIECE, PIECES, REST)
        start = tl.maximum(begin - head * blocks, 0)
        stop = tl.minimum(end - head * blocks, blocks)
        for block in range(start, stop):
            q = _load(x, video, block * TOKENS, head, TOKENS, WIDE)
            token = block * TOKENS + tl.arange(0, TOKENS)
            normed = scale * tl.load(norms + video * n_tokens + token, token < n_tokens, other=0.0)
            value = _seen(q, seen_k, seen_v, n_image, normed, PIECE)
            value = _said(q, said_k, said_v, value, n_text, normed, last, PIECE)
            value = _quantised(value, out_scale, video, QUANTISE, LARGEST, SMALLEST)
            done = tl.reshape(value.to(out.dtype), (1, 1, TOKENS, WIDE))
            out.store([video, head, block * TOKENS, 0], done)


def attention(q: Tensor, eps: float, keys: CrossKeys, quantise: bool) -> Tensor | Rows:
    """Of q [B, n, heads, head_dim], of any strides but the last: [B, n, heads * head_dim]; see `TokenOps`."""
    videos, n_tokens, heads, width = q.shape
    given = (q, keys.text.k, keys.text.v, *keys.image)
    assert all(x.stride(3) == 1 for x in given), [x.stride() for x in given]
    dtype = torch.float8_e4m3fn if quantise else q.dtype
    out = torch.empty(videos, n_tokens, heads * width, dtype=dtype, device=q.device)
    norms = inverse_rms(q, eps)
    if not _attention_held(q, norms, keys, out):
        tokens, some = TILES[q.element_size()]
        _cross[(triton.cdiv(n_tokens, tokens), heads, videos)](
            *given,
            out,
            *(n_tokens, keys.text.k.shape[1], keys.image.k.shape[1]),
            *(x.stride()[:3] for x in given),
            *(norms, width**-0.5 * math.log2(math.e), math.log2(keys.text.times), keys.scale),
            *(width, padded(width), tokens, some, quantise, LARGEST, SMALLEST_PEAK),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    if quantise:
        return Rows(out, keys.scale[:, None, None].expand(videos, n_tokens, 1).contiguous())
    return out


def _attention_held(q: Tensor, norms: Tensor, keys: CrossKeys, out: Tensor) -> bool:
    """The same where all keys of a head are held; whether they could be."""
    videos, n_tokens, heads, width = q.shape
    text, image = keys.text, keys.image
    wide, lengths = padded(width), (text.k.shape[1], image.k.shape[1])
    pieces, rests = zip(*(_cut(n) for n in lengths), strict=True)
    used = (2 * (sum(pieces) * PIECE + sum(rests)) + HELD_TOKENS) * wide * q.itemsize
    given = (q, text.k, text.v, *image)
    starts = (x.data_ptr() for x in given)
    steps = (n * x.itemsize for x in (*given, out.view(q.shape)) for n in x.stride()[:3])
    processors, room = machine(q.device)
    if (
        q.itemsize != 2
        or used > room - OWN
        or lengths[0] > 2 * PIECE
        or any(n % 16 for n in (*starts, *steps))
    ):
        return False
    blocks = triton.cdiv(n_tokens, HELD_TOKENS)
    run = triton.cdiv(blocks * heads, max(1, processors // videos))
    _cross_held[(triton.cdiv(blocks * heads, run), videos)](
        _tiles(q, HELD_TOKENS, wide),
        *(_tiles(x, PIECE, wide) for x in given[1:]),
        _tiles(out.view(q.shape), HELD_TOKENS, wide),
        *(
            _tiles(x, max(rest, 16), wide)
            for kv, rest in zip((text[:2], image), rests, strict=True)
            for x in kv
        ),
        *(norms, n_tokens, *lengths),
        *(width**-0.5 * math.log2(math.e), math.log2(text.times), keys.scale, heads, blocks, run),
        *(wide, HELD_TOKENS, PIECE, pieces[0], rests[0], pieces[1], rests[1]),
        *(out.dtype != q.dtype, LARGEST, SMALLEST_PEAK),
        num_warps=HELD_WARPS,
        num_stages=HELD_STAGES,
    )
    return True


def _cut(n: int) -> tuple[int, int]:
    """Whole pieces of n keys, and what is loaded for the rest of them."""
    pieces, rest = divmod(n, PIECE)
    return pieces, padded(rest) if rest else 0


def _tiles(x: Tensor, rows: int, wide: int) -> TensorDescriptor:
    """x [B, n, heads, head_dim], to be taken or given as [1, 1, rows, wide] of a video and a head."""
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, wide])


def padded(n: int) -> int:
    """What a product of tiles takes at least."""
    return max(16, triton.next_power_of_2(n))


def machine(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, on each of which one such program runs, and the bytes of shared memory that it may have."""
    if device.type != "cuda":  # interpreted, or compiled only
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    if found.major != 9:  # measured on Hopper; elsewhere descriptors are served in other ways
        return found.multi_processor_count, 0
    return found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", HOPPER[1])
