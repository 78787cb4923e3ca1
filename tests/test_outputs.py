"""The decoder of samples, of a run on a folder of latents: checked before training, given at any time."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastasync.cli import main
from fastasync.data.images import ImageSet
from fastasync.encode import encode
from fastasync.representations import Bundle, build
from fastasync.run import existing_config

SETTINGS = [
    "data.dataset=latents", "representations.names=texture,lowfreq", "representations.channels=48,3",
    "representations.grid=8", "schedule.name=offset:0.3", "schedule.baselines=", "model.depth=1", "model.width=32",
    "model.heads=2", "model.classes=2", "train.batch=8", "train.steps=2", "train.device=cpu", "sample.count=4",
    "sample.steps=1", "evaluate.features=inception",
]  # fmt: skip
PLUGIN = """
from fastasync.representations import register
from fastasync.representations.texture import Texture

@register("shuffle")
class Shuffle(Texture):
    pass
"""


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image_set = ImageSet(images, torch.arange(12) % 2, 2, ("a", "b"), "noise")
    folder = tmp_path_factory.mktemp("latents")
    bundle = Bundle([build(name, (3, 32, 32), 8) for name in ("texture", "lowfreq")])
    encode(image_set, bundle, folder, progress=False)
    return folder


@pytest.fixture
def stage(latents, tmp_path, monkeypatch):
    """stage("train", "section.field=value", ...) in tmp_path/run; returns the exit code."""
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)

    def run(name, *more):
        settings = [part for each in (*SETTINGS, f"data.root={latents}", *more) for part in ("--set", each)]
        return main([name, "--preset", "digits", "--out", str(tmp_path / "run"), *settings])

    return run


def test_the_decoder_may_be_named_after_training(stage, tmp_path, capsys):
    """As the README's commands do: training needs none."""
    out = tmp_path / "run"
    assert stage("train") == 0
    assert main(["sample", "--out", str(out)]) == 2
    assert "representations.decoder: (empty): give the texture autoencoder's" in capsys.readouterr().err
    assert not (out / "samples").exists()
    assert main(["sample", "--out", str(out), "--set", "representations.decoder=texture"]) == 0
    with np.load(next(out.glob("samples/*/samples.npz"))) as arrays:
        assert arrays["arr_0"].shape == (4, 32, 32, 3)
    assert existing_config(out).representations.decoder == "texture"
    assert main(["train", "--out", str(out), "--set", "train.steps=4"]) == 0  # its checkpoints are still the run's
    assert (out / "checkpoints" / "step_00000004").is_dir()


def test_other_latents_are_refused_and_forgotten(stage, tmp_path, capsys):
    """By their folder's name; the run's configuration keeps its own, which may move."""
    out, other, moved = tmp_path / "run", tmp_path / "other", tmp_path / "moved"
    assert stage("train") == 0
    before = (out / "config.yaml").read_text()
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    bundle = Bundle([build(name, (3, 32, 32), 8) for name in ("texture", "lowfreq")])
    encode(ImageSet(images, torch.arange(12) % 2, 2, ("a", "b"), "noise"), bundle, other, progress=False)
    capsys.readouterr()
    for command in ("train", "sample"):
        more = ["train.steps=4", f"data.root={other}", "representations.decoder=texture"]
        assert main([command, "--out", str(out), *(part for each in more for part in ("--set", each))]) == 2
        assert f"data.root: {other}: has latents with statistics " in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == before
    shutil.copytree(existing_config(out).data.root, moved)
    assert main(["train", "--out", str(out), "--set", "train.steps=4", "--set", f"data.root={moved}"]) == 0
    assert existing_config(out).data.root == str(moved)


def test_a_decoder_of_other_latents_is_refused_before_training(stage, tmp_path, capsys):
    reference = tmp_path / "reference.npz"
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
    for decoder, line in (("lowfreq", "representations.decoder: lowfreq: is "), ("no.ckpt", "no.ckpt: is no file")):
        assert stage("run", f"representations.decoder={decoder}", f"evaluate.reference={reference}") == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_decoder_may_come_from_a_plugin(tmp_path, capsys):
    folder, plugin = tmp_path / "images", tmp_path / "shuffle.py"
    plugin.write_text(PLUGIN)
    generator = np.random.default_rng(0)
    for number in range(12):
        (folder / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class {number % 2}" / f"{number}.png")
    command = ["encode", str(folder), "--out", str(tmp_path / "latents"), "--plugin", str(plugin), "--device", "cpu"]
    assert main([*command, "--representations", "shuffle,lowfreq", "--size", "32", "--grid", "8"]) == 0
    more = [f"data.root={tmp_path / 'latents'}", "representations.names=shuffle,lowfreq"]
    more += ["representations.decoder=shuffle", f"representations.plugin={plugin}"]
    arguments = [part for each in (*SETTINGS, *more) for part in ("--set", each)]
    assert main(["train", "--preset", "digits", "--out", str(tmp_path / "run"), *arguments]) == 0
    assert main(["sample", "--out", str(tmp_path / "run")]) == 0
    assert len(list((tmp_path / "run").glob("samples/*/samples.npz"))) == 1
