"""A linear layer whose three products are in fp8 (e4m3), with a scale for each row of every factor.

For x [M, K], weight w [N, K] and g = dL/dy [M, N], with cast and s (the divisors) of ``cast_rows``:

    y  = (cast(x)   cast(w)^T)   s(x) s(w)^T + bias           rows of x and of w
    dx = (cast(g)   cast(w^T)^T) s(g) s(w^T)^T                rows of g, columns of w
    dw = (cast(g^T) cast(x^T)^T) s(g^T) s(x^T)^T              columns of g and of x

The casts and products of torchao's row-wise recipe, with sums in float32 (torch._scaled_mm).  torchao leaves the casts
to the compiler, in several passes each; here each way of casting is one pass over memory (bench/NOTES.md).
"""

from __future__ import annotations

import contextlib
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
    cpu = a.values.device.type == "cpu"  # where autocast would round inside
    with torch.autocast("cpu", enabled=False) if cpu else contextlib.nullcontext():
        return torch._scaled_mm(
            a.values, b.values.t(), a.scale, b.scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
        ops = _ops(triton)
        flat = _unit_stride(x.flatten(0, -2))
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
        g = _unit_stride(grads[0].flatten(0, -2))
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


class _Mlp(torch.autograd.Function):
    """``w3(swiglu(w12(x)))`` by the kernels: swiglu finds the largest magnitudes of what it writes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
        ops, casts = _ops(True), _casts()
        flat = _unit_stride(x.flatten(0, -2))
        x8, sx, top_x = ops.cast_rows(flat, True)
        w12_8, s12, top_12 = ops.cast_rows(w12, True)
        packed = product(Fp8Rows(x8, sx), Fp8Rows(w12_8, s12), b12.to(torch.bfloat16))
        h8, sh, ht8, sht = casts.swiglu_cast(packed)
        w3_8, s3, top_3 = ops.cast_rows(w3, True)
        y = product(Fp8Rows(h8, sh), Fp8Rows(w3_8, s3), b3.to(torch.bfloat16))
        ctx.save_for_backward(w12, top_12, w3, top_3, packed, *ops.cast_columns(flat, top_x), ht8, sht)
        ctx.x_dtype, ctx.bias_dtypes = x.dtype, (b12.dtype, b3.dtype)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        ops, casts = _ops(True), _casts()
        w12, top_12, w3, top_3, packed, xt8, sxt, ht8, sht = ctx.saved_tensors
        g = _unit_stride(grads[0].flatten(0, -2))
        g8, sg, top_g = ops.cast_rows(g, True)
        dh = product(Fp8Rows(g8, sg), Fp8Rows(*ops.cast_columns(w3, top_3)))
        dw3 = product(Fp8Rows(*ops.cast_columns(g, top_g)), Fp8Rows(ht8, sht)).to(w3.dtype)
        a8, sa, at8, sat, db12 = casts.swiglu_backward_cast(dh, packed)
        dx = product(Fp8Rows(a8, sa), Fp8Rows(*ops.cast_columns(w12, top_12)))
        dw12 = product(Fp8Rows(at8, sat), Fp8Rows(xt8, sxt)).to(w12.dtype)
        db3 = g.sum(0, dtype=torch.float32)
        dx = dx.to(ctx.x_dtype).unflatten(0, grads[0].shape[:-1])
        return dx, dw12, db12.to(ctx.bias_dtypes[0]), dw3, db3.to(ctx.bias_dtypes[1])


def _unit_stride(g: Tensor) -> Tensor:
    return g if g.stride(-1) == 1 else g.contiguous()


def _casts() -> ModuleType:
    from . import fp8_casts  # imports triton

    return fp8_casts


def _ops(triton: bool) -> ModuleType:
    if triton:
        from . import triton_ops  # imports triton

        return triton_ops
    return reference


def _check_sizes(weight: Tensor) -> None:
    if any(size % reference.FP8_MULTIPLE for size in weight.shape):
        shape = list(weight.shape)
        raise ValueError(f"weight has shape {shape}: fp8 needs multiples of {reference.FP8_MULTIPLE} both ways")


def frozen_rows(weight: Tensor, triton: bool = True) -> Fp8Rows:
    """What ``frozen_linear`` needs of a weight [N, K] that no longer changes."""
    return Fp8Rows(*_ops(triton).cast_rows(weight.detach())[:2])


def frozen_linear(x: Tensor, weight: Fp8Rows, bias: Tensor | None = None, triton: bool = True) -> Tensor:
    """``fp8_linear`` of a weight that was cast before, without gradients."""
    rows = Fp8Rows(*_ops(triton).cast_rows(_unit_stride(x.flatten(0, -2)))[:2])
    y = product(rows, weight, None if bias is None else bias.to(torch.bfloat16))
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def fp8_mlp(x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
    """``w3 swiglu(w12 x + b12) + b3`` in fp8 by the kernels, with all gradients: the same numbers as the three in turn.

    x [M, ..., K], w12 [2 F, K], w3 [N, F], biases [2 F] and [N] -> [M, ..., N] in x's dtype.  K, 2 F, F and N:
    multiples of 16 (ValueError).
    """
    for weight in (w12, w3):
        _check_sizes(weight)
    return _Mlp.apply(x, w12, b12, w3, b3)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, triton: bool = True) -> Tensor:
    """``x w^T + bias`` and its gradients in fp8: x [M, ..., K], weight [N, K], bias [N] -> [M, ..., N] in x's dtype.

    K and N must be multiples of 16 (ValueError).  ``triton``: casts by the kernels, or by their reference, which runs
    on any device.  Sums are rounded to bf16; gradients have the dtypes of what they are of.
    """
    _check_sizes(weight)
    return _Linear.apply(x, weight, bias, triton)
