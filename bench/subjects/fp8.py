"""What fp8 could save at XL's shapes: the products of the block linears in bf16 and fp8, and the casts before them.

A linear of a step is three products; the default recipe computes the output and the input's gradient in fp8 with a
scale for each row, the weight's gradient in bf16 (in fp8 it would need the columns cast too).  Its casts read 16-bit
numbers and write 8-bit ones: of the input in the forward pass, of the output's gradient in the backward pass.
(Weights are cast too, a hundredth of that.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import Bench, Summary, summarize
from bench.subjects.common import sizes
from fastasync.errors import UserError
from fastasync.training.build import check_fp8

LARGEST = 448.0  # of float8_e4m3fn


def cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] in fp8, and the float32 scales [M, 1] that undo it."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def run(bench: Bench) -> None:
    if not bench.small:
        try:
            check_fp8(bench.device)
        except UserError as error:
            bench.skip("fp8", str(error))
            return
    of_bench = sizes(bench)
    width, hidden, rows = of_bench["width"], of_bench["hidden"], (2 if bench.small else 256) * of_bench["tokens"]
    shapes = {"qkv": (width, 3 * width), "proj": (width, width), "w12": (width, 2 * hidden), "w3": (hidden, width)}
    compiled = cast if bench.small else torch.compile(cast, dynamic=False)
    totals = dict.fromkeys(("bf16", "fp8", "casts"), 0.0)
    for name, (k, n) in shapes.items():
        if bench.time_is_up(f"fp8 {name}"):
            return
        x, g, w = (torch.randn(shape, device=bench.device).bfloat16() for shape in ((rows, k), (rows, n), (n, k)))
        (x8, sx), (g8, sg), (w8, sw), (v8, sv) = (cast(t) for t in (x, g, w, w.t().contiguous()))
        (gt8, sgt), (xt8, sxt) = (cast(t.t().contiguous()) for t in (g, x))
        one = torch.ones((), device=bench.device)
        calls: dict[str, Callable[[], object]] = {
            "output, bf16": lambda x=x, w=w: x @ w.t(),
            "output, fp8 rows": lambda a=x8, b=w8, s=sx, t=sw: product(a, b, s, t.t()),
            "output, fp8 one scale": lambda a=x8, b=w8, s=one: product(a, b, s, s),
            "input's gradient, bf16": lambda g=g, w=w: g @ w,
            "input's gradient, fp8 rows": lambda a=g8, b=v8, s=sg, t=sv: product(a, b, s, t.t()),
            "weight's gradient, bf16": lambda g=g, x=x: g.t() @ x,
            "weight's gradient, fp8 rows": lambda a=gt8, b=xt8, s=sgt, t=sxt: product(a, b, s, t.t()),
            "cast of the input": lambda x=x: compiled(x),
            "cast of the gradient": lambda g=g: compiled(g),
        }
        times = {case: summarize(values) for case, values in bench.interleaved(calls, warm=2).items()}
        for case, found in times.items():
            moved = 3 * rows * (k if "input" in case else n) if case.startswith("cast") else 0
            flops = 0 if moved else 2 * rows * k * n
            kind = "bfloat16" if "bf16" in case else "float8_e4m3fn"
            bench.add("fp8", name, case, f"[{rows}, {k}] x [{k}, {n}]", kind, found, flops=flops, nbytes=moved)
        totals["bf16"] += of(times, "output, bf16", "input's gradient, bf16", "weight's gradient, bf16")
        totals["fp8"] += of(times, "output, fp8 rows", "input's gradient, fp8 rows", "weight's gradient, bf16")
        totals["casts"] += of(times, "cast of the input", "cast of the gradient")
    text = ", ".join(f"{name} {28 * value:.1f} ms" for name, value in totals.items())
    bench.say(f"  products of 28 blocks: {text}")


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed, bf16."""
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def of(times: dict[str, Summary], *names: str) -> float:
    """Milliseconds of these together."""
    return sum(times[name].median for name in names)
