"""What tests of the parts of a stream share: a store of sound, a source that runs, a status, and a way to wait."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashtalk_cli.live.sources import Source
from flashtalk_cli.live.status import METRICS
from flashtalk_cli.live.timeline import RATE_HZ, Timeline

FPS = 25


def timeline(backlog_s: float = 30.0, rate_hz: int = RATE_HZ) -> Timeline:
    return Timeline(past_s=1.0, backlog_s=backlog_s, fps=FPS, rate_hz=rate_hz)


def wait_until(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def has_ipv6() -> bool:
    """Whether one can listen at ::1."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@contextmanager
def running(source: Source) -> Iterator[Source]:
    source.start()
    try:
        yield source
    finally:
        source.close()
        source._thread.join(5)
        assert not source._thread.is_alive()


STATUS = {
    **{key: 1.5 for _, key, _ in METRICS.values()},
    "state": "idle",
    "source": "live",
    "latency": {
        part: {"p50_s": 0.1, "p95_s": None, "p99_s": 0.3} for part in ("total", "fill", "compute", "delivery")
    },
    "sinks": [
        {
            **{
                "shown": 'rtmp://h/a/***"\\',
                "kind": "rtmp",
                "state": "live",
                "reconnects": 2,
                "last_error": "",
            },
            **{"bytes_sent": 10, "frames_sent": 5, "frames_dropped": 1, "behind_s": 0.5},
        }
    ],
}
