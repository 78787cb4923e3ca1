"""Attention of at most 256 tokens without a mask, in blocks of queries and of keys, forward and backward.

Forward, for a block of queries (c = log2(e) / sqrt(Dh), m the row's maximum, r one over the row's sum):

    S = q k^T,     E = 2^(c (S - m)),     r = 1 / rowsum(E),     out = r E v

over blocks of keys, with the running maximum and sum of a softmax in one pass.  m and r are kept, float32, two numbers
a row.  Backward, with g = dL/dout:

    P = r 2^(c (S - m)),     dv = P^T g,     dP = g v^T,     D = rowsum(g out) = rowsum(P dP)
    dS = P (dP - D),     dq = dS k / sqrt(Dh),     dk = dS^T q / sqrt(Dh)

in two launches: one program for each block of queries computes dq, and writes D; then one for each block of keys
computes dk and dv over all queries.  S and dP are computed twice (7 products in the place of 5), nothing is added up
between programs: the same bits every time.  Other divisions were slower (bench/NOTES.md, 2026-11-25).

m and r, and not a log-sum-exp: rounded, that is a factor of the whole row (see short_attention).  Products of 16-bit
numbers have float32 sums, with E, P and dS rounded to their type; float32 is multiplied as float32.

72 columns are 64 + 16, padded, where that is less than the next power of two: 80 and not 128.  Strides over heads and
tokens are compile-time constants, as in short_attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, INTERPRET, OfflineCase, ceil_div, check_tensor, on_device, power_of_two
from ._rows import check_unit_stride, head_and_tail, unit_stride
from .short_attention import _empty, _strides

LONGEST, WIDEST = 256, 128  # tokens and head dimension
LARGEST_TILE = 128  # with 256 keys the forward kernel that Triton 3.6.0 compiles is wrong (bench/NOTES.md)


class Tile(NamedTuple):
    """One kernel's launch: queries and keys at a time; ``stages``: steps of the loop that are in flight at once.

    Compiled, at most ``LARGEST_TILE`` of either.
    """

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


FORWARD = Tile()
FOR_QUERIES, FOR_KEYS = Tile(), Tile(queries=32)


@triton.jit
def _place(
    ptr, first, STRIDE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, FROM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pointers to rows first.. and columns FROM.. of a head, and which rows and columns these are."""
    row = first + tl.arange(0, ROWS)[:, None]
    column = FROM + tl.arange(0, COLUMNS)[None, :]
    if STRIDE * TOKENS >= 2147483648:
        return ptr + (row.to(tl.int64) * STRIDE + column), row, column
    else:
        return ptr + (row * STRIDE + column), row, column


