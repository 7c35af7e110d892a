"""Whether this machine keeps up live with the embedded model: a few chunks, timed as they are made."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path

from flashtalk_cli import events, launch, presets
from flashtalk_cli.cli.machine import Finding
from flashtalk_cli.config import BenchJob, Preset
from flashtalk_cli.errors import FlashtalkError
from flashtalk_cli.media.audio import prepare_speech

PRESET = "mini"
WARM_CHUNKS, TIMED_CHUNKS = 2, 3
LIMIT_S = 120.0
AMPLE = 1.25  # so much faster than real time, a busier moment does no harm
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def rehearse() -> float | None:
    """Seconds of video that this machine makes in a second with the embedded model; None: it did not come to it.

    Takes about as long as a stream takes to go on air.
    """
    preset: Preset = presets.load(PRESET)
    made_s: list[float] = []  # when each chunk was made
    requests: list[int] = []

    def on_event(happened: events.Event) -> None:
        if happened["event"] == "progress" and happened["name"] == "measure":
            made_s.append(time.monotonic())
        if len(made_s) >= WARM_CHUNKS + TIMED_CHUNKS or time.monotonic() > end_s:
            requests.append(signal.SIGTERM)  # the bench would go on to what the machine can do at best

    end_s = time.monotonic() + LIMIT_S
    with tempfile.TemporaryDirectory(prefix="flashtalk-") as folder:
        try:
            job = BenchJob(
                preset=preset,
                picture=next((_ASSETS / "portraits").glob("*.png")),
                speech=prepare_speech(next((_ASSETS / "speech").glob("*.wav")), Path(folder)),
                chunks=TIMED_CHUNKS,
                warmup_chunks=WARM_CHUNKS,
            )
            launch.run(job, on_event, on_log=lambda line: None, requests=requests)
        except FlashtalkError:  # what is missing, doctor says elsewhere
            return None
    if len(made_s) < WARM_CHUNKS + TIMED_CHUNKS:
        return None
    return TIMED_CHUNKS * preset.sampling.new_s / (made_s[-1] - made_s[-1 - TIMED_CHUNKS])


def pace(realtime: float | None) -> Finding:
    """What to expect of a stream at that speed; None: nothing was measured."""
    others = "of another preset: flashtalk bench --preset NAME"
    if realtime is None:
        return Finding("speed", "note", f"not measured: flashtalk bench says whether {PRESET} keeps up live")
    said = f"{PRESET} makes {realtime:.2f} s of video in a second here, now"
    if realtime < 1:
        mend = "stream with fewer --steps or a smaller --size, or end what else runs"
        return Finding("speed", "note", f"{said}: too slow to be live, frames will be repeated; {mend}")
    if realtime < AMPLE:
        return Finding("speed", "note", f"{said}: live, with little to spare; {others}")
    return Finding("speed", "good", f"{said}: fast enough to be live; {others}")
