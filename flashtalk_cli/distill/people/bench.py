"""How fast people are made, and what they look like: `python -m flashtalk_cli.distill.people.bench`.

Prints frames a second of every stage on a device, checks the Triton z-buffer against the plain
one, and writes sheets of people to look at.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flashtalk_cli.distill.people import raster
from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.clips import ClipStream, Drawing, Plan, draw_plan, motion_of, render_clips
from flashtalk_cli.distill.people.figure import pose
from flashtalk_cli.distill.people.render import film, prepare, project
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.log import setup

log = logging.getLogger(__name__)


def _seconds(device: str, work: object, repeats: int = 3) -> float:
    assert callable(work)
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


@torch.inference_mode()
def stages(plans: list[Plan], drawing: Drawing, device: str) -> None:
    """Times each stage for one batch, and compares the two z-buffers."""
    specs, backdrops = [plan.spec for plan in plans], [plan.backdrop for plan in plans]
    height, width = drawing.height_px, drawing.width_px
    motion = motion_of([plan.performance for plan in plans], device)
    scene = prepare(specs, height, width, device, backdrops=backdrops)
    vertices, _, _ = pose(scene.figure, motion, scene.people("body_turn"))
    screen = project(scene, vertices)
    screen = torch.cat([screen[..., :2] * 2, screen[..., 2:]], -1)
    frames, faces = len(screen), scene.figure.faces
    log.info(
        "%d clips of %d frames, %d vertices, %d triangles",
        len(plans),
        drawing.n_frames,
        screen.shape[1],
        len(faces),
    )
    times = {
        "prepare": lambda: prepare(specs, height, width, device, backdrops=backdrops),
        "pose": lambda: pose(scene.figure, motion, scene.people("body_turn")),
        "z-buffer": lambda: raster.rasterise(screen, faces, 2 * height, 2 * width),
        "film": lambda: film(scene, motion),
    }
    for name, work in times.items():
        spent_s = _seconds(device, work)
        log.info("%-10s %8.1f ms a batch, %8.0f frames/s", name, 1000 * spent_s, frames / spent_s)
    some = screen[:4]
    plain, near = raster.rasterise_plain(some, faces, 2 * height, 2 * width)
    chosen, near_chosen = raster.rasterise(some, faces, 2 * height, 2 * width)
    log.info(
        "z-buffers agree on %.5f of the samples; largest difference of nearness %.2e",
        (plain == chosen).float().mean().item(),
        (near - near_chosen).abs().max().item(),
    )


def sheet(pictures: list[np.ndarray], columns: int) -> Image.Image:
    """Pictures of one size in rows."""
    rows = [
        np.concatenate(pictures[i : i + columns], 1)
        for i in range(0, len(pictures) // columns * columns, columns)
    ]
    return Image.fromarray(np.concatenate(rows, 0))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--sheets", type=Path)
    given = parser.parse_args()
    setup(debug=True)
    bank = SpeechBank(given.bank, "train")
    drawing = Drawing(batch=given.batch)
    began = time.perf_counter()
    plans = [draw_plan(number, bank, drawing) for number in range(given.batch)]
    log.info("plan       %8.1f ms a clip on one core", 1000 * (time.perf_counter() - began) / given.batch)
    stages(plans, drawing, given.device)
    stream = ClipStream(bank, drawing, first=1000, device=given.device, workers=given.workers)
    waited_s, rendered_s, frames = 0.0, 0.0, 0
    source = iter(stream.plans)
    for number in range(given.batches + 3):
        began = time.perf_counter()
        plans = next(source)
        planned = time.perf_counter()
        _ = stream.render(plans).frames.sum().item()
        if number >= 3:  # the first batches start workers and compile kernels
            waited_s, rendered_s = waited_s + planned - began, rendered_s + time.perf_counter() - planned
            frames += drawing.batch * drawing.n_frames
    log.info(
        "stream     %8.0f frames/s with %d workers; %.0f ms a batch waiting for plans, %.0f ms rendering",
        frames / (waited_s + rendered_s),
        given.workers,
        1000 * waited_s / given.batches,
        1000 * rendered_s / given.batches,
    )
    if given.sheets:
        _sheets(bank, given.device, given.sheets)


def _sheets(bank: SpeechBank, device: str, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name, side, count, columns in (("many", 160, 96, 12), ("large", 512, 12, 4)):
        drawing = Drawing(side, side, n_frames=8, batch=1)
        pictures = []
        for number in range(5000, 5000 + count):
            plan = draw_plan(number, bank, drawing)
            clip = render_clips([plan.spec], [plan.performance], (side, side), device)
            pictures.append(clip.frames[0, 5].cpu().numpy())
        sheet(pictures, columns).save(into / f"{name}.png")


if __name__ == "__main__":
    told_in_a_line(main)
