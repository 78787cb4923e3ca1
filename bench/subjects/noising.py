"""The noised state in one pass: ``x = (1 - tau) eps + tau z``, the noise drawn in the kernel, alone and with the times'
gradient; and the other operation that draws, label dropout."""

from __future__ import annotations

import torch

from bench.harness import Bench, Operation
from bench.subjects.common import CHANNELS, Random, short, variants


def run(bench: Bench) -> None:
    grid, batches = (4, (4,)) if bench.small else (16, (256, 8192))
    for batch in batches:
        torch.compiler.reset()  # of one function eight shapes are compiled, and the next ones run eagerly
        for dtype, out in (
            [(torch.float32, torch.float32)]
            if bench.small
            else [
                (torch.float32, torch.bfloat16),
                (torch.bfloat16, torch.bfloat16),
            ]
        ):

            def make(seed: int, batch: int, dtype: torch.dtype = dtype) -> list:
                random = Random(bench.device, seed, dtype)
                z = random(batch, sum(CHANNELS), grid, grid)
                return [z, random.unit(batch, 2), CHANNELS, 7, 3, torch.arange(batch, device=bench.device)]

            numbers = batch * sum(CHANNELS) * grid**2
            bench.operation(
                Operation(
                    *("noising", "forward", f"[{batch}, 48, {grid}, {grid}]", f"{short(dtype)} to {short(out)}"),
                    variants(bench, "noising", "noising", False, dtype=out),
                    *(make, batch),
                    nbytes=numbers * (dtype.itemsize + out.itemsize),
                )
            )
        backward(bench, batch, grid)

    def labels(seed: int, batch: int) -> list:
        # one seed for all copies: the compiled baseline is specialised on it
        samples = seed * batch + torch.arange(batch, device=bench.device)
        return [samples % 10, 10, 0.1, 0, 3, samples]

    torch.compiler.reset()
    batch = batches[0]
    calls = variants(bench, "label dropout", "drop_labels", False)
    bench.operation(Operation("noising", "label dropout", f"[{batch}]", "int64", calls, labels, batch))


def backward(bench: Bench, batch: int, grid: int) -> None:
    """Forward, and dL/dtau: float32 latents, the state in the dtype that training has."""
    out = torch.float32 if bench.small else torch.bfloat16

    def make(seed: int, batch: int) -> list:
        random = Random(bench.device, seed, torch.float32)
        z, tau = random(batch, sum(CHANNELS), grid, grid), random.unit(batch, 2).requires_grad_()
        # partly along z: sums that nearly cancel would show how the noise is rounded, and that alone
        dx = (z + random(*z.shape)).to(out)
        return [z, tau, CHANNELS, 7, 3, torch.arange(batch, device=bench.device), [dx]]

    # forward reads z and writes x, backward reads dx and z
    nbytes = batch * sum(CHANNELS) * grid**2 * (2 * torch.float32.itemsize + 2 * out.itemsize)
    bench.operation(
        Operation(
            *("noising", "forward+dtau", f"[{batch}, 48, {grid}, {grid}]", f"float32 to {short(out)}"),
            variants(bench, "noising", "noising", True, dtype=out),
            *(make, batch),
            nbytes=nbytes,
        )
    )
