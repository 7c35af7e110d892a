"""The embedded model's encoders of speech and pictures in training, and the model folder made of all its parts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashtalk_cli.distill.components import (
    export,
    image,
    speech,
    vae,
    windows,
)
from flashtalk_cli.distill.people.bank import Speech
from flashtalk_cli.distill.people.phonemes import CLASSES, SHAPES, Sound
from flashtalk_cli.distill.people.spec import draw_person
from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.folder import find
from flashtalk_cli.models.speech import SpeechEncoder, features_of
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.models.verify import verify_folder
from flashtalk_cli.models.weights import (
    load_dit,
    load_image_encoder,
    load_speech_encoder,
    load_text_encoder,
    load_vae,
)

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Speech


class ToneBank:
    """Speech in which every odd second is the sound `a`, a tone, and every even one silence."""

    def draw(self, rng: np.random.Generator, n_frames: int) -> Speech:
        times_s = np.arange(n_frames * windows.HOP) / windows.SAMPLE_RATE_HZ
        on = (times_s.astype(int) % 2).astype(np.float32)
        samples = (0.2 * on * np.sin(2 * np.pi * 440 * times_s)).astype(np.float32)
        sounds = [Sound(CLASSES.index("a"), s, s + 1) for s in range(1, n_frames // 25, 2)]
        return Speech(samples, sounds, on[:: windows.HOP].astype(np.float64), "tone")


def tone_windows(count: int = 3) -> windows.Windows:
    bank: Any = ToneBank()
    drawn = [windows.draw_window(bank, np.random.default_rng(i), clean=True) for i in range(count)]
    return windows.Windows(*(torch.from_numpy(np.stack(values)) for values in zip(*drawn, strict=True)))


@settings(max_examples=12)
@given(seed=st.integers(0, 1000))
def test_varied_windows_keep_their_labels(seed: int) -> None:
    """Played faster or slower, coloured, with gaps and zeros: labelled frames are where the tone sounds."""
    samples, labels = windows.vary(tone_windows(), generator(seed), np.random.default_rng(seed))
    n_frames = labels.sounds.shape[1]
    assert samples.shape == (3, n_frames * windows.HOP)
    loud = rearrange(samples, "n (t s) -> n t s", s=windows.HOP).std(-1)
    spoken = labels.sounds > 0
    agree = ((loud > 0.5) == spoken).float().mean()
    assert agree > 0.85, f"{agree:.2f} of the frames"
    assert (labels.loudness[~spoken] == 0).float().mean() > 0.9
    torch.testing.assert_close(samples.mean(1), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(samples.std(1, correction=0), torch.ones(3), rtol=0, atol=1e-3)


def test_windows_replace_the_oldest() -> None:
    bank: Any = ToneBank()
    pool = windows.WindowPool(bank, 12, "cpu", workers=0, seed=0)
    pool.add()
    assert pool.count == 8
    pool.add()
    assert pool.count == 12
    drawn = pool.draw(5, generator())
    assert drawn.samples.shape == (5, windows.WINDOW_FRAMES * windows.HOP)
    assert drawn.shapes.shape == (5, windows.WINDOW_FRAMES, len(SHAPES))


@torch.no_grad()
def test_training_hears_as_rendering_does() -> None:
    """Parity: a window normalised for training gives the features that `SpeechEncoder.encode` gives."""
    module = speech.build_trainable(speech.MINI, seed=0).eval()
    samples = 0.05 * torch.randn(windows.WINDOW_FRAMES * windows.HOP, generator=generator()) + 0.01
    ours = features_of(module, windows.normalise(samples[None]), windows.WINDOW_FRAMES)[0]
    torch.testing.assert_close(ours, SpeechEncoder(module).encode(samples, windows.WINDOW_FRAMES))
    assert ours.shape == (windows.WINDOW_FRAMES, 4, 192)


def test_reading_right_costs_less_and_counts_as_right() -> None:
    labels = tone_windows()
    truth = torch.nn.functional.one_hot(labels.sounds, len(CLASSES)).float()
    right = (
        (8 * truth)[:, :, None].repeat(1, 1, 4, 1),
        labels.shapes[:, :, None].repeat(1, 1, 4, 1),
        labels.loudness[:, :, None].repeat(1, 1, 4).float(),
    )
    wrong = (right[0].roll(1, -1), right[1] + 1, right[2] + 1)
    assert speech.reading_loss(right, labels) < 0.3 * speech.reading_loss(wrong, labels)
    found = speech.accuracy(right, labels)
    assert found["sounds"] == found["spoken"] == found["looks"] == found["silence"] == 1
    assert found["jaw"] == pytest.approx(1, abs=1e-3)
    assert speech.accuracy(wrong, labels)["sounds"] < 0.1


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of 0.1 s a look for the speech encoder's training, so that its steps are counted and not timed."""
    ticks = itertools.count()
    monkeypatch.setattr(speech, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))


