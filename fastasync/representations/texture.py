"""Texture: the pixels themselves, one patch per token, or the principal components of the patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fastasync.errors import UserError
from fastasync.representations.base import ImageShape, Representation, named_settings, register
from fastasync.representations.denoiser import Denoiser, DenoiserSettings, train_denoiser


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float32 in [-1, 1] -> uint8: clamp(127.5 x + 128, 0, 255), rounded down; the exact inverse of ``to_float``."""
    return (127.5 * x + 128).clamp(0, 255).byte()


@register("texture")
class Texture(Representation):
    """Patches of p x p pixels in [-1, 1], channels ordered (colour, row, column); p = image side / grid.

    Option ``channels``: fewer than a patch's numbers, their principal components over the training images instead, the
    largest first: the linear autoencoder that reconstructs best.  Normalised, they all have the same deviation; the
    finest detail of CIFAR-10's pixels has a hundredth of theirs, which a sampler's last noise covers.
    Option ``denoiser``: fields of DenoiserSettings that differ from its defaults; then ``decode`` ends with a network
    that takes such noise out.
    """

    basis: Tensor
    mean: Tensor

    def __init__(
        self,
        image_shape: ImageShape,
        grid: int,
        channels: int | None = None,
        denoiser: dict[str, Any] | None = None,
    ):
        super().__init__(image_shape, grid)
        colours, height, width = image_shape
        if height != width or height % grid:
            raise UserError("grid", grid, f"must divide the image side ({height}x{width} images, square only)")
        self.patch = height // grid
        numbers = colours * self.patch**2
        self.channels = numbers if channels is None else channels
        if not 1 <= self.channels <= numbers:
            raise UserError("representation texture: channels", channels, f"must be 1 to {numbers}, a patch's numbers")
        if channels is not None:
            self.register_buffer("basis", torch.eye(numbers)[: self.channels])
            self.register_buffer("mean", torch.zeros(numbers))
        self.denoiser = None
        if denoiser is not None:
            self.settings = named_settings(DenoiserSettings, "denoiser", denoiser)
            self.denoiser = Denoiser(colours, self.settings.width, self.settings.depth)

    @property
    def compresses(self) -> bool:
        """Whether the channels are principal components."""
        return "basis" in self._buffers

    @property
    def learns(self) -> bool:
        """As of every representation: the pixels alone need no fit."""
        return self.compresses or self.denoiser is not None

    def fit(self, images: Tensor, seed: int, progress: bool = True) -> dict[str, float]:
        """Find the components and train the denoiser.

        Returns ``explained``, the components' share of the variance, and the figures of ``train_denoiser``.
        """
        figures: dict[str, float] = {}
        if not self.learns:
            return figures
        mean, covariance = patch_moments(images, self.patch)
        variances = covariance.diagonal()
        if self.compresses:
            values, vectors = torch.linalg.eigh(covariance)
            basis = vectors.T.flip(0)[: self.channels]
            sign = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()  # eigenvectors have no sign of their own
            self.basis.copy_(sign * basis)
            self.mean.copy_(mean)
            variances = values.flip(0)[: self.channels]
            figures["explained"] = float(variances.sum() / values.sum())
        if self.denoiser is not None:
            device = self.denoiser.enter.weight.device
            deviation = variances.clamp(min=0).sqrt().float().to(device)
            figures |= train_denoiser(
                self.denoiser,
                lambda samples: to_float(images[samples].to(device)),
                self._to_latents,
                self._to_pixels,
                deviation,
                len(images),
                self.settings,
                seed,
                progress,
            )
        return figures

    def encode(self, images: Tensor) -> Tensor:
        return self._to_latents(to_float(images))

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self._to_pixels(latents)
        return to_uint8(pixels if self.denoiser is None else self.denoiser(pixels))

    def _to_latents(self, pixels: Tensor) -> Tensor:
        patches = pixel_unshuffle(pixels, self.patch)
        if not self.compresses:
            return patches
        return torch.einsum("nchw,kc->nkhw", patches - self.mean[:, None, None], self.basis)

    def _to_pixels(self, latents: Tensor) -> Tensor:
        if self.compresses:
            latents = torch.einsum("nkhw,kc->nchw", latents, self.basis) + self.mean[:, None, None]
        return pixel_shuffle(latents, self.patch)


def patch_moments(images: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Mean [c] and covariance [c, c], float64, of all patches of images uint8 [N, C, H, W] in [-1, 1]; c = C patch^2.

    The sums are of whole numbers below 2^53, so exact in any order.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for part in images.split(1000):
        rows = pixel_unshuffle(part.double(), patch).movedim(1, -1).flatten(0, -2)
        count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.T @ rows
    mean = total / count
    return mean / 127.5 - 1, (squares / count - torch.outer(mean, mean)) / 127.5**2
