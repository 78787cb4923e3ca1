"""Attention of 129 to 256 tokens: which division into programs is fastest, and is it faster than cuDNN's?

``python3 -m bench.experiments.medium_attention`` on a GPU, at most --seconds: compiles every variant (in threads),
checks each one on two samples against the formula in float32, and twice on the whole batch for the same bits, then
times it by turns with cuDNN's: recorded graphs, two sets of tensors in turn, each far larger than the second-level
cache.  One line a variant as soon as it is known; errors are printed and the variant skipped; a sorted table last.

The two launches of a "two" backward are timed apart, "queries"/"exact" (dq and D) and "keys" (dk and dv), and the best
ones together at the end.  cuDNN's backward is its forward and backward less its forward.

``--offline`` compiles every variant for sm_90 without a GPU and says what it takes; ``--rehearse`` runs every variant
on a small shape under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

if "--rehearse" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from fastasync_kernels import medium_attention
from fastasync_kernels.attention import _reference, attention
from fastasync_kernels.medium_attention import Plan, Tile, offline_cases
from torch import Tensor

XL: tuple[int, int, int, int] = (256, 16, 256, 72)
FURTHEST = 0.01  # from the formula, relative (L2): rounding to bfloat16 is a third of it
ROUNDS, CALLS, SETS = 12, 4, 2

FORWARDS = (
    Tile(64, 32, 4, 2),
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 3),
    Tile(64, 64, 4, 1),
    Tile(64, 64, 4, 2, blocks=2),
    Tile(64, 128, 4, 2),
    Tile(128, 32, 8, 2),
    Tile(128, 64, 8, 2),
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 2, blocks=2),
    Tile(128, 128, 8, 2),
    Tile(64, 256, 4, 1),  # all keys at once from here on
    Tile(64, 256, 4, 1, blocks=2),
    Tile(64, 256, 4, 1, blocks=4),
    Tile(64, 256, 4, 2, blocks=4),
    Tile(64, 256, 8, 1, blocks=4),
    Tile(128, 256, 8, 1),
    Tile(128, 256, 8, 1, blocks=2),
)
QUERIES = (
    Tile(64, 32, 4, 2),
    Tile(64, 32, 4, 3),
    Tile(64, 64, 4, 1),
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 3),
    Tile(64, 64, 4, 2, limit=128),
    Tile(64, 32, 4, 2, blocks=2),
    Tile(128, 32, 8, 2, limit=128),
    Tile(128, 64, 8, 2),
    Tile(128, 64, 8, 2, limit=128),
    Tile(128, 64, 8, 2, blocks=2),
    Tile(64, 128, 8, 2),
    Tile(64, 256, 8, 1, exact=True),
)
KEYS = (
    Tile(32, 64, 4, 2),
    Tile(32, 64, 4, 3),
    Tile(64, 64, 4, 1),
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 3),
    Tile(64, 64, 4, 2, limit=168),
    Tile(32, 128, 8, 2),
    Tile(64, 128, 8, 2),
    Tile(64, 128, 8, 3),
    Tile(64, 128, 16, 2),
)
WHOLE = (
    Plan("both", Tile(64, 64, 4, 2)),
    Plan("both", Tile(32, 64, 4, 2)),
    Plan("both", Tile(64, 128, 8, 2)),
    Plan("fused", Tile(64, 128, 8, 1)),
    Plan("fused", Tile(64, 128, 8, 2)),
    Plan("fused", Tile(64, 128, 8, 2, each=0)),
    Plan("fused", Tile(64, 64, 8, 2)),
    Plan("fused", Tile(64, 64, 4, 1, each=2)),
    Plan("fused", Tile(64, 64, 4, 2, each=2)),
    Plan("fused", Tile(128, 64, 8, 2)),
    Plan("fused", Tile(64, 256, 16, 2)),
    Plan("fused", Tile(32, 128, 8, 2)),  # its dq takes the older instruction
)


class Variant(NamedTuple):
    """``checked``: the whole backward that it is checked in; None for a forward."""

    name: str
    timed: Tile | Plan
    checked: Plan | None = None


def named(part: str, tile: Tile) -> str:
    extras = [f"blocks {tile.blocks}"] * (tile.blocks > 1) + [f"limit {tile.limit}"] * bool(tile.limit)
    extras += [f"{tile.each or 'all'} each"] * (part == "fused")
    return ", ".join([f"{part} {tile.queries}x{tile.keys}", f"{tile.warps} warps", f"{tile.stages} stages", *extras])


def variants() -> list[Variant]:
    first, second = medium_attention.BACKWARD.first or QUERIES[0], medium_attention.BACKWARD.second
    found = [Variant(named("forward", tile), tile) for tile in FORWARDS]
    for tile in QUERIES:
        part = "exact" if tile.exact else "queries"
        found.append(Variant(named(part, tile), Plan(part, tile), Plan("two", second, tile)))
    found += [Variant(named("keys", tile), Plan("keys", tile), Plan("two", tile, first)) for tile in KEYS]
    return found + [Variant(named(plan.kind, plan.second), plan, plan) for plan in WHOLE]


def offline(every: Sequence[Variant]) -> int:
    """Compile for sm_90; prints a table, returns how many failed."""
    from bench.offline import compile_case, resources

    bad = 0
    for variant in every:
        timed = variant.timed
        forward, plan = (timed, None) if isinstance(timed, Tile) else (None, timed)
        try:
            (case,) = offline_cases("*bf16", *XL[1:], forward, plan)
            built = compile_case(case)
            found = resources(built)
        except Exception as error:  # the compiler's, of many types
            bad += 1
            print(f"FAILED {variant.name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}", flush=True)
            continue
        products = "wgmma" + " and mma" * ("mma.sync" in built.asm["ptx"])
        fit = found.programs(case.constexprs["num_warps"])
        taken = f"{found.registers:4} registers {found.spilled:5} spilled {found.shared:7} shared {fit} programs"
        print(f"{variant.name:46} {taken} {products}", flush=True)
    return bad


class Inputs(NamedTuple):
    """q, k, v and dout as the model has them, and what the forward leaves for the backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    rows: Tensor


def draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    batch, heads, tokens, width = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)

    v = normal(batch, tokens, 3, heads, width)[:, :, 2].transpose(1, 2)  # a view of the packed projection
    q, k, dout = (normal(batch, tokens, heads, width).transpose(1, 2) for _ in range(3))
    out, rows = medium_attention.forward(q, k, v, medium_attention.FORWARD)
    return Inputs(q, k, v, dout, out, rows)


def call(timed: Tile | Plan, x: Inputs) -> tuple[Tensor, ...]:
    """One forward or backward."""
    if isinstance(timed, Tile):
        return medium_attention.forward(x.q, x.k, x.v, timed)
    return medium_attention.backward(x.dout, x.q, x.k, x.v, x.out, x.rows, timed)


def formula(x: Inputs) -> list[Tensor]:
    """out, dq, dk, dv in float32."""
    leaves = [t.detach().float().requires_grad_() for t in x[:3]]
    out = _reference(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, x.dout.float())]


def check(variant: Variant, small: Inputs, truth: list[Tensor], large: Inputs) -> float:
    """Largest relative error on the small batch.  ArithmeticError for one too large, or for other bits a second time.

    Every comparison is of one kernel with itself; results of the small batch and of the large are not the same tensors.
    """
    what = variant.checked or variant.timed
    results = call(what, small)
    expected = truth[1:] if variant.checked else truth[:1]
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(results, expected)]
    if not max(errors) <= FURTHEST:  # NaN too
        raise ArithmeticError(f"off by {', '.join(f'{error:.2g}' for error in errors)}")
    once, again = call(what, large), call(what, large)
    if not all(torch.equal(a, b) for a, b in zip(once, again)):
        raise ArithmeticError("not the same bits a second time")
    return max(errors)


def cudnn(gradient: bool) -> Callable[[Inputs], Any]:
    def run(x: Inputs) -> Any:
        with torch.set_grad_enabled(gradient):
            q, k, v = (t.detach().requires_grad_(gradient) for t in x[:3])
            out = attention(q, k, v, "cudnn")
            return torch.autograd.grad(out, (q, k, v), x.dout) if gradient else out

    return run


class Clock:
    """Milliseconds a call, of recordings of CALLS calls over the sets in turn; all recordings share their memory."""

    def __init__(self, sets: Sequence[Inputs]) -> None:
        self.sets = sets
        self.cuda = sets[0].q.is_cuda
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def record(self, run: Callable[[Inputs], Any]) -> Callable[[], Any]:
        def several() -> None:
            for index in range(CALLS):
                run(self.sets[index % len(self.sets)])

        if not self.cuda:
            return several
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            several()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            several()
        return graph.replay

    def by_turns(self, *recorded: Callable[[], Any]) -> list[float]:
        """Median milliseconds a call of each."""
        times: list[list[float]] = [[] for _ in recorded]
        for turn in range(ROUNDS + 1 if self.cuda else 1):
            for replay, into in zip(recorded, times):
                if not self.cuda:
                    begin = time.perf_counter()
                    replay()
                    into.append((time.perf_counter() - begin) * 1e3 / CALLS)
                    continue
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                replay()
                end.record()
                end.synchronize()
                if turn:  # the first one warms up
                    into.append(start.elapsed_time(end) / CALLS)
        return [statistics.median(one) for one in times]


