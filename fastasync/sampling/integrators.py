"""Integrators of the sampling ODE ``dx_k/ds = tau_k'(s) v_k`` along a schedule.

Fixed grids step in increments of local time, ``x_k += (tau_k(s_{i+1}) - tau_k(s_i)) v_k``: exact through the kinks of a
schedule, where tau' jumps.

``heun_euler`` is Heun, except that a representation takes its last step, the one that ends at tau_k = 1, by Euler.
There Heun would average in a velocity at tau_k = 1, where no noise is left to predict and no density trains: half of
the last step's noise would stay in the sample.  (EDM, arXiv 2206.00364, ends its Heun sampler so too.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasync.schedule import Schedule

METHODS = ("euler", "heun", "heun_euler", "dopri5")
RTOL, ATOL = 1e-3, 1e-6  # dopri5, as the peers sample


class Velocity(NamedTuple):
    """A velocity before guidance is applied: ``v_weak + scale (v - v_weak)``, or plainly ``v`` when weak is None.

    v, weak [B, C, H, W]; scale [B, K].
    """

    v: Tensor
    weak: Tensor | None = None
    scale: Tensor | None = None


VelocityFunction = Callable[[Tensor, Tensor, Tensor], Tensor | Velocity]


def uniform_grid(steps: int) -> Tensor:
    """``steps`` equal intervals of global time: float64 [steps + 1] from 0 to 1."""
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)


def time_grid(schedule: Schedule, steps: int, power: float = 1.0, last_step: float = 0.0) -> Tensor:
    """``steps`` intervals of time, ``s = 1 - (1 - u)^power`` for uniform u: above 1 the steps shrink towards s = 1.

    ``last_step`` > 0: the last interval begins as soon as no representation has more than that local time left, and the
    others divide the time before it.  So the last step has the same length along every schedule: otherwise one that
    ends steeply takes a longer last step, and what that costs or saves is not the path's merit.

    float64 [steps + 1] from 0 to 1.
    """
    if not last_step or steps == 1:
        return 1 - (1 - uniform_grid(steps)) ** power
    left = torch.tensor(1 - last_step, dtype=torch.float64)
    end = max(float(schedule.invert(k, left)) for k in range(schedule.count))
    return torch.cat([end * time_grid(schedule, steps - 1, power), torch.ones(1, dtype=torch.float64)])


def evaluations(method: str, steps: int) -> int | None:
    """Function evaluations of a fixed-grid method over ``steps`` intervals; None for dopri5, which adapts."""
    return {"euler": steps, "heun": 2 * steps, "heun_euler": 2 * steps - 1}.get(method)


@torch.no_grad()
def integrate(
    velocity: VelocityFunction,
    schedule: Schedule,
    x: Tensor,
    y: Tensor,
    grid: Tensor,
    method: str = "heun",
    *,
    channels: Sequence[int],
    ops: Any = None,
    rtol: float = RTOL,
    atol: float = ATOL,
) -> Tensor:
    """Carry ``x`` [B, C, H, W] (noise at grid[0]) along the schedule to grid[-1]; returns the state there, same dtype.

    ``velocity(x, tau [B, K], y [B])`` -> the velocities [B, C, H, W], or a ``Velocity`` that carries guidance.
    ``grid``: increasing global times [n + 1] (dopri5 uses its ends and chooses its own steps).  ``ops``: the fused
    update or its reference (default).  dopri5 adapts to the whole batch: keep the batch fixed where results must not
    depend on it.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: use one of {METHODS}")
    if ops is None:
        from fastasync_kernels import reference as ops

    def at(x: Tensor, tau: Tensor) -> Velocity:
        result = velocity(x, tau.to(x).expand(x.shape[0], -1), y)
        return result if isinstance(result, Velocity) else Velocity(result)

    def update(x: Tensor, u: Velocity, dtau: Tensor) -> Tensor:
        local = dtau.to(x).expand(x.shape[0], -1).contiguous()
        return ops.guided_update(x, u.v, u.weak, local if u.scale is None else u.scale, local, channels)

    if method == "dopri5":
        from torchdiffeq import odeint

        def slope(s: Tensor, x: Tensor) -> Tensor:
            tau, dtau = schedule(s.to(torch.float64))
            return update(torch.zeros_like(x), at(x, tau), dtau)

        ends = grid[[0, -1]].to(x.device, x.dtype)
        # land on the end (it would step past s = 1 and interpolate) and on the kinks (it would step over them)
        options = {"step_t": ends[-1:], "jump_t": ends.new_tensor(schedule.kinks())}
        options = {key: value for key, value in options.items() if len(value)}
        return odeint(slope, x, ends, method="dopri5", rtol=rtol, atol=atol, options=options)[-1]

    taus = schedule(grid.to(torch.float64)).tau
    for now, after in pairwise(taus):
        dtau = after - now
        first = at(x, now)
        # the part of the step that the first velocity takes; the rest is taken by the one at its end
        share = torch.full_like(dtau, 1.0 if method == "euler" else 0.5)
        if method == "heun_euler":
            share[after > 1 - 1e-9] = 1.0
        if bool((share == 1).all()):
            x = update(x, first, dtau)
        else:
            part, ahead = update(x, first, share * dtau), update(x, first, dtau)
            x = update(part, at(ahead, after), (1 - share) * dtau)
    return x
