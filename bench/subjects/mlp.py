"""The gated MLP with bf16 weights, as in training with working weights: separate operations, and by quack-kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastasync_kernels import reference
from fastasync_kernels.gated_mlp import Shape, gated_mlp, plain_mlp, refusal
from torch import Tensor

from bench.harness import Bench, Operation, with_backward
from bench.subjects.common import Random, dtypes, kernels, short, sizes


def pytorch(x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
    return F.linear(reference.swiglu(F.linear(x, w12, b12)), w3, b3)


def run(bench: Bench) -> None:
    size, batch = sizes(bench), 2 if bench.small else 256
    width, hidden, tokens = size["width"], size["hidden"], size["tokens"]
    (dtype,) = dtypes(bench)
    rows = batch * tokens
    forms: dict[str, Callable[..., Tensor]] = {"pytorch": pytorch}
    if (ops := kernels(bench, "mlp")) is not None:
        forms["triton"] = plain_mlp(ops.swiglu)
    if why := refusal(bench.device, dtype, Shape(rows, width, hidden, width)):
        bench.skip("mlp, quack", why)
    else:
        forms["quack"] = gated_mlp
    if not bench.small:
        forms |= {f"{name} compiled": torch.compile(form, dynamic=False) for name, form in forms.items()}
    flops, numbers = 6 * rows * width * hidden, rows * (2 * width + 2 * hidden) + 3 * width * hidden
    for backward in (False, True):

        def make(seed: int, count: int, backward: bool = backward) -> list[Any]:
            random = Random(bench.device, seed, dtype)
            x = random(count * tokens, width, grad=backward)
            w12 = random(2 * hidden, width, scale=width**-0.5, grad=backward)
            w3 = random(width, hidden, scale=hidden**-0.5, grad=backward)
            b12, b3 = random(2 * hidden, scale=0.1, grad=backward), random(width, scale=0.1, grad=backward)
            return [x, w12, b12, w3, b3, *([[random(count * tokens, width)]] if backward else [])]

        with torch.set_grad_enabled(backward):
            bench.operation(
                Operation(
                    *("mlp", "fwd+bwd" if backward else "fwd", f"[{rows}, {width}] x [{width}, 2x{hidden}]"),
                    short(dtype),
                    {name: with_backward(form) if backward else form for name, form in forms.items()},
                    *(make, batch),
                    # forward alone: x is read, h written and read, the output written
                    nbytes=0.0 if backward else numbers * dtype.itemsize,
                    flops=flops * (3 if backward else 1),
                )
            )
