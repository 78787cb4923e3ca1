"""The experiment that fuses QK-norm, RoPE and attention: right in every configuration, and it compiles for sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastasync_kernels import reference

from bench.experiments.short_attention import TILES, Tile, compare, main, short_attention, two_kernels, verdict
from bench.harness import Bench, Row, check
from fastasync.model.embeddings import rope_tables

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def draw(batch, tokens, heads, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(dtype)
    weights = [1 + 0.3 * torch.randn(width, generator=generator) for _ in range(2)]
    angles = 3 * torch.randn(tokens, width // 2, generator=generator)
    return [qkv, *weights, angles.cos(), angles.sin(), heads]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors")
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((2, 32, 2, 72), Tile(16, 1, 16)),
        ((1, 32, 2, 72), Tile(16, 2, 32)),  # all keys at once, programs of two blocks
        ((1, 21, 1, 72), Tile(16, 2, 16)),  # keys and queries that do not fill their blocks
        ((1, 21, 1, 40), Tile(32, 1, 32)),
        ((0, 16, 2, 72), Tile(16, 1, 16)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_computes_what_the_two_kernels_do(shape, tile, dtype):
    arguments = draw(*shape, dtype)
    ours = lambda *a: short_attention(*a, tile=tile)  # noqa: E731
    errors = check({"reference": two_kernels(reference, "reference"), "fused": ours}, arguments)
    assert errors["fused"] < (1e-6 if dtype is torch.float32 else 2e-3)
    assert torch.equal(ours(*arguments), ours(*arguments))


def test_the_models_tables_are_pairs():
    for table in rope_tables(72, 4):
        assert torch.equal(table[:, ::2], table[:, 1::2])


def test_wrong_arguments_are_refused():
    qkv, *rest = draw(1, 16, 2, 72)
    with pytest.raises(ValueError, match="even Dh above 16"):
        short_attention(*draw(1, 16, 2, 16))
    with pytest.raises(TypeError, match="qkv"):
        short_attention(qkv.double(), *rest)
    with pytest.raises(ValueError, match="cos must have shape"):
        short_attention(qkv, rest[0], rest[1], rest[2][:, :5], rest[3], 2)


def test_the_comparison_names_both_times():
    lines = []
    bench = Bench(CPU, rounds=1, say=lines.append)
    bench.copy_rate, bench.matmul_rate = 1e9, 1e12
    size = {"tokens": 16, "width": 144, "heads": 2}
    rows = compare(bench, size, 2, torch.float32, [Tile(16, 1, 16)])
    names = {row.variant for row in rows}
    assert names == {"reference", "qknorm_rope + sdpa", Tile(16, 1, 16).name}
    assert verdict(rows).count(" ms") == 2
    assert verdict(rows[:1]).startswith("no verdict")
    pairs = (("fused a", 0.3), ("qknorm_rope + x", 0.4))
    made = [Row(*"dcdtt", "s", "c", name, "", "", ms, ms, ms, 1) for name, ms in pairs]
    assert verdict(made) == "fused a: 0.3000 ms; qknorm_rope + x: 0.4000 ms (-25.0%)"
    assert main([]) == 2


def test_it_compiles_for_sm_90_without_spills():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    chosen = str(TILES.index(Tile()))
    command = [sys.executable, "-m", "bench.experiments.short_attention", "--offline", "--tiles", chosen]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok fused 64x1 by 64" in done.stdout
    assert "wgmma" in done.stdout
