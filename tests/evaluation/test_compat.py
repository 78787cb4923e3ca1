"""torchvision imports beside a torch whose build does not match."""

import sys

import pytest

from fastasync import compat
from fastasync.errors import UserError


def test_torchvision_and_torch_fidelity_import():
    torchvision = compat.import_torchvision()
    assert compat.import_torchvision() is torchvision
    from torchvision.transforms import functional

    assert functional is not None
    assert compat.import_torch_fidelity().__name__ == "torch_fidelity"


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"package torchvision: not installed: .*fastasync\[fid\]"):
        compat.import_torchvision()


def test_other_import_errors_pass_through(monkeypatch):
    def broken(package, extra):
        raise RuntimeError("something else")

    monkeypatch.setattr(compat, "require", broken)
    with pytest.raises(RuntimeError, match="something else"):
        compat.import_torchvision()
