"""Estimator C: the search against closed-form distances, its plan, its candidates, its ledger."""

import math

import pytest
import torch

from fastasync.densities import DENSITIES
from fastasync.errors import UserError
from fastasync.evaluation.frechet import GaussianStatistics, frechet_distance
from fastasync.probe.budget import Budget
from fastasync.probe.generation import (
    MAX_SAMPLES,
    MIN_CANDIDATES,
    MIN_SAMPLES,
    Scorer,
    Selection,
    candidate_family,
    gaussian_statistics,
    neighbours,
    plan_rounds,
    rank_by_loss,
    search,
)
from fastasync.sampling.generate import initial_noise
from fastasync.sampling.integrators import integrate, uniform_grid
from fastasync.schedule import OffsetSchedule, PowerSchedule, check_monotone, offset, power, synchronous
from tests.probe.probe_cases import NAMES, PAIR, ROLES, THREE_CLOSE, THREE_NAMES, THREE_ROLES, WIDE


def statistics(cov):
    return GaussianStatistics(torch.zeros(len(cov), dtype=torch.float64), cov)


def true_distance(case, schedule, steps):
    """Closed form: the Frechet distance between what the sampler generates in ``steps`` Heun steps and the data."""
    return frechet_distance(statistics(case.generated_cov(schedule, uniform_grid(steps))), statistics(case.cov))


def run_search(case, candidates, roles, steps, samples, budget=None, energy=0.0):
    def generate(schedule, indices):
        noise = initial_noise(indices, (sum(case.channels), 1, 1), seed=0).double()
        return integrate(
            case.velocity, schedule, noise, torch.zeros(len(indices)), uniform_grid(steps), channels=case.channels
        )

    scorer = Scorer(lambda z: z.flatten(1), statistics(case.cov))
    budget = budget or Budget(1e9, "test")
    return search(
        candidates,
        roles,
        generate,
        scorer,
        sample_flops=2.0 * steps,
        budget=budget,
        allowance=samples * 2.0 * steps,
        energy=energy,
        progress=False,
    )


@pytest.mark.parametrize("case", [PAIR, WIDE])
def test_c_picks_the_best_of_a_known_set(case):
    """Three Heun steps: far enough from convergence that the schedules differ; for PAIR an asynchronous one is best,
    for WIDE the synchronous one."""
    family = candidate_family(NAMES, ROLES)
    known = ["synchronous", "offset 0.3", "offset 0.6", "cascade", "power 2/1 floor 0.1"]
    # one more, that is no candidate of C: a leader ahead of its clock, whose steps are more even
    candidates = {name: family[name] for name in known} | {"power 3/-3 floor 0.3": PowerSchedule(NAMES, [3, -3], 0.3)}
    truth = {name: true_distance(case, schedule, 3) for name, schedule in candidates.items()}
    best = min(truth, key=truth.get)
    assert best == ("power 3/-3 floor 0.3" if case is PAIR else "synchronous")
    found = run_search(case, candidates, ROLES, 3, 40_000)
    rows = [row for row in found.rows if row["label"] in candidates]
    assert len(rows) == len(candidates)
    assert rows[0]["label"] == best
    # the refinement may move on from it, to something that is at least as good in truth
    assert true_distance(case, found.schedule, 3) <= truth[best]
    # scores estimate the truth, with the small bias of a finite sample
    assert rows[0]["distance"] == pytest.approx(truth[best], abs=0.01)
    assert 0 < found.noise < 0.01


def test_c_of_three():
    """Each role has its own part in the family; here an asynchronous order is best by a fifth."""
    family = candidate_family(THREE_NAMES, THREE_ROLES)
    found = run_search(THREE_CLOSE, family, THREE_ROLES, 3, 80_000)
    truth = {name: true_distance(THREE_CLOSE, schedule, 3) for name, schedule in family.items()}
    assert min(truth.values()) < 0.8 * truth["synchronous"]
    assert true_distance(THREE_CLOSE, found.schedule, 3) < 1.15 * min(truth.values())


FOUR = {
    name: candidate_family(NAMES, ROLES)[name]
    for name in ("synchronous", "offset 0.3", "power 2/1 floor 0.1", "cascade")
}


def test_what_the_reference_cost_is_not_there_for_samples():
    case, schedules = PAIR, {name: FOUR[name] for name in FOUR}
    spent = {}
    for reference in (0.0, 3000.0):
        budget = Budget(1e9, "test")

        def generate(schedule, indices):
            return indices[:, None, None, None].double()

        scorer = Scorer(lambda z: z.flatten(1), statistics(case.cov[:1, :1]), Selection(2.0, reference))
        options = dict(sample_flops=1.0, budget=budget, allowance=9000.0, progress=False)
        found = search(schedules, ROLES, generate, scorer, **options)
        spent[reference] = budget.flops
        assert budget.spent <= 9000
        assert budget.flops["scoring"] == 2.0 * sum(row["samples"] for row in found.rows)
    assert spent[3000.0]["reference"] == 3000
    assert "reference" not in spent[0.0]
    assert spent[3000.0]["sampling"] < 0.7 * spent[0.0]["sampling"]


