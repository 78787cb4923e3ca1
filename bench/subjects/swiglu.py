"""SwiGLU: silu(a) b of the packed halves."""

from __future__ import annotations

import torch

from bench.harness import Bench, Operation
from bench.subjects.common import Random, dtypes, short, sizes, variants


def run(bench: Bench) -> None:
    size, batch = sizes(bench), 2 if bench.small else 256
    tokens, hidden = size["tokens"], size["hidden"]
    for dtype in dtypes(bench):
        plane = batch * tokens * hidden * dtype.itemsize

        def make(seed: int, batch: int, backward: bool, dtype: torch.dtype = dtype) -> list:
            random = Random(bench.device, seed, dtype)
            packed = random(batch, tokens, 2 * hidden, grad=backward)
            return [packed, *([[random(batch, tokens, hidden)]] if backward else [])]

        for backward in (False, True):
            bench.operation(
                Operation(
                    *("swiglu", "fwd+bwd" if backward else "fwd", f"[{batch}, {tokens}, 2x{hidden}]", short(dtype)),
                    variants(bench, "swiglu", "swiglu", backward),
                    lambda seed, batch, make=make, backward=backward: make(seed, batch, backward),
                    *(batch, (3 + 5 if backward else 3) * plane),
                )
            )
