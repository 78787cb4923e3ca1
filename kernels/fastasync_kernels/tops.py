"""Largest magnitudes of the rows and columns of a matrix, found by who writes it: what the casts to fp8 divide by.

Where an operation has them, one pass casts a tensor both ways (``fp8_casts.cast_both``).  For an output they are two
more outputs.  For a gradient they travel as the gradient of a *hint*, a second output of the linear that nobody reads:

    y, hint = linear(x)            hint [M P + C + 1] float32, uninitialised
    x', h = gated(x, y, hint)      its backward returns dy [M, C], and for the hint [M P row parts, C columns, 1]

The last number counts who sent: 1 says that the magnitudes are of the whole gradient of y.  A hint that nobody was
given comes back as zeros, two readers' as their sum: the linear then finds the magnitudes by itself, on the device.
Whoever reads y without the hint says so by ``fp8_linear.unhinted``.  Who does not may make them too small, at which the
casts give NaN, not a wrong number.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRET, Launch, OfflineCase, ceil_div, on_device

# up to 2,048 rows of partial results: few turns; few blocks of few rows are what the interpreter is fast at
COLUMNS = Launch(rows=64, columns=128, warps=8) if INTERPRET else Launch(rows=512, columns=16, warps=8)


class Tops(NamedTuple):
    """Largest magnitudes of a matrix [M, C], float32: of its rows, in parts [M, P], and of its columns [C]."""

    rows: Tensor
    columns: Tensor


def hint_size(rows: int, columns: int, parts: int) -> int:
    return rows * parts + columns + 1


def split_hint(hint: Tensor, rows: int, parts: int) -> tuple[Tops, Tensor]:
    """The magnitudes in a hint of a matrix of so many rows, and the count [1]."""
    return Tops(hint[: rows * parts].view(rows, parts), hint[rows * parts : -1]), hint[-1:]


@triton.jit
def _columns_kernel(
    part_ptr, out_ptr, count_ptr, parts,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HINTED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT: a one after the last column.  HINTED: zeros where that says that the magnitudes are known."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    top = tl.zeros([ROWS, COLUMNS], tl.float32)
    if HINTED:
        parts = tl.where(tl.load(count_ptr) == 1.0, 0, parts)
    for start in range(0, parts, ROWS):
        place = part_ptr + (start + row).to(tl.int64)[:, None] * C + column[None, :]
        inside = (start + row < parts)[:, None] & (column < C)[None, :]
        top = tl.maximum(top, tl.load(place, inside, 0.0).to(tl.float32))
    tl.store(out_ptr + column, tl.max(top, 0), column < C)
    if COUNT and tl.program_id(0) == 0:
        tl.store(out_ptr + C, 1.0)


def column_tops(parts: Tensor, out: Tensor, known: Tensor | None = None, count: bool = False) -> None:
    """out [C] float32 = the largest of each column of parts [P, C], none negative; for use inside other operators.

    ``count``: a one is written after the last column.  ``known`` [1]: where it is one, parts are not read and out is 0.
    """
    rows, width = parts.shape
    with on_device(parts):
        _columns_kernel[(ceil_div(width, COLUMNS.columns),)](
            parts, out, out if known is None else known, rows,
            C=width, ROWS=COLUMNS.rows, COLUMNS=COLUMNS.columns, HINTED=known is not None, COUNT=count,
            **COLUMNS.options(4),
        )  # fmt: skip


OFFLINE = [
    OfflineCase(
        _columns_kernel,
        {"part_ptr": kind, "out_ptr": "*fp32", "count_ptr": "*fp32", "parts": "i32"},
        {"C": 1152, "ROWS": COLUMNS.rows, "COLUMNS": COLUMNS.columns, "HINTED": hinted, "COUNT": not hinted},
        COLUMNS.warps,
    )
    for kind, hinted in (("*bf16", False), ("*fp32", True))
]
