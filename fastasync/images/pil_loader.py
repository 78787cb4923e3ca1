"""The plain loader: Pillow on threads (it decodes and resizes without Python's lock), ADM's crop exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastasync.images.loader import ImageBatch, ImageLoader, read_ahead
from fastasync.images.transforms import BadImage, centre_crop, decode


class PilLoader(ImageLoader):
    """See ImageLoader.  The pixels are ``centre_crop(decode(bytes), size)``, on every machine the same."""

    backend = "pil"

    def __iter__(self) -> Iterator[ImageBatch]:
        for indices, crops in read_ahead(self.batches, self._crops, self.workers):
            images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
            yield self._labelled(images.to(self.device), indices)

    def _crops(self, indices: list[int]) -> list[np.ndarray]:
        """Crops uint8 [S, S, 3]."""
        crops = []
        for index in indices:
            try:
                crops.append(centre_crop(decode(self.source.read(index)), self.size))
            except BadImage as error:
                raise self._bad_file(index, str(error)) from None
        return crops
