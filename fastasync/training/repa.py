"""REPA's features in a training step: where they come from, and what each way costs.

    objective.repa_source   disk for N images                      in each step
    cached                  N x views x tokens x width x 2 bytes   the batch's features are read
    online                  the images                             the batch is decoded, the frozen ViT runs on it
    off (repa_weight 0)     nothing                                nothing

The first two are the same features up to the rounding to float16 that shards hold.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastasync.config import Config
from fastasync.data import Latents
from fastasync.data.shards import FEATURES_DTYPE, INDEX, Encoding, read_index
from fastasync.errors import UserError
from fastasync.images import ImageSource, open_images, open_source, require_checked
from fastasync.representations.vit import FrozenViT, TokenFeatures
from fastasync.training.build import choose_autocast

Call = tuple[Tensor, Tensor | None]  # indices int64 [B] and flips bool [B] or None
FeaturesOf = Callable[[Tensor, Tensor | None], Tensor]

IMAGENET = 1_281_167  # training images, for costs where no data are there yet
_AHEAD = 2  # batches of views that are ready while one is in use; the image loader reads further ahead


class _Views(NamedTuple):
    indices: Tensor
    flips: Tensor | None
    images: Tensor
    event: torch.cuda.Event | None


class OnlineFeatures:
    """The frozen ViT's features of the images that the latents were encoded from: ``latents.features``, made anew.

    Without gradient and in the precision of the step's autocast.  ``shape``: (tokens, width).  Within ``reading`` a
    thread decodes the images of the coming calls, with DALI where encoding would, else with Pillow, and on a GPU on a
    stream of its own; ``waited`` is for how many seconds the calls had to wait for it.  The view is that of the
    latents: the crop, or its mirror image where ``flips`` is true.

    Raises UserError: a field of the configuration is missing or wrong, or the images are not those of the latents.
    """

    def __init__(self, config: Config, latents: Latents):
        fields = config.objective
        self._source, encoding = encoded_images(config, latents)
        self._size = encoding.image_shape[1]
        remedy = f"give the weights file of {fields.repa_vit}, or set objective.repa_source=cached"
        if not fields.repa_vit_weights:
            raise UserError("objective.repa_vit_weights", "(empty)", remedy)
        if not Path(fields.repa_vit_weights).is_file():
            raise UserError("objective.repa_vit_weights", fields.repa_vit_weights, f"no such file: {remedy}")
        precision = "float32" if choose_autocast(config.train.precision, latents.device) is None else "bfloat16"
        grid = config.representations.grid
        with _about("objective.repa_vit"):
            vit = FrozenViT(grid, fields.repa_vit, fields.repa_vit_weights, precision=precision)
        self._tokens = TokenFeatures(vit.to(latents.device))
        self.shape, self.device = self._tokens.shape, latents.device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool: ThreadPoolExecutor | None = None
        self._views: Iterator[_Views] = iter(())
        self._ahead: deque[Future[_Views]] = deque()
        self.waited = 0.0

    @contextmanager
    def reading(self, calls: Callable[[int], Call], start: int, stop: int) -> Iterator[None]:
        """Within it, call n = start .. stop - 1 must be for ``calls(n)`` -> (indices, flips), a pure function."""
        views = self._views = self._decode(calls, start, stop)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="repa")
        try:
            for _ in range(_AHEAD):
                self._submit()
            yield
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._ahead.clear()
            views.close()

    def __call__(self, indices: Tensor, flips: Tensor | None) -> Tensor:
        """float32 [B, tokens, width] on the latents' device.  UserError, naming the file, if one cannot be decoded."""
        if self._pool is None:
            raise RuntimeError("the features are asked for outside of `reading`")
        before = time.perf_counter()
        views = self._ahead.popleft().result()
        self.waited += time.perf_counter() - before
        self._submit()
        if not _equal(views.indices, indices) or not _equal(views.flips, flips):
            raise RuntimeError("the features are asked for in another order than was announced")
        if views.event is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(views.event)
            views.images.record_stream(here)
        return self._tokens(views.images)

    def _submit(self) -> None:
        assert self._pool is not None
        self._ahead.append(self._pool.submit(self._next))

    def _next(self) -> _Views:
        with torch.cuda.stream(self._stream):  # None: no change
            views = next(self._views, None)
        if views is None:
            raise RuntimeError("the features are asked for more often than was announced")
        return views

    def _decode(self, calls: Callable[[int], Call], start: int, stop: int) -> Generator[_Views]:
        """The views of every call, on the device."""
        batches = (calls(number)[0] for number in range(start, stop))
        largest = len(calls(start)[0])
        loader = open_images(self._source, self._size, largest, batches=batches, device=self.device)
        for number, batch in enumerate(loader, start):
            flips = calls(number)[1]
            images = batch.images
            if flips is not None:
                mirrored = flips.to(self.device, non_blocking=True)[:, None, None, None]
                images = torch.where(mirrored, batch.flipped, images)
            event = self._stream.record_event() if self._stream is not None else None
            yield _Views(batch.indices, flips, images, event)


