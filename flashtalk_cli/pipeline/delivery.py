"""Frames from a GPU to host memory while the GPU goes on with the next ones."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtalk_cli.pipeline.marks import Mark, unmarked


class Delivery:
    """Copies pieces of frames, one after another, on a stream beside the one that makes them.

    The copy of a piece runs while the next piece is made, so a piece is given out when the next one comes.
    On a CPU there is nothing to copy, and a piece is given out at once. Where a rank has none, None is passed on.
    """

    def __init__(self, device: torch.device, mark: Mark = unmarked) -> None:
        self._mark = mark
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: tuple[Tensor, torch.cuda.Event] | None = None

    def push(self, frames: Tensor | None) -> Tensor | None:
        """Take a piece, uint8 [T, H, W, 3]; the piece that is in host memory now, if one is.

        What comes out of a GPU lies in pinned memory of its own, which lives as long as the tensor.
        """
        if self._stream is None or frames is None:
            self._mark("to host")
            return frames
        ready = self.flush()
        host = torch.empty_like(frames, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(frames.device))
        with torch.cuda.stream(self._stream):
            self._mark("")
            host.copy_(frames, non_blocking=True)
            self._mark("to host")
        frames.record_stream(self._stream)
        self._under_way = (host, self._stream.record_event())
        return ready

    def flush(self) -> Tensor | None:
        """Wait for the piece that is under way, if one is."""
        if self._under_way is None:
            return None
        host, copied = self._under_way
        self._under_way = None
        copied.synchronize()
        return host
