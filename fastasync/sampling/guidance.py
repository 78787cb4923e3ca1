"""Guidance: classifier-free and AutoGuidance, with a scale and an interval for each representation's own local time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastasync.sampling.integrators import Velocity, VelocityFunction

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(
    model: Network,
    *,
    scale: Sequence[float],
    interval: tuple[float, float] = (0.0, 1.0),
    null_class: int | None = None,
    weak: Network | None = None,
) -> VelocityFunction:
    """A velocity function with guidance: ``v = v_weak + g (v_main - v_weak)`` [SFD, AutoGuidance].

    Args:
        model: ``model(x, tau, y) -> v``.
        scale: g, one for each representation; where it is 1 the result is unguided.
        interval: representation k is guided while ``low <= tau_k <= high``, elsewhere its scale is 1.
        null_class: classifier-free guidance: the weak velocity is the same model's under this label.
        weak: AutoGuidance: the weak velocity is this network's.  Exactly one of ``null_class`` and ``weak``.
    """
    if (null_class is None) == (weak is None):
        raise ValueError("give either null_class (classifier-free guidance) or weak (AutoGuidance)")
    low, high = interval

    def velocity(x: Tensor, tau: Tensor, y: Tensor) -> Velocity:
        inside = (tau >= low) & (tau <= high)
        scales = torch.where(inside, torch.tensor(scale, dtype=x.dtype, device=x.device), 1.0)
        if bool((scales == 1).all()):
            return Velocity(model(x, tau, y))
        if weak is not None:
            return Velocity(model(x, tau, y), weak(x, tau, y), scales)
        labels = torch.cat([y, torch.full_like(y, null_class or 0)])
        main, base = model(torch.cat([x, x]), torch.cat([tau, tau]), labels).chunk(2)
        return Velocity(main.contiguous(), base.contiguous(), scales)

    return velocity
