"""The order of the training images: a pure function of (seed, epoch, position), whatever the world size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from fastasync_kernels.reference import philox, philox_uniform
from torch import Tensor

from fastasync.errors import UserError

FLIP_STREAM, ORDER_STREAM = 3, 7  # Philox streams (the others are listed where they are drawn)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    index = torch.arange(count, dtype=torch.int64)
    zero = torch.zeros_like(index)
    # a 63-bit random key for each image; a tie (probability count^2 / 2^64) is broken by the index: the sort is stable
    high, low, _, _ = philox(seed, (index, zero, zero + epoch, zero + ORDER_STREAM))
    return torch.argsort((high << 31) | (low >> 1), stable=True)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The permutation of ``range(count)`` in which epoch ``epoch`` visits the images, int64 [count]."""
    return _epoch_order(seed, epoch, count).clone()


def batch_indices(step: int, batch: int, count: int, seed: int) -> Tensor:
    """Images of global step ``step``, int64 [batch] (CPU).

    Global position p = step * batch + i is image ``epoch_order(seed, p // count, count)[p % count]``: each image
    exactly once per epoch, and a batch may span two epochs.  A rank takes its slice of the result.
    Raises UserError when ``batch`` is not in [1, count].
    """
    if not 1 <= batch <= count:
        raise UserError("batch", batch, f"must be between 1 and the {count} images of the set")
    start = step * batch
    parts = []
    for epoch in range(start // count, (start + batch - 1) // count + 1):
        first, last = max(start - epoch * count, 0), min(start + batch - epoch * count, count)
        parts.append(_epoch_order(seed, epoch, count)[first:last])
    return torch.cat(parts)


def draw_flips(seed: int, step: int | Tensor, samples: Tensor) -> Tensor:
    """Whether each sample is seen mirrored: fair, bool [B], a pure function of (seed, step, sample); stream 3."""
    return philox_uniform(seed, step, samples, 1, stream=FLIP_STREAM)[:, 0] < 0.5


def flips_by_step(seed: int, samples: Tensor, block: int = 64) -> Callable[[int], Tensor]:
    """``step -> draw_flips(seed, step, samples)``, drawn on the CPU for ``block`` steps at once.

    The generator is a hundred small operations, however many numbers it makes: step by step they would take longer
    than a small network's training step.
    """
    drawn: dict[int, Tensor] = {}

    def at(step: int) -> Tensor:
        nonlocal drawn
        if (found := drawn.get(step)) is None:
            steps = step - step % block + torch.arange(block)
            flips = draw_flips(seed, steps.repeat_interleave(len(samples))[:, None], samples.cpu().repeat(block))
            drawn = dict(zip(steps.tolist(), flips.split(len(samples))))  # replaced whole: loaders ask from threads
            found = drawn[step]
        return found

    return at


def training_calls(
    parts: Sequence[Tensor], batch: int, count: int, seed: int, flip: bool
) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """What the n-th ``latents.batch`` call of training asks for, so that a loader can work ahead.

    ``parts``: the batch positions of each call of a step.  Returns n -> (indices, flips or None).
    """

    flips_at = [flips_by_step(seed, positions) for positions in parts]

    def call(n: int) -> tuple[Tensor, Tensor | None]:
        step, part = divmod(n, len(parts))
        flips = flips_at[part](step) if flip else None
        return batch_indices(step, batch, count, seed)[parts[part]], flips

    return call
