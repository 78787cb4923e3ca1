"""The schedule: s -> (tau_1(s)..tau_K(s)), the one object that training, probe and sampler share.

Global time s in [0, 1]; local noising time tau_k in [0, 1], 0 is noise and 1 is data; each tau_k nondecreasing with
tau_k(0) = 0 and tau_k(1) = 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

_GRID = 257  # bracketing points of the numerical inverse
_EXACT = 1e-14  # an error of tau after which one more step, just taken, is the last
_ITERATIONS = 24  # Newton, with bisection as the fallback: enough for float64 from a bracket of 1/256


class SchedulePoint(NamedTuple):
    """Local times and their derivatives at the same s.  ``tau`` and ``dtau`` (= dtau/ds): [..., K], s's dtype."""

    tau: Tensor
    dtau: Tensor


class Schedule(nn.Module):
    """A schedule over the representations ``names``.  Subclasses implement ``forward`` and ``parameters_json``."""

    kind: ClassVar[str]

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)

    @property
    def count(self) -> int:
        """K, the number of representations."""
        return len(self.names)

    def forward(self, s: Tensor) -> SchedulePoint:
        """s [...] in [0, 1], floating point -> tau and dtau/ds, both [..., K] in s's dtype and on its device."""
        raise NotImplementedError

    def parameters_json(self) -> dict[str, Any]:
        """The numbers that define this schedule within its kind, as JSON values."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """``{"kind", "names", ...}``: what ``schedule_from_json`` reads."""
        return {"kind": self.kind, "names": list(self.names), **self.parameters_json()}

    @property
    def fingerprint(self) -> str:
        """Hash of the definition: 12 hexadecimal digits that name this schedule in protocols and checkpoints."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    @torch.no_grad()
    def invert(self, k: int, tau: Tensor) -> Tensor:
        """The s at which representation k reaches ``tau``: float64, in tau's shape, no gradient.

        Where tau_k is flat any s that gives ``tau`` may be returned.  Safeguarded Newton inside a bracket.
        """
        goal = tau.detach().to(torch.float64)
        grid = torch.linspace(0.0, 1.0, _GRID, dtype=torch.float64, device=goal.device)
        values = self(grid).tau[:, k].contiguous()
        right = torch.searchsorted(values, goal.contiguous()).clamp(1, _GRID - 1)
        low, high = grid[right - 1], grid[right]
        s = 0.5 * (low + high)
        for _ in range(_ITERATIONS):
            tau_s, dtau_s = self(s)
            excess = tau_s[..., k] - goal
            low = torch.where(excess <= 0, s, low)
            high = torch.where(excess >= 0, s, high)
            newton = s - excess / dtau_s[..., k]
            inside = (newton >= low) & (newton <= high)  # false for a NaN of a flat piece
            inexact = excess.abs() > _EXACT  # what is exact stays: the result does not depend on its neighbours
            s = torch.where(inexact, torch.where(inside, newton, 0.5 * (low + high)), s)
            if not bool(inexact.any()):
                break
        return s

    def kinks(self) -> tuple[float, ...]:
        """The s strictly inside (0, 1) where some tau_k' jumps, increasing: an adaptive integrator must stop there."""
        return ()

    def lead(self, points: int = 2049) -> float:
        """Largest signed ``tau_last - tau_first`` over s: positive when the last representation (semantic) leads."""
        with torch.no_grad():
            tau = self(torch.linspace(0.0, 1.0, points, dtype=torch.float64)).tau
        gap = tau[:, -1] - tau[:, 0]
        return float(gap[gap.abs().argmax()])


def kinetic_energy(schedule: Schedule, weights: Sequence[float] | None = None, points: int = 4096) -> Tensor:
    """``KE = sum_k c_k integral_0^1 (tau_k')^2 ds`` with ``c = weights`` (default: 1 / K each), differentiable.

    1 for the synchronous schedule when the weights sum to 1.  Midpoint rule.
    """
    weights = weights or [1 / schedule.count] * schedule.count
    s = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    speed = schedule(s).dtau
    return (speed.square().mean(0) * torch.tensor(weights, dtype=torch.float64)).sum()


def check_monotone(schedule: Schedule, points: int = 1025) -> str | None:
    """What is wrong with the schedule as a map of [0, 1] onto [0, 1], or None when it is sound."""
    with torch.no_grad():
        tau, dtau = schedule(torch.linspace(0.0, 1.0, points, dtype=torch.float64))
    for k, name in enumerate(schedule.names):
        column = tau[:, k]
        if not (torch.isfinite(column).all() and torch.isfinite(dtau[:, k]).all()):
            return f"{name} is not finite"
        if not math.isclose(float(column[0]), 0.0, abs_tol=1e-9) or not math.isclose(
            float(column[-1]), 1.0, abs_tol=1e-9
        ):
            return f"{name} runs from {float(column[0]):.4g} to {float(column[-1]):.4g}, not from 0 to 1"
        if float(column.diff().min()) < -1e-12:
            where = int(column.diff().argmin())
            return f"{name} decreases at s = {where / (points - 1):.4g}"
    return None
