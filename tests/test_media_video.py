"""Video files: what is promised of a whole one, and of every way in which writing one can end early."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.media import codecs, part_file, video_file
from flashtalk_cli.media.audio import prepare_speech
from flashtalk_cli.media.ffmpeg import Reading, file_input, find_ffmpeg, run
from flashtalk_cli.media.part_file import PartFile, part_path
from flashtalk_cli.media.probe import Probe, probe
from flashtalk_cli.media.soundtrack import LEAD_S
from flashtalk_cli.media.video_file import VideoFile, check_output

ROOT = Path(__file__).parents[1]
SIDE = 64
PACKET_S = 1024 / 44_100  # of AAC; Opus has 0.02 s


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """4.03 s of stereo at 44.1 kHz."""
    path = tmp_path / "sound.wav"
    times = np.arange(int(4.03 * 44_100)) / 44_100
    soundfile.write(path, np.stack([np.sin(2 * np.pi * 440 * times) * 0.3] * 2, 1), 44_100)
    return path


def frames(n: int, first: int = 0, side: int = SIDE) -> np.ndarray:
    """Noise, which an encoder cannot make small: uint8 [n, side, side, 3]."""
    return np.random.default_rng(first).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def opened(
    output: Path | None, n_frames: int = 101, audio: Path | None = None, **changes: object
) -> VideoFile:
    settings: dict = {
        "width_px": SIDE,
        "height_px": SIDE,
        "fps": 25,
        "encoding": Encoding(),
        "comment": "synthetic",
    }
    return VideoFile(output, n_frames=n_frames, audio=audio, **(settings | changes))


def in_step(found: Probe, n_frames: int, fps: int = 25, slack_s: float = 0.0) -> None:
    """All frames are there, and picture and sound begin and end together, within a frame.

    Only a file that was copied at its end says exactly where the sound's last packet ends: `slack_s` for
    the others.
    """
    assert found.video is not None
    assert found.audio is not None
    assert found.video.n_frames == n_frames
    assert found.video.duration_s == pytest.approx(n_frames / fps, abs=0.003)
    assert abs(found.audio.end_s - found.video.end_s) <= 1 / fps + slack_s
    assert abs(found.audio.start_s - found.video.start_s) <= 1 / fps


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


def test_bad_outputs_end_in_one_line_before_anything_is_made(tmp_path: Path) -> None:
    """Fault: every output that cannot work is refused, by the early check and by the constructor alike."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "taken.mp4").write_bytes(b"precious")
    bad = [
        (tmp_path / "none" / "a.mp4", {}, "does not exist"),
        (tmp_path / "file" / "a.mp4", {}, "is not a folder"),
        (tmp_path / "folder.mp4", {}, "is a folder"),
        (tmp_path / "taken.mp4", {}, "--overwrite"),
        (tmp_path / "a.avi", {}, "'.avi'.*.mp4, .mov, .mkv, .webm"),
        (tmp_path / "a", {}, "''"),
        (tmp_path / "a.mp4", {"codec": "theora"}, "unknown codec 'theora'"),
        (tmp_path / "a.webm", {"codec": "libx264"}, "does not go into .webm"),
        (tmp_path / "a.mp4", {"crf": 60}, "0 to 51"),
        (tmp_path / os.fsdecode(b"\xff.mp4"), {}, "UTF-8"),
        (tmp_path / ("x" * 300 + ".mp4"), {}, "too long"),
    ]
    before = sorted(os.listdir(tmp_path))
    for output, choice, told in bad:
        encoding = Encoding(**choice)
        with pytest.raises(OutputError, match=told) as caught:
            opened(output, encoding=encoding)
        assert str(caught.value).isprintable()
        if told != "too long":  # which only creating it can tell
            with pytest.raises(OutputError, match=told):
                check_output(output, encoding, SIDE, SIDE, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "taken.mp4").read_bytes() == b"precious"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Fault: a read-only folder is refused. To root no permission is denied, so a read-only mount stands in."""
    folder = tmp_path / "locked"
    folder.mkdir()
    mounted = False
    if os.geteuid() == 0:
        options = ["/bin/mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
        mounted = subprocess.run(options, capture_output=True, check=False).returncode == 0
        if not mounted:
            pytest.skip("root, and may not mount: nothing here is read-only")
    else:
        folder.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot be written to"):
            opened(folder / "a.mp4")
    finally:
        if mounted:
            subprocess.run(["/bin/umount", str(folder)], check=True)
        folder.chmod(0o755)


@pytest.mark.parametrize("name", ["-y.mp4", "a:b%03d.mp4", "with 'quotes' \"both\".mkv", "two\nlines.mp4"])
def test_odd_names(tmp_path: Path, sound: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: no name is taken for an option, a protocol or a pattern; also of the sound."""
    monkeypatch.chdir(tmp_path)
    heard = Path(f"-{name}.wav")
    sound.rename(heard)
    with opened(Path(name), 101, heard) as video:
        video.write(frames(101))
        assert video.finish() == Path(name)
    assert sorted(os.listdir()) == sorted([name, str(heard)])
    in_step(probe(Path(name)), 101, slack_s=PACKET_S)


