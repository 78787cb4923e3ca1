"""Whether the compiled kernels compute what their reference does on this device: small inputs, forward and backward.

A compiler can turn a right kernel into one that returns zeros, or drifts, on one GPU and one version only.  So the
kernels are compared where they are about to be used, once in a process, before anybody relies on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastasync_kernels import fp8_casts, reference, triton_ops
from fastasync_kernels.tops import Tops, hint_size

_CHANNELS, _SEED, _STEP = (5, 3), 11, 7
_SLACK, _FLOOR = 4.0, 1e-4  # times the same-precision reference's error against float64, and of the result's norm
Case = Callable[[ModuleType, Sequence[Tensor]], Sequence[Tensor]]


def _cases(device: torch.device) -> dict[str, tuple[list[Tensor], Case]]:
    """Name -> float64 inputs and the call, which makes float32 of what is float32 in training at any precision."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    samples = torch.arange(3, device=device)
    tau = torch.tensor([[0.2, 0.9], [0.5, 0.4], [1.0, 0.0]], dtype=torch.float64, device=device)
    weight = tau + 0.3
    angles = draw(16, 36).repeat_interleave(2, dim=1)

    def wide(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def noising(ops: ModuleType, x: Sequence[Tensor]) -> Sequence[Tensor]:
        return [ops.noising(x[0], wide(x[1]), _CHANNELS, _SEED, _STEP, samples)]

    def corrected_loss(ops: ModuleType, x: Sequence[Tensor]) -> Sequence[Tensor]:
        z, weights = wide(x[1]).detach(), wide(x[2]).detach()
        return ops.corrected_loss(x[0], z, weights, _CHANNELS, _SEED, _STEP, samples, 0.5)[:1]

    def guided_update(ops: ModuleType, x: Sequence[Tensor]) -> Sequence[Tensor]:
        return [ops.guided_update(x[0], x[1], x[2], wide(x[3]).detach(), wide(x[4]).detach(), _CHANNELS)]

    def qknorm_rope(ops: ModuleType, x: Sequence[Tensor]) -> Sequence[Tensor]:
        cos, sin = wide(angles.to(x[0].dtype)).cos(), wide(angles.to(x[0].dtype)).sin()
        return ops.qknorm_rope(x[0], x[1], x[2], cos, sin, 2, bias=x[3] if len(x) > 3 else None)

    grid, rows = (3, 8, 4, 4), (3, 16, 144)
    return {
        "noising": ([draw(*grid), tau], noising),
        "corrected_loss": ([draw(*grid), draw(*grid), weight], corrected_loss),
        "guided_update": ([draw(*grid), draw(*grid), draw(*grid), weight, tau], guided_update),
        "rmsnorm_modulate": (
            [draw(*rows), draw(144), draw(3, 144), draw(3, 144)],
            lambda o, x: [o.rmsnorm_modulate(*x)],
        ),
        "gated_rmsnorm_modulate": (
            [draw(*rows), draw(*rows), draw(3, 144), draw(144), draw(3, 144), draw(3, 144)],
            lambda ops, x: ops.gated_rmsnorm_modulate(*x),
        ),
        "gated_rmsnorm_modulate with bias": (
            [draw(*rows), draw(*rows), draw(3, 144), draw(144), draw(3, 144), draw(3, 144), draw(144)],
            lambda ops, x: ops.gated_rmsnorm_modulate(*x[:6], bias=x[6]),
        ),
        "qknorm_rope": ([draw(3, 16, 432), draw(72), draw(72)], qknorm_rope),
        "qknorm_rope with bias": ([draw(3, 16, 432), draw(72), draw(72), draw(432)], qknorm_rope),
        "swiglu": ([draw(3, 16, 288)], lambda ops, x: [ops.swiglu(x[0])]),
        "swiglu with bias": ([draw(3, 16, 288), draw(288)], lambda ops, x: [ops.swiglu(x[0], bias=x[1])]),
    }


def _run(ops: ModuleType, call: Case, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and the gradients of all inputs, for the same output gradients whatever the precision."""
    leaves = [value.to(dtype).detach().requires_grad_() for value in inputs]
    outputs = call(ops, leaves)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    for output in outputs:
        probe = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        total = total + (output.double() * probe).sum()
    total.backward()
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@functools.cache
def casts_disagreement(device: torch.device) -> str:
    """What is wrong with the casts to fp8 on this device, which are exact: asked where fp8 is about to be used."""
    x = torch.randn(40, 144, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    try:
        top = reference.cast_rows(x, True)[2]
        found, known = ([*ops.cast_rows(x, True), *ops.cast_columns(x, top)] for ops in (triton_ops, reference))
        found += _cast_in_one_pass(x, top)
        known += 2 * (known[:2] + known[3:])
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure)[:200]}"
    same = all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(found, known))
    return "" if same else "they differ from their reference"


def _cast_in_one_pass(x: Tensor, top: Tensor) -> list[Tensor]:
    """x both ways, by given largest magnitudes, and by those that a hint lacks."""
    rows = x.float().abs().amax(1, keepdim=True)
    hint = torch.zeros(hint_size(len(x), x.shape[1], 1), device=x.device)
    return [*fp8_casts.cast_both(x, Tops(rows, top)), *fp8_casts.cast_hinted(x, hint, 1, False)[:4]]


def disagreement(device: torch.device | str, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> str:
    """The first kernel whose results differ from the reference's by more than rounding, in words; "" when none does."""
    device = torch.device(device)
    for name, (inputs, call) in _cases(device).items():
        for dtype in dtypes:
            rounded = [value.to(dtype).double() for value in inputs]
            truth = _run(reference, call, rounded, torch.float64)
            known = _run(reference, call, inputs, dtype)
            try:
                found = _run(triton_ops, call, inputs, dtype)
            except Exception as failure:  # a compiler's failure has many types
                return f"{name} ({dtype}): {type(failure).__name__}: {str(failure)[:200]}"
            for ours, theirs, exact in zip(found, known, truth, strict=True):
                error, allowed = ((value.double() - exact).norm() for value in (ours, theirs))
                limit = _SLACK * allowed + _FLOOR * exact.norm()
                if not bool(error <= limit):  # NaN too
                    return f"{name} ({dtype}): error {float(error):.3g}, the reference's {float(allowed):.3g}"
    return ""
