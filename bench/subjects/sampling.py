"""Sampling: the network forward only, and one guided update of the state."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import Bench, Operation, check, summarize
from bench.subjects.common import CHANNELS, Random, short, variants
from bench.workload import backends, configuration, latents, randomize
from fastasync.config import config_from_dict
from fastasync.errors import UserError
from fastasync.model import LightningDiT, forward_flops
from fastasync.training.build import build_model, choose_autocast, prepare_sampling
from fastasync.training.engine import compile_in_place
from fastasync.training.graph import WARM_UP, GraphedForward


def guided_update(bench: Bench) -> None:
    """Alone, and with the gradients of state, velocities, scale and steps."""
    grid, batch = (4, 4) if bench.small else (16, 256)
    dtype = torch.float32
    for backward in (False, True):

        def make(seed: int, batch: int, backward: bool = backward) -> list:
            random = Random(bench.device, seed, dtype)
            states = [random(batch, 48, grid, grid, grad=backward) for _ in range(3)]
            values = [(low + random.unit(batch, 2)).requires_grad_(backward) for low in (1, 0)]
            g = states[1].detach() + random(batch, 48, grid, grid)  # partly along v: the sums do not nearly cancel
            return [*states, *values, CHANNELS, *([[g]] if backward else [])]

        # forward reads x, v and v_weak, writes x'; backward reads g, v and v_weak, writes dv and dv_weak (dx is g)
        moved = 4 + 5 if backward else 4
        bench.operation(
            Operation(
                *("sampling", "guided update" + (" fwd+bwd" if backward else "")),
                *(f"[{batch}, 48, {grid}, {grid}]", short(dtype)),
                variants(bench, "guided update", "guided_update", backward),
                *(make, batch),
                nbytes=moved * batch * 48 * grid**2 * dtype.itemsize,
            )
        )


def forward(
    model: LightningDiT, dtype: torch.dtype | None, exact: LightningDiT, graph: str = "off"
) -> tuple[Callable[..., Tensor], GraphedForward | None]:
    """``run(z, tau, y)``: the velocity, under autocast in ``dtype``; for inputs in float64 that of ``exact`` in it.

    ``graph``: as ``sample.cuda_graph``; what replays the passes is returned beside them.
    """

    def narrow(z: Tensor, tau: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(z.device.type, dtype, enabled=dtype is not None):
            return model(z, tau, y)

    graphed = None
    if graph != "off":
        graphed = GraphedForward(narrow, next(model.parameters()).device, watch=graph == "auto")

    def run(z: Tensor, tau: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            if z.dtype == torch.float64:
                return copy.deepcopy(exact).double()(z, tau, y)
            return graphed(z, tau, y) if graphed else narrow(z, tau, y)

    return run, graphed


def run(bench: Bench) -> None:
    guided_update(bench)
    size, batch = ("tiny", 4) if bench.small else ("XL", 128)
    usual = ("pytorch regional", "ours regional", "ours fp8", "ours fp8 graph")
    if bench.variants:  # the first one is what the others are compared with
        usual = tuple(dict.fromkeys(("pytorch regional", *bench.variants)))
    names = ("pytorch eager", "ours eager") if bench.small else usual
    models: dict[str, LightningDiT] = {}
    calls: dict[str, Callable[..., Tensor]] = {}
    decided: dict[str, str] = {}  # of sample.cuda_graph=auto
    tau = torch.full((batch, 2), 0.5, device=bench.device)
    z, y, _ = latents(configuration(size, batch, names[0]), bench.device, 1)[0]

    def build(variant: str, changes: dict, prepared: bool) -> tuple[LightningDiT, torch.dtype | None]:
        config = config_from_dict(changes, configuration(size, batch, variant))
        torch.manual_seed(0)
        model = build_model(config)
        randomize(model)
        model = model.to(bench.device).eval().requires_grad_(False)
        precision = config.train.precision
        if prepared:
            dtype = prepare_sampling(model, batch, precision, bench.device)
        else:
            dtype = choose_autocast(precision, bench.device)
            model.choose_attention(batch, dtype or torch.float32, gradient=False)
        compile_in_place(model, config.train.compile)
        return model, dtype

    for name in names:
        if bench.time_is_up(f"sampling {name}"):
            break
        try:
            model, dtype = build(name, {}, name.startswith("ours"))
            graph = "on" if "graph" in name else "auto" if "auto" in name else "off"
            call, graphed = forward(model, dtype, next(iter(models.values()), model), graph)
            for _ in range(WARM_UP + 1):  # what is recorded is, by then
                call(z, tau, y)
        except UserError as error:
            bench.skip(f"sampling {name}", str(error))
            continue
        calls[name], models[name] = call, model
        if graph == "auto":
            decided[name] = "; recorded" if graphed is not None and graphed.replays else "; not recorded"
    if not calls:
        return
    errors = check({name: call for name, call in calls.items() if "fp8" not in name}, [z, tau, y])
    fp8 = [name for name in calls if "fp8" in name]
    if fp8:  # against fp8 in plain PyTorch
        changes = {"model": {"kernels": "reference", "attention": "sdpa"}, "train": {"compile": "off"}}
        plain, _ = forward(*build("ours fp8", changes, True), next(iter(models.values())))
        errors |= check({"reference": plain} | {name: calls[name] for name in fp8}, [z, tau, y])
        del plain
    times = bench.interleaved({name: lambda call=call: call(z, tau, y) for name, call in calls.items()}, warm=2)
    for name, values in times.items():
        precision = "fp8" if "fp8" in name else "fp32" if bench.small else "bf16"
        bench.add(
            *("sampling", f"forward {size}", name, f"batch {batch}", precision, summarize(values)),
            flops=forward_flops(models[name]) * batch,
            images=batch,
            note=f"error {errors[name]:.1e}; {backends(models[name])}{decided.get(name, '')}",
        )
    del calls, models
    gc.collect()
