"""Semantic: a frozen encoder's feature map, compressed by a SemVAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastasync.errors import UserError
from fastasync.representations.base import ImageShape, Representation, named_settings, register
from fastasync.representations.classifier import Classifier
from fastasync.representations.semvae import SemVAE, SemVAESettings, reconstruction, train_semvae
from fastasync.representations.texture import to_float


@register("semantic")
class Semantic(Representation):
    """Classifier feature map [N, D, grid, grid] -> posterior mean of a SemVAE [N, channels, grid, grid].

    Options: ``channels``, and ``semvae``: the fields of SemVAESettings that differ from its defaults.
    """

    uses_encoder = True

    def __init__(
        self,
        image_shape: ImageShape,
        grid: int,
        encoder: Classifier,
        channels: int = 8,
        semvae: dict[str, Any] | None = None,
    ):
        super().__init__(image_shape, grid)
        if encoder.grid != grid:
            raise UserError("grid", grid, f"the encoder's feature map has side {encoder.grid}")
        self.channels, self.settings = channels, named_settings(SemVAESettings, "semvae", semvae)
        self.encoder = encoder
        s = self.settings
        self.vae = SemVAE(encoder.map_channels, channels, grid, s.width, s.depth, s.heads)

    def fit(self, images: Tensor, seed: int, progress: bool = True) -> dict[str, float]:
        """Train the SemVAE; returns mse, cosine and kl of standardised features over the training images."""
        device = self.vae.feature_mean.device

        @torch.no_grad()
        def features(indices: Tensor) -> Tensor:
            return self.encoder.feature_map(to_float(images[indices].to(device)))

        self.vae = train_semvae(
            features, len(images), self.vae.feature_dim, self.channels, self.grid, self.settings, seed, device, progress
        )
        return reconstruction(self.vae, features, len(images))

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(self.encoder.feature_map(to_float(images)).float())
