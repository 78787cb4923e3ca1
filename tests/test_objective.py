"""The corrected objective: unbiased against quadrature, bounded, the same for any parametrisation and batch split."""

import math

import pytest
import torch
from fastasync_kernels import reference

from fastasync.densities import DENSITIES, LogitNormal, Uniform
from fastasync.objective import Objective, draw_times, mixture_component, sfd_loss_weights, stratified
from fastasync.schedule import ConvexSchedule, PowerSchedule, cascade, offset, synchronous

NAMES, ROLES = ("texture", "semantic"), ("lags", "leads")


def schedules():
    logits = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    yield synchronous(NAMES)
    yield offset(NAMES, 0.3, ROLES)
    yield cascade(NAMES, ROLES)
    yield PowerSchedule(NAMES, [3.0, 1.0])
    yield ConvexSchedule(NAMES, ROLES, logits)


def line_integral(schedule, density, errors, points=200_001):
    """sum over k of integral rho(tau_k) l_k(tau) dtau_k along the path, by the midpoint rule: the definition."""
    s = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    with torch.no_grad():
        tau, dtau = schedule(s)
    return (density.pdf(tau) * dtau * errors(tau)).mean(0)


def smooth_errors(tau):
    first, second = tau[:, 0], tau[:, 1]
    return torch.stack([1 + first * second - 0.5 * second.square(), 2 - first.square() + first * second], -1)


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("proposal", ["mixture", "uniform"])
@pytest.mark.parametrize("schedule", schedules(), ids=lambda s: s.kind)
def test_weights_are_unbiased(schedule, proposal, density):
    total = 20_000
    times = draw_times(
        schedule, density, seed=1, step=2, samples=torch.arange(total), total=total, mode="corrected", proposal=proposal
    )
    estimate = (times.weight * smooth_errors(times.tau)).mean(0)
    assert torch.allclose(estimate, line_integral(schedule, density, smooth_errors), rtol=4e-3)
    assert torch.allclose(times.weight.mean(0), torch.ones(2, dtype=torch.float64), rtol=4e-3), "rho integrates to 1"


@pytest.mark.parametrize("schedule", schedules(), ids=lambda s: s.kind)
def test_mixture_weights_are_bounded(schedule):
    for pi in (None, (0.2, 0.8)):
        times = draw_times(
            schedule, LogitNormal(), seed=0, step=0, samples=torch.arange(4096), total=4096, pi=pi, proposal="mixture"
        )
        shares = torch.tensor(pi or (0.5, 0.5), dtype=torch.float64)
        assert float(times.weight.min()) >= 0
        assert bool((times.weight <= 1 / shares + 1e-9).all())
        assert torch.allclose(times.weight @ shares, torch.ones(4096, dtype=torch.float64), atol=1e-9)


def test_loss_does_not_depend_on_the_parametrisation():
    # the same path (1 - (1 - r)^2, r^2), run at r = s, s^2 and s^3: reference value 3
    class Run(PowerSchedule):
        def __init__(self, speed):
            super().__init__(NAMES, [-2.0, 2.0], floor=0.0)
            self.speed = speed

        def forward(self, s):
            tau, dtau = super().forward(s**self.speed)
            return type(super().forward(s))(tau, dtau * (self.speed * s ** (self.speed - 1))[..., None])

    estimates = []
    for speed in (1, 2, 3):
        times = draw_times(Run(speed), Uniform(), seed=5, step=0, samples=torch.arange(20_000), total=20_000)
        estimates.append((times.weight * smooth_errors(times.tau)).mean(0))
    assert torch.allclose(estimates[0], estimates[1], rtol=2e-3)
    assert torch.allclose(estimates[0], estimates[2], rtol=2e-3)


def test_densities():
    for density in (LogitNormal(), LogitNormal(0.4, 1.3), Uniform()):
        tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        pdf = density.pdf(tau)
        assert math.isclose(float(pdf.mean()), 1.0, rel_tol=1e-6)
        u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
        below = torch.stack([pdf[tau <= edge].sum() / 100_000 for edge in density.quantile(u)])
        assert torch.allclose(below, u, atol=1e-4)
        assert torch.isfinite(density.pdf(torch.tensor([0.0, 1.0], dtype=torch.float64))).all()


def test_times_do_not_depend_on_the_split():
    whole = draw_times(offset(NAMES, 0.3, ROLES), LogitNormal(), seed=3, step=9, samples=torch.arange(64), total=64)
    parts = [
        draw_times(offset(NAMES, 0.3, ROLES), LogitNormal(), seed=3, step=9, samples=part, total=64)
        for part in torch.arange(64).split([5, 20, 39])
    ]
    for k in range(3):
        assert torch.equal(whole[k], torch.cat([part[k] for part in parts]))


