"""Which pieces of footage are fit to learn from: one shot, a still background, one face.

A model that is to move a person and nothing else must not see backgrounds that move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashtalk_cli.errors import InputError

BORDER_SHARE = 0.08  # of each side, where a portrait shows no person
SAMPLED_FRAMES = 8
CUT_LEVELS, CUT_RATIO = 18.0, 6.0  # a cut changes more than so many levels, and so many times the usual
FACE_FRAMES_SHARE = 0.75  # of the sampled frames must show one face
BOX_GROWTH = 1.2

Box = tuple[float, float, float, float]
Faces = Callable[[np.ndarray], list[Box]]
"""A frame uint8 [H, W, 3] -> boxes x0, y0, x1, y1 of the faces in it, in pixels."""


def sampled(frames: np.ndarray, count: int = SAMPLED_FRAMES) -> np.ndarray:
    """Up to `count` frames spread over a clip [F, H, W, 3]."""
    return frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]


def background_motion(frames: np.ndarray) -> float:
    """How much the border changes over a clip uint8 [F, H, W, 3]: a standard deviation in levels of 255.

    The border is the top of the frame and the upper half of its sides; shoulders are below. The
    ninetieth percentile of its pixels counts, so that one moving corner is enough.
    """
    some = sampled(frames, 16).astype(np.float32).mean(-1)
    height, width = some.shape[1:]
    rows, columns = max(1, round(BORDER_SHARE * height)), max(1, round(BORDER_SHARE * width))
    border = np.zeros((height, width), bool)
    border[:rows] = True
    border[: height // 2, :columns] = True
    border[: height // 2, -columns:] = True
    return float(np.quantile(some.std(0)[border], 0.9))


def has_cut(frames: np.ndarray) -> bool:
    """Whether one frame of a clip uint8 [F, H, W, 3] follows another of a different shot."""
    small = frames[:, ::4, ::4].astype(np.float32)
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
    return bool(len(change) and change.max() > max(CUT_LEVELS, CUT_RATIO * float(np.median(change))))


def face_box(frames: np.ndarray, faces: Faces, min_share: float) -> Box | None:
    """The box around the one face of a clip in all its frames; None when there is none, or several.

    min_share: of the frame's height that the face must have.
    """
    found = [faces(frame) for frame in sampled(frames)]
    large = [[box for box in boxes if box[3] - box[1] >= min_share * frames.shape[1]] for boxes in found]
    single = np.asarray([boxes[0] for boxes in large if len(boxes) == 1])
    if any(len(boxes) > 1 for boxes in large) or len(single) < FACE_FRAMES_SHARE * len(found):
        return None
    (x0, y0), (x1, y1) = single[:, :2].min(0).tolist(), single[:, 2:].max(0).tolist()
    dx, dy = (BOX_GROWTH - 1) / 2 * (x1 - x0), (BOX_GROWTH - 1) / 2 * (y1 - y0)
    return x0 - dx, y0 - dy, x1 + dx, y1 + dy


def opencv_faces() -> Faces:
    """OpenCV's frontal face detector. Raises InputError when OpenCV 4 is not installed."""
    try:
        import cv2

        cascade = cv2.CascadeClassifier  # OpenCV 5 has none, and brings no other detector's weights
    except (ImportError, AttributeError):
        raise InputError(
            "the face filter needs OpenCV 4: pip install 'opencv-python-headless<5', or switch the filter off "
            "with --set data.min_face_share=0"
        ) from None
    detector: Any = cascade(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")

    def faces(frame: np.ndarray) -> list[Box]:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        found = detector.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=6)
        return [(float(x), float(y), float(x + w), float(y + h)) for x, y, w, h in found]

    return faces
