"""Video files: what is promised of a whole one."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from video_parts import PACKET_S, SIDE, frames, in_step, opened, tone

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.media import codecs
from flashtalk_cli.media.audio import prepare_speech
from flashtalk_cli.media.ffmpeg import Reading, file_input, find_ffmpeg, run
from flashtalk_cli.media.probe import probe


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return tone(tmp_path / "sound.wav")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".MP4"])
def test_a_whole_file(tmp_path: Path, sound: Path, suffix: str) -> None:
    """Contract: frames, durations, codecs, the sound's own rate, the comment; nothing else is left in the folder."""
    output = tmp_path / "out" / f"видео 1{suffix}"
    output.parent.mkdir()
    with opened(output, 101, sound, comment="synthetic media; flashtalk 1.0; preset mini; seed 7") as video:
        for first in range(0, 101, 28):
            video.write(frames(min(28, 101 - first), first))
        assert not output.exists()
        assert video.finish() == output
        assert video.abort() is None
    assert os.listdir(output.parent) == [output.name]
    found = probe(output)
    in_step(found, 101, slack_s=PACKET_S if suffix in (".mkv", ".webm") else 0)
    webm = suffix == ".webm"
    assert (found.video.codec, found.audio.codec) == (("vp9", "opus") if webm else ("h264", "aac"))
    assert (found.video.width_px, found.video.height_px) == (SIDE, SIDE)
    assert (found.audio.rate_hz, found.audio.layout) == (48_000 if webm else 44_100, "stereo")
    assert found.tags["comment"] == "synthetic media; flashtalk 1.0; preset mini; seed 7"


def test_mp4_has_its_index_in_front(tmp_path: Path, sound: Path) -> None:
    """Contract: the finished MP4 is a plain one that plays before it is read whole."""
    with opened(tmp_path / "a.mp4", 30, sound) as video:
        video.write(frames(30))
        video.finish()
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data


@pytest.mark.parametrize(("n_frames", "fps"), [(1, 25), (2, 25), (3, 60), (31, 30), (50, 20), (77, 50)])
def test_no_frame_is_lost_or_added(tmp_path: Path, n_frames: int, fps: int) -> None:
    """Property: any number of frames at any rate, over sound that ends inside the last of them."""
    sound = tmp_path / "a.wav"
    n_samples = max(1, int((n_frames - 0.97) / fps * 16_000))
    soundfile.write(sound, np.full(n_samples, 0.1), 16_000)
    for suffix in (".mp4", ".webm")[: 1 + (n_frames < 10)]:
        output = tmp_path / f"v{suffix}"
        with opened(output, n_frames, sound, fps=fps) as video:
            video.write(frames(n_frames))
            video.finish()
        in_step(probe(output), n_frames, fps, slack_s=0.021 if suffix == ".webm" else 0)


def test_without_sound(tmp_path: Path) -> None:
    """Contract: a video needs no sound."""
    with opened(tmp_path / "a.mp4", 10) as video:
        video.write(frames(10))
        video.finish()
    found = probe(tmp_path / "a.mp4")
    assert found.audio is None
    assert found.video is not None
    assert found.video.n_frames == 10


