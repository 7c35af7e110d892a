"""Every way in which writing a video can end early: what is said, and what is left to play."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from video_parts import PACKET_S, frames, in_step, opened, tone

from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.media import video_file
from flashtalk_cli.media.part_file import PartFile, part_path
from flashtalk_cli.media.probe import probe
from flashtalk_cli.media.soundtrack import LEAD_S
from flashtalk_cli.media.video_file import VideoFile, file_behind

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return tone(tmp_path / "sound.wav")


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


def test_a_sound_that_ffmpeg_cannot_read(tmp_path: Path) -> None:
    """Fault: a second input without sound is refused before a frame is written, and nothing is made."""
    (tmp_path / "bad.wav").write_bytes(b"no sound at all " * 100)
    with pytest.raises(InputError, match=r"bad\.wav.*Invalid data"):
        opened(tmp_path / "a.mp4", 4000, tmp_path / "bad.wav")
    assert os.listdir(tmp_path) == ["bad.wav"]


def limited(code: str, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys, os, signal, time, resource, numpy as np; from pathlib import Path\n"
        "from flashtalk_cli.config import Encoding; from flashtalk_cli.errors import OutputError\n"
        "from flashtalk_cli.media.video_file import VideoFile, file_behind\n"
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


@contextmanager
def small_disk(folder: Path, n_kib: int) -> Iterator[Path]:
    """A disk of that size, mounted in a new folder."""
    folder.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", f"size={n_kib}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    """Fault: no space left: one line that says so, no final name; half a disk is enough without the index copy."""
    with small_disk(tmp_path / "disk", 400) as disk:
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


# In KiB, of which the part takes 99 to 109, and its copy as much again where there is one: what is cut lies in the
# pictures, in the last sound, in the index at the end, in the copy; and at last there is enough for both.
SIZES = (60, 92, 96, 100, 104, 108, 150, 200, 216)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_a_disk_that_is_full_at_the_very_end(
    tmp_path: Path, sound: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: ffmpeg may end with status 0 although its last write failed: what gets its name is whole all the same."""
    whole = {}
    for n_kib in SIZES:
        caplog.clear()
        with small_disk(tmp_path / f"{n_kib}", n_kib) as disk:
            output = disk / f"a{suffix}"
            said = ""
            try:
                with opened(output, 63, sound, width_px=32, height_px=32) as video:
                    video.write(frames(63, side=32))
                    video.finish()
            except OutputError as error:
                said = str(error)
            whole[n_kib] = not said
            assert os.listdir(disk) == [f"a{suffix}.part" if said else f"a{suffix}"], n_kib
            if said:
                assert re.search(r"No space left on device\); free some space", said), n_kib
            else:
                in_step(probe(output), 63, slack_s=PACKET_S)
            for record in caplog.records:
                assert record.getMessage().endswith("which plays too: No space left on device"), n_kib
    assert [*whole.values()] == sorted(whole.values()), whole
    assert set(whole.values()) == {False, True}


def test_standard_output_into_a_file_on_a_full_disk(tmp_path: Path, sound: Path) -> None:
    """Fault: the same with `-o - > FILE`: an end without an error means that all of it is there."""
    whole = {}
    for n_kib in (92, 96, 100, 104, 108, 150):
        with small_disk(tmp_path / f"{n_kib}", n_kib) as disk, (disk / "a.mp4").open("wb") as output:
            said = ""
            try:
                with opened(None, 63, sound, width_px=32, height_px=32, stdout=output.fileno()) as video:
                    video.write(frames(63, side=32))
                    video.finish()
            except OutputError as error:
                said = str(error)
                assert said.startswith(
                    "standard output: ffmpeg ended after 63 of 63 frames (No space left on device"
                )
            else:
                in_step(probe(disk / "a.mp4"), 63, slack_s=PACKET_S)
            whole[n_kib] = not said
    assert set(whole.values()) == {False, True}, whole


