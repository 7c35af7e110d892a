"""The embedded model's video VAE as something to be trained: losses, first weights, measures.

An autoencoder of rendered people and of procedural pictures. The loss is the mean error of pixels,
of their differences at three scales and in time, and one minus the structural similarity; a little
Kullback-Leibler divergence gives the log variances their meaning, and a term on the channels' means,
variances and correlations holds the latents near the unit normal.

At the end `normalise_latents` moves each channel's measured mean and standard deviation into the
1 x 1 x 1 convolutions, so that the latents of this VAE have zero mean and unit variance under the
released model's constants.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flashtalk_cli.models.export import save_tensors
from flashtalk_cli.models.vae import LATENT_MEAN, LATENT_STD, Vae, VaeParams
from flashtalk_cli.parallel.spatial import WHOLE

# dim 12 decodes a chunk of 160 x 160 in 0.8 s on two cores: too slow
MINI = VaeParams(dim=8, dim_mult=(1, 2, 4, 8))


def autoencode(vae: Vae, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Video [B, 3, T, H, W] through the VAE with noise on its latents, ready for gradients.

    noise: [B, 16, T', h, w], added to the normalised latents. The same walk as `Vae.encode` and
    `Vae.decode`, but in two pieces of time only, with the log variance, and without the clamp that
    would stop gradients. Returns channels-last video [B, T, H, W, 3], and the normalised mean and
    log variance [B, T', h, w, 16], all float32.
    """
    mean, std = statistics(video.device)
    latents, log_variance = encode(vae, video)
    seen = latents + rearrange(noise, "b c t h w -> b t h w c")
    z = vae.conv2((seen * std + mean).to(vae.conv2.weight.dtype))
    first, state = vae.decoder(z[:, :1].contiguous(), None, WHOLE)
    frames = [first]
    if z.shape[1] > 1:
        rest, _ = vae.decoder(z[:, 1:].contiguous(), state, WHOLE)
        frames.append(rest)
    return torch.cat(frames, 1).float(), latents, log_variance


def encode(vae: Vae, video: Tensor) -> tuple[Tensor, Tensor]:
    """Video [B, 3, T, H, W] to the normalised mean and log variance, float32 [B, T', h, w, 16]; see `autoencode`."""
    mean, std = statistics(video.device)
    x = rearrange(video, "b c t h w -> b t h w c").to(vae.conv1.weight.dtype)
    first, state = vae.encoder(x[:, :1].contiguous(), None, WHOLE)
    hidden = [first]
    if x.shape[1] > 1:
        rest, _ = vae.encoder(x[:, 1:].contiguous(), state, WHOLE)
        hidden.append(rest)
    raw_mean, raw_log_variance = vae.conv1(torch.cat(hidden, 1)).float().chunk(2, dim=-1)
    return (raw_mean - mean) / std, raw_log_variance.clamp(-12, 4)


