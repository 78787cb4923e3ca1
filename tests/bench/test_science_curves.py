"""What the study's curves and savings compare: the same seeds, and only what was measured far enough."""

from dataclasses import replace

import pytest

from bench.science import transfer
from bench.science.compare import of_shared_seeds
from bench.science.plan import Ledger
from bench.science.plots import sampler_title
from bench.science.specs import STUDIES, Spec

STUDY = replace(STUDIES["digits"], longer=2)


def test_curves_are_of_the_seeds_that_all_have():
    found = {
        "a": {5: {0: 1.0, 1: 2.0, 2: 3.0}, 9: {0: 4.0, 1: 5.0}, 17: {0: 6.0}},
        "b": {5: {1: 7.0, 2: 8.0}, 9: {1: 9.0}, 17: {2: 10.0}},
        "begun": {5: {}, 9: {1: 11.0}},  # takes nothing from the others where it has not been measured
        "nothing yet": {5: {}, 9: {}},
    }
    assert of_shared_seeds(found) == {
        "a": {5: [2.0, 3.0], 9: [5.0]},  # at 17 there is no seed in common
        "b": {5: [7.0, 8.0], 9: [9.0]},
        "begun": {9: [11.0]},
    }
    assert of_shared_seeds({"a": {5: {}}}) == {}


def test_a_run_that_was_not_measured_far_enough_says_nothing(tmp_path):
    ledger = Ledger(STUDY, [0, 1, 2], tmp_path)
    sampler, (half, _, budget, twice) = STUDY.headline[-1], STUDY.milestones
    rows = [("synchronous", seed, twice, 4.0) for seed in range(3)]
    rows += [("C", seed, half, 16.0) for seed in range(3)] + [("C", seed, budget, 8.0) for seed in range(3)]
    rows += [("C", 0, twice, 4.0), ("C", 1, twice, 5.0)]  # gets there, does not; and one without a last figure
    for schedule, seed, step, fid in rows:
        values = {**vars(Spec(schedule, seed)), "step": step, "status": "done", f"fid_{sampler}": fid}
        ledger.runs.put(values)
    assert transfer._saved(ledger, "C", "synchronous", twice) == [pytest.approx(1.0), None]


def test_what_a_panel_is_called():
    names = ("heun_euler17@0.2", "heun10", "dopri5")
    assert [sampler_title(name) for name in names] == ["17 evaluations, heun_euler", "10 evaluations, heun", "dopri5"]
