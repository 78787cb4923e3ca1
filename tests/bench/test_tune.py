"""The sweep of launch parameters at tiny sizes: what it keeps, refuses and restores."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastasync_kernels import adaln, swiglu

from bench import tune, tune_targets
from bench.subjects.common import XL, Random

ROOT = Path(__file__).parents[2]


def rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def small(kernel, direction):
    (found,) = [t for t in tune_targets.targets(tune.TINY, [kernel]) if t.direction == direction]
    return found


def sweep(tmp_path):
    return tune.Sweep("rehearse", tmp_path / "tune.csv", 100.0, rounds=1)


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses in the interpreter")


def test_every_target_is_right_at_its_own_setting_and_restores_it():
    for target in tune_targets.targets(tune.TINY, list(tune_targets.KERNELS)):
        before = target.current()
        other = dict(before.items()) | {"maxnreg": 96}
        with target.setting(other):
            assert target.current() == other
        assert target.current() == before
        assert all(target.current()[name] in (*knob.options, before[name]) for name, knob in target.knobs.items())
        if target.kernel != "qknorm_rope":  # slow in the interpreter; its own tests cover it
            draw = Random(torch.device("cpu"), 0, torch.float32)
            tune.check({"reference": target.reference, "ours": target.ours}, target.proof(draw, 2))


def test_a_sweep_writes_every_candidate_and_changes_nothing(tmp_path):
    target, before = small("swiglu", "backward, bias"), swiglu.BIAS_BACKWARD
    line = sweep(tmp_path).tune(target, 100.0, few=True)
    found = rows(tmp_path / "tune.csv")
    assert before == swiglu.BIAS_BACKWARD
    assert line.startswith("swiglu backward, bias")
    assert {row["status"] for row in found} == {"current", "timed", "best"}
    timed = [row["setting"] for row in found if row["status"] == "timed"]
    assert len(timed) == len(set(timed)) >= 5
    assert all(float(row["ms"]) > 0 and float(row["share"]) > 0 for row in found)
    assert not any("rows=64" in text and "chunk=16 " in text for text in timed)  # no whole number of rows


def test_candidates_that_are_wrong_or_fail_are_recorded_and_not_timed(tmp_path, monkeypatch):
    target, made = small("adaln", "forward"), sweep(tmp_path)
    real = adaln._launch_forward

    def launch(x, *rest):
        if adaln.FORWARD.chunk == 8:
            raise RuntimeError("out of resource: shared memory")
        residual, out = real(x, *rest)
        return residual, out * 1.001 if adaln.FORWARD.chunk == 16 else out

    monkeypatch.setattr(adaln, "_launch_forward", launch)
    made.tune(target, 100.0, few=True)
    status = {(row["setting"].split()[0], row["status"]) for row in rows(tmp_path / "tune.csv")}
    assert {("chunk=8", "failed"), ("chunk=16", "wrong")} <= status
    assert not {("chunk=8", "timed"), ("chunk=16", "timed")} & status
    assert "shared memory" in (tmp_path / "tune.csv").read_text()


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "tune.csv").write_text("a,b\n")
    with pytest.raises(SystemExit, match="other columns"):
        sweep(tmp_path)


def test_only_chunks_of_whole_rows():
    (target,) = [t for t in tune_targets.targets(XL, ["adaln"]) if t.direction == "backward"]
    assert target.possible({**target.current(), "chunk": 43, "rows": 1})
    assert not target.possible({**target.current(), "chunk": 43, "rows": 2})


def test_command_line(tmp_path, capsys):
    arguments = ["--kernels", "swiglu", "--only", "forward", "--out", str(tmp_path / "tune.csv"), "--few"]
    assert tune.main(["--rehearse", "--rounds", "1", *arguments]) == 0
    assert "swiglu forward" in capsys.readouterr().out
    assert tune.main(["--rehearse", "--kernels", "attention"]) == 2
    assert tune.main(arguments) == 2
    assert "--rehearse and --offline need none" in capsys.readouterr().err


def test_offline_says_what_a_gpu_would_hold(tmp_path):
    """Compiled for sm_90: registers, shared memory and how many programs fit; spills are named."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "bench.tune", "--offline", "--kernels", "swiglu", "--only", "forward", "--few"]
    out = tmp_path / "tune.csv"
    done = subprocess.run([*command, "--out", str(out)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(out)
    assert {row["status"] for row in found} == {"compiled"}
    assert all(20 < int(row["registers"]) < 256 and int(row["programs"]) >= 1 for row in found)
    current = found[0]
    assert float(current["rounds"]) == pytest.approx(65536 / 4 * 3 / (132 * int(current["programs"])), rel=1e-3)
