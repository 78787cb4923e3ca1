"""Estimator B: fit the loss surface l_k(tau) over the unit cube, then minimise over the schedule class.

A probe trained with independent local times gives noisy errors at scattered points of the cube.  A Legendre polynomial
through them is smooth, and one fit serves every choice of loss weights and of beta:

    J(phi) = sum_k lam_k integral rho(tau_k) l_k(tau) dtau_k  +  beta sum_k c_k integral (tau_k')^2 ds

a deterministic function of the schedule's parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastasync.densities import Density
from fastasync.schedule import ConvexSchedule, Schedule, kinetic_energy

Errors = Callable[[Tensor], Tensor]  # l: tau [..., K] -> [..., K]
DEGREE = 5
SAMPLES_PER_TERM = 4  # fewer errors than this for each coefficient lower the degree
LEAST_ERRORS = 8  # for each local time: fewer determine no surface at all
JUMP = 0.25  # neighbouring betas whose paths are further apart than this in a local time: the optimum jumped
_POINTS = 256  # quadrature points in s while minimising
_START_SPREAD = 3.0  # logits of the first and the last basis function differ by this in a one-sided start


def _legendre(tau: Tensor, degree: int) -> Tensor:
    """Legendre polynomials of 2 tau - 1, orthonormal on [0, 1]: [...] -> [..., degree + 1]."""
    x = 2 * tau - 1
    values = [torch.ones_like(x), x]
    for n in range(1, degree):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    scale = torch.arange(degree + 1, dtype=tau.dtype).mul(2).add(1).sqrt()
    return torch.stack(values[: degree + 1], -1) * scale


def _exponents(count: int, degree: int) -> list[tuple[int, ...]]:
    """Degrees of each term: the full tensor product for K <= 2, total degree at most ``degree`` beyond."""
    terms = itertools.product(range(degree + 1), repeat=count)
    return [term for term in terms if count <= 2 or sum(term) <= degree]


@dataclass(frozen=True)
class LossSurface:
    """Polynomial errors l_k over the cube: ``coefficients`` float64 [terms, K], ``terms`` the degrees of each term,
    ``noise`` [K] the standard error of the fitted l_k, root mean square over the cube."""

    coefficients: Tensor
    terms: tuple[tuple[int, ...], ...]
    noise: Tensor

    @property
    def count(self) -> int:
        """K."""
        return self.coefficients.shape[1]

    def evaluate(self, tau: Tensor) -> Tensor:
        """l at tau [..., K] -> [..., K], float64, differentiable."""
        degree = max(max(term) for term in self.terms)
        values = _legendre(tau.to(torch.float64).reshape(-1, self.count), degree)
        table = torch.zeros(*[degree + 1] * self.count, self.count, dtype=torch.float64)
        table[tuple(torch.tensor(self.terms).T)] = self.coefficients
        # sum over the degrees of one local time after the other
        result = values[:, 0] @ table.reshape(degree + 1, -1)
        for k in range(1, self.count):
            result = (values[:, k, None] @ result.reshape(len(values), degree + 1, -1))[:, 0]
        return result.reshape(tau.shape)

    __call__ = evaluate

    @classmethod
    def fit(cls, tau: Tensor, errors: Tensor, degree: int = DEGREE) -> LossSurface:
        """Weighted least squares on per-sample errors [N, K] at local times tau [N, K].

        An error is a sum of many squares, so its standard deviation is proportional to its mean: the second pass
        weights each row by the inverse square of the first fit.  ValueError for fewer than LEAST_ERRORS K samples.
        """
        tau, errors = tau.to("cpu", torch.float64), errors.to("cpu", torch.float64)
        count = tau.shape[1]
        while degree > 1 and len(_exponents(count, degree)) * SAMPLES_PER_TERM > len(tau):
            degree -= 1
        if len(tau) < LEAST_ERRORS * count:
            raise ValueError(f"{len(tau)} errors cannot determine a surface over {count} local times")
        terms = tuple(_exponents(count, degree))
        design = _design(tau, terms)
        columns, spread = [], []
        for k in range(count):
            weight = torch.ones(len(tau), dtype=torch.float64)
            for _ in range(2):
                normal = design.T @ (design * weight[:, None])
                solution = torch.linalg.lstsq(normal, (design.T @ (weight * errors[:, k]))[:, None], driver="gelsd")
                fitted = design @ solution.solution[:, 0]
                # a floor keeps a few points near zero from deciding the fit
                weight = fitted.clamp(min=0.2 * float(errors[:, k].mean())).pow(-2)
                weight = weight / weight.mean()
            columns.append(solution.solution[:, 0])
            residual = (weight * (errors[:, k] - fitted).square()).mean()
            # the basis is orthonormal: the trace is the mean variance over the cube
            spread.append((residual * torch.linalg.pinv(normal, hermitian=True).trace()).sqrt())
        return cls(torch.stack(columns, 1), terms, torch.stack(spread))


def _design(tau: Tensor, terms: Sequence[tuple[int, ...]]) -> Tensor:
    """[..., K] -> products of Legendre polynomials [..., terms]."""
    degree = max(max(term) for term in terms)
    values = _legendre(tau, degree)  # [..., K, degree + 1]
    index = torch.tensor(terms)
    return torch.stack([values[..., k, :][..., index[:, k]] for k in range(tau.shape[-1])]).prod(0)


def _corrected(errors: Errors, s: Tensor, tau: Tensor, dtau: Tensor, density: Density) -> Tensor:
    return density.pdf(tau) * errors(tau) * dtau


def _uncorrected(errors: Errors, s: Tensor, tau: Tensor, dtau: Tensor, density: Density) -> Tensor:
    return density.pdf(s)[:, None] * errors(tau)


def _objective(
    integrand: Callable[..., Tensor],
    errors: Errors,
    schedule: Schedule,
    density: Density,
    lam: Sequence[float],
    beta: float,
    points: int,
) -> Tensor:
    """``sum_k lam_k integral integrand_k ds + beta KE`` by the midpoint rule; KE with equal weights c_k = 1 / K."""
    s = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tau, dtau = schedule(s)
    loss = integrand(errors, s, tau, dtau, density).mean(0) @ torch.as_tensor(lam, dtype=torch.float64)
    return loss + beta * dtau.square().mean()


def line_loss(errors: Errors, schedule: Schedule, density: Density, lam: Sequence[float], points: int = 4096) -> Tensor:
    """``sum_k lam_k integral rho(tau_k) l_k(tau) tau_k' ds``, float64 scalar, differentiable; midpoint rule in s."""
    return _objective(_corrected, errors, schedule, density, lam, 0.0, points)


