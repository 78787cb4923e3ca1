"""DeepSpeed's configuration: made from ours, with a user's own JSON merged in.  A contradiction is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastasync.config import Config
from fastasync.errors import UserError, unknown_name
from fastasync.model import Zero
from fastasync.training.build import trains_working_weights

# What DeepSpeed's JSON may not decide, because a field of ours does.  Keys with dots are nested.
_OURS = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.batch / (ranks x train.accumulate)",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip",
    "zero_optimization.stage": "train.zero",
    "optimizer": "train.optimizer, train.lr, train.betas, train.weight_decay",
    "scheduler": "train.lr, train.warmup",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.memory",
    "compile": "train.compile",
    "zero_allow_untested_optimizer": "train.optimizer",
    "managed_gradient_accumulation": "train.accumulate",
}

# Besides what stands under zero_optimization, what DeepSpeed's own reduction reads.
_REDUCTION = {
    "communication_data_type",
    "data_types",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "prescale_gradients",
    "sparse_gradients",
    "sequence_parallel_size",
    "tensor_parallel",
    "zenflow",
}

# Fields of zero_optimization that keep on the host what our optimizer updates on the device.
_OFFLOADS = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", "cpu_offload_params")


# What deepspeed.initialize reads itself, besides its DeepSpeedConfig.
_INITIALIZE = {"data_parallel_size", "sequence_parallel_size"}


class Asked(dict[str, Any]):
    """Settings that note which of their names, given or not, a reader has asked for: those that DeepSpeed knows."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return self  # `name in settings.keys()` is a way of asking


def check_known(config: Config, asked: Asked) -> None:
    """Raises UserError for a name in the user's JSON that DeepSpeed, which has read ``asked``, would not notice."""
    known = asked.names | _INITIALIZE
    for name in _read(config.train.deepspeed_config):
        if name not in known:
            raise unknown_name(f"train.deepspeed_config: {config.train.deepspeed_config}", name, known)


def deepspeed_json(config: Config, world: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` receives for ``world`` ranks.

    Weights stay float32 in DeepSpeed's eyes: ``train.precision`` is autocast, exactly as in the plain engine, so that
    one checkpoint serves both.  A value "auto" in the user's file stands for ours.

    Raises:
        UserError: ``train.deepspeed_config`` cannot be read, or contradicts a field; names both.
    """
    train = config.train
    ours: dict[str, Any] = {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": train.batch // (world * train.accumulate),
        "gradient_accumulation_steps": train.accumulate,
        "gradient_clipping": train.clip,
        "zero_optimization": {"stage": train.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before and after every step
    }
    if train.zero in (1, 2) and not reduction_fields(config):
        ours["zero_optimization"] |= {"contiguous_gradients": False, "overlap_comm": False}  # no buckets of its own
    if train.deepspeed_config:
        _merge(ours, _read(train.deepspeed_config), Path(train.deepspeed_config), "")
    return ours


def reduction_fields(config: Config) -> list[str]:
    """What the user's JSON, if there is one, says about how ZeRO 1 and 2 reduce gradients; none: it is left to us."""
    theirs = _read(config.train.deepspeed_config) if config.train.deepspeed_config else {}
    nested = set(theirs.get("zero_optimization", {})) - {"stage", *_OFFLOADS}
    return sorted(_REDUCTION.intersection(theirs)) + [f"zero_optimization.{name}" for name in sorted(nested)]


def zero_of(config: Config, device: torch.device, world: int) -> Zero:
    """How a DeepSpeed run of ``world`` ranks on ``device`` divides its memory."""
    stage = config.train.zero
    working = stage in (1, 2) and not reduction_fields(config) and trains_working_weights(config, device)
    return Zero(stage, world, working)


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("train.deepspeed_config", path, f"cannot be read as JSON ({error})") from None
    if not isinstance(theirs, dict):
        raise UserError("train.deepspeed_config", path, "needs a JSON object")
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError("train.deepspeed_config", f"{path}: zero_optimization", "needs a JSON object")
    for name in _OFFLOADS:
        value = zero.get(name)
        if value and value != "none" and not (isinstance(value, dict) and value.get("device", "none") == "none"):
            given = f"{path} sets zero_optimization.{name} = {json.dumps(value)}"
            remedy = "our optimizer updates on the device: leave it out; train.zero=3 and train.memory=full need less"
            raise UserError("train.deepspeed_config", given, remedy)
    return {**theirs, "zero_optimization": {name: value for name, value in zero.items() if name not in _OFFLOADS}}


def _merge(ours: dict[str, Any], theirs: dict[str, Any], path: Path, prefix: str) -> None:
    for key, value in theirs.items():
        name = prefix + key
        if value == "auto" and name in _OURS:
            continue
        if isinstance(ours.get(key), dict) and isinstance(value, dict):
            _merge(ours[key], value, path, f"{name}.")
        elif name in _OURS and not (key in ours and value == ours[key]) and not _is_off(value):
            field = _OURS[name]
            given = f" ({ours[key]})" if key in ours else ""
            raise UserError(
                "train.deepspeed_config",
                f"{path} sets {name} = {json.dumps(value)}",
                f"{field}{given} decides this: change the field and leave {name} out of the file",
            )
        elif name not in _OURS:
            ours[key] = value


def _is_off(value: Any) -> bool:
    return isinstance(value, dict) and value.get("enabled") is False
