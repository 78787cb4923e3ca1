"""What several subjects share: the operations' variants and random tensors of the network's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastasync_kernels
import torch
from fastasync_kernels import reference
from torch import Tensor

from bench.harness import Bench, with_backward

XL = {"width": 1152, "heads": 16, "hidden": 3072, "tokens": 256}
TINY = {"width": 64, "heads": 4, "hidden": 128, "tokens": 16}
CHANNELS = (32, 16)


def sizes(bench: Bench) -> dict[str, int]:
    """XL's shapes, or on a CPU small ones."""
    return TINY if bench.small else XL


def dtypes(bench: Bench) -> list[torch.dtype]:
    return [torch.float32] if bench.small else [torch.bfloat16]


def short(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[1]


def kernels(bench: Bench, subject: str) -> Any:
    """The Triton operations, or None with a line that says so."""
    if bench.device.type != "cuda":
        bench.skip(f"{subject}, Triton", "needs a CUDA device (the interpreter's time means nothing)")
        return None
    try:
        return fastasync_kernels.select("triton", bench.device)
    except fastasync_kernels.KernelUnavailable as error:
        bench.skip(f"{subject}, Triton", str(error))
        return None


def variants(
    bench: Bench, subject: str, name: str, backward: bool, bias: bool = False, **options: Any
) -> dict[str, Callable[..., Any]]:
    """Reference, reference under torch.compile, and the kernel of an operation; with ``backward`` and its gradients.

    ``bias``: the last argument is the bias of the linear before it, whose gradient the operation gives, as in
    training.  ``options`` are bound to the operation.  The compiled reference is left out on a CPU, where it would time
    a C++ compiler's work.
    """

    def of(module: Any) -> Callable[..., Any]:
        function = getattr(module, name)
        if bias:
            return lambda *arguments: function(*arguments[:-1], bias=arguments[-1], **options)
        return lambda *arguments: function(*arguments, **options)

    found: dict[str, Callable[..., Any]] = {"reference": of(reference)}
    if bench.small:
        bench.skip(f"{subject}, compiled reference", "not timed on a CPU")
    else:
        found["reference compiled"] = torch.compile(of(reference), dynamic=False)
    ours = kernels(bench, subject)
    if ours is not None:
        found["triton"] = of(ours)
    return {name: with_backward(function) if backward else function for name, function in found.items()}


class Random:
    """Normal tensors on a device from one seed."""

    def __init__(self, device: torch.device, seed: int, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        tensor = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32) * scale
        return tensor.to(dtype or self.dtype).requires_grad_(grad)

    def unit(self, *shape: int) -> Tensor:
        """Uniform in (0, 1), float32."""
        return torch.rand(shape, generator=self.generator, device=self.device).clamp(1e-3, 1 - 1e-3)