def test_what_standard_output_is(tmp_path: Path) -> None:
    """Contract: only a file that is written from its start is read back, wherever it was moved since."""
    read_end, write_end = os.pipe()
    with (tmp_path / "new").open("wb") as new:
        found = file_behind(new.fileno())
        assert found is not None
        (tmp_path / "new").rename(tmp_path / "moved")
        assert found.samefile(tmp_path / "moved")
        assert file_behind(write_end) is None
        new.write(b"x")
        new.flush()
        assert file_behind(new.fileno()) is None
    with (tmp_path / "moved").open("ab") as more:
        assert file_behind(more.fileno()) is None
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("n_lost", [3_000, 30_000])
def test_a_part_that_was_cut_gets_no_name(tmp_path: Path, sound: Path, suffix: str, n_lost: int) -> None:
    """Fault: whatever ffmpeg and the system say, frames that cannot be read back are missed; the part stays."""
    output = tmp_path / f"a{suffix}"
    with opened(output, 63, sound) as video:
        video.write(frames(63))
        assert video._feed is not None
        video._feed.end()
        part = part_path(output)
        os.truncate(part, part.stat().st_size - n_lost)
        with pytest.raises(
            OutputError, match=r"of 63 frames and .* of 2\.52 s of sound can be read back.*part"
        ):
            video.finish()
    assert part.exists()
    assert not output.exists()


def test_a_copy_that_was_cut_gets_no_name(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: the copy with the index in front has status 0 and is not whole: the part gets the name."""

    def cut(stream: object) -> tuple[int, list[str]]:
        (tmp_path / "a.mp4.part.index").write_bytes(b"no video")
        return 0, []

    monkeypatch.setattr(video_file, "run", cut)
    with opened(tmp_path / "a.mp4", 28, sound) as video:
        video.write(frames(28))
        video.finish()
    in_step(probe(tmp_path / "a.mp4"), 28, slack_s=PACKET_S)
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "sound.wav"]
    assert "0 of 28 frames" in caplog.text


def test_what_an_earlier_run_left_is_moved_aside(
    tmp_path: Path, sound: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract: a part is never written over: it goes only when the run that moved it is whole, and that is said."""
    output = tmp_path / "a.mp4"
    for n_frames in (10, 28, 0):
        with opened(output, 101, sound) as video:
            if n_frames:
                video.write(frames(n_frames))
            video.abort()
    assert probe(tmp_path / "a.mp4.part.1").video.n_frames == 10  # type: ignore[union-attr]
    assert probe(tmp_path / "a.mp4.part.2").video.n_frames == 28  # type: ignore[union-attr]
    assert not part_path(output).exists(), "nothing was written to the third"
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition("kept as ")[2].split()[0] for text in told] == [
        f"{output}.part.1",
        f"{output}.part.2",
    ]
    part_path(output).write_bytes(b"of a third")
    with opened(output, 5) as video:
        assert (tmp_path / "a.mp4.part.3").read_bytes() == b"of a third"
        video.write(frames(5))
        video.finish()
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.mp4.part.1", "a.mp4.part.2", "sound.wav"]


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
    "feed = video._feed\n"
    "while (feed._queue.qsize() or os.path.getsize(sys.argv[1] + '.part') < 100_000\n"
    "       or feed._soundtrack.written_frames < feed._taken_frames): time.sleep(0.001)\n"
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
    """The part as it lies there: taking its lock would move it aside."""
    copy = output.with_name("copy")
    copy.write_bytes(part_path(output).read_bytes())
    return copy


def test_the_parent_is_killed(tmp_path: Path, sound: Path) -> None:
    """Fault: SIGKILL to the program: ffmpeg ends by itself and the part holds all it was given.

    What the program still held of frames and of sound is lost: a part of either's pipe's worth.
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
    assert -0.2 <= found.audio.end_s - found.video.end_s <= LEAD_S + 0.04
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
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a run in the background ignores it
        "try:\n"
        "    with opened(1000, Path(sys.argv[1]), Path(sys.argv[2])) as video:\n"
        "        video.write(noise); video.write(noise)\n"
        "        os.killpg(0, signal.SIGINT)\n"
        "        while True: time.sleep(0.05)\n"  # a library's thread may be the one that is interrupted
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    assert limited(code, tmp_path, output, sound).returncode == 130
    in_step(probe(part_path(output)), 50, slack_s=PACKET_S)
