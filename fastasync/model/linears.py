"""The linear layers of a block: nn.Linear's parameters, and how their products are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastasync_kernels import weight_gradient
from fastasync_kernels.fp8_linear import Fp8Rows, fp8_linear, frozen_linear
from fastasync_kernels.zeros import NO_ZEROS, Zeros
from torch import Tensor, nn


class BlockLinear(nn.Linear):
    """A linear layer of a block.

    ``fp8``: who casts for its three products in fp8, ``triton`` or ``reference``; ``frozen``: its weight, cast once.
    ``parts``: parts of the rows that its weight's gradient is summed over (fastasync_kernels.weight_gradient).
    ``zeros``: beside its weight and bias in products; the parameters have none (fastasync_kernels.zeros).
    """

    fp8: str | None = None
    frozen: Fp8Rows | None = None
    parts: int = 1
    zeros: Zeros = NO_ZEROS

    @property
    def product_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight in products."""
        return self.zeros.shape_beside(self.weight)

    def product(self, x: Tensor, bias: Tensor) -> Tensor:
        wider = self.zeros.rows or self.zeros.columns
        if self.fp8 is None and torch.is_grad_enabled() and (self.parts > 1 or wider):
            return weight_gradient.linear(x, self.weight, bias, self.parts, self.zeros)
        bias = self.zeros.beside(bias)
        if self.fp8 is not None and self.frozen is not None and not torch.is_grad_enabled():
            return frozen_linear(x, self.frozen, bias, self.fp8 == "triton")
        weight = self.zeros.beside(self.weight)
        return F.linear(x, weight, bias) if self.fp8 is None else fp8_linear(x, weight, bias, self.fp8 == "triton")

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class Linear(BlockLinear):
    """One whose bias can be left to the operation that reads the result, for its gradient."""

    def forward(self, x: Tensor, detach_bias: bool = False) -> Tensor:
        return self.product(x, self.bias.detach() if detach_bias else self.bias)
