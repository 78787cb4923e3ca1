"""Sampling: the network forward only, and one guided update of the state."""

from __future__ import annotations

import gc

import torch

from bench.harness import Bench, Operation, summarize
from bench.subjects.common import CHANNELS, Random, short, variants
from bench.workload import backends, configuration, latents
from fastasync.errors import UserError
from fastasync.model import forward_flops
from fastasync.training.build import build_model, choose_autocast, prepare_sampling
from fastasync.training.engine import compile_in_place


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


def run(bench: Bench) -> None:
    guided_update(bench)
    size, batch = ("tiny", 4) if bench.small else ("XL", 128)
    names = ("ours eager",) if bench.small else ("pytorch regional", "ours regional", "ours fp8")
    calls, models = {}, {}
    for name in names:
        if bench.time_is_up(f"sampling {name}"):
            break
        config = configuration(size, batch, name)
        torch.manual_seed(0)
        precision = config.train.precision
        try:
            model = build_model(config).to(bench.device).eval().requires_grad_(False)
            if name.startswith("ours"):
                dtype = prepare_sampling(model, batch, precision, bench.device)
            else:
                dtype = choose_autocast(precision, bench.device)
                model.choose_attention(batch, dtype or torch.float32, gradient=False)
            compile_in_place(model, config.train.compile)
            z, y, _ = latents(config, bench.device, 1)[0]
            tau = torch.full((batch, 2), 0.5, device=bench.device)

            def call(model=model, dtype=dtype, z=z, y=y, tau=tau) -> None:  # type: ignore[no-untyped-def]
                with torch.no_grad(), torch.autocast(bench.device.type, dtype, enabled=dtype is not None):
                    model(z, tau, y)

            call()
        except UserError as error:
            bench.skip(f"sampling {name}", str(error))
            continue
        calls[name], models[name] = call, model
    times = bench.interleaved(calls, warm=2) if calls else {}
    for name, values in times.items():
        precision = "fp8" if "fp8" in name else "fp32" if bench.small else "bf16"
        note = backends(models[name])
        bench.add(
            *("sampling", f"forward {size}", name, f"batch {batch}", precision, summarize(values)),
            flops=forward_flops(models[name]) * batch,
            images=batch,
            note=note,
        )
    del calls, models
    gc.collect()
