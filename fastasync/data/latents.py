"""Normalised latents of a training set, in memory on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastasync.data.images import check_labels
from fastasync.errors import UserError


class Latents(Protocol):
    """What training and the probe read from: a ``LatentSet``, or anything that answers alike.

    A set that also has ``features(indices, flips) -> [B, N, D]`` (frozen features of the images) can train with REPA.
    What a set's ``verification`` finds, if it has one, ends training and the probe (``fastasync.data.verify``).
    """

    @property
    def classes(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised latents [B, C, H, W] and labels [B] of ``indices`` (int64 [B])."""
        ...


@dataclass(frozen=True)
class LatentSet:
    """Normalised latents z float32 [N, C, H, W], labels int64 [N], and the same of the mirrored images or None."""

    z: Tensor
    labels: Tensor
    classes: int
    flipped: Tensor | None = None

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.z), self.classes, "latents")
        if self.z.dtype != torch.float32 or self.z.ndim != 4:
            raise UserError("latents", f"{self.z.dtype} {list(self.z.shape)}", "must be float32 [N, C, H, W]")
        if self.flipped is not None and (self.flipped.shape, self.flipped.dtype) != (self.z.shape, self.z.dtype):
            found = f"{self.flipped.dtype} {list(self.flipped.shape)}"
            raise UserError("mirrored latents", found, f"must be float32 {list(self.z.shape)}")

    def __len__(self) -> int:
        return len(self.z)

    @property
    def device(self) -> torch.device:
        """Where z, labels and every batch live."""
        return self.z.device

    def batch(self, indices: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents [B, C, H, W] and labels [B] of ``indices`` (int64 [B]); mirrored where ``flips`` (bool [B]) is true.

        ``flips`` is ignored when the set has no mirrored view.
        """
        indices = indices.to(self.device, non_blocking=True)
        z = self.z[indices]
        if flips is not None and self.flipped is not None:
            z = torch.where(flips.to(self.device, non_blocking=True)[:, None, None, None], self.flipped[indices], z)
        return z, self.labels[indices]
