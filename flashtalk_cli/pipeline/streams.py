"""Work recorded once on a GPU and replayed; on a CPU it is called as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as nested

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass
class _Recording:
    given: object
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]
    inputs: tuple[Tensor, ...] = ()
    output: Any = None
    graph: torch.cuda.CUDAGraph | None = None


class Graphs:
    """Functions of tensors as CUDA graphs: thousands of launches become one, and none waits for Python.

    The first call with new shapes runs as it is, so that kernels are built and caches filled; the second
    is recorded, and that and all later ones are replayed. Where recording fails it is said once, and
    everything runs as it is.

    before: called before each replay, such as to count the exchanges with other ranks that are in it.
    agree: whether what is so here is so on any rank. An exchange is recorded by all ranks or by none.
    """

    def __init__(
        self,
        before: Callable[[], None] = lambda: None,
        agree: Callable[[bool], bool] = lambda failed: failed,
    ) -> None:
        self._before, self._agree = before, agree
        self._recordings: dict[str, _Recording] = {}
        # A stream of its own: what libraries keep by stream is no other recorder's.
        self._stream: torch.cuda.Stream | None = None
        self.works = True  # nothing failed to be recorded so far

    def __call__(self, name: str, given: object, function: Callable[..., T], *inputs: Tensor) -> T:
        """function(*inputs), which is a tensor or tensors in tuples.

        given: all that the function reads besides, an object or a tuple of such, which must not change; with
        another it is another function and is recorded anew. One recording is kept under a name.
        """
        held = self._seen(name, given, inputs)
        if held is None or not self._replay(name, held, function, inputs):
            return function(*inputs)
        return nested.tree_map_only(Tensor, torch.clone, held.output)  # the next replay writes there again

    def kept(self, name: str, given: object, function: Callable[..., T], *inputs: Tensor) -> T:
        """The same, in the recording's own memory: the very object each time, so that another function may be given it.

        The next call writes there again. It is recorded by the first call, which is of that memory, too.
        """
        held = self._seen(name, given, inputs)
        if held is None and self.works:
            held = self._recordings[name]
            self._recordings = {name: held}  # what reads the old memory is of no use without it
            function(*inputs)
        if held is None or not self._replay(name, held, function, inputs):
            return function(*inputs)
        found: T = held.output
        return found

    def _seen(self, name: str, given: object, inputs: tuple[Tensor, ...]) -> _Recording | None:
        """The recording of that name, where a call like this one was before; else a place for one."""
        if not self.works:
            return None
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        held = self._recordings.get(name)
        if held is not None and _same(held.given, given) and held.shapes == shapes:
            return held
        # In the place of the old one, whose memory is free for this call then.
        self._recordings[name] = _Recording(given, shapes)
        return None

    def _replay(
        self, name: str, held: _Recording, function: Callable[..., object], inputs: tuple[Tensor, ...]
    ) -> bool:
        """Replay a recording, made now where there is none; whether there was one to replay."""
        if held.graph is None and not self._record(name, held, function, inputs):
            return False
        assert held.graph is not None
        torch._foreach_copy_(held.inputs, inputs)
        self._before()
        held.graph.replay()
        return True

    def clear(self) -> None:
        """Give the recordings up: a library whose exchanges are in them cannot end before."""
        self._recordings.clear()

    def _record(
        self, name: str, held: _Recording, function: Callable[..., object], inputs: tuple[Tensor, ...]
    ) -> bool:
        """Record a function, or leave all recordings where that failed on any rank; whether it was recorded."""
        reason = "another rank could not record it"
        try:
            self._stream = self._stream or torch.cuda.Stream()
            _record(held, function, inputs, self._stream)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
        self.works = not self._agree(held.graph is None)
        if not self.works:
            held.graph = held.output = None
            self._recordings.clear()
            torch.cuda.synchronize()
            _log.warning("CUDA graphs are left out, %s cannot be recorded: %s", name, reason)
        return self.works


def _record(
    held: _Recording,
    function: Callable[..., object],
    inputs: tuple[Tensor, ...],
    stream: torch.cuda.Stream,
) -> None:
    held.inputs = tuple(x.clone() for x in inputs)
    graph = torch.cuda.CUDAGraph()
    # Other threads (delivery of frames, a live session's) may use CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        held.output = function(*held.inputs)
    held.graph = graph


def _same(a: object, b: object) -> bool:
    """Whether these are the very same objects, one or a tuple of them; numbers are by their value."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, int) and a == b)
