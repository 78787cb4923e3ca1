"""QK-norm and RoPE from the packed qkv; v is a view, and its gradient part of the packed one."""

from __future__ import annotations

import torch

from bench.harness import Bench, Operation
from bench.subjects.common import Random, dtypes, short, sizes, variants
from fastasync.model.embeddings import rope_tables


def run(bench: Bench) -> None:
    size, batch = sizes(bench), 2 if bench.small else 256
    tokens, width, heads = size["tokens"], size["width"], size["heads"]
    tables = [table.to(bench.device) for table in rope_tables(width // heads, int(tokens**0.5))]
    for dtype in dtypes(bench):
        plane = batch * tokens * width * dtype.itemsize

        def make(seed: int, batch: int, backward: bool, bias: bool, dtype: torch.dtype = dtype) -> list:
            random = Random(bench.device, seed, dtype)
            qkv = random(batch, tokens, 3 * width, grad=backward)
            weights = [random(width // heads, dtype=torch.float32, grad=backward) for _ in range(2)]
            douts = [random(batch, tokens, heads, width // heads).transpose(1, 2) for _ in range(3)]
            last = [random(3 * width, dtype=torch.float32, grad=True)] if bias else []
            return [qkv, *weights, *tables, heads, *last, *([douts] if backward else [])]

        for backward, bias in ((False, False), (True, False), (True, True)):
            case = f"{'fwd+bwd' if backward else 'fwd'}{', bias' if bias else ''}"
            bench.operation(
                Operation(
                    *("qknorm_rope", case, f"[{batch}, {tokens}, 3x{width}]", short(dtype)),
                    variants(bench, "qknorm_rope", "qknorm_rope", backward, bias),
                    lambda seed, batch, make=make, backward=backward, bias=bias: make(seed, batch, backward, bias),
                    *(batch, (4 + 8 if backward else 4) * plane),
                )
            )
