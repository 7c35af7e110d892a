"""Many clips, held to: nothing is lost and nothing done twice whatever dies (property, with replicas that
die as drawn); a replica's death is told from a clip's own failure (fault, with fake workers); and through the
real command line ten clips, two of them bad, with one replica killed in mid-clip (fault)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_launch import gone

from flashtalk_cli import launch
from flashtalk_cli.batch import replica as replica_module
from flashtalk_cli.batch.backlog import TRIES, Backlog
from flashtalk_cli.batch.clip import Clip, Setup
from flashtalk_cli.batch.replica import LocalReplica
from flashtalk_cli.batch.run import DEATHS, Crew, Record
from flashtalk_cli.config import Preset
from flashtalk_cli.errors import DeviceError, FlashtalkError, InputError, ModelError, OutputError, WorkerError
from flashtalk_cli.events import Event, event
from flashtalk_cli.media.probe import probe
from flashtalk_cli.serving import Orders

ROOT = Path(__file__).resolve().parent.parent
PRESET = Preset(name="x", description="")


def clip_of(line: int, folder: Path = Path("/none")) -> Clip:
    return Clip(
        line=line,
        preset=PRESET,
        picture=folder / "p.png",
        speech=folder / "s.wav",
        output=folder / f"{line}.mp4",
    )


# The crew, with replicas that do as they are told


class Puppet:
    """A replica whose life follows a script: for each start or clip what happens, then all goes well.

    It dies of the lines that are `deadly` whatever the script says.
    """

    def __init__(self, script: list[str], done: Counter[int], hold: threading.Barrier | None = None) -> None:
        self.script, self.done = script, done
        self.alive = self.busy = False
        self.starts = 0
        self.deadly: set[int] = set()

    def start(self) -> None:
        assert not self.alive
        self.starts += 1
        if self.script and self.script[0] == "unfit":
            self.script.pop(0)
            raise DeviceError("no memory")
        self.alive = True

    def render(self, clip: Clip) -> Event:
        assert self.alive
        assert not self.busy, "two clips at once"
        self.busy = True
        time.sleep(0.0005)
        self.busy = False
        act = "dies" if clip.line in self.deadly else self.script.pop(0) if self.script else "well"
        if act == "dies":
            self.alive = False
            raise WorkerError("killed")
        if act == "ends":  # of several processes, a clip's own error ends them
            self.alive = False
            raise OutputError("disk full")
        if act == "bad":
            raise InputError("no sound")
        if act == "fault":
            return event("clip", state="failed", type="OutputError", message="x")
        self.done[clip.line] += 1
        return event("clip", state="done", frames=1, duration_s=0.04, elapsed_s=0.1)

    def close(self) -> None:
        self.alive = False


ACTS = st.sampled_from(["well", "well", "dies", "ends", "bad", "fault", "unfit"])


def crew_of(
    folder: Path, scripts: list[list[str]], n_clips: int, requests: list[int] | None = None
) -> tuple[Crew, Record, Counter[int], list[Event], list[Puppet]]:
    done: Counter[int] = Counter()
    shown: list[Event] = []
    puppets = [Puppet(script, done) for script in scripts]
    record = Record(folder / "results.jsonl", shown.append, 9)
    clips = [clip_of(line) for line in range(1, n_clips + 1)]
    return Crew(puppets, clips, record, [] if requests is None else requests), record, done, shown, puppets


@settings(max_examples=60)
@given(scripts=st.lists(st.lists(ACTS, max_size=6), min_size=1, max_size=4), n_clips=st.integers(0, 12))
def test_nothing_is_lost_and_nothing_done_twice(scripts: list[list[str]], n_clips: int) -> None:
    """Property: every clip is recorded once, and done at most once; only where no replica is left, some are not."""
    with tempfile.TemporaryDirectory() as folder:
        crew, record, done, shown, puppets = crew_of(Path(folder), scripts, n_clips)
        try:
            left = crew.run()
            assert left == []
        except FlashtalkError:
            assert sum("given up" in str(e.get("message")) for e in shown) == len(puppets) - 1
            left = [clip_of(0)] * (n_clips - len(record.clips))
        recorded = Counter(clip["line"] for clip in record.clips)
        assert set(recorded.values()) <= {1}
        assert len(recorded) + len(left) == n_clips
        assert {c["line"] for c in record.of("done")} == set(done)
        assert set(done.values()) <= {1}
        assert all(clip["tries"] <= TRIES for clip in record.clips)
        assert not any(puppet.alive for puppet in puppets)
        record.close()
        lines = (Path(folder) / "results.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            json.loads(json.dumps(c, default=str)) for c in record.clips
        ]


def test_a_clip_that_kills_two_replicas_is_the_one_that_fails(tmp_path: Path) -> None:
    """Contract: it went back once; its error says what happened."""
    crew, record, _, _, puppets = crew_of(tmp_path, [[]], 3)
    puppets[0].deadly = {1}
    assert crew.run() == []
    (failed,) = record.of("failed")
    assert (failed["line"], failed["tries"], failed["type"]) == (1, TRIES, "WorkerError")
    assert len(record.of("done")) == 2
    assert puppets[0].starts == 2


@pytest.mark.parametrize("deadly", [{1, 2}, {2, 5, 8}, {1, 3, 5, 7, 10}], ids=str)
def test_clips_that_kill_a_lone_replica_keep_no_other_from_it(tmp_path: Path, deadly: set[int]) -> None:
    """Fault: they wait for their other try behind all others, where their deaths no longer end the run."""
    crew, record, _, _, puppets = crew_of(tmp_path, [[]], 10)
    puppets[0].deadly = deadly
    assert crew.run() == []
    assert {clip["line"] for clip in record.of("done")} == set(range(1, 11)) - deadly
    assert {(clip["line"], clip["tries"]) for clip in record.of("failed")} == {(n, TRIES) for n in deadly}
    assert [clip["line"] for clip in record.clips[-len(deadly) :]] == sorted(deadly)


def test_a_replica_that_dies_after_its_last_frame_has_done_its_clip(tmp_path: Path) -> None:
    """Fault: the file is whole, so another replica neither renders it again nor calls it failed."""
    done: Counter[int] = Counter()
    puppet = Puppet(["dies"], done)
    record = Record(tmp_path / "results.jsonl", lambda happened: None, 9)
    clip = clip_of(1, tmp_path)
    clip.output.write_bytes(b"whole")
    assert Crew([puppet], [clip], record, []).run() == []
    assert [(e["state"], e["tries"]) for e in record.clips] == [("skipped", 2)]
    assert not done


def test_two_runs_do_not_share_a_manifest(tmp_path: Path) -> None:
    first = Record(tmp_path / "results.jsonl", print, 9)
    with pytest.raises(OutputError, match="another run renders this manifest"):
        Record(tmp_path / "results.jsonl", print, 9)
    first.close()
    Record(tmp_path / "results.jsonl", print, 9).close()


def test_a_place_where_replicas_die_is_given_up(tmp_path: Path) -> None:
    """Fault: deaths in a row end the run with an error, and not a clip after the other; what was tried has failed."""
    crew, record, _, _, _ = crew_of(tmp_path, [["dies"] * 50], 20)
    with pytest.raises(WorkerError, match=f"{DEATHS} times in a row, the last at line {DEATHS}"):
        crew.run()
    failed = [(clip["line"], clip["tries"], clip["message"]) for clip in record.of("failed")]
    assert failed == [(line, 1, "killed") for line in range(1, DEATHS + 1)]
    assert len(record.clips) == DEATHS


def test_a_clip_whose_replica_could_not_start_keeps_its_place(tmp_path: Path) -> None:
    """Contract: it was not tried, and is the next to be taken."""
    backlog = Backlog([clip_of(1), clip_of(2), clip_of(3)])
    for untried in (True, False):
        clip = backlog.take()
        assert clip
        assert backlog.put_back(clip, untried=untried)
    assert [clip.line for clip in backlog.close()] == [2, 3, 1]


def test_a_replica_that_cannot_start_leaves_its_clips_to_the_others(tmp_path: Path) -> None:
    crew, record, _, shown, _ = crew_of(tmp_path, [["unfit"], []], 5)
    assert crew.run() == []
    assert len(record.of("done")) == 5
    assert {clip["replica"] for clip in record.clips} == {1}
    assert all(clip["tries"] == 1 for clip in record.clips)
    assert any("replica 0 is given up, 1 go on: no memory" in str(e.get("message")) for e in shown)


def test_a_request_to_end_leaves_what_was_not_begun(tmp_path: Path) -> None:
    """Contract: nothing is begun any more, and a replica that is ended by it is no failure."""
    requests: list[int] = []
    crew, record, _, _, puppets = crew_of(tmp_path, [["well", "dies"]], 9, requests)
    render = puppets[0].render

    def asked(clip: Clip) -> Event:
        requests.extend([signal.SIGINT] if clip.line == 2 else [])
        return render(clip)

    puppets[0].render = asked  # type: ignore[method-assign]
    assert [clip.line for clip in crew.run()] == list(range(3, 10))
    assert [clip["state"] for clip in record.clips] == ["done", "interrupted"]


# A replica, with fake workers

WORKER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from flashtalk_cli import errors, events
emitter = events.Emitter(Path(sys.argv[2]))
"""
READY = 'emitter.emit("stage", name="ready", detail="")\n'


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Makes a replica whose worker runs a given body; `.seen` has its events."""
    soundfile.write(tmp_path / "s.wav", np.zeros(1600), 16_000)
    made: list[LocalReplica] = []

    def make(body: str) -> LocalReplica:
        def command(job: Path, socket: Path, debug: bool, *rest: object) -> list[str]:
            return [sys.executable, "-S", "-c", WORKER + body, str(job), str(socket)]

        monkeypatch.setattr(launch, "worker_command", command)
        setup = Setup.of([clip_of(1)], processes=1, debug=False)
        seen: list[Event] = []
        found = LocalReplica(setup, launch.Share(), [], seen.append, lambda line: None)
        found.seen = seen  # type: ignore[attr-defined]
        made.append(found)
        return found

    yield make
    for each in made:
        each.close()


ECHO = """
for line in sys.stdin:
    import json
    emitter.emit("chunk", index=0)
    emitter.emit("clip", state="done", frames=json.loads(line)["speech"]["n_samples"])
