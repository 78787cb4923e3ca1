"""Which operations a run gets, and what it is told when it cannot have them."""

import inspect
import subprocess
import sys

import fastasync_kernels
import pytest
from fastasync_kernels import KernelUnavailable, reference, select


def public(module):
    return {
        name: value for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")
    }


def test_reference_and_auto_without_a_gpu():
    assert select("reference", "cpu") is reference
    assert select("reference", "cuda:0") is reference
    assert select("auto", "cpu") is reference


def test_triton_has_every_function_of_the_reference_with_its_signature():
    ops = select("triton", "cuda")
    theirs = public(reference)
    assert set(theirs) <= set(public(ops))
    for name, function in theirs.items():
        parameters = inspect.signature(getattr(ops, name)).parameters
        expected = inspect.signature(function).parameters
        assert [p for p in parameters if p in expected] == list(expected), name
        extra = [p for p in parameters.values() if p.name not in expected]
        assert all(p.default is not p.empty for p in extra), name
        assert all(parameters[key].default == value.default for key, value in expected.items()), name
    fused = {"noising", "flow_errors", "corrected_loss", "guided_update", "rmsnorm_modulate"}
    fused |= {"gated_rmsnorm_modulate", "qknorm_rope", "swiglu", "drop_labels", "cast_rows", "cast_columns"}
    assert {name for name in theirs if getattr(ops, name) is not theirs[name]} == fused
    assert select("auto", "cuda") is ops


@pytest.mark.parametrize("kind", ["Triton", "", "cuda"])
def test_unknown_kind(kind):
    with pytest.raises(KernelUnavailable, match="none of auto, triton, reference"):
        select(kind, "cpu")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(fastasync_kernels, "_has_triton", lambda: False)
    assert select("auto", "cuda") is reference
    with pytest.raises(KernelUnavailable, match="not installed"):
        select("triton", "cuda")


def test_imports_and_refuses_without_triton_or_interpreter():
    program = """
import sys
import fastasync_kernels as kernels
assert not {"torch", "triton"} & set(sys.modules)
try:
    kernels.select("triton", "cpu")
except kernels.KernelUnavailable as error:
    assert "needs a CUDA device, not cpu" in str(error)
else:
    raise SystemExit("triton on a CPU without the interpreter was not refused")
sys.modules["triton"] = None
for name in [name for name in sys.modules if name.startswith("fastasync_kernels.")]:
    del sys.modules[name]
assert kernels.select("auto", "cuda").__name__ == "fastasync_kernels.reference"
try:
    kernels.select("triton", "cuda")
except kernels.KernelUnavailable as error:
    assert "not installed" in str(error)
"""
    root = inspect.getfile(fastasync_kernels).rsplit("/", 2)[0]
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
