"""The learned class: convex and monotone by construction.

A representation that ``lags`` (texture) follows ``tau(s) = sum_i a_i C_i(s)`` with a on the simplex and every C_i
convex, increasing, C_i(0) = 0, C_i(1) = 1; one that ``leads`` (semantic) follows the concave mirror
``1 - sum_i b_i C_i(1 - s)``, so texture time as a function of semantic time is convex.  ``free`` is monotone only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastasync.schedule.base import Schedule, SchedulePoint

ROLES = ("leads", "lags", "free")
KNOTS = tuple(round(0.15 * i, 2) for i in range(7))  # 0, 0.15, ..., 0.9
FLOOR = 0.02  # smallest weight of the identity: dtau/ds >= FLOOR everywhere, so that inversion is safe


def _convex_basis(s: Tensor, knots: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Identity and ``((s - c)_+)^2 / (1 - c)^2``: values and derivatives [..., 1 + len(knots)]."""
    c = torch.tensor(knots, dtype=s.dtype, device=s.device)
    ramp = (s[..., None] - c).clamp(min=0) / (1 - c)
    values = torch.cat([s[..., None], ramp.square()], dim=-1)
    slopes = torch.cat([torch.ones_like(s)[..., None], 2 * ramp / (1 - c)], dim=-1)
    return values, slopes


def _monotone_basis(s: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Identity and the integrals of the ``cells + 1`` hat functions of a uniform grid, each scaled to end at 1."""
    nodes = torch.arange(cells + 1, dtype=s.dtype, device=s.device)
    u = s[..., None] * cells - nodes
    rising, falling = (1 + u.clamp(-1, 0)).square() / 2, 0.5 - (1 - u.clamp(0, 1)).square() / 2
    area = rising + falling  # of the hat from -1 to u
    start = torch.where(nodes == 0, 0.5, 0.0).to(s.dtype)  # the first hat has only its right half, the last its left
    total = torch.where((nodes == 0) | (nodes == cells), 0.5, 1.0).to(s.dtype)
    values = torch.cat([s[..., None], (area - start) / total], dim=-1)
    slopes = torch.cat([torch.ones_like(s)[..., None], (1 - u.abs()).clamp(min=0) * cells / total], dim=-1)
    return values, slopes


class ConvexSchedule(Schedule):
    """A learnable schedule; ``logits`` [K, 1 + len(knots)] (float64) are its parameters.

    The weights are ``softmax(logits)`` with a floor under the identity's.  ``roles``: one of ROLES for each.
    """

    kind = "convex"

    def __init__(
        self,
        names: Sequence[str],
        roles: Sequence[str],
        logits: Sequence[Sequence[float]] | Tensor | None = None,
        knots: Sequence[float] = KNOTS,
        floor: float = FLOOR,
    ):
        super().__init__(names)
        self.roles, self.knots, self.floor = tuple(roles), tuple(float(c) for c in knots), float(floor)
        if len(self.roles) != self.count or not set(self.roles) <= set(ROLES):
            raise ValueError(f"roles {self.roles}: one of {ROLES} for each of {self.names}")
        if not self.knots or not all(0 <= c < 1 for c in self.knots) or not 0 < self.floor < 1:
            raise ValueError(f"knots {self.knots} must lie in [0, 1) and the floor {self.floor} between 0 and 1")
        shape = (self.count, 1 + len(self.knots))
        start = (
            torch.zeros(shape, dtype=torch.float64) if logits is None else torch.as_tensor(logits, dtype=torch.float64)
        )
        if start.shape != shape:
            raise ValueError(f"logits {list(start.shape)}: needed {list(shape)}")
        self.logits = nn.Parameter(start.clone())

    def weights(self) -> Tensor:
        """The simplex weights [K, 1 + len(knots)], float64; column 0 is the identity's, at least ``floor``."""
        weights = (1 - self.floor) * self.logits.softmax(-1)
        return weights + self.floor * torch.eye(1, weights.shape[1], dtype=weights.dtype, device=weights.device)

    def forward(self, s: Tensor) -> SchedulePoint:
        weights = self.weights().to(s.device, s.dtype)
        taus, slopes = [], []
        for role, row in zip(self.roles, weights):
            if role == "free":
                value, slope = (
                    _monotone_basis(s, len(self.knots) - 1) if len(self.knots) > 1 else _convex_basis(s, (0.0,))
                )
            else:
                value, slope = _convex_basis(s if role == "lags" else 1 - s, self.knots)
            tau = value @ row
            # the weights' sum is 1 but for its rounding: without the clamp a local time could start just below 0
            taus.append((1 - tau if role == "leads" else tau).clamp(0, 1))
            slopes.append(slope @ row)
        return SchedulePoint(torch.stack(taus, -1), torch.stack(slopes, -1))

    def parameters_json(self) -> dict[str, Any]:
        return {
            "roles": list(self.roles),
            "knots": list(self.knots),
            "floor": self.floor,
            "logits": self.logits.detach().tolist(),
        }
