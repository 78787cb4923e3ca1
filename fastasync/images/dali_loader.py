"""The fast loader: NVIDIA DALI decodes and resizes, on the GPU where there is one.

Order, division over ranks and position are ours: DALI is handed the bytes of each batch and what to cut out of each
image.  What it would read by other rules than Pillow (anything but grey and YCbCr JPEGs) it gets decoded by Pillow, as
PPM.  The crop is ADM's up to rounding: DALI's antialiased cubic filter is Pillow's with unrounded intermediates, its
decoder the same libjpeg-turbo on the CPU and nvJPEG on the GPU.

nvJPEG has two ways to bring subsampled chroma to full size: repeating it, and interpolating it as libjpeg-turbo does,
which is as fast and nearer to Pillow (bench/NOTES.md).

A compiled reader reads a batch of files in one call, and looks at the headers of JPEGs (fastasync/images/read.py): what
Python does under its lock takes time from the thread that feeds DALI.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastasync.errors import require
from fastasync.images.loader import ImageBatch, ImageLoader, read_ahead
from fastasync.images.read import Files
from fastasync.images.sources import ImageSource
from fastasync.images.transforms import BadImage, as_plain

GPU_THREADS = 16  # of DALI beside a GPU, at most: 64 were slower (bench/NOTES.md)
READERS = 2  # batches that are read at a time
READING_THREADS = 16  # of the compiled reader for each, at most
HALVINGS = 3  # a shorter side of up to 16 x the target is halved as ADM does it; beyond, the cubic filter does the rest


class Form(NamedTuple):
    """How the pipeline is made; bench/experiments/dali_variants.py times the alternatives on a GPU.

    ``fancy``: interpolate chroma.  ``hw_load``: share of the images that the GPU's JPEG engines get.  ``depth``:
    batches in the pipeline at a time.  ``hint``: side of the largest image that the engines' buffers are made for at
    the start (0: they grow).  ``halving``: whether images twice too large are halved first, as ADM does it.
    """

    fancy: bool = True
    hw_load: float = 0.9
    depth: int = 2
    hint: int = 0
    halving: bool = True


class Feed(NamedTuple):
    """What one call of a pipeline reads, all kept alive until it has: files, and the geometry of their crops.

    ``halvings`` int32 [b, 1]; ``sizes`` int32 [b, 2] (height, width) of the encoded images; ``start`` and ``stop``
    float32 [b, 2]: the corners (y, x) of the crop, in pixels of the image after its halvings.
    """

    files: list[np.ndarray]
    halvings: np.ndarray
    sizes: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def feed_of(files: Files, size: int, most: int = HALVINGS) -> Feed:
    """ADM's geometry (``centre_crop``) with at most ``most`` halvings; the sums are those that it computes."""
    sizes = files.sizes[:, ::-1].copy()  # (height, width)
    halvings, halved = np.zeros((len(sizes), 1), np.int32), sizes.copy()
    for _ in range(most):
        large = halved.min(1) >= 2 * size
        halvings += large[:, None]
        halved[large] //= 2
    scale = size / halved.min(1, keepdims=True)
    full = np.round(halved * scale)  # to even, as Python's round
    first = (full - size) // 2
    start, stop = (edge * halved / full for edge in (first, first + size))
    return Feed(files.data, halvings, sizes, start.astype(np.float32), stop.astype(np.float32))


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


def _halve_both(dali: Any, image: Any, height: Any, width: Any) -> tuple[Any, Any, Any]:
    image, width = _halve(dali, image, width, axis=1)
    image, height = _halve(dali, image, height, axis=0)
    return image, height, width


