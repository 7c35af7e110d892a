"""The ffmpeg program: finding it, asking what it can do, running it to its end or reading from it.

The system's own ffmpeg comes first, the one that imageio-ffmpeg brings is for machines without.
Command lines are built with ffmpeg-python, whose `file:` inputs here make any name safe (one that
begins with a dash, or holds a colon) and keep a playlist from reaching for the network.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import ffmpeg

from flashtalk_cli.errors import OutputError

log = logging.getLogger(__name__)

QUIET = ("-hide_banner", "-nostdin", "-v", "error")
PROTOCOLS = "file,pipe"

# Any layout becomes one that every codec we write takes.
MONO_OR_STEREO = "aformat=channel_layouts=mono|stereo"

# Lines that only say that there was another one.
NOT_THE_CAUSE = re.compile(
    r"Conversion failed|Terminating thread|Task finished|Nothing was written|Last message repeated"
    r"|Error closing file|Error opening (input|output) files?\b",
)


@functools.lru_cache(maxsize=1)
def find_ffmpeg() -> str:
    """Path of the ffmpeg to use: the first that runs and has libx264, else the first that runs.

    Raises `OutputError` when there is none.
    """
    working = [program for program in candidates() if encoders(program)]
    for program in working:
        if "libx264" in encoders(program):
            return program
    if not working:
        raise OutputError("no ffmpeg found; install it (apt install ffmpeg) or pip install imageio-ffmpeg")
    return working[0]


def candidates() -> Iterable[str]:
    """Every ffmpeg of this machine, the one to prefer first; whether it runs is not asked."""
    on_path = shutil.which("ffmpeg")
    if on_path:
        yield on_path
    try:
        import imageio_ffmpeg

        yield imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        log.debug("imageio-ffmpeg brings no ffmpeg here")


@functools.lru_cache(maxsize=4)
def encoders(program: str | None = None) -> frozenset[str]:
    """Names of the encoders compiled into that ffmpeg; empty when the program does not run.

    That a name is in the list does not mean that it opens: NVENC needs a GPU and a driver.
    """
    listing = _stdout_of(program or find_ffmpeg(), "-encoders").rpartition("------")[2]
    return frozenset(line.split()[1] for line in listing.splitlines() if len(line.split()) > 1)


@functools.lru_cache(maxsize=16)
def listed(program: str, *what: str) -> frozenset[str]:
    """All words of a listing of that ffmpeg, such as `-muxers` or `-protocols`; empty when it does not run."""
    return frozenset(_stdout_of(program, *what).split())


def version(program: str | None = None) -> str:
    """Version of ffmpeg as it writes it, such as `5.1.9-0+deb12u1`."""
    found = re.search(
        r"^ffmpeg version (\S+)", _stdout_of(program or find_ffmpeg(), "-version"), re.MULTILINE
    )
    return found[1] if found else "unknown"


def _stdout_of(program: str, *options: str) -> str:
    try:
        return subprocess.run(
            [program, "-hide_banner", *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=True,
            text=True,
            errors="replace",
        ).stdout
    except (OSError, subprocess.SubprocessError):
        log.debug("%s %s does not run", program, options, exc_info=True)
        return ""


def file_input(path: Path, **options: Any) -> Any:
    """An ffmpeg-python input that reads a local file, whatever its name looks like."""
    return ffmpeg.input(f"file:{path}", protocol_whitelist=PROTOCOLS, **options)


def command(stream: Any) -> list[str]:
    """The command line of an ffmpeg-python output: quiet, overwriting, deaf to the terminal."""
    return list(ffmpeg.compile(stream, cmd=[find_ffmpeg(), *QUIET], overwrite_output=True))


def run(stream: Any, data: bytes = b"") -> tuple[int, list[str]]:
    """Run ffmpeg to its end with `data` on its stdin: exit status and lines of stderr."""
    ended = subprocess.run(command(stream), input=data, capture_output=True, start_new_session=True)
    return ended.returncode, ended.stderr.decode(errors="replace").splitlines()


R = TypeVar("R", bound="Reading")


class Reading:
    """ffmpeg writing to a pipe that we read; stderr goes to a file, so neither side can wait for the other.

    Leaving the context ends ffmpeg, whether it was done or not.
    """

    def __init__(self, stream: Any) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
        self._process = subprocess.Popen(
            command(stream),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    @property
    def stdout(self) -> IO[bytes]:
        """What ffmpeg writes."""
        assert self._process.stdout is not None
        return self._process.stdout

    def outcome(self) -> tuple[int, list[str]]:
        """Exit status and lines of stderr, once `stdout` was read to its end."""
        status = self._process.wait()
        self._errors.seek(0)
        return status, self._errors.read().decode(errors="replace").splitlines()

    def close(self) -> None:
        """End ffmpeg and let go of its pipe; harmless when done twice."""
        self._process.kill()
        self._process.wait()
        self.stdout.close()
        self._errors.close()

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def widen(pipe: int) -> None:
    """Let a pipe hold 1 MiB, where the system lets us: what lies in it outlives a killed writer."""
    resize(pipe, 1 << 20)


def resize(pipe: int, n_bytes: int) -> None:
    """Let a pipe hold so much, where the system lets us."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, n_bytes)


def cause(status: int, lines: Iterable[str]) -> str:
    """Why ffmpeg ended, in a few words: its last line that tells something, else its exit status."""
    if status < 0:
        return f"killed by {_signal_name(-status)}"
    told = [line for line in lines if line.strip() and not NOT_THE_CAUSE.search(line)]
    if not told:
        return f"exit status {status}, no message"
    # "[mov,mp4 @ 0x55ced3fbe8c0] " in front tells a user nothing
    return re.sub(r"^((\[[^\]]*\] *)+|file:.*: )", "", told[-1]).replace("file:", "").strip()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
