"""Work-arounds for packages that do not import as they are."""

from __future__ import annotations

import sys
from types import ModuleType

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
