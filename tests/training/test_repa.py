"""REPA's features made in the step are those that encoding cached: same images, same flips, in any split and resume."""

import json

import pytest
import torch
from PIL import Image

from fastasync.cli import main
from fastasync.config import Config, config_from_dict
from fastasync.data import LatentSet, training_calls
from fastasync.data.shard_loader import open_latents
from fastasync.errors import UserError
from fastasync.images import loader, open_images
from fastasync.model import train_flops
from fastasync.presets import preset
from fastasync.representations.vit import FrozenViT
from fastasync.representations.weights import import_model_package
from fastasync.schedule import named_schedule
from fastasync.stages import summary
from fastasync.training import build_model, repa, train
from fastasync.training.engine import split_positions

SIDE, COUNT, WIDTH = 64, 24, 64
VIT = "test_vit"  # timm's own for tests: 6 blocks of width 64, patches of 16
TERMS = ("loss", "loss/texture", "loss/lowfreq", "repa", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs of several sizes cut out of photographs, a ViT's weights, and the latents and features of both views."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("repa")
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(COUNT):
        place = root / "images" / f"class {number % 3}" / f"{number:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        left, top, width, height = 23 * number, 11 * number, 70 + 17 * (number % 4), 66 + 13 * (number % 5)
        photos[number % 2].crop((left, top, left + width, top + height)).save(place, quality=90)
    torch.manual_seed(0)
    network = import_model_package("timm").create_model(VIT, num_classes=0)
    for parameter in network.parameters():  # as they come, they give every image nearly the same features
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(network.state_dict(), root / "vit.pth")
    words = f"--size {SIDE} --grid 4 --shard-size 10 --backend pil --device cpu --representations texture,lowfreq"
    features = ["--repa-vit", VIT, "--repa-weights", str(root / "vit.pth")]
    assert main(["encode", str(root / "images"), "--out", str(root / "latents"), *words.split(), *features]) == 0
    return root


def configured(folder, source: str = "online", **sections) -> Config:
    base = config_from_dict(
        {
            "data": dict(dataset="latents", root=str(folder / "latents"), flip=True, images=str(folder / "images")),
            "representations": dict(names=["texture", "lowfreq"], channels=[768, 3], grid=4),
            "schedule": dict(name="offset:0.3"),
            "objective": dict(repa_weight=1.0, repa_source=source, repa_vit=VIT),
            "model": dict(depth=2, width=16, heads=2, classes=3, repa_width=WIDTH),
            "train": dict(steps=8, batch=8, lr=1e-3, checkpoint_every=3, log_every=1, ema=0.9, device="cpu"),
        }
    )
    base = config_from_dict({"objective": dict(repa_vit_weights=str(folder / "vit.pth"))}, base)
    return config_from_dict(sections, base)


def trained(config: Config, out) -> dict[str, torch.Tensor]:
    """Train, and return the terms of every step."""
    names, roles = config.representations.names, config.representations.roles
    schedule = named_schedule(config.schedule.name, names, roles)
    with open_latents(config.data.root, features=config.objective.cached_features) as latents:
        train(config, latents, schedule, out, statistics_fingerprint="statistics-1", progress=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {term: torch.tensor([record[term] for record in records], dtype=torch.float64) for term in TERMS}


def largest_difference(one, other) -> float:
    """Relative, over all terms and steps."""
    return max(float(((one[term] - other[term]) / other[term]).abs().max()) for term in TERMS)


@pytest.fixture(scope="module")
def cached(folder):
    """The terms of eight steps on cached features: more than two epochs, both views."""
    return trained(configured(folder, "cached"), folder / "cached")


def test_the_losses_are_the_cached_modes(folder, cached, tmp_path, monkeypatch):
    """To the rounding of float16, 2^-11; and without it (the same rounding applied online) to that of float32."""
    assert largest_difference(trained(configured(folder), tmp_path / "a"), cached) < 2**-11
    call = repa.OnlineFeatures.__call__
    monkeypatch.setattr(repa.OnlineFeatures, "__call__", lambda self, *which: call(self, *which).half())
    assert largest_difference(trained(configured(folder), tmp_path / "b"), cached) < 2e-5
    split = trained(configured(folder, train=dict(accumulate=4)), tmp_path / "c")
    assert largest_difference(split, cached) < 2e-5


def test_another_view_or_order_would_be_seen(folder, cached, tmp_path, monkeypatch):
    """The comparison above is no comparison if it cannot tell the images apart."""
    monkeypatch.setattr(loader, "horizontal_flip", lambda images: images)
    unmirrored = trained(configured(folder), tmp_path / "a")
    assert largest_difference({**cached, "repa": unmirrored["repa"]}, cached) > 10 * 2**-11
    monkeypatch.undo()
    monkeypatch.setattr(
        repa, "open_images", lambda *args, batches, **options: open_images(*args, batches=(b.flip(0) for b in batches))
    )
    with pytest.raises(RuntimeError, match="another order than was announced"):
        trained(configured(folder), tmp_path / "b")


def test_resumed_is_bitwise_the_uninterrupted_run(folder, tmp_path):
    whole = trained(configured(folder), tmp_path / "whole")
    for steps in (3, 5, 8):
        parts = trained(configured(folder, train=dict(steps=steps)), tmp_path / "parts")
    assert all(torch.equal(whole[term], parts[term]) for term in TERMS)
    for name in ("model", "ema", "optimizer"):
        one, other = (tmp_path / run / f"checkpoints/step_00000008/{name}.safetensors" for run in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()


def features_of_step(folder, world: int, rank: int, accumulate: int, step: int) -> list[torch.Tensor]:
    """What one rank's parts get at a step; its loader starts there."""
    config = configured(folder)
    with open_latents(config.data.root) as latents:
        features = repa.OnlineFeatures(config, latents)
        parts = split_positions(config.train.batch, world, rank, accumulate)
        calls = training_calls(parts, config.train.batch, len(latents), config.data.seed, True)
        with features.reading(calls, step * len(parts), (step + 1) * len(parts)):
            found = [features(*calls(step * len(parts) + part)) for part in range(len(parts))]
            with pytest.raises(RuntimeError, match="more often than was announced"):
                features(*calls(0))
    with pytest.raises(RuntimeError, match="outside of `reading`"):
        features(*calls(0))
    return found


def test_ranks_and_parts_divide_the_same_features(folder):
    (whole,) = features_of_step(folder, 1, 0, 1, 5)
    assert (whole.shape, whole.dtype, whole.requires_grad) == ((8, 16, WIDTH), torch.float32, False)
    ranks = [features_of_step(folder, 2, rank, 2, 5) for rank in range(2)]
    divided = torch.cat([ranks[rank][part] for part in range(2) for rank in range(2)])
    torch.testing.assert_close(divided, whole, rtol=1e-4, atol=1e-4)


def test_dali_gives_nearly_the_same(folder, cached, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    used = []

    def with_dali(*args, **options):
        used.append(open_images(*args, "dali", workers=1, **options))
        return used[-1]

    monkeypatch.setattr(repa, "open_images", with_dali)
    assert largest_difference(trained(configured(folder), tmp_path / "dali"), cached) < 0.01
    assert [made.backend for made in used] == ["dali"]


def test_the_views_follow_the_precision_of_the_step(folder):
    """bf16 autocast, as the network has it: the features differ by its rounding, and stay float32."""
    indices, flips = torch.arange(8), torch.arange(8) % 2 == 0
    found = []
    for precision in ("fp32", "bf16"):
        config = configured(folder, train=dict(precision=precision))
        with open_latents(config.data.root) as latents:
            features = repa.OnlineFeatures(config, latents)
            with features.reading(lambda number: (indices, flips), 0, 1):
                found.append(features(indices, flips))
    assert found[1].dtype == torch.float32
    assert not torch.equal(*found)
    assert torch.cosine_similarity(*found, dim=-1).min() > 0.99


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_is_missing_or_wrong_is_said_before_any_work(folder, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    listed = tmp_path / "bad.txt"
    listed.write_text("class 1/01.jpg\tcut short\n")
    for number in range(COUNT):
        place = tmp_path / "renamed" / f"class {number % 3}" / f"x{number:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((folder / "images" / place.parent.name / place.name[1:]).read_bytes())
    for sections, message in (
        (dict(data=dict(images="")), "data.images: (empty): objective.repa_source=online: give the images of"),
        (dict(data=dict(images=str(tmp_path / "none"))), f"data.images: {tmp_path / 'none'}: "),
        (
            dict(data=dict(images=str(tmp_path / "renamed"))),
            f"data.images: {tmp_path / 'renamed'}: other names, sizes or classes than those that",
        ),
        (
            dict(data=dict(skip_bad=str(listed))),
            "23 images (1 left out), " + f"{folder / 'latents'} was encoded from 24 (0 left out): give the folder or",
        ),
        (dict(data=dict(skip_bad=str(tmp_path / "no.txt"))), f"data.skip_bad: {tmp_path / 'no.txt'}: "),
        (dict(objective=dict(repa_vit_weights="")), "objective.repa_vit_weights: (empty): give the weights file of"),
        (dict(objective=dict(repa_vit_weights="no.pth")), "objective.repa_vit_weights: no.pth: no such file: give"),
        (
            dict(objective=dict(repa_vit_weights=str(tmp_path / "text.pth"))),
            f"objective.repa_vit: weights of {VIT}: {tmp_path / 'text.pth'}: ",
        ),
        (dict(objective=dict(repa_vit="test_vti")), "objective.repa_vit: vit: 'test_vti': choose one of vit_"),
        (dict(model=dict(repa_width=0)), "model.repa_width: 0: objective.repa_weight needs a projector"),
        (dict(model=dict(repa_width=32)), "model.repa_width: 32: the features' width is 64: give that"),
        (dict(model=dict(patch=2)), "model.patch: 2: makes 4 tokens, the features have 16"),
    ):
        config = configured(folder, **sections)
        with open_latents(config.data.root) as latents, pytest.raises(UserError) as caught:
            repa.repa_features(config, latents)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"objective.repa_source: 'onlien': did you mean 'online'"):
        configured(folder, "onlien")
    nameless = LatentSet(torch.zeros(8, 771, 4, 4), torch.zeros(8, dtype=torch.int64), 3)
    with pytest.raises(UserError, match=r"objective.repa_source: online: needs a folder of `fastasync encode`"):
        repa.repa_features(configured(folder), nameless)


def test_the_command_line(folder, tmp_path, capsys):
    """Bad input leaves no run behind; sampling needs neither the images nor the ViT; the plan states the costs."""
    sections = configured(folder, train=dict(steps=2), sample=dict(count=2, batch=2, steps=[1])).to_dict()
    plain = {name: values for name, values in sections.items() if isinstance(values, dict)}
    settings = [
        f"{section}.{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for section, values in plain.items()
        for name, value in values.items()
    ]

    def command(name, *more):
        words = [word for setting in (*settings, *more) for word in ("--set", setting)]
        return main([name, "--preset", "imagenet256-s", "--out", str(tmp_path / "run"), *words])

    assert command("train", "data.images=") == 2
    assert "data.images: (empty)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert command("train") == 0
    assert command("sample", "data.images=", "representations.decoder=") == 2
    assert "representations.decoder" in capsys.readouterr().err
    # sampling needs no features; a decoder may be given when it is needed
    assert command("sample", "data.images=", "representations.decoder=texture") == 0
    assert main(["train", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "REPA features: online" in plan
    assert (
        f"GB on disk ({COUNT} images x 2 views x 16 tokens x {WIDTH} x 2 bytes) {COUNT * 2 * 16 * 64 * 2e-9:.4g}"
        in plan
    )


# --- costs -----------------------------------------------------------------------------------------------------------


def test_costs_of_the_published_size():
    """The README's table: 256 tokens of width 768 for 1,281,167 images, and DINOv2-B beside XL/1 (by hand)."""
    config = preset("imagenet256-xl")
    with torch.device("meta"):
        step = train_flops(build_model(config)) * 256
        flops = repa.vit_flops(FrozenViT(16, random_weights=True))
    tokens, width, depth = 256 + 5, 768, 12  # class and four registers
    products = tokens * (depth * 12 * width**2 + depth * 2 * tokens * width) + 256 * 3 * 14**2 * width
    assert flops == 2 * products
    costs = repa.repa_costs(config, step)
    assert costs["REPA features"] == "cached"
    cached = list(costs["REPA cached (computed)"].values())
    assert cached == [1_281_167 * 2 * 256 * 768 * 2 / 1e9, 256 * 256 * 768 * 2 / 1e9]
    assert list(costs["REPA online (computed)"].values()) == ["theirs", 256 * flops, 256 * flops / step]
    assert "REPA features" in summary(config)
    assert "REPA features" not in summary(preset("digits"))
    off = config_from_dict({"objective": dict(repa_weight=0.0, repa_vit="nonesuch")}, config)
    costs = repa.repa_costs(off, step)
    assert costs["REPA features"] == "off"
    assert "nonesuch" in costs["REPA online (computed)"]
