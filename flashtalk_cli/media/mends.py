"""What helps when ffmpeg cannot write a file, by the cause that it or the system gives."""

from __future__ import annotations

from collections.abc import Iterable

MENDS = {
    "No space left": "free some space or write elsewhere",
    "quota": "free some space or write elsewhere",
    "SIGXFSZ": "raise the limit on file sizes (ulimit -f) or write elsewhere",
    "File too large": "raise the limit on file sizes (ulimit -f) or write elsewhere",
    "no progress": "a stopped process or a disk that does not answer held it up; run again or write elsewhere",
    "SIGKILL": "somebody or a lack of memory ended it; run again",
}


def mend_of(why: str) -> str:
    """What to do about a cause."""
    return next((mend for sign, mend in MENDS.items() if sign in why), "flashtalk doctor checks ffmpeg")


def known(lines: Iterable[str]) -> str:
    """The cause that ffmpeg gave, if it is one that we have a mend for: it is not always in the last line."""
    found = [line for line in lines if any(sign in line for sign in MENDS)]
    return found[0].rpartition(": ")[2] if found else ""
