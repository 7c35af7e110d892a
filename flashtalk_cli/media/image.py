"""A portrait file to the canvas: bytes in, uint8 RGB out.

The arithmetic of `fit="crop"` is the reference's: scale to cover the canvas with Pillow's
bilinear filter (which averages when it shrinks), to a size rounded up, then cut out the centre.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashtalk_cli.config import Canvas
from flashtalk_cli.errors import FlashtalkError, InputError
from flashtalk_cli.media.files import check_file, shown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)

MAX_PICTURE_PX = 100_000_000
MIN_SIDE_PX = 32
MAX_ASPECT = 16  # a longer strip would need a huge picture in between to cover the canvas

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # a phone's MPO opens as JPEG
WANTED = "a PNG, JPEG, WebP, BMP or GIF picture"

EXIF_ORIENTATION = 0x0112


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels as the picture is meant to be seen, after its EXIF rotation.

    Raises `InputError` for a file that is no usable picture; pixels are not decoded unless the format
    keeps its EXIF behind them.
    """
    with _opened(path) as picture:
        width_px, height_px = picture.size
        sideways = _orientation(picture) >= 5
    return (height_px, width_px) if sideways else (width_px, height_px)


def load_picture(path: Path, canvas: Canvas) -> np.ndarray:
    """The picture on the canvas: uint8 [height_px, width_px, 3] RGB.

    Rotated by its EXIF, flattened on `canvas.background` where transparent, fitted by `canvas.fit`.
    Raises `InputError` for a missing, broken, oversized, too small or unknown file.
    """
    with _opened(path) as picture:
        upright = _turn_upright(picture, _orientation(picture))
        rgb = _flatten(upright, canvas.background)
    return fit_picture(rgb, canvas)


def fit_picture(rgb: np.ndarray, canvas: Canvas) -> np.ndarray:
    """uint8 [h, w, 3] scaled to the canvas: uint8 [height_px, width_px, 3].

    `crop` covers the canvas and cuts the centre out; `pad` shows everything, with bars of the background.
    """
    from PIL import Image

    assert rgb.dtype == np.uint8, rgb.dtype
    assert rgb.ndim == 3, rgb.shape
    assert rgb.shape[2] == 3, rgb.shape
    height_px, width_px = rgb.shape[:2]
    target_h, target_w = canvas.height_px, canvas.width_px
    scales = target_h / height_px, target_w / width_px
    picture = Image.fromarray(rgb)
    if canvas.fit == "crop":
        scale = max(scales)
        size = math.ceil(scale * width_px), math.ceil(scale * height_px)
        scaled = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        # An odd surplus halves to an even offset, as round() does and as the reference did.
        top = round((scaled.shape[0] - target_h) / 2)
        left = round((scaled.shape[1] - target_w) / 2)
        return np.ascontiguousarray(scaled[top : top + target_h, left : left + target_w])
    scale = min(scales)
    size = (
        min(target_w, max(1, round(scale * width_px))),
        min(target_h, max(1, round(scale * height_px))),
    )
    scaled = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    padded = np.empty((target_h, target_w, 3), np.uint8)
    padded[:] = _rgb_of(canvas.background)
    top, left = (target_h - size[1]) // 2, (target_w - size[0]) // 2
    padded[top : top + size[1], left : left + size[0]] = scaled
    return padded


@contextmanager
def _opened(path: Path) -> Iterator[Picture]:
    """The file as an open picture of a size we accept; every failure inside becomes an `InputError`."""
    from PIL import Image, UnidentifiedImageError

    check_file(path, WANTED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below is the one that counts
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as picture:
                _check_size(path, *picture.size)
                yield picture
    except FlashtalkError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{shown(path)}: not a picture that can be read; give {WANTED}") from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise _too_large(path, int(found[0]) if found else MAX_PICTURE_PX + 1) from None
    except Exception as error:  # decoders of hostile bytes raise whatever they meet
        log.debug("cannot decode %s", path, exc_info=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{shown(path)}: broken or cut short ({reason}); save or download it anew") from None


def _check_size(path: Path, width_px: int, height_px: int) -> None:
    if width_px * height_px > MAX_PICTURE_PX:
        raise _too_large(path, width_px * height_px, f"{width_px}x{height_px}, ")
    if min(width_px, height_px) < MIN_SIDE_PX:
        raise InputError(
            f"{shown(path)}: {width_px}x{height_px} pixels are too few; each side needs at least {MIN_SIDE_PX}"
        )
    if max(width_px, height_px) > MAX_ASPECT * min(width_px, height_px):
        raise InputError(
            f"{shown(path)}: {width_px}x{height_px} pixels are too long a strip; "
            f"crop it to at most {MAX_ASPECT}:1"
        )


def _too_large(path: Path, n_px: int, detail: str = "") -> InputError:
    limit = MAX_PICTURE_PX // 1_000_000
    return InputError(
        f"{shown(path)}: {detail}{n_px / 1e6:.1f} megapixels are over the limit of {limit}; scale it down"
    )


def _orientation(picture: Picture) -> int:
    """EXIF orientation, 1 to 8; 1 when there is none or the EXIF itself is broken."""
    try:
        value = picture.getexif().get(EXIF_ORIENTATION, 1)
    except OSError:  # the pixels before the EXIF are cut short
        raise
    except Exception:  # a camera's broken EXIF is no reason to refuse its picture
        log.debug("unreadable EXIF ignored", exc_info=True)
        return 1
    return value if value in range(1, 9) else 1


def _turn_upright(picture: Picture, orientation: int) -> Picture:
    """The picture as EXIF orientation 1 would store it (JEITA CP-3451, tag 0x0112)."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _flatten(picture: Picture, background: str) -> np.ndarray:
    """Any mode to uint8 [h, w, 3] RGB, transparency shown on the background."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them to 8, not scale
        grey = np.clip(np.asarray(picture), 0, 65535)
        eight_bits = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(eight_bits[..., None], 3, axis=2)
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        under = Image.new("RGBA", over.size, (*_rgb_of(background), 255))
        picture = Image.alpha_composite(under, over)
    return np.asarray(picture.convert("RGB"))


def _rgb_of(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` as three numbers from 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
