"""Attention of at most 256 tokens without a mask: whole heads in blocks of queries and of keys, forward and backward.

Forward, for a block of queries (c = log2(e) / sqrt(Dh), m the row's maximum, r one over the row's sum):

    S = q k^T,     E = 2^(c (S - m)),     r = 1 / rowsum(E),     out = r E v

over all keys at once, or over blocks of them with the running maximum and sum of a softmax in one pass.  m and r are
kept, float32, two numbers a row.  Backward, with g = dL/dout:

    P = r 2^(c (S - m)),     dv = P^T g,     dP = g v^T,     D = rowsum(P dP) = rowsum(g out)
    dS = P (dP - D),     dq = dS k / sqrt(Dh),     dk = dS^T q / sqrt(Dh)

m and r, and not a log-sum-exp: rounded, that is a factor of the whole row (see short_attention).  Where a program has
all keys of a row, D is rowsum(P dP), which cancels exactly where one key takes it all; elsewhere rowsum(g out), from
the rounded output, as other fused attention has it.

How the backward is divided (``Plan.kind``; Q: query block, K: key block):

| kind | programs | products | D |
|---|---|---|---|
| two | first one for each Q: dq, and D to memory; then one for each K, over all Q: dk and dv | 7 | either |
| both | one for each K: its dk and dv over all Q, then dq of its share of Q over all K | 7 | rowsum(g out) |
| fused | a few for each multiprocessor, a head at a time: dk, dv and a part of dq for each K | 5 | same |

In "fused" the parts of dq are added up in a float32 buffer of the program's own, which stays in the second-level cache.
Each number has one program that adds it up in one order: the same bits every time.  Products of 16-bit numbers have
float32 sums, with E, P and dS rounded to their type; float32 is multiplied as float32.

72 columns are 64 + 16, padded, where that is less than the next power of two: 80 and not 128.  Strides over heads and
tokens are compile-time constants, as in short_attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLOATS, OfflineCase, check_tensor, on_device
from ._rows import check_unit_stride, head_and_tail, unit_stride
from .short_attention import _empty, _strides

LONGEST, WIDEST = 256, 128  # tokens and head dimension


class Tile(NamedTuple):
    """One kernel's launch: queries and keys at a time, and how many blocks of queries a program takes in turn.

    ``stages``: how many steps of the loop are in flight at once; ``limit``: most registers a thread may have.
    ``exact``: all keys at once, and D as rowsum(P dP).  ``each``: programs for a multiprocessor ("fused"; 0: one for
    every head).
    """

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    blocks: int = 1
    limit: int | None = None
    exact: bool = False
    each: int = 1


class Plan(NamedTuple):
    """A backward: "two" has a tile for dq and one for dk and dv; "both" and "fused" have the second alone."""

    kind: str
    second: Tile
    first: Tile | None = None


FORWARD = Tile(64, 64, 4, 2)
BACKWARD = Plan("two", Tile(32, 64, 4, 2), Tile(64, 64, 4, 2))


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
    q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, q_b, k_b, v_b, Q_H: tl.constexpr, Q_N: tl.constexpr, K_H: tl.constexpr,
    K_N: tl.constexpr, V_H: tl.constexpr, V_N: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (TOKENS + QUERIES * BLOCKS - 1) // (QUERIES * BLOCKS)
    c: tl.constexpr = 1.4426950408889634 * DH**-0.5
    program = tl.program_id(0)
    part = program % PARTS  # fastest: the programs of a head read the same keys
    pair = (program // PARTS).to(tl.int64)
    head = pair % HEADS
    sample = pair // HEADS
    q_ptr += sample * q_b + head * Q_H
    k_ptr += sample * k_b + head * K_H
    v_ptr += sample * v_b + head * V_H
    out_ptr += sample * (TOKENS * HEADS * DH) + head * DH
    rows_ptr += pair * (2 * TOKENS)
    if KEYS >= TOKENS:
        k0, k1 = _tiles(k_ptr, 0, K_N, TOKENS, DH, KEYS, HEAD, TAIL)
        v0, v1 = _tiles(v_ptr, 0, V_N, TOKENS, DH, KEYS, HEAD, TAIL)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            first = (part * BLOCKS + block) * QUERIES
            q0, q1 = _tiles(q_ptr, first, Q_N, TOKENS, DH, QUERIES, HEAD, TAIL)
            s = _across(q0, q1, k0, k1, TAIL)
            if TOKENS < KEYS:
                s = tl.where((tl.arange(0, KEYS) < TOKENS)[None, :], s, float("-inf"))
            m = tl.max(s, 1)
            e = tl.exp2((s - m[:, None]) * c)
            r = 1.0 / tl.sum(e, 1)
            x0, x1 = _zeros(QUERIES, HEAD, TAIL)
            x0, x1 = _along(e.to(v0.dtype), v0, v1, x0, x1, TAIL)
            _store_tiles(out_ptr, x0 * r[:, None], x1 * r[:, None], first, HEADS * DH, TOKENS, DH, QUERIES, HEAD, TAIL)
            _store_vector(rows_ptr, m, first, TOKENS, QUERIES)
            _store_vector(rows_ptr + TOKENS, r, first, TOKENS, QUERIES)
    else:
        for block in range(BLOCKS):
            first = (part * BLOCKS + block) * QUERIES
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
def _row_sum(
    g_ptr, out_ptr, first, G_N: tl.constexpr, O_N: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """D = rowsum(g out)."""
    g0, g1 = _tiles(g_ptr, first, G_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    o0, o1 = _tiles(out_ptr, first, O_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    d = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if TAIL:
        d += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    return d


@triton.jit
def _key_gradients(
    key, g_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, delta_ptr, partial_ptr, dq_ptr, dk_ptr, dv_ptr,
    G_N: tl.constexpr, Q_N: tl.constexpr, K_N: tl.constexpr, V_N: tl.constexpr, O_N: tl.constexpr,
    TOKENS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys key..; FUSED: their part of dq too, added to partial_ptr and, after the last keys, stored."""
    c: tl.constexpr = 1.4426950408889634 * DH**-0.5
    scale: tl.constexpr = DH**-0.5  # last: dS in float16 keeps smaller numbers
    ROWS: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES * QUERIES
    k0, k1 = _tiles(k_ptr, key, K_N, TOKENS, DH, KEYS, HEAD, TAIL)
    v0, v1 = _tiles(v_ptr, key, V_N, TOKENS, DH, KEYS, HEAD, TAIL)
    dk0, dk1 = _zeros(KEYS, HEAD, TAIL)
    dv0, dv1 = _zeros(KEYS, HEAD, TAIL)
    for first in tl.range(0, TOKENS, QUERIES, num_stages=STAGES):
        q0, q1 = _tiles(q_ptr, first, Q_N, TOKENS, DH, QUERIES, HEAD, TAIL)
        m = _vector(rows_ptr, first, TOKENS, QUERIES)
        r = _vector(rows_ptr + TOKENS, first, TOKENS, QUERIES)
        s = _across(k0, k1, q0, q1, TAIL)  # transposed: rows are keys
        g0, g1 = _tiles(g_ptr, first, G_N, TOKENS, DH, QUERIES, HEAD, TAIL)
        dp = _across(v0, v1, g0, g1, TAIL)
        p = tl.exp2((s - m[None, :]) * c) * r[None, :]
        if TOKENS % KEYS:
            p = tl.where((key + tl.arange(0, KEYS) < TOKENS)[:, None], p, 0.0)
        dv0, dv1 = _along(p.to(g0.dtype), g0, g1, dv0, dv1, TAIL)
        ds = (p * (dp - _vector(delta_ptr, first, TOKENS, QUERIES)[None, :])).to(q0.dtype)
        dk0, dk1 = _along(ds, q0, q1, dk0, dk1, TAIL)
        if FUSED:
            dq0, dq1 = _zeros(QUERIES, HEAD, TAIL)
            dq0, dq1 = _along(tl.trans(ds), k0, k1, dq0, dq1, TAIL)
            if KEYS < TOKENS:
                row = first + tl.arange(0, QUERIES)[:, None]
                part0 = partial_ptr + row * HEAD + tl.arange(0, HEAD)[None, :]
                dq0 += tl.load(part0, (row >= 0) & (key > 0), 0.0)
                tl.store(part0, dq0, (row >= 0) & (key + KEYS < TOKENS))
                if TAIL:
                    part1 = partial_ptr + ROWS * HEAD + row * TAIL + tl.arange(0, TAIL)[None, :]
                    dq1 += tl.load(part1, (row >= 0) & (key > 0), 0.0)
                    tl.store(part1, dq1, (row >= 0) & (key + KEYS < TOKENS))
            if key + KEYS >= TOKENS:
                _store_tiles(dq_ptr, dq0 * scale, dq1 * scale, first, O_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    _store_tiles(dv_ptr, dv0, dv1, key, O_N, TOKENS, DH, KEYS, HEAD, TAIL)
    _store_tiles(dk_ptr, dk0 * scale, dk1 * scale, key, O_N, TOKENS, DH, KEYS, HEAD, TAIL)


@triton.jit
def _query_gradients(
    first, g_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, delta_ptr, dq_ptr,
    G_N: tl.constexpr, Q_N: tl.constexpr, K_N: tl.constexpr, V_N: tl.constexpr, O_N: tl.constexpr,
    TOKENS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq of queries first.. over blocks of keys.  D "known": it is at delta_ptr; "out" or "exact": it is put there."""
    c: tl.constexpr = 1.4426950408889634 * DH**-0.5
    scale: tl.constexpr = DH**-0.5
    q0, q1 = _tiles(q_ptr, first, Q_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    g0, g1 = _tiles(g_ptr, first, G_N, TOKENS, DH, QUERIES, HEAD, TAIL)
    m = _vector(rows_ptr, first, TOKENS, QUERIES)
    r = _vector(rows_ptr + TOKENS, first, TOKENS, QUERIES)
    if D == "known":
        d = _vector(delta_ptr, first, TOKENS, QUERIES)
    elif D == "out":
        d = _row_sum(g_ptr, out_ptr, first, G_N, O_N, TOKENS, DH, HEAD, TAIL, QUERIES)
        _store_vector(delta_ptr, d, first, TOKENS, QUERIES)
    dq0, dq1 = _zeros(QUERIES, HEAD, TAIL)
    for key in tl.range(0, TOKENS, KEYS, num_stages=STAGES):
        k0, k1 = _tiles(k_ptr, key, K_N, TOKENS, DH, KEYS, HEAD, TAIL)
        v0, v1 = _tiles(v_ptr, key, V_N, TOKENS, DH, KEYS, HEAD, TAIL)
        s = _across(q0, q1, k0, k1, TAIL)
        dp = _across(g0, g1, v0, v1, TAIL)
        p = tl.exp2((s - m[:, None]) * c) * r[:, None]
        if TOKENS % KEYS:
            p = tl.where((key + tl.arange(0, KEYS) < TOKENS)[None, :], p, 0.0)
        if D == "exact":  # all keys are here
            d = tl.sum(p * dp, 1)
            _store_vector(delta_ptr, d, first, TOKENS, QUERIES)
        ds = (p * (dp - d[:, None])).to(q0.dtype)
        dq0, dq1 = _along(ds, k0, k1, dq0, dq1, TAIL)
    _store_tiles(dq_ptr, dq0 * scale, dq1 * scale, first, O_N, TOKENS, DH, QUERIES, HEAD, TAIL)


@triton.jit
def _gradients(
    program, pair, start, g_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, delta_ptr, partial_ptr, dq_ptr, dk_ptr, dv_ptr,
    g_b, q_b, k_b, v_b,
    G_H: tl.constexpr, G_N: tl.constexpr, Q_H: tl.constexpr, Q_N: tl.constexpr,
    K_H: tl.constexpr, K_N: tl.constexpr, V_H: tl.constexpr, V_N: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """What one program does for one head of one sample; start: its first query or key."""
    O_N: tl.constexpr = HEADS * DH
    pair = tl.cast(pair, tl.int64)  # a plain number under the interpreter
    head = pair % HEADS
    sample = pair // HEADS
    g_ptr += sample * g_b + head * G_H
    q_ptr += sample * q_b + head * Q_H
    k_ptr += sample * k_b + head * K_H
    v_ptr += sample * v_b + head * V_H
    target = sample * (TOKENS * HEADS * DH) + head * DH
    out_ptr += target
    dq_ptr += target
    dk_ptr += target
    dv_ptr += target
    rows_ptr += pair * (2 * TOKENS)
    if PART == "both" or PART == "fused":  # D is the program's own
        delta_ptr += program.to(tl.int64) * TOKENS
        tl.debug_barrier()  # nobody still reads what is there
        for first in range(0, TOKENS, QUERIES):
            d = _row_sum(g_ptr, out_ptr, first, G_N, O_N, TOKENS, DH, HEAD, TAIL, QUERIES)
            _store_vector(delta_ptr, d, first, TOKENS, QUERIES)
        tl.debug_barrier()
    else:
        delta_ptr += pair * TOKENS
    if PART == "queries" or PART == "exact":
        for block in range(BLOCKS):
            _query_gradients(
                start + block * QUERIES, g_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, delta_ptr, dq_ptr,
                G_N, Q_N, K_N, V_N, O_N, TOKENS, DH, HEAD, TAIL, QUERIES, KEYS, STAGES,
                "exact" if PART == "exact" else "out",
            )  # fmt: skip
    elif PART == "fused":
        partial_ptr += program.to(tl.int64) * ((TOKENS + QUERIES - 1) // QUERIES * QUERIES * (HEAD + TAIL))
        for key in range(0, TOKENS, KEYS):
            tl.debug_barrier()  # the parts of dq so far are there
            _key_gradients(
                key, g_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, delta_ptr, partial_ptr, dq_ptr, dk_ptr, dv_ptr,
                G_N, Q_N, K_N, V_N, O_N, TOKENS, DH, HEAD, TAIL, QUERIES, KEYS, STAGES, True,
            )  # fmt: skip
    else:
        _key_gradients(
            start, g_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, delta_ptr, partial_ptr, dq_ptr, dk_ptr, dv_ptr,
            G_N, Q_N, K_N, V_N, O_N, TOKENS, DH, HEAD, TAIL, QUERIES, KEYS, STAGES, False,
        )  # fmt: skip
        if PART == "both":  # queries and keys change places
            _query_gradients(
                start, g_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, delta_ptr, dq_ptr,
                G_N, Q_N, K_N, V_N, O_N, TOKENS, DH, HEAD, TAIL, KEYS, QUERIES, STAGES, "known",
            )  # fmt: skip


@triton.jit
def _attention_backward_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, delta_ptr, partial_ptr, dq_ptr, dk_ptr, dv_ptr, dout_b, q_b,
    k_b, v_b, pairs, G_H: tl.constexpr, G_N: tl.constexpr, Q_H: tl.constexpr, Q_N: tl.constexpr, K_H: tl.constexpr,
    K_N: tl.constexpr, V_H: tl.constexpr, V_N: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """PART: "exact" or "queries" (of "two"'s first launch), "keys" (its second), "both", "fused"."""
    SHARE: tl.constexpr = KEYS if PART == "keys" or PART == "both" else QUERIES * BLOCKS
    PARTS: tl.constexpr = (TOKENS + SHARE - 1) // SHARE
    program = tl.program_id(0)
    if PART == "fused":
        for pair in range(program, pairs, tl.num_programs(0)):
            _gradients(
                program, pair, 0, dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, delta_ptr, partial_ptr,
                dq_ptr, dk_ptr, dv_ptr, dout_b, q_b, k_b, v_b, G_H, G_N, Q_H, Q_N, K_H, K_N, V_H, V_N,
                HEADS, TOKENS, DH, HEAD, TAIL, QUERIES, KEYS, BLOCKS, STAGES, PART,
            )  # fmt: skip
    else:
        _gradients(
            program, program // PARTS, program % PARTS * SHARE, dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr,
            delta_ptr, partial_ptr, dq_ptr, dk_ptr, dv_ptr, dout_b, q_b, k_b, v_b, G_H, G_N, Q_H, Q_N, K_H, K_N,
            V_H, V_N, HEADS, TOKENS, DH, HEAD, TAIL, QUERIES, KEYS, BLOCKS, STAGES, PART,
        )  # fmt: skip


def _columns(width: int) -> tuple[int, int]:
    """HEAD and TAIL: one padded tile, or two where these have fewer columns."""
    whole = max(16, triton.next_power_of_2(width))
    if width <= 16 or whole == width:
        return whole, 0
    head, tail = head_and_tail(width)
    tail = max(16, tail)
    return (whole, 0) if head + tail >= whole else (head, tail)


def _meta(heads: int, tokens: int, width: int, tile: Tile) -> dict[str, Any]:
    head, tail = _columns(width)
    most = max(16, triton.next_power_of_2(tokens))
    queries = min(tile.queries, most)
    keys = most if tile.exact else min(tile.keys, most)
    sizes = {"HEADS": heads, "TOKENS": tokens, "DH": width, "HEAD": head, "TAIL": tail}
    blocks = {"QUERIES": queries, "KEYS": keys, "BLOCKS": min(tile.blocks, most // queries), "STAGES": tile.stages}
    return {**sizes, **blocks, "num_warps": tile.warps, **({"maxnreg": tile.limit} if tile.limit else {})}


def _parts(meta: dict[str, Any], by: str) -> int:
    """Programs for one head of one sample."""
    share = meta["KEYS"] if by == "keys" else meta["QUERIES"] * meta["BLOCKS"]
    return triton.cdiv(meta["TOKENS"], share)


def _launches(plan: Plan) -> list[tuple[str, Tile]]:
    """PART and tile of a plan's launches in turn."""
    if plan.kind != "two":
        return [(plan.kind, plan.second)]
    assert plan.first is not None
    return [("exact" if plan.first.exact else "queries", plan.first), ("keys", plan.second)]


def _statistics(like: Tensor) -> Tensor:
    """m and r of every row."""
    batch, heads, tokens, _ = like.shape
    return like.new_empty((batch, heads, 2, tokens), dtype=torch.float32)


def _multiprocessors(tensor: Tensor) -> int:
    cuda = tensor.device.type == "cuda"
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if cuda else 2


def refusal(tokens: int, width: int) -> str:
    """Why the kernels do not take so many tokens or such a head dimension, or an empty string."""
    if not 1 <= tokens <= LONGEST:
        return f"needs 1 to {LONGEST} tokens, not {tokens}"
    return "" if 1 <= width <= WIDEST else f"needs a head dimension of 1 to {WIDEST}, not {width}"


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """The output, and m and r; nothing is checked."""
    batch, heads, tokens, width = q.shape
    out, rows = _empty(q), _statistics(q)
    if batch * heads:
        meta = _meta(heads, tokens, width, tile)
        with on_device(q):
            _attention_forward_kernel[(batch * heads * _parts(meta, "queries"),)](
                q, k, v, out, rows, q.stride(0), k.stride(0), v.stride(0), **_strides(Q=q, K=k, V=v), **meta,
            )  # fmt: skip
    return out, rows


@torch.library.custom_op("fastasync::medium_attention", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and m and r [B, heads, 2, N]."""
    check_tensor("q", q, FLOATS, (-1, -1, -1, -1))
    reason = refusal(*q.shape[2:])
    if reason:
        raise ValueError(f"medium_attention {reason}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, (q.dtype,), q.shape, q.device)
        check_unit_stride(name, tensor)
    return forward(q, k, v, FORWARD)


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q), _statistics(q)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; out in memory order B, N, heads, Dh, rows as ``forward`` returns them."""
    batch, heads, tokens, width = q.shape
    dout = unit_stride(dout)
    dq, dk, dv = _empty(q), _empty(q), _empty(q)
    pairs = batch * heads
    if not pairs:
        return dq, dk, dv
    strides = (dout.stride(0), q.stride(0), k.stride(0), v.stride(0))
    delta = partial = None
    for part, tile in _launches(plan):
        meta = _meta(heads, tokens, width, tile)
        if part == "fused":
            programs = min(pairs, tile.each * _multiprocessors(q)) if tile.each else pairs
            padded = triton.cdiv(tokens, meta["QUERIES"]) * meta["QUERIES"]
            size = programs * padded * (meta["HEAD"] + meta["TAIL"]) if meta["KEYS"] < tokens else 0
            partial = q.new_empty(size, dtype=torch.float32)
        else:
            programs = pairs * _parts(meta, "keys" if part in ("keys", "both") else "queries")
        if delta is None:  # the second launch reads what the first one wrote
            delta = q.new_empty(max(pairs, programs) * tokens, dtype=torch.float32)
        with on_device(q):
            _attention_backward_kernel[(programs,)](
                dout, q, k, v, out, rows, delta, delta if partial is None else partial, dq, dk, dv, *strides, pairs,
                **_strides(G=dout, Q=q, K=k, V=v), PART=part, **meta,
            )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("fastasync::medium_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dout, q, k, v, out, rows, BACKWARD)


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


def offline_cases(
    kind: str, heads: int, tokens: int, width: int, forward: Tile | None = None, plan: Plan | None = None
) -> list[OfflineCase]:
    """Builds of a forward and of a backward (its launches in turn), v packed."""
    rows = {f"{name}_{axis}": size for name in "GQK" for axis, size in (("H", width), ("N", heads * width))}
    rows |= {"V_H": width, "V_N": 3 * heads * width}
    cases = []
    strides: tuple[str, ...] = ("q_b", "k_b", "v_b")
    if forward:
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), kind) | {"rows_ptr": "*fp32"}
        signature |= dict.fromkeys(strides, "i32")
        block = {name: size for name, size in rows.items() if name[0] != "G"} | _meta(heads, tokens, width, forward)
        cases.append(OfflineCase(_attention_forward_kernel, signature, block, divisible=strides))
    strides = ("dout_b", *strides)
    for part, tile in _launches(plan) if plan else ():
        signature = dict.fromkeys(("dout_ptr", "q_ptr", "k_ptr", "v_ptr", "out_ptr"), kind)
        signature |= dict.fromkeys(("rows_ptr", "delta_ptr", "partial_ptr"), "*fp32")
        signature |= dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr"), kind) | dict.fromkeys((*strides, "pairs"), "i32")
        block = rows | _meta(heads, tokens, width, tile) | {"PART": part}
        cases.append(OfflineCase(_attention_backward_kernel, signature, block, divisible=(*strides, "pairs")))
    return cases


# XL (16 heads of 72, 256 tokens) in bfloat16; padded rows; columns that are a power of two
_SHAPES = (("*bf16", 16, 256, 72), ("*fp16", 16, 200, 72), ("*bf16", 6, 256, 64))
OFFLINE = [case for shape in _SHAPES for case in offline_cases(*shape, FORWARD, BACKWARD)]
