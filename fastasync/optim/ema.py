"""The EMA of the weights as optimizer state: reading it, and evaluating with it.

``state[p]["ema"]`` is float32, starts as the weights before the first update and follows
``ema += (1 - ema_decay) (weights - ema)`` after each one.  As optimizer state it is sharded and checkpointed by whoever
shards the optimizer (DeepSpeed ZeRO), and is restored with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastasync.errors import UserError

Combine = Callable[[Tensor], Tensor]


def restore_precision(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """After ``Optimizer.load_state_dict(saved)``: float32 state again, in copies of the saved tensors.

    torch casts floating-point state to the parameter's dtype, which for a bf16 parameter would round moments, EMA and
    master weights, and may keep an alias of the caller's tensors.

    Raises:
        UserError: a saved tensor does not have its parameter's shape.
    """
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"]):
        for p, key in zip(group["params"], saved_group["params"]):
            for name, value in saved["state"].get(key, {}).items():
                if not torch.is_tensor(value):
                    continue
                if name != "step" and value.shape != p.shape:
                    remedy = f"the parameter has shape {list(p.shape)}: load the checkpoint of the same model"
                    raise UserError(f"optimizer state {name}", list(value.shape), remedy)
                dtype = torch.promote_types(p.dtype, torch.float32) if value.is_floating_point() else value.dtype
                device = optimizer.state[p][name].device if name == "step" else p.device
                optimizer.state[p][name] = value.detach().to(device=device, dtype=dtype, copy=True)


class EmaInterface(Optimizer):
    """What the training loop asks of any of the optimizers, on top of ``torch.optim.Optimizer``."""

    def clip_and_step(
        self, max_norm: float | None = None, grad_scale: float = 1.0, combine: Combine | None = None
    ) -> Tensor:
        """One update with ``grad_scale * gradient``, clipped to the 2-norm ``max_norm`` (None: not clipped).

        ``combine``: where the parameters are a shard of all, from the norm of this shard's gradients to that of all
        (0-d float32).  Returns the norm before clipping (0-d float32, on the parameters' device).  If it is not finite,
        nothing has been updated: weights, moments, EMA and step counts are as before.
        """
        raise NotImplementedError

    def ema_state(self) -> dict[Tensor, Tensor]:
        """Parameter -> its EMA (float32), for every parameter that has been updated at least once."""
        return {p: state["ema"] for p, state in self.state.items() if "ema" in state}


def check_max_norm(max_norm: float | None) -> float:
    if max_norm is not None and not max_norm > 0:
        raise UserError("max_norm", max_norm, "give a positive number, or none for no clipping")
    return float("inf") if max_norm is None else float(max_norm)


def norm_of_nothing(optimizer: Optimizer, combine: Combine | None) -> Tensor:
    """The norm where no parameter has a gradient: ``combine`` is called all the same, as other ranks wait in it."""
    devices = [p.device for group in optimizer.param_groups for p in group["params"]]
    norm = torch.zeros((), device=devices[0] if devices else None)
    return norm if combine is None else combine(norm)


def check_gradient(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        raise UserError("optimizer", "a sparse gradient", "build the embedding with sparse=False")
    return grad


def _sharded(p: Tensor, started: bool) -> Tensor:
    """The EMA of one parameter that DeepSpeed shards, gathered from all ranks (a collective call)."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if p.requires_grad:
        return safe_get_full_optimizer_state(p, "ema") if started else safe_get_full_fp32_param(p)
    with zero.GatheredParameters([p]):
        return p.detach().clone()


def ema_parameters(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """Name -> EMA (float32) of every parameter of ``model``; one that was never updated stands for itself.

    Args:
        optimizer: one of this package's, or DeepSpeed's wrapper around one (any ZeRO stage).  Under DeepSpeed every
            rank must call this.
        model: its buffers are not part of the result.
    """
    started = any("ema" in state for state in optimizer.state.values())
    if started and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed's views into the state are made once and still point at what a loaded checkpoint replaced.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    averaged = {}
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
            value = _sharded(p, started)
        else:
            state = optimizer.state.get(p, {})
            value = state.get("ema", state.get("master", p)).detach()
        averaged[name] = value.to(torch.promote_types(value.dtype, torch.float32))
    return averaged


@contextmanager
def swapped_in_ema(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` holds the EMA (cast to its dtype); afterwards the weights are back, bit for bit.

    In place, so that compiled code and CUDA graphs see it.  Do not train or save inside the block.

    Raises:
        UserError: ZeRO-3 shards the weights themselves; build a second model from ``ema_parameters`` there.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError("zero_stage", 3, "load ema_parameters(...) into a second model to evaluate it")
    averaged = ema_parameters(optimizer, model)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(averaged[name])
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(kept[name])
