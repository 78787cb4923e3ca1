"""A rule's choice that was trained under another name: its figures are taken, and only those of the same run."""

from dataclasses import replace

import pytest

from bench.science import plan, study
from bench.science.plan import Ledger, Rates, TrainJob
from bench.science.runner import Workshop
from bench.science.specs import STUDIES, Spec

STUDY = STUDIES["digits"]
STEPS = STUDY.steps


def test_a_schedule_under_another_name_is_not_trained_again(monkeypatch, tmp_path):
    ledger = Ledger(STUDY, [0], tmp_path)
    workshop = Workshop(STUDY, tmp_path, tmp_path / "work", lambda line: None)
    spec, chosen = Spec("power:2", 5), workshop.schedule(Spec("power:2", 5))
    monkeypatch.setattr(workshop, "schedule", lambda spec: chosen)  # what C finds, too
    worker = study.Worker(ledger, workshop, "the command", keep=True, say=lambda line: None)
    same = {"fingerprint": chosen.fingerprint, "hardware": workshop.hardware, "commit": worker.commit}
    ledger.runs.put(
        {
            **vars(spec),
            "step": STEPS,
            **same,
            "status": "done",
            "train_seconds": 40.0,
            "sample_seconds": 2.4,
            "score_seconds": 1.0,
            "fid_heun10": 3.0,
            "kid_heun10": 0.5,
        }
    )
    job = TrainJob(Spec("C", 5), ((STEPS, ("heun10",)),))
    worker.run(job)
    row = ledger.row(job.spec, STEPS)
    assert (row["status"], row["same_as"], row["fid_heun10"], row["kid_heun10"]) == ("done", "power:2", "3", "0.5")
    assert (row["fingerprint"], float(row["train_seconds"])) == (chosen.fingerprint, 0)
    rates = plan.measured_rates(ledger, workshop.hardware, Rates(9.0, 9.0, 9.0))
    assert rates.step == pytest.approx(40 / STEPS)  # of the run alone
    ledger.runs.put({**vars(spec), "step": STEPS, "fid_heun18": 2.0})  # a sampler more: it is taken, too
    worker.run(TrainJob(job.spec, ((STEPS, ("heun18",)),)))
    assert ledger.row(job.spec, STEPS)["fid_heun18"] == "2"
    assert not workshop.run_folder(job.spec).exists()
    assert ledger.twin(job.spec, STEPS, ["heun10"], same) is not None
    # another seed, objective, step, sampler or commit is another run
    cases = [
        (replace(job.spec, seed=6), STEPS, "heun10", {}),
        (replace(job.spec, objective="uncorrected"), STEPS, "heun10", {}),
        (job.spec, STEPS // 2, "heun10", {}),
        (job.spec, STEPS, next(name for name in STUDY.samplers if name not in ("heun10", "heun18")), {}),
        (job.spec, STEPS, "heun10", {"commit": "another"}),
    ]
    for other, step, name, changed in cases:
        assert ledger.twin(other, step, [name], same | changed) is None
