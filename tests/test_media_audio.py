"""Sound: loudness parity, one rule for lengths, any format, constant memory, one line for every fault."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashtalk_cli.config import Speech
from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.media.audio import prepare_speech, read_samples
from flashtalk_cli.media.ffmpeg import file_input, run
from flashtalk_cli.media.loudness import LoudnessMeter, gain_to, normalise_loudness

REFERENCE = Path(os.environ.get("FLASHTALK_REFERENCE", Path(__file__).parents[1] / "../shared/reference"))


def cases(kind: str) -> list:
    found = [p for p in sorted(REFERENCE.glob("*.json")) if json.loads(p.read_text()).get("kind") == kind]
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no {kind} case in {REFERENCE}"))]
    return [pytest.param(p, id=p.stem) for p in found]


def voice(n: int, seed: int = 0) -> np.ndarray:
    """Noise that comes and goes like words: float32 [n] within +-0.5."""
    rng = np.random.default_rng(seed)
    loud = 0.5 + 0.5 * np.sin(np.arange(n) / 3000.0)
    return (np.tanh(rng.standard_normal(n)) * loud * 0.4).astype(np.float32)


def samples_of(speech: Speech) -> np.ndarray:
    return read_samples(speech, 0, speech.n_samples)


def convert(source: Path, target: Path, **options: object) -> None:
    status, lines = run(file_input(source).output(f"file:{target}", **options))
    assert status == 0, lines


@pytest.mark.parametrize("case", cases("loudness"))
def test_normalised_loudness_is_the_reference(case: Path) -> None:
    """Parity: a window brought to -23 LUFS equals the reference's."""
    with np.load(case.with_suffix(".npz")) as arrays:
        np.testing.assert_allclose(normalise_loudness(arrays["input"], -23.0), arrays["output"], atol=1e-6)


@settings(max_examples=25)
@given(
    n=st.integers(6400, 60_000),
    seed=st.integers(0, 99),
    pause=st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 1e-5, 0.1, 3.0])),
    pieces=st.lists(st.integers(1, 20_000), min_size=1, max_size=5),
)
def test_streaming_loudness_is_that_of_the_whole(n: int, seed: int, pause: tuple, pieces: list[int]) -> None:
    """Property: in any pieces, with pauses that the gates must drop, the meter equals pyloudnorm."""
    samples = voice(n, seed).astype(np.float64)
    start, end = sorted((int(pause[0] * n), int(pause[1] * n)))
    samples[start:end] *= pause[2]
    meter = LoudnessMeter()
    at = 0
    for size in itertools.cycle(pieces):
        meter.add(samples[at : at + size])
        at += size
        if at >= n:
            break
    expected = pyloudnorm.Meter(16_000).integrated_loudness(samples)
    measured = meter.integrated_lufs()
    if not np.isfinite(expected):
        assert measured is None
    else:
        assert measured == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_measured_gets_no_gain() -> None:
    """Contract: silence, 0.39 s, NaN and a loudness beyond +-100 are left as they are."""
    for samples in (np.zeros(32_000, np.float32), voice(6_399), np.full(32_000, np.nan, np.float32)):
        meter = LoudnessMeter()
        meter.add(samples)
        assert meter.integrated_lufs() is None
        np.testing.assert_array_equal(normalise_loudness(samples, -23.0), samples)
    assert gain_to(None, -23.0) == 1.0
    assert gain_to(-100.5, -23.0) == 1.0
    assert gain_to(100.5, -23.0) == 1.0
    assert gain_to(float("nan"), -23.0) == 1.0
    assert gain_to(-43.0, -23.0) == pytest.approx(10.0)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "aiff", "mp3", "m4a", "mkv", "opus", "aac"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    """Contract: lossless or lossy, by soundfile or ffmpeg, the same words come out at the same time."""
    source, path = tmp_path / "source.wav", tmp_path / f"speech.{suffix}"
    tone = np.sin(2 * np.pi * 300 * np.arange(2 * 44_100) / 44_100) * 0.25
    tone[:44_100] *= 0.02  # quiet, then loud from 1 s on
    soundfile.write(source, np.stack([tone, tone], 1), 44_100)
    convert(source, path) if suffix != "wav" else source.rename(path)
    speech = prepare_speech(path, tmp_path)
    # AAC comes in packets of 1024 samples; a bare stream also cannot say what its encoder put in front.
    packet = 1024 * 16_000 / 44_100
    assert (
        -60 <= speech.n_samples - 32_000 <= {"aac": 3 * packet, "m4a": packet, "mkv": packet}.get(suffix, 60)
    )
    loud_from = int(np.argmax(np.abs(samples_of(speech)) > 0.1))
    assert abs(loud_from - 16_000) <= (2 * packet if suffix == "aac" else 60)
    expected = pyloudnorm.Meter(16_000).integrated_loudness(soxr.resample(tone, 44_100, 16_000))
    assert speech.loudness_lufs == pytest.approx(expected, abs=0.6)  # LAME takes 0.45 dB off


