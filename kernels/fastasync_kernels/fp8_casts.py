"""Casts to fp8 (e4m3) for the products of linears, of rows and of columns; what for: ``fp8_linear``.

With s the largest magnitude of a row (a column) over 448: ``cast = round(x / s)``, by multiplying with 1 / s.

A tensor that is needed both ways is read twice: one pass casts its rows and finds the largest magnitude of each column,
the next writes its columns, transposed, since the products read both factors along the axis that they sum over.  Where
the operation that made it has found the largest magnitudes (``swiglu``), one pass casts it both ways.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, Launch, OfflineCase, check_tensor, on_device
from ._rows import check_unit_stride, head_and_tail
from .reference import FP8, FP8_MULTIPLE
from .swiglu import backward_with_tops, forward_with_tops

ROWS = Launch(chunk=128, columns=8192, warps=4)  # columns: numbers at a time, in as many rows as that makes
COLUMNS = Launch(rows=256, columns=64, warps=8)
BOTH = Launch(rows=128, columns=128, warps=8)
TOPS = Launch(rows=128, columns=32, warps=4)


@triton.jit
def _scale(top):
    """The largest magnitude -> what a row is divided by, and its reciprocal.  A row of zeros stays zeros."""
    scale = tl.maximum(top, 1e-12) * (1 / 448)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _cast_rows_kernel(
    x_ptr, out_ptr, scale_ptr, part_ptr, rows, x_row,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    TOPS: tl.constexpr,
):  # fmt: skip
    c0 = tl.arange(0, HEAD)[None, :]
    c1 = HEAD + tl.arange(0, TAIL)[None, :]
    top0 = tl.zeros([ROWS, HEAD], tl.float32)
    top1 = tl.zeros([ROWS, TAIL], tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = tl.program_id(0) * CHUNK + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        source = x_ptr + row.to(tl.int64)[:, None] * x_row
        target = out_ptr + row.to(tl.int64)[:, None] * C
        x0 = tl.load(source + c0, inside, 0.0).to(tl.float32)
        x1 = tl.load(source + c1, inside & (c1 < C), 0.0).to(tl.float32)
        scale, inverse = _scale(tl.maximum(tl.max(tl.abs(x0), 1), tl.max(tl.abs(x1), 1)))
        tl.store(target + c0, (x0 * inverse[:, None]).to(out_ptr.dtype.element_ty), inside)
        tl.store(target + c1, (x1 * inverse[:, None]).to(out_ptr.dtype.element_ty), inside & (c1 < C))
        tl.store(scale_ptr + row, scale, row < rows)
        if TOPS:
            top0 = tl.maximum(top0, tl.abs(x0))
            top1 = tl.maximum(top1, tl.abs(x1))
    if TOPS:
        part = part_ptr + tl.program_id(0).to(tl.int64) * C
        tl.store(part + tl.arange(0, HEAD), tl.max(top0, 0))
        column = HEAD + tl.arange(0, TAIL)
        tl.store(part + column, tl.max(top1, 0), column < C)


@triton.jit
def _tops_kernel(part_ptr, out_ptr, parts, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    top = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, parts, ROWS):
        place = part_ptr + (start + row).to(tl.int64)[:, None] * C + column[None, :]
        top = tl.maximum(top, tl.load(place, (start + row < parts)[:, None] & (column < C)[None, :], 0.0))
    tl.store(out_ptr + column, tl.max(top, 0), column < C)


@triton.jit
def _cast_columns_kernel(
    x_ptr, top_ptr, out_ptr, scale_ptr, rows, x_row, out_row,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(0) // parts
    row = block * ROWS + tl.arange(0, ROWS)
    scale, inverse = _scale(tl.load(top_ptr + column, column < C, 0.0))
    if block == 0:
        tl.store(scale_ptr + column, scale, column < C)
    source = x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :]
    x = tl.load(source, (row < rows)[:, None] & (column < C)[None, :], 0.0).to(tl.float32)
    y = tl.trans((x * inverse[None, :]).to(out_ptr.dtype.element_ty))
    target = out_ptr + column.to(tl.int64)[:, None] * out_row + row[None, :]
    tl.store(target, y, (column < C)[:, None] & (row < out_row)[None, :])


@triton.jit
def _cast_both_kernel(
    x_ptr, row_top_ptr, top_ptr, out_ptr, scale_ptr, columns_ptr, divisor_ptr, rows, x_row, columns_row,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(0) // blocks
    row = block * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PADDED)[None, :]
    tops = tl.load(row_top_ptr + row[:, None] * PARTS + part, (row < rows)[:, None] & (part < PARTS), 0.0)
    scale, inverse = _scale(tl.max(tops, 1))
    divisor, reciprocal = _scale(tl.load(top_ptr + column, column < C, 0.0))
    if tl.program_id(0) % blocks == 0:
        tl.store(scale_ptr + row, scale, row < rows)
    if block == 0:
        tl.store(divisor_ptr + column, divisor, column < C)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :], inside, 0.0).to(tl.float32)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + row.to(tl.int64)[:, None] * C + column[None, :], (x * inverse[:, None]).to(kind), inside)
    y = tl.trans((x * reciprocal[None, :]).to(kind))
    target = columns_ptr + column.to(tl.int64)[:, None] * columns_row + row[None, :]
    tl.store(target, y, (column < C)[:, None] & (row < columns_row)[None, :])


def _check(x: Tensor) -> None:
    check_tensor("x", x, FLOATS, (-1, -1))
    check_unit_stride("x", x)
    if x.shape[1] < 2:
        raise ValueError(f"x has {x.shape[1]} columns: at least 2 are needed")


def _empty_rows(x: Tensor, tops: bool) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FP8), scale, x.new_empty(x.shape[1] if tops else 0, dtype=torch.float32)


def _rows_meta(width: int) -> dict[str, Any]:
    head, tail = head_and_tail(width)
    rows = max(1, ROWS.columns // (head + tail))
    rows = 1 << (rows.bit_length() - 1)
    return {"C": width, "HEAD": head, "TAIL": tail, "CHUNK": max(ROWS.chunk, rows), "ROWS": rows}


@torch.library.custom_op("fastasync::cast_rows", mutates_args=())
def _cast_rows(x: Tensor, tops: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    out, scale, top = _empty_rows(x, tops)
    width, meta = x.shape[1], _rows_meta(x.shape[1])
    programs = triton.cdiv(len(x), meta["CHUNK"])
    parts = x.new_empty((programs, width) if tops else 0, dtype=torch.float32)
    with on_device(x):
        if programs:
            _cast_rows_kernel[(programs,)](
                x, out, scale, parts, len(x), x.stride(0), TOPS=tops, **meta, **ROWS.options(4)
            )
        if tops:
            _largest(parts, top)
    return out, scale, top


def _largest(parts: Tensor, top: Tensor) -> None:
    """top [C] = the largest of parts [P, C]."""
    count, width = parts.shape
    _tops_kernel[(triton.cdiv(width, TOPS.columns),)](
        parts, top, count, C=width, ROWS=TOPS.rows, COLUMNS=TOPS.columns, **TOPS.options(4)
    )


@_cast_rows.register_fake
def _(x: Tensor, tops: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_rows(x, tops)


def _empty_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = -(-x.shape[0] // FP8_MULTIPLE) * FP8_MULTIPLE
    return x.new_empty((x.shape[1], rows), dtype=FP8), x.new_empty((x.shape[1], 1), dtype=torch.float32)


@torch.library.custom_op("fastasync::cast_columns", mutates_args=())
def _cast_columns(x: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    check_tensor("top", top, (torch.float32,), (x.shape[1],), x.device)
    out, scale = _empty_columns(x)
    rows, columns = COLUMNS.rows, COLUMNS.columns
    if len(x):
        with on_device(x):
            _cast_columns_kernel[(triton.cdiv(len(x), rows) * triton.cdiv(x.shape[1], columns),)](
                x, top, out, scale, len(x), x.stride(0), out.stride(0),
                C=x.shape[1], ROWS=rows, COLUMNS=columns, **COLUMNS.options(4),
            )  # fmt: skip
    return out, scale


@_cast_columns.register_fake
def _(x: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_columns(x)


def cast_rows(x: Tensor, tops: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x [M, C] in e4m3 [M, C], what they were divided by [M, 1] float32, and with ``tops`` the largest
    magnitude of each column [C] float32 (otherwise empty).

    x: float16, bfloat16 or float32 (TypeError), unit stride over C (ValueError).
    """
    return _cast_rows(x, tops)


