"""The casts to fp8 of activations and gradients, in the forms that XL's step and sampling launch them (``fp8_casts``).

Rows alone for passes without gradients; rows, with the columns' largest magnitudes, and then columns where nobody has
found magnitudes before; both ways at once where the tensor's writer has, without (``both``) and with a hint.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from fastasync_kernels import reference
from fastasync_kernels.fp8_linear import ADALN_PARTS, QKNORM_PARTS
from torch import Tensor

from bench.harness import Bench, Operation, WrongResult, tensors_of
from bench.subjects.common import Random, dtypes, kernels, short, sizes
from fastasync.errors import UserError
from fastasync.training.build import check_fp8

SWIGLU_PARTS = 3  # that XL's hidden width is divided into (fastasync_kernels.swiglu)


class Case(NamedTuple):
    """One cast: of how many columns, in PyTorch and by the kernels, the bytes that it writes for each number.

    ``inputs`` makes its arguments from x [M, columns].
    """

    name: str
    columns: int
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: Callable[[Tensor], list[Any]]
    written: int


def by_kernels() -> ModuleType:
    from fastasync_kernels import fp8_casts  # imports triton

    return fp8_casts


def column_tops(x: Tensor) -> Tensor:
    return x.abs().amax(0).float()


def row_tops(x: Tensor, parts: int) -> Tensor:
    """[M, parts]"""
    return torch.stack([part.abs().amax(1) for part in x.chunk(parts, 1)], 1).float()


def hint_of(x: Tensor, parts: int) -> Tensor:
    """What a hint's reader sends back: the magnitudes of all of x."""
    return torch.cat([row_tops(x, parts).flatten(), column_tops(x), torch.ones(1, device=x.device)])


def plain_both(x: Tensor, sums: bool = False) -> tuple[Tensor, ...]:
    rows, scale, top = reference.cast_rows(x, True)
    total = x.sum(0, dtype=torch.float32) if sums else x.new_empty(0)
    return rows, scale, *reference.cast_columns(x, top), *((total,) if sums else ())


def cases(width: int, hidden: int) -> list[Case]:
    """Of a block of this width and hidden width: the parts are those of the operations that write the tensors."""

    def rows(name: str, columns: int, tops: bool) -> Case:
        plain, fast = (lambda x, of=of: of().cast_rows(x, tops) for of in (lambda: reference, by_kernels))
        return Case(name, columns, plain, fast, lambda x: [x], 1)

    def both(columns: int, parts: int) -> Case:
        def fast(x: Tensor, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, ...]:
            return by_kernels().cast_both(x, by_kernels().Tops(of_rows, of_columns))

        def inputs(x: Tensor) -> list[Any]:
            return [x, row_tops(x, parts), column_tops(x)]

        return Case("both", columns, lambda x, *_: plain_both(x), fast, inputs, 2)

    def hinted(columns: int, parts: int) -> Case:
        def fast(x: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
            return by_kernels().cast_hinted(x, hint, parts, True)

        name = "both, hinted, sums"
        return Case(name, columns, lambda x, _: plain_both(x, True), fast, lambda x: [x, hint_of(x, parts)], 2)

    def columns(x: Tensor, top: Tensor) -> tuple[Tensor, ...]:
        return by_kernels().cast_columns(x, top)

    return [
        rows("rows", width, False),
        rows("rows", hidden, False),
        rows("rows, tops", width, True),
        Case("columns", width, reference.cast_columns, columns, lambda x: [x, column_tops(x)], 1),
        both(width, ADALN_PARTS),
        both(hidden, SWIGLU_PARTS),
        both(2 * hidden, SWIGLU_PARTS),
        hinted(width, ADALN_PARTS),
        hinted(3 * width, QKNORM_PARTS),
    ]


def check_bits(case: Case, x: Tensor) -> None:
    """Casts are exact: every byte in fp8 is PyTorch's.  Raises WrongResult."""
    inputs = case.inputs(x)
    for found, known in zip(tensors_of(case.ours(*inputs)), tensors_of(case.plain(*inputs))):
        if found.dtype == reference.FP8 and not torch.equal(found.view(torch.uint8), known.view(torch.uint8)):
            count = int((found.view(torch.uint8) != known.view(torch.uint8)).sum())
            raise WrongResult(f"{case.name}, {case.columns} columns: {count} numbers in fp8 are not the reference's")


def run(bench: Bench) -> None:
    if not bench.small:
        try:
            check_fp8(bench.device)
        except UserError as error:
            bench.skip("fp8_casts", str(error))
            return
    size, batch = sizes(bench), 2 if bench.small else 256
    with_kernels = kernels(bench, "fp8_casts") is not None
    for dtype in dtypes(bench):
        for case in cases(size["width"], size["hidden"]):

            def make(seed: int, batch: int, case: Case = case, dtype: torch.dtype = dtype) -> list:
                x = Random(bench.device, seed, dtype)(batch * size["tokens"], case.columns)
                return case.inputs(x)

            found = {"reference": case.plain}
            if not bench.small:
                found["reference compiled"] = torch.compile(case.plain, dynamic=False)
            if with_kernels:
                check_bits(case, make(0, batch)[0])
                found["triton"] = case.ours
            rows = batch * size["tokens"]
            bench.operation(
                Operation(
                    *("fp8_casts", case.name, f"[{rows}, {case.columns}]", short(dtype)),
                    *(found, make, batch, rows * case.columns * (dtype.itemsize + case.written)),
                    check_batch=batch,  # compiling takes seconds: one shape
                )
            )
