"""The compiled reader: the same bytes as Python's, the same sizes of the same plain JPEGs, and the same errors."""

import random
import tarfile

import numpy as np
import pytest

from fastasync.errors import UserError
from fastasync.images import open_source, read
from fastasync.images.read import Place, read_places
from fastasync.images.transforms import plain_size


@pytest.fixture
def tree(tmp_path):
    for number in range(40):
        path = tmp_path / f"class {number % 2}" / f"é{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * (1000 * number + 1))
    return tmp_path


def test_it_was_built():
    assert read.library() is not None, "no C++ compiler, or not installed from these sources"


@pytest.mark.parametrize("threads", [1, 3, 100])
def test_the_same_bytes_as_one_by_one(tree, threads):
    source = open_source(tree)
    order = [7, 0, 39, 7, *range(40)]
    found = source.read_many(order, threads)
    assert {data.dtype for data in found.data} == {np.dtype(np.uint8)}
    assert [bytes(data) for data in found.data] == [source.read(index) for index in order]
    assert source.read_many([], threads).data == []


def test_parts_of_tars(tree, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "a.tar", "w") as tar:
        for number, path in enumerate(sorted(tree.rglob("*.jpg"))):
            tar.add(path, f"{number}.jpg")
            (tmp_path / "cls").write_text(str(number % 2))
            tar.add(tmp_path / "cls", f"{number}.cls")
    source = open_source(tars)
    assert [bytes(data) for data in source.read_many(range(40), 4).data] == [source.read(index) for index in range(40)]


def test_files_that_changed_since_they_were_listed(tree, crop_of, encoded):
    source = open_source(tree)
    longer, shorter, gone = (tree / source.path(index) for index in (3, 4, 5))
    longer.write_bytes(encoded(crop_of(3)))
    shorter.write_bytes(b"")
    found = source.read_many([3, 4, 6], 2)
    assert [bytes(data) for data in found.data] == [source.read(index) for index in (3, 4, 6)]
    assert found.sizes.tolist() == [list(crop_of(3).size), [0, 0], [0, 0]]
    gone.unlink()
    with pytest.raises(UserError, match=f"^{source.path(5)}: No such file"):
        source.read_many([4, 5], 2)


def test_what_cannot_be_read_is_told(tree):
    path = tree / "class 0" / "é0.jpg"
    places = [Place(path, 0, 1, True), Place(path, 0, 2, False), Place(tree, 0, 1, False), Place(path, 1, 0, False)]
    found, failed = read_places(places, 2)
    assert failed == [1, 2]
    assert [bytes(found.data[number]) for number in (0, 3)] == [b"\0", b""]


def test_without_the_library_python_reads(tree, monkeypatch, crop_of, encoded):
    (tree / open_source(tree).path(3)).write_bytes(encoded(crop_of(3)))
    source = open_source(tree)
    monkeypatch.setattr("fastasync.images.sources.library", lambda: None)
    found = source.read_many([1, 2, 3], 4)
    assert [bytes(data) for data in found.data] == [source.read(index) for index in (1, 2, 3)]
    assert found.sizes.tolist() == [[0, 0], [0, 0], list(crop_of(3).size)]


@pytest.fixture
def headers(tmp_path):
    """A function: list of bytes -> their sizes by the compiled reader, each with the others around it in memory."""

    def sizes(files):
        (tmp_path / "all").write_bytes(b"".join(files))
        ends = np.cumsum([len(data) for data in files])
        places = [Place(tmp_path / "all", int(end) - len(data), len(data), False) for data, end in zip(files, ends)]
        found, failed = read_places(places, 2)
        assert not failed
        return [tuple(size) for size in found.sizes.tolist()]

    return sizes


@pytest.fixture
def jpegs(crop_of, encoded, odd_files):
    """Files whose headers decide in every way, and what a camera may put before the size."""
    image = crop_of(3)
    plain = encoded(image)
    frame = plain.index(b"\xff\xc0")
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    variants = [plain[:2] + adobe + transform + plain[2:] for transform in (b"\0", b"\1", b"\2")]
    changes = {
        1: "c1 c3 c9",
        2: "ffff",
        4: "0c",
        5: "0000",
        7: "0000",
        9: "00 01 04",
        10: "52",
        13: "47",
    }  # of the frame
    for at, values in changes.items():
        for value in map(bytes.fromhex, values.split()):
            variants.append(plain[: frame + at] + value + plain[frame + at + len(value) :])
    variants += [plain[:frame] + marker + b"\0\2" + plain[frame:] for marker in (b"\xff\xcb", b"\xff\xcc")]
    fill = plain[:frame] + b"\xff" * 5 + plain[frame:]
    photo = encoded(image, keep_rgb=True), encoded(image, subsampling=0, comment=b"\xff\xc0" * 9)
    return [
        *odd_files.values(),
        plain,
        *variants,
        fill,
        *photo,
        plain + bytes(62),
        plain + bytes(63),
        plain[:frame] + plain[frame + 2 :],
    ]


def test_the_same_jpegs_are_plain(headers, jpegs):
    found = headers(jpegs)
    assert found == [plain_size(data) or (0, 0) for data in jpegs]
    assert 8 <= sum(size != (0, 0) for size in found) <= len(jpegs) - 12


def test_the_same_beginnings_of_jpegs_are_plain(headers, jpegs):
    """With the end marker behind them: where a header stops decides."""
    for data in (jpegs[0], *jpegs[-6:]):
        parts = [data[:end] + tail for end in range(min(len(data), 800)) for tail in (b"", b"\xff\xd9")]
        assert headers(parts) == [plain_size(part) or (0, 0) for part in parts]


def test_the_same_damaged_jpegs_are_plain(headers, jpegs):
    chance, files = random.Random(0), []
    for number in range(6000):
        data = bytearray(jpegs[number % len(jpegs)][:700] + b"\xff\xd9")
        for _ in range(chance.choice((1, 2, 8))):
            values = (0, 1, 2, 3, 8, 0xC0, 0xC2, 0xD9, 0xDA, 0xEE, 0xFF, chance.randrange(256))
            data[chance.randrange(len(data))] = chance.choice(values)
        files.append(bytes(data))
    files += [b"\xff\xd8" + chance.randbytes(chance.randrange(60)) + b"\xff\xd9" for _ in range(3000)]
    found = headers(files)
    assert found == [plain_size(data) or (0, 0) for data in files]
    assert 1000 < sum(size != (0, 0) for size in found) < 6000


def test_a_library_of_other_sources_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "_read_files.so").write_bytes(b"not a library")
    monkeypatch.setattr(read, "__file__", str(tmp_path / "read.py"))
    with pytest.warns(UserWarning, match="Python reads files instead"):
        assert read.library.__wrapped__() is None
