"""Estimator B: the fit, minimisation against the dynamic-programming oracle, the sweep, naive against corrected."""

import pytest
import torch

from fastasync.densities import LogitNormal, Uniform
from fastasync.probe.diagnostics import describe
from fastasync.probe.network import independent_times
from fastasync.probe.oracle import best_path
from fastasync.probe.surface import (
    JUMP,
    LossSurface,
    line_loss,
    minimise,
    naive_loss,
    path_gap,
    starting_points,
    sweep,
)
from fastasync.schedule import ConvexSchedule, OffsetSchedule, check_monotone, kinetic_energy, synchronous
from tests.probe.probe_cases import (
    NAMES,
    PAIR,
    ROLES,
    TEXTURE_HEAVY,
    THREE,
    THREE_NAMES,
    THREE_ROLES,
    WIDE,
    sampled_errors,
)

STARTS = starting_points(NAMES, ROLES)


def test_fit_recovers_a_polynomial_exactly():
    generator = torch.Generator().manual_seed(0)
    tau = torch.rand(500, 2, generator=generator, dtype=torch.float64)

    def polynomial(tau):
        a, b = tau[..., 0], tau[..., 1]
        return torch.stack([2 + a**5 * b**4 - a * b, 1 + (a - b) ** 2 * a], -1)

    surface = LossSurface.fit(tau, polynomial(tau))
    grid = torch.rand(100, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(surface.evaluate(grid), polynomial(grid), rtol=0, atol=1e-9)


def test_few_errors_lower_the_degree():
    tau = independent_times(2, 64, 0, 0)
    assert len(LossSurface.fit(tau, 1 + tau).terms) == 16  # 36 terms would need 144 errors
    with pytest.raises(ValueError, match="cannot determine"):
        LossSurface.fit(tau[:10], tau[:10])


@pytest.mark.parametrize(("case", "count"), [(WIDE, 20_000), (THREE, 40_000)])
def test_fit_from_sampled_errors(case, count):
    surface = LossSurface.fit(*sampled_errors(case, count))
    tau = torch.rand(2000, len(case.channels), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    deviation = (surface.evaluate(tau) - case.errors(tau)).square().mean(0)
    # what degree 5 cannot express, from exact errors; the rest is the noise that the fit reports
    exact = independent_times(len(case.channels), count, 0, 0)
    truncation = (LossSurface.fit(exact, case.errors(exact)).evaluate(tau) - case.errors(tau)).square().mean(0)
    assert (truncation.sqrt() < 0.02).all()
    ratio = (deviation - truncation) / surface.noise.square()
    assert (ratio > 0.4).all()
    assert (ratio < 2).all()


def test_independent_times_fill_every_cell_and_repeat():
    tau = independent_times(3, 50, seed=4, step=7)
    assert torch.equal((tau * 50).long().sort(0).values, torch.arange(50)[:, None].expand(50, 3))
    assert torch.equal(tau, independent_times(3, 50, seed=4, step=7))
    assert not torch.equal(tau, independent_times(3, 50, seed=4, step=8))
    assert abs(float(torch.corrcoef(independent_times(2, 4096, 0, 0).T)[0, 1])) < 0.05


@pytest.mark.parametrize("density", [Uniform(), LogitNormal()])
def test_b_reaches_the_oracle(density):
    """A fair test: semantic-first is the optimum over all monotone paths when texture has three times the weight, and
    beta = 0 lets the class (semantic leads) come as close to that corner as its floor of 2 % permits."""
    oracle = best_path(PAIR.errors, density, TEXTURE_HEAVY, NAMES, cells=256)
    surface = LossSurface.fit(*sampled_errors(PAIR, 20_000))
    found = minimise(surface, density, TEXTURE_HEAVY, 0.0, STARTS)
    true_loss = float(line_loss(PAIR.errors, found.schedule, density, TEXTURE_HEAVY).detach())
    assert true_loss == pytest.approx(oracle.value, rel=0.01)
    assert true_loss < 0.85 * float(line_loss(PAIR.errors, synchronous(NAMES), density, TEXTURE_HEAVY))


def test_b_reaches_the_oracle_of_three():
    lam = (1.0, 0.4, 0.1)
    oracle = best_path(THREE.errors, LogitNormal(), lam, THREE_NAMES, cells=32)
    surface = LossSurface.fit(*sampled_errors(THREE, 40_000))
    found = minimise(surface, LogitNormal(), lam, 0.0, starting_points(THREE_NAMES, THREE_ROLES))
    true_loss = float(line_loss(THREE.errors, found.schedule, LogitNormal(), lam).detach())
    assert true_loss == pytest.approx(oracle.value, rel=0.01)


def test_kinetic_energy_makes_the_optimum_interior():
    """J's minimum over the class: no point of a fine family does better, and the gradient there is small."""
    surface = PAIR.errors
    found = minimise(surface, LogitNormal(), (1.0, 0.0), 0.03, STARTS)
    assert 0.3 < found.schedule.lead() < 0.95
    assert found.objective <= min(found.reached.values())
    others = [
        synchronous(NAMES),
        *(OffsetSchedule(NAMES, (d, 0.0)) for d in (0.2, 0.4, 0.6, 0.8, 1.0)),
        *STARTS.values(),
    ]
    for other in others:
        assert describe(other, surface, LogitNormal(), (1.0, 0.0), 0.03)["objective"] > found.objective
    assert check_monotone(found.schedule) is None


def test_sweep_is_ordered_and_deterministic():
    surface = LossSurface.fit(*sampled_errors(WIDE, 4096))
    rows = sweep(surface, LogitNormal(), (1.0, 0.0), (0.1, 0.01, 1.0), NAMES, ROLES)
    assert [row.beta for row in rows] == [0.01, 0.1, 1.0]
    table = [row.to_json(surface, LogitNormal(), (1.0, 0.0)) for row in rows]
    # a heavier penalty buys less energy with more loss
    assert table[0]["kinetic_energy"] > table[1]["kinetic_energy"] > table[2]["kinetic_energy"]
    assert table[0]["loss"] < table[1]["loss"] < table[2]["loss"]
    assert rows[0].moved is None
    assert not any(row.jumped for row in rows)
    again = sweep(surface, LogitNormal(), (1.0, 0.0), (0.1, 0.01, 1.0), NAMES, ROLES)
    assert [row.minimum.schedule.to_json() for row in again] == [row.minimum.schedule.to_json() for row in rows]


def test_sweep_reports_a_jump():
    """With a ridge of loss between the diagonal and the corner the argmin jumps over it as beta falls."""

    def errors(tau):
        lead = tau[..., 1] - tau[..., 0]
        texture = 4.0 - 1.5 * lead + 3.0 * torch.exp(-((lead - 0.25) / 0.08).square())
        return torch.stack([texture, torch.ones_like(texture)], -1)

    rows = sweep(errors, Uniform(), (1.0, 0.0), (0.1, 0.3), NAMES, ROLES)
    assert rows[1].jumped
    assert rows[1].moved > JUMP
    assert rows[1].minimum.schedule.lead() < 0.2 < 0.6 < rows[0].minimum.schedule.lead()


def test_path_gap_ignores_speed():
    slow, fast = ConvexSchedule(("a", "b"), ("lags", "lags")), OffsetSchedule(("a", "b"), (0.0, 0.0))
    assert path_gap(slow, fast) < 1e-6  # the same diagonal at different speeds
    # cascade: after texture's start semantic is 1, at mean 1/2: (0, 1) against (1/2, 1/2)
    assert path_gap(OffsetSchedule(NAMES, (1.0, 0.0)), synchronous(NAMES)) == pytest.approx(0.5, abs=1e-3)


def test_naive_objective_collapses_and_corrected_does_not():
    """Weights gamed: the uncorrected loss of a free schedule falls when every local time races through the expensive
    middle at the same s, as fast as the class allows, whatever order the data have.  The corrected loss cannot be
    lowered by a race, and at the same beta it finds the order."""
    free = {"even": ConvexSchedule(NAMES, ("free", "free"))}
    density, lam, beta = LogitNormal(), (0.5, 0.5), 0.01
    naive = minimise(PAIR.errors, density, lam, beta, free, corrected=False).schedule
    honest = minimise(PAIR.errors, density, lam, beta, free).schedule
    s = torch.linspace(0, 1, 1001, dtype=torch.float64)
    with torch.no_grad():
        jump, smooth = float(naive(s).dtau.amax()), float(honest(s).dtau.amax())
        looks, was = (
            naive_loss(PAIR.errors, naive, density, lam),
            naive_loss(PAIR.errors, synchronous(NAMES), density, lam),
        )
        corrected = [float(line_loss(PAIR.errors, x, density, lam)) for x in (naive, honest, synchronous(NAMES))]
        energy = [float(kinetic_energy(schedule, (0.5, 0.5))) for schedule in (naive, honest)]
    assert looks < 0.85 * was  # it looks like progress
    assert jump > 0.98 * 0.98 * 6 > 2 * smooth  # one hat of the basis carries everything: a jump
    assert abs(naive.lead()) < 1e-3
    assert energy[0] > 2 * energy[1]
    assert corrected[0] > 0.99 * corrected[2]  # and has learned nothing: no better than synchronous
    assert corrected[1] < 0.9 * corrected[2]
    assert honest.lead() > 0.5
