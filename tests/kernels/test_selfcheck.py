"""The comparison that guards users against a compiler's mistakes passes on right kernels and catches wrong ones."""

import fastasync_kernels
import pytest
import torch
from fastasync_kernels import reference, select, selfcheck, triton_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (
    (torch.float32, torch.bfloat16) if torch.cuda.is_available() else (torch.float32,)
)  # see the interpreter's bf16


def test_right_kernels_agree():
    assert selfcheck.disagreement(DEVICE, DTYPES) == ""


def zeros(packed):
    return torch.zeros_like(reference.swiglu(packed))


def drifts(x, weight, shift, scale):
    return reference.rmsnorm_modulate(x, weight, shift, scale * 1.01)


def wrong_backward(packed):
    out = reference.swiglu(packed)
    return out.detach() + 0.5 * (out - out.detach())


def breaks(*_):
    raise RuntimeError("PTX assembly failed")


@pytest.mark.parametrize(
    ("name", "broken"),
    [("swiglu", zeros), ("rmsnorm_modulate", drifts), ("swiglu", wrong_backward), ("guided_update", breaks)],
)
def test_wrong_kernels_are_named(monkeypatch, name, broken):
    for other in ("noising", "corrected_loss", "guided_update", "rmsnorm_modulate", "gated_rmsnorm_modulate"):
        monkeypatch.setattr(triton_ops, other, getattr(reference, other))  # quick ones: only one is under test
    monkeypatch.setattr(triton_ops, "qknorm_rope", reference.qknorm_rope)
    monkeypatch.setattr(triton_ops, name, broken)
    assert selfcheck.disagreement(DEVICE, (torch.float32,)).startswith(name)


def test_auto_falls_back_and_triton_refuses(monkeypatch):
    monkeypatch.setattr(fastasync_kernels, "_fault", lambda device: "swiglu (torch.bfloat16): error 1")
    with pytest.warns(UserWarning, match="swiglu"):
        assert select("auto", "cuda") is reference
    with pytest.raises(fastasync_kernels.KernelUnavailable, match="swiglu"):
        select("triton", "cuda")


def test_wrong_casts_to_fp8_are_found(monkeypatch):
    check = selfcheck.casts_disagreement.__wrapped__
    assert check(DEVICE) == ""
    monkeypatch.setattr(triton_ops, "cast_columns", lambda x, top: reference.cast_columns(2 * x, top))
    assert check(DEVICE) == "they differ from their reference"
