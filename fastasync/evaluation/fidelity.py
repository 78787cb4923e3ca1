"""FID, KID, precision and recall, and IS of a set of samples; the last two are computed by torch-fidelity."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastasync.compat import import_torch_fidelity
from fastasync.errors import UserError, unknown_name
from fastasync.evaluation.features import FeatureExtractor, FeatureSet
from fastasync.evaluation.frechet import GaussianStatistics, frechet_distance

METRICS = ("fid", "kid", "precision_recall", "is")


def _torch_fidelity(module: str) -> ModuleType:
    import_torch_fidelity()
    return importlib.import_module(f"torch_fidelity.{module}")


def _same_width(samples: Tensor, reference: Tensor) -> None:
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise UserError("features", f"{tuple(samples.shape)}, {tuple(reference.shape)}", "need [N, D] and [M, D]")


def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Kernel distance (KID; Binkowski et al., 2018): unbiased squared MMD with the kernel (x.y / D + 1)^3.

    In float64 (float32 kernels of 2,048 features lose the digits that the difference keeps), on the same subsets and
    with the same figures as torch-fidelity's, which knows the CPU only: 1.2 TFLOP for the usual sizes.

    Args:
        samples: features [N, D].
        reference: features [M, D].
        subsets: number of random subsets that are averaged.
        subset_size: samples in each of them, at most min(N, M).
        seed: of the choice of subsets.
        device: where to compute.

    Returns:
        Mean and standard deviation over the subsets.  The mean may be slightly negative: the estimator is unbiased.

    Raises:
        UserError: too few samples for a subset, or different numbers of features.
    """
    _same_width(samples, reference)
    if not 2 <= subset_size <= min(len(samples), len(reference)):
        raise UserError(
            "kid subset_size", subset_size, f"choose 2 to {min(len(samples), len(reference))}, the size of the sets"
        )
    draw = np.random.RandomState(seed)

    def subset(features: Tensor) -> Tensor:
        chosen = draw.choice(len(features), subset_size, replace=False)
        return features[torch.from_numpy(chosen).to(features.device)].to(device, torch.float64)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (subset_size * (subset_size - 1))

    distances = []
    for _ in range(subsets):
        x, y = subset(samples), subset(reference)
        distances.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    found = torch.stack(distances)
    return float(found.mean()), float(found.std(correction=0))


