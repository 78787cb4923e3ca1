"""Labelled images, cached latents and the order in which training visits them."""

from fastasync.data.images import ImageSet, check_images, check_labels, load_images
from fastasync.data.latents import Latents, LatentSet
from fastasync.data.order import batch_indices, draw_flips, epoch_order, flips_by_step, training_calls

__all__ = [
    "ImageSet",
    "LatentSet",
    "Latents",
    "batch_indices",
    "check_images",
    "check_labels",
    "draw_flips",
    "epoch_order",
    "flips_by_step",
    "load_images",
    "training_calls",
]
