"""What the Triton kernels share: argument checks, the generator on the device, and cases for offline compilation.

Every kernel file has the same order: formula, kernels, launchers, torch.library op with its autograd, public
function, OFFLINE cases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET: bool = bool(triton.knobs.runtime.interpret)  # kernels run on CPU tensors, element by element in numpy
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


class OfflineCase(NamedTuple):
    """One build of a kernel that must compile for sm_90 without a GPU.

    ``signature``: run-time argument -> Triton type ("*bf16", "*fp32", "i32", "i64", "fp32"); ``constexprs``: the rest,
    and launch options (num_warps, maxnreg), which go before the field of that name.
    Pointers are taken as 16-byte aligned, and so are the integers named in ``divisible`` as multiples of 16.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    divisible: tuple[str, ...] = ()


class Launch(NamedTuple):
    """How one kernel is launched.  Every module names its own once, at its top; ``bench.tune`` measures others.

    ``chunk``: rows (tokens, samples) that one program walks over, ``rows`` of them at a time; ``stages``: how many of
    these steps are in flight at once (1: nothing is fetched ahead); ``columns``: features per program where a row is
    divided.  ``warps`` 0: as many as the width asks for.  ``maxnreg``: most registers a thread may have.
    """

    chunk: int = 1
    rows: int = 1
    stages: int = 3
    warps: int = 0
    maxnreg: int | None = None
    columns: int = 0

    def options(self, warps: int) -> dict[str, int]:
        """Triton's own launch options; ``warps`` where this launch leaves their number open."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.warps or warps, **limit}


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> None:
    """Refuse a wrong dtype (TypeError), a wrong shape or device (ValueError) before anything is launched.

    ``shape``: expected sizes, -1 for any.  Without ``device`` the tensor's own device must be able to run the kernels.
    """
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if shape is not None and (
        tensor.dim() != len(shape) or any(want not in (-1, have) for want, have in zip(shape, tensor.shape))
    ):
        raise ValueError(f"{name} must have shape {list(shape)} (-1: any), not {list(tensor.shape)}")
    if device is None:
        if tensor.device.type != "cuda" and not (INTERPRET and tensor.device.type == "cpu"):
            raise ValueError(f"{name} is on {tensor.device}: the Triton kernels need CUDA; choose kernels=reference")
    elif tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {device}")


def check_bundle(name: str, tensor: Tensor, channels: Sequence[int], device: torch.device | None = None) -> None:
    """``tensor`` must be a floating [B, C, H, W] with C = sum(channels), every count positive."""
    check_tensor(name, tensor, FLOATS, (-1, -1, -1, -1), device)
    if not channels or any(count < 1 for count in channels):
        raise ValueError(f"channels must be positive counts, not {list(channels)}")
    if tensor.shape[1] != sum(channels):
        raise ValueError(f"{name} has {tensor.shape[1]} channels, but channels {list(channels)} sum to {sum(channels)}")
    if tensor.shape[2] * tensor.shape[3] == 0:
        raise ValueError(f"{name} has an empty grid: {list(tensor.shape)}")


def check_noise_key(step: int | Tensor, samples: Tensor, batch: int, device: torch.device) -> None:
    """What numbers the noise: ``samples`` integer [B]; ``step`` an int, or a one-element int64 tensor on the device."""
    check_tensor("samples", samples, INTEGERS, (batch,), device)
    if isinstance(step, Tensor):
        check_tensor("step", step, (torch.int64,), None, device)
        if step.numel() != 1:
            raise ValueError(f"step must be one number, not a tensor of {step.numel()}")


def split_step(step: int | Tensor) -> tuple[int, Tensor | None]:
    """A step as the operators take it: (int, None) or (0, tensor), the latter for replays of a CUDA graph."""
    return (0, step) if isinstance(step, Tensor) else (step, None)


def bounds(channels: Sequence[int], positions: int) -> tuple[int, ...]:
    """First element of each representation in a sample's flattened [C, H, W], and the total: K + 1 numbers."""
    return tuple(sum(channels[:k]) * positions for k in range(len(channels) + 1))


def signed64(seed: int) -> int:
    """A seed in [-2**63, 2**64) as the int64 with the same bits, which is what an operator's schema can hold."""
    return seed - 2**64 if seed >= 2**63 else seed


