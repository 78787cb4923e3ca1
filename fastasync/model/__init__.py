"""The velocity network: the LightningDiT family, its embeddings, its cost, and published weights."""

from fastasync.model.dit import SIZES, LightningDiT, Size
from fastasync.model.embeddings import short_name
from fastasync.model.flops import (
    UNDIVIDED,
    MemoryEstimate,
    Zero,
    activation_memory,
    forward_flops,
    memory_estimate,
    memory_with_zero,
    parameter_count,
    train_flops,
)
from fastasync.model.importer import export_state, load_into, load_state

__all__ = [
    "SIZES",
    "UNDIVIDED",
    "LightningDiT",
    "MemoryEstimate",
    "Size",
    "Zero",
    "activation_memory",
    "export_state",
    "forward_flops",
    "load_into",
    "load_state",
    "memory_estimate",
    "memory_with_zero",
    "parameter_count",
    "short_name",
    "train_flops",
]
