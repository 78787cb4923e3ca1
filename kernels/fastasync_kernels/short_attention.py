"""Attention of at most 128 tokens without a mask: one program has a whole head of a sample, forward and backward.

Forward, over all keys at once (c = log2(e) / sqrt(Dh), m the row's maximum):

    S = q k^T,     E = 2^(c (S - m)),     out = E v / rowsum(E)

Backward, from q, k and v alone (nothing else is kept), with g = dL/dout:

    P = E / rowsum(E),     dv = P^T g,     dP = g v^T,     dS = P (dP - rowsum(P dP))
    dq = dS k / sqrt(Dh),     dk = dS^T q / sqrt(Dh)

P comes from S and not from a log-sum-exp of the forward: rounded, that is a factor of the whole row, and where one key
takes it all the gradients then have up to four times the error of the formula's.

A head's rows are read once and written once, and nothing else is launched: no row sums of g out before, no conversion
of a float32 dq after, which for 64 tokens cost cuDNN more than the products.  Each number has one program that adds it
up in one order: the same bits every time.  Products of 16-bit numbers have float32 sums, with E, P and dS rounded to
their type, as every fused attention does; the softmax is float32.  float32 is multiplied as float32.

Rows and columns are padded to powers of two, 16 at least.  Strides over heads and tokens are compile-time constants:
72 is a multiple of 8, which is 16 bytes, but Triton only learns at run time about multiples of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, Launch, OfflineCase, check_tensor, on_device, power_of_two
from ._rows import check_unit_stride, unit_stride

LONGEST, WIDEST = 128, 128  # tokens and head dimension
# warps 0: one for every 16 rows (what one instruction multiplies), so 4 up to 64 tokens and 8 beyond
FORWARD = BACKWARD = Launch()


@triton.jit
def _tile(N_STRIDE: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and mask of one head [ROWS, COLUMNS]."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < TOKENS) & (column < DH)
    if N_STRIDE * TOKENS >= 2147483648:
        row = row.to(tl.int64)
    return row * N_STRIDE + column, inside


@triton.jit
def _load(
    ptr, N_STRIDE: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    offset, inside = _tile(N_STRIDE, TOKENS, DH, ROWS, COLUMNS)
    if TOKENS == ROWS and DH == COLUMNS:
        return tl.load(ptr + offset)
    else:
        return tl.load(ptr + offset, inside, 0.0)


@triton.jit
def _store(
    ptr, x, N_STRIDE: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    offset, inside = _tile(N_STRIDE, TOKENS, DH, ROWS, COLUMNS)
    if TOKENS == ROWS and DH == COLUMNS:
        tl.store(ptr + offset, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offset, x.to(ptr.dtype.element_ty), inside)


@triton.jit
def _exponentials(q, k, TOKENS: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr):
    """E [ROWS queries, ROWS keys], float32; zero for keys that do not exist."""
    c: tl.constexpr = 1.4426950408889634 * DH**-0.5
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if TOKENS < ROWS:
        scores = tl.where((tl.arange(0, ROWS) < TOKENS)[None, :], scores, float("-inf"))
    return tl.exp2((scores - tl.max(scores, 1)[:, None]) * c)


# "attention" in the kernels' names: bench.profile_step tells by it what a kernel is for


@triton.jit
def _attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_b,
    k_b,
    v_b,
    Q_H: tl.constexpr,
    Q_N: tl.constexpr,
    K_H: tl.constexpr,
    K_N: tl.constexpr,
    V_H: tl.constexpr,
    V_N: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)  # fastest: heads are neighbours in memory
    sample = (program // HEADS).to(tl.int64)
    q = _load(q_ptr + sample * q_b + head * Q_H, Q_N, TOKENS, DH, ROWS, COLUMNS)
    k = _load(k_ptr + sample * k_b + head * K_H, K_N, TOKENS, DH, ROWS, COLUMNS)
    v = _load(v_ptr + sample * v_b + head * V_H, V_N, TOKENS, DH, ROWS, COLUMNS)
    e = _exponentials(q, k, TOKENS, DH, ROWS)
    out = tl.dot(e.to(v.dtype), v, input_precision="ieee") / tl.sum(e, 1)[:, None]
    _store(out_ptr + sample * (TOKENS * HEADS * DH) + head * DH, out, HEADS * DH, TOKENS, DH, ROWS, COLUMNS)


@triton.jit
def _attention_backward_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dout_b,
    q_b,
    k_b,
    v_b,
    G_H: tl.constexpr,
    G_N: tl.constexpr,
    Q_H: tl.constexpr,
    Q_N: tl.constexpr,
    K_H: tl.constexpr,
    K_N: tl.constexpr,
    V_H: tl.constexpr,
    V_N: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    sample = (program // HEADS).to(tl.int64)
    q = _load(q_ptr + sample * q_b + head * Q_H, Q_N, TOKENS, DH, ROWS, COLUMNS)
    k = _load(k_ptr + sample * k_b + head * K_H, K_N, TOKENS, DH, ROWS, COLUMNS)
    v = _load(v_ptr + sample * v_b + head * V_H, V_N, TOKENS, DH, ROWS, COLUMNS)
    g = _load(dout_ptr + sample * dout_b + head * G_H, G_N, TOKENS, DH, ROWS, COLUMNS)
    target = sample * (TOKENS * HEADS * DH) + head * DH

    e = _exponentials(q, k, TOKENS, DH, ROWS)
    p = e * (1.0 / tl.sum(e, 1))[:, None]
    dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
    _store(dv_ptr + target, dv, HEADS * DH, TOKENS, DH, ROWS, COLUMNS)
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
    scale: tl.constexpr = DH**-0.5  # last: dS in float16 keeps smaller numbers
    dq = tl.dot(ds, k, input_precision="ieee") * scale
    _store(dq_ptr + target, dq, HEADS * DH, TOKENS, DH, ROWS, COLUMNS)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * scale
    _store(dk_ptr + target, dk, HEADS * DH, TOKENS, DH, ROWS, COLUMNS)


def _meta(heads: int, tokens: int, width: int, launch: Launch) -> dict[str, Any]:
    rows, columns = (max(16, power_of_two(size)) for size in (tokens, width))
    sizes = {"HEADS": heads, "TOKENS": tokens, "DH": width, "ROWS": rows, "COLUMNS": columns}
    return {**sizes, **launch.options(rows // 16)}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides over heads and tokens as the kernels' constants: ``Q_H``, ``Q_N``, ..."""
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for axis, i in (("H", 1), ("N", 2))}


