"""The analysis of rules that read the loss surface alone, on rows with a known answer."""

import math

import pytest

from bench.experiments import loss_rule
from bench.science.plan import Ledger
from bench.science.specs import STUDIES

STUDY = STUDIES["digits"]
LOSSES = {"synchronous": 0.6, "offset:0.3": 0.4, "power:2": 0.45, "cascade": 0.35}
FIGURES = {"synchronous": 4, "offset:0.3": 3, "power:2": 2.5, "cascade": 3.5}


def test_choices_by_the_loss_and_the_kinetic_energy(tmp_path):
    ledger = Ledger(STUDY, [], tmp_path)
    for seed, schedule, status in (*((0, name, "done") for name in LOSSES), (0, "C", "done"), (1, "power:2", "failed")):
        told = {"objective": LOSSES.get(schedule, 9.0), "distance": 1 + LOSSES.get(schedule, 9.0)}
        ledger.ranks.put({"variant": "base", "seed": seed, "schedule": schedule, "status": status, **told})
    usual = {"size": "base", "objective": "corrected", "representations": "pair", "probe": "base", "start": "scratch"}

    def run(seed, schedule, figures, **changes):
        scored = {f"fid_{sampler}": figure for sampler, figure in figures.items()}
        row = {**usual, "seed": seed, "schedule": schedule, "step": STUDY.steps, "status": "done", **scored, **changes}
        ledger.runs.put(row)

    first, second = STUDY.headline
    for name, figure in FIGURES.items():
        for seed in (100, 101):
            run(seed, name, {first: figure * 2, second: figure / 2})
        run(3, name, {first: 1, second: 1})  # no seed of the scan
        run(100, name, {first: 1, second: 1}, objective="uncorrected")
    run(100, "power:3", {first: 1})  # not scored by all samplers
    quality, found = loss_rule.trained(ledger), loss_rule.ranked(ledger, "objective")
    assert quality == pytest.approx({name: math.log(figure) for name, figure in FIGURES.items()})
    assert list(found) == [("base", 0)]
    assert found["base", 0] == pytest.approx(LOSSES)
    assert loss_rule.ranked(ledger, "distance")["base", 0]["cascade"] == pytest.approx(1.35)
    energies = loss_rule.kinetic_energies(STUDY)
    assert energies["synchronous"] == pytest.approx(1)
    kinetics = {name: energies[name] for name in LOSSES}
    said = []
    for energy in (0, 0.3, 1.3, 5):
        scores = loss_rule.scores(found["base", 0], kinetics, energy)
        said.append(
            loss_rule.describe([scores], {"synchronous": 4.0, "offset:0.3": 3.0, "power:2": 0.0, "cascade": 1.0})
        )
    assert [line.split(": ")[1] for line in said] == [
        f"{name} 1 times" for name in ("cascade (1.0)", "offset:0.3 (3.0)", "power:2 (0.0)", "synchronous (4.0)")
    ]
    # by the loss: cascade, offset, power, synchronous; trained: power, cascade, offset, synchronous
    assert said[0].startswith("1.0 above the best on average, 1.0 at most, order +0.40: ")


def test_the_studys_probes_keep_their_budget():
    """Whatever their preset's is: rows must not change their meaning."""
    budgets = {name: STUDIES[name].probe_config("C", "base", 0).probe.budget for name in STUDIES}
    assert budgets == {"cifar10": 0.1, "cifar10-components": 0.1, "digits": 1.0}
