"""The generator of talking people: its people, their speech, and the truth beside the frames."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flashtalk_cli.distill.people import bank as bank_module
from flashtalk_cli.distill.people import head as head_module
from flashtalk_cli.distill.people import kokoro, measure
from flashtalk_cli.distill.people.assets import SPEECHES
from flashtalk_cli.distill.people.bank import SpeechBank, disturb, loudness_of
from flashtalk_cli.distill.people.clips import Drawing, draw_plan, render_clips
from flashtalk_cli.distill.people.figure import LOWER_LIP, UPPER_LIP
from flashtalk_cli.distill.people.hair import STYLES
from flashtalk_cli.distill.people.head import load_head, unit_names
from flashtalk_cli.distill.people.measure import accuracy, load_meter, mouth_opening_from_frames
from flashtalk_cli.distill.people.perform import (
    FPS,
    Manner,
    Performance,
    articulate,
    begin_elsewhere,
    begin_smiling,
    perform,
)
from flashtalk_cli.distill.people.person import BACKDROPS, GARMENTS, HAIR_STYLES, PersonSpec
from flashtalk_cli.distill.people.phonemes import (
    CLASSES,
    LETTERS,
    MOUTHS,
    SHAPES,
    Sound,
    spell,
)
from flashtalk_cli.distill.people.render import Clip, Detail
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM, draw_person
from flashtalk_cli.distill.people.voices import Utterance, Voice, say
from flashtalk_cli.errors import InputError

ROUGH = Detail(texture=192, strands=150, sky_directions=2, shadow_side=48)
ASSETS = Path(__file__).parents[1] / "flashtalk_cli" / "assets"
MANNER = Manner(smile=0.0, lively=0.0)
CLASS = {name: number for number, name in enumerate(CLASSES)}

needs_voices = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="no espeak-ng or flite"
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def acting(spec: PersonSpec, *rows: dict[str, float]) -> Performance:
    """A performance of one frame a row of face units, with nothing else moving."""
    n = len(rows)
    curves = np.zeros((n, len(unit_names())), np.float32)
    for frame, row in enumerate(rows):
        for name, value in row.items():
            curves[frame, unit_names().index(name)] = value
    still = np.zeros((n, 3), np.float32)
    return Performance(curves, still, still[:, :2], still, still[:, 0], np.zeros(n, np.int64))


def film(spec: PersonSpec, performance: Performance, side_px: int = 96) -> Clip:
    return render_clips([spec], [performance], (side_px, side_px), "cpu", ROUGH)


def plain_person(seed: int = 5) -> PersonSpec:
    """Someone without a beard, lit from the front, whose face is large in the frame."""
    return dataclasses.replace(
        draw_person(seed),
        beard="none",
        hair_style="short",
        glasses=0,
        face_height=0.62,
        place=(0.5, 0.45),
        turn=(0.0, 0.0, 0.0),
        body_turn=0.0,
        key_angle=(0.2, 0.4),
        key_strength=1.0,
        softness=0.0,
        grain=0.0,
    )


# --- people


def test_baked_head_has_what_the_renderer_needs() -> None:
    """Contract: 52 face units, finite targets, lip vertices in order down the midline."""
    head = load_head("cpu")
    assert len(head.unit_names) == 52
    assert {"jawOpen", "mouthClose", "mouthPucker", "eyeBlinkLeft"} <= set(head.unit_names)
    assert torch.isfinite(head.targets).all()
    assert torch.isfinite(head.units).all()
    assert head.faces.max() < head.n_vertices
    for lip, sign in ((UPPER_LIP, -1), (LOWER_LIP, 1)):
        rows = head.mean[list(lip)]
        assert rows[:, 0].abs().max() < 0.02
        assert (sign * rows[:, 1]).diff().min() > -0.02


def test_a_missing_head_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fault: the error names the file and the command that makes it."""
    monkeypatch.setattr(head_module, "HEAD_FILE", tmp_path / "head.npz")
    load_head.cache_clear()
    with pytest.raises(InputError, match=r"people\.bake"):
        load_head("cpu")
    load_head.cache_clear()


@settings(max_examples=40)
@given(seed=st.integers(0, 2 * HELD_OUT_FROM))
def test_people_follow_from_their_seed(seed: int) -> None:
    """Property: the same seed is the same person, another seed another, and all values make sense."""
    person = draw_person(seed)
    assert person == draw_person(seed)
    assert person != draw_person(seed + 1)
    assert person.hair_style in STYLES
    assert set(STYLES) == set(HAIR_STYLES)
    assert person.garment in GARMENTS
    assert person.backdrop in BACKDROPS
    assert 0.56 <= person.face_height <= 0.9
    for field in ("skin", "lip", "iris", "hair", "cloth"):
        assert all(0 <= channel <= 1 for channel in getattr(person, field))
    assert all(np.isfinite(value) and 0 <= value <= 1.3 for _, value in person.targets)