emitter.emit("done", path=None)
"""


def test_a_replica_renders_one_clip_after_another(replica: Any, tmp_path: Path) -> None:
    """Contract: one worker for all; it ends when no more come; events say whose they are."""
    here = replica(READY + ECHO)
    here.start()
    thread = here._thread
    for line in (1, 2, 3):
        assert here.render(clip_of(line, tmp_path))["frames"] == 1600
    assert here._thread is thread
    assert [e["line"] for e in here.seen if e["event"] == "chunk"] == [1, 2, 3]
    assert {e["replica"] for e in here.seen} == {0}
    here.close()
    assert not here.alive
    assert not any(e["event"] in ("done", "clip") for e in here.seen)


def test_a_sound_that_cannot_be_used_costs_its_own_clip(replica: Any, tmp_path: Path) -> None:
    here = replica(READY + ECHO)
    here.start()
    with pytest.raises(InputError):
        here.render(clip_of(1))
    assert here.alive
    assert here.render(clip_of(2, tmp_path))["state"] == "done"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('emitter.error(errors.ModelError("no weights"))', ModelError),
        ("os.kill(os.getpid(), signal.SIGKILL)", WorkerError),
    ],
)
def test_an_error_before_the_first_clip_is_the_starts(replica: Any, body: str, kind: type[Exception]) -> None:
    here = replica(body)
    with pytest.raises(kind):
        here.start()
    assert not here.alive


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)", WorkerError),
        ("os.kill(os.getpid(), signal.SIGKILL)", WorkerError),  # before it was given anything
        ('sys.stdin.readline(); emitter.error(errors.OutputError("disk full")); sys.exit(6)', OutputError),
    ],
)
def test_a_death_is_told_and_a_new_life_begins(
    replica: Any, tmp_path: Path, body: str, kind: type[Exception]
) -> None:
    """Fault: the error has its class; the replica is dead, and can be started again."""
    here = replica(READY + body)
    for _ in range(2):
        here.start()
        with pytest.raises(kind):
            here.render(clip_of(1, tmp_path))
        assert not here.alive


def test_the_stage_that_is_waited_for_is_the_workers() -> None:
    """Contract: the parent, which may not import the worker's module, knows its word."""
    from flashtalk_cli import serving

    assert replica_module.READY == serving.READY


