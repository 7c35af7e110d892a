"""A panel of people whom no training has seen, who talk for minutes: what evaluation puts to every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashtalk_cli.distill.config import Evaluation
from flashtalk_cli.distill.encoding import Clip, Encoders, colour_of, loudness_gain
from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.clips import motion_of, render_clips
from flashtalk_cli.distill.people.figure import lip_gap
from flashtalk_cli.distill.people.head import unit_names
from flashtalk_cli.distill.people.perform import perform
from flashtalk_cli.distill.people.render import prepare
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM, draw_person
from flashtalk_cli.distill.shards import windows_of
from flashtalk_cli.pipeline.colour import Statistics
from flashtalk_cli.pipeline.session import MASK_CHANNELS

FIRST_PERSON = 500_000  # of the held-out ones: others are in the package's portraits and tests
PEOPLE_AT_ONCE = 4


@dataclass(frozen=True)
class Panel:
    """P people, one picture each and one talk each, and the truth about their mouths."""

    pictures: Tensor  # uint8 [P, H, W, 3], the first frames of the truth
    frames: Tensor  # uint8 [P, F, H, W, 3], the truth's beginning, on the CPU
    gap: Tensor  # [P, T] between the lips in all of the talk, in units of the face
    mouth_box: Tensor  # [P, 4] px
    y: Tensor
    tokens: Tensor
    text: Tensor  # [1, L, text_dim]
    colour: Statistics
    picture_latent: Tensor
    sound: list[np.ndarray]  # at the gain of use; sample 0 is the beginning of frame 0
    engines: list[str]  # whose voice each speaks with: espeak, flite or kokoro
    encoders: Encoders

    def __len__(self) -> int:
        return len(self.pictures)

    def windows(self, chunk: int) -> Tensor:
        """What each person hears in a chunk of use: [P, F, 5, layers, dim] on the device."""
        sampling = self.encoders.base.sampling
        start = chunk * sampling.new_frames - sampling.motion_frames
        clips = [Clip(self.pictures[:0], samples, origin=0) for samples in self.sound]
        sounds = np.concatenate([self.encoders.sounds(clip, [start]) for clip in clips])
        return windows_of(self.encoders.hear(sounds)).to(self.encoders.device)

    def saying(self, samples: np.ndarray) -> Panel:
        """The same people, all saying this: float32 at 16 kHz, brought to the gain of use."""
        gain = np.float32(loudness_gain(samples, self.encoders.base.hearing.loudness_lufs))
        return replace(self, sound=[samples * gain] * len(self))

    def hushed(self) -> Panel:
        """The same people with nothing to say."""
        return replace(self, sound=[np.zeros_like(samples) for samples in self.sound])


def draw_panel(
    encoders: Encoders, bank_folder: Path, plan: Evaluation, told: Callable[[int], None] = lambda _: None
) -> Panel:
    """Held-out people with held-out voices and sentences; the same for every evaluation of one size.

    told: called with how many are drawn; on a CPU each takes a minute.
    """
    base = encoders.base
    sampling, canvas = base.sampling, base.canvas
    bank = SpeechBank(bank_folder, "held_out")
    n_frames = sampling.new_frames * max(plan.long_chunks, plan.short_chunks)
    n_shown = sampling.new_frames * plan.short_chunks
    specs, performances, sound, engines = [], [], [], []
    for number in range(plan.people):
        rng = np.random.default_rng((41, number))
        spec = draw_person(HELD_OUT_FROM + FIRST_PERSON + number)
        speech = bank.draw(rng, n_frames + sampling.fps)
        specs.append(spec)
        engines.append(speech.voice.partition(":")[0])
        performances.append(perform(spec, speech.sounds, speech.loudness, unit_names(), seed=spec.seed))
        gain = loudness_gain(speech.samples, base.hearing.loudness_lufs)
        sound.append((speech.samples * np.float32(gain)).astype(np.float32))
    frames, gaps, boxes = [], [], []
    at_once = PEOPLE_AT_ONCE if encoders.device.type == "cuda" else 1
    for first in range(0, plan.people, at_once):
        told(first)
        some = slice(first, first + at_once)
        size_px, device = (canvas.height_px, canvas.width_px), str(encoders.device)
        shown = [performance.cut(0, n_shown) for performance in performances[some]]
        clip = render_clips(specs[some], shown, size_px, device)
        frames.append(clip.frames.cpu())
        boxes.append(clip.mouth_box.cpu().float())
        with torch.no_grad():
            scene = prepare(specs[some], *size_px, device)
            gaps.append(
                lip_gap(scene.figure, motion_of(performances[some], device).curves)[:, :n_frames].cpu()
            )
    truth = torch.cat(frames)
    encoded = encoders.encode_pictures(truth[:, 0])
    latents = encoded["picture"].to(encoders.device).float()
    mask = torch.zeros_like(latents[:, :MASK_CHANNELS])
    mask[:, :, 0] = 1
    return Panel(
        pictures=truth[:, 0],
        frames=truth,
        gap=torch.cat(gaps),
        mouth_box=torch.cat(boxes),
        y=torch.cat([mask, latents], dim=1),
        tokens=encoded["tokens"].to(encoders.device),
        text=encoders.encode_prompts([sampling.prompt])[0][None],
        colour=colour_of(encoded["colour"].to(encoders.device)),
        picture_latent=latents[:, :, :1],
        sound=sound,
        engines=engines,
        encoders=encoders,
    )
