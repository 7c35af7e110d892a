"""A report as one HTML page that needs nothing else: no script, no network, plots as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashtalk_cli.bench import words


def page(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a report; `others` are reports of other counts of GPUs."""
    return words.title(report)
