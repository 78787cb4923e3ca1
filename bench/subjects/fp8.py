"""What fp8 saves at XL's shapes: the products of the block linears in bf16 and fp8, and the casts that fp8 needs.

A linear of a step is three products, all in fp8 with a scale for each row of both factors.  Input and output gradient
are cast by rows and by columns, each from 16-bit numbers to 8-bit ones; weights too, a hundredth of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import fastasync_kernels
import torch
from fastasync_kernels import reference
from fastasync_kernels.weight_gradient import weight_gradient
from torch import Tensor

from bench.harness import Bench, Summary, summarize
from bench.subjects.common import sizes
from fastasync.errors import UserError
from fastasync.training.build import check_fp8


def both_ways(ops: ModuleType, x: Tensor) -> tuple[Tensor, ...]:
    """The casts of x [M, K] by rows and by columns, each with its scales."""
    rows, scale, top = ops.cast_rows(x, True)
    return rows, scale, *ops.cast_columns(x, top)


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
    plain = functools.partial(both_ways, reference)
    casts = {"reference" if bench.small else "compiled": plain if bench.small else torch.compile(plain, dynamic=False)}
    ours = fastasync_kernels.select("auto", bench.device)
    if ours is not reference:
        casts["ours"] = functools.partial(both_ways, ours)
    totals = dict.fromkeys(("bf16", "fp8", "casts"), 0.0)
    for name, (k, n) in shapes.items():
        if bench.time_is_up(f"fp8 {name}"):
            return
        x, g, w = (torch.randn(shape, device=bench.device).bfloat16() for shape in ((rows, k), (rows, n), (n, k)))
        (x8, sx, xt8, sxt), (g8, sg, gt8, sgt), (w8, sw, v8, sv) = (both_ways(ours, t) for t in (x, g, w))
        one = torch.ones((), device=bench.device)
        calls: dict[str, Callable[[], object]] = {
            "output, bf16": lambda x=x, w=w: x @ w.t(),
            "output, fp8 rows": lambda a=x8, b=w8, s=sx, t=sw: product(a, b, s, t.t()),
            "output, fp8 one scale": lambda a=x8, b=w8, s=one: product(a, b, s, s),
            "input's gradient, bf16": lambda g=g, w=w: g @ w,
            "input's gradient, fp8 rows": lambda a=g8, b=v8, s=sg, t=sv: product(a, b, s, t.t()),
            "weight's gradient, bf16": lambda g=g, x=x: weight_gradient(g, x, 1),
            "weight's gradient, bf16, 2 parts": lambda g=g, x=x: weight_gradient(g, x, 2),
            "weight's gradient, bf16, 4 parts": lambda g=g, x=x: weight_gradient(g, x, 4),
            "weight's gradient, fp8 rows": lambda a=gt8, b=xt8, s=sgt, t=sxt: product(a, b, s, t.t()),
        }
        for who, both in casts.items():
            calls |= {f"casts of the input, {who}": lambda both=both, x=x: both(x)}
            calls |= {f"casts of the gradient, {who}": lambda both=both, g=g: both(g)}
        times = {case: summarize(values) for case, values in bench.interleaved(calls, warm=2).items()}
        for case, found in times.items():
            moved = 4 * rows * (k if "input" in case else n) if case.startswith("cast") else 0
            flops = 0 if moved else 2 * rows * k * n
            kind = "bfloat16" if "bf16" in case else "float8_e4m3fn"
            bench.add("fp8", name, case, f"[{rows}, {k}] x [{k}, {n}]", kind, found, flops=flops, nbytes=moved)
        three = ("output", "input's gradient", "weight's gradient")
        totals["bf16"] += of(times, *(f"{name}, bf16" for name in three))
        totals["fp8"] += of(times, *(f"{name}, fp8 rows" for name in three))
        totals["casts"] += of(times, *(f"casts of the {name}, {list(casts)[-1]}" for name in ("input", "gradient")))
    text = ", ".join(f"{name} {28 * value:.1f} ms" for name, value in totals.items())
    bench.say(f"  products of 28 blocks: {text}")


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed, bf16."""
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def of(times: dict[str, Summary], *names: str) -> float:
    """Milliseconds of these together."""
    return sum(times[name].median for name in names)
