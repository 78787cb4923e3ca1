"""adaLN between linears in fp8: ``adaln``'s kernels, which also find the largest magnitudes of what they write.

Those of h, for the linear that reads it, are outputs; those of dy, for the linear that made y, go back as the gradient
of its hint (``tops``).  Everything else is as in ``adaln``, and the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import adaln
from ._common import OfflineCase, check_tensor
from .adaln import _check, _gated_backward_op, _launch_backward, _launch_forward, _plain_backward_op
from .fp8_linear import ADALN_PARTS
from .tops import Tops, hint_size, split_hint


def _empty_tops(x: Tensor, wanted: bool = True) -> Tops:
    batch, tokens, width = x.shape
    rows = x.new_empty((batch * tokens if wanted else 0, ADALN_PARTS), dtype=torch.float32)
    return Tops(rows, x.new_empty(width if wanted else 0, dtype=torch.float32))


def _check_width(x: Tensor) -> None:
    if x.shape[-1] < 8:
        raise ValueError(f"x must have at least 8 features for its magnitudes, not {x.shape[-1]}")


@torch.library.custom_op("fastasync::rmsnorm_modulate_tops", mutates_args=())
def _plain_op(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, None, weight, {"shift": shift, "scale": scale})
    _check_width(x)
    tops = _empty_tops(x)
    return _launch_forward(x, None, None, weight, shift, scale, eps, tops)[1], *tops


@_plain_op.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_empty_tops(x)


def _plain_setup(ctx, inputs, output) -> None:
    x, weight, _, scale, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, scale)


def _plain_backward(ctx, dout: Tensor | None, *_: Tensor | None):
    if dout is None:
        return (None,) * 5
    return *_plain_backward_op(dout, *ctx.saved_tensors, ctx.eps), None


_plain_op.register_autograd(_plain_backward, setup_context=_plain_setup)


@torch.library.custom_op("fastasync::gated_rmsnorm_modulate_tops", mutates_args=())
def _gated_op(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    hint: Tensor | None,
    tops: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, y, weight, {"gate": gate, "shift": shift, "scale": scale})
    _check_width(x)
    if hint is not None:
        size = hint_size(x.shape[0] * x.shape[1], x.shape[2], ADALN_PARTS)
        check_tensor("hint", hint, (torch.float32,), (size,), x.device)
    found = _empty_tops(x, tops)
    return *_launch_forward(x, y, gate, weight, shift, scale, eps, found if tops else None), *found


@_gated_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    hint: Tensor | None,
    tops: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), *_empty_tops(x, tops)


@torch.library.custom_op("fastasync::gated_rmsnorm_modulate_backward_hint", mutates_args=())
def _gated_backward_hint_op(
    dresidual: Tensor | None,
    dout: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dweight, dshift, dscale, and dy's largest magnitudes as a hint."""
    rows = residual.shape[0] * residual.shape[1]
    hint = residual.new_empty(hint_size(rows, residual.shape[2], ADALN_PARTS), dtype=torch.float32)
    tops = split_hint(hint, rows, ADALN_PARTS)[0]
    return *_launch_backward(residual, y, gate, weight, scale, dresidual, dout, eps, None, tops)[:6], hint


@_gated_backward_hint_op.register_fake
def _(
    dresidual: Tensor | None,
    dout: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = hint_size(residual.shape[0] * residual.shape[1], residual.shape[2], ADALN_PARTS)
    row, column = residual.shape, scale.shape
    return (
        residual.new_empty(row),
        residual.new_empty(row),
        residual.new_empty(column),
        weight.new_empty(weight.shape),
        residual.new_empty(column),
        residual.new_empty(column),
        residual.new_empty(size, dtype=torch.float32),
    )


def _gated_setup(ctx, inputs, output) -> None:
    _, y, gate, weight, _, scale, ctx.eps, hint, _ = inputs
    ctx.hinted = hint is not None
    ctx.set_materialize_grads(False)  # as in adaln; and nobody asks for the gradient of a magnitude
    ctx.save_for_backward(output[0], y, gate, weight, scale)


def _gated_backward(ctx, dresidual: Tensor | None, dout: Tensor | None, *_: Tensor | None):
    saved, dhint = ctx.saved_tensors, None
    if dout is None:
        dout = torch.zeros_like(saved[0])
    if ctx.hinted:
        *grads, dhint = _gated_backward_hint_op(dresidual, dout, *saved, ctx.eps)
    else:
        *grads, _ = _gated_backward_op(dresidual, dout, *saved, ctx.eps, None)
    return *grads, None, dhint, None


_gated_op.register_autograd(_gated_backward, setup_context=_gated_setup)


def rmsnorm_modulate_tops(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tops]:
    """``adaln.rmsnorm_modulate``, and the largest magnitudes of its result.  At least 8 features (ValueError)."""
    h, rows, columns = _plain_op(x, weight, shift, scale, eps)
    return h, Tops(rows, columns)


def gated_rmsnorm_modulate_tops(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    hint: Tensor | None = None,
    tops: bool = True,
) -> tuple[Tensor, Tensor, Tops | None]:
    """``adaln.gated_rmsnorm_modulate``: (x', h), and with ``tops`` the largest magnitudes of h.

    hint: of the linear that made y, with ``ADALN_PARTS`` parts a row; its gradient is dy's largest magnitudes.
    At least 8 features; otherwise a ValueError, and one for a hint of another size.
    """
    residual, h, rows, columns = _gated_op(x, y, gate, weight, shift, scale, eps, hint, tops)
    return residual, h, Tops(rows, columns) if tops else None


def _offline() -> list[OfflineCase]:
    cases = []
    for case in adaln.OFFLINE:
        gated, backward = case.constexprs.get("GATED"), case.kernel is adaln._backward_kernel
        if "TOPS" not in case.constexprs or case.constexprs.get("BIAS") or (backward and not gated):
            continue
        launch = adaln.TOPS_BACKWARD if backward else adaln.TOPS_GATED_FORWARD if gated else adaln.TOPS_FORWARD
        cases.append(case._replace(constexprs=case.constexprs | adaln._meta(1152, launch) | {"TOPS": True}))
    return cases


OFFLINE = _offline()
