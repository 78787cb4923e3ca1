"""Casts to fp8 (e4m3) for the products of linears, of rows and of columns; what for: ``fp8_linear``.

With s the largest magnitude of a row (a column) over 448: ``cast = round(x / s)``, by multiplying with 1 / s.

A tensor that is needed both ways is read twice: one pass casts its rows and finds the largest magnitude of each column,
the next writes its columns, transposed, since the products read both factors along the axis that they sum over.  Where
the operation that made it has found the largest magnitudes (``tops``), one pass casts it both ways, and can sum its
columns.  A number above its largest magnitude, which a wrong hint could cause, becomes NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, Launch, OfflineCase, ceil_div, check_tensor, on_device, power_of_two
from ._rows import check_unit_stride
from .column_sums import column_sums
from .reference import FP8, FP8_MULTIPLE
from .swiglu import backward_with_tops, forward_with_tops
from .tops import Tops, column_tops, hint_size, split_hint

ROWS = Launch(chunk=128, columns=8192, warps=4)  # columns: numbers at a time, in as many rows as that makes
# that cast many rows: more than an H100 or H200 runs at a time.  Each that finds the largest magnitudes of columns too
# leaves a row of partial results: four for each multiprocessor, which has room for five
PROGRAMS, TOPS_PROGRAMS = 2048, 512
WIDE = 512  # columns of a piece of a row
COLUMNS = Launch(rows=256, columns=64, warps=8)
BOTH = Launch(rows=64, columns=128, warps=4)
HINTED = Launch(rows=64, columns=64, warps=2, maxnreg=112)  # without a limit 128: eight programs at a time, not nine


@triton.jit
def _scale(top):
    """The largest magnitude -> what a row is divided by, and its reciprocal.  A row of zeros stays zeros."""
    scale = tl.maximum(top, 1e-12) * (1 / 448)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _piece(start: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr):
    """Columns from ``start``, [1, WIDE], or [1, TAIL] of the last ones.

    A row is worked on in pieces, each a block of its own: where there are four rows or more a warp has rows for itself
    then.  The compiler divides a row of a block [rows, columns] among warps if it is wider than 512 numbers of 16 bits,
    and some releases (Triton 3.6) divide pieces on an axis [pieces, rows, columns] too: warps wait for each other
    eight or nine times in every turn (1,152 columns).
    """
    return start + tl.arange(0, WIDE if start + WIDE <= C else TAIL)[None, :]


@triton.jit
def _row_of(step, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows in one of CHUNK / ROWS steps, [ROWS, 1]: each is in a run of its own."""
    run: tl.constexpr = CHUNK // ROWS
    return tl.program_id(0) * CHUNK + step + run * tl.arange(0, ROWS)[:, None]


