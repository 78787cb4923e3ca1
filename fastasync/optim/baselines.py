"""The optimizers to compare ``FusedAdamW`` with, behind its interface: torch's AdamW and NVIDIA apex's FusedAdam."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastasync.errors import UserError
from fastasync.optim.ema import (
    Combine,
    EmaInterface,
    check_gradient,
    check_max_norm,
    norm_of_nothing,
    restore_precision,
)


class SeparateEma(EmaInterface):
    """Adds the EMA (a foreach pass after the step) and clipping to another AdamW.  Put it before that class.

    Unlike ``FusedAdamW`` it reads the gradients' norm on the host, and keeps no master weights of bf16 parameters.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averaged = [
            (group["ema_decay"], [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
            if group["ema_decay"] is not None
        ]
        # The wrapped optimizer takes a parameter with any state for initialised: the first EMA is added afterwards.
        first = {p: _wide(p).clone() for _, params in averaged for p in params if "ema" not in self.state.get(p, {})}
        super().step(**options)  # type: ignore[safe-super]
        for p, ema in first.items():
            self.state[p]["ema"] = ema
        for decay, params in averaged:
            if params:
                emas = [self.state[p]["ema"] for p in params]
                torch._foreach_lerp_(emas, [_wide(p) for p in params], 1 - decay)
        return loss

    @torch.no_grad()
    def clip_and_step(
        self, max_norm: float | None = None, grad_scale: float = 1.0, combine: Combine | None = None
    ) -> Tensor:
        limit = check_max_norm(max_norm)
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return norm_of_nothing(self, combine)
        grads = [check_gradient(p.grad) for p in params]
        norm = get_total_norm([_wide(grad) for grad in grads]) * abs(grad_scale)
        if combine is not None:
            norm = combine(norm)
        if not math.isfinite(float(norm)):
            return norm
        if grad_scale != 1.0:
            torch._foreach_mul_(grads, grad_scale)
        clip_grads_with_norm_(params, limit, norm)
        self.step()
        return norm

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_precision(self, state_dict)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class TorchAdamW(SeparateEma, torch.optim.AdamW):  # type: ignore[misc]
    """``torch.optim.AdamW`` (its fused kernel on CUDA) and a foreach EMA.

    A non-finite gradient norm skips the step.  Arguments as for ``FusedAdamW``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
    ):
        params = list(params)
        tensors = [p for item in params for p in (item["params"] if isinstance(item, dict) else [item])]
        fused = bool(tensors) and all(p.is_cuda for p in tensors)
        self._ema_decay = ema_decay
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused, foreach=not fused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({"ema_decay": self._ema_decay, **param_group})


def apex_adamw(
    params: Iterable[Any],
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ema_decay: float | None = None,
) -> EmaInterface:
    """NVIDIA apex's FusedAdam in AdamW mode and a foreach EMA.

    Raises:
        UserError: apex is missing, is PyPI's unrelated web package of that name, or was built without its CUDA kernels.
    """
    build = (
        "build NVIDIA apex from https://github.com/NVIDIA/apex with its CUDA extensions, or set train.optimizer=fused"
    )
    if importlib.util.find_spec("apex") is None:
        raise UserError("train.optimizer", "apex", f"NVIDIA apex is not installed: {build}")
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        unrelated = "the installed package 'apex' is not NVIDIA's (PyPI has an unrelated web package of that name)"
        raise UserError("train.optimizer", "apex", f"{unrelated}: pip uninstall apex, then {build}") from None

    class ApexAdamW(SeparateEma, fused_adam):  # type: ignore[misc, valid-type]
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group({"ema_decay": ema_decay, **param_group})

    try:
        optimizer: Any = ApexAdamW
        return optimizer(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True)
    except RuntimeError as error:
        raise UserError("train.optimizer", "apex", f"{error}: {build}") from None
