"""AdamW, EMA and bf16 working weights in one pass over the parameters (38 bytes a parameter, csrc/fused_adamw.cu)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastasync.errors import UserError
from fastasync.optim import library
from fastasync.optim.ema import (
    Combine,
    EmaInterface,
    check_gradient,
    check_max_norm,
    norm_of_nothing,
    restore_precision,
)

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class _Slot(NamedTuple):
    """One parameter with a gradient and its state; ``working`` is the bf16 parameter, ``master`` what is trained."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor | None
    working: Tensor | None
    step: Tensor


class _Plan(NamedTuple):
    """What one parameter group's update needs, kept from step to step; it holds the tensors, so no id is reused."""

    signature: tuple[Any, ...]
    held: list[Tensor]
    params: list[Tensor]
    table: np.ndarray
    copied: list[Tensor]


class FusedAdamW(EmaInterface):
    """AdamW with decoupled weight decay; the EMA, and float32 master weights of bf16 parameters, are optimizer state.

    A plain torch optimizer: ``step()`` is one update with the gradients as they are, so that DeepSpeed ZeRO can own the
    clipping and shard the state.  ``clip_and_step`` adds clipping, and skips an update whose gradient norm is not
    finite, without waiting for the device.  A parameter without a gradient is left alone, its EMA too.

    State per parameter: ``step`` (0-d float32), ``exp_avg``, ``exp_avg_sq`` and, where asked for, ``ema``, all float32;
    for a parameter of less than 32 bits also ``master``, of which the parameter is the rounded working copy.

    On CUDA inside a graph: call ``init_state()`` before the capture, and give ``lr`` as a 0-d float32 tensor if it
    changes.

    Args:
        lr: a number, or a 0-d float32 tensor on the parameters' device.
        ema_decay: None keeps no EMA.  Like every other hyperparameter it may differ between parameter groups.
        native: True needs the compiled library of the parameters' device, False uses PyTorch, None takes what is there.

    Raises:
        UserError: a hyperparameter is out of range, a gradient is sparse, or ``native=True`` without the library.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        native: bool | None = None,
    ):
        self._wanted = native
        self._plans: dict[int, _Plan] = {}
        self.grad_norm: Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        super().__init__(params, defaults)
        if native and self.backend == "torch":
            remedy = "rebuild with nvcc and g++ (pip install -e .); parameters: float32 or bfloat16 on one device"
            raise UserError("native", native, f"the compiled AdamW cannot run these parameters: {remedy}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_wanted", None)
        self._plans, self.grad_norm = {}, None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        check_hyperparameters(**{key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "ema_decay")})
        super().add_param_group(param_group)

    def _library(self, params: Sequence[Tensor]) -> library.Library | None:
        if self._wanted is False:
            return None
        devices, dtypes = {p.device for p in params}, {p.dtype for p in params}
        if len(devices) != 1 or not dtypes.issubset(_NATIVE_DTYPES):
            return None
        return library.load(devices.pop().type)

    @property
    def backend(self) -> str:
        """What runs the update: "cuda" or "cpu" (compiled) or "torch"."""
        params = [p for group in self.param_groups for p in group["params"]]
        return "torch" if self._library(params) is None else params[0].device.type

    @torch.no_grad()
    def init_state(self, masters: Sequence[Tensor] | None = None) -> None:
        """Create the state of every trainable parameter now rather than at its first update.

        Args:
            masters: the full-precision weights of every parameter in the groups' order, so that training starts from
                them and not from bf16 parameters' rounded values.  The parameters are overwritten by their rounding.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if masters is not None and [m.shape for m in masters] != [p.shape for p in params]:
            raise UserError("masters", f"{len(masters)} tensors", "give one of the same shape per parameter, in order")
        for p, master in zip(params, masters or []):
            p.copy_(master)
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._state_of(p, group)
        for p, master in zip(params, masters or []):
            for name in ("master", "ema"):
                if name in self.state.get(p, {}):
                    self.state[p][name].copy_(master)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        if "step" not in state:
            # On the parameter's device for the compiled path: a skipped step is decided there and must not count.
            home = p.device if self._library([p]) is not None else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=home)
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
            if p.dtype != wide:
                state["master"] = p.detach().clone().to(wide)
        if group["ema_decay"] is not None and "ema" not in state:
            state["ema"] = state.get("master", p).detach().clone()
        return state

    def _slots(self, group: dict[str, Any]) -> list[_Slot]:
        slots = []
        for p in group["params"]:
            if p.grad is None:
                continue
            grad = p.grad
            state = self._state_of(p, group)
            master = state.get("master")
            slots.append(
                _Slot(
                    p if master is None else master,
                    grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["ema"] if group["ema_decay"] is not None else None,
                    None if master is None else p,
                    state["step"],
                )
            )
        return slots

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        grad_scale: float = 1.0,
        combine: Combine | None = None,
    ) -> Any:
        """One update.  Without ``max_norm`` the gradients (times ``grad_scale``) are neither clipped nor checked.

        With ``max_norm`` (infinity: check only) it is ``clip_and_step``, and ``self.grad_norm`` holds the norm.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.grad_norm = self._update(None if max_norm is None else check_max_norm(max_norm), grad_scale, combine)
        return loss

    def clip_and_step(
        self, max_norm: float | None = None, grad_scale: float = 1.0, combine: Combine | None = None
    ) -> Tensor:
        self.step(max_norm=check_max_norm(max_norm), grad_scale=grad_scale, combine=combine)
        return cast(Tensor, self.grad_norm)

    def _update(self, max_norm: float | None, grad_scale: float, combine: Combine | None) -> Tensor | None:
        """One step over all groups; with ``max_norm`` the gradients' norm is computed and returned, and guards it."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        groups = [(group, params) for group, params in groups if params]
        every = [p for _, params in groups for p in params]
        for p in every:
            check_gradient(p.grad)
        if not every:
            return None if max_norm is None else norm_of_nothing(self, combine)
        native = self._library(every)
        if native is None or any(p.grad.dtype not in _NATIVE_DTYPES for p in every):
            return _torch_update([(group, self._slots(group)) for group, _ in groups], max_norm, grad_scale, combine)

        device = every[0].device
        plans = [self._plan(group, params, device) for group, params in groups]
        norm = status = None
        if max_norm is not None:
            tables = [plan.table for plan in plans]
            norm, status = native.norm(np.concatenate(tables), grad_scale, max_norm, device)
            if combine is not None:
                norm = combine(norm)
                status = library.status_of(norm, grad_scale, max_norm)
        for (group, _), plan in zip(groups, plans):
            lr, decay = group["lr"], group["ema_decay"]
            on_device = torch.is_tensor(lr) and lr.device == device and lr.dtype == torch.float32
            hyper = library.Hyper(
                0.0 if on_device else float(lr),
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                0.0 if decay is None else decay,
                grad_scale,
                lr.data_ptr() if on_device else None,
            )
            native.step(plan.table, hyper, status, device)
            # The library wrote behind autograd's back: count it as an in-place operation.
            increment_version(plan.params)
        return norm

    def _plan(self, group: dict[str, Any], params: list[Tensor], device: torch.device) -> _Plan:
        """The addresses of one group, checked again only where a tensor is not the one of the step before.

        Reading and checking hundreds of tensors one by one would take as long as the update itself.
        """
        grads = [cast(Tensor, p.grad) for p in params]
        held = [tensor for p in params for tensor in (p, *self.state[p].values())]
        signature = (
            group["ema_decay"] is None,
            [*map(id, held)],
            [*map(Tensor.data_ptr, held)],
            [grad.dtype for grad in grads],
            [*map(Tensor.stride, grads)],
        )
        plan = self._plans.get(id(group))
        if plan is not None and plan.signature == signature:
            plan.table[:, library.GRAD] = [*map(Tensor.data_ptr, grads)]
            return plan
        slots = [_addressable(slot, device) for slot in self._slots(group)]
        table = np.array([library.entry(*slot) for slot in slots], dtype=np.int64)
        copied = [slot.grad for slot, grad in zip(slots, grads) if slot.grad is not grad]
        plan = _Plan(signature, held, params, table, copied)
        if copied:  # copies are made anew each step
            self._plans.pop(id(group), None)
        else:
            self._plans[id(group)] = plan
        return plan

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_precision(self, state_dict)
        for p, state in self.state.items():
            if "step" in state:
                home = p.device if self._library([p]) is not None else torch.device("cpu")
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(home)


