"""What became of a stream's outputs, once it is over."""

from __future__ import annotations

from collections.abc import Sequence

from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.live.statistics import SinkStatistics
from flashtalk_cli.media.mends import mend_of

SERVERS = ("rtmp", "srt", "whip")  # outputs that know whether somebody takes what is sent


def where_it_went(sinks: Sequence[SinkStatistics], repeated_frames: int) -> str:
    """Where a stream went, and whether it was on time."""
    where = ", ".join(
        f"{sink.shown} ({'never connected' if _is_unheard(sink) else f'{sink.frames_sent} frames'})"
        for sink in sinks
    )
    return f"{where}; {f'{repeated_frames} frames were shown twice' if repeated_frames else 'in real time'}"


def failure(sinks: Sequence[SinkStatistics]) -> OutputError | None:
    """The error of a stream some of whose outputs came to nothing: recordings without a name, servers never reached."""
    told = [_complaint(sink) for sink in sinks if _came_to_nothing(sink)]
    return OutputError("; ".join(told)) if told else None


def are_late(before: Sequence[SinkStatistics], after: Sequence[SinkStatistics]) -> bool:
    """Whether an output was not done at the end that had not failed before, and of which `failure` says nothing."""
    return any(
        then.state != "failed" and now.state != "ended" and not _came_to_nothing(now)
        for then, now in zip(before, after, strict=True)
    )


def _came_to_nothing(sink: SinkStatistics) -> bool:
    return _is_unheard(sink) or (sink.kind == "file" and sink.state != "ended")


def _is_unheard(sink: SinkStatistics) -> bool:
    return sink.kind in SERVERS and not sink.frames_sent


def _complaint(sink: SinkStatistics) -> str:
    why = sink.last_error or "was not done when time was up"
    if sink.kind == "file":
        return f"{sink.shown}: {why}; {mend_of(why)}"
    return f"{sink.shown}: never connected ({why}); look whether a server listens there"
