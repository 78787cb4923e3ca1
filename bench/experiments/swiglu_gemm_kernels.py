"""Triton kernels of bench.experiments.swiglu_gemm: products with SwiGLU, or its backward, behind them.

    packed = x w12^T + bias = [a, b];  out = silu(a) b
    dout = g w3;  [da, db] = dout [b s (1 + a (1 - s)), a s], s = 1 / (1 + exp(-a));  dbias = sum of rows

A program takes tiles in turn, operands come through tensor descriptors, sums are float32, results are rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastasync_kernels._common import INTERPRET, OfflineCase, check_tensor, on_device
from fastasync_kernels.column_sums import column_sums
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = (torch.bfloat16, torch.float16) + ((torch.float32,) if INTERPRET else ())


class Tile(NamedTuple):
    """One configuration: rows and hidden units of a program's tile, depth of a step, warps, stages.

    ``joined``: gate and up in one product of twice as many columns (forward).  ``parts``: columns are taken in so many
    parts behind the products, for fewer registers, and ``ahead``: packed is fetched into the second-level cache before
    the products (backward).  ``flat``: the next tile's loads begin before this one's results are written.  ``special``:
    Triton divides the warps by their work.  ``programs``: of one multiprocessor; ``limit``: most registers a thread may
    have.
    """

    rows: int = 128
    hidden: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    joined: bool = True
    parts: int = 1
    ahead: bool = False
    flat: bool = True
    special: bool = False
    programs: int = 1
    limit: int | None = None

    @property
    def name(self) -> str:
        words = [f"triton {self.rows}x{self.hidden}x{self.depth}, {self.warps} warps, {self.stages} stages"]
        words += [f"{self.parts} parts"] if self.parts > 1 else []
        words += [word for word in ("joined", "ahead", "flat", "special") if getattr(self, word)]
        words += [f"{self.programs} programs"] if self.programs > 1 else []
        return ", ".join(words + ([f"limit {self.limit}"] if self.limit else []))


@triton.jit
def _place(number, rows, F: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr, GROUP: tl.constexpr):
    """Tile ``number``'s first row and first hidden unit; GROUP tiles of rows share a read of the weights."""
    across: tl.constexpr = F // HIDDEN
    first = number // (GROUP * across) * GROUP
    size = tl.minimum(tl.cdiv(rows, ROWS) - first, GROUP)
    inside = number % (GROUP * across)
    return (first + inside % size) * ROWS, inside // size * HIDDEN


@triton.jit
def _halves(x):
    """[R, C] -> [R, C / 2] twice, the left and the right columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _forward_kernel(
    x_desc, w_desc, bias_ptr, packed_desc, out_desc, rows, K,
    F: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    JOINED: tl.constexpr, KEEP: tl.constexpr, FLAT: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """x [rows, K], w [2, F, K], bias [2 F] -> packed [rows, 2 F] (KEEP) and out [rows, F]."""
    tiles = tl.cdiv(rows, ROWS) * (F // HIDDEN)
    kind: tl.constexpr = out_desc.dtype
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT, warp_specialize=SPECIAL):
        row, unit = _place(number, rows, F, ROWS, HIDDEN, GROUP)
        if JOINED:
            both = tl.zeros([ROWS, 2 * HIDDEN], tl.float32)
            for k in range(0, K, DEPTH):
                x = x_desc.load([row, k])
                w = w_desc.load([0, unit, k]).reshape([2 * HIDDEN, DEPTH])
                both = tl.dot(x, w.T, both)
            a, b = _halves(both)
        else:
            a = tl.zeros([ROWS, HIDDEN], tl.float32)
            b = tl.zeros([ROWS, HIDDEN], tl.float32)
            for k in range(0, K, DEPTH):
                x = x_desc.load([row, k])
                gate = w_desc.load([0, unit, k]).reshape([HIDDEN, DEPTH])
                up = w_desc.load([1, unit, k]).reshape([HIDDEN, DEPTH])
                a = tl.dot(x, gate.T, a)
                b = tl.dot(x, up.T, b)
        column = unit + tl.arange(0, HIDDEN)
        a += tl.load(bias_ptr + column).to(tl.float32)[None, :]
        b += tl.load(bias_ptr + F + column).to(tl.float32)[None, :]
        if KEEP:
            packed_desc.store([row, unit], a.to(kind))
            packed_desc.store([row, F + unit], b.to(kind))
        out_desc.store([row, unit], (a * tl.sigmoid(a) * b).to(kind))


@triton.jit
def _fetch_line(pointer):
    """Ask for one line of memory in the second-level cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer], tl.int32, False, 1)


