"""Work beside the main stream of a GPU; on a CPU it is done where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """A second stream, for work that is wanted only later.

    What is made in it is read in the main stream after `join`. Memory is safe without further ado: it
    waits for the main stream before it begins, so nothing that is still read there is overwritten.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        on_gpu = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    @contextmanager
    def run(self) -> Iterator[None]:
        """What is computed inside begins after all that was asked for before, and holds nothing up."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is computed from here on may read all that was computed beside."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
