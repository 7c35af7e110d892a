"""Whether the ranks of a run are alive and get on, and which of them does not.

A rank that hangs takes all others with it: they wait for it in an exchange, some libraries
without end. Nobody can tell from a wait alone whether it is too long, so every rank says
how it is doing, twice a second, from a thread of its own, into the store that torchrun
keeps for the run: how many exchanges it began, how many rounds of work it finished. Every
rank reads what all say and judges by the same rules, on any count of hosts:

    *silent*   no word from a rank for SILENT_S: it is stopped, or its host is gone
    *dead*     its process is gone, as those on its machine see; they see too whether it is stopped
    *stuck*    nobody began an exchange for STUCK_S, or three times the longest gap so far:
               it is the rank that began the fewest, for the others wait for it
    *ended*    a rank that failed said so in its last word

A dead rank is told by the torchrun that started it, which knows why; the others only end.

*Silent* and *stuck* hold once a run is warm: a round may compile, load and tune for minutes. So the
first WARM_ROUNDS rounds of each kind of work are given FIRST_S, and only later ones teach what gaps are
usual. While any rank rests (the consumer of its frames is slow, a listener is silent) nobody is stuck.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from flashtalk_cli.parallel.traffic import Traffic

BEAT_S = 0.5
SILENT_S = 4.5
STUCK_S = 4.5
STUCK_GAPS = 3  # so many times the longest gap between exchanges that was seen in a warm round
FIRST_S = 600.0
WARM_ROUNDS = 2


class Store(Protocol):
    """What ranks write to and read from; torch's TCPStore is one."""

    def set(self, key: str, value: str, /) -> None:
        """Put a value."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """The values of all keys, waiting for those that are not there yet."""


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    host: str
    log: str  # where its log lies, on its host
    count: int = 0  # beats so far
    begun: int = 0  # exchanges with other ranks, on a GPU those that it came to
    rounds: int = 0  # rounds of one kind of work finished
    resting: bool = False
    last_word: str | None = None  # why it ended; empty: in order
    process: int = 0  # its number in `space`
    space: str = ""  # its machine, or what part of it processes can see

    def who(self, rank: int) -> str:
        """The rank, for an error."""
        return f"rank {rank} on {self.host}"


@dataclass(frozen=True)
class Verdict:
    """Why a run cannot go on, in one line; `told`: the rank that failed said so itself."""

    text: str
    told: bool = False


@dataclass
class Judge:
    """Looks at everybody's beats, time after time, with a clock that is given.

    `is_stopped`: whether a rank's process is known to be stopped, and not busy with loading.
    """

    size: int
    is_stopped: Callable[[Beat], bool] = lambda _: False
    _looked_s: float = field(default=float("-inf"), init=False)
    _moved_s: float = field(default=0.0, init=False)  # when an exchange was last begun
    _heard_s: list[float] = field(default_factory=list, init=False)
    _last: Sequence[Beat] = field(default=(), init=False)
    _longest_gap_s: float = field(default=0.0, init=False)
    _loaded: bool = field(default=False, init=False)  # a round was finished once, so libraries are loaded

    def look(self, beats: Sequence[Beat], now_s: float) -> Verdict | None:
        """The verdict on what all ranks, in order, last said; None while all is well."""
        for beat in beats:
            if beat.last_word:
                return Verdict(beat.last_word, told=True)
        if now_s - self._looked_s > SILENT_S / 2:  # we were stopped ourselves: what we know of others is old
            self._moved_s, self._heard_s = now_s, [now_s] * self.size
        elif self._last:
            self._compare(beats, now_s)
        self._looked_s, self._last = now_s, beats
        self._loaded = self._loaded or self._rounds > 0
        return self._silent(now_s) or self._stuck(now_s)

    def _compare(self, beats: Sequence[Beat], now_s: float) -> None:
        for rank, (before, after) in enumerate(zip(self._last, beats, strict=True)):
            if after.count != before.count:
                self._heard_s[rank] = now_s
        resting = any(beat.resting for beat in beats)
        if resting or [b.begun for b in beats] != [b.begun for b in self._last]:
            if not resting and self._rounds > 0:
                self._longest_gap_s = max(self._longest_gap_s, now_s - self._moved_s)
            self._moved_s = now_s

    @property
    def _rounds(self) -> int:
        return min(beat.rounds for beat in self._last)

    def _silent(self, now_s: float) -> Verdict | None:
        for rank, beat in enumerate(self._last):
            silent_s = now_s - self._heard_s[rank]
            if silent_s <= SILENT_S or beat.last_word is not None:
                continue
            if self._loaded or silent_s > FIRST_S or self.is_stopped(beat):
                what = f"gave no sign of life for {silent_s:.0f} s: it was stopped, or its host hangs"
                return Verdict(f"{beat.who(rank)} {what}; its log: {beat.log}")
        return None

    def _stuck(self, now_s: float) -> Verdict | None:
        stuck_s = now_s - self._moved_s
        warm = self._rounds >= WARM_ROUNDS
        limit_s = max(STUCK_S, STUCK_GAPS * self._longest_gap_s) if warm else FIRST_S
        if stuck_s <= limit_s or any(beat.last_word is not None for beat in self._last):
            return None
        begun = [beat.begun for beat in self._last]
        if min(begun) == max(begun):
            hosts = ", ".join(sorted({beat.host for beat in self._last}))
            return Verdict(
                f"all {self.size} ranks ({hosts}) have waited {stuck_s:.0f} s for one another in the "
                f"same exchange: their network hangs; log of rank 0: {self._last[0].log}"
            )
        rank = begun.index(min(begun))
        beat = self._last[rank]
        return Verdict(
            f"{beat.who(rank)} hangs: the others have waited {stuck_s:.0f} s for it; its log: {beat.log}"
        )


class Pulse:
    """This rank's beats, and its view of the others'; without a store it is silent and sees nobody."""

    def __init__(
        self,
        size: int = 1,
        rank: int = 0,
        store: Store | None = None,
        traffic: Traffic | None = None,
        *,
        host: str = "",
        log: str = "",
    ) -> None:
        self.rank = rank
        self._store = store
        self._traffic = traffic or Traffic()
        self._host, self._log = host, log
        self._space = process_space()
        self._keys = keys_of(size)
        self._count = self.rounds = 0
        self._resting = False
        self._lock = threading.Lock()  # a last word is the last
        self._ended = threading.Event()
        self._say(None)  # before ranks meet for the first time, so that whoever reads finds all

    def start(self, on_verdict: Callable[[Verdict], None]) -> None:
        """Beat and judge in a thread, which calls `on_verdict` once if the run cannot go on."""
        if self._store is not None:
            threading.Thread(target=self._watch, args=(on_verdict,), name="pulse", daemon=True).start()

    def round(self) -> None:
        """A round of work was finished, and the next one is like it."""
        self.rounds += 1

    def anew(self) -> None:
        """Another kind of work begins, whose first rounds may compile and load as those of the first."""
        self.rounds = 0

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, the run waits for somebody outside it, however long."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def end(self, word: str = "") -> None:
        """Say the last word, which tells the others why this rank ended; empty: in order."""
        with self._lock:
            if not self._ended.is_set():
                self._ended.set()
                self._say(word)

    def _say(self, last_word: str | None) -> None:
        if self._store is None:
            return
        self._count += 1
        beat = Beat(
            host=self._host,
            log=self._log,
            count=self._count,
            begun=self._traffic.begun,
            rounds=self.rounds,
            resting=self._resting,
            last_word=last_word,
            process=os.getpid(),
            space=self._space,
        )
        try:
            self._store.set(self._keys[self.rank], json.dumps(asdict(beat)))
        except RuntimeError:  # torchrun, or its host, is gone; whoever watches reads that too
            return

    def _watch(self, on_verdict: Callable[[Verdict], None]) -> None:
        assert self._store is not None
        who = f"rank {self.rank} on {self._host}"
        verdict = observe(self._store, self._keys, who, self._ended, self._beat, self._space)
        if verdict is not None and not self._ended.is_set():
            on_verdict(verdict)

    def _beat(self) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._say(None)


def keys_of(size: int) -> list[str]:
    """Where the beats of so many ranks lie in their store."""
    return [f"pulse-{rank}" for rank in range(size)]


def observe(
    store: Store,
    keys: list[str],
    who: str,
    ended: threading.Event,
    between: Callable[[], None] = lambda: None,
    space: str = "",
) -> Verdict | None:
    """Judge the beats under `keys` until a verdict, or None once `ended` is set; calls `between` each time.

    `who` is the observer, for the error of a store that went away; `space` is where it sees processes.
    """
    judge = Judge(len(keys), lambda beat: _is_seen(beat, space) and state_of(beat.process) in "Tt")
    while not ended.wait(BEAT_S):
        between()
        try:
            beats = [Beat(**json.loads(value)) for value in store.multi_get(keys)]
        except RuntimeError as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return Verdict(f"{who} lost torchrun's store: {first}", told=True)
        if verdict := judge.look(beats, time.monotonic()) or _dead(beats, space):
            return verdict
    return None


def _dead(beats: Sequence[Beat], space: str) -> Verdict | None:
    """The verdict on a rank whose process is gone without a word, if it ran where we can see that."""
    for rank, beat in enumerate(beats):
        if _is_seen(beat, space) and beat.last_word is None and state_of(beat.process) in "ZX":
            return Verdict(f"{beat.who(rank)}, process {beat.process}, died; its log: {beat.log}", told=True)
    return None


def _is_seen(beat: Beat, space: str) -> bool:
    """Whether its process runs where its number means the same as in `space`."""
    return bool(space) and beat.space == space


def process_space() -> str:
    """What tells processes that see each other by number from others; empty where nobody can say.

    Names of hosts do not: those of containers may be alike.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux, or hidden
        return ""


def state_of(process: int) -> str:
    """What the system says of a process in a letter, as ps does: T stopped, Z ended, X gone; ? hidden from us."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    except OSError:
        return "?"
    return state.split()[0]
