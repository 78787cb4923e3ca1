"""Shared by the kernels that work on rows of features: exact column blocks and stride checks.

A Triton block has a power-of-two length, and the widths of these models (1152, 1536, head dimension 72) are not powers
of two.  One padded block would leave up to 44 % of its lanes idle, and these kernels spend about half of the issue
slots that their memory traffic leaves.  So a row is two blocks, a head and a tail: 1152 = 1024 + 128, 72 = 64 + 8.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import power_of_two


def head_and_tail(width: int) -> tuple[int, int]:
    """(head, tail): the largest power of two below ``width``, and the power of two that holds the rest.  width >= 2."""
    head = 1 << ((width - 1).bit_length() - 1)
    return head, power_of_two(width - head)


def check_unit_stride(name: str, tensor: Tensor) -> None:
    """The last axis must be contiguous; the other axes may have any stride.  ValueError, never a hidden copy."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} over its last axis, not 1; call .contiguous() first")


def unit_stride(tensor: Tensor) -> Tensor:
    """A gradient whose layout nobody chose (a broadcast sum, say): copied only where the kernel cannot read it."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def row_sum(part0, part1, ROWS: tl.constexpr):
    """Sums of the rows of a head and a tail block, [ROWS, 1]; a number for one row.

    A number has no layout.  With rows of one number each the compiler may give the head the layout of the tail, moves
    it there through shared memory in every turn and then reads and writes four bytes at a time.
    """
    if ROWS == 1:
        total = tl.sum(part0) + tl.sum(part1)
    else:
        total = (tl.sum(part0, 1) + tl.sum(part1, 1))[:, None]
    return total


@triton.jit
def store_row_tops(place, size0, size1, here, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The largest of each row of a head and a tail block, in four parts: with up to four warps, one for each."""
    part0 = tl.max(tl.reshape(size0, [ROWS, 4, HEAD // 4]), 2)
    part1 = tl.max(tl.reshape(size1, [ROWS, 4, TAIL // 4]), 2)
    tl.store(place + tl.arange(0, 4)[None, :], tl.maximum(part0, part1), here)


@triton.jit
def store_column_tops(place, top0, top1, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    high = HEAD + tl.arange(0, TAIL)[None, :]
    tl.store(place + tl.arange(0, HEAD)[None, :], tl.max(top0, 0)[None, :])
    tl.store(place + high, tl.max(top1, 0)[None, :], high < D)
