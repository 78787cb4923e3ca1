"""A linear layer whose weight's gradient is computed in parts: ``dw = sum_p g_p^T x_p`` over parts of the rows.

A product [N, M] x [M, K] of very many rows M and a small result is divided into tiles of the result, and a GPU takes as
long for a last, partly filled round of tiles as for a full one: XL's w12 (6,144 x 1,152) makes 192 tiles of 192 x 192
for 132 multiprocessors.  As a batch of products over parts of the rows it makes 2 or 4 times as many, at the price of
a sum of the parts, each rounded to the weight's dtype (bench/NOTES.md, 2026-11-25).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .zeros import NO_ZEROS, Zeros

PARTS = (1, 2, 4)
GAIN = 0.97  # of the undivided product's time: what is worth another rounding
WORTH_MEASURING = 1e10  # FLOPs: a smaller product takes microseconds
_log = logging.getLogger(__name__)
_choices: dict[tuple[Any, ...], int] = {}


def weight_gradient(g: Tensor, x: Tensor, parts: int) -> Tensor:
    """``g^T x`` in g's dtype for g [M, N] and x [M, K]; ``parts`` divides M."""
    if parts == 1:
        return g.t() @ x
    rows = g.shape[0] // parts
    return torch.bmm(g.unflatten(0, (parts, rows)).transpose(1, 2), x.unflatten(0, (parts, rows))).sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, zeros: Zeros) -> Tensor:
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        ctx.parts, ctx.zeros, ctx.dtypes = parts, zeros, (weight.dtype, None if bias is None else bias.dtype)
        return F.linear(x, zeros.beside(half), None if bias is None else zeros.beside(bias.to(x.dtype)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        g = grads[0].flatten(0, -2)
        dx = dw = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (g @ ctx.zeros.beside_again(weight)).unflatten(0, x.shape[:-1])
        if ctx.needs_input_grad[1]:
            dw = ctx.zeros.without(weight_gradient(g, x.flatten(0, -2), ctx.parts)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            dbias = ctx.zeros.without(g.sum(0)).to(ctx.dtypes[1])
        return dx, dw, dbias, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, zeros: Zeros = NO_ZEROS) -> Tensor:
    """``F.linear`` in x's dtype for x [M, ..., K], weight [N, K] and bias [N], with the weight's gradient as above.

    Gradients have the dtypes of what they are of.  ``parts`` must divide the number of rows (ValueError).
    ``zeros``: beside weight and bias, made for each product; x and the result have as many features more.
    """
    rows = x.shape[:-1].numel()
    if parts < 1 or rows % parts:
        raise ValueError(f"parts {parts} must divide the {rows} rows of x")
    return _Linear.apply(x, weight, bias, parts, zeros)


def choose_parts(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many parts are fastest for the gradient of a weight [outputs, inputs] over ``rows`` rows.

    Measured once in a process on a CUDA device, and logged; 1 elsewhere, for small products and where memory is short.
    """
    if device.type != "cuda" or 2.0 * rows * outputs * inputs < WORTH_MEASURING:
        return 1
    key = (torch.cuda.get_device_name(device), dtype, rows, outputs, inputs)
    if key not in _choices:
        try:
            times = _measure(rows, outputs, inputs, dtype, device)
        except torch.cuda.OutOfMemoryError:
            return 1
        best = min(times, key=times.__getitem__)
        _choices[key] = best if times[best] < GAIN * times[1] else 1
        listing = ", ".join(f"{parts}: {ms:.3f} ms" for parts, ms in times.items())
        _log.info("gradient of a weight [%d, %d]: %d parts (%s)", outputs, inputs, _choices[key], listing)
    return _choices[key]


def _measure(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> dict[int, float]:
    """Parts -> median milliseconds, by turns."""
    with torch.cuda.device(device):
        g = torch.randn(rows, outputs, dtype=dtype, device=device)
        x = torch.randn(rows, inputs, dtype=dtype, device=device)
        times: dict[int, list[float]] = {parts: [] for parts in PARTS if rows % parts == 0}
        for _ in range(8):
            for parts, found in times.items():
                found.append(_milliseconds(lambda parts=parts: weight_gradient(g, x, parts)))  # type: ignore[misc]
        return {parts: statistics.median(found[2:]) for parts, found in times.items()}


def _milliseconds(call: Callable[[], Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
