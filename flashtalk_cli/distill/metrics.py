"""What a run measures while it goes on: summed on the device, written to CSV and TensorBoard now and then."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtalk_cli.errors import FlashtalkError
from flashtalk_cli.parallel.ranks import Ranks

log = logging.getLogger(__name__)

CSV_FILE = "metrics.csv"


class Running:
    """Means since the last flush. Nothing is copied to the host in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Count a step's values in."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def flush(self, ranks: Ranks, step: int) -> dict[str, float]:
        """The means over steps and ranks, and begin anew. Raises FlashtalkError when one is not finite."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        means = ranks.mean(torch.stack([self._sums[name] / self._counts[name] for name in names]))
        found = dict(zip(names, means.tolist(), strict=True))
        self._sums, self._counts = {}, {}
        wrong = [name for name, value in found.items() if not math.isfinite(value)]
        if wrong:
            raise FlashtalkError(
                f"training diverged: {wrong[0]} is {found[wrong[0]]} at step {step}; resume from the last "
                "checkpoint with a lower learning rate"
            )
        return found


class Journal:
    """metrics.csv, and TensorBoard's files where it is installed; rank 0 writes."""

    def __init__(self, out: Path, resumed_step: int) -> None:
        self._path = out / CSV_FILE
        self._rows = [row for row in _read(self._path) if int(row["step"]) <= resumed_step]
        self._columns = list(self._rows[0]) if self._rows else []
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resumed_step + 1)
        except ImportError:
            log.info("tensorboard is not installed (pip install 'flashtalk[train]'): metrics go to CSV alone")
        if self._rows:
            self._rewrite()

    def write(self, step: int, values: dict[str, float]) -> None:
        """A row for `step`."""
        row = {"step": step, **{name: f"{value:.6g}" for name, value in values.items()}}
        if not set(row) <= set(self._columns):
            self._columns += [name for name in row if name not in self._columns]
            self._rows.append(row)
            self._rewrite()
        else:
            self._rows.append(row)
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _rewrite(self) -> None:
        with self._path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)

    def close(self) -> None:
        """Finish what is written behind."""
        if self._board is not None:
            self._board.close()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
