"""A run's starting weights: a published checkpoint brought into its folder by ``fastasync convert --to ours``."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastasync.model import load_into, load_state

START = "start.safetensors"


def load_starting_weights(model: nn.Module, out_dir: Path) -> Path | None:
    """Copy ``start.safetensors`` of a run's folder into a new network; the file, or None where there is none.

    Raises UserError when it is damaged or of another architecture.
    """
    path = out_dir / START
    if not path.is_file():
        return None
    load_into(model, load_state(path), source=str(path))
    return path
