"""Representations of images on a token grid, their registry, and the bundle that joins them."""

from fastasync.representations import autoencoder, lowfreq, semantic, texture, vit  # noqa: F401  (registers the built-in ones)
from fastasync.representations.base import Representation, build, load_plugin, register, registered
from fastasync.representations.bundle import Bundle, with_statistics
from fastasync.representations.classifier import Classifier, ClassifierSettings, image_features, train_classifier
from fastasync.representations.prepare import Prepared, Recipe, load_prepared, make_recipe, prepare
from fastasync.representations.statistics import LatentStatistics, check_same_statistics
from fastasync.representations.texture import to_float, to_uint8

__all__ = [
    "Bundle",
    "Classifier",
    "ClassifierSettings",
    "LatentStatistics",
    "Prepared",
    "Recipe",
    "Representation",
    "build",
    "check_same_statistics",
    "image_features",
    "load_plugin",
    "load_prepared",
    "make_recipe",
    "prepare",
    "register",
    "registered",
    "to_float",
    "to_uint8",
    "train_classifier",
    "with_statistics",
]
