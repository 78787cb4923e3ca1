"""Noised state of all representations in one launch, with the noise drawn in the kernel.

    x_k = (1 - tau_k) eps_k + tau_k z_k
    dL/dtau_k = sum over representation k of dL/dx (z - eps),    dL/dz = tau_k dL/dx

eps is the noise of reference.philox_normal, stream 0: drawn again in the backward pass, so nothing is stored but the
inputs.  Bytes moved per element: read z, write x; backward: read dx and z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    FLOATS,
    OfflineCase,
    bounds,
    by_representation,
    ceil_div,
    check_bundle,
    check_noise_key,
    check_tensor,
    normals,
    normals_by_eight,
    on_device,
    signed64,
    split_step,
)

BLOCK, WARPS = 4096, 8


@triton.jit(do_not_specialize=["seed", "step"])
def _forward(
    z_ptr,
    tau_ptr,
    samples_ptr,
    x_ptr,
    seed,
    step,
    BOUNDS: tl.constexpr,
    STEP_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    K: tl.constexpr = len(BOUNDS) - 1
    SIZE: tl.constexpr = BOUNDS[K]
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    b = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    if STEP_TENSOR:
        step = tl.load(step)
    row = b.to(tl.int64) * SIZE
    element = first + tl.arange(0, BLOCK)
    inside = element < SIZE
    z = tl.load(z_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
    sample = tl.load(samples_ptr + b)
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        eps = normals_by_eight(seed, step, sample, first // 8 + tl.arange(0, BLOCK // 8), 0)
    else:
        eps = normals(seed, step, sample, first // 4 + tl.arange(0, BLOCK // 4), 0)
    tau = by_representation(tau_ptr + b * K, element, BOUNDS)
    x = (1.0 - tau) * eps + tau * z
    tl.store(x_ptr + row + element, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "step"])
def _backward(
    dx_ptr,
    z_ptr,
    tau_ptr,
    samples_ptr,
    dtau_ptr,
    dz_ptr,
    seed,
    step,
    BOUNDS: tl.constexpr,
    STEP_TENSOR: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per sample and one sum per representation in a fixed order: repeatable, no second stage.
    K: tl.constexpr = len(BOUNDS) - 1
    b = tl.program_id(0)
    sample = tl.load(samples_ptr + b)
    if STEP_TENSOR:
        step = tl.load(step)
    row = b.to(tl.int64) * BOUNDS[K]
    for k in tl.static_range(K):
        total = tl.zeros([BLOCK], tl.float32)
        tau = tl.load(tau_ptr + b * K + k)
        # blocks start at a multiple of 16 elements: whole counter blocks and aligned loads
        for first in range(BOUNDS[k] // 16 * 16, BOUNDS[k + 1], BLOCK):
            element = first + tl.arange(0, BLOCK)
            inside = (element >= BOUNDS[k]) & (element < BOUNDS[k + 1])
            dx = tl.load(dx_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
            z = tl.load(z_ptr + row + element, mask=inside, other=0.0).to(tl.float32)
            if dx_ptr.dtype.element_ty.primitive_bitwidth == 16:
                eps = normals_by_eight(seed, step, sample, first // 8 + tl.arange(0, BLOCK // 8), 0)
            else:
                eps = normals(seed, step, sample, first // 4 + tl.arange(0, BLOCK // 4), 0)
            total += dx * (z - eps)
            if WRITE_DZ:
                tl.store(dz_ptr + row + element, (tau * dx).to(dz_ptr.dtype.element_ty), mask=inside)
        tl.store(dtau_ptr + b * K + k, tl.sum(total))


@torch.library.custom_op("fastasync::noising", mutates_args=())
def _noising_op(
    z: Tensor,
    tau: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    samples: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    batch, _, height, width = z.shape
    x = torch.empty(z.shape, dtype=dtype, device=z.device)
    if batch:
        limits = bounds(channels, height * width)
        with on_device(z):
            _forward[(batch * ceil_div(limits[-1], BLOCK),)](
                z.contiguous(),
                tau.contiguous(),
                samples.contiguous(),
                x,
                seed,
                step if step_tensor is None else step_tensor,
                BOUNDS=limits,
                STEP_TENSOR=step_tensor is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return x


@_noising_op.register_fake
def _(z, tau, channels, seed, step, step_tensor, samples, dtype):
    return torch.empty(z.shape, dtype=dtype, device=z.device)


@torch.library.custom_op("fastasync::noising_backward", mutates_args=())
def _noising_backward_op(
    dx: Tensor,
    z: Tensor,
    tau: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    samples: Tensor,
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = z.shape
    dtau = torch.empty(tau.shape, dtype=torch.float32, device=z.device)
    dz = torch.empty(z.shape if need_dz else (0,), dtype=z.dtype, device=z.device)
    if batch:
        with on_device(z):
            _backward[(batch,)](
                dx.contiguous(),
                z.contiguous(),
                tau.contiguous(),
                samples.contiguous(),
                dtau,
                dz,
                seed,
                step if step_tensor is None else step_tensor,
                BOUNDS=bounds(channels, height * width),
                STEP_TENSOR=step_tensor is not None,
                WRITE_DZ=need_dz,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return dtau, dz


@_noising_backward_op.register_fake
def _(dx, z, tau, channels, seed, step, step_tensor, samples, need_dz):
    dz = torch.empty(z.shape if need_dz else (0,), dtype=z.dtype, device=z.device)
    return torch.empty(tau.shape, dtype=torch.float32, device=z.device), dz


def _setup_context(ctx, inputs, output):
    z, tau, channels, seed, step, step_tensor, samples, _ = inputs
    ctx.save_for_backward(z, tau, step_tensor, samples)
    ctx.key = (channels, seed, step)


def _autograd(ctx, dx):
    z, tau, step_tensor, samples = ctx.saved_tensors
    channels, seed, step = ctx.key
    need_dz = ctx.needs_input_grad[0]
    dtau, dz = _noising_backward_op(dx, z, tau, channels, seed, step, step_tensor, samples, need_dz)
    return dz if need_dz else None, dtau, None, None, None, None, None, None


_noising_op.register_autograd(_autograd, setup_context=_setup_context)


def noising(
    z: Tensor,
    tau: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noised state ``x_k = (1 - tau_k) eps_k + tau_k z_k`` [B, C, H, W] in ``dtype`` (default: z's).

    z [B, C, H, W] float32, float16 or bfloat16 (copied if not contiguous); tau [B, K] float32 in [0, 1]; samples [B]
    integer; ``step`` an int or a one-element int64 tensor on the device (for CUDA graphs).  Differentiable once, in tau
    and z.  Raises TypeError for a dtype and ValueError for a shape or device that does not fit, before any launch.
    """
    check_bundle("z", z, channels)
    check_tensor("tau", tau, (torch.float32,), (z.shape[0], len(channels)), z.device)
    check_noise_key(step, samples, z.shape[0], z.device)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, not {dtype}")
    value, tensor = split_step(step)
    return _noising_op(z, tau, list(channels), signed64(seed), value, tensor, samples, dtype or z.dtype)


_XL = {"BOUNDS": (0, 8192, 12288), "BLOCK": BLOCK}
_KEY = {"seed": "i64", "step": "i64"}
OFFLINE = [
    OfflineCase(
        _forward,
        {"z_ptr": z, "tau_ptr": "*fp32", "samples_ptr": "*i64", "x_ptr": x, **_KEY},
        {**_XL, "STEP_TENSOR": False},
        WARPS,
    )
    for z, x in (("*bf16", "*bf16"), ("*fp32", "*bf16"), ("*fp32", "*fp32"))
] + [
    OfflineCase(
        _backward,
        {
            "dx_ptr": "*bf16",
            "z_ptr": z,
            "tau_ptr": "*fp32",
            "samples_ptr": "*i64",
            "dtau_ptr": "*fp32",
            "dz_ptr": z,
            "seed": "i64",
            "step": "*i64",
        },
        {**_XL, "STEP_TENSOR": True, "WRITE_DZ": write},
        WARPS,
    )
    for z, write in (("*bf16", False), ("*fp32", True))
]
