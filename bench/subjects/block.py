"""One transformer block with a pending branch, forward and backward: where the floor of its parts lies."""

from __future__ import annotations

from typing import Any

import torch
from fastasync_kernels import gated_mlp
from fastasync_kernels.attention import resolve_backend

from bench.harness import Bench, summarize
from bench.subjects.common import Random, dtypes, kernels, short, sizes
from fastasync.model.dit import Block, select_ops
from fastasync.model.embeddings import rope_tables


def element_wise_bytes(tokens: int, width: int, hidden: int, itemsize: int) -> int:
    """Fewest bytes of a block's element-wise work, both directions, for one sample: each tensor moved once."""
    gated = 2 * (4 + 6) * width  # two gated norms
    rope, mlp = (4 + 8) * width, (3 + 5) * hidden
    return tokens * (gated + rope + mlp) * itemsize


def run(bench: Bench) -> None:
    size, batch = sizes(bench), 2 if bench.small else 256
    tokens, width, heads, hidden = size["tokens"], size["width"], size["heads"], size["hidden"]
    (dtype,) = dtypes(bench)
    random = Random(bench.device, 0, dtype)
    torch.manual_seed(0)
    block = Block(width, heads).to(bench.device)
    hidden = block.mlp.w3.in_features
    cos, sin = (table.to(bench.device) for table in rope_tables(width // heads, int(tokens**0.5)))
    x, y = (random(batch, tokens, width, grad=True) for _ in range(2))
    gate, condition = (random(batch, width, grad=True) for _ in range(2))
    dout = random(batch, tokens, width)
    backend = resolve_backend("auto", bench.device, dtype, (batch, heads, tokens, width // heads))

    def direction(function: Any, ops: Any, backward: bool) -> Any:
        def call() -> None:
            with (
                torch.autocast(bench.device.type, dtype, enabled=dtype is not torch.float32),
                torch.set_grad_enabled(backward),
            ):
                stream, branch, last, _ = function(x, y, gate, None, condition, cos, sin, ops)
                out = stream + last[:, None] * branch
            if backward:
                torch.autograd.grad(out, [x, y, gate, condition, *block.parameters()], dout)

        return call

    pytorch = select_ops("reference", bench.device, "sdpa")
    ours = None if kernels(bench, "block") is None else select_ops("triton", bench.device, backend)
    variants = {"pytorch": (block.compute, pytorch)}
    if not bench.small:
        variants["pytorch compiled"] = (torch.compile(block.compute, dynamic=False), pytorch)
    if ours is not None:
        variants["triton"] = (block.compute, ours)
        variants["triton compiled"] = (torch.compile(block.compute, dynamic=False), ours)
        if why := gated_mlp.refusal(bench.device, dtype, gated_mlp.Shape(batch * tokens, width, hidden, width)):
            bench.skip("block, MLP by quack", why)
        else:
            variants["triton, quack compiled"] = (
                torch.compile(block.compute, dynamic=False),
                ours._replace(mlp="quack"),
            )
    linear = 2 * tokens * (4 * width * width + 3 * width * hidden) + 2 * 6 * width * width
    forward = batch * (linear + 4 * tokens**2 * width)
    for backward in (False, True):
        if bench.time_is_up("block"):
            return
        calls = {name: direction(function, ops, backward) for name, (function, ops) in variants.items()}
        times = bench.interleaved(calls, warm=2)
        least = element_wise_bytes(tokens, width, hidden, dtype.itemsize) * batch
        for name, values in times.items():
            floor = 3 * forward / bench.matmul_rate + least / bench.copy_rate
            note = f"floor, parts one after the other: {1e3 * floor:.3g} ms" if backward else ""
            bench.add(
                *("block", "fwd+bwd" if backward else "fwd", name, f"[{batch}, {tokens}, {width}]", short(dtype)),
                summarize(values),
                flops=forward * (3 if backward else 1),
                note=note,
            )
