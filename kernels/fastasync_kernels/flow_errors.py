"""Squared and cosine errors of the velocity and their gradient, with the noise drawn again in the kernel.

    u = z - eps,   errors_k = ||v_k - u_k||^2 / d_k,   cosines = mean over positions of 1 - cos(v, u) over all channels
    dL/dv_k = 2 g_k (v_k - u_k) / d_k  -  g_cos / (H W) (u / (|v| |u|) - cos v / |v|^2)

One kernel, one program per sample: it walks tiles of [channels of one representation, positions], so that every sum has
a fixed order (repeatable, no atomics, no second stage) and the channel sums of the cosine stay inside the program.
``flow_errors`` runs it for the errors and, in the backward pass, for dL/dv.  ``corrected_loss`` knows the weights
beforehand and runs it once for both, which saves a read of v and z and one drawing of the noise.
Bytes moved per element: errors read v and z; gradients read v and z (L2's second time with the cosine), write dv.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    OfflineCase,
    bounds,
    ceil_div,
    check_bundle,
    check_noise_key,
    check_tensor,
    normals,
    normals_at,
    normals_by_eight,
    on_device,
    power_of_two,
    signed64,
    split_step,
)

TILE, WARPS = 4096, 8
COSINE_TILE = 2048  # three more sums an element: at 4,096 one program fits on a multiprocessor, and waits for memory
SCALE_PROGRAMS = 1024  # few: at the usual factor of one, their start is all that the scaling costs
COSINE_EPS = tl.constexpr(1e-8)  # torch's cosine_similarity: each norm is at least this


@triton.jit
def _tile(
    v_ptr,
    z_ptr,
    seed,
    step,
    sample,
    channel,
    end,
    position,
    HW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """v, u = z - eps (both 0 outside), offsets and mask of channels [channel, end) and positions from ``position``."""
    c = channel + tl.arange(0, ROWS)[:, None]
    p = position + tl.arange(0, COLUMNS)[None, :]
    element = c * HW + p
    inside = (c < end) & (p < HW)
    v = tl.load(v_ptr + element, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + element, mask=inside, other=0.0).to(tl.float32)
    if HW % 8 == 0 and COLUMNS % 8 == 0 and v_ptr.dtype.element_ty.primitive_bitwidth == 16:
        pair = c * (HW // 8) + position // 8 + tl.arange(0, COLUMNS // 8)[None, :]
        eps = normals_by_eight(seed, step, sample, pair, 0)
    elif HW % 4 == 0:
        block = c * (HW // 4) + position // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        eps = normals(seed, step, sample, block, 0)
    else:  # a counter block of four elements may cross from one channel to the next
        eps = normals_at(seed, step, sample, element, 0)
    return v, tl.where(inside, z - eps, 0.0), element, inside


@triton.jit(do_not_specialize=["seed", "step"])
def _kernel(
    v_ptr,
    z_ptr,
    samples_ptr,
    weight_ptr,  # [B, K]: the errors' upstream gradients or weights, times weight_scale (GRADIENT)
    cosine_ptr,  # [B]: the cosines' upstream gradients (GRADIENT and COSINE, unless COSINE_UNIFORM)
    errors_ptr,
    cosines_ptr,
    dv_ptr,
    seed,
    step,
    weight_scale,
    cosine_scale,
    STARTS: tl.constexpr,  # first channel of each representation, and C
    HW: tl.constexpr,
    STEP_TENSOR: tl.constexpr,
    ERRORS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COSINE: tl.constexpr,
    COSINE_UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two >= K
):
    K: tl.constexpr = len(STARTS) - 1
    b = tl.program_id(0)
    sample = tl.load(samples_ptr + b)
    if STEP_TENSOR:
        step = tl.load(step)
    row = b.to(tl.int64) * (STARTS[K] * HW)
    v_ptr += row
    z_ptr += row
    if GRADIENT:
        dv_ptr += row
    slots = tl.arange(0, SLOTS)
    errors = tl.zeros([SLOTS], tl.float32)
    cosines = tl.zeros([COLUMNS], tl.float32)
    for position in range(0, HW, COLUMNS):
        if COSINE:
            dots = tl.zeros([ROWS, COLUMNS], tl.float32)
            vv = tl.zeros([ROWS, COLUMNS], tl.float32)
            uu = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.static_range(K):
            count = STARTS[k + 1] - STARTS[k]
            squares = tl.zeros([ROWS, COLUMNS], tl.float32)
            if GRADIENT:
                slope = tl.load(weight_ptr + b * K + k) * weight_scale * (2.0 / (count * HW))
            for channel in range(STARTS[k], STARTS[k + 1], ROWS):
                v, u, element, inside = _tile(
                    v_ptr, z_ptr, seed, step, sample, channel, STARTS[k + 1], position, HW, ROWS, COLUMNS
                )
                d = v - u
                if ERRORS:
                    squares += d * d
                if COSINE:
                    dots += v * u
                    vv += v * v
                    uu += u * u
                elif GRADIENT:
                    tl.store(dv_ptr + element, (slope * d).to(dv_ptr.dtype.element_ty), mask=inside)
            if ERRORS:
                errors += tl.where(slots == k, tl.sum(squares) / (count * HW), 0.0)
        if COSINE:
            v_inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(vv, 0)), COSINE_EPS)
            u_inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(uu, 0)), COSINE_EPS)
            cosine = tl.sum(dots, 0) * v_inverse * u_inverse
            cosines += tl.where(position + tl.arange(0, COLUMNS) < HW, 1.0 - cosine, 0.0)
            if GRADIENT:
                slope_cosine = cosine_scale / HW
                if not COSINE_UNIFORM:
                    slope_cosine *= tl.load(cosine_ptr + b)
                along_u = (slope_cosine * v_inverse * u_inverse)[None, :]
                along_v = (slope_cosine * cosine * v_inverse * v_inverse)[None, :]
                for k in tl.static_range(K):
                    count = STARTS[k + 1] - STARTS[k]
                    slope = tl.load(weight_ptr + b * K + k) * weight_scale * (2.0 / (count * HW))
                    for channel in range(STARTS[k], STARTS[k + 1], ROWS):
                        v, u, element, inside = _tile(
                            v_ptr, z_ptr, seed, step, sample, channel, STARTS[k + 1], position, HW, ROWS, COLUMNS
                        )
                        dv = slope * (v - u) + along_v * v - along_u * u
                        tl.store(dv_ptr + element, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    if ERRORS:
        tl.store(errors_ptr + b * K + slots, errors, mask=slots < K)
        tl.store(cosines_ptr + b, tl.sum(cosines) / HW)


@triton.jit
def _total(
    errors_ptr,
    weight_ptr,
    cosines_ptr,
    loss_ptr,
    batch,
    K: tl.constexpr,
    cosine_weight,
    COSINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss = (sum of weight * errors + cosine_weight * sum of cosines) / batch: one program, fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, batch * K, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < batch * K
        total += tl.load(errors_ptr + i, mask=inside, other=0.0) * tl.load(weight_ptr + i, mask=inside, other=0.0)
    if COSINE:
        for first in range(0, batch, BLOCK):
            i = first + tl.arange(0, BLOCK)
            total += cosine_weight * tl.load(cosines_ptr + i, mask=i < batch, other=0.0)
    tl.store(loss_ptr, tl.sum(total) / batch)


@triton.jit
def _scale(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x *= factor in place; nothing is read or written when the factor is one, as it is in a plain loss.backward()."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, stride):
            i = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < size).to(tl.float32)
            tl.store(x_ptr + i, (x * factor).to(x_ptr.dtype.element_ty), mask=i < size)


@functools.lru_cache(maxsize=256)
def _tiling(channels: tuple[int, ...], positions: int, tile: int) -> tuple[int, int]:
    """(rows, columns) of the tile that walks a sample in the least padded work; tiles below 1,024 count as 1,024."""

    def cost(rows: int, columns: int) -> tuple[int, int]:
        tiles = sum(ceil_div(count, rows) for count in channels) * ceil_div(positions, columns)
        return tiles * max(rows * columns, min(tile, 1024)), tiles

    sides = [2**i for i in range(13)]
    fitting = [
        (rows, columns)
        for columns in sides[2:]
        for rows in sides
        if rows * columns <= tile and rows <= power_of_two(max(channels)) and columns <= max(4, power_of_two(positions))
    ]
    return min(fitting, key=lambda sizes: (*cost(*sizes), -sizes[1]))


def _launch(
    v: Tensor,
    z: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    samples: Tensor,
    *,
    cosine: bool,
    errors: Tensor | None = None,
    cosines: Tensor | None = None,
    weight: Tensor | None = None,
    weight_scale: float = 1.0,
    cosine_weight: Tensor | None = None,
    cosine_scale: float = 1.0,
    dv: Tensor | None = None,
) -> None:
    """One launch of the kernel: for the errors (with ``errors``), for the gradient (with ``dv``), or for both."""
    batch, _, height, width = v.shape
    if not batch:
        return
    rows, columns = _tiling(tuple(channels), height * width, COSINE_TILE if cosine else TILE)
    with on_device(v):
        _kernel[(batch,)](
            v.contiguous(),
            z.contiguous(),
            samples.contiguous(),
            weight,
            cosine_weight,
            errors,
            cosines,
            dv,
            seed,
            step if step_tensor is None else step_tensor,
            weight_scale,
            cosine_scale,
            STARTS=bounds(channels, 1),
            HW=height * width,
            STEP_TENSOR=step_tensor is not None,
            ERRORS=errors is not None,
            GRADIENT=dv is not None,
            COSINE=cosine,
            COSINE_UNIFORM=cosine_weight is None,
            ROWS=rows,
            COLUMNS=columns,
            SLOTS=power_of_two(len(channels)),
            num_warps=WARPS,
            **_options(dv is not None, cosine, len(channels) == 2 and v.dtype == z.dtype),
        )


def _options(gradient: bool, cosine: bool, usual: bool) -> dict[str, int]:
    """Without a limit the cosine's gradient takes up to 128 registers: two programs on a multiprocessor.  ``usual``:
    two representations, one dtype; they fit into 80 without spills, for three programs, and all others into 96."""
    return {"maxnreg": 80 if usual else 96} if gradient and cosine else {}


def _new_errors(v: Tensor, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch = v.shape[0]
    errors = torch.empty((batch, len(channels)), dtype=torch.float32, device=v.device)
    return errors, torch.empty((batch,), dtype=torch.float32, device=v.device)


# --- flow_errors -------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastasync::flow_errors", mutates_args=())
def _errors_op(
    v: Tensor,
    z: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    samples: Tensor,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    errors, cosines = _new_errors(v, channels)
    _launch(v, z, channels, seed, step, step_tensor, samples, cosine=cosine, errors=errors, cosines=cosines)
    return errors, cosines


@_errors_op.register_fake
def _(v, z, channels, seed, step, step_tensor, samples, cosine):
    return _new_errors(v, channels)


@torch.library.custom_op("fastasync::flow_errors_backward", mutates_args=())
def _errors_backward_op(
    derrors: Tensor,
    dcosines: Tensor | None,
    v: Tensor,
    z: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    samples: Tensor,
) -> Tensor:
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _launch(
        v,
        z,
        channels,
        seed,
        step,
        step_tensor,
        samples,
        cosine=dcosines is not None,
        weight=derrors.contiguous(),
        cosine_weight=None if dcosines is None else dcosines.contiguous(),
        dv=dv,
    )
    return dv


@_errors_backward_op.register_fake
def _(derrors, dcosines, v, z, channels, seed, step, step_tensor, samples):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _errors_context(ctx, inputs, output):
    v, z, channels, seed, step, step_tensor, samples, cosine = inputs
    ctx.save_for_backward(v, z, step_tensor, samples)
    ctx.key = (channels, seed, step)
    ctx.cosine = cosine
    ctx.set_materialize_grads(False)


def _errors_autograd(ctx, derrors, dcosines):
    v, z, step_tensor, samples = ctx.saved_tensors
    channels, seed, step = ctx.key
    if derrors is None:
        derrors = torch.zeros((v.shape[0], len(channels)), dtype=torch.float32, device=v.device)
    dcosines = dcosines if ctx.cosine else None
    dv = _errors_backward_op(derrors, dcosines, v, z, channels, seed, step, step_tensor, samples)
    return dv, None, None, None, None, None, None, None


_errors_op.register_autograd(_errors_autograd, setup_context=_errors_context)


def _check(v: Tensor, z: Tensor, channels: Sequence[int], step: int | Tensor, samples: Tensor) -> None:
    check_bundle("v", v, channels)
    check_bundle("z", z, channels, v.device)
    if v.shape != z.shape:
        raise ValueError(f"v {list(v.shape)} and z {list(z.shape)} must have the same shape")
    if z.requires_grad:
        raise ValueError(
            "z is the data of the target and takes no gradient here; detach it, or choose kernels=reference"
        )
    check_noise_key(step, samples, v.shape[0], v.device)


def flow_errors(
    v: Tensor,
    z: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    """``errors`` [B, K], ``||v_k - u_k||^2 / d_k``, and ``cosines`` [B], the mean over positions of ``1 - cos(v, u)``.

    v, z [B, C, H, W] float32, float16 or bfloat16 (copied if not contiguous); samples [B] integer; ``step`` an int or a
    one-element int64 tensor on the device.  Both results float32, differentiable once in v; the cosines are zeros
    unless ``cosine``.  Raises TypeError for a dtype and ValueError for a shape or device, before any launch.
    """
    _check(v, z, channels, step, samples)
    value, tensor = split_step(step)
    return _errors_op(v, z, list(channels), signed64(seed), value, tensor, samples, cosine)


# --- corrected_loss ----------------------------------------------------------------------------------------------


@torch.library.custom_op("fastasync::corrected_loss", mutates_args=())
def _loss_op(
    v: Tensor,
    z: Tensor,
    weight: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    samples: Tensor,
    cosine_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, errors, cosines, dloss/dv); the last is empty unless ``gradient``."""
    batch, cosine = v.shape[0], cosine_weight != 0
    errors, cosines = _new_errors(v, channels)
    dv = torch.empty(v.shape if gradient else (0,), dtype=v.dtype, device=v.device)
    if not batch:
        return torch.zeros((), dtype=torch.float32, device=v.device), errors, cosines, dv
    weight = weight.contiguous()
    _launch(
        v,
        z,
        channels,
        seed,
        step,
        step_tensor,
        samples,
        cosine=cosine,
        errors=errors,
        cosines=cosines,
        weight=weight,
        weight_scale=1.0 / batch,
        cosine_scale=cosine_weight / batch,
        dv=dv if gradient else None,
    )
    loss = torch.empty((), dtype=torch.float32, device=v.device)
    with on_device(v):
        _total[(1,)](errors, weight, cosines, loss, batch, len(channels), cosine_weight, COSINE=cosine, BLOCK=1024)
    return loss, errors, cosines, dv


