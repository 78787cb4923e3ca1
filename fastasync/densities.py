"""Densities rho of the local noising time: where along its own path each representation is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitNormal:
    """``logit(tau) ~ N(mean, std^2)``: what SFD and LightningDiT train with (mean 0, std 1)."""

    mean: float = 0.0
    std: float = 1.0

    def pdf(self, tau: Tensor) -> Tensor:
        """Density at tau in [0, 1] (0 at the ends), in tau's shape and dtype."""
        inside = (tau > 0) & (tau < 1)
        safe = torch.where(inside, tau, 0.5)
        z = (torch.logit(safe) - self.mean) / self.std
        value = torch.exp(-0.5 * z.square()) / (math.sqrt(2 * math.pi) * self.std * safe * (1 - safe))
        return torch.where(inside, value, 0.0)

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function: u in (0, 1) -> tau."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Uniform:
    """Every local time alike."""

    def pdf(self, tau: Tensor) -> Tensor:
        """1 on [0, 1], 0 elsewhere."""
        return ((tau >= 0) & (tau <= 1)).to(tau.dtype)

    def quantile(self, u: Tensor) -> Tensor:
        """u itself."""
        return u


Density = LogitNormal | Uniform
DENSITIES: dict[str, Density] = {"logit_normal": LogitNormal(), "uniform": Uniform()}
