"""Attention to the prompt and to the picture, summed: few keys, and queries read once for both.

A library's kernel takes one set of keys, and pads 257 of them to 352. It also takes every empty row of a prompt
by itself, of which there are hundreds: here they are one key that counts so many times (see PromptKeys).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.models.attention import KeyValue, PromptKeys

# By bytes a number: tokens of a program, and keys that it takes at once. In float32 no tensor core multiplies, and
# the larger tiles would need 7 kB a thread beyond its registers.
TILES = {2: (128, 64), 4: (64, 16)}
WARPS = 8


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
    """softmax(q k^T scale, and `last` on the last key, as powers of two) v: float32 [TOKENS, WIDE]."""
    channel = tl.arange(0, WIDE)
    peak = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    out = tl.zeros((TOKENS, WIDE), tl.float32)
    for first in range(0, n_keys, KEYS):
        key = first + tl.arange(0, KEYS)
        there = (key < n_keys)[:, None] & (channel < WIDTH)[None, :]
        k = tl.load(keys + key[:, None] * key_step + channel[None, :], there, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
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
    scale,
    last,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Tokens of a head. Steps go from a video, a token and a head to the next. Grid (tokens, heads, videos)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head, video, channel = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.arange(0, WIDE)
    there = (token < n_tokens)[:, None] & (channel < WIDTH)[None, :]
    at = video * x_steps[0] + head * x_steps[2] + token[:, None] * x_steps[1] + channel[None, :]
    q = tl.load(x + at, there, other=0.0)
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
    tl.store(out + to, (said + seen).to(out.dtype.element_ty), there)


def attention(q: Tensor, text: PromptKeys, image: KeyValue) -> Tensor:
    """Of q [B, n, heads, head_dim], of any strides but the last: [B, n, heads * head_dim]."""
    videos, n_tokens, heads, width = q.shape
    given = (q, text.k, text.v, *image)
    assert all(x.stride(3) == 1 for x in given), [x.stride() for x in given]
    out = torch.empty(videos, n_tokens, heads * width, dtype=q.dtype, device=q.device)
    tokens, keys = TILES[q.element_size()]
    _cross[(triton.cdiv(n_tokens, tokens), heads, videos)](
        *given,
        out,
        *(n_tokens, text.k.shape[1], image.k.shape[1]),
        *(x.stride()[:3] for x in given),
        *(width**-0.5 * math.log2(math.e), math.log2(text.times)),
        *(width, max(16, triton.next_power_of_2(width)), tokens, keys),
        num_warps=WARPS,
    )
    return out
