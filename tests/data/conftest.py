"""A small set of latents in shards, made directly (without encoders)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastasync.data.shards import Encoding, begin, finish, write_shard

COUNT, CLASSES = 23, 3


def encoding_of(**changes) -> Encoding:
    fields = dict(
        images="images-1", count=COUNT, left_out=0, class_names=("a", "b", "c"), image_shape=(3, 8, 8), grid=4,
        names=("texture", "semantic", "third"), channels=(3, 2, 1), fingerprints=("f1", "f2", "f3"), flip=True,
        dtype="float32", shard_size=5, features="feature-encoder", features_shape=(16, 6),
    )  # fmt: skip
    return Encoding(**(fields | changes))


def content_of(encoding: Encoding, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of the whole set; channel c has mean c and standard deviation c + 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in encoding.tensors(encoding.count).items():
        if name == "labels":
            tensors[name] = torch.randint(len(encoding.class_names), shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator)
            scale = torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2))
            tensors[name] = (values * (scale + 1) + scale).to(dtype)
    return tensors


def write_folder(out: Path, encoding: Encoding, content: dict[str, torch.Tensor]) -> Path:
    begin(out, encoding)
    for shard in range(encoding.shards):
        first, last = encoding.bounds(shard)
        write_shard(out, encoding, shard, {name: tensor[first:last] for name, tensor in content.items()})
    assert finish(out, encoding) == 0
    return out


@pytest.fixture
def encoding() -> Callable[..., Encoding]:
    return encoding_of


@pytest.fixture
def content() -> Callable[..., dict[str, torch.Tensor]]:
    return content_of


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished folder: 23 images in 5 shards, K = 3, mirrored views, features."""
    encoding = encoding_of()
    return write_folder(tmp_path / "latents", encoding, content_of(encoding))
