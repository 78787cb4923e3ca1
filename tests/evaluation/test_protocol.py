"""Figures keep their protocol through JSON and print it in full."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastasync.errors import UserError
from fastasync.evaluation import (
    Figure,
    GaussianStatistics,
    Protocol,
    evaluate,
    figures_from,
    hardware_name,
    load_figures,
    save_figures,
)

FIELDS = {
    "samples": 50_000,
    "reference": "cifar10-train",
    "reference_count": 50_000,
    "reference_fingerprint": "0123456789abcdef",
    "extractor": "inception-2015-12-05",
    "extractor_fingerprint": "fedcba9876543210",
    "schedule": "offset 0.3",
    "schedule_fingerprint": "aaaabbbbcccc",
    "integrator": "heun",
    "function_evaluations": 18,
    "guidance": "autoguidance 1.5",
    "labels": "balanced",
    "precision": "bf16",
    "seed": 7,
    "checkpoint_step": 6000,
    "ema": 0.9999,
    "decode": "patches, exact",
    "metric": "100 subsets of 1000, seed 0",
    "versions": {"torch": "2.13.0+cpu", "numpy": "2.4"},
    "hardware": "NVIDIA H200",
    "date": "2026-01-02",
}


def protocol(**changes) -> Protocol:
    return Protocol(**{**FIELDS, **changes})


def test_json_round_trip(tmp_path):
    figures = [Figure("fid", 3.152, protocol()), Figure("kid", -1e-5, protocol(ema=0), 2e-4)]
    save_figures(tmp_path / "figures.json", figures)
    assert load_figures(tmp_path / "figures.json") == figures


def test_describe_is_one_line_and_shows_everything():
    line = Figure("kid", 0.00123, protocol(), 2.5e-4).describe()
    assert "\n" not in line
    assert line.startswith("kid 0.00123 +- 0.00025 [50000 samples; ")
    for shown in ("cifar10-train 01234567 (50000)", "inception-2015-12-05 fedcba98", "schedule offset 0.3 aaaabbbb"):
        assert shown in line
    for shown in ("heun, 18 NFE", "autoguidance 1.5", "balanced labels", "bf16", "seed 7", "step 6000, EMA 0.9999"):
        assert shown in line
    for shown in ("decode patches, exact", "100 subsets of 1000", "torch 2.13.0+cpu", "NVIDIA H200", "2026-01-02"):
        assert shown in line


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_changes_the_line(name):
    value = FIELDS[name]
    changes = {str: "random" if name == "labels" else "zz" + str(value), dict: {"torch": "9"}, int: 3, float: 0.5}
    assert protocol(**{name: changes[type(value)]}).describe() != protocol().describe()


def test_defaults_describe_this_machine():
    plain = {k: v for k, v in FIELDS.items() if k not in ("versions", "date")}
    here = Protocol(**plain)
    assert here.versions["torch"] == str(torch.__version__)
    assert "python" in here.versions
    assert hardware_name("cpu").startswith("CPU")
    assert len(here.date) == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        here.seed = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("labels", "all"), ("samples", 0), ("samples", 10.5), ("seed", True), ("schedule", None), ("versions", "2.13")],
)
def test_bad_fields(name, value):
    with pytest.raises(UserError, match=f"protocol.{name}"):
        protocol(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "3.15"])
def test_values_are_finite_numbers(value):
    with pytest.raises(UserError, match="figure fid: value"):
        Figure("fid", value, protocol())


def test_bad_files(tmp_path):
    path = tmp_path / "figures.json"
    with pytest.raises(UserError, match="no such file"):
        load_figures(path)
    save_figures(path, [Figure("fid", 3.1, protocol())])
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not JSON"):
        load_figures(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="list of figures"):
        load_figures(path)
    values = json.loads(text)
    del values[0]["protocol"]["date"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"protocol\.date: missing"):
        load_figures(path)
    values[0]["protocol"] |= {"date": "2026-01-02", "colour": "red"}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"protocol\.colour: unknown"):
        load_figures(path)


def test_figures_from_an_evaluation(extractor, photos):
    result = evaluate(photos(60, 1), photos(70, 2), extractor, ("fid", "kid", "precision_recall"))
    rest = {k: v for k, v in FIELDS.items() if k not in ("samples", "reference_count", "extractor", "metric")}
    figures = {figure.name: figure for figure in figures_from(result, rest)}
    assert set(figures) == {"fid", "kid", "precision", "recall"}
    assert figures["fid"].value == result["fid"]
    assert figures["kid"].spread == result["kid_std"]
    assert figures["kid"].protocol.metric == "100 subsets of 60, seed 0"
    assert figures["fid"].protocol.metric == ""
    assert (figures["fid"].protocol.samples, figures["fid"].protocol.reference_count) == (60, 70)
    assert figures["fid"].protocol.extractor_fingerprint == extractor.fingerprint


def test_statistics_that_do_not_say_their_count(extractor, photos, tmp_path):
    reference = extractor.extract(photos(70, 2)).statistics()
    np.savez(tmp_path / "community.npz", mu=reference.mean.numpy(), sigma=reference.cov.numpy())
    result = evaluate(photos(60, 1), GaussianStatistics.load(tmp_path / "community.npz"), extractor)
    rest = {k: v for k, v in FIELDS.items() if k not in ("samples", "reference_count", "extractor", "metric")}
    (figure,) = figures_from(result, rest)
    assert figure.protocol.reference_count == 0
    assert "(size unknown)" in figure.describe()