def naive_loss(
    errors: Errors, schedule: Schedule, density: Density, lam: Sequence[float], points: int = 4096
) -> Tensor:
    """The uncorrected loss ``E_{s ~ rho} sum_k lam_k l_k(tau(s))``, which a learned schedule games; for comparison."""
    return _objective(_uncorrected, errors, schedule, density, lam, 0.0, points)


def starting_points(names: Sequence[str], roles: Sequence[str]) -> dict[str, ConvexSchedule]:
    """Where minimisation starts: nearly synchronous, even weights, both one-sided ones, and each ``free`` one first."""
    terms = ConvexSchedule(names, roles).logits.shape[1]
    ramp = torch.linspace(0, _START_SPREAD, terms, dtype=torch.float64)
    identity = torch.full((terms,), 0.1 / (terms - 1), dtype=torch.float64)
    identity[0] = 0.9
    logits = {
        "synchronous": identity.log().expand(len(names), -1),
        "even": torch.zeros(len(names), terms, dtype=torch.float64),
        "far apart": ramp.expand(len(names), -1),
        "close": ramp.flip(0).expand(len(names), -1),
    }
    for first, role in enumerate(roles):
        if role == "free":
            rows = [ramp.flip(0) if k == first else ramp for k in range(len(names))]
            logits[f"{names[first]} first"] = torch.stack(rows)
    return {name: ConvexSchedule(names, roles, value) for name, value in logits.items()}


