"""QK-norm, RoPE and attention of short sequences in one kernel, forward: does it beat the two kernels that we use?

``python -m bench.experiments.short_attention`` on a GPU: checks, then times it interleaved with qknorm_rope + cuDNN and
qknorm_rope + SDPA.  ``--offline`` compiles every configuration for sm_90 without a GPU and says what it takes.

One program has one head of one sample and ``QUERIES`` queries, ``BLOCKS`` times:

    q, k = rope(rmsnorm(q_head) q_weight), rope(rmsnorm(k_head) k_weight)     (float32, rounded as qknorm_rope rounds)
    out  = softmax(q k^T / sqrt(Dh)) v                                        (products of 16-bit numbers, float32 sums)

straight from the packed qkv of the GEMM to [B, N, heads, Dh]: q and k never reach memory, which saves half of the bytes
of the two kernels together (604 of 1,208 MB at XL/1, batch 256).  What it costs: k is normalised once for each program
of a head.  Dh = 72 is 64 + 8, and 8 is padded to 16, so products run over 80 columns and not 128.  Keys come in blocks
of ``KEYS``, with the running maximum and sum of a softmax in one pass, or all at once.

The two numbers of a RoPE pair share an angle, so the tables are half of the model's, [N, Dh / 2]: every program reads
them, and so they fit into a multiprocessor's first-level cache beside the tiles.

Built for sm_90 (Triton 3.6 and 3.7, `--offline`): 134 to 250 registers, wgmma, and no spills but where noted; three
programs on a multiprocessor with 64 queries by 32 keys, two with 64 by 64, one or two with 8 warps.  Not timed yet.
Backward would need q and k again: for training this is half of the answer, for sampling all of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastasync_kernels import qknorm_rope, reference
from fastasync_kernels._common import OfflineCase, check_tensor, on_device
from fastasync_kernels._rows import head_and_tail
from fastasync_kernels.attention import attention, available_backends
from torch import Tensor

from bench.harness import RESULTS, Bench, Operation, Row, check, device_name, write_rows
from bench.subjects.common import XL, Random
from fastasync.model.embeddings import rope_tables

TYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """One configuration: queries at a time, how many such blocks a program takes in turn, keys at a time.

    ``limit``: most registers a thread may have.
    """

    queries: int = 64
    blocks: int = 1
    keys: int = 64
    warps: int = 4
    stages: int = 1
    limit: int | None = None

    @property
    def name(self) -> str:
        limit = f", limit {self.limit}" if self.limit else ""
        return f"fused {self.queries}x{self.blocks} by {self.keys}, {self.warps} warps, {self.stages} stages{limit}"


TILES = (  # 4 warps leave room for two or three programs on a multiprocessor, 8 warps mostly for one
    Tile(64, 1, 64, 4, 1),
    Tile(64, 1, 64, 4, 2),
    Tile(64, 1, 32, 4, 1),
    Tile(64, 1, 32, 4, 2),
    Tile(128, 1, 32, 8, 1),
    Tile(128, 1, 32, 8, 1, 128),  # room for two; Triton 3.7 spills 8 bytes here, 3.6 none
    Tile(128, 1, 32, 8, 2),
    Tile(128, 1, 64, 8, 1),
    Tile(128, 1, 64, 8, 2),
    Tile(128, 1, 128, 8, 1),
    Tile(64, 1, 128, 8, 1),
    Tile(64, 1, 256, 8, 1),  # all keys at once from here on
    Tile(64, 4, 256, 8, 1),  # and normalised once for a head
)


@triton.jit
def _pairs(x, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """[ROWS, LENGTH] -> its even and its odd columns, each [ROWS, LENGTH // 2]."""
    return tl.split(tl.reshape(x, [ROWS, LENGTH // 2, 2]))


@triton.jit
def _turned(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, first, tokens, x_n, eps,
    ROWS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows first.. of q or k, normalised and turned: [ROWS, HEAD] and [ROWS, TAIL], rounded; beyond Dh zeros."""
    row = first + tl.arange(0, ROWS)[:, None]
    here = row < tokens
    low = tl.arange(0, HEAD)[None, :]
    high = HEAD + tl.arange(0, TAIL)[None, :]
    x_row = x_ptr + row * x_n
    e0, o0 = _pairs(tl.load(x_row + low, here, 0.0).to(tl.float32), ROWS, HEAD)
    e1, o1 = _pairs(tl.load(x_row + high, here & (high < DH), 0.0).to(tl.float32), ROWS, TAIL)
    square = tl.sum(e0 * e0 + o0 * o0, 1) + tl.sum(e1 * e1 + o1 * o1, 1)
    r = tl.rsqrt(square / DH + eps)[:, None]
    weight_e0, weight_o0 = _pairs(tl.load(weight_ptr + low).to(tl.float32), 1, HEAD)
    weight_e1, weight_o1 = _pairs(tl.load(weight_ptr + high, high < DH, 0.0).to(tl.float32), 1, TAIL)
    half0 = tl.arange(0, HEAD // 2)[None, :]
    half1 = HEAD // 2 + tl.arange(0, TAIL // 2)[None, :]
    inside = here & (half1 < DH // 2)
    cos0 = tl.load(cos_ptr + row * (DH // 2) + half0, here, 0.0)
    sin0 = tl.load(sin_ptr + row * (DH // 2) + half0, here, 0.0)
    cos1 = tl.load(cos_ptr + row * (DH // 2) + half1, inside, 0.0)
    sin1 = tl.load(sin_ptr + row * (DH // 2) + half1, inside, 0.0)
    e0 *= r * weight_e0
    o0 *= r * weight_o0
    e1 *= r * weight_e1
    o1 *= r * weight_o1
    x0 = tl.reshape(tl.join(e0 * cos0 - o0 * sin0, o0 * cos0 + e0 * sin0), [ROWS, HEAD])
    x1 = tl.reshape(tl.join(e1 * cos1 - o1 * sin1, o1 * cos1 + e1 * sin1), [ROWS, TAIL])
    kind: tl.constexpr = x_ptr.dtype.element_ty
    return x0.to(kind), x1.to(kind)


@triton.jit
def _values(v_ptr, first, tokens, v_n, ROWS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    row = first + tl.arange(0, ROWS)[:, None]
    high = HEAD + tl.arange(0, TAIL)[None, :]
    v0 = tl.load(v_ptr + row * v_n + tl.arange(0, HEAD)[None, :], row < tokens, 0.0)
    return v0, tl.load(v_ptr + row * v_n + high, (row < tokens) & (high < DH), 0.0)


@triton.jit
def _scores(q0, q1, k0, k1, first, tokens, KEYS: tl.constexpr, EVEN: tl.constexpr):
    """q k^T [queries, KEYS] in float32; -inf for keys that do not exist."""
    scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0)))
    if not EVEN:
        scores = tl.where((first + tl.arange(0, KEYS) < tokens)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    qkv_b,
    qkv_n,
    scale,
    eps,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``scale``: log2(e) / sqrt(Dh), for powers of two.  WHOLE: KEYS holds all keys.  EVEN: blocks of keys are full."""
    parts = tl.cdiv(tokens, QUERIES * BLOCKS)
    part = tl.program_id(0) % parts
    head = (tl.program_id(0) // parts) % HEADS
    sample = (tl.program_id(0) // parts // HEADS).to(tl.int64)
    q_ptr = qkv_ptr + sample * qkv_b + head * DH
    k_ptr = q_ptr + HEADS * DH
    v_ptr = k_ptr + HEADS * DH
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if WHOLE:
        k0, k1 = _turned(k_ptr, k_weight_ptr, cos_ptr, sin_ptr, 0, tokens, qkv_n, eps, KEYS, DH, HEAD, TAIL)
        v0, v1 = _values(v_ptr, 0, tokens, qkv_n, KEYS, DH, HEAD, TAIL)
    for block in range(BLOCKS):
        start = (part * BLOCKS + block) * QUERIES
        q0, q1 = _turned(q_ptr, q_weight_ptr, cos_ptr, sin_ptr, start, tokens, qkv_n, eps, QUERIES, DH, HEAD, TAIL)
        if WHOLE:
            scores = _scores(q0, q1, k0, k1, 0, tokens, KEYS, EVEN)
            powers = tl.exp2(scores * scale - (tl.max(scores, 1) * scale)[:, None])
            total = tl.sum(powers, 1)
            powers = powers.to(kind)
            sum0 = tl.dot(powers, v0)
            sum1 = tl.dot(powers, v1)
        else:
            largest = tl.full([QUERIES], float("-inf"), tl.float32)
            total = tl.zeros([QUERIES], tl.float32)
            sum0 = tl.zeros([QUERIES, HEAD], tl.float32)
            sum1 = tl.zeros([QUERIES, TAIL], tl.float32)
            for first in tl.range(0, tokens, KEYS, num_stages=STAGES):
                k0, k1 = _turned(k_ptr, k_weight_ptr, cos_ptr, sin_ptr, first, tokens, qkv_n, eps, KEYS, DH, HEAD, TAIL)
                scores = _scores(q0, q1, k0, k1, first, tokens, KEYS, EVEN)
                now = tl.maximum(largest, tl.max(scores, 1) * scale)
                powers = tl.exp2(scores * scale - now[:, None])
                shrink = tl.exp2(largest - now)
                total = total * shrink + tl.sum(powers, 1)
                v0, v1 = _values(v_ptr, first, tokens, qkv_n, KEYS, DH, HEAD, TAIL)
                powers = powers.to(kind)
                sum0 = tl.dot(powers, v0, sum0 * shrink[:, None])
                sum1 = tl.dot(powers, v1, sum1 * shrink[:, None])
                largest = now
        row = start + tl.arange(0, QUERIES)[:, None]
        high = HEAD + tl.arange(0, TAIL)[None, :]
        target = out_ptr + (sample * tokens + row) * (HEADS * DH) + head * DH
        share = (1.0 / total)[:, None]
        tl.store(target + tl.arange(0, HEAD)[None, :], (sum0 * share).to(kind), row < tokens)
        tl.store(target + high, (sum1 * share).to(kind), (row < tokens) & (high < DH))


def _meta(tile: Tile, tokens: int, heads: int, width: int) -> dict[str, Any]:
    head, tail = head_and_tail(width)
    return {
        "HEADS": heads, "DH": width, "HEAD": head, "TAIL": max(tail, 16), "QUERIES": tile.queries,
        "BLOCKS": tile.blocks, "KEYS": tile.keys, "WHOLE": tile.keys >= tokens, "EVEN": tokens % tile.keys == 0,
        "STAGES": tile.stages, "num_warps": tile.warps, **({"maxnreg": tile.limit} if tile.limit else {}),
    }  # fmt: skip


def short_attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, tile: Tile = TILES[0],
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """qkv [B, N, 3 heads Dh] as qknorm_rope takes it -> attention's output [B, N, heads, Dh], contiguous.

    cos and sin: [N, Dh / 2] float32, the angle of each pair (``tables[:, ::2]``).  Forward only.  16 < Dh; the last
    axis of qkv contiguous.  TypeError, ValueError for what the kernel does not take.
    """
    check_tensor("qkv", qkv, TYPES, (-1, -1, -1))
    batch, tokens, packed = qkv.shape
    width = packed // (3 * heads)
    if packed != 3 * heads * width or width <= 16 or width % 2 or qkv.stride(2) != 1:
        raise ValueError(f"qkv must be [B, N, 3 x {heads} heads x an even Dh above 16], not {list(qkv.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (torch.float32,), (tokens, width // 2), qkv.device)
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_tensor(name, weight, (torch.float32, qkv.dtype), (width,), qkv.device)
    out = qkv.new_empty((batch, tokens, heads, width))
    grid = batch * heads * triton.cdiv(tokens, tile.queries * tile.blocks)
    if grid:
        with on_device(qkv):
            _kernel[(grid,)](
                qkv, q_weight, k_weight, cos, sin, out, tokens, qkv.stride(0), qkv.stride(1),
                1.4426950408889634 * width**-0.5, eps, **_meta(tile, tokens, heads, width),
            )  # fmt: skip
    return out


def two_kernels(ops: Any, backend: str) -> Callable[..., Tensor]:
    """What the package does: qknorm_rope, then an attention backend; -> [B, N, heads, Dh]."""

    def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        q, k, v = ops.qknorm_rope(qkv, q_weight, k_weight, *(t.repeat_interleave(2, 1) for t in (cos, sin)), heads)
        return attention(q, k, v, backend).transpose(1, 2)

    return run


def offline_case(tile: Tile, kind: str = "*bf16") -> OfflineCase:
    """XL: 256 tokens, 16 heads of 72."""
    signature = {"qkv_ptr": kind, "q_weight_ptr": "*fp32", "k_weight_ptr": "*fp32", "cos_ptr": "*fp32"}
    signature |= {"sin_ptr": "*fp32", "out_ptr": kind, "tokens": "i32", "qkv_b": "i32", "qkv_n": "i32"}
    signature |= {"scale": "fp32", "eps": "fp32"}
    return OfflineCase(_kernel, signature, _meta(tile, 256, 16, 72), divisible=("tokens", "qkv_b", "qkv_n"))


def offline(tiles: Sequence[Tile]) -> int:
    """Compile for sm_90; the number that failed or spill."""
    from bench.offline import compile_case, resources

    bad = 0
    for tile in tiles:
        try:
            built = compile_case(offline_case(tile))
            found = resources(built)
        except Exception as error:  # the compiler's, of many types
            bad += 1
            print(f"FAILED {tile.name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}", flush=True)
            continue
        bad += found.spilled > 0
        products = "wgmma" if "wgmma" in built.asm["ptx"] else "mma"
        how = f"{found.spilled} bytes spilled" if found.spilled else f"{found.programs(tile.warps)} programs at a time"
        word = "SPILLED" if found.spilled else "ok"
        taken = f"{found.registers} registers, {found.shared} bytes shared"
        print(f"{word} {tile.name}: {taken}, {how}, {products}", flush=True)
    return bad


def compare(bench: Bench, size: dict[str, int], batch: int, dtype: torch.dtype, tiles: Sequence[Tile]) -> list[Row]:
    """Time the package's two kernels and every tile that is right, by turns.  Raises WrongResult for the former."""
    tokens, width, heads = size["tokens"], size["width"], size["heads"]
    tables = [t[:, ::2].contiguous().to(bench.device) for t in rope_tables(width // heads, int(tokens**0.5))]

    def make(seed: int, count: int) -> list[Any]:
        random = Random(bench.device, seed, dtype)
        weights = [1 + random(width // heads, dtype=torch.float32, scale=0.1) for _ in range(2)]
        return [random(count, tokens, 3 * width), *weights, *tables, heads]

    truth = {"reference": two_kernels(reference, "reference")}
    wide = [table.repeat_interleave(2, 1).contiguous() for table in tables]  # made once, as the model does

    def baseline(backend: str) -> Callable[..., Tensor]:
        def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
            q, k, v = qknorm_rope.qknorm_rope(qkv, q_weight, k_weight, *wide, heads)
            return attention(q, k, v, backend).transpose(1, 2)

        return run

    found = available_backends(bench.device, dtype, (batch, heads, tokens, width // heads))
    variants = {f"qknorm_rope + {n}": baseline(n) for n in ("cudnn", "fa4", "fa3", "sdpa") if not found[n]}
    for tile in tiles:
        variants[tile.name] = lambda *a, tile=tile: short_attention(*a, tile=tile)
    usable = dict(truth)
    for name, function in variants.items():
        try:
            check({**truth, name: function}, make(0, 2))
            usable[name] = function
        except Exception as error:  # one tile that is wrong or does not fit must not hide the others
            bench.skip(name, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
    before = len(bench.rows)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    bench.operation(
        Operation(
            *("short_attention", "fwd", f"[{batch}, {heads}, {tokens}, {width // heads}]", str(dtype).split(".")[1]),
            *(usable, make, batch),
            nbytes=4 * batch * tokens * width * itemsize,
            flops=4 * batch * tokens**2 * width,
            check_batch=2,
        )
    )
    return bench.rows[before:]


def verdict(rows: Sequence[Row]) -> str:
    """Both times in one line."""
    fused = [row for row in rows if row.variant.startswith("fused")]
    two = [row for row in rows if row.variant.startswith("qknorm_rope")]
    if not fused or not two:
        return "no verdict: nothing to compare"
    ours, theirs = (min(group, key=lambda row: row.ms) for group in (fused, two))
    return f"{ours.variant}: {ours.ms:.4f} ms; {theirs.variant}: {theirs.ms:.4f} ms ({ours.ms / theirs.ms - 1:+.1%})"


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.short_attention", description=__doc__.splitlines()[0])
    top.add_argument("--batch", type=int, default=256)
    top.add_argument("--rounds", type=int, default=20)
    top.add_argument("--tiles", default="", help=f"indices of the {len(TILES)} configurations (default: all)")
    top.add_argument("--offline", action="store_true", help="compile for sm_90 without a GPU")
    top.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = top.parse_args(argv)
    tiles = [TILES[int(index)] for index in options.tiles.split(",")] if options.tiles else list(TILES)
    if options.offline:
        return 1 if offline(tiles) else 0
    if not torch.cuda.is_available():
        print("bench.experiments.short_attention: error: no CUDA device; --offline needs none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    path = options.results / f"{device_name(device)}.csv"
    bench = Bench(device, options.rounds, sink=lambda row: write_rows(path, [row]))
    bench.measure_ceilings()
    with torch.no_grad():
        rows = compare(bench, XL, options.batch, torch.bfloat16, tiles)
    print(verdict(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
