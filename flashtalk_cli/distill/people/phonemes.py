"""Sounds of speech: one alphabet for all synthesisers, and the mouth that makes each sound.

The alphabet is IPA reduced to base letters, grouped into the classes a listener should tell
apart (`CLASSES`, 0 is silence). espeak-ng speaks IPA itself; flite's phones are translated.
Diphthongs and affricates are two letters and become two sounds in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

# class name -> the IPA letters in it
LETTERS = {
    "sil": "_",
    "p": "p",
    "b": "bɓ",
    "m": "mɱ",
    "f": "fɸ",
    "v": "vʋβ",
    "th": "θ",
    "dh": "ð",
    "t": "tʈ",
    "d": "dɖɗ",
    "n": "nɳɲ",
    "s": "sɕ",
    "z": "zʑ",
    "sh": "ʃʂ",
    "zh": "ʒʐ",
    "k": "kcq",
    "g": "ɡgɟɢɠ",
    "ng": "ŋɴ",
    "x": "xçχɣħʁ",
    "h": "hɦʔ",
    "l": "lɫɬɭʎɮ",
    "r": "ɹrɾɻʀɽ",
    "w": "wʍɰ",
    "j": "jɥʝ",
    "i": "iɨᵻ",
    "ih": "ɪ",
    "y": "yʏʉ",
    "e": "eɘ",
    "eh": "ɛ",
    "oe": "øœɶɵ",
    "ae": "æ",
    "a": "aɑä",
    "ah": "ʌəɐ",
    "er": "ɜɚɝɞ",
    "ao": "ɔɒ",
    "o": "oɤ",
    "uh": "ʊ",
    "u": "uɯ",
}
CLASSES = tuple(LETTERS)
CLASS_OF_LETTER = {letter: number for number, letters in enumerate(LETTERS.values()) for letter in letters}
VOWELS = frozenset(
    CLASSES.index(name)
    for name in ("i", "ih", "y", "e", "eh", "oe", "ae", "a", "ah", "er", "ao", "o", "uh", "u")
)

FLITE = {
    "pau": "_",
    "ssil": "_",
    "aa": "ɑ",
    "ae": "æ",
    "ah": "ʌ",
    "ao": "ɔ",
    "aw": "aʊ",
    "ax": "ə",
    "axr": "ɚ",
    "ay": "aɪ",
    "b": "b",
    "ch": "tʃ",
    "d": "d",
    "dh": "ð",
    "dx": "d",
    "eh": "ɛ",
    "el": "əl",
    "em": "əm",
    "en": "ən",
    "er": "ɜ",
    "ey": "eɪ",
    "f": "f",
    "g": "g",
    "hh": "h",
    "hv": "h",
    "ih": "ɪ",
    "iy": "i",
    "jh": "dʒ",
    "k": "k",
    "l": "l",
    "m": "m",
    "n": "n",
    "nx": "n",
    "ng": "ŋ",
    "ow": "oʊ",
    "oy": "ɔɪ",
    "p": "p",
    "r": "ɹ",
    "s": "s",
    "sh": "ʃ",
    "t": "t",
    "th": "θ",
    "uh": "ʊ",
    "uw": "u",
    "v": "v",
    "w": "w",
    "y": "j",
    "z": "z",
    "zh": "ʒ",
}


@dataclass(frozen=True)
class Mouth:
    """The shape a sound asks for, each in 0..1, and how hard it insists on it.

    jaw; closed: lips pressed together; tuck: lower lip under the upper teeth; round: pucker;
    funnel: rounded and open; spread: corners apart; show: lips lifted off the teeth.
    `insists`: weight of the jaw and lips against the neighbours' (a schwa takes what it gets).
    """

    jaw: float
    closed: float = 0.0
    tuck: float = 0.0
    round: float = 0.0
    funnel: float = 0.0
    spread: float = 0.0
    show: float = 0.0
    insists: float = 1.0


SHAPES = ("jaw", "closed", "tuck", "round", "funnel", "spread", "show")

MOUTHS = {
    "sil": Mouth(0.0, insists=0.7),
    "p": Mouth(0.04, closed=1.0, insists=2.0),
    "b": Mouth(0.05, closed=1.0, insists=2.0),
    "m": Mouth(0.04, closed=1.0, insists=2.0),
    "f": Mouth(0.07, tuck=1.0, show=0.25, insists=1.7),
    "v": Mouth(0.08, tuck=0.9, show=0.2, insists=1.6),
    "th": Mouth(0.12, show=0.3, spread=0.1),
    "dh": Mouth(0.12, show=0.25, spread=0.1),
    "t": Mouth(0.09, show=0.35, spread=0.15),
    "d": Mouth(0.10, show=0.3, spread=0.15),
    "n": Mouth(0.11, show=0.25, spread=0.12),
    "s": Mouth(0.05, show=0.5, spread=0.35, insists=1.3),
    "z": Mouth(0.06, show=0.45, spread=0.3, insists=1.3),
    "sh": Mouth(0.09, funnel=0.75, round=0.25, show=0.35, insists=1.4),
    "zh": Mouth(0.10, funnel=0.7, round=0.25, show=0.3, insists=1.4),
    "k": Mouth(0.16, show=0.1, insists=0.6),
    "g": Mouth(0.16, show=0.1, insists=0.6),
    "ng": Mouth(0.15, show=0.1, insists=0.6),
    "x": Mouth(0.18, insists=0.6),
    "h": Mouth(0.20, insists=0.35),
    "l": Mouth(0.18, show=0.2, insists=0.8),
    "r": Mouth(0.12, funnel=0.4, round=0.2, insists=0.9),
    "w": Mouth(0.06, round=1.0, funnel=0.1, insists=1.6),
    "j": Mouth(0.10, spread=0.5, show=0.2),
    "i": Mouth(0.13, spread=0.75, show=0.3),
    "ih": Mouth(0.20, spread=0.4, show=0.2),
    "y": Mouth(0.10, round=0.85, funnel=0.2, insists=1.3),
    "e": Mouth(0.27, spread=0.55, show=0.2),
    "eh": Mouth(0.36, spread=0.4, show=0.2),
    "oe": Mouth(0.24, round=0.45, funnel=0.5, insists=1.2),
    "ae": Mouth(0.47, spread=0.45, show=0.3, insists=1.2),
    "a": Mouth(0.56, spread=0.1, show=0.1, insists=1.3),
    "ah": Mouth(0.30, insists=0.8),
    "er": Mouth(0.22, funnel=0.4, round=0.1),
    "ao": Mouth(0.44, funnel=0.5, round=0.15, insists=1.2),
    "o": Mouth(0.30, funnel=0.55, round=0.45, insists=1.3),
    "uh": Mouth(0.20, round=0.5, funnel=0.3),
    "u": Mouth(0.10, round=0.9, funnel=0.2, insists=1.4),
}
assert set(MOUTHS) == set(LETTERS)


@dataclass(frozen=True)
class Sound:
    """One sound in time: a class number, and when it lasts."""

    sound: int
    start_s: float
    end_s: float


def spell(letters: str, start_s: float, end_s: float) -> list[Sound]:
    """IPA letters that share a stretch of time, as sounds; the first of two takes the larger part.

    Marks of stress, length and manner are left out; a string of marks alone gives nothing.
    """
    known = [CLASS_OF_LETTER[letter] for letter in letters if letter in CLASS_OF_LETTER]
    if not known:
        return []
    weights = [1.3] + [1.0] * (len(known) - 1)
    length_s, sounds, at_s = end_s - start_s, [], start_s
    for number, weight in zip(known, weights, strict=True):
        until_s = at_s + length_s * weight / sum(weights)
        sounds.append(Sound(number, at_s, until_s))
        at_s = until_s
    return sounds