def _empty(like: Tensor) -> Tensor:
    """[B, heads, N, Dh], uninitialised, in memory order B, N, heads, Dh."""
    batch, heads, tokens, width = like.shape
    return like.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def refusal(tokens: int, width: int) -> str:
    """Why the kernels do not take so many tokens or such a head dimension, or an empty string."""
    if not 1 <= tokens <= LONGEST:
        return f"needs 1 to {LONGEST} tokens, not {tokens}"
    return "" if 1 <= width <= WIDEST else f"needs a head dimension of 1 to {WIDEST}, not {width}"


@torch.library.custom_op("fastasync::short_attention", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    check_tensor("q", q, FLOATS, (-1, -1, -1, -1))
    batch, heads, tokens, width = q.shape
    reason = refusal(tokens, width)
    if reason:
        raise ValueError(f"short_attention {reason}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, (q.dtype,), q.shape, q.device)
        check_unit_stride(name, tensor)
    out = _empty(q)
    if batch * heads:
        with on_device(q):
            _attention_forward_kernel[(batch * heads,)](
                q, k, v, out, q.stride(0), k.stride(0), v.stride(0),
                **_strides(Q=q, K=k, V=v), **_meta(heads, tokens, width, FORWARD),
            )  # fmt: skip
    return out


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _empty(q)


@torch.library.custom_op("fastasync::short_attention_backward", mutates_args=())
def _backward_op(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    dout = unit_stride(dout)
    dq, dk, dv = _empty(q), _empty(q), _empty(q)
    if batch * heads:
        with on_device(q):
            _attention_backward_kernel[(batch * heads,)](
                dout, q, k, v, dq, dk, dv, dout.stride(0), q.stride(0), k.stride(0), v.stride(0),
                **_strides(G=dout, Q=q, K=k, V=v), **_meta(heads, tokens, width, BACKWARD),
            )  # fmt: skip
    return dq, dk, dv


@_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(q), _empty(q)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_op(dout, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_setup)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(Dh)) v``, no mask: q, k, v [B, heads, N, Dh] -> [B, heads, N, Dh] in their dtype.

    N and Dh are 1 to 128.  The last axis of q, k and v must be contiguous, the others may have any stride.  The output
    and the gradients lie in memory as B, N, heads, Dh, so that ``out.transpose(1, 2).flatten(2)`` copies nothing.
    TypeError for a dtype (float16, bfloat16 or float32), ValueError for a shape, stride or device.
    """
    return _forward_op(q, k, v)


def _offline() -> list[OfflineCase]:
    """The cifar10 preset (8 heads of 32, 64 tokens) in bfloat16 and float16; a full tile; padded ones.  v is packed."""
    cases = []
    shapes = (("*bf16", 8, 64, 32), ("*fp16", 8, 64, 32), ("*bf16", 6, 128, 64), ("*bf16", 2, 128, 128))
    for kind, heads, tokens, width in (*shapes, ("*bf16", 16, 17, 72), ("*bf16", 16, 100, 72), ("*fp32", 2, 16, 32)):
        rows = {f"{name}_{axis}": size for name in "GQK" for axis, size in (("H", width), ("N", heads * width))}
        rows |= {"V_H": width, "V_N": 3 * heads * width}
        strides: tuple[str, ...] = ("q_b", "k_b", "v_b")
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), kind) | dict.fromkeys(strides, "i32")
        block = {name: size for name, size in rows.items() if name[0] != "G"} | _meta(heads, tokens, width, FORWARD)
        cases.append(OfflineCase(_attention_forward_kernel, signature, block, divisible=strides))
        strides = ("dout_b", *strides)
        pointers = ("dout_ptr", "q_ptr", "k_ptr", "v_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
        signature = dict.fromkeys(pointers, kind) | dict.fromkeys(strides, "i32")
        block = rows | _meta(heads, tokens, width, BACKWARD)
        cases.append(OfflineCase(_attention_backward_kernel, signature, block, divisible=strides))
    return cases


OFFLINE = _offline()
