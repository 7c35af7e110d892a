"""How long to wait before the next attempt: a pure rule."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

FACTOR, CAP_S = 2.0, 30.0
SETTLED_S = 10.0  # live for that long, an outage counts as a new one


@dataclass
class Backoff:
    """Waits that double from `first_s`, each drawn between its half and its whole: many clients come apart."""

    rng: random.Random
    first_s: float
    _attempts: int = field(default=0, init=False)

    def wait_s(self, live_s: float) -> float:
        """The wait after an attempt that was live for `live_s` seconds (0: it never was)."""
        if live_s >= SETTLED_S:
            self._attempts = 0
        whole_s = min(CAP_S, self.first_s * FACTOR ** min(self._attempts, 32))
        self._attempts += 1
        return whole_s * self.rng.uniform(0.5, 1.0)
