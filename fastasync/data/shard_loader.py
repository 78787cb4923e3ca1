"""Latents read from memory-mapped shards: random access, and batches made ready before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from fastasync.data.shards import MappedFile, check_hash, check_labels, open_shards, read_index
from fastasync.data.verify import Verification
from fastasync.errors import UserError
from fastasync.representations.bundle import Bundle
from fastasync.representations.statistics import LatentStatistics

Call = tuple[Tensor, Tensor | None]  # indices int64 [B] and flips bool [B] or None, as ``batch`` takes them


class Names(NamedTuple):
    """What a tensor of the plain view and the same of the mirrored one (None: not there) are called in a shard."""

    plain: str
    mirrored: str | None


class _Ready(NamedTuple):
    indices: Tensor
    flips: Tensor | None
    z: Tensor
    y: Tensor
    features: Tensor | None
    event: torch.cuda.Event | None


class MappedLatents:
    """Training latents in mapped shards: the training loop's ``Latents``.

    Batches are normalised, (raw - mean) / std in float32, and arrive on ``device``.  With a CUDA device they are
    gathered into pinned memory and copied without waiting.  ``prefetch`` announces the batches to come.

    Args:
        files: the shards, in order.
        parts: the latents' names in a shard, in the bundle's order.
        statistics: of the raw latents.
        classes: how many there are; every label must be in [0, classes).
        features: the REPA features' names, or None for none; [n, tokens, D] or [n, D, h, w] in a shard.
        device: where batches go.
    """

    names: tuple[str, ...]  # of the representations, in their order
    channels: tuple[int, ...]  # of each

    def __init__(
        self,
        files: Sequence[MappedFile],
        parts: Sequence[Names],
        statistics: LatentStatistics,
        classes: int,
        features: Names | None = None,
        device: str | torch.device = "cpu",
    ):
        self.classes, self.device, self.statistics = classes, torch.device(device), statistics
        if self.device.type == "cuda" and self.device.index is None:  # threads do not share the current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.mirrored = all(part.mirrored is not None for part in parts)
        self.features: Callable[[Tensor, Tensor | None], Tensor] | None = self._features if features else None
        self.served_ahead = self.served_directly = 0  # batches
        self._files, self._parts, self._feature_names = list(files), tuple(parts), features
        self._labels = torch.cat([file.tensors["labels"].long() for file in files])  # read into memory
        counts = torch.tensor([len(file.tensors["labels"]) for file in files])
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts
        for file in files:
            check_labels(file, classes)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float64).float().reshape(1, -1, 1, 1).to(self.device)
            for values in (statistics.mean, statistics.std)
        )
        self._cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[_Ready]] = deque()
        self._order: Callable[[int], Call] | None = None
        self._next = self._stop = 0
        self._delivered: _Ready | None = None

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def statistics_fingerprint(self) -> str:
        """What checkpoints remember of the statistics."""
        return self.statistics.fingerprint()

    # --- random access ----------------------------------------------------------------------------------------------

    def batch(self, indices: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised latents float32 [B, C, H, W] and labels int64 [B] on ``device``.

        ``indices`` int64 [B]; an image is mirrored where ``flips`` (bool [B]) is true, if the set holds mirrored ones.
        """
        ready = self._take(indices, flips)
        if ready is None:
            self.served_directly += 1
            z, y, _ = self._load(indices, flips, with_features=False)
            return z, y
        return ready.z, ready.y

    def _features(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """The frozen features [B, tokens, D] that belong to ``batch(indices, flips)``, as they are stored."""
        ready = self._delivered
        if ready is not None and ready.features is not None and _same(ready, indices, flips):
            return ready.features
        return self._load_features(*self._on_host(indices, flips))

    def _on_host(self, indices: Tensor, flips: Tensor | None) -> Call:
        indices = indices.cpu()
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < len(self)):
            raise IndexError(f"indices {int(indices.min())}..{int(indices.max())} of {len(self)} images")
        return indices, None if flips is None else flips.cpu()

    def _load(self, indices: Tensor, flips: Tensor | None, with_features: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        indices, flips = self._on_host(indices, flips)
        first, count = self._files[0].tensors, len(indices)
        samples = [first[part.plain] for part in self._parts]
        channels = [sample.shape[1] for sample in samples]
        if self._cuda:  # in the stored type, through pinned memory
            parts = [self._pinned(count, sample) for sample in samples]
            self._fill(self._parts, indices, flips, parts)
            z = torch.cat([part.to(self.device, non_blocking=True).float() for part in parts], dim=1)
        else:
            z = torch.empty(count, sum(channels), *samples[0].shape[2:])
            self._fill(self._parts, indices, flips, z.split(channels, dim=1))
        z = z.sub_(self._mean).div_(self._std)
        y = self._labels[indices]
        y = (y.pin_memory() if self._cuda else y).to(self.device, non_blocking=True)
        return z, y, self._load_features(indices, flips) if with_features and self._feature_names else None

    def _load_features(self, indices: Tensor, flips: Tensor | None) -> Tensor:
        assert self._feature_names is not None
        values = self._pinned(len(indices), self._files[0].tensors[self._feature_names.plain])
        self._fill([self._feature_names], indices, flips, [values])
        values = values.to(self.device, non_blocking=True)
        return values if values.ndim == 3 else values.flatten(2).transpose(1, 2)

    def _pinned(self, count: int, like: Tensor) -> Tensor:
        return torch.empty(count, *like.shape[1:], dtype=like.dtype, pin_memory=self._cuda)

    def _fill(self, names: Sequence[Names], indices: Tensor, flips: Tensor | None, targets: Sequence[Tensor]) -> None:
        """Copy one row for each index and name into ``targets`` [B, ...]: one pass over the data, from map to place.

        A copy for each row was measured faster than grouping a batch by shard (26,400 against 16,200 img/s on a busy
        core, 48x16x16): with many shards the groups are single rows, and they have to be put back in order.
        """
        shards = torch.searchsorted(self._ends, indices, right=True)
        rows = (indices - self._starts[shards]).tolist()
        mirrored = [False] * len(rows) if flips is None or not self.mirrored else flips.tolist()
        for place, (shard, row, flip) in enumerate(zip(shards.tolist(), rows, mirrored)):
            tensors = self._files[shard].tensors
            for name, target in zip(names, targets):
                target[place].copy_(tensors[name.mirrored if flip and name.mirrored else name.plain][row])

    # --- reading ahead ----------------------------------------------------------------------------------------------

    def prefetch(
        self, order: Callable[[int], Call], start: int, stop: int, *, depth: int = 4, workers: int = 2
    ) -> None:
        """Announce the coming calls of ``batch``: ``order(n)`` -> (indices, flips) for n = start .. stop - 1.

        ``order`` must be a pure function (it runs on the reading threads).  Up to ``depth`` calls are made ready by
        ``workers`` threads; a call with other indices (or flips; those on a GPU are not compared, that would wait for
        it) is answered directly, and the announced ones stay ready.  Replaces an earlier announcement.
        """
        self.close()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="latents")
        self._order, self._next, self._stop = order, start, stop
        for _ in range(depth):
            self._submit()

    def close(self) -> None:
        """Forget what was announced and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._order, self._delivered = None, None, None
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self) -> None:
        if self._pool is not None and self._next < self._stop:
            self._ahead.append(self._pool.submit(self._make_ready, self._next))
            self._next += 1

    def _make_ready(self, number: int) -> _Ready:
        assert self._order is not None
        indices, flips = self._order(number)
        if self._stream is None:
            return _Ready(indices, flips, *self._load(indices, flips, with_features=True), None)
        with torch.cuda.stream(self._stream):
            made = self._load(indices, flips, with_features=True)
            return _Ready(indices, flips, *made, self._stream.record_event())

    def _take(self, indices: Tensor, flips: Tensor | None) -> _Ready | None:
        """The next announced batch, if it is the one that is asked for."""
        if not self._ahead:
            return None
        ready = self._ahead[0].result()
        if not _same(ready, indices, flips):
            return None
        self._ahead.popleft()
        self._submit()
        if ready.event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready.event)
            for tensor in (ready.z, ready.y, ready.features):
                if tensor is not None:
                    tensor.record_stream(current)
        self._delivered = ready
        self.served_ahead += 1
        return ready


def _same(ready: _Ready, indices: Tensor, flips: Tensor | None) -> bool:
    if not torch.equal(ready.indices, indices.cpu()):
        return False
    if ready.flips is None or flips is None:
        return ready.flips is flips
    return flips.is_cuda or torch.equal(ready.flips, flips)


class ShardLatents(MappedLatents):
    """The latents of a folder that ``fastasync encode`` finished.

    Args:
        directory: the folder.
        device: where batches go.
        features: also give REPA's features; UserError when the folder holds none.
        bundle: the representations in use; UserError unless the shards were made by them.
        verify: first compare every shard's hash (reads all of the set; else sizes and layouts are compared).
        progress: show it while verifying.

    Raises UserError for a folder that is unfinished, and for a shard that is missing, cut short, or not as indexed.
    """

    def __init__(
        self,
        directory: str | Path,
        device: str | torch.device = "cpu",
        *,
        features: bool = False,
        bundle: Bundle | None = None,
        verify: bool = False,
        progress: bool = True,
    ):
        self.index = read_index(directory)
        encoding = self.index.encoding
        if bundle is not None:
            check_encoder(directory, self.index.statistics, encoding.names, bundle)
        if features and not encoding.features:
            raise UserError(
                str(directory),
                "holds no features",
                "encode with --repa-vit, set objective.repa_source=online (with data.images and "
                "objective.repa_vit_weights), or objective.repa_weight=0",
            )
        files = list(open_shards(directory, self.index))
        self.verification: Verification | None = None
        self._hashed = [(file, record["sha256"]) for file, record in zip(files, self.index.shards)]
        if verify:
            for file, sha256 in tqdm(self._hashed, "verify latents", unit="shard", disable=not progress):
                check_hash(file, sha256)

        def names(kind: str, suffix: str = "") -> Names:
            return Names(f"{kind}{suffix}", f"{kind}_flip{suffix}" if encoding.flip else None)

        super().__init__(
            files,
            [names("latents", f".{name}") for name in encoding.names],
            self.index.statistics,
            len(encoding.class_names),
            names("feats") if features else None,
            device,
        )
        self.names, self.channels = encoding.names, encoding.channels

    def start_verifying(self, rank: int, world: int, at_once: int, say: Callable[[str], None]) -> Verification:
        """Begin to compare the hashes of this rank's part of the shards, once; ``at_once``, ``say``: Verification's."""
        if self.verification is None:
            self.verification = Verification(self._hashed[rank::world], at_once, say)
        return self.verification


def check_encoder(directory: str | Path, statistics: LatentStatistics, names: Sequence[str], bundle: Bundle) -> None:
    """UserError unless the latents were made by the representations of ``bundle``."""
    if tuple(names) != bundle.names:
        found, wanted = ", ".join(names), ", ".join(bundle.names)
        raise UserError(str(directory), f"representations {found}, not {wanted}", "encode with these, or use its own")
    for name, expected, found in zip(names, bundle.fingerprints(), statistics.representations):
        if expected != found:
            what = f"made by another {name} encoder ({found[:12]}, this one is {expected[:12]})"
            raise UserError(str(directory), what, "use the encoder that it was made by, or encode again")


def open_latents(
    directory: str | Path, device: str | torch.device = "cpu", *, features: bool = False, classes: int | None = None
) -> MappedLatents:
    """Latents of ``fastasync encode``, or of an SFD / LightningDiT folder (see SFDLatents; ``classes`` is for it)."""
    from fastasync.data.sfd_folder import SFDLatents, is_sfd_folder

    if is_sfd_folder(directory):
        return SFDLatents(directory, device, features=features, classes=classes)
    return ShardLatents(directory, device, features=features)
