"""Frames and sound to examples, by the same encoders and the same arithmetic as rendering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashtalk_cli.config import Preset
from flashtalk_cli.distill.shards import Origin, as_stored, digest_of
from flashtalk_cli.media.loudness import LoudnessMeter, gain_to
from flashtalk_cli.models import image as image_models
from flashtalk_cli.models import weights
from flashtalk_cli.models.folder import ModelFolder
from flashtalk_cli.models.image import ImageEncoder
from flashtalk_cli.models.speech import SpeechEncoder
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.pipeline.chunks import WINDOW_FRAMES, heard_from
from flashtalk_cli.pipeline.colour import Statistics, to_lab

VIDEOS_AT_ONCE = 64  # windows of 160 x 160 that the VAE encodes together; fewer of larger ones
AREA_AT_ONCE_PX = VIDEOS_AT_ONCE * 160 * 160
SOUNDS_AT_ONCE = 64


@dataclass(frozen=True)
class Clip:
    """A piece of video with its sound, before it is encoded.

    frames: uint8 [F, H, W, 3] on any device. samples: float32 at 16 kHz, already at the file's gain;
    sample `origin` belongs to the beginning of frame 0, those before and after are heard too.
    """

    frames: Tensor
    samples: np.ndarray
    origin: int
    box: tuple[float, float, float, float] | None = None
    prompt: int = 0


def loudness_gain(samples: np.ndarray, target_lufs: float) -> float:
    """The one gain of a file, as rendering applies it."""
    meter = LoudnessMeter()
    meter.add(samples)
    return gain_to(meter.integrated_lufs(), target_lufs)


def cut_sound(samples: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Samples [start, stop), zeros where there are none."""
    cut = np.zeros(stop - start, np.float32)
    first, last = max(0, start), min(stop, len(samples))
    if last > first:
        cut[first - start : last - start] = samples[first:last]
    return cut


