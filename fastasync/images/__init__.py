"""Image files at scale: sources, ADM's crop, loaders (Pillow, DALI) and the check for bad files."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastasync.errors import UserError, require, unknown_name
from fastasync.images.check import add_parser, check_images, check_images_command, read_bad_list, require_checked
from fastasync.images.loader import ImageBatch, ImageLoader, shard_batches
from fastasync.images.pil_loader import PilLoader
from fastasync.images.sources import ImageSource, open_folder, open_source, open_tars
from fastasync.images.transforms import BadImage, centre_crop, decode, horizontal_flip, to_rgb

BACKENDS = ("auto", "dali", "pil")

__all__ = [
    "BACKENDS",
    "BadImage",
    "ImageBatch",
    "ImageLoader",
    "ImageSource",
    "PilLoader",
    "add_parser",
    "centre_crop",
    "check_images",
    "check_images_command",
    "decode",
    "horizontal_flip",
    "open_folder",
    "open_images",
    "open_source",
    "open_tars",
    "read_bad_list",
    "require_checked",
    "shard_batches",
    "to_rgb",
]


def open_images(
    source: ImageSource,
    size: int,
    batch: int,
    backend: str = "auto",
    *,
    order: Tensor | None = None,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    batches: Iterable[Tensor] | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
) -> ImageLoader:
    """A loader of this rank's batches; see ImageLoader for the arguments that it shares.

    Either ``batches`` (index tensors, for instance of ``batch_indices``, without end if need be), or ``order`` (int64,
    default: the source's), ``rank``, ``world`` and ``start`` for ``shard_batches``.  ``backend``: ``pil``, ``dali``, or
    ``auto``, which is DALI where there are a CUDA device and the package, else Pillow (slower than DALI on CPUs, but
    its crop is ADM's to the pixel).  ``device``: by default the
    current CUDA device for DALI if there is one, else the CPU.  Raises UserError.
    """
    if backend not in BACKENDS:
        raise unknown_name("image loader", backend, BACKENDS)
    if batches is None:
        order = torch.arange(len(source)) if order is None else order
        batches = shard_batches(order, batch, rank, world, start)
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if backend == "auto":
        backend = "dali" if cuda and _has_dali() else "pil"
    if backend == "pil":
        return PilLoader(source, size, batches, batch, workers, device or "cpu")
    from fastasync.images.dali_loader import DaliLoader

    device = device or ("cuda" if cuda else "cpu")
    return DaliLoader(source, size, batches, batch, workers, device)


def _has_dali() -> bool:
    try:
        require("nvidia.dali", "dali")
    except UserError:
        return False
    return True
