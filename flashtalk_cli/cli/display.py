"""What a run shows while it goes: live bars on a terminal, plain lines elsewhere, JSON for programs.

Everything goes to stderr, except that `--json` lines go to stdout when the video does not.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from flashtalk_cli import events

if TYPE_CHECKING:
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

PLAIN_EVERY_S = 5.0  # a log file needs no more than a line every few seconds
STAGE_COLUMNS, BAR_COLUMNS = 10, 12


def one_line(text: str) -> str:
    """Text fit for one line of a terminal: white space squeezed, control characters spelled out."""
    squeezed = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in squeezed)


def clock(seconds: float | None) -> str:
    """1:02:03, 2:03, or ? when nobody knows."""
    if seconds is None:
        return "?"
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_s:02}" if hours else f"{minutes}:{whole_s:02}"


class Display:
    """A context around a run that is given its events and the lines that its worker logs.

    An exception that leaves the context is shown as the run's last event where the display has
    one for it; reporting it to the user stays the caller's.
    """

    def show(self, happened: events.Event) -> None:
        """Show an event."""
        raise NotImplementedError

    def log(self, line: str) -> None:
        """Pass on a line that a worker wrote to its stderr. Called from another thread."""
        sys.stderr.write(line + "\n")

    def stage(self, name: str, detail: str = "") -> None:
        """Show that a part of the work begins."""
        self.show(events.event("stage", name=name, detail=detail))

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        """Show how far a part of the work is."""
        self.show(events.event("progress", name=name, done=done, total=total, unit=unit))

    def close(self) -> None:
        """Leave the terminal as it should be for whoever writes next."""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(problem, KeyboardInterrupt):
            self.show(events.event("interrupted", path=None, frames=0))
        elif isinstance(problem, Exception) and not isinstance(problem, BrokenPipeError):
            self.show(events.error(problem))
        self.close()


class JsonLines(Display):
    """One JSON object a line, as events.py documents them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, happened: events.Event) -> None:
        """Write the event's line at once."""
        self._stream.write(events.to_line(happened) + "\n")
        self._stream.flush()


class PlainLines(Display):
    """A line a stage and one every few seconds, for log files and pipes."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def show(self, happened: events.Event) -> None:
        """Print the event, unless another of its kind was printed a moment ago."""
        kind = happened["event"]
        if kind in ("chunk", "progress", "live") and not _is_last(happened):
            if time.monotonic() < self._next_s:
                return
            self._next_s = time.monotonic() + PLAIN_EVERY_S
        if text := describe(happened):
            sys.stderr.write(one_line(text) + "\n")
            sys.stderr.flush()


class Bars(Display):
    """One live line, a spinner for a stage and a bar for chunks; above it what is over."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = Console(stderr=True)
        self._spinner = Spinner("dots", style="green")
        self._title, self._note = "", ""
        self._done: float = 0.0
        self._total: float | None = None
        self._stage: tuple[str, str, float] | None = None  # name, detail, when it began
        self._live = Live(
            console=self._console, get_renderable=self._line, refresh_per_second=8, transient=True
        )

    def show(self, happened: events.Event) -> None:
        """Update the live line, or print what stays."""
        kind = happened["event"]
        if kind == "stage":
            self._end_stage()
            self._stage = (happened["name"], happened.get("detail") or "", time.monotonic())
            self._draw(f"{self._stage[0]:<{STAGE_COLUMNS}} {one_line(self._stage[1])}")
        elif kind == "progress":
            done, total, unit = happened["done"], happened.get("total"), happened.get("unit") or ""
            self._draw(f"{happened['name']:<{STAGE_COLUMNS}}", done, total, f"{done:,.0f} {unit}")
        elif kind == "chunk":
            done, total = happened["frames_done"], happened["frames_total"]
            title = f"chunk {happened['index'] + 1}/{happened['chunks']}"
            self._draw(
                f"{title:<{STAGE_COLUMNS}}", done, total, f"{done}/{total} frames, {speed_note(happened)}"
            )
        else:
            if kind in events.LAST:
                self._end_stage()
                self.close()
            if text := describe(happened):
                self._print(one_line(text), "green" if kind == "done" else "yellow")

    def log(self, line: str) -> None:
        """Print a worker's line above the live one."""
        self._print(line, "dim")

    def close(self) -> None:
        """Remove the live line."""
        self._live.stop()

    def _draw(self, title: str, done: float = 0.0, total: float | None = None, note: str = "") -> None:
        self._title, self._done, self._total, self._note = title, done, total, note
        self._live.start(refresh=True)
        self._live.refresh()

    def _line(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        def text(words: str) -> Text:
            return Text(words, no_wrap=True, overflow="ellipsis")

        line = Table.grid(padding=(0, 1))
        cells: list[Spinner | Text | ProgressBar] = [self._spinner, text(self._title)]
        if self._total:
            cells.append(ProgressBar(self._total, self._done, width=BAR_COLUMNS))
        cells.append(text(self._note))
        line.add_row(*cells)
        return line

    def _end_stage(self) -> None:
        if self._stage is not None:
            name, detail, began_s = self._stage
            took_s = time.monotonic() - began_s
            self._stage = None
            took = f" ({took_s:.1f} s)" if took_s >= 0.1 else ""
            self._print(f"  {name:<{STAGE_COLUMNS}} {one_line(detail)}{took}", "")

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(text, style=style), soft_wrap=True)


