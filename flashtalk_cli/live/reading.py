"""An ffmpeg that reads for hours: its words are kept to the last few, and it can be ended by another thread."""

from __future__ import annotations

import collections
import logging
import subprocess
import threading
from types import TracebackType
from typing import Any

from flashtalk_cli.media.ffmpeg import command

log = logging.getLogger(__name__)

KEPT_LINES = 20
DYING_S = 2.0


class LongReading:
    """ffmpeg writing to a pipe that we read; a context that ends it."""

    def __init__(self, stream: Any) -> None:
        self._process = subprocess.Popen(
            command(stream),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._drainer = threading.Thread(target=self._drain, name="source-stderr", daemon=True)
        self._drainer.start()

    def read(self, n_bytes: int) -> bytes:
        """Up to so many bytes, as soon as there are some; b"" at the end."""
        assert self._process.stdout is not None
        return self._process.stdout.read(n_bytes) or b""

    def outcome(self) -> tuple[int, list[str]]:
        """Exit status and the last lines of stderr, once everything was read."""
        status = self._process.wait()
        self._drainer.join(DYING_S)
        return status, list(self._lines)

    def end(self) -> None:
        """End ffmpeg, from any thread; harmless when done twice."""
        self._process.kill()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in iter(lambda: stderr.readline(4096), b""):
                text = line.decode(errors="replace").rstrip()
                log.debug("ffmpeg: %s", text)
                self._lines.append(text)

    def __enter__(self) -> LongReading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._process.wait()
        self._drainer.join(DYING_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
