"""The comparison of precisions: what it trains, what it reads back, and that its emulation ends with it."""

import csv

import pytest
import torch

from bench import precision_curve
from bench.precision_curve import Point, configuration, emulated, paired, parser, table
from fastasync.training import build


def points(name, losses):
    return [Point("d", "c", "cpu", "t", "digits", "preset", name, 10 * (i + 1), x, 1.0) for i, x in enumerate(losses)]


def test_difference_of_twins():
    made = points("bf16:0", [4.0, 2.0, 1.0, 1.0]) + points("fp8:0", [4.0, 2.1, 1.01, 1.03]) + points("bf16:1", [3.9])
    assert paired(made, "fp8:0", "bf16:0")[2:] == [(30, pytest.approx(0.01)), (40, pytest.approx(0.03))]
    lines = table(made, "bf16:0")  # the last quarter: step 40
    assert lines[0].startswith("steps 30 to 40")
    assert [line.split()[0] for line in lines[1:]] == ["bf16:0", "fp8:0"]
    assert "+3.00 %" in lines[2]


def test_configurations_differ_in_precision_and_seed_only():
    options = parser().parse_args(["--preset", "digits", "--steps", "30", "--set", "train.batch=32"])
    one, other = configuration(options, "bf16", 0), configuration(options, "fp8", 0)
    assert (one.train.precision, other.train.precision, one.train.steps, one.train.batch) == ("bf16", "fp8", 30, 32)
    assert configuration(options, "bf16", 1).data.seed == 1
    assert configuration(parser().parse_args(["--size", "S"]), "bf16", 0).model.size == "S"


def test_emulation_ends(monkeypatch):
    seen = []
    monkeypatch.setattr(build, "use_fp8", lambda *a, **k: seen.append(k))
    before = build.use_fp8
    for wanted in (True, False):
        with emulated(wanted):
            build.use_fp8(None, None)
    assert seen == [{"emulate": True}, {}]
    assert build.use_fp8 is before


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    few = ["--set", "representations.encoder_steps=5", "--set", "representations.semvae_steps=5"]
    small = ["--set", "train.batch=8", "--set", "train.warmup=5", *few]
    command = ["--preset", "digits", "--steps", "20", "--emulate", "--out", str(tmp_path), *small]
    assert precision_curve.main([*command, "--runs", "bf16:0,fp8:0"]) == 0
    with open(tmp_path / "curve.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["run"], row["step"]) for row in rows] == [
        (name, step) for name in ("bf16:0", "fp8 emulated:0") for step in ("10", "20")
    ]
    first, second = float(rows[1]["loss"]), float(rows[3]["loss"])
    assert first != second
    assert abs(first - second) < 0.02 * first
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "fp8 emulated:0" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert precision_curve.main([*command[:4], *command[5:], "--runs", "fp8:0"]) == 2  # again, not emulated
