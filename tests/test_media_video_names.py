"""Where a video may be written, under which name, and what becomes of what lies there already."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from video_parts import PACKET_S, SIDE, frames, in_step, opened, tone

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import ConfigError, OutputError
from flashtalk_cli.media import part_file
from flashtalk_cli.media.part_file import PartFile, part_path
from flashtalk_cli.media.probe import probe
from flashtalk_cli.media.video_file import check_output


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return tone(tmp_path / "sound.wav")


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
        (tmp_path / "a", {}, "has no suffix"),
        (tmp_path / "a.mp4", {"codec": "theora"}, "unknown codec 'theora'"),
        (
            tmp_path / "a.webm",
            {"codec": "libx264"},
            "libx264 does not go into .webm, which takes auto, vp9, av1",
        ),
        (tmp_path / "a.mp4", {"crf": 60}, "0 to 51"),
        (tmp_path / os.fsdecode(b"\xff.mp4"), {}, "UTF-8"),
        (tmp_path / ("x" * 300 + ".mp4"), {}, "too long"),
    ]
    before = sorted(os.listdir(tmp_path))
    for output, choice, told in bad:
        encoding = Encoding(**choice)
        with pytest.raises((OutputError, ConfigError), match=told) as caught:
            opened(output, encoding=encoding)
        assert str(caught.value).isprintable()
        if told != "too long":  # which only creating it can tell
            with pytest.raises((OutputError, ConfigError), match=told):
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


def test_nothing_rendered_leaves_nothing(tmp_path: Path, sound: Path) -> None:
    """Contract: without a frame there is no part file either, and an older one is as it was, under another name."""
    part_path(tmp_path / "a.mp4").write_bytes(b"of a dead run")
    with opened(tmp_path / "a.mp4", 101, sound) as video:
        assert video.abort() is None
    assert sorted(os.listdir(tmp_path)) == ["a.mp4.part.1", sound.name]
    assert (tmp_path / "a.mp4.part.1").read_bytes() == b"of a dead run"