def test_frames_have_a_person_before_a_still_background() -> None:
    """Contract: shapes and types; the background does not move; the same call makes the same frames."""
    spec = plain_person()
    performance = acting(spec, {}, {"jawOpen": 0.5}, {"jawOpen": 0.5})
    performance = dataclasses.replace(
        performance, turn=np.asarray([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]], np.float32)
    )
    clip = film(spec, performance)
    frames = clip.frames.numpy()
    assert frames.shape == (1, 3, 96, 96, 3)
    assert frames.dtype == np.uint8
    corners = frames[0][:, :6, [0, 1, 2, -3, -2, -1]]
    assert (corners == corners[:1]).all()
    assert np.abs(frames[0, 2].astype(int) - frames[0, 0]).max() > 60
    assert torch.equal(film(spec, performance).frames, clip.frames)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    """Property: a person filmed beside others looks as when filmed alone, up to rounding."""
    specs = [plain_person(5), draw_person(8)]
    performances = [acting(spec, {"jawOpen": 0.3}, {}) for spec in specs]
    together = render_clips(specs, performances, (64, 64), "cpu", ROUGH)
    for number in range(2):
        alone = render_clips(
            specs[number : number + 1], performances[number : number + 1], (64, 64), "cpu", ROUGH
        )
        difference = (together.frames[number].int() - alone.frames[0].int()).abs()
        assert (difference > 2).float().mean() < 0.001
        torch.testing.assert_close(together.opening_px[number], alone.opening_px[0], atol=1e-4, rtol=1e-4)


