"""Launching, held to: events arrive as sent, every way a worker can end has its exit code and
one line, signals reach the worker once, and no process outlives the run (fault tests with
fake workers; the event lines are a property test)."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video_parts import frames, opened

from flashtalk_cli import events, launch
from flashtalk_cli.config import Frozen, RenderJob, Speech
from flashtalk_cli.errors import FlashtalkError, ModelError, WorkerError
from flashtalk_cli.media.part_file import PartFile, part_path
from flashtalk_cli.presets import load

ROOT = Path(__file__).parent.parent
WORKER = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from flashtalk_cli import events
job, emitter = Path(sys.argv[1]).read_text(), events.Emitter(Path(sys.argv[2]))
"""
PARENT = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_launch import Job, fake
from flashtalk_cli import launch
options = {{"command": fake(sys.argv[1]), "clean_end_s": float(sys.argv[2])}}
print("code", launch.run(Job(), lambda e: print(e, flush=True), **options), flush=True)
"""


class Job(Frozen):
    text: str = "job"


def fake(body: str):
    """A command that runs `body` as the worker."""

    def command(job_path: Path, socket_path: Path, debug: bool) -> list[str]:
        return [sys.executable, "-S", "-c", WORKER + body, str(job_path), str(socket_path)]

    return command


def run(body: str, **options):
    """(exit code, events) of a fake worker."""
    seen: list[events.Event] = []
    return launch.run(Job(), seen.append, command=fake(body), **options), seen


def parent(
    body: str, clean_end_s: float = 10.0, hangup: signal.Handlers = signal.SIG_DFL
) -> subprocess.Popen:
    """A process that runs a fake worker, to be sent signals. `hangup` is how it finds SIGHUP, however tests are run."""
    arguments = [sys.executable, "-c", PARENT, body, str(clean_end_s)]
    before = signal.signal(signal.SIGHUP, hangup)
    try:
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process has ended (or is only waiting to be reaped)."""
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# What a worker that is killed leaves


def render_job(output: Path | None) -> RenderJob:
    speech = Speech(samples_path=Path("s.raw"), n_samples=16_000, loudness_lufs=None)
    picture, audio = Path("p.png"), Path("a.wav")
    return RenderJob(preset=load("mini", []), picture=picture, speech=speech, audio=audio, output=output)


def killed(output: Path | None, body: str) -> events.Event:
    """The last word about a render whose worker does not end in time after the event that `body` emits."""
    seen: list[events.Event] = []
    requests: list[int] = []

    def on_event(happened: events.Event) -> None:
        seen.append(happened)
        requests.append(signal.SIGINT)

    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + body + "\ntime.sleep(60)"
    options = {"command": fake(stubborn), "clean_end_s": 0.2, "requests": requests}
    assert launch.run(render_job(output), on_event, **options) == 130
    return seen[-1]


CHUNK = 'emitter.emit("chunk", index=0, frames_done=40, frames_total=100)'
STAGE = 'emitter.emit("stage", name="weights")'


def test_a_killed_workers_part_is_named_with_the_frames_in_it(tmp_path):
    """Of 40 frames that were reported, 12 were still with the encoder."""
    output = tmp_path / "a.mp4"
    with opened(output, 100) as video:
        video.write(frames(28))
        video.abort()
    last = killed(output, CHUNK)
    assert last == {"event": "interrupted", "path": str(part_path(output)), "frames": 28}
    assert part_path(output).exists()


def test_what_a_killed_worker_did_not_write_is_not_its_own(tmp_path):
    """An earlier run's part stays and is not named; an empty one goes; one that another run holds stays."""
    output = tmp_path / "a.mp4"
    nothing = {"event": "interrupted", "path": None, "frames": 0}
    assert killed(output, CHUNK) == nothing
    part_path(output).write_bytes(b"of an earlier run")
    assert killed(output, STAGE) == nothing
    assert part_path(output).read_bytes() == b"of an earlier run"
    part_path(output).write_bytes(b"")
    assert killed(output, STAGE) == nothing
    assert list(tmp_path.iterdir()) == []
    other = PartFile(output, overwrite=False)
    assert killed(output, STAGE) == nothing
    assert list(tmp_path.iterdir()) == [part_path(output)]
    other.discard()


