"""The only place that concatenates, splits and normalises representations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastasync.data.images import check_images
from fastasync.errors import UserError
from fastasync.representations.base import Representation, checked_encode
from fastasync.representations.statistics import LatentStatistics, StreamingStatistics, checked_statistics


def only_decoder(representations: Sequence[Representation]) -> Representation:
    """The one that decodes to images.  UserError unless there is exactly one."""
    decoders = [item for item in representations if item.decodes]
    if len(decoders) != 1:
        found = ", ".join(item.name for item in decoders) or "none"
        raise UserError("representations that decode to images", found, "a bundle needs exactly one")
    return decoders[0]


class Bundle:
    """K representations of the same images on the same grid, in order (texture first, semantic last in the presets).

    ``raw`` latents are what the representations return; ``normalised`` ones, (raw - mean) / std per channel over the
    training set, are what the model sees (LightningDiT's scaling with multiplier 1).  All representations must be on
    one device.  Raises UserError when they do not fit together or not exactly one decodes.
    """

    def __init__(self, representations: Sequence[Representation], statistics: LatentStatistics | None = None):
        self.representations = tuple(representations)
        self.names = tuple(item.name for item in self.representations)
        self.channels = tuple(item.channels for item in self.representations)
        if not self.names:
            raise UserError("representations", "none", "name at least one")
        if len(set(self.names)) != len(self.names):
            raise UserError("representations", ", ".join(self.names), "each may appear once")
        for what, values in (
            ("grid", {item.grid for item in self.representations}),
            ("image shape", {item.image_shape for item in self.representations}),
        ):
            if len(values) > 1:
                raise UserError(f"representations: {what}", sorted(values), "must be the same for all of a bundle")
        self.decoder = only_decoder(self.representations)
        self.grid, self.image_shape = self.decoder.grid, self.decoder.image_shape
        self.statistics = statistics
        if statistics is not None:
            if len(statistics.mean) != sum(self.channels):
                found = f"{len(statistics.mean)} channels"
                raise UserError("latent statistics", found, f"the bundle has {sum(self.channels)}")
            self.mean = torch.tensor(statistics.mean, dtype=torch.float64).float().reshape(1, -1, 1, 1)
            self.std = torch.tensor(statistics.std, dtype=torch.float64).float().reshape(1, -1, 1, 1)

    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprint of each representation."""
        return tuple(item.fingerprint() for item in self.representations)

    def to(self, device: str | torch.device) -> Bundle:
        """Move the representations to ``device``; returns self."""
        for item in self.representations:
            item.to(device)
        return self

    def concatenate(self, parts: Sequence[Tensor]) -> Tensor:
        """K latents [N, C_k, H, W] -> [N, C, H, W]."""
        return torch.cat(list(parts), dim=1)

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """[N, C, H, W] -> K views [N, C_k, H, W]."""
        return z.split(list(self.channels), dim=1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [N, C, H, W] on the representations' device -> raw latents float32 [N, C, grid, grid]."""
        check_images(images, "encode", self.image_shape)
        return self.concatenate([checked_encode(item, images) for item in self.representations])

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw -> normalised latents, [N, C, H, W]."""
        self._require_statistics()
        return (raw - self.mean.to(raw.device)) / self.std.to(raw.device)

    def denormalise(self, z: Tensor) -> Tensor:
        """Normalised -> raw latents, [N, C, H, W]."""
        self._require_statistics()
        return z * self.std.to(z.device) + self.mean.to(z.device)

    @torch.no_grad()
    def decode(self, z: Tensor, batch: int = 1024) -> Tensor:
        """Normalised latents [N, C, H, W], as a sampler makes them -> images uint8, in chunks of ``batch``."""
        index = self.representations.index(self.decoder)
        return torch.cat([self.decoder.decode(self.split(self.denormalise(part))[index]) for part in z.split(batch)])

    def _require_statistics(self) -> None:
        if self.statistics is None:
            raise UserError("bundle", "no statistics", "make them first: with_statistics(bundle, batches)")


def with_statistics(bundle: Bundle, raw_batches: Iterator[Tensor]) -> Bundle:
    """The same bundle with exact statistics of raw latents [n, C, H, W] (the whole training set, batch by batch).

    Raises UserError for a channel that never varies or is not finite: it could not be normalised.
    """
    streaming = StreamingStatistics(sum(bundle.channels))
    for batch in raw_batches:
        streaming.update(batch)
    statistics = checked_statistics(streaming, bundle.names, bundle.channels, bundle.fingerprints())
    return Bundle(bundle.representations, statistics)
