"""AdamW + EMA (+ bf16 weights) + clipping over XL's parameters: ours, torch's with a foreach EMA, apex where it is."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.harness import Bench, WrongResult, check, summarize
from bench.subjects.common import short
from bench.workload import configuration
from fastasync.errors import UserError
from fastasync.optim import FusedAdamW, build_optimizer
from fastasync.training.build import build_model

# bytes a parameter, gradients of the parameters' precision, the norm's reading of them included
BYTES = {torch.bfloat16: 38, torch.float32: 40}
CHECKED = 32  # parameters: embeddings and the first block


def updated(impl: str, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Norm, weights, moments and EMA after two clipped updates with large steps, which show in all of them.

    In float32 for parameters of 16 bits (in float64 for float64).  Raises WrongResult where such parameters are not the
    weights, rounded.
    """
    masters = impl == "fused"  # the others update float32 weights
    kinds = [w.dtype if masters else torch.promote_types(w.dtype, torch.float32) for w in weights]
    own = [torch.nn.Parameter(w.detach().to(kind, copy=True)) for w, kind in zip(weights, kinds)]
    optimizer = build_optimizer(own, impl, lr=1e-2, weight_decay=0.1, ema_decay=0.9)
    for scale in (1.0, 0.5):
        for p, gradient in zip(own, gradients):
            p.grad = (scale * gradient).to(p.dtype)
        norm = optimizer.clip_and_step(1e-3)
    state = [optimizer.state[p] for p in own]
    trained = [kept.get("master", p.detach()) for p, kept in zip(own, state)]
    if not all(torch.equal(p, weight.to(p.dtype)) for p, weight in zip(own, trained)):
        raise WrongResult(f"{impl}: a parameter is not its weight, rounded")
    return [norm, *trained, *(kept[name] for name in ("exp_avg", "exp_avg_sq", "ema") for kept in state)]


def run(bench: Bench) -> None:
    size = "tiny" if bench.small else "XL"
    with torch.device("meta"):
        shapes = [p.shape for p in build_model(configuration(size, 8, "ours eager")).parameters()]
    count = sum(shape.numel() for shape in shapes)
    for dtype in (torch.float32,) if bench.small else (torch.bfloat16, torch.float32):
        generator = torch.Generator(bench.device).manual_seed(0)

        def parameters(
            dtype: torch.dtype = dtype, generator: torch.Generator = generator, shapes: list[torch.Size] = shapes
        ) -> list:
            made = []
            for shape in shapes:
                p = torch.nn.Parameter(
                    torch.randn(shape, device=bench.device, generator=generator).mul_(0.02).to(dtype)
                )
                p.grad = torch.randn(shape, device=bench.device, generator=generator).mul_(1e-3).to(dtype)
                made.append(p)
            return made

        calls, notes, checked = {}, {}, {}
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
            checked[impl] = functools.partial(updated, impl)
        few = parameters(shapes=shapes[:CHECKED])
        errors = check(checked, [[p.detach() for p in few], [p.grad for p in few]])
        for call in calls.values():
            call()
        times = bench.interleaved(calls)
        for name, values in times.items():
            bench.add(
                *("optimizer", "step", name, f"{count} parameters", short(dtype), summarize(values)),
                nbytes=BYTES[dtype] * count,
                note=f"error {errors[name]:.1e}; {notes[name]}",
            )
