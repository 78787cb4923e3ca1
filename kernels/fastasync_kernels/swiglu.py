"""SwiGLU: ``out = silu(a) b``, [a, b] the halves of the last axis, ``silu(a) = a s``, ``s = 1 / (1 + exp(-a))``.

Backward, from the input alone (s is recomputed, nothing but the input is kept), with g = dL/dout:

    da = g b s (1 + a (1 - s)),     db = g a s

The gradient of the bias of the linear before it, the sum of [da, db] over all rows, is taken on the way: one partial
sum for every ``chunk`` rows, then a sum over those, always in the same order.

For linears in fp8 (``fp8_mlp``) both directions can also give the largest magnitudes of what they write: of each row,
one number for every block of columns, and of each column, one for every chunk of rows.

Computed in float32 and rounded once (the reference rounds silu(a) first).  bfloat16, float16 and float32; float64 is
refused (use the reference).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, INTERPRET, Launch, OfflineCase, ceil_div, check_tensor, on_device, power_of_two
from .column_sums import column_sums

# 3 x 1024 columns are XL's width exactly; a program takes one block of rows, and with the sums of a bias many
FORWARD = BACKWARD = Launch(chunk=64 if INTERPRET else 4, rows=64 if INTERPRET else 4, columns=1024, warps=4)
BIAS_BACKWARD = Launch(chunk=64, rows=64 if INTERPRET else 2, stages=3, columns=1024, warps=4)
TOPS_FORWARD = Launch(chunk=64, rows=64 if INTERPRET else 4, stages=3, columns=1024, warps=4)


@triton.jit
def _place(F: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """The number of this program's chunk of rows (int64), and its columns [COLUMNS]."""
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _forward_kernel(
    packed_ptr, out_ptr, row_top_ptr, top_ptr, rows, packed_row,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOPS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    chunk, columns = _place(F, CHUNK, COLUMNS)
    column = columns[None, :]
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if TOPS:
        top = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < F)
        source = packed_ptr + row[:, None] * packed_row + column
        a = tl.load(source, inside, 0.0).to(tl.float32)
        b = tl.load(source + F, inside, 0.0).to(tl.float32)
        out = (a * tl.sigmoid(a) * b).to(kind)
        tl.store(out_ptr + row[:, None] * F + column, out, inside)
        if TOPS:
            size = tl.abs(out.to(tl.float32))
            tl.store(row_top_ptr + row * blocks + tl.program_id(0) % blocks, tl.max(size, 1), row < rows)
            top = tl.maximum(top, size)
    if TOPS:
        tl.store(top_ptr + chunk * F + columns, tl.max(top, 0), columns < F)


