"""Whole training steps for the benchmarks: the production engine on random latents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastasync.config import Config, config_from_dict
from fastasync.model import LightningDiT
from fastasync.presets import preset
from fastasync.schedule import ConvexSchedule, Schedule, named_schedule
from fastasync.training.build import build_model, build_objective, choose_ops
from fastasync.training.engine import Engine, PlainEngine, build_engine
from fastasync.training.graph import Part
from fastasync.training.loop import learning_rate
from fastasync.training.step import step_function

SIZES = ("XL", "L", "B", "S", "cifar10")
Sections = dict[str, dict[str, Any]]


def _pytorch(**train: Any) -> Sections:
    return {"model": {"kernels": "reference", "attention": "sdpa"}, "train": {"optimizer": "torch", **train}}


def _ours(**train: Any) -> Sections:
    model = {"kernels": "auto", "attention": "auto"}
    return {"model": model, "train": {"optimizer": "auto", "cuda_graph": "off", "compile": "regional", **train}}


# a variant is recorded as a CUDA graph if its name says so, and an "auto" one as train.cuda_graph=auto (in sampling
# sample.cuda_graph=auto) decides
VARIANTS: dict[str, Sections] = {
    "pytorch eager": _pytorch(compile="off"),
    "pytorch regional": _pytorch(compile="regional"),
    "pytorch whole": _pytorch(compile="model"),
    "ours eager": _ours(compile="off"),
    "ours regional": _ours(),
    "ours regional plain MLP": {**_ours(), "model": {**_ours()["model"], "mlp": "plain"}},
    "ours whole": _ours(compile="model"),
    "ours fp8": _ours(precision="fp8"),
    "ours fp8 graph": _ours(precision="fp8", cuda_graph="on"),
    "ours regional graph": _ours(cuda_graph="on"),
    "ours auto": _ours(cuda_graph="auto"),
    "ours fp8 auto": _ours(precision="fp8", cuda_graph="auto"),
    "ours zero1": _ours(engine="deepspeed", zero=1),
    "ours zero2": _ours(engine="deepspeed", zero=2),
    "ours graph": _ours(compile="model", cuda_graph="on"),
    "ours graph uncompiled": _ours(compile="off", cuda_graph="on"),
}


def configuration(size: str, batch: int, variant: str) -> Config:
    """``S`` to ``XL`` at 48x16x16 with REPA, ``cifar10`` (the preset), or ``tiny`` for a CPU."""
    if size == "tiny":
        base = config_from_dict(
            {
                "representations": {"channels": [4, 2], "grid": 4},
                "model": {"depth": 2, "width": 32, "heads": 2, "repa_width": 12},
                "objective": {"repa_weight": 1.0},
                "probe": {"budget": 0.25, "batch": 8},
            }
        )
    elif size == "cifar10":
        base = preset("cifar10")
    else:
        base = config_from_dict({"model": {"size": size}}, preset("imagenet256-xl"))
    changes = VARIANTS[variant]
    train = {**changes["train"], "batch": batch, "memory": "none", "clip": 1.0, "warmup": 0}
    return config_from_dict({"model": changes["model"], "train": train}, base)


def backends(model: LightningDiT) -> str:
    """Who computes a network's attention and MLPs, and how wide the latter: a row's note."""
    if model._ops is None:
        return ""
    return f"attention {model._ops.attention}, MLP {model._ops.mlp} {model.product_hidden} wide"


def learned_schedule(config: Config) -> Schedule:
    """A convex schedule as the probe makes them, with fixed, uneven weights."""
    reps = config.representations
    schedule = ConvexSchedule(reps.names, reps.roles)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        schedule.logits.copy_(torch.randn(schedule.logits.shape, generator=generator, dtype=torch.float64))
    return schedule.requires_grad_(False)


def synchronous(config: Config) -> Schedule:
    return named_schedule("synchronous", config.representations.names, config.representations.roles)


def randomize(network: nn.Module) -> None:
    """Give every linear torch's own initial weights and biases, and adaLN's three times as large ones.

    Those of an untrained network are zero where they end a block, and at its end: whatever its blocks compute, it is
    the identity, and no wrong result would be seen.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
            if "adaLN" in name:
                module.weight.data.mul_(3)  # gates so large that what the branches compute counts


def share_parameters(target: nn.Module, source: nn.Module) -> None:
    """Make ``target`` use the parameters of ``source``, so that variants do not each hold an optimizer's state."""
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        for key in list(module._parameters):
            module._parameters[key] = modules[name]._parameters[key]


class Work(NamedTuple):
    """A variant's training step: ``step(schedule)`` runs one and returns its terms; ``step(schedule, lr)`` with another
    learning rate; ``engine`` and ``config`` as in training."""

    config: Config
    engine: Engine
    step: Callable[..., Tensor]


def latents(config: Config, device: torch.device, sets: int = 4) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Normal latents, labels and REPA features of ``sets`` batches, on the device."""
    generator = torch.Generator(device).manual_seed(0)
    reps, model, batch = config.representations, config.model, config.train.batch
    made = []
    for _ in range(sets):
        z = torch.randn(batch, sum(reps.channels), reps.grid, reps.grid, device=device, generator=generator)
        y = torch.randint(model.classes, (batch,), device=device, generator=generator)
        features = None
        if config.objective.repa_weight:
            tokens = (reps.grid // model.patch) ** 2
            features = torch.randn(batch, tokens, model.repa_width, device=device, generator=generator)
            features = features.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        made.append((z, y, features))
    return made


def _alike(engine: Engine, other: Engine) -> bool:
    """Whether two engines can share parameters: DeepSpeed's owns its own, others need the same dtypes."""
    kinds = [[p.dtype for p in each.model.parameters()] for each in (engine, other)]
    return isinstance(engine, PlainEngine) and isinstance(other, PlainEngine) and kinds[0] == kinds[1]


def make_work(
    config: Config,
    device: torch.device,
    data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    like: Sequence[Work] = (),
    make_engine: Callable[..., Any] = build_engine,
) -> Work:
    """A variant's step on this rank's ``data``.  ``like``: share the parameters of one of these variants that keeps
    them in the same dtypes, and the optimizer of one of the same kind."""
    torch.manual_seed(0)
    network = build_model(config)
    randomize(network)
    engine: Any = make_engine(network, config, device)
    shared = [work.engine for work in like if _alike(work.engine, engine)]
    if shared:
        first: Any = shared[0]
        share_parameters(engine.model, first.model)
        alike = [other.optimizer for other in shared if type(other.optimizer) is type(engine.optimizer)]  # type: ignore[attr-defined]
        for group, other in zip(engine.optimizer.param_groups, first.optimizer.param_groups):
            group["params"] = other["params"]
        engine.optimizer = alike[0] if alike else engine.optimizer
    objective, ops = build_objective(config), choose_ops(config.model.kernels, device)
    (where,) = engine.positions()
    compute = step_function(engine, config, objective, ops, [where.to(device)])
    clocks: dict[Schedule, tuple[Any, Iterator[int]]] = {}  # of each schedule: its times by step, its steps so far

    def step(schedule: Schedule, lr: float = learning_rate(config, 0)) -> Tensor:
        if schedule not in clocks:
            drawn = objective.times_by_step(schedule, seed=config.data.seed, samples=where, total=config.train.batch)
            clocks[schedule] = drawn, itertools.count()
        times_at, steps = clocks[schedule]
        number = next(steps)
        z, y, features = data[number % len(data)]
        times = times_at(number).to(device)
        values, _ = engine.run(compute, number, [Part(z, y, times.tau, times.weight, features)], lr)
        return values

    return Work(config, engine, step)
