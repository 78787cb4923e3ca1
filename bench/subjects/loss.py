"""The corrected loss and its gradient, noise drawn again; and what a training step does with both: noising + loss."""

from __future__ import annotations

from typing import Any

import torch
from fastasync_kernels import reference

from bench.harness import Bench, Operation, with_backward
from bench.subjects.common import CHANNELS, Random, kernels, short, variants


def noising_and_loss(ops: Any, state: torch.dtype) -> Any:
    """The forward pass of both, as the objective calls them, the noised state in the dtype ``state``; the network
    between them is the identity on ``v``."""

    def forward(v: Any, z: Any, tau: Any, weight: Any, channels: Any, seed: int, step: Any, samples: Any) -> Any:
        x = ops.noising(z, tau, channels, seed, step, samples, state)
        return ops.corrected_loss(v, z, weight, channels, seed, step, samples)[0], x

    return forward


def run(bench: Bench) -> None:
    grid, batches = (4, (4,)) if bench.small else (16, (256, 8192))
    for batch in batches:
        torch.compiler.reset()  # of one function eight shapes are compiled, and the next ones run eagerly
        for dtype in [torch.float32] if bench.small else [torch.float32, torch.bfloat16]:

            def make(seed: int, batch: int, dtype: torch.dtype = dtype, both: bool = False) -> list:
                random = Random(bench.device, seed, dtype)
                v = random(batch, 48, grid, grid, dtype=torch.float32 if both else dtype, grad=True)
                z, tau, weight = random(batch, 48, grid, grid), random.unit(batch, 2), random.unit(batch, 2)
                samples = torch.arange(batch, device=bench.device)
                one = torch.ones((), dtype=torch.float32, device=bench.device)
                keys = [CHANNELS, 7, 3, samples]  # constants: torch.compile specialises on them
                return [v, z, tau, weight, *keys, [one]] if both else [v, z, weight, *keys, [one]]

            numbers = batch * 48 * grid**2
            shape = f"[{batch}, 48, {grid}, {grid}]"
            found = variants(bench, "loss", "corrected_loss", False)
            only_loss = {name: with_backward(lambda *a, f=f: f(*a)[0]) for name, f in found.items()}
            # forward reads v and z and writes dL/dv for the backward pass, which returns it
            nbytes = numbers * 3 * dtype.itemsize
            bench.operation(
                Operation("loss", "forward+backward", shape, short(dtype), only_loss, make, batch, nbytes=nbytes)
            )
            if dtype == torch.float32:  # the network's velocity is, and the latents are: SFD's objective
                found = variants(bench, "loss with cosine", "corrected_loss", False, cosine_weight=1.0)
                cosine = {name: with_backward(lambda *a, f=f: f(*a)[0]) for name, f in found.items()}
                # the same bytes: v and z of a sample (98 kB each) need not be read from memory a second time
                bench.operation(
                    Operation("loss", "with cosine", shape, short(dtype), cosine, make, batch, nbytes=nbytes)
                )
            # in training latents are float32, and the state is in autocast's dtype (the interpreter has no bf16)
            states = [dtype] if dtype != torch.float32 else [dtype, torch.float16 if bench.small else torch.bfloat16]
            ours = kernels(bench, "noising + loss")
            for state in states:
                plain = noising_and_loss(reference, state)
                calls = {"reference": with_backward(plain)}
                if ours is not None:
                    calls["reference compiled"] = with_backward(torch.compile(plain, dynamic=False))
                    calls["triton"] = with_backward(noising_and_loss(ours, state))
                kinds = short(dtype) if state == dtype else f"{short(dtype)} to {short(state)}"
                both = numbers * (2 * dtype.itemsize + state.itemsize + 4 + 4)
                bench.operation(
                    Operation(
                        *("loss", "noising + loss", shape, kinds, calls),
                        lambda seed, batch, make=make: make(seed, batch, both=True),
                        *(batch, both),
                    )
                )