def decoded_frames(path: Path, side: int = SIDE) -> np.ndarray:
    with Reading(
        file_input(path, copyts=None).output("-", format="rawvideo", pix_fmt="rgb24", map="0:v")
    ) as reading:
        return np.frombuffer(reading.stdout.read(), np.uint8).reshape(-1, side, side, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_colours_survive(tmp_path: Path, suffix: str) -> None:
    """Golden: plain colours come back as they were, and the file says bt709 in limited range."""
    colours = [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (0, 0, 0),
        (224, 172, 150),
        (16, 128, 235),
    ]
    output = tmp_path / f"a{suffix}"
    with opened(output, len(colours) * 5) as video:
        for colour in colours:
            video.write(np.broadcast_to(np.uint8(colour), (5, SIDE, SIDE, 3)))
        video.finish()
    seen = decoded_frames(output)[2::5].astype(int)
    for colour, frame in zip(colours, seen, strict=True):
        assert np.abs(frame - colour).max() <= 6, colour
    described = subprocess.run(
        [find_ffmpeg(), "-i", output], capture_output=True, text=True, check=False
    ).stderr
    assert re.search(r"Video: .*yuv420p\(tv, bt709", described), described


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("delayed", [False, True])
def test_lips_and_sound_are_in_step(tmp_path: Path, suffix: str, delayed: bool) -> None:
    """Golden: a click and a flash at 2 s are at one time in the file, also when the sound's file starts late.

    A film whose sound begins 0.7 s after its picture: the speech encoder hears samples from 0, so the video
    must play them from 0 too.
    """
    click = np.zeros(3 * 44_100)
    click[2 * 44_100 : 2 * 44_100 + 400] = 0.9
    sound = tmp_path / "click.wav"
    soundfile.write(sound, click, 44_100)
    if delayed:
        (tmp_path / "raw").write_bytes(bytes(SIDE * SIDE * 3 * 90))
        picture = file_input(tmp_path / "raw", format="rawvideo", pix_fmt="rgb24", s=f"{SIDE}x{SIDE}", r=25)
        late = file_input(sound, itsoffset=0.7)["a:0"]
        film = tmp_path / "film.mkv"
        from ffmpeg import output as joined

        status, lines = run(joined(picture["v:0"], late, f"file:{film}", acodec="pcm_s16le", vcodec="mpeg4"))
        assert status == 0, lines
        sound = film
    heard = prepare_speech(sound, tmp_path)
    samples = np.fromfile(heard.samples_path, np.float32)
    assert np.argmax(np.abs(samples) > 0.3) / 16_000 == pytest.approx(2.0, abs=0.005)
    flash = np.zeros((75, SIDE, SIDE, 3), np.uint8)
    flash[50] = 255
    output = tmp_path / f"v{suffix}"
    with opened(output, 75, sound) as video:
        video.write(flash)
        video.finish()
    found = probe(output)
    assert found.video is not None
    assert found.audio is not None
    flash_s = found.video.start_s + int(np.argmax(decoded_frames(output).mean((1, 2, 3)) > 100)) / 25
    with Reading(file_input(output).output("-", format="f32le", ac=1, map="0:a")) as reading:
        loud = np.abs(np.frombuffer(reading.stdout.read(), np.float32)) > 0.3
    click_s = found.audio.start_s + int(np.argmax(loud)) / found.audio.rate_hz
    assert click_s == pytest.approx(flash_s, abs=0.041 if suffix == ".mkv" else 0.021)


def test_crf_and_codecs(tmp_path: Path) -> None:
    """Contract: a higher crf makes a smaller file; a codec may be named."""
    sizes = []
    for crf in (10, 40):
        with opened(tmp_path / f"{crf}.mp4", 10, encoding=Encoding(crf=crf)) as video:
            video.write(frames(10))
            video.finish()
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[1] < sizes[0] / 2
    with opened(tmp_path / "vp9.mkv", 5, encoding=Encoding(codec="vp9", crf=50)) as video:
        video.write(frames(5))
        video.finish()
    assert probe(tmp_path / "vp9.mkv").streams[0].codec == "vp9"


def test_nvenc_is_taken_only_where_it_opens() -> None:
    """Fault: being compiled in is not enough; without a GPU it is refused in one line, and auto passes it by."""
    if codecs.opens("h264_nvenc"):
        assert codecs.pick_video_codec(".mp4", "nvenc").name == "h264_nvenc"
        pytest.skip("NVENC opens on this machine")
    with pytest.raises(OutputError, match=r"h264_nvenc.*--codec auto"):
        codecs.pick_video_codec(".mp4", "h264_nvenc")
    assert codecs.pick_video_codec(".mp4", "auto").name == "libx264"


def test_auto_without_x264(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an ffmpeg without any encoder that fits says which were tried."""
    monkeypatch.setattr(codecs, "encoders", lambda: frozenset({"mpeg4"}))
    with pytest.raises(OutputError, match="libx264, h264_nvenc"):
        codecs.pick_video_codec(".mp4", "auto")


def test_standard_output(tmp_path: Path, sound: Path) -> None:
    """Contract: without a name the video goes to a descriptor, fragmented, and nothing else is made."""
    target = tmp_path / "piped"
    with target.open("wb") as file, opened(None, 101, sound, stdout=file.fileno()) as video:
        video.write(frames(101))
        assert video.finish() is None
    assert sorted(os.listdir(tmp_path)) == ["piped", "sound.wav"]
    in_step(probe(target), 101, slack_s=PACKET_S)


def test_probe_refuses_what_does_not_decode(tmp_path: Path) -> None:
    """Contract: the checker itself does not call rubbish a video, and counts only what decodes."""
    (tmp_path / "a.mp4").write_bytes(bytes(5000))
    with pytest.raises(InputError, match="cannot be decoded"):
        probe(tmp_path / "a.mp4")
