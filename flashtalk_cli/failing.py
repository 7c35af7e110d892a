"""How a rank ends that cannot go on: it says why, to the parent, to the other ranks and in its log."""

from __future__ import annotations

import os
import socket
import threading
import traceback
from pathlib import Path

from flashtalk_cli import events
from flashtalk_cli.errors import PeerLost
from flashtalk_cli.events import Emitter
from flashtalk_cli.parallel.pulse import SILENT_S
from flashtalk_cli.parallel.ranks import Ranks, lost_peers

VERDICT_S = SILENT_S + 1.0  # within which a rank that lost another is told why


def reason(error: Exception, ranks: Ranks, stop: threading.Event) -> Exception:
    """The error itself, or `PeerLost` where it is the effect of another rank's end.

    That one is waited for to say why: torchrun ends this process if it knows, else the pulse does.
    """
    if ranks.size == 1 or (lost := lost_peers(error)) is None:
        return error
    stop.wait(VERDICT_S)
    effect = PeerLost(lost)
    effect.__cause__ = error
    return effect


def fail(emitter: Emitter, error: Exception, ranks: Ranks, rank_log: Path | None = None) -> int:
    """Say why this rank ends; the exit code. Of several ranks, this one ends here."""
    happened = events.error(error)
    code: int = happened["exit_code"]
    if ranks.size == 1:
        emitter.send(happened)
        return code
    who = f"rank {ranks.rank} on {socket.gethostname()}"
    text = f"{who}: {happened['message']}; its log: {rank_log or 'its stderr'}"
    emitter.send({**happened, "message": text})
    ranks.pulse.end(text)
    traceback.print_exception(type(error), error, error.__traceback__)
    emitter.close()
    os._exit(code)  # libraries may wait for the lost ranks while they are torn down
