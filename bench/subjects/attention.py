"""Every attention backend that runs here, forward and with its backward, in both memory orders of q and k."""

from __future__ import annotations

import torch
from fastasync_kernels.attention import attention, available_backends

from bench.harness import Bench, Operation, check, with_backward
from bench.subjects.common import XL, Random, dtypes, short, sizes

CIFAR10 = {"width": 256, "heads": 8, "tokens": 64}  # the preset's


def run(bench: Bench) -> None:
    for size in [sizes(bench)] if bench.small else [XL, CIFAR10]:
        _run(bench, size, 2 if bench.small else 256)


def _run(bench: Bench, size: dict[str, int], batch: int) -> None:
    tokens, heads = size["tokens"], size["heads"]
    width = size["width"] // heads
    for dtype in dtypes(bench):
        names = []
        for name, problem in available_backends(bench.device, dtype, (batch, heads, tokens, width)).items():
            if name == "triton" and bench.small and not problem:
                problem = "needs a CUDA device (the interpreter's time means nothing)"
            if problem:
                bench.skip(f"attention, {name}", problem)
            elif name != "reference":
                names.append(name)

        def make(seed: int, batch: int, backward: bool, order: str, dtype: torch.dtype = dtype) -> list:
            random = Random(bench.device, seed, dtype)
            packed = random(batch, tokens, 3, heads, width)
            q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
            if order == "bnhd":
                q, k = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k))
            else:
                q, k = q.contiguous(), k.contiguous()
            q, k, v = (part.detach().requires_grad_(backward) for part in (q, k, v))
            dout = random(batch, tokens, heads, width).transpose(1, 2)
            return [q, k, v, *([[dout]] if backward else [])]

        flops = 4 * batch * heads * tokens**2 * width
        for order in ("bnhd",) if bench.small else ("bnhd", "bhnd"):
            for backward in (False, True):
                runs = {}
                for name in ("reference", *names):
                    call = lambda *a, name=name: attention(*a, backend=name)  # noqa: E731
                    runs[name] = with_backward(call) if backward else call

                def inputs(seed: int, batch: int, backward: bool = backward, order: str = order) -> list:
                    return make(seed, batch, backward, order)

                usable = {"reference": runs["reference"]}
                for name in names:
                    try:
                        check({"reference": runs["reference"], name: runs[name]}, inputs(0, 2))
                        usable[name] = runs[name]
                    except Exception as error:  # one backend that is wrong or fails must not hide the others
                        bench.skip(f"attention, {name}, {order}", f"{type(error).__name__}: {str(error)[:100]}")
                bench.operation(
                    Operation(
                        *("attention", f"{'fwd+bwd' if backward else 'fwd'} {order}"),
                        *(f"[{batch}, {heads}, {tokens}, {width}]", short(dtype), usable, inputs, batch),
                        nbytes=(12 if backward else 4) * batch * tokens * heads * width * dtype.itemsize,
                        flops=flops * 3.5 if backward else flops,
                    )
                )
