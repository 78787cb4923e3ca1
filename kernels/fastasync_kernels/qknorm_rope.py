"""QK-norm and RoPE, from the packed qkv of one GEMM into what the attention reads, and back into the packed gradient.

Forward, for each head row x [Dh] of q and k, statistics in float32, with the pairs (e, o) = (x_0, x_1), ...:

    r = 1 / sqrt(mean(x^2) + eps),     z = x r weight
    out_e = z_e cos_e - z_o sin_e,     out_o = z_o cos_o + z_e sin_o

v is a view of qkv: nothing is copied.  Backward (r is recomputed), with g the gradient of q or k:

    dz_e = g_e cos_e + g_o sin_o,      dz_o = g_o cos_o - g_e sin_e
    dweight = sum over rows of dz x r,     dx = r (dz weight - x r mean(dz weight x r))

and one launch writes dq, dk and dv into the packed gradient.  Each program keeps one token and walks over samples, so
that cos, sin and the weights stay in registers.  dweight: one partial sum per program, then one sum over the programs,
always in the same order; the gradient of the bias of the linear that made qkv, if asked for, is the sum of dx over
samples and tokens and made the same way.  Strides over heads and tokens are compile-time constants: 72 is a multiple
of 8, which is 16 bytes, but Triton only learns at run time about multiples of 16.

The reference rounds x r and z to qkv's dtype on the way; here they stay in float32.  bfloat16, float16 and float32;
float64 is refused (use the reference).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, Launch, OfflineCase, ceil_div, check_tensor, on_device, power_of_two
from ._rows import check_unit_stride, head_and_tail, unit_stride
from .column_sums import column_sums
from .fp8_linear import QKNORM_PARTS
from .tops import Tops, column_tops, hint_size, split_hint

LAYOUTS = ("bnhd", "bhnd")  # memory order of q and k; the shape is [B, heads, N, Dh] for both
# samples per program: 3,072 programs backward at B = N = 256, and partial sums of 0.6 MB, of a bias 14 MB more (1152
# numbers a program).  All heads of a token at a time.  bench/NOTES.md has the times of others
FORWARD = Launch(chunk=16, stages=3)
BACKWARD = BIAS_BACKWARD = TOPS_BACKWARD = Launch(chunk=64, stages=4)


@triton.jit
def _pairs(x):
    """[PIECES, LENGTH] -> its even and its odd columns, each [PIECES, LENGTH // 2]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _joined(even, odd):
    """[PIECES, LENGTH // 2] twice -> [PIECES, LENGTH], ``_pairs`` undone."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def _places(ROWS: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Row [ROWS * LANES, 1] and columns of every piece of a head block and of the tail block behind it.

    Each of ROWS rows is LANES pieces, of HEAD // LANES columns and of TAIL // LANES.  With the same pieces a thread
    holds parts of the same row in both blocks; where it does not, the compiler computes the head block twice, once in
    each layout.
    """
    piece = tl.arange(0, ROWS * LANES)[:, None]
    lane = piece % LANES
    low = lane * (HEAD // LANES) + tl.arange(0, HEAD // LANES)[None, :]
    high = HEAD + lane * (TAIL // LANES) + tl.arange(0, TAIL // LANES)[None, :]
    return piece // LANES, low, high


@triton.jit
def _table(weight_ptr, cos_ptr, sin_ptr, column, DH: tl.constexpr):
    """weight, cos and sin of these columns of one token, as even and odd halves, float32."""
    inside = column < DH
    weight_e, weight_o = _pairs(tl.load(weight_ptr + column, inside, 0.0).to(tl.float32))
    cos_e, cos_o = _pairs(tl.load(cos_ptr + column, inside, 0.0))
    sin_e, sin_o = _pairs(tl.load(sin_ptr + column, inside, 0.0))
    return weight_e, weight_o, cos_e, cos_o, sin_e, sin_o


@triton.jit
def _row_sums(head, tail, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The sums of the rows of both blocks together, at each of their pieces: [ROWS * LANES, 1]."""
    total = tl.sum(tl.reshape(tl.sum(head, 1) + tl.sum(tail, 1), [ROWS, LANES]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [ROWS, LANES]), [ROWS * LANES, 1])


@triton.jit
def _place(tokens, BATCH_PER: tl.constexpr, PARTS: tl.constexpr):
    """Program -> (part q, k or v; token; first sample).  Parts, then tokens vary fastest: neighbours in memory."""
    program = tl.program_id(0)
    part = program % PARTS
    token = (program // PARTS) % tokens
    first = (program // PARTS // tokens) * BATCH_PER
    return part, token, first


@triton.jit
def _forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    batch,
    tokens,
    qkv_b,
    qkv_n,
    out_b,
    eps,
    OUT_H: tl.constexpr,
    OUT_N: tl.constexpr,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    SAMPLES: tl.constexpr,
    STAGES: tl.constexpr,
):
    part, token, first = _place(tokens, SAMPLES, 2)
    row, low, high = _places(ROWS, LANES, HEAD, TAIL)
    here = row < HEADS
    inside = here & (high < DH)
    if part == 0:
        weight_ptr = q_weight_ptr
        out_ptr = q_ptr
    else:
        weight_ptr = k_weight_ptr
        out_ptr = k_ptr
    cos_ptr += token * DH
    sin_ptr += token * DH
    w_e0, w_o0, cos_e0, cos_o0, sin_e0, sin_o0 = _table(weight_ptr, cos_ptr, sin_ptr, low, DH)
    w_e1, w_o1, cos_e1, cos_o1, sin_e1, sin_o1 = _table(weight_ptr, cos_ptr, sin_ptr, high, DH)
    source = qkv_ptr + token.to(tl.int64) * qkv_n + part * HEADS * DH + row * DH
    target = out_ptr + token.to(tl.int64) * OUT_N + row * OUT_H
    kind: tl.constexpr = q_ptr.dtype.element_ty

    for sample in tl.range(first, tl.minimum(first + SAMPLES, batch), num_stages=STAGES):
        x_row = source + tl.cast(sample, tl.int64) * qkv_b
        e0, o0 = _pairs(tl.load(x_row + low, here, 0.0).to(tl.float32))
        e1, o1 = _pairs(tl.load(x_row + high, inside, 0.0).to(tl.float32))
        r = tl.rsqrt(_row_sums(e0 * e0 + o0 * o0, e1 * e1 + o1 * o1, ROWS, LANES) / DH + eps)
        e0 *= r * w_e0
        o0 *= r * w_o0
        e1 *= r * w_e1
        o1 *= r * w_o1
        out0 = _joined(e0 * cos_e0 - o0 * sin_e0, o0 * cos_o0 + e0 * sin_o0)
        out1 = _joined(e1 * cos_e1 - o1 * sin_e1, o1 * cos_o1 + e1 * sin_o1)
        out_row = target + tl.cast(sample, tl.int64) * out_b
        tl.store(out_row + low, out0.to(kind), here)
        tl.store(out_row + high, out1.to(kind), inside)


@triton.jit
def _row_tops(size0, size1, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The largest of all heads in four parts [4]: with up to four warps none waits for another."""
    part0 = tl.max(tl.reshape(size0, [4, ROWS * HEAD // 4]), 1)
    part1 = tl.max(tl.reshape(size1, [4, ROWS * TAIL // 4]), 1)
    return tl.maximum(part0, part1)


@triton.jit
def _backward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dqkv_ptr,
    partial_ptr,
    bias_partial_ptr,
    row_top_ptr,
    top_ptr,
    batch,
    tokens,
    qkv_b,
    qkv_n,
    dq_b,
    dk_b,
    dv_b,
    eps,
    DQ_H: tl.constexpr,
    DQ_N: tl.constexpr,
    DK_H: tl.constexpr,
    DK_N: tl.constexpr,
    DV_H: tl.constexpr,
    DV_N: tl.constexpr,
    BIAS: tl.constexpr,
    TOPS: tl.constexpr,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    SAMPLES: tl.constexpr,
    STAGES: tl.constexpr,
):
    part, token, first = _place(tokens, SAMPLES, 3)
    row, low, high = _places(ROWS, LANES, HEAD, TAIL)
    here = row < HEADS
    inside = here & (high < DH)
    last = tl.minimum(first + SAMPLES, batch)
    target = dqkv_ptr + token.to(tl.int64) * (3 * HEADS * DH) + part * HEADS * DH + row * DH
    packed = tl.cast(tokens, tl.int64) * (3 * HEADS * DH)  # elements of one sample of the packed gradient
    kind: tl.constexpr = dqkv_ptr.dtype.element_ty
    if BIAS:
        bias0 = tl.zeros([ROWS * LANES, HEAD // LANES], tl.float32)
        bias1 = tl.zeros([ROWS * LANES, TAIL // LANES], tl.float32)
    if TOPS:
        top0 = tl.zeros([ROWS * LANES, HEAD // LANES], tl.float32)
        top1 = tl.zeros([ROWS * LANES, TAIL // LANES], tl.float32)
        row_top_ptr += token.to(tl.int64) * 12 + part * 4 + tl.arange(0, 4)

    if part == 2:
        incoming = dv_ptr + token.to(tl.int64) * DV_N + row * DV_H
        for sample in tl.range(first, last, num_stages=STAGES):
            g_row = incoming + tl.cast(sample, tl.int64) * dv_b
            out_row = target + sample * packed
            g0 = tl.load(g_row + low, here, 0.0)
            g1 = tl.load(g_row + high, inside, 0.0)
            tl.store(out_row + low, g0, here)
            tl.store(out_row + high, g1, inside)
            if BIAS:
                bias0 += g0.to(tl.float32)
                bias1 += g1.to(tl.float32)
            if TOPS:
                size0 = tl.abs(g0.to(tl.float32))
                size1 = tl.abs(g1.to(tl.float32))
                place = row_top_ptr + tl.cast(sample, tl.int64) * tokens * 12
                tl.store(place, _row_tops(size0, size1, ROWS, HEAD, TAIL))
                top0 = tl.maximum(top0, size0)
                top1 = tl.maximum(top1, size1)
    else:
        if part == 0:
            weight_ptr = q_weight_ptr
            incoming = dq_ptr + token.to(tl.int64) * DQ_N + row * DQ_H
            g_b = dq_b
        else:
            weight_ptr = k_weight_ptr
            incoming = dk_ptr + token.to(tl.int64) * DK_N + row * DK_H
            g_b = dk_b
        cos_ptr += token * DH
        sin_ptr += token * DH
        w_e0, w_o0, cos_e0, cos_o0, sin_e0, sin_o0 = _table(weight_ptr, cos_ptr, sin_ptr, low, DH)
        w_e1, w_o1, cos_e1, cos_o1, sin_e1, sin_o1 = _table(weight_ptr, cos_ptr, sin_ptr, high, DH)
        source = qkv_ptr + token.to(tl.int64) * qkv_n + part * HEADS * DH + row * DH
        sum_e0 = tl.zeros([ROWS * LANES, HEAD // LANES // 2], tl.float32)
        sum_o0 = tl.zeros([ROWS * LANES, HEAD // LANES // 2], tl.float32)
        sum_e1 = tl.zeros([ROWS * LANES, TAIL // LANES // 2], tl.float32)
        sum_o1 = tl.zeros([ROWS * LANES, TAIL // LANES // 2], tl.float32)
        for sample in tl.range(first, last, num_stages=STAGES):
            x_row = source + tl.cast(sample, tl.int64) * qkv_b
            g_row = incoming + tl.cast(sample, tl.int64) * g_b
            x_e0, x_o0 = _pairs(tl.load(x_row + low, here, 0.0).to(tl.float32))
            x_e1, x_o1 = _pairs(tl.load(x_row + high, inside, 0.0).to(tl.float32))
            g_e0, g_o0 = _pairs(tl.load(g_row + low, here, 0.0).to(tl.float32))
            g_e1, g_o1 = _pairs(tl.load(g_row + high, inside, 0.0).to(tl.float32))
            z_e0 = g_e0 * cos_e0 + g_o0 * sin_o0
            z_o0 = g_o0 * cos_o0 - g_e0 * sin_e0
            z_e1 = g_e1 * cos_e1 + g_o1 * sin_o1
            z_o1 = g_o1 * cos_o1 - g_e1 * sin_e1
            # both row sums before r is known: mean(dz weight x r) = r sum(dz weight x) / Dh
            square = _row_sums(x_e0 * x_e0 + x_o0 * x_o0, x_e1 * x_e1 + x_o1 * x_o1, ROWS, LANES)
            product0 = z_e0 * w_e0 * x_e0 + z_o0 * w_o0 * x_o0
            product1 = z_e1 * w_e1 * x_e1 + z_o1 * w_o1 * x_o1
            product = _row_sums(product0, product1, ROWS, LANES)
            r = tl.rsqrt(square / DH + eps)
            mean = product * r / DH
            n_e0 = x_e0 * r
            n_o0 = x_o0 * r
            n_e1 = x_e1 * r
            n_o1 = x_o1 * r
            sum_e0 += z_e0 * n_e0
            sum_o0 += z_o0 * n_o0
            sum_e1 += z_e1 * n_e1
            sum_o1 += z_o1 * n_o1
            dx0 = _joined(r * (z_e0 * w_e0 - n_e0 * mean), r * (z_o0 * w_o0 - n_o0 * mean))
            dx1 = _joined(r * (z_e1 * w_e1 - n_e1 * mean), r * (z_o1 * w_o1 - n_o1 * mean))
            out_row = target + sample * packed
            rounded0 = dx0.to(kind)
            rounded1 = dx1.to(kind)
            tl.store(out_row + low, rounded0, here)
            tl.store(out_row + high, rounded1, inside)
            if BIAS:
                bias0 += dx0
                bias1 += dx1
            if TOPS:
                size0 = tl.abs(rounded0.to(tl.float32))
                size1 = tl.abs(rounded1.to(tl.float32))
                place = row_top_ptr + tl.cast(sample, tl.int64) * tokens * 12
                tl.store(place, _row_tops(size0, size1, ROWS, HEAD, TAIL))
                top0 = tl.maximum(top0, size0)
                top1 = tl.maximum(top1, size1)
        # partial sums [2 (q, k), programs of that part, DH]
        share = (part * (tl.num_programs(0) // 3) + tl.program_id(0) // 3) * DH
        partial = partial_ptr + share.to(tl.int64)
        column0 = tl.arange(0, HEAD)
        column1 = HEAD + tl.arange(0, TAIL)
        tl.store(partial + column0, tl.sum(tl.reshape(_joined(sum_e0, sum_o0), [ROWS, HEAD]), 0))
        tl.store(partial + column1, tl.sum(tl.reshape(_joined(sum_e1, sum_o1), [ROWS, TAIL]), 0), column1 < DH)
    if BIAS:  # partial sums [programs of a part, 3 (q, k, v), HEADS * DH]: the parts vary fastest over the programs
        bias_row = bias_partial_ptr + tl.program_id(0).to(tl.int64) * (HEADS * DH) + row * DH
        tl.store(bias_row + low, bias0, here)
        tl.store(bias_row + high, bias1, inside)
    if TOPS:  # in the same order
        top_row = top_ptr + tl.program_id(0).to(tl.int64) * (HEADS * DH) + row * DH
        tl.store(top_row + low, top0, here)
        tl.store(top_row + high, top1, inside)


def _meta(heads: int, width: int, launch: Launch) -> dict[str, Any]:
    """Block sizes and warps, with about one piece, eight columns of the head block, a thread.

    A piece has at least two columns of the tail, some of them masked: a load of less than four bytes is not prefetched.
    """
    head, tail = head_and_tail(width)
    rows, lanes = power_of_two(heads), max(head // 8, 1)
    return {
        "HEADS": heads, "DH": width, "ROWS": rows, "LANES": lanes, "HEAD": head, "TAIL": max(tail, 2 * lanes),
        "SAMPLES": launch.chunk, "STAGES": launch.stages,
        **launch.options(min(max(rows * lanes // 32, 1), 8)),
    }  # fmt: skip


def _check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, layout: str
) -> tuple[int, int, int]:
    """Batch, tokens and head dimension of checked arguments."""
    check_tensor("qkv", qkv, FLOATS, (-1, -1, -1))
    check_unit_stride("qkv", qkv)
    batch, tokens, packed = qkv.shape
    if heads < 1 or packed % (3 * heads):
        raise ValueError(f"qkv has {packed} features, which is not 3 x {heads} heads x a head dimension")
    width = packed // (3 * heads)
    if width < 4 or width % 2:
        raise ValueError(f"the head dimension must be even and at least 4 (RoPE turns pairs), not {width}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_tensor(name, weight, (torch.float32, qkv.dtype), (width,), qkv.device)
        check_unit_stride(name, weight)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (torch.float32,), (tokens, width), qkv.device)
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    return batch, tokens, width


def _empty(qkv: Tensor, heads: int, layout: str) -> Tensor:
    """[B, heads, N, Dh], uninitialised, in the memory order ``layout``."""
    batch, tokens, packed = qkv.shape
    width = packed // (3 * heads)
    if layout == "bhnd":
        return qkv.new_empty((batch, heads, tokens, width))
    return qkv.new_empty((batch, tokens, heads, width)).transpose(1, 2)


@torch.library.custom_op("fastasync::qknorm_rope", mutates_args=())
def _forward_op(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, layout: str
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = _check(qkv, q_weight, k_weight, cos, sin, heads, layout)
    q, k = _empty(qkv, heads, layout), _empty(qkv, heads, layout)
    if batch and tokens:
        with on_device(qkv):
            _forward_kernel[(2 * tokens * ceil_div(batch, FORWARD.chunk),)](
                qkv, q_weight, k_weight, cos, sin, q, k, batch, tokens,
                qkv.stride(0), qkv.stride(1), q.stride(0), eps,
                OUT_H=q.stride(1), OUT_N=q.stride(2), **_meta(heads, width, FORWARD),
            )  # fmt: skip
    return q, k


@_forward_op.register_fake
def _(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, layout: str
) -> tuple[Tensor, Tensor]:
    return _empty(qkv, heads, layout), _empty(qkv, heads, layout)


@torch.library.custom_op("fastasync::qknorm_rope_backward", mutates_args=())
def _backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, the gradients of both norms' weights [2, Dh] in float32, and the bias's (empty without its dtype)."""
    return launch_backward(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, heads, eps, bias)


def launch_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    bias: torch.dtype | None,
    tops: Tops | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator's results; what ``tops`` holds is written, dqkv's largest magnitudes, and a one after."""
    batch, tokens, packed = qkv.shape
    width = packed // (3 * heads)
    dq, dk, dv = unit_stride(dq), unit_stride(dk), unit_stride(dv)
    dqkv = qkv.new_empty(qkv.shape)
    launch = TOPS_BACKWARD if tops is not None else BACKWARD if bias is None else BIAS_BACKWARD
    programs = tokens * ceil_div(batch, launch.chunk)
    partial = qkv.new_empty((2, programs, width), dtype=torch.float32)
    bias_partial = qkv.new_empty((0 if bias is None else programs, packed), dtype=torch.float32)
    rows, parts = (qkv, qkv) if tops is None else (tops.rows, qkv.new_empty((programs, packed)))
    if programs:
        with on_device(qkv):
            _backward_kernel[(3 * programs,)](
                qkv, q_weight, k_weight, cos, sin, dq, dk, dv, dqkv, partial, bias_partial, rows, parts, batch, tokens,
                qkv.stride(0), qkv.stride(1), dq.stride(0), dk.stride(0), dv.stride(0), eps,
                DQ_H=dq.stride(1), DQ_N=dq.stride(2), DK_H=dk.stride(1), DK_N=dk.stride(2),
                DV_H=dv.stride(1), DV_N=dv.stride(2), BIAS=bias is not None, TOPS=tops is not None,
                **_meta(heads, width, launch),
            )  # fmt: skip
    if tops is not None:
        column_tops(parts, tops.columns, count=True)
    dbias = qkv.new_empty(0) if bias is None else column_sums(bias_partial[None], bias)[0]
    return dqkv, column_sums(partial), dbias


@_backward_op.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = qkv.new_empty(0) if bias is None else qkv.new_empty(qkv.shape[-1], dtype=bias)
    return qkv.new_empty(qkv.shape), qkv.new_empty((2, *q_weight.shape), dtype=torch.float32), dbias


@torch.library.custom_op("fastasync::qknorm_rope_backward_hint", mutates_args=())
def _backward_hint_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, the gradients of both norms' weights, and dqkv's largest magnitudes as a hint (``tops``)."""
    batch, tokens, packed = qkv.shape
    hint = qkv.new_empty(hint_size(batch * tokens, packed, QKNORM_PARTS), dtype=torch.float32)
    tops = split_hint(hint, batch * tokens, QKNORM_PARTS)[0]
    return *launch_backward(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, heads, eps, None, tops)[:2], hint


@_backward_hint_op.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    hint = qkv.new_empty(hint_size(qkv.shape[0] * qkv.shape[1], qkv.shape[2], QKNORM_PARTS), dtype=torch.float32)
    return qkv.new_empty(qkv.shape), qkv.new_empty((2, *q_weight.shape), dtype=torch.float32), hint


class _QKNormRope(torch.autograd.Function):
    """Joins the two operators.  Not ``register_autograd``: v is a view of qkv, which an operator may not return, and
    its gradient has to reach the backward operator instead of becoming a second tensor of qkv's size."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, heads, eps, layout, bias, hint):
        q, k = _forward_op(qkv, q_weight, k_weight, cos, sin, heads, eps, layout)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.heads, ctx.eps, ctx.bias = heads, eps, None if bias is None else bias.dtype
        ctx.hinted = hint is not None
        batch, tokens, packed = qkv.shape
        v = qkv.view(batch, tokens, 3, heads, packed // (3 * heads))[:, :, 2].transpose(1, 2)
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        inputs = (dq, dk, dv, qkv, q_weight, k_weight, cos, sin, ctx.heads, ctx.eps)
        dhint = None
        if ctx.hinted:
            dqkv, dweights, dhint = _backward_hint_op(*inputs)
        else:
            dqkv, dweights, dbias = _backward_op(*inputs, ctx.bias)
        dq_weight, dk_weight = dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype)
        return dqkv, dq_weight, dk_weight, *[None] * 5, None if ctx.bias is None else dbias, dhint


def qknorm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
    layout: str = "bnhd",
    *,
    bias: Tensor | None = None,
    hint: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed qkv [B, N, 3 heads Dh] (order q, k, v; then heads; then Dh) -> q, k, v, each of shape [B, heads, N, Dh].

    q and k are normalised over each head (weights [Dh], qkv's dtype or float32) and turned by RoPE with the tables cos
    and sin [N, Dh] (float32, contiguous, interleaved pairs).  ``layout`` is their memory order: "bnhd" (what the
    FlashAttention family reads, and the order of qkv itself) or "bhnd".  v is a view of qkv, not a copy; writing to it
    in place is an error under autograd.  The last axis of qkv must be contiguous, its others may have any stride.
    ``bias`` [3 heads Dh] (qkv's dtype or float32): its gradient, the sum of dqkv over samples and tokens, is returned,
    its values are not read: pass it when the linear that made qkv used ``bias.detach()``.  ``hint``: of the linear in
    fp8 that made qkv, with ``QKNORM_PARTS`` parts a row, in the place of a bias (``tops``).
    TypeError for a dtype, ValueError for a shape, stride, device or layout that the kernel does not take.
    """
    if bias is not None:
        check_tensor("bias", bias, (torch.float32, qkv.dtype), qkv.shape[-1:], qkv.device)
    if hint is not None:
        if bias is not None:
            raise ValueError("bias and hint: a linear in fp8 that is given a hint sums its bias's gradient itself")
        size = hint_size(qkv.shape[0] * qkv.shape[1], qkv.shape[2], QKNORM_PARTS)
        check_tensor("hint", hint, (torch.float32,), (size,), qkv.device)
    if k_weight is q_weight:  # torch.compile of 2.11 drops a gradient of an argument given twice; 2.13 refuses it
        k_weight = k_weight.view_as(k_weight)
    return _QKNormRope.apply(qkv, q_weight, k_weight, cos, sin, heads, eps, layout, bias, hint)


def _offline() -> list[OfflineCase]:
    """XL: 16 heads of 72, in bfloat16 and float32, backward also with the bias of qkv."""
    cases = []
    forward = _meta(16, 72, FORWARD)
    for kind in ("*bf16", "*fp32"):
        sizes = {"batch": "i32", "tokens": "i32"}
        tables = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        inputs = {"qkv_ptr": kind, "q_weight_ptr": kind, "k_weight_ptr": kind}
        strides: tuple[str, ...] = ("qkv_b", "qkv_n", "out_b")
        signature = inputs | tables | {"q_ptr": kind, "k_ptr": kind} | sizes
        signature |= dict.fromkeys(strides, "i32") | {"eps": "fp32"}
        forward |= {"OUT_H": 72, "OUT_N": 1152}
        cases.append(OfflineCase(_forward_kernel, signature, forward, divisible=strides))
        strides = ("qkv_b", "qkv_n", "dq_b", "dk_b", "dv_b")
        signature = inputs | tables | {f"{name}_ptr": kind for name in ("dq", "dk", "dv", "dqkv")} | sizes
        signature |= dict.fromkeys(strides, "i32") | {
            "partial_ptr": "*fp32",
            "bias_partial_ptr": "*fp32",
            "row_top_ptr": "*fp32",
            "top_ptr": kind,
            "eps": "fp32",
        }
        orders = {"DQ_H": 72, "DQ_N": 1152, "DK_H": 72, "DK_N": 1152, "DV_H": 72, "DV_N": 1152}
        for bias, tops, launch in (
            (False, False, BACKWARD),
            (True, False, BIAS_BACKWARD),
            (False, True, TOPS_BACKWARD),
        ):
            block = _meta(16, 72, launch) | orders | {"BIAS": bias, "TOPS": tops}
            cases.append(OfflineCase(_backward_kernel, signature, block, divisible=strides))
    return cases


OFFLINE = _offline()
