"""The CPU-sized set: scikit-learn's 1,797 handwritten digits, 8x8 grey."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from fastasync.data.images import ImageSet
from fastasync.data.order import epoch_order

TRAIN_COUNT = 1500


def _file() -> Path:
    """scikit-learn's table of them, found without importing scikit-learn, which takes longer than all the rest."""
    found = importlib.util.find_spec("sklearn")
    assert found is not None, "scikit-learn is one of this package's requirements"
    assert found.origin is not None
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"


def load_digits(split: str) -> ImageSet:
    """1,500 ``train`` or 297 ``test`` images, uint8 [N, 1, 8, 8]: the first and the rest of one fixed permutation."""
    table = np.loadtxt(_file(), delimiter=",")  # 64 pixels and the label
    # grey levels 0..16 of the source, spread over 0..255
    images = torch.from_numpy(np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    order = epoch_order(seed=0, epoch=0, count=len(images))
    chosen = order[:TRAIN_COUNT] if split == "train" else order[TRAIN_COUNT:]
    return ImageSet(images[chosen], labels[chosen], 10, tuple("0123456789"), name="digits")
