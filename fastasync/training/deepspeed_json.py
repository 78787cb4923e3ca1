"""DeepSpeed's configuration: made from ours, with a user's own JSON merged in.  A contradiction is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastasync.config import Config
from fastasync.errors import UserError

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
    if train.zero in (1, 2) and leaves_reduction_to_us(config):
        ours["zero_optimization"] |= {"contiguous_gradients": False, "overlap_comm": False}  # no buckets of its own
    if train.deepspeed_config:
        _merge(ours, _read(train.deepspeed_config), Path(train.deepspeed_config), "")
    return ours


def leaves_reduction_to_us(config: Config) -> bool:
    """Whether the user's JSON, if there is one, says nothing about how ZeRO 1 and 2 reduce gradients."""
    theirs = _read(config.train.deepspeed_config) if config.train.deepspeed_config else {}
    return not _REDUCTION.intersection(theirs) and set(theirs.get("zero_optimization", {})) <= {"stage"}


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("train.deepspeed_config", path, f"cannot be read as JSON ({error})") from None
    if not isinstance(theirs, dict):
        raise UserError("train.deepspeed_config", path, "needs a JSON object")
    if not isinstance(theirs.get("zero_optimization", {}), dict):
        raise UserError("train.deepspeed_config", f"{path}: zero_optimization", "needs a JSON object")
    return theirs


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
