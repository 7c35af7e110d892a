"""Voices that say when each sound sounds: espeak-ng, through its library, flite, festival and Kokoro.

All give mono float32 samples at 16 kHz with the sounds aligned to them. They are needed where a
speech bank is made, not where it is used.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

from flashtalk_cli.config import SAMPLE_RATE_HZ
from flashtalk_cli.distill.people import festival, kokoro
from flashtalk_cli.distill.people.phonemes import FLITE, Sound, spell
from flashtalk_cli.errors import InputError

FLITE_VOICES = ("kal16", "awb", "rms", "slt")
# espeak-ng's own throats, and those that its users gave it: the more of them, the less one listens to a throat
ESPEAK_VARIANTS = (
    *("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+m8", "+f1", "+f2", "+f3", "+f4", "+f5"),
    *("+klatt", "+klatt2", "+klatt3", "+klatt4", "+klatt6", "+croak", "+whisper"),
    *("+Alex", "+Alicia", "+Andrea", "+Andy", "+Annie", "+Denis", "+Diogo", "+Gene", "+Henrique", "+Hugo"),
    *("+Jacky", "+Lee", "+Marco", "+Mario", "+Michael", "+Mike", "+Nguyen", "+Storm", "+Tweaky"),
    *("+adam", "+anika", "+antonio", "+aunty", "+belinda", "+benjamin", "+boris", "+caleb", "+david", "+ed"),
    *("+edward", "+grandma", "+grandpa", "+iven", "+john", "+kaukovalta", "+linda", "+max", "+michel"),
    *("+miguel", "+norbert", "+pablo", "+paul", "+pedro", "+quincy", "+rob", "+robert", "+sandro", "+shelby"),
    *("+steph", "+travis", "+victor", "+zac"),
)
HELD_OUT_VARIANTS = ("+f2", "+m3")
HELD_OUT_FLITE = ("slt", "rms")
# What part of the voices drawn are whose. Kokoro's sound human, flite's and festival's nearly, and a listener
# learns people from them.
TRAIN_SHARES = {"flite": 0.1, "festival": 0.2, "kokoro": 0.4, "espeak": 0.3}
HELD_OUT_SHARES = {"flite": 0.25, "kokoro": 0.4, "espeak": 0.35}
ENGINES = tuple(TRAIN_SHARES)

_RETRIEVAL, _PHONEME_EVENTS, _PHONEME_IPA, _UTF8 = 1, 1, 2, 1
_EVENT_PHONEME, _EVENT_END = 7, 0
_RATE, _PITCH, _RANGE = 1, 3, 4


@dataclass(frozen=True)
class Voice:
    """Who speaks: `engine` espeak, flite, festival or kokoro, its voice's name, and how fast and high."""

    engine: str
    name: str
    speed: float = 1.0
    pitch: float = 1.0

    @property
    def held_out(self) -> bool:
        """Whether training never hears this voice."""
        if self.engine == "flite":
            return self.name in HELD_OUT_FLITE
        if self.engine == "kokoro":
            return self.name.partition("+")[0] in kokoro.HELD_OUT
        return self.engine == "espeak" and self.name.endswith(HELD_OUT_VARIANTS)


@dataclass(frozen=True)
class Utterance:
    """Samples float32 [N] at 16 kHz and the sounds in them, in order, silence included."""

    samples: np.ndarray
    sounds: tuple[Sound, ...]


def say(voice: Voice, text: str) -> Utterance:
    """Speaks a text. Raises InputError when the synthesiser is not installed or fails."""
    return _SAY[voice.engine](voice, text)


