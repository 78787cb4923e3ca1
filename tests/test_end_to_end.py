"""From JPEGs to trained, resumed, sampled and exported networks: DALI on the CPU, shards, two DeepSpeed ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastasync.cli import main
from fastasync.data import load_images
from fastasync.model import load_into, load_state
from fastasync.training import load_model

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data.dataset=latents", "data.flip=true", "representations.names=texture,lowfreq",
    "representations.channels=48,3", "representations.grid=8", "representations.decoder=texture",
    "schedule.name=learned", "schedule.baselines=", "model.depth=2", "model.width=32", "model.heads=2",
    "model.classes=3", "train.batch=8", "train.steps=30", "train.checkpoint_every=15", "train.log_every=1",
    "train.precision=fp32", "probe.estimator=B", "probe.depth=1", "probe.width=16", "probe.heads=1", "probe.batch=2",
    "probe.budget=1", "sample.count=12", "sample.steps=2", "sample.batch=8",
]  # fmt: skip
STAGES = (1, 2, 3)

# `fastasync train` of several runs, one after the other, in the same ranks: starting them takes longer than training
RUNS = """import json, sys
from fastasync.cli import _command, parser
from fastasync.distributed import session
codes = [_command(parser("train").parse_args(command)) for command in json.loads(sys.argv[1])]
session().leave()
sys.exit(max(codes))
"""


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Digits 0, 1 and 2 as 40x36 JPEGs, one of them cut short."""
    folder = tmp_path_factory.mktemp("jpegs") / "images"
    digits = load_images("digits", "data", "train")
    for label in range(3):
        place = folder / f"digit {label}"
        place.mkdir(parents=True)
        for index in (digits.labels == label).nonzero().flatten()[:14].tolist():
            pixels = Image.fromarray(digits.images[index, 0].numpy()).convert("RGB")
            pixels.resize((40, 36), Image.Resampling.BICUBIC).save(place / f"{index}.jpg", quality=95)
    broken = next((folder / "digit 1").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


def settings(*more):
    return [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]


@pytest.mark.slow
def test_from_jpegs_to_an_exported_network(jpegs, tmp_path, capsys):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("deepspeed")
    bad, latents, out = tmp_path / "bad.txt", tmp_path / "latents", tmp_path / "run"
    assert main(["check-images", str(jpegs), "--list", str(bad)]) == 1
    assert len(bad.read_text().splitlines()) == 1
    encode = ["encode", str(jpegs), "--out", str(latents), "--representations", "texture,lowfreq", "--size", "32",
              "--grid", "8", "--shard-size", "16", "--batch", "8", "--backend", "dali", "--device", "cpu"]  # fmt: skip
    assert main([*encode, "--bad", str(bad)]) == 2
    assert "digit 1" in capsys.readouterr().err
    assert main([*encode, "--skip-bad", str(bad)]) == 0
    assert main(["check-latents", str(latents)]) == 0

    # two ranks learn a schedule and train along it under each stage, fifteen steps; started again, to the thirtieth
    outs = {zero: tmp_path / f"zero{zero}" for zero in STAGES}
    sharded = tmp_path / "sharded.json"  # ZeRO 3 keeps parameters as small as these whole otherwise
    sharded.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))

    def command(zero, steps):
        more = [f"data.root={latents}", f"train.zero={zero}", f"train.steps={steps}"]
        more += [] if zero == 1 else [f"schedule.name={outs[1]}/schedule.json"]
        more += [f"train.deepspeed_config={sharded}"] if zero == 3 else []
        return ["train", "--preset", "digits", "--out", str(outs[zero]), *settings(*more)]

    (tmp_path / "runs.py").write_text(RUNS)
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests/without"))
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PYTHONPATH": paths}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    for steps in (15, 30):
        commands = json.dumps([command(zero, steps) for zero in STAGES])
        done = subprocess.run(
            [*launch, str(tmp_path / "runs.py"), commands],
            env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    for zero in STAGES:
        assert f"resumed from {outs[zero] / 'checkpoints' / 'step_00000015'}" in done.stderr

    # one process samples and exports; the files load strictly, and no stage has trained anything else
    assert main(["sample", "--out", str(outs[1])]) == 0
    with np.load(next(outs[1].glob("samples/*/samples.npz"))) as arrays:
        assert arrays["arr_0"].shape == (12, 32, 32, 3)
    exported = {}
    for zero, out in outs.items():
        assert main(["verify", str(out)]) == 0
        assert main(["convert", str(out), str(tmp_path / f"zero{zero}.pt")]) == 0
        loaded, exported[zero] = load_model(out), load_state(tmp_path / f"zero{zero}.pt")
        load_into(loaded.model, exported[zero])
        assert loaded.info.step == 30
        for name, value in exported[zero].items():
            torch.testing.assert_close(value, exported[1][name], rtol=2e-4, atol=1e-5, msg=f"ZeRO {zero} {name}")


def test_bad_latents_are_one_line(jpegs, tmp_path, capsys):
    latents, out = tmp_path / "latents", tmp_path / "run"

    def refused(*more, says):
        command = ["train", "--preset", "digits", "--out", str(out), *settings(f"data.root={latents}", *more)]
        assert main(command) == 2
        assert says in capsys.readouterr().err
        assert not out.exists()

    refused(says="latents")
    encode = ["encode", str(jpegs), "--representations", "texture,lowfreq", "--size", "32", "--grid", "8",
              "--backend", "pil", "--device", "cpu"]  # fmt: skip
    assert main([*encode, "--out", str(tmp_path / "refused")]) == 2  # the damaged image, by name
    assert "digit 1" in capsys.readouterr().err
    bad = tmp_path / "bad.txt"
    main(["check-images", str(jpegs), "--list", str(bad)])
    assert main([*encode, "--out", str(latents), "--skip-bad", str(bad)]) == 0
    capsys.readouterr()
    refused("train.batch=60", says="train.batch")
    refused("model.classes=4", says="model.classes")
    refused("probe.estimator=C", says="probe.estimator")
    refused("objective.repa_weight=1", "model.repa_width=8", says="features")
    refused("representations.grid=4", says="the latents are (51, 8, 8)")
    refused("representations.channels=3,48", says="has texture (48), lowfreq (3), in this order")
    swapped = ("representations.names=lowfreq,texture", "representations.channels=48,3")
    refused(*swapped, says="has texture (48), lowfreq (3), in this order")
    refused("data.root=" + str(tmp_path / "nowhere"), says="no such folder")
    wanted = ["--set", "objective.repa_weight=1", "--set", "model.repa_width=8"]
    assert main(["train", "--preset", "digits", "--out", str(out), *wanted]) == 2
    assert "only a folder of latents has features" in capsys.readouterr().err
