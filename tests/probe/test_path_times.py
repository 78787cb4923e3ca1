"""Times of a probe that is trained along its candidates."""

import torch

from fastasync.densities import LogitNormal
from fastasync.objective import times_of
from fastasync.probe.network import PathTimes
from fastasync.schedule import cascade, power, synchronous

NAMES, ROLES = ("texture", "semantic"), ("lags", "leads")
FAMILY = [synchronous(NAMES), power(NAMES, 3.0, ROLES), cascade(NAMES, ROLES)]


def test_every_sample_lies_on_a_path_of_the_family():
    tau, weight = PathTimes(FAMILY, LogitNormal(), total=60, seed=3)(7)
    assert tau.shape == weight.shape == (60, 2)
    counts = []
    for schedule in FAMILY:
        # where the faster local time says that s is, the path has the other one
        s = torch.stack([schedule.invert(k, tau[:, k]) for k in (0, 1)]).mean(0) if schedule is not FAMILY[2] else None
        if s is None:
            s = torch.where(tau[:, 0] > 0, schedule.invert(0, tau[:, 0]), schedule.invert(1, tau[:, 1]))
        counts.append(int(((schedule(s).tau - tau).abs().max(1).values < 1e-9).sum()))
    assert counts == [20, 20, 20]


def test_times_are_a_function_of_seed_and_step():
    draw = PathTimes(FAMILY, LogitNormal(), total=32, seed=3, block=4)
    first = draw(5)
    draw(40)
    again = PathTimes(FAMILY, LogitNormal(), total=32, seed=3, block=4)(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], PathTimes(FAMILY, LogitNormal(), total=32, seed=4, block=4)(5)[0])
    assert not torch.equal(first[0], draw(6)[0])


def test_the_loss_is_the_corrected_one_averaged_over_the_family():
    """E[w_k f(tau)] over the draws is the mean over the paths of the line integral, here of f = tau_k^2 (1 + tau_j)."""
    draw, sums, steps, total = PathTimes(FAMILY, LogitNormal(), total=256, seed=1), torch.zeros(2), 200, 256
    for step in range(steps):
        tau, weight = draw(step)
        sums += (weight * tau.square() * (1 + tau.flip(1))).mean(0) / steps
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    exact = torch.zeros(2, dtype=torch.float64)
    for schedule in FAMILY:
        times = times_of(u, schedule, LogitNormal())
        exact += (times.weight * times.tau.square() * (1 + times.tau.flip(1))).mean(0) / len(FAMILY)
    torch.testing.assert_close(sums.double(), exact, rtol=0.01, atol=0)
    assert steps * total > 50_000


def test_a_share_has_independent_times():
    tau, weight = PathTimes(FAMILY, LogitNormal(), total=80, seed=2, independent=0.25)(0)
    ones = (weight == 1).all(1)
    above = tau[:, 0] > tau[:, 1] + 1e-6  # no path of the family goes there
    assert int(ones.sum()) >= 20
    assert 3 <= int(above.sum()) <= 17
    assert ones[above].all()
