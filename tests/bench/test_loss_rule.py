"""The analysis of rules that read the loss surface alone, on rows with a known answer."""

import csv
import math

import pytest

from bench.experiments import loss_rule
from bench.science.specs import STUDIES

STUDY = STUDIES["digits"]
LOSSES = {"synchronous": 0.6, "offset:0.3": 0.4, "power:2": 0.45, "cascade": 0.35}


def write(path, rows):
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_choices_by_the_loss_and_the_kinetic_energy(tmp_path):
    beta = STUDY.common().probe.beta[1]
    probes = []
    for name, loss in LOSSES.items():
        objective = loss + beta * loss_rule.kinetic(STUDY, name)
        probes.append(
            {"variant": "base", "seed": 0, "schedule": name, "status": "done", "objective": objective, "distance": loss}
        )
    probes += [dict(probes[0], schedule="C"), dict(probes[0], seed=1, status="failed")]
    write(tmp_path / "probes.csv", probes)
    usual = {
        "size": "base",
        "objective": "corrected",
        "representations": "pair",
        "start": "scratch",
        "step": STUDY.steps,
    }
    runs = [
        usual | {"seed": seed, "schedule": name, **{f"fid_{sampler}": figure for sampler in STUDY.headline}}
        for name, figure in {"synchronous": 4, "offset:0.3": 3, "power:2": 2.5, "cascade": 3.5}.items()
        for seed in (100, 101)
    ]
    runs += [runs[0] | {"seed": 3, "fid_heun10": 1}, runs[0] | {"objective": "uncorrected", "fid_heun10": 1}]
    write(tmp_path / "runs.csv", runs)
    quality, found = loss_rule.trained(STUDY, tmp_path), loss_rule.ranked(STUDY, tmp_path, "objective")
    assert quality == pytest.approx({name: math.log(row) for name, row in zip(LOSSES, (4, 3, 2.5, 3.5))})
    assert list(found) == [("base", 0)]
    assert found["base", 0] == pytest.approx(LOSSES)
    kinetics = {name: loss_rule.kinetic(STUDY, name) for name in LOSSES}
    assert kinetics["synchronous"] == pytest.approx(1)
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
    assert loss_rule.ranked(STUDY, tmp_path, "distance")["base", 0] == pytest.approx(LOSSES)


def test_the_studys_probes_keep_their_budget():
    """Whatever their preset's is: rows must not change their meaning."""
    budgets = {name: STUDIES[name].probe_config("C", "base", 0).probe.budget for name in STUDIES}
    assert budgets == {"cifar10": 0.1, "cifar10-components": 0.1, "digits": 1.0}
