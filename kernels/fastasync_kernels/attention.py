"""Attention without a mask, ``softmax(q k^T / sqrt(Dh)) v``, by whichever backend is fastest here.

| name | what |
|---|---|
| ``cudnn`` | cuDNN's fused attention, through ``torch.nn.attention.sdpa_kernel`` |
| ``fa4`` | FlashAttention-4 (package flash-attn-4, module ``flash_attn.cute``) |
| ``fa3`` | FlashAttention-3 (module ``flash_attn_interface``) |
| ``fa2`` | FlashAttention-2 (package flash-attn) |
| ``sdpa`` | ``scaled_dot_product_attention`` with torch's own choice |
| ``efficient`` | its memory-efficient backend |
| ``triton`` | ``short_attention.py`` for at most 128 tokens, ``medium_attention.py`` for at most 256 |
| ``mixed`` | cuDNN's forward, the backward of ``medium_attention.py``: at most 256 tokens |
| ``reference`` | the formula in float32 (float64 for float64): for tests, needs the memory of all scores |

Every backend takes q, k, v of shape [B, heads, N, Dh] in any memory order with a contiguous last axis, so neither the
output of ``qknorm_rope`` nor its view of v is copied on the way in.

``auto`` is a measurement, which cannot happen while torch.compile traces: call ``resolve_backend`` once, before
compiling, and keep the concrete name.  It also compares what other packages compute with the formula: their kernels
come in versions that are wrong for some head dimensions on some devices, in the gradients only too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler at once: 2 s
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._timing import recorded_milliseconds

BACKENDS = ("cudnn", "fa4", "fa3", "fa2", "sdpa", "efficient", "triton", "mixed", "reference")
_PACKAGES = ("fa4", "fa3", "fa2")  # of others: never taken unchecked
_HALF = (torch.float16, torch.bfloat16)
_OFF_HALF, _OFF = 0.02, 1e-3  # further than this from the formula a backend is wrong; rounding is a tenth of it
_log = logging.getLogger(__name__)
_choices: dict[tuple[Any, ...], str] = {}
_faults: dict[tuple[Any, ...], str] = {}


class BackendUnavailable(ValueError):
    """The attention backend asked for does not exist, cannot run here or is wrong here; the message names others."""


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # autocast would take the products back to half precision
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 and -3: [B, N, heads, Dh] in and out.  Some versions of 3 return (out, log-sum-exp)."""
    out = importlib.import_module(module).flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


# FlashAttention-4 hands data pointers to a just-in-time compiler, so torch.compile cannot trace its own autograd
# function; its forward and backward entry points are therefore operators of ours.


