"""A run's starting weights: a published checkpoint brought into its folder by ``fastasync convert --to ours``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastasync.config import Config
from fastasync.model import load_into, load_state
from fastasync.schedule import Schedule
from fastasync.training.build import build_model
from fastasync.training.checkpoint import FOLDER, Loaded, run_state, steps

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


def only_started(out_dir: Path) -> bool:
    """Whether a run has its starting weights and has not trained them yet."""
    return (out_dir / START).is_file() and not steps(out_dir / FOLDER)


def load_start(
    out_dir: Path, config: Config, schedule: Schedule, statistics: str, device: torch.device | str
) -> Loaded:
    """The starting weights as a network to sample from along ``schedule``: step 0 of the run.

    The file does not say which latents it was trained on: ``statistics`` are taken to be theirs.
    Raises UserError when it is damaged or of another architecture.
    """
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    load_starting_weights(model, out_dir)
    info = run_state(0, config, schedule, statistics, [])
    return Loaded(model.to(device).eval().requires_grad_(False), schedule, config, info)