def test_opening_is_true_to_the_frames() -> None:
    """Parity: the stated gap grows with the jaw, is nothing for a closed mouth, and is dark where it is."""
    spec = plain_person()
    clip = film(
        spec, acting(spec, {}, {"jawOpen": 0.3}, {"jawOpen": 0.6}, {"jawOpen": 0.3, "mouthClose": 0.3}), 128
    )
    shut, half, wide, pressed = clip.opening_px[0].tolist()
    assert shut < 0.6
    assert pressed < 0.6
    assert 1.5 < half < wide
    x0, y0, x1, y1 = (int(v) for v in clip.mouth_box[0].tolist())
    middle = slice((3 * x0 + x1) // 4, (x0 + 3 * x1) // 4)
    light = clip.frames[0, :, y0:y1, middle].float().mean(-1)
    changed = ((light[2] - light[0]).abs() > 12).float().sum(0).mean()
    assert changed > 0.6 * wide
    assert torch.allclose(
        clip.opening * clip.opening_px[0, 2] / clip.opening[0, 2], clip.opening_px, atol=1e-4
    )


@pytest.mark.parametrize("unit", ["eyeBlinkLeft", "browInnerUp", "mouthSmileRight", "mouthPucker"])
def test_face_units_move_their_own_part(unit: str) -> None:
    """Property: a unit changes the frame, and above or below the nose as its name says."""
    spec = plain_person()
    before, after = film(spec, acting(spec, {}, {unit: 1.0})).frames[0].int()
    rows = (before - after).abs().sum((1, 2)).float()
    eyes_row, nose_row = spec.place[1] * 96, (spec.place[1] + 0.36 / 2.15 * spec.face_height) * 96
    assert rows.sum() > 100
    centre = (rows * torch.arange(96)).sum() / rows.sum()
    assert centre > nose_row if unit.startswith("mouth") else abs(centre - eyes_row) < 14


# --- speech and performance


def test_every_sound_has_letters_and_a_mouth() -> None:
    """Contract: classes, letters and mouths agree; lips meet for p, b and m and for nothing else."""
    assert set(LETTERS) == set(MOUTHS) == set(CLASSES)
    letters = "".join(LETTERS.values())
    assert len(letters) == len(set(letters))
    assert {name for name, mouth in MOUTHS.items() if mouth.closed > 0.5} == {"p", "b", "m"}


def test_spelling_shares_time_without_gaps() -> None:
    """Property: a diphthong is two sounds that fill its time; marks alone are nothing."""
    sounds = spell("aɪ", 1.0, 1.2)
    assert [CLASSES[s.sound] for s in sounds] == ["a", "ih"]
    assert (sounds[0].start_s, sounds[1].end_s) == (1.0, pytest.approx(1.2))
    assert sounds[0].end_s == sounds[1].start_s
    assert spell("ː", 0.0, 0.1) == []


def a_sentence(*names: str, each_s: float = 0.12, start_s: float = 0.8) -> list[Sound]:
    return [
        Sound(CLASS[name], start_s + i * each_s, start_s + (i + 1) * each_s) for i, name in enumerate(names)
    ]


def test_lips_close_for_bilabials_even_between_open_vowels() -> None:
    """Property: in a-m-a at a fast rate there is a frame with closed lips; in silence the jaw is shut."""
    shapes = articulate(a_sentence("a", "m", "a", "b", "a", each_s=0.08), 50)
    jaw, closed = shapes[:, SHAPES.index("jaw")], shapes[:, SHAPES.index("closed")]
    assert closed[20:30].max() > 0.75
    assert jaw[:12].max() < 0.03
    assert jaw[20:30].max() > 0.3
    assert jaw[40:].max() < 0.03


def test_articulation_has_no_lag() -> None:
    """Property: the jaw follows vowels and pauses best with no shift at all."""
    names = ["a", "sil", "a", "sil", "ae", "sil", "a", "sil"] * 3
    sounds = a_sentence(*names, each_s=0.21, start_s=0.4)
    jaw = articulate(sounds, 150)[:, SHAPES.index("jaw")]
    middle = (np.arange(150) + 0.5) / FPS
    voiced = np.zeros(150)
    for sound in sounds:
        voiced[(middle >= sound.start_s) & (middle < sound.end_s)] = sound.sound != 0
    fits = {lag: np.corrcoef(np.roll(voiced, lag)[8:-8], jaw[8:-8])[0, 1] for lag in range(-4, 5)}
    assert max(fits, key=fits.__getitem__) == 0
    assert fits[0] > 0.7


def test_a_silent_person_is_alive_with_a_shut_mouth() -> None:
    """Property: without speech the jaw rests, while eyes blink, the head moves and the chest breathes."""
    lively = dataclasses.replace(MANNER, lively=1.0)
    performance = perform(draw_person(3), [], np.zeros(250), unit_names(), seed=1, manner=lively)
    curves = dict(zip(unit_names(), performance.curves.T, strict=True))
    assert curves["jawOpen"].max() < 0.01
    assert curves["eyeBlinkLeft"].max() > 0.9
    assert performance.turn.std(0).min() > 0.005
    assert np.ptp(performance.breath) > 0.8
    assert np.abs(np.diff(performance.turn, axis=0)).max() < 0.05


def test_a_talk_that_begins_smiling_soon_is_the_talk_it_was() -> None:
    """Property: the first frames smile more, and after three seconds nothing is left of it."""
    plain = perform(draw_person(3), [], np.zeros(100), unit_names(), seed=1)
    smile = unit_names().index("mouthSmileLeft")
    for seed in range(8):
        smiling = begin_smiling(plain, unit_names(), np.random.default_rng(seed))
        more = smiling.curves - plain.curves
        assert more[0, smile] > 0.1
        assert more.min() >= 0
        assert more[75:].max() < 0.01


def test_a_talk_begun_elsewhere_soon_is_the_talk_it_was() -> None:
    """Property: its first frame has the mouth of one of the others and its own eyes; a second later all is its own."""
    sounds = a_sentence("a", "m", "o", "s", "ae", each_s=0.2, start_s=0.5)
    plain = perform(draw_person(3), sounds, np.ones(100), unit_names(), seed=1)
    jaw, lid = unit_names().index("jawOpen"), unit_names().index("eyeBlinkLeft")
    begun = []
    for seed in range(40):
        posed = begin_elsewhere(plain, unit_names(), np.random.default_rng(seed)).curves
        assert (np.abs(plain.curves[:, jaw] - posed[0, jaw]) < 1e-6).any()
        assert np.array_equal(posed[:, lid], plain.curves[:, lid])
        assert np.abs(posed[30:] - plain.curves[30:]).max() < 0.01
        begun.append(posed[0, jaw])
    assert max(begun) - min(begun) > 0.2


def test_eyes_meet_the_camera_while_the_head_turns() -> None:
    """Property: with eye contact, gaze and turn of the head cancel on the average."""
    spec = dataclasses.replace(draw_person(3), turn=(0.2, 0.0, 0.0), body_turn=0.05)
    performance = perform(
        spec, [], np.zeros(500), unit_names(), seed=2, manner=dataclasses.replace(MANNER, lively=1.0)
    )
    towards = performance.gaze[:, 0] + performance.turn[:, 0] + 0.25
    assert np.median(np.abs(towards)) < 0.05


@needs_voices
@pytest.mark.parametrize(
    "voice",
    [
        Voice("flite", "slt"),
        Voice("flite", "awb", 1.2, 1.1),
        Voice("espeak", "en-us+f3", 1.1),
        Voice("espeak", "de"),
    ],
)
def test_voices_say_when_each_sound_sounds(voice: Voice) -> None:
    """Property: sounds are in order, cover the samples, and vowels are louder than silences."""
    spoken = say(voice, "Hello people, my mother bought five blue boats.")
    times = [(s.start_s, s.end_s) for s in spoken.sounds]
    assert all(start <= end for start, end in times)
    assert all(abs(end - start) < 0.02 for (_, end), (start, _) in pairwise(times))
    assert abs(times[-1][1] - len(spoken.samples) / 16_000) < 0.1
    loud: dict[str, list[float]] = {"vowel": [], "sil": []}
    for sound in spoken.sounds:
        name = CLASSES[sound.sound]
        kind = "sil" if name == "sil" else "vowel" if name in ("ah", "eh", "a", "o", "u", "i", "ae") else None
        part = spoken.samples[int(sound.start_s * 16_000) : int(sound.end_s * 16_000)]
        if kind and len(part) > 300:
            loud[kind].append(np.sqrt((part**2).mean()))
    assert np.mean(loud["vowel"]) > 4 * np.mean(loud["sil"])


@pytest.fixture(scope="module")
def small_bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    bank_module.make(folder, "held_out", hours=0.005, workers=1, engines=("espeak", "flite"))
    return folder


def test_a_bank_without_held_out_voices_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Example: festival trains alone; that is said before an hour of it has been spoken."""
    monkeypatch.setattr("sys.argv", ["bank", str(tmp_path / "bank"), "--engines", "festival"])
    with pytest.raises(SystemExit):
        bank_module.main()
    assert "name one of flite, kokoro, espeak too" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_a_bank_has_its_index_when_it_is_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    """The index comes last, after the sound: with it nothing is missing; without, that of a bank before is gone too."""
    index, sound = tmp_path / "held_out.npz", tmp_path / "held_out.opus"
    index.write_bytes(b"of another sound")

    class Here:
        """A pool of this process, in which nobody takes long to say something."""

        def __init__(self, workers: int) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...
        def imap(self, _: object, jobs: list[object]) -> list[list[object]]:
            spoken = Utterance(np.full(16_000, 0.1, np.float32), (Sound(1, 0.0, 1.0),))
            return [[(Voice("espeak", "me"), "yes", spoken)] for _ in jobs]

    def encode(command: list[str], **_: object) -> SimpleNamespace:
        assert not index.exists()
        sound.write_bytes(b"sound")
        return SimpleNamespace(returncode=code, stderr="no room")

    monkeypatch.setattr(bank_module, "find_ffmpeg", lambda: "ffmpeg")
    monkeypatch.setattr(bank_module.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=Here))
    monkeypatch.setattr(bank_module.subprocess, "run", encode)
    if code:
        with pytest.raises(InputError, match=r"could not write held_out\.opus \(code 1\): no room"):
            bank_module.make(tmp_path, "held_out", hours=0.002, workers=1)
        assert not index.exists()
    else:
        bank_module.make(tmp_path, "held_out", hours=0.002, workers=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.npz", "held_out.opus"]
        with np.load(index) as stored:
            assert len(stored["starts"]) == len(stored["counts"]) >= 8


@needs_voices
def test_bank_gives_back_what_was_said(small_bank: Path) -> None:
    """Parity: an utterance out of the bank is the spoken one, in place to 10 ms, sounds included."""
    bank = SpeechBank(small_bank, "held_out")
    _voice, text, spoken = bank_module._voice_group((0, True, ("espeak", "flite")))[1]
    kept = bank.utterance(1)
    assert bank.index["texts"][1] == text
    assert len(kept.samples) == len(spoken.samples)
    assert [s.sound for s in kept.sounds] == [s.sound for s in spoken.sounds]
    spectrum = np.fft.rfft(kept.samples, 1 << 18) * np.conj(np.fft.rfft(spoken.samples, 1 << 18))
    lag = int(np.argmax(np.fft.irfft(spectrum)))
    assert min(lag, (1 << 18) - lag) <= 160


@needs_voices
def test_drawn_speech_is_of_the_length_asked_and_loud_where_it_speaks(small_bank: Path) -> None:
    """Property: N = T * 640 samples, loudness follows the sounds, disturbed speech keeps its length."""
    bank = SpeechBank(small_bank, "held_out")
    rng = np.random.default_rng(4)
    speech = bank.draw(rng, 400)
    assert speech.samples.shape == (400 * 640,)
    assert speech.loudness.shape == (400,)
    heard = disturb(speech.samples, rng)
    assert heard.shape == speech.samples.shape
    assert np.abs(heard).max() <= 1
    spoken = np.zeros(400, bool)
    for sound in speech.sounds:
        spoken[max(0, int(sound.start_s * FPS)) : max(0, int(sound.end_s * FPS))] |= sound.sound != 0
    assert speech.loudness[spoken].mean() > 0.5
    assert speech.loudness[~spoken].mean() < 0.25


def test_a_missing_bank_is_said_in_one_line(tmp_path: Path) -> None:
    """Fault: the error names the command that makes one."""
    with pytest.raises(InputError, match=r"people\.bank"):
        SpeechBank(tmp_path, "train")


@needs_voices
def test_plans_follow_from_their_number(small_bank: Path) -> None:
    """Property: clip n is the same whenever it is drawn, and another than clip n + 1."""
    bank, drawing = SpeechBank(small_bank, "held_out"), Drawing(32, 32, n_frames=20)
    first, again, other = (draw_plan(number, bank, drawing) for number in (7, 7, 8))
    assert first.spec == again.spec != other.spec
    np.testing.assert_array_equal(first.heard, again.heard)
    np.testing.assert_array_equal(first.performance.curves, again.performance.curves)


def test_loudness_of_silence_is_nothing() -> None:
    """Property: silence and faint noise read about 0, speech about 1 whatever its gain."""
    rng = np.random.default_rng(0)
    assert loudness_of(np.zeros(16_000)).max() == 0 or loudness_of(np.zeros(16_000)).max() < 0.01
    voice = rng.normal(0, 1, 16_000) * np.repeat([0.0, 1.0], 8_000)
    quiet, loud = loudness_of(0.02 * voice), loudness_of(0.5 * voice)
    np.testing.assert_allclose(quiet, loud, atol=0.05)
    assert loud[14:].mean() == pytest.approx(1, abs=0.2)


# --- measuring, and the assets


def test_measured_opening_follows_the_truth() -> None:
    """Parity: read from the frames alone, the opening of the mouth correlates with the stated one."""
    rng = np.random.default_rng(1)
    names = [str(name) for name in rng.choice(["a", "m", "o", "s", "ae", "p", "u", "f", "sil"], 10)]
    sounds = a_sentence(*names, each_s=0.13, start_s=0.2)
    found = []
    for seed in (HELD_OUT_FROM + 5, HELD_OUT_FROM + 9):
        spec = plain_person(seed)
        performance = perform(spec, sounds, np.ones(36), unit_names(), seed=seed)
        clip = film(spec, performance, 96)
        measured = mouth_opening_from_frames(clip.frames[0].numpy(), tuple(clip.mouth_box[0].tolist()))
        found.append(np.corrcoef(measured, clip.opening_px[0].numpy())[0, 1])
    assert min(found) > 0.9


@needs_voices
def test_measured_opening_follows_the_truth_while_heads_turn(
    small_bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity: the same over the ten seconds at a time for which evaluation uses it, in people as they are drawn."""
    monkeypatch.setattr(measure, "EVERY_FRAMES", 12)  # two a second: half the frames to render
    found = accuracy(load_meter(), SpeechBank(small_bank, "held_out"), "cpu", n_clips=2)
    assert len(found) >= 2
    assert found.mean() > 0.9


def test_example_assets_are_what_the_package_promises() -> None:
    """Contract: four portraits of 512 x 512 under 400 kB, three speeches of about 12 s with their texts."""
    portraits = sorted((ASSETS / "portraits").glob("*.png"))
    assert len(portraits) == 4
    for path in portraits:
        assert path.stat().st_size < 400_000
        assert Image.open(path).size == (512, 512)
    speeches = sorted((ASSETS / "speech").glob("*.wav"))
    assert len(speeches) == 3
    for path in speeches:
        samples, rate_hz = soundfile.read(path)
        assert samples.ndim == 1
        assert 9 < len(samples) / rate_hz < 15
        assert path.stat().st_size < 600_000
        assert path.with_suffix(".txt").read_text().strip()
    assert {voice for voice, _ in SPEECHES.values()} <= set(kokoro.HELD_OUT)
