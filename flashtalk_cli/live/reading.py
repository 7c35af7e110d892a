"""An ffmpeg that reads for hours: its words are kept to the last few, and it can be ended by another thread.

Every user of the machine can read a command line (`ps`), and addresses of sound hold keys and passwords. So
ffmpeg gets an address in a list of one that it reads from a pipe, with the options that go with it.
"""

from __future__ import annotations

import collections
import functools
import logging
import os
import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from flashtalk_cli.media.ffmpeg import QUIET, command, find_ffmpeg

log = logging.getLogger(__name__)

KEPT_LINES = 20
CAUSE_BYTES = 1 << 20  # what was said before so much more sound came (5.5 s) is not why it ended
DYING_S = 2.0
LIST = "{list}"  # in a command line: where the list comes from


class LongReading:
    """ffmpeg writing to a pipe that we read; a context that ends it.

    `listed` is what it reads as `LIST`; `masked` takes the secrets out of what it says.
    """

    def __init__(self, stream: Any, listed: bytes, masked: Callable[[str], str]) -> None:
        self._masked = masked
        read_end, write_end = os.pipe()
        self._list_name = f"pipe:{read_end}: "
        try:
            os.write(write_end, listed)
            os.close(write_end)
            self._process = subprocess.Popen(
                [f"pipe:{read_end}" if word == LIST else word for word in command(stream)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                pass_fds=(read_end,) if listed else (),
            )
        finally:
            os.close(read_end)
        self._n_read = 0  # bytes; counts for ever
        self._lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=KEPT_LINES)
        self._drainer = threading.Thread(target=self._drain, name="source-stderr", daemon=True)
        self._drainer.start()

    def read(self, n_bytes: int) -> bytes:
        """Up to so many bytes, as soon as there are some; b"" at the end."""
        assert self._process.stdout is not None
        data = self._process.stdout.read(n_bytes) or b""
        self._n_read += len(data)
        return data

    def outcome(self) -> tuple[int, list[str]]:
        """Exit status and what it said last, without secrets, once everything was read."""
        status = self._process.wait()
        self._drainer.join(DYING_S)
        return status, [text for n_read, text in self._lines if self._n_read - n_read < CAUSE_BYTES]

    def end(self) -> None:
        """End ffmpeg, from any thread; harmless when done twice."""
        self._process.kill()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in iter(lambda: stderr.readline(4096), b""):
                text = self._masked(line.decode(errors="replace").rstrip())
                text = text.removeprefix(self._list_name)  # which tells a user nothing
                log.debug("ffmpeg: %s", text)
                self._lines.append((self._n_read, text))

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


def list_of_one(url: str, options: dict[str, Any]) -> bytes:
    """An address with its options, as ffmpeg's concat demuxer reads it."""
    quoted = url.replace("'", "'\\''")
    lines = [
        "ffconcat version 1.0",
        f"file '{quoted}'",
        *(f"option {key} {value}" for key, value in options.items()),
    ]
    return "\n".join([*lines, ""]).encode()


@functools.lru_cache(maxsize=1)
def reads_lists() -> bool:
    """Whether this ffmpeg takes options in a list (since 5.0), found by trying."""
    words = [find_ffmpeg(), *QUIET, "-f", "concat", "-i", "pipe:0", "-f", "null", "-"]
    try:
        ended = subprocess.run(
            words, input=list_of_one("x", {"probesize": 32}), capture_output=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return b"unknown keyword" not in ended.stderr
