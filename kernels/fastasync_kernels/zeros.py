"""Products at a width that is fast: zeros beside a weight that change no result.

A GPU's fast products read rows whose bytes are a multiple of 16 (TMA's limit, and cuBLAS's for its newer kernels; in
fp8 ``torch._scaled_mm`` refuses others).  A gated MLP of 2,730 hidden units (LightningDiT-L) has no such rows.  With
hidden units of zeros behind its own it has them, exactly: ``silu(0) 0 = 0``, and zeros in ``w3`` meet these zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16  # numbers: 16 bytes in fp8, the strictest
ROUNDED = 64  # what other widths are rounded up to: rows of whole cache lines (128 bytes in bf16)


def fast_width(width: int) -> int:
    """``width`` where products take it as it is, otherwise the next multiple of ``ROUNDED``.

    A multiple of 64 costs no more products than one of 8: both fill the same tiles of 128 and more columns.
    """
    return width if width % ALIGNED == 0 else -(-width // ROUNDED) * ROUNDED


class Zeros(NamedTuple):
    """Rows and columns of zeros behind those of a weight [N, K]; rows behind each of its ``groups`` (gate and up)."""

    rows: int = 0
    columns: int = 0
    groups: int = 1

    def shape_beside(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of a weight [N, K] with the zeros."""
        return weight.shape[0] + self.groups * self.rows, weight.shape[1] + self.columns

    def beside(self, weight: Tensor) -> Tensor:
        """weight [N, K] with the zeros, [N + groups * rows, K + columns], or bias [N], [N + groups * rows]."""
        if not self.rows and not self.columns:
            return weight
        columns = (0, self.columns) if weight.dim() == 2 else ()
        return F.pad(weight.unflatten(0, (self.groups, -1)), (*columns, 0, self.rows)).flatten(0, 1)

    def beside_again(self, weight: Tensor) -> Tensor:
        """``beside`` of a weight, for a backward pass that would otherwise keep it from the forward pass.

        Written in another way, so that torch.compile does not take both for one and keep it after all.
        """
        if not self.rows and not self.columns:
            return weight
        parts = weight.unflatten(0, (self.groups, -1))
        if self.rows:
            parts = torch.cat([parts, parts.new_zeros(self.groups, self.rows, parts.shape[2])], 1)
        if self.columns:
            parts = torch.cat([parts, parts.new_zeros(*parts.shape[:2], self.columns)], 2)
        return parts.flatten(0, 1)

    def without(self, gradient: Tensor) -> Tensor:
        """The gradient of a weight or a bias from that of ``beside``, contiguous."""
        if not self.rows and not self.columns:
            return gradient
        grouped = gradient.unflatten(0, (self.groups, -1))
        grouped = grouped[:, : grouped.shape[1] - self.rows]
        if gradient.dim() == 2:
            grouped = grouped[..., : grouped.shape[2] - self.columns]
        return grouped.flatten(0, 1).contiguous()


NO_ZEROS = Zeros()


def hidden_zeros(units: int) -> tuple[Zeros, Zeros]:
    """Those of a gated MLP with ``units`` more hidden units: beside w12 [2 F, K] and its bias, and beside w3 [N, F]."""
    return Zeros(rows=units, groups=2), Zeros(columns=units)
