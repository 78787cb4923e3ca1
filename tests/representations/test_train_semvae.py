"""``fastasync train-semvae``: what it learns, that it resumes bit for bit, and what it refuses."""

import argparse
import csv
import dataclasses
import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastasync.data.images import ImageSet
from fastasync.data.shards import Encoding, begin, finish, write_shard
from fastasync.encode import encode
from fastasync.errors import UserError
from fastasync.representations import Bundle, build
from fastasync.representations.semvae import SemVAE, SemVAESettings, semvae_losses
from fastasync.representations.semvae_file import load_semvae
from fastasync.representations.train_semvae import (
    CachedFeatures,
    ImageFeatures,
    SemVAETraining,
    add_parser,
    ridge_accuracy,
    train,
    train_semvae_command,
)
from fastasync.representations.vit import DINOV2_B, FrozenViT, TokenFeatures
from fastasync.training.interrupt import Interrupted

WIDTH, GRID, COUNT, CLASSES = 24, 2, 220, 4
SMALL = SemVAESettings(16, 1, 2, steps=60, batch=32, learning_rate=5e-3)
TRAINING = SemVAETraining(
    SMALL, channels=4, held_out=20, probe_images=100, statistics_images=100, log_every=10, save_every=20,
    evaluate_every=30,
)  # fmt: skip


def _data():
    """Features of four classes, near a plane of 6 dimensions: something that 4 channels can nearly hold."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) * CLASSES // COUNT  # sorted, as a folder of classes is
    hidden = torch.randn(CLASSES, 6, generator=generator)[labels][:, :, None, None]
    hidden = hidden + 0.5 * torch.randn(COUNT, 6, GRID, GRID, generator=generator)
    mix = torch.randn(WIDTH, 6, generator=generator)
    return torch.einsum("dk,nkhw->ndhw", mix, hidden) + 3.0, labels


class Source:
    """Features in memory; ``stop_at``: the process gets SIGTERM while it makes that batch of training."""

    feature_dim, grid, fingerprint, data = WIDTH, GRID, "f" * 64, "some images"

    def __init__(self, stop_at=None):
        self.features, self.labels = _data()
        self.stop_at, self.served = stop_at, []

    def stream(self, batches):
        for indices in batches:
            self.served.append(indices)
            if len(self.served) == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield self.features[indices]


def _train(source, out, training=TRAINING):
    return train(source, out, training, {"name": "test"}, progress=False)


def _records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


@pytest.fixture(autouse=True, scope="module")
def no_board():
    """TensorBoard takes seconds to import: one test looks at what it gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("semvae")
    return out, _train(Source(), out)


def test_it_learns_and_reports(finished):
    out, facts = finished
    records = _records(out)
    assert [record["step"] for record in records] == [10, 20, 30, 40, 50, 60]
    assert records[-1]["mse"] < 0.5 * records[0]["mse"]
    assert [record["step"] for record in records if "held_out_mse" in record] == [30, 60]
    quality = facts["quality"]
    assert quality == {key: value for key, value in records[-1].items() if key in quality}
    vae, _ = load_semvae(out / "semvae.safetensors")
    features, _ = _data()
    with torch.no_grad():
        mse, cosine, _ = semvae_losses(vae, features)
    assert quality["held_out_mse"] == pytest.approx(float(mse), rel=0.3)  # of other images of the same kind
    assert quality["held_out_cosine"] == pytest.approx(float(cosine), abs=0.05)
    assert quality["held_out_cosine"] > 0.8
    assert 0.8 <= quality["probe_latents"] <= 1
    assert 0.8 <= quality["probe_features"] <= 1
    assert (facts["vit"], facts["channels"], facts["depth"]) == ({"name": "test", "fingerprint": "f" * 64}, 4, 1)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "checkpoint-00000060.safetensors", "metrics.csv", "metrics.jsonl", "semvae.json", "semvae.safetensors",
        "state.json",
    ]  # fmt: skip


def _table(out):
    with open(out / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_and_the_board_have_every_record(finished, tmp_path, monkeypatch):
    """Of a run that was stopped between two records too: each step is there once."""
    out, _ = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [{name: float(value) for name, value in row.items() if value} for row in _table(out)]
    assert found == lines
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    with pytest.raises(Interrupted):
        _train(Source(27), tmp_path)
    _train(Source(), tmp_path)
    assert [row["step"] for row in _table(tmp_path)] == [row["step"] for row in _table(out)]
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("mse")] == [10, 20, 30, 40, 50, 60]
    assert [event.step for event in board.Scalars("probe_latents")] == [30, 60]
    values = [record["held_out_mse"] for record in lines if "held_out_mse" in record]
    assert [event.value for event in board.Scalars("held_out_mse")] == pytest.approx(values)


