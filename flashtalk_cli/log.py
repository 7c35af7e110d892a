"""The only place that sets logging up. Logs go to stderr: stdout may be the video."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO


class RankFilter(logging.Filter):
    """Marks what ranks other than 0 say with their rank; where all are read together, lets their warnings pass only."""

    def __init__(self, rank: int, together: bool) -> None:
        super().__init__()
        self.rank, self.together = rank, together

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be shown; sets the `who` that the format prints."""
        record.who = f"rank {self.rank} " if self.rank else ""
        return not self.together or self.rank == 0 or record.levelno >= logging.WARNING


def setup(*, debug: bool = False, rank: int = 0, console: TextIO | None = None) -> None:
    """Log warnings to stderr; with `debug` all that our own modules say, and Python's warnings.

    Where stderr is a rank's own file, `console` is where all are read together, and of ranks other than 0 shows
    warnings only.
    Calling it again replaces what an earlier call set up.
    """
    shape = (
        "%(asctime)s %(who)s%(levelname)s %(name)s: %(message)s"
        if debug
        else "%(who)s%(levelname)s: %(message)s"
    )
    handlers = []
    for stream, together in ((sys.stderr, console is None), (console, True)):
        if stream is not None:
            handlers.append(handler := logging.StreamHandler(stream))
            handler.setFormatter(logging.Formatter(shape))
            handler.addFilter(RankFilter(rank, together))
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for ours in ("flashtalk_cli", "__main__"):  # the second is a module of ours that python -m runs
        logging.getLogger(ours).setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if debug else logging.ERROR)


def divert_stderr(path: Path) -> TextIO:
    """Write stderr, that of libraries in C too, to a file from now on; what stderr was before.

    Raises OSError when the file cannot be made.
    """
    before = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 2)
    os.close(file)
    return before
