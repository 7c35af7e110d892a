"""How far a mouth is open, read from frames alone: for pictures whose truth is not known.

The instrument is a small convolutional network, calibrated on rendered people whose lip gap is
known exactly: `python -m flashtalk_cli.distill.people.measure BANK` makes it anew in two and a half
minutes on a GPU. It sees the mouth in a frame beside the median of the clip, so that lips, beards and light of
a person cancel out. It learns as it is used, on stretches of ten seconds, in which heads turn and
mouths wander about their box, and on blurred, noisy, recoloured and badly framed crops, so that
it bears with what a generative model makes. `accuracy` tells how well it agrees with the truth on
held-out people.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, smooth_l1_loss

from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.clips import ClipStream, Drawing, render_clips
from flashtalk_cli.distill.people.render import Clip
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.errors import InputError
from flashtalk_cli.log import setup

log = logging.getLogger(__name__)

METER_FILE = Path(__file__).with_name("mouth_meter.safetensors")
CROP_PX, FACE_PX = 48, 32
CROP_SPAN = 1.25  # side of the crop over the width of the mouth's box
FACE_SPAN, FACE_ABOVE = 3.0, 0.6  # the same of a face's, and how far its middle lies above the mouth's
STRETCH_FRAMES, EVERY_FRAMES = 250, 6  # ten seconds, of which some frames are rendered
CLIPS, KEPT_BATCHES, STEPS_A_BATCH = 48, 24, 12


class MouthMeter(nn.Module):
    """Crops [N, 6, 48, 48] (a frame, the clip's median) -> gap over the box's width [N]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 32, 48, 64)
        layers: list[nn.Module] = []
        before = 6
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.SiLU()]
            before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before * (CROP_PX >> len(widths)) ** 2, 1)

    def forward(self, crops: Tensor) -> Tensor:
        """The gap of each crop."""
        return self.head(self.features(crops).flatten(1)).squeeze(1)


def crop_mouths(frames: Tensor, boxes: Tensor) -> Tensor:
    """Squares around the mouths: frames uint8 [B, T, H, W, 3], boxes [B, 4] -> [B, T, 3, 48, 48] in -1..1."""
    return _crop(frames, boxes, CROP_PX, CROP_SPAN, 0.0)


def crop_faces(frames: Tensor, boxes: Tensor) -> Tensor:
    """The same of what lies around a mouth's box between brows and chin, 32 px a side."""
    return _crop(frames, boxes, FACE_PX, FACE_SPAN, FACE_ABOVE)


