"""The end of a stream on request: within a few seconds, whatever the model is in the middle of.

A request to stop is looked at between pieces of a chunk, and a slow machine may work on one for long. So a
thread watches too. When the loop does not come to its end within `GRACE_S`, that thread writes out what is
there in the loop's place, and the process ends with the model still at work.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from flashtalk_cli.errors import FlashtalkError

log = logging.getLogger(__name__)

GRACE_S = 0.8  # for the loop to come to its end by itself
LOOK_UP_S = 0.2


class Ending:
    """Does once what ends a stream: called when the loop has ended, or by the thread of `watched`."""

    def __init__(self, stop: threading.Event, end: Callable[[bool], int]) -> None:
        self._stop = stop
        self._end = end
        self._lock = threading.Lock()
        self._called = False
        self._code = FlashtalkError.exit_code

    def __call__(self, late: bool = False) -> int:
        """End it; the exit code. `late` is whether the loop is still at work. Who comes second waits for the first."""
        with self._lock:
            if not self._called:
                self._called = True
                self._code = self._end(late)
            return self._code

    def watched(self) -> AbstractContextManager[None]:
        """While the context is open, a request to stop that the loop does not come to ends the process."""

        return outlived(self._stop, GRACE_S, lambda: self(late=True))


def outlived(stop: threading.Event, grace_s: float, end: Callable[[], int]) -> AbstractContextManager[None]:
    """While the context is open, a request to stop ends the process `grace_s` later.

    `end`, called in a thread, does what has to be done before, and gives the exit code.
    """

    def outlive(over: threading.Event) -> None:
        if over.wait(grace_s):
            return
        try:
            leave(end())
        except Exception:
            log.exception("the stream could not be ended in order")
            leave(FlashtalkError.exit_code)

    return on_request(stop, outlive)


@contextmanager
def on_request(stop: threading.Event, do: Callable[[threading.Event], None]) -> Iterator[None]:
    """While the context is open, a request to stop calls `do`, in a thread; it gets what is set at the context's end."""
    over = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_UP_S):
            if over.is_set():
                return
        do(over)

    threading.Thread(target=watch, name="ending", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def leave(code: int) -> None:
    """End the process at once, with everything written: Python would take seconds to take torch down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def heard_at_once(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM although the main thread is inside a long call, in which Python runs no handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def listen() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM:
                stop.set()
        os.close(read_end)

    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)