def compile_all(every: Sequence[Variant], small: Inputs) -> None:
    """Every variant's kernels, in threads; launches nothing.  What fails here fails again, and is told, later."""
    from bench.offline import compiling

    def one(variant: Variant) -> None:
        try:
            call(variant.timed, small)
        except Exception as error:  # the compiler's, of many types
            print(f"FAILED to compile {variant.name}: {type(error).__name__}", flush=True)

    with compiling(lambda name, built, options: None), ThreadPoolExecutor(min(os.cpu_count() or 1, 12)) as pool:
        list(pool.map(one, every))


def measure(every: Sequence[Variant], shape: tuple[int, ...], device: torch.device, seconds: float) -> int:
    """Check and time; returns how many variants failed."""
    began = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter's bfloat16 is not the GPU's
    small = draw((min(2, shape[0]), *shape[1:]), device, dtype, 0)
    if device.type == "cuda":
        compile_all(every, small)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    truth = formula(small)
    sets = [draw(shape, device, dtype, 1 + index) for index in range(SETS)]
    clock = Clock(sets)
    base: list[Callable[[], Any]] = []
    if device.type == "cuda":
        base = [clock.record(cudnn(gradient)) for gradient in (False, True)]
        forward, both = clock.by_turns(*base)
        print(f"cudnn: forward {forward:.4f} ms, backward {both - forward:.4f} ms", flush=True)
    table: list[tuple[str, float, Variant]] = []
    failed = 0

    def one(variant: Variant) -> None:
        nonlocal failed
        if time.monotonic() - began > seconds:
            print(f"no time left for {variant.name}", flush=True)
            return
        try:
            error = check(variant, small, truth, sets[0])
            recorded = clock.record(lambda x: call(variant.timed, x))
            ms, *theirs = clock.by_turns(recorded, *base)
        except Exception as problem:  # one that is wrong or does not fit must not hide the others
            failed += 1
            print(
                f"FAILED {variant.name}: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}", flush=True
            )
            return
        group = variant.timed.kind if isinstance(variant.timed, Plan) else "forward"
        table.append((group, ms, variant))
        beside = ""
        if theirs:
            other = theirs[0] if group == "forward" else theirs[1] - theirs[0]
            beside = f", cudnn {other:.4f} ms, {ms / other:.2f} of it"
        print(f"{variant.name}: {ms:.4f} ms{beside}; error {error:.1e}; {time.monotonic() - began:.0f} s", flush=True)

    for variant in every:
        one(variant)
    found = {group: min((row for row in table if row[0] == group), key=lambda row: row[1]) for group, _, _ in table}
    seconds += 10  # for what all the others were timed for
    for part in ("queries", "exact"):
        first, second = (found[name][2].timed if name in found else None for name in (part, "keys"))
        if isinstance(first, Plan) and isinstance(second, Plan):
            plan = Plan("two", second.second, first.second)
            one(Variant(f"two: {named(part, first.second)} + {named('keys', second.second)}", plan, plan))
    print("\nfastest first:")
    order = ("forward", "queries", "exact", "keys")  # parts; then whole backwards
    for group, ms, variant in sorted(
        table, key=lambda row: ((*order, "").index(row[0] if row[0] in order else ""), row[1])
    ):
        print(f"{'backward' if group not in order else group:9} {ms:8.4f} ms  {variant.name}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.medium_attention", description=__doc__.splitlines()[0])
    top.add_argument("--only", default="", help="variants whose name contains this")
    top.add_argument("--batch", type=int, default=XL[0])
    top.add_argument("--seconds", type=float, default=75.0)
    top.add_argument("--offline", action="store_true", help="compile for sm_90 without a GPU")
    top.add_argument("--rehearse", action="store_true", help="a small shape under Triton's interpreter")
    options = top.parse_args(argv)
    every = [variant for variant in variants() if options.only in variant.name]
    if options.offline:
        return 1 if offline(every) else 0
    if options.rehearse:
        return 1 if measure(every, (1, 1, 130, 72), torch.device("cpu"), 600.0) else 0
    if not torch.cuda.is_available():
        print("bench.experiments.medium_attention: error: no CUDA device; --offline needs none", file=sys.stderr)
        return 2
    failed = measure(every, (options.batch, *XL[1:]), torch.device("cuda"), options.seconds)
    return 1 if failed == len(every) else 0


if __name__ == "__main__":
    sys.exit(main())
