"""Folders and tars: what is found, in which order, and what is refused."""

import gzip
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastasync.compat import import_torchvision
from fastasync.errors import UserError
from fastasync.images import open_folder, open_source, open_tars, sources


def test_folder(tree):
    source = open_source(tree)
    assert source.class_names == ("b two", "ä one")
    assert source.classes == 2
    expected = [f"b two/bild {number} ß日本.JPEG" for number in range(5)] + ["b two/deeper/z.png"]
    expected += [f"ä one/bild {number} ß日本.JPEG" for number in range(6)]
    assert [source.path(index) for index in range(len(source))] == expected
    assert [source.label(index) for index in range(len(source))] == [0] * 6 + [1] * 6
    assert all(source.read(index) == (tree / path).read_bytes() for index, path in enumerate(expected))
    assert source.sizes.tolist() == [len(source.read(index)) for index in range(len(source))]
    assert source.ignored == ("b two/notes.txt", "b two/self")


def test_a_link_above_the_root_leads_to_no_images_of_others(tree, crop_of, encoded):
    before = open_source(tree).paths
    (tree.parent / "other").mkdir()
    (tree.parent / "other" / "not of the set.jpg").write_bytes(encoded(crop_of(31)))
    (tree / "b two" / "above").symlink_to("../..")
    assert open_source(tree).paths == before


def test_the_order_is_torchvisions(tree):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    datasets = import_torchvision().datasets
    for link in ("b two/up", "b two/self", "loop"):  # it would follow them for ever
        (tree / link).unlink()
    shutil.rmtree(tree / ".cache")
    (tree / "ä one" / ".hidden.jpg").unlink()
    source, theirs = open_folder(tree), datasets.ImageFolder(str(tree))
    assert [(str(tree / path), label) for path, label in zip(source.paths, source.labels.tolist())] == theirs.samples


def test_fingerprint(tree, tmp_path):
    first = open_folder(tree).fingerprint
    assert open_folder(shutil.copytree(tree, tmp_path / "moved", symlinks=True)).fingerprint == first
    (tree / "ä one" / "bild 0 ß日本.JPEG").rename(tree / "ä one" / "x.jpg")
    second = open_folder(tree).fingerprint
    (tree / "ä one" / "x.jpg").write_bytes(b"other")
    assert len({first, second, open_folder(tree).fingerprint}) == 3


def test_without(tree, tars):
    for source in (open_source(tree), open_source(tars)):
        removed = [source.path(0), source.path(4), "not/there.jpg"]
        rest = source.without(removed)
        assert (len(rest), rest.left_out, rest.class_names) == (len(source) - 2, 2, source.class_names)
        kept = [index for index in range(len(source)) if source.path(index) not in removed]
        assert [rest.path(index) for index in range(len(rest))] == [source.path(index) for index in kept]
        assert [rest.read(index) for index in range(len(rest))] == [source.read(index) for index in kept]
        assert rest.labels.tolist() == source.labels[kept].tolist()
        assert rest.fingerprint != source.fingerprint
        assert rest.without(rest.paths[:1]).left_out == 3
        with pytest.raises(UserError, match="no image left"):
            source.without(source.paths)


def test_one_class_is_a_set(tree):
    shutil.rmtree(tree / "b two")
    source = open_folder(tree)
    assert (source.classes, len(source)) == (1, 6)


def _empty(root):
    root.mkdir()


def _loose_images(root):
    root.mkdir()
    (root / "a.jpg").write_bytes(b"x")


def _empty_class(root):
    (root / "a").mkdir(parents=True)
    (root / "a" / "readme").write_text("x")


def _splits(root):
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "a.jpg").write_bytes(b"x")


def _line_end(root):
    (root / "a").mkdir(parents=True)
    (root / "a" / "x\ny.jpg").write_bytes(b"x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "no such folder"),
        (_empty, "no class folders: put the images"),
        (_loose_images, "images, but no class folders"),
        (_empty_class, "class folder a: no image in it"),
        (_splits, r"splits \(train\): give .*train"),
        (_line_end, "rename it"),
    ],
)
def test_refused_folders(tmp_path, make, message):
    if make:
        make(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "set")


