"""Gaussian statistics of features, accumulated in fp64, and the Frechet distance between two of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastasync.errors import UserError
from fastasync.evaluation.npz import load_arrays, save_arrays


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of a feature set.

    Attributes:
        mean: float64 [D] on the CPU.
        cov: float64 [D, D] on the CPU, symmetric, with the unbiased 1/(N-1).
        count: number of samples N, or None when a file does not say.
        extractor: fingerprint of the feature extractor, or empty when a file does not say.

    Raises:
        UserError: shapes that do not match, NaN or Inf, or fewer than two samples.
    """

    mean: Tensor
    cov: Tensor
    count: int | None = None
    extractor: str = ""

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.cov.shape != (len(self.mean), len(self.mean)):
            raise UserError(
                "feature statistics", f"{tuple(self.mean.shape)}, {tuple(self.cov.shape)}", "need mean [D], cov [D, D]"
            )
        if self.count is not None and self.count < 2:
            raise UserError("feature statistics", f"{self.count} samples", "a covariance needs at least two")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.cov).all()):
            raise UserError("feature statistics", "NaN or Inf", "look for non-finite samples or features")

    @cached_property
    def half(self) -> Tensor:
        """A [r, D] with A^T A = cov, r its numerical rank; computed once: a reference serves many comparisons."""
        return _half(self.cov)

    def save(self, path: Path | str) -> None:
        """Write an npz with ``mu``, ``sigma`` (the FID community's names), ``count`` and ``extractor``, atomically."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.cov.numpy(), "extractor": np.asarray(self.extractor)}
        if self.count is not None:
            arrays["count"] = np.asarray(self.count)
        save_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path | str) -> GaussianStatistics:
        """Read an npz with ``mu`` and ``sigma``, ours or the FID community's.

        Raises:
            UserError: missing, truncated, or without these arrays.
        """
        arrays = load_arrays(path, ("mu", "sigma"), "give an npz with mu [D] and sigma [D, D]")
        try:
            mean, cov = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
            count = int(arrays["count"]) if "count" in arrays else None
        except (ValueError, TypeError) as error:
            raise UserError(str(path), f"not numbers ({error})", "give an npz with mu [D] and sigma [D, D]") from None
        return cls(mean, cov, count, str(arrays.get("extractor", "")))


class StatisticsAccumulator:
    """Streaming mean and covariance in fp64: any split of the samples into updates gives the same result.

    Holds count, mean and the scatter matrix M = sum (x - mean)(x - mean)^T, and joins batches by the update of Chan,
    Golub and LeVeque (1979), which does not cancel when the mean is large.

    Args:
        extractor: fingerprint of the feature extractor, passed on to the statistics.
    """

    def __init__(self, extractor: str = "") -> None:
        self.extractor, self.count = extractor, 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add features [N, D], any float dtype, any device; N = 0 is allowed.

        Raises:
            UserError: not [N, D], another D than before, NaN or Inf.
        """
        if features.ndim != 2 or (self._mean is not None and features.shape[1] != len(self._mean)):
            width = "D" if self._mean is None else len(self._mean)
            raise UserError("features", tuple(features.shape), f"expected [N, {width}]")
        if len(features) == 0:
            return
        x = features.detach().double()
        if not torch.isfinite(x).all():
            rows = int((~torch.isfinite(x)).any(dim=1).sum())
            raise UserError("features", f"NaN or Inf in {rows} of {len(x)} rows", "look for non-finite samples")
        mean = x.mean(dim=0)
        centred = x - mean
        self._join(len(x), mean.cpu(), (centred.T @ centred).cpu())

    def merge(self, other: StatisticsAccumulator) -> None:
        """Add everything that another accumulator has seen (another process's share, say)."""
        if other._mean is None or other._scatter is None:
            return
        if self._mean is not None and len(self._mean) != len(other._mean):
            raise UserError("features", len(other._mean), f"expected {len(self._mean)} of them, as before")
        self._join(other.count, other._mean, other._scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    def statistics(self) -> GaussianStatistics:
        """Mean and unbiased covariance of all samples so far; UserError with fewer than two."""
        if self.count < 2 or self._mean is None or self._scatter is None:
            raise UserError("feature statistics", f"{self.count} samples", "a covariance needs at least two")
        return GaussianStatistics(self._mean.clone(), self._scatter / (self.count - 1), self.count, self.extractor)


def _solver(matrix: Tensor) -> Tensor:
    """The matrix on a GPU where there is one and it is large: 2,048 features take 0.3 s there and seconds on a CPU."""
    return matrix.cuda() if min(matrix.shape) >= 512 and torch.cuda.is_available() else matrix


def _half(cov: Tensor) -> Tensor:
    """A [r, D] with A^T A = cov and r its numerical rank: the eigenvectors scaled by the root of their eigenvalues."""
    values, vectors = (part.cpu() for part in torch.linalg.eigh(_solver((cov + cov.T) / 2)))
    largest = float(values[-1]) if len(values) else 0.0
    # Below the rounding of eigh an eigenvalue is zero; its root (1e-8) would not be negligible any more.
    keep = values > max(largest, 0.0) * len(values) * torch.finfo(values.dtype).eps
    return (vectors[:, keep] * values[keep].sqrt()).T


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau, 1982):

        |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2

    The last trace is the sum of the roots of the eigenvalues of a symmetric product.  They are computed as the singular
    values of H_a H_b^T with H^T H = S, which are the same numbers without first squaring and then rooting the rounding
    errors.  No square root of an asymmetric matrix is taken, so singular covariances are fine.

    Raises:
        UserError: different numbers of features, or features of different extractors.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError("frechet distance", f"{len(a.mean)} and {len(b.mean)} features", "use one feature extractor")
    if a.extractor and b.extractor and a.extractor != b.extractor:
        names = f"extractors {a.extractor[:12]} and {b.extractor[:12]}"
        raise UserError("frechet distance", names, "extract both sets with the same one")
    half_a, half_b = a.half, b.half
    empty = not (len(half_a) and len(half_b))
    overlap = 0.0 if empty else float(torch.linalg.svdvals(_solver(half_a @ half_b.T)).sum())
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * overlap
    return max(float(distance), 0.0)


def frechet_influence(features: Tensor, reference: GaussianStatistics) -> Tensor:
    """What each sample contributes to the Frechet distance of its set: features [N, D] -> float64 [N], mean about 0.

    The distance's first-order change when a little weight is moved to the sample (its influence function).  With T the
    optimal transport map from the features' Gaussian to the reference's,

        2 (m - m_r) . (x - m) + (x - m)^T (I - T) (x - m) - tr((I - T) S)

    ``std / sqrt(N)`` is the distance's standard error, and that of the difference of two sets' values sample by sample
    is the standard error of the difference of their distances (common random numbers included).
    """
    x = features.detach().double().cpu()
    mean = x.mean(0)
    centred = x - mean
    cov = centred.T @ centred / (len(x) - 1)
    half = reference.half
    values, vectors = (part.cpu() for part in torch.linalg.eigh(_solver(half @ cov @ half.T)))
    keep = values > max(float(values[-1]), 0.0) * len(values) * torch.finfo(values.dtype).eps
    root = (vectors[:, keep] * values[keep].pow(-0.25)).T @ half  # root^T root = T
    spread = centred.square().sum(1) - (centred @ root.T).square().sum(1)
    return 2 * centred @ (mean - reference.mean) + spread - spread.mean()
