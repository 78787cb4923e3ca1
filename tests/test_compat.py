"""Work-arounds for other packages, and that those which tests need are there."""

import importlib.util

import pytest
import torch
from torch._inductor import exc

from fastasync import compat


class NeverEnding:
    def __str__(self):
        raise AssertionError("described an argument")

    __repr__ = __str__


def test_messages_of_the_compiler_do_not_describe_arguments(monkeypatch):
    before = exc.OperatorIssue.operator_str
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(before))  # restored afterwards
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    compat.shorten_compiler_messages()
    text = exc.MissingOperatorWithoutDecomp.operator_str("fastasync.swiglu", [NeverEnding()], {"eps": NeverEnding()})
    assert text.splitlines() == ["  target: fastasync.swiglu", "  arguments: NeverEnding, eps=NeverEnding"]


def test_newer_compilers_are_left_alone(monkeypatch):
    before = exc.OperatorIssue.operator_str
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))
    compat.shorten_compiler_messages()
    assert exc.OperatorIssue.operator_str is before


@pytest.mark.parametrize(
    "package",
    [
        "deepspeed",
        "diffusers",
        "nvidia.dali",
        "tensorboard",
        "timm",
        "torch_fidelity",
        "torchao",
        "torchvision",
        "triton",
    ],
)
def test_nothing_is_skipped_for_want_of_a_package(package):
    """Tests that need one of these skip without it, so that the rest runs on a bare GPU machine: not in `make test`."""
    assert importlib.util.find_spec(package) is not None
