"""The backward epilogue of ``quack_products`` without the activation: what it costs to write that.  Imports quack."""

from __future__ import annotations

from quack.activation import dswiglu
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.epilogue.ops import RowVecReduce


@gemm_epilogue(reduces={"a_sum": RowVecReduce("a_sum"), "b_sum": RowVecReduce("b_sum")}, mode="packed_cd_b16x2")
def gradient_alone(acc, c):
    a, b = unpack(c)
    da, db, _ = dswiglu(a, b, acc)
    return {"D": pack(da, db), "a_sum": da, "b_sum": db}