@pytest.mark.parametrize("schedule", schedules(), ids=lambda s: s.kind)
def test_times_drawn_ahead_are_those_of_each_step(schedule):
    objective = Objective((3, 2), (0.6, 0.8), LogitNormal())
    samples = torch.arange(8, 24)
    at = objective.times_by_step(schedule, seed=3, samples=samples, total=64, block=4)
    for step in (5, 6, 0, 11):
        direct = objective.times(schedule, seed=3, step=step, samples=samples, total=64)
        for ahead, each in zip(at(step), direct):
            assert torch.equal(ahead.float(), each.float())
            assert torch.allclose(ahead, each, rtol=0, atol=1e-14)


def test_stratified_and_components():
    u = stratified(0, 0, torch.arange(1000), 1000)
    assert torch.equal((u * 1000).floor().long(), torch.arange(1000))
    component, inner = mixture_component(u, (0.25, 0.75))
    assert int((component == 0).sum()) == 250
    assert math.isclose(float(inner[component == 1].mean()), 0.5, abs_tol=2e-3)


def test_sfd_and_naive_modes():
    clock = offset(NAMES, 0.3, ROLES)
    times = draw_times(clock, LogitNormal(), seed=0, step=0, samples=torch.arange(5000), total=5000, mode="sfd")
    assert bool((times.weight == 1).all())
    logits = torch.logit(times.s)
    assert abs(float(logits.mean())) < 0.02
    assert abs(float(logits.std()) - 1) < 0.02
    assert torch.allclose(times.tau, clock(times.s).tau)


def test_sfd_parity_with_a_direct_evaluation():
    channels = (32, 16)
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(6, 48, 4, 4, generator=generator) for _ in range(2))
    samples = torch.arange(6)
    objective = Objective(channels, sfd_loss_weights(channels, ROLES), LogitNormal(), mode="sfd", cosine_weight=1.0)
    times = objective.times(offset(NAMES, 0.3, ROLES), seed=0, step=3, samples=samples, total=6).to("cpu")
    seen = {}

    def model(x, tau, y):
        seen["x"] = x
        return v

    terms = objective(model, z, torch.zeros(6, dtype=torch.long), times, seed=0, step=3, samples=samples, ops=reference)
    noise = reference.draw_noise(z, 0, 3, samples)
    target = z - noise
    weight = torch.cat([torch.ones(32), 2 * torch.ones(16)])[None, :, None, None]
    direct = (weight * (v - target) ** 2).mean()  # SFD's mean over 48 channels, semantic weight 2
    direct = direct + (1 - torch.nn.functional.cosine_similarity(v, target, dim=1)).mean()
    assert torch.allclose(terms.total, direct, rtol=1e-5)
    tex, sem = times.tau[:, 0, None, None, None], times.tau[:, 1, None, None, None]
    assert torch.allclose(seen["x"][:, :32], (tex * z + (1 - tex) * noise)[:, :32], atol=1e-6)
    assert torch.allclose(seen["x"][:, 32:], (sem * z + (1 - sem) * noise)[:, 32:], atol=1e-6)


def test_loss_is_the_same_on_any_split_and_repa_counts():
    objective = Objective((3, 2), (0.6, 0.8), LogitNormal(), repa_weight=0.5)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, 5, 2, 2, generator=generator)
    features = torch.randn(8, 4, 7, generator=generator)
    y = torch.zeros(8, dtype=torch.long)

    def model(x, tau, y, return_repa=False):
        v = 0.5 * x + tau.mean(1)[:, None, None, None]
        tokens = x.flatten(1)[:, :7][:, None].expand(-1, 4, -1)
        return (v, tokens) if return_repa else v

    def loss(part, features=None):
        times = objective.times(synchronous(NAMES), seed=0, step=1, samples=part, total=8).to("cpu")
        wanted = None if features is None else features[part]
        return objective(model, z[part], y[part], times, seed=0, step=1, samples=part, ops=reference, features=wanted)

    whole = loss(torch.arange(8))
    halves = [loss(part) for part in torch.arange(8).split(4)]
    assert torch.allclose(whole.total, sum(half.total for half in halves) / 2, rtol=1e-6)
    with_repa = loss(torch.arange(8), features)
    assert torch.allclose(with_repa.total, whole.total + 0.5 * with_repa.repa, rtol=1e-6)
    assert 0 < float(with_repa.repa) < 2


def test_noising_gradient_reaches_tau():
    z = torch.randn(2, 5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tau = torch.tensor([[0.2, 0.9], [0.5, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: reference.noising(z, t, (3, 2), 0, 1, torch.arange(2)), (tau,))
