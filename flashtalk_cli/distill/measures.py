"""What is measured on frames: lips against the truth, and what becomes of the picture over time.

Per frame, against the picture that the person was given:

    identity    cosine between the image encoder's class tokens, both less the mean of all people's, so that
                1 is the same and 0 is anybody
    likeness    correlation of the brightness at a quarter of the size: the same things at the same places
    face        the same of the face alone, at 32 x 32; nods and words lower it, too: see the truth's own
    sharpness   mean absolute Laplacian of the brightness, over the picture's
    colour      mean distance of L, a, b (Delta E 1976) of blocks of 16 x 16 pixels
    life        mean absolute change from the frame before, in levels of 255
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.distill.encoding import as_video
from flashtalk_cli.distill.people.measure import beside_median, crop_faces, crop_mouths, load_meter
from flashtalk_cli.models import image as image_models
from flashtalk_cli.models.image import ImageEncoder
from flashtalk_cli.pipeline.colour import to_lab

NAMES = ("identity", "likeness", "face", "sharpness", "colour", "life")
BLOCK_PX = 16
MAX_LAG_FRAMES = 8
CLIP_FRAMES = 250  # over which the mouth meter takes its median
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Reference:
    """The pictures of P people, prepared for comparison."""

    image: ImageEncoder
    centre: Tensor  # [dim]: the mean class token
    token: Tensor  # [P, dim]
    small: Tensor  # [P, n]: brightness, zero mean and unit norm
    mouth_box: Tensor  # [P, 4] px
    face: Tensor  # [P, 1024]: brightness there, zero mean and unit norm
    sharpness: Tensor  # [P]
    blocks: Tensor  # [P, 3, h, w]

    @staticmethod
    def of(pictures: Tensor, mouth_box: Tensor, image: ImageEncoder, device: torch.device) -> Reference:
        """pictures: uint8 [P, H, W, 3]; mouth_box: [P, 4] px."""
        video = as_video(pictures[:, None], device)[:, :, 0]
        token = class_tokens(image, video)
        centre = token.mean(0) if len(token) > 1 else torch.zeros_like(token[0])
        luma = _luma(video)
        return Reference(
            image=image,
            centre=centre,
            token=token - centre,
            small=_unit(_shrink(luma)),
            mouth_box=mouth_box,
            face=_faces(pictures[:, None].to(device), mouth_box),
            sharpness=_laplacian(luma),
            blocks=_blocks(video),
        )


@torch.no_grad()
def measure_frames(frames: Tensor, before: Tensor, reference: Reference) -> Tensor:
    """Measures of frames uint8 [P, T, H, W, 3], the last frame before them [P, H, W, 3]: [P, T, 6]."""
    n_people, n_frames = frames.shape[:2]
    video = rearrange(as_video(frames, frames.device), "p c t h w -> (p t) c h w")

    def each(values: Tensor) -> Tensor:
        return values.repeat_interleave(n_frames, 0)

    luma = _luma(video)
    token = class_tokens(reference.image, video) - reference.centre
    found = torch.stack(
        [
            F.cosine_similarity(token, each(reference.token)),
            (_unit(_shrink(luma)) * each(reference.small)).sum(1),
            (_faces(frames, reference.mouth_box) * each(reference.face)).sum(1),
            _laplacian(luma) / each(reference.sharpness),
            (_blocks(video) - each(reference.blocks)).square().sum(1).sqrt().mean((1, 2)),
        ],
        dim=-1,
    )
    shifted = torch.cat([before[:, None], frames[:, :-1]], dim=1)
    life = (frames.float() - shifted.float()).abs().mean((2, 3, 4))
    return torch.cat([rearrange(found, "(p t) m -> p t m", p=n_people), life[..., None]], dim=-1)


def class_tokens(image: ImageEncoder, video: Tensor) -> Tensor:
    """The image encoder's class token of pictures [N, 3, H, W]: float32 [N, dim]."""
    weight = next(image.module.parameters())
    pixels = image_models.normalise(video, image.params.image_px)
    return image_models.tokens(image.module, pixels.to(weight.dtype))[:, 0].float()


