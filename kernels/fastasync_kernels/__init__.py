"""Fused operations of fastasync: a PyTorch reference and Triton kernels behind the same function names.

Importing this package needs nothing but the standard library; ``select`` imports what is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KINDS = ("auto", "triton", "reference")


class KernelUnavailable(ValueError):
    """The kernels asked for cannot run here; the message says what is missing and what to choose instead."""


def select(kind: str, device: torch.device | str) -> ModuleType:
    """The module that holds every fused operation under reference.py's function names.

    ``kind``: ``reference`` is plain PyTorch; ``triton`` is the fused kernels; ``auto`` is the kernels on a CUDA device
    where Triton is installed and the reference anywhere else.  Both kinds draw the same noise and give the same
    results to rounding, so a checkpoint never depends on the choice.  The first time in a process the compiled kernels
    are compared with their reference on this device; if they differ, ``auto`` warns and takes the reference.

    Raises KernelUnavailable for an unknown kind, and for ``triton`` where Triton is missing or ``device`` is not CUDA
    (unless Triton's interpreter is on: ``TRITON_INTERPRET=1``).
    """
    if kind not in KINDS:
        raise KernelUnavailable(f"kernels: {kind!r} is none of {', '.join(KINDS)}")
    cuda = str(device).startswith("cuda")
    if kind == "reference" or (kind == "auto" and not (cuda and _has_triton())):
        return importlib.import_module(".reference", __name__)
    if not _has_triton():
        raise KernelUnavailable("kernels: triton is not installed; pip install triton, or choose kernels=reference")
    if not cuda and not importlib.import_module("._common", __name__).INTERPRET:
        raise KernelUnavailable(f"kernels: triton needs a CUDA device, not {device}; choose kernels=reference")
    fault = _fault(str(device)) if cuda else ""
    if fault and kind == "auto":
        warnings.warn(f"kernels: not used, they disagree with their reference on {device}: {fault}", stacklevel=2)
        return importlib.import_module(".reference", __name__)
    if fault:
        raise KernelUnavailable(f"kernels: wrong results on {device}: {fault}; choose kernels=reference")
    return importlib.import_module(".triton_ops", __name__)


@functools.cache
def _fault(device: str) -> str:
    if not importlib.import_module("torch").cuda.is_available():
        return ""  # planning for another machine: there is nothing to compare on
    return importlib.import_module(".selfcheck", __name__).disagreement(device)


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] without a spec: a stub, not the package
        return False