def test_resampling_is_soxr_hq_of_the_mean(tmp_path: Path) -> None:
    """Parity: streamed in blocks, the samples are those of soxr over the whole mean of the channels."""
    stereo = np.stack([voice(200_001, 1), voice(200_001, 2)], 1)
    soundfile.write(tmp_path / "a.wav", stereo, 44_100, subtype="FLOAT")
    speech = prepare_speech(tmp_path / "a.wav", tmp_path)
    expected = soxr.resample(stereo.mean(1), 44_100, 16_000, quality="HQ")
    np.testing.assert_allclose(samples_of(speech), expected, atol=1e-6)
    whole = pyloudnorm.Meter(16_000).integrated_loudness(expected.astype(np.float64))
    assert speech.loudness_lufs == pytest.approx(whole, abs=1e-5)


def test_16_khz_mono_passes_untouched(tmp_path: Path) -> None:
    """Parity: what is already right is not resampled; also beyond full scale, which floats may be."""
    samples = voice(70_000) * 5
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(samples_of(prepare_speech(tmp_path / "a.wav", tmp_path)), samples)


@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM"]
)
def test_full_scale_is_one(tmp_path: Path, subtype: str) -> None:
    """Contract: integers of any width are scaled to +-1, neither clipped nor wrapped."""
    square = np.where(np.arange(16_000) % 160 < 80, 1.0, -1.0)
    soundfile.write(tmp_path / "a.wav", square, 16_000, subtype=subtype)
    samples = samples_of(prepare_speech(tmp_path / "a.wav", tmp_path))[:16_000]
    assert np.median(np.abs(samples)) == pytest.approx(1.0, abs=0.03)
    assert (np.sign(samples[40:][::160]) == 1).all()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3000),
    rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000]),
)
def test_length_rule(tmp_path: Path, n: int, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: n frames become n / rate * 16000 samples, rounded, at least one: one sample of sound works."""
    monkeypatch.setattr("flashtalk_cli.media.audio.BLOCK_FRAMES", 700)  # several blocks even here
    monkeypatch.setattr("flashtalk_cli.media.audio._check_ffmpeg_reads", lambda path: None)  # costs a process
    soundfile.write(tmp_path / "a.wav", voice(n), rate, subtype="FLOAT")
    speech = prepare_speech(tmp_path / "a.wav", tmp_path)
    exact = n * 16_000 / rate
    assert speech.n_samples >= 1
    assert abs(speech.n_samples - max(1.0, exact)) <= 0.5
    assert speech.samples_path.stat().st_size == 4 * speech.n_samples
    speech.samples_path.unlink()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(-300, 300), length=st.integers(-5, 500))
def test_read_samples_is_zero_outside(tmp_path: Path, start: int, length: int) -> None:
    """Property: any window equals that of the sound between endless zeros."""
    samples = voice(100)
    path = tmp_path / "raw.f32"
    samples.tofile(path)
    speech = Speech(samples_path=path, n_samples=100, loudness_lufs=None)
    endless = np.concatenate([np.zeros(1000, np.float32), samples, np.zeros(1000, np.float32)])
    window = read_samples(speech, start, start + length)
    assert window.dtype == np.float32
    np.testing.assert_array_equal(window, endless[1000 + start : 1000 + start + max(0, length)])


def wav_bytes(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=kind)
    return buffer.getvalue()


def not_finite(value: float) -> np.ndarray:
    samples = voice(32_000)
    samples[24_000] = value
    return samples


WHOLE = wav_bytes(voice(32_000))
FLAC = wav_bytes(voice(32_000), kind="FLAC")
MP3 = wav_bytes(voice(320_000), kind="MP3", subtype="MPEG_LAYER_III")
BAD_BYTES = {
    "empty": (b"", "0 bytes"),
    "text": (b"These are words, not a sound.\n" * 50, "not a sound"),
    "noise": (np.random.default_rng(0).bytes(5000), "not a sound"),
    "a picture": (b"BM" + bytes(200), "a sound"),
    "no samples": (wav_bytes(np.zeros(0)), "no samples"),
    "only a header": (WHOLE[:20], "a sound"),
    "cut wav": (WHOLE[:20_000], "19956 bytes of sound of 64000"),
    "cut flac": (FLAC[: len(FLAC) // 2], "cut short"),
    "cut mp3": (MP3[: len(MP3) // 2], "cut short"),
    "nan": (wav_bytes(not_finite(np.nan), subtype="FLOAT"), "1.500 s"),
    "infinity": (wav_bytes(not_finite(np.inf), subtype="DOUBLE"), "1.500 s"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_sounds_end_in_one_line(tmp_path: Path, name: str) -> None:
    """Fault: every unusable file is an `InputError` of one line that names it; no samples are left behind."""
    data, told = BAD_BYTES[name]
    (tmp_path / "bad.wav").write_bytes(data)
    (tmp_path / "work").mkdir()
    with pytest.raises(InputError) as caught:
        prepare_speech(tmp_path / "bad.wav", tmp_path / "work")
    message = str(caught.value)
    assert "bad.wav" in message
    assert told in message
    assert "\n" not in message
    assert not list((tmp_path / "work").iterdir())


def test_what_is_no_file_is_told_apart(tmp_path: Path) -> None:
    """Fault: a missing file and a folder say which they are."""
    for path, told in ((tmp_path / "none.wav", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=told):
            prepare_speech(path, tmp_path)


def test_containers_without_or_with_half_a_sound(tmp_path: Path) -> None:
    """Fault: a film without sound and an M4A that was not downloaded to its end say so."""
    soundfile.write(tmp_path / "a.wav", voice(160_000), 16_000)
    silent = tmp_path / "silent.mp4"
    (tmp_path / "frames").write_bytes(bytes(64 * 64 * 3 * 10))
    frames = file_input(tmp_path / "frames", format="rawvideo", pix_fmt="rgb24", s="64x64", r=25)
    assert run(frames.output(f"file:{silent}", pix_fmt="yuv420p"))[0] == 0
    convert(tmp_path / "a.wav", tmp_path / "whole.m4a", movflags="+faststart")
    convert(tmp_path / "a.wav", tmp_path / "late.m4a")
    (tmp_path / "half.m4a").write_bytes((tmp_path / "whole.m4a").read_bytes()[:40_000])
    (tmp_path / "late.m4a").write_bytes((tmp_path / "late.m4a").read_bytes()[:40_000])
    for name, told in (("silent.mp4", "no sound"), ("half.m4a", "partial file"), ("late.m4a", "moov atom")):
        with pytest.raises(InputError, match=told):
            prepare_speech(tmp_path / name, tmp_path)


def test_a_wav_of_unknown_length_is_whole(tmp_path: Path) -> None:
    """Contract: a WAV written to a pipe, whose header claims 4 GB, is not taken for one cut short."""
    soundfile.write(tmp_path / "a.wav", voice(32_000), 16_000)
    unknown = bytearray((tmp_path / "a.wav").read_bytes())
    unknown[4:8] = unknown[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(unknown)
    assert prepare_speech(tmp_path / "a.wav", tmp_path).n_samples == 32_000


def test_many_channels_that_the_video_could_not_hold(tmp_path: Path) -> None:
    """Fault: what ffmpeg cannot mix for the video is refused now, not after an hour of rendering."""
    soundfile.write(tmp_path / "six.wav", np.stack([voice(8_000)] * 6, 1), 16_000)
    assert prepare_speech(tmp_path / "six.wav", tmp_path).n_samples == 8_000
    soundfile.write(tmp_path / "many.wav", np.stack([voice(8_000)] * 30, 1), 16_000)
    with pytest.raises(InputError, match="one or two channels"):
        prepare_speech(tmp_path / "many.wav", tmp_path)


@pytest.mark.parametrize("name", ["-i.wav", "речь 声.wav", "a:b%d.wav", "two\nlines.wav", "speech.raw"])
def test_odd_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: any name works, through soundfile and through ffmpeg, and a misleading suffix misleads nobody."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("made.wav", voice(16_000), 16_000)
    for made in ("made.wav", "made.m4a"):
        if made == "made.m4a":
            soundfile.write("made.wav", voice(16_000), 16_000)
            convert(Path("made.wav"), Path(made))
        Path(made).rename(name)
        assert abs(prepare_speech(Path(name), Path()).n_samples - 16_000) <= 1024


def test_working_folder_that_cannot_take_it(tmp_path: Path) -> None:
    """Fault: no folder for the samples, or no room in it, is an `OutputError`."""
    soundfile.write(tmp_path / "a.wav", voice(160_000), 16_000)
    with pytest.raises(OutputError, match="No such file"):
        prepare_speech(tmp_path / "a.wav", tmp_path / "none")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from flashtalk_cli.media.audio import prepare_speech; from flashtalk_cli.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n"
        "try: prepare_speech(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except OutputError as error: print(error)\n"
    )
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "a.wav"), str(tmp_path / "work")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "an hour of sound takes 230 MB" in told.stdout, told
    assert not list((tmp_path / "work").iterdir())


def test_memory_does_not_grow_with_the_sound(tmp_path: Path) -> None:
    """Property: the peak for 20 minutes of 24 kHz (58 MB) is that for 10 seconds, within 10 MB."""
    code = (
        "import sys; from pathlib import Path\n"
        "from flashtalk_cli.media.audio import prepare_speech\n"
        "speech = prepare_speech(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(speech.n_samples, peak.split()[1])\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to read the peak from")
    peaks_kb = {}
    for seconds in (10, 1200):
        path = tmp_path / f"{seconds}.wav"
        soundfile.write(path, voice(240_000), 24_000)  # ten seconds, then a sparse rest
        n_bytes = seconds * 24_000 * 2
        with path.open("r+b") as file:
            file.seek(4)
            file.write((36 + n_bytes).to_bytes(4, "little"))
            file.seek(40)
            file.write(n_bytes.to_bytes(4, "little"))
            file.truncate(44 + n_bytes)
        command = [sys.executable, "-c", code, str(path), str(tmp_path)]
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        )
        n_samples, peak = told.stdout.split()
        assert int(n_samples) == seconds * 16_000
        peaks_kb[seconds] = int(peak)
    assert peaks_kb[1200] - peaks_kb[10] < 10_000, peaks_kb
