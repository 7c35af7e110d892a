"""The only place that sets logging up. Logs go to stderr: stdout may be the video."""

from __future__ import annotations

import logging
import sys


class RankFilter(logging.Filter):
    """Lets rank 0 speak, and of the other ranks only warnings and worse, marked with their rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be shown; sets the `who` that the format prints."""
        record.who = f"rank {self.rank} " if self.rank else ""
        return self.rank == 0 or record.levelno >= logging.WARNING


def setup(*, debug: bool = False, rank: int = 0) -> None:
    """Log warnings to stderr; with `debug` all that our own modules say, and Python's warnings.

    Calling it again replaces what an earlier call set up.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RankFilter(rank))
    shape = (
        "%(asctime)s %(who)s%(levelname)s %(name)s: %(message)s"
        if debug
        else "%(who)s%(levelname)s: %(message)s"
    )
    handler.setFormatter(logging.Formatter(shape))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("flashtalk_cli").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if debug else logging.ERROR)