class Minimum(NamedTuple):
    """The best schedule from all starts, its J, and what each start reached."""

    schedule: ConvexSchedule
    objective: float
    reached: dict[str, float]


def minimise(
    errors: Errors,
    density: Density,
    lam: Sequence[float],
    beta: float,
    starts: dict[str, ConvexSchedule],
    iterations: int = 60,
    corrected: bool = True,
) -> Minimum:
    """Minimise J over the schedule class with L-BFGS from every start; deterministic.

    KE has equal weights c_k.  ``corrected`` False: the naive loss in the place of the corrected one, for comparison.
    """
    integrand = _corrected if corrected else _uncorrected
    best: tuple[float, ConvexSchedule] | None = None
    reached = {}
    for name, start in starts.items():
        schedule = ConvexSchedule(start.names, start.roles, start.logits.detach(), start.knots, start.floor)
        optimizer = torch.optim.LBFGS(
            schedule.parameters(),
            max_iter=iterations,
            history_size=20,
            tolerance_grad=1e-9,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def objective(schedule: ConvexSchedule = schedule) -> Tensor:
            return _objective(integrand, errors, schedule, density, lam, beta, _POINTS)

        def closure(optimizer: torch.optim.LBFGS = optimizer, objective: Callable[[], Tensor] = objective) -> Tensor:
            optimizer.zero_grad()
            value = objective()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            value = float(objective())
        reached[name] = value
        if best is None or value < best[0]:
            best = value, schedule
    if best is None:
        raise ValueError("minimise needs at least one start")
    return Minimum(best[1], best[0], reached)


def path_gap(first: Schedule, second: Schedule, points: int = 513) -> float:
    """Largest difference of a local time between two paths, compared at equal mean local time: speed does not count."""
    progress = np.linspace(0, 1, points)
    columns = []
    with torch.no_grad():
        for schedule in (first, second):
            tau = schedule(torch.linspace(0, 1, 8 * points, dtype=torch.float64)).tau.numpy()
            columns.append([np.interp(progress, tau.mean(1), tau[:, k]) for k in range(schedule.count)])
    return float(np.abs(np.array(columns[0]) - np.array(columns[1])).max())


class SweepRow(NamedTuple):
    """One beta: its minimum, and how far its path is from the neighbouring smaller beta's (``path_gap``)."""

    beta: float
    minimum: Minimum
    moved: float | None

    @property
    def jumped(self) -> bool:
        """Whether the argmin jumped between neighbouring betas."""
        return self.moved is not None and self.moved > JUMP

    def to_json(self, errors: Errors, density: Density, lam: Sequence[float]) -> dict[str, Any]:
        """The row of the report's table."""
        schedule = self.minimum.schedule
        with torch.no_grad():
            energy = kinetic_energy(schedule)
            loss = line_loss(errors, schedule, density, lam)
        return {
            "beta": self.beta,
            "objective": self.minimum.objective,
            "loss": float(loss),
            "kinetic_energy": float(energy),
            "lead": schedule.lead(),
            "moved": self.moved,
            "jump": self.jumped,
            "reached": self.minimum.reached,
            "schedule": schedule.to_json(),
        }


def sweep(
    errors: Errors,
    density: Density,
    lam: Sequence[float],
    betas: Sequence[float],
    names: Sequence[str],
    roles: Sequence[str],
) -> list[SweepRow]:
    """``minimise`` for each beta, in increasing order, from the same starts."""
    rows: list[SweepRow] = []
    starts = starting_points(names, roles)
    for beta in sorted(betas):
        found = minimise(errors, density, lam, beta, starts)
        rows.append(SweepRow(beta, found, path_gap(found.schedule, rows[-1].minimum.schedule) if rows else None))
    return rows