def precision_recall(samples: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall on k-nearest-neighbour manifolds (Kynkaanniemi et al., 2019).

    Args:
        samples: features [N, D].
        reference: features [M, D].
        neighbours: k; the ball of a point reaches to its k-th neighbour.

    Returns:
        Share of samples inside the reference's manifold, and share of the reference inside the samples' manifold.

    Raises:
        UserError: not more than k samples in a set, or different numbers of features.
    """
    _same_width(samples, reference)
    if not 1 <= neighbours < min(len(samples), len(reference)):
        raise UserError(
            "precision_recall neighbours", neighbours, f"choose 1 to {min(len(samples), len(reference)) - 1}"
        )
    result = _torch_fidelity("metric_prc").prc_features_to_metric(
        samples.double(),
        reference.double(),
        prc_neighborhood=neighbours,
        prc_batch_size=1000,  # distances of 1,000 x M at a time: 0.4 GB for M = 50,000
        save_cpu_ram=True,
        verbose=False,
    )
    return result["precision"], result["recall"]


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception score (Salimans et al., 2016) of logits [N, classes]: mean and standard deviation over ``splits``.

    Raises:
        UserError: fewer samples than splits, or NaN logits (a weights file without the classification layer).
    """
    if not 1 <= splits <= len(logits):
        raise UserError("is splits", splits, f"choose 1 to {len(logits)}, the number of samples")
    if not logits.isfinite().all():
        raise UserError("is", "NaN or Inf logits", "use an extractor with a classification layer")
    result = _torch_fidelity("metric_isc").isc_features_to_metric(logits, splits, True, seed)
    return result["inception_score_mean"], result["inception_score_std"]


def evaluate(
    samples: Tensor | FeatureSet,
    reference: Tensor | FeatureSet | GaussianStatistics,
    extractor: FeatureExtractor,
    metrics: Iterable[str] = ("fid",),
    *,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    neighbours: int = 3,
    is_splits: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of merit of samples against a reference set.

    Args:
        samples: uint8 [N, C, H, W], or what ``extractor.extract`` returned for them.
        reference: the same for the reference set (extract it once, use it often), or its Gaussian statistics, which
            serve for FID only.
        extractor: turns images into features; the fingerprints of precomputed ones must match its own.
        metrics: any of `METRICS`.
        kid_subsets: subsets of the kernel distance.
        kid_subset_size: samples in each; smaller sets shrink it, which is noted.
        neighbours: k of precision and recall.
        is_splits: splits of the inception score.
        seed: of subsets and splits.

    Returns:
        The figures asked for, ``fid``, ``kid`` and ``kid_std``, ``precision`` and ``recall``, ``is`` and ``is_std``;
        ``samples`` and ``reference`` (counts; None where statistics do not say); ``extractor`` and ``fingerprint``;
        ``settings`` (metric -> the settings that change it); ``notes`` (what was left out or adapted, and why).

    Raises:
        UserError: an unknown metric, statistics of another extractor, or too few samples.
    """
    metrics = tuple(metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_name("metrics", metric, METRICS)
    found = samples if isinstance(samples, FeatureSet) else extractor.extract(samples)
    known = extractor.extract(reference) if isinstance(reference, Tensor) else reference
    for field, precomputed in (("samples", found.extractor), ("reference", known.extractor)):
        if precomputed and precomputed != extractor.fingerprint:
            raise UserError(
                f"features of the {field}",
                f"extractor {precomputed[:12]}",
                f"made by another extractor than {extractor.name} {extractor.fingerprint[:12]}: extract them again",
            )
    known_features = known.features if isinstance(known, FeatureSet) else None
    notes: list[str] = []
    settings: dict[str, str] = {}
    result: dict[str, Any] = {
        "samples": len(found.features),
        "reference": len(known.features) if isinstance(known, FeatureSet) else known.count,
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
        "settings": settings,
        "notes": notes,
    }
    if "fid" in metrics:
        statistics = known.statistics() if isinstance(known, FeatureSet) else known
        there = replace(found, features=found.features.to(extractor.device))  # a covariance is a large product
        result["fid"] = frechet_distance(there.statistics(), statistics)
        settings["fid"] = ""
        width = found.features.shape[1]
        for field in ("samples", "reference"):
            if result[field] is not None and result[field] <= width:
                notes.append(f"fid: {result[field]} {field} for {width} features, the covariance is singular")
    for metric in ("kid", "precision_recall"):
        if metric in metrics and known_features is None:
            notes.append(f"{metric} omitted: the reference is given by its mean and covariance only")
    if "kid" in metrics and known_features is not None:
        size = min(kid_subset_size, len(found.features), len(known_features))
        if size < kid_subset_size:
            notes.append(f"kid: subsets of {size} instead of {kid_subset_size}, the size of the smaller set")
        result["kid"], result["kid_std"] = kernel_distance(
            found.features, known_features, kid_subsets, size, seed, extractor.device
        )
        settings["kid"] = f"{kid_subsets} subsets of {size}, seed {seed}"
    if "precision_recall" in metrics and known_features is not None:
        result["precision"], result["recall"] = precision_recall(found.features, known_features, neighbours)
        settings["precision"] = settings["recall"] = f"{neighbours} neighbours"
    if "is" in metrics:
        if found.logits is None:
            notes.append(f"is omitted: {extractor.name} has no classification layer")
        else:
            result["is"], result["is_std"] = inception_score(found.logits, is_splits, seed)
            settings["is"] = f"{is_splits} splits, seed {seed}"
    return result
