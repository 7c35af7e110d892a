"""Monotonic time, and waiting in it: the one place to put an invented clock in its stead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Clock:
    """The machine's monotonic clock. The wall clock, which people and NTP set, is never asked."""

    def now_s(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait_for(
        self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None
    ) -> bool:
        """Wait until `ready()`, asked anew whenever `changed` is notified; False after the timeout."""
        with changed:
            return changed.wait_for(ready, timeout_s)
