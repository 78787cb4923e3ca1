"""Estimator A: implicit times, an unbiased gradient, and descent to the oracle's value on a Gaussian."""

import pytest
import torch
from fastasync_kernels import reference

from fastasync.densities import LogitNormal, Uniform
from fastasync.probe.joint import ScheduleLearner, draw_for_schedule, implicit_times, schedule_losses
from fastasync.probe.oracle import best_path
from fastasync.probe.surface import line_loss, starting_points
from fastasync.schedule import ConvexSchedule
from tests.probe.probe_cases import (
    NAMES,
    PAIR,
    ROLES,
    TEXTURE_HEAVY,
    THREE,
    THREE_NAMES,
    THREE_ROLES,
    WIDE,
    GaussianLatents,
)


def random_schedule(names, roles, seed=0):
    logits = torch.randn(len(names), 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ConvexSchedule(names, roles, logits)


def test_implicit_times_keep_their_own_time_and_move_the_others():
    schedule = random_schedule(THREE_NAMES, THREE_ROLES)
    component = torch.tensor([0, 1, 2, 0])
    goal = torch.tensor([0.3, 0.6, 0.2, 0.9], dtype=torch.float64)
    tau = implicit_times(schedule, component, goal)
    torch.testing.assert_close(tau.gather(1, component[:, None])[:, 0], goal, rtol=0, atol=1e-12)
    # against finite differences of "invert, then evaluate" in every logit
    direction = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((tau * direction).sum(), schedule.logits)
    step = 1e-6
    for index in ((0, 0), (0, 5), (1, 3), (2, 7), (2, 0)):
        sides = []
        for sign in (1, -1):
            logits = schedule.logits.detach().clone()
            logits[index] += sign * step
            moved = ConvexSchedule(THREE_NAMES, THREE_ROLES, logits)
            with torch.no_grad():
                sides.append((implicit_times(moved, component, goal) * direction).sum())
        assert float(gradient[index]) == pytest.approx(float((sides[0] - sides[1]) / (2 * step)), abs=1e-7)


@pytest.mark.parametrize(
    ("case", "names", "roles", "lam"),
    [
        (WIDE, NAMES, ROLES, (0.6, 0.4)),
        (WIDE, NAMES, ROLES, (1.0, 0.0)),
        (THREE, THREE_NAMES, THREE_ROLES, (1, 0.5, 0.2)),
    ],
)
@pytest.mark.parametrize("density", [LogitNormal(), Uniform()])
def test_gradient_is_unbiased(case, names, roles, lam, density):
    """The mean over many batches against the exact gradient of the quadrature, in units of its standard error."""
    schedule = random_schedule(names, roles, seed=5)
    (exact,) = torch.autograd.grad(line_loss(case.errors, schedule, density, lam), schedule.logits)
    batches, size = 40, 512
    latents = GaussianLatents(case, batches * size, seed=11, grid=2)
    gradients, values = [], []
    for step in range(batches):
        z, y = latents.batch(torch.arange(step * size, (step + 1) * size))
        draw = draw_for_schedule(schedule, density, lam, seed=2, step=step, samples=torch.arange(size), total=size)
        losses = schedule_losses(
            case.velocity, draw, z, y, case.channels, seed=8, step=step, samples=torch.arange(size), ops=reference
        )
        gradients.append(torch.autograd.grad(losses.mean(), schedule.logits)[0])
        values.append(losses.detach().mean())
    stacked = torch.stack(gradients)
    mean, error = stacked.mean(0), stacked.std(0) / batches**0.5
    # the standard errors are small: an estimator that is wrong by three quarters of the gradient would fail
    assert float(exact.abs().max()) > 6 * float(error[exact.abs() == exact.abs().max()])
    assert float(((mean - exact) / error.clamp(min=1e-9)).abs().max()) < 4.5
    value = torch.stack(values)
    with torch.no_grad():
        bias = float(value.mean() - line_loss(case.errors, schedule, density, lam))
    assert abs(bias) < 4 * float(value.std()) / batches**0.5


def test_a_reaches_the_oracle():
    """As for B: the corner that beats every monotone path lies at the edge of the class when beta is 0."""
    oracle = best_path(PAIR.errors, Uniform(), TEXTURE_HEAVY, NAMES, cells=256)
    steps, size = 150, 128
    learner = ScheduleLearner(starting_points(NAMES, ROLES)["synchronous"], steps, lr=0.25)
    latents = GaussianLatents(PAIR, 8192, seed=1, grid=4)
    for step in range(steps):
        z, y = latents.batch(torch.arange(step * size, (step + 1) * size) % 8192)
        samples = torch.arange(size)
        draw = draw_for_schedule(
            learner.schedule, Uniform(), TEXTURE_HEAVY, seed=3, step=step, samples=samples, total=size
        )
        losses = schedule_losses(
            PAIR.velocity, draw, z, y, PAIR.channels, seed=4, step=step, samples=samples, ops=reference
        )
        learner.objective(losses, 0.0).backward()
        learner.update()
    found = line_loss(PAIR.errors, learner.result(), Uniform(), TEXTURE_HEAVY).detach()
    assert float(found) == pytest.approx(oracle.value, rel=0.01)
    assert learner.loss == pytest.approx(float(found), rel=0.03)
