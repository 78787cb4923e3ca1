"""Published weights in and out: checkpoints of LWD, SFD and LightningDiT, and our own in the same layout."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastasync.errors import UserError

_WRAPPERS = {"module", "_orig_mod"}  # DistributedDataParallel and DeepSpeed; torch.compile
_WEIGHTS = ("ema", "model")
_LISTED = 3


def strip_wrappers(name: str) -> str:
    """A parameter's name without ``module.`` and ``_orig_mod.``, wherever and however often they occur."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def load_state(source: str | os.PathLike[str] | Mapping[str, Any], prefer: str = "ema") -> dict[str, Tensor]:
    """The state dict in a checkpoint, with plain names, on the CPU.

    Args:
        source: a ``.safetensors`` file, a ``torch.save`` file, or what such a file holds: ``{'ema': ...}``,
            ``{'model': ..., 'ema': ..., ...}`` or a bare state dict.
        prefer: ``ema`` or ``model``, used where the file has both; where it has only the other, that is taken with a
            warning, since averaged and raw weights score differently.

    Raises:
        UserError: no such file, truncated, not a checkpoint, or two entries with one name.
    """
    if prefer not in _WEIGHTS:
        raise UserError("prefer", prefer, f"choose one of {', '.join(_WEIGHTS)}")
    if isinstance(source, Mapping):
        label, content = "checkpoint", source
    else:
        label, content = str(source), _read(Path(source))
    present = [name for name in _WEIGHTS if isinstance(content.get(name), Mapping)]
    if present:
        chosen = prefer if prefer in present else present[0]
        if chosen != prefer:
            warnings.warn(f"{label}: no '{prefer}' weights, using '{chosen}'", stacklevel=2)
        content = content[chosen]
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(label, f"entry {name!r} is a {type(value).__name__}", "expected a state dict of tensors")
        plain = strip_wrappers(name)
        if plain in state:
            raise UserError(label, f"two entries for {plain!r}", "keep one of them")
        state[plain] = value
    if not state:
        raise UserError(label, "no weights", "expected {'ema': ...}, {'model': ...} or a state dict")
    return state


def _read(path: Path) -> Mapping[str, Any]:
    """What a checkpoint file holds; tensors are mapped, not read, until they are used."""
    if not path.is_file():
        raise UserError("checkpoint", str(path), "no such file")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler meets arbitrary bytes here, and may raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0]
        remedy = "truncated, or not a checkpoint of tensors only; download or save it again"
        raise UserError("checkpoint", str(path), f"{remedy} ({reason[:120]})") from error
    if not isinstance(content, Mapping):
        raise UserError("checkpoint", str(path), f"holds a {type(content).__name__}, expected a state dict")
    return content


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Copy a state dict (of ``load_state``) into a model, strictly: the same names and the same shapes.

    ``pos_embed`` and the RoPE tables are part of the state dict, as in the published files, and are taken from it.
    The model may be compiled or wrapped.  Nothing is copied unless everything fits.

    Raises:
        UserError: another architecture; names the first missing, unexpected and differently shaped entries.
    """
    check_fits(model, state, source)
    own = {strip_wrappers(name): name for name in model.state_dict()}
    model.load_state_dict({own[name]: value for name, value in state.items()})


def check_fits(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raises the UserError of ``load_into``.  The model may be on the meta device."""
    shapes = {strip_wrappers(name): tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [
        f"{name} {tuple(state[name].shape)} in the file, {shape} in the model"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    findings = {
        "missing": [name for name in shapes if name not in state],
        "unexpected": [name for name in state if name not in shapes],
        "shape": wrong,
    }
    if any(findings.values()):
        text = "; ".join(f"{kind}: {_first(found)}" for kind, found in findings.items() if found)
        remedy = f"{text}; set the model's size, patch, channels and REPA projector as in the file"
        raise UserError(source, "weights of another architecture", remedy)


def _first(found: Iterable[str]) -> str:
    listed = list(found)
    more = f" (and {len(listed) - _LISTED} more)" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def export_state(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The published layout ``{'ema': state_dict}`` of a model's weights: plain names, copies on the CPU."""
    return {"ema": {strip_wrappers(name): value.detach().cpu().clone() for name, value in model.state_dict().items()}}
