"""Pictures: parity with the reference's fit, every format and mode, rotation, and one line for every fault."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flashtalk_cli.config import Canvas
from flashtalk_cli.errors import InputError
from flashtalk_cli.media.image import EXIF_ORIENTATION, fit_picture, load_picture, picture_size

REFERENCE = Path(os.environ.get("FLASHTALK_REFERENCE", Path(__file__).parents[1] / "../shared/reference"))
SQUARE = Canvas(width_px=64, height_px=64, background="#102030")


def cases(kind: str) -> list:
    found = [p for p in sorted(REFERENCE.glob("*.json")) if json.loads(p.read_text()).get("kind") == kind]
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no {kind} case in {REFERENCE}"))]
    return [pytest.param(p, id=p.stem) for p in found]


def gradient(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize("case", cases("centercrop"))
def test_crop_is_the_reference(case: Path) -> None:
    """Parity: scaling to cover and cutting out the centre gives the reference's bytes."""
    height, width = json.loads(case.read_text())["target"]
    canvas = Canvas.model_construct(width_px=width, height_px=height, fit="crop", background="#000000")
    with np.load(case.with_suffix(".npz")) as arrays:
        fitted = fit_picture(arrays["image"], canvas)
        expected = arrays["output"][0, :, 0].transpose(1, 2, 0)
    np.testing.assert_array_equal(fitted, expected)


@settings(max_examples=30)
@given(
    width=st.integers(32, 300),
    height=st.integers(32, 300),
    fit=st.sampled_from(["crop", "pad"]),
    w=st.integers(4, 10),
)
def test_any_size_fills_the_canvas(width: int, height: int, fit: str, w: int) -> None:
    """Property: a plain picture covers a cropped canvas wholly, and a padded one but for centred bars."""
    canvas = Canvas(width_px=16 * w, height_px=96, fit=fit, background="#00ff00")
    fitted = fit_picture(np.full((height, width, 3), 200, np.uint8), canvas)
    assert fitted.shape == (96, 16 * w, 3)
    assert fitted.dtype == np.uint8
    is_picture = (fitted == 200).all(-1)
    if fit == "crop":
        assert is_picture.all()
        return
    assert (is_picture | (fitted == (0, 255, 0)).all(-1)).all()
    rows, columns = np.flatnonzero(is_picture.any(1)), np.flatnonzero(is_picture.any(0))
    assert len(rows) == 96 or len(columns) == 16 * w
    for kept, side in ((rows, 96), (columns, 16 * w)):
        assert abs(kept[0] - (side - 1 - kept[-1])) <= 1
    scale = min(96 / height, 16 * w / width)
    assert abs(len(rows) - height * scale) <= 1
    assert abs(len(columns) - width * scale) <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    """Contract: each promised format loads, with its colours in the right order."""
    path = tmp_path / f"portrait.{suffix}"
    Image.new("RGB", (80, 60), (220, 120, 20)).save(
        path, **({"quality": 95} if suffix in ("jpg", "webp") else {})
    )
    assert picture_size(path) == (80, 60)
    loaded = load_picture(path, SQUARE)
    assert np.abs(loaded.astype(int) - (220, 120, 20)).max() <= 6