def choose(*, json: bool, video_on_stdout: bool) -> Display:
    """The display for this terminal, or absence of one."""
    if json:
        return JsonLines(sys.stderr if video_on_stdout else sys.stdout)
    return Bars() if sys.stderr.isatty() else PlainLines()


def describe(happened: events.Event) -> str:
    """An event as a line for people; empty for an error, which the command itself reports."""
    return {
        "stage": _stage_line,
        "progress": _progress_line,
        "chunk": _chunk_line,
        "report": lambda e: "",  # the bench shows it as a table
        "live": _live_line,
        "warning": lambda e: f"warning: {e['message']}",
        "clip": clip_line,
        "done": _done_line,
        "interrupted": _interrupted_line,
        "error": lambda e: "",
    }[happened["event"]](happened)


def speed_note(happened: events.Event) -> str:
    """Speed and time left of a chunk event."""
    return (
        f"{_number(happened.get('fps'))} fps, {_number(happened.get('realtime'), 2)}x real time, "
        f"{clock(happened.get('eta_s'))} left"
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _is_last(happened: dict[str, Any]) -> bool:
    if happened["event"] == "chunk":
        return bool(happened["frames_done"] == happened["frames_total"])
    return False


def _stage_line(happened: events.Event) -> str:
    return f"{happened['name']}: {happened.get('detail') or '...'}"


def _chunk_line(happened: events.Event) -> str:
    chunk = f"chunk {happened['index'] + 1}/{happened['chunks']}"
    return f"{chunk}: {happened['frames_done']}/{happened['frames_total']} frames, {speed_note(happened)}"


def _progress_line(happened: events.Event) -> str:
    total = f" of {happened['total']:,.0f}" if happened.get("total") else ""
    return f"{happened['name']}: {happened['done']:,.0f}{total} {happened.get('unit') or ''}"


def _live_line(happened: events.Event) -> str:
    delay_s = happened["latency"]["total"]["p50_s"]
    delay = "" if delay_s is None else f", {delay_s:.1f} s after the sound"
    outputs = ", ".join(f"{sink['shown']} {sink['state']}" for sink in happened["sinks"])
    repeated = f", {happened['repeated_frames']} frames repeated" if happened["repeated_frames"] else ""
    return f"{happened['state']}: {clock(happened['media_s'])}{delay}{repeated}; {outputs}"


def _done_line(happened: events.Event) -> str:
    path, elapsed_s = happened.get("path"), happened.get("elapsed_s")
    if happened.get("frames") is None:  # no video: something that was trained or measured
        return f"done: {f'{path}, ' if path else ''}{clock(elapsed_s or 0.0)}"
    if elapsed_s is None:  # a stream, which takes as long as it lasts; it has said where it went
        return f"done: {f'{path}, ' if path else ''}{_made(happened)}"
    return f"done: {path or 'standard output'}, {_made(happened)}"


def _made(happened: events.Event) -> str:
    """How much video, and how fast."""
    duration_s, elapsed_s = happened.get("duration_s") or 0.0, happened.get("elapsed_s") or 0.0
    speed = f" in {elapsed_s:.1f} s, {duration_s / elapsed_s:.2f} times real time" if elapsed_s else ""
    return f"{happened['frames']} frames, {duration_s:.2f} s of video{speed}"


def clip_line(happened: events.Event) -> str:
    """What became of a clip of a manifest."""
    where = f"line {happened['line']}: {happened.get('output') or '?'}"
    if happened["state"] == "failed":
        return f"{where}: {happened['type']}: {happened['message']}"
    if happened["state"] != "done":
        return f"{where}: {happened['state']}"
    return f"{where}: {_made(happened)}"


def _interrupted_line(happened: events.Event) -> str:
    if not happened.get("path"):
        n_frames = happened.get("frames")
        return f"interrupted: after {n_frames} frames" if n_frames else "interrupted: nothing was rendered"
    if happened.get("frames") is None:
        return f"interrupted: what was done is kept in {happened['path']}"
    return f"interrupted: {happened['frames']} frames are kept in {happened['path']}"
