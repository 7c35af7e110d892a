"""`flashtalk train people` and `flashtalk train prepare`: examples, going on where an earlier run ended."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

from flashtalk_cli.distill import shards
from flashtalk_cli.distill.encoding import Encoders, origin_of
from flashtalk_cli.distill.work import Work
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, OutputError


def make_people(work: Work) -> int:
    """`train people`: shards of generated people, spread over the ranks, going on where an earlier run ended.

    A shard's number says which clips it holds, so that any number of ranks make the same ones.
    """
    from flashtalk_cli.distill.people_data import Cast, make_people

    job, base, ranks = work.job, work.job.base, work.ranks
    assert job.source is not None
    assert job.clips is not None
    started_s = time.monotonic()
    encoders = Encoders(work.folder, base, ranks.device)
    cast = Cast.of(job.preset, base, job.preset.data.clip_chunks, job.held_out)
    size_px, per_shard = (cast.height_px, cast.width_px), job.preset.data.shard_clips
    origin = _begin(work, encoders, [base.sampling.prompt])
    wanted = [range(start, min(start + per_shard, job.clips)) for start in range(0, job.clips, per_shard)]
    left = [number for number, clips in enumerate(wanted) if _has(job.out, number) < len(clips)]
    mine = left[ranks.rank :: ranks.size]
    workers = max(0, min(24, (os.cpu_count() or 1) // ranks.size - 2))
    at_first = job.clips - sum(len(wanted[number]) for number in left)
    work.say("people", f"clips {at_first} to {job.clips} of {cast.n_frames} frames, {workers} planners")
    shards_made = make_people(encoders, job.preset, job.source, cast, [wanted[n] for n in mine], workers)
    for number, tensors in zip(mine, shards_made, strict=True):
        shards.write_shard(job.out, size_px, number, tensors)
        elapsed_s = time.monotonic() - started_s
        made = sum(len(wanted[n]) for n in shards.numbers_in(job.out) if n < len(wanted))
        work.emitter.emit(
            "progress",
            name="people",
            done=made,
            total=job.clips,
            unit=f"clips, {max(0, made - at_first) / elapsed_s:.1f} a second",
        )
        late = job.max_seconds is not None and elapsed_s > job.max_seconds
        if late or work.stop.is_set():
            break
    ranks.wait()
    if ranks.leads:
        _count(work, origin, cast.n_frames)
    if ranks.any(work.stop.is_set()):
        work.emitter.emit("interrupted", path=job.out)
        return INTERRUPTED_EXIT_CODE
    work.emitter.emit("done", path=job.out, elapsed_s=time.monotonic() - started_s)
    return 0


def _has(folder: Path, number: int) -> int:
    """Clips of a shard by its number; 0 when it is not there."""
    path = shards.numbers_in(folder).get(number)
    return shards.clips_in(path) if path else 0


def _count(work: Work, origin: shards.Origin, n_frames: int) -> None:
    """Write down how much there is."""
    clips = sum(map(shards.clips_in, shards.numbers_in(work.job.out).values()))
    fps = work.job.base.sampling.fps
    shards.write_origin(
        work.job.out, origin.model_copy(update={"clips": clips, "seconds": clips * n_frames / fps})
    )


def prepare(work: Work) -> int:
    """`train prepare`: examples of real footage, going on where an earlier run ended."""
    from flashtalk_cli.distill.filters import opencv_faces
    from flashtalk_cli.distill.footage import KEPT, SHARD, Preparation
    from flashtalk_cli.distill.people_data import merged

    job, base = work.job, work.job.base
    assert job.source is not None
    started_s = time.monotonic()
    faces = opencv_faces() if job.preset.data.min_face_share > 0 else None
    encoders = Encoders(work.folder, base, work.ranks.device)
    origin = _begin(work, encoders, [base.sampling.prompt])
    numbers = shards.numbers_in(job.out)
    n_clips, number = sum(map(shards.clips_in, numbers.values())), max(numbers, default=-1) + 1
    preparation = Preparation(encoders, job.preset.data, job.source, job.out, faces)
    left = preparation.left()
    work.say("footage", f"{len(left)} files, {len(preparation.journal)} done before")
    n_done = 0

    def ends() -> bool:
        late = job.max_seconds is not None and time.monotonic() - started_s > job.max_seconds
        return late or work.stop.is_set()

    for batch in preparation.batches(ends):
        names = {}
        for size_px, parts in batch.clips.items():
            names[size_px] = shards.write_shard(job.out, size_px, number, merged(parts)).name
            number, n_clips = number + 1, n_clips + len(parts)
        preparation.write_journal(
            {
                file: said | ({SHARD: names[size]} if KEPT in said else {})
                for file, (size, said) in batch.done.items()
            }
        )
        shards.write_origin(job.out, origin.model_copy(update={"clips": n_clips}))
        n_done += len(batch.done)
        work.emitter.emit(
            "progress", name="footage", done=n_done, total=len(left), unit=f"files, {n_clips} clips"
        )
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


def _begin(work: Work, encoders: Encoders, prompts: list[str]) -> shards.Origin:
    """Make the folder and say what it is; or what it says of itself, held to this job."""
    job, out = work.job, work.job.out
    origin = origin_of(
        encoders.folder, encoders.base, job.preset.data.shard_clips, prompts, held_out=job.held_out
    )
    if work.ranks.leads:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{out} cannot be made ({error.strerror}): choose another") from None
        if not (out / shards.INDEX).exists():
            shards.write_texts(out, encoders.encode_prompts(prompts))
            shards.write_origin(out, origin)
    work.ranks.wait()
    found = shards.read_origin(out)
    shards.check_addition(out, found, origin)
    return found
