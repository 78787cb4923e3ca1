"""SwiGLU in the epilogue of the product before it, and its backward in the epilogue of the product behind it.

``python -m bench.experiments.swiglu_gemm`` on a GPU: checks every candidate, then times it interleaved with what the
package does, cuBLAS and the ``swiglu`` kernel.  ``--offline`` compiles the Triton kernels for sm_90 without a GPU and
says what they take; ``--rehearse`` runs everything at tiny sizes in Triton's interpreter.

    forward    packed = x w12^T + bias = [a, b];  out = silu(a) b
    backward   dout = g w3;  [da, db] = dout [b s (1 + a (1 - s)), a s], s = 1 / (1 + exp(-a));  dbias = sum of rows

Fused, a program has the gate's columns and the same columns of the second half, so packed is written and not read again
and dout never reaches memory.  XL/1, batch 256, bf16, for each of 28 blocks: forward 805 of 2,178 MB less (in sampling,
where packed is not kept, 1,611 less), backward 805 of 2,574 MB less.  The operands are counted once.

Predicted for one H200, from rates measured there (copies 4.2 TB/s, cuBLAS 634 to 733 TFLOP/s on these shapes) and
from what Triton's products are said to reach on Hopper (550 to 650):

    forward, packed kept   cuBLAS 1.35 + swiglu 0.29 = 1.64 ms; Triton 1.65 to 1.85, quack 1.40 to 1.50
    forward, out only      the same 1.64 ms;                    Triton 1.50 to 1.70, quack 1.35 to 1.45
    backward with dbias    cuBLAS 0.68 + 0.51 = 1.19 ms;        Triton 0.95 to 1.25, quack 0.85 (dbias: + 0.20)

A forward tile of 128 x 256 computes for 14 microseconds and writes 98 KB: 3 microseconds of its multiprocessor's
share of the bandwidth, which Triton does not hide behind the next tile's products as two groups of warps by turns do
(quack's ``pingpong``).  So Triton is expected to lose forward, perhaps not backward.
Built for sm_90 by Triton 3.6 and 3.7: no spills, wgmma.  With ``warp_specialize`` four warps do not compile (the pass
halves a descriptor's rows and not the descriptor), and eight give the same code as without.

quack wants gate and up by turns, [a0, b0, a1, b1, ..]: w12's rows are put into this order outside of what is timed, and
its packed is compared as the view that it is.  quack's backward also writes out again (403 MB), which would save
keeping it.  In its default form it has no gradient of the bias: torch's sum is added to it in the case that has one,
and beside it epilogues of ours sum (``fastasync_kernels.quack_products``; predicted: 0.90 to 0.95 ms).
quack and cutlass must lie in a folder called site-packages: elsewhere quack 0.6 takes cutlass for the user's own code
and refuses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastasync_kernels import reference
from fastasync_kernels._common import INTERPRET
from fastasync_kernels.swiglu import backward_with_tops, swiglu
from torch import Tensor

from bench.experiments.swiglu_gemm_kernels import Tile, gated_product, gated_product_backward, offline_case
from bench.harness import RESULTS, Bench, Operation, Row, check, device_name, write_rows
from bench.subjects.common import XL, Random, short

BASELINE = "cuBLAS + swiglu"


FORWARD = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 64, 8, 3, joined=False),
    Tile(128, 128, 64, 8, 3, flat=False),
    Tile(256, 64, 64, 8, 3),
    Tile(128, 64, 64, 4, 3, flat=False, programs=2),
    Tile(128, 128, 64, 4, 3, flat=False, special=True),  # Triton 3.6 and 3.7 cannot compile it
)
BACKWARD = (
    Tile(128, 256, 64, 8, 3, False, parts=4, ahead=True),
    Tile(128, 256, 64, 8, 3, False, parts=4),
    Tile(128, 256, 64, 8, 3, False, parts=4, ahead=True, flat=False),
    Tile(128, 128, 64, 8, 3, False, parts=2, ahead=True),
    Tile(256, 128, 64, 8, 3, False, parts=4, ahead=True),
    Tile(128, 128, 64, 8, 3, False, parts=4, flat=False, programs=2, limit=128),
)
REHEARSED = Tile(16, 32, 16, 4, 1, joined=True)
REHEARSED_SIZE = {"width": 40, "hidden": 64, "tokens": 25}


class Quack(NamedTuple):
    """One configuration of quack's products: tile, whether two groups of warps take tiles by turns, cluster.

    ``sums``: who adds up the bias's gradient, torch or our epilogue; ``again``: whether this writes the activation.
    """

    rows: int = 128
    columns: int = 192
    pingpong: bool = True
    cluster: tuple[int, int] = (2, 1)
    sums: str = "torch"
    again: bool = True

    @property
    def name(self) -> str:
        turns = ", pingpong" if self.pingpong else ""
        sums = "" if self.sums == "torch" else f", sums in the {self.sums}{'' if self.again else ' alone'}"
        return f"quack {self.rows}x{self.columns}{turns}, cluster {self.cluster[0]}x{self.cluster[1]}{sums}"

    def config(self) -> Any:
        from quack.gemm_config import GemmConfig

        return GemmConfig(
            tile_m=self.rows, tile_n=self.columns, pingpong=self.pingpong, cluster_m=self.cluster[0],
            cluster_n=self.cluster[1], is_dynamic_persistent=False, device_capacity=9,
        )  # fmt: skip


QUACK = (Quack(128, 192, True), Quack(128, 256, False), Quack(128, 128, True), Quack(256, 128, False))
OWN_EPILOGUE = tuple(
    Quack(*tile, sums="epilogue", again=again)
    for tile in ((128, 128, True), (128, 192, True), (256, 128, False), (128, 256, False))
    for again in (True, False)
)


def offline(forward: Sequence[Tile], backward: Sequence[Tile]) -> int:
    """Compile for sm_90; how many failed, spill, or have their products elsewhere than in wgmma."""
    from bench.offline import compile_case, resources

    bad = 0
    for what, tile in [("forward", tile) for tile in forward] + [("backward", tile) for tile in backward]:
        try:
            built = compile_case(offline_case(tile, what == "backward"))
            found = resources(built)
        except Exception as error:  # the compiler's, of many types
            bad += 1
            print(f"FAILED {what} {tile.name}: {type(error).__name__}: {_short(error)}", flush=True)
            continue
        products = "wgmma" if "wgmma" in built.asm["ptx"] else "mma"
        word = "SPILLED" if found.spilled else "ok"
        bad += word != "ok" or products != "wgmma"
        taken = f"{found.registers} registers, {found.shared} bytes shared, {found.spilled} bytes spilled"
        fit = f"{found.programs(built.metadata.num_warps)} programs at a time"
        print(f"{word} {what} {tile.name}: {taken}, {fit}, {products}", flush=True)
    return bad


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:150]


def by_turns(halves: Tensor) -> Tensor:
    """[a, b], the halves of the first axis -> [a0, b0, a1, b1, ..]: the order that quack wants."""
    return halves.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()


class Candidates(NamedTuple):
    """What is compared with the baseline in one case."""

    triton: Sequence[Tile] = ()
    quack: Sequence[Quack] = ()


def forward_operation(
    bench: Bench, size: dict[str, int], batch: int, dtype: torch.dtype, some: Candidates, keep: bool
) -> Operation:
    """Variants (x, w12, bias, and the latter two by turns) -> packed [M, 2, F] (``keep``) and out [M, F]."""
    width, hidden = size["width"], size["hidden"]

    def results(packed: Tensor, out: Tensor) -> list[Tensor]:
        return [*([packed.unflatten(1, (2, -1))] if keep else []), out]

    def plain(activation: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
        def run(x: Tensor, w12: Tensor, bias: Tensor, *_: Tensor) -> list[Tensor]:
            packed = torch.nn.functional.linear(x, w12, bias)
            return results(packed, activation(packed))

        return run

    def fused(tile: Tile) -> Callable[..., list[Tensor]]:
        return lambda x, w12, bias, *_: results(*gated_product(x, w12, bias, tile, keep))

    def quack(item: Quack) -> Callable[..., list[Tensor]]:
        from quack.gemm_interface import gemm_gated

        config = item.config()  # once: quack knows its launches by this object

        def run(x: Tensor, w12: Tensor, bias: Tensor, turned: Tensor, turned_bias: Tensor) -> list[Tensor]:
            packed, out = gemm_gated(
                x, turned.T, bias=turned_bias, activation="swiglu", store_preact=keep, tuned=False, config=config
            )
            return [*([packed.unflatten(1, (-1, 2)).transpose(1, 2)] if keep else []), out]

        return run

    def make(seed: int, count: int) -> list[Tensor]:
        random = Random(bench.device, seed, dtype)
        x = random(count * size["tokens"], width)
        w12, bias = random(2 * hidden, width, scale=width**-0.5), random(2 * hidden, scale=0.1)
        return [x, w12, bias, by_turns(w12), by_turns(bias)]

    variants: dict[str, Callable[..., Any]] = {"reference": plain(reference.swiglu), BASELINE: plain(swiglu)}
    variants |= _buildable(bench, some.triton, fused) | _buildable(bench, some.quack, quack)
    rows = batch * size["tokens"]
    numbers = rows * (width + (3 if keep else 1) * hidden) + 2 * hidden * width
    return Operation(
        "swiglu_gemm",
        f"forward{'' if keep else ', out only'}",
        f"[{rows}, {width}] x [{width}, 2x{hidden}]",
        short(dtype),
        variants,
        make,
        batch,
        nbytes=numbers * dtype.itemsize,
        flops=4 * rows * width * hidden,
        check_batch=2,
    )


def backward_operation(
    bench: Bench, size: dict[str, int], batch: int, dtype: torch.dtype, some: Candidates, bias: bool
) -> Operation:
    """Variants (g, w3, packed, and that by turns) -> dpacked [M, 2, F] and, with ``bias``, dbias [2 F] float32."""
    width, hidden = size["width"], size["hidden"]

    def results(dpacked: Tensor, dbias: Tensor) -> list[Tensor]:
        return [dpacked.unflatten(1, (2, -1)), *([dbias] if bias else [])]

    def plain(g: Tensor, w3: Tensor, packed: Tensor, *_: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf, zero = packed.detach().requires_grad_(), packed.new_zeros(2 * hidden).float().requires_grad_()
            out = reference.swiglu(leaf, bias=zero)
        return results(*torch.autograd.grad(out, [leaf, zero], g @ w3))

    def baseline(g: Tensor, w3: Tensor, packed: Tensor, *_: Tensor) -> list[Tensor]:
        return results(*backward_with_tops(g @ w3, packed, bias, tops=False)[:2])

    def fused(tile: Tile) -> Callable[..., list[Tensor]]:
        return lambda g, w3, packed, *_: results(*gated_product_backward(g, w3, packed, tile, bias))

    def quack(item: Quack) -> Callable[..., list[Tensor]]:
        from quack.gemm_interface import gemm_dgated

        config = item.config()
        if item.sums == "epilogue":
            return own_epilogue(item.again, config)

        def run(g: Tensor, w3: Tensor, packed: Tensor, turned: Tensor) -> list[Tensor]:
            dpacked, _ = gemm_dgated(
                g, w3, turned, activation="swiglu", dynamic_scheduler=False, tuned=False, config=config
            )
            dbias = [dpacked.sum(0, dtype=torch.float32).unflatten(0, (-1, 2)).T.flatten()] if bias else []
            return [dpacked.unflatten(1, (-1, 2)).transpose(1, 2), *dbias]

        return run

    def own_epilogue(again: bool, config: Any) -> Callable[..., list[Tensor]]:
        from fastasync_kernels.quack_products import swiglu_gradient

        from bench.experiments.swiglu_gemm_quack import gradient_alone

        product = swiglu_gradient if again else gradient_alone

        def run(g: Tensor, w3: Tensor, packed: Tensor, turned: Tensor) -> list[Tensor]:
            found = product(g, w3, turned, config=config, tuned=False)
            dbias = torch.cat([found["a_sum"], found["b_sum"]])
            return [found["D"].unflatten(1, (-1, 2)).transpose(1, 2), dbias]

        return run

    def make(seed: int, count: int) -> list[Tensor]:
        random = Random(bench.device, seed, dtype)
        rows = count * size["tokens"]
        packed = random(rows, 2 * hidden)
        turned = [packed.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)] if some.quack else []
        return [random(rows, width), random(width, hidden, scale=width**-0.5), packed, *turned]

    variants: dict[str, Callable[..., Any]] = {"reference": plain, BASELINE: baseline}
    variants |= _buildable(bench, some.triton, fused) | _buildable(bench, some.quack, quack)
    rows = batch * size["tokens"]
    numbers = rows * (width + 4 * hidden) + hidden * width
    return Operation(
        "swiglu_gemm",
        f"backward{', bias' if bias else ''}",
        f"[{rows}, {width}] x [{width}, {hidden}]",
        short(dtype),
        variants,
        make,
        batch,
        nbytes=numbers * dtype.itemsize,
        flops=2 * rows * width * hidden,
        check_batch=2,
    )


def _buildable(bench: Bench, items: Sequence[Any], build: Callable[[Any], Callable[..., Any]]) -> dict[str, Any]:
    """Candidates by name; one whose package is not there is skipped with the reason."""
    found = {}
    for item in items:
        try:
            found[item.name] = build(item)
        except Exception as error:  # a package that is not installed, or one that does not import
            bench.skip(item.name, f"{type(error).__name__}: {_short(error)}")
    return found


def compare(bench: Bench, op: Operation, until: float = math.inf) -> list[Row]:
    """Check the operation's candidates at its full size, then time those that are right, by turns.

    Candidates that come after ``until`` (``time.monotonic``) are skipped.  Raises WrongResult for the baseline.
    """
    truth = {"reference": op.variants["reference"]}
    inputs = op.make(0, op.batch)
    check({**truth, BASELINE: op.variants[BASELINE]}, inputs)
    for name in [name for name in op.variants if name not in ("reference", BASELINE)]:
        label = f"{op.case}, {name}"
        try:
            if time.monotonic() > until:
                raise TimeoutError("out of time")
            start = time.monotonic()
            error = check({**truth, name: op.variants[name]}, inputs)[name]
            bench.say(f"  {label}: error {error:.1e}, built and checked in {time.monotonic() - start:.1f} s")
        except Exception as error:  # one candidate that is wrong or does not compile must not hide the others
            bench.skip(label, f"{type(error).__name__}: {_short(error)}")
            del op.variants[name]
    del inputs
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # the check's float64 tensors; recordings have memory of their own
    before = len(bench.rows)
    bench.operation(op)
    return bench.rows[before:]


def product(bench: Bench, op: Operation) -> None:
    """Time the operation's product alone."""
    forward = op.case.startswith("forward")
    run = torch.nn.functional.linear if forward else torch.matmul
    alone = {"cuBLAS" if bench.device.type == "cuda" else "torch": lambda *a: run(*a[: 3 if forward else 2])}
    case = f"product {op.case}"
    bench.operation(dataclasses.replace(op, case=case, variants=alone))


