"""The CPU-sized set: scikit-learn's 1,797 handwritten digits, 8x8 grey."""

from __future__ import annotations

import numpy as np
import torch

from fastasync.data.images import ImageSet
from fastasync.data.order import epoch_order

TRAIN_COUNT = 1500


def load_digits(split: str) -> ImageSet:
    """1,500 ``train`` or 297 ``test`` images, uint8 [N, 1, 8, 8]: the first and the rest of one fixed permutation."""
    from sklearn import datasets

    digits = datasets.load_digits()
    # grey levels 0..16 of the source, spread over 0..255
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = epoch_order(seed=0, epoch=0, count=len(images))
    chosen = order[:TRAIN_COUNT] if split == "train" else order[TRAIN_COUNT:]
    return ImageSet(images[chosen], labels[chosen], 10, tuple("0123456789"), name="digits")
