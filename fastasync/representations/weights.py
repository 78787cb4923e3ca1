"""Weight files of other people's networks: read without running what is in them, loaded strictly."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastasync.compat import import_torchvision
from fastasync.errors import UserError, require, unknown_name

PRECISIONS = ("float32", "bfloat16")
_WRAPPERS = ("state_dict", "teacher", "ema", "model")  # where training checkpoints keep the weights
_LISTED = 3


class _Inert:
    """Stands for any class that a checkpoint pickles beside its tensors (callbacks, configurations)."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def import_model_package(package: str) -> ModuleType:
    """Import timm or diffusers.  UserError, naming the extra, when it is not installed."""
    import_torchvision()  # both import it, and it does not always import as it is
    return require(package, "imagenet")


def read_weights(path: str | Path, field: str, remedy: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``torch.save`` file, or of its ``state_dict`` or ``model``, on the CPU.

    No code of the file is run.  UserError, with ``remedy``, when it is not given, missing, cut short or has no tensors.
    """
    if not str(path):
        raise UserError(field, "(not given)", remedy)
    path = Path(path)
    if not path.is_file():
        raise UserError(field, path, f"no such file: {remedy}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:  # the reader meets arbitrary bytes here, and may raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        raise UserError(field, path, f"cut short, or not a file of weights ({reason}): {remedy}") from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(field, path, f"no weights in it: {remedy}")
    return tensors


def _unpickle(path: Path) -> Any:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if zipfile.is_zipfile(path) else []
    with torch.serialization.safe_globals([(_Inert, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], field: str, path: object, remedy: str) -> None:
    """Put float32 weights into a model (which may be on the meta device): the same names and the same shapes.

    UserError that names the first missing, unexpected and differently shaped entries.
    """
    own = model.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "shape": [
            f"{name} {list(state[name].shape)}, expected {list(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(wrong.values()):
        text = "; ".join(f"{kind}: {_first(found)}" for kind, found in wrong.items() if found)
        raise UserError(field, path, f"weights of another architecture ({text}): {remedy}")
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    model.load_state_dict(floats, assign=True)


def _first(found: Sequence[str]) -> str:
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def check_precision(field: str, precision: str) -> None:
    """UserError unless it is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise unknown_name(f"{field}: precision", precision, PRECISIONS)


def checked_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``.  UserError for another one, and for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError("--device", name, "use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            "--device", name, f"there are {count} CUDA devices here" if count else "no CUDA device is here: use cpu"
        )
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which matrix products and convolutions run in ``precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