@triton.jit
def _backward_kernel(
    packed_ptr,
    dout_ptr,
    dpacked_ptr,
    partial_ptr,
    row_top_ptr,
    top_ptr,
    rows,
    packed_row,
    dout_row,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    TOPS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    chunk, columns = _place(F, CHUNK, COLUMNS)
    column = columns[None, :]
    kind: tl.constexpr = dpacked_ptr.dtype.element_ty
    if BIAS:
        a_sum = tl.zeros([COLUMNS], tl.float32)
        b_sum = tl.zeros([COLUMNS], tl.float32)
    if TOPS:
        a_top = tl.zeros([ROWS, COLUMNS], tl.float32)
        b_top = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
        rows_here = chunk * CHUNK + start + tl.arange(0, ROWS)
        row = rows_here[:, None]
        inside = (row < rows) & (column < F)
        source = packed_ptr + row * packed_row + column
        a = tl.load(source, inside, 0.0).to(tl.float32)
        b = tl.load(source + F, inside, 0.0).to(tl.float32)
        g = tl.load(dout_ptr + row * dout_row + column, inside, 0.0).to(tl.float32)
        s = tl.sigmoid(a)
        da = g * b * s * (1.0 + a * (1.0 - s))
        db = g * a * s
        target = dpacked_ptr + row * (2 * F) + column
        tl.store(target, da.to(kind), inside)
        tl.store(target + F, db.to(kind), inside)
        if BIAS:
            a_sum += tl.sum(da, 0)
            b_sum += tl.sum(db, 0)
        if TOPS:
            a_size = tl.abs(da.to(kind).to(tl.float32))
            b_size = tl.abs(db.to(kind).to(tl.float32))
            place = row_top_ptr + rows_here * blocks + tl.program_id(0) % blocks
            tl.store(place, tl.max(tl.maximum(a_size, b_size), 1), rows_here < rows)
            a_top = tl.maximum(a_top, a_size)
            b_top = tl.maximum(b_top, b_size)
    if TOPS:
        target = top_ptr + chunk * (2 * F) + columns
        tl.store(target, tl.max(a_top, 0), columns < F)
        tl.store(target + F, tl.max(b_top, 0), columns < F)
    if BIAS:
        partial = partial_ptr + chunk * (2 * F) + columns
        tl.store(partial, a_sum, columns < F)
        tl.store(partial + F, b_sum, columns < F)


def _as_rows(name: str, tensor: Tensor) -> Tensor:
    """[..., W] as [rows, W] without a copy: unit stride over W, and leading axes that merge into one."""
    width = tensor.shape[-1]
    try:
        rows = tensor.view(-1, width) if tensor.numel() else tensor.reshape(0, width)
    except RuntimeError:
        rows = None
    if rows is None or (width > 1 and rows.stride(1) != 1):
        raise ValueError(f"{name} with strides {tensor.stride()} cannot be read as rows; call .contiguous() first")
    return rows


def _columns(width: int, launch: Launch) -> int:
    return min(launch.columns, power_of_two(width))


def _grid(rows: int, width: int, launch: Launch) -> tuple[tuple[int], dict[str, int]]:
    columns = _columns(width, launch)
    grid = (ceil_div(rows, launch.chunk) * ceil_div(width, columns),)
    meta = {"F": width, "ROWS": launch.rows, "COLUMNS": columns, "CHUNK": launch.chunk, "STAGES": launch.stages}
    return grid, {**meta, **launch.options(4)}


def _top_buffers(like: Tensor, rows: int, hidden: int, width: int, launch: Launch, tops: bool) -> tuple[Tensor, Tensor]:
    """For the largest magnitudes of rows [rows, blocks] and of columns [chunks, width], or two empty tensors."""
    blocks, chunks = ceil_div(hidden, _columns(hidden, launch)), ceil_div(rows, launch.chunk)
    shapes = ((rows, blocks), (chunks, width)) if tops else ((0, blocks), (0, width))
    return like.new_empty(shapes[0], dtype=torch.float32), like.new_empty(shapes[1], dtype=torch.float32)


def forward_with_tops(packed: Tensor, tops: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """``swiglu``, and the largest magnitudes of its rows and columns in parts (``_top_buffers``)."""
    source, width = _as_rows("packed", packed), packed.shape[-1] // 2
    out = packed.new_empty((*packed.shape[:-1], width))
    launch = TOPS_FORWARD if tops else FORWARD
    row_top, top = _top_buffers(packed, source.shape[0], width, width, launch, tops)
    if source.shape[0]:
        grid, meta = _grid(source.shape[0], width, launch)
        with on_device(packed):
            _forward_kernel[grid](source, out, row_top, top, source.shape[0], source.stride(0), TOPS=tops, **meta)
    return out, row_top, top


def _check(packed: Tensor) -> None:
    check_tensor("packed", packed, FLOATS)
    if packed.dim() < 1 or packed.shape[-1] < 2 or packed.shape[-1] % 2:
        raise ValueError(f"packed must be [..., 2 F], not {list(packed.shape)}")


@torch.library.custom_op("fastasync::swiglu", mutates_args=())
def _forward_op(packed: Tensor, bias: Tensor | None) -> Tensor:
    _check(packed)
    return forward_with_tops(packed, tops=False)[0]


@_forward_op.register_fake
def _(packed: Tensor, bias: Tensor | None) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


def backward_with_tops(
    dout: Tensor, packed: Tensor, with_bias: bool, tops: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dpacked, its sum over the rows in float32 (empty without ``with_bias``), and its largest magnitudes in parts."""
    source = _as_rows("packed", packed)
    gradient = dout.reshape(-1, dout.shape[-1]) if dout.numel() else dout.reshape(0, dout.shape[-1])
    if gradient.stride(1) != 1:  # a broadcast gradient, say: nobody chose its layout
        gradient = gradient.contiguous()
    dpacked = packed.new_empty(packed.shape)
    rows, width = source.shape[0], packed.shape[-1]
    launch = BIAS_BACKWARD if with_bias or tops else BACKWARD
    partial = packed.new_empty((ceil_div(rows, launch.chunk) if with_bias else 0, width), dtype=torch.float32)
    row_top, top = _top_buffers(packed, rows, width // 2, width, launch, tops)
    if rows:
        grid, meta = _grid(rows, width // 2, launch)
        with on_device(packed):
            _backward_kernel[grid](
                source, gradient, dpacked, partial, row_top, top, rows, source.stride(0), gradient.stride(0),
                BIAS=with_bias, TOPS=tops, **meta,
            )  # fmt: skip
    return dpacked, column_sums(partial[None])[0] if with_bias else partial, row_top, top


@torch.library.custom_op("fastasync::swiglu_backward", mutates_args=())
def _backward_op(dout: Tensor, packed: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """dpacked, and its sum over the rows in float32 (empty unless asked for)."""
    return backward_with_tops(dout, packed, with_bias, tops=False)[:2]


@_backward_op.register_fake
def _(dout: Tensor, packed: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    shape = packed.shape[-1:] if with_bias else (0, packed.shape[-1])
    return packed.new_empty(packed.shape), packed.new_empty(shape, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    packed, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed)


def _backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor | None]:
    dpacked, dbias = _backward_op(dout, *ctx.saved_tensors, ctx.bias_dtype is not None)
    return dpacked, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)


_forward_op.register_autograd(_backward, setup_context=_setup)


def swiglu(packed: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``silu(a) * b`` with [a, b] the two halves of the last axis: [..., 2 F] -> [..., F], contiguous.

    The last axis must be contiguous and the leading ones must merge into rows at one stride (any contiguous tensor, or
    columns cut out of a wider one).  TypeError for a dtype, ValueError for a shape, stride or device.

    bias: [2 F], float32 or packed's dtype.  Its gradient is returned, the sum of packed's over all rows; its values are
    not read: pass it when the linear that made packed used ``bias.detach()``.
    """
    if bias is not None:  # before the operator: for a bias on meta the dispatcher takes the shape-only implementation
        check_tensor("bias", bias, (torch.float32, packed.dtype), packed.shape[-1:], packed.device)
    return _forward_op(packed, bias)


def _offline() -> list[OfflineCase]:
    """XL: F = 3072, in bfloat16 and float32."""
    cases = []
    for kind in ("*bf16", "*fp32"):
        tops = {"row_top_ptr": "*fp32", "top_ptr": "*fp32"}
        signature = {"packed_ptr": kind, "out_ptr": kind, **tops, "rows": "i32", "packed_row": "i32"}
        for wanted, launch in ((False, FORWARD), (True, TOPS_FORWARD)):
            block = {**_grid(1, 3072, launch)[1], "TOPS": wanted}
            cases.append(OfflineCase(_forward_kernel, signature, block, divisible=("packed_row",)))
        signature = {"packed_ptr": kind, "dout_ptr": kind, "dpacked_ptr": kind, "partial_ptr": "*fp32", **tops}
        signature |= {"rows": "i32", "packed_row": "i32", "dout_row": "i32"}
        for bias, wanted, launch in (
            (False, False, BACKWARD),
            (True, False, BIAS_BACKWARD),
            (True, True, BIAS_BACKWARD),
        ):
            block = {**_grid(1, 3072, launch)[1], "BIAS": bias, "TOPS": wanted}
            cases.append(OfflineCase(_backward_kernel, signature, block, divisible=("packed_row", "dout_row")))
    return cases


OFFLINE = _offline()
