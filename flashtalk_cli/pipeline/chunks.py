"""Which samples a chunk hears, and which feature rows each of its frames sees.

Video frame f is on screen while samples [f, f + 1) * samples_per_frame sound. Chunk c adds
frames [c n, (c + 1) n) with n = new_frames, and begins with the motion frames before them.

It hears `context_s` of sound that ends `lookahead_s` after its last frame. With a look-ahead
of zero this is the released program's live window, whose last frames have nothing after them
to see; a file knows what follows, so there the last frames need not guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtalk_cli.config import Hearing, Sampling

WINDOW_FRAMES = 5  # a frame sees features of itself and of two neighbours on either side


@dataclass(frozen=True)
class Heard:
    """The stretch of sound that a chunk hears."""

    start_sample: int  # may be negative: there is silence before the beginning
    stop_sample: int  # may lie beyond the end: there is silence after it
    n_frames: int  # feature rows that it is encoded to
    first_frame: int  # row of the chunk's first (motion) frame


def count(n_frames: int, sampling: Sampling) -> int:
    """Chunks that a video of n_frames needs; the last may be longer than what is left."""
    return -(-n_frames // sampling.new_frames)


def heard_by(index: int, sampling: Sampling, hearing: Hearing) -> Heard:
    """The samples and feature rows of chunk `index`."""
    return heard_from((index + 1) * sampling.new_frames - sampling.chunk_frames, sampling, hearing)


def heard_from(start_frame: int, sampling: Sampling, hearing: Hearing) -> Heard:
    """The samples and feature rows of a chunk whose first (motion) frame is `start_frame`."""
    lookahead_frames = round(hearing.lookahead_s * sampling.fps)
    n_frames = round(hearing.context_s * sampling.fps)
    if n_frames < sampling.chunk_frames + lookahead_frames:
        raise ValueError(f"a context of {n_frames} frames is shorter than a chunk and its look-ahead")
    stop_frame = start_frame + sampling.chunk_frames + lookahead_frames
    return Heard(
        start_sample=(stop_frame - n_frames) * sampling.samples_per_frame,
        stop_sample=stop_frame * sampling.samples_per_frame,
        n_frames=n_frames,
        first_frame=n_frames - lookahead_frames - sampling.chunk_frames,
    )


def windows(features: Tensor, heard: Heard, chunk_frames: int) -> Tensor:
    """Feature rows [n_frames, layers, dim] -> what each frame sees, [1, chunk_frames, 5, layers, dim].

    Rows beyond either end are the end's own row again, as in the released program.
    """
    frames = heard.first_frame + torch.arange(chunk_frames)
    around = torch.arange(WINDOW_FRAMES) - WINDOW_FRAMES // 2
    rows = (frames[:, None] + around[None]).clamp(0, heard.n_frames - 1)
    return features[rows.to(features.device)][None]