def reconstruction_loss(made: Tensor, truth: Tensor, unlike: float = 0.15) -> Tensor:
    """How far video is from the truth, both [B, T, H, W, 3] in [-1, 1]; 0 where they are equal.

    unlike: what one minus the structural similarity costs.
    The first frame of a stream has a path of its own and counts as much as four others.
    """
    weight = 1.0 + 3.0 * (torch.arange(made.shape[1], device=made.device) == 0)
    weight = (weight / weight.mean())[:, None, None, None]
    pixels = (_soft_abs(made - truth) * weight).mean()
    change = (
        _soft_abs((made[:, 1:] - made[:, :-1]) - (truth[:, 1:] - truth[:, :-1])).mean()
        if made.shape[1] > 1
        else 0
    )
    a, b = (rearrange(x * weight.sqrt(), "b t h w c -> (b t) c h w") for x in (made, truth))
    edges = torch.zeros((), device=made.device)
    for scale in range(3):
        error = a - b
        edges = edges + _soft_abs(error[..., 1:, :] - error[..., :-1, :]).mean()
        edges = edges + _soft_abs(error[..., :, 1:] - error[..., :, :-1]).mean()
        if scale < 2:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    frames, wanted = (rearrange(x, "b t h w c -> (b t) c h w") for x in (made, truth))
    return pixels + 0.25 * edges + 0.5 * change + unlike * (1 - similarity(frames, wanted))


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of frames [N, C, H, W] in [-1, 1], over windows of 7 pixels every 2."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=2)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.02**2, 0.06**2  # (0.01 and 0.03 of the range 2) squared
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (alike / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean()


def latent_loss(latents: Tensor, log_variance: Tensor, kl: float, unit: float) -> Tensor:
    """Divergence of each posterior from the unit normal, and of the latents' statistics from it.

    Those are each channel's mean and variance, and the channels' correlations: without the latter
    all channels come to say much the same, and what is small among them is lost in the noise.
    """
    divergence = 0.5 * (latents**2 + log_variance.exp() - 1 - log_variance).mean()
    flat = latents.flatten(0, 3)
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / len(flat)
    variance = covariance.diagonal()
    correlation = covariance * torch.rsqrt(variance[:, None] * variance + 1e-6)
    alike = (correlation**2).sum() / len(variance) - 1
    spread = 0.5 * (mean**2 + variance - 1 - (variance + 1e-6).log()).mean()
    return kl * divergence + unit * (spread + alike)


def objective(
    vae: Vae,
    video: Tensor,
    noise: Tensor,
    kl: float,
    unit: float,
    unlike: float,
    known: Vae | None = None,
    hold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch of video in [-1, 1], and the mean squared error within it.

    known: a VAE whose latents these should stay near, for a motion network that knows them; `hold` is what the mean
    square of their distance costs.
    """
    made, latents, log_variance = autoencode(vae, video, noise)
    truth = rearrange(video, "b c t h w -> b t h w c").float()
    sampled = latent_loss(latents, log_variance, kl, unit)
    if known is not None:
        with torch.no_grad():
            wanted, _ = encode(known, video)
        sampled = sampled + hold * (latents - wanted).square().mean()
    return reconstruction_loss(made, truth, unlike) + sampled, (
        made.detach().clamp(-1, 1) - truth
    ).square().mean()


@torch.no_grad()
def latent_statistics(vae: Vae, clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16] of normalised latents of clips [B, 3, T, H, W] in [-1, 1]."""
    latents = torch.cat([rearrange(vae.encode(clip)[0], "b c t h w -> c (b t h w)") for clip in clips], 1)
    return latents.mean(1), latents.std(1)


@torch.no_grad()
def normalise_latents(vae: Vae, mean: Tensor, std: Tensor) -> None:
    """Make the VAE's latents (l - mean) / std, with reconstructions as they were, in place.

    mean, std: [16], of the latents as they are now. Exact up to rounding: both convolutions next to
    the latents are 1 x 1 x 1, and take the change of scale and origin into weights and biases.
    """
    origin, unit = statistics(mean.device)  # raw = latent * unit + origin
    n = len(mean)
    scale = torch.cat([1 / std, 1 / std])
    shift = torch.cat([origin - (origin + mean * unit) / std, -2 * std.log()])
    weight, bias = vae.conv1.weight, vae.conv1.bias
    scale[n:] = 1  # a log variance is moved, not scaled
    weight.mul_(scale[:, None, None, None, None])
    bias.mul_(scale).add_(shift)
    weight, bias = vae.conv2.weight, vae.conv2.bias
    matrix = weight[:, :, 0, 0, 0].clone()
    bias.add_(matrix @ (origin + mean * unit - origin * std))
    weight.mul_(std[None, :, None, None, None])


@torch.no_grad()
def measure(vae: Vae, clips: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of reconstructions of clips uint8 [N, T, H, W, 3], by scikit-image, frame by frame."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    ratios, likenesses = [], []
    for clip in clips:
        made = reconstruct(vae, clip)
        for truth, frame in zip(clip.cpu().numpy(), made.cpu().numpy(), strict=True):
            ratios.append(peak_signal_noise_ratio(truth, frame, data_range=255))
            likenesses.append(structural_similarity(truth, frame, channel_axis=-1, data_range=255))
    return {
        "psnr_db": float(np.mean(ratios)), "psnr_worst_db": float(np.min(ratios)),
        "ssim": float(np.mean(likenesses)), "ssim_worst": float(np.min(likenesses)), "frames": len(ratios),
    }  # fmt: skip


@torch.no_grad()
def reconstruct(vae: Vae, clip: Tensor) -> Tensor:
    """Frames uint8 [T, H, W, 3] through the VAE and back, by the code that is used for rendering."""
    weight = vae.conv1.weight
    video = rearrange(clip, "t h w c -> 1 c t h w").to(weight.device).float() / 127.5 - 1
    latents, _ = vae.encode(video, latents_at_once=8)
    made, _ = vae.decode(latents, latents_at_once=8)
    return rearrange(((made[0] + 1) * 127.5).round().clamp(0, 255).byte(), "c t h w -> t h w c")


def as_video(clips: Tensor) -> Tensor:
    """Frames uint8 [B, T, H, W, 3] as video float32 [B, 3, T, H, W] in [-1, 1]."""
    return rearrange(clips, "b t h w c -> b c t h w").float() / 127.5 - 1


def save_weights(vae: Vae, path: Path) -> None:
    """The weights in float16, under their released names: half a file, at no loss that can be measured."""
    save_tensors(path, {name: value.half() for name, value in vae.state_dict().items()})


def _soft_abs(x: Tensor) -> Tensor:
    return torch.sqrt(x * x + 1e-6)


@lru_cache(maxsize=4)
def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """What raw latents are normalised by: mean and standard deviation [16]."""
    return torch.tensor(LATENT_MEAN, device=device), torch.tensor(LATENT_STD, device=device)
