"""The solvable case: reference values, path independence, curl, exact sampling."""

import pytest
import torch

from fastasync.densities import LogitNormal, Uniform
from fastasync.probe.diagnostics import curl, curl_report
from fastasync.probe.oracle import best_path
from fastasync.probe.surface import line_loss
from fastasync.sampling.integrators import uniform_grid
from fastasync.schedule import ConvexSchedule, OffsetSchedule, TableSchedule, kinetic_energy, synchronous
from fastasync.schedule.base import Schedule, SchedulePoint
from tests.probe.probe_cases import NAMES, PAIR, ROLES, TEXTURE_HEAVY, THREE, TRIPLE, WIDE


def printed(value: float) -> float:
    return round(value, 8)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [((0.5, 0.25), (1.95469891, 1.43367504)), ((1.0, 0.0), (1.0, 0.775)), ((0.0, 1.0), (0.60625, 1.0))],
)
def test_errors_of_item_1(tau, expected):
    found = TRIPLE.errors(torch.tensor(tau, dtype=torch.float64))
    assert tuple(map(printed, found.tolist())) == expected


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [((1.0, 0.0), 0.90621977), ((0.0, 0.0), 1.33096136), ((0.3, 0.0), 1.08829627), ((0.0, 1.0), 1.34927081)],
)
def test_losses_of_item_2(offsets, expected):
    schedule = OffsetSchedule(NAMES, offsets)
    # a number of cells that puts every kink between two of them
    loss = line_loss(PAIR.errors, schedule, Uniform(), TEXTURE_HEAVY, points=13 * 8 * 1024)
    assert float(loss) == pytest.approx(expected, abs=6e-9)


class _Reparametrised(Schedule):
    """The path (1 - (1 - r)^2, r^2) at r = s^power: item 3."""

    def __init__(self, power):
        super().__init__(NAMES)
        self.power = power

    def forward(self, s):
        r, dr = s**self.power, self.power * s ** (self.power - 1)
        return SchedulePoint(torch.stack([1 - (1 - r) ** 2, r**2], -1), torch.stack([2 * (1 - r) * dr, 2 * r * dr], -1))


@pytest.mark.parametrize(("power", "energy"), [(1, 1.33333333), (2, 1.75238095), (3, 2.37272727)])
def test_item_3_loss_ignores_speed_and_energy_does_not(power, energy):
    schedule = _Reparametrised(power)
    loss = line_loss(PAIR.errors, schedule, Uniform(), (0.5, 0.5), points=65536)
    assert float(loss) == pytest.approx(1.18383777, abs=6e-9)
    assert float(kinetic_energy(schedule, (0.5, 0.5), points=65536)) == pytest.approx(energy, abs=6e-9)


def test_dynamic_programming_finds_item_2():
    found = best_path(PAIR.errors, Uniform(), TEXTURE_HEAVY, NAMES, cells=256)
    assert found.path.tolist() == [[0, 0], [0, 1], [1, 1]]  # semantic first
    assert found.value == pytest.approx(0.90621977, abs=5e-6)  # the trapezoid rule's error
    along = line_loss(PAIR.errors, found.schedule, Uniform(), TEXTURE_HEAVY, points=65536)
    assert float(along) == pytest.approx(0.90621977, abs=6e-9)


