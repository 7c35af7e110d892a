"""What a stream shows while it is on air: on a terminal a table that stays in its place."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from flashtalk_cli import events
from flashtalk_cli.cli.display import Bars, Display, JsonLines, PlainLines, clock

if TYPE_CHECKING:
    from rich.console import RenderableType

STATE_STYLES = {"live": "green", "connecting": "yellow", "waiting": "yellow", "failed": "red", "ended": "dim"}


def choose(*, json: bool, video_on_stdout: bool) -> Display:
    """The display for this terminal, or absence of one."""
    if json:
        return JsonLines(sys.stderr if video_on_stdout else sys.stdout)
    return LiveTable() if sys.stderr.isatty() else PlainLines()


class LiveTable(Bars):
    """Stages as a render shows them; once on air, a few figures and a line for each output."""

    def __init__(self) -> None:
        self._status: events.Event | None = None
        super().__init__()

    def show(self, happened: events.Event) -> None:
        """Update the table, or print what stays above it."""
        if happened["event"] == "live":
            self._end_stage()
            self._status = happened
            self._draw("")
        else:
            super().show(happened)

    def _line(self) -> Any:
        return super()._line() if self._status is None else table(self._status)


def table(status: events.Event) -> RenderableType:
    """A status as a table."""
    from rich.table import Table
    from rich.text import Text

    head = f"{status['state']}  {clock(status['media_s'])}"
    found = Table(title=head, title_style="bold", title_justify="left", show_header=False, box=None)
    found.add_column(style="dim")
    found.add_column()
    for name, value in _figures(status):
        found.add_row(name, value)
    for sink in status["sinks"]:
        found.add_row(sink["kind"], Text(_sink(sink), style=STATE_STYLES.get(sink["state"], "")))
    return found


def _figures(status: events.Event) -> list[tuple[str, str]]:
    delay = {part: _ms(values["p50_s"]) for part, values in status["latency"].items()}
    figures = [
        (
            "delay",
            f"{delay['total']} ms (p95 {_ms(status['latency']['total']['p95_s'])}): "
            f"fill {delay['fill']}, compute {delay['compute']}, delivery {delay['delivery']}",
        ),
        (
            "speed",
            f"{status['realtime'] or 0:.2f} times real time, {status['ahead_s']:.1f} s of video ahead",
        ),
        ("sound", f"{status['source']}, {status['unspoken_s']:.1f} s not yet spoken"),
    ]
    if status["repeated_frames"] or status["dropped_s"] or status["jumps"]:
        lost = f"{status['repeated_frames']} frames repeated, {status['dropped_s']:.1f} s of sound dropped"
        figures.append(("late", f"{lost}, {status['jumps']} stalls"))
    return figures


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"


def _sink(sink: dict[str, Any]) -> str:
    text = f"{sink['state']}  {sink['shown']}  {sink['frames_sent']} frames"
    text += f", {sink['frames_dropped']} dropped" if sink["frames_dropped"] else ""
    text += f", {sink['reconnects']} reconnects" if sink["reconnects"] else ""
    return text + (f"  ({sink['last_error']})" if sink["last_error"] else "")
