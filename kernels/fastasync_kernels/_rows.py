"""Shared by the kernels that work on rows of features: exact column blocks and stride checks.

A Triton block has a power-of-two length, and the widths of these models (1152, 1536, head dimension 72) are not powers
of two.  One padded block would leave up to 44 % of its lanes idle, and these kernels spend about half of the issue
slots that their memory traffic leaves.  So a row is two blocks, a head and a tail: 1152 = 1024 + 128, 72 = 64 + 8.
"""

from __future__ import annotations

import triton
from torch import Tensor


def head_and_tail(width: int) -> tuple[int, int]:
    """(head, tail): the largest power of two below ``width``, and the power of two that holds the rest.  width >= 2."""
    head = 1 << ((width - 1).bit_length() - 1)
    return head, triton.next_power_of_2(width - head)


def check_unit_stride(name: str, tensor: Tensor) -> None:
    """The last axis must be contiguous; the other axes may have any stride.  ValueError, never a hidden copy."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} over its last axis, not 1; call .contiguous() first")


def unit_stride(tensor: Tensor) -> Tensor:
    """A gradient whose layout nobody chose (a broadcast sum, say): copied only where the kernel cannot read it."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