def _crop(frames: Tensor, boxes: Tensor, side_px: int, span: float, above: float) -> Tensor:
    """Squares of `side_px` pixels that are so many times as wide as the boxes, and so many widths above them."""
    batch, count, height, width, _ = frames.shape
    boxes = boxes.to(frames.device, torch.float32)
    wide = boxes[:, 2] - boxes[:, 0]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - torch.stack([torch.zeros_like(wide), above * wide], 1)
    side = wide * span
    steps = (torch.arange(side_px, device=frames.device) + 0.5) / side_px - 0.5
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    where = centre[:, None, None] + torch.stack([x, y], -1) * side[:, None, None, None]
    size = torch.tensor([width, height], device=frames.device)
    grid = (where / size * 2 - 1)[:, None].expand(-1, count, -1, -1, -1).reshape(-1, side_px, side_px, 2)
    pictures = frames.reshape(-1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    shrink = max(1, int(side.mean() / side_px))
    if shrink > 1:
        pictures = avg_pool2d(pictures, shrink)
    crops = grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.reshape(batch, count, 3, side_px, side_px)


def beside_median(crops: Tensor) -> Tensor:
    """Crops [B, T, 3, h, w] with the clip's median appended: [B * T, 6, h, w]."""
    median = crops.median(1, keepdim=True).values.expand_as(crops)
    return torch.cat([crops, median], 2).flatten(0, 1)


@lru_cache(maxsize=1)
def load_meter() -> MouthMeter:
    """The calibrated instrument on the CPU. Raises InputError when it was never made."""
    if not METER_FILE.exists():
        raise InputError(f"{METER_FILE} is missing: python -m flashtalk_cli.distill.people.measure BANK")
    meter = MouthMeter()
    meter.load_state_dict(load_file(METER_FILE))
    return meter.eval()


@torch.inference_mode()
def mouth_opening_from_frames(frames: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The gap between the lips in pixels, float64 [T], about 0 when they are closed.

    frames uint8 [T, H, W, 3] of one clip, about a second or more; box is x0, y0, x1, y1 in pixels
    around the mouth in all frames, as `Clip.mouth_box`. It may be off by a tenth of its width.
    """
    crops = crop_mouths(torch.from_numpy(np.ascontiguousarray(frames))[None], torch.tensor([box]))
    gap = load_meter()(beside_median(crops))
    return gap.double().numpy() * (box[2] - box[0])


def _worsen(crops: Tensor) -> Tensor:
    """Crops as a weaker renderer would make them: recoloured, blurred, noisy; one draw a clip."""
    batch = len(crops)

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(batch, 1, channels, 1, 1, device=crops.device).uniform_(low, high)

    crops = crops * draw(0.7, 1.25) + draw(-0.15, 0.15, 3)
    flat = crops.flatten(0, 1)
    coarse = interpolate(
        interpolate(flat, scale_factor=0.5, mode="area"), size=flat.shape[-2:], mode="bilinear"
    )
    crops = torch.lerp(crops, coarse.view_as(crops), draw(0, 1.2).clamp(0, 1))
    crops = crops + torch.randn_like(crops) * draw(0, 0.06)
    return crops.flip(-1) if torch.rand(()) < 0.5 else crops


def _stretches(
    bank: SpeechBank, n_clips: int, first: int, device: str, workers: int = 0, *, held_out: bool = False
) -> Iterator[Clip]:
    """Stretches of ten seconds, `n_clips` at once, without end; a few frames of each second are in them."""
    drawing = Drawing(n_frames=STRETCH_FRAMES, batch=n_clips, held_out=held_out)
    for plans in ClipStream(bank, drawing, first=first, device=device, workers=workers).plans:
        yield render_clips(
            [plan.spec for plan in plans],
            [plan.performance.every(EVERY_FRAMES) for plan in plans],
            (drawing.height_px, drawing.width_px),
            device,
            backdrops=[plan.backdrop for plan in plans],
        )


def _training_pair(clip: Clip) -> tuple[Tensor, Tensor]:
    boxes = clip.mouth_box
    wide = (boxes[:, 2:3] - boxes[:, :1]).clamp_min(4.0)
    off = (torch.rand_like(boxes[:, :2]) - 0.5) * 0.2 * wide
    grown = wide * (1 + (torch.rand_like(wide) - 0.5) * 0.3)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + off
    loose = torch.cat([centre - grown / 2, centre + grown / 2], 1)
    crops = _worsen(crop_mouths(clip.frames, loose))
    return beside_median(crops), (clip.opening_px / grown).flatten()


def calibrate(bank: SpeechBank, device: str, seconds: float, workers: int) -> MouthMeter:
    """Trains the instrument on rendered people for about so many seconds."""
    meter = MouthMeter().to(device)
    optimiser = torch.optim.AdamW(meter.parameters(), lr=2e-3, weight_decay=1e-3)
    began, losses = time.perf_counter(), []
    kept: list[Clip] = []
    for clip in _stretches(bank, CLIPS, 2_000_000, device, workers):
        done = (time.perf_counter() - began) / seconds
        if done >= 1:
            break
        kept = [*kept[1 - KEPT_BATCHES :], clip]
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, 20 * done + 0.02, 1.02 - done)
        for _ in range(
            STEPS_A_BATCH
        ):  # to render takes longer than to learn: what is seen again is worn anew
            crops, truth = _training_pair(kept[int(torch.randint(len(kept), ()))])
            loss = smooth_l1_loss(meter(crops), truth, beta=0.02)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    log.info("calibrated on %d batches, last loss %.5f", len(losses), float(np.mean(losses[-10:])))
    return meter.eval()


@torch.inference_mode()
def accuracy(meter: MouthMeter, bank: SpeechBank, device: str, n_clips: int = 32) -> np.ndarray:
    """Correlation with the truth over ten seconds of each held-out clip in which someone speaks, [n]."""
    found: list[float] = []
    for clip in _stretches(bank, min(4, n_clips), 0, device, held_out=True):
        wide = clip.mouth_box[:, 2:3] - clip.mouth_box[:, :1]
        gap = meter(beside_median(crop_mouths(clip.frames, clip.mouth_box))).view(len(wide), -1) * wide
        for measured, truth in zip(gap.cpu().numpy(), clip.opening_px.cpu().numpy(), strict=True):
            if truth.std() > 0.25:
                found.append(float(np.corrcoef(measured, truth)[0, 1]))
        if len(found) >= n_clips:
            break
    return np.asarray(found)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--into", type=Path, default=METER_FILE)
    given = parser.parse_args()
    setup(debug=True)
    meter = calibrate(SpeechBank(given.bank, "train"), given.device, given.seconds, given.workers)
    save_file({name: value.cpu().contiguous() for name, value in meter.state_dict().items()}, given.into)
    found = accuracy(meter, SpeechBank(given.bank, "held_out"), given.device)
    log.info(
        "held-out people: correlation mean %.3f, median %.3f, lowest %.3f over %d clips",
        found.mean(),
        np.median(found),
        found.min(),
        len(found),
    )


if __name__ == "__main__":
    told_in_a_line(main)
