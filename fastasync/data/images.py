"""A labelled set of images in memory, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastasync.errors import UserError, unknown_name
from fastasync.files import digest_tensors


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, C, H, W] in 0..255 and labels int64 [N] in [0, classes).

    ``mirror`` says that a horizontally flipped image is as good an image of its class (true of photographs, not of
    digits).  ``fingerprint`` is a hash of the pixels, the labels and the classes.  Raises UserError on bad content.
    """

    images: Tensor
    labels: Tensor
    classes: int
    class_names: tuple[str, ...]
    name: str
    mirror: bool = False
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        check_images(self.images, self.name)
        check_labels(self.labels, len(self.images), self.classes, self.name)
        if len(self.class_names) != self.classes:
            raise UserError(
                f"{self.name}: class names", len(self.class_names), f"one for each of {self.classes} classes"
            )
        tensors = {"images": self.images, "labels": self.labels}
        object.__setattr__(self, "fingerprint", digest_tensors(tensors, self.classes))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def check_images(images: Tensor, name: str, image_shape: tuple[int, int, int] | None = None) -> None:
    """UserError unless ``images`` is a non-empty uint8 [N, C, H, W], C 1 or 3 (and of ``image_shape`` (C, H, W))."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f"{name}: images", f"{images.dtype} {list(images.shape)}", "must be uint8 [N, C, H, W]")
    if not len(images):
        raise UserError(f"{name}: images", "none", "the set is empty: check the folder or the split")
    if images.shape[1] not in (1, 3):
        raise UserError(f"{name}: image channels", images.shape[1], "must be 1 (grey) or 3 (RGB)")
    if image_shape is not None and tuple(images.shape[1:]) != tuple(image_shape):
        wanted, found = "x".join(map(str, image_shape)), "x".join(map(str, images.shape[1:]))
        raise UserError(f"{name}: image size", found, f"must be {wanted} (channels x height x width)")


def check_labels(labels: Tensor, count: int, classes: int, name: str) -> None:
    """UserError unless ``labels`` is int64 [count] with every entry in [0, classes)."""
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise UserError(f"{name}: labels", f"{labels.dtype} {list(labels.shape)}", "must be int64 [N]")
    if len(labels) != count:
        raise UserError(f"{name}: labels", f"{len(labels)} labels for {count} images", "must be one for each image")
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise UserError(f"{name}: label of image {first}", int(labels[first]), f"must be in 0..{classes - 1}")


def load_images(name: str, root: str | Path, split: str) -> ImageSet:
    """The ``train`` or ``test`` images of a known set: ``digits`` (embedded) or ``cifar10`` (read from ``root``).

    Raises UserError for an unknown set or split, and for missing or damaged files.
    """
    from fastasync.data.cifar10 import load_cifar10
    from fastasync.data.digits import load_digits

    if split not in ("train", "test"):
        raise unknown_name("split", split, ("train", "test"))
    if name == "digits":
        return load_digits(split)
    if name == "cifar10":
        return load_cifar10(root, split)
    raise unknown_name("dataset", name, ("digits", "cifar10"))
