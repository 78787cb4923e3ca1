"""The experiment that puts SwiGLU behind its products: right in every form, and it compiles for sm_90."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.experiments.swiglu_gemm import (
    BASELINE,
    OWN_EPILOGUE,
    Candidates,
    Quack,
    backward_operation,
    best,
    by_turns,
    compare,
    forward_operation,
    main,
    measure,
    verdict,
)
from bench.experiments.swiglu_gemm_kernels import Tile, gated_product, gated_product_backward
from bench.harness import Bench, Row, WrongResult, check

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TILES = [  # the sizes give full tiles, and rows and depths that do not fill them; two programs take all of them
    Tile(16, 32, 16, 4, 1),
    Tile(32, 16, 16, 4, 1, joined=False, parts=2, flat=False),
    Tile(16, 64, 32, 4, 1, parts=4),
]
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors")


def silent(**options):
    return Bench(CPU, rounds=1, say=lambda line: None, **options)


@needs_interpreter
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens", [32, 21, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("flag", [True, False])
def test_it_computes_what_product_and_swiglu_do(tile, tokens, dtype, flag):
    size = {"width": 40, "hidden": 64, "tokens": tokens}
    for operation in (forward_operation, backward_operation):
        op = operation(silent(), size, 1, dtype, Candidates([tile]), flag)
        errors = check(op.variants, op.make(3, 1))
        assert set(errors) == {"reference", BASELINE, tile.name}
        assert errors[tile.name] < (1e-6 if dtype is torch.float32 else 1e-3)


@needs_interpreter
def test_a_wrong_candidate_is_named_and_does_not_stop_the_others(monkeypatch):
    lines = []
    bench = Bench(CPU, rounds=1, say=lines.append)
    size = {"width": 16, "hidden": 32, "tokens": 16}
    op = forward_operation(bench, size, 1, torch.float32, Candidates(TILES[:1]), True)
    right = op.variants[TILES[0].name]
    op.variants = dict(op.variants)
    op.variants["triton wrong"] = lambda *a: [1.01 * result for result in right(*a)]
    op.variants["triton fails"] = lambda *a: 1 / 0
    rows = compare(bench, op)
    assert {row.variant for row in rows} == {"reference", BASELINE, TILES[0].name}
    assert any("triton wrong: WrongResult" in line for line in lines)
    assert any("triton fails: ZeroDivisionError" in line for line in lines)
    op = forward_operation(bench, size, 1, torch.float32, Candidates(TILES[:1]), True)
    assert {row.variant for row in compare(bench, op, until=0.0)} == {"reference", BASELINE}
    assert "out of time" in lines[-3] + lines[-2] + lines[-1]
    op.variants[BASELINE] = lambda *a: [1.01 * result for result in right(*a)]
    with pytest.raises(WrongResult):
        compare(bench, op)


def test_gate_and_up_by_turns():
    assert by_turns(torch.tensor([1, 2, 3, 10, 20, 30])).tolist() == [1, 10, 2, 20, 3, 30]
    rows = torch.arange(8).view(4, 2)
    assert torch.equal(by_turns(rows), rows[[0, 2, 1, 3]])


@needs_interpreter
def test_wrong_arguments_are_refused():
    x, w12, bias = torch.randn(16, 16), torch.randn(64, 16), torch.randn(64)
    tile = Tile(16, 32, 16, 4, 1)
    with pytest.raises(TypeError, match="x must be"):
        gated_product(x.double(), w12, bias, tile)
    with pytest.raises(TypeError, match="w12 must be"):
        gated_product(x, w12.half(), bias, tile)
    with pytest.raises(ValueError, match="bias must have shape"):
        gated_product(x, w12, bias[:5], tile)
    with pytest.raises(ValueError, match="multiple of the tile's 64"):
        gated_product(x, w12, bias, tile._replace(hidden=64))
    with pytest.raises(ValueError, match="x must be contiguous"):
        gated_product(x.T, w12, bias, tile)
    with pytest.raises(ValueError, match="packed must have shape"):
        gated_product_backward(x, torch.randn(16, 32), torch.randn(16, 32), tile)


@needs_interpreter
def test_the_whole_experiment():
    lines = []
    bench = Bench(CPU, rounds=1, say=lines.append)
    tile, size = TILES[0], {"width": 16, "hidden": 32, "tokens": 16}
    both = Candidates([tile], [Quack()])
    said = measure(bench, size, 1, torch.float32, both, both, 100.0)
    assert [line.split(":")[0] for line in said] == ["forward", "forward, out only", "backward, bias", "backward"]
    assert sum(f"{Quack().name}: " in line for line in lines) == 4  # not installed here: each case says so
    assert sum(line.count("sums in the epilogue") for line in lines) == len(OWN_EPILOGUE)  # with the bias only
    assert {row.case for row in bench.rows} >= {"product forward", "product backward, bias"}


def test_verdict():
    pairs = (("triton a", 0.3), ("quack b", 0.2), (BASELINE, 0.4), ("reference", 1.0))
    rows = [Row(*"dcdtt", "s", "c", name, "", "", ms, ms, ms, 1) for name, ms in pairs]
    assert verdict(rows) == f"c: quack b 0.2000 ms; {BASELINE} 0.4000 ms (-50.0%)"
    assert verdict(rows[2:]).startswith("no verdict")
    named = [dataclasses.replace(rows[0], variant=tile.name, ms=ms) for tile, ms in zip(TILES, (3.0, 1.0, 2.0))]
    assert best(named, TILES, 2) == [TILES[1], TILES[2]]
    assert main([]) == 2 or torch.cuda.is_available()


@pytest.mark.parametrize("chosen", ["forward:0", "backward:0"])
def test_it_compiles_for_sm_90_without_spills(chosen):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "bench.experiments.swiglu_gemm", "--offline", "--tiles", chosen]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok {chosen.split(':')[0]} triton" in done.stdout
    assert "wgmma" in done.stdout
