"""The prepared folder: made once, continued after a crash, refused when it is not what was asked for."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastasync.data import ImageSet, load_images
from fastasync.errors import UserError
from fastasync.files import sha256_file
from fastasync.representations import ClassifierSettings, Recipe, load_prepared, prepare
from fastasync.representations.prepare import MANIFEST
from fastasync.representations.semantic import Semantic

RECIPE = Recipe(
    4,
    ClassifierSettings(widths=(8, 16), steps=12, batch=32),
    {"semantic": {"channels": 3, "semvae": {"width": 16, "heads": 2, "steps": 12, "batch": 32}}},
)
PLUGIN = '''
import torch
from fastasync.representations import Representation, register

@register("mean_grey")
class MeanGrey(Representation):
    """The mean of each cell, on a scale that is learned: 1 / the mean of all."""

    def __init__(self, image_shape, grid):
        super().__init__(image_shape, grid)
        self.channels = 1
        self.register_buffer("scale", torch.ones(()))

    def fit(self, images, seed, progress=True):
        self.scale = 1.0 / images.float().mean()
        return {"scale": float(self.scale)}

    def encode(self, images):
        grey = images.float().mean(1, keepdim=True)
        return torch.nn.functional.adaptive_avg_pool2d(grey, self.grid) * self.scale
'''


@pytest.fixture(scope="module")
def sets():
    train, test = (load_images("digits", ".", split) for split in ("train", "test"))
    return _part(train, 200), _part(test, 50)


def _part(image_set, count):
    return ImageSet(
        image_set.images[:count], image_set.labels[:count], 10, image_set.class_names, image_set.name, image_set.mirror
    )


def _prepare(sets, folder, **kwargs):
    return prepare(sets[0], folder, **{"test_set": sets[1], "recipe": RECIPE, "progress": False, **kwargs})


@pytest.fixture(scope="module")
def made(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "prepared"
    _prepare(sets, folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def _hashes(folder):
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_what_is_written_is_what_is_read(sets, made):
    ready = load_prepared(made)
    assert ready.bundle.names == ("texture", "semantic")
    assert ready.bundle.channels == (4, 3)
    z = ready.latents.z
    assert z.shape == (200, 7, 4, 4)
    assert torch.equal(ready.latents.labels, sets[0].labels)
    assert ready.latents.flipped is None
    assert torch.equal(ready.bundle.decode(z), sets[0].images)
    torch.testing.assert_close(ready.bundle.normalise(ready.bundle.encode(sets[0].images)), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.double().std((0, 2, 3)), torch.ones(7).double(), atol=1e-5, rtol=0)
    assert not torch.equal(ready.encoder.head.weight, ready.scorer.head.weight)
    assert ready.statistics_fingerprint == ready.info["statistics_fingerprint"]
    parts = ready.info["parts"]
    assert {parts[f"{name}.safetensors"]["seed"] for name in ("encoder", "scorer")} == {0, 1000}
    assert 0 <= parts["scorer.safetensors"]["test accuracy"] <= 1
    assert 0 < parts["representation-semantic.safetensors"]["cosine"] < 1
    assert {"torch", "fastasync", "python"} <= set(ready.info["versions"])


def test_mirrored_images_become_the_second_view(sets, tmp_path):
    photos = replace(sets[0], mirror=True)
    _prepare(sets, tmp_path / "p", names=("texture", "lowfreq"), recipe=replace(RECIPE, options={}), test_set=None)
    prepare(photos, tmp_path / "q", ("texture", "lowfreq"), recipe=replace(RECIPE, options={}), progress=False)
    ready = load_prepared(tmp_path / "q")
    flipped = ready.latents.flipped
    assert flipped is not None
    assert torch.equal(ready.bundle.decode(flipped), photos.images.flip(-1))
    # statistics are those of the images as they are: the same as without the second view
    assert ready.bundle.statistics == load_prepared(tmp_path / "p").bundle.statistics


def test_principal_components_are_restored(sets, tmp_path):
    recipe = replace(RECIPE, options={"texture": {"channels": 3}})
    parts = _prepare(sets, tmp_path / "p", names=("texture", "lowfreq"), recipe=recipe)["parts"]
    ready = load_prepared(tmp_path / "p")
    assert ready.bundle.channels == (3, 1)
    raw = ready.bundle.encode(sets[0].images)
    torch.testing.assert_close(ready.bundle.normalise(raw), ready.latents.z, rtol=1e-4, atol=1e-5)
    # what three of four components leave is the rest of the variance, in units of 1 / 127.5, and rounding
    difference = ready.bundle.decode(ready.latents.z).double() - sets[0].images
    explained = parts["representation-texture.safetensors"]["explained"]
    patches = torch.nn.functional.pixel_unshuffle(sets[0].images.double(), 2)
    assert 0.8 < explained < 1
    assert difference.square().mean() <= (1 - explained) * patches.var((0, 2, 3), correction=0).mean() + 1 / 12


def test_running_again_changes_nothing(sets, copy):
    before, times = _hashes(copy), {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    _prepare(sets, copy)
    assert _hashes(copy) == before
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == times


def test_an_interrupted_run_goes_on_and_ends_the_same(sets, made, copy):
    """Cut after each part in turn: what is finished is kept (its time stays), the rest is made again, bit for bit."""
    manifest = json.loads((copy / MANIFEST).read_text())
    files = list(manifest["parts"])
    for keep in range(len(files)):
        cut = {key: value for key, value in manifest.items() if not key.startswith("statistics")} | {"complete": False}
        cut["parts"] = {file: manifest["parts"][file] for file in files[:keep]}
        (copy / MANIFEST).write_text(json.dumps(cut))
        for file in files[keep + 1 :]:  # the next one was written, but not yet recorded
            (copy / file).unlink()
        (copy / f".{files[-1]}.123.partial").write_bytes(b"half")
        with pytest.raises(UserError, match="unfinished: run prepare again"):
            load_prepared(copy)
        times = {file: (copy / file).stat().st_mtime_ns for file in files[:keep]}
        _prepare(sets, copy)
        assert _hashes(copy) == _hashes(made)
        assert {file: (copy / file).stat().st_mtime_ns for file in files[:keep]} == times


KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_prepare import RECIPE, _part, load_images
from fastasync.representations import prepare
images = _part(load_images("digits", ".", "train"), 200)
def run(folder):
    prepare(images, Path(sys.argv[1]) / folder, recipe=RECIPE, progress=False)
start = time.time()
run("whole")
span = time.time() - start
for share in (0.02, 0.2, 0.4, 0.6, 0.8):  # each child goes on where the last was killed
    child = os.fork()
    if not child:
        run("killed")
        os._exit(0)
    time.sleep(share * span)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
run("killed")
"""