@triton.jit
def _load_rows(x_ptr, row, rows, x_row, C: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr):
    source = x_ptr + row.to(tl.int64) * x_row
    pieces = ()
    for start in tl.static_range(0, C, WIDE):
        column = _piece(start, C, WIDE, TAIL)
        pieces += (tl.load(source + column, (row < rows) & (column < C), 0.0),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _row_tops(pieces):
    """Largest magnitudes of the rows, [ROWS, 1]: of one number of each wide piece first, then of a row's numbers."""
    wide = tl.abs(pieces[0].to(tl.float32))
    for i in tl.static_range(1, len(pieces) - 1):
        wide = tl.maximum(wide, tl.abs(pieces[i].to(tl.float32)))
    top = tl.max(wide, 1)
    if len(pieces) > 1:
        top = tl.maximum(top, tl.max(tl.abs(pieces[len(pieces) - 1].to(tl.float32)), 1))
    return top[:, None]


@triton.jit
def _store_rows(place, row, values, rows):
    """One number for each row, by the first thread of its warp: a block of numbers alone would go through memory."""
    lane = tl.arange(0, 32)[None, :]
    tl.store(place + row + lane, values + tl.zeros([1, 32], tl.float32), (row < rows) & (lane == 0))


@triton.jit
def _no_tops(ROWS: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr):
    tops = ()
    for start in tl.static_range(0, C, WIDE):
        tops += (tl.zeros([ROWS, WIDE if start + WIDE <= C else TAIL], tl.float32),)  # type: ignore[assignment]
    return tops


@triton.jit
def _larger(tops, pieces):
    larger = ()
    for i in tl.static_range(len(pieces)):
        larger += (tl.maximum(tops[i], tl.abs(pieces[i].to(tl.float32))),)  # type: ignore[assignment]
    return larger


@triton.jit
def _store_column_tops(part, tops, C: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr):
    for i in tl.static_range(len(tops)):
        column = _piece(i * WIDE, C, WIDE, TAIL)
        tl.store(part + column, tl.max(tops[i], 0)[None, :], column < C)


@triton.jit
def _cast_rows_kernel(
    x_ptr, out_ptr, scale_ptr, part_ptr, rows, x_row,
    C: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    TOPS: tl.constexpr,
):  # fmt: skip
    steps: tl.constexpr = CHUNK // ROWS
    # few programs run at a time with TOPS: the next rows are on their way while these are cast.  Not with more than 40
    # numbers a thread, or wider ones: their registers would leave room for three programs instead of four
    AHEAD: tl.constexpr = TOPS and ROWS * C <= 5120 and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    if TOPS:
        tops = _no_tops(ROWS, C, WIDE, TAIL)
    if AHEAD:
        ahead = _load_rows(x_ptr, _row_of(0, CHUNK, ROWS), rows, x_row, C, WIDE, TAIL)
    for step in range(0, steps):
        row = _row_of(step, CHUNK, ROWS)
        if AHEAD:
            pieces = ahead
            ahead = _load_rows(x_ptr, row + 1, tl.where(step + 1 < steps, rows, 0), x_row, C, WIDE, TAIL)
        else:
            pieces = _load_rows(x_ptr, row, rows, x_row, C, WIDE, TAIL)
        scale, inverse = _scale(_row_tops(pieces))
        target = out_ptr + row.to(tl.int64) * C
        for i in tl.static_range(len(pieces)):
            column = _piece(i * WIDE, C, WIDE, TAIL)
            y = (pieces[i].to(tl.float32) * inverse).to(out_ptr.dtype.element_ty)
            tl.store(target + column, y, (row < rows) & (column < C))
        _store_rows(scale_ptr, row, scale, rows)
        if TOPS:
            tops = _larger(tops, pieces)
    if TOPS:
        _store_column_tops(part_ptr + tl.program_id(0).to(tl.int64) * C, tops, C, WIDE, TAIL)


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
def _find_tops_kernel(
    x_ptr, count_ptr, row_top_ptr, part_ptr, rows, x_row,
    C: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes of the rows, and of the columns in parts, unless the hint has them: its count is one."""
    if tl.load(count_ptr) != 1.0:
        tops = _no_tops(ROWS, C, WIDE, TAIL)
        for step in range(0, CHUNK // ROWS):
            row = _row_of(step, CHUNK, ROWS)
            pieces = _load_rows(x_ptr, row, rows, x_row, C, WIDE, TAIL)
            _store_rows(row_top_ptr, row, _row_tops(pieces), rows)
            tops = _larger(tops, pieces)
        _store_column_tops(part_ptr + tl.program_id(0).to(tl.int64) * C, tops, C, WIDE, TAIL)


@triton.jit
def _cast_both_kernel(
    x_ptr, row_top_ptr, top_ptr, count_ptr, found_row_ptr, found_top_ptr,
    out_ptr, scale_ptr, columns_ptr, divisor_ptr, sum_ptr, rows, x_row, columns_row,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    HINTED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """HINTED: the magnitudes are those of the hint if its count is one, otherwise the found ones.  SUMS: partial sums
    of the columns, one for each block of rows."""
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(0) // blocks
    row = block * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PADDED)[None, :]
    given_rows, given_columns = rows, C
    if HINTED:  # all or none
        given_rows = tl.where(tl.load(count_ptr) == 1.0, rows, 0)
        given_columns = tl.where(tl.load(count_ptr) == 1.0, C, 0)
    given = (row < given_rows)[:, None] & (part < PARTS)
    row_top = tl.max(tl.load(row_top_ptr + row.to(tl.int64)[:, None] * PARTS + part, given, 0.0), 1)
    top = tl.load(top_ptr + column, column < given_columns, 0.0)
    if HINTED:
        row_top = tl.maximum(row_top, tl.load(found_row_ptr + row, (row < rows) & (row >= given_rows), 0.0))
        top = tl.maximum(top, tl.load(found_top_ptr + column, (column < C) & (column >= given_columns), 0.0))
    scale, inverse = _scale(row_top)
    divisor, reciprocal = _scale(top)
    if tl.program_id(0) % blocks == 0:
        tl.store(scale_ptr + row, scale, row < rows)
    if block == 0:
        tl.store(divisor_ptr + column, divisor, column < C)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :], inside, 0.0).to(tl.float32)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    size = tl.abs(x)
    by_row = tl.where(size > row_top[:, None], float("nan"), x * inverse[:, None])
    tl.store(out_ptr + row.to(tl.int64)[:, None] * C + column[None, :], by_row.to(kind), inside)
    if SUMS:
        tl.store(sum_ptr + block.to(tl.int64) * C + column, tl.sum(x, 0), column < C)
    by_column = tl.where(size > top[None, :], float("nan"), x * reciprocal[None, :])
    y = tl.trans(by_column.to(kind))
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


def _rows_meta(width: int, count: int = 65536, tops: bool = True) -> dict[str, Any]:
    tail = power_of_two(width % WIDE or WIDE)
    rows = max(1, ROWS.columns // (width - (width % WIDE or WIDE) + tail))
    rows = 1 << (rows.bit_length() - 1)
    # a weight has few rows: a program for each few of them
    few = power_of_two(ceil_div(count, TOPS_PROGRAMS if tops else PROGRAMS))
    return {"C": width, "WIDE": WIDE, "TAIL": tail, "CHUNK": max(min(ROWS.chunk, few), rows), "ROWS": rows}


@torch.library.custom_op("fastasync::cast_rows", mutates_args=())
def _cast_rows(x: Tensor, tops: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    out, scale, top = _empty_rows(x, tops)
    width, meta = x.shape[1], _rows_meta(x.shape[1], len(x), tops)
    programs = ceil_div(len(x), meta["CHUNK"])
    parts = x.new_empty((programs, width) if tops else 0, dtype=torch.float32)
    with on_device(x):
        if programs:
            _cast_rows_kernel[(programs,)](
                x, out, scale, parts, len(x), x.stride(0), TOPS=tops, **meta, **ROWS.options(4)
            )
        if tops:
            column_tops(parts, top)
    return out, scale, top


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
            _cast_columns_kernel[(ceil_div(len(x), rows) * ceil_div(x.shape[1], columns),)](
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


def _launch_both(
    x: Tensor, tops: Tops, count: Tensor | None = None, found: Tops | None = None, sums: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x cast both ways, and the sums of its columns in float32 (empty without ``sums``)."""
    (out, scale, _), (columns, divisor) = _empty_rows(x, False), _empty_columns(x)
    launch = BOTH if count is None else HINTED
    rows, wide = launch.rows, launch.columns
    blocks = ceil_div(len(x), rows)
    partial = x.new_empty((blocks if sums else 0, x.shape[1]), dtype=torch.float32)
    if len(x):
        unused = scale
        with on_device(x):
            _cast_both_kernel[(blocks * ceil_div(x.shape[1], wide),)](
                x, tops.rows, tops.columns, unused if count is None else count, *(found or (unused, unused)),
                out, scale, columns, divisor, partial, len(x), x.stride(0), columns.stride(0),
                C=x.shape[1], ROWS=rows, COLUMNS=wide, PARTS=tops.rows.shape[1],
                PADDED=power_of_two(tops.rows.shape[1]), HINTED=count is not None, SUMS=sums,
                **launch.options(4),
            )  # fmt: skip
    return out, scale, columns, divisor, column_sums(partial[None])[0] if sums else partial[:, 0]


def _largest(x: Tensor, parts: Tensor) -> Tensor:
    top = x.new_empty(x.shape[1], dtype=torch.float32)
    column_tops(parts, top)
    return top


@torch.library.custom_op("fastasync::cast_both", mutates_args=())
def _cast_both(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x)
    check_tensor("rows", rows, (torch.float32,), (len(x), -1), x.device)
    check_tensor("columns", columns, (torch.float32,), x.shape[1:], x.device)
    return _launch_both(x, Tops(rows, columns))[:4]


@_cast_both.register_fake
def _(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_empty_rows(x, False)[:2], *_empty_columns(x)


def cast_both(x: Tensor, tops: Tops) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``cast_rows`` and ``cast_columns`` of x [M, C] in one pass, by the largest magnitudes of its rows and columns."""
    return _cast_both(x, *tops)


@torch.library.custom_op("fastasync::cast_hinted", mutates_args=())
def cast_hinted(x: Tensor, hint: Tensor, parts: int, sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``cast_both`` of x [M, C] by the gradient of a hint (``tops``), and with ``sums`` its columns' sums, float32 [C].

    A hint that is not of the whole x costs one more pass over x.
    """
    _check(x)
    check_tensor("hint", hint, (torch.float32,), (hint_size(len(x), x.shape[1], parts),), x.device)
    if not len(x):
        out, scale, columns, divisor, _ = _launch_both(x, split_hint(hint, 0, parts)[0])
        return out, scale, columns, divisor, x.new_zeros(x.shape[1] if sums else 0, dtype=torch.float32)
    tops, count = split_hint(hint, len(x), parts)
    meta = _rows_meta(x.shape[1], len(x))
    programs = ceil_div(len(x), meta["CHUNK"])
    found = Tops(*(x.new_empty(size, dtype=torch.float32) for size in x.shape))
    partial = x.new_empty((programs, x.shape[1]))
    with on_device(x):
        _find_tops_kernel[(programs,)](x, count, found.rows, partial, len(x), x.stride(0), **meta, **ROWS.options(4))
    column_tops(partial, found.columns, count)
    return _launch_both(x, tops, count, found, sums)


@cast_hinted.register_fake
def _(x: Tensor, hint: Tensor, parts: int, sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape[1] if sums else 0, dtype=torch.float32)
    return *_empty_rows(x, False)[:2], *_empty_columns(x), total


@torch.library.custom_op("fastasync::swiglu_cast", mutates_args=())
def swiglu_cast(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``swiglu`` of packed [M, 2 F] in fp8, both ways: what ``cast_rows`` and ``cast_columns`` give."""
    out, rows, parts = forward_with_tops(packed)
    return _launch_both(out, Tops(rows, _largest(out, parts)))[:4]


@swiglu_cast.register_fake
def _(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = packed.new_empty((packed.shape[0], packed.shape[1] // 2))
    return (*_empty_rows(out, True)[:2], *_empty_columns(out))


@torch.library.custom_op("fastasync::swiglu_backward_cast", mutates_args=())
def swiglu_backward_cast(dout: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """packed's gradient [M, 2 F] in fp8, both ways, and its sum over the rows, float32 [2 F]."""
    dpacked, total, row_parts, parts = backward_with_tops(dout, packed, with_bias=True)
    return *_launch_both(dpacked, Tops(row_parts, _largest(dpacked, parts)))[:4], total


@swiglu_backward_cast.register_fake
def _(dout: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = packed.new_empty(packed.shape[-1], dtype=torch.float32)
    return *_empty_rows(packed, True)[:2], *_empty_columns(packed), total


def _offline() -> list[OfflineCase]:
    cases = []
    for kind in ("*bf16", "*fp32"):
        for width in (1152, 3456, 6144):
            signature = {"x_ptr": kind, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "rows": "i32", "x_row": "i32"}
            for tops in (False, True):
                meta = {**_rows_meta(width, tops=tops), "TOPS": tops}
                cases.append(
                    OfflineCase(_cast_rows_kernel, signature | {"part_ptr": "*fp32"}, meta, ROWS.warps, ("x_row",))
                )
            signature |= {"top_ptr": "*fp32", "out_row": "i32"}
            meta = {"C": width, "ROWS": COLUMNS.rows, "COLUMNS": COLUMNS.columns}
            cases.append(OfflineCase(_cast_columns_kernel, signature, meta, COLUMNS.warps, ("x_row", "out_row")))
        meta = _rows_meta(1152)
        signature = {"x_ptr": kind, "part_ptr": kind, "rows": "i32", "x_row": "i32"}
        signature |= dict.fromkeys(("count_ptr", "row_top_ptr"), "*fp32")
        cases.append(OfflineCase(_find_tops_kernel, signature, meta, ROWS.warps, ("x_row",)))
        pointers = ("row_top", "top", "count", "found_row", "found_top", "scale", "divisor", "sum")
        signature = {f"{name}_ptr": "*fp32" for name in pointers} | {"x_ptr": kind}
        signature |= dict.fromkeys(("out_ptr", "columns_ptr"), "*fp8e4nv")
        signature |= dict.fromkeys(("rows", "x_row", "columns_row"), "i32")
        for width, parts, hinted in ((6144, 3, False), (1152, 4, False), (1152, 4, True), (3456, 12, True)):
            launch = HINTED if hinted else BOTH
            meta = {"C": width, "ROWS": launch.rows, "COLUMNS": launch.columns, "PARTS": parts, "HINTED": hinted}
            meta |= {"PADDED": power_of_two(parts), "SUMS": hinted, **launch.options(4)}
            cases.append(OfflineCase(_cast_both_kernel, signature, meta, launch.warps, ("x_row", "columns_row")))
    return cases


OFFLINE = _offline()