def verdict(rows: Sequence[Row]) -> str:
    """The best candidate's and the baseline's time in one line."""
    fused = [row for row in rows if row.variant.startswith(("triton", "quack"))]
    plain = [row for row in rows if row.variant == BASELINE]
    if not fused or not plain:
        return "no verdict: nothing to compare"
    ours, theirs = min(fused, key=lambda row: row.ms), plain[0]
    change = ours.ms / theirs.ms - 1
    return f"{ours.case}: {ours.variant} {ours.ms:.4f} ms; {theirs.variant} {theirs.ms:.4f} ms ({change:+.1%})"


def best(rows: Sequence[Row], tiles: Sequence[Tile], count: int) -> list[Tile]:
    """The tiles that were fastest, at most ``count``."""
    times = {row.variant: row.ms for row in rows}
    return sorted((tile for tile in tiles if tile.name in times), key=lambda tile: times[tile.name])[:count]


def measure(
    bench: Bench, size: dict[str, int], batch: int, dtype: torch.dtype, forward: Candidates, backward: Candidates,
    seconds: float,
) -> list[str]:  # fmt: skip
    """All four cases in about ``seconds`` from now; their verdicts."""
    start, said = time.monotonic(), []

    def case(op: Operation, share: float) -> list[Row]:
        rows = compare(bench, op, start + share * seconds)
        said.append(verdict(rows))
        return rows

    kept = forward_operation(bench, size, batch, dtype, forward, True)
    rows = case(kept, 0.35)
    product(bench, kept)
    few = Candidates(best(rows, forward.triton, 2), forward.quack)
    case(forward_operation(bench, size, batch, dtype, few, False), 0.5)
    own = (*backward.quack, *(OWN_EPILOGUE if backward.quack else ()))
    with_bias = backward_operation(bench, size, batch, dtype, backward._replace(quack=own), True)
    rows = case(with_bias, 0.8)
    product(bench, with_bias)
    few = Candidates(best(rows, backward.triton, 2), backward.quack)
    case(backward_operation(bench, size, batch, dtype, few, False), 0.95)
    return said