@pytest.mark.usefixtures("_ticking")
def test_the_speech_encoder_learns_a_tone() -> None:
    """Some steps lower the loss on windows that do not change; every parameter has moved from where it was drawn."""
    bank: Any = ToneBank()
    plan = replace(speech.TOY, seconds=3.0, fill_s=0.5, rate=2e-3, average=0.0)
    asked = speech.draw_windows(bank, 4, 7, True, torch.device("cpu"))

    def loss_of(module: Any, readers: speech.Readers) -> float:
        with torch.no_grad():
            return speech.reading_loss(readers(speech.hear(module, asked)), asked).item()

    before = loss_of(*speech.Learner(plan, "cpu").best)
    module, readers, lines = speech.train(bank, plan, "cpu")
    assert lines[-1]["step"] >= 3
    assert loss_of(module, readers) < 0.7 * before
    drawn = dict(speech.build_trainable(speech.MINI, plan.seed).named_parameters())
    still = [name for name, value in module.named_parameters() if torch.equal(value, drawn[name])]
    assert still in ([], ["masked_spec_embed"])


@pytest.mark.usefixtures("_ticking")
def test_training_the_speech_encoder_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Contract: steps, moments, average and the time spent are those kept; what is done is not done again."""
    bank: Any = ToneBank()
    plan, kept = replace(speech.TOY, seconds=1.0, fill_s=0.5, rate=2e-3), tmp_path / "speech.state"
    first, _, _ = speech.train(bank, plan, "cpu", kept=kept)
    learner = speech.Learner(plan, "cpu")
    learner.resume(kept)
    assert learner.step >= 1
    assert learner.spent_s >= 1.0
    assert learner.optimizer.state_dict()["state"][0]["step"] == learner.step
    torch.testing.assert_close(learner.best[0].state_dict(), first.state_dict())
    again, _, lines = speech.train(bank, plan, "cpu", kept=kept)
    assert lines == []
    torch.testing.assert_close(again.state_dict(), first.state_dict())
    speech.train(bank, replace(plan, seconds=learner.spent_s + 1), "cpu", kept=kept)
    further = speech.Learner(plan, "cpu")
    further.resume(kept)
    assert further.step > learner.step
    assert not list(tmp_path.glob("*.part"))


def test_opening_is_read_from_features_that_hold_it() -> None:
    """Property: of an encoder that hears loudness the opening of a tone that is louder when open can be read, of one
    that hears nothing it cannot."""
    bank: Any = ToneBank()
    hears = speech.build_trainable(speech.MINI, seed=0).eval()
    told = speech.read_opening(hears, bank, bank, 4)
    deaf = speech.build_trainable(speech.MINI, seed=0).eval()
    with torch.no_grad():
        deaf.feature_projection.projection.weight.zero_()
    guessed = speech.read_opening(deaf, bank, bank, 4)
    assert told > 0.8
    assert told > abs(guessed) + 0.3


def revoiced(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A vowel of a voice of 125 Hz whose first resonance is at 700 Hz, three times, and by other throats."""
    times_s = torch.arange(windows.SAMPLE_RATE_HZ) / windows.SAMPLE_RATE_HZ
    harmonics = 125.0 * torch.arange(1, 40)
    loud = torch.exp(-(((harmonics - 700) / 150) ** 2)) + 0.01
    vowel = (loud[:, None] * torch.sin(2 * math.pi * harmonics[:, None] * times_s)).sum(0)
    samples = vowel.repeat(3, 1)
    return samples, windows._revoiced(samples, generator(seed))