def test_of_standard_output_only_the_frames_are_said():
    assert killed(None, CHUNK) == {"event": "interrupted", "path": None, "frames": 40}


# How a worker ends


def test_events_arrive_in_order_and_the_job_is_what_was_given():
    code, seen = run("""
emitter.emit("stage", name="weights", detail=job)
for index in range(3): emitter.emit("chunk", index=index)
emitter.emit("done", path=Path("/tmp/x.mp4"), frames=84)""")
    assert code == 0
    assert [e["event"] for e in seen] == ["stage", "chunk", "chunk", "chunk", "done"]
    assert json.loads(seen[0]["detail"]) == {"text": "job"}
    assert seen[-1] == {"event": "done", "path": "/tmp/x.mp4", "frames": 84}


def test_interrupted_worker_gives_130():
    code, seen = run('emitter.emit("interrupted", path=None, frames=0)')
    assert (code, seen[-1]["event"]) == (130, "interrupted")


def test_error_of_the_worker_is_raised_here_with_its_class_and_traceback():
    with pytest.raises(ModelError, match=r"^no weights$") as caught:
        run("""
from flashtalk_cli.errors import ModelError
try: raise ModelError("no weights")
except ModelError as error: emitter.error(error)
sys.exit(5)""")
    assert "line 9" in str(caught.value.__cause__)


def test_crash_of_the_worker_is_an_internal_error():
    with pytest.raises(FlashtalkError, match=r"^internal error TypeError: one$") as caught:
        run('emitter.error(TypeError("one\\ntwo")); sys.exit(1)')
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ran out of memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("os._exit(3)", "exit code 3"),
    ],
)
def test_death_without_a_word_is_a_worker_error_with_the_last_line(body, said):
    with pytest.raises(WorkerError, match=f"{said}.*; its last line: cannot allocate"):
        run("print('cannot allocate', file=sys.stderr, flush=True);" + body)


def test_command_that_is_not_there_is_a_worker_error():
    with pytest.raises(WorkerError, match="cannot start /no/python"):
        launch.run(Job(), print, command=lambda *_: ["/no/python"])


def test_worker_that_hangs_after_its_last_word_is_ended(monkeypatch):
    monkeypatch.setattr(launch, "CLEAN_END_S", 0.3)
    begin = time.monotonic()
    assert run('emitter.emit("done", path="x"); time.sleep(60)')[0] == 0
    assert time.monotonic() - begin < 10


def test_half_a_line_and_lines_that_are_no_events_are_left_out():
    code, seen = run("""
emitter._socket.sendall(b'rubbish\\n{"event": "bogus"}\\n[1]\\n')
emitter.emit("done", path="x")
emitter._socket.sendall(b'{"event": "chu')""")
    assert (code, len(seen)) == (0, 1)


# What it prints


