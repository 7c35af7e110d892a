"""A bank of speech that travels: hours of sentences with their sounds, made once, mixed without end.

    python -m flashtalk_cli.distill.people.bank runs/speech --hours 4

writes `train.opus`, `train.npz`, `held_out.opus` and `held_out.npz`: utterances one after another
and an index with their places, voices, texts and sounds. Held-out voices and sentences are in the
second pair alone. Making it needs what speaks (`--engines` leaves some out): espeak-ng, flite, festival with its voices
(`festival.SPEAKERS` names them; each is a package festvox-...) and Kokoro's files (`kokoro.py` says which and
where); using it needs only soundfile.

`SpeechBank.draw` strings utterances of one voice together with pauses, so that an hour of bank is
many hours of speech; `disturb` adds rooms, noise and gain to what a listener hears.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from flashtalk_cli.config import SAMPLE_RATE_HZ
from flashtalk_cli.distill.people.perform import FPS
from flashtalk_cli.distill.people.phonemes import Sound
from flashtalk_cli.distill.people.sentences import draw_sentence
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM
from flashtalk_cli.distill.people.voices import ENGINES, HELD_OUT_SHARES, Utterance, Voice, draw_voice, say
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.errors import InputError
from flashtalk_cli.log import setup
from flashtalk_cli.media.ffmpeg import find_ffmpeg

log = logging.getLogger(__name__)

GAP_SAMPLES = SAMPLE_RATE_HZ // 10
SENTENCES_A_VOICE = 6
ATTEMPTS, ATTEMPTS_APART = 8, 50_000_000  # to find a sentence that a voice can say, and between their seeds
BITRATE = "14k"
TARGET_RMS = 0.08


@dataclass(frozen=True)
class Speech:
    """Samples float32 [N] at 16 kHz, the sounds in them, and how loud each frame of 1 / 25 s is.

    loudness [T] is about 1 where someone speaks and 0 in silence; N = T * 640.
    """

    samples: np.ndarray
    sounds: list[Sound]
    loudness: np.ndarray
    voice: str


def loudness_of(samples: np.ndarray) -> np.ndarray:
    """Loudness [T] of 16 kHz speech relative to its loud parts, smoothed over about 80 ms."""
    hop = SAMPLE_RATE_HZ // FPS
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    rms = np.sqrt((frames**2).mean(1) + 1e-10)
    padded = np.pad(rms, 1, mode="edge")
    smooth = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    usual = np.sqrt((smooth**2).mean() / max((smooth > 0.15 * smooth.max()).mean(), 1e-3)) + 1e-6
    return np.clip(smooth / max(usual, 5e-3), 0, 2.5)


def _level(utterance: Utterance) -> Utterance:
    rms = float(np.sqrt((utterance.samples**2).mean() + 1e-9))
    return Utterance(np.clip(utterance.samples * (TARGET_RMS / rms), -1, 1), utterance.sounds)


def _voice_group(job: tuple[int, bool, Sequence[str]]) -> list[tuple[Voice, str, Utterance]]:
    seed, held_out, engines = job
    rng = np.random.default_rng((9, seed, held_out))
    voice, language = draw_voice(rng, held_out=held_out, engines=engines)
    found = []
    for number in range(SENTENCES_A_VOICE):
        first = seed * SENTENCES_A_VOICE + number + (HELD_OUT_FROM if held_out else 0)
        text, utterance = _said(voice, language, first)
        found.append((voice, text, _level(utterance)))
    return found


def _said(voice: Voice, language: str, seed: int) -> tuple[str, Utterance]:
    """A sentence of the voice's language, of that seed or a later one: some voices cannot say every invented word."""
    for _ in range(ATTEMPTS - 1):
        text = draw_sentence(seed, language)
        try:
            return text, say(voice, text)
        except InputError:
            seed += ATTEMPTS_APART
    text = draw_sentence(seed, language)
    return text, say(voice, text)


