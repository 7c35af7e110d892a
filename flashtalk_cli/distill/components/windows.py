"""Windows of speech to learn from: drawn from a bank, kept on the device, and varied.

Voices vary by the bank; on top of it speed and pitch together, the throat's resonances, whispering,
colouring of the spectrum, noise, gaps and rooms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flashtalk_cli.config import SAMPLE_RATE_HZ
from flashtalk_cli.distill.people.bank import SpeechBank, disturb
from flashtalk_cli.distill.people.perform import FPS, articulate, frame_sounds
from flashtalk_cli.distill.people.phonemes import SHAPES

WINDOW_FRAMES = 200  # 8 s, what rendering hears at a time
HOP = SAMPLE_RATE_HZ // FPS
SPECTRUM, STEP = 512, 128  # samples of a short spectrum, and from one to the next
THROAT_SAMPLES = 30  # of the cepstrum: a voice's own period is longer, up to 530 Hz
FAINTEST = 1e-4  # of a window's loudest spectrum; below nothing is told apart


@dataclass(frozen=True)
class Windows:
    """Windows of speech and what is true of them: samples int16 [N, 128000], sounds int64 [N, 200],
    shapes float32 [N, 200, 7], loudness float32 [N, 200]."""

    samples: Tensor
    sounds: Tensor
    shapes: Tensor
    loudness: Tensor


def draw_window(bank: SpeechBank, rng: np.random.Generator, clean: bool = False) -> tuple[np.ndarray, ...]:
    """One window: samples int16, sounds, shapes and loudness; a few have no speech at all."""
    speech = bank.draw(rng, WINDOW_FRAMES)
    samples = speech.samples if clean else disturb(speech.samples, rng)
    sounds = frame_sounds(speech.sounds, WINDOW_FRAMES)
    shapes, loudness = articulate(speech.sounds, WINDOW_FRAMES), speech.loudness
    if not clean and rng.random() < 0.03:
        samples = disturb(np.zeros_like(samples), rng)
        sounds, shapes, loudness = np.zeros_like(sounds), np.zeros_like(shapes), np.zeros_like(loudness)
    pcm = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
    return pcm, sounds, shapes.astype(np.float32), np.minimum(loudness, 1.5).astype(np.float32)


class _Stream(IterableDataset):
    def __init__(self, bank: SpeechBank, seed: int) -> None:
        self.bank, self.seed = bank, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = np.random.default_rng((41, self.seed, worker.id if worker else 0))
        while True:
            drawn = [draw_window(self.bank, rng) for _ in range(8)]
            yield tuple(torch.from_numpy(np.stack(values)) for values in zip(*drawn, strict=True))


class WindowPool:
    """Windows on the device, replaced one after another by new ones."""

    def __init__(self, bank: SpeechBank, n: int, device: str, workers: int, seed: int) -> None:
        self.windows = Windows(
            torch.empty(n, WINDOW_FRAMES * HOP, dtype=torch.int16, device=device),
            torch.empty(n, WINDOW_FRAMES, dtype=torch.int64, device=device),
            torch.empty(n, WINDOW_FRAMES, len(SHAPES), device=device),
            torch.empty(n, WINDOW_FRAMES, device=device),
        )
        self.count, self._next = 0, 0
        loader: DataLoader = DataLoader(
            _Stream(bank, seed),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        self._stream = iter(loader)

    def add(self) -> None:
        """Put the next few windows in the place of the oldest."""
        drawn = next(self._stream)
        n = len(self.windows.samples)
        places = (torch.arange(len(drawn[0])) + self._next) % n
        for kept, new in zip(vars(self.windows).values(), drawn, strict=True):
            kept[places.to(kept.device)] = new.to(kept.device, kept.dtype)
        self._next = int(places[-1] + 1) % n
        self.count = min(n, self.count + len(places))

    def draw(self, batch: int, generator: Generator) -> Windows:
        """Random windows."""
        device = self.windows.samples.device
        which = (torch.rand(batch, generator=generator, device=device) * self.count).long()
        return Windows(*(kept[which] for kept in vars(self.windows).values()))


def vary(windows: Windows, generator: Generator, rng: np.random.Generator) -> tuple[Tensor, Windows]:
    """Windows in other voices: samples float32 [N, samples], normalised as rendering does, and labels.

    A batch is played faster or slower as a whole (higher or lower with it), each window by a throat
    and through a spectrum of its own, with noise and short gaps, and one in four begins with zeros.
    """
    samples = windows.samples.float() / 32768
    count, total = samples.shape
    device = samples.device
    speed = float(np.exp(rng.uniform(-0.25, 0.25))) if rng.random() < 0.85 else 1.0
    n_frames = WINDOW_FRAMES if speed <= 1 else int(WINDOW_FRAMES / speed)
    taken = min(total, int(n_frames * HOP * speed))
    played = F.interpolate(samples[:, None, :taken], size=n_frames * HOP, mode="linear", align_corners=False)[
        :, 0
    ]
    times = ((torch.arange(n_frames, device=device) + 0.5) * speed).long().clamp_max(WINDOW_FRAMES - 1)
    labels = Windows(played, windows.sounds[:, times], windows.shapes[:, times], windows.loudness[:, times])
    played = _colour(_revoiced(played, generator), generator)
    level = 10 ** (-torch.rand(count, 1, generator=generator, device=device) * 2 - 1.2)
    played = played + torch.randn(played.shape, generator=generator, device=device) * level * played.std(
        1, keepdim=True
    )
    played = _interrupted(played, generator)
    silent = torch.rand(count, 1, generator=generator, device=device) * 3.6 - 2.7  # one in four: up to 90 %
    began = torch.linspace(0, 1, played.shape[1], device=device) >= silent
    heard = torch.linspace(0, 1, n_frames, device=device) >= silent
    labels = Windows(played, labels.sounds * heard, labels.shapes * heard[..., None], labels.loudness * heard)
    return normalise(played * began), labels


def _revoiced(samples: Tensor, generator: Generator) -> Tensor:
    """Samples [N, samples] of other throats: resonances up to 28 % higher or lower, and one in eight whispers.

    A spectrum is an envelope, the throat's, times what is too fine for it, the voice's harmonics. The envelope
    is stretched along the frequencies (as in vocal tract length perturbation, Jaitly and Hinton 2013, where
    harmonics move too); pitch, timing and loudness stay, so labels do.
    """
    count, total = samples.shape
    device = samples.device
    window = torch.hann_window(SPECTRUM, device=device)
    spectrum = torch.stft(samples, SPECTRUM, STEP, window=window, return_complex=True)
    loud = spectrum.abs()
    floor = FAINTEST * loud.amax((1, 2), keepdim=True) + 1e-9
    cepstrum = torch.fft.irfft(loud.clamp_min(floor).log(), dim=1)
    cepstrum[:, THROAT_SAMPLES : SPECTRUM - THROAT_SAMPLES + 1] = 0
    envelope = torch.fft.rfft(cepstrum, dim=1).real
    factor = torch.exp((torch.rand(count, 1, generator=generator, device=device) * 2 - 1) * 0.25)
    bins = torch.arange(envelope.shape[1], device=device)
    at = (bins / factor).clamp_max(len(bins) - 1.001)
    low, part = at.long()[..., None].expand(envelope.shape), (at % 1)[..., None]
    stretched = torch.lerp(envelope.gather(1, low), envelope.gather(1, low + 1), part)
    made = spectrum * (stretched - envelope).exp()
    whispers = torch.rand(count, 1, 1, generator=generator, device=device) < 0.125
    turn = torch.rand(made.shape, generator=generator, device=device) * (2 * math.pi)
    made = torch.where(whispers, torch.polar(made.abs(), turn), made)
    made = torch.istft(made, SPECTRUM, STEP, window=window, length=total)
    return made * (samples.norm(dim=1, keepdim=True) / (made.norm(dim=1, keepdim=True) + 1e-9))


def _colour(samples: Tensor, generator: Generator) -> Tensor:
    """Samples through filters that rise or fall by up to about 15 dB between random bands."""
    bands = torch.randn(len(samples), 1, 14, generator=generator, device=samples.device) * 0.8
    spectrum = torch.fft.rfft(samples)
    gain = F.interpolate(bands, size=spectrum.shape[-1], mode="linear", align_corners=True)[:, 0].exp()
    return torch.fft.irfft(spectrum * gain, n=samples.shape[-1])


def _interrupted(samples: Tensor, generator: Generator) -> Tensor:
    """Samples with gaps of 40 to 120 ms, about two a second: what is missing must be told from around it."""
    slots = samples.shape[1] // (HOP // 2)
    begins = torch.rand(len(samples), 1, slots, generator=generator, device=samples.device) < 0.02
    longer = torch.rand(len(samples), 1, slots, generator=generator, device=samples.device) < 0.5
    gap = F.max_pool1d(begins.float(), 3, stride=1, padding=1)
    gap = torch.maximum(gap, F.max_pool1d((begins & longer).float(), 7, stride=1, padding=3))
    return samples * (1 - F.interpolate(gap, size=samples.shape[1], mode="nearest")[:, 0])


def normalise(samples: Tensor) -> Tensor:
    """Zero mean and unit variance per window, as `SpeechEncoder.encode` does it."""
    return (samples - samples.mean(1, keepdim=True)) / torch.sqrt(
        samples.var(1, correction=0, keepdim=True) + 1e-7
    )
