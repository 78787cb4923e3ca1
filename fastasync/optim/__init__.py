"""Optimizers: AdamW whose state holds the EMA of the weights.  ``build_optimizer`` chooses the implementation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastasync.errors import UserError
from fastasync.optim import library
from fastasync.optim.baselines import TorchAdamW, apex_adamw
from fastasync.optim.ema import EmaInterface, ema_parameters, swapped_in_ema
from fastasync.optim.fused import FusedAdamW, check_hyperparameters

__all__ = ["IMPLEMENTATIONS", "EmaInterface", "FusedAdamW", "build_optimizer", "ema_parameters", "swapped_in_ema"]

IMPLEMENTATIONS = ("auto", "fused", "torch", "apex")


def build_optimizer(
    params: Iterable[Any],
    impl: str = "auto",
    *,
    lr: float | Tensor = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ema_decay: float | None = None,
) -> EmaInterface:
    """AdamW with an EMA (``ema_decay=None``: without) over ``params`` (tensors or torch's parameter groups).

    Args:
        impl: ``fused`` is this package's single pass (compiled where it was built, PyTorch otherwise); ``torch`` is
            torch's AdamW and a foreach EMA; ``apex`` is NVIDIA apex's FusedAdam and a foreach EMA; ``auto`` is
            ``fused``, except for float32 parameters on CUDA without the compiled library, which ``torch`` updates
            faster.  bf16 parameters get float32 master weights from ``fused`` only.

    Raises:
        UserError: an unknown ``impl``, a hyperparameter out of range, or apex missing or unrelated.
    """
    if impl not in IMPLEMENTATIONS:
        raise UserError("train.optimizer", impl, f"use one of {', '.join(IMPLEMENTATIONS)}")
    check_hyperparameters(lr, betas, eps, weight_decay, ema_decay)
    params = list(params)
    options: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "ema_decay": ema_decay,
    }
    tensors = [p for item in params for p in (item["params"] if isinstance(item, dict) else [item])]
    uncompiled = any(p.is_cuda for p in tensors) and library.load("cuda") is None
    if impl == "fused" and uncompiled:
        warnings.warn(
            "fused AdamW: the CUDA library is not built (pip install -e . with nvcc on the PATH builds it); "
            "the update runs in PyTorch, slower",
            stacklevel=2,
        )
    if impl == "auto":
        impl = "torch" if uncompiled and all(p.element_size() >= 4 for p in tensors) else "fused"
    if impl == "apex":
        return apex_adamw(params, **options)
    return TorchAdamW(params, **options) if impl == "torch" else FusedAdamW(params, **options)
