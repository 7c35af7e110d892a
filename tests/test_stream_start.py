"""What is looked at when a stream begins, and how its first and last words are put."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from stream_process import Stream, furnish

from flashtalk_cli.config import SoundSource, StreamJob
from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.live import microphone, session
from flashtalk_cli.media.ffmpeg import find_ffmpeg
from flashtalk_cli.presets import load

FILE = SoundSource(kind="file", where="a.wav")


def job_of(folder: Path, source: SoundSource = FILE, **changes: object) -> StreamJob:
    return StreamJob(
        preset=load("mini", []),
        picture=folder / "p.png",
        source=source,
        targets=(("hls", str(folder / "hls")),),
        control=folder / "c.sock",
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", ["index.m3u8", "segment-000099.ts"])
def test_somebody_elses_stream_is_not_replaced_unasked(tmp_path, name) -> None:
    """A folder with other files, or none, is taken; a stream in it only with --overwrite, or to go on with it."""
    folder = tmp_path / "hls"
    session.check_first_start(job_of(tmp_path))
    folder.mkdir()
    (folder / "mine.txt").touch()
    session.check_first_start(job_of(tmp_path))
    (folder / name).write_text("theirs")
    with pytest.raises(OutputError, match=rf"hls: holds a stream.*{name}.*--overwrite$"):
        session.check_first_start(job_of(tmp_path))
    session.check_first_start(job_of(tmp_path, overwrite=True))
    assert (folder / name).read_text() == "theirs"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("start"))


def test_a_taken_folder_a_missing_device_and_a_refused_picture_end_in_their_exit_codes(place) -> None:
    """The whole way through the command line: one line each, and nothing is touched."""
    (place / "taken").mkdir()
    (place / "taken/index.m3u8").write_text("theirs")
    taken = Stream(place, "--audio", "speech.wav", "--hls", "taken")
    absent = Stream(place, "--audio", "mic:no-such", "--hls", "new")
    try:
        assert (taken.end(), absent.end()) == (OutputError.exit_code, InputError.exit_code)
    finally:
        taken.close()
        absent.close()
    assert (place / "taken/index.m3u8").read_text() == "theirs"
    assert not (place / "new").exists()
    last = absent.events[-1]
    assert last["event"] == "error"
    assert last["message"].startswith("no-such: ")
    assert last["message"].endswith(("--audio mic:DEVICE", "--audio -"))
    assert not [happened for happened in absent.events if happened["event"] == "live"]


@pytest.mark.slow
def test_a_stream_says_where_it_went_and_begins_anew_only_when_told_to(place) -> None:
    words = ["--audio", "speech.wav", "--hls", "own"]
    first = Stream(place, *words)
    try:
        first.wait_for(lambda e: e["frames"] > 0)
        with pytest.raises(InputError, match=r"no\.png"):
            first.ask(command="picture", path=str(place / "no.png"))
        assert first.end() == 0
    finally:
        first.close()
    sent, done = [e for e in first.events if e["event"] == "done" or e.get("name") == "sent"]
    assert sent["detail"].startswith(f"own ({done['frames']} frames); ")
    assert (done["path"], done["elapsed_s"]) == (None, None)
    for more, code in ([], OutputError.exit_code), (["--overwrite"], 0):
        again = Stream(place, *words, *more)
        try:
            assert again.end() == code
        finally:
            again.close()


def test_a_device_that_gives_nothing_at_first_is_waited_for(tmp_path, monkeypatch) -> None:
    """Only one that fails is refused: silence may end."""
    source = SoundSource(kind="microphone", where="x")
    words = [find_ffmpeg(), "-f", "lavfi", "-re", "-i", "anullsrc", "-f", "null", "-"]
    monkeypatch.setattr(microphone, "listed", lambda *what: {"alsa"})
    monkeypatch.setattr(microphone, "command", lambda stream: words)
    monkeypatch.setattr(microphone, "DEVICE_S", 0.3)
    session.check_first_start(job_of(tmp_path, source))


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({"pulse"}, r"^hw:7: .* has no alsa: install the system's ffmpeg, or pipe arecord .* --audio -$"),
        (
            {"alsa"},
            r"^hw:7: no sound can be had from it .*plug one in, or name another with --audio mic:DEVICE$",
        ),
    ],
)
def test_an_ffmpeg_without_alsa_is_no_missing_microphone(tmp_path, monkeypatch, devices, said) -> None:
    monkeypatch.setattr(microphone, "_driver", lambda: "alsa")
    monkeypatch.setattr(microphone, "listed", lambda *what: devices)
    with pytest.raises(InputError, match=said):
        session.check_first_start(job_of(tmp_path, SoundSource(kind="microphone", where="hw:7")))


def test_a_stream_that_goes_on_looks_at_neither(tmp_path, monkeypatch) -> None:
    """After a restart the segments in the folder are its own, and a device may come back."""

    class Reached(Exception):
        pass

    def stage(worker: object) -> None:
        raise Reached

    monkeypatch.setattr(session, "Stage", stage)
    worker = SimpleNamespace(ranks=SimpleNamespace(leads=True))
    (tmp_path / "hls").mkdir()
    (tmp_path / "hls/index.m3u8").touch()
    source = SoundSource(kind="microphone", where="no-such")
    stop = session.threading.Event()
    with pytest.raises(Reached):
        session.stream(worker, job_of(tmp_path, source, restarts=1), stop, 1)  # type: ignore[arg-type]
    with pytest.raises(OutputError):
        session.stream(worker, job_of(tmp_path, source), stop, 1)  # type: ignore[arg-type]


def test_a_slow_chunk_is_called_just_that() -> None:
    """GPUs are advised only where there are any."""
    said = session.slow(1.45, 1.12, on_gpus=False)
    assert said.startswith("a chunk of 1.12 s took 1.45 s to make beforehand")
    assert "--gpus" not in said
    assert "--gpus" in session.slow(1.45, 1.12, on_gpus=True)
