"""The study of schedules: its arithmetic on hand-made data, its rows, resuming, and a miniature on digits."""

import argparse
import csv
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.harness import ROOT
from bench.science import plan, rules, study
from bench.science.plan import FAILED, Ledger, Question, RankJob, Rates, TrainJob, merge
from bench.science.runner import Workshop
from bench.science.specs import SAMPLE_SEED, STUDIES, Spec, nfe, random_schedule, sampler, shaped_schedule
from bench.science.statistics import paired, spearman, steps_to_reach, summary
from bench.science.table import Table, markdown
from fastasync.errors import UserError
from fastasync.schedule import check_monotone, power, save_schedule
from fastasync.training import load_model

TINY = replace(
    STUDIES["digits"],
    settings=(
        *("representations.encoder_steps=15", "representations.semvae_steps=10", "model.depth=1", "model.width=32"),
        *("model.heads=2", "train.batch=256", "train.warmup=2", "train.ema=0.5", "sample.count=40"),
        *("evaluate.metrics=fid,kid", "probe.depth=1", "probe.width=16", "probe.heads=1", "probe.batch=16"),
        *("probe.budget=1.0", "probe.train_share=0.2", "probe.sampling_steps=1", "probe.beta=0.03"),
    ),
    steps=40,
    serves=0,
    headline=("heun2", "heun4"),
    curve=("heun2", "heun4"),
    integrators=(("heun4", "heun_euler3", "heun4^2"),),
    fixed=("synchronous", "power:2"),
    scan_seeds=1,
    rank_samples=60,
    rules=("C",),
    longer=2,
    sample_batch=40,
)
ASSUMED = Rates(0.01, 1e-4, 1.0)
_HOLD = """
import sys, time
from pathlib import Path
from bench.science.table import locked
with locked(Path(sys.argv[1]), wait=False) as ours:
    assert ours
    print("held", flush=True)
    time.sleep(60)
"""


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_summary():
    found = summary([1.0, 2.0, 6.0])
    assert found == (3.0, pytest.approx(math.sqrt(7.0)), 1.0, 6.0, 3)
    assert str(found) == "3.000 ± 2.646"
    assert summary([2.0]).deviation == 0.0
    with pytest.raises(ValueError):
        summary([])


def test_spearman_against_known_values():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)), d = (0, 1, -1, 1, -1)
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # ties have their mean rank: ranks (1.5, 1.5, 3) and (1, 2, 3)
    assert spearman([7, 7, 8], [1, 2, 3]) == pytest.approx(math.sqrt(0.75))
    assert math.isnan(spearman([1, 2], [1, 2]))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError):
        spearman([1, 2, 3], [1, 2])


def test_paired_differences_and_verdicts():
    theirs = {0: 10.0, 1: 20.0, 2: 30.0}
    small = paired({0: 9.5, 1: 19.0, 2: 28.4, 7: 1.0}, theirs)
    assert small.change.mean == pytest.approx(-0.05111, abs=1e-4)
    assert (small.better, small.change.seeds) == (3, 3)
    # every seed improves by about 5 %, but seeds differ more than schedules do: better, not a win
    assert not small.separated
    assert small.verdict == "better"
    assert paired({0: 2.0, 1: 2.1, 2: 1.9}, {0: 3.0, 1: 3.2, 2: 2.9}).verdict == "wins"
    # apart by less than the target
    assert paired({0: 2.00, 1: 2.01, 2: 1.99}, {0: 2.1, 1: 2.11, 2: 2.09}).verdict == "better"
    assert paired({0: 11.0, 1: 22.0, 2: 33.5}, theirs).verdict == "worse"
    assert paired({0: 9.0, 1: 22.0, 2: 29.0}, theirs).verdict == "no difference shown"
    assert paired({0: 1.0}, theirs).verdict == "one seed: no verdict"
    # two seeds can be better but never win
    assert paired({0: 2.0, 1: 2.0}, {0: 3.0, 1: 3.01}).verdict == "better"
    assert paired({5: 1.0}, theirs) is None


