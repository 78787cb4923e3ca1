"""A linear layer whose three products are in fp8 (e4m3), with a scale for each row of every factor.

For x [M, K], weight w [N, K] and g = dL/dy [M, N], with cast and s (the divisors) of ``cast_rows``:

    y  = (cast(x)   cast(w)^T)   s(x) s(w)^T + bias           rows of x and of w
    dx = (cast(g)   cast(w^T)^T) s(g) s(w^T)^T                rows of g, columns of w
    dw = (cast(g^T) cast(x^T)^T) s(g^T) s(x^T)^T              columns of g and of x

The casts and products of torchao's row-wise recipe, with sums in float32 (torch._scaled_mm).  torchao leaves the casts
to the compiler, in several passes each; here a cast is one pass over memory (bench/NOTES.md, 2026-11-25).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference


class Fp8Rows(NamedTuple):
    """Rows of a factor in fp8 [M, K], and what they were divided by, float32 [M, 1]."""

    values: Tensor
    scale: Tensor


def product(a: Fp8Rows, b: Fp8Rows, bias: Tensor | None = None) -> Tensor:
    """``a b^T + bias`` in bf16, for a [M, K] and b [N, K]."""
    return torch._scaled_mm(
        a.values, b.values.t(), a.scale, b.scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
        ops = _ops(triton)
        flat = x.flatten(0, -2)
        x8, sx, top_x = ops.cast_rows(flat, weight.requires_grad)
        w8, sw, top_w = ops.cast_rows(weight, x.requires_grad)
        half = None if bias is None else bias.to(torch.bfloat16)
        y = product(Fp8Rows(x8, sx), Fp8Rows(w8, sw), half)
        columns = ops.cast_columns(flat, top_x) if weight.requires_grad else (None, None)
        ctx.save_for_backward(weight, top_w, *columns)
        ctx.triton, ctx.x_dtype, ctx.bias_dtype = triton, x.dtype, None if bias is None else bias.dtype
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        ops = _ops(ctx.triton)
        weight, top_w, xt8, sxt = ctx.saved_tensors
        g = grads[0].flatten(0, -2)
        g = g if g.stride(-1) == 1 else g.contiguous()
        dx = dw = dbias = None
        g8, sg, top_g = ops.cast_rows(g, ctx.needs_input_grad[1])
        if ctx.needs_input_grad[0]:
            dx = product(Fp8Rows(g8, sg), Fp8Rows(*ops.cast_columns(weight, top_w)))
            dx = dx.to(ctx.x_dtype).unflatten(0, grads[0].shape[:-1])
        if ctx.needs_input_grad[1]:
            dw = product(Fp8Rows(*ops.cast_columns(g, top_g)), Fp8Rows(xt8, sxt)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = g.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, dbias, None


def _ops(triton: bool) -> ModuleType:
    if triton:
        from . import triton_ops  # imports triton

        return triton_ops
    return reference


def frozen_rows(weight: Tensor, triton: bool = True) -> Fp8Rows:
    """What ``frozen_linear`` needs of a weight [N, K] that no longer changes."""
    return Fp8Rows(*_ops(triton).cast_rows(weight.detach())[:2])


def frozen_linear(x: Tensor, weight: Fp8Rows, bias: Tensor | None = None, triton: bool = True) -> Tensor:
    """``fp8_linear`` of a weight that was cast before, without gradients."""
    rows = Fp8Rows(*_ops(triton).cast_rows(x.flatten(0, -2))[:2])
    y = product(rows, weight, None if bias is None else bias.to(torch.bfloat16))
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, triton: bool = True) -> Tensor:
    """``x w^T + bias`` and its gradients in fp8: x [..., K], weight [N, K], bias [N] -> [..., N] in x's dtype.

    K and N must be multiples of 16 (ValueError).  ``triton``: casts by the kernels, or by their reference, which runs
    on any device.  Sums are rounded to bf16; gradients have the dtypes of what they are of.
    """
    if any(size % reference.FP8_MULTIPLE for size in weight.shape):
        shape = list(weight.shape)
        raise ValueError(f"weight has shape {shape}: fp8 needs multiples of {reference.FP8_MULTIPLE} both ways")
    return _Linear.apply(x, weight, bias, triton)
