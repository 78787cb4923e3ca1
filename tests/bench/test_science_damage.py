"""What is damaged or missing in the study's folders is an error with its remedy, never a run that failed."""

import re
from dataclasses import replace

import pytest

from bench.science import runner, study
from bench.science.plan import FAILED, Ledger, RankJob, Rates, TrainJob
from bench.science.rules import rank_agreement
from bench.science.runner import Workshop
from bench.science.specs import STUDIES, Spec
from fastasync.errors import UserError
from fastasync.files import write_json
from fastasync.probe.learn import NETWORK, NETWORK_FACTS, RESULT, SURFACE
from fastasync.training import Interrupted, TrainingError

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
    headline=("heun2",),
    curve=("heun2",),
    integrators=(),
    fixed=("synchronous", "power:2"),
    scan_seeds=1,
    rank_samples=60,
    sample_batch=40,
)
SPEC = Spec("power:2", 100)
JOB = TrainJob(SPEC, ((40, ("heun2",)),))


def quiet(line):
    return None


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    return Workshop(TINY, folder / "out", folder / "work", quiet)


def worker(workshop, out):
    return study.Worker(Ledger(TINY, [0], out), workshop, "the command", keep=True, say=quiet)


def test_a_damaged_run_is_an_error_with_its_remedy(workshop, tmp_path):
    works = worker(workshop, tmp_path)
    works.run(JOB)
    done = dict(works.ledger.row(SPEC, 40))
    assert done["status"] == "done"
    assert float(done["train_seconds"]) > 0
    folder = workshop.run_folder(SPEC)
    for path, damaged in (
        (folder / "seconds.json", b""),
        (next((folder / "checkpoints" / "step_00000040").glob("*.safetensors")), None),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damaged is None else damaged)
        again = worker(workshop, tmp_path / path.name)
        again.run(JOB)
        assert str(path.parent) in str(again.stopped[SPEC])
        assert not again.ledger.runs.rows
        path.write_bytes(whole)
    # the seconds of a process that was killed are nobody's to know: the figure is there, they are not
    for damaged in ({"seconds": 3.0, "step": 20}, None):
        (folder / "seconds.json").unlink() if damaged is None else write_json(folder / "seconds.json", damaged)
        again = worker(workshop, tmp_path / f"killed {damaged}")
        again.run(JOB)
        row = again.ledger.row(SPEC, 40)
        assert (row["status"], row["fid_heun2"], row["train_seconds"]) == ("done", done["fid_heun2"], "")
    works.run(JOB)  # a sampler more would leave what the row knows
    assert works.ledger.row(SPEC, 40)["train_seconds"] == done["train_seconds"]