def make(into: Path, split: str, hours: float, workers: int, engines: Sequence[str] = ENGINES) -> None:
    """Makes one split, `train` or `held_out`, of at least so many hours, with voices of these engines."""
    ffmpeg = find_ffmpeg()  # before hours of speech, not after
    into.mkdir(parents=True, exist_ok=True)
    wanted, have, seed = hours * 3600 * SAMPLE_RATE_HZ, 0, 0
    starts, lengths, counts, groups = [], [], [], []
    sounds: list[tuple[int, float, float]] = []
    texts, voices = [], []
    wav = into / f"{split}.wav"
    with (
        soundfile.SoundFile(wav, "w", SAMPLE_RATE_HZ, 1, "PCM_16") as file,
        multiprocessing.get_context("spawn").Pool(workers) as pool,
    ):
        while have < wanted:
            jobs = [(seed + offset, split == "held_out", engines) for offset in range(8 * workers)]
            for group in pool.imap(_voice_group, jobs):
                for voice, text, utterance in group:
                    starts.append(have)
                    lengths.append(len(utterance.samples))
                    counts.append(len(utterance.sounds))
                    groups.append(seed)
                    texts.append(text)
                    voices.append(f"{voice.engine}:{voice.name}:{voice.speed:.2f}:{voice.pitch:.2f}")
                    sounds += [(s.sound, s.start_s, s.end_s) for s in utterance.sounds]
                    file.write(np.pad(utterance.samples, (0, GAP_SAMPLES)))
                    have += len(utterance.samples) + GAP_SAMPLES
                seed += 1
            log.info("%s: %.2f of %.2f hours", split, have / 3600 / SAMPLE_RATE_HZ, hours)
    index = into / f"{split}.npz"  # the last to be there: with it the split is complete
    index.unlink(missing_ok=True)
    command = [
        ffmpeg,
        "-y",
        "-loglevel",
        "error",
        "-i",
        str(wav),
        "-c:a",
        "libopus",
        "-b:a",
        BITRATE,
        "-application",
        "audio",
        str(into / f"{split}.opus"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"ffmpeg could not write {split}.opus (code {done.returncode}): {done.stderr.strip()[:200]}"
        )
    part = into / f"{split}.part.npz"
    table = np.asarray(sounds)
    np.savez_compressed(
        part,
        starts=np.asarray(starts),
        lengths=np.asarray(lengths),
        counts=np.asarray(counts),
        groups=np.asarray(groups),
        sounds=table[:, 0].astype(np.uint8),
        times_ms=np.round(table[:, 1:] * 1000).astype(np.uint16),
        texts=np.asarray(texts),
        voices=np.asarray(voices),
    )
    os.replace(part, index)
    wav.unlink()


class SpeechBank:
    """A bank in memory: int16 samples and the sounds of every utterance."""

    def __init__(self, folder: Path, split: str) -> None:
        sound_path, index_path = folder / f"{split}.opus", folder / f"{split}.npz"
        for path in (sound_path, index_path):
            if not path.exists():
                raise InputError(f"{path} is missing: python -m flashtalk_cli.distill.people.bank {folder}")
        samples, rate_hz = soundfile.read(sound_path, dtype="int16")
        if rate_hz != SAMPLE_RATE_HZ:
            import soxr

            samples = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ)
        self.samples = samples
        with np.load(index_path) as stored:
            self.index = {key: stored[key] for key in stored.files}
        self._first_sound = np.concatenate([[0], np.cumsum(self.index["counts"])])
        self._groups = [np.flatnonzero(self.index["groups"] == g) for g in np.unique(self.index["groups"])]

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Leave out what other voices say: wanted(ENGINE:NAME:SPEED:PITCH). Raises InputError when nothing is left."""
        self._groups = [group for group in self._groups if wanted(str(self.index["voices"][group[0]]))]
        if not self._groups:
            raise InputError("the bank has none of the voices that are asked for")

    @property
    def hours(self) -> float:
        """Speech in the bank."""
        return float(self.index["lengths"].sum() / SAMPLE_RATE_HZ / 3600)

    def __len__(self) -> int:
        return len(self.index["starts"])

    def utterance(self, number: int) -> Utterance:
        """One utterance as it was spoken."""
        start, length = int(self.index["starts"][number]), int(self.index["lengths"][number])
        first, end = self._first_sound[number], self._first_sound[number + 1]
        sounds = tuple(
            Sound(int(sound), float(times[0]) / 1000, float(times[1]) / 1000)
            for sound, times in zip(
                self.index["sounds"][first:end], self.index["times_ms"][first:end], strict=True
            )
        )
        return Utterance(self.samples[start : start + length].astype(np.float32) / 32768, sounds)

    def draw(self, rng: np.random.Generator, n_frames: int) -> Speech:
        """`n_frames` of one voice saying several things with pauses; sometimes a long silence."""
        n_samples = n_frames * SAMPLE_RATE_HZ // FPS
        samples = np.zeros(n_samples, dtype=np.float32)
        group = self._groups[int(rng.integers(len(self._groups)))]
        sounds: list[Sound] = []
        at = int(rng.uniform(-3.0, 0.6) * SAMPLE_RATE_HZ)
        while at < n_samples:
            number = int(rng.choice(group))
            spoken = self.utterance(number)
            low, high = max(at, 0), min(at + len(spoken.samples), n_samples)
            if high > low:
                samples[low:high] = spoken.samples[low - at : high - at]
            shift_s = at / SAMPLE_RATE_HZ
            sounds += [Sound(s.sound, s.start_s + shift_s, s.end_s + shift_s) for s in spoken.sounds]
            pause_s = rng.uniform(1.2, 5.0) if rng.random() < 0.2 else rng.gamma(2.0, 0.12)
            at += len(spoken.samples) + int(pause_s * SAMPLE_RATE_HZ)
        return Speech(samples, sounds, loudness_of(samples), str(self.index["voices"][group[0]]))


def disturb(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a microphone in a room makes of speech: echo, noise, another level. Same length."""
    heard = samples
    if rng.random() < 0.4:
        length_s = rng.uniform(0.08, 0.4)
        tail = rng.normal(0, 1, int(length_s * SAMPLE_RATE_HZ)) * np.exp(
            -6 * np.linspace(0, 1, int(length_s * SAMPLE_RATE_HZ))
        )
        tail = tail / np.sqrt((tail**2).sum()) * rng.uniform(0.1, 0.6)
        tail[0] = 1.0
        n = len(samples) + len(tail) - 1
        size = 1 << (n - 1).bit_length()
        heard = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)[: len(samples)]
    if rng.random() < 0.6:
        white = rng.normal(0, 1, len(samples))
        spectrum = np.fft.rfft(white)
        spectrum /= np.maximum(np.arange(len(spectrum)), 20.0) ** rng.uniform(0, 0.9)
        noise = np.fft.irfft(spectrum, len(samples))
        level = TARGET_RMS * 10 ** (-rng.uniform(15, 45) / 20)
        heard = heard + noise / (noise.std() + 1e-9) * level
    gain = 10 ** (rng.uniform(-14, 8) / 20)
    return np.clip(heard * gain, -1, 1).astype(np.float32)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("into", type=Path)
    parser.add_argument("--hours", type=float, default=3.5)
    parser.add_argument("--held-out-hours", type=float, default=0.25)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="whose voices")
    given = parser.parse_args()
    if not HELD_OUT_SHARES.keys() & set(given.engines):
        parser.error(
            f"{' '.join(given.engines)}: no voice of it is held out; name one of {', '.join(HELD_OUT_SHARES)} too"
        )
    setup(debug=True)
    make(given.into, "train", given.hours, given.workers, given.engines)
    make(given.into, "held_out", given.held_out_hours, given.workers, given.engines)


if __name__ == "__main__":
    told_in_a_line(main)