@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_other_throats_keep_pitch_and_loudness(seed: int) -> None:
    """Property: resonances move by 28 % at most, harmonics stay where they are, and so does what is quiet."""
    samples, made = revoiced(seed)
    assert made.shape == samples.shape
    assert torch.isfinite(made).all()
    spectra = torch.fft.rfft(made[:, 2000:14_000] * torch.hann_window(12_000), n=16_000).abs()
    for spectrum in spectra:
        centre_hz = float((spectrum**2 * torch.arange(len(spectrum))).sum() / (spectrum**2).sum())
        assert 700 / 1.4 < centre_hz < 700 * 1.4
    for voice, own in zip(made[:, 2000:14_000], samples[:, 2000:14_000], strict=True):
        period = windows.SAMPLE_RATE_HZ // 125
        again = torch.corrcoef(torch.stack([voice[:-period], voice[period:]]))[0, 1]
        assert again > 0.95 or again < 0.7, "a voice, or a whisper"
        assert float(voice.std()) == pytest.approx(float(own.std()), rel=0.1)
    silent = torch.zeros(2, 8000)
    assert windows._revoiced(silent, generator(seed)).abs().max() < 1e-6


# The image encoder


def test_truth_of_people_is_scaled_and_tells_them_apart() -> None:
    truth = image.truth_of([draw_person(seed) for seed in range(40)], "cpu")
    assert truth.amounts.mean(0).abs().max() < 1e-4
    assert (truth.amounts.std(0) < 1.1).all()
    assert truth.choices.shape == (40, len(image.CHOICES))
    assert len(truth.choices[:, 0].unique()) > 3


def test_the_image_encoder_learns_and_measures() -> None:
    """A second on a few pictures: the loss falls, figures come out, and the file has the released names."""
    frames = (torch.rand(20, 2, 64, 64, 3, generator=generator()) * 255).byte()
    pool: Any = SimpleNamespace(specs=[draw_person(seed) for seed in range(20)], frames=frames)
    _, short = image.train(pool, 0.05, "cpu", batch=8)
    module, long = image.train(pool, 3.0, "cpu", batch=8)
    assert long["steps"] > short["steps"]
    assert long["loss"] < short["loss"]
    assert not module.training


# Export


def write_parts(folder: Path) -> None:
    """Parts as training leaves them, but untrained."""
    torch.manual_seed(0)
    vae.save_weights(Vae(vae.MINI), folder / "vae.safetensors")
    speech.save_weights(speech.build_trainable(speech.MINI, 0), folder / "speech.safetensors")
    pool: Any = SimpleNamespace(
        specs=[draw_person(seed) for seed in range(4)], frames=torch.zeros(4, 1, 64, 64, 3, dtype=torch.uint8)
    )
    module, _ = image.train(pool, 0.05, "cpu", batch=2)
    image.save_weights(module, folder / "image.safetensors")


def test_exported_parts_make_a_model_that_loads(tmp_path: Path) -> None:
    """Contract: verify finds nothing, every loader takes its part, sizes fit, a notice says what is missing."""
    write_parts(tmp_path / "parts")
    export.write_mini(tmp_path / "parts", tmp_path / "mini")
    folder = find(tmp_path / "mini")
    assert [report.problem for report in verify_folder(folder)] == [""] * 5
    assert folder.missing() == []
    assert folder.size_bytes() < 40e6
    assert folder.config()["_notice"] == export.UNTRAINED
    load_vae(folder, CPU, torch.float32)
    load_dit(folder, CPU, torch.float32)
    rows = load_text_encoder(folder, CPU, torch.float32).encode("A person is talking.")
    assert rows.shape == (16, 64)
    tokens = load_image_encoder(folder, CPU, torch.float32).encode(torch.zeros(3, 160, 160))
    assert tokens.shape == (1, 17, 96)
    heard = load_speech_encoder(folder, CPU, torch.float32).encode(torch.randn(16000), 25)
    assert heard.shape == (25, 4, 192)


def test_export_keeps_a_trained_motion_network(tmp_path: Path) -> None:
    """Writing the parts again leaves a trained network and its configuration, and drops no notice of theirs."""
    write_parts(tmp_path / "parts")
    mini = tmp_path / "mini"
    export.write_mini(tmp_path / "parts", mini)
    trained = {name: value + 1 for name, value in export.no_motion_network().items()}
    save_file(trained, mini / "diffusion_pytorch_model.safetensors")
    export.write_config(mini, {**export.CONFIG_MINI, "_made": "by training"})
    before = (mini / "diffusion_pytorch_model.safetensors").read_bytes()
    export.write_mini(tmp_path / "parts", mini)
    assert (mini / "diffusion_pytorch_model.safetensors").read_bytes() == before
    config = find(mini).config()
    assert "_notice" not in config
    assert config["_made"] == "by training"


def test_export_names_the_part_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vae\.safetensors is missing: scripts/train-mini makes it"):
        export.write_mini(tmp_path, tmp_path / "mini")
