"""What the README shows works: the third representation in one file, and every command and file that it names."""

import re
from pathlib import Path

import numpy as np
import torch

from fastasync.cli import main, parser
from fastasync.run import existing_config
from fastasync.schedule import load_schedule

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_third_representation_in_one_file(tmp_path):
    code = re.search(r"```python\n(# edges\.py\n.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "edges.py").write_text(code)
    shown = re.search(r"fastasync run --preset digits --out runs/k3 (.*?)```", README, re.DOTALL).group(1)
    settings = [part for part in shown.replace("\\", " ").split() if part != "--set"]
    tiny = [
        "representations.encoder_steps=10", "representations.semvae_steps=5", "schedule.baselines=", "model.depth=1",
        "model.width=32", "model.heads=2", "train.steps=20", "train.batch=16", "probe.width=16", "probe.heads=1",
        "probe.depth=1", "probe.batch=16", "probe.budget=1.0", "probe.estimator=B", "sample.count=20",
        "sample.steps=2", "evaluate.metrics=fid",
    ]  # fmt: skip
    settings = [setting.replace("edges.py", str(tmp_path / "edges.py")) for setting in settings]
    arguments = [part for setting in (*settings, *tiny) for part in ("--set", setting)]
    out = tmp_path / "k3"
    assert main(["run", "--preset", "digits", "--out", str(out), *arguments]) == 0
    assert existing_config(out).representations.names == ("texture", "edges", "semantic")
    schedule = load_schedule(out / "schedule.json")
    assert schedule.count == 3
    with torch.no_grad():
        assert schedule(torch.tensor([0.5], dtype=torch.float64)).tau.shape == (1, 3)
    assert (out / "report.html").is_file()


def test_third_representation_of_images(tmp_path, monkeypatch, noise_images):
    """The same file on JPEGs: encode, train, sample; small encoders in the place of the pretrained ones."""
    monkeypatch.chdir(tmp_path)
    Path("edges.py").write_text(re.search(r"```python\n(# edges\.py\n.*?)```", README, re.DOTALL).group(1))
    noise_images(Path("IMAGES"), extension="jpg")
    encode, train = re.search(
        r"fastasync (encode IMAGES --out LATENTS3 .*?) \.\.\.\ndeepspeed train\.py (.*?)```", README, re.DOTALL
    ).groups()
    encode = encode.replace("autoencoder", "texture").replace("dino_semantic", "lowfreq").split()
    assert main([*encode, "--size", "32", "--grid", "8", "--device", "cpu", "--backend", "pil"]) == 0
    train = train.replace("\\", " ").replace("channels=32,2,16", "channels=48,2,3").split()
    tiny = [
        "representations.grid=8", "representations.decoder=texture", "schedule.name=offset:0.3", "model.size=custom",
        "model.depth=1", "model.width=32", "model.heads=2", "model.classes=2", "model.repa_width=0",
        "objective.repa_weight=0", "train.batch=8", "train.steps=2", "train.compile=off", "train.device=cpu",
        "sample.count=4", "sample.integrator=euler", "sample.steps=2",
    ]  # fmt: skip
    settings = [part for setting in tiny for part in ("--set", setting)]
    assert main(["train", *train, *settings]) == 0
    assert main(["sample", *train, *settings]) == 0
    with np.load(next(Path("runs/xl3").glob("samples/*/samples.npz"))) as arrays:
        assert arrays["arr_0"].shape == (4, 32, 32, 3)


def test_commands_and_files_in_the_readme_exist():
    known = set(parser()._subparsers._group_actions[0].choices)
    for command in re.findall(r"^\s*fastasync (\S+)", README, re.MULTILINE):
        assert command in known, command
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`?make ([a-z0-9-]+)`?", README):
        assert target in targets, target
    tree = README.split("## What is where")[1]
    for path in re.findall(r"^((?:fastasync|kernels|csrc|tests|bench)/\S*|train\.py)", tree, re.MULTILINE):
        assert (ROOT / path).exists(), path