def ceil_div(size: int, part: int) -> int:
    """How many parts ``size`` needs.  Triton's own takes 1.5 microseconds, before every launch (bench/NOTES.md)."""
    return -(-size // part)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size`` (at least 1)."""
    return 1 << max(size - 1, 0).bit_length()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current CUDA device: make it the tensor's."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


# --- the generator on the device: the same numbers as reference.philox_normal -----------------------------------


@triton.jit
def philox_words(seed, step, sample, block, STREAM: tl.constexpr):
    """Philox-4x32-10 words of counter (block, sample, step, STREAM); ``block`` is a tensor, the others scalars.

    The same words as tl.philox; one 64-bit product a multiplication is one instruction, where a low and a high
    32-bit product are two.
    """
    c0 = block.to(tl.uint32)
    c1 = (c0 * 0) + sample.to(tl.uint32)
    c2 = (c0 * 0) + step.to(tl.uint32)
    c3 = (c0 * 0) + STREAM
    seed = seed.to(tl.int64)  # a small seed arrives as int32
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def unit(word):
    """32-bit word -> float32 in (0, 1): the middle of one of 2**23 equal cells, exact.

    The upper 23 bits as the fraction of a number in [1, 2), less 1 - 2**-24: no conversion, a slow instruction.
    """
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994


@triton.jit
def minus_two_log_of_unit(u):
    """-2 ln u of u = unit(word): u = 2**e (1 + f), |f| <= 1/3, and a minimax polynomial of log1p (relative error 3e-8).

    In g = -2 f, which takes the factor in.  The library's log takes care of zero, infinity and numbers below 2**-126
    too: half of its instructions and a branch.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # e 2**23
    g = (bits - exponent).to(tl.float32, bitcast=True) * -2.0 + 2.0
    q = 0.005130137 + g * (0.002186872 + g * (0.0012020525 + g * 0.0005478754))
    q = 0.24999969 + g * (0.08333299 + g * (0.031259738 + g * (0.012506973 + g * q)))
    return exponent.to(tl.float32) * -1.6525917e-07 + (g + g * (g * q))  # -2 ln 2 / 2**23


@triton.jit
def box_muller(radius_word, angle_word):
    """Two words -> two standard normals: sqrt(-2 ln u) times the cosine and the sine of 2 pi w, w = unit(angle_word).

    w is a multiple of a quarter turn plus r, |r| <= 1/8: half a quarter further the word's highest two bits count the
    quarters, and the 21 below them, as the fraction of a number in [1, 2), are 4 r + 3/2 but for the middle of a cell.
    Then minimax polynomials in 4 r (errors 5e-11 and 1.2e-9): a third of the instructions of the library's two range
    reductions, and more accurate.  A half turn's sign is set in the radius' highest bit.
    """
    radius = tl.sqrt(minus_two_log_of_unit(unit(radius_word)))
    turned = tl.add(angle_word, 0x20000000, sanitize_overflow=False)
    r = (((turned >> 7) & 0x7FFFFC) | 0x3F800000).to(tl.float32, bitcast=True) - 1.4999998
    rr = r * r
    cosine = 1.0 + rr * (-1.2337005 + rr * (0.25366926 + rr * (-0.020860288 + rr * 0.0009040218)))
    sine = r * (1.5707963 + rr * (-0.64596295 + rr * (0.079675905 + rr * -0.004592289)))
    swap = (turned & 0x40000000) != 0
    signed = (radius.to(tl.uint32, bitcast=True) ^ (turned & 0x80000000)).to(tl.float32, bitcast=True)
    return signed * tl.where(swap, -sine, cosine), signed * tl.where(swap, cosine, sine)


@triton.jit
def normals(seed, step, sample, block, STREAM: tl.constexpr):
    """Standard normals of counter blocks [..., Q] -> [..., 4 Q], in the order of reference.philox_normal."""
    w0, w1, w2, w3 = philox_words(seed, step, sample, block, STREAM)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def normals_by_eight(seed, step, sample, pair, STREAM: tl.constexpr):
    """The same numbers of counter blocks 2 pair and 2 pair + 1: [..., Q] -> [..., 8 Q].

    A thread makes 8 in a row, as it reads and writes numbers of 16 bits: they need not go through shared memory.
    """
    v0, v1, v2, v3 = philox_words(seed, step, sample, 2 * pair, STREAM)
    w0, w1, w2, w3 = philox_words(seed, step, sample, 2 * pair + 1, STREAM)
    m0, m1 = box_muller(v0, v1)
    m2, m3 = box_muller(v2, v3)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    even = tl.interleave(tl.interleave(m0, n0), tl.interleave(m2, n2))
    return tl.interleave(even, tl.interleave(tl.interleave(m1, n1), tl.interleave(m3, n3)))


@triton.jit
def normals_at(seed, step, sample, element, STREAM: tl.constexpr):
    """The same numbers at any elements, one counter block for each: four times the work, for odd grids only."""
    w0, w1, w2, w3 = philox_words(seed, step, sample, element // 4, STREAM)
    second = element % 4 >= 2
    cosine, sine = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where(element % 2 == 0, cosine, sine)


@triton.jit
def by_representation(values_ptr, element, BOUNDS: tl.constexpr):
    """The value of each element's representation: values_ptr points at K float32 numbers."""
    value = tl.zeros_like(element).to(tl.float32) + tl.load(values_ptr)
    for k in tl.static_range(1, len(BOUNDS) - 1):
        value = tl.where(element >= BOUNDS[k], tl.load(values_ptr + k), value)
    return value
