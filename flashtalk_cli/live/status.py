"""What a live stream says of itself: one value for the display, `flashtalk ctl status`, and Prometheus.

state            starting (nothing was sent yet), speaking, idle (silence), muted, held (no server takes the
                 stream, and the person waits), ending
media_s, frames  what was sent, repeated frames included
chunks           what was made
realtime         seconds of video made in a second of work, lately; below 1 the machine is too slow
latency          from a sound's arrival to its frame's sending: total, fill (until its chunk began),
                 compute (until it was decoded), delivery; each p50_s, p95_s, p99_s of the last minute
ahead_s          video that waits to be sent; negative when it is late
unspoken_s       sound that waits to be spoken
repeated_frames  sent a second time, for want of a new one
jumps            stalls after which the schedule began anew
silent_s         silence put where sound was late or missing
dropped_s        sound never spoken: interrupted, too much of it, or left out to catch up
muted            whether the person stays silent whatever arrives
source           what the source is doing: starting, live, waiting (it will be tried again), ended
position_s       how much of the sound was spoken or left out, with what waits to be sent
restarts         how often the stream was started again after its worker died
sinks            of each output, as media/live/statistics.py has it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flashtalk_cli.live.loop import Loop
from flashtalk_cli.media.live.statistics import SinkStatistics

METRICS = {  # name: (kind, where in the status, what it is)
    "media_seconds_total": ("counter", "media_s", "Video sent, in seconds."),
    "frames_sent_total": ("counter", "frames", "Frames sent, repeated ones included."),
    "chunks_total": ("counter", "chunks", "Chunks made."),
    "frames_repeated_total": ("counter", "repeated_frames", "Frames sent again for want of a new one."),
    "jumps_total": ("counter", "jumps", "Stalls after which the schedule began anew."),
    "sound_silent_seconds_total": ("counter", "silent_s", "Silence in place of missing sound."),
    "sound_dropped_seconds_total": ("counter", "dropped_s", "Sound never spoken."),
    "realtime_ratio": ("gauge", "realtime", "Seconds of video made in a second of work."),
    "video_ahead_seconds": ("gauge", "ahead_s", "Video that waits to be sent."),
    "sound_unspoken_seconds": ("gauge", "unspoken_s", "Sound that waits to be spoken."),
    "muted": ("gauge", "muted", "1 while muted."),
    "restarts_total": ("counter", "restarts", "Times the stream was started again."),
}
SINK_METRICS = {
    "sink_live": ("gauge", "1 while the output takes frames."),
    "sink_frames_total": ("counter", "Frames an output took."),
    "sink_frames_dropped_total": ("counter", "Frames an output never got."),
    "sink_bytes_total": ("counter", "Bytes an output took."),
    "sink_reconnects_total": ("counter", "Times an output was connected again."),
    "sink_behind_seconds": ("gauge", "Encoded video that an output has not yet taken."),
}


def status_of(
    loop: Loop, source_state: str, sinks: Sequence[SinkStatistics], restarts: int
) -> dict[str, Any]:
    """The status now, as the fields of a `live` event."""
    timeline, delivery = loop.timeline, loop.delivery
    return {
        "state": _state(loop),
        "media_s": delivery.sent_frames / loop.rules.fps,
        "frames": delivery.sent_frames,
        "chunks": loop.chunks,
        "realtime": loop.realtime,
        "latency": delivery.latency.summary(),
        "ahead_s": delivery.ahead_s,
        "unspoken_s": timeline.unspoken_s,
        "repeated_frames": delivery.repeated_frames,
        "jumps": delivery.jumps,
        "silent_s": timeline.silent_samples / timeline.rate_hz,
        "dropped_s": timeline.dropped_samples / timeline.rate_hz,
        "muted": timeline.muted,
        "source": source_state,
        "position_s": timeline.arrived_samples / timeline.rate_hz - timeline.unspoken_s,
        "restarts": restarts,
        "sinks": [asdict(sink) for sink in sinks],
    }


def _state(loop: Loop) -> str:
    if loop.stop.is_set():
        return "ending"
    if not loop.delivery.on_air:
        return "starting"
    if loop.delivery.held:
        return "held"
    if loop.timeline.muted:
        return "muted"
    return "speaking" if loop.speaking else "idle"


def prometheus(status: dict[str, Any]) -> str:
    """The status in Prometheus' text format, version 0.0.4."""
    lines = []

    def family(name: str, kind: str, about: str, samples: Sequence[tuple[str, Any]]) -> None:
        lines.extend([f"# HELP flashtalk_{name} {about}", f"# TYPE flashtalk_{name} {kind}"])
        for labels, value in samples:
            number = "NaN" if value is None else repr(float(value))
            lines.append(f"flashtalk_{name}{labels} {number}")

    for name, (kind, key, about) in METRICS.items():
        family(name, kind, about, [("", status[key])])
    quantiles = [
        (f'{{part="{part}",quantile="0.{quantile[1:3]}"}}', seconds)
        for part, values in status["latency"].items()
        for quantile, seconds in values.items()
    ]
    family("latency_seconds", "gauge", "From a sound's arrival to its frame's sending.", quantiles)
    values = [
        (
            float(sink["state"] == "live"),
            sink["frames_sent"],
            sink["frames_dropped"],
            sink["bytes_sent"],
            sink["reconnects"],
            sink["behind_s"],
        )
        for sink in status["sinks"]
    ]
    labels = [
        f'{{sink="{index}",kind="{sink["kind"]}",to="{_escaped(sink["shown"])}"}}'
        for index, sink in enumerate(status["sinks"])
    ]
    for column, (name, (kind, about)) in enumerate(SINK_METRICS.items()):
        family(name, kind, about, [(label, row[column]) for label, row in zip(labels, values, strict=True)])
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