@triton.jit
def _write_gradients(
    dout, packed_desc, dpacked_desc, partial_ptr, row, unit, F: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr
):
    """Gradients of the hidden units from ``unit`` on, as many as dout [ROWS, ...] has columns."""
    kind: tl.constexpr = dpacked_desc.dtype
    a = packed_desc.load([row, unit]).to(tl.float32)
    b = packed_desc.load([row, F + unit]).to(tl.float32)
    s = tl.sigmoid(a)
    db = dout * a * s
    da = dout * b * s * (1.0 + a * (1.0 - s))
    dpacked_desc.store([row, unit], da.to(kind))
    dpacked_desc.store([row, F + unit], db.to(kind))
    if BIAS:  # rows that do not exist have dout = 0
        partial = partial_ptr + row // ROWS * (2 * F) + unit + tl.arange(0, dout.shape[1])
        tl.store(partial, tl.sum(da, 0))
        tl.store(partial + F, tl.sum(db, 0))


@triton.jit
def _backward_kernel(
    g_desc, w_desc, packed_ptr, packed_desc, dpacked_desc, partial_ptr, rows, K,
    F: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, AHEAD: tl.constexpr, BIAS: tl.constexpr, FLAT: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """g [rows, K], w [K, F], packed [rows, 2 F] -> dpacked [rows, 2 F] and the columns' sums of each tile of rows."""
    tiles = tl.cdiv(rows, ROWS) * (F // HIDDEN)
    part: tl.constexpr = HIDDEN // PARTS
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT, warp_specialize=SPECIAL):
        row, unit = _place(number, rows, F, ROWS, HIDDEN, GROUP)
        if AHEAD:  # a line is 64 numbers
            here = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None]
            lines = packed_ptr + here * (2 * F) + unit + 64 * tl.arange(0, HIDDEN // 64)[None, :]
            _fetch_line(lines)
            _fetch_line(lines + F)
        dout = tl.zeros([ROWS, HIDDEN], tl.float32)
        for k in range(0, K, DEPTH):
            dout = tl.dot(g_desc.load([row, k]), w_desc.load([k, unit]), dout)
        if PARTS == 1:
            _write_gradients(dout, packed_desc, dpacked_desc, partial_ptr, row, unit, F, ROWS, BIAS)
        else:
            left, right = _halves(dout)
            if PARTS == 2:
                _write_gradients(left, packed_desc, dpacked_desc, partial_ptr, row, unit, F, ROWS, BIAS)
                _write_gradients(right, packed_desc, dpacked_desc, partial_ptr, row, unit + part, F, ROWS, BIAS)
            else:
                first, second = _halves(left)
                _write_gradients(first, packed_desc, dpacked_desc, partial_ptr, row, unit, F, ROWS, BIAS)
                _write_gradients(second, packed_desc, dpacked_desc, partial_ptr, row, unit + part, F, ROWS, BIAS)
                third, fourth = _halves(right)
                _write_gradients(third, packed_desc, dpacked_desc, partial_ptr, row, unit + 2 * part, F, ROWS, BIAS)
                _write_gradients(fourth, packed_desc, dpacked_desc, partial_ptr, row, unit + 3 * part, F, ROWS, BIAS)


def _grid(rows: int, hidden: int, tile: Tile, device: torch.device) -> tuple[int]:
    many = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return (min(many * tile.programs, triton.cdiv(rows, tile.rows) * (hidden // tile.hidden)),)


def _meta(tile: Tile, hidden: int, **flags: bool) -> dict[str, Any]:
    return {
        "F": hidden, "ROWS": tile.rows, "HIDDEN": tile.hidden, "DEPTH": tile.depth, "GROUP": 8, "FLAT": tile.flat,
        "SPECIAL": tile.special, "num_warps": tile.warps, "num_stages": tile.stages, **flags,
        **({"maxnreg": tile.limit} if tile.limit else {}),
    }  # fmt: skip


def _check(tensors: dict[str, tuple[Tensor, tuple[int, ...]]], hidden: int, tile: Tile) -> None:
    first = next(iter(tensors.values()))[0]
    for name, (tensor, shape) in tensors.items():
        check_tensor(name, tensor, TYPES if tensor is first else (first.dtype,), shape)
        if not tensor.is_contiguous() or shape[-1] * tensor.element_size() % 16:
            raise ValueError(f"{name} must be contiguous, with rows of a multiple of 16 bytes")
    if hidden % tile.hidden:
        raise ValueError(f"the hidden width {hidden} must be a multiple of the tile's {tile.hidden}")


def gated_product(x: Tensor, w12: Tensor, bias: Tensor, tile: Tile, keep: bool = True) -> tuple[Tensor, Tensor]:
    """x [M, K], w12 [2 F, K], bias [2 F] (x's dtype or float32) -> packed [M, 2 F] (empty unless ``keep``), out [M, F].

    bfloat16 or float16, contiguous, F a multiple of the tile's hidden units, M and K at least 1.  TypeError, ValueError
    for what the kernel does not take.  Forward only.
    """
    rows, depth = x.shape
    hidden = w12.shape[0] // 2
    _check({"x": (x, (rows, depth)), "w12": (w12, (2 * hidden, depth))}, hidden, tile)
    check_tensor("bias", bias, (torch.float32, x.dtype), (2 * hidden,), x.device)
    out = x.new_empty((rows, hidden))
    packed = x.new_empty((rows, 2 * hidden)) if keep else out
    with on_device(x):
        _forward_kernel[_grid(rows, hidden, tile, x.device)](
            TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(
                w12.view(2, hidden, depth), [2 if tile.joined else 1, tile.hidden, tile.depth]
            ),
            bias,
            TensorDescriptor.from_tensor(packed, [tile.rows, tile.hidden]),
            TensorDescriptor.from_tensor(out, [tile.rows, tile.hidden]),
            *(rows, depth),
            **_meta(tile, hidden, JOINED=tile.joined, KEEP=keep),
        )
    return (packed if keep else x.new_empty((0, 2 * hidden))), out


def gated_product_backward(
    g: Tensor, w3: Tensor, packed: Tensor, tile: Tile, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """g [M, K], w3 [K, F], packed [M, 2 F] -> dpacked [M, 2 F], dbias [2 F] float32 (empty without ``bias``).

    One dtype, bfloat16 or float16; contiguous, F a multiple of the tile's hidden units, M and K at least 1.  TypeError,
    ValueError for what the kernel does not take.
    """
    rows, depth = g.shape
    hidden = w3.shape[1]
    shapes = {"g": (g, (rows, depth)), "w3": (w3, (depth, hidden)), "packed": (packed, (rows, 2 * hidden))}
    _check(shapes, hidden, tile)
    dpacked = torch.empty_like(packed)
    parts = triton.cdiv(rows, tile.rows) if bias else 0
    partial = g.new_empty((parts, 2 * hidden), dtype=torch.float32)
    with on_device(g):
        _backward_kernel[_grid(rows, hidden, tile, g.device)](
            TensorDescriptor.from_tensor(g, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(w3, [tile.depth, tile.hidden]),
            packed,
            TensorDescriptor.from_tensor(packed, [tile.rows, tile.hidden // tile.parts]),
            TensorDescriptor.from_tensor(dpacked, [tile.rows, tile.hidden // tile.parts]),
            partial,
            *(rows, depth),
            **_meta(tile, hidden, PARTS=tile.parts, AHEAD=tile.ahead, BIAS=bias),
        )
    return dpacked, column_sums(partial[None])[0] if bias else partial.view(-1)


def offline_case(tile: Tile, backward: bool, kind: str = "bf16") -> OfflineCase:
    """XL: width 1152, hidden width 3072."""

    def block(*shape: int) -> str:
        return f"tensordesc<{kind}[{', '.join(map(str, shape))}]>"

    result, common = block(tile.rows, tile.hidden // tile.parts), {"rows": "i32", "K": "i32"}
    if backward:
        signature = {"g_desc": block(tile.rows, tile.depth), "w_desc": block(tile.depth, tile.hidden)}
        signature |= {"packed_ptr": f"*{kind}", "packed_desc": result, "dpacked_desc": result, "partial_ptr": "*fp32"}
        meta = _meta(tile, 3072, PARTS=tile.parts, AHEAD=tile.ahead, BIAS=True)
        return OfflineCase(_backward_kernel, signature | common, meta, divisible=("rows", "K"))
    weights = block(2 if tile.joined else 1, tile.hidden, tile.depth)
    signature = {"x_desc": block(tile.rows, tile.depth), "w_desc": weights, "bias_ptr": f"*{kind}"}
    signature |= {"packed_desc": result, "out_desc": result}
    return OfflineCase(
        _forward_kernel, signature | common, _meta(tile, 3072, JOINED=tile.joined, KEEP=True), divisible=("rows", "K")
    )
