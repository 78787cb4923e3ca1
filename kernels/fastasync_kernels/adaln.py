"""adaLN: RMSNorm with a per-sample shift and scale, alone or fused with the gated residual sum before it.

Forward, for every row (token) x of D features, statistics in float32:

    x'  = x + gate y                      (gated form only; rounded to x's dtype, since the rounded x' is what is kept)
    r   = 1 / sqrt(mean(x'^2) + eps),     n = x' r
    h   = n a + shift,                    a = weight (1 + scale)

The reference rounds n, n weight and the modulated value to x's dtype on the way; here they stay in float32 and h is
rounded once, so h is at least as close to the exact value.

Backward (r and n are recomputed), with g = dL/dh, e = dL/dx' from the residual stream, and sums over the N tokens:

    dL/dx' = e + r (g a - n mean(g a n)),     dL/dx = dL/dx',     dL/dy = gate dL/dx'
    dshift = sum g,    dscale = weight sum(g n),    dweight = sum_b (1 + scale_b) sum(g n)_b,    dgate = sum(dL/dx' y)

so three column sums feed all four parameter gradients, and a fourth one, sum(dL/dy), is the gradient of the bias of the
linear that made y, if asked for.  They are reduced in two fixed stages (no atomics, so the same bits every time): one
partial sum per program, each over ``chunk`` consecutive tokens, then a sum over the programs.

bfloat16, float16 and float32; float64 is refused (use the reference).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, INTERPRET, Launch, OfflineCase, ceil_div, check_tensor, on_device
from ._rows import check_unit_stride, head_and_tail, row_sum, store_column_tops, store_row_tops, unit_stride
from .column_sums import column_sums
from .tops import Tops, column_tops

# 32 tokens per program: partial sums then add about 6 % to the backward's traffic; a block of rows is what the
# interpreter is fast at
_ALL = Launch(chunk=32, rows=8 if INTERPRET else 1, stages=3)
FORWARD = GATED_FORWARD = BACKWARD = GATED_BACKWARD = BIAS_BACKWARD = _ALL
TOPS_FORWARD = TOPS_GATED_FORWARD = TOPS_BACKWARD = _ALL  # the last of the gated form
REDUCE = Launch(columns=4096 if INTERPRET else 256, warps=2)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, gate_ptr, weight_ptr, shift_ptr, scale_ptr, residual_ptr, out_ptr, row_top_ptr, top_ptr,
    tokens, chunks, x_b, x_n, y_b, y_n, gate_b, shift_b, scale_b, eps,
    GATED: tl.constexpr, TOPS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TOPS: the largest magnitudes of h too (``tops``)."""
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    low = tl.arange(0, HEAD)[None, :]
    high = HEAD + tl.arange(0, TAIL)[None, :]
    inside = high < D

    a0 = tl.load(weight_ptr + low).to(tl.float32) * (1.0 + tl.load(scale_ptr + sample * scale_b + low).to(tl.float32))
    a1 = tl.load(weight_ptr + high, inside, 0.0).to(tl.float32) * (
        1.0 + tl.load(scale_ptr + sample * scale_b + high, inside, 0.0).to(tl.float32)
    )
    shift0 = tl.load(shift_ptr + sample * shift_b + low).to(tl.float32)
    shift1 = tl.load(shift_ptr + sample * shift_b + high, inside, 0.0).to(tl.float32)
    if GATED:
        gate0 = tl.load(gate_ptr + sample * gate_b + low).to(tl.float32)
        gate1 = tl.load(gate_ptr + sample * gate_b + high, inside, 0.0).to(tl.float32)
    if TOPS:
        top0 = tl.zeros([ROWS, HEAD], tl.float32)
        top1 = tl.zeros([ROWS, TAIL], tl.float32)

    for start in tl.range(first, tl.minimum(first + CHUNK, tokens), ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS))[:, None]
        here = row < tokens
        x_row = x_ptr + sample * x_b + row.to(tl.int64) * x_n
        out_row = (sample * tokens + row) * D
        x0 = tl.load(x_row + low, here, 0.0).to(tl.float32)
        x1 = tl.load(x_row + high, here & inside, 0.0).to(tl.float32)
        if GATED:
            y_row = y_ptr + sample * y_b + row.to(tl.int64) * y_n
            kind: tl.constexpr = residual_ptr.dtype.element_ty
            rounded0 = (x0 + gate0 * tl.load(y_row + low, here, 0.0).to(tl.float32)).to(kind)
            rounded1 = (x1 + gate1 * tl.load(y_row + high, here & inside, 0.0).to(tl.float32)).to(kind)
            tl.store(residual_ptr + out_row + low, rounded0, here)
            tl.store(residual_ptr + out_row + high, rounded1, here & inside)
            x0 = rounded0.to(tl.float32)
            x1 = rounded1.to(tl.float32)
        r = tl.rsqrt(row_sum(x0 * x0, x1 * x1, ROWS) / D + eps)
        h0 = (x0 * r * a0 + shift0).to(out_ptr.dtype.element_ty)
        h1 = (x1 * r * a1 + shift1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_row + low, h0, here)
        tl.store(out_ptr + out_row + high, h1, here & inside)
        if TOPS:
            size0 = tl.where(here, tl.abs(h0.to(tl.float32)), 0.0)  # past the last token stands the shift
            size1 = tl.where(here, tl.abs(h1.to(tl.float32)), 0.0)
            store_row_tops(row_top_ptr + (sample * tokens + row) * 4, size0, size1, here, ROWS, HEAD, TAIL)
            top0 = tl.maximum(top0, size0)
            top1 = tl.maximum(top1, size1)
    if TOPS:
        store_column_tops(top_ptr + tl.program_id(0).to(tl.int64) * D, top0, top1, D, HEAD, TAIL)