@settings(max_examples=50)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\n", exclude_categories=("Cs",)), min_size=1), max_size=5
    )
)
def test_orders_arrive_as_sent(texts: list[str]) -> None:
    """Property: lines of any text; then the end; and nothing yet is not the end."""
    read_end, write_end = os.pipe()
    stop = threading.Event()
    orders = Orders(read_end)
    try:
        assert orders.next(0.0, stop) is None
        os.write(write_end, "".join(f"{text}\n" for text in texts).encode())
        assert [orders.next(1.0, stop) for _ in texts] == [text.encode() for text in texts]
        assert orders.next(0.0, stop) is None
        os.write(write_end, b"in time\ntoo late\n")
        assert orders.next(1.0, stop) == b"in time"
        stop.set()
        assert orders.next(1.0, stop) == b""
        stop.clear()
        assert orders.next(1.0, stop) == b"too late"
        os.close(write_end)
        assert orders.next(1.0, stop) == b""
        stop.set()
        assert orders.next(1.0, stop) == b""
    finally:
        os.close(read_end)


# All of it

OPTIONS = (
    *("--model", "model", "--device", "cpu", "--size", "64x64", "--steps", "1"),
    *("--set", "sampling.chunk_frames=9", "--set", "hearing.context_s=2", "--json"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a picture, sounds, and a manifest of ten clips of which two are bad."""
    folder = tmp_path_factory.mktemp("batch")
    tiny_model.write(folder / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 70, 3), dtype=np.uint8)).save(folder / "p.png")
    for name, seconds in (("short", 0.3), ("long", 1.0)):
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.2, 0.2, int(16_000 * seconds)), 16_000)
    (folder / "noise.wav").write_text("this is no sound")
    clips = [
        {"picture": "p.png", "speech": "short.wav", "output": f"{i}.mp4", "seed": i} for i in range(1, 11)
    ]
    clips[0] |= {"speech": "long.wav"}
    clips[1] |= {"speech": "long.wav", "size": "80x64"}
    clips[3] |= {"speech": "noise.wav"}
    clips[6] |= {"picture": "nobody.png"}
    clips[8] |= {"prompt": "A person sings."}
    (folder / "clips.jsonl").write_text("\n".join(json.dumps(clip) for clip in clips))
    return folder


def flashtalk(place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flashtalk_cli", "render", *arguments, *OPTIONS]
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def workers_of(parent: int) -> dict[int, int]:
    """Process ids of a parent's workers by their replica's number."""
    found = {}
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            visible = next(v for v in environment if v.startswith("CUDA_VISIBLE_DEVICES="))
            found[int(visible.partition("=")[2])] = int(pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ten_clips_two_of_them_bad_and_one_replica_killed(place: Path) -> None:
    """Fault: eight files, two named errors, nothing lost and nothing twice; then nothing is left to be done."""
    process = flashtalk(place, "--manifest", "clips.jsonl", "--replicas", "2")
    assert process.stdout is not None
    killed: dict[str, Any] = {}
    happened = []
    for text in process.stdout:
        happened.append(json.loads(text))
        if happened[-1]["event"] == "chunk" and not killed:
            killed = happened[-1]
            os.kill(workers_of(process.pid)[killed["replica"]], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 9, errors
    assert "2 of 10 clips failed: line 4: InputError:" in errors.splitlines()[-1]
    ends = [json.loads(text) for text in (place / "clips.results.jsonl").read_text().splitlines()]
    assert sorted(end["line"] for end in ends) == list(range(1, 11))
    failed = {end["line"]: end["message"] for end in ends if end["state"] == "failed"}
    assert set(failed) == {4, 7}
    assert "noise.wav" in failed[4]
    assert "nobody.png" in failed[7]
    done = {end["line"]: end for end in ends if end["state"] == "done"}
    assert {line for line, end in done.items() if end["tries"] == 2} == {killed["line"]}
    for line, end in done.items():
        video = probe(place / f"{line}.mp4").video
        assert video
        assert video.n_frames == end["frames"] == (25 if line < 3 else 8)
        assert (video.width_px, video.height_px) == ((80, 64) if line == 2 else (64, 64))
    assert len(list(place.glob("*.mp4"))) == 8
    assert not list(place.glob("*.part*"))
    assert happened[-1]["event"] == "error"
    assert happened[-1]["type"] == "ClipsError"

    again = flashtalk(place, "--manifest", "clips.jsonl", "--replicas", "2")
    out, _ = again.communicate(timeout=60)
    states = Counter(e["state"] for e in map(json.loads, out.splitlines()) if e["event"] == "clip")
    assert states == {"skipped": 8, "failed": 2}
    assert again.returncode == 9
    assert '"stage"' not in out, "a model was loaded"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_ends_all_and_names_no_half_file(place: Path) -> None:
    """Fault: exit code 130, no process left, what was not finished has no final name and is done next time."""
    clips = [{"picture": "p.png", "speech": "long.wav", "output": f"c{i}.mp4"} for i in range(3)]
    (place / "ctrl.jsonl").write_text("\n".join(map(json.dumps, clips)))
    process = flashtalk(place, "--manifest", "ctrl.jsonl", "--replicas", "2")
    assert process.stdout is not None
    for text in process.stdout:
        if json.loads(text)["event"] == "chunk":
            pids = workers_of(process.pid)
            process.send_signal(signal.SIGINT)
            break
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids.values())
    assert json.loads(out.splitlines()[-1])["event"] == "interrupted"
    ends = [json.loads(text) for text in (place / "ctrl.results.jsonl").read_text().splitlines()]
    finished = {place / f"c{end['line'] - 1}.mp4" for end in ends if end["state"] == "done"}
    assert set(place.glob("c*.mp4")) == finished
    assert "interrupted" in {end["state"] for end in ends}


@pytest.mark.slow
def test_a_replica_of_two_processes_renders_clips_of_two_sizes(place: Path) -> None:
    """Contract: the processes agree on each clip, and keep their networks."""
    clips = [
        {"picture": "p.png", "speech": "short.wav", "output": f"two{size}.mp4", "size": size}
        for size in ("64x64", "96x64", "64x96")
    ]
    (place / "two.jsonl").write_text("\n".join(map(json.dumps, clips)))
    process = flashtalk(place, "--manifest", "two.jsonl", "--gpus", "2")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert sum(e["event"] == "stage" and e["name"] == "ready" for e in map(json.loads, out.splitlines())) == 1
    for clip in clips:
        video = probe(place / clip["output"]).video
        assert video
        assert f"{video.width_px}x{video.height_px}" == clip["size"]