def _at_16_khz(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    return soxr.resample(samples.astype(np.float32), rate_hz, SAMPLE_RATE_HZ).astype(np.float32)


def _say_flite(voice: Voice, text: str) -> Utterance:
    program = shutil.which("flite")
    if program is None:
        raise InputError("flite is not installed: apt-get install flite")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        stretch = ["--setf", f"duration_stretch={1 / voice.speed:.4f}"]
        command = [program, "-voice", voice.name, *stretch, "-psdur", "-t", text, "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise InputError(
                f"flite failed with code {done.returncode} on {text!r}: {done.stderr.strip()[:200]}"
            )
        samples, rate_hz = soundfile.read(path, dtype="float32")
    sounds: list[Sound] = []
    start_s = 0.0
    for entry in done.stdout.split():
        phone, _, end = entry.partition(":")
        sounds += spell(FLITE.get(phone, "ə"), start_s, float(end))
        start_s = float(end)
    return _pitched(Utterance(_at_16_khz(samples, rate_hz), tuple(sounds)), voice.pitch)


def _say_festival(voice: Voice, text: str) -> Utterance:
    samples, rate_hz, phones = festival.speak(voice.name, text, voice.speed)
    letters = festival.TABLES[festival.SPEAKERS[voice.name].phones]
    return _timed(voice, samples, rate_hz, [(letters.get(phone, "ə"), end_s) for phone, end_s in phones])


def _say_kokoro(voice: Voice, text: str) -> Utterance:
    return _timed(voice, *kokoro.speak(voice.name, text, voice.speed))


def _timed(voice: Voice, samples: np.ndarray, rate_hz: int, ends: list[tuple[str, float]]) -> Utterance:
    sounds: list[Sound] = []
    start_s = 0.0
    for letters, end_s in ends:
        sounds += spell(letters, start_s, end_s)
        start_s = end_s
    return _pitched(Utterance(_at_16_khz(samples, rate_hz), tuple(sounds)), voice.pitch)


def _pitched(utterance: Utterance, pitch: float) -> Utterance:
    """Higher and faster by `pitch`, as a tape would be: another speaker for the same recordings."""
    if abs(pitch - 1) < 0.01:
        return utterance
    samples = soxr.resample(utterance.samples, SAMPLE_RATE_HZ * pitch, SAMPLE_RATE_HZ).astype(np.float32)
    return Utterance(
        samples, tuple(Sound(s.sound, s.start_s / pitch, s.end_s / pitch) for s in utterance.sounds)
    )


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Espeak:
    """The library, once a process: it keeps its state in globals."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng")
        if name is None:
            raise InputError("espeak-ng is not installed: apt-get install espeak-ng")
        self._native = ctypes.CDLL(name)
        self.rate_hz = self._native.espeak_Initialize(_RETRIEVAL, 0, None, _PHONEME_EVENTS | _PHONEME_IPA)
        if self.rate_hz <= 0:
            raise InputError("espeak-ng could not start: is espeak-ng-data installed?")
        self.pieces: list[np.ndarray] = []
        self.events: list[tuple[int, str]] = []
        self._callback = _Callback(self._receive)
        self._native.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer, count: int, events: ctypes._Pointer) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_END:
            event = events[index]
            if event.type == _EVENT_PHONEME:
                self.events.append((event.sample, bytes(event.id.string).decode("utf-8", "ignore")))
            index += 1
        return 0

    def speak(self, voice: Voice, text: str) -> tuple[np.ndarray, list[tuple[int, str]]]:
        self.pieces, self.events = [], []
        if self._native.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise InputError(f"espeak-ng has no voice {voice.name!r}: espeak-ng --voices lists them")
        self._native.espeak_SetParameter(_RATE, round(170 * voice.speed), 0)
        self._native.espeak_SetParameter(_PITCH, int(np.clip(50 * voice.pitch, 0, 99)), 0)
        self._native.espeak_SetParameter(_RANGE, 50, 0)
        data = text.encode()
        self._native.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
        self._native.espeak_Synchronize()
        samples = np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.int16)
        return samples.astype(np.float32) / 32768, self.events


@lru_cache(maxsize=1)
def _espeak() -> _Espeak:
    return _Espeak()


def _say_espeak(voice: Voice, text: str) -> Utterance:
    engine = _espeak()
    samples, events = engine.speak(voice, text)
    sounds: list[Sound] = []
    ends = [at for at, _ in events[1:]] + [len(samples)]
    for (start, letters), end in zip(events, ends, strict=True):
        pause = letters.startswith("_") or not letters
        found = spell("_" if pause else letters, start / engine.rate_hz, end / engine.rate_hz)
        if found:
            sounds += found
        elif sounds:  # a mark alone lengthens what came before it
            sounds[-1] = Sound(sounds[-1].sound, sounds[-1].start_s, end / engine.rate_hz)
    return Utterance(_at_16_khz(samples, engine.rate_hz), tuple(sounds))


_SAY = {"espeak": _say_espeak, "flite": _say_flite, "festival": _say_festival, "kokoro": _say_kokoro}


def draw_voice(
    rng: np.random.Generator, *, held_out: bool, engines: Sequence[str] = ENGINES
) -> tuple[Voice, str]:
    """A voice of one of these engines and the language it speaks, from those of training or from those kept from it."""
    from flashtalk_cli.distill.people.sentences import HELD_OUT_LANGUAGES, LANGUAGES

    speed, pitch = float(rng.uniform(0.78, 1.25)), float(rng.uniform(0.85, 1.18))
    shares = {
        e: share for e, share in (HELD_OUT_SHARES if held_out else TRAIN_SHARES).items() if e in engines
    }
    engine = str(rng.choice(list(shares), p=np.asarray(list(shares.values())) / sum(shares.values())))
    if engine == "flite":
        names = [name for name in FLITE_VOICES if (name in HELD_OUT_FLITE) == held_out]
        return Voice("flite", str(rng.choice(names)), speed, pitch), "en"
    if engine == "festival":
        name = str(rng.choice(tuple(festival.SPEAKERS)))
        return Voice("festival", name, speed, pitch), festival.SPEAKERS[name].language
    if engine == "kokoro":
        speakers = kokoro.HELD_OUT if held_out else kokoro.SPEAKERS
        name = str(rng.choice(speakers))
        others = [other for other in speakers if other[0] == name[0] and other != name]
        if others and rng.random() < 0.5:
            name += "+" + str(rng.choice(others))
        return Voice("kokoro", name, speed, pitch), kokoro.ACCENTS[name[0]][0]
    languages = HELD_OUT_LANGUAGES if held_out else LANGUAGES
    language = "en" if rng.random() < 0.45 else str(rng.choice(languages[1:]))
    variants = [v for v in ESPEAK_VARIANTS if (v in HELD_OUT_VARIANTS) == held_out]
    base = str(rng.choice(("en-us", "en", "en-gb-scotland"))) if language == "en" else language
    return Voice("espeak", base + str(rng.choice(variants)), speed, float(rng.uniform(0.4, 1.6))), language
