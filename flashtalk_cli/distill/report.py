"""Evaluations for people to read: a table, plots over time, film strips."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flashtalk_cli.distill.evaluate import Result, Yardstick
from flashtalk_cli.distill.measures import NAMES, Lips
from flashtalk_cli.distill.panel import Panel

log = logging.getLogger(__name__)

SHOWN_PEOPLE = 4
COLUMNS = (
    "", "evaluations a chunk", "lips r", "r at lag 0", "lag", "worst r", "closed", "silent gap",
    "silent life", "recorded r", "seconds", *(f"{name} first → last" for name in NAMES), "lips r at the end",
)  # fmt: skip


def write(
    out: Path, results: Sequence[Result], yardsticks: Sequence[Yardstick], panel: Panel, about: dict[str, Any]
) -> Path:
    """Write eval.json, eval.md, plots and strips into a folder; the table's path."""
    out.mkdir(parents=True, exist_ok=True)
    held = [{"name": own.name, "lips": vars(own.lips), "seen": own.seen} for own in yardsticks]
    about = about | {"engines": panel.engines}
    found = {"about": about, "yardsticks": held, "results": [result.summary() for result in results]}
    (out / "eval.json").write_text(json.dumps(_finite(found), indent=1) + "\n", encoding="utf-8")
    path = out / "eval.md"
    lips = [(own.name, own.lips) for own in yardsticks] + [(one.name, one.lips) for one in results]
    voices = by_voice(lips, panel.engines)
    path.write_text(table(results, yardsticks) + "\n" + voices, encoding="utf-8")
    for result in results:
        stem = result.name.replace(" ", "-").replace(",", "")
        shown = torch.cat([panel.pictures[:, None], result.strip], dim=1)
        _save_grid(shown[:SHOWN_PEOPLE], out / f"strip-{stem}.png")
        n = min(result.talking.shape[1], panel.frames.shape[1])
        both = torch.stack([panel.frames[:, :n:3], result.talking[:, :n:3]], dim=1)[: SHOWN_PEOPLE // 2]
        _save_grid(rearrange(both, "p two t h w c -> (p two) t h w c"), out / f"talk-{stem}.png")
    _plots(out, results, panel)
    return path


def table(results: Sequence[Result], yardsticks: Sequence[Yardstick]) -> str:
    """The results as a Markdown table."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for own in yardsticks:
        seen = (f"{own.seen[name]:.3f}" for name in NAMES)
        rows.append((own.name, "", *_lips(own.lips), "", "", "", "", *seen, ""))
    for result in results:
        kept = (f"{result.first[name]:.3f} → {result.last[name]:.3f}" for name in NAMES)
        rows.append(
            (
                result.name,
                str(result.method.evaluations),
                *_lips(result.lips),
                f"{result.silent_gap:.3f}",
                f"{result.silent_life:.2f}",
                f"{result.recorded.correlation:.3f}",
                str(len(result.series)),
                *kept,
                f"{result.lips_at_end.correlation:.3f}" if result.lips_at_end else "",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def by_voice(lips: Sequence[tuple[str, Lips]], engines: Sequence[str]) -> str:
    """Mean lips of the people who speak with each engine's voices, as a Markdown table."""
    kinds = sorted(set(engines))
    whose = np.asarray(engines)
    rows = [("lips r by voices", *(f"{kind}, {engines.count(kind)} people" for kind in kinds))]
    rows.append(tuple("---" for _ in rows[0]))
    for name, found in lips:
        spoke = np.asarray(found.each)
        means = (spoke[(whose == kind) & np.isfinite(spoke)] for kind in kinds)
        rows.append((name, *(f"{some.mean():.3f}" if len(some) else "" for some in means)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _finite(value: Any) -> Any:
    """Numbers that are none as null, which is all that JSON has for them."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lips(lips: Lips) -> tuple[str, ...]:
    return (
        f"{lips.correlation:.3f}",
        f"{lips.correlation_now:.3f}",
        f"{lips.lag_frames:+.0f}",
        f"{lips.worst:.3f}",
        f"{lips.closed:.3f}",
    )


def _save_grid(frames: Tensor, path: Path) -> None:
    """Frames uint8 [rows, columns, H, W, 3] as one picture."""
    grid = rearrange(frames, "r c h w k -> (r h) (c w) k")
    Image.fromarray(np.ascontiguousarray(grid.numpy())).save(path)


def _plots(out: Path, results: Sequence[Result], panel: Panel) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        log.warning("no plots: matplotlib is not installed (pip install 'flashtalk[train]')")
        return
    figure, axes = pyplot.subplots(len(NAMES), 1, figsize=(9, 2.2 * len(NAMES)), sharex=True)
    for row, (axis, name) in enumerate(zip(axes, NAMES, strict=True)):
        for result in results:
            if len(result.series) > 1:
                axis.plot(np.arange(len(result.series)) + 0.5, result.series[:, row], label=result.name, lw=1)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    axes[-1].set_xlabel("seconds of rollout")
    figure.tight_layout()
    figure.savefig(out / "drift.png", dpi=110)
    pyplot.close(figure)
    n_people = min(SHOWN_PEOPLE, len(panel))
    figure, axes = pyplot.subplots(n_people, 1, figsize=(9, 1.8 * n_people), sharex=True, squeeze=False)
    fps = panel.encoders.base.sampling.fps
    for person, axis in enumerate(axes[:, 0]):
        truth = panel.gap[person, : results[0].gap.shape[1]].numpy()
        axis.plot(np.arange(len(truth)) / fps, truth / max(truth.max(), 1e-6), "k", lw=1.5, label="truth")
        for result in results:
            mine = result.gap[person].numpy()
            axis.plot(np.arange(len(mine)) / fps, mine / max(mine.max(), 1e-6), lw=0.8, label=result.name)
        axis.set_ylabel("gap")
    axes[0, 0].legend(fontsize=6)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(out / "lips.png", dpi=110)
    pyplot.close(figure)