def test_steps_to_reach():
    steps, values = [100, 200, 400], [8.0, 4.0, 2.0]
    assert steps_to_reach(steps, values, 4.0) == pytest.approx(200)
    assert steps_to_reach(steps, values, math.sqrt(8.0)) == pytest.approx(200 * math.sqrt(2))
    assert steps_to_reach(steps, values, 9.0) == 100
    assert steps_to_reach(steps, values, 1.0) is None


def test_samplers_and_seeds():
    assert sampler("heun18") == ("heun", 9, 1.0, 0.0)
    assert sampler("heun_euler17^1.5") == ("heun_euler", 9, 1.5, 0.0)
    assert sampler("heun_euler17@0.12") == ("heun_euler", 9, 1.0, 0.12)
    assert (nfe("heun18"), nfe("heun_euler17^1.5")) == (18, 17)
    with pytest.raises(ValueError, match="heun18x"):
        sampler("heun18x")
    assert nfe("dopri5") is None
    for name, each in STUDIES.items():
        for seed in (0, 1, 100, 102):
            config = each.config(Spec("synchronous", seed))
            assert config.sample.seed == SAMPLE_SEED + seed
            assert config.sample.seed != each.probe_config("C", "base", seed).probe.seed
        assert len(each.fixed) == {"digits": 7, "cifar10": 14, "cifar10-components": 10}[name]
        for size in each.sizes:
            for variant in each.probes:
                each.config(Spec("C", 0, size=size, probe=variant))
                each.probe_config("C", variant, 0, "triple")
        assert each.milestones == (each.steps // 2, 3 * each.steps // 4, each.steps, 2 * each.steps, 4 * each.steps)


# --- rows and jobs ----------------------------------------------------------------------------------------------------


def test_rows_survive_and_are_found_by_key(tmp_path):
    columns = ["name", "seed", "status", "value"]
    table = Table(tmp_path / "rows.csv", columns, 2)
    table.put({"name": "power:2, seed", "seed": 3, "value": 0.123456789})
    table.put({"name": "power:2, seed", "seed": 3, "status": "done"})
    again = Table(tmp_path / "rows.csv", columns, 2)
    assert again.get("power:2, seed", 3) == {"name": "power:2, seed", "seed": "3", "status": "done", "value": "0.12346"}
    assert len(again.rows) == 1
    with pytest.raises(ValueError):
        table.put({"name": "x", "seed": 1, "vlaue": 2})
    with pytest.raises(UserError, match="another version"):
        Table(tmp_path / "rows.csv", ["label", "seed", "value"], 2)
    assert markdown(["a", "b"], [{"a": 1.5, "b": None}]) == "| a | b |\n|---|---|\n| 1.5 |  |"


def fake(ledger, spec, values, step=None, status="done"):
    """A row with FIDs by sampler."""
    row = {**{name: getattr(spec, name) for name in plan.SPEC_FIELDS}, "step": step or ledger.study.steps}
    ledger.runs.put(
        {**row, "status": status, "hardware": "x", "train_seconds": 40.0, "sample_seconds": 2.4, "score_seconds": 1.0}
        | {f"fid_{name}": value for name, value in values.items()}
    )


def test_jobs_merge_and_what_is_missing(tmp_path):
    ledger = Ledger(TINY, [0], tmp_path)
    spec = Spec("power:2", 0)
    jobs = merge([TrainJob(spec, ((40, ("heun2",)),)), RankJob("base", 0), RankJob("base", 0),
                  TrainJob(spec, ((20, ("heun2",)), (40, ("heun4", "heun2"))))])  # fmt: skip
    assert jobs == [TrainJob(spec, ((20, ("heun2",)), (40, ("heun2", "heun4")))), RankJob("base", 0)]
    assert ledger.missing(jobs[0]) == jobs[0]
    fake(ledger, spec, {"heun2": 3.0})
    assert ledger.missing(jobs[0]) == TrainJob(spec, ((20, ("heun2",)), (40, ("heun4",))))
    fake(ledger, spec, {"heun2": 3.0}, step=20)
    fake(ledger, spec, {"heun4": 3.0})
    assert ledger.missing(jobs[0]) is None
    other = TrainJob(replace(spec, seed=1), jobs[0].points)
    fake(ledger, other.spec, {}, step=20, status=FAILED)
    fake(ledger, other.spec, {}, status=FAILED)
    assert ledger.missing(other) is None
    assert ledger.by_seed(spec, 40, "heun2", [0, 1]) == {0: 3.0}


def test_an_edited_figure_is_bad_input(tmp_path):
    ledger, sampler_ = Ledger(TINY, [0], tmp_path), TINY.headline[0]
    spec = Spec("synchronous", 0)
    for text in ("2.5O", "0", "-3", "nan"):
        ledger.runs.put({**vars(spec), "step": TINY.steps, "status": "done", f"fid_{sampler_}": text})
        with pytest.raises(UserError, match=f"runs.csv.*{text}.*no fid: fid_{sampler_} of synchronous, seed 0"):
            ledger.figure(spec, TINY.steps, sampler_)


def test_best_fixed_waits_for_the_whole_scan(tmp_path):
    ledger = Ledger(replace(TINY, scan_seeds=2), [0], tmp_path)
    assert ledger.best_fixed() is None
    assert ledger.rivals() == ["best fixed"]
    for seed, values in ((100, (4.0, 2.0)), (101, (4.0, 2.2))):
        fake(ledger, Spec("synchronous", seed), {"heun2": values[0], "heun4": values[1]})
    fake(ledger, Spec("power:2", 100), {"heun2": 3.0, "heun4": 2.3})
    assert ledger.best_fixed() is None
    fake(ledger, Spec("power:2", 101), {"heun2": 3.1, "heun4": 2.3})
    best = {"heun2": "power:2", "heun4": "synchronous", "all": "power:2"}
    assert ledger.best_fixed() == best
    assert ledger.rivals() == ["power:2", "synchronous"]
    # what failed on one of the seeds does not stand
    fake(ledger, Spec("power:2", 101), {"heun2": "", "heun4": ""}, status=FAILED)
    assert ledger.best_fixed() == {"heun2": "synchronous", "heun4": "synchronous", "all": "synchronous"}


def test_rates_are_measured_from_finished_runs(tmp_path):
    ledger = Ledger(TINY, [0], tmp_path)
    assert plan.measured_rates(ledger, "x", ASSUMED) == ASSUMED
    fake(ledger, Spec("power:2", 0), {"heun2": 1.0, "heun4": 1.0})
    # 40 s for 40 steps, 2.4 s for 40 images of 6 evaluations, 1 s for two sets
    assert plan.measured_rates(ledger, "x", ASSUMED) == Rates(1.0, pytest.approx(0.01), 0.5, True)
    assert plan.measured_rates(ledger, "another machine", ASSUMED) == ASSUMED


def test_reports_from_hand_made_rows(tmp_path):
    wide = replace(TINY, fixed=("synchronous", "offset:0.3", "power:2", "cascade"))
    ledger = Ledger(wide, [0, 1, 2], tmp_path)
    trained = {"synchronous": 4.0, "offset:0.3": 3.0, "power:2": 2.0, "cascade": 5.0}
    for name, value in trained.items():
        fake(ledger, Spec(name, 100), {"heun2": value, "heun4": value})
    for seed in (0, 1, 2):
        shift = 0.05 * seed
        for name, value in (("synchronous", 4.0), ("power:2", 2.0), ("C", 1.5)):
            fake(ledger, Spec(name, seed), {"heun2": value + shift, "heun4": value + shift})
            for step in (10, 20, 80):
                fake(ledger, Spec(name, seed), {"heun2": value * 40 / step, "heun4": value * 40 / step}, step=step)
        save_schedule(
            power(("texture", "semantic"), 3.0, ("lags", "leads")), Workshop.schedule_path(tmp_path, Spec("C", seed))
        )
        # C's distances rank as the trained do, B's objectives the other way round
        for place, name in enumerate(("C", "power:2", "offset:0.3", "synchronous", "cascade")):
            ledger.ranks.put({"variant": "base", "seed": seed, "schedule": name, "status": "done", "flops": 10.0,
                              "distance": place + 0.5, "objective": 9.0 - place, "chosen": "x", "budget": 0.01,
                              "probe_steps": 9, "probe_seconds": 1.5})  # fmt: skip
    report = study.QUESTIONS[1].report(ledger)
    tables = {section.name: section.rows for section in report.sections}
    assert tables["headline"][-1] == {"schedule": "C", "heun2": "1.550 ± 0.050", "heun4": "1.550 ± 0.050",
                                      "all": "1.550 ± 0.050"}  # fmt: skip
    verdicts = {(row["sampler"], row["against"]): row["verdict"] for row in tables["paired"]}
    assert verdicts["heun2", "power:2"] == "wins"
    row = tables["ranking"][0]
    assert (row["probe's seed"], row["schedules"]) == (0, 4)
    assert (row["Spearman of C"], row["Spearman of B"]) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert report.picture is not None
    size = study.QUESTIONS[2].report(ledger)
    assert size.sections[0].rows[0]["Spearman of C"] == "1.000 ± 0.000"
    # C needs 40 * 1.5 / 2 = 30 steps for power:2's FID at 40: values fall as 1 / steps between 20 and 40
    saved = {row["goal"]: row["times fewer steps"] for row in study.QUESTIONS[4].report(ledger).sections[0].rows}
    assert float(saved["power:2 at 40 steps"].split()[0]) == pytest.approx(4 / 3, abs=0.05)
    path = study.write_reports(ledger, [1, 2, 3, 4, 5, 6, 7], "command")
    text = path.read_text()
    assert "wins" in text
    assert "![question 1](q1.png)" in text
    assert (tmp_path / "q1.png").stat().st_size > 1000


def test_how_well_the_trained_order_repeats(tmp_path):
    ledger = Ledger(
        replace(TINY, fixed=("synchronous", "offset:0.3", "power:2", "cascade"), scan_seeds=2), [0], tmp_path
    )
    assert rules.seed_agreement(ledger) == []
    # the second seed is worse throughout, which must not matter, and its order is (4, 1, 3, 2) instead of (4, 1, 2, 3)
    for seed, values in ((100, (9.0, 1.0, 2.0, 3.0)), (101, (18.0, 2.0, 6.0, 5.0))):
        for name, value in zip(ledger.study.fixed, values):
            fake(ledger, Spec(name, seed), {"heun2": value, "heun4": value})
    assert rules.seed_agreement(ledger) == [pytest.approx(0.8)]


def test_random_members_of_the_class():
    names, roles = ("texture", "semantic"), ("lags", "leads")
    drawn = [random_schedule(f"random:{number}", names, roles) for number in range(12)]
    assert len({schedule.fingerprint for schedule in drawn}) == 12
    for number, schedule in enumerate(drawn):
        assert check_monotone(schedule) is None
        assert 0.1 <= schedule.lead() <= 0.5
        assert random_schedule(f"random:{number}", names, roles).fingerprint == schedule.fingerprint


def test_shaped_leads():
    names, roles = ("texture", "lowfreq", "semantic"), ("lags", "free", "leads")
    s = torch.linspace(0, 1, 513, dtype=torch.float64)
    for name in STUDIES["cifar10"].shapes:
        schedule = shaped_schedule(name, names, roles)
        lead, place = map(float, name.removeprefix("lead:").split("@"))
        assert check_monotone(schedule) is None
        tau = schedule(s).tau
        assert torch.allclose(tau.mean(1), s)
        assert torch.allclose(tau[:, 1], s)
        gap = tau[:, 2] - tau[:, 0]
        assert float(gap.max()) == pytest.approx(lead, rel=1e-4)
        assert float(gap.min()) >= 0
        assert float(s[gap.argmax()]) == pytest.approx(place, abs=2 / 512)


def test_the_room_above_the_best_fixed_schedule(tmp_path):
    """The best member on the scan's seed is trained again, and only that second figure judges it."""
    ledger = Ledger(replace(TINY, members=2, shapes=("lead:0.2@0.5",)), [3, 4], tmp_path)
    question = study.QUESTIONS[9]
    assert [job.spec for job in question.jobs(ledger, None)] == [
        Spec(name, 100) for name in ("random:0", "random:1", "lead:0.2@0.5")
    ]
    for name, value in {
        "synchronous": 5.0,
        "power:2": 4.0,
        "random:0": 5.0,
        "random:1": 3.0,
        "lead:0.2@0.5": 6.0,
    }.items():
        fake(ledger, Spec(name, 100), {"heun2": value, "heun4": value})
    again = {job.spec for job in question.jobs(ledger, None)[3:]}
    assert again == {Spec(name, seed) for name in ("random:1", "synchronous", "power:2") for seed in (3, 4)}
    for seed, value in ((3, 4.4), (4, 4.2)):
        fake(ledger, Spec("random:1", seed), {"heun2": value, "heun4": value})
        fake(ledger, Spec("power:2", seed), {"heun2": 4.0, "heun4": 4.0})
    report = question.report(ledger)
    assert [row["schedule"] for row in report.sections[0].rows] == ["random:1", "random:0", "lead:0.2@0.5"]
    assert "-25.0% against the best of 2 fixed schedules (power:2)" in report.sentences[0]
    assert report.sentences[1] == "heun2: random:1 against power:2 +7.5 ± 3.5 %, 0 of 2 seeds better (worse)."


def test_ranks_go_by_the_score_of_their_rule(tmp_path):
    """Distances that rise with the lead a little: the energy turns them round."""
    study_ = replace(
        TINY, fixed=("synchronous", "power:1.5", "power:3"), probes={"base": (), "old": ("probe.energy=0",)}
    )
    ledger = Ledger(study_, [0], tmp_path)
    for name, distance, trained in (("synchronous", 1.02, 3.0), ("power:1.5", 1.01, 2.0), ("power:3", 1.0, 4.0)):
        fake(ledger, Spec(name, 100), {"heun2": trained, "heun4": trained})
        for variant in ("base", "old"):
            ledger.ranks.put({"variant": variant, "seed": 0, "schedule": name, "status": "done", "distance": distance,
                              "objective": 1.0})  # fmt: skip
    # with the energy 0.2: log 1.02 + 0.200, log 1.01 + 0.210, 0.265; trained 2nd, 1st, 3rd
    assert rules.rank_agreement(ledger, "base", 0)["Spearman of C"] == pytest.approx(0.5)
    assert rules.rank_agreement(ledger, "old", 0)["Spearman of C"] == pytest.approx(-0.5)


# --- the miniature ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Question 1 with two fixed schedules and C, one seed, and the run from the probe's weights."""
    folder = tmp_path_factory.mktemp("science")
    ledger = Ledger(TINY, [0], folder / "out")
    workshop = Workshop(TINY, folder / "out", folder / "work", lambda line: None)
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    assert study.work(worker, [1], ASSUMED, say=lambda line: None) == []
    return folder, ledger, workshop, worker


def test_miniature_end_to_end(finished):
    folder, ledger, workshop, _ = finished
    with open(folder / "out" / "runs.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    # the scan on its own seed, then synchronous, the best fixed one (which may be synchronous) and C
    assert {(row["schedule"], row["seed"]) for row in rows} >= {("power:2", "100"), ("synchronous", "0"), ("C", "0")}
    for row in rows:
        assert row["status"] == "done", row["error"]
        assert float(row["fid_heun2"]) > 0
        assert row["kid_heun4"]
        assert row["same_as"] or float(row["train_seconds"]) > 0
        assert (row["command"], row["step"]) == ("the command", "40")
    ranks = {key[2]: row for key, row in ledger.ranks.rows.items()}
    assert set(ranks) == {"synchronous", "power:2", "C", "B"}
    assert float(ranks["C"]["budget"]) <= 1.0
    schedule = workshop.schedule(Spec("C", 0))
    assert schedule.fingerprint == ledger.row(Spec("C", 0), 40)["fingerprint"]
    path = study.write_reports(ledger, [1], "the command")
    assert "Which rule gives the best trained model" in path.read_text()


def test_a_longer_run_has_the_shorter_ones(finished):
    _, _, workshop, _ = finished
    spec = Spec("power:2", 7)
    whole = workshop.train(spec, [20, 40])
    half = workshop.train(spec, [20])
    assert half.folder == whole.folder
    assert half.seconds == pytest.approx(whole.seconds / 2)
    assert workshop.score(spec, half, 20, "heun2").figures["fid"] > 0
    # a step that it did not keep is trained again, beside it, to the same figure
    other = workshop.train(Spec("power:2", 8), [40])
    again = workshop.train(Spec("power:2", 8), [20])
    assert again.folder != other.folder
    kept = workshop.train(Spec("power:2", 8), [40])
    assert kept.folder == other.folder
    assert workshop.score(Spec("power:2", 8), again, 20, "heun2").figures["fid"] > 0
    workshop.discard(Spec("power:2", 8))
    assert not other.folder.exists()
    assert not again.folder.exists()


def test_nothing_is_done_twice(finished):
    folder, ledger, workshop, _ = finished
    again = Ledger(TINY, [0], folder / "out")
    assert study.plan(again, workshop, [1])[1] == []
    # one figure lost: only that sampler is scored again, on the checkpoint that is there
    spec, before = Spec("synchronous", 0), dict(ledger.row(Spec("synchronous", 0), 40))
    again.runs.put({**{name: getattr(spec, name) for name in plan.SPEC_FIELDS}, "step": 40, "fid_heun4": ""})
    assert study.plan(again, workshop, [1])[1] == [TrainJob(spec, ((40, ("heun4",)),))]
    second = study.Worker(again, workshop, "another command", keep=True, say=lambda line: None)
    assert study.work(second, [1], ASSUMED, say=lambda line: None) == []
    after = again.row(spec, 40)
    assert after["train_seconds"] == before["train_seconds"]
    assert {name: after[name] for name in ("fid_heun2", "fid_heun4")} == {
        name: before[name] for name in ("fid_heun2", "fid_heun4")
    }


def test_integrators_are_compared_on_the_same_networks(finished):
    folder, _, workshop, _ = finished
    ledger = Ledger(TINY, [0], folder / "out")
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    assert study.work(worker, [8], ASSUMED, say=lambda line: None) == []
    for name in ("synchronous", "power:3"):
        found = [ledger.figure(Spec(name, 0), 40, each) for each in ("heun4", "heun_euler3", "heun4^2")]
        assert len(set(found)) == 3
        assert None not in found
    report = study.QUESTIONS[8].report(ledger)
    assert report.sections[0].name == "about-4"
    assert [(row["schedule"], row["figure"]) for row in report.sections[0].rows][:2] == [
        ("synchronous", "fid"),
        ("synchronous", "kid"),
    ]
    assert report.sentences[0].startswith("synchronous: heun_euler3 against heun4 ")


def test_a_failed_run_is_a_row_and_the_rest_goes_on(finished, monkeypatch, tmp_path):
    _, _, workshop, _ = finished
    ledger = Ledger(TINY, [0], tmp_path)
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    points = ((40, ("heun2",)),)
    jobs = [TrainJob(Spec("cascade", 0, size="nowhere"), points), TrainJob(Spec("power:2", 100), points)]
    monkeypatch.setitem(study.QUESTIONS, 1, Question(1, "two", lambda *_: jobs, study.QUESTIONS[1].report))
    monkeypatch.setattr(study, "seconds", lambda *_: 1.0)  # the estimate would name the unknown size
    assert study.work(worker, [1], ASSUMED, say=lambda line: None) == []
    row = ledger.row(jobs[0].spec, 40)
    assert row["status"] == FAILED
    assert "nowhere" in row["error"]
    assert ledger.row(jobs[1].spec, 40)["status"] == "done"
    assert "cascade 0 nowhere" in study.write_reports(ledger, [1], "x").read_text()


def test_what_was_scored_before_a_failure_stays_done(finished, monkeypatch, tmp_path):
    _, _, workshop, _ = finished
    ledger = Ledger(TINY, [0], tmp_path)
    score = workshop.score

    def breaks(spec, trained, step, name):
        if step == 40:
            raise RuntimeError("the device is gone")
        return score(spec, trained, step, name)

    monkeypatch.setattr(workshop, "score", breaks)
    job = TrainJob(Spec("power:2", 7), ((20, ("heun2",)), (40, ("heun2",))))
    study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None).run(job)
    rows = [ledger.row(job.spec, step) for step in (20, 40)]
    assert [row["status"] for row in rows] == ["done", FAILED]
    assert float(rows[0]["fid_heun2"]) > 0
    assert "the device is gone" in rows[1]["error"]


def test_failures_in_a_row_stop_the_study(finished, monkeypatch, tmp_path):
    _, _, workshop, _ = finished
    ledger = Ledger(TINY, [0], tmp_path)
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    jobs = [TrainJob(Spec(f"offset:{i}", 0, size="nowhere"), ((40, ("heun2",)),)) for i in range(5)]
    monkeypatch.setitem(study.QUESTIONS, 1, Question(1, "five", lambda *_: jobs, study.QUESTIONS[1].report))
    monkeypatch.setattr(study, "seconds", lambda *_: 1.0)
    assert len(study.work(worker, [1], ASSUMED, say=lambda line: None)) == 5 - study.FAILURES
    assert len(ledger.runs.rows) == study.FAILURES


def test_processes_share_the_work(finished, monkeypatch, tmp_path):
    """What another process holds is left to it, and taken once that process has died without doing it."""
    _, _, workshop, _ = finished
    ledger = Ledger(TINY, [0], tmp_path)
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    points = ((40, ("heun2",)),)
    jobs = [TrainJob(Spec(name, 100), points) for name in TINY.fixed]
    monkeypatch.setitem(study.QUESTIONS, 1, Question(1, "two", lambda *_: jobs, study.QUESTIONS[1].report))
    claim = workshop.claim(jobs[0].spec)
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(claim)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    done, run = [], worker.run

    def recorded(job):
        done.append(job.spec.schedule)
        run(job)

    monkeypatch.setattr(worker, "run", recorded)
    monkeypatch.setattr(study, "WAIT", 0.05)
    monkeypatch.setattr(study.time, "sleep", lambda _: holder.poll() is None and (holder.kill(), holder.wait()))
    assert study.work(worker, [1], ASSUMED, say=lambda line: None) == []
    assert done == ["power:2", "synchronous"]


def test_what_another_process_has_just_finished_is_planned_on(finished, monkeypatch, tmp_path):
    """It finished the first job between our plan and our claim, and that makes the second one ready."""
    _, _, workshop, _ = finished
    ledger, elsewhere = Ledger(TINY, [0], tmp_path), Ledger(TINY, [0], tmp_path)
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    points = ((40, ("heun2",)),)
    first, second = (TrainJob(Spec(name, 100), points) for name in TINY.fixed)

    def jobs(ledger, _):
        return [first] if ledger.missing(first) else [first, second]

    def finished_meanwhile(ledger, job):
        if job == first:
            study.Worker(elsewhere, workshop, "another", keep=True, say=lambda line: None).run(first)
            ledger.refresh()
        return ledger.missing(job) == job

    monkeypatch.setitem(study.QUESTIONS, 1, Question(1, "two", jobs, study.QUESTIONS[1].report))
    monkeypatch.setattr(study, "_still_missing", finished_meanwhile)
    assert study.work(worker, [1], ASSUMED, say=lambda line: None) == []
    assert ledger.row(second.spec, 40)["command"] == "the command"


def test_two_tables_of_one_file_lose_no_row(tmp_path):
    first, second = (Table(tmp_path / "rows.csv", ["name", "value", "more"], 1) for _ in range(2))
    first.put({"name": "a", "value": 1})
    second.put({"name": "b", "value": 2})
    first.put({"name": "b", "more": 3})
    second.refresh()
    assert [tuple(row.values()) for row in second.rows.values()] == [("a", "1", ""), ("b", "2", "3")]
    assert second.rows == Table(first.path, first.columns, 1).rows
    first.path.write_text("name,value,more\na,1,\n")  # somebody takes a row out: it must not come back
    second.put({"name": "c", "value": 4})
    assert [row["name"] for row in second.rows.values()] == ["a", "c"]


def test_time_limit_starts_nothing_that_does_not_fit(finished, tmp_path):
    _, _, workshop, _ = finished
    ledger = Ledger(TINY, [0], tmp_path)
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    left = study.work(worker, [1], Rates(10.0, 1.0, 1.0), limit=5.0, say=lambda line: None)
    assert left
    assert not ledger.runs.rows


def test_main_run_starts_from_the_probes_weights(finished):
    _, _, workshop, _ = finished
    study_ = replace(TINY, probes={"base": (), "main shape": ("probe.depth=1", "probe.width=32", "probe.heads=2")})
    warm = Workshop(study_, workshop.out, workshop.work / "warm", lambda line: None)
    warm._inputs = workshop._inputs
    spec = Spec("C", 0, probe="main shape", start="probe")
    config = study_.config(spec, 3)
    warm._start_from_probe(spec, config, warm.schedule(spec), warm.run_folder(spec))
    start = load_model(warm.run_folder(spec))
    network, _ = warm._probe_network(study_.probe_config("C", "main shape", 0), "C", "main shape", 0)
    expected = network.state_dict()
    for ema in (True, False):
        found = load_model(warm.run_folder(spec), ema=ema).model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert start.info.step == 0
    trained = warm.train(spec, [3])
    assert load_model(trained.folder).info.step == 3
    assert 0 < warm.probe_steps("main shape") < study_.steps


def test_seeds_of_the_command_line():
    assert list(study._seeds("3")) == [0, 1, 2]
    assert list(study._seeds("3-5")) == [3, 4, 5]
    for text in ("0", "5-3", "3-", "x", "99-100", "-2"):
        with pytest.raises(UserError, match="--seeds"):
            study._seeds(text)


def test_rows_of_other_settings_are_not_taken_for_these(capsys, tmp_path):
    words = ["--preset", "digits", "--dry-run", "--seeds", "1", "--out", str(tmp_path), "--work", str(tmp_path / "w")]
    ledger = Ledger(STUDIES["digits"], [0], tmp_path)
    fake(ledger, Spec("synchronous", 0), {"heun10": 3.0, "heun18": 3.0}, step=300)
    assert study.main([*words, "--set", "data.root=elsewhere"]) == 0
    capsys.readouterr()
    assert study.main([*words, "--set", "train.lr=1e-5"]) == 2
    assert f"--set: train.lr=1e-5: the rows in {tmp_path} were made with none" in capsys.readouterr().err
    other = Ledger(STUDIES["digits"], [0], tmp_path / "other")
    study.check_settings(other, ["train.lr=1e-5", "data.root=x"], write=True)
    fake(other, Spec("synchronous", 0), {"heun10": 3.0, "heun18": 3.0}, step=300)
    study.check_settings(other, ["data.root=y", "train.lr=1e-5"], write=True)
    with pytest.raises(UserError, match=r"made with train\.lr=1e-5: give another --out"):
        study.check_settings(other, [], write=True)


def test_plan_and_bad_input(capsys, tmp_path):
    words = ["--preset", "digits", "--dry-run", "--seeds", "1", "--out", str(tmp_path), "--work", str(tmp_path / "w")]
    assert study.main(words) == 0
    said = capsys.readouterr().out
    for number in study.QUESTIONS:
        assert f"question {number}: " in said
    assert "assumed" in said
    assert "known after the scan" in said
    assert not list(tmp_path.iterdir())
    for bad, says in (
        (["--preset", "digit"], "did you mean 'digits'"),
        (["--questions", "10"], "--questions"),
        (["--preset", "digits", "--seeds", "0"], "--seeds"),
        (["--preset", "digits", "--set", "train.stps=3", "--dry-run"], "did you mean 'steps'"),
        (["--preset", "cifar10", "--set", f"data.root={tmp_path}"], "cifar10"),
    ):
        assert study.main([*bad, "--out", str(tmp_path)]) == 2
        assert says in capsys.readouterr().err
    assert isinstance(study.parser(), argparse.ArgumentParser)
