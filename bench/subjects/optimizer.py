"""AdamW + EMA (+ bf16 weights) + clipping over XL's parameters: ours, torch's with a foreach EMA, apex where it is."""

from __future__ import annotations

import torch

from bench.harness import Bench, summarize
from bench.subjects.common import short
from bench.workload import configuration
from fastasync.errors import UserError
from fastasync.optim import FusedAdamW, build_optimizer
from fastasync.training.build import build_model

# bytes a parameter, gradients of the parameters' precision, the norm's reading of them included
BYTES = {torch.bfloat16: 38, torch.float32: 40}


def run(bench: Bench) -> None:
    size = "tiny" if bench.small else "XL"
    with torch.device("meta"):
        shapes = [p.shape for p in build_model(configuration(size, 8, "ours eager")).parameters()]
    count = sum(shape.numel() for shape in shapes)
    for dtype in (torch.float32,) if bench.small else (torch.bfloat16, torch.float32):
        generator = torch.Generator(bench.device).manual_seed(0)

        def parameters(dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> list:
            made = []
            for shape in shapes:
                p = torch.nn.Parameter(
                    torch.randn(shape, device=bench.device, generator=generator).mul_(0.02).to(dtype)
                )
                p.grad = torch.randn(shape, device=bench.device, generator=generator).mul_(1e-3).to(dtype)
                made.append(p)
            return made

        calls, notes = {}, {}
        # bf16 parameters have float32 master weights in ours only: torch's variant then updates float32 ones
        for impl in ("torch", "fused", "apex"):
            own = parameters() if impl == "fused" else parameters(torch.float32)
            try:
                optimizer = build_optimizer(own, impl, lr=1e-4, ema_decay=0.9999)
            except UserError as error:
                bench.skip(f"optimizer, {impl}", error.remedy)
                continue
            notes[impl] = optimizer.backend if isinstance(optimizer, FusedAdamW) else "float32 weights only"
            calls[impl] = lambda optimizer=optimizer: optimizer.clip_and_step(1.0)
        for call in calls.values():
            call()
        times = bench.interleaved(calls)
        for name, values in times.items():
            bench.add(
                *("optimizer", "step", name, f"{count} parameters", short(dtype), summarize(values)),
                nbytes=BYTES[dtype] * count,
                note=notes[name],
            )