@triton.jit
def _load(
    ptr, first, STRIDE: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr,
    ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place, row, column = _place(ptr, first, STRIDE, TOKENS, ROWS, FROM, COLUMNS)
    if TOKENS % ROWS == 0 and FROM + COLUMNS <= DH:
        return tl.load(place)
    else:
        return tl.load(place, (row < TOKENS) & (column < DH), 0.0)


@triton.jit
def _store(
    ptr, x, first, STRIDE: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr,
    ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place, row, column = _place(ptr, first, STRIDE, TOKENS, ROWS, FROM, COLUMNS)
    if TOKENS % ROWS == 0 and FROM + COLUMNS <= DH:
        tl.store(place, x.to(ptr.dtype.element_ty))
    else:
        tl.store(place, x.to(ptr.dtype.element_ty), (row < TOKENS) & (column < DH))


@triton.jit
def _tiles(
    ptr, first, STRIDE: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Columns 0..HEAD and HEAD..HEAD + TAIL; without a tail the second is never used."""
    head = _load(ptr, first, STRIDE, TOKENS, DH, ROWS, 0, HEAD)
    if TAIL:
        return head, _load(ptr, first, STRIDE, TOKENS, DH, ROWS, HEAD, TAIL)
    else:
        return head, head


@triton.jit
def _store_tiles(
    ptr, x0, x1, first, STRIDE: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    _store(ptr, x0, first, STRIDE, TOKENS, DH, ROWS, 0, HEAD)
    if TAIL:
        _store(ptr, x1, first, STRIDE, TOKENS, DH, ROWS, HEAD, TAIL)


@triton.jit
def _across(a0, a1, b0, b1, TAIL: tl.constexpr):
    """a b^T over all columns, float32."""
    x = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if TAIL:
        x = tl.dot(a1, tl.trans(b1), x, input_precision="ieee")
    return x


@triton.jit
def _along(a, b0, b1, x0, x1, TAIL: tl.constexpr):
    """x + a b."""
    x0 = tl.dot(a, b0, x0, input_precision="ieee")
    if TAIL:
        x1 = tl.dot(a, b1, x1, input_precision="ieee")
    return x0, x1


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    return tl.zeros([ROWS, HEAD], tl.float32), tl.zeros([ROWS, TAIL if TAIL else 16], tl.float32)


@triton.jit
def _vector(ptr, first, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    if TOKENS % ROWS == 0:
        return tl.load(ptr + row)
    else:
        return tl.load(ptr + row, row < TOKENS, 0.0)


@triton.jit
def _store_vector(ptr, x, first, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    tl.store(ptr + row, x, row < TOKENS)


# "attention" in the kernels' names: bench.profile_step tells by it what a kernel is for


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, q_b, k_b, v_b,
    Q_H: tl.constexpr, Q_N: tl.constexpr, K_H: tl.constexpr, K_N: tl.constexpr, V_H: tl.constexpr, V_N: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    c: tl.constexpr = 1.4426950408889634 * DH**-0.5
    program = tl.program_id(0)
    first = program % PARTS * QUERIES  # fastest: the programs of a head read the same keys
    pair = (program // PARTS).to(tl.int64)
    head = pair % HEADS
    sample = pair // HEADS
    q_ptr += sample * q_b + head * Q_H
    k_ptr += sample * k_b + head * K_H
    v_ptr += sample * v_b + head * V_H
    out_ptr += sample * (TOKENS * HEADS * DH) + head * DH
    rows_ptr += pair * (2 * TOKENS)
    q0, q1 = _tiles(q_ptr, first, Q_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    x0, x1 = _zeros(QUERIES, HEAD, TAIL)
    for key in tl.range(0, TOKENS, KEYS, num_stages=STAGES):
        k0, k1 = _tiles(k_ptr, key, K_N, TOKENS, DH, KEYS, HEAD, TAIL)
        s = _across(q0, q1, k0, k1, TAIL)
        if TOKENS % KEYS:
            s = tl.where((key + tl.arange(0, KEYS) < TOKENS)[None, :], s, float("-inf"))
        now = tl.maximum(m, tl.max(s, 1))
        e = tl.exp2((s - now[:, None]) * c)
        shrink = tl.exp2((m - now) * c)
        m = now
        total = total * shrink + tl.sum(e, 1)
        v0, v1 = _tiles(v_ptr, key, V_N, TOKENS, DH, KEYS, HEAD, TAIL)
        x0, x1 = _along(e.to(v0.dtype), v0, v1, x0 * shrink[:, None], x1 * shrink[:, None], TAIL)
    r = 1.0 / total
    _store_tiles(out_ptr, x0 * r[:, None], x1 * r[:, None], first, HEADS * DH, TOKENS, DH, QUERIES, HEAD, TAIL)
    _store_vector(rows_ptr, m, first, TOKENS, QUERIES)
    _store_vector(rows_ptr + TOKENS, r, first, TOKENS, QUERIES)


@triton.jit
def _attention_backward_for_queries_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, delta_ptr, dq_ptr,
    dout_b, q_b, k_b, v_b, G_H: tl.constexpr, G_N: tl.constexpr,
    Q_H: tl.constexpr, Q_N: tl.constexpr, K_H: tl.constexpr, K_N: tl.constexpr, V_H: tl.constexpr, V_N: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    c: tl.constexpr = 1.4426950408889634 * DH**-0.5
    scale: tl.constexpr = DH**-0.5  # last: dS in float16 keeps smaller numbers
    O_N: tl.constexpr = HEADS * DH
    program = tl.program_id(0)
    pair = (program // PARTS).to(tl.int64)
    head = pair % HEADS
    sample = pair // HEADS
    g_ptr = dout_ptr + sample * dout_b + head * G_H
    q_ptr += sample * q_b + head * Q_H
    k_ptr += sample * k_b + head * K_H
    v_ptr += sample * v_b + head * V_H
    target = sample * (TOKENS * O_N) + head * DH
    rows_ptr += pair * (2 * TOKENS)
    delta_ptr += pair * TOKENS
    first = program % PARTS * QUERIES
    q0, q1 = _tiles(q_ptr, first, Q_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    g0, g1 = _tiles(g_ptr, first, G_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    o0, o1 = _tiles(out_ptr + target, first, O_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    d = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if TAIL:
        d += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    _store_vector(delta_ptr, d, first, TOKENS, QUERIES)
    m = _vector(rows_ptr, first, TOKENS, QUERIES)
    r = _vector(rows_ptr + TOKENS, first, TOKENS, QUERIES)
    dq0, dq1 = _zeros(QUERIES, HEAD, TAIL)
    for key in tl.range(0, TOKENS, KEYS, num_stages=STAGES):
        k0, k1 = _tiles(k_ptr, key, K_N, TOKENS, DH, KEYS, HEAD, TAIL)
        v0, v1 = _tiles(v_ptr, key, V_N, TOKENS, DH, KEYS, HEAD, TAIL)
        s = _across(q0, q1, k0, k1, TAIL)
        dp = _across(g0, g1, v0, v1, TAIL)
        p = tl.exp2((s - m[:, None]) * c) * r[:, None]
        if TOKENS % KEYS:
            p = tl.where((key + tl.arange(0, KEYS) < TOKENS)[None, :], p, 0.0)
        ds = (p * (dp - d[:, None])).to(q0.dtype)
        dq0, dq1 = _along(ds, k0, k1, dq0, dq1, TAIL)
    _store_tiles(dq_ptr + target, dq0 * scale, dq1 * scale, first, O_N, TOKENS, DH, QUERIES, HEAD, TAIL)


@triton.jit
def _attention_backward_for_keys_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, delta_ptr, dk_ptr, dv_ptr,
    dout_b, q_b, k_b, v_b, G_H: tl.constexpr, G_N: tl.constexpr,
    Q_H: tl.constexpr, Q_N: tl.constexpr, K_H: tl.constexpr, K_N: tl.constexpr, V_H: tl.constexpr, V_N: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (TOKENS + KEYS - 1) // KEYS
    c: tl.constexpr = 1.4426950408889634 * DH**-0.5
    scale: tl.constexpr = DH**-0.5  # last: dS in float16 keeps smaller numbers
    O_N: tl.constexpr = HEADS * DH
    program = tl.program_id(0)
    pair = (program // PARTS).to(tl.int64)
    head = pair % HEADS
    sample = pair // HEADS
    g_ptr = dout_ptr + sample * dout_b + head * G_H
    q_ptr += sample * q_b + head * Q_H
    k_ptr += sample * k_b + head * K_H
    v_ptr += sample * v_b + head * V_H
    target = sample * (TOKENS * O_N) + head * DH
    rows_ptr += pair * (2 * TOKENS)
    delta_ptr += pair * TOKENS
    key = program % PARTS * KEYS
    k0, k1 = _tiles(k_ptr, key, K_N, TOKENS, DH, KEYS, HEAD, TAIL)
    v0, v1 = _tiles(v_ptr, key, V_N, TOKENS, DH, KEYS, HEAD, TAIL)
    dk0, dk1 = _zeros(KEYS, HEAD, TAIL)
    dv0, dv1 = _zeros(KEYS, HEAD, TAIL)
    for first in tl.range(0, TOKENS, QUERIES, num_stages=STAGES):
        q0, q1 = _tiles(q_ptr, first, Q_N, TOKENS, DH, QUERIES, HEAD, TAIL)
        g0, g1 = _tiles(g_ptr, first, G_N, TOKENS, DH, QUERIES, HEAD, TAIL)
        m = _vector(rows_ptr, first, TOKENS, QUERIES)
        r = _vector(rows_ptr + TOKENS, first, TOKENS, QUERIES)
        s = _across(k0, k1, q0, q1, TAIL)  # transposed: rows are keys
        dp = _across(v0, v1, g0, g1, TAIL)
        p = tl.exp2((s - m[None, :]) * c) * r[None, :]
        if TOKENS % KEYS:
            p = tl.where((key + tl.arange(0, KEYS) < TOKENS)[:, None], p, 0.0)
        dv0, dv1 = _along(p.to(g0.dtype), g0, g1, dv0, dv1, TAIL)
        ds = (p * (dp - _vector(delta_ptr, first, TOKENS, QUERIES)[None, :])).to(q0.dtype)
        dk0, dk1 = _along(ds, q0, q1, dk0, dk1, TAIL)
    _store_tiles(dv_ptr + target, dv0, dv1, key, O_N, TOKENS, DH, KEYS, HEAD, TAIL)
    _store_tiles(dk_ptr + target, dk0 * scale, dk1 * scale, key, O_N, TOKENS, DH, KEYS, HEAD, TAIL)


def _columns(width: int) -> tuple[int, int]:
    """HEAD and TAIL: one padded tile, or two where these have fewer columns."""
    whole = max(16, power_of_two(width))
    if width <= 16 or whole == width:
        return whole, 0
    head, tail = head_and_tail(width)
    tail = max(16, tail)
    return (whole, 0) if head + tail >= whole else (head, tail)


def _meta(heads: int, tokens: int, width: int, tile: Tile) -> dict[str, Any]:
    if not INTERPRET and max(tile.queries, tile.keys) > LARGEST_TILE:
        raise ValueError(f"{tile} is wrong when compiled: at most {LARGEST_TILE} queries and keys at a time")
    head, tail = _columns(width)
    most = max(16, power_of_two(tokens))
    sizes = {"HEADS": heads, "TOKENS": tokens, "DH": width, "HEAD": head, "TAIL": tail}
    blocks = {"QUERIES": min(tile.queries, most), "KEYS": min(tile.keys, most), "STAGES": tile.stages}
    return {**sizes, **blocks, "num_warps": tile.warps}


def _statistics(like: Tensor) -> Tensor:
    """m and r of every row."""
    batch, heads, tokens, _ = like.shape
    return like.new_empty((batch, heads, 2, tokens), dtype=torch.float32)


def refusal(tokens: int, width: int) -> str:
    """Why the kernels do not take so many tokens or such a head dimension, or an empty string."""
    if not 1 <= tokens <= LONGEST:
        return f"needs 1 to {LONGEST} tokens, not {tokens}"
    return "" if 1 <= width <= WIDEST else f"needs a head dimension of 1 to {WIDEST}, not {width}"


@torch.library.custom_op("fastasync::medium_attention", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and m and r [B, heads, 2, N]."""
    check_tensor("q", q, FLOATS, (-1, -1, -1, -1))
    batch, heads, tokens, width = q.shape
    reason = refusal(tokens, width)
    if reason:
        raise ValueError(f"medium_attention {reason}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, (q.dtype,), q.shape, q.device)
        check_unit_stride(name, tensor)
    out, rows = _empty(q), _statistics(q)
    if batch * heads:
        meta = _meta(heads, tokens, width, FORWARD)
        with on_device(q):
            _attention_forward_kernel[(batch * heads * ceil_div(tokens, meta["QUERIES"]),)](
                q, k, v, out, rows, q.stride(0), k.stride(0), v.stride(0), **_strides(Q=q, K=k, V=v), **meta,
            )  # fmt: skip
    return out, rows


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q), _statistics(q)


@torch.library.custom_op("fastasync::medium_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    dout = unit_stride(dout)
    dq, dk, dv = _empty(q), _empty(q), _empty(q)
    if not batch * heads:
        return dq, dk, dv
    delta = q.new_empty(batch * heads * tokens, dtype=torch.float32)  # D: the second launch reads the first one's
    batches = (dout.stride(0), q.stride(0), k.stride(0), v.stride(0))
    strides = _strides(G=dout, Q=q, K=k, V=v)
    with on_device(q):
        meta = _meta(heads, tokens, width, FOR_QUERIES)
        _attention_backward_for_queries_kernel[(batch * heads * ceil_div(tokens, meta["QUERIES"]),)](
            dout, q, k, v, out, rows, delta, dq, *batches, **strides, **meta,
        )  # fmt: skip
        meta = _meta(heads, tokens, width, FOR_KEYS)
        _attention_backward_for_keys_kernel[(batch * heads * ceil_div(tokens, meta["KEYS"]),)](
            dout, q, k, v, rows, delta, dk, dv, *batches, **strides, **meta,
        )  # fmt: skip
    return dq, dk, dv


@_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(q), _empty(q)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout: Tensor, drows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_op(dout, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_setup)


def medium_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(Dh)) v``, no mask: q, k, v [B, heads, N, Dh] -> [B, heads, N, Dh] in their dtype.

    N is 1 to 256, Dh 1 to 128.  The last axis of q, k and v must be contiguous, the others may have any stride.  The
    output and the gradients lie in memory as B, N, heads, Dh, so that ``out.transpose(1, 2).flatten(2)`` copies
    nothing.  TypeError for a dtype (float16, bfloat16 or float32), ValueError for a shape, stride or device.
    """
    return _forward_op(q, k, v)[0]


def rows_of(lse: Tensor, width: int) -> Tensor:
    """m and r [B, heads, 2, N] from another kernel's log-sum-exp [B, heads, N] (natural) of the scaled scores."""
    return torch.stack([lse * width**0.5, torch.ones_like(lse)], 2)


@torch.library.custom_op("fastasync::cudnn_attention", mutates_args=())
def _cudnn_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's output, and m and r."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # a copy only where q lies in memory as B, heads, N, Dh
    return out, rows_of(lse.reshape(q.shape[:3]), q.shape[3])


@_cudnn_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q), _statistics(q)


_cudnn_op.register_autograd(_backward, setup_context=_setup)


def mixed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``medium_attention`` with cuDNN's forward pass and the backward pass of this module; on CUDA, 16 bits."""
    return _cudnn_op(q, k, v)[0]


def _offline() -> list[OfflineCase]:
    """XL (16 heads of 72, 256 tokens) in bfloat16; padded rows; columns that are a power of two.  v is packed."""
    cases = []
    for kind, heads, tokens, width in (("*bf16", 16, 256, 72), ("*fp16", 16, 200, 72), ("*bf16", 6, 256, 64)):
        steps = {f"{name}_{axis}": size for name in "GQK" for axis, size in (("H", width), ("N", heads * width))}
        steps |= {"V_H": width, "V_N": 3 * heads * width}
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), kind) | {"rows_ptr": "*fp32"}
        signature |= dict.fromkeys(("q_b", "k_b", "v_b"), "i32")
        block = {name: size for name, size in steps.items() if name[0] != "G"} | _meta(heads, tokens, width, FORWARD)
        cases.append(OfflineCase(_attention_forward_kernel, signature, block, divisible=("q_b", "k_b", "v_b")))
        batches = ("dout_b", "q_b", "k_b", "v_b")
        common = dict.fromkeys(("dout_ptr", "q_ptr", "k_ptr", "v_ptr"), kind) | dict.fromkeys(batches, "i32")
        common |= dict.fromkeys(("rows_ptr", "delta_ptr"), "*fp32")
        for kernel, outputs, tile in (
            (_attention_backward_for_queries_kernel, ("out_ptr", "dq_ptr"), FOR_QUERIES),
            (_attention_backward_for_keys_kernel, ("dk_ptr", "dv_ptr"), FOR_KEYS),
        ):
            block = steps | _meta(heads, tokens, width, tile)
            cases.append(OfflineCase(kernel, common | dict.fromkeys(outputs, kind), block, divisible=batches))
    return cases


OFFLINE = _offline()
