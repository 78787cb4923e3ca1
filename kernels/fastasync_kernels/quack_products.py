"""The products of ``gated_mlp`` by quack-kernels (Hopper's wgmma and TMA through the CUTLASS DSL).  Imports quack.

    gated            [a, b] = x w^T + bias;  out = silu(a) b
    gated_backward   dout = g w;  [da, db] = dout [b s (1 + a (1 - s)), a s],  s = 1 / (1 + exp(-a));  their sums over
                     the rows;  out again

quack pairs neighbouring columns: gate and up come by turns, [a0, b0, a1, b1, ..], in the rows of w and bias and in the
columns of packed and its gradient.  The sums come from the epilogue too, so nothing reads the gradient for them.
"""

from __future__ import annotations

from typing import Any

import torch
from quack.activation import dswiglu
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.epilogue.ops import RowVecReduce
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_gated
from torch import Tensor


@gemm_epilogue(
    outputs=("activation",),
    reduces={"a_sum": RowVecReduce("a_sum"), "b_sum": RowVecReduce("b_sum")},
    mode="packed_cd_b16x2",
)
def swiglu_gradient(acc, c):
    """acc: dout; c: a and b, two 16-bit numbers in the place of one of 32."""
    a, b = unpack(c)
    da, db, activation = dswiglu(a, b, acc)
    return {"D": pack(da, db), "activation": activation, "a_sum": da, "b_sum": db}


def hopper(rows: int, columns: int, pingpong: bool = True, cluster: tuple[int, int] = (2, 1)) -> Any:
    """A configuration for compute capability 9: tile, whether two groups of warps take tiles by turns, cluster."""
    return GemmConfig(
        tile_m=rows, tile_n=columns, pingpong=pingpong, cluster_m=cluster[0], cluster_n=cluster[1],
        is_dynamic_persistent=False, device_capacity=9,
    )  # fmt: skip


# fastest on an H200 at XL's shapes (bench/NOTES.md); constants, for quack knows its launches by these objects
FORWARD, BACKWARD = hopper(128, 192), hopper(128, 128)


def _config(tensor: Tensor, wanted: Any) -> Any:
    """``wanted`` where it was measured, elsewhere None: quack's own choice."""
    hopper_here = tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device)[0] == 9
    return wanted if hopper_here else None


def gated(x: Tensor, w: Tensor, bias: Tensor, keep: bool, config: Any = FORWARD) -> tuple[Tensor | None, Tensor]:
    """packed [M, 2 F] (None unless ``keep``) and out [M, F] for x [M, K], w [2 F, K] and bias [2 F], all bf16."""
    chosen = _config(x, config)
    return gemm_gated(x, w.t(), bias=bias, activation="swiglu", store_preact=keep, tuned=False, config=chosen)


def gated_backward(g: Tensor, w: Tensor, packed: Tensor, config: Any = BACKWARD) -> tuple[Tensor, Tensor, Tensor]:
    """packed's gradient [M, 2 F], out [M, F], and the gradient's sum over the rows, float32 [2 F]: da's, then db's.

    g [M, N], w [N, F] and packed [M, 2 F], all bf16.
    """
    found = swiglu_gradient(g, w, packed, config=_config(g, config), tuned=False)
    return found["D"], found["activation"], torch.cat([found["a_sum"], found["b_sum"]])
