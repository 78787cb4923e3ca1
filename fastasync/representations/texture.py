"""Texture: the pixels themselves, one patch per token."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fastasync.errors import UserError
from fastasync.representations.base import ImageShape, Representation, register


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float32 in [-1, 1] -> uint8: clamp(127.5 x + 128, 0, 255), rounded down; the exact inverse of ``to_float``."""
    return (127.5 * x + 128).clamp(0, 255).byte()


@register("texture")
class Texture(Representation):
    """Patches of p x p pixels in [-1, 1], channels ordered (colour, row, column); p = image side / grid."""

    def __init__(self, image_shape: ImageShape, grid: int):
        super().__init__(image_shape, grid)
        colours, height, width = image_shape
        if height != width or height % grid:
            raise UserError("grid", grid, f"must divide the image side ({height}x{width} images, square only)")
        self.patch = height // grid
        self.channels = colours * self.patch**2

    def encode(self, images: Tensor) -> Tensor:
        return pixel_unshuffle(to_float(images), self.patch)

    def decode(self, latents: Tensor) -> Tensor:
        return to_uint8(pixel_shuffle(latents, self.patch))