@_loss_op.register_fake
def _(v, z, weight, channels, seed, step, step_tensor, samples, cosine_weight, gradient):
    errors, cosines = _new_errors(v, channels)
    dv = torch.empty(v.shape if gradient else (0,), dtype=v.dtype, device=v.device)
    return torch.empty((), dtype=torch.float32, device=v.device), errors, cosines, dv


@torch.library.custom_op("fastasync::scale_", mutates_args=("x",))
def _scale_op(x: Tensor, factor: Tensor) -> None:
    if x.numel():
        with on_device(x):
            programs = min(ceil_div(x.numel(), TILE), SCALE_PROGRAMS)
            _scale[(programs,)](x, factor, x.numel(), BLOCK=TILE, num_warps=WARPS)


@_scale_op.register_fake
def _(x, factor):
    return None


def _loss_context(ctx, inputs, output):
    _, errors, cosines, dv = output
    ctx.save_for_backward(errors, dv)
    ctx.mark_non_differentiable(errors, cosines, dv)
    ctx.set_materialize_grads(False)


def _loss_autograd(ctx, dloss, *_):
    errors, dv = ctx.saved_tensors  # raises in a second backward pass over one graph: dv is scaled in place
    need_v, _, need_weight = ctx.needs_input_grad[:3]
    dweight = errors * (dloss / max(errors.shape[0], 1)) if need_weight else None
    if need_v:
        _scale_op(dv, dloss)
    return dv if need_v else None, None, dweight, None, None, None, None, None, None, None


