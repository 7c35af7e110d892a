"""`flashtalk render --manifest`: clips of a manifest on replicas, from the options to the summary."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from pathlib import Path

from flashtalk_cli import launch, log
from flashtalk_cli.batch.clip import Clip, Setup
from flashtalk_cli.batch.cluster import RayReplica, connected
from flashtalk_cli.batch.replica import LocalReplica, Replica
from flashtalk_cli.batch.run import Crew, Record, clip_event
from flashtalk_cli.cli.batch_display import choose, show_summary
from flashtalk_cli.cli.display import Display, one_line
from flashtalk_cli.cli.hosts import check_split
from flashtalk_cli.cli.machine import check_machine, probe
from flashtalk_cli.cli.manifest import plan
from flashtalk_cli.cli.request import Request, preset_of
from flashtalk_cli.config import Compute, Preset
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, ClipsError, ConfigError, DeviceError, UsageError
from flashtalk_cli.events import event
from flashtalk_cli.models.folder import resolve


def render_all(
    manifest: Path, common: Request, *, replicas: int, ray: str | None, json: bool, debug: bool
) -> int:
    """Render a manifest; the exit code. Raises ClipsError when some clips failed and the others are done."""
    log.setup(debug=debug)
    started_s = time.monotonic()
    with choose(json=json) as display:
        preset_of(common.preset, common.sets, common.options, common.size)  # wrong for all is wrong at once
        planned = plan(manifest, common, lambda done, of: display.progress("look", done, of, "clips"))
        n_clips = len(planned.clips) + len(planned.ended)
        with closing(Record(results_path(manifest), display.show, n_clips)) as record:
            for ended in planned.ended:
                record.add(ended)
            try:
                if planned.clips:
                    _work(planned.clips, record, display, replicas, ray, debug)
            finally:  # also when no replica is left: what was done until then is done
                display.close()
                if record.clips and not json:
                    show_summary(record)
            return _end(record, time.monotonic() - started_s)


def results_path(manifest: Path) -> Path:
    """Where it is recorded what became of each clip: beside the manifest."""
    return manifest.with_suffix(".results.jsonl")


def _work(
    clips: list[Clip], record: Record, display: Display, replicas: int, ray: str | None, debug: bool
) -> None:
    """Render clips, until all have come to an end or the run is asked to end."""
    first = clips[0].preset
    if not ray:  # whose cluster may have what this host lacks
        check_machine(first)
    resolve(first.model.name, first.model.speech_encoder, random=first.model.weights == "random")
    n_replicas = min(replicas, len(clips))
    # Ray first: it would put a handler of its own in the place of ours.
    with connected(ray) if ray else nullcontext(), launch.stop_requests() as requests:
        processes = _processes(first.compute, n_replicas, ray)
        clips = [clip for clip in clips if _can_be_split(clip, processes, record)]
        if not clips:
            return
        setup = Setup.of(clips, processes, debug)
        setup = setup.model_copy(update={"preset": _from_anywhere(setup.preset)})
        crew: list[Replica] = [
            RayReplica(setup, number, requests, record.show)
            if ray
            else LocalReplica(setup, launch.Share(number, n_replicas), requests, record.show, display.log)
            for number in range(n_replicas)
        ]
        Crew(crew, clips, record, requests).run()


def _can_be_split(clip: Clip, processes: int, record: Record) -> bool:
    """Whether a replica's processes can share the clip; recorded as failed when not."""
    try:
        check_split(clip.preset, processes)
    except ConfigError as error:
        record.add(clip_event(clip, "failed", error))
        return False
    return True


def _from_anywhere(preset: Preset) -> Preset:
    """The same with absolute paths: a replica may have another working folder."""
    given = {"name": preset.model.name, "speech_encoder": preset.model.speech_encoder}
    paths = {key: str(Path(text).absolute()) for key, text in given.items() if text and Path(text).is_dir()}
    return preset.model_copy(update={"model": preset.model.model_copy(update=paths)})


def _processes(compute: Compute, n_replicas: int, ray: str | None) -> int:
    """Processes of a replica, here or on a cluster."""
    if not ray:
        return processes_each(compute, n_replicas)
    if compute.gpus == "all":
        raise UsageError("--gpus all: with --ray, say how many GPUs each replica gets")
    return compute.gpus


def processes_each(compute: Compute, replicas: int) -> int:
    """Processes of a replica, a GPU each where there are GPUs.

    Raises DeviceError when this machine has fewer GPUs than that takes.
    """
    n_gpus = 0 if compute.device == "cpu" else len(probe().get("gpus", []))
    if not n_gpus:
        return 1 if compute.gpus == "all" else compute.gpus
    each = n_gpus // replicas if compute.gpus == "all" else compute.gpus
    if not 0 < each * replicas <= n_gpus:
        raise DeviceError(
            f"{replicas} replicas of {max(1, each)} GPUs need {max(1, each) * replicas} GPUs, "
            f"this machine has {n_gpus}; lower --replicas or --gpus"
        )
    return each


def _end(record: Record, elapsed_s: float) -> int:
    """Say what became of the clips; the exit code."""
    if record.n_left or record.of("interrupted"):
        record.show(event("interrupted", path=record.path))
        return INTERRUPTED_EXIT_CODE
    failed = record.of("failed")
    if failed:
        first = failed[0]
        text = f"line {first['line']}: {first['type']}: {one_line(first['message'])}"
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ClipsError(
            f"{len(failed)} of {len(record.clips)} clips failed: {text}{more}; see {record.path}"
        )
    record.show(event("done", path=record.path, elapsed_s=elapsed_s))
    return 0
