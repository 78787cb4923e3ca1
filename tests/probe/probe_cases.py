"""Shared by the probe's tests: Gaussian cases with known answers."""

import torch
from fastasync_kernels import reference
from torch import Tensor

from fastasync.config import Config, config_from_dict
from fastasync.data import LatentSet
from fastasync.probe.gaussian import GaussianCase
from fastasync.probe.network import Errors, surface_errors

NAMES = ("texture", "semantic")
ROLES = ("lags", "leads")
PAIR = GaussianCase([[1, 0.9], [0.9, 1]], (1, 1))  # of reference values 2 and 3
TRIPLE = GaussianCase([[1, 0.6, 0.3], [0.6, 1, 0.2], [0.3, 0.2, 1]], (1, 2))  # item 1
TEXTURE_HEAVY = (0.75, 0.25)  # item 2's weights in the bundle's order: texture first
# semantic knows the texture's coarse half: two channels each, unequal variances
WIDE = GaussianCase([[1.2, 0.3, 0.7, 0.0], [0.3, 0.6, 0.0, 0.3], [0.7, 0.0, 0.9, 0.1], [0.0, 0.3, 0.1, 0.5]], (2, 2))
# three representations, one channel each, in the order lags, free, leads
THREE_NAMES, THREE_ROLES = ("texture", "edges", "semantic"), ("lags", "free", "leads")
THREE = GaussianCase([[1, 0.7, 0.6], [0.7, 1, 0.8], [0.6, 0.8, 1]], (1, 1, 1))
THREE_CLOSE = GaussianCase([[1, 0.9, 0.9], [0.9, 1, 0.9], [0.9, 0.9, 1]], (1, 1, 1))


class GaussianLatents:
    """A stream of draws from a Gaussian case behind the interface of a LatentSet."""

    classes = 10

    def __init__(self, case: GaussianCase, count: int, seed: int = 0, grid: int = 1):
        self.z = case.sample(count, torch.Generator().manual_seed(seed), grid)
        self.labels = torch.arange(count) % self.classes

    def __len__(self) -> int:
        return len(self.z)

    def batch(self, indices: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.z[indices], self.labels[indices]

    def as_set(self) -> LatentSet:
        return LatentSet(self.z.float(), self.labels, self.classes)


def sampled_errors(case: GaussianCase, count: int, grid: int = 4, seed: int = 3) -> Errors:
    """What a perfect probe gives B: per-sample errors of the exact velocity at independent times."""
    latents = GaussianLatents(case, 4096, seed, grid)
    return surface_errors(
        case.velocity,
        latents,
        case.channels,
        count,
        seed=seed,
        batch=2048,
        device="cpu",
        ops=reference,
        progress=False,
    )


def tiny_config(**probe: object) -> Config:
    """A configuration whose probe trains in seconds on WIDE's latents (grid 2)."""
    settings = dict(depth=1, width=16, heads=1, batch=64, lr=3e-3, budget=0.5, sampling_steps=4, beta=[0.01, 0.03, 0.1])
    return config_from_dict(
        {
            "representations": dict(channels=[2, 2], grid=2),
            "model": dict(classes=10),
            "objective": dict(density="logit_normal"),
            "sample": dict(batch=256),
            "probe": settings | probe,
        }
    )
