"""Training: one loop, an engine that executes it, checkpoints that are never lost, and metrics."""

from fastasync.training.build import build_model, build_objective
from fastasync.training.checkpoint import Loaded, RunState, load_model, verify
from fastasync.training.engine import Engine, PlainEngine, build_engine, check_engine
from fastasync.training.interrupt import EXIT_CODE, Interrupted
from fastasync.training.loop import TrainingError, TrainResult, train

__all__ = [
    "EXIT_CODE",
    "Engine",
    "Interrupted",
    "Loaded",
    "PlainEngine",
    "RunState",
    "TrainResult",
    "TrainingError",
    "build_engine",
    "build_model",
    "build_objective",
    "check_engine",
    "load_model",
    "train",
    "verify",
]
