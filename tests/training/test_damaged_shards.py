"""A flipped bit in a shard that rank 1 compares: both ranks stop, with its one line."""

import subprocess

import pytest

from fastasync.cli import main
from fastasync.training import checkpoint
from tests.training.deepspeed_kit import REPOSITORY, environment, launcher

pytestmark = pytest.mark.slow
SETTINGS = [
    "data.dataset=latents", "representations.names=texture,lowfreq", "representations.channels=48,3",
    "representations.grid=8", "schedule.name=offset:0.3", "model.depth=1", "model.width=32", "model.heads=2",
    "model.classes=2", "train.batch=8", "train.steps=20000", "train.checkpoint_every=2", "train.device=cpu",
    "data.flip=false",
]  # fmt: skip
LARGE = """
import sys, time
from pathlib import Path
from fastasync import cli, stages
from fastasync.data import verify
from fastasync.training import checkpoint

compare, folder = verify.check_hash, Path(sys.argv.pop(1))

def after_a_checkpoint(*arguments):
    while not checkpoint.steps(folder):
        time.sleep(0.01)
    compare(*arguments)

stages.AT_ONCE, verify.check_hash = 0, after_a_checkpoint
sys.exit(cli.main())
"""


@pytest.fixture
def latents(tmp_path, noise_images):
    """Two shards; a bit of the second one's numbers is wrong."""
    images, out = noise_images(tmp_path / "images", (32, 32)), tmp_path / "latents"
    options = ["--representations", "texture,lowfreq", "--size", "32", "--grid", "8", "--backend", "pil", "--device"]
    assert main(["encode", str(images), "--out", str(out), *options, "cpu", "--shard-size", "6"]) == 0
    shard = out / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-20] ^= 4
    shard.write_bytes(data)
    return out


def test_two_ranks_stop_before_a_step_and_at_one(tmp_path, latents):
    pytest.importorskip("deepspeed")
    script, out = tmp_path / "large.py", tmp_path / "run"
    script.write_text(LARGE)
    settings = [f"--set={setting}" for setting in (*SETTINGS, f"data.root={latents}")]
    for start in ([REPOSITORY / "train.py"], [script, out / "checkpoints", "train"]):
        command = map(str, [*launcher("torchrun"), *start, "--preset=digits", f"--out={out}", *settings])
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
        (line,) = [line for line in done.stderr.splitlines() if "fastasync: error" in line]
        assert f"{latents / 'shard-00001.safetensors'}: altered (hash " in line
        assert "exitcode  : 2 " in done.stderr
        newest = checkpoint.newest(out / "checkpoints")
        assert (newest.path is not None) == (start[-1] == "train")
        if newest.path is not None:
            assert line.endswith(f"the last checkpoint is {newest.path}")
