"""A replica: one warm worker, of one or several processes, that renders a clip at a time."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from flashtalk_cli import launch
from flashtalk_cli.batch.clip import Clip, Setup
from flashtalk_cli.config import ServeJob
from flashtalk_cli.errors import WorkerError
from flashtalk_cli.events import LAST, Event

READY = "ready"  # the stage in which a worker waits for clips, see serving.py


class Replica(Protocol):
    """What renders clips: here, or on another host."""

    @property
    def alive(self) -> bool:
        """Whether it is ready for a clip."""

    def start(self) -> None:
        """Load the networks. Raises the error that prevents it."""

    def render(self, clip: Clip) -> Event:
        """Render a clip: its `clip` event, also when it failed.

        Raises WorkerError when the replica died of it, or beside it, and is no longer alive; any other
        FlashtalkError is the clip's own, after which it may be alive or not.
        """

    def close(self) -> None:
        """Let it end; wait until it has."""


class LocalReplica:
    """A replica on this machine. `requests` are those to end, see `launch.run`."""

    def __init__(
        self,
        setup: Setup,
        share: launch.Share,
        requests: list[int],
        on_event: Callable[[Event], None],
        on_log: Callable[[str], None],
    ) -> None:
        self._setup, self._share, self._requests = setup, share, requests
        self._on_event, self._on_log = on_event, on_log
        self._words: queue.Queue[Event | Exception] = queue.Queue()  # of this life: its end is the last
        self._thread: threading.Thread | None = None
        self._orders = -1
        self._line: int | None = None  # of the manifest, what is being rendered

    @property
    def alive(self) -> bool:
        """See `Replica`."""
        return self._thread is not None

    def start(self) -> None:
        """See `Replica`."""
        assert not self.alive
        read_end, self._orders = os.pipe()
        self._words = queue.Queue()
        self._thread = threading.Thread(target=self._live, args=(read_end, self._words), daemon=True)
        self._thread.start()
        self._next_word()

    def render(self, clip: Clip) -> Event:
        """See `Replica`."""
        self._line = clip.line
        with clip.job() as job:
            line = job.model_dump_json().encode() + b"\n"
            with suppress(BrokenPipeError):  # it has just died; its last word says of what
                while line:
                    line = line[os.write(self._orders, line) :]
            return self._next_word()

    def close(self) -> None:
        """See `Replica`."""
        if self._thread is not None:
            os.close(self._orders)
            self._thread.join()
            self._thread = None

    def _next_word(self) -> Event:
        word = self._words.get()
        if isinstance(word, Exception):
            self.close()
            raise word
        return word

    def _live(self, read_end: int, words: queue.Queue[Event | Exception]) -> None:
        """A worker's life, in a thread of its own."""

        def on_event(happened: Event) -> None:
            if happened["event"] == "clip":
                words.put(happened)
                return
            if happened["event"] == "stage" and happened["name"] == READY:
                words.put(happened)
            if happened["event"] not in LAST:
                where = {} if self._line is None else {"line": self._line}
                self._on_event({**happened, "replica": self._share.index, **where})

        try:
            launch.run(
                ServeJob(preset=self._setup.preset, prompts=self._setup.prompts),
                on_event,
                debug=self._setup.debug,
                stdin=read_end,
                on_log=self._on_log,
                processes=self._setup.processes,
                share=self._share,
                requests=self._requests,
            )
            words.put(WorkerError("the worker was asked to end"))
        except Exception as error:
            words.put(error)
        finally:
            os.close(read_end)