def check_hyperparameters(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, ema_decay: float | None
) -> None:
    """Raises UserError for the first value that is out of range."""
    if not torch.is_tensor(lr) and not 0 <= lr < math.inf:
        raise UserError("optimizer.lr", lr, "give a finite number that is not negative")
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError("optimizer.betas", betas, "give two numbers in [0, 1)")
    if not 0 <= eps < math.inf:
        raise UserError("optimizer.eps", eps, "give a finite number that is not negative")
    if not 0 <= weight_decay < math.inf:
        raise UserError("optimizer.weight_decay", weight_decay, "give a finite number that is not negative")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise UserError("optimizer.ema_decay", ema_decay, "give a number in [0, 1), or none for no EMA")


def _same_order(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _addressable(slot: _Slot, device: torch.device) -> _Slot:
    """The slot as the library may read it: one device, one memory order, float32 state.

    State made by this class is so, unless the parameter is a view with gaps; a gradient in another order is copied.
    """
    master = slot.master
    for buffer in (master, slot.exp_avg, slot.exp_avg_sq, slot.ema):
        if buffer is not None and (buffer.dtype != torch.float32 or buffer.device != device):
            where = f"state of {buffer.dtype} on {buffer.device}"
            raise UserError("optimizer", where, f"the update needs float32 on {device}: load the state again")
        if buffer is not None and not _same_order(master, buffer):
            raise UserError("optimizer", f"a parameter of strides {master.stride()}", "make it contiguous")
    if slot.working is not None and not _same_order(master, slot.working):
        raise UserError("optimizer", f"a parameter of strides {slot.working.stride()}", "make it contiguous")
    if slot.step.device != device:
        raise UserError("optimizer", f"a step count on {slot.step.device}", f"the update needs it on {device}")
    if not _same_order(master, slot.grad):
        return slot._replace(grad=torch.empty_like(master, dtype=slot.grad.dtype).copy_(slot.grad))
    return slot


def _torch_update(
    groups: Sequence[tuple[dict[str, Any], list[_Slot]]],
    max_norm: float | None,
    grad_scale: float,
    combine: Combine | None,
) -> Tensor | None:
    """The same step in PyTorch (foreach).  With ``max_norm`` it reads the norm on the host, waiting for the device."""
    wide = [[slot.grad.to(slot.master.dtype) for slot in slots] for _, slots in groups]
    norm, factor = None, grad_scale
    if max_norm is not None:
        # Accumulated in float64, as the compiled paths do between chunks: float32 loses digits on large CPU tensors.
        norms = torch._foreach_norm([grad for grads in wide for grad in grads], 2, dtype=torch.float64)
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])) * abs(grad_scale)
        norm = norm.to(torch.float32) if combine is None else combine(norm.to(torch.float32))
        value = float(norm)
        if not math.isfinite(value):
            return norm
        factor = grad_scale * min(1.0, max_norm / (value + 1e-6))
    for (group, slots), grads in zip(groups, wide):
        lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["ema_decay"]
        masters = [slot.master for slot in slots]
        if factor != 1.0:
            grads = list(torch._foreach_mul(grads, factor))
        first, second = [slot.exp_avg for slot in slots], [slot.exp_avg_sq for slot in slots]
        steps = [slot.step for slot in slots]
        torch._foreach_add_(steps, 1.0)
        counts = [int(step) for step in steps]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_mul_(denominators, [1 / math.sqrt(1 - beta2**t) for t in counts])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(masters, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(masters, first, denominators, [-lr / (1 - beta1**t) for t in counts])
        if decay is not None:
            torch._foreach_lerp_([cast(Tensor, slot.ema) for slot in slots], masters, 1 - decay)
        for slot in slots:
            if slot.working is not None:
                slot.working.copy_(slot.master)
    return norm
