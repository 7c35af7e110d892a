"""A report, and a comparison, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flashtalk_cli.bench import words
from flashtalk_cli.bench.compare import CONFIDENCE, DRIFT, Comparison
from flashtalk_cli.bench.parts import MAIN
from flashtalk_cli.bench.words import milliseconds

COLOURS = {"slower": "red", "faster": "green", "same": "", "unclear": "yellow"}
PERCENTILES = ("p50_s", "p95_s", "p99_s")


def tables(report: Mapping[str, Any]) -> RenderableType:
    """The whole report."""
    speed = report["speed"]
    count = report["setting"]["chunks"]
    heading = Text.assemble(
        (words.title(report), "bold"), f"\n{words.hardware(report)}\n{words.programs(report)}\n"
    )
    summary = Text.assemble(
        (f"\n{speed['fps']:.1f} frames a second with everything counted", "bold"),
        f" over {count} chunk{'s' if count != 1 else ''}, {speed['realtime']:.2f} times real time\n",
        (words.verdict(report), "green" if speed["realtime"] >= 1 and report["live"]["holds"] else "yellow"),
        f"\n{words.start_up(report)}\n{_memory(report)}\n",
    )
    return Group(heading, _parts(report), summary, _work(report), _once(report))


def _parts(report: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("part of a chunk")
    for name in ("p50 ms", "p95 ms", "p99 ms", "share"):
        table.add_column(name, justify="right")
    for part in report["parts"]:
        title = words.TITLES.get(part["name"], part["name"])
        times = f" x{part['count']}" if part["count"] > 1 else ""
        beside = "" if part["lane"] == MAIN else f" [dim]({escape(part['lane'])})[/]"
        share = "" if part["share"] is None else f"{part['share']:.0%}"
        table.add_row(f"{escape(title)}{times}{beside}", *_spread(part["time"]), share)
        for index, one in enumerate(part.get("each", ())):
            table.add_row(f"  step {index + 1}", *_spread(one), style="dim")
    table.add_section()
    table.add_row("chunk", *_spread(report["chunk"]), "", style="bold")
    if len(report["ranks"]) > 1:
        longest = max(report["ranks"], key=lambda rank: rank["exchange"]["p50_s"])
        note = f"of which {longest['exchanges']} exchanges, waiting counted (rank {longest['rank']})"
        table.add_row(note, *_spread(longest["exchange"]), "")
    return table


def _spread(spread: Mapping[str, float]) -> Iterator[str]:
    return (milliseconds(spread[key]) for key in PERCENTILES)


def _memory(report: Mapping[str, Any]) -> str:
    peaks = ", ".join(f"{rank['peak_memory_gib']:.2f}" for rank in report["ranks"])
    return f"peak memory {peaks} GiB" + (" of each rank" if len(report["ranks"]) > 1 else "")


def _work(report: Mapping[str, Any]) -> Table:
    table = Table(
        caption=f"{words.CEILING}\n{_ceilings(report)}",
        caption_justify="left",
    )
    table.add_column("arithmetic")
    for name in ("work", "achieved a rank", "ceiling", "share"):
        table.add_column(name, justify="right")
    for row in report["work"]:
        name = "DiT step" if row["stage"] == "step" else words.TITLES.get(row["stage"], row["stage"])
        rates = (f"{words.amount(row[key])}/s" for key in ("tflops", "ceiling_tflops"))
        table.add_row(name, words.amount(row["tflop"]), *rates, f"{row['share']:.0%}")
    return table


def _ceilings(report: Mapping[str, Any]) -> str:
    return "\n".join(f"{c['kind']} {words.amount(c['tflops'])}/s ({c['what']})" for c in report["ceilings"])


def _once(report: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("once")
    table.add_column("s", justify="right")
    for name, seconds in {**report["once"], "drain": report["speed"]["drain_s"]}.items():
        table.add_row(words.ONCE.get(name, name), f"{seconds:.2f}")
    return table


def comparison(found: Comparison) -> RenderableType:
    """What changed between two reports."""
    table = Table(title="against the old report")
    table.add_column("figure")
    for name in ("old", "new", "ratio", f"{CONFIDENCE:.0%} sure", ""):
        table.add_column(name, justify="right")
    for row in found.rows:
        old, new = (
            (milliseconds(x) + " ms" if row.unit == "s" else f"{x:.2f} GiB") for x in (row.old, row.new)
        )
        bounds = "" if row.low == row.high else f"{row.low:.3f} to {row.high:.3f}"
        name = words.TITLES.get(row.name, row.name)
        verdict = Text(row.verdict, COLOURS[row.verdict])
        table.add_row(name, old, new, f"{row.ratio:.3f}", bounds, verdict, style="" if row.decides else "dim")
    notes = [
        f"a slow-down of a chunk by {found.noticed:.0%} would have been noticed (noise, and {DRIFT:.0%} between runs)"
    ]
    notes += [f"differs: {line}" for line in (*found.settings, *found.changed)]
    return Group(table, Text("\n".join(notes)))
