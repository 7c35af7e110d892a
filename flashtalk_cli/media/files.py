"""Checks of input files that need no decoder, and names fit for a one-line message."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from flashtalk_cli.errors import InputError

FULL_BYTES = 1 << 20  # a disk with less to give is full
ADDRESS = re.compile(r"(https?|ftp|data|s3):/*", re.IGNORECASE)  # as a path has it: with a single slash


def shown(path: Path | str) -> str:
    """A file's name for a message: always one line, always printable, whatever bytes the name has."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_text(path: Path) -> bool:
    """Whether the name is Unicode: jobs travel as JSON and ffmpeg's command line as text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_file(path: Path, wanted: str) -> int:
    """Size in bytes of a regular file that is there, readable and not empty; `InputError` says which it is not.

    `wanted` names what would do, such as "a PNG or JPEG picture".
    """
    if not is_text(path):
        raise InputError(f"{shown(path)}: its name is not valid UTF-8; rename it")
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise InputError(f"{shown(path)}: is a folder; give {wanted}")
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{shown(path)}: is not a regular file; save it to disk first and give {wanted}")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        if ADDRESS.match(str(path)):
            text = ADDRESS.sub(r"\1://", shown(path), count=1)
            raise InputError(
                f"{text}: is an address, not a file; save it to disk first and give {wanted}"
            ) from None
        raise InputError(f"{shown(path)}: no such file; give {wanted}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown(path)}: cannot be read ({reason}); give {wanted}") from None
    if found.st_size == 0:
        raise InputError(f"{shown(path)}: is empty (0 bytes); give {wanted}")
    return found.st_size


def disk_is_full(place: int | Path) -> bool:
    """Whether the disk that a descriptor or a folder lies on has nothing left to give."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize < FULL_BYTES