def chosen(indices: str, what: str, tiles: Sequence[Tile]) -> list[Tile]:
    """Of ``forward:0,backward:2,..`` the tiles of one direction; of nothing all."""
    pairs = [word.split(":") for word in indices.split(",") if word]
    return [tiles[int(index)] for direction, index in pairs if direction == what] if pairs else list(tiles)


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.swiglu_gemm", description=__doc__.splitlines()[0])
    top.add_argument("--batch", type=int, default=256)
    top.add_argument("--rounds", type=int, default=20)
    top.add_argument("--seconds", type=float, default=150, help="about how long; later candidates are skipped")
    top.add_argument("--only", choices=("triton", "quack"), help="candidates of one kind (default: both)")
    top.add_argument("--tiles", default="", help="Triton's candidates by index, as forward:0,backward:2 (default: all)")
    top.add_argument("--offline", action="store_true", help="compile for sm_90 without a GPU")
    top.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    top.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = top.parse_args(argv)
    forward, backward = chosen(options.tiles, "forward", FORWARD), chosen(options.tiles, "backward", BACKWARD)
    if options.offline:
        return 1 if offline(forward, backward) else 0
    if options.rehearse and not INTERPRET:
        print("bench.experiments.swiglu_gemm: error: --rehearse needs TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if not options.rehearse and not torch.cuda.is_available():
        text = "no CUDA device; --offline and --rehearse need none"
        print(f"bench.experiments.swiglu_gemm: error: {text}", file=sys.stderr)
        return 2
    quack = () if options.only == "triton" else QUACK
    if options.rehearse:
        bench, size, batch, dtype = Bench(torch.device("cpu"), rounds=1), REHEARSED_SIZE, 2, torch.float32
        forward, backward = [REHEARSED], [REHEARSED._replace(parts=2)]
    else:
        device = torch.device("cuda")
        path = options.results / f"{device_name(device)}.csv"
        bench = Bench(device, options.rounds, sink=lambda row: write_rows(path, [row]))
        size, batch, dtype = XL, options.batch, torch.bfloat16
        bench.measure_ceilings()
    if options.only == "quack":
        forward, backward = [], []
    both = Candidates(forward, quack), Candidates(backward, quack)
    with torch.no_grad():
        lines = measure(bench, size, batch, dtype, both[0], both[1], options.seconds)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
