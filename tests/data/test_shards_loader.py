"""Reading shards: the same numbers as from memory, in any order, ahead of time or not; and how fast."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastasync.data import LatentSet, batch_indices, draw_flips
from fastasync.data.shard_loader import ShardLatents, open_latents
from fastasync.data.shards import Encoding, begin, finish, write_shard
from fastasync.errors import UserError
from fastasync.representations import Bundle, build


@pytest.fixture
def in_memory(folder, encoding, content):
    """The same latents as a LatentSet, normalised by the folder's statistics."""
    whole, latents = content(encoding()), ShardLatents(folder)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).float().reshape(1, -1, 1, 1)
        for values in (latents.statistics.mean, latents.statistics.std)
    )
    z, flipped = (
        (torch.cat([whole[f"latents{view}.{name}"] for name in encoding().names], 1) - mean) / std
        for view in ("", "_flip")
    )
    return LatentSet(z, whole["labels"], 3, flipped)


def test_random_access_equals_memory_bit_for_bit(folder, in_memory):
    latents = ShardLatents(folder)
    assert (len(latents), latents.classes, latents.device.type) == (23, 3, "cpu")
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 23, 60, 0):
        indices = torch.randint(23, (size,), generator=generator)  # with repetitions
        for flips in (None, torch.rand(size, generator=generator) < 0.5):
            z, y = latents.batch(indices, flips)
            expected_z, expected_y = in_memory.batch(indices, flips)
            assert torch.equal(z, expected_z)
            assert torch.equal(y, expected_y)
    z, _ = latents.batch(torch.arange(23))
    assert z.mean((0, 2, 3)).abs().max() < 1e-6
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-6
    for wrong in (23, -1):
        with pytest.raises(IndexError, match="of 23 images"):
            latents.batch(torch.tensor([0, wrong]))


def test_features_follow_the_flips(folder, encoding, content):
    whole, latents = content(encoding()), ShardLatents(folder, features=True)
    indices, flips = torch.tensor([22, 3, 3, 11]), torch.tensor([True, False, True, False])
    features = latents.features(indices, flips)
    assert features.dtype == torch.float16
    expected = torch.stack([whole["feats_flip" if f else "feats"][i] for i, f in zip(indices, flips)])
    assert torch.equal(features, expected)
    assert ShardLatents(folder).features is None  # REPA is refused where nobody asked for features


def test_without_mirrored_images_flips_are_ignored(tmp_path, encoding, content, write):
    plain = encoding(flip=False)
    latents = ShardLatents(write(tmp_path / "plain", plain, content(plain)))
    indices = torch.arange(23)
    assert torch.equal(latents.batch(indices, torch.ones(23, dtype=torch.bool))[0], latents.batch(indices)[0])


