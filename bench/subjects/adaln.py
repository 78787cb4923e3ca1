"""RMSNorm with modulation, the gated residual with the next norm, and sums of partial results (``column_sums``)."""

from __future__ import annotations

import torch

from bench.harness import Bench, Operation
from bench.subjects.common import Random, dtypes, kernels, short, sizes, variants


def sums(bench: Bench) -> None:
    """512 rows as wide as the block's: what the gradients of biases and norms end with."""
    rows, width = (8, 64) if bench.small else (512, 1152)
    calls = {"reference": lambda x: x.sum(1)}
    if kernels(bench, "column sums") is not None:
        from fastasync_kernels.column_sums import column_sums  # imports triton

        calls |= {"reference compiled": torch.compile(calls["reference"], dynamic=False), "triton": column_sums}
    bench.operation(
        Operation(
            *("adaln", "column sums", f"[1, {rows}, {width}]", "float32", calls),
            lambda seed, batch: [Random(bench.device, seed, torch.float32)(1, rows, width)],
            *(1, 4 * (rows + 1) * width),
        )
    )


def run(bench: Bench) -> None:
    size, batch = sizes(bench), 2 if bench.small else 256
    tokens, width = size["tokens"], size["width"]
    for dtype in dtypes(bench):
        plane = batch * tokens * width * dtype.itemsize

        def plain(seed: int, batch: int, dtype: torch.dtype = dtype, backward: bool = False) -> list:
            random = Random(bench.device, seed, dtype)
            x = random(batch, tokens, width, grad=backward)
            weight = (1 + random(width, dtype=torch.float32, scale=0.1).detach()).requires_grad_(backward)
            shift, scale = (random(batch, width, grad=backward, scale=0.5) for _ in range(2))
            return [x, weight, shift, scale, *([[random(batch, tokens, width)]] if backward else [])]

        def gated(seed: int, batch: int, dtype: torch.dtype = dtype, backward: bool = False) -> list:
            random = Random(bench.device, seed + 1000, dtype)
            x, *rest = plain(seed, batch, dtype, backward)
            y, gate = random(batch, tokens, width, grad=backward), random(batch, width, grad=backward)
            douts = [[random(batch, tokens, width) for _ in range(2)]] if backward else []
            return [x, y, gate, *rest[:3], *douts]

        def biased(seed: int, batch: int, dtype: torch.dtype = dtype, backward: bool = False) -> list:
            *inputs, douts = gated(seed, batch, dtype, backward)
            return [*inputs, Random(bench.device, seed + 2000, dtype)(width, grad=True, dtype=torch.float32), douts]

        shape = f"[{batch}, {tokens}, {width}]"
        # planes of [B, N, D] that must move: forward, then forward and backward
        for name, make, moved, bias in (
            ("rmsnorm_modulate", plain, (2, 2 + 3), False),
            ("gated_rmsnorm_modulate", gated, (4, 4 + 6), False),
            ("gated_rmsnorm_modulate", biased, (4, 4 + 6), True),
        ):
            for backward in (True,) if bias else (False, True):
                case = f"{name.split('_')[0]} {'fwd+bwd' if backward else 'fwd'}{', bias' if bias else ''}"
                bench.operation(
                    Operation(
                        *("adaln", case, shape, short(dtype)),
                        variants(bench, f"adaln {name}", name, backward, bias),
                        lambda seed, batch, make=make, backward=backward: make(seed, batch, backward=backward),
                        *(batch, moved[backward] * plane),
                    )
                )
    sums(bench)