def test_stderr_comes_line_by_line_with_carriage_returns_and_bad_bytes():
    lines: list[str] = []
    run(
        "os.write(2, b'10%\\r20%\\r\\n\\xff\\nend'); print('said'); sys.stdout.flush(); emitter.emit('done', path='x')",
        on_log=lines.append,
    )
    assert lines[:3] == ["10%", "20%", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(lines[3:]) == "endsaid"  # what it prints on stdout is no result: it counts as log


def test_stdout_is_the_workers_only_when_given(capfd):
    body = "os.write(1, b'video'); emitter.emit('done', path=None)"
    run(body, stdout=True)
    assert capfd.readouterr().out == "video"
    run(body)
    assert capfd.readouterr().out == ""


def test_standard_input_is_closed():
    _, seen = run('emitter.emit("done", path=repr(sys.stdin.read()))')
    assert seen[-1]["path"] == "''"


# Signals, and what is left behind

SLOW = """
def end(number, frame):
    emitter.emit("stage", name=f"signal {number}", detail=""); ends.append(number)
ends = []
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
emitter.emit("stage", name="ready", detail=str(os.getpid()))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_the_worker_once_and_lets_it_end(number):
    process = parent(
        SLOW + "while not ends: time.sleep(0.02)\nemitter.emit('interrupted', path='kept.part', frames=9)"
    )
    assert "ready" in process.stdout.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert out.count("signal 15") == 1
    assert "signal 2" not in out
    assert "kept.part" in out
    assert out.endswith("code 130\n")


def test_a_run_under_nohup_outlives_its_terminal():
    """SIGHUP stays ignored where this process was started to ignore it; other signals are heeded."""
    process = parent(
        SLOW + "while not ends: time.sleep(0.02)\nemitter.emit('interrupted', path=None, frames=0)",
        hangup=signal.SIG_IGN,
    )
    assert "ready" in process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert out.count("signal 15") == 1
    assert out.endswith("code 130\n")


def test_the_second_signal_kills_at_once():
    process = parent(SLOW + "time.sleep(60)\ntime.sleep(60)", clean_end_s=30)
    pid = int(process.stdout.readline().split("'detail': '")[1].split("'")[0])
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "signal 15" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert time.monotonic() - begin < 10
    assert out.endswith("code 130\n")
    assert gone(pid)


def test_a_worker_that_does_not_listen_is_killed_in_time():
    process = parent(SLOW + "time.sleep(60)\ntime.sleep(60)", clean_end_s=0.3)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    begin_s = time.monotonic()
    out, _ = process.communicate(timeout=20)
    assert time.monotonic() - begin_s < 5
    assert out.endswith("code 130\n")


def test_worker_has_a_session_of_its_own():
    _, seen = run('emitter.emit("done", path=str(os.getsid(0)))')
    assert int(seen[0]["path"]) != os.getsid(0)


def test_children_of_the_worker_end_with_it():
    _, seen = run("child = subprocess.Popen(['sleep', '60']); emitter.emit('done', path=str(child.pid))")
    assert gone(int(seen[0]["path"]))


def test_worker_ends_when_its_parent_is_killed():
    process = parent(
        "events.watch_parent(lambda: os.killpg(0, signal.SIGKILL), emitter)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "emitter.emit('stage', name=str(os.getpid()), detail=str(child.pid)); time.sleep(60)"
    )
    first = process.stdout.readline()
    pids = [int(part) for part in first.split("'") if part.isdigit()]
    process.kill()
    process.communicate()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_rank_without_a_socket_sees_its_parent_die():
    middle = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-S", "-c", '''
import os, sys, time; sys.path.insert(0, {str(ROOT)!r})
from flashtalk_cli import events
events.watch_parent(lambda: os._exit(0), every_s=0.05); print(os.getpid(), flush=True); time.sleep(60)'''])
worker.wait()"""
    process = subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert gone(pid)


def test_nothing_is_left_in_the_temporary_folder_even_where_its_name_is_too_long_for_a_socket(
    tmp_path, monkeypatch
):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    before = set(Path("/tmp").glob("flashtalk-*"))
    monkeypatch.setattr(launch.tempfile, "tempdir", str(long))
    assert run('emitter.emit("done", path="x")')[0] == 0
    assert list(long.iterdir()) == []
    assert not {p for p in set(Path("/tmp").glob("flashtalk-*")) - before if (p / "job.json").exists()}


# Lines

numbers = st.floats() | st.integers(-(2**53), 2**53)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(), numbers), max_size=8))
def test_what_is_emitted_is_what_is_read(values):
    with tempfile.TemporaryDirectory() as name, events.Listener(Path(name, "s")) as listener:
        emitter = events.Emitter(Path(name, "s"))
        for text, number in values:
            emitter.emit("progress", name=text, done=number)
        emitter.close()
        seen = listener.drain()
    assert [e["name"] for e in seen] == [text for text, _ in values]
    for happened, (_, number) in zip(seen, values, strict=True):
        assert happened["done"] == (number if math.isfinite(number) else None)


def test_every_kind_and_field_is_documented():
    assert events.__doc__ is not None
    for kind, fields in events.KINDS.items():
        assert kind in events.__doc__
        for field in fields:
            assert field in events.__doc__, (kind, field)