@contextmanager
def _about(field: str) -> Iterator[None]:
    """Put the configuration's field before what another module's UserError says."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error.field}", error.value, error.remedy) from None


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other.cpu())


def encoded_images(config: Config, latents: Latents) -> tuple[ImageSource, Encoding]:
    """The images that the latents were encoded from, in the same order, and the encoding.

    The index's fingerprint of names, sizes in bytes, labels and classes, in their order, must be that of
    ``data.images`` without the files of ``data.skip_bad``.  UserError otherwise.
    """
    data, index = config.data, getattr(latents, "index", None)
    if index is None:
        remedy = "needs a folder of `fastasync encode`: no other says which images its latents are; use cached"
        raise UserError("objective.repa_source", "online", remedy)
    if not data.images:
        raise UserError("data.images", "(empty)", f"objective.repa_source=online: give the images of {data.root}")
    with _about("data.images"):
        source = open_source(data.images)
    with _about("data.skip_bad"):
        source = require_checked(source, data.skip_bad or None, skip_bad=True)
    encoding: Encoding = index.encoding
    if source.fingerprint != encoding.images:
        if len(source) != encoding.count or source.left_out != encoding.left_out:
            counts = f"{len(source):,} images ({source.left_out:,} left out)"
            what = f"{counts}, {data.root} was encoded from {encoding.count:,} ({encoding.left_out:,} left out)"
        else:
            what = f"other names, sizes or classes than those that {data.root} was encoded from"
        remedy = "give the folder or tars that `fastasync encode` had, and its --skip-bad list as data.skip_bad"
        raise UserError("data.images", f"{data.images}: {what}", remedy)
    return source, encoding


def repa_features(config: Config, latents: Latents) -> FeaturesOf | None:
    """What gives REPA's features [B, tokens, width] of (indices, flips), or None when the objective has no REPA.

    UserError unless there are features, and they fit the network.
    """
    weight = config.objective.repa_weight
    if not weight:
        return None
    if not config.model.repa_width:
        raise UserError("model.repa_width", 0, "objective.repa_weight needs a projector: give the features' width")
    features: FeaturesOf | None
    if config.objective.repa_source == "online":
        features = OnlineFeatures(config, latents)
        tokens, width = features.shape
    else:
        features = getattr(latents, "features", None)
        if features is None:
            raise UserError("objective.repa_weight", weight, "these latents hold no features: set it to 0")
        tokens, width = features(torch.zeros(1, dtype=torch.int64), None).shape[1:]
    if width != config.model.repa_width:
        raise UserError("model.repa_width", config.model.repa_width, f"the features' width is {width}: give that")
    if tokens != (made := (config.representations.grid // config.model.patch) ** 2):
        raise UserError("model.patch", config.model.patch, f"makes {made} tokens, the features have {tokens}")
    return features


# --- costs -----------------------------------------------------------------------------------------------------------


def vit_flops(vit: FrozenViT) -> int:
    """FLOPs of one image's features (2 for a multiply-add); the ViT may be on the meta device."""
    side = vit.grid * vit.patch
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit.network.forward_features(torch.zeros(1, 3, side, side, device=vit.mean.device))
    return counter.get_total_flops()


def repa_costs(config: Config, step_flops: int) -> dict[str, Any]:
    """What each source of REPA's features costs, computed: for ``--dry-run``.  Bytes are in GB (1e9).

    ``step_flops``: of a training step.  The images are those of the latents or, before there are any, ImageNet's.
    """
    objective, grid, batch = config.objective, config.representations.grid, config.train.batch
    count, views = IMAGENET, 1 + config.data.flip
    if os.path.exists(os.path.join(config.data.root, INDEX)):
        encoding = read_index(config.data.root).encoding
        count, views = encoding.count, 1 + encoding.flip
    image = grid**2 * config.model.repa_width * FEATURES_DTYPE.itemsize
    cached = {
        f"GB on disk ({count:,} images x {views} views x {grid**2} tokens x {config.model.repa_width} x "
        f"{FEATURES_DTYPE.itemsize} bytes)": count * views * image / 1e9,
        "GB read in a step": batch * image / 1e9,
    }
    with _about("data.images"):
        sizes = open_source(config.data.images).sizes if config.data.images else None
    images = "theirs" if sizes is None else int(sizes.sum()) / 1e9
    online: Any
    try:
        with torch.device("meta"):
            flops = batch * vit_flops(FrozenViT(grid, objective.repa_vit, random_weights=True))
        online = {
            "GB on disk, the images": images,
            f"FLOPs of {objective.repa_vit} in a step": flops,
            "of the training step's": flops / step_flops,
        }
    except UserError as error:  # no timm here, or no such ViT
        online = str(error)
    used = objective.repa_source if objective.repa_weight else "off"
    return {"REPA features": used, "REPA cached (computed)": cached, "REPA online (computed)": online}
