"""Label dropout for guidance: ``y -> null_class`` where the uniform number of (seed, step, sample) is below ``rate``.

One launch for the batch, the generator of reference.philox_uniform in the kernel; in PyTorch the same is 146 launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    OfflineCase,
    ceil_div,
    check_noise_key,
    check_tensor,
    on_device,
    philox_words,
    signed64,
    split_step,
    unit,
)
from .reference import LABEL_DROPOUT_STREAM

BLOCK = 128


@triton.jit(do_not_specialize=["null_class", "seed", "step"])
def _kernel(
    y_ptr,
    samples_ptr,
    out_ptr,
    count,
    null_class,
    rate,
    seed,
    step,
    STREAM: tl.constexpr,
    STEP_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if STEP_TENSOR:
        step = tl.load(step)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    samples = tl.load(samples_ptr + place, inside, 0)
    words = philox_words(seed, step, samples, tl.zeros([BLOCK], tl.int32), STREAM)
    y = tl.load(y_ptr + place, inside, 0)
    tl.store(out_ptr + place, tl.where(unit(words[0]) < rate, null_class.to(tl.int64), y), inside)


@torch.library.custom_op("fastasync::drop_labels", mutates_args=())
def _op(
    y: Tensor, null_class: int, rate: float, seed: int, step: int, step_tensor: Tensor | None, samples: Tensor
) -> Tensor:
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if len(y):
        with on_device(y):
            _kernel[(ceil_div(len(y), BLOCK),)](
                y.contiguous(), samples.contiguous(), out, len(y), null_class, rate, seed,
                step if step_tensor is None else step_tensor,
                STREAM=LABEL_DROPOUT_STREAM, STEP_TENSOR=step_tensor is not None, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return out


@_op.register_fake
def _(y, null_class, rate, seed, step, step_tensor, samples):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def drop_labels(y: Tensor, null_class: int, rate: float, seed: int, step: int | Tensor, samples: Tensor) -> Tensor:
    """y [B] int64 with labels replaced by ``null_class``, each with probability ``rate``; as the reference's.

    samples [B] integer; ``step`` an int or a one-element int64 tensor on the device (for CUDA graphs).  TypeError for a
    dtype, ValueError for a shape or device, before any launch.
    """
    check_tensor("y", y, (torch.int64,), (-1,))
    check_noise_key(step, samples, len(y), y.device)
    value, tensor = split_step(step)
    return _op(y, null_class, float(rate), signed64(seed), value, tensor, samples)


OFFLINE = [
    OfflineCase(
        _kernel,
        {
            "y_ptr": "*i64",
            "samples_ptr": "*i64",
            "out_ptr": "*i64",
            "count": "i32",
            "null_class": "i32",
            "rate": "fp32",
            "seed": "i64",
            "step": step,
        },
        {"STREAM": LABEL_DROPOUT_STREAM, "STEP_TENSOR": step != "i64", "BLOCK": BLOCK},
    )
    for step in ("i64", "*i64")
]