class Encoders:
    """The networks of a model folder that make examples; its diffusion transformer is not needed."""

    def __init__(self, folder: ModelFolder, base: Preset, device: torch.device) -> None:
        self.base, self.device, self.folder = base, device, folder
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.vae: Vae = weights.load_vae(folder, device, dtype)
        self.speech: SpeechEncoder = weights.load_speech_encoder(folder, device, torch.float32)
        self.image: ImageEncoder = weights.load_image_encoder(folder, device, dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Rows [L, dim] of each prompt; the text encoder is loaded for this alone."""
        text = weights.load_text_encoder(self.folder, self.device, self.vae.conv1.weight.dtype)
        return [text.encode(prompt) for prompt in prompts]

    @torch.no_grad()
    def encode_windows(self, frames: Tensor) -> Tensor:
        """Frames uint8 [N, F, H, W, 3] to latents float16 [N, 16, T, h, w], on the CPU."""
        some_at_once = frames.chunk(_pieces(len(frames), frames.shape[2] * frames.shape[3]))
        return torch.cat([self._latents(as_video(some, self.device)).cpu() for some in some_at_once])

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures uint8 [M, H, W, 3] to `picture`, `tokens` and `colour` of a shard, on the CPU."""
        found: dict[str, list[Tensor]] = {"picture": [], "tokens": [], "colour": []}
        for some in pictures.chunk(_pieces(len(pictures), pictures.shape[1] * pictures.shape[2])):
            video = as_video(some[:, None], self.device)
            unseen = video.new_zeros(*video.shape[:2], self.base.sampling.chunk_frames - 1, *video.shape[3:])
            found["picture"].append(self._latents(torch.cat([video, unseen], dim=2)).cpu())
            found["tokens"].append(self._tokens(video[:, :, 0]).cpu())
            found["colour"].append(stack_colour(Statistics.of(to_lab(video))).cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _latents(self, video: Tensor) -> Tensor:
        latents, _ = self.vae.encode(video)
        return latents.half()

    def _tokens(self, pictures: Tensor) -> Tensor:
        weight = next(self.image.module.parameters())
        pixels = image_models.normalise(pictures, self.image.params.image_px)
        return image_models.tokens(self.image.module, pixels.to(weight.dtype)).half()

    def sounds(self, clip: Clip, starts: Sequence[int]) -> np.ndarray:
        """What is heard around windows that begin at those frames of a clip: float32 [N, samples]."""
        spans = [heard_from(start, self.base.sampling, self.base.hearing) for start in starts]
        cuts = [(clip.origin + span.start_sample, clip.origin + span.stop_sample) for span in spans]
        return np.stack([cut_sound(clip.samples, *cut) for cut in cuts])

    @torch.no_grad()
    def hear(self, sounds: np.ndarray) -> Tensor:
        """What `sounds` gave, as features: float16 [N, F + 4, layers, dim], on the CPU."""
        sampling = self.base.sampling
        span = heard_from(0, sampling, self.base.hearing)
        frames = torch.arange(sampling.chunk_frames + WINDOW_FRAMES - 1) - WINDOW_FRAMES // 2
        rows = (span.first_frame + frames).clamp(0, span.n_frames - 1).to(self.device)
        return torch.cat(
            [
                self.speech.encode_each(some.to(self.device), span.n_frames)[:, rows].half().cpu()
                for some in torch.from_numpy(sounds).split(SOUNDS_AT_ONCE)
            ]
        )

    def encode(self, clips: Sequence[Clip], n_pictures: int) -> dict[str, Tensor]:
        """A shard's tensors for clips of one size, each at least a chunk long.

        Windows follow each other as chunks do; pictures are the first frames of windows spread
        over the clip.
        """
        sampling = self.base.sampling
        parts: dict[str, list[Tensor]] = {}

        def keep(**found: Tensor) -> None:
            for name, value in found.items():
                parts.setdefault(name, []).append(value)

        for number, clip in enumerate(clips):
            starts = window_starts(len(clip.frames), sampling.chunk_frames, sampling.new_frames)
            shown = picture_frames(starts, n_pictures)
            windows = torch.stack([clip.frames[s : s + sampling.chunk_frames] for s in starts])
            n, m = len(starts), len(shown)
            keep(
                frames=windows,
                pictures=clip.frames[torch.tensor(shown)],
                sounds=torch.from_numpy(self.sounds(clip, starts)),
                start=torch.tensor(starts),
                clip=torch.full((n,), number),
                text=torch.full((n,), clip.prompt),
                box=torch.tensor(clip.box or (0.0, 0.0, 0.0, 0.0)).expand(n, 4),
                picture_clip=torch.full((m,), number),
                picture_frame=torch.tensor(shown),
            )
        whole = {name: torch.cat(found) for name, found in parts.items()}
        latents = self.encode_windows(whole.pop("frames"))
        pictures = self.encode_pictures(whole.pop("pictures"))
        heard = self.hear(whole.pop("sounds").numpy())
        return as_stored({**whole, **pictures, "latents": latents, "heard": heard})


def origin_of(
    folder: ModelFolder, base: Preset, shard_clips: int, prompts: list[str], *, held_out: bool = False
) -> Origin:
    """What examples made with this model and preset say of themselves."""
    return Origin(
        chunk_frames=base.sampling.chunk_frames,
        motion_frames=base.sampling.motion_frames,
        fps=base.sampling.fps,
        area_px=base.canvas.area_px,
        shard_clips=shard_clips,
        held_out=held_out,
        hearing=base.hearing,
        encoders=digest_of(folder),
        prompts=prompts,
    )


def _pieces(n: int, area_px: int) -> int:
    """Equal pieces that n videos go through the VAE in."""
    return -(-n * area_px // AREA_AT_ONCE_PX)


def window_starts(n_frames: int, chunk_frames: int, new_frames: int) -> list[int]:
    """First frames of the windows of a clip, one after another as chunks in use."""
    return list(range(0, n_frames - chunk_frames + 1, new_frames))


def picture_frames(starts: Sequence[int], n_pictures: int) -> list[int]:
    """First frames of up to n windows, spread evenly; with one window there is one picture."""
    places = np.linspace(0, len(starts) - 1, min(n_pictures, len(starts)))
    return sorted({starts[round(place)] for place in places})


def as_video(frames: Tensor, device: torch.device) -> Tensor:
    """Bytes [N, F, H, W, 3] to [N, 3, F, H, W] in [-1, 1] on the device."""
    return rearrange(frames.to(device), "n f h w c -> n c f h w").float() / 127.5 - 1


def stack_colour(statistics: Statistics) -> Tensor:
    """Statistics of N single frames as [N, 2, 3]."""
    both = torch.stack([statistics.mean, statistics.std], dim=1)
    return both.reshape(len(both), 2, 3)


def colour_of(stacked: Tensor) -> Statistics:
    """The way back: [N, 2, 3] to statistics of N single frames."""
    mean, std = stacked.float()[..., None, None, None].unbind(1)
    return Statistics(mean, std)
