"""How much arithmetic a chunk is, counted from the networks' sizes: floating-point operations, a
multiplication and an addition being two.

What is counted is the work that the network defines: matrix products, convolutions and attention as they
are written in the released program. Norms, activations and copies are left out; so is any saving of an
implementation (an up-convolution counts its nine taps although four do), so that its achieved rate says
how soon the defined work was done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashtalk_cli.models.dit import DitParams
    from flashtalk_cli.models.vae import VaeParams

TAPS_3D, TAPS_2D, TAPS_TIME = 27, 9, 3  # of the VAE's kernels
COLOURS = 3


@dataclass(frozen=True)
class Work:
    """Operations by the kind of unit that does them."""

    gemm: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0

    @property
    def total(self) -> float:
        """All operations."""
        return self.gemm + self.attention + self.convolution

    def __add__(self, other: Work) -> Work:
        return Work(
            self.gemm + other.gemm,
            self.attention + other.attention,
            self.convolution + other.convolution,
        )

    def __mul__(self, n: float) -> Work:
        return Work(self.gemm * n, self.attention * n, self.convolution * n)


def dit_tokens(params: DitParams, latents: int, height: int, width: int) -> int:
    """Tokens of a chunk of so many latent frames of height x width latents."""
    t, h, w = params.patch_size
    return (latents // t) * (height // h) * (width // w)


def dit_step(params: DitParams, tokens: int, image_tokens: int) -> Work:
    """One pass through the DiT, keys and values of prompt, picture and speech being there already."""
    p, patch = params, prod(params.patch_size)
    # Weights that a token meets in a block: q, k, v, o of self-attention, q and o of the prompt's and of
    # the speech's, and the feed-forward network's two.
    in_block = 8 * p.dim**2 + 2 * p.dim * p.ffn_dim
    at_ends = p.dim * patch * (p.in_dim + p.out_dim)
    keys = tokens + p.text_len + image_tokens + p.context_tokens
    return Work(
        gemm=2.0 * tokens * (p.num_layers * in_block + at_ends),
        attention=4.0 * tokens * keys * p.dim * p.num_layers,
    )


def vae_decode(params: VaeParams, latents: int, height: int, width: int, *, first: int = 0) -> Work:
    """Decoding latents `first` to `latents` of a stream, height x width latents each."""
    return _decoder(params, latents, height, width) + _decoder(params, first, height, width) * -1


def vae_encode(params: VaeParams, latents: int, height: int, width: int) -> Work:
    """Encoding the frames of the first so many latents of a stream, height x width latents each."""
    dims = [params.dim * m for m in (1, *params.dim_mult)]
    halvings = len(params.temporal_downsample)
    scale, per_latent = 2**halvings, 2 ** sum(params.temporal_downsample)
    frames = _frames(latents, per_latent)
    work = _convolution(TAPS_3D * COLOURS * dims[0], frames, scale**2 * height * width)
    for level, (before, channels) in enumerate(pairwise(dims)):
        pixels = scale**2 * height * width
        work += _blocks(before, channels, params.num_res_blocks, frames, pixels)
        if level < halvings:
            scale //= 2
            pixels = scale**2 * height * width
            work += _convolution(TAPS_2D * channels**2, frames, pixels)
            if params.temporal_downsample[level]:
                per_latent //= 2
                frames = _frames(latents, per_latent)
                work += _convolution(TAPS_TIME * channels**2, max(0, frames - 1), pixels)
    pixels = height * width
    work += _middle(dims[-1], latents, pixels)
    work += _convolution(TAPS_3D * dims[-1] * 2 * params.z_dim, latents, pixels)
    return work + _convolution((2 * params.z_dim) ** 2, latents, pixels)


def _decoder(params: VaeParams, latents: int, height: int, width: int) -> Work:
    """Decoding the first so many latents of a stream."""
    dims = [params.dim * m for m in (params.dim_mult[-1], *reversed(params.dim_mult))]
    temporal = params.temporal_downsample[::-1]
    pixels, frames, per_latent = height * width, latents, 1
    work = _convolution(params.z_dim**2 + TAPS_3D * params.z_dim * dims[0], frames, pixels)
    work += _middle(dims[0], frames, pixels)
    channels = dims[0]
    for level, wanted in enumerate(dims[1:]):
        work += _blocks(channels, wanted, params.num_res_blocks + 1, frames, pixels)
        channels = wanted
        if level < len(temporal):
            if temporal[level]:  # the first frame stays alone
                work += _convolution(TAPS_TIME * 2 * channels**2, max(0, frames - 1), pixels)
                per_latent *= 2
                frames = _frames(latents, per_latent)
            pixels *= 4
            work += _convolution(TAPS_2D * channels * (channels // 2), frames, pixels)
            channels //= 2
    return work + _convolution(TAPS_3D * channels * COLOURS, frames, pixels)


def _frames(latents: int, per_latent: int) -> int:
    """Frames at a level of the network where the first latent has one and every later one `per_latent`."""
    return 1 + (latents - 1) * per_latent if latents else 0


def _convolution(weights: int, frames: int, pixels: int) -> Work:
    """A kernel of so many weights at each pixel of each frame."""
    return Work(convolution=2.0 * weights * frames * pixels)


def _blocks(before: int, channels: int, count: int, frames: int, pixels: int) -> Work:
    """Residual blocks, the first of which changes the width."""
    return _convolution(sum(_block_weights(before, channels, count)), frames, pixels)


def _block_weights(before: int, channels: int, count: int) -> Iterator[int]:
    for _ in range(count):
        shortcut = before * channels if before != channels else 0
        yield TAPS_3D * channels * (before + channels) + shortcut
        before = channels


def _middle(channels: int, frames: int, pixels: int) -> Work:
    """Two residual blocks around an attention among the pixels of a frame."""
    attention = Work(gemm=8.0 * channels**2 * frames * pixels, attention=4.0 * pixels**2 * channels * frames)
    return _blocks(channels, channels, 2, frames, pixels) + attention
