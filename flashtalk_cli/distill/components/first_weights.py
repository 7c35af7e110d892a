"""The weights that the video VAE begins with, so that it has every colour from its first step on.

As torch draws them, each convolution keeps a third of its input's variance and adds a constant, and a
norm divides away how bright a pixel is: of the three colours one is all that can be told from the
latents then, and what the encoder has dropped the decoder never learns to ask for. Thousands of steps
later one colour axis was still missing. So here

- convolutions are orthogonal without biases, and each residual block begins as the identity;
- before the last norm of encoder and decoder one channel is a constant that outweighs the others: the
  norm then divides by nearly the same everywhere;
- the encoder's last convolution is fitted on a batch of video: the first three latents are the mean
  colours of their patch, the others the principal components of what is left of it, all of unit variance;
- the decoder hands its latents through, each pixel its patch's, and its last convolution is fitted to
  make the video of them: a mosaic in the right colours.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flashtalk_cli.models.vae import FRAMES_PER_LATENT, STRIDE_PX, Vae
from flashtalk_cli.models.vae_blocks import Conv, Past, RmsNorm
from flashtalk_cli.parallel.spatial import WHOLE

CARRIER = 2.0  # the constant channel, over the root mean square of all the others together
RIDGE = 1e-3


@torch.no_grad()
def begin(vae: Vae, video: Tensor, origin: Tensor, unit: Tensor) -> None:
    """Set all weights of a VAE, in place, by a batch of video [B, 3, T, H, W] in [-1, 1].

    origin, unit: [16], what latents are normalised by: raw = latent * unit + origin.
    """
    draw(vae)
    x = rearrange(video, "b c t h w -> b t h w c").contiguous()
    seen = carried(vae.encoder, vae.encoder.middle[-1], x)
    wanted = patch_components(x, len(origin))
    fit(vae.encoder.head["2"], seen, torch.cat([wanted, torch.zeros_like(wanted)], -1))
    n = 2 * len(origin)
    vae.conv1.weight.copy_(torch.eye(n).view(n, n, 1, 1, 1))
    vae.conv1.weight[: n // 2].mul_(unit[:, None, None, None, None])
    vae.conv1.bias[: n // 2].copy_(origin)
    vae.conv1.bias[n // 2 :].fill_(-4.0)
    vae.conv2.weight.copy_(torch.eye(n // 2).view(n // 2, n // 2, 1, 1, 1))
    vae.conv2.weight.div_(unit[None, :, None, None, None])
    vae.conv2.bias.copy_(-origin / unit)
    z = walk(vae.encoder, x, vae.encoder.head)[..., : n // 2]
    spread = z.flatten(0, -2).std(0)  # what could not be told is fitted too small
    vae.conv1.weight[: n // 2].div_(spread[:, None, None, None, None])
    z = z / spread
    fit(vae.decoder.head["2"], carried(vae.decoder, vae.decoder.upsamples[-1], z), x)


@torch.no_grad()
def draw(vae: Vae) -> None:
    """Orthogonal convolutions; in the decoder, outside its blocks, such that channels pass through."""
    for name, module in vae.named_modules():
        if not isinstance(module, Conv):
            continue
        module.bias.zero_()
        weight = module.weight
        passes = name.startswith("decoder") and ".residual." not in name and ".middle." not in name
        if name.endswith("residual.6"):
            weight.zero_()
        elif passes:
            weight.zero_()
            centre = tuple(
                size - 1 if i == 0 and weight.ndim == 5 else size // 2
                for i, size in enumerate(weight.shape[2:])
            )
            tap: Tensor = weight
            for index in reversed(centre):  # the one tap, [out, in], as a view
                tap = tap[..., index]
            tap.copy_(passing(weight.shape[0], weight.shape[1], weight.device))
        else:
            matrix = nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device).flatten(1))
            weight.copy_(matrix.view(weight.shape))
        module.order_weight()


def passing(n_out: int, n_in: int, device: torch.device) -> Tensor:
    """A matrix [out, in] that hands channel i on as channel i; when there are more out, again from 0 on."""
    return torch.eye(n_in, device=device).repeat(-(-n_out // n_in), 1)[:n_out]


def walk(half: Any, x: Tensor, head: nn.ModuleDict | None = None) -> Tensor:
    """Video or latents [B, T, H, W, C] through encoder or decoder, up to its head or with it."""
    out, state = [], None
    layers = (
        [half.conv1, *half.downsamples, *half.middle]
        if hasattr(half, "downsamples")
        else [half.conv1, *half.middle, *half.upsamples]
    )
    for piece in (x[:, :1], x[:, 1:]):
        if not piece.shape[1]:
            continue
        y, state = _through(layers, piece.contiguous(), state)
        out.append(y)
    y = torch.cat(out, 1)
    if head is None:
        return y
    norm, last = head["0"], head["2"]
    assert isinstance(norm, RmsNorm)
    y, _ = last(norm(y, silu=True), None, WHOLE)
    return y


def _through(layers: list[nn.Module], x: Tensor, past: Past) -> tuple[Tensor, Past]:
    pasts = past or (None,) * len(layers)
    kept = []
    for layer, layer_past in zip(layers, pasts, strict=True):
        x, layer_past = layer(x, layer_past, WHOLE)
        kept.append(layer_past)
    return x, tuple(kept)


def carried(half: Any, block: Any, x: Tensor) -> Tensor:
    """Make the last channel of the half's last block a constant; what its head's convolution then sees."""
    y = walk(half, x)
    bias = block.residual["6"].bias
    bias[-1] = CARRIER * y.square().sum(-1).mean().sqrt()
    y = walk(half, x)
    return half.head["0"](y, silu=True)


def fit(convolution: Any, seen: Tensor, wanted: Tensor) -> None:
    """Set a causal convolution to the matrix that makes [..., O] of [..., I] best, by least squares."""
    inputs, outputs = (x.flatten(0, -2).double() for x in (seen, wanted))
    mean_in, mean_out = inputs.mean(0), outputs.mean(0)
    inputs, outputs = inputs - mean_in, outputs - mean_out
    power = inputs.T @ inputs / len(inputs)
    power.diagonal().add_(RIDGE * power.diagonal().mean())
    matrix = torch.linalg.solve(power, inputs.T @ outputs / len(inputs)).T
    weight, bias = convolution.weight, convolution.bias
    weight.zero_()
    weight[:, :, -1, 1, 1] = matrix.to(weight)
    bias.copy_((mean_out - matrix @ mean_in).to(bias))


def patch_components(x: Tensor, n: int) -> Tensor:
    """Of video [B, T, H, W, 3]: each latent's mean colours and first components, [B, T', h, w, n], unit variance."""
    first, rest = x[:, :1], x[:, 1:]
    frames = [first]
    if rest.shape[1]:
        frames.append(rearrange(rest, "b (t k) h w c -> b t k h w c", k=FRAMES_PER_LATENT).mean(2))
    patches = rearrange(
        torch.cat(frames, 1), "b t (h p) (w q) c -> b t h w (p q) c", p=STRIDE_PX, q=STRIDE_PX
    )
    colours = patches.mean(-2)
    detail = (patches - colours[..., None, :]).flatten(-2)
    flat = detail.flatten(0, -2).double()
    _, direction = torch.linalg.eigh(flat.T @ flat / len(flat))
    components = detail @ direction[:, -(n - 3) :].flip(1).to(detail)
    both = torch.cat([colours, components], -1)
    spread = both.flatten(0, -2).std(0)
    return (both - both.flatten(0, -2).mean(0)) / spread.clamp_min(0.02)
