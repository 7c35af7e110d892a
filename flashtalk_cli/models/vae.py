"""The Wan 2.1 video VAE: 1 + 4n frames of H x W pixels to 1 + n latent frames of H/8 x W/8, and back.

Causal in time: no frame looks ahead. So a video can be encoded or decoded in pieces, and the state
that one call gives to the next is a plain value; a whole video is one piece, on the same path:

    whole, _ = vae.decode(latents)

    state = None
    for latent in latents.split(1, dim=2):
        frames, state = vae.decode(latent, state)

The first frame of a stream stands for itself; every later latent frame stands for four. Latents go
through the network one at a time unless told otherwise: then results do not depend on how a stream was
split, not in a single bit, memory does not grow with length, and on a CPU activations stay in its cache.

Parameter names and shapes are those of the released `Wan2.1_VAE.pth`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from flashtalk_cli.models.vae_blocks import (
    Attention,
    CausalConv,
    Downsample,
    Past,
    PixelConv,
    Pointwise,
    ResidualBlock,
    RmsNorm,
    Upsample,
)
from flashtalk_cli.parallel.spatial import WHOLE, Tiles

FRAMES_PER_LATENT = 4
STRIDE_PX = 8

# Statistics of the released VAE's latents, by channel: what the diffusion model sees is normalised.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VaeParams:
    """Size of the network; the defaults are the released one's."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VaeParams:
        """From a model folder's config.json: `vae_dim`, `vae_dim_mult`, `vae_num_res_blocks`, if there."""
        return cls(
            dim=config.get("vae_dim", cls.dim),
            dim_mult=tuple(config.get("vae_dim_mult", cls.dim_mult)),
            num_res_blocks=config.get("vae_num_res_blocks", cls.num_res_blocks),
        )


class Vae(nn.Module):
    """Encoder and decoder between video [B, 3, T, H, W] in [-1, 1] and normalised latents."""

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        assert params.z_dim == len(LATENT_MEAN), (
            f"latent statistics are known for {len(LATENT_MEAN)} channels"
        )
        self.params = params
        self.encoder = Encoder(params)
        self.conv1 = Pointwise(2 * params.z_dim, 2 * params.z_dim, (1, 1, 1))
        self.conv2 = Pointwise(params.z_dim, params.z_dim, (1, 1, 1))
        self.decoder = Decoder(params)

    def encode(
        self, video: Tensor, state: Past = None, tiles: Tiles = WHOLE, latents_at_once: int = 1
    ) -> tuple[Tensor, Past]:
        """Video to latents: the mean of the posterior, normalised.

        Args:
            video: [B, 3, T, H, W] in [-1, 1]; T = 1 + 4n at the start of a stream, else 4n.
            state: None at the start, else what the call before returned.
            tiles: how frames lie over ranks.
            latents_at_once: how many go through the network together.

        Returns:
            Latents float32 [B, 16, 1 + n or n, H/8, W/8], and the state for the frames that follow.
        """
        _, _, n_frames, height, width = video.shape
        assert n_frames % FRAMES_PER_LATENT == (state is None), (
            f"{n_frames} frames, state {state is not None}"
        )
        assert height % STRIDE_PX == width % STRIDE_PX == 0, (
            f"{width} x {height} px do not divide by {STRIDE_PX}"
        )
        mean, std = _latent_statistics(video.device)
        weight_dtype = self.conv1.weight.dtype
        latents = []
        for frames in _first_alone(video, state is None, latents_at_once * FRAMES_PER_LATENT):
            x = rearrange(frames, "b c t h w -> b t h w c").to(weight_dtype).contiguous()
            x, state = self.encoder(x, state, tiles)
            posterior_mean, _ = self.conv1(x).float().chunk(2, dim=-1)
            latents.append((posterior_mean - mean) / std)
        return rearrange(torch.cat(latents, dim=1), "b t h w c -> b c t h w"), state

    def decode(
        self, latents: Tensor, state: Past = None, tiles: Tiles = WHOLE, latents_at_once: int = 1
    ) -> tuple[Tensor, Past]:
        """Latents to video.

        Args:
            latents: normalised [B, 16, T, h, w].
            state: None at the start of a stream, else what the call before returned.
            tiles: how frames lie over ranks.
            latents_at_once: how many go through the network together.

        Returns:
            Video float32 [B, 3, T', 8h, 8w] in [-1, 1], T' = 1 + 4 (T - 1) at the start of a stream and
            4 T later (in memory [B, T', 8h, 8w, 3], as sinks want it), and the state for what follows.
        """
        mean, std = _latent_statistics(latents.device)
        weight_dtype = self.conv2.weight.dtype
        video = []
        for z in _first_alone(latents, state is None, latents_at_once):
            x = rearrange(z, "b c t h w -> b t h w c").float() * std + mean
            x, state = self.decoder(self.conv2(x.to(weight_dtype)), state, tiles)
            video.append(x.float().clamp(-1, 1))
        return rearrange(torch.cat(video, dim=1), "b t h w c -> b c t h w"), state


