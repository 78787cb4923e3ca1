"""The ceilings that rows are shares of: bf16's, and fp8's where there is one."""

import pytest
import torch

from bench import harness
from bench.harness import Bench, summarize

CPU = torch.device("cpu")


@pytest.fixture
def bench():
    return Bench(CPU, rounds=1, say=lambda line: None)


@pytest.mark.parametrize("dtype", ["fp8", "float8_e4m3fn", "bf16", "auto"])
@pytest.mark.parametrize("fp8_rate", [0.0, 4e12])
def test_a_row_in_fp8_is_a_share_of_fp8s_ceiling(bench, monkeypatch, dtype, fp8_rate):
    """Where none was measured it is one of bf16's, as a row in bf16 always is."""
    monkeypatch.setattr(bench, "small", False)
    bench.copy_rate, bench.matmul_rate, bench.fp8_rate = 1e9, 1e12, fp8_rate
    row = bench.add("step", "XL", "ours", "batch 8", dtype, summarize([1.0]), flops=5e8, images=8)
    in_fp8 = bool(fp8_rate) and dtype in ("fp8", "float8_e4m3fn")
    assert row.matmul_tflop_per_s == (4.0 if in_fp8 else 1.0)
    assert row.share == pytest.approx(0.125 if in_fp8 else 0.5)
    assert row.mfu == pytest.approx(5e11 / (1979e12 if in_fp8 else 989e12))
    casts = bench.add("fp8", "qkv", "casts", "[8, 8]", dtype, summarize([1.0]), nbytes=5e5)
    assert casts.share == pytest.approx(0.5)  # of copy bandwidth


def test_fp8s_ceiling_is_measured_where_there_are_such_products(bench, monkeypatch):
    bench.measure_ceilings()
    assert [row.dtype for row in bench.rows] == ["uint8", "float32"]
    assert bench.fp8_rate == 0
    monkeypatch.setattr(harness, "has_fp8", lambda device: True)
    bench.measure_ceilings()
    *_, plain, fp8 = bench.rows
    assert (fp8.subject, fp8.case, fp8.variant, fp8.shape) == ("ceilings", "matmul", "torch", plain.shape)
    assert (plain.dtype, fp8.dtype) == ("float32", "float8_e4m3fn")
    assert (plain.share, fp8.share) == (pytest.approx(1), pytest.approx(1))
    assert fp8.matmul_tflop_per_s == pytest.approx(bench.fp8_rate / 1e12)
    assert bench.skipped == []


def test_a_torch_without_fp8_products_ends_nothing(bench, monkeypatch):
    def refuse(*factors):
        raise NotImplementedError("no such product")

    monkeypatch.setattr(harness, "has_fp8", lambda device: True)
    monkeypatch.setattr(harness.fp8_linear, "product", refuse)
    bench.measure_ceilings()
    assert bench.skipped == ["ceilings, fp8: no such product"]
    assert bench.fp8_rate == 0
