"""Replicas on an existing Ray cluster, one actor each: the same manifest, on more than one host.

Every host needs this program in the same version, and sees the manifest's files and the model under the
same paths. An actor holds a `LocalReplica` on its host, with the GPUs that Ray gave to it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from typing import Any

from flashtalk_cli.batch.clip import Clip, Setup
from flashtalk_cli.batch.replica import LocalReplica
from flashtalk_cli.errors import DeviceError, FlashtalkError, UsageError, WorkerError, by_name
from flashtalk_cli.events import Event, event
from flashtalk_cli.launch import CLEAN_END_S, Share

LOOK_S = 0.5  # how often a wait looks at the requests to end


def _ray() -> Any:
    try:
        return import_module("ray")
    except ModuleNotFoundError:
        raise UsageError("--ray needs Ray, which is not installed: pip install 'flashtalk[ray]'") from None


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the cluster at HOST:PORT, ray://HOST:PORT, or `auto`: the one of this machine.

    Raises UsageError without Ray, DeviceError when no cluster answers.
    """
    ray = _ray()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeviceError(
            f"no Ray cluster answers at {address} ({first}); start one with `ray start --head`"
        ) from None
    try:
        with redirect_stdout(sys.stderr):  # Ray prints what happens to the cluster, and ours may be read
            yield
    finally:
        ray.shutdown()


class Host:
    """An actor. Its methods return an Answer, since not every exception survives the way back."""

    def __init__(self, setup: str) -> None:
        self._requests: list[int] = []
        parsed = Setup.model_validate_json(setup)
        self._replica = LocalReplica(parsed, Share(), self._requests, lambda event: None, _to_stderr)

    def start(self) -> dict[str, Any]:
        """Load the networks."""
        return self._answer(self._replica.start)

    def render(self, clip: str) -> dict[str, Any]:
        """Render a clip."""
        return self._answer(lambda: self._replica.render(Clip.model_validate_json(clip)))

    def stop(self) -> None:
        """Ask what is going on to end; called beside it."""
        self._requests.append(1)

    def close(self) -> None:
        """End the worker."""
        self._replica.close()

    def _answer(self, act: Callable[[], Event | None]) -> dict[str, Any]:
        """What came of an act: `event`, or the `error` (class, message); and whether the replica is `alive`."""
        try:
            found: dict[str, Any] = {"event": act()}
        except FlashtalkError as error:
            found = {"error": (type(error).__name__, str(error))}
        return {**found, "alive": self._replica.alive}


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")  # which Ray keeps in the actor's log


class RayReplica:
    """A replica on the cluster, see `Replica`."""

    def __init__(
        self, setup: Setup, number: int, requests: Sequence[int], on_event: Callable[[Event], None]
    ) -> None:
        self._setup, self._number, self._requests, self._on_event = setup, number, requests, on_event
        self._ray = _ray()
        self._actor: Any = None
        self.alive = False

    def start(self) -> None:
        """Wait for a place, and load the networks there."""
        if self._actor is None:
            options = _resources(self._setup, self._ray.cluster_resources())
            actor = self._ray.remote(Host).options(max_concurrency=2, **options)
            self._actor = actor.remote(self._setup.model_dump_json())
        self._tell("place", "waiting for the cluster")
        self._answer(self._actor.start.remote())
        self._tell("ready", "on the cluster")

    def render(self, clip: Clip) -> Event:
        """Render a clip there."""
        found: Event = self._answer(self._actor.render.remote(clip.model_dump_json()))
        return found

    def close(self) -> None:
        """End the worker and its actor."""
        self.alive = False
        if self._actor is not None:
            with suppress(Exception):  # it may be gone already, and Ray's errors have no common base
                self._ray.get(self._actor.close.remote(), timeout=CLEAN_END_S)
            self._ray.kill(self._actor)
            self._actor = None

    def _tell(self, name: str, detail: str) -> None:
        self._on_event({**event("stage", name=name, detail=detail), "replica": self._number})

    def _answer(self, reference: Any) -> Any:
        """What an actor answers; an actor that dies, or does not end when asked to, is a WorkerError."""
        give_up = float("inf")
        try:
            while not self._ray.wait([reference], timeout=LOOK_S)[0]:
                if self._requests and give_up == float("inf"):
                    give_up = time.monotonic() + CLEAN_END_S
                    self._actor.stop.remote()
                if time.monotonic() > give_up:
                    raise WorkerError("the actor does not end")
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self.alive, self._actor = False, None
            raise WorkerError(f"the actor was lost: {str(error).splitlines()[0]}") from None
        self.alive = answer["alive"]
        if "error" in answer:
            kind, message = answer["error"]
            raise by_name(kind)(message)
        return answer["event"]


def _resources(setup: Setup, cluster: dict[str, float]) -> dict[str, float]:
    """What an actor asks of a cluster: a GPU for each process, or a core where it shall or must do without."""
    device = setup.preset.compute.device
    if device == "cpu" or (device == "auto" and not cluster.get("GPU")):
        return {"num_cpus": setup.processes, "num_gpus": 0}
    return {"num_cpus": 1, "num_gpus": setup.processes}
