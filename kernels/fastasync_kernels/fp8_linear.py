"""A linear layer whose three products are in fp8 (e4m3), with a scale for each row of every factor.

For x [M, K], weight w [N, K] and g = dL/dy [M, N], with cast and s (the divisors) of ``cast_rows``:

    y  = (cast(x)   cast(w)^T)   s(x) s(w)^T + bias           rows of x and of w
    dx = (cast(g)   cast(w^T)^T) s(g) s(w^T)^T                rows of g, columns of w
    dw = (cast(g^T) cast(x^T)^T) s(g^T) s(x^T)^T              columns of g and of x

The casts and products of torchao's row-wise recipe, with sums in float32 (torch._scaled_mm).  torchao leaves the casts
to the compiler, in several passes each; here each way of casting is one pass over memory (bench/NOTES.md).  Between
operations that find the largest magnitudes of what they write (``tops``), both ways of x and of g are one pass.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .zeros import NO_ZEROS, Zeros, hidden_zeros

if TYPE_CHECKING:
    from .tops import Tops  # imports triton


# numbers for each row that adaLN's and QK-norm's backward passes give as its largest magnitude (``tops``)
ADALN_PARTS, QKNORM_PARTS = 4, 12


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
    """With ``parts`` > 0 also the hint, and both ways of g in one pass; with ``tops`` both ways of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        triton: bool,
        row_tops: Tensor | None,
        column_tops: Tensor | None,
        parts: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ops = _ops(triton)
        flat = _unit_stride(x.flatten(0, -2))
        columns: tuple[Tensor | None, Tensor | None] = (None, None)
        if row_tops is not None and column_tops is not None:
            x8, sx, *columns = _casts().cast_both(flat, _casts().Tops(row_tops, column_tops))
        else:
            x8, sx, top_x = ops.cast_rows(flat, weight.requires_grad)
            if weight.requires_grad:
                columns = ops.cast_columns(flat, top_x)
        w8, sw, top_w = ops.cast_rows(weight, x.requires_grad)
        half = None if bias is None else bias.to(torch.bfloat16)
        y = product(Fp8Rows(x8, sx), Fp8Rows(w8, sw), half)
        ctx.save_for_backward(weight, top_w, *columns)
        ctx.triton, ctx.x_dtype, ctx.bias_dtype = triton, x.dtype, None if bias is None else bias.dtype
        ctx.parts = parts
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return (y, _new_hint(y, parts)) if parts else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops = _ops(ctx.triton)
        weight, top_w, xt8, sxt = ctx.saved_tensors
        g = _unit_stride(grads[0].flatten(0, -2))
        dx = dw = dbias = None
        if ctx.parts:
            g8, sg, *columns, total = _casts().cast_hinted(g, grads[1], ctx.parts, ctx.needs_input_grad[2])
        else:
            g8, sg, top_g = ops.cast_rows(g, ctx.needs_input_grad[1])
            columns = ops.cast_columns(g, top_g) if ctx.needs_input_grad[1] else ()
        if ctx.needs_input_grad[0]:
            dx = product(Fp8Rows(g8, sg), Fp8Rows(*ops.cast_columns(weight, top_w)))
            dx = dx.to(ctx.x_dtype).unflatten(0, grads[0].shape[:-1])
        if ctx.needs_input_grad[1]:
            dw = product(Fp8Rows(*columns), Fp8Rows(xt8, sxt)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = (total if ctx.parts else g.sum(0, dtype=torch.float32)).to(ctx.bias_dtype)
        return dx, dw, dbias, None, None, None, None


class _Mlp(torch.autograd.Function):
    """``w3(swiglu(w12(x)))`` by the kernels: swiglu finds the largest magnitudes of what it writes.

    ``parts`` and ``tops`` as in ``_Linear``; ``units``: hidden units of zeros besides (``zeros``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w12: Tensor,
        b12: Tensor,
        w3: Tensor,
        b3: Tensor,
        row_tops: Tensor | None,
        column_tops: Tensor | None,
        parts: int,
        units: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ops, casts = _ops(True), _casts()
        beside12, beside3 = hidden_zeros(units)
        flat = _unit_stride(x.flatten(0, -2))
        if row_tops is not None and column_tops is not None:
            x8, sx, *columns = casts.cast_both(flat, casts.Tops(row_tops, column_tops))
        else:
            x8, sx, top_x = ops.cast_rows(flat, True)
            columns = ops.cast_columns(flat, top_x)
        w12_8, s12, top_12 = ops.cast_rows(beside12.beside(w12), True)
        packed = product(Fp8Rows(x8, sx), Fp8Rows(w12_8, s12), beside12.beside(b12.to(torch.bfloat16)))
        h8, sh, ht8, sht = casts.swiglu_cast(packed)
        w3_8, s3, top_3 = ops.cast_rows(beside3.beside(w3), True)
        y = product(Fp8Rows(h8, sh), Fp8Rows(w3_8, s3), b3.to(torch.bfloat16))
        ctx.save_for_backward(w12, top_12, w3, top_3, packed, *columns, ht8, sht)
        ctx.x_dtype, ctx.bias_dtypes, ctx.parts, ctx.units = x.dtype, (b12.dtype, b3.dtype), parts, units
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return (y, _new_hint(y, parts)) if parts else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, casts = _ops(True), _casts()
        w12, top_12, w3, top_3, packed, xt8, sxt, ht8, sht = ctx.saved_tensors
        beside12, beside3 = hidden_zeros(ctx.units)
        g = _unit_stride(grads[0].flatten(0, -2))
        if ctx.parts:
            g8, sg, *columns, db3 = casts.cast_hinted(g, grads[1], ctx.parts, True)
        else:
            g8, sg, top_g = ops.cast_rows(g, True)
            columns, db3 = ops.cast_columns(g, top_g), g.sum(0, dtype=torch.float32)
        dh = product(Fp8Rows(g8, sg), Fp8Rows(*ops.cast_columns(beside3.beside_again(w3), top_3)))
        dw3 = beside3.without(product(Fp8Rows(*columns), Fp8Rows(ht8, sht))).to(w3.dtype)
        a8, sa, at8, sat, db12 = casts.swiglu_backward_cast(dh, packed)
        dx = product(Fp8Rows(a8, sa), Fp8Rows(*ops.cast_columns(beside12.beside_again(w12), top_12)))
        dw12 = beside12.without(product(Fp8Rows(at8, sat), Fp8Rows(xt8, sxt))).to(w12.dtype)
        dx = dx.to(ctx.x_dtype).unflatten(0, grads[0].shape[:-1])
        db12 = beside12.without(db12).to(ctx.bias_dtypes[0])
        return dx, dw12, db12, dw3, db3.to(ctx.bias_dtypes[1]), None, None, None, None


def _new_hint(y: Tensor, parts: int) -> Tensor:
    """A linear's second output: nobody reads it, its gradient holds the largest magnitudes of y's (``tops``)."""
    return y.new_empty(y.numel() // y.shape[-1] * parts + y.shape[-1] + 1, dtype=torch.float32)


class _Unhinted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, hint: Tensor) -> Tensor:
        ctx.size = hint.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_full(ctx.size, 2.0, dtype=torch.float32)


def unhinted(y: Tensor, hint: Tensor | None) -> Tensor:
    """A linear's result y for a reader that gives no magnitudes of its gradient: those of others are then not used."""
    return y if hint is None else _Unhinted.apply(y, hint)


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


def _check_sizes(weight: Tensor, zeros: Zeros = NO_ZEROS) -> None:
    shape = zeros.shape_beside(weight)
    if any(size % reference.FP8_MULTIPLE for size in shape):
        raise ValueError(f"weight has shape {list(shape)}: fp8 needs multiples of {reference.FP8_MULTIPLE} both ways")


def _check_mlp(w12: Tensor, w3: Tensor, units: int) -> None:
    for weight, zeros in zip((w12, w3), hidden_zeros(units)):
        _check_sizes(weight, zeros)


def frozen_rows(weight: Tensor, triton: bool = True) -> Fp8Rows:
    """What ``frozen_linear`` needs of a weight [N, K] that no longer changes."""
    return Fp8Rows(*_ops(triton).cast_rows(weight.detach())[:2])


def frozen_linear(x: Tensor, weight: Fp8Rows, bias: Tensor | None = None, triton: bool = True) -> Tensor:
    """``fp8_linear`` of a weight that was cast before, without gradients."""
    rows = Fp8Rows(*_ops(triton).cast_rows(_unit_stride(x.flatten(0, -2)))[:2])
    y = product(rows, weight, None if bias is None else bias.to(torch.bfloat16))
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def fp8_mlp(x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, b3: Tensor, units: int = 0) -> Tensor:
    """``w3 swiglu(w12 x + b12) + b3`` in fp8 by the kernels, with all gradients: the same numbers as the three in turn.

    x [M, ..., K], w12 [2 F, K], w3 [N, F], biases [2 F] and [N] -> [M, ..., N] in x's dtype.  ``units``: hidden units
    of zeros that are computed besides (``zeros``).  K, N and F + units: multiples of 16 (ValueError).
    """
    _check_mlp(w12, w3, units)
    return _Mlp.apply(x, w12, b12, w3, b3, None, None, 0, units)


def fp8_mlp_hinted(
    x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, b3: Tensor, tops: Tops | None, parts: int, units: int = 0
) -> tuple[Tensor, Tensor]:
    """``fp8_mlp`` with x's largest magnitudes where they are known, and a hint for who reads the result (``tops``).

    ``parts``: how many numbers that operation gives for a row of its gradient.  Returns [M, ..., N] and the hint.
    """
    _check_mlp(w12, w3, units)
    return _Mlp.apply(x, w12, b12, w3, b3, *(tops or (None, None)), parts, units)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, triton: bool = True) -> Tensor:
    """``x w^T + bias`` and its gradients in fp8: x [M, ..., K], weight [N, K], bias [N] -> [M, ..., N] in x's dtype.

    K and N must be multiples of 16 (ValueError).  ``triton``: casts by the kernels, or by their reference, which runs
    on any device.  Sums are rounded to bf16; gradients have the dtypes of what they are of.
    """
    _check_sizes(weight)
    return _Linear.apply(x, weight, bias, triton, None, None, 0)


def fp8_linear_hinted(
    x: Tensor, weight: Tensor, bias: Tensor | None, tops: Tops | None, parts: int
) -> tuple[Tensor, Tensor]:
    """``fp8_linear`` by the kernels, with x's largest magnitudes where they are known, and a hint as ``fp8_mlp_hinted``
    gives.  The weight must require a gradient."""
    _check_sizes(weight)
    return _Linear.apply(x, weight, bias, True, *(tops or (None, None)), parts)