def test_an_unreadable_folder(tree, monkeypatch):
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("ä one"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # (root may read everything)
    with pytest.raises(UserError, match="ä one: Permission denied"):
        open_folder(tree)


def test_a_broken_link_is_found_when_read(tree):
    (tree / "b two" / "a.jpg").symlink_to(tree / "nowhere")
    source = open_folder(tree)
    assert source.sizes[0] == -1
    with pytest.raises(UserError, match=r"b two/a.jpg: No such file"):
        source.read(0)


def test_tars(tars):
    source = open_source(tars)
    prefix = "long folder name/" * 8
    expected = [f"set-000.tar/n0_ü {number}.{('jpg', 'png')[number % 2]}" for number in range(4)]
    expected += [f"set-001.tar/{prefix}n1_ü {number}.{('jpg', 'png')[number % 2]}" for number in range(3)]
    assert list(source.paths) == expected
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.class_names == ("0", "1", "2")
    unpacked = tars / "unpacked"
    unpacked.mkdir()
    with pytest.raises(UserError, match=r"tars and folders: for the tars give .*/\*.tar"):
        open_source(tars)
    subprocess.run(["tar", "-xf", tars / "set-001.tar", "-C", unpacked], check=True)
    for index in range(4, 7):
        assert source.read(index) == (unpacked / source.path(index).removeprefix("set-001.tar/")).read_bytes()
    assert open_tars(f"{tars}/*.tar").fingerprint == source.fingerprint
    assert open_tars([tars / "set-000.tar", tars / "set-001.tar"]).fingerprint == source.fingerprint


def test_the_index_is_built_once_and_again_when_stale_or_damaged(tars, monkeypatch, write_tar):
    calls = []
    build = sources._build_index

    def count(*args):
        calls.append(1)
        return build(*args)

    monkeypatch.setattr(sources, "_build_index", count)
    first = open_tars(f"{tars}/*.tar")
    (cache,) = tars.glob(".fastasync-index-*")
    again = open_tars(f"{tars}/*.tar")
    assert len(calls) == 1
    assert torch.equal(again.offsets, first.offsets)
    assert list(again.paths) == list(first.paths)

    data = bytearray(cache.read_bytes())
    data[-20] ^= 1
    cache.write_bytes(data)
    assert open_source(tars).fingerprint == first.fingerprint
    assert len(calls) == 2

    write_tar(tars / "set-001.tar", {"a.jpg": b"x", "a.cls": b"7"})
    assert len(open_source(tars)) == 5
    assert len(calls) == 3


def test_the_index_goes_elsewhere_when_the_folder_is_read_only(tars, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save = sources.save_tensors

    def refuse(path, tensors):
        if path.parent == tars:
            raise UserError(str(path), "Read-only file system", "choose a folder that can be written to")
        return save(path, tensors)

    monkeypatch.setattr(sources, "save_tensors", refuse)
    first = open_source(tars)
    assert len(list((tmp_path / "cache" / "fastasync").iterdir())) == 1
    monkeypatch.setattr(sources, "_build_index", None)
    assert open_source(tars).fingerprint == first.fingerprint


def test_a_tar_cut_short_anywhere_is_refused(tars, tmp_path):
    whole = (tars / "set-000.tar").read_bytes()
    source = open_tars(f"{tars}/*.tar")
    ends = int(source.offsets[3] + source.sizes[3])
    for length in [0, 100, 512, 1000, *(range(1024, ends, 3333)), ends, ends // 512 * 512 + 512]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"cut.tar: cut short (at|or damaged at byte \d+ of)( byte)? {length}\b"):
            open_tars(tmp_path / "cut.tar")
    assert source.read(6)
    with open(tars / "set-001.tar", "rb+") as stream:
        stream.truncate(int(source.offsets[6]) + 5)
    with pytest.raises(UserError, match="was cut short since it was indexed: 5 of"):
        source.read(6)


def test_a_damaged_header_is_refused(tars, tmp_path):
    whole = bytearray((tars / "set-000.tar").read_bytes())
    third = int(open_tars(tars / "set-000.tar").offsets[1]) - 512
    whole[third + 20] ^= 0xFF
    (tmp_path / "bad.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"bad.tar: cut short or damaged at byte \d+ of"):
        open_tars(tmp_path / "bad.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.cls": b"1"}, "sample a has no image"),
        ({"a.jpg": b"x"}, r"sample a has no class \(.cls\)"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"a.cls: b'cat': must hold the class"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "two images for sample a"),
        ({"a.txt": b"x"}, "no images"),
        ({"a\n.jpg": b"x"}, "rename it"),
    ],
)
def test_refused_tars(tmp_path, write_tar, members, message):
    with pytest.raises(UserError, match=message):
        open_tars(write_tar(tmp_path / "a.tar", members))


def test_no_tar_and_no_plain_tar(tmp_path, tars):
    with pytest.raises(UserError, match="no tar: give"):
        open_source(f"{tmp_path}/x-*.tar")
    with pytest.raises(UserError, match="no tar: give"):
        open_source([])
    with pytest.raises(UserError, match=r"missing.tar: No such file"):
        open_source([tmp_path / "missing.tar"])
    (tmp_path / "z.tar").write_bytes(gzip.compress((tars / "set-000.tar").read_bytes()))
    with pytest.raises(UserError, match="not a plain tar"):
        open_tars(tmp_path / "z.tar")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_names_that_are_no_text(tree):
    os.rename(tree / "b two" / "bild 0 ß日本.JPEG", os.fsencode(tree / "b two") + b"/\xff\xfe.jpg")
    source = open_folder(tree)
    assert source.fingerprint
    assert all(source.read(index) for index in range(len(source)))
