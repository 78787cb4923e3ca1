"""Files are whole or absent."""

import errno
import os
import shutil

import pytest
import torch

from fastasync import files
from fastasync.errors import UserError
from fastasync.files import atomic_path, digest_tensors, load_tensors, save_tensors, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})
    before = target.read_bytes()

    def write_half():
        with atomic_path(target) as partial:
            partial.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "no space left on the device: free some"), (errno.EROFS, "choose a folder")]
)
def test_no_space_and_no_permission(tmp_path, monkeypatch, code, message):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=message):
        write_json(tmp_path / "a.json", 2)
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert os.listdir(tmp_path) == ["a.json"]


def test_tensors_round_trip_and_are_checked(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([1, 2])}
    sha256 = save_tensors(tmp_path / "t", tensors)
    back = load_tensors(tmp_path / "t", sha256, "again")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"truncated or altered.*: again"):
        load_tensors(tmp_path / "t", sha256, "again")
    with pytest.raises(UserError, match="missing: again"):
        load_tensors(tmp_path / "u", sha256, "again")


def test_nothing_stays_of_tensors_that_were_not_written_whole(tmp_path, monkeypatch):
    """Neither of a failed write nor, once the partials are removed, of a killed one; another file's partials stay."""
    save_tensors(tmp_path / "t", {"a": torch.ones(3)})
    before = (tmp_path / "t").read_bytes()
    seen = []

    def half(tensors, path, metadata):
        (path.parent / ".tmpAbC123").write_text("half")  # as safetensors' save_file begins
        left = shutil.copytree(path.parent, tmp_path / f"{path.parent.name[:-8]}x.partial")  # as if killed here
        seen.extend(left.iterdir())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(UserError, match="no space left"):
        save_tensors(tmp_path / "t", {"a": torch.zeros(3)})
    (tmp_path / ".u.1.partial").write_text("half")
    assert [path.name for path in seen] == [".tmpAbC123"]
    files.remove_partials(tmp_path, "t.")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".u.1.partial", "t"]
    files.remove_partials(tmp_path)
    assert os.listdir(tmp_path) == ["t"]
    assert (tmp_path / "t").read_bytes() == before
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o644


def test_digests_see_values_names_dtypes_shapes_and_facts():
    base = torch.arange(4.0)
    variants = [
        ({"a": base}, ()),
        ({"b": base}, ()),
        ({"a": base + 1}, ()),
        ({"a": base.reshape(2, 2)}, ()),
        ({"a": base.double()}, ()),
        ({"a": base}, ("fact",)),
        ({}, ()),
    ]
    assert len({digest_tensors(tensors, *facts) for tensors, facts in variants}) == len(variants)
    assert digest_tensors({"a": base.bool()}) == digest_tensors({"a": base.bool().clone()})
