"""Which windows and pictures of a folder's clips belong together, worked out once: what the pool draws from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choices:
    """Some pictures for each of N windows."""

    table: Tensor  # int64 [N, most]: their numbers, the first `counts` of each row
    counts: Tensor  # int64 [N]

    @staticmethod
    def of(numbers: list[list[int]]) -> Choices:
        """From a list a window."""
        most = max(1, max(map(len, numbers)))
        table = torch.tensor([found + [0] * (most - len(found)) for found in numbers])
        return Choices(table, torch.tensor([len(found) for found in numbers]))

    def to(self, device: torch.device) -> Choices:
        """The same there."""
        return Choices(self.table.to(device), self.counts.to(device))


@dataclass(frozen=True)
class Tables:
    """N windows and M pictures of the same clips."""

    start: Tensor  # int64 [N]: a window's first frame in its clip
    clip: Tensor  # int64 [N]
    picture_clip: Tensor  # int64 [M]
    picture_frame: Tensor  # int64 [M]

    def _places(self) -> Iterator[list[tuple[int, int]]]:
        """For each window its clip's pictures: their numbers, and frames counted from the window's first."""
        of_clip: dict[int, list[tuple[int, int]]] = {}
        for number, clip in enumerate(self.picture_clip.tolist()):
            of_clip.setdefault(clip, []).append((number, int(self.picture_frame[number])))
        for start, clip in zip(self.start.tolist(), self.clip.tolist(), strict=True):
            yield [(number, frame - start) for number, frame in of_clip.get(clip, [])]

    def own(self) -> Tensor:
        """For each window the picture that is its first frame; -1: none."""
        return torch.tensor([next((n for n, at in shown if at == 0), -1) for shown in self._places()])

    def outside(self, n_frames: int) -> Choices:
        """For each window the pictures that are none of the n_frames from its first on."""
        return Choices.of([[n for n, at in shown if not 0 <= at < n_frames] for shown in self._places()])

    def of_rollouts(self, n_frames: int, span: int) -> Choices:
        """For each window of n_frames the pictures outside the `span` frames from its first on; else that first
        one; where it is no picture, those outside the window."""
        choices = []
        for shown in self._places():
            outside = [n for n, at in shown if not 0 <= at < span]
            own = [n for n, at in shown if at == 0]
            choices.append(outside or own or [n for n, at in shown if not 0 <= at < n_frames])
        return Choices.of(choices)

    def chains(self, new_frames: int) -> tuple[Tensor, Tensor]:
        """For each window: the one that follows it as the next chunk (itself: none), and how many do, itself counted."""
        places = {pair: i for i, pair in enumerate(zip(self.clip.tolist(), self.start.tolist(), strict=True))}
        following = [places.get((clip, start + new_frames), -1) for clip, start in places]
        run = [1] * len(following)
        for place in sorted(range(len(run)), key=lambda i: -int(self.start[i])):
            if following[place] >= 0:
                run[place] = 1 + run[following[place]]
        kept = [place if found < 0 else found for place, found in enumerate(following)]
        return torch.tensor(kept), torch.tensor(run)
