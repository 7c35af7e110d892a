"""A report as one HTML page that needs nothing else: no script, no network, plots as inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flashtalk_cli.bench import plots, projection, words
from flashtalk_cli.bench.words import milliseconds

OF_A_COUNT = ("ranks", "split", "chunks", "warmup_chunks")  # settings in which reports of one plot may differ
STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c2026; --faint: #6a717b; --rule: #dfe2e6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e7eb; --faint: #949ca7; --rule: #333940; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1000px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; } .faint, caption { color: var(--faint); }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; margin: 1.4rem 0 .8rem; }
.figures div { color: var(--faint); } .figures b { display: block; color: var(--ink); font-size: 1.7rem; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg text.faint { fill: var(--faint); } svg text.strong { font-weight: 600; }
svg text.inside { fill: #fff; }
svg .grid { stroke: var(--rule); } svg .limit { stroke: var(--ink); stroke-dasharray: 3 4; }
svg .measured { fill: #3b6fd4; }
svg .projected { fill: var(--paper); stroke: var(--faint); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg polyline.projected { fill: none; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .22rem .6rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
tr.sub td { color: var(--faint); } tr.sub td:first-child { padding-left: 1.8rem; }
"""


def page(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a report; `others` are reports of other counts of GPUs, for the plot of scaling."""
    title = f"flashtalk bench: {words.title(report)}"
    deadline_s = report["live"]["audio_fill_s"]
    sections = [
        _head(report),
        _section("One chunk", plots.timeline(report["timeline"], deadline_s), _timeline_note(report)),
        _section("Share of a chunk's time", plots.shares(report["parts"]), "of the main stream, means"),
        _section("Every timed chunk", plots.samples(report["chunk"]["samples_s"], deadline_s)),
        _scaling(report, others),
        _section("Parts of a chunk", _parts(report)),
        _section("Arithmetic", _work(report), _ceilings(report)),
        _section("Once a run", _once(report)),
        _section("Ranks", _ranks(report), "exchanges: waiting for peers is part of them"),
        _section("Where and when", _facts({**report["fingerprint"], **report["setting"]})),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{''.join(sections)}</body></html>\n"
    )


def _head(report: Mapping[str, Any]) -> str:
    speed, live = report["speed"], report["live"]
    figures = [
        (f"{speed['fps']:.1f} fps", "with everything counted"),
        (f"{speed['realtime']:.2f}x", f"real time, at {report['setting']['fps']} fps"),
        (f"{live['first_frame']['p50_s']:.2f} s", "first frame after the chunk's sound"),
        (f"{report['memory']['peak_gib']:.1f} GiB", "peak memory of a rank"),
    ]
    tiles = "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in figures)
    lines = (words.hardware(report), words.programs(report))
    faint = "".join(f'<p class="faint">{escape(line)}</p>' for line in lines)
    said = "".join(f"<p>{escape(line)}.</p>" for line in (words.verdict(report), words.start_up(report)))
    return f'<h1>{escape(words.title(report))}</h1>{faint}<div class="figures">{tiles}</div>{said}\n'


def _section(title: str, content: str, note: str = "") -> str:
    said = "".join(f'<p class="faint">{escape(line)}</p>' for line in note.splitlines())
    return f"<h2>{escape(title)}</h2>\n{content}{said}\n"


def _timeline_note(report: Mapping[str, Any]) -> str:
    lanes = {part["lane"] for part in report["timeline"]}
    beside = " Lanes beside the main stream ran at the same time." if len(lanes) > 1 else ""
    return f"The chunk whose time is nearest to the median, from its sound being there on.{beside}"


def _scaling(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Only for GPUs: processes that share a CPU's cores say nothing of more machines."""
    if report["fingerprint"]["device_memory_gib"] is None:
        said = f"{_reports(len(others))} left out: only GPUs are drawn"
        return _section("Scaling", "", said) if others else ""
    alike = [other for other in others if _of_a_count(other) == _of_a_count(report)]
    reports = [*alike, report]
    base = max(reports, key=lambda one: one["setting"]["ranks"])
    counted = projection.counts_exchanges(base)
    assumed = "exchanges grow with what a rank sends" if counted else "exchanges left out: an upper bound"
    ranks = base["setting"]["ranks"]
    note = f"Projection, not a result: from the parts measured on {ranks} GPU{'s' * (ranks > 1)}; {assumed}."
    plot = plots.scaling(
        projection.measured(reports), projection.project(base), report["setting"]["fps"], note
    )
    left_out = len(others) - len(alike)
    said = f"{_reports(left_out)} of another device or setting left out" if left_out else ""
    return _section("Scaling", plot, said)


def _of_a_count(report: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What two reports have to have in common to be points of one plot: the device, and all settings but the count."""
    kept = {key: value for key, value in report["setting"].items() if key not in OF_A_COUNT}
    return report["fingerprint"]["device"], kept


def _reports(count: int) -> str:
    return f"{count} report{'s' if count != 1 else ''}"


def _parts(report: Mapping[str, Any]) -> str:
    rows = []
    for part in report["parts"]:
        name = words.TITLES.get(part["name"], part["name"])
        times = f" x{part['count']}" if part["count"] > 1 else ""
        rows.append(("", [name + times, part["lane"], *_spread(part["time"])]))
        rows += [
            ("sub", [f"step {index + 1}", "", *_spread(one)])
            for index, one in enumerate(part.get("each", ()))
        ]
    rows.append(("", ["chunk", "", *_spread(report["chunk"])]))
    return _table(["", "stream", "p50 ms", "p95 ms", "p99 ms"], rows)


def _spread(spread: Mapping[str, float]) -> list[str]:
    return [milliseconds(spread[key]) for key in ("p50_s", "p95_s", "p99_s")]


def _work(report: Mapping[str, Any]) -> str:
    rows = [
        (
            "",
            [
                "DiT step" if row["stage"] == "step" else words.TITLES.get(row["stage"], row["stage"]),
                words.amount(row["tflop"]),
                f"{words.amount(row['tflops'])}/s",
                f"{words.amount(row['ceiling_tflops'])}/s",
                f"{row['share']:.0%}",
            ],
        )
        for row in report["work"]
    ]
    return _table(["", "work", "achieved a rank", "ceiling", "share"], rows)


def _ceilings(report: Mapping[str, Any]) -> str:
    found = [f"{c['kind']}: {words.amount(c['tflops'])}/s, {c['what']}" for c in report["ceilings"]]
    return "\n".join([words.CEILING, *found])


def _once(report: Mapping[str, Any]) -> str:
    once = {**report["once"], "drain": report["speed"]["drain_s"]}
    rows = [("", [words.ONCE.get(name, name), f"{seconds:.2f}"]) for name, seconds in once.items()]
    return _table(["", "s"], rows)


def _ranks(report: Mapping[str, Any]) -> str:
    rows = [
        (
            "",
            [
                f"rank {rank['rank']} on {rank['host']}",
                f"{rank['peak_memory_gib']:.2f}",
                "" if rank["peak_reserved_gib"] is None else f"{rank['peak_reserved_gib']:.2f}",
                str(rank["exchanges"]),
                milliseconds(rank["exchange"]["p50_s"]),
                milliseconds(rank["exchange"]["p95_s"]),
            ],
        )
        for rank in report["ranks"]
    ]
    return _table(["", "peak GiB", "reserved GiB", "exchanges a chunk", "p50 ms", "p95 ms"], rows)


def _facts(facts: Mapping[str, Any]) -> str:
    told = ((key.replace("_", " "), value) for key, value in facts.items() if value is not None)
    return _table([], [("", [name, _plain(value)]) for name, value in told])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows are a class and cells."""
    head = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>" if header else ""
    body = "".join(
        f"<tr{f' class={kind!r}' if kind else ''}>"
        + "".join(f"<td>{escape(c)}</td>" for c in cells)
        + "</tr>\n"
        for kind, cells in rows
    )
    return f"<table>{head}\n{body}</table>"