_loss_op.register_autograd(_loss_autograd, setup_context=_loss_context)


def corrected_loss(
    v: Tensor,
    z: Tensor,
    weight: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    cosine_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scalar ``loss = mean_b (sum_k weight_bk errors_bk + cosine_weight cosines_b)``, errors [B, K] and cosines [B].

    Arguments and exceptions as in ``flow_errors``; weight [B, K] float32.  The loss is float32, differentiable once in
    v and weight, and backward runs once: dL/dv is computed with the loss and handed over in place.  errors and cosines
    carry no gradient; the cosines are zeros when ``cosine_weight`` is zero.
    """
    _check(v, z, channels, step, samples)
    check_tensor("weight", weight, (torch.float32,), (v.shape[0], len(channels)), v.device)
    gradient = torch.is_grad_enabled() and v.requires_grad
    value, tensor = split_step(step)
    key = (list(channels), signed64(seed), value, tensor, samples)
    loss, errors, cosines, _ = _loss_op(v, z, weight, *key, float(cosine_weight), gradient)
    return loss, errors, cosines


def _case(
    types: str,
    errors: bool,
    gradient: bool,
    cosine: bool,
    uniform: bool,
    step: str = "i64",
    starts: tuple[int, ...] = (0, 32, 48),
) -> OfflineCase:
    signature = dict.fromkeys(("weight_ptr", "cosine_ptr", "errors_ptr", "cosines_ptr"), "*fp32")
    signature |= {"v_ptr": types, "z_ptr": types, "dv_ptr": types, "samples_ptr": "*i64", "seed": "i64", "step": step}
    signature |= {"weight_scale": "fp32", "cosine_scale": "fp32"}
    flags = {"ERRORS": errors, "GRADIENT": gradient, "COSINE": cosine, "COSINE_UNIFORM": uniform}
    sizes = {
        "STARTS": starts,
        "HW": 256,
        "ROWS": 8 if cosine else 16,
        "COLUMNS": 256,
        "SLOTS": 2 ** (len(starts) - 2).bit_length(),
    }
    flags |= {"STEP_TENSOR": step == "*i64"}
    return OfflineCase(_kernel, signature, {**sizes, **flags, **_options(gradient, cosine, len(starts) == 3)}, WARPS)


OFFLINE = [
    _case("*fp32", True, False, False, True),
    _case("*fp32", False, True, False, True),
    _case("*fp32", True, True, False, True),
    _case("*bf16", True, True, False, True, "*i64"),
    _case("*fp32", True, False, True, True),
    _case("*fp32", False, True, True, False),
    _case("*bf16", True, True, True, True),
    _case("*fp32", True, True, True, True, "*i64", (0, 16, 32, 48)),
    OfflineCase(
        _total,
        {**dict.fromkeys(("errors_ptr", "weight_ptr", "cosines_ptr", "loss_ptr"), "*fp32"), "batch": "i32"}
        | {"cosine_weight": "fp32"},
        {"K": 2, "COSINE": True, "BLOCK": 1024},
    ),
    OfflineCase(_scale, {"x_ptr": "*fp32", "factor_ptr": "*fp32", "size": "i32"}, {"BLOCK": TILE}, WARPS, ("size",)),
]
