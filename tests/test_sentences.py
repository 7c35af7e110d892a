"""What is said, and by whom: training and held-out parts never meet, and training does not hear the same words again."""

from __future__ import annotations

import re

import numpy as np
import pytest

from flashtalk_cli.distill.people import bank as bank_module
from flashtalk_cli.distill.people.sentences import ENGLISH, HELD_OUT_ENGLISH, LANGUAGES, OTHERS, draw_sentence
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM
from flashtalk_cli.distill.people.voices import ENGINES, Utterance, Voice, draw_voice
from flashtalk_cli.errors import InputError


def test_held_out_words_and_voices_are_never_trained_on() -> None:
    """Contract: no phrase, word list or voice is in both splits, in any language."""
    for key in ENGLISH:
        assert not set(ENGLISH[key].split("|")) & set(HELD_OUT_ENGLISH[key].split("|"))
    rng = np.random.default_rng(0)
    train = {draw_voice(rng, held_out=False)[0] for _ in range(300)}
    held_out = {draw_voice(rng, held_out=True)[0] for _ in range(300)}
    assert not {voice.name for voice in train} & {voice.name for voice in held_out}
    assert all(voice.held_out for voice in held_out)
    assert not any(voice.held_out for voice in train)
    assert {voice.engine for voice in train} == set(ENGINES)
    assert {voice.engine for voice in held_out} == set(ENGINES) - {"festival"}
    assert {draw_voice(rng, held_out=False, engines=("flite",))[0].engine for _ in range(30)} == {"flite"}
    for language in LANGUAGES:
        assert draw_sentence(1, language) == draw_sentence(1, language)
        common = {draw_sentence(s, language) for s in range(40)} & {
            draw_sentence(HELD_OUT_FROM + s, language) for s in range(40)
        }
        assert not common


@pytest.mark.parametrize("language", LANGUAGES)
def test_most_of_what_training_hears_are_words_that_nobody_has_heard(language: str) -> None:
    """Property: two in five words of training and more are in no phrase, and most of those are heard once. (With few words to be
    heard, a listener learns those by heart and not their sounds.)"""
    phrases = "|".join(ENGLISH.values()) if language == "en" else OTHERS[language]
    word_of = re.compile(r"[^\s|,.?!']+")
    known = set(word_of.findall(phrases.lower()))
    words = [w for seed in range(300) for w in word_of.findall(draw_sentence(seed, language).lower())]
    new = [word for word in words if word not in known]
    assert len(new) > 0.4 * len(words)
    assert len(set(new)) > 0.5 * len(new)


def test_a_voice_that_cannot_say_a_sentence_is_given_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: the next one is tried; who can say nothing at all is heard of."""
    asked: list[str] = []

    def say_third(voice: Voice, text: str) -> Utterance:
        asked.append(text)
        if len(asked) < 3:
            raise InputError("cannot say that")
        return Utterance(np.zeros(3, np.float32), ())

    monkeypatch.setattr(bank_module, "say", say_third)
    text, _ = bank_module._said(Voice("flite", "awb"), "en", 5)
    assert text == asked[-1]
    assert len(set(asked)) == 3

    def say_nothing(voice: Voice, text: str) -> Utterance:
        raise InputError("flite is not installed")

    monkeypatch.setattr(bank_module, "say", say_nothing)
    with pytest.raises(InputError, match="not installed"):
        bank_module._said(Voice("flite", "awb"), "en", 5)