def test_kill_9_while_preparing(tmp_path):
    """Killed at five moments, then finished: equal to a run that nobody disturbed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", KILLER, tmp_path, os.path.dirname(__file__)], check=True, env=environment)
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")


def _parts():
    names = ["encoder", "scorer", "labels"]
    return [
        f"{name}.safetensors" for name in names + ["latents-texture", "latents-semantic", "representation-semantic"]
    ]


@pytest.mark.parametrize("file", _parts())
def test_a_flipped_byte_is_noticed(sets, copy, file):
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    before = _hashes(copy)
    for call in (lambda: load_prepared(copy), lambda: _prepare(sets, copy)):
        with pytest.raises(
            UserError, match=rf"{file}: hash .*truncated or altered.*: restore it, or delete the folder"
        ):
            call()
    assert _hashes(copy) == before


def test_a_truncated_and_a_missing_file(copy):
    path = copy / "latents-semantic.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"latents-semantic\.safetensors: hash"):
        load_prepared(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"latents-semantic\.safetensors: missing: restore it"):
        load_prepared(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["statistics"]["mean"].__setitem__(0, 0.25), "statistics were altered"),
        (lambda m: m["statistics"]["representations"].__setitem__(1, "0" * 64), "representation semantic: fingerprint"),
        (lambda m: m.update(format=2), "format 2: this version reads format 1"),
        (lambda m: m.pop("parts"), "not a readable manifest"),
    ],
)
def test_an_edited_manifest(copy, change, message):
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        load_prepared(copy)


def test_a_truncated_manifest(sets, copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text[: len(text) // 2])
    for call in (lambda: load_prepared(copy), lambda: _prepare(sets, copy)):
        with pytest.raises(UserError, match="not a readable manifest: delete the folder"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"names": ("texture", "lowfreq", "semantic")},
            r"prepared with representations \[.texture., .semantic.\], asked",
        ),
        ({"recipe": replace(RECIPE, options={"semantic": {"channels": 4}})}, "prepared with options"),
        ({"recipe": replace(RECIPE, classifier=replace(RECIPE.classifier, steps=13))}, "prepared with classifier"),
        ({"seed": 1}, "prepared with seed 0, asked for 1: choose another folder"),
        ({"test_set": None}, "prepared with test images"),
    ],
)
def test_a_folder_made_with_other_settings_is_kept(sets, copy, change, message):
    before = _hashes(copy)
    with pytest.raises(UserError, match=message):
        _prepare(sets, copy, **change)
    assert _hashes(copy) == before


def test_a_folder_of_other_images_is_kept(sets, copy):
    before = _hashes(copy)
    with pytest.raises(UserError, match="prepared with images"):
        _prepare((_part(sets[0], 199), sets[1]), copy)
    assert _hashes(copy) == before


def test_a_folder_that_holds_something_else_is_kept(sets, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty and without prepared\.json"):
        _prepare(sets, tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        _prepare(sets, tmp_path / "thesis.txt")
    with pytest.raises(UserError, match="not a prepared folder: run prepare first"):
        load_prepared(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("texture", "semantc")}, "options for representation: 'semantic': did you mean 'semantc'"),
        ({"names": ("texture", "lowfrq"), "recipe": replace(RECIPE, options={})}, "'lowfrq': did you mean 'lowfreq'"),
        ({"names": ("semantic",)}, "exactly one"),
        ({"recipe": replace(RECIPE, grid=3)}, "grid: 3"),
        ({"plugins": ["nowhere.py"]}, "no such file"),
    ],
)
def test_bad_requests_write_nothing(sets, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        _prepare(sets, tmp_path / "p", **change)
    assert not (tmp_path / "p").exists()


def test_a_set_without_recipe_and_a_test_set_of_another_size(sets, tmp_path):
    other = ImageSet(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.arange(3), 10, sets[0].class_names, "mine")
    with pytest.raises(UserError, match="recipe for dataset: 'mine'"):
        prepare(other, tmp_path / "p", progress=False)
    with pytest.raises(UserError, match="mine test set: image size: 1x4x4: must be 1x8x8"):
        _prepare(sets, tmp_path / "p", test_set=other)
    assert not (tmp_path / "p").exists()


def test_a_plugin_travels_with_the_folder(sets, tmp_path):
    """K = 3 from one user file with a learned part; its copy in the folder is used, and refused when it was changed."""
    plugin = tmp_path / "mean_grey.py"
    plugin.write_text(PLUGIN)
    folder = tmp_path / "p"
    _prepare(sets, folder, names=("texture", "mean_grey", "semantic"), plugins=[plugin])
    plugin.unlink()
    ready = load_prepared(folder)
    assert ready.bundle.channels == (4, 1, 3)
    assert ready.bundle.representations[1].scale == pytest.approx(1.0 / float(sets[0].images.float().mean()))
    (folder / "mean_grey.py").write_text(PLUGIN + "# changed\n")
    with pytest.raises(UserError, match=r"mean_grey\.py: changed since the latents were made"):
        load_prepared(folder)


def test_digits_end_to_end_are_good(tmp_path):
    """The real recipe: both classifiers above 97 % on the test images, features reconstructed, pixels exact."""
    train, test = (load_images("digits", ".", split) for split in ("train", "test"))
    info = prepare(train, tmp_path / "p", test_set=test, progress=False)
    assert info["parts"]["encoder.safetensors"]["test accuracy"] > 0.97
    assert info["parts"]["scorer.safetensors"]["test accuracy"] > 0.97
    assert info["parts"]["representation-semantic.safetensors"]["cosine"] > 0.9
    ready = load_prepared(tmp_path / "p")
    assert torch.equal(ready.bundle.decode(ready.latents.z), train.images)
    semantic = ready.bundle.representations[1]
    assert isinstance(semantic, Semantic)
    restored = ready.encoder.features_from_map(semantic.vae.decode(semantic.encode(test.images)))
    kept = (ready.encoder.head(restored).argmax(1) == test.labels).double().mean()
    assert float(kept) > 0.95  # what the class costs to read after the detour through 8 channels