def test_a_signal_handler_may_emit_in_the_middle_of_an_emit():
    code, seen = run("""
signal.signal(signal.SIGALRM, lambda *_: emitter.emit("warning", message="tick"))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for index in range(5000): emitter.emit("chunk", index=index)
signal.setitimer(signal.ITIMER_REAL, 0)
emitter.emit("done", path=None)""")
    assert code == 0
    assert sum(e["event"] == "warning" for e in seen) > 5
    assert [e["index"] for e in seen if e["event"] == "chunk"] == list(range(5000))


def test_emitter_without_a_parent_is_silent_and_one_that_cannot_connect_says_so(tmp_path):
    events.Emitter(None).emit("warning", message="x")
    with pytest.raises(WorkerError, match="the parent is gone"):
        events.Emitter(tmp_path / "none")


def test_unknown_kind_or_field_is_a_programming_error():
    with pytest.raises(AssertionError):
        events.event("bogus")
    with pytest.raises(AssertionError):
        events.event("done", colour="red")


def test_several_processes_may_speak():
    """Property of the socket: every connection's lines arrive whole; it is closed when all of them are."""
    with tempfile.TemporaryDirectory() as name, events.Listener(Path(name, "s")) as listener:
        first, second = events.Emitter(Path(name, "s")), events.Emitter(Path(name, "s"))
        first.emit("stage", name="one")
        second.emit("stage", name="two")
        second.close()
        first.emit("stage", name="three")
        assert not listener.closed
        first.close()
        assert sorted(e["name"] for e in listener.drain()) == ["one", "three", "two"]
        assert listener.closed


@pytest.mark.parametrize("cause_first", [True, False])
def test_the_cause_is_shown_and_not_the_loss_of_a_peer(cause_first):
    """Whichever of the two errors arrives first."""
    lines = ['emitter.error(ModelError("the cause"))', 'emitter.error(PeerLost("lost a peer"))']
    said = "\n".join(lines if cause_first else lines[::-1])
    with pytest.raises(ModelError, match=r"^the cause$"):
        run(f"from flashtalk_cli.errors import ModelError, PeerLost\n{said}\nsys.exit(5)")


def test_several_processes_share_the_cores(monkeypatch):
    """Contract: torchrun is started for them, and each is told of its share of the cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = 'emitter.emit("stage", name=os.environ["OMP_NUM_THREADS"]); emitter.emit("done", path=None)'
    code, seen = run(body, processes=10_000)
    assert (code, seen[0]["name"]) == (0, "1")
    command = launch.worker_command(Path("j"), Path("s"), True, 3)
    assert command[1:] == ["-m", "flashtalk_cli.torchrun", "3", "flashtalk_cli.worker", "j", "s", "--debug"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0,1", "2,3"]),
        ("4,5,6,7", ["4,5", "6,7"]),
        ("GPU-a,GPU-b", ["GPU-a,GPU-b", ""]),
        ("", ["", ""]),
    ],
)
def test_workers_side_by_side_have_gpus_of_their_own(monkeypatch, visible, expected):
    """Contract: also where only some of the machine's GPUs are ours, or none is."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [launch.Share(index, 2).environment(2)["CUDA_VISIBLE_DEVICES"] for index in range(2)]
    assert found == expected
    assert "CUDA_VISIBLE_DEVICES" not in launch.Share().environment(2)


def test_a_worker_may_be_given_standard_input_and_be_ended_by_a_shared_list():
    """Contract: what workers that run side by side are started with."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"hello\n")
    requests: list[int] = []
    seen: list[events.Event] = []

    def on_event(happened: events.Event) -> None:
        seen.append(happened)
        requests.append(signal.SIGINT)

    code = launch.run(
        Job(),
        on_event,
        stdin=read_end,
        requests=requests,
        command=fake(
            SLOW.replace("str(os.getpid())", "sys.stdin.readline()") + "while not ends: time.sleep(0.02)"
        ),
    )
    os.close(read_end)
    os.close(write_end)
    assert seen[0]["detail"] == "hello\n"
    assert code == 130