def calls(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch_indices(step, 6, 23, seed=5), draw_flips(5, step, torch.arange(6))


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_gives_the_same_batches(folder, in_memory, workers):
    with ShardLatents(folder, features=True) as latents, ShardLatents(folder, features=True) as direct:
        latents.batch(torch.zeros(1, dtype=torch.int64))  # the training loop looks at one before it starts
        latents.prefetch(calls, 3, 15, depth=3, workers=workers)
        for step in range(3, 15):
            indices, flips = calls(step)
            z, y = latents.batch(indices, flips)
            expected_z, expected_y = in_memory.batch(indices, flips)
            assert torch.equal(z, expected_z)
            assert torch.equal(y, expected_y)
            assert torch.equal(latents.features(indices, flips), direct.features(indices, flips))
        assert (latents.served_ahead, latents.served_directly) == (12, 1)
        latents.batch(*calls(15))  # beyond what was announced
        assert latents.served_directly == 2


def test_calls_that_were_not_announced_are_answered_directly(folder, in_memory):
    with ShardLatents(folder) as latents:
        latents.prefetch(calls, 0, 4)
        indices, flips = calls(0)
        other = indices.flip(0)
        for asked in ((other, flips), (indices, ~flips), (indices, None), (indices[:3], flips[:3])):
            assert torch.equal(latents.batch(*asked)[0], in_memory.batch(*asked)[0])
        assert (latents.served_ahead, latents.served_directly) == (0, 4)
        assert torch.equal(latents.batch(indices, flips)[0], in_memory.batch(indices, flips)[0])
        assert latents.served_ahead == 1
        latents.prefetch(calls, 2, 4)  # another announcement replaces it
        latents.batch(*calls(2))
        assert latents.served_ahead == 2


def test_threads_end_and_errors_arrive(folder):
    before = threading.active_count()
    latents = ShardLatents(folder)

    def failing(step):
        if step == 1:
            raise UserError("order", step, "broken")
        return calls(step)

    latents.prefetch(failing, 0, 9)
    latents.batch(*calls(0))
    with pytest.raises(UserError, match="order: 1: broken"):
        latents.batch(*calls(1))
    latents.close()
    assert threading.active_count() == before


def test_the_training_loop_runs_on_shards(tmp_path, encoding, content, write, monkeypatch):
    """The loop's result is that of the latents in memory, bit for bit, with and without reading ahead."""
    from fastasync.config import config_from_dict
    from fastasync.schedule import named_schedule
    from fastasync.training import train

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # it takes seconds to import

    one = encoding(names=("texture", "semantic"), channels=(3, 2), fingerprints=("f1", "f2"), class_names=("a", "b"))
    whole = content(one)
    folder = write(tmp_path / "latents", one, whole)
    config = config_from_dict(
        {
            "representations": dict(channels=[3, 2], grid=4),
            "model": dict(depth=2, width=16, heads=2, classes=2, repa_width=6),
            "objective": dict(repa_weight=0.5),
            "data": dict(flip=True, seed=2),
            "train": dict(steps=4, batch=6, accumulate=2, device="cpu", checkpoint_every=100),
        }
    )
    schedule = named_schedule("offset:0.3", config.representations.names, config.representations.roles)

    class Direct:
        """The same latents, answered when they are asked for."""

        def __init__(self, latents: ShardLatents):
            self.classes, self.device, self.count = latents.classes, latents.device, len(latents)
            self.batch, self.features = latents.batch, latents.features

        def __len__(self) -> int:
            return self.count

    records = []
    for ahead in (False, True):
        with ShardLatents(folder, features=True) as latents:
            seen = latents if ahead else Direct(latents)
            fingerprint = latents.statistics_fingerprint
            result = train(
                config, seen, schedule, tmp_path / str(ahead), statistics_fingerprint=fingerprint, progress=False
            )
            records.append({key: value for key, value in result.record.items() if key != "images_per_second"})
            assert latents.served_ahead == (8 if ahead else 0)
    assert records[0]["loss"] == records[1]["loss"]
    assert records[0]["grad_norm"] == records[1]["grad_norm"]
    assert records[0]["repa"] == records[1]["repa"] != 0


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_removed_a_cut_and_a_flipped_shard(folder):
    path = folder / "shard-00002.safetensors"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-200] ^= 1
    path.write_bytes(flipped)
    ShardLatents(folder)
    with pytest.raises(UserError, match=r"shard-00002.safetensors: altered .*: delete it and run the same"):
        ShardLatents(folder, verify=True, progress=False)
    path.write_bytes(good[:-1])
    with pytest.raises(UserError, match=r"shard-00002.safetensors: .*cut short"):
        ShardLatents(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00002.safetensors: missing"):
        ShardLatents(folder)


def test_labels_out_of_range_are_refused_at_opening(tmp_path, encoding, content, write):
    whole = content(encoding())
    whole["labels"][21] = -1
    with pytest.raises(UserError, match=r"shard-00004.safetensors: label of image 1: -1: must be in 0..2"):
        ShardLatents(write(tmp_path / "labels", encoding(), whole))


def test_shards_of_another_encoder(tmp_path, encoding, content, write):
    bundle = Bundle([build("texture", (3, 8, 8), 4), build("lowfreq", (3, 8, 8), 4)])
    fields = dict(names=bundle.names, channels=bundle.channels, features="", features_shape=())
    same = encoding(**fields, fingerprints=bundle.fingerprints())
    ShardLatents(write(tmp_path / "same", same, content(same)), bundle=bundle)
    other = encoding(**fields, fingerprints=(bundle.fingerprints()[0], "0123456789abcdef"))
    folder = write(tmp_path / "other", other, content(other))
    with pytest.raises(UserError, match=r"other: made by another lowfreq encoder \(0123456789ab, this one is"):
        ShardLatents(folder, bundle=bundle)
    third = Bundle([build("texture", (3, 8, 8), 4)])
    with pytest.raises(UserError, match="representations texture, lowfreq, not texture: encode with these"):
        ShardLatents(folder, bundle=third)
    with pytest.raises(UserError, match=r"holds no features: encode with --repa-vit, set objective.repa_source=online"):
        ShardLatents(folder, features=True)
    assert len(open_latents(folder)) == 23


# --- how fast ---------------------------------------------------------------------------------------------------------


class OpensEachSample(torch.utils.data.Dataset):
    """What the peers' loaders do: open the shard, slice one sample, normalise it."""

    def __init__(self, folder: Path, encoding: Encoding, latents: ShardLatents):
        self.folder, self.encoding = folder, encoding
        self.mean, self.std = latents._mean, latents._std

    def __len__(self) -> int:
        return self.encoding.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard, row = divmod(index, self.encoding.shard_size)
        with safe_open(self.folder / self.encoding.file(shard), framework="pt", device="cpu") as file:
            parts = [file.get_slice(f"latents.{name}")[row : row + 1] for name in self.encoding.names]
            label = file.get_slice("labels")[row : row + 1]
        return ((torch.cat(parts, 1) - self.mean) / self.std).squeeze(0), label.squeeze(0)


@pytest.mark.slow
def test_at_least_five_times_a_loader_that_opens_each_sample(tmp_path, encoding, capsys):
    """ImageNet's latents (32 + 16 channels on 16x16) in 64 small shards; one core, interleaved, warm cache."""
    one = encoding(
        count=2048, names=("texture", "semantic"), channels=(32, 16), fingerprints=("f1", "f2"), grid=16,
        shard_size=32, features="", features_shape=(), flip=False,
    )  # fmt: skip
    begin(tmp_path, one)
    generator = torch.Generator().manual_seed(0)
    for shard in range(one.shards):
        tensors = {
            name: torch.randint(3, shape) if name == "labels" else torch.randn(shape, generator=generator)
            for name, (_, shape) in one.tensors(32).items()
        }
        write_shard(tmp_path, one, shard, tensors)
    assert finish(tmp_path, one) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ShardLatents(tmp_path) as latents:
        slow = OpensEachSample(tmp_path, one, latents)
        times: dict[str, list[float]] = {"opens each sample": [], "direct": [], "ahead": []}
        batches = [batch_indices(step, 256, 2048, seed=0) for step in range(8)]
        loader = torch.utils.data.DataLoader(slow, batch_sampler=[batch.tolist() for batch in batches])
        for _ in range(5):
            began = time.perf_counter()
            expected = list(loader)
            times["opens each sample"].append(time.perf_counter() - began)
            began = time.perf_counter()
            for batch in batches:
                latents.batch(batch)
            times["direct"].append(time.perf_counter() - began)
            latents.prefetch(lambda step: (batches[step], None), 0, 8, workers=1)
            began = time.perf_counter()
            for batch in batches:
                got = latents.batch(batch, None)
            times["ahead"].append(time.perf_counter() - began)
            assert torch.equal(got[0], expected[-1][0])
            assert torch.equal(got[1], expected[-1][1])
    torch.set_num_threads(threads)
    rate = {name: 2048 / sorted(values)[2] for name, values in times.items()}
    with capsys.disabled():
        print("\nimg/s, median of 5:", {name: round(value) for name, value in rate.items()})
        print(f"factor: direct {rate['direct'] / rate['opens each sample']:.1f}", end=", ")
        print(f"ahead {rate['ahead'] / rate['opens each sample']:.1f}")
    for way in ("direct", "ahead"):  # by turns, so that other work slows all three
        assert rate[way] >= 2 * rate["opens each sample"], way
    if os.getloadavg()[0] <= len(os.sched_getaffinity(0)):  # else others decide what is measured
        assert rate["direct"] >= 5 * rate["opens each sample"]