@torch.library.custom_op("fastasync::fa4", mutates_args=())
def _fa4_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, heads, Dh] -> the same, and the log-sum-exp [B, heads, N] in float32."""
    forward = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd
    out, lse = forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False, return_lse=True)[:2]
    return out, lse


@_fa4_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("fastasync::fa4_backward", mutates_args=())
def _fa4_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backward = importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5
    backward(q, k, v, out, dout.contiguous(), lse, softmax_scale=scale, causal=False, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@_fa4_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fa4_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _fa4_gradient(ctx, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _fa4_backward_op(dout, *ctx.saved_tensors)


_fa4_op.register_autograd(_fa4_gradient, setup_context=_fa4_setup)


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fa4_op(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from . import medium_attention, short_attention  # here: the other backends do not need Triton

    if q.shape[2] <= short_attention.LONGEST:
        return short_attention.short_attention(q, k, v)
    return medium_attention.medium_attention(q, k, v)


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from . import medium_attention

    return medium_attention.mixed_attention(q, k, v)


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cudnn": _cudnn,
    "fa4": _fa4,
    "fa3": functools.partial(_flash, "flash_attn_interface"),
    "fa2": functools.partial(_flash, "flash_attn"),
    "sdpa": _sdpa,
    "efficient": _efficient,
    "triton": _triton,
    "mixed": _mixed,
    "reference": _reference,
}


@functools.cache
def _missing(backend: str) -> str:
    """Why the package of a FlashAttention backend cannot be used, or an empty string.  Imports it."""
    module = {"fa4": "flash_attn.cute.interface", "fa3": "flash_attn_interface", "fa2": "flash_attn"}[backend]
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a broken build raises anything from ImportError to OSError or an assertion
        return (
            f"{module} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    wanted = {
        "_flash_attn_fwd": ("softmax_scale", "causal", "return_lse"),
        "_flash_attn_bwd": ("softmax_scale", "causal", "dq", "dk", "dv"),
    }
    for function, parameters in (wanted if backend == "fa4" else {"flash_attn_func": ()}).items():
        found = getattr(loaded, function, None)
        if found is None or not set(parameters) <= set(inspect.signature(found).parameters):
            return f"{module} has no {function} of the form this code calls; another version is installed"
    return ""


def _triton_reason(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> str:
    """Why the kernels of short_attention and medium_attention cannot run here, or an empty string.  Imports them."""
    try:
        from . import _common, medium_attention
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    interpreted = device.type == "cpu" and _common.INTERPRET
    if not interpreted and (device.type != "cuda" or not torch.cuda.is_available()):
        return f"needs a CUDA device, not {device}"
    # compiled, float32's products are for tests: they use no matrix unit, and big ones do not fit
    if dtype not in _HALF and not (interpreted and dtype == torch.float32):
        return f"needs float16 or bfloat16, not {dtype}"
    if not interpreted and torch.cuda.get_device_capability(device)[0] < 8:
        return f"needs compute capability 8.0, not {torch.cuda.get_device_capability(device)[0]}.x"
    return medium_attention.refusal(tokens, head_dim)


def _reason(backend: str, device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> str:
    """Why ``backend`` cannot run here, or an empty string."""
    if backend in ("sdpa", "reference"):
        return ""
    if backend == "triton":
        return _triton_reason(device, dtype, tokens, head_dim)
    if backend == "mixed":
        own = _triton_reason(device, dtype, tokens, head_dim)
        return own or _reason("cudnn", device, dtype, tokens, head_dim)
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs a CUDA device, not {device}"
    major = torch.cuda.get_device_capability(device)[0]
    if backend == "efficient":
        return "" if dtype in (*_HALF, torch.float32) else f"does not take {dtype}"
    if dtype not in _HALF:
        return f"needs float16 or bfloat16, not {dtype}"
    if head_dim % 8:
        return f"needs a head dimension that is a multiple of 8, not {head_dim}"
    largest = 128 if backend == "cudnn" or (backend == "fa4" and major != 9) else 256
    if head_dim > largest:
        return f"needs a head dimension of at most {largest}, not {head_dim}"
    if backend == "cudnn":
        if not torch.backends.cudnn.is_available():
            return "this build of torch has no cuDNN"
        return "" if major >= 8 else f"needs compute capability 8.0, not {major}.x"
    if (backend == "fa4" and major < 9) or (backend == "fa3" and major != 9) or major < 8:
        return f"does not run on compute capability {major}.x"
    return _missing(backend)


def available_backends(device: torch.device | str, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, str]:
    """Every backend -> why it cannot take q, k, v of this device, dtype and shape [B, heads, N, Dh]; "" if it can."""
    return {backend: _reason(backend, torch.device(device), dtype, *shape[-2:]) for backend in BACKENDS}


def _milliseconds(backend: str, q: Tensor, k: Tensor, v: Tensor, gradient: bool) -> float:
    """Forward, or forward and backward."""

    def run() -> None:
        with torch.enable_grad() if gradient else torch.no_grad():
            out = _RUN[backend](q, k, v)
            if gradient:
                torch.autograd.grad(out, (q, k, v), out.detach())

    return recorded_milliseconds({backend: run})[backend]


def _draw(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], gradient: bool) -> list[Tensor]:
    """q, k, v laid out as the model's: packed in memory order B, N, 3, heads, Dh, then q and k in their own."""
    batch, heads, tokens, width = shape
    generator = torch.Generator(device).manual_seed(0)  # a check must not move the draws of what runs after it
    qkv = torch.randn(batch, tokens, 3, heads, width, device=device, dtype=dtype, generator=generator)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    q, k = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k))
    return [part.detach().requires_grad_(gradient) for part in (q, k, v)]


def _error(backend: str, tensors: list[Tensor], gradient: bool) -> float:
    """Largest relative distance (L2) of the output, and of the gradients, from the formula's."""
    results = []
    for name in (backend, "reference"):
        with torch.enable_grad() if gradient else torch.no_grad():
            out = _RUN[name](*tensors)
            results.append([out, *(torch.autograd.grad(out, tensors, tensors[2].detach()) if gradient else ())])
    pairs = [(found.detach().float(), exact.detach().float()) for found, exact in zip(*results, strict=True)]
    distances = [(found - exact).norm() / exact.norm().clamp(min=1e-30) for found, exact in pairs]
    return float(torch.stack(distances).max())  # NaN where one is: Python's max would pass over it


