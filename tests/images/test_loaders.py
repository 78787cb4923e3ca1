"""Order, sharding and position of the loaders; which one is chosen."""

import itertools
import sys

import pytest
import torch

from fastasync.data import batch_indices
from fastasync.errors import UserError
from fastasync.images import centre_crop, decode, open_images, open_source, shard_batches
from fastasync.images.loader import read_ahead


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_every_index_once_over_the_ranks(world, start):
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    shards = [shard_batches(order, 3, rank, world, start) for rank in range(world)]
    visited = torch.cat([torch.cat(batches) for batches in shards])
    assert sorted(visited.tolist()) == sorted(order[start:].tolist())
    assert all(len(part) == 3 for batches in shards for part in batches[:-1])
    lengths = [len(batches) for batches in shards]
    assert max(lengths) - min(lengths) <= 1


def test_a_position_continues_on_another_world_size():
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    seen = [index for rank in range(3) for part in shard_batches(order, 2, rank, 3)[:4] for index in part.tolist()]
    position = 4 * 2 * 3
    assert set(seen) == set(order[:position].tolist())
    rest = [
        index for rank in range(2) for part in shard_batches(order, 5, rank, 2, position) for index in part.tolist()
    ]
    assert sorted(seen + rest) == list(range(40))


def test_more_ranks_than_images():
    assert [len(shard_batches(torch.arange(2), 4, rank, 3)) for rank in range(3)] == [1, 1, 0]
    assert shard_batches(torch.arange(4), 2, 0, 1, start=4) == ()


@pytest.mark.parametrize("arguments", [(0, 0, 1), (2, 1, 1), (2, -1, 1), (2, 0, 1, 5), (2, 0, 1, -1)])
def test_refused_shards(arguments):
    with pytest.raises(UserError, match=r"^(rank|batch|position): "):
        shard_batches(torch.arange(4), *arguments)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", ["tree", "tars"])
def test_pil_batches(request, kind, workers):
    source = open_source(request.getfixturevalue(kind))
    order = torch.arange(len(source)).flip(0)
    loader = open_images(source, 64, 4, "pil", order=order, workers=workers)
    batches = list(loader)
    assert [len(batch.indices) for batch in batches] == [len(part) for part in order.split(4)]
    for batch in batches:
        assert (batch.images.dtype, batch.images.shape[1:]) == (torch.uint8, (3, 64, 64))
        assert batch.labels.tolist() == [source.label(index) for index in batch.indices.tolist()]
        for image, mirrored, index in zip(batch.images, batch.flipped, batch.indices.tolist()):
            expected = torch.from_numpy(centre_crop(decode(source.read(index)), 64).copy()).permute(2, 0, 1)
            assert torch.equal(image, expected)
            assert torch.equal(mirrored, expected.flip(2))
    assert torch.equal(torch.cat([batch.indices for batch in batches]), order)
    again = list(loader)
    assert all(torch.equal(one.images, other.images) for one, other in zip(batches, again, strict=True))
    resumed = list(open_images(source, 64, 4, "pil", order=order, workers=workers, start=4))
    assert all(torch.equal(one.images, other.images) for one, other in zip(batches[1:], resumed, strict=True))


def test_batches_without_end(tree):
    source = open_source(tree)
    steps = (batch_indices(step, 5, len(source), seed=3) for step in itertools.count(7))
    loader = open_images(source, 16, 5, "pil", batches=steps, workers=2)
    for step, batch in zip(range(7, 14), loader):
        assert torch.equal(batch.indices, batch_indices(step, 5, len(source), seed=3))


def test_a_bad_file_is_named(tree):
    name = "ä one/bild 2 ß日本.JPEG"
    (tree / name).write_bytes((tree / name).read_bytes()[:2000])
    source = open_source(tree)
    loader = iter(open_images(source, 32, 4, "pil", workers=2))
    assert [len(next(loader).indices) for _ in range(2)] == [4, 4]  # what comes before it is delivered
    with pytest.raises(UserError, match=rf"^{name}: .*truncated.*check-images"):
        list(loader)
    assert len(list(open_images(source.without([name]), 32, 4, "pil"))) == 3


def test_reading_stays_a_few_batches_ahead():
    taken = []

    def batches():
        for number in range(100):
            taken.append(number)
            yield torch.tensor([number])

    reader = read_ahead(batches(), lambda indices: indices, 2)
    assert next(reader)[1] == [0]
    assert taken == [0, 1, 2]
    reader.close()
    assert taken == [0, 1, 2]


def test_the_choice_of_backend(tree, monkeypatch):
    source = open_source(tree)
    assert open_images(source, 32, 4, device="cpu").backend == "pil"
    with pytest.raises(UserError, match="'dalli': did you mean 'dali'"):
        open_images(source, 32, 4, "dalli")
    for field, arguments in (("size", (0, 4)), ("batch", (32, 0))):
        with pytest.raises(UserError, match=f"{field}: 0"):
            open_images(source, *arguments, "pil")
    with pytest.raises(UserError, match="workers: 0"):
        open_images(source, 32, 4, "pil", workers=0)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install 'fastasync\[dali\]'"):
        open_images(source, 32, 4, "dali")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_images(source, 32, 4).backend == "pil"
