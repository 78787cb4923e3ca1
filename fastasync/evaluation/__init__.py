"""Figures of merit: feature extractors, distances between image sets, and the protocol stored with each figure."""

from fastasync.evaluation.features import ClassifierFeatures, FeatureExtractor, FeatureSet
from fastasync.evaluation.fidelity import METRICS, evaluate, inception_score, kernel_distance, precision_recall
from fastasync.evaluation.frechet import GaussianStatistics, StatisticsAccumulator, frechet_distance
from fastasync.evaluation.inception import InceptionFeatures
from fastasync.evaluation.npz import load_npz, save_npz
from fastasync.evaluation.protocol import Figure, Protocol, figures_from, hardware_name, load_figures, save_figures

__all__ = [
    "METRICS",
    "ClassifierFeatures",
    "FeatureExtractor",
    "FeatureSet",
    "Figure",
    "GaussianStatistics",
    "InceptionFeatures",
    "Protocol",
    "StatisticsAccumulator",
    "evaluate",
    "figures_from",
    "frechet_distance",
    "hardware_name",
    "inception_score",
    "kernel_distance",
    "load_figures",
    "load_npz",
    "precision_recall",
    "save_figures",
    "save_npz",
]
