"""What a run of many clips shows: a line for every clip that ends, a bar for each replica, a table at the end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from flashtalk_cli import events
from flashtalk_cli.batch.run import Record
from flashtalk_cli.cli.display import BAR_COLUMNS, Display, JsonLines, clock, describe, one_line, speed_note

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 40  # of a table that is still read; a larger one leaves out what went well


class ClipLines(Display):
    """A line for each clip that ends, and for what stands in its way."""

    def __init__(self) -> None:
        self._warnings: set[str] = set()

    def show(self, happened: events.Event) -> None:
        """Print what is worth a line; a warning that every replica gives, once."""
        kind = happened["event"]
        if kind == "warning" and happened["message"] in self._warnings:
            return
        if kind == "warning":
            self._warnings.add(happened["message"])
        ready = kind == "stage" and happened["name"] == "ready"
        ended = kind == "clip" and happened["state"] != "skipped"  # of those the table has the count
        if ready or ended or kind in ("warning", *events.LAST[:2]):
            who = f"replica {happened['replica']}: " if ready else ""
            self.write(one_line(who + describe(happened)))

    def write(self, line: str) -> None:
        """Print a line."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def log(self, line: str) -> None:
        """Pass on a line of a replica's log."""
        self.write(line)


class Row(NamedTuple):
    """What is going on."""

    title: str
    done: float
    total: float | None  # None: no bar
    note: str


class ClipBars(ClipLines):
    """The same above live lines, one a replica."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._rows: dict[int, Row] = {}  # by replica; -1 is the run itself
        self._live = Live(
            console=self._console, get_renderable=self._table, refresh_per_second=4, transient=True
        )

    def show(self, happened: events.Event) -> None:
        """Update the replica's live line, or print what stays."""
        kind, line = happened["event"], f" line {happened['line']}" if "line" in happened else ""
        row: Row | None = None
        if kind == "stage":
            row = Row(happened["name"] + line, 0, None, one_line(happened.get("detail") or ""))
        elif kind == "progress":
            done, total = happened["done"], happened["total"]
            row = Row(happened["name"], done, total, f"{done} of {total}")
        elif kind == "chunk":
            done, total = happened["frames_done"], happened["frames_total"]
            row = Row("render" + line, done, total, speed_note(happened))
        if row is not None:
            self._rows[happened.get("replica", -1)] = row
            self._live.start()
        super().show(happened)

    def write(self, line: str) -> None:
        """Print a line above the live ones."""
        from rich.text import Text

        self._console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Remove the live lines."""
        self._live.stop()

    def _table(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        for replica, row in sorted(self._rows.items()):
            bar = ProgressBar(row.total, row.done, width=BAR_COLUMNS) if row.total else ""
            table.add_row(f"replica {replica}" if replica >= 0 else "", row.title, bar, row.note)
        return table


def choose(*, json: bool) -> Display:
    """The display for this terminal, or absence of one."""
    if json:
        return JsonLines(sys.stdout)
    return ClipBars() if sys.stderr.isatty() else ClipLines()


def show_summary(record: Record) -> None:
    """A table of the clips on stderr; of many, only of those that did not go well."""
    from rich.console import Console
    from rich.table import Table

    states = ("done", "skipped", "failed", "interrupted")
    counts = {state: len(record.of(state)) for state in states}
    counts["not begun"] = record.n_left
    many = len(record.clips) > ROWS
    table = Table(title=", ".join(f"{n} {state}" for state, n in counts.items() if n))
    table.add_column("line", justify="right")
    table.add_column("output")
    table.add_column("", no_wrap=True)
    for name in ("frames", "video", "took", "speed", "replica", "tries"):
        table.add_column(name, justify="right")
    for clip in record.of(*(states[2:] if many else states)):
        table.add_row(*_cells(clip))
    Console(stderr=True).print(table)


def _cells(clip: dict[str, Any]) -> list[str]:
    name = str(clip.get("output") or "?").rpartition("/")[2]
    start = [str(clip["line"]), one_line(name), clip.get("type") or clip["state"]]
    if clip["state"] != "done":
        return [*start, "", "", "", "", str(clip.get("replica", "")), str(clip.get("tries", ""))]
    video_s, took_s = clip["duration_s"], clip["elapsed_s"]
    speed = f"{video_s / took_s:.2f}x" if took_s else ""
    times = [clock(video_s), clock(took_s), speed]
    return [*start, str(clip["frames"]), *times, str(clip["replica"]), str(clip["tries"])]
