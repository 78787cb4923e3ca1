"""Sums over rows, ``out[g] = sum over r of x[g, r]``: the last stage of reductions whose first left partial sums.

Up to a few thousand rows of float32, always added in the same order.  torch's own reduction of so few numbers is a
block of threads wide and took 7 to 19 microseconds on an H200 (bench/NOTES.md); here every 8 columns are a program, and
many rows are read at a time, as it is the latency of a read that costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRET, Launch, OfflineCase, ceil_div, on_device

# few blocks of few rows are what the interpreter is fast at
LAUNCH = Launch(rows=64, columns=128, warps=8) if INTERPRET else Launch(rows=512, columns=8, warps=8)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, rows, x_group, x_row, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[:, None]
    source = x_ptr + group * x_group + row.to(tl.int64) * x_row + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        total += tl.load(source, (start + row < rows) & (column < C)[None, :], 0.0)
        source += ROWS * x_row
    tl.store(out_ptr + group * C + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), column < C)


def column_sums(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float32 [G, R, C], unit stride over C -> [G, C] in ``dtype``; a launcher for use inside other operators."""
    groups, rows, width = x.shape
    out = x.new_empty((groups, width), dtype=dtype)
    programs = groups * ceil_div(width, LAUNCH.columns)
    if programs:
        with on_device(x):
            _sum_kernel[(programs,)](
                x, out, rows, x.stride(0), x.stride(1), C=width, ROWS=LAUNCH.rows, COLUMNS=LAUNCH.columns,
                **LAUNCH.options(4),
            )  # fmt: skip
    return out


OFFLINE = [
    OfflineCase(
        _sum_kernel,
        {"x_ptr": "*fp32", "out_ptr": out, "rows": "i32", "x_group": "i32", "x_row": "i32"},
        {"C": width, "ROWS": LAUNCH.rows, "COLUMNS": LAUNCH.columns},
        LAUNCH.warps,
        divisible=("x_group", "x_row"),
    )
    for width, out in ((72, "*fp32"), (1152, "*bf16"), (6144, "*fp32"))
]
