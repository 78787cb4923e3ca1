"""Work-arounds for packages that do not import, or do not work, as they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from fastasync.errors import require

# The operators whose schemas torchvision's Python files refer to at import time, as its C++ library declares them.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARIES: list[torch.library.Library] = []  # a definition lives only as long as its Library object


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled library does not load.

    PyPI's torchvision 0.28 beside a CPU build of torch fails with ``operator torchvision::nms does not exist``: its C++
    library wants CUDA, so its operators are never declared.  Only then are the schemas declared here, which is enough
    for everything but the box operators themselves.  Call this before importing torch_fidelity or timm.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        return require("torchvision", "fid")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _LIBRARIES:
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # left by the failed import
    library = torch.library.Library("torchvision", "DEF")
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    _LIBRARIES.append(library)
    return require("torchvision", "fid")


def import_torch_fidelity() -> ModuleType:
    """Import torch_fidelity (FID, KID, IS, precision and recall), with torchvision made importable first.

    Raises:
        UserError: torch-fidelity or torchvision is not installed.
    """
    import_torchvision()
    return require("torch_fidelity", "fid")


def shorten_compiler_messages() -> None:
    """Keep torch.compile from hanging where a graph uses operators of ours: only torch before 2.13 needs it.

    Before its first use of an operator without a lowering, Inductor describes the arguments for a log message, whether
    or not anybody logs it.  The description repeats every expression that an argument is computed from, as often as it
    is used: for the backward pass of a whole network that takes longer than anybody waits (seen with torch 2.11).
    Here arguments are named by their type.  2.13 describes them only when the message is shown.
    """
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 13):
        return
    from torch._inductor import exc

    exc.OperatorIssue.operator_str = staticmethod(describe_operator)  # type: ignore[method-assign]


def describe_operator(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """An operator and the types of its arguments: what a compiler's message has room for."""
    named = [type(arg).__name__ for arg in args] + [f"{name}={type(value).__name__}" for name, value in kwargs.items()]
    return f"  target: {target}\n  arguments: {', '.join(named)}"
