"""The gated MLP ``y = h w3^T + b3``, ``h = silu(a) b``, ``[a, b] = x w12^T + b12``, as one operation with gradients.

The two products beside the activation compute it in their epilogues, by quack-kernels (``quack_products``):

    packed, h           = gated(x, w12, b12)                 kept: x and packed, not h
    dpacked, h, db12    = gated_backward(g, w3, packed)      g = dL/dy
    dw3 = g^T h,  db3 = sum of g's rows,  dx = dpacked w12,  dw12 = dpacked^T x

quack wants gate and up by turns, the network's w12 has them as halves: it is put into the other order while it is
rounded, and its gradient into the first again, a copy of the weight each way (and none where torch.compile fuses it
with the conversion).  Weights that change no more are put into it once (``freeze_mlp``).

``resolve_mlp`` chooses between this (``quack``) and separate operations (``plain``), as ``attention.resolve_backend``
does: outside of torch.compile, before the model is compiled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler at once: 2 s

from . import reference
from ._timing import recorded_milliseconds
from .weight_gradient import weight_gradient
from .zeros import hidden_zeros

SwiGLU = Callable[..., Tensor]  # signature in ``reference``
BACKENDS = ("plain", "quack")
EXTRA = "pip install 'fastasync[quack]'"
ALIGNED = 8  # numbers of 16 bits: TMA's 16 bytes
DTYPES = (torch.bfloat16, torch.float16)  # that quack's products take
GAIN = 0.99  # of the plain operations' time: what is worth another package's kernels
_CHECKED_ROWS = 1000  # no multiple of a tile
_UNTRIED = "could not be tried"
_log = logging.getLogger(__name__)
_choices: dict[tuple[Any, ...], str] = {}


class MlpUnavailable(ValueError):
    """The MLP's backend asked for does not exist or cannot run here; the message says why."""


def _products() -> ModuleType:
    return importlib.import_module(".quack_products", __package__)  # imports quack