def cast_columns(x: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of x [M, C] as rows in e4m3 [C, M up to a multiple of 16, zeros last], and their divisors [C, 1] float32.

    ``top``: of the same x, from ``cast_rows``.
    """
    return _cast_columns(x, top)


def cast_both(x: Tensor, row_parts: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``cast_rows`` and ``cast_columns`` of x [M, C] in one pass; a launcher for use inside other operators.

    row_parts [M, P] and parts [Q, C], float32: the largest of P are a row's largest magnitude, those of Q a column's.
    """
    (out, scale, top), (columns, divisor) = _empty_rows(x, True), _empty_columns(x)
    rows, wide = BOTH.rows, BOTH.columns
    if len(x):
        with on_device(x):
            _largest(parts, top)
            _cast_both_kernel[(triton.cdiv(len(x), rows) * triton.cdiv(x.shape[1], wide),)](
                x, row_parts, top, out, scale, columns, divisor, len(x), x.stride(0), columns.stride(0),
                C=x.shape[1], ROWS=rows, COLUMNS=wide, PARTS=row_parts.shape[1],
                PADDED=triton.next_power_of_2(row_parts.shape[1]), **BOTH.options(4),
            )  # fmt: skip
    return out, scale, columns, divisor


@torch.library.custom_op("fastasync::swiglu_cast", mutates_args=())
def swiglu_cast(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``swiglu`` of packed [M, 2 F] in fp8, both ways: what ``cast_rows`` and ``cast_columns`` give."""
    return cast_both(*forward_with_tops(packed))


@swiglu_cast.register_fake
def _(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = packed.new_empty((packed.shape[0], packed.shape[1] // 2))
    return (*_empty_rows(out, True)[:2], *_empty_columns(out))


@torch.library.custom_op("fastasync::swiglu_backward_cast", mutates_args=())
def swiglu_backward_cast(dout: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """packed's gradient [M, 2 F] in fp8, both ways, and its sum over the rows, float32 [2 F]."""
    dpacked, total, row_parts, parts = backward_with_tops(dout, packed, with_bias=True)
    return *cast_both(dpacked, row_parts, parts), total


@swiglu_backward_cast.register_fake
def _(dout: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = packed.new_empty(packed.shape[-1], dtype=torch.float32)
    return *_empty_rows(packed, True)[:2], *_empty_columns(packed), total


def _offline() -> list[OfflineCase]:
    cases = []
    for kind in ("*bf16", "*fp32"):
        for width in (1152, 3456, 6144):
            signature = {"x_ptr": kind, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "rows": "i32", "x_row": "i32"}
            meta = {**_rows_meta(width), "TOPS": True}
            cases.append(
                OfflineCase(_cast_rows_kernel, signature | {"part_ptr": "*fp32"}, meta, ROWS.warps, ("x_row",))
            )
            signature |= {"top_ptr": "*fp32", "out_row": "i32"}
            meta = {"C": width, "ROWS": COLUMNS.rows, "COLUMNS": COLUMNS.columns}
            cases.append(OfflineCase(_cast_columns_kernel, signature, meta, COLUMNS.warps, ("x_row", "out_row")))
        signature = dict.fromkeys(("out_ptr", "columns_ptr"), "*fp8e4nv") | {
            "x_ptr": kind,
            "rows": "i32",
            "x_row": "i32",
        }
        signature |= dict.fromkeys(("row_top_ptr", "top_ptr", "scale_ptr", "divisor_ptr"), "*fp32") | {
            "columns_row": "i32"
        }
        meta = {"C": 6144, "ROWS": BOTH.rows, "COLUMNS": BOTH.columns, "PARTS": 3, "PADDED": 4}
        cases.append(OfflineCase(_cast_both_kernel, signature, meta, BOTH.warps, ("x_row", "columns_row")))
    signature = {"part_ptr": "*fp32", "out_ptr": "*fp32", "parts": "i32"}
    meta = {"C": 1152, "ROWS": TOPS.rows, "COLUMNS": TOPS.columns}
    return [*cases, OfflineCase(_tops_kernel, signature, meta, TOPS.warps)]


OFFLINE = _offline()
