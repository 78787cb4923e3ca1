"""Generation: image i is a function of (seed, i, label i), whatever the batch size, device count or interruptions."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastasync_kernels.reference import philox_normal, philox_uniform
from torch import Tensor
from tqdm import tqdm

from fastasync.files import atomic_path
from fastasync.sampling.integrators import VelocityFunction, integrate
from fastasync.schedule import Schedule

NOISE_STREAM, LABEL_STREAM = 4, 5
ADAPTIVE_GROUP = 64  # images that dopri5 steps together, whatever the batch size


def sample_labels(indices: Tensor, classes: Sequence[int], mode: str, seed: int) -> Tensor:
    """Labels int64 [B] of the images ``indices``: ``balanced`` deals the classes in turn, ``random`` draws each."""
    table = torch.tensor(list(classes), dtype=torch.int64)
    if mode == "balanced":
        return table[indices % len(table)]
    if mode != "random":
        raise ValueError(f"labels {mode!r}: balanced or random")
    uniform = philox_uniform(seed, 0, indices, 1, stream=LABEL_STREAM)[:, 0]
    return table[(uniform.to(torch.float64) * len(table)).long().clamp(max=len(table) - 1)]


def initial_noise(indices: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """The starting noise of the images ``indices`` [B]: float32 [B, *shape]."""
    count = int(np.prod(shape))
    return philox_normal(seed, 0, indices, count, stream=NOISE_STREAM).reshape(len(indices), *shape)


def generate_latents(
    velocity: VelocityFunction,
    schedule: Schedule,
    indices: Tensor,
    labels: Tensor,
    *,
    channels: Sequence[int],
    side: int,
    grid: Tensor,
    method: str,
    seed: int,
    device: torch.device | str = "cpu",
    ops: Any = None,
) -> Tensor:
    """Normalised latents of the images ``indices`` with ``labels`` (both int64 [B]): float32 [B, C, side, side]."""
    x = initial_noise(indices.to(device), (sum(channels), side, side), seed)
    y = labels.to(device)
    return integrate(velocity, schedule, x, y, grid, method, channels=channels, ops=ops)


def batches(count: int, batch: int, method: str) -> Iterator[Tensor]:
    """The index batches of a run of ``count`` images.  Those of dopri5 are whole groups, the last one filled up."""
    if method == "dopri5":
        for start in range(0, count, ADAPTIVE_GROUP):
            yield torch.arange(start, start + ADAPTIVE_GROUP)
    else:
        for start in range(0, count, batch):
            yield torch.arange(start, min(start + batch, count))


def generate_images(
    make: Callable[[Tensor], tuple[Tensor, Tensor, int]],
    index_batches: Sequence[Tensor],
    count: int,
    folder: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    label: str = "sample",
    progress: bool = True,
    join: bool = True,
) -> Path:
    """Generate images into ``folder/samples.npz``.

    It holds ``arr_0`` uint8 [count, H, W, 3], ``labels`` int64 [count] and ``evaluations`` int64 [batches] (of the
    network).  ``make(indices) -> (images uint8 [B, C, H, W], labels [B], function evaluations)``.
    Each batch is kept as a file until the end, so an interrupted run continues where it was (with another batch
    size, it starts over); rank r of ``world`` makes the batches r, r + world, ... and whoever finds all of them
    complete joins them (``join``; ranks that end at the same time must not all do so).  Returns the npz's path (which
    exists only once every part does).
    """
    folder = Path(folder)
    target = folder / "samples.npz"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # the name tells the whole range: after an interruption another batch size may continue
    parts = [folder / f"part_{int(indices[0]):08d}_{len(indices)}.npz" for indices in index_batches]
    mine = range(rank, len(parts), world)
    with tqdm(total=sum(len(index_batches[i]) for i in mine), desc=label, unit="img", disable=not progress) as bar:
        for i in mine:
            if not parts[i].exists():
                images, labels, evaluations = make(index_batches[i])
                keep = int((index_batches[i] < count).sum())
                rgb = images[:keep].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
                _write_part(
                    parts[i], images=rgb, labels=labels[:keep].cpu().numpy(), evaluations=np.array([evaluations])
                )
            bar.update(len(index_batches[i]))
    if join and all(part.exists() for part in parts):
        _join(parts, target, count)
    return target


def _write_part(path: Path, **arrays: np.ndarray) -> None:
    with atomic_path(path) as partial, open(partial, "wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _join(parts: Sequence[Path], target: Path, count: int) -> None:
    """Join the parts into one npz, a part at a time, so that 50k images at 256 never sit in memory."""
    with np.load(parts[0]) as first:
        shape = (count, *first["images"].shape[1:])
    small: dict[str, list[np.ndarray]] = {"labels": [], "evaluations": []}
    with atomic_path(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                with np.load(part) as arrays:
                    stream.write(np.ascontiguousarray(arrays["images"]).tobytes())
                    for name, collected in small.items():
                        collected.append(arrays[name])
        for name, collected in small.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, np.concatenate(collected))
    for part in target.parent.glob("part_*.npz"):  # those of another batch size too
        part.unlink()