def _fault(backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], gradient: bool) -> str:
    """How far ``backend`` is off on two samples of ``shape``, or its error; an empty string where it is right.

    Found once in a process.  Raises torch.OutOfMemoryError, which is not the backend's fault.
    """
    key = (backend, device, dtype, *shape[1:], gradient)
    if key not in _faults:
        allowed = _OFF_HALF if dtype in _HALF else _OFF
        try:
            with torch.cuda.device(device):
                error = _error(backend, _draw(device, dtype, (2, *shape[1:]), gradient), gradient)
            _faults[key] = "" if error <= allowed else f"off by {error:.2g}, at most {allowed:g} is rounding"  # NaN too
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a backend that fails at run time raises anything
            _faults[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return _faults[key]


def _measure(candidates: list[str], device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], gradient: bool):
    """Milliseconds of each candidate on tensors laid out as the model's.

    A candidate that fails here, or whose results are not the formula's, is left out with a warning.
    """
    timings: dict[str, float] = {}
    with torch.cuda.device(device):
        q, k, v = _draw(device, dtype, shape, gradient)
        for backend in candidates:
            try:
                if fault := _fault(backend, device, dtype, shape, gradient):
                    raise ArithmeticError(fault)
                timings[backend] = _milliseconds(backend, q, k, v, gradient)
            except Exception as error:  # a backend that fails at run time is not a candidate, and says so
                _log.warning("attention: %s left out, it failed on %s %s: %s", backend, list(shape), dtype, error)
    return timings


@_disable_dynamo
def resolve_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype, shape: tuple[int, ...], gradient: bool = True
) -> str:
    """A concrete, usable backend name for q, k, v of ``shape`` [B, heads, N, Dh].

    ``backend`` is a name of ``BACKENDS``, checked, or "auto": the fastest of those available for this device, shape,
    dtype and direction (``gradient``: forward and backward, or forward only), measured once in a process, a few
    milliseconds each, and logged.  On a device other than CUDA "auto" is "sdpa" and nothing is measured.
    A backend of another package is compared with the formula in the same direction, on two samples, once in a process.

    Raises BackendUnavailable for an unknown name, for one that cannot run here, with the reason, and for one that fails
    or is wrong here.
    """
    device, direction = torch.device(device), "forward and backward" if gradient else "forward"
    if len(shape) != 4:
        raise ValueError(f"shape must be [B, heads, N, Dh], not {list(shape)}")
    if backend != "auto" and backend not in BACKENDS:
        raise BackendUnavailable(f"attention backend {backend!r} is none of auto, {', '.join(BACKENDS)}")
    if backend == "auto" and device.type != "cuda":
        return "sdpa"
    if backend != "auto":
        reason = _reason(backend, device, dtype, *shape[-2:])
        if reason:
            usable = [name for name, problem in available_backends(device, dtype, shape).items() if not problem]
            raise BackendUnavailable(
                f"attention backend {backend} cannot be used: {reason}; available: {', '.join(usable)}"
            )
        if backend in _PACKAGES and 0 not in shape and (fault := _fault(backend, device, dtype, shape, gradient)):
            others = [name for name in ("cudnn", "sdpa") if not _reason(name, device, dtype, *shape[-2:])]
            raise BackendUnavailable(
                f"attention backend {backend} is wrong or fails here ({fault}) on {list(shape)} {dtype}, "
                f"{direction}, on {device}: choose auto, {' or '.join(others)}"
            )
        return backend
    if 0 in shape:
        return "sdpa"
    name = torch.cuda.get_device_name(device)
    key = (name, dtype, tuple(shape), gradient)
    if key not in _choices:
        reasons = available_backends(device, dtype, shape)
        unwanted = ("reference",) if gradient else ("reference", "mixed")  # forward, mixed is cudnn and more
        candidates = [name for name in BACKENDS if not reasons[name] and name not in unwanted]
        timings = _measure(candidates, device, dtype, shape, gradient)
        _choices[key] = min(timings, key=timings.__getitem__) if timings else "reference"
        listing = ", ".join(f"{name} {time:.3f} ms" for name, time in sorted(timings.items(), key=lambda item: item[1]))
        _log.info(
            "attention: %s for %s %s, %s, on %s (%s)", _choices[key], list(shape), dtype, direction, name, listing
        )
    return _choices[key]


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """``softmax(q k^T / sqrt(Dh)) v``, no mask.  q, k, v [B, heads, N, Dh] -> [B, heads, N, Dh] in their dtype.

    With a concrete ``backend`` name from ``resolve_backend`` torch.compile sees no graph break.  "auto" resolves on
    every call (a dictionary look-up after the first) and therefore breaks the graph.
    The memory order of the output is the backend's; FlashAttention and cuDNN write B, N, heads, Dh when given that.

    Raises BackendUnavailable as ``resolve_backend`` does, TypeError or ValueError for tensors that do not match.
    """
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must have one shape [B, heads, N, Dh], not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device, not {q.device}, {k.device}, {v.device}")
    if backend == "auto" or not torch.compiler.is_compiling():
        gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        backend = resolve_backend(backend, q.device, q.dtype, tuple(q.shape), gradient)
    return _RUN[backend](q, k, v)
