"""The exact optimum over monotone lattice paths, by dynamic programming: what estimators A and B are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastasync.densities import Density
from fastasync.schedule import TableSchedule

Errors = Callable[[Tensor], Tensor]  # l: tau [..., K] -> [..., K]


class OraclePath(NamedTuple):
    """``value``: the least corrected loss.  ``path``: its corners [n, K].  ``schedule``: the same path, every increment
    of local time taking equally long."""

    value: float
    path: Tensor
    schedule: TableSchedule


@torch.no_grad()
def best_path(
    errors: Errors, density: Density, lam: Sequence[float], names: Sequence[str], cells: int = 128
) -> OraclePath:
    """Minimise ``sum_k integral P_k dtau_k``, ``P_k = lam_k rho(tau_k) l_k(tau)``, over axis-parallel monotone paths.

    The lattice has ``cells`` cells on each of the K axes; an edge costs the trapezoid rule.  Time and memory grow as
    ``cells^K``: 128 is instant for K = 2, 32 for K = 3.
    """
    count, side = len(lam), cells + 1
    axis = torch.linspace(0, 1, side, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(*[axis] * count, indexing="ij"), -1)
    integrand = torch.as_tensor(lam, dtype=torch.float64) * density.pdf(lattice) * errors(lattice).to(torch.float64)
    strides = [side ** (count - 1 - k) for k in range(count)]
    # P_k flat, and the number of steps that lead to each node: nodes of one level depend only on the level before
    flat = integrand.flatten(0, -2)
    index = torch.cartesian_prod(*[torch.arange(side)] * count).reshape(-1, count)
    level = index.sum(1)
    order = level.argsort(stable=True)
    value = torch.full((side**count,), torch.inf, dtype=torch.float64)
    came = torch.zeros(side**count, dtype=torch.int64)
    value[0] = 0.0
    for nodes in order.split(torch.bincount(level).tolist())[1:]:
        options = []
        for k in range(count):
            before = nodes - strides[k]
            usable = index[nodes, k] > 0
            before = torch.where(usable, before, nodes)
            cost = value[before] + 0.5 * (flat[before, k] + flat[nodes, k]) / cells
            options.append(torch.where(usable, cost, torch.inf))
        best = torch.stack(options).min(0)
        value[nodes], came[nodes] = best.values, best.indices

    node, steps = side**count - 1, []
    while node:
        steps.append(int(came[node]))
        node -= strides[steps[-1]]
    points, position = [[0.0] * count], [0] * count
    at = [0.0]
    for number, k in enumerate(reversed(steps), start=1):
        position[k] += 1
        if number < len(steps) and steps[len(steps) - number - 1] == k:
            continue  # not a corner
        points.append([p / cells for p in position])
        at.append(number / len(steps))
    return OraclePath(float(value[-1]), torch.tensor(points, dtype=torch.float64), TableSchedule(names, at, points))
