"""From the bytes of an image file to ADM's square crop, uint8 RGB."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor


class BadImage(Exception):
    """The bytes cannot be decoded; the text says why, in a few words."""


def open_image(data: bytes | memoryview) -> ImageFile.ImageFile:
    """The image with its header parsed, and its pixels not decoded yet.  Raises BadImage."""
    if not data:
        raise BadImage("zero bytes")
    try:
        return Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # on damaged files Pillow's readers raise anything
        raise BadImage(f"unreadable header ({_words(error)})") from None


def load_pixels(image: Image.Image) -> Image.Image:
    """Decode the first frame, and return the image.  Raises BadImage when the data is cut short or damaged."""
    try:
        image.load()
    except Exception as error:  # on damaged files Pillow's readers raise anything
        raise BadImage(_words(error)) from None
    return image


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, as ADM does it (Pillow's ``convert``).

    Grey is repeated, CMYK and palettes are converted, alpha is dropped (not blended).  One exception: of 16-bit grey
    (and of whole numbers in general, taken as 16 bits) the high byte is kept, as Pillow does for 16-bit colour, where
    ``convert`` would make everything above 255 white.  Of an animation the first frame is taken; the EXIF orientation
    and colour profiles are ignored.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(data: bytes | memoryview) -> Image.Image:
    """The bytes of an image file -> RGB image by ``to_rgb``'s rules.  Raises BadImage."""
    return to_rgb(load_pixels(open_image(data)))


def centre_crop(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB image -> its centre, uint8 [size, size, 3].

    Dhariwal and Nichol (ADM): halve by a box filter while the shorter side is at least twice the target, resize that
    side to the target bicubically, cut out the centre.
    """
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    image = _resize(image, round(image.width * scale), round(image.height * scale), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Rows first, then columns, rounded in between: as Pillow's ``resize`` was, which since 13 swaps tall images'."""
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def horizontal_flip(images: Tensor) -> Tensor:
    """Mirror images [..., W] left to right."""
    return images.flip(-1)


def plain_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) of a whole 8-bit grey or YCbCr JPEG, which every decoder turns into the same colours; else None.

    None for CMYK, RGB, lossless and arithmetic-coded JPEGs, other formats, files that do not end with the end-of-image
    marker (a few bytes of padding allowed), and headers that leave the size open.
    """
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in bytes(data[-64:]):
        return None
    at, is_rgb = 2, False
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and at + 15 < len(data):
            is_rgb = data[at + 15] == 0  # the transform: 0 none, 1 YCbCr
        if marker in (0xC0, 0xC1, 0xC2):  # frame header: baseline, extended or progressive Huffman coding
            components = data[at + 10 : at + 10 + 3 * data[at + 9] : 3]
            plain = data[at + 4] == 8 and ((components == b"\1\2\3" and not is_rgb) or len(components) == 1)
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            return (width, height) if plain and width and height else None
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xCC)) or marker in (0xD9, 0xDA):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def as_plain(data: bytes | memoryview) -> tuple[bytes | memoryview, int, int]:
    """(bytes, width, height): the same bytes if ``plain_size`` knows them, else an uncompressed PPM file.

    The PPM is the image in RGB by ``to_rgb``'s rules: what a foreign decoder is fed with, so that it follows our rules.
    Raises BadImage.
    """
    size = plain_size(data)
    if size is not None:
        return data, *size
    image = decode(data)
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes(), *image.size
