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

        def make(seed: int, batch: int, backward: bool, bias: bool, dtype: torch.dtype = dtype) -> list:
            random = Random(bench.device, seed, dtype)
            packed = random(batch, tokens, 2 * hidden, grad=backward)
            last = [random(2 * hidden, dtype=torch.float32, grad=True)] if bias else []
            return [packed, *last, *([[random(batch, tokens, hidden)]] if backward else [])]

        for backward, bias in ((False, False), (True, False), (True, True)):
            case = f"{'fwd+bwd' if backward else 'fwd'}{', bias' if bias else ''}"
            bench.operation(
                Operation(
                    *("swiglu", case, f"[{batch}, {tokens}, 2x{hidden}]", short(dtype)),
                    variants(bench, "swiglu", "swiglu", backward, bias),
                    lambda seed, batch, make=make, backward=backward, bias=bias: make(seed, batch, backward, bias),
                    *(batch, (3 + 5 if backward else 3) * plane),
                )
            )
