"""What both image loaders share: batches, their division over ranks, and reading ahead in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastasync.distributed import cpus_of_rank
from fastasync.errors import UserError
from fastasync.images.sources import ImageSource
from fastasync.images.transforms import horizontal_flip

AHEAD = 2  # batches that are prepared while one is in use
Item = TypeVar("Item")


class ImageBatch(NamedTuple):
    """Images uint8 [B, 3, S, S] on the loader's device; labels and indices int64 [B] on the CPU."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    @property
    def flipped(self) -> Tensor:
        """The second view: the images mirrored left to right."""
        return horizontal_flip(self.images)


class ImageLoader(ABC):
    """Iterates over the batches of source indices that it is given, in their order; may be iterated again.

    Args:
        source: the images.
        size: side S of the square crop.
        batches: index tensors int64 [b], 1 <= b <= batch (see ``shard_batches``).
        batch: the largest batch.
        workers: threads that read and decode (default: one for each CPU, divided by the ranks of this host).
        device: where the images go.

    A file that cannot be decoded is a UserError that names it.
    """

    backend: ClassVar[str]

    def __init__(
        self,
        source: ImageSource,
        size: int,
        batches: Iterable[Tensor],
        batch: int,
        workers: int | None = None,
        device: str | torch.device = "cpu",
    ):
        for name, value in (("size", size), ("batch", batch), ("workers", 1 if workers is None else workers)):
            if value < 1:
                raise UserError(name, value, "must be at least 1")
        self.source, self.size, self.batches, self.batch = source, size, batches, batch
        self.workers = workers or cpus_of_rank()
        self.device = torch.device(device)

    @abstractmethod
    def __iter__(self) -> Iterator[ImageBatch]:
        """The batches."""

    def _labelled(self, images: Tensor, indices: Tensor) -> ImageBatch:
        return ImageBatch(images, self.source.labels[indices], indices)

    def _bad_file(self, index: int, reason: str) -> UserError:
        return UserError(
            self.source.path(index),
            reason,
            "list such files with `fastasync check-images`, leave them out by that list",
        )


def shard_batches(order: Tensor, batch: int, rank: int = 0, world: int = 1, start: int = 0) -> tuple[Tensor, ...]:
    """This rank's batches of ``order`` (int64 [N]) from position ``start`` on: every world-th entry, beginning at rank.

    Over all ranks each entry is visited exactly once; the last batch may be smaller, and a rank may have one batch
    less than another.  After k batches on every rank the position is ``start + k * batch * world``, on any other
    world size too.  UserError for a rank, batch or position out of range.
    """
    if not 0 <= rank < world:
        raise UserError("rank", rank, f"must be in 0..{world - 1}")
    if batch < 1:
        raise UserError("batch", batch, "must be at least 1")
    if not 0 <= start <= len(order):
        raise UserError("position", start, f"must be in 0..{len(order)}")
    mine = order[start:][rank::world]
    return mine.split(batch) if len(mine) else ()


def read_ahead(
    batches: Iterable[Tensor], work: Callable[[list[int]], list[Item]], workers: int, parts: int | None = None
) -> Generator[tuple[Tensor, list[Item]], None, None]:
    """(batch, ``work``'s items for its indices), in order, up to AHEAD + 1 batches ahead on ``workers`` threads.

    ``work`` gets a batch in ``parts`` parts (default: two for each worker).  Its first exception is raised in the batch
    it belongs to.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    pending: deque[tuple[Tensor, list[Future[list[Item]]]]] = deque()
    try:
        for indices in batches:
            part = max(1, -(-len(indices) // (parts or 2 * workers)))
            pending.append((indices, [pool.submit(work, piece.tolist()) for piece in indices.split(part)]))
            if len(pending) > AHEAD:
                yield _collect(*pending.popleft())
        while pending:
            yield _collect(*pending.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(indices: Tensor, parts: list[Future[list[Item]]]) -> tuple[Tensor, list[Item]]:
    return indices, [item for part in parts for item in part.result()]
