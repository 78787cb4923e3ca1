"""What to print about a loss surface and a schedule: J, KE, lead, curl sign, jump."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastasync.densities import Density
from fastasync.probe.surface import Errors, line_loss
from fastasync.schedule import Schedule, kinetic_energy


def curl(errors: Errors, tau: Tensor, i: int, j: int, lam: Sequence[float], density: Density) -> Tensor:
    """``d_i P_j - d_j P_i`` of ``P_k = lam_k rho(tau_k) l_k`` at tau [N, K] -> [N], by automatic differentiation."""
    with torch.enable_grad():
        tau = tau.detach().to(torch.float64).requires_grad_()
        value = errors(tau) * density.pdf(tau.detach())  # rho_j depends on tau_j only: it passes through d_i, i != j
        across = [torch.autograd.grad(value[:, k].sum(), tau, retain_graph=True)[0] for k in (i, j)]
    return (lam[j] * across[1][:, i] - lam[i] * across[0][:, j]).detach()


def curl_report(
    errors: Errors, count: int, lam: Sequence[float], density: Density, names: Sequence[str], cells: int = 32
) -> list[dict[str, Any]]:
    """For each pair of representations what the sign of the curl says.

    ``integral``: over the square of the two (mean over the other local times).  By Green's theorem it is the loss of
    "first one, then the other" minus the loss of the reverse, so its sign names the one that the loss wants first.
    ``same_sign``: the fraction of the mass |curl| that has the sign of the integral; 1 means that an L-shaped corner is
    optimal, less means that the preference turns round somewhere in the square.
    """
    axis = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    lattice = torch.cartesian_prod(*[axis] * count).reshape(-1, count)
    report = []
    for i, j in itertools.combinations(range(count), 2):
        value = curl(errors, lattice, i, j, lam, density)
        integral, mass = float(value.mean()), float(value.abs().mean())
        agreeing = float(value[value.sign() == (1 if integral > 0 else -1)].abs().sum()) / len(value)
        report.append(
            {
                "pair": [names[i], names[j]],
                "integral": integral,
                "sign": (integral > 0) - (integral < 0),
                "first": names[j] if integral > 0 else names[i] if integral < 0 else None,
                "same_sign": agreeing / mass if mass > 0 else 1.0,
            }
        )
    return report


def describe(
    schedule: Schedule, errors: Errors | None, density: Density, lam: Sequence[float], beta: float
) -> dict[str, Any]:
    """J, its two parts and the lead of a schedule; J and the loss are None without a surface."""
    with torch.no_grad():
        energy = float(kinetic_energy(schedule))
        loss = None if errors is None else float(line_loss(errors, schedule, density, lam))
    return {
        "objective": None if loss is None else loss + beta * energy,
        "loss": loss,
        "kinetic_energy": energy,
        "beta": beta,
        "lam": list(lam),
        "lead": schedule.lead(),
    }