def test_dynamic_programming_is_the_minimum_over_all_paths():
    # by hand on a 2 x 2 lattice: all six monotone paths
    axis = torch.linspace(0, 1, 3, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    cost = torch.tensor([0.3, 0.7], dtype=torch.float64) * WIDE.errors(lattice)
    values = []
    for word in ("aabb", "abab", "abba", "baab", "baba", "bbaa"):
        at, total = [0, 0], 0.0
        for letter in word:
            k = "ab".index(letter)
            before = float(cost[at[0], at[1], k])
            at[k] += 1
            total += 0.25 * (before + float(cost[at[0], at[1], k]))
        values.append(total)
    assert best_path(WIDE.errors, Uniform(), (0.3, 0.7), NAMES, cells=2).value == pytest.approx(min(values), rel=1e-12)


def test_dynamic_programming_of_three():
    found = best_path(THREE.errors, LogitNormal(), (1.0, 0.5, 0.1), ("a", "b", "c"), cells=24)
    assert torch.equal(found.path[-1], torch.ones(3, dtype=torch.float64))
    along = line_loss(THREE.errors, found.schedule, LogitNormal(), (1.0, 0.5, 0.1), points=32768)
    assert float(along) == pytest.approx(found.value, abs=2e-3)
    for schedule in (synchronous(("a", "b", "c")), OffsetSchedule(("a", "b", "c"), (0.6, 0.3, 0.0))):
        assert float(line_loss(THREE.errors, schedule, LogitNormal(), (1.0, 0.5, 0.1))) > found.value


def test_information_weights_make_the_loss_independent_of_the_path():
    """I-MMSE: with lam_k rho_k = d_k tau / (1 - tau) the integral depends on the ends only.

    Up to tau = 0.9: the integral diverges (logarithmically, the same for every path) at 1.
    """

    def loss(path):
        tau = 0.9 * path.tau
        weight = torch.tensor(WIDE.channels) * tau / (1 - tau)
        return float((weight * WIDE.errors(tau) * 0.9 * path.dtau).mean(0).sum())

    s = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    paths = [
        synchronous(NAMES),
        ConvexSchedule(NAMES, ROLES),
        OffsetSchedule(NAMES, (1.0, 0.0)),
        OffsetSchedule(NAMES, (0.0, 1.0)),
        TableSchedule(NAMES, (0, 0.25, 0.5, 1), [[0, 0], [0.5, 0.25], [0.5, 1], [1, 1]]),
    ]
    with torch.no_grad():
        values = [loss(path(s)) for path in paths]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-8)
    # the same paths differ under any other weights
    with torch.no_grad():
        others = [float(line_loss(WIDE.errors, path, Uniform(), (1, 1))) for path in paths]
    assert max(others) - min(others) > 0.05


@pytest.mark.parametrize("density", [Uniform(), LogitNormal()])
@pytest.mark.parametrize(("case", "i", "j"), [(PAIR, 0, 1), (TRIPLE, 0, 1), (WIDE, 1, 0), (THREE, 0, 2)])
def test_curl_formula_against_finite_differences(case, i, j, density):
    count = len(case.channels)
    tau = 0.1 + 0.8 * torch.rand(20, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lam = (0.7, 0.4, 0.2)[:count]

    def weighted(k, tau):
        return lam[k] * density.pdf(tau[:, k]) * case.errors(tau)[:, k]

    step = 1e-5
    unit = torch.eye(count, dtype=torch.float64) * step
    differences = (weighted(j, tau + unit[i]) - weighted(j, tau - unit[i])) / (2 * step)
    differences -= (weighted(i, tau + unit[j]) - weighted(i, tau - unit[j])) / (2 * step)
    torch.testing.assert_close(case.curl(tau, i, j, lam, density), differences, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(curl(case.errors, tau, i, j, lam, density), differences, rtol=1e-6, atol=1e-8)


def test_curl_report_is_the_difference_between_the_two_corners():
    (row,) = curl_report(PAIR.errors, 2, TEXTURE_HEAVY, Uniform(), NAMES, cells=128)
    assert row["integral"] == pytest.approx(1.34927081 - 0.90621977, rel=1e-3)
    assert row["first"] == "semantic"
    # with no correlation the order does not matter
    independent = type(PAIR)([[1, 0], [0, 1]], (1, 1))
    (flat,) = curl_report(independent.errors, 2, TEXTURE_HEAVY, Uniform(), NAMES)
    assert abs(flat["integral"]) < 1e-12


@pytest.mark.parametrize("case", [PAIR, WIDE])
def test_exact_sampling_generates_the_data_along_any_schedule(case):
    for schedule in (synchronous(NAMES), OffsetSchedule(NAMES, (0.3, 0.0)), ConvexSchedule(NAMES, ROLES)):
        coarse = (case.generated_cov(schedule, uniform_grid(26)) - case.cov).abs().max()
        fine = (case.generated_cov(schedule, uniform_grid(26 * 32)) - case.cov).abs().max()
        assert fine < 2e-5
        assert coarse / fine > 500  # second order: 1024


def test_velocity_is_the_conditional_mean():
    generator = torch.Generator().manual_seed(0)
    tau = torch.tensor([0.4, 0.7], dtype=torch.float64)
    z, eps = WIDE.sample(200_000, generator), torch.randn(200_000, 4, 1, 1, generator=generator, dtype=torch.float64)
    wide = WIDE._repeat(tau)[:, None, None]
    x, u = (1 - wide) * eps + wide * z, z - eps
    residual = (u - WIDE.velocity(x, tau.expand(len(z), 2)))[:, :, 0, 0]
    # uncorrelated with what it was predicted from, and of the predicted size
    assert float((residual.T @ x[:, :, 0, 0] / len(z)).abs().max()) < 0.02
    sizes = residual.square().mean(0)
    expected = WIDE.errors(tau)
    assert [float(sizes[:2].mean()), float(sizes[2:].mean())] == pytest.approx(expected.tolist(), rel=0.01)
