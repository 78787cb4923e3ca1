"""SwiGLU: ``out = silu(a) b``, [a, b] the halves of the last axis, ``silu(a) = a s``, ``s = 1 / (1 + exp(-a))``.

Backward, from the input alone (s is recomputed, nothing but the input is kept), with g = dL/dout:

    da = g b s (1 + a (1 - s)),     db = g a s

Computed in float32 and rounded once (the reference rounds silu(a) first).  bfloat16, float16 and float32; float64 is
refused (use the reference).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, INTERPRET, OfflineCase, check_tensor, on_device

_COLUMNS = 1024  # 3 x 1024 is XL's width exactly
_ROWS = 64 if INTERPRET else 4


@triton.jit
def _place(rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row [ROWS, 1] and column [1, COLUMNS] numbers of this program's block, and which of them exist."""
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < F)


@triton.jit
def _forward_kernel(packed_ptr, out_ptr, rows, packed_row, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _place(rows, F, ROWS, COLUMNS)
    source = packed_ptr + row * packed_row + column
    a = tl.load(source, inside, 0.0).to(tl.float32)
    b = tl.load(source + F, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * F + column, (a * tl.sigmoid(a) * b).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    packed_ptr,
    dout_ptr,
    dpacked_ptr,
    rows,
    packed_row,
    dout_row,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _place(rows, F, ROWS, COLUMNS)
    source = packed_ptr + row * packed_row + column
    a = tl.load(source, inside, 0.0).to(tl.float32)
    b = tl.load(source + F, inside, 0.0).to(tl.float32)
    g = tl.load(dout_ptr + row * dout_row + column, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(a)
    target = dpacked_ptr + row * (2 * F) + column
    kind: tl.constexpr = dpacked_ptr.dtype.element_ty
    tl.store(target, (g * b * s * (1.0 + a * (1.0 - s))).to(kind), inside)
    tl.store(target + F, (g * a * s).to(kind), inside)


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


def _grid(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    grid = (triton.cdiv(rows, _ROWS) * triton.cdiv(width, columns),)
    return grid, {"F": width, "ROWS": _ROWS, "COLUMNS": columns, "num_warps": 4}


@torch.library.custom_op("fastasync::swiglu", mutates_args=())
def _forward_op(packed: Tensor) -> Tensor:
    check_tensor("packed", packed, FLOATS)
    if packed.dim() < 1 or packed.shape[-1] < 2 or packed.shape[-1] % 2:
        raise ValueError(f"packed must be [..., 2 F], not {list(packed.shape)}")
    source = _as_rows("packed", packed)
    width = packed.shape[-1] // 2
    out = packed.new_empty((*packed.shape[:-1], width))
    if source.shape[0]:
        grid, meta = _grid(source.shape[0], width)
        with on_device(packed):
            _forward_kernel[grid](source, out, source.shape[0], source.stride(0), **meta)
    return out


@_forward_op.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


@torch.library.custom_op("fastasync::swiglu_backward", mutates_args=())
def _backward_op(dout: Tensor, packed: Tensor) -> Tensor:
    source = _as_rows("packed", packed)
    gradient = dout.reshape(-1, dout.shape[-1]) if dout.numel() else dout.reshape(0, dout.shape[-1])
    if gradient.stride(1) != 1:  # a broadcast gradient, say: nobody chose its layout
        gradient = gradient.contiguous()
    dpacked = packed.new_empty(packed.shape)
    if source.shape[0]:
        grid, meta = _grid(source.shape[0], packed.shape[-1] // 2)
        with on_device(packed):
            _backward_kernel[grid](
                source, gradient, dpacked, source.shape[0], source.stride(0), gradient.stride(0), **meta
            )
    return dpacked


@_backward_op.register_fake
def _(dout: Tensor, packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx, dout: Tensor) -> Tensor:
    return _backward_op(dout, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_setup)


def swiglu(packed: Tensor) -> Tensor:
    """``silu(a) * b`` with [a, b] the two halves of the last axis: [..., 2 F] -> [..., F], contiguous.

    The last axis must be contiguous and the leading ones must merge into rows at one stride (any contiguous tensor, or
    columns cut out of a wider one).  TypeError for a dtype, ValueError for a shape, stride or device.
    """
    return _forward_op(packed)


def _offline() -> list[OfflineCase]:
    """XL: F = 3072, in bfloat16 and float32."""
    cases = []
    meta = {"F": 3072, "ROWS": 4, "COLUMNS": _COLUMNS}
    for kind in ("*bf16", "*fp32"):
        signature = {"packed_ptr": kind, "out_ptr": kind, "rows": "i32", "packed_row": "i32"}
        cases.append(OfflineCase(_forward_kernel, signature, meta, 4, ("packed_row",)))
        signature = {"packed_ptr": kind, "dout_ptr": kind, "dpacked_ptr": kind}
        signature |= {"rows": "i32", "packed_row": "i32", "dout_row": "i32"}
        cases.append(OfflineCase(_backward_kernel, signature, meta, 4, ("packed_row", "dout_row")))
    return cases


OFFLINE = _offline()
