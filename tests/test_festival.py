"""Festival's voices: their phones are ours (contract, parity with the voices' own lists), their sounds are where they
say (property), and whom they are drawn beside (golden)."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flashtalk_cli.distill.people import festival
from flashtalk_cli.distill.people.phonemes import CLASS_OF_LETTER, CLASSES
from flashtalk_cli.distill.people.sentences import ENGLISH, OTHERS, draw_sentence
from flashtalk_cli.distill.people.voices import Voice, draw_voice, say

CLASS = {name: index for index, name in enumerate(CLASSES)}
FESTIVAL_VOICES = Path("/usr/share/festival/voices")
needs_festival = pytest.mark.skipif(
    not (
        shutil.which("festival") and festival.SPEAKERS.keys() <= {p.name for p in FESTIVAL_VOICES.glob("*/*")}
    ),
    reason="no festival, or not all of its voices",
)


def test_held_out_draws_stay_as_they_were_when_voices_are_added() -> None:
    """Golden: a held-out bank made before can be made again; who trains is in the parts asked for."""
    drawn = [draw_voice(np.random.default_rng((9, seed, True)), held_out=True) for seed in range(8)]
    assert [(voice.name, language) for voice, language in drawn] == [
        ("am_michael", "en"),
        ("hi+f2", "hi"),
        ("am_michael+af_heart", "en"),
        ("af_heart", "en"),
        ("en-gb-scotland+m3", "en"),
        ("slt", "en"),
        ("slt", "en"),
        ("slt", "en"),
    ]
    assert [round(voice.pitch, 3) for voice, _ in drawn[:4]] == [0.908, 1.375, 0.884, 1.086]
    rng = np.random.default_rng(1)
    train = [draw_voice(rng, held_out=False)[0] for _ in range(2000)]
    for engine, share in (("flite", 0.1), ("festival", 0.2), ("kokoro", 0.4), ("espeak", 0.3)):
        assert abs(np.mean([voice.engine == engine for voice in train]) - share) < 0.04
    assert {voice.name for voice in train if voice.engine == "festival"} == festival.SPEAKERS.keys()


@pytest.mark.parametrize("phones", festival.TABLES)
def test_festival_phones_are_spelt_in_known_letters(phones: str) -> None:
    """Contract: every phone is one or more sounds we know, and lips and teeth have theirs."""
    table = festival.TABLES[phones]
    assert all(letters and set(letters) <= CLASS_OF_LETTER.keys() for letters in table.values())
    said = {CLASSES[CLASS_OF_LETTER[letter]] for letters in table.values() for letter in letters}
    assert {"sil", "p", "b", "m", "f"} <= said


def test_festival_voices_can_read_what_they_are_given() -> None:
    """Contract: a voice's language has sentences, and its encoding holds them."""
    for speaker in festival.SPEAKERS.values():
        assert speaker.phones in festival.TABLES
        words = OTHERS.get(speaker.language, "".join(ENGLISH.values()))
        assert words.encode(speaker.coding).decode(speaker.coding) == words


ONE_OF_EACH = tuple({speaker.phones: name for name, speaker in festival.SPEAKERS.items()}.values())


@needs_festival
def test_festival_tables_hold_every_phone_of_the_voices(tmp_path: Path) -> None:
    """Parity: the phones a voice may say are in its table."""
    show = "(mapcar (lambda (p) (print (car p))) (cadr (assoc 'phones (PhoneSet.description '(phones)))))"
    script = tmp_path / "phones.scm"
    script.write_text("".join(f'(voice_{name})\n(print "voice {name}")\n{show}\n' for name in ONE_OF_EACH))
    done = subprocess.run(["festival", "--batch", str(script)], capture_output=True, text=True, check=True)
    said: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        word = line.strip().strip('"')
        if word.startswith("voice "):
            phones = said[word.removeprefix("voice ")] = set()
        elif word:
            phones.add(word)
    assert said.keys() == set(ONE_OF_EACH)
    for name, phones in said.items():
        assert len(phones) > 30
        assert not phones - festival.TABLES[festival.SPEAKERS[name].phones].keys()


@needs_festival
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_festival_says_when_each_sound_sounds(name: str) -> None:
    """Property: the sounds cover the samples, pauses are quiet, speed is obeyed."""
    text = draw_sentence(3, festival.SPEAKERS[name].language)
    spoken = say(Voice("festival", name, 1.0, 1.1), text)
    assert all(a.end_s == pytest.approx(b.start_s) for a, b in pairwise(spoken.sounds))
    assert abs(spoken.sounds[-1].end_s - len(spoken.samples) / 16_000) < 0.1
    heard: dict[bool, list[float]] = {True: [], False: []}
    for sound in spoken.sounds:
        part = spoken.samples[int(sound.start_s * 16_000) : int(sound.end_s * 16_000)]
        heard[sound.sound == CLASS["sil"]].append(float(np.sqrt((part**2).mean())))
    assert np.mean(heard[False]) > 4 * np.mean(heard[True])
    if name != "msu_ru_nsh_clunits":
        fast = say(Voice("festival", name, 1.25, 1.1), text)
        assert len(fast.samples) / len(spoken.samples) == pytest.approx(0.8, abs=0.04)