def test_a_damaged_probe_is_an_error_with_its_remedy(workshop, tmp_path):
    job, works = RankJob("base", 0), worker(workshop, tmp_path)
    works.run(job)
    assert all(row["status"] == "done" for row in works.ledger.ranks.rows.values())
    folder = workshop.probe_folder("C", "base", 0, "pair")
    for name in (NETWORK_FACTS, NETWORK, RESULT, SURFACE):
        whole = (folder / name).read_bytes()
        for damaged in (None, whole[: len(whole) // 2]):
            if damaged is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damaged)
            if name in (RESULT, SURFACE) and damaged is None:
                continue  # nothing says that it was done: it is done again; a probe without pictures is one, too
            again = worker(workshop, tmp_path / name)
            again.run(job)
            assert re.search("remove|again", str(again.stopped[job]))
            assert not again.ledger.ranks.rows
        (folder / name).write_bytes(whole)
    # a cell that was emptied by hand
    works.ledger.ranks.put({"variant": "base", "seed": 0, "schedule": "power:2", "objective": ""})
    for name, fid in (("synchronous", 3.0), ("power:2", 2.0)):
        values = {**vars(Spec(name, 100)), "step": 40, "status": "done", "fid_heun2": fid}
        works.ledger.runs.put(values)
    with pytest.raises(UserError, match="is no objective of probe base, seed 0, power:2: remove that row"):
        rank_agreement(works.ledger, "base", 0)


@pytest.mark.parametrize(
    "error", [TrainingError("the loss", 9, "diverged"), UserError("probe.budget", 0.01, "leaves too little")]
)
def test_a_run_that_cannot_be_done_as_it_is_has_failed(workshop, monkeypatch, tmp_path, error):
    def breaks(*_):
        raise error

    monkeypatch.setattr(workshop, "train", breaks)
    works = worker(workshop, tmp_path)
    works.run(JOB)
    assert works.ledger.row(SPEC, 40)["status"] == FAILED


def test_seconds_of_an_interrupted_run_are_added_up(workshop, monkeypatch):
    """The second process adds its own; a look at the clock takes 10 s here."""
    spec, looks, real = Spec("synchronous", 7), iter(range(0, 10_000, 10)), runner.train
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(looks)))

    def stopped(*args, **kwargs):
        real(replace(args[0], train=replace(args[0].train, steps=20)), *args[1:], **kwargs)
        raise Interrupted(20, args[3])

    monkeypatch.setattr(runner, "train", stopped)
    with pytest.raises(Interrupted):
        workshop.train(spec, [40])
    record = runner.read_json(workshop.run_folder(spec) / "seconds.json", "")
    assert record["step"] == 20
    assert (first := record["seconds"]) >= 10
    monkeypatch.setattr(runner, "train", real)
    both = workshop.train(spec, [40]).seconds
    assert both >= first + 10
    assert workshop.train(spec, [40]).seconds == both  # it is complete: nothing is added


def test_two_studies_with_other_settings_share_no_folder(tmp_path, capsys):
    ledger = Ledger(TINY, [0], tmp_path)
    study.check_settings(ledger, [], write=True)  # an empty folder: the first one says what its rows are made with
    with pytest.raises(
        UserError, match=r"was begun with none: give another --out and --work, or remove .*settings.json"
    ):
        study.check_settings(ledger, ["train.lr=1e-5"], write=True)
    for text, says in (("[", "cannot be read"), ("null", "holds no list"), ("[1]", "holds no list")):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(UserError, match=says):
            study.check_settings(ledger, [], write=True)
    words = ["--preset", "digits", "--out", str(tmp_path / "new"), "--set", "train.lr=abc"]
    assert study.main(words) == 2  # said before anything is written
    assert "train.lr" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_damaged_stops_its_own_job_alone(workshop, monkeypatch, tmp_path):
    """The next job goes on; a file that is gone is no failed run, a setting that cannot be is one."""
    real = workshop.train

    def train(spec, steps):
        if spec.schedule == "synchronous":
            raise UserError("data.root", "/gone", "no such folder")
        return real(spec, steps)

    monkeypatch.setattr(workshop, "train", train)
    works = worker(workshop, tmp_path)
    jobs = [TrainJob(Spec("synchronous", 100), ((40, ("heun2",)),)), JOB]
    monkeypatch.setitem(study.QUESTIONS, 1, study.QUESTIONS[1]._replace(jobs=lambda *_: jobs))
    left = study.work(works, [1], Rates(0.01, 1e-4, 1.0), say=quiet)
    assert [job.spec.schedule for job in left] == ["synchronous"]
    assert "/gone" in str(works.stopped[jobs[0].spec])
    assert list(works.ledger.runs.rows) == [("power:2", "100", "base", "corrected", "pair", "base", "scratch", "40")]
    assert works.ledger.row(SPEC, 40)["status"] == "done"


def test_a_sampler_more_keeps_the_commit_of_the_row(workshop, monkeypatch, tmp_path):
    works = worker(workshop, tmp_path)
    works.commit = "first"
    works.run(JOB)
    works.commit = "second"
    works.run(TrainJob(SPEC, ((40, ("heun2",)),)))
    assert works.ledger.row(SPEC, 40)["commit"] == "first and second"
    works.run(TrainJob(SPEC, ((40, ("heun2",)),)))
    assert works.ledger.row(SPEC, 40)["commit"] == "first and second"
