"""One increment of the sampler with guidance, all representations in one pass.

    x'_k = x_k + dtau_k (v_weak + scale_k (v - v_weak))_k,    without v_weak: x'_k = x_k + dtau_k v_k
    dL/dx = g,    dL/dv = dtau scale g,    dL/dv_weak = dtau (1 - scale) g,
    dL/dscale_k = dtau_k sum g (v - v_weak),    dL/ddtau_k = sum g (v_weak + scale_k (v - v_weak))

Bytes moved per element: read x, v and v_weak, write x'; backward: read g, v and v_weak, write dv and dv_weak.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OfflineCase, bounds, by_representation, ceil_div, check_bundle, check_tensor, on_device

BLOCK, WARPS = 4096, 8


@triton.jit
def _forward(
    x_ptr,
    v_ptr,
    weak_ptr,
    scale_ptr,
    dtau_ptr,
    out_ptr,
    BOUNDS: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    K: tl.constexpr = len(BOUNDS) - 1
    SIZE: tl.constexpr = BOUNDS[K]
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    b = tl.program_id(0) // blocks
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    row = b.to(tl.int64) * SIZE
    x = tl.load(x_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        weak = tl.load(weak_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
        v = weak + by_representation(scale_ptr + b * K, element, BOUNDS) * (v - weak)
    x += by_representation(dtau_ptr + b * K, element, BOUNDS) * v
    tl.store(out_ptr + row + element, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    g_ptr,
    v_ptr,
    weak_ptr,
    scale_ptr,
    dtau_ptr,
    dv_ptr,
    dweak_ptr,
    dscale_ptr,
    ddtau_ptr,
    BOUNDS: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per sample and sums in a fixed order, as in noising.
    K: tl.constexpr = len(BOUNDS) - 1
    b = tl.program_id(0)
    row = b.to(tl.int64) * BOUNDS[K]
    for k in tl.static_range(K):
        dtau = tl.load(dtau_ptr + b * K + k)
        along_dtau = tl.zeros([BLOCK], tl.float32)
        along_scale = tl.zeros([BLOCK], tl.float32)
        for first in range(BOUNDS[k] // 16 * 16, BOUNDS[k + 1], BLOCK):
            element = first + tl.arange(0, BLOCK)
            inside = (element >= BOUNDS[k]) & (element < BOUNDS[k + 1])
            g = tl.load(g_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
            dv = dtau * g
            if GUIDED:
                scale = tl.load(scale_ptr + b * K + k)
                weak = tl.load(weak_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
                difference = v - weak
                along_scale += g * difference
                v = weak + scale * difference
                tl.store(dweak_ptr + row + element, (dv - scale * dv).to(dweak_ptr.dtype.element_ty), mask=inside)
                dv = scale * dv
            tl.store(dv_ptr + row + element, dv.to(dv_ptr.dtype.element_ty), mask=inside)
            along_dtau += g * v
        tl.store(ddtau_ptr + b * K + k, tl.sum(along_dtau))
        if GUIDED:
            tl.store(dscale_ptr + b * K + k, dtau * tl.sum(along_scale))


@torch.library.custom_op("fastasync::guided_update", mutates_args=())
def _update_op(
    x: Tensor, v: Tensor, v_weak: Tensor | None, scale: Tensor | None, dtau: Tensor, channels: Sequence[int]
) -> Tensor:
    batch, _, height, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch:
        limits = bounds(channels, height * width)
        with on_device(x):
            _forward[(batch * ceil_div(limits[-1], BLOCK),)](
                x.contiguous(),
                v.contiguous(),
                None if v_weak is None else v_weak.contiguous(),
                None if scale is None else scale.contiguous(),
                dtau.contiguous(),
                out,
                BOUNDS=limits,
                GUIDED=v_weak is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out


@_update_op.register_fake
def _(x, v, v_weak, scale, dtau, channels):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _new_gradients(v: Tensor, v_weak: Tensor | None, dtau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for dv, dv_weak (empty without it), dscale and ddtau."""
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dweak = dv.new_empty((0,)) if v_weak is None else torch.empty(v_weak.shape, dtype=v_weak.dtype, device=v.device)
    return dv, dweak, torch.zeros(dtau.shape, dtype=dtau.dtype, device=v.device), dtau.new_empty(dtau.shape)