def build(feeds: Iterator[Feed], size: int, batch: int, threads: int, device: torch.device, form: Form) -> Any:
    """A pipeline from feeds to crops uint8 [b, S, S, 3], S = ``size``."""
    dali: Any = require("nvidia.dali", "dali")
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    kinds = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT]
    engines = {"hw_decoder_load": form.hw_load, "jpeg_fancy_upsampling": form.fancy}
    if form.hint:
        engines |= {"preallocate_width_hint": form.hint, "preallocate_height_hint": form.hint}

    @dali.pipeline_def(enable_conditionals=True)
    def crops() -> Any:
        encoded, halvings, sizes, start, stop = fn.external_source(
            source=feeds, num_outputs=5, dtype=kinds, ndim=1, batch=True, no_copy=True
        )
        image = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            **(engines if on_gpu else {}),
        )
        times = halvings[0] if form.halving else 0
        if times > 0:  # most images pass all of this by at one branch
            image, height, width = _halve_both(dali, image, sizes[0], sizes[1])
            if times > 1:
                image, height, width = _halve_both(dali, image, height, width)
                if times > 2:
                    image, height, width = _halve_both(dali, image, height, width)
        return fn.resize(
            image,
            size=[size, size],
            roi_start=start,
            roi_end=stop,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            subpixel_scale=False,
        )

    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    pipeline = crops(batch_size=batch, num_threads=threads, device_id=index, prefetch_queue_depth=form.depth)
    pipeline.build()
    return pipeline


class DaliLoader(ImageLoader):
    """See ImageLoader; needs the extra ``dali``.  On a CUDA device the images are decoded and stay there.

    ``form``: how DALI is used.
    """

    backend = "dali"

    def __init__(
        self,
        source: ImageSource,
        size: int,
        batches: Iterable[Tensor],
        batch: int,
        workers: int | None = None,
        device: str | torch.device = "cpu",
        form: Form = Form(),  # noqa: B008 (immutable)
    ):
        require("nvidia.dali", "dali")
        super().__init__(source, size, batches, batch, workers, device)
        self.form = form

    def __iter__(self) -> Iterator[ImageBatch]:
        batches = iter(self.batches)
        first = next(batches, None)
        if first is None:
            return
        ahead = read_ahead(itertools.chain([first], batches), lambda indices: [self._files(indices)], READERS, 1)
        pending: deque[tuple[Tensor, Feed]] = deque()  # keeps alive what DALI reads without copying

        def feeds() -> Iterator[Feed]:
            for indices, (files,) in ahead:
                pending.append((indices, feed_of(files, self.size, HALVINGS if self.form.halving else 0)))
                yield pending[-1][1]

        take = _Taker(self.device)
        try:
            threads = min(self.workers, GPU_THREADS) if self.device.type == "cuda" else self.workers
            pipeline = build(feeds(), self.size, self.batch, threads, self.device, self.form)
            while True:
                try:
                    (crops,) = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError:
                    self._name_bad_file([index for indices, _ in pending for index in indices.tolist()])
                    raise
                indices, _ = pending.popleft()
                yield self._labelled(take(crops), indices)
        finally:
            ahead.close()

    def _files(self, indices: list[int]) -> Files:
        files = self.source.read_many(indices, min(self.workers, READING_THREADS))
        for number in np.flatnonzero(files.sizes[:, 0] == 0).tolist():  # others than plain JPEGs
            try:
                data, *files.sizes[number] = as_plain(files.data[number].data)
            except BadImage as error:
                raise self._bad_file(indices[number], str(error)) from None
            files.data[number] = np.frombuffer(data, np.uint8)
        return files

    def _name_bad_file(self, indices: list[int]) -> None:
        """After DALI failed on one of these: raise the UserError that names the first file it fails on alone."""
        for index in indices:
            feed = feed_of(self._files([index]), self.size)
            try:
                build(itertools.repeat(feed), self.size, 1, 1, self.device, self.form).run()
            except RuntimeError:
                raise self._bad_file(index, "DALI cannot decode it") from None


class _Taker:
    """A pipeline's crops [b, S, S, 3] -> a tensor of our own, uint8 [b, 3, S, S]; the copy turns the axes.

    On a GPU it is made on a stream of its own, which waits for nothing but DALI: what the caller has queued goes on.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def __call__(self, crops: Any) -> Tensor:
        with torch.cuda.stream(self.stream):  # None: no change
            view = torch.from_dlpack(crops.as_tensor()).permute(0, 3, 1, 2)
            images = view.clone(memory_format=torch.contiguous_format)
        if self.stream is not None:
            self.stream.synchronize()  # DALI may have its memory back
            images.record_stream(torch.cuda.current_stream(images.device))
        return images
