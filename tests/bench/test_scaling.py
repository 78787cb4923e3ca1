"""The benchmark of several GPUs, on gloo ranks: what is timed, against what, and what the rows say."""

import os
import subprocess
import sys

import pytest

from bench import scaling
from bench.harness import ROOT, read_rows


def test_the_baseline_is_timed_before_and_after():
    assert [(leg.variant, leg.zero, leg.batch) for leg in scaling.legs(2, 256)] == [
        ("plain", None, 256),
        ("zero 1", 1, 256),
        ("zero 2", 2, 256),
        ("plain", None, 256),
        ("zero 1 strong", 1, 128),
        ("zero 1 by DeepSpeed", 1, 256),
    ]
    assert [leg.variant for leg in scaling.legs(1, 256)] == ["plain", "zero 1", "plain"]
    assert len(scaling.legs(3, 256)) == 5


def test_configurations():
    plain, two, strong = (
        scaling.config_of(leg, "XL", 2, "selective", "regional").train for leg in scaling.legs(2, 256)[:5:2]
    )
    assert (plain.engine, plain.batch, plain.memory) == ("plain", 256, "selective")
    assert (two.engine, two.zero, two.batch, two.memory) == ("deepspeed", 2, 512, "selective")
    assert (strong.engine, strong.zero, strong.batch) == ("deepspeed", 1, 256)


def test_of_nccls_settings_no_path_is_written():
    found = {"NCCL_NVLS_ENABLE": "0", "NCCL_TOPO_FILE": "/some/where", "PATH": "/usr/bin", "TORCH_NCCL_X": "1"}
    said = scaling.settings_of_nccl(found)
    assert said.endswith(" NCCL_NVLS_ENABLE=0 NCCL_TOPO_FILE=... TORCH_NCCL_X=1")


@pytest.mark.slow
def test_one_process_and_two_ranks(tmp_path):
    pytest.importorskip("deepspeed")
    chosen = ["--gpus", "2", "--size", "tiny", "--rounds", "1", "--only", "plain", "--only", "zero 1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.scaling", *chosen, "--record", "--results", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "DS_BUILD_OPS": "0",
            "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "cpu.csv")
    assert [(row.case, row.variant) for row in rows] == [
        ("tiny on 1", "plain"),
        ("tiny on 1", "zero 1"),
        ("tiny on 1", "plain"),
        ("tiny on 1", "plain"),
        ("tiny on 2", "plain at once"),
        ("tiny on 2", "zero 1"),
        ("tiny on 1", "plain"),
        ("on 2", "all_reduce"),
    ]
    base, two = rows[3], rows[5]
    assert two.images_per_s == pytest.approx(16e3 / two.ms, rel=1e-3)
    said = float(two.note.split("x the plain engine")[0])
    assert said == pytest.approx(two.images_per_s / base.images_per_s, rel=2e-3)
