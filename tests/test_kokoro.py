"""Kokoro's voices: what it reads is in its letters (contract), its sounds are where it says (property; the model itself
where FLASHTALK_KOKORO names its folder), and what is missing is named (bad input)."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtalk_cli.distill.people import kokoro
from flashtalk_cli.distill.people.phonemes import CLASS_OF_LETTER, CLASSES
from flashtalk_cli.distill.people.sentences import LANGUAGES, draw_sentence
from flashtalk_cli.distill.people.voices import Voice, draw_voice, say
from flashtalk_cli.errors import InputError

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng")
needs_kokoro = pytest.mark.skipif(kokoro.FOLDER not in os.environ, reason=f"{kokoro.FOLDER} names no folder")

LETTERS = st.text(st.sampled_from(sorted(kokoro.NUMBERS)), min_size=1, max_size=30)


def test_letters_have_the_numbers_they_were_taught_by() -> None:
    """Golden: some of the vocabulary that the model's authors publish; no number stands for two."""
    some = {";": 1, ".": 4, " ": 16, "A": 24, "Y": 41, "a": 43, "f": 48, "h": 50, "ə": 83, "ɹ": 123, "ʧ": 133, "ˈ": 156, "ː": 158, "ᵻ": 177}  # fmt: skip
    assert {letter: kokoro.NUMBERS[letter] for letter in some} == some
    assert len(set(kokoro.NUMBERS.values())) == len(kokoro.NUMBERS)
    assert set(kokoro.JOINED.values()) <= kokoro.NUMBERS.keys()


def test_those_who_train_speak_languages_that_have_sentences() -> None:
    """Contract: of voices of one accent two may become one, and every voice is heard."""
    rng = np.random.default_rng(3)
    drawn = [(voice, language) for voice, language in (draw_voice(rng, held_out=False) for _ in range(4000)) if voice.engine == "kokoro"]  # fmt: skip
    assert {part for voice, _ in drawn for part in voice.name.split("+")} == set(kokoro.SPEAKERS)
    for voice, language in drawn:
        assert language in LANGUAGES
        assert len({part[0] for part in voice.name.split("+")}) == 1
        assert kokoro.ACCENTS[voice.name[0]][0] == language
    assert 0.35 < np.mean(["+" in voice.name for voice, _ in drawn]) < 0.55


@given(letters=LETTERS, seed=st.integers(0, 99))
def test_sounds_follow_each_other_to_the_end(letters: str, seed: int) -> None:
    """Property: silence, sounds in order, silence; none ends before the one before it, the last at the end."""
    durations_s = np.random.default_rng(seed).integers(1, 9, len(letters) + 2) * kokoro.DURATION_S
    said = kokoro.timed(letters, durations_s)
    assert said[0][0] == said[-1][0] == "_"
    assert all(before <= after for (_, before), (_, after) in pairwise(said))
    assert said[-1][1] == pytest.approx(durations_s.sum())
    spoken = [letter for letter in letters if letter not in " ːˈˌ"]
    assert len(said) == len(spoken) + 2
    assert set("".join(sound for sound, _ in said)) <= CLASS_OF_LETTER.keys()


def test_length_belongs_to_what_came_before_and_stress_to_what_follows() -> None:
    durations_s = np.array([8, 1, 2, 3, 4, 5]) * kokoro.DURATION_S
    said = kokoro.timed("ˈaːb", durations_s)
    assert [sound for sound, _ in said] == ["_", "a", "b", "_"]
    ends = np.array([8, 14, 18, 23]) * kokoro.DURATION_S - np.array([1, 1, 1, 0]) * kokoro.EARLY_S
    np.testing.assert_allclose([end for _, end in said], ends)


@needs_espeak
@pytest.mark.parametrize("accent", ["en-us", "en-gb", "es", "fr", "hi", "it", "pt-br"])
def test_what_is_read_is_spoken(accent: str) -> None:
    """Contract: nearly all that espeak-ng writes has a letter; commas and the end stay."""
    language = accent[:2]
    letters = kokoro._read("One, " + draw_sentence(3, language), accent)
    assert "," in letters
    assert letters[-1] in ".?"
    assert len(letters) > 10


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Bad input: no folder, or an empty one."""
    if shutil.which("espeak-ng") is None:
        with pytest.raises(InputError, match="espeak-ng"):
            kokoro.speak("af_heart", "Hello.", 1.0)
        return
    kokoro._loaded.cache_clear()
    monkeypatch.delenv(kokoro.FOLDER, raising=False)
    with pytest.raises(InputError, match=kokoro.FOLDER):
        kokoro.speak("af_heart", "Hello.", 1.0)
    monkeypatch.setenv(kokoro.FOLDER, str(tmp_path))
    with pytest.raises(InputError, match=r"kokoro-v1.0.int8.onnx of https://.* is missing"):
        kokoro.speak("af_heart", "Hello.", 1.0)


@needs_kokoro
def test_sounds_are_where_they_are_said_to_be() -> None:
    """Property: vowels are louder than silences, and hiss is where the s are, at 5 ms of lag better than at 100."""
    hiss = {CLASSES.index(name) for name in ("s", "z", "sh", "zh")}
    near, far = [], []
    for number in range(4):
        spoken = say(Voice("kokoro", "af_heart"), draw_sentence(number, "en"))
        high = np.diff(spoken.samples, 2, prepend=[0, 0])
        share = np.convolve(high**2, np.ones(160), "same")[::80] / (np.convolve(spoken.samples**2, np.ones(160), "same")[::80] + 1e-4)  # fmt: skip
        true = np.zeros(len(share))
        for sound in spoken.sounds:
            true[int(sound.start_s * 200) : int(sound.end_s * 200)] = sound.sound in hiss
        near.append(np.corrcoef(share, true)[0, 1])
        far.append(np.corrcoef(np.roll(share, 20), true)[0, 1])
    assert np.nanmean(near) > np.nanmean(far) + 0.1
