"""ADM's crop against a direct evaluation of its filters; colours of every mode."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastasync.images.transforms import BadImage, as_plain, centre_crop, decode, horizontal_flip, plain_size


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def catmull_rom(x):
    x = abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resample(pixels, length, axis, kernel):
    """One axis of uint8 pixels, every weight evaluated directly; the kernel is stretched when shrinking."""
    scale = pixels.shape[axis] / length
    centres = (np.arange(length) + 0.5) * scale
    weights = kernel((np.arange(pixels.shape[axis]) + 0.5 - centres[:, None]) / max(scale, 1.0))
    weights /= weights.sum(1, keepdims=True)
    values = np.moveaxis(np.tensordot(weights, pixels.astype(np.float64), (1, axis)), 0, axis)
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def adm(pixels, size):
    """Dhariwal and Nichol's crop, from its definition."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = resample(resample(pixels, width, 1, box), height, 0, box)
    scale = size / min(pixels.shape[:2])
    height, width = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
    pixels = resample(resample(pixels, width, 1, catmull_rom), height, 0, catmull_rom)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


# (no length here is 1 more than a multiple of 4 when it is halved: rounding would decide about its middle pixel)
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(500, 375, 256), (333, 427, 128), (640, 427, 64), (103, 403, 32), (90, 60, 96), (64, 64, 64), (128, 128, 64)],
)
def test_the_crop_is_adms(photos, width, height, size):
    image = photos[0].crop((50, 0, 50 + width, height))
    found, expected = centre_crop(image, size), adm(np.asarray(image), size)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1  # Pillow's weights have 22 bits
    assert (difference > 0).mean() < 2e-3


def test_a_plain_resize_would_be_noticed(photos):
    image = photos[0]
    direct = image.resize((96, 64), Image.Resampling.BICUBIC).crop((16, 0, 80, 64))
    assert np.abs(np.asarray(direct).astype(int) - adm(np.asarray(image), 64)).max() > 20


def test_every_mode_becomes_rgb(odd_files, crop_of):
    image = np.asarray(crop_of(3)).astype(int)
    grey = np.repeat(np.asarray(crop_of(3).convert("L"))[:, :, None], 3, 2)
    assert {decode(data).mode for data in odd_files.values()} == {"RGB"}
    decoded = {name: np.asarray(decode(data)) for name, data in odd_files.items()}
    assert np.array_equal(decoded["grey16.png"], grey)  # the high byte
    assert np.array_equal(decoded["alpha.png"], image)
    assert np.array_equal(decoded["png named.jpg"], image)
    assert np.abs(decoded["grey.jpg"].astype(int) - grey).mean() < 3
    assert np.abs(decoded["cmyk.jpg"].astype(int) - image).mean() < 6
    assert np.array_equal(decoded["palette.png"], decoded["transparent palette.png"])
    assert np.abs(decoded["palette.png"].astype(int) - image).mean() < 20
    first = np.asarray(crop_of(1).resize((120, 100))).astype(int)
    for name in ("animated.gif", "animated.webp"):
        assert np.abs(decoded[name] - first).mean() < 12, name
    assert decoded["turned.jpg"].shape == image.shape  # not rotated
    assert np.array_equal(decoded["padded.jpg"], decoded["turned.jpg"])


def test_bad_bytes(crop_of, encoded):
    jpeg, png = encoded(crop_of(3)), encoded(crop_of(3), "PNG")
    for data, reason in [
        (b"", "zero bytes"),
        (b"<html>not found</html>", "not an image"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (png[: len(png) // 2], "[Tt]runcated"),
        (jpeg[:40], "."),
    ]:
        with pytest.raises(BadImage, match=reason):
            decode(data)


def test_only_whole_grey_and_ycbcr_jpegs_are_plain(odd_files, crop_of, encoded):
    plain = {name for name, data in odd_files.items() if plain_size(data)}
    assert plain == {"grey.jpg", "progressive.jpg", "turned.jpg"}
    whole = encoded(crop_of(0))
    assert plain_size(whole)
    assert plain_size(whole + b"\0\0")
    assert not any(plain_size(whole[:end]) for end in range(0, len(whole), 101))
    assert not plain_size(encoded(crop_of(0), keep_rgb=True))


def test_foreign_decoders_get_the_same_pixels(odd_files):
    for name, data in odd_files.items():
        given, *size = as_plain(data)
        assert (given == data) == (plain_size(data) is not None)
        with Image.open(io.BytesIO(given)) as image:
            assert tuple(size) == image.size
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(decode(data))), name


def test_flip():
    images = torch.arange(24, dtype=torch.uint8).view(1, 2, 3, 4)
    assert horizontal_flip(images)[0, 1, 2].tolist() == [23, 22, 21, 20]
    assert math.prod(images.shape) == 24
