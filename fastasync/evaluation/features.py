"""Frozen feature extractors: uint8 images in, float32 features out, with a name and a fingerprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fastasync.data.images import check_images
from fastasync.errors import UserError
from fastasync.evaluation.frechet import GaussianStatistics, StatisticsAccumulator
from fastasync.files import digest_tensors
from fastasync.representations.texture import to_float


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What an extractor made of a set of images.

    Attributes:
        features: float32 [N, D] on the CPU.
        extractor: the extractor's fingerprint.
        logits: float32 [N, classes] on the CPU, or None.
    """

    features: Tensor
    extractor: str = ""
    logits: Tensor | None = None

    def statistics(self) -> GaussianStatistics:
        """Mean and covariance, computed once; UserError with fewer than two samples or non-finite features."""
        return self._statistics

    @cached_property
    def _statistics(self) -> GaussianStatistics:
        accumulator = StatisticsAccumulator(self.extractor)
        accumulator.update(self.features)
        return accumulator.statistics()


class FeatureExtractor(ABC):
    """A frozen network that turns images into features.  Subclasses implement `extract_batch` for one batch.

    Attributes:
        name: what tables call it, e.g. ``inception-2015-12-05``.
        fingerprint: sha256 of its weights; stored with every figure.
        has_logits: whether `extract` also returns class logits (the inception score needs them).
    """

    name: str
    fingerprint: str
    has_logits: bool = False

    def __init__(self, device: torch.device | str = "cpu", batch_size: int = 256):
        if batch_size < 1:
            raise UserError("batch_size", batch_size, "give a positive number")
        self.device, self.batch_size = torch.device(device), batch_size

    @abstractmethod
    def extract_batch(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, C, H, W] on ``self.device`` -> features [B, D] and logits [B, classes] or None."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, D] on the CPU of images uint8 [N, 3 or 1, H, W]; UserError on any other input."""
        return self.extract(images).features

    @torch.no_grad()
    def extract(self, images: Tensor) -> FeatureSet:
        """Features and, if ``has_logits``, logits of images uint8 [N, 3 or 1, H, W], in one pass over batches.

        On a GPU, TF32 is off and algorithms are deterministic: a figure must not depend on either.
        """
        check_images(images, self.name)
        features, logits = [], []
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for batch in images.split(self.batch_size):
                feature, logit = self.extract_batch(batch.to(self.device))
                features.append(feature.float().cpu())
                if self.has_logits and logit is not None:
                    logits.append(logit.float().cpu())
        return FeatureSet(torch.cat(features), self.fingerprint, torch.cat(logits) if logits else None)


class ClassifierFeatures(FeatureExtractor):
    """Penultimate features of a classifier: ``module.features(x)`` and, when ``has_logits``, ``module.head(features)``.

    Args:
        module: a frozen classifier with ``features(x float32 [B, C, H, W] in [-1, 1]) -> [B, D]``; it is put in eval
            mode, its gradients stay untouched.
        name: name in tables, e.g. ``cifar10-classifier-seed1``.
        has_logits: whether ``module.head`` maps features to class logits.

    Raises:
        UserError: the module has no ``features``.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        device: torch.device | str = "cpu",
        batch_size: int = 512,
        has_logits: bool = False,
    ):
        super().__init__(device, batch_size)
        for method in ("features", "head") if has_logits else ("features",):
            if not callable(getattr(module, method, None)):
                raise UserError("extractor", type(module).__name__, f"the classifier needs a method {method}(x)")
        self.module, self.name, self.has_logits = module.eval().to(self.device), name, has_logits
        self.fingerprint = digest_tensors(module.state_dict(), type(module).__qualname__)

    def extract_batch(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, C, H, W] -> features [B, D] and logits or None."""
        features = self.module.features(to_float(images))  # type: ignore[operator]
        if features.ndim != 2:
            raise UserError(f"features of {self.name}", tuple(features.shape), "features(x) must return [B, D]")
        return features, self.module.head(features) if self.has_logits else None  # type: ignore[operator]
