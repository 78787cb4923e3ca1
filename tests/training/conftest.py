"""A run so small that a step takes milliseconds, and ways to disturb it."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastasync.config import Config, config_from_dict
from fastasync.data import LatentSet
from fastasync.schedule import Schedule, named_schedule
from fastasync.training import TrainResult, train

ROOT = Path(__file__).parents[2]
FINGERPRINT = "statistics-1"


def tiny(**sections: dict[str, Any]) -> Config:
    """Two representations of 2 channels on a 2x2 grid, one block of width 16; ``sections`` change fields."""
    base = config_from_dict(
        {
            "representations": dict(channels=[2, 2], grid=2),
            "model": dict(depth=1, width=16, heads=2, classes=3),
            "train": dict(steps=6, batch=8, checkpoint_every=4, log_every=2, warmup=3, ema=0.9, clip=1.0, device="cpu"),
        }
    )
    return config_from_dict(sections, base)


def gaussian_latents(count: int = 32, seed: int = 0, mirror: bool = False) -> LatentSet:
    """Standard normal latents [count, 4, 2, 2] with labels 0..2."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 4, 2, 2, generator=generator)
    return LatentSet(z, torch.randint(3, (count,), generator=generator), 3, z.flip(-1) if mirror else None)


class Disturbed:
    """Latents that call ``event(step)`` before each batch; what it returns, if anything, multiplies the latents."""

    def __init__(self, latents: LatentSet, event: Callable[[int], float | None], first: int = 0):
        self.latents, self.event, self.step = latents, event, first
        self.classes, self.device = latents.classes, latents.device

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: torch.Tensor, flips: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        factor = None
        if len(indices) > 1:  # not the look at the first sample, before training
            factor = self.event(self.step)
            self.step += 1
        z, y = self.latents.batch(indices, flips)
        return (z if factor is None else z * factor), y


def schedule_of(config: Config, name: str = "offset:0.3") -> Schedule:
    return named_schedule(name, config.representations.names, config.representations.roles)


def run(config: Config, out: Path, latents: Any = None, **options: Any) -> TrainResult:
    """``train`` with this folder's defaults."""
    options = {"statistics_fingerprint": FINGERPRINT, "progress": False, "schedule": schedule_of(config)} | options
    return train(config, latents or gaussian_latents(), options.pop("schedule"), out, **options)


@pytest.fixture(name="tiny")
def tiny_fixture() -> Callable[..., Config]:
    return tiny


@pytest.fixture(name="run")
def run_fixture() -> Callable[..., TrainResult]:
    return run


@pytest.fixture(name="latents")
def latents_fixture() -> Callable[..., LatentSet]:
    return gaussian_latents


@pytest.fixture(name="disturbed")
def disturbed_fixture() -> type[Disturbed]:
    return Disturbed


@pytest.fixture(autouse=True)
def no_board(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard takes seconds to import: only tests that name the ``board`` fixture write to it."""
    if "board" not in request.fixturenames:
        monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)


@pytest.fixture
def board() -> None:
    """Asks for TensorBoard."""


@contextmanager
def _started(command: Sequence[object], **variables: object) -> Iterator[subprocess.Popen[str]]:
    """A process group of its own, of which nothing survives the block; no launcher's variables but ``variables``."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "without")])
    fixed = {"OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0", "PYTHONPATH": paths}
    environment = {**kept, **fixed, **{name: str(value) for name, value in variables.items()}}
    process = subprocess.Popen(
        [str(word) for word in command], env=environment, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def started() -> Callable[..., Any]:
    """``with started(command, NAME=value, ...) as process:``"""
    return _started