def test_overwrite(tmp_path: Path) -> None:
    """Contract: with leave the old file stays until the new one is whole, and is then replaced."""
    output = tmp_path / "a.mp4"
    output.write_bytes(b"old")
    with opened(output, 5, overwrite=True) as video:
        video.write(frames(5))
        assert output.read_bytes() == b"old"
        video.finish()
    assert probe(output).streams[0].n_frames == 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("links", [True, False])
def test_a_name_taken_meanwhile_is_left_alone(
    tmp_path: Path, suffix: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a file that appears during the render is not replaced; the video is kept, and said where."""
    if not links:  # as on FAT and some network drives

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    output = tmp_path / f"a{suffix}"
    with opened(output, 5) as video:
        video.write(frames(5))
        output.write_bytes(b"another's")
        with pytest.raises(OutputError, match=r"appeared.*\.part"):
            video.finish()
    assert output.read_bytes() == b"another's"
    assert sorted(os.listdir(tmp_path)) == sorted([output.name, output.name + ".part"])
    assert probe(part_path(output)).streams[0].n_frames == 5
    output.unlink()
    with opened(output, 6) as video:  # the way is free again, and the stale part is no obstacle
        video.write(frames(6))
        video.finish()
    assert probe(output).streams[0].n_frames == 6
    assert os.listdir(tmp_path) == [output.name]


def test_two_runs_do_not_share_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a second run to the same name is refused while the first lives, and leaves its file alone."""
    monkeypatch.setattr(part_file, "LOCK_S", 0.1)
    output = tmp_path / "a.mp4"
    with opened(output, 5) as video:
        with pytest.raises(OutputError, match="another run"):
            opened(output, 5)
        video.write(frames(5))
        video.finish()
    assert probe(output).streams[0].n_frames == 5
    PartFile(tmp_path / "b.mp4", overwrite=False).discard()


@pytest.mark.parametrize("published", [False, True])
def test_a_part_is_waited_for_a_moment(tmp_path: Path, published: bool) -> None:
    """Fault: what a killed run's encoder still writes is taken over when it lets go; what it published is not."""
    first = PartFile(tmp_path / "a.mp4", overwrite=True)
    timer = threading.Timer(0.3, first.discard if published else first.release)
    timer.start()
    if published:
        with pytest.raises(OutputError, match="another run"):
            PartFile(tmp_path / "a.mp4", overwrite=True)
    else:
        PartFile(tmp_path / "a.mp4", overwrite=True).discard()
    timer.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_an_interrupted_video_is_kept(tmp_path: Path, sound: Path, suffix: str) -> None:
    """Contract: ended early, the part holds every frame written and its sound cut to them; no final name."""
    output = tmp_path / f"a{suffix}"
    with opened(output, 101, sound) as video:
        video.write(frames(28))
        video.write(frames(28, 1))
        kept = video.abort()
    assert kept == part_path(output)
    assert not output.exists()
    found = probe(kept)
    in_step(found, 56, slack_s=PACKET_S)
    assert found.tags["comment"] == "synthetic"


def test_an_exception_aborts(tmp_path: Path, sound: Path) -> None:
    """Contract: leaving the context by an exception keeps what there is, and the exception goes on."""
    output = tmp_path / "a.mp4"

    def interrupted() -> None:
        with opened(output, 101, sound) as video:
            video.write(frames(28))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    in_step(probe(part_path(output)), 28, slack_s=PACKET_S)
    assert not output.exists()


def test_nothing_rendered_leaves_nothing(tmp_path: Path, sound: Path) -> None:
    """Contract: without a frame there is no part file either, and an older one is gone."""
    part_path(tmp_path / "a.mp4").write_bytes(b"of a dead run")
    with opened(tmp_path / "a.mp4", 101, sound) as video:
        assert video.abort() is None
    assert os.listdir(tmp_path) == [sound.name]


def write_until_it_fails(video: VideoFile, n: int = 400) -> str:
    def write_all() -> None:
        for first in range(n):
            video.write(frames(10, first))
            time.sleep(0.01)
        video.finish()

    with pytest.raises(OutputError) as caught:
        write_all()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_ffmpeg_killed(tmp_path: Path, sound: Path) -> None:
    """Fault: the encoder is killed in mid-file: one line, nothing under the final name, the part plays."""
    output = tmp_path / "a.mp4"
    with opened(output, 4000, sound) as video:
        for first in range(15):
            video.write(frames(20, first))
        deadline = time.monotonic() + 20
        while part_path(output).stat().st_size < 100_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert video.pid is not None
        os.kill(video.pid, signal.SIGKILL)
        message = write_until_it_fails(video, 370)
    assert "SIGKILL" in message
    assert "a.mp4.part" in message
    assert not output.exists()
    found = probe(part_path(output))
    assert found.video is not None
    assert 45 <= found.video.n_frames < 330
    assert found.audio is not None


def test_ffmpeg_that_hangs_is_killed_on_abort(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: an encoder that neither reads nor ends cannot make us wait for ever."""
    monkeypatch.setattr(video_file, "ABORT_S", 0.5)
    with opened(tmp_path / "a.mp4", 4000, sound) as video:
        assert video.pid is not None
        os.kill(video.pid, signal.SIGSTOP)
        filler = threading.Thread(target=lambda: [video.write(frames(10)) for _ in range(3)])
        filler.start()
        filler.join(20)
        started = time.monotonic()
        video.abort()
    assert time.monotonic() - started < 10
    assert not (tmp_path / "a.mp4").exists()


def test_a_sound_that_ffmpeg_cannot_read(tmp_path: Path) -> None:
    """Fault: a second input without sound is refused before a frame is written, and nothing is made."""
    (tmp_path / "bad.wav").write_bytes(b"no sound at all " * 100)
    with pytest.raises(InputError, match=r"bad\.wav.*Invalid data"):
        opened(tmp_path / "a.mp4", 4000, tmp_path / "bad.wav")
    assert os.listdir(tmp_path) == ["bad.wav"]


def limited(code: str, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys, os, signal, resource, numpy as np; from pathlib import Path\n"
        "from flashtalk_cli.config import Encoding; from flashtalk_cli.errors import OutputError\n"
        "from flashtalk_cli.media.video_file import VideoFile\n"
        "noise = np.random.default_rng(0).integers(0, 256, (25, 64, 64, 3), dtype=np.uint8)\n"
        "def opened(n, output, audio=None, **more): return VideoFile(output, width_px=64, height_px=64, fps=25,\n"
        "    n_frames=n, audio=audio, encoding=Encoding(), **more)\n" + code
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """Fault: at RLIMIT_FSIZE ffmpeg is ended by the system; that is said, with the mend."""
    code = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000,) * 2)\n"
        "try:\n"
        "    with opened(1000, Path(sys.argv[1])) as video:\n"
        "        for _ in range(40): video.write(noise)\n"
        "        video.finish()\n"
        "except OutputError as error: print(error); sys.exit(6)\n"
    )
    told = limited(code, tmp_path, tmp_path / "a.mp4")
    assert told.returncode == 6, told
    assert "ulimit -f" in told.stdout
    assert told.stdout.count("\n") == 1
    assert not (tmp_path / "a.mp4").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    """Fault: no space left: one line that says so, no final name; half a disk is enough without the index copy."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        for name in ("a.mp4", "a.mkv"):
            with opened(disk / name, 4000) as video:
                message = write_until_it_fails(video)
            assert "No space left" in message, message
            assert "free some space" in message
            assert os.listdir(disk) == [f"{name}.part"]
            part_path(disk / name).unlink()
        with opened(disk / "b.mp4", 25) as video:
            video.write(np.tile(frames(1), (25, 1, 1, 1)))
            filler = disk / "filler"
            video._feed.end()  # type: ignore[union-attr]
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            assert video.finish() == disk / "b.mp4"
        assert probe(disk / "b.mp4").streams[0].n_frames == 25
        assert sorted(os.listdir(disk)) == ["b.mp4", "filler"]
    finally:
        subprocess.run(["/bin/umount", str(disk)], check=True)


def test_standard_output(tmp_path: Path, sound: Path) -> None:
    """Contract: without a name the video goes to a descriptor, fragmented, and nothing else is made."""
    target = tmp_path / "piped"
    with target.open("wb") as file, opened(None, 101, sound, stdout=file.fileno()) as video:
        video.write(frames(101))
        assert video.finish() is None
    assert sorted(os.listdir(tmp_path)) == ["piped", "sound.wav"]
    in_step(probe(target), 101, slack_s=PACKET_S)


def test_the_reader_of_standard_output_goes_away(sound: Path) -> None:
    """Fault: `| head` ends the run with one line, without waiting."""
    reader, writer = os.pipe()
    with opened(None, 4000, sound, stdout=writer) as video:
        os.close(writer)
        os.close(reader)
        message = write_until_it_fails(video)
    assert "standard output" in message
    assert "went away" in message


PARENT = (
    "video = opened(4000, Path(sys.argv[1]), Path(sys.argv[2]))\n"
    "for _ in range(12): video.write(noise)\n"
    "while video._feed._queue.qsize() or os.path.getsize(sys.argv[1] + '.part') < 100_000: pass\n"
)


def wait_until_unlocked(output: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            PartFile(output, overwrite=False).release()
        except OutputError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("ffmpeg outlived its parent")


def copy_before_lock(output: Path) -> Path:
    """The part as it lies there: taking its lock would empty it."""
    copy = output.with_name("copy")
    copy.write_bytes(part_path(output).read_bytes())
    return copy


def test_the_parent_is_killed(tmp_path: Path, sound: Path) -> None:
    """Fault: SIGKILL to the program: ffmpeg ends by itself and the part holds all it was given.

    The sound may lead, never lag: what the program still held of either is lost.
    """
    output = tmp_path / "a.mp4"
    ended = limited(PARENT + "os.kill(os.getpid(), signal.SIGKILL)\n", tmp_path, output, sound)
    assert ended.returncode == -signal.SIGKILL, ended
    deadline = time.monotonic() + 20
    size = -1
    while size != (size := part_path(output).stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.5)
    copy = copy_before_lock(output)
    wait_until_unlocked(output)
    found = probe(copy)
    assert found.video is not None
    assert 270 <= found.video.n_frames <= 300  # up to a piece was on its way
    assert found.audio is not None
    assert -0.04 <= found.audio.end_s - found.video.end_s <= LEAD_S + 0.04
    assert not output.exists()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_everything_is_killed(tmp_path: Path, sound: Path, suffix: str) -> None:
    """Fault: parent and ffmpeg are killed at once, as by a power cut: the part plays to the last fragment."""
    output = tmp_path / f"a{suffix}"
    code = PARENT + "os.kill(video.pid, signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)\n"
    ended = limited(code, tmp_path, output, sound)
    assert ended.returncode == -signal.SIGKILL, ended
    found = probe(part_path(output))
    assert found.video is not None
    assert found.video.n_frames >= 45
    assert found.audio is not None
    assert found.audio.end_s >= 1.7
    assert not output.exists()


def test_ctrl_c_does_not_reach_ffmpeg(tmp_path: Path, sound: Path) -> None:
    """Contract: the terminal's Ctrl-C goes to a whole process group; ffmpeg is not in it, and we end it."""
    output = tmp_path / "a.mp4"
    code = (
        "os.setpgid(0, 0)\n"
        "try:\n"
        "    with opened(1000, Path(sys.argv[1]), Path(sys.argv[2])) as video:\n"
        "        video.write(noise); video.write(noise)\n"
        "        os.killpg(0, signal.SIGINT)\n"
        "        signal.pause()\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    assert limited(code, tmp_path, output, sound).returncode == 130
    in_step(probe(part_path(output)), 50, slack_s=PACKET_S)


def test_probe_refuses_what_does_not_decode(tmp_path: Path) -> None:
    """Contract: the checker itself does not call rubbish a video, and counts only what decodes."""
    (tmp_path / "a.mp4").write_bytes(bytes(5000))
    with pytest.raises(InputError, match="cannot be decoded"):
        probe(tmp_path / "a.mp4")
