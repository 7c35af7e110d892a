"""Plots of a report as SVG that stands in a page: text in the page's colour, no script.

Every function gives one `<svg>` of the page's width; sizes are in its own units, WIDTH across.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flashtalk_cli.bench.parts import HOST, MAIN
from flashtalk_cli.bench.projection import Point
from flashtalk_cli.bench.words import TITLES, milliseconds

WIDTH = 960
LEFT, RIGHT = 110, 24  # margins, for labels
LANE, GAP = 40, 10
MAX_BAR, HAIR = 44, 0.7
LETTER = 6.6  # width of a letter of a label, about
COLOURS = {
    "speech": "#2f9e77",
    "keys": "#79c9ab",
    "noise": "#8a919c",
    "step": "#3b6fd4",
    "prime": "#efb562",
    "decode": "#dd7f23",
    "colour": "#a74fb0",
    "bytes": "#d193d6",
    "to host": "#5f6874",
    "deliver": "#8d7047",
    "motion": "#c4463a",
}
OTHER = "#70757d"


def timeline(parts: Sequence[Mapping[str, Any]], deadline_s: float) -> str:
    """When each part of one chunk ran, a row a lane, and how long a chunk is on screen."""
    lanes = list(dict.fromkeys(part["lane"] for part in parts))
    end_s = max(part["end_s"] for part in parts)
    limit_s = max(end_s, deadline_s if deadline_s < 2.5 * end_s else end_s) * 1.02
    bottom = GAP + len(lanes) * (LANE + GAP)
    found = [_axis(limit_s, bottom)]
    for row, lane in enumerate(lanes):
        y = GAP + row * (LANE + GAP)
        found.append(_text(LEFT - 10, y + LANE / 2 + 4, _lane(lane), "end"))
        own = [part for part in parts if part["lane"] == lane]
        found += [_bar(part, y, limit_s, _numbered(own, index)) for index, part in enumerate(own)]
    if deadline_s <= limit_s:
        found.append(_deadline(_x(deadline_s, limit_s), bottom, f"a chunk's video: {deadline_s:.2f} s"))
    names = list(dict.fromkeys(part["name"] for part in parts))
    legend, height = _legend(names, bottom + 44)
    return _svg(height, [*found, legend], "when each part of a chunk ran")


def shares(parts: Sequence[Mapping[str, Any]]) -> str:
    """What a chunk's time goes to: a bar a part, of its lane's whole."""
    own = [part for part in parts if part["share"] is not None]
    left, row = 230, 26
    room = WIDTH - left - 150
    largest = max(part["share"] for part in own)
    found = []
    for index, part in enumerate(own):
        y = GAP + index * row
        width = max(1.0, room * part["share"] / largest)
        label = f"{part['share']:.1%}, {milliseconds(part['time']['mean_s'])} ms"
        found.append(_text(left - 10, y + 14, _title(part), "end"))
        found.append(_rectangle(left, y, width, 18, COLOURS.get(part["name"], OTHER), label))
        found.append(_text(left + width + 8, y + 14, label))
    return _svg(GAP + len(own) * row + GAP, found, "share of a chunk's time")


def samples(chunk_s: Sequence[float], deadline_s: float) -> str:
    """How long each timed chunk took."""
    height, top = 180, 14
    limit_s = max(*chunk_s, deadline_s if deadline_s < 2.5 * max(chunk_s) else 0.0) * 1.1
    step = min(MAX_BAR / 0.7, (WIDTH - LEFT - RIGHT) / len(chunk_s))

    def y_of(seconds: float) -> float:
        return top + height * (1 - seconds / limit_s)

    found = [_line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick), "grid") for tick in ticks(limit_s)]
    found += [_text(LEFT - 10, y_of(tick) + 4, f"{tick:g} s", "end") for tick in ticks(limit_s)]
    for index, seconds in enumerate(chunk_s):
        bar = (LEFT + step * (index + 0.15), y_of(seconds), step * 0.7, top + height - y_of(seconds))
        colour = COLOURS["motion" if seconds > deadline_s else "step"]
        found.append(_rectangle(*bar, colour, f"chunk {index + 1}: {seconds:.3f} s"))
    label = "timed chunks, in order"
    if deadline_s < limit_s:
        found.append(_line(LEFT, y_of(deadline_s), WIDTH - RIGHT, y_of(deadline_s), "limit"))
        label += f"; dashed: a chunk's video, {deadline_s:.2f} s"
    found.append(_text(LEFT, top + height + 20, label))
    return _svg(top + height + 30, found, "time of each chunk")


def scaling(measured: Sequence[Point], projected: Sequence[Point], real_time_fps: float, note: str) -> str:
    """Frames a second over GPUs: what was measured, and apart from it what is projected."""
    height, top = 260, 20
    counts = sorted({point.ranks for point in (*measured, *projected)})
    limit = max(real_time_fps, *(point.fps for point in (*measured, *projected))) * 1.12
    span = max(1.0, math.log2(counts[-1] / counts[0]))

    def place(point: Point) -> tuple[float, float]:
        along = math.log2(point.ranks / counts[0]) / span
        return LEFT + 50 + along * (WIDTH - LEFT - RIGHT - 170), top + height * (1 - point.fps / limit)

    def y_of(fps: float) -> float:
        return top + height * (1 - fps / limit)

    found = [_line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick), "grid") for tick in ticks(limit)]
    found += [_text(LEFT - 10, y_of(tick) + 4, f"{tick:g} fps", "end") for tick in ticks(limit)]
    found += [
        _text(place(Point(n, 0))[0], top + height + 20, f"{n} GPU{'s' * (n > 1)}", "middle") for n in counts
    ]
    found.append(_line(LEFT, y_of(real_time_fps), WIDTH - RIGHT, y_of(real_time_fps), "limit"))
    found.append(_real_time((*measured, *projected), real_time_fps, y_of(real_time_fps) - 5))
    if projected:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, projected))
        found.append(f'<polyline class="projected" points="{path}"/>')
    own = {point.ranks for point in measured}
    for point in (p for p in projected if p.ranks not in own):
        x, y = place(point)
        found.append(f'<circle class="projected" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        found.append(_text(x + 10, y + 16, f"projected {point.fps:.1f}", "start", "faint"))
    for point in measured:
        x, y = place(point)
        found.append(f'<circle class="measured" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        found.append(_text(x, y - 12, f"measured {point.fps:.1f}", "middle", "strong"))
    found.append(_text(LEFT, top + height + 48, note, "start", "faint"))
    return _svg(top + height + 60, found, "frames a second over GPUs")


def _real_time(points: Sequence[Point], fps: float, y: float) -> str:
    """What the line means, at whichever end the points are farther from it: their own labels are there, too."""
    first, last = (pick(points, key=lambda point: point.ranks) for pick in (min, max))
    at_end = abs(last.fps - fps) >= abs(first.fps - fps)
    x, anchor = (WIDTH - RIGHT, "end") if at_end else (LEFT + 6, "start")
    return _text(x, y, f"real time: {fps:g} fps", anchor, "strong")


def ticks(limit: float, about: int = 6) -> list[float]:
    """Round values from 0 up to the limit, about so many."""
    rough = limit / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [round(step * n, 10) for n in range(int(limit / step + 1e-9) + 1)]


def _x(seconds: float, limit_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * seconds / limit_s


def _axis(limit_s: float, bottom: float) -> str:
    found = []
    for tick in ticks(limit_s, about=10):
        x = _x(tick, limit_s)
        found.append(_line(x, 0, x, bottom, "grid"))
        found.append(
            _text(x, bottom + 16, f"{tick:g} s" if limit_s >= 3 else f"{tick * 1000:g} ms", "middle")
        )
    return "".join(found)


def _bar(part: Mapping[str, Any], y: float, limit_s: float, label: str) -> str:
    x, end = _x(part["start_s"], limit_s), _x(part["end_s"], limit_s)
    width = max(1.5, end - x - HAIR)
    took = milliseconds(part["end_s"] - part["start_s"])
    bar = _rectangle(x, y, width, LANE, COLOURS.get(part["name"], OTHER), f"{label}: {took} ms")
    fits = len(label) * LETTER + 8 < width
    return bar + (_text(x + width / 2, y + LANE / 2 + 4, label, "middle", "inside") if fits else "")


def _numbered(parts: Sequence[Mapping[str, Any]], index: int) -> str:
    """A part's name, with its number where there are several."""
    name = parts[index]["name"]
    before = sum(part["name"] == name for part in parts[:index])
    several = sum(part["name"] == name for part in parts) > 1
    return f"{name} {before + 1}" if several else name


def _lane(lane: str) -> str:
    return {MAIN: "main stream", HOST: "host"}.get(lane, f"{lane} stream")


def _title(part: Mapping[str, Any]) -> str:
    times = f" x{part['count']}" if part["count"] > 1 else ""
    return TITLES.get(part["name"], part["name"]) + times


def _deadline(x: float, bottom: float, label: str) -> str:
    side = "end" if x > WIDTH / 2 else "start"
    return _line(x, 0, x, bottom, "limit") + _text(x, bottom + 30, label, side, "strong")


def _legend(names: Iterable[str], y: float) -> tuple[str, float]:
    """Colours and what they stand for, in as many lines as it takes; and where they end."""
    x, found = float(LEFT), []
    for name in names:
        title = TITLES.get(name, name)
        width = 34 + len(title) * LETTER
        if x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 22
        found.append(_rectangle(x, y, 12, 12, COLOURS.get(name, OTHER), title) + _text(x + 18, y + 11, title))
        x += width
    return "".join(found), y + 24


def _svg(height: float, elements: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "\n".join(elements)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rectangle(x: float, y: float, width: float, height: float, colour: str, hint: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {box} fill="{colour}"><title>{escape(hint)}</title></rect>'
