"""The compiled reader: the same bytes as Python's, and the same errors."""

import tarfile

import pytest

from fastasync.errors import UserError
from fastasync.images import open_source, read
from fastasync.images.read import Place, read_places


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
    assert all(isinstance(data, memoryview) for data in found)
    assert [bytes(data) for data in found] == [source.read(index) for index in order]
    assert source.read_many([], threads) == []


def test_parts_of_tars(tree, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "a.tar", "w") as tar:
        for number, path in enumerate(sorted(tree.rglob("*.jpg"))):
            tar.add(path, f"{number}.jpg")
            (tmp_path / "cls").write_text(str(number % 2))
            tar.add(tmp_path / "cls", f"{number}.cls")
    source = open_source(tars)
    assert [bytes(data) for data in source.read_many(range(40), 4)] == [source.read(index) for index in range(40)]


def test_files_that_changed_since_they_were_listed(tree):
    source = open_source(tree)
    longer, shorter, gone = (tree / source.path(index) for index in (3, 4, 5))
    longer.write_bytes(b"longer" * 10_000)
    shorter.write_bytes(b"")
    assert [bytes(data) for data in source.read_many([3, 4, 6], 2)] == [source.read(index) for index in (3, 4, 6)]
    gone.unlink()
    with pytest.raises(UserError, match=f"^{source.path(5)}: No such file"):
        source.read_many([4, 5], 2)


def test_what_cannot_be_read_is_none(tree):
    path = tree / "class 0" / "é0.jpg"
    places = [Place(path, 0, 1, True), Place(path, 0, 2, False), Place(tree, 0, 1, False), Place(path, 1, 0, False)]
    found = read_places(places, 2)
    assert [None if data is None else bytes(data) for data in found] == [b"\0", None, None, b""]


def test_without_the_library_python_reads(tree, monkeypatch):
    source = open_source(tree)
    monkeypatch.setattr("fastasync.images.sources.library", lambda: None)
    found = source.read_many([1, 2], 4)
    assert all(isinstance(data, bytes) for data in found)
    assert found == [source.read(1), source.read(2)]


def test_a_library_of_other_sources_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "_read_files.so").write_bytes(b"not a library")
    monkeypatch.setattr(read, "__file__", str(tmp_path / "read.py"))
    with pytest.warns(UserWarning, match="Python reads files instead"):
        assert read.library.__wrapped__() is None
