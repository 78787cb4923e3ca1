"""The fast loader: NVIDIA DALI decodes and resizes, on the GPU where there is one.

Order, division over ranks and position are ours: DALI is handed the bytes of each batch.  What it would read by other
rules than Pillow (anything but grey and YCbCr JPEGs) it gets decoded by Pillow, as PPM.  The crop is ADM's up to
rounding: DALI's antialiased cubic filter is Pillow's with unrounded intermediates, its decoder the same libjpeg-turbo
on the CPU and nvJPEG on the GPU (``jpeg_fancy_upsampling`` makes their chroma agree).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastasync.errors import require
from fastasync.images.loader import ImageBatch, ImageLoader, read_ahead
from fastasync.images.sources import ImageSource
from fastasync.images.transforms import BadImage, as_plain

HALVINGS = 3  # a shorter side of up to 16 x the target is halved as ADM does it; beyond, the cubic filter does the rest


def _halve(dali: Any, image: Any, length: Any, axis: int) -> tuple[Any, Any]:
    """Shrink one axis of HWC images from ``length`` to m = length // 2 pixels with Pillow's box filter.

    Its output pixel i is the mean of the input pixels whose centres lie in (i, i + 1] * length / m: of pairs of
    neighbours for the first (m - 1) // 2, of the 2 (length even) or 3 (odd) that follow for the next one, and of pairs
    again for the rest.  Linear interpolation halfway between two pixels is their mean.
    """
    fn, types = dali.fn, dali.types
    half = length // 2
    before = (half - 1) // 2
    after = half - before - 1
    parts = []
    for start, count, output, antialias in (
        (0 * length, 2 * before, before, False),
        (2 * before, length - 2 * (half - 1), 0 * length + 1, True),
        (length - 2 * after, 2 * after, after, False),
    ):
        part = fn.slice(image, start=fn.reshape(start, shape=[1]), shape=fn.reshape(count, shape=[1]), axes=[axis])
        parts.append(
            fn.resize(
                part,
                **{("resize_y", "resize_x")[axis]: fn.cast(output, dtype=types.FLOAT)},
                mode="stretch",
                interp_type=types.INTERP_LINEAR,
                antialias=antialias,
            )
        )
    return fn.cat(*parts, axis=axis), half


def _build(batches: Iterator[list[np.ndarray]], size: int, batch: int, threads: int, device: torch.device) -> Any:
    """A pipeline from lists of encoded files (uint8, kept alive by the caller) to crops uint8 CHW."""
    dali: Any = require("nvidia.dali", "dali")
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"

    def feed() -> list[np.ndarray]:
        return next(batches)

    @dali.pipeline_def(enable_conditionals=True)
    def crops() -> Any:
        encoded = fn.external_source(source=feed, dtype=types.UINT8, ndim=1, batch=True, no_copy=True)
        shape = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)
        height, width = shape[0], shape[1]
        image = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        for _ in range(HALVINGS):
            if dali.math.min(height, width) >= 2 * size:
                image, width = _halve(dali, image, width, axis=1)
                image, height = _halve(dali, image, height, axis=0)
            else:
                height = height + 0  # both branches must assign: a conditional merges what they assign
        # subpixel_scale would scale both axes alike instead of to whole pixels, and soften the result
        image = fn.resize(
            image, resize_shorter=size, interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False
        )
        return fn.crop_mirror_normalize(
            image,
            crop=(size, size),
            rounding="truncate",  # of the crop's position
            dtype=types.UINT8,
            output_layout="CHW",
            mean=[0.0, 0.0, 0.0],
            std=[1.0, 1.0, 1.0],
        )

    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    pipeline = crops(batch_size=batch, num_threads=threads, device_id=index, prefetch_queue_depth=2)
    pipeline.build()
    return pipeline


class DaliLoader(ImageLoader):
    """See ImageLoader; needs the extra ``dali``.  On a CUDA device the images are decoded and stay there."""

    backend = "dali"

    def __init__(
        self,
        source: ImageSource,
        size: int,
        batches: Iterable[Tensor],
        batch: int,
        workers: int | None = None,
        device: str | torch.device = "cpu",
    ):
        require("nvidia.dali", "dali")
        super().__init__(source, size, batches, batch, workers, device)

    def __iter__(self) -> Iterator[ImageBatch]:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        ahead = read_ahead(self.batches, self._files, self.workers)
        pending: deque[tuple[Tensor, list[np.ndarray]]] = deque()  # keeps alive what DALI reads without copying

        def files() -> Iterator[list[np.ndarray]]:
            for batch in ahead:
                pending.append(batch)
                yield batch[1]

        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if on_gpu else None
        try:
            pipeline = _build(files(), self.size, self.batch, self.workers, self.device)
            while True:
                try:
                    (crops,) = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError:
                    self._name_bad_file([index for indices, _ in pending for index in indices.tolist()])
                    raise
                indices, _ = pending.popleft()
                images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8, device=self.device)
                feed_ndarray(crops.as_tensor(), images, cuda_stream=stream)
                yield self._labelled(images, indices)
        finally:
            ahead.close()

    def _files(self, indices: list[int]) -> list[np.ndarray]:
        """Encoded files as DALI gets them, uint8 [bytes] each."""
        files = []
        for index in indices:
            try:
                files.append(np.frombuffer(as_plain(self.source.read(index)), np.uint8))
            except BadImage as error:
                raise self._bad_file(index, str(error)) from None
        return files

    def _name_bad_file(self, indices: list[int]) -> None:
        """After DALI failed on one of these: raise the UserError that names the first file it fails on alone."""
        for index in indices:
            try:
                _build(itertools.repeat(self._files([index])), self.size, 1, 1, self.device).run()
            except RuntimeError:
                raise self._bad_file(index, "DALI cannot decode it") from None
