"""What `ps` shows of this process: its command line, without the keys and tokens that stand in it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress

from flashtalk_cli.errors import UsageError
from flashtalk_cli.live.masking import HIDDEN, masked
from flashtalk_cli.media.live.targets import parse_target

NETWORK = ("rtmp", "srt", "whip", "udp")
ELSEWHERE = ("@", "env:")  # the secret does not stand in the command line


def shown_command(
    arguments: Sequence[str], targets: Sequence[tuple[str, str]], sound: str | None, token: str | None
) -> str:
    """A command line as it may be seen. `targets`: kind and place; `sound` and `token` as they were typed."""
    words = list(arguments)
    for kind, place in targets:
        if kind in NETWORK and not place.startswith(ELSEWHERE):
            with suppress(UsageError):  # it is told in a moment, without the address
                words = [parse_target(kind, place).masked(word) if place in word else word for word in words]  # type: ignore[arg-type]
    if sound is not None and "://" in sound:
        words = [masked(sound, word) for word in words]
    if token is not None and not token.startswith(ELSEWHERE):
        words = [word.replace(token, HIDDEN) if word.endswith(token) else word for word in words]
    return shlex.join(["flashtalk", *words])


def hide(targets: Sequence[tuple[str, str]], sound: str | None, token: str | None) -> None:
    """Have `ps` show this process without secrets, from now on. What started it (a shell's history) stays."""
    with suppress(ImportError):  # an installation older than this
        from setproctitle import setproctitle

        setproctitle(shown_command(sys.argv[1:], targets, sound, token))
