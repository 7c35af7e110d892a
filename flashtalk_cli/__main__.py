"""`flashtalk` and `python -m flashtalk_cli`."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE


def _end(number: int, frame: FrameType | None) -> None:
    """End like Ctrl-C does: temporary folders are removed on the way out."""
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line of this process and exit with its code."""
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` ignores it
        signal.signal(signal.SIGHUP, _end)
    try:
        from flashtalk_cli.cli.app import run  # takes its time to load, and may be interrupted there

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    main()