@torch.library.custom_op("fastasync::guided_update_backward", mutates_args=())
def _update_backward_op(
    g: Tensor, v: Tensor, v_weak: Tensor | None, scale: Tensor | None, dtau: Tensor, channels: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = v.shape
    dv, dweak, dscale, ddtau = _new_gradients(v, v_weak, dtau)
    if batch:
        with on_device(v):
            _backward[(batch,)](
                g.contiguous(),
                v.contiguous(),
                None if v_weak is None else v_weak.contiguous(),
                None if scale is None else scale.contiguous(),
                dtau.contiguous(),
                dv,
                dweak,
                dscale,
                ddtau,
                BOUNDS=bounds(channels, height * width),
                GUIDED=v_weak is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return dv, dweak, dscale, ddtau


@_update_backward_op.register_fake
def _(g, v, v_weak, scale, dtau, channels):
    return _new_gradients(v, v_weak, dtau)


def _setup_context(ctx, inputs, output):
    _, v, v_weak, scale, dtau, channels = inputs
    ctx.save_for_backward(v, v_weak, scale, dtau)
    ctx.channels = channels


def _autograd(ctx, g):
    v, v_weak, scale, dtau = ctx.saved_tensors
    dv, dweak, dscale, ddtau = _update_backward_op(g, v, v_weak, scale, dtau, ctx.channels)
    return g, dv, None if v_weak is None else dweak, None if scale is None else dscale, ddtau, None


_update_op.register_autograd(_autograd, setup_context=_setup_context)


def guided_update(
    x: Tensor, v: Tensor, v_weak: Tensor | None, scale: Tensor | None, dtau: Tensor, channels: Sequence[int]
) -> Tensor:
    """``x_k + dtau_k (v_weak + scale_k (v - v_weak))_k`` in x's dtype; without ``v_weak``, ``x_k + dtau_k v_k``.

    x, v, v_weak [B, C, H, W] float32, float16 or bfloat16, each its own (copied if not contiguous); scale and dtau
    [B, K] float32.  Differentiable once in all of them.  Raises TypeError for a dtype and ValueError for a shape, a
    device or a missing scale, before any launch.
    """
    check_bundle("x", x, channels)
    for name, velocity in (("v", v), ("v_weak", v_weak)):
        if velocity is not None:
            check_bundle(name, velocity, channels, x.device)
            if velocity.shape != x.shape:
                raise ValueError(f"{name} {list(velocity.shape)} and x {list(x.shape)} must have the same shape")
    for name, values in (("dtau", dtau), ("scale", scale if v_weak is not None else dtau)):
        if values is None:
            raise ValueError("v_weak needs a scale [B, K]")
        check_tensor(name, values, (torch.float32,), (x.shape[0], len(channels)), x.device)
    return _update_op(x, v, v_weak, None if v_weak is None else scale, dtau, list(channels))


def _case(kernel, names: dict[str, str], guided: bool) -> OfflineCase:
    sizes = {"BOUNDS": (0, 8192, 12288), "GUIDED": guided, "BLOCK": BLOCK}
    return OfflineCase(kernel, {f"{name}_ptr": type_ for name, type_ in names.items()}, sizes, WARPS)


_VALUES = {"scale": "*fp32", "dtau": "*fp32"}
OFFLINE = [
    _case(_forward, {"x": x, "v": v, "weak": v, "out": x, **_VALUES}, guided)
    for x, v, guided in (("*fp32", "*fp32", True), ("*fp32", "*bf16", True), ("*bf16", "*bf16", False))
] + [
    _case(
        _backward,
        {"g": "*fp32", "v": v, "weak": v, "dv": v, "dweak": v, "dscale": "*fp32", "ddtau": "*fp32", **_VALUES},
        guided,
    )
    for v, guided in (("*fp32", True), ("*bf16", False))
]
