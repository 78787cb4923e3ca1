"""Sampling: integrators along a schedule, guidance, and reproducible generation."""

from fastasync.sampling.generate import batches, generate_images, generate_latents, sample_labels
from fastasync.sampling.guidance import guided
from fastasync.sampling.integrators import METHODS, Velocity, evaluations, integrate, time_grid, uniform_grid

__all__ = [
    "METHODS",
    "Velocity",
    "batches",
    "evaluations",
    "generate_images",
    "generate_latents",
    "guided",
    "integrate",
    "sample_labels",
    "time_grid",
    "uniform_grid",
]
