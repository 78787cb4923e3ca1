"""Files are whole or absent."""

import errno
import os

import pytest
import torch
from safetensors.torch import save

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


def test_the_file_is_the_one_that_safetensors_would_write(tmp_path):
    """Byte for byte (but for the order of types of one size)."""
    tensors = {
        "z": torch.arange(6, dtype=torch.int64).reshape(2, 3), "ä b": torch.randn(3, 5), "half": torch.randn(7).half(),
        "flag": torch.tensor([True, False, True]), "none": torch.empty(0, 4), "one": torch.tensor(2.5),
        "map": torch.randn(4, 6)[:, ::2], "brain": torch.randn(2, 1).bfloat16(), "byte": torch.tensor(3).byte(),
    }  # fmt: skip
    sha256 = save_tensors(tmp_path / "t", tensors)
    back = load_tensors(tmp_path / "t", sha256, "again")
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    same = {name: value.contiguous() for name, value in tensors.items() if name not in ("brain", "byte")}
    save_tensors(tmp_path / "t", same)
    assert (tmp_path / "t").read_bytes() == save(same)


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
