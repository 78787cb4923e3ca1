"""Real photographs (scikit-learn's two samples) written in every way that image folders hold them."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos():
    """Two RGB photographs, 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture(scope="session")
def encoded():
    """A function: image, format and options -> the bytes of the file."""

    def write(image, image_format="JPEG", **options):
        stream = io.BytesIO()
        image.save(stream, image_format, **options)
        return stream.getvalue()

    return write


@pytest.fixture(scope="session")
def crop_of(photos):
    """A function: number -> a crop of a photograph, its size and place depending on the number."""

    def crop(number):
        width, height = 120 + 37 * (number % 7), 100 + 29 * (number % 5)
        left, top = 11 * number % (640 - width), 7 * number % (427 - height)
        return photos[number % 2].crop((left, top, left + width, top + height))

    return crop


@pytest.fixture(scope="session")
def odd_files(crop_of, encoded):
    """``{file name: bytes}`` of files that are usable although they are no plain RGB JPEGs."""
    image = crop_of(3)
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 77)
    frames = [crop_of(number).resize((120, 100)) for number in (1, 2)]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    return {
        "grey.jpg": encoded(image.convert("L")),
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "grey16.png": encoded(grey16, "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG"),
        "transparent palette.png": encoded(image.convert("P"), "PNG", transparency=bytes(range(256))),
        "alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "png named.jpg": encoded(image, "PNG"),
        "progressive.jpg": encoded(image, progressive=True),
        "turned.jpg": encoded(image, exif=exif),
        "padded.jpg": encoded(image) + bytes(200),
    }


@pytest.fixture
def tree(tmp_path, crop_of, encoded):
    """A folder of two classes, with names that have spaces and other alphabets, hidden files and link loops."""
    root = tmp_path / "set"
    for label, folder in enumerate(("b two", "ä one")):
        (root / folder).mkdir(parents=True)
        for number in range(5 + label):
            (root / folder / f"bild {number} ß日本.JPEG").write_bytes(encoded(crop_of(10 * label + number)))
    (root / "ä one" / ".hidden.jpg").write_bytes(b"")
    (root / ".cache").mkdir()
    (root / "b two" / "deeper").mkdir()
    (root / "b two" / "deeper" / "z.png").write_bytes(encoded(crop_of(30), "PNG"))
    (root / "b two" / "notes.txt").write_text("not an image")
    (root / "b two" / "up").symlink_to("..")
    (root / "b two" / "self").symlink_to("self")
    (root / "loop").symlink_to(".")
    return root


@pytest.fixture
def write_tar():
    """A function: path and ``{member: bytes}`` -> a tar."""

    def write(path, members, mode="w"):
        with tarfile.open(path, mode) as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def tars(tmp_path, write_tar, crop_of, encoded):
    """Two tars of four and three samples."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard, count in enumerate((4, 3)):
        members = {}
        for number in range(count):
            key = f"{'long folder name/' * 8 if shard else ''}n{shard}_ü {number}"
            members[f"{key}.cls"] = f"{(shard + number) % 3}\n".encode()
            members[f"{key}.{('jpg', 'png')[number % 2]}"] = encoded(
                crop_of(10 * shard + number), ("JPEG", "PNG")[number % 2]
            )
            members[f"{key}.json"] = b"{}"
        write_tar(folder / f"set-{shard:03d}.tar", members)
    return folder
