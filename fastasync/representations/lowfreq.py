"""Low frequencies: a third representation in one file, the worked example for K = 3."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from fastasync.errors import UserError
from fastasync.representations.base import ImageShape, Representation, register
from fastasync.representations.texture import to_float


@register("lowfreq")
class LowFrequency(Representation):
    """The image averaged over size x size areas (default: half the grid), then bilinearly resampled to the grid."""

    def __init__(self, image_shape: ImageShape, grid: int, size: int | None = None):
        super().__init__(image_shape, grid)
        self.channels = image_shape[0]
        self.size = max(grid // 2, 1) if size is None else size
        if not 1 <= self.size <= min(image_shape[1:]):
            raise UserError("lowfreq size", size, f"must be between 1 and the image side {min(image_shape[1:])}")

    def encode(self, images: Tensor) -> Tensor:
        small = adaptive_avg_pool2d(to_float(images), self.size)
        return interpolate(small, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