def _luma(video: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nhw", video, torch.tensor(LUMA, device=video.device))[:, None]


def _shrink(luma: Tensor) -> Tensor:
    return F.avg_pool2d(luma, 4).flatten(1)


def _faces(frames: Tensor, mouth_box: Tensor) -> Tensor:
    """Brightness of faces in frames uint8 [P, T, H, W, 3]: [P T, 1024], zero mean and unit norm."""
    return _unit(_luma(crop_faces(frames, mouth_box).flatten(0, 1)).flatten(1))


def _unit(values: Tensor) -> Tensor:
    return F.normalize(values - values.mean(1, keepdim=True), dim=1)


def _laplacian(luma: Tensor) -> Tensor:
    kernel = luma.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(luma, kernel).abs().mean((1, 2, 3))


def _blocks(video: Tensor) -> Tensor:
    """L, a, b of blocks: [N, 3, h, w]."""
    return F.avg_pool2d(to_lab(video[:, :, None])[:, :, 0], BLOCK_PX)


@torch.no_grad()
def gaps_of(crops: Tensor, widths: Tensor) -> Tensor:
    """Gap between the lips in pixels [P, T] from crops of mouths uint8 [P, T, 3, 48, 48].

    The meter compares with a median over time: it is taken over stretches of some ten seconds.
    """
    meter = load_meter().to(crops.device)
    found = []
    for some in crops.tensor_split(max(1, round(crops.shape[1] / CLIP_FRAMES)), dim=1):
        pixels = some.float() / 127.5 - 1
        found.append(meter(beside_median(pixels)).view(len(crops), -1) * widths[:, None].to(crops.device))
    meter.cpu()
    return torch.cat(found, dim=1).cpu()


def mouth_crops(frames: Tensor, boxes: Tensor) -> Tensor:
    """Squares around the mouths as bytes: uint8 [P, T, 3, 48, 48]."""
    crops = crop_mouths(frames, boxes)
    return ((crops + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Lips:
    """How a mouth follows the truth, over people with something to say."""

    correlation: float  # at the best lag, mean over people
    correlation_now: float  # at no lag
    lag_frames: float  # the best one's median; positive: the picture is late
    worst: float  # the person with the lowest correlation
    closed: float  # mean gap where the truth is closed, over the gap of wide open
    each: tuple[float, ...]  # everyone's correlation; NaN: nothing to say

    @property
    def people(self) -> int:
        """Who had something to say."""
        return sum(not math.isnan(one) for one in self.each)


def compare_lips(found: np.ndarray, truth: np.ndarray) -> Lips:
    """Gaps [P, T] that were measured against true ones [P, T]; scales do not matter."""
    each, now, lags, closed = [], [], [], []
    for mine, theirs in zip(found, truth, strict=True):
        if theirs.std() < 1e-4:
            each.append(math.nan)
            continue
        by_lag = {lag: _correlation(mine, theirs, lag) for lag in range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1)}
        lag = max(by_lag, key=lambda lag: by_lag[lag])
        each.append(by_lag[lag])
        now.append(by_lag[0])
        lags.append(lag)
        shut = theirs < 0.05 * np.quantile(theirs, 0.95)
        wide = np.quantile(mine, 0.95)
        if shut.any() and wide > 0:
            closed.append(float(np.clip(mine[shut], 0, None).mean() / wide))
    if not now:
        return Lips(math.nan, math.nan, math.nan, math.nan, math.nan, tuple(each))
    return Lips(
        correlation=float(np.nanmean(each)),
        correlation_now=float(np.mean(now)),
        lag_frames=float(np.median(lags)),
        worst=float(np.nanmin(each)),
        closed=float(np.mean(closed)) if closed else math.nan,
        each=tuple(each),
    )


def _correlation(mine: np.ndarray, theirs: np.ndarray, lag: int) -> float:
    """Correlation of mine, `lag` frames later, with theirs; 0 when one does not move."""
    a, b = (mine[lag:], theirs[: len(theirs) - lag]) if lag >= 0 else (mine[:lag], theirs[-lag:])
    if a.std() < 1e-9 or b.std() < 1e-9:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
