"""Exact statistics of latents, and the fingerprint by which training and sampling recognise them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastasync.errors import UserError
from fastasync.files import digest_tensors


class StreamingStatistics:
    """Mean and standard deviation per channel over any number of batches, in float64.

    Batches are merged by their count, mean and sum of squared deviations (Chan, Golub, LeVeque 1979), so that no large
    sums cancel.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.deviation = torch.zeros(channels, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add a batch [N, C, H, W]."""
        values = x.detach().double().transpose(0, 1).flatten(1)
        if not values.shape[1]:
            return
        mean = values.mean(1)
        deviation = (values - mean[:, None]).square().sum(1)
        self.merge(values.shape[1], mean.cpu(), deviation.cpu())

    def merge(self, count: int, mean: Tensor, deviation: Tensor) -> None:
        """Add ``count`` values known by their mean and sum of squared deviations, float64 [C]."""
        total = self.count + count
        if not count:
            return
        shift = mean - self.mean
        self.deviation += deviation + shift.square() * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """(mean, std), float64 [C]; std is the unbiased one, as in the peers' files."""
        return self.mean.clone(), (self.deviation / max(self.count - 1, 1)).sqrt()


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and std of every channel of a bundle (float64 values), with the fingerprints of what produced them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    representations: tuple[str, ...]  # fingerprints, in the bundle's order

    def fingerprint(self) -> str:
        """SHA-256 over values and representations: stored in checkpoints, compared by ``check_same_statistics``."""
        tensors = {
            "mean": torch.tensor(self.mean, dtype=torch.float64),
            "std": torch.tensor(self.std, dtype=torch.float64),
        }
        return digest_tensors(tensors, list(self.representations))


def checked_statistics(
    streaming: StreamingStatistics, names: Sequence[str], channels: Sequence[int], fingerprints: Sequence[str]
) -> LatentStatistics:
    """The statistics of a bundle's latents, once all of the training set was added to ``streaming``.

    Raises UserError for a channel that never varies or is not finite: it could not be normalised.
    """
    mean, std = streaming.result()
    owners = [name for name, count in zip(names, channels) for _ in range(count)]
    for channel, owner in enumerate(owners):
        if not torch.isfinite(std[channel]) or std[channel] <= 1e-6 * max(1.0, abs(float(mean[channel]))):
            where = f"representation {owner}: std of channel {channel - owners.index(owner)}"
            raise UserError(where, float(std[channel]), "must be positive and finite over the training set")
    return LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()), tuple(fingerprints))


def check_same_statistics(expected: str, found: str, where: str = "latent statistics") -> None:
    """UserError unless a checkpoint's statistics fingerprint (``expected``) is the prepared data's (``found``)."""
    if expected != found:
        remedy = (
            f"the checkpoint was trained with {expected[:12]}: use the prepared data it was trained on, or train again"
        )
        raise UserError(where, f"fingerprint {found[:12]}", remedy)