def test_held_out_images_are_never_trained_on(tmp_path):
    source = Source()
    _train(source, tmp_path, dataclasses.replace(TRAINING, evaluate_every=0))
    statistics, steps = source.served[:4], source.served[4:64]
    trained = torch.cat([*statistics, *steps]).unique()
    held_out = torch.cat(source.served[-1:])
    assert len(trained) == 200
    assert len(held_out) == 20
    assert not set(trained.tolist()) & set(held_out.tolist())
    assert len(source.labels[held_out].unique()) == CLASSES  # though the set is sorted by class


@pytest.mark.parametrize(
    "stop_at", [14, 27, 69]
)  # 4 batches measure the features, 5 evaluate; 69 is the last of training
def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path, stop_at):
    if stop_at < 69:
        with pytest.raises(Interrupted):
            _train(Source(stop_at), tmp_path)
        assert not (tmp_path / "semvae.safetensors").exists()
    else:
        _train(Source(stop_at), tmp_path)
        (tmp_path / "semvae.safetensors").unlink()  # as if killed between the last checkpoint and the weights
    torch.manual_seed(stop_at)
    facts = _train(Source(), tmp_path)
    out, expected = finished
    assert facts == expected  # the weights' hash, too
    assert (tmp_path / "semvae.safetensors").read_bytes() == (out / "semvae.safetensors").read_bytes()
    assert _records(tmp_path) == _records(out)


