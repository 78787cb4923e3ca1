"""``torchrun ... -m fastasync train-semvae``: two ranks reach what one does, stop together, and resume on one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastasync.distributed import Session
from fastasync.errors import UserError
from fastasync.representations import train_semvae
from fastasync.representations.semvae import SemVAESettings
from fastasync.representations.train_semvae import CachedFeatures, SemVAETraining, train
from fastasync.training.interrupt import EXIT_CODE, Interrupted

ROOT = Path(__file__).parents[2]
COUNT, WIDTH, GRID = 120, 12, 2
SMALL = SemVAESettings(16, 1, 2, steps=40, batch=24, learning_rate=5e-3)
TRAINING = SemVAETraining(SMALL, channels=4, held_out=12, log_every=10, save_every=10, evaluate_every=20)
VIT = {"name": "test", "hub": False}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A folder of cached features near a plane of 4 dimensions, of 3 classes."""
    folder = tmp_path_factory.mktemp("features")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % 3
    hidden = torch.randn(3, 4, generator=generator)[labels][:, :, None, None]
    hidden = hidden + 0.5 * torch.randn(COUNT, 4, GRID, GRID, generator=generator)
    mix = torch.randn(WIDTH, 4, generator=generator)
    maps = torch.einsum("dk,nkhw->ndhw", mix, hidden).contiguous()
    save_file({"feats_dino": maps, "labels": labels}, folder / "a.safetensors")
    return folder


class Stopping(CachedFeatures):
    """The process gets SIGTERM while it reads that batch of training."""

    stop_at = 15

    def stream(self, batches):
        for number, features in enumerate(super().stream(batches)):
            if number == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield features


def command(features, out, *more):
    """TRAINING's settings as options."""
    words = [
        "train-semvae", "--features", features, "--out", out, "--device", "cpu", "--grid", GRID, "--vit", "test",
        "--width", 16, "--depth", 1, "--heads", 2, "--steps", 40, "--batch", 24, "--learning-rate", 5e-3,
        "--channels", 4, "--held-out", 12, "--log-every", 10, "--save-every", 10, "--evaluate-every", 20, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def two_ranks(*words, timeout=120):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastasync"]
    return subprocess.run(
        [*launch, *words], env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False,
    )  # fmt: skip


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def assert_same(out, other):
    """But for the order of float32 sums."""
    found, wanted = (load_file(folder / "semvae.safetensors") for folder in (out, other))
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.endswith("qkv.bias"):  # attention does not depend on the keys' bias: its gradient is rounding only
            continue
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    assert [record.keys() for record in records(out)] == [record.keys() for record in records(other)]
    for one, two in zip(records(out), records(other)):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


def test_two_ranks_reach_what_one_process_does(features, tmp_path):
    train(CachedFeatures(features), tmp_path / "one", TRAINING, VIT, progress=False)
    done = two_ranks(*command(features, tmp_path / "two"))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("held_out_cosine: ") == 1
    assert_same(tmp_path / "two", tmp_path / "one")
    assert [record["step"] for record in records(tmp_path / "two")] == [10, 20, 30, 40]

    # one process stops at step 16, two ranks go on
    with pytest.raises(Interrupted):
        train(Stopping(features), tmp_path / "parts", TRAINING, VIT, progress=False)
    assert 0 < json.loads((tmp_path / "parts" / "state.json").read_text())["step"] < 40
    done = two_ranks(*command(features, tmp_path / "parts"))
    assert done.returncode == 0, done.stdout
    assert_same(tmp_path / "parts", tmp_path / "one")


STOPPED = """
import os, signal, sys
from fastasync.cli import main
from fastasync.representations import train_semvae
average, calls = train_semvae._Run._average, []

def stop(self, values):  # rank 1 alone gets the signal
    calls.append(1)
    if len(calls) == 14 and self.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return average(self, values)

train_semvae._Run._average = stop
code = 0
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
open(f"{os.environ['CODES']}{os.environ['RANK']}", "w").write(str(code))
"""


def test_a_signal_on_one_rank_stops_both_and_one_process_goes_on(features, tmp_path, monkeypatch):
    out, script = tmp_path / "out", tmp_path / "stopped.py"
    script.write_text(STOPPED)
    monkeypatch.setenv("CODES", str(tmp_path / "code"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*launch, *command(features, out)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == [str(EXIT_CODE)] * 2, done.stderr
    assert json.loads((out / "state.json").read_text())["step"] == 15
    train(CachedFeatures(features), out, TRAINING, VIT, progress=False)
    train(CachedFeatures(features), tmp_path / "one", TRAINING, VIT, progress=False)
    assert_same(out, tmp_path / "one")


def test_bad_input_is_one_line_of_both_ranks(features, tmp_path):
    out = tmp_path / "out"
    done = two_ranks(*command(features, out, "--held-out", 0))
    lines = [line for line in done.stdout.splitlines() if line.startswith("fastasync: error")]
    assert lines == ["fastasync: error: held_out: 0: must be at least 1"], done.stdout
    assert not out.exists()


def test_a_batch_that_does_not_divide_names_the_nearest(features, tmp_path, monkeypatch):
    monkeypatch.setattr(train_semvae, "session", lambda: Session({"RANK": "0", "WORLD_SIZE": "5"}))
    with pytest.raises(UserError, match="batch: 24: must divide into 5 ranks; nearest: 25"):
        train(CachedFeatures(features), tmp_path / "out", TRAINING, VIT, progress=False)
    assert not (tmp_path / "out").exists()
