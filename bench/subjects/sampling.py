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
    grid, batch = (4, 4) if bench.small else (16, 256)
    for dtype in (torch.float32,):

        def make(seed: int, batch: int, dtype: torch.dtype = dtype) -> list:
            random = Random(bench.device, seed, dtype)
            states = [random(batch, 48, grid, grid) for _ in range(3)]
            return [*states, 1 + random.unit(batch, 2), random.unit(batch, 2), CHANNELS]

        bench.operation(
            Operation(
                *("sampling", "guided update", f"[{batch}, 48, {grid}, {grid}]", short(dtype)),
                variants(bench, "guided update", "guided_update", False),
                *(make, batch),
                nbytes=4 * batch * 48 * grid**2 * dtype.itemsize,
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