def test_phone_jpeg_and_first_gif_frame(tmp_path: Path) -> None:
    """Contract: an MPO is a JPEG, and of an animation the first frame counts."""
    red, blue = Image.new("RGB", (64, 64), (250, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 250))
    red.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[blue])
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    for name in ("phone.jpg", "moving.gif"):
        assert np.abs(load_picture(tmp_path / name, SQUARE).astype(int) - (250, 0, 0)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_rotation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Contract: what a camera held sideways stored is loaded upright, and measured upright."""
    upright = Image.fromarray(gradient(96, 64))
    # How a camera in that orientation would have stored it: the inverse of the turn a viewer makes.
    stored = {
        1: lambda im: im,
        2: lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda im: im.rotate(180),
        4: lambda im: im.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda im: im.transpose(Image.Transpose.TRANSPOSE),
        6: lambda im: im.rotate(90, expand=True),
        7: lambda im: im.transpose(Image.Transpose.TRANSVERSE),
        8: lambda im: im.rotate(-90, expand=True),
    }[orientation](upright)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = (
        {"lossless": True}
        if suffix == "webp"
        else {"quality": 100, "subsampling": 0}
        if suffix == "jpg"
        else {}
    )
    stored.save(path, exif=exif, **options)
    assert picture_size(path) == (96, 64)
    loaded = load_picture(path, Canvas(width_px=96, height_px=64))
    assert np.abs(loaded.astype(int) - np.asarray(upright)).max() <= (12 if suffix == "jpg" else 0)


def test_broken_exif_is_ignored(tmp_path: Path) -> None:
    """Fault: a picture with nonsense for EXIF, or an orientation of 77, is still a picture."""
    picture = Image.fromarray(gradient(64, 64))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 77
    picture.save(tmp_path / "a.png", exif=exif)
    picture.save(tmp_path / "b.png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffnonsense")
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(load_picture(tmp_path / name, SQUARE), np.asarray(picture))


def test_modes_become_rgb(tmp_path: Path) -> None:
    """Contract: grey, 1 bit, 16 bits, palette and CMYK keep their brightness."""
    size = (64, 64)
    pictures = {
        "grey.png": (Image.new("L", size, 77), (77, 77, 77)),
        "bits.png": (Image.new("1", size, 1), (255, 255, 255)),
        "grey16.png": (Image.fromarray(np.full(size, 40000, np.uint16)), (156, 156, 156)),
        "palette.png": (Image.new("RGB", size, (10, 200, 30)).quantize(8), (10, 200, 30)),
        "ink.jpg": (Image.new("CMYK", size, (0, 255, 255, 0)), (255, 0, 0)),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name)
        assert np.abs(load_picture(tmp_path / name, SQUARE).astype(int) - expected).max() <= 3, name


def test_alpha_shows_the_background(tmp_path: Path) -> None:
    """Contract: what is transparent becomes the chosen background, half of it a mix."""
    clear = Image.new("RGBA", (64, 64), (200, 100, 0, 0))
    half = Image.new("RGBA", (64, 64), (200, 100, 0, 128))
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([255, 255, 255] * 256)
    clear.save(tmp_path / "clear.png")
    half.save(tmp_path / "half.webp", lossless=True)
    palette.save(tmp_path / "palette.gif", transparency=0)
    Image.new("LA", (64, 64), (255, 0)).save(tmp_path / "grey.png")
    for name in ("clear.png", "palette.gif", "grey.png"):
        assert (load_picture(tmp_path / name, SQUARE) == (0x10, 0x20, 0x30)).all(), name
    mixed = load_picture(tmp_path / "half.webp", SQUARE).astype(int)
    assert np.abs(mixed - [(200 + 16) // 2, (100 + 32) // 2, 48 // 2]).max() <= 2


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises that size and whose pixels are not there."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=suffix)
    return buffer.getvalue()


BAD_BYTES = {
    "empty": (b"", "0 bytes"),
    "text": (b"I am a portrait, honestly.\n" * 40, "not a picture"),
    "cut png": (encoded("png")[:9000], "broken or cut short"),
    "cut jpeg": (encoded("jpeg")[:5000], "broken or cut short"),
    "cut webp": (encoded("webp")[:3000], "broken or cut short"),
    "cut bmp": (encoded("bmp")[:9000], "broken or cut short"),
    "damaged png": (encoded("png")[:500] + b"\0" * 64 + encoded("png")[564:], "broken or cut short"),
    "only a header": (encoded("png")[:20], ""),
    "400 megapixels": (png_claiming(20_000, 20_000), "400.0 megapixels"),
    "144 megapixels": (png_claiming(12_000, 12_000), "144.0 megapixels"),
    "no pixels behind": (png_claiming(5_000, 5_000), "broken or cut short"),
    "a strip": (png_claiming(60_000, 40), "at most 16:1"),
    "1x1": (png_claiming(1, 1), "1x1"),
    "31 px high": (png_claiming(400, 31), "at least 32"),
    "tiff": (b"II*\x00" + bytes(100), "not a picture"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_pictures_end_in_one_line(tmp_path: Path, name: str) -> None:
    """Fault: every unusable file is an `InputError` of one line that names it and says what is wrong."""
    data, told = BAD_BYTES[name]
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load_picture(path, SQUARE)
    message = str(caught.value)
    assert "bad.png" in message
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize("read", [picture_size, lambda path: load_picture(path, SQUARE)])
def test_what_is_no_file_is_told_apart(tmp_path: Path, read) -> None:
    """Fault: a missing file, a folder, a pipe and a path through a file each say which they are."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    for path, told in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "file" / "a.png", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (Path("nul\0byte.png"), "cannot be read"),
        (Path(os.fsdecode(b"latin-\xff.png")), "not valid UTF-8"),
    ):
        with pytest.raises(InputError, match=told) as caught:
            read(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["-v.png", "портрет 笑.png", "a:b%03d.png", "two\nlines.png"])
def test_odd_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: any name works, and its message is one printable line."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "made.png")
    (tmp_path / "made.png").rename(name)
    assert picture_size(Path(name)) == (64, 64)
    Path(name).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_picture(Path(name), SQUARE)
    assert str(caught.value).isprintable()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["png", "jpeg", "webp", "gif", "bmp"]),
    at=st.integers(0, 2000),
    junk=st.binary(min_size=1, max_size=40),
)
def test_damage_is_a_picture_or_an_input_error(tmp_path: Path, suffix: str, at: int, junk: bytes) -> None:
    """Property: whatever bytes are damaged, the answer is a canvas or an `InputError`, never a crash."""
    data = encoded(suffix)
    path = tmp_path / "damaged"
    path.write_bytes(data[:at] + junk + data[at + len(junk) :])
    try:
        picture = load_picture(path, SQUARE)
    except InputError as error:
        told = str(error)
    else:
        assert picture.shape == (64, 64, 3)
        told = ""
    assert "\n" not in told