def test_killed_between_checkpoints(finished, tmp_path):
    class Killed(Source):
        def stream(self, batches):
            for features in super().stream(batches):
                if len(self.served) == 50:
                    raise KeyboardInterrupt
                yield features

    with pytest.raises(KeyboardInterrupt):
        _train(Killed(), tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 40
    assert _train(Source(), tmp_path) == finished[1]
    assert _records(tmp_path) == _records(finished[0])


def test_a_finished_run_is_left_as_it_is(finished):
    out, facts = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*e*.*")}
    assert _train(Source(), out) == facts
    assert {path: path.stat().st_mtime_ns for path in out.glob("*e*.*")} == before


def test_other_settings_or_damage_are_refused(finished, tmp_path):
    with pytest.raises(Interrupted):
        _train(Source(14), tmp_path)
    with pytest.raises(UserError, match="trained with training semvae width 16, asked for 8"):
        _train(Source(), tmp_path, dataclasses.replace(TRAINING, semvae=dataclasses.replace(SMALL, width=8)))
    other = Source()
    other.labels = other.labels.flip(0)
    with pytest.raises(UserError, match="trained with data"):
        _train(other, tmp_path)
    other = Source()
    other.data = "others"
    with pytest.raises(UserError, match="trained with data"):
        _train(other, tmp_path)
    other = Source()
    other.fingerprint = "0" * 64
    with pytest.raises(UserError, match=r"trained with vit fingerprint fff.*asked for 000"):
        _train(other, tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    data = bytearray(checkpoint.read_bytes())
    data[-3] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(UserError, match="truncated or altered"):
        _train(Source(), tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        _train(Source(), tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    class Bad(Source):
        def stream(self, batches):
            for features in super().stream(batches):
                yield features * float("nan") if len(self.served) > 30 else features

    with pytest.raises(UserError, match=r"not finite by step 30.*checkpoint is intact"):
        _train(Bad(), tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 20


def test_bfloat16_reaches_about_the_same(finished, tmp_path):
    facts = _train(Source(), tmp_path, dataclasses.replace(TRAINING, precision="bfloat16"))
    expected = finished[1]["quality"]["held_out_mse"]
    assert facts["quality"]["held_out_mse"] == pytest.approx(expected, rel=0.1)
    assert facts["quality"]["held_out_mse"] != expected


def test_settings_are_checked():
    for change, message in (({"steps": 0}, "steps"), ({"batch": 0}, "batch"), ({"learning_rate": -1.0}, "learning")):
        with pytest.raises(UserError, match=message):
            SemVAETraining(dataclasses.replace(SMALL, **change))
    with pytest.raises(UserError, match="channels"):
        dataclasses.replace(TRAINING, channels=0)
    with pytest.raises(UserError, match="precision"):
        dataclasses.replace(TRAINING, precision="half")


def test_too_few_images(tmp_path):
    source = Source()
    source.features, source.labels = source.features[:33], source.labels[:33]
    with pytest.raises(UserError, match="33: too few for a batch of 32: give 36"):
        _train(source, tmp_path)


def test_learning_rate():
    t = SemVAETraining(dataclasses.replace(SMALL, steps=1000, learning_rate=1.0), warmup=10)
    assert [t.learning_rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert t.learning_rate(10 + 495) == pytest.approx(0.5)
    assert t.learning_rate(999) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("dims", [10, 300])  # the primal and the dual
def test_ridge_probe(dims):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, dims, generator=generator)
    y = torch.randint(0, 3, (120,), generator=generator)
    x = centres[y] + 0.3 * torch.randn(120, dims, generator=generator)
    names = torch.tensor([7, 2, 40])[y]  # classes need not be 0..n-1
    assert ridge_accuracy(x[:80], names[:80], x[80:], names[80:]) > 0.95
    shuffled = names[torch.randperm(120, generator=generator)]
    assert ridge_accuracy(x[:80], shuffled[:80], x[80:], shuffled[80:]) < 0.6
    # the same solution, from scikit-learn
    from sklearn.linear_model import Ridge

    a = ((x - x[:80].mean(0)) / x[:80].std(0)).double().numpy()
    target = torch.nn.functional.one_hot(y[:80], 3).double().numpy()
    predicted = Ridge(alpha=0.1 * 80).fit(a[:80], target).predict(a[80:]).argmax(1)
    expected = float((predicted == y[80:].numpy()).mean())
    assert ridge_accuracy(x[:80], names[:80], x[80:], names[80:]) == expected


def _shards(folder, kind):
    """The features in two shards, SFD's or our own."""
    features, labels = _data()
    folder.mkdir()
    parts = [slice(0, 150), slice(150, COUNT)]
    if kind == "sfd":
        for number, part in enumerate(parts):
            tensors = {"feats_dino": features[part].contiguous(), "labels": labels[part].contiguous()}
            save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors")
        return folder
    names = tuple("abcd")
    encoding = Encoding(
        "i" * 64, COUNT, 0, names, (3, 8, 8), GRID, ("texture",), (1,), ("t" * 64,), False, "float32", 150,
        "e" * 64, (GRID**2, WIDTH),
    )  # fmt: skip
    begin(folder, encoding)
    for number, part in enumerate(parts):
        tokens = features[part].flatten(2).transpose(1, 2).half().contiguous()
        latents = torch.randn(len(tokens), 1, GRID, GRID)
        write_shard(folder, encoding, number, {"feats": tokens, "labels": labels[part], "latents.texture": latents})
    assert finish(folder, encoding) == 0
    return folder


@pytest.mark.parametrize("kind", ["sfd", "ours"])
def test_cached_features(tmp_path, kind):
    source = CachedFeatures(_shards(tmp_path / "shards", kind))
    features, labels = _data()
    assert (source.feature_dim, source.grid, len(source.labels)) == (WIDTH, GRID, COUNT)
    assert source.fingerprint == ("e" * 64 if kind == "ours" else None)
    assert torch.equal(source.labels, labels)
    batches = [torch.tensor([0, 219, 149, 150]), torch.tensor([3])]
    for indices, found in zip(batches, source.stream(batches)):
        expected = features[indices] if kind == "sfd" else features[indices].half().float()
        assert torch.equal(found.float(), expected)


def test_from_encoded_shards(tmp_path):
    """``encode`` stores the ViT's tokens; a SemVAE trained on them fits the ViT that made them."""
    images = torch.randint(0, 256, (40, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiny = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    vit = FrozenViT(2, random_weights=True, model_options=tiny)
    image_set = ImageSet(images, torch.arange(40) % 2, 2, ("a", "b"), "noise")
    out = tmp_path / "shards"
    encode(image_set, Bundle([build("texture", (3, 28, 28), 2)]), out, flip=False, shard_size=25,
           features=TokenFeatures(vit), progress=False)  # fmt: skip
    source = CachedFeatures(out)
    (found,) = source.stream([torch.tensor([30, 2])])
    torch.testing.assert_close(found.float(), vit(images[[30, 2]]), rtol=1e-3, atol=1e-3)
    settings = dataclasses.replace(TRAINING, semvae=SemVAESettings(8, 1, 2, steps=2, batch=16), channels=2)
    train(source, tmp_path / "out", settings, {"name": DINOV2_B}, progress=False)
    file = str(tmp_path / "out" / "semvae.safetensors")
    item = build("dino_semantic", (3, 28, 28), 2, semvae=file, random_weights=True, model_options=tiny)
    assert item.encode(images[:3]).shape == (3, 2, 2, 2)


def test_bad_folders_of_features(tmp_path):
    with pytest.raises(UserError, match="no safetensors files"):
        CachedFeatures(tmp_path)
    folder = _shards(tmp_path / "shards", "ours")
    with pytest.raises(UserError, match="--vit-weights"):
        CachedFeatures(folder, "0" * 64)
    save_file({"labels": torch.zeros(3, dtype=torch.int64)}, folder / "shard-00000.safetensors")
    with pytest.raises(UserError, match="neither feats nor feats_dino"):
        CachedFeatures(folder)
    odd = {"feats": torch.zeros(3, 5, WIDTH), "labels": torch.zeros(3, dtype=torch.int64)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="grid"):
        CachedFeatures(tmp_path)
    save_file({"feats": torch.zeros(2, 4, 8)}, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match="like the first shard"):
        CachedFeatures(tmp_path)


def _parse(*arguments):
    top = argparse.ArgumentParser()
    add_parser(top.add_subparsers())
    return top.parse_args(["train-semvae", *map(str, arguments)])


def test_the_command_on_cached_features(tmp_path, capsys):
    folder = _shards(tmp_path / "shards", "sfd")
    options = ["--features", folder, "--out", tmp_path / "out", "--device", "cpu", "--grid", GRID, "--steps", 4]
    options += ["--batch", 16, "--width", 16, "--depth", 1, "--heads", 2, "--channels", 3, "--held-out", 20]
    arguments = _parse(*options)
    assert arguments.handler is train_semvae_command
    assert train_semvae_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "held_out_cosine: " in printed
    assert "probe_latents: " in printed
    vae, facts = load_semvae(tmp_path / "out" / "semvae.safetensors")
    assert (vae.channels, vae.feature_dim, facts["vit"]["name"]) == (3, WIDTH, DINOV2_B)
    with pytest.raises(SystemExit):
        _parse("--out", tmp_path)


def test_defaults_of_the_command_are_those_of_the_settings(tmp_path):
    arguments = _parse("--data", "x", "--out", tmp_path)
    default = SemVAETraining()
    for entry in dataclasses.fields(SemVAESettings):
        assert getattr(arguments, entry.name) == getattr(default.semvae, entry.name)
    for entry in dataclasses.fields(SemVAETraining):
        if entry.name != "semvae":
            assert getattr(arguments, entry.name) == getattr(default, entry.name)


def test_from_images_to_the_representation(tmp_path):
    """JPEG files -> ViT -> SemVAE -> ``dino_semantic``, through the image loader."""
    from PIL import Image

    from fastasync.images import open_images, open_source

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8, generator=generator)
    for number, array in enumerate(pixels.numpy()):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{number}.png")
    images = open_source(tmp_path / "images")
    tiny = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    vit = FrozenViT(2, random_weights=True, model_options=tiny)
    options = {"workers": 1, "device": "cpu"}
    source = ImageFeatures(
        lambda batches: open_images(images, 32, 16, "pil", batches=batches, **options), images.labels, vit
    )
    settings = dataclasses.replace(TRAINING, semvae=SemVAESettings(8, 1, 2, steps=3, batch=16), channels=2)
    facts = train(source, tmp_path / "out", settings, {"name": DINOV2_B}, progress=False)
    assert facts["vit"]["fingerprint"] == vit.fingerprint()
    file = str(tmp_path / "out" / "semvae.safetensors")
    item = build("dino_semantic", (3, 32, 32), 2, semvae=file, random_weights=True, model_options=tiny)
    (batch,) = source.loader([torch.tensor([5, 7])])
    torch.testing.assert_close(item.encode(batch.images), load_semvae(file)[0].encode(vit(batch.images)))


def test_the_published_shape():
    """768 -> 16 channels on a grid of 16, four blocks each way."""
    with torch.device("meta"):
        shape = SemVAETraining().semvae
        vae = SemVAE(768, 16, 16, shape.width, shape.depth, shape.heads)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 58_318_112
    assert vae.encode(torch.empty(2, 768, 16, 16, device="meta")).shape == (2, 16, 16, 16)
