"""One transformer block with a pending branch, forward and backward: where the floor of its parts lies.

As training has it: ``build_engine`` makes it, with the working bf16 weights and the divided gradients that ours have,
and what comes back is what the next block would give, the gradients of stream, branch and gate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Bench, check, summarize
from bench.subjects.common import Random, dtypes, kernels, short, sizes
from bench.workload import configuration, randomize
from fastasync.config import config_from_dict
from fastasync.errors import UserError
from fastasync.training.build import build_model
from fastasync.training.engine import build_engine

# name -> the variant in bench.workload, the MLP's backend
VARIANTS = {
    "pytorch": ("pytorch eager", "plain"),
    "pytorch compiled": ("pytorch regional", "plain"),
    "triton": ("ours eager", "plain"),
    "triton compiled": ("ours regional", "plain"),
    "triton, quack compiled": ("ours regional", "quack"),
}


def element_wise_bytes(tokens: int, width: int, hidden: int, itemsize: int) -> int:
    """Fewest bytes of a block's element-wise work, both directions, for one sample: each tensor moved once."""
    gated = 2 * (4 + 6) * width  # two gated norms
    rope, mlp = (4 + 8) * width, (3 + 5) * hidden
    return tokens * (gated + rope + mlp) * itemsize


def trained(bench: Bench, batch: int, variant: str, mlp: str) -> Any:
    """A network of one block, as training prepares it for ``batch`` samples; the same weights each time."""
    size = sizes(bench)
    model = {"size": "custom", "depth": 1, "width": size["width"], "heads": size["heads"], "repa_width": 0, "mlp": mlp}
    base = configuration("tiny" if bench.small else "XL", batch, variant)
    config = config_from_dict({"model": model, "objective": {"repa_weight": 0.0}}, base)
    torch.manual_seed(0)
    network = build_model(config)
    randomize(network)
    return build_engine(network, config, bench.device).model


def direction(network: Any, dtype: torch.dtype, backward: bool) -> Callable[..., list[Tensor]]:
    """``run(x, y, gate, condition, *douts)`` -> stream, branch and gate, and with ``backward`` the gradients of the
    four arguments and of the parameters.  In float64 for inputs in float64."""

    def run(x: Tensor, y: Tensor, gate: Tensor, condition: Tensor, *douts: Tensor) -> list[Tensor]:
        wide = x.dtype == torch.float64
        block = copy.deepcopy(network.blocks[0]).double() if wide else network.blocks[0]
        tables = network.feat_rope.freqs_cos, network.feat_rope.freqs_sin
        half = dtype != torch.float32 and not wide
        with torch.autocast(x.device.type, dtype, enabled=half), torch.set_grad_enabled(backward):
            out = block(x, y, gate, None, condition, *tables, network._ops)[:3]
        wanted = [x, y, gate, condition, *block.parameters()]
        return [*(each.detach() for each in out), *(torch.autograd.grad(out, wanted, douts) if backward else ())]

    return run


def run(bench: Bench) -> None:
    size, batch = sizes(bench), 2 if bench.small else 256
    tokens, width = size["tokens"], size["width"]
    (dtype,) = dtypes(bench)
    ours = kernels(bench, "block") is not None
    networks: dict[str, Any] = {}
    for name, (variant, mlp) in VARIANTS.items():
        if (bench.small and "compiled" in name) or ("triton" in name and not ours):
            continue
        try:
            networks[name] = trained(bench, batch, variant, mlp)
        except UserError as error:
            bench.skip(f"block, {name}", str(error))
    random = Random(bench.device, 0, dtype)
    inputs = [random(batch, tokens, width, grad=True) for _ in range(2)]
    inputs += [random(batch, width, grad=True) for _ in range(2)]
    inputs += [random(batch, tokens, width), random(batch, tokens, width), random(batch, width)]
    hidden = networks["pytorch"].product_hidden
    linear = 2 * tokens * (4 * width * width + 3 * width * hidden) + 2 * 6 * width * width
    forward = batch * (linear + 4 * tokens**2 * width)
    for backward in (False, True):
        if bench.time_is_up("block"):
            return
        runs = {name: direction(network, dtype, backward) for name, network in networks.items()}
        errors = check(runs, inputs)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()  # of the check in float64
        calls = {name: lambda run=run: run(*inputs) for name, run in runs.items()}
        times = bench.interleaved(calls, warm=2)
        least = element_wise_bytes(tokens, width, hidden, dtype.itemsize) * batch
        for name, values in times.items():
            floor = 3 * forward / bench.matmul_rate + least / bench.copy_rate
            note = f"error {errors[name]:.1e}"
            if backward:
                note += f"; floor, parts one after the other: {1e3 * floor:.3g} ms"
            bench.add(
                *("block", "fwd+bwd" if backward else "fwd", name, f"[{batch}, {tokens}, {width}]", short(dtype)),
                summarize(values),
                flops=forward * (3 if backward else 1),
                note=note,
            )
