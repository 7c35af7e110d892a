"""Train the embedded model's parts: what runs on the machine with the GPU.

    python -m flashtalk_cli.distill.components.train vae    BANK OUT --seconds 540
    python -m flashtalk_cli.distill.components.train speech BANK OUT --seconds 400
    python -m flashtalk_cli.distill.components.train decoder BANK OUT --seconds 240 --start OUT/vae.safetensors
    python -m flashtalk_cli.distill.components.train both    BANK OUT --seconds 300 --start OUT/vae.safetensors
    python -m flashtalk_cli.distill.components.train measure BANK OUT --start OUT/vae.safetensors

The first two run side by side; the third goes on with the VAE's decoder alone, at any time later; the fourth with
both its halves, held to the latents that a motion network knows; the fifth only measures a VAE.
Each writes its weights to OUT about every minute and at its end, and what it measured to OUT/vae.json and
OUT/speech.json; the first trains the image encoder too, and the second, ended early, goes on from OUT/speech.state. `--seconds` is all the time that a command takes, measuring at
its end included.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from flashtalk_cli.distill.components import image, speech, vae, vae_training
from flashtalk_cli.distill.components.pool import ClipPool
from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.clips import Drawing, draw_plan, render_clips
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.log import setup
from flashtalk_cli.models.vae import Vae

log = logging.getLogger(__name__)


def train_vae(
    bank: Path,
    out: Path,
    seconds: float,
    device: str,
    plan: vae_training.Plan,
    workers: int,
    image_s: float,
    start: Path | None = None,
) -> None:
    """Renders, trains the VAE and the image encoder, measures on held-out people, and writes all.

    start: weights of a VAE to go on with; their latents' statistics and the image encoder are left alone.
    """
    began_s = time.monotonic()
    drawing = Drawing(plan.pool_side_px, plan.pool_side_px, plan.pool_frames, batch=min(16, plan.pool_clips))
    pool = ClipPool(
        SpeechBank(bank, "train"), drawing, plan.pool_clips, device, workers, close_share=plan.close_share
    )
    pool.fill(plan.pool_clips, began_s + plan.fill_s)
    figures: dict[str, Any] = {
        "pool_clips": pool.count,
        "pool_s": round(time.monotonic() - began_s, 1),
        "device": _name(device),
    }
    log.info("vae %s", figures)
    measuring_s = 1.3 * plan.held_out_clips
    given = load_file(start, device=device) if start else None
    left_s = seconds - (time.monotonic() - began_s) - (0 if given else image_s) - measuring_s
    plan = replace(plan, seconds=left_s)

    def save(average: Vae, step: int) -> None:
        vae.save_weights(average, out / "vae_part.safetensors")
        log.info("vae saved at step %d", step)

    model, lines = vae_training.train(pool, plan, device, start=given, save=save)
    vae.save_weights(model, out / "vae_part.safetensors")
    pool.close()
    figures["log"] = lines
    if not given:
        figures |= _normalise(model, pool, plan)
        encoder, figures["image"] = image.train(pool, image_s, device)
        image.save_weights(encoder, out / "image.safetensors")
    vae.save_weights(model, out / "vae.safetensors")
    write_vae_figures(model, bank, out, device, plan, figures)


def write_vae_figures(
    model: Vae, bank: Path, out: Path, device: str, plan: vae_training.Plan, figures: dict[str, Any]
) -> None:
    """Measure a VAE on held-out people, as the generator frames them today: OUT/vae.json and a picture, OUT/vae.png."""
    clips = held_out_clips(bank, plan.held_out_clips, device, plan.pool_frames)
    figures["held_out"] = vae.measure(model, clips)
    log.info("vae %s", figures["held_out"])
    strip(model, clips).save(out / "vae.png")
    write_json(out / "vae.json", figures)


def _normalise(model: Vae, pool: ClipPool, plan: vae_training.Plan) -> dict[str, list[float]]:
    """Give the latents zero mean and unit variance over the pool; what they had."""
    height, width = plan.batches[-1].height_px, plan.batches[-1].width_px
    seen = [
        pool.draw(1, plan.pool_frames, height, width, np.random.default_rng(i)) * 2 - 1 for i in range(64)
    ]
    mean, std = vae.latent_statistics(model, seen)
    vae.normalise_latents(model, mean, std)
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def train_speech(bank: Path, out: Path, seconds: float, device: str, plan: speech.Plan) -> None:
    """Trains the speech encoder, measures on held-out voices and sentences, and writes all."""
    began_s = time.monotonic()
    spoken, unheard = SpeechBank(bank, "train"), SpeechBank(bank, "held_out")
    kept = out / "speech.state"

    def save(module: nn.Module, step: int) -> None:
        speech.save_weights(module, out / "speech.safetensors")

    plan = replace(
        plan, seconds=seconds - plan.fill_s - 0.2 * plan.measured_windows - (time.monotonic() - began_s)
    )
    module, readers, lines = speech.train(spoken, plan, device, save, kept)
    speech.save_weights(module, out / "speech.safetensors")
    count = plan.measured_windows
    figures = {
        "hours": round(spoken.hours, 2), "held_out": speech.measure(module, readers, unheard, count),
        "held_out_disturbed": speech.measure(module, readers, unheard, count, clean=False),
        "trained": speech.measure(module, readers, spoken, count),
        "opening_read": {
            "held_out": speech.read_opening(module, spoken, unheard, count),
            "trained": speech.read_opening(module, spoken, spoken, count),
        },
        "log": lines, "device": _name(device),
    }  # fmt: skip
    log.info("speech %s %s", figures["held_out"], figures["opening_read"])
    write_json(out / "speech.json", figures)
    kept.unlink(missing_ok=True)  # done: the same command begins another


def held_out_clips(bank: Path, count: int, device: str, n_frames: int = 33, side_px: int = 144) -> Tensor:
    """Clips uint8 [count, T, side, side, 3] of held-out people as the generator frames them."""
    held_out, drawing = (
        SpeechBank(bank, "held_out"),
        Drawing(side_px, side_px, n_frames, batch=1, held_out=True),
    )
    plans = [draw_plan(number, held_out, drawing) for number in range(count)]
    rendered = [render_clips([p.spec], [p.performance], (side_px, side_px), device).frames for p in plans]
    return torch.cat(rendered)


def strip(model: Vae, clips: Tensor, count: int = 8) -> Image.Image:
    """Columns of truth above reconstruction, of a clip's first and last frame."""
    rows = []
    for clip in clips[:count]:
        made = vae.reconstruct(model, clip)
        for at in (0, len(clip) - 1):
            rows.append(torch.cat([clip[at].cpu(), made[at].cpu()], 0))
    return Image.fromarray(np.ascontiguousarray(rearrange(torch.stack(rows), "n h w c -> h (n w) c").numpy()))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file, for people to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else "cpu"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("vae", "speech", "decoder", "both", "measure"))
    parser.add_argument("bank", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help="all that a training may take")
    parser.add_argument("--fill-seconds", type=float, default=60.0)
    parser.add_argument("--image-seconds", type=float, default=25.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--start", type=Path, help="weights to begin with, or to measure")
    parser.add_argument("--toy", action="store_true", help="run every line at a size that teaches nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.part in ("decoder", "both", "measure") and given.start is None:
        parser.error(f"{given.part} takes a VAE: name its weights with --start")
    if given.part == "speech" and given.start is not None:
        parser.error("speech is trained from nothing: leave out --start")
    if given.part != "measure" and given.seconds is None:
        parser.error("say how long it may train with --seconds")
    setup(debug=True)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    if given.part == "speech":
        whole_speech = speech.TOY if given.toy else speech.Plan()
        heard = replace(whole_speech, fill_s=given.fill_seconds, workers=given.workers)
        train_speech(given.bank, given.out, given.seconds, given.device, heard)
    elif given.part == "measure":
        model = Vae(vae.MINI).to(given.device)
        model.load_state_dict(load_file(given.start))
        seen = vae_training.TOY if given.toy else vae_training.Plan()
        write_vae_figures(
            model.eval(), given.bank, given.out, given.device, seen, {"measured": str(given.start)}
        )
    else:
        plans = {"vae": vae_training.Plan(), "decoder": vae_training.FINER, "both": vae_training.BOTH}
        whole = plans[given.part]
        small = replace(
            vae_training.TOY, hold=whole.hold, only_decoder=whole.only_decoder, turned=whole.turned
        )
        seen = replace(small if given.toy else whole, fill_s=given.fill_seconds)
        train_vae(
            given.bank, given.out, given.seconds, given.device, seen, given.workers, given.image_seconds,
            given.start,
        )  # fmt: skip


if __name__ == "__main__":
    told_in_a_line(main)
