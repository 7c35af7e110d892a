"""How far a mouth is open, read from frames alone: for renders whose truth is not known.

Inside an open mouth it is dark, or there are teeth, which are pale: both have less of the colour
of skin than what surrounds them. So the measure is the area, in the middle of the mouth's box,
of pixels that are darker or paler than the box's usual pixel, divided by the width looked at. The
box may be a few pixels off and larger than the mouth; the head may move a little inside it.
"""

from __future__ import annotations

import numpy as np

CENTRE_SHARE = 0.5  # of the box's width that is looked at


def mouth_opening_from_frames(frames: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Mean height of the opening in pixels, float64 [T], up to a factor and an offset.

    frames uint8 [T, H, W, 3]; box is x0, y0, x1, y1 in pixels around the mouth in all frames.
    What stays the same over a clip (a moustache, a shadow) is subtracted: the most closed tenth of
    the frames reads about 0.
    """
    raise NotImplementedError