def search_four(generate, samples, energy=0.0):
    """Among FOUR, by the distance of samples of one number each to the standard normal distribution."""
    unit = GaussianStatistics(torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    return search(
        FOUR,
        ROLES,
        generate,
        Scorer(lambda z: z.flatten(1), unit),
        sample_flops=1.0,
        budget=Budget(1e9, "test"),
        allowance=samples,
        energy=energy,
        progress=False,
    )


@pytest.mark.parametrize(
    ("energy", "shift", "chosen"),
    [
        (0.2, 0.02, "power 2/1 floor 0.1"),  # log 1.02 = 0.020 costs less than 0.2 x 0.165 of kinetic energy
        (0.2, 0.05, "offset 0.3"),  # log 1.05 = 0.049 costs more
        (0.4, 0.05, "power 2/1 floor 0.1"),
        (0.0, 0.02, "offset 0.3"),
        (3.0, 0.02, "synchronous"),  # 3 x 0.135 is more than log 1.4
    ],
)
def test_of_near_equals_the_gentlest(energy, shift, chosen):
    """Candidates at known distances 1 (KE 1.300), 1 + shift (KE 1.135), 1.4 (KE 1), and far ones."""
    distances = {"offset 0.3": 1.0, "power 2/1 floor 0.1": 1 + shift, "synchronous": 1.4}
    shifts = {FOUR[name].fingerprint: distance**0.5 for name, distance in distances.items()}

    def generate(schedule, indices):  # mean c, variance 1: at distance c^2
        return (shifts.get(schedule.fingerprint, 3.0) + 1.0 - 2.0 * (indices % 2)).double()[:, None, None, None]

    found = search_four(generate, 10_000, energy)
    assert found.label == chosen
    row = next(row for row in found.rows if row["label"] == chosen)
    assert row["distance"] == pytest.approx(distances[chosen], rel=1e-3)
    assert row["score"] == pytest.approx(math.log(row["distance"]) + energy * row["kinetic_energy"], rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize(("energy", "chosen"), [(0.0, "offset 0.3"), (2.4, "power 2/1 floor 0.1"), (3, "synchronous")])
def test_d_reads_the_loss_surface_alone(scale, energy, chosen):
    """Texture's error 1 - tau_sem at uniform times: its integral over dtau_tex is known, and its scale decides nothing.

    Synchronous 1/2 (KE 1), 0.9 s^2 + 0.1 s 0.35 (KE 1.135), offset 0.3 0.245 (of a slope of 1.3; KE 1.3).
    """

    def errors(tau):
        return scale * torch.stack([1 - tau[..., 1], torch.full_like(tau[..., 1], 9.0)], -1)

    known = {"synchronous": 0.5, "power 2/1 floor 0.1": 0.35, "offset 0.3": 0.5 * 0.7**2}
    few = {name: FOUR[name] for name in known}
    rows = rank_by_loss(few, errors, DENSITIES["uniform"], (1.0, 0.0), energy)
    assert rows[0]["label"] == chosen
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(scale * known[row["label"]], rel=1e-3)
        assert row["score"] == pytest.approx(math.log(row["loss"]) + energy * row["kinetic_energy"], rel=1e-9)
        assert row["schedule"] == few[row["label"]].to_json()


def test_d_leaves_out_a_loss_that_is_not_positive():
    """Which only a poor fit gives: the log of a number near 0 would win."""

    def errors(tau):
        return torch.stack([0.4 - tau[..., 1], torch.ones_like(tau[..., 1])], -1)

    rows = rank_by_loss(FOUR, errors, DENSITIES["uniform"], (1.0, 1.0), 0.4)
    assert {row["label"] for row in rows} == set(FOUR)
    rows = rank_by_loss(FOUR, lambda tau: errors(tau) - 0.1, DENSITIES["uniform"], (1.0, 0.5), 0.0)
    assert rows
    assert all(row["loss"] > 0 for row in rows)
    assert {row["label"] for row in rows} < set(FOUR)
    with pytest.raises(UserError, match="negative along every candidate"):
        rank_by_loss(FOUR, errors, DENSITIES["uniform"], (1.0, 0.0), 0.4)


@pytest.mark.parametrize(("gain", "moves"), [(0.02, False), (0.2, True)])
def test_a_neighbour_must_be_better_than_its_noise(gain, moves):
    """Samples c + 1, c - 1, ... and c - 1, c + 1, ...: distances c^2 without error, whose difference has the noise
    4 c / sqrt(N) all the same: 0.06 at 4,000 samples."""
    far = {schedule.fingerprint: 9.0 for schedule in FOUR.values()} | {FOUR["power 2/1 floor 0.1"].fingerprint: 1.0}

    def generate(schedule, indices):
        known = schedule.fingerprint in far
        centre = far.get(schedule.fingerprint, 1.0 - gain) ** 0.5
        return (centre + (1.0 - 2.0 * (indices % 2)) * (1 if known else -1)).double()[:, None, None, None]

    found = search_four(generate, 40_000)
    assert len(found.rows) > len(FOUR)  # neighbours were tried
    assert (found.label != "power 2/1 floor 0.1") == moves


def test_search_is_deterministic_and_stays_within_its_allowance():
    family = candidate_family(NAMES, ROLES)
    results = []
    for _ in range(2):
        budget = Budget(1e9, "test")
        results.append(run_search(PAIR, family, ROLES, 3, 6000, budget))
        assert set(budget.flops) == {"sampling"}
        assert 0.5 * 6000 * 6 < budget.spent <= 6000 * 6
        assert budget.spent == sum(row["samples"] for row in results[-1].rows) * 6
    assert results[0].rows == results[1].rows
    assert results[0].schedule.to_json() == results[1].schedule.to_json()


def test_a_small_allowance_drops_candidates_but_never_synchronous():
    found = run_search(PAIR, candidate_family(NAMES, ROLES), ROLES, 3, 2400)
    labels = {row["label"] for row in found.rows}
    assert "synchronous" in labels
    assert len(labels) < len(candidate_family(NAMES, ROLES))
    with pytest.raises(UserError, match=r"probe\.budget"):
        run_search(PAIR, candidate_family(NAMES, ROLES), ROLES, 3, 100)


def test_the_smallest_allowance_compares_one_of_each_kind():
    family = candidate_family(NAMES, ROLES)
    assert list(family)[:MIN_CANDIDATES] == ["synchronous", "offset 0.3", "power 3/1 floor 0.1", "offset 0.6"]
    assert list(candidate_family(["one"], ["free"])) == ["synchronous"]


def test_what_leads_is_the_clock():
    s = torch.linspace(0, 1, 33, dtype=torch.float64)
    for names, roles in ((NAMES, ROLES), (THREE_NAMES, THREE_ROLES)):
        curves = [each for each in candidate_family(names, roles).values() if each.kind == "power"]
        assert curves
        for curve in [*curves, *(near for each in curves for near in neighbours(each, roles, 1.0))]:
            torch.testing.assert_close(curve(s)[0][:, roles.index("leads")], s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("candidates", [1, 2, 3, 7, 22])
@pytest.mark.parametrize("samples", [500, 5000, 10**6])
def test_plan_of_the_rounds(candidates, samples):
    plan = plan_rounds(candidates, samples)
    if plan is None:
        assert candidates * MIN_SAMPLES > samples * 0.5
        return
    assert plan.rounds[0][0] == candidates
    assert plan.total <= samples
    before, total = 0, 0
    for size, count in plan.rounds:
        total += size * (count - before)
        before = count
    assert total == plan.total
    assert plan.rounds[-1][1] <= MAX_SAMPLES
    assert all(later[0] < earlier[0] for earlier, later in zip(plan.rounds, plan.rounds[1:]))


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (NAMES, ROLES),
        (THREE_NAMES, THREE_ROLES),
        (("a", "b"), ("free", "free")),
        (("a", "b", "c"), ("lags", "lags", "leads")),
    ],
)
def test_family_and_neighbours_are_sound(names, roles):
    family = candidate_family(names, roles)
    assert next(iter(family)) == "synchronous"
    assert len({schedule.fingerprint for schedule in family.values()}) == len(family)
    assert any("power" in name for name in family)
    for schedule in family.values():
        assert check_monotone(schedule) is None
        for near in neighbours(schedule, roles, 1.0) + neighbours(schedule, roles, 0.25):
            assert check_monotone(near) is None
            assert near.to_json() != schedule.to_json()
    if roles == ("free", "free"):  # both orders are tried
        leads = [schedule.lead() for schedule in family.values()]
        assert min(leads) < -0.1 < 0.1 < max(leads)


def test_neighbours_keep_their_role():
    start = power(NAMES, 3.0, ROLES)
    for step in (1.0, 4.0):
        for near in neighbours(start, ROLES, step):
            assert near.exponents[0] >= 1
            assert near.exponents[1] == 1
    lags = [round(near.offsets[0], 9) for near in neighbours(offset(NAMES, 0.3, ROLES), ROLES, 1.0)]
    assert set(lags) == {0.2, 0.4}
    assert not [near for near in neighbours(synchronous(NAMES), ROLES, 1.0) if not isinstance(near, OffsetSchedule)]


def test_reference_from_latents():
    class Tiny:
        classes = 10

        def __len__(self):
            return 700

        def batch(self, indices, flips=None):
            return torch.stack([indices.float(), indices.float() ** 2], 1)[:, :, None, None], indices % 10

    scorer = Scorer.of(lambda z: z.flatten(1), Tiny())
    x = torch.arange(700.0).double()
    expected = gaussian_statistics(torch.stack([x, x.float().square().double()], 1))
    torch.testing.assert_close(scorer.reference.cov, expected.cov)


def test_the_reference_of_a_large_set_is_spread_over_its_classes():
    class Sorted:
        classes = 10

        def __len__(self):
            return 25_000

        def batch(self, indices, flips=None):  # sorted by class, which is what the features show
            label = indices * 10 // 25_000
            return torch.nn.functional.one_hot(label, 10).float()[:, :, None, None], label

    mean = Scorer.of(lambda z: z.flatten(1), Sorted()).reference.mean
    torch.testing.assert_close(mean, torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=1e-4)
