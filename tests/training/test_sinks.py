"""metrics.csv says what metrics.jsonl says; Weights & Biases, played by a module that only remembers."""

import csv
import json
import sys
import types

import pytest

from fastasync import stages
from fastasync.config import differences
from fastasync.errors import UserError
from fastasync.run import Run
from fastasync.training.metrics import MetricsLog
from fastasync.training.sinks import wandb_package


def rows(folder):
    with open(folder / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(folder):
    """The table has the records' names in their order, and their numbers to the last bit."""
    table, lines = rows(folder), records(folder)
    for row, record in zip(table, lines, strict=True):
        assert list(row) == list(record)
        for name, text in row.items():
            assert (None if text == "" else float(text)) == record[name]
    return [int(row["step"]) for row in table]


def test_csv_has_the_records_and_each_step_once(tmp_path, tiny, run, latents, disturbed):
    """Killed after step 6 was logged, the newest checkpoint at 4."""
    config = tiny(train=dict(steps=8))

    def crash(step):
        if step == 7:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(config, tmp_path, disturbed(latents(), crash))
    assert same(tmp_path) == [2, 4, 6]
    (tmp_path / "metrics.csv").open("a").write("3,0.")
    (tmp_path / ".metrics.csv.123.partial").write_text("of a killed process")
    assert run(config, tmp_path).resumed_from == 4
    assert same(tmp_path) == [2, 4, 6, 8]
    assert not list(tmp_path.glob(".metrics*"))
    (tmp_path / "metrics.csv").unlink()  # a run of a version that wrote none
    run(tiny(train=dict(steps=10)), tmp_path)
    assert same(tmp_path) == [2, 4, 6, 8, 10]


def test_csv_with_a_record_of_other_names(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write({"step": 1, "loss": 1 / 3})
        log.write({"step": 2, "loss": None})
        log.write({"step": 3, "loss": 0.5, "new": 7})
        log.write({"step": 4, "loss": 0.25})
        log.sync()
    expected = "step,loss,new\n1,0.3333333333333333,\n2,,\n3,0.5,7\n4,0.25,\n"
    assert (tmp_path / "metrics.csv").read_text() == expected
    with MetricsLog(tmp_path, 4):
        pass
    assert (tmp_path / "metrics.csv").read_text() == expected


@pytest.fixture
def service(monkeypatch):
    """A stand-in for wandb that remembers its calls; ``fails`` names the function that raises."""
    fake = types.ModuleType("wandb")
    fake.started, fake.logged, fake.finished, fake.fails = [], [], 0, None

    def fail(name):
        if fake.fails == name:
            raise ConnectionError("no route\nto host")

    class Run:
        def log(self, values, step, commit):
            fail("log")
            assert commit
            fake.logged.append((step, values))

        def finish(self):
            fail("finish")
            fake.finished += 1

    def init(**options):
        fail("init")
        fake.started.append(options)
        return Run()

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_has_the_records(tmp_path, tiny, run, service):
    config = tiny(train=dict(wandb="denoise"))
    run(config, tmp_path / "one")
    (started,) = service.started
    assert (started["project"], started["name"], started["resume"]) == ("denoise", "one", "allow")
    assert started["dir"] == str(tmp_path / "one")
    assert started["config"]["train"]["batch"] == 8
    lines = records(tmp_path / "one")
    assert [step for step, _ in service.logged] == [2, 4, 6]
    for (_, values), line in zip(service.logged, lines):
        assert values == {name: value for name, value in line.items() if name != "step" and value is not None}
    assert service.finished == 1
    # resumed: the same run there; another folder, or a new start: another one
    longer = tiny(train=dict(wandb="denoise", steps=8))
    run(longer, tmp_path / "one")
    run(config, tmp_path / "two")
    ids = [options["id"] for options in service.started]
    assert ids[0] == ids[1] != ids[2]
    assert differences(config, tiny()) == []  # it may change within a run


def test_without_a_project_wandb_is_not_imported(tmp_path, tiny, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(tiny(), tmp_path)
    assert same(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("missing", [None, types.ModuleType("wandb")], ids=["missing", "folder"])
def test_missing_wandb_is_said_before_any_work(tiny, monkeypatch, missing, tmp_path):
    """A folder called wandb, which wandb itself leaves, imports as an empty package."""
    monkeypatch.setitem(sys.modules, "wandb", missing)
    with pytest.raises(UserError, match=r"pip install 'fastasync\[wandb\]'"):
        wandb_package()
    config = tiny(train=dict(wandb="denoise"), schedule=dict(name="synchronous"), evaluate=dict(metrics=["fid"]))
    monkeypatch.setattr(stages, "check_inputs", lambda config: 0)
    with pytest.raises(UserError, match="package wandb"):
        stages.preflight(Run(tmp_path, config), ("prepare", "probe", "train"))
    stages.preflight(Run(tmp_path, config), ("prepare", "sample"))


def test_wandb_that_cannot_start_is_one_line(tmp_path, tiny, run, service):
    service.fails = "init"
    with pytest.raises(UserError, match=r"train.wandb: denoise: ConnectionError.*WANDB_MODE=offline"):
        run(tiny(train=dict(wandb="denoise")), tmp_path)


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_wandb_that_fails_later_ends_nothing(tmp_path, tiny, run, service, caplog, fails):
    service.fails = fails
    assert run(tiny(train=dict(wandb="denoise")), tmp_path).step == 6
    assert same(tmp_path) == [2, 4, 6]
    (said,) = caplog.messages
    assert said == "wandb gets no more records of this run (ConnectionError: no route to host)"