class Encoder(nn.Module):
    """Frames [B, T, H, W, 3] to the posterior's mean and log variance [B, T', H/8, W/8, 2 z]."""

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        dims = [params.dim * m for m in (1, *params.dim_mult)]
        self.conv1 = CausalConv(3, dims[0])
        layers: list[nn.Module] = []
        for level, (in_channels, channels) in enumerate(pairwise(dims)):
            for _ in range(params.num_res_blocks):
                layers.append(ResidualBlock(in_channels, channels))
                in_channels = channels
            if level < len(params.temporal_downsample):
                layers.append(Downsample(channels, params.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(dims[-1])
        self.head = nn.ModuleDict({"0": RmsNorm(dims[-1]), "2": CausalConv(dims[-1], 2 * params.z_dim)})

    def forward(self, x: Tensor, past: Past, tiles: Tiles) -> tuple[Tensor, Past]:
        """The first frame alone (past None), then any multiple of four."""
        return _walk([self.conv1, *self.downsamples, *self.middle], self.head, x, past, tiles)


class Decoder(nn.Module):
    """Latents [B, T, h, w, z] to frames [B, T', 8h, 8w, 3]."""

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        dims = [params.dim * m for m in (params.dim_mult[-1], *reversed(params.dim_mult))]
        self.conv1 = CausalConv(params.z_dim, dims[0])
        self.middle = _middle(dims[0])
        layers: list[nn.Module] = []
        temporal = params.temporal_downsample[::-1]
        in_channels = dims[0]
        for level, channels in enumerate(dims[1:]):
            for _ in range(params.num_res_blocks + 1):
                layers.append(ResidualBlock(in_channels, channels))
                in_channels = channels
            if level < len(temporal):
                layers.append(Upsample(channels, temporal[level]))
                in_channels = channels // 2
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict({"0": RmsNorm(dims[-1]), "2": PixelConv(dims[-1], 3)})

    def forward(self, x: Tensor, past: Past, tiles: Tiles) -> tuple[Tensor, Past]:
        """The first latent alone (past None), then any number."""
        return _walk([self.conv1, *self.middle, *self.upsamples], self.head, x, past, tiles)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), Attention(channels), ResidualBlock(channels, channels)]
    )


def _walk(
    layers: list[nn.Module], head: nn.ModuleDict, x: Tensor, past: Past, tiles: Tiles
) -> tuple[Tensor, Past]:
    """Through the layers and the head, each with its own past, collecting what each remembers."""
    pasts = past or (None,) * (len(layers) + 1)
    remembered = []
    for layer, layer_past in zip(layers, pasts[:-1], strict=True):
        x, layer_past = layer(x, layer_past, tiles)
        remembered.append(layer_past)
    x, head_past, owed = cast("CausalConv", head["2"]).after(head["0"], x, None, pasts[-1], tiles)
    if owed is not None:
        x = x + owed
    return x, (*remembered, head_past)


def _first_alone(x: Tensor, starts: bool, frames_at_once: int) -> Iterator[Tensor]:
    """Cut [B, C, T, H, W] in time: the first frame of a stream alone, then equal pieces."""
    if starts:
        yield x[:, :, :1]
        x = x[:, :, 1:]
    if x.shape[2]:
        yield from x.split(frames_at_once, dim=2)


@lru_cache(maxsize=8)
def _latent_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, float32 [16], on that device.

    Not buffers: those would be in the state dict, or be lost when the model is built without memory.
    """
    with torch.inference_mode(False):  # made under inference mode, they could never be trained through
        return torch.tensor(LATENT_MEAN, device=device), torch.tensor(LATENT_STD, device=device)
