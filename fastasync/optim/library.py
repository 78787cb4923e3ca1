"""The compiled AdamW (csrc/), reached through ctypes: one library for CUDA and its twin for the CPU.

Both are optional: without them ``FusedAdamW`` runs the same step in PyTorch.  ``pip install`` builds the CPU library
when there is a C++ compiler and the CUDA one when there is nvcc.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ABI = 1  # kAbi in csrc/adamw.h
_STATUS_FIELDS, _NORM = 3, 0  # StatusField in csrc/adamw.h
GRAD = 1  # its column in a table of entries
Row = tuple[int, int, int, int, int, int, int, int, int]  # struct Entry in csrc/adamw.h


class Hyper(ctypes.Structure):
    """``struct Hyper`` of csrc/adamw.h."""

    _fields_ = [
        *(
            (name, ctypes.c_double)
            for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "ema_decay", "grad_scale")
        ),
        ("lr_tensor", ctypes.c_void_p),
    ]


def entry(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    working: Tensor | None,
    step: Tensor,
) -> Row:
    """The addresses of one parameter's tensors, in the order of ``struct Entry``."""
    return (
        master.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        0 if ema is None else ema.data_ptr(),
        0 if working is None else working.data_ptr(),
        step.data_ptr(),
        master.numel(),
        int(grad.dtype == torch.bfloat16),
    )


def status_of(norm: Tensor, grad_scale: float, max_norm: float) -> Tensor:
    """What ``Library.norm`` would give as status for this ``norm`` (0-d), as finish_norm in csrc/adamw.h does."""
    finite = norm.isfinite()
    factor = grad_scale * (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    return torch.stack([norm.double(), factor.masked_fill(~finite, 0.0), (~finite).double()]).to(torch.float32)


class Library:
    """One loaded library.  No call waits for the device; the caller keeps the tensors alive until the call returns."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        library.fastasync_adamw_abi.restype = ctypes.c_int
        if library.fastasync_adamw_abi() != ABI:
            raise OSError(f"{path} was built from other sources than this package")
        pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        library.fastasync_adamw_chunk.restype = whole
        library.fastasync_adamw_error.restype = ctypes.c_char_p
        library.fastasync_adamw_error.argtypes = [ctypes.c_int]
        library.fastasync_adamw_norm.argtypes = [pointer, whole, real, real, pointer, pointer, ctypes.c_int, pointer]
        library.fastasync_adamw_step.argtypes = [pointer, whole, pointer, pointer, pointer, ctypes.c_int, pointer]
        self._library = library
        self._chunk = int(library.fastasync_adamw_chunk())
        self._check(library.fastasync_adamw_ready())

    def _check(self, code: int) -> None:
        if code != 0:
            raise OSError(f"fused AdamW: {self._library.fastasync_adamw_error(code).decode()} (code {code})")

    @staticmethod
    def _where(device: torch.device) -> tuple[int, int | None]:
        """``place`` and ``stream`` of csrc/adamw.h."""
        if device.type == "cpu":
            return torch.get_num_threads(), None
        index = torch.cuda.current_device() if device.index is None else device.index
        return index, torch.cuda.current_stream(index).cuda_stream

    def norm(
        self, table: np.ndarray, grad_scale: float, max_norm: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The 2-norm of ``grad_scale * gradient`` over all rows of ``table`` (int64 [n, 9], see ``entry``).

        Returns (norm, status): a 0-d float32 tensor on ``device``, and what ``step`` needs.
        """
        chunks = int((-(-table[:, 7] // self._chunk)).sum())
        partials = torch.empty(chunks, dtype=torch.float64, device=device)
        status = torch.empty(_STATUS_FIELDS, dtype=torch.float32, device=device)
        self._check(
            self._library.fastasync_adamw_norm(
                table.ctypes.data,
                len(table),
                grad_scale,
                max_norm,
                partials.data_ptr(),
                status.data_ptr(),
                *self._where(device),
            )
        )
        return status[_NORM], status

    def step(self, table: np.ndarray, hyper: Hyper, status: Tensor | None, device: torch.device) -> None:
        """One update of one parameter group, or nothing when ``status`` says that the norm is not finite."""
        factors = torch.empty(len(table), 4, dtype=torch.float32, device=device)
        self._check(
            self._library.fastasync_adamw_step(
                table.ctypes.data,
                len(table),
                ctypes.addressof(hyper),
                None if status is None else status.data_ptr(),
                factors.data_ptr(),
                *self._where(device),
            )
        )


@functools.cache
def load(device_type: str) -> Library | None:
    """The library for "cuda" or "cpu", or None when it was not built.  An unusable one is warned about, once."""
    path = Path(__file__).with_name(f"_adamw_{device_type}.so")
    if not path.exists():
        return None
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        warnings.warn(f"{error}; fused AdamW runs in PyTorch instead (rebuild: pip install -e .)", stacklevel=2)
        return None
