"""Fixed schedules: synchronous, offset, cascade, power, and a table of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastasync.schedule.base import Schedule, SchedulePoint


class OffsetSchedule(Schedule):
    """``tau_k = clip(s (1 + D) - o_k, 0, 1)`` with ``D = max o_k``: SFD's clock, written once, for K representations.

    Synchronous is ``o = 0``; SFD's is ``o = (D, 0)`` (texture, semantic); the cascade is ``o = (K - 1, ..., 1, 0)``.
    """

    kind = "offset"

    def __init__(self, names: Sequence[str], offsets: Sequence[float]):
        super().__init__(names)
        self.offsets = tuple(float(offset) for offset in offsets)
        if len(self.offsets) != self.count or min(self.offsets) != 0.0:
            raise ValueError(f"offsets {self.offsets}: one per representation {self.names}, the smallest 0")
        self.span = 1.0 + max(self.offsets)

    def forward(self, s: Tensor) -> SchedulePoint:
        local = s[..., None] * self.span - torch.tensor(self.offsets, dtype=s.dtype, device=s.device)
        # the derivative of the piece on the right; at s = 1 of that on the left, where only who comes last moves
        last = torch.tensor([offset + 1.0 == self.span for offset in self.offsets], device=s.device)
        moving = (local >= 0) & ((local < 1) | (last & (s[..., None] >= 1)))
        return SchedulePoint(local.clamp(0, 1), self.span * moving.to(s.dtype))

    @torch.no_grad()
    def invert(self, k: int, tau: Tensor) -> Tensor:
        return (tau.detach().to(torch.float64) + self.offsets[k]) / self.span

    def parameters_json(self) -> dict[str, Any]:
        return {"offsets": list(self.offsets)}

    def kinks(self) -> tuple[float, ...]:
        ends = {(tau + offset) / self.span for offset in self.offsets for tau in (0.0, 1.0)}
        return tuple(sorted(s for s in ends if 0 < s < 1))


class PowerSchedule(Schedule):
    """``tau_k = (1 - floor) q_k(s) + floor s``; exponent p >= 1 gives q = s^p, p <= -1 its mirror 1 - (1 - s)^|p|.

    The first lags (convex), the second leads (concave); ``|p| = 1`` is the straight line.
    """

    kind = "power"

    def __init__(self, names: Sequence[str], exponents: Sequence[float], floor: float = 0.1):
        super().__init__(names)
        self.exponents = tuple(float(exponent) for exponent in exponents)
        self.floor = float(floor)
        if len(self.exponents) != self.count or not all(abs(p) >= 1 for p in self.exponents):
            raise ValueError(f"exponents {self.exponents}: one per representation {self.names}, each >= 1 or <= -1")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor {self.floor}: between 0 and 1")

    def forward(self, s: Tensor) -> SchedulePoint:
        taus, slopes = [], []
        for exponent in self.exponents:
            power = abs(exponent)
            base = s if exponent > 0 else 1 - s
            value, slope = base**power, power * base ** (power - 1)
            taus.append((1 - self.floor) * (value if exponent > 0 else 1 - value) + self.floor * s)
            slopes.append((1 - self.floor) * slope + self.floor)
        return SchedulePoint(torch.stack(taus, -1), torch.stack(slopes, -1))

    def parameters_json(self) -> dict[str, Any]:
        return {"exponents": list(self.exponents), "floor": self.floor}


class TableSchedule(Schedule):
    """Straight lines through given points: ``s`` [n] increasing from 0 to 1 and ``tau`` [n, K] nondecreasing."""

    kind = "table"

    def __init__(self, names: Sequence[str], s: Sequence[float], tau: Sequence[Sequence[float]]):
        super().__init__(names)
        self.s = torch.tensor(s, dtype=torch.float64)
        self.tau = torch.tensor(tau, dtype=torch.float64)
        if self.s.dim() != 1 or len(self.s) < 2 or self.tau.shape != (len(self.s), self.count):
            raise ValueError(
                f"s {list(self.s.shape)} and tau {list(self.tau.shape)}: needed [n >= 2] and [n, {self.count}]"
            )
        if not bool((self.s.diff() > 0).all()) or float(self.s[0]) != 0.0 or float(self.s[-1]) != 1.0:
            raise ValueError("s: must increase strictly from 0 to 1")
        falling = (self.tau.diff(dim=0) < 0).any(1).nonzero()
        if len(falling):  # check_monotone looks at a grid, between whose points a table may dip
            raise ValueError(f"tau: decreases after s = {float(self.s[falling[0]]):g}")

    def forward(self, s: Tensor) -> SchedulePoint:
        knots, values = self.s.to(s.device, s.dtype), self.tau.to(s.device, s.dtype)
        right = torch.searchsorted(knots, s.detach().contiguous(), right=True).clamp(1, len(knots) - 1)
        slope = (values[right] - values[right - 1]) / (knots[right] - knots[right - 1])[..., None]
        return SchedulePoint(values[right - 1] + slope * (s - knots[right - 1])[..., None], slope)

    def parameters_json(self) -> dict[str, Any]:
        return {"s": self.s.tolist(), "tau": self.tau.tolist()}

    def kinks(self) -> tuple[float, ...]:
        return tuple(self.s[1:-1].tolist())


def synchronous(names: Sequence[str]) -> OffsetSchedule:
    """``tau_k = s`` for every representation."""
    return OffsetSchedule(names, [0.0] * len(names))


def offset(names: Sequence[str], delta: float, roles: Sequence[str]) -> OffsetSchedule:
    """SFD's offset: what ``lags`` starts ``delta`` later than what ``leads``; ``free`` starts half-way between."""
    late = {"leads": 0.0, "free": 0.5 * delta, "lags": delta}
    offsets = [late[role] for role in roles]
    return OffsetSchedule(names, [value - min(offsets) for value in offsets])


def cascade(names: Sequence[str], roles: Sequence[str]) -> OffsetSchedule:
    """One after the other: what ``leads``, then ``free``, then what ``lags``; of equals the last in the bundle."""
    rank = {"leads": 0, "free": 1, "lags": 2}
    order = sorted(range(len(names)), key=lambda k: (rank[roles[k]], -k))
    return OffsetSchedule(names, [float(order.index(k)) for k in range(len(names))])


def power(names: Sequence[str], exponent: float, roles: Sequence[str], floor: float = 0.1) -> PowerSchedule:
    """What ``lags`` follows ``s^exponent`` (with the floor), everything else the straight line."""
    return PowerSchedule(names, [exponent if role == "lags" else 1.0 for role in roles], floor)
