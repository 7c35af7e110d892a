"""`flashtalk train people` and `flashtalk train prepare`: examples, going on where an earlier run ended."""

from __future__ import annotations

import os
import time
from collections import Counter

from flashtalk_cli.distill import shards
from flashtalk_cli.distill.encoding import Encoders
from flashtalk_cli.distill.work import Work
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, InputError, OutputError


def make_people(work: Work) -> int:
    """`train people`: shards of generated people, going on where an earlier run ended."""
    from flashtalk_cli.distill.people_data import Cast, make_people

    job, base = work.job, work.job.base
    assert job.source is not None
    started_s = time.monotonic()
    encoders = Encoders(work.folder, base, work.ranks.device)
    cast = Cast.of(job.preset, base, job.preset.data.clip_chunks, job.held_out)
    origin, first, number = _going_on(work, encoders, [base.sampling.prompt])
    workers = max(0, min(24, (os.cpu_count() or 1) - 2))
    work.say("people", f"clips {first} to {job.clips} of {cast.n_frames} frames, {workers} planners")
    made = first
    size_px = (cast.height_px, cast.width_px)
    parts = (
        make_people(encoders, job.preset, job.source, cast, first, job.clips, workers)
        if first < job.clips
        else ()
    )
    for tensors, done in parts:
        shards.write_shard(job.out, size_px, number, tensors)
        number, made = number + 1, made + done.clips
        origin = replace_counts(origin, made, base.sampling.fps, cast.n_frames)
        shards.write_origin(job.out, origin)
        rate = (made - first) / max(1e-9, time.monotonic() - started_s)
        work.emitter.emit(
            "progress", name="people", done=made, total=job.clips, unit=f"clips, {rate:.1f} a second"
        )
        if work.stop.is_set():
            work.emitter.emit("interrupted", path=job.out)
            return INTERRUPTED_EXIT_CODE
        if job.max_seconds is not None and time.monotonic() - started_s > job.max_seconds:
            break
    work.emitter.emit("done", path=job.out, elapsed_s=time.monotonic() - started_s)
    return 0


def prepare(work: Work) -> int:
    """`train prepare`: examples of real footage, going on where an earlier run ended."""
    from flashtalk_cli.distill.filters import opencv_faces
    from flashtalk_cli.distill.footage import KEPT, Preparation
    from flashtalk_cli.distill.people_data import merged

    job, base = work.job, work.job.base
    assert job.source is not None
    started_s = time.monotonic()
    faces = opencv_faces() if job.preset.data.min_face_share > 0 else None
    encoders = Encoders(work.folder, base, work.ranks.device)
    origin, n_clips, number = _going_on(work, encoders, [base.sampling.prompt])
    preparation = Preparation(encoders, job.preset.data, job.source, job.out, faces)
    left = preparation.left()
    work.say("footage", f"{len(left)} files, {len(preparation.journal)} done before")
    n_done = 0
    for by_size, done in preparation.batches():
        for size_px, parts in by_size.items():
            shards.write_shard(job.out, size_px, number, merged(parts))
            number, n_clips = number + 1, n_clips + len(parts)
        preparation.write_journal(done)
        shards.write_origin(job.out, origin.model_copy(update={"clips": n_clips}))
        n_done += len(done)
        work.emitter.emit(
            "progress", name="footage", done=n_done, total=len(left), unit=f"files, {n_clips} clips"
        )
        late = job.max_seconds is not None and time.monotonic() - started_s > job.max_seconds
        if work.stop.is_set() or late:
            break
    if work.stop.is_set():
        work.emitter.emit("interrupted", path=job.out)
        return INTERRUPTED_EXIT_CODE
    reasons: Counter[str] = Counter()
    for said in preparation.journal.values():
        reasons.update({name: count for name, count in said.items() if isinstance(count, int)})
    kept = reasons.pop(KEPT, 0)
    dropped = ", ".join(f"{count} {name}" for name, count in reasons.most_common()) or "none"
    work.say("kept", f"{kept} clips; dropped: {dropped}")
    work.emitter.emit("done", path=job.out, elapsed_s=time.monotonic() - started_s)
    return 0


def replace_counts(origin: shards.Origin, clips: int, fps: int, n_frames: int) -> shards.Origin:
    """The same with how much there is by now."""
    return origin.model_copy(update={"clips": clips, "seconds": clips * n_frames / fps})


def _going_on(work: Work, encoders: Encoders, prompts: list[str]) -> tuple[shards.Origin, int, int]:
    """What the folder says of itself, clips that are there, and the next shard's number."""
    out = work.job.out
    origin = encoders.origin(prompts)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}): choose another") from None
    if (out / shards.INDEX).exists():
        found = shards.read_origin(out)
        shards.check_origin(out, found, origin)
        if found.prompts != prompts:
            raise InputError(
                f"{out} was made with the prompts {found.prompts}, now they are {prompts}: choose another"
            )
        paths = [path for some in shards.shard_paths(out).values() for path in some]
        return found, sum(map(shards.clips_in, paths)), len(paths)
    shards.write_texts(out, encoders.encode_prompts(prompts))
    return origin, 0, 0