@torch.library.custom_op("fastasync::gated_product", mutates_args=())
def _gated_op(x: Tensor, w: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """packed [M, 2 F] (no rows unless ``keep``) and h [M, F], gate and up by turns."""
    rows, width = x.shape[0], w.shape[0]
    if not rows:
        return x.new_empty(0, width), x.new_empty(0, width // 2)
    with torch.cuda.device_of(x):
        packed, h = _products().gated(x, w, bias, keep)
    return x.new_empty(0, width) if packed is None else packed, h


@_gated_op.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    rows, width = x.shape[0], w.shape[0]
    return x.new_empty(rows if keep else 0, width), x.new_empty(rows, width // 2)


@torch.library.custom_op("fastasync::gated_product_backward", mutates_args=())
def _gated_backward_op(g: Tensor, w: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dpacked [M, 2 F] by turns, h [M, F], and the gradient of the bias, float32 [2 F] as halves."""
    if not packed.shape[0]:
        return torch.empty_like(packed), g.new_empty(0, w.shape[1]), g.new_zeros(packed.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(g):
        return _products().gated_backward(g, w, packed)


@_gated_backward_op.register_fake
def _(g: Tensor, w: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = packed.shape
    return packed.new_empty(rows, width), g.new_empty(rows, w.shape[1]), g.new_empty(width, dtype=torch.float32)


def by_turns(halves: Tensor, dtype: torch.dtype) -> Tensor:
    """[a, b], the halves of the first axis -> [a0, b0, a1, b1, ..], in ``dtype``."""
    return _ordered(halves.unflatten(0, (2, -1)), dtype)


def as_halves(turns: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``by_turns`` undoes."""
    return _ordered(turns.unflatten(0, (-1, 2)), dtype)


def _ordered(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """The first two axes exchanged and merged, in one pass over memory."""
    return pairs.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 1)


class _Mlp(torch.autograd.Function):
    """``parts``: that the gradients of w12 and w3 are summed over (``weight_gradient``); ``units``: of ``zeros``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w12: Tensor,
        b12: Tensor,
        w3: Tensor,
        b3: Tensor,
        parts: tuple[int, int],
        units: int,
        keep: bool,
    ) -> Tensor:
        rows, (beside12, beside3) = x.flatten(0, -2).contiguous(), hidden_zeros(units)
        turned, last = by_turns(beside12.beside(w12), x.dtype), w3.to(x.dtype)
        packed, h = _gated_op(rows, turned, by_turns(beside12.beside(b12), x.dtype), keep)
        ctx.save_for_backward(rows, turned, last, packed)
        ctx.parts, ctx.units, ctx.dtypes = parts, units, tuple(part.dtype for part in (w12, b12, w3, b3))
        y = F.linear(h, beside3.beside(last), b3.to(x.dtype)).unflatten(0, x.shape[:-1])
        if not torch.compiler.is_compiling():
            # who recomputes selectively keeps both results of the product, and the backward pass reads packed alone
            h.untyped_storage().resize_(0)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, w12, w3, packed = ctx.saved_tensors
        beside12, beside3 = hidden_zeros(ctx.units)
        g = grads[0].flatten(0, -2).contiguous()
        dpacked, h, db12 = _gated_backward_op(g, beside3.beside_again(w3), packed)
        kinds, needs = ctx.dtypes, ctx.needs_input_grad
        dx = (dpacked @ w12).unflatten(0, grads[0].shape[:-1]) if needs[0] else None
        dw12 = beside12.without(as_halves(weight_gradient(dpacked, rows, ctx.parts[0]), kinds[0])) if needs[1] else None
        db12 = beside12.without(db12).to(kinds[1]) if needs[2] else None
        dw3 = beside3.without(weight_gradient(g, h, ctx.parts[1])).to(kinds[2]) if needs[3] else None
        db3 = g.sum(0, dtype=torch.float32).to(kinds[3]) if needs[4] else None
        return dx, dw12, db12, dw3, db3, None, None, None


def gated_mlp(
    x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, b3: Tensor, parts: tuple[int, int] = (1, 1), units: int = 0
) -> Tensor:
    """``w3 (silu(a) b) + b3`` with [a, b] = ``w12 x + b12``: x [..., K] -> [..., N], in x's dtype.

    w12 [2 F, K], gate first, w3 [N, F], biases [2 F] and [N], of any floating dtype: they are rounded to x's, and their
    gradients have their own.  ``units``: hidden units of zeros that are computed besides (``zeros``).  TypeError for an
    x of a dtype that is none of ``DTYPES``, ValueError for shapes that do not fit, K, N or F + units that is no
    multiple of 8, and tensors on several devices.
    ``parts`` must divide the rows of x, those for w12 and for w3 (ValueError).
    """
    _check_dtype(x.dtype)
    if w12.dim() != 2 or w3.dim() != 2 or w12.shape != (2 * w3.shape[1], x.shape[-1]):
        shapes = f"{list(x.shape)}, {list(w12.shape)}, {list(w3.shape)}"
        raise ValueError(f"x, w12 and w3 must be [..., K], [2 F, K] and [N, F], not {shapes}")
    if b12.shape != w12.shape[:1] or b3.shape != w3.shape[:1]:
        raise ValueError(f"biases must be [2 F] and [N], not {list(b12.shape)}, {list(b3.shape)}")
    if not x.device == w12.device == b12.device == w3.device == b3.device:
        raise ValueError(f"x is on {x.device}, w12 on {w12.device}, w3 on {w3.device}: all must be on one device")
    if fault := _sizes_fault(w12.shape[1], w3.shape[1] + units, w3.shape[0]):
        raise ValueError(fault)
    count = x.shape[:-1].numel()
    if any(part < 1 or count % part for part in parts):
        raise ValueError(f"parts {parts} must divide the {count} rows of x")
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in (x, w12, b12, w3, b3))
    return _Mlp.apply(x, w12, b12, w3, b3, parts, units, keep)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"quack takes {' or '.join(map(str, DTYPES))}, not {dtype}")


class FrozenMlp(NamedTuple):
    """An MLP whose weights change no more, in one dtype: w12 [2 F, K] and b12, by turns for quack, w3 [N, F] and b3.

    F counts hidden units of zeros.  ``backend``: whose products take it so.  ``sources``: what it was made of (they
    share memory and the count of changes with the parameters), and ``counts``.
    """

    w12: Tensor
    b12: Tensor
    w3: Tensor
    b3: Tensor
    backend: str
    sources: tuple[Tensor, ...]
    counts: tuple[int, ...]

    def stands_for(self, *parameters: Tensor) -> bool:
        """Whether it still holds what w12, b12, w3 and b3 hold; writes that autograd does not count are not seen."""
        now = zip(parameters, self.sources, self.counts)
        return all(p.data_ptr() == source.data_ptr() and p._version == count for p, source, count in now)


@torch.no_grad()
def freeze_mlp(
    w12: Tensor, b12: Tensor, w3: Tensor, b3: Tensor, dtype: torch.dtype, backend: str, units: int = 0
) -> FrozenMlp:
    """The parameters in the order, the width and the dtype that a backend's products take, once for many calls.

    TypeError for a dtype that is none of ``DTYPES`` with quack.
    """
    if backend == "quack":
        _check_dtype(dtype)
    sources = tuple(part.detach() for part in (w12, b12, w3, b3))
    beside12, beside3 = hidden_zeros(units)
    ordered = by_turns if backend == "quack" else Tensor.to
    first, first_bias = (ordered(beside12.beside(part), dtype) for part in sources[:2])
    last, last_bias = beside3.beside(sources[2]).to(dtype), sources[3].to(dtype)
    return FrozenMlp(first, first_bias, last, last_bias, backend, sources, tuple(p._version for p in sources))


def frozen_mlp(x: Tensor, frozen: FrozenMlp, swiglu: SwiGLU) -> Tensor:
    """The MLP without gradients: x [..., K] in the dtype of ``frozen`` (TypeError for another) -> [..., N].

    ``swiglu``: of the plain one.
    """
    if x.dtype != frozen.w12.dtype:
        raise TypeError(f"x is {x.dtype}, the weights were frozen in {frozen.w12.dtype}")
    if frozen.backend == "quack":
        _, h = _gated_op(x.flatten(0, -2).contiguous(), frozen.w12, frozen.b12, False)
        return F.linear(h, frozen.w3, frozen.b3).unflatten(0, x.shape[:-1])
    return F.linear(swiglu(F.linear(x, frozen.w12, frozen.b12)), frozen.w3, frozen.b3)


Mlp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Sizes of an MLP's call: x [rows, width], w12 [2 hidden, width], w3 [outputs, hidden]."""

    rows: int
    width: int
    hidden: int
    outputs: int


def _sizes_fault(*sizes: int) -> str:
    odd = [size for size in sizes if size % ALIGNED]
    remedy = "model.mlp_multiple rounds the hidden width up"
    return f"needs sizes that are multiples of {ALIGNED}, not {odd[0]} ({remedy})" if odd else ""


@functools.cache
def _missing() -> str:
    """Why quack cannot be used, or an empty string.  Imports it."""
    try:
        _products()
    except ModuleNotFoundError as error:
        return f"quack-kernels is not installed (no module {error.name}): {EXTRA}"
    except Exception as error:  # another version, a broken build: anything
        first = " ".join(str(error).split())[:200]
        return f"quack-kernels cannot be imported ({type(error).__name__}: {first}): {_misplaced() or EXTRA}"
    return ""


def _misplaced() -> str:
    """That quack was put into a folder of another name than it takes for installed packages (0.6.5), or nothing."""
    try:
        spec = importlib.util.find_spec("quack")
    except ValueError:  # made by hand, without a place
        return ""
    found = list(spec.submodule_search_locations or ()) if spec else []
    if not found or {"site-packages", "dist-packages"} & set(Path(found[0]).parts):
        return ""
    return f"it lies in {Path(found[0]).parent}, and works only from a folder called site-packages"


def refusal(device: torch.device | str, dtype: torch.dtype, shape: Shape) -> str:
    """Why ``quack`` cannot run the MLP of this device, dtype and shape, or an empty string."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs a CUDA device, not {device}"
    if dtype != torch.bfloat16:
        return f"needs bfloat16, not {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"needs compute capability 9.0, not {major}.{minor}"
    return _sizes_fault(*shape[1:]) or _missing()


def _results(run: Mlp, inputs: Sequence[Tensor], g: Tensor, gradient: bool) -> list[Tensor]:
    """The output, and with ``gradient`` the gradients of all five inputs."""
    leaves = [part.detach().requires_grad_(gradient) for part in inputs]
    with torch.enable_grad() if gradient else torch.no_grad():
        y = run(*leaves)
    return [y.detach(), *(torch.autograd.grad(y, leaves, g.to(y.dtype)) if gradient else ())]


def plain_mlp(swiglu: SwiGLU) -> Mlp:
    """``gated_mlp`` by three operations, of which the second gives w12's bias its gradient."""
    return lambda x, w12, b12, w3, b3: F.linear(swiglu(F.linear(x, w12, b12.detach()), bias=b12), w3, b3)


def disagreement(inputs: Sequence[Tensor], g: Tensor, gradient: bool) -> str:
    """The first of quack's results that is more than twice as far from float64 as plain operations in the same
    precision, in words; "" where none is."""
    plain = plain_mlp(reference.swiglu)
    known = _results(plain, inputs, g, gradient)
    truth = _results(plain, [part.double() for part in inputs], g.double(), gradient)
    found = _results(gated_mlp, inputs, g, gradient)
    names = ("output", *(f"gradient of {name}" for name in ("x", "w12", "b12", "w3", "b3")))
    for name, ours, theirs, exact in zip(names, found, known, truth):
        error, allowed = (float((part.double() - exact).norm()) for part in (ours, theirs))
        if not error <= 2 * allowed + torch.finfo(ours.dtype).eps * float(exact.norm()):  # NaN too
            return f"{name} has error {error:.3g}, plain operations {allowed:.3g}"
    return ""


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, the weights and biases, and the output's gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator, device=device)).to(dtype)

    rows, width, hidden, outputs = shape
    weights = [normal(2 * hidden, width, scale=width**-0.5), normal(2 * hidden, scale=0.1)]
    weights += [normal(outputs, hidden, scale=hidden**-0.5), normal(outputs, scale=0.1)]
    return [normal(rows, width), *weights], normal(rows, outputs)


@functools.cache
def _fault(device: torch.device, dtype: torch.dtype, shape: Shape, gradient: bool) -> str:
    """What is wrong with quack's results here, or an empty string: compared once in a process."""
    with torch.cuda.device(device):
        try:
            return disagreement(*_draw(shape, dtype, device), gradient)
        except Exception as error:  # a just-in-time compiler's failure has many types
            return f"{_UNTRIED} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _times(swiglu: SwiGLU, device: torch.device, dtype: torch.dtype, shape: Shape, gradient: bool) -> dict[str, float]:
    """Backend -> milliseconds, forward or forward and backward."""
    with torch.cuda.device(device):
        inputs, g = _draw(shape, dtype, device)
        runs: dict[str, Mlp] = {"plain": plain_mlp(swiglu), "quack": gated_mlp}
        return recorded_milliseconds(
            {name: functools.partial(_results, run, inputs, g, gradient) for name, run in runs.items()}
        )


@_disable_dynamo
def resolve_mlp(
    backend: str, swiglu: SwiGLU, device: torch.device | str, dtype: torch.dtype, shape: Shape, gradient: bool = True
) -> str:
    """A concrete, usable backend for the MLP: ``plain`` or ``quack``.

    ``backend``: a name of ``BACKENDS``, or "auto": quack where it can run, its results are right and it is faster than
    ``plain``, separate operations with this ``swiglu`` (``gradient``: forward and backward, or forward only).  Both are
    found out once in a process; the choice is logged with its times.

    Raises MlpUnavailable for an unknown name, and for ``quack`` where it cannot run or its results are wrong.
    """
    device = torch.device(device)
    if backend != "auto" and backend not in BACKENDS:
        raise MlpUnavailable(f"MLP backend {backend!r} is none of auto, {', '.join(BACKENDS)}")
    if backend == "plain" or not shape.rows:
        return "plain"
    reason = refusal(device, dtype, shape)
    if not reason:
        checked = shape._replace(rows=min(shape.rows, _CHECKED_ROWS))
        fault = _fault(device, dtype, checked, gradient)
        reason = fault if not fault or fault.startswith(_UNTRIED) else f"its results are wrong on {device}: {fault}"
        if fault and backend == "auto":
            _log.warning("MLP: quack left out, %s", reason)
    if backend == "auto":
        if reason and device.type == "cuda":
            _say_once(reason)
        return "plain" if reason else _faster(swiglu, device, dtype, shape, gradient)
    if reason:
        raise MlpUnavailable(f"MLP backend quack cannot be used: {reason}; choose auto or plain")
    return backend


@functools.cache
def _say_once(reason: str) -> None:
    _log.info("MLP: plain, as quack %s", reason)


def _faster(swiglu: SwiGLU, device: torch.device, dtype: torch.dtype, shape: Shape, gradient: bool) -> str:
    key = (torch.cuda.get_device_name(device), dtype, shape, gradient)
    if key not in _choices:
        try:
            times = _times(swiglu, device, dtype, shape, gradient)
        except torch.cuda.OutOfMemoryError:
            return "plain"
        finally:
            torch.cuda.empty_cache()  # who asks next how much memory is free shall see it
        _choices[key] = "quack" if times["quack"] < GAIN * times["plain"] else "plain"
        direction = "forward and backward" if gradient else "forward"
        listing = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
        _log.info("MLP: %s for %s %s, %s (%s)", _choices[key], list(shape), dtype, direction, listing)
    return _choices[key]