@triton.jit
def _backward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    dresidual_ptr,
    dout_ptr,
    dx_ptr,
    dy_ptr,
    partial_ptr,
    row_top_ptr,
    top_ptr,
    tokens,
    chunks,
    x_b,
    x_n,
    y_b,
    y_n,
    gate_b,
    scale_b,
    dresidual_b,
    dresidual_n,
    dout_b,
    dout_n,
    eps,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    TOPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x is the normalised tensor (x' of the gated form).  RESIDUAL: a gradient of x' arrives besides that of h.

    BIAS (gated only): sum dy too.  TOPS (gated only): dy's largest magnitudes too.
    """
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    low = tl.arange(0, HEAD)[None, :]
    high = HEAD + tl.arange(0, TAIL)[None, :]
    inside = high < D

    a0 = tl.load(weight_ptr + low).to(tl.float32) * (1.0 + tl.load(scale_ptr + sample * scale_b + low).to(tl.float32))
    a1 = tl.load(weight_ptr + high, inside, 0.0).to(tl.float32) * (
        1.0 + tl.load(scale_ptr + sample * scale_b + high, inside, 0.0).to(tl.float32)
    )
    g_sum0 = tl.zeros([ROWS, HEAD], tl.float32)
    g_sum1 = tl.zeros([ROWS, TAIL], tl.float32)
    gn_sum0 = tl.zeros([ROWS, HEAD], tl.float32)
    gn_sum1 = tl.zeros([ROWS, TAIL], tl.float32)
    if GATED:
        gate0 = tl.load(gate_ptr + sample * gate_b + low).to(tl.float32)
        gate1 = tl.load(gate_ptr + sample * gate_b + high, inside, 0.0).to(tl.float32)
        gate_sum0 = tl.zeros([ROWS, HEAD], tl.float32)
        gate_sum1 = tl.zeros([ROWS, TAIL], tl.float32)
    if BIAS:
        dx_sum0 = tl.zeros([ROWS, HEAD], tl.float32)
        dx_sum1 = tl.zeros([ROWS, TAIL], tl.float32)
    if TOPS:
        top0 = tl.zeros([ROWS, HEAD], tl.float32)
        top1 = tl.zeros([ROWS, TAIL], tl.float32)

    for start in tl.range(first, tl.minimum(first + CHUNK, tokens), ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS))[:, None]
        here = row < tokens
        x_row = x_ptr + sample * x_b + row.to(tl.int64) * x_n
        g_row = dout_ptr + sample * dout_b + row.to(tl.int64) * dout_n
        dx_row = (sample * tokens + row) * D
        x0 = tl.load(x_row + low, here, 0.0).to(tl.float32)
        x1 = tl.load(x_row + high, here & inside, 0.0).to(tl.float32)
        g0 = tl.load(g_row + low, here, 0.0).to(tl.float32)
        g1 = tl.load(g_row + high, here & inside, 0.0).to(tl.float32)

        # both row sums before r is known, so that they share one round of synchronisation: mean(g a n) = r sum(g a x)/D
        square = row_sum(x0 * x0, x1 * x1, ROWS)
        product = row_sum(g0 * a0 * x0, g1 * a1 * x1, ROWS)
        r = tl.rsqrt(square / D + eps)
        mean = product * r / D
        n0 = x0 * r
        n1 = x1 * r
        dx0 = r * (g0 * a0 - n0 * mean)
        dx1 = r * (g1 * a1 - n1 * mean)
        if RESIDUAL:
            e_row = dresidual_ptr + sample * dresidual_b + row.to(tl.int64) * dresidual_n
            dx0 += tl.load(e_row + low, here, 0.0).to(tl.float32)
            dx1 += tl.load(e_row + high, here & inside, 0.0).to(tl.float32)
        tl.store(dx_ptr + dx_row + low, dx0.to(dx_ptr.dtype.element_ty), here)
        tl.store(dx_ptr + dx_row + high, dx1.to(dx_ptr.dtype.element_ty), here & inside)
        if GATED:
            y_row = y_ptr + sample * y_b + row.to(tl.int64) * y_n
            gate_sum0 += dx0 * tl.load(y_row + low, here, 0.0).to(tl.float32)
            gate_sum1 += dx1 * tl.load(y_row + high, here & inside, 0.0).to(tl.float32)
            dy0 = (dx0 * gate0).to(dy_ptr.dtype.element_ty)
            dy1 = (dx1 * gate1).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + dx_row + low, dy0, here)
            tl.store(dy_ptr + dx_row + high, dy1, here & inside)
        if TOPS:
            size0 = tl.abs(dy0.to(tl.float32))
            size1 = tl.abs(dy1.to(tl.float32))
            store_row_tops(row_top_ptr + (sample * tokens + row) * 4, size0, size1, here, ROWS, HEAD, TAIL)
            top0 = tl.maximum(top0, size0)
            top1 = tl.maximum(top1, size1)
        if BIAS:
            dx_sum0 += dx0
            dx_sum1 += dx1
        g_sum0 += g0
        g_sum1 += g1
        gn_sum0 += g0 * n0
        gn_sum1 += g1 * n1

    if TOPS:
        store_column_tops(top_ptr + tl.program_id(0).to(tl.int64) * D, top0, top1, D, HEAD, TAIL)
    sums: tl.constexpr = 2 + GATED + BIAS
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * sums * D
    tl.store(partial + low, tl.sum(g_sum0, 0)[None, :])
    tl.store(partial + high, tl.sum(g_sum1, 0)[None, :], inside)
    tl.store(partial + D + low, tl.sum(gn_sum0, 0)[None, :])
    tl.store(partial + D + high, tl.sum(gn_sum1, 0)[None, :], inside)
    if GATED:
        tl.store(partial + 2 * D + low, tl.sum(gate_sum0, 0)[None, :])
        tl.store(partial + 2 * D + high, tl.sum(gate_sum1, 0)[None, :], inside)
    if BIAS:  # dy = gate dx'
        tl.store(partial + 3 * D + low, gate0 * tl.sum(dx_sum0, 0)[None, :])
        tl.store(partial + 3 * D + high, gate1 * tl.sum(dx_sum1, 0)[None, :], inside)


@triton.jit
def _reduce_kernel(
    partial_ptr,
    weight_ptr,
    scale_ptr,
    dshift_ptr,
    dscale_ptr,
    dgate_ptr,
    dweight_ptr,
    chunks,
    scale_b,
    GATED: tl.constexpr,
    SUMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second stage: one sample's partial sums [chunks, SUMS, D] -> its dshift, dscale, dgate and share of dweight."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    partial = partial_ptr + sample * chunks * SUMS * D + column
    g_sum = tl.zeros([BLOCK], tl.float32)
    gn_sum = tl.zeros([BLOCK], tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        here = partial + chunk * SUMS * D
        g_sum += tl.load(here, inside, 0.0)
        gn_sum += tl.load(here + D, inside, 0.0)
        if GATED:
            gate_sum += tl.load(here + 2 * D, inside, 0.0)
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_b + column, inside, 0.0).to(tl.float32)
    out = sample * D + column
    tl.store(dshift_ptr + out, g_sum.to(dshift_ptr.dtype.element_ty), inside)
    tl.store(dscale_ptr + out, (gn_sum * weight).to(dscale_ptr.dtype.element_ty), inside)
    tl.store(dweight_ptr + out, gn_sum * (1.0 + scale), inside)
    if GATED:
        tl.store(dgate_ptr + out, gate_sum.to(dgate_ptr.dtype.element_ty), inside)


def _meta(width: int, launch: Launch) -> dict[str, Any]:
    """Block sizes and warps: eight features of the head block a thread, which is one 16-byte access in bfloat16.

    The tail has at least two a thread (some of them masked): a load of less than four bytes is not prefetched.
    """
    head, tail = head_and_tail(width)
    options = launch.options(min(max(head // 256, 1), 8))
    return {
        "D": width, "HEAD": head, "TAIL": max(tail, 64 * options["num_warps"]),
        "CHUNK": launch.chunk, "ROWS": launch.rows, "STAGES": launch.stages, **options,
    }  # fmt: skip


def _check(
    x: Tensor, y: Tensor | None, weight: Tensor, conditions: dict[str, Tensor], bias: Tensor | None = None
) -> None:
    check_tensor("x", x, FLOATS, (-1, -1, -1))
    batch, _, width = x.shape
    if width < 2:
        raise ValueError(f"x must have at least 2 features, not {width}")
    check_unit_stride("x", x)
    if y is not None:
        check_tensor("y", y, (x.dtype,), x.shape, x.device)
        check_unit_stride("y", y)
    check_tensor("weight", weight, (torch.float32, x.dtype), (width,), x.device)
    check_unit_stride("weight", weight)
    for name, tensor in conditions.items():
        check_tensor(name, tensor, (x.dtype,), (batch, width), x.device)
        check_unit_stride(name, tensor)
    if bias is not None:
        check_tensor("bias", bias, (torch.float32, x.dtype), (width,), x.device)


def _launch_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    tops: Tops | None = None,
) -> tuple[Tensor, Tensor]:
    """x' and h; what ``tops`` holds is written, h's largest magnitudes."""
    batch, tokens, width = x.shape
    out = x.new_empty(x.shape)
    residual = x if y is None else x.new_empty(x.shape)
    if tops is None:
        launch = FORWARD if y is None else GATED_FORWARD
    else:
        launch = TOPS_FORWARD if y is None else TOPS_GATED_FORWARD
    chunks = ceil_div(tokens, launch.chunk)
    rows, parts = (x, x) if tops is None else (tops.rows, x.new_empty((batch * chunks, width)))
    if batch * chunks:
        second, gates = (x, shift) if y is None or gate is None else (y, gate)  # unused when not gated
        with on_device(x):
            _forward_kernel[(batch * chunks,)](
                x, second, gates, weight, shift, scale, residual, out, rows, parts, tokens, chunks,
                x.stride(0), x.stride(1), second.stride(0), second.stride(1),
                gates.stride(0), shift.stride(0), scale.stride(0), eps,
                GATED=y is not None, TOPS=tops is not None, **_meta(width, launch),
            )  # fmt: skip
    if tops is not None:
        column_tops(parts, tops.columns)
    return residual, out


def _launch_backward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    dresidual: Tensor | None,
    dout: Tensor,
    eps: float,
    bias: torch.dtype | None = None,
    tops: Tops | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dweight, dshift, dscale, dbias (dy, dgate empty when not gated; dbias without its dtype).

    What ``tops`` holds is written, dy's largest magnitudes, and a one after its columns (gated only).
    """
    batch, tokens, width = x.shape
    dout = unit_stride(dout)
    gated = y is not None and gate is not None
    second, gates = (y, gate) if y is not None and gate is not None else (x, scale)
    incoming = dout if dresidual is None else unit_stride(dresidual)
    dx = x.new_empty(x.shape)
    dy = x.new_empty(x.shape if gated else (0,))
    dshift, dscale = x.new_empty((batch, width)), x.new_empty((batch, width))
    dgate = x.new_empty((batch, width) if gated else (0,))
    weighted = x.new_empty((batch, width), dtype=torch.float32)
    if tops is None:
        launch = BACKWARD if not gated else GATED_BACKWARD if bias is None else BIAS_BACKWARD
    else:
        launch = TOPS_BACKWARD
    chunks = ceil_div(tokens, launch.chunk)
    rows, parts = (x, x) if tops is None else (tops.rows, x.new_empty((batch * chunks, width)))
    sums = 2 + gated + (bias is not None)
    partial = x.new_empty((batch, chunks, sums, width), dtype=torch.float32)
    if batch:
        with on_device(x):
            if chunks:
                _backward_kernel[(batch * chunks,)](
                    x, second, gates, weight, scale, incoming, dout, dx, dy, partial, rows, parts, tokens, chunks,
                    x.stride(0), x.stride(1), second.stride(0), second.stride(1), gates.stride(0), scale.stride(0),
                    incoming.stride(0), incoming.stride(1), dout.stride(0), dout.stride(1), eps,
                    GATED=gated, BIAS=bias is not None, TOPS=tops is not None, RESIDUAL=dresidual is not None,
                    **_meta(width, launch),
                )  # fmt: skip
            _reduce_kernel[(batch, ceil_div(width, REDUCE.columns))](
                partial, weight, scale, dshift, dscale, dgate, weighted, chunks, scale.stride(0),
                GATED=gated, SUMS=sums, D=width, BLOCK=REDUCE.columns, **REDUCE.options(2),
            )  # fmt: skip
    if tops is not None:
        column_tops(parts, tops.columns, count=True)
    dbias = x.new_empty(0)
    if bias is not None:
        dbias = column_sums(partial.view(1, batch * chunks, sums, width)[:, :, 3], bias)[0]
    return dx, dy, dgate, column_sums(weighted[None], weight.dtype)[0], dshift, dscale, dbias


@torch.library.custom_op("fastasync::rmsnorm_modulate", mutates_args=())
def _plain_op(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    _check(x, None, weight, {"shift": shift, "scale": scale})
    return _launch_forward(x, None, None, weight, shift, scale, eps)[1]


@_plain_op.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastasync::rmsnorm_modulate_backward", mutates_args=())
def _plain_backward_op(
    dout: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, _, _, dweight, dshift, dscale, _ = _launch_backward(x, None, None, weight, scale, None, dout, eps)
    return dx, dweight, dshift, dscale


@_plain_backward_op.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(scale.shape), x.new_empty(scale.shape)


def _plain_setup(ctx, inputs, output) -> None:
    x, weight, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, weight, scale)


def _plain_backward(ctx, dout: Tensor):
    return *_plain_backward_op(dout, *ctx.saved_tensors, ctx.eps), None


_plain_op.register_autograd(_plain_backward, setup_context=_plain_setup)


@torch.library.custom_op("fastasync::gated_rmsnorm_modulate", mutates_args=())
def _gated_op(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check(x, y, weight, {"gate": gate, "shift": shift, "scale": scale}, bias)
    return _launch_forward(x, y, gate, weight, shift, scale, eps)


@_gated_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("fastasync::gated_rmsnorm_modulate_backward", mutates_args=())
def _gated_backward_op(
    dresidual: Tensor | None,
    dout: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _launch_backward(residual, y, gate, weight, scale, dresidual, dout, eps, bias)


@_gated_backward_op.register_fake
def _(
    dresidual: Tensor | None,
    dout: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, column = residual.shape, scale.shape
    return (
        residual.new_empty(row),
        residual.new_empty(row),
        residual.new_empty(column),
        weight.new_empty(weight.shape),
        residual.new_empty(column),
        residual.new_empty(column),
        residual.new_empty(0) if bias is None else residual.new_empty(weight.shape, dtype=bias),
    )


def _gated_setup(ctx, inputs, output) -> None:
    _, y, gate, weight, _, scale, ctx.eps, bias = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # after the last block nobody uses x': no tensor of zeros is made and read
    ctx.save_for_backward(output[0], y, gate, weight, scale)


def _gated_backward(ctx, dresidual: Tensor | None, dout: Tensor | None):
    residual, y, gate, weight, scale = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(residual)
    *grads, dbias = _gated_backward_op(dresidual, dout, residual, y, gate, weight, scale, ctx.eps, ctx.bias)
    return *grads, None, None if ctx.bias is None else dbias


_gated_op.register_autograd(_gated_backward, setup_context=_gated_setup)


def rmsnorm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """adaLN: ``rmsnorm(x) (1 + scale) + shift``.  x [B, N, D], weight [D], shift and scale [B, D] -> [B, N, D].

    x, shift and scale share one dtype; the weight has that dtype or float32.  The last axis must be contiguous, the
    others may have any stride (the six pieces of one [B, 6 D] tensor need no copy).  TypeError, ValueError otherwise.
    """
    return _plain_op(x, weight, shift, scale, eps)


def gated_rmsnorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate y``; ``h = rmsnorm(x') (1 + scale) + shift``.  Returns (x', h), both [B, N, D].

    x, y [B, N, D]; gate, shift, scale [B, D]; weight [D].  Dtypes, strides and errors as in ``rmsnorm_modulate``.
    ``bias`` [D] (x's dtype or float32): its gradient, the sum of dy over samples and tokens, is returned, its values
    are not read: pass it when the linear that made y used ``bias.detach()``.
    """
    return _gated_op(x, y, gate, weight, shift, scale, eps, bias)


def _offline() -> list[OfflineCase]:
    """XL's width, in bfloat16 and float32, plain, gated, and gated with the bias of y."""

    def signature(kind: str, pointers: str, integers: str, wide: str = "") -> dict[str, str]:
        types = {f"{name}_ptr": kind for name in pointers.split()} | dict.fromkeys(integers.split(), "i32")
        return types | {f"{name}_ptr": "*fp32" for name in wide.split()}

    forward_strides, backward_strides = (
        "x_b x_n y_b y_n gate_b shift_b scale_b",
        "x_b x_n y_b y_n gate_b scale_b dresidual_b dresidual_n dout_b dout_n",
    )
    cases = []
    for kind in ("*bf16", "*fp32"):
        pointers = "x y gate weight shift scale residual out top"
        types = signature(kind, pointers, "tokens chunks " + forward_strides, "row_top") | {"eps": "fp32"}
        for gated, launch in ((False, FORWARD), (True, GATED_FORWARD)):
            block = _meta(1152, launch) | {"GATED": gated, "TOPS": False}
            cases.append(OfflineCase(_forward_kernel, types, block, divisible=tuple(forward_strides.split())))
        pointers = "x y gate weight scale dresidual dout dx dy top"
        types = signature(kind, pointers, "tokens chunks " + backward_strides, "partial row_top") | {"eps": "fp32"}
        for gated, bias, launch in (
            (False, False, BACKWARD),
            (True, False, GATED_BACKWARD),
            (True, True, BIAS_BACKWARD),
        ):
            block = _meta(1152, launch) | {"GATED": gated, "BIAS": bias, "TOPS": False, "RESIDUAL": gated}
            cases.append(OfflineCase(_backward_kernel, types, block, divisible=tuple(backward_strides.split())))
        for gated, bias in ((False, False), (True, False), (True, True)):
            types = signature(kind, "weight scale dshift dscale dgate", "chunks scale_b", "partial dweight")
            block = {"GATED": gated, "SUMS": 2 + gated + bias, "D": 1152, "BLOCK": REDUCE.columns, **REDUCE.options(2)}
            cases.append(OfflineCase(_reduce_kernel, types, block, divisible=("scale_b",)))
    return cases


OFFLINE = _offline()
