"""The casts to fp8 of activations and gradients, in the forms that XL's step and sampling launch them (``fp8_casts``).

Rows alone for passes without gradients; rows, with the columns' largest magnitudes, and then columns where nobody has
found magnitudes before; both ways at once where the tensor's writer has, without (``both``) and with a hint.  And the
writers: adaLN and QK-norm's backward with magnitudes, SwiGLU and its backward with their casts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from fastasync_kernels import reference
from fastasync_kernels.fp8_linear import ADALN_PARTS, QKNORM_PARTS
from torch import Tensor

from bench.harness import Bench, Operation, WrongResult, tensors_of, with_backward
from bench.subjects.common import Random, dtypes, kernels, short, sizes
from fastasync.errors import UserError
from fastasync.model.embeddings import rope_tables
from fastasync.training.build import check_fp8

SWIGLU_PARTS = 3  # that XL's hidden width is divided into (fastasync_kernels.swiglu)


class Case(NamedTuple):
    """One operation: on how many columns, in PyTorch and by the kernels, and the fewest bytes that it moves.

    ``inputs`` makes its arguments from x [M, columns].  For each of x's numbers ``planes`` numbers of its dtype and
    ``written`` bytes of fp8 must move.  ``exact``: the first results, as kernels that have checks of their own and
    PyTorch's casts give them (default: ``plain``'s in fp8).  ``compiled``: makes the compiled ``plain``.
    """

    name: str
    columns: int
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: Callable[[Tensor], list[Any]]
    written: int
    planes: float = 1
    exact: Callable[..., Any] | None = None
    compiled: Callable[[], Callable[..., Any]] | None = None


def by_kernels() -> ModuleType:
    from fastasync_kernels import fp8_casts  # imports triton

    return fp8_casts


def column_tops(x: Tensor) -> Tensor:
    return x.abs().amax(0).float()


def tops(x: Tensor, parts: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The columns' largest magnitudes, and the rows': each side divides rows in its own way, so their parts are kept
    from the comparison of numbers (``tensors_of`` leaves dictionaries out), and compared whole by ``check_bits``."""
    return column_tops(x), {"rows": row_tops(x, parts)}


def row_tops(x: Tensor, parts: int) -> Tensor:
    """[M, parts]"""
    return torch.stack([part.abs().amax(1) for part in x.chunk(parts, 1)], 1).float()


def hint_of(x: Tensor, parts: int) -> Tensor:
    """What a hint's reader sends back: the magnitudes of all of x."""
    return torch.cat([row_tops(x, parts).flatten(), column_tops(x), torch.ones(1, device=x.device)])


def plain_both(x: Tensor, sums: bool = False) -> tuple[Tensor, ...]:
    rows, scale, top = reference.cast_rows(x, True)
    total = x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)) if sums else x.new_empty(0)
    return rows, scale, *reference.cast_columns(x, top), *((total,) if sums else ())


def adaln_case(width: int, tokens: int) -> Case:
    """The gated form with the magnitudes of what it writes, forward: as the block has it before w12."""

    def inputs(x: Tensor) -> list[Any]:
        batch = len(x) // tokens
        gate, shift, scale = (x[i * batch : (i + 1) * batch] for i in range(3))
        residual, y = (part.view(batch, tokens, width) for part in (x, x.flip(0)))
        return [residual, y, gate, 1 + 0.1 * x[0].float(), shift, scale]

    def plain(*arguments: Tensor) -> tuple[Any, ...]:
        residual, h = reference.gated_rmsnorm_modulate(*arguments)
        return residual, h, *tops(h.flatten(0, 1), ADALN_PARTS)

    def ours(*arguments: Tensor) -> tuple[Any, ...]:
        from fastasync_kernels.adaln_tops import gated_rmsnorm_modulate_tops

        residual, h, found = gated_rmsnorm_modulate_tops(*arguments)
        assert found is not None
        return residual, h, found.columns, {"rows": found.rows}

    def exact(*arguments: Tensor) -> tuple[Any, ...]:
        from fastasync_kernels.adaln import gated_rmsnorm_modulate

        residual, h = gated_rmsnorm_modulate(*arguments)
        return residual, h, *tops(h.flatten(0, 1), ADALN_PARTS)

    return Case("adaln gated, tops", width, plain, ours, inputs, 0, 4, exact)


def qknorm_case(width: int, tokens: int, heads: int) -> Case:
    """Forward, and the backward pass with the magnitudes of dqkv as the gradient of a hint."""
    head = width // heads

    def inputs(x: Tensor) -> list[Any]:
        batch = len(x) // tokens
        weights = [(1 + 0.1 * x[i, :head].float()).requires_grad_() for i in range(2)]
        tables = [table.to(x.device) for table in rope_tables(head, int(tokens**0.5))]
        upstream = x.flip(0).view(batch, tokens, 3, heads, head).unbind(2)
        qkv, hint = x.view(batch, tokens, 3 * width).requires_grad_(), hint_of(x.detach(), QKNORM_PARTS)
        upstream = [part.contiguous().transpose(1, 2) for part in upstream]
        return [qkv, *weights, *tables, heads, hint.requires_grad_(), upstream]

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return reference.qknorm_rope(*arguments[:-1])

    def plain(*arguments: Any, forward: Any = forward, magnitudes: Any = tops) -> tuple[Any, ...]:
        q, k, v, dqkv, *weights = with_backward(forward)(*arguments)
        columns, rows = magnitudes(dqkv.flatten(0, 1), QKNORM_PARTS)
        return q, k, v, dqkv, columns, *weights, rows

    def compiled() -> Callable[..., Any]:
        parts = {"forward": forward, "magnitudes": tops}
        parts = {name: torch.compile(part, dynamic=False) for name, part in parts.items()}
        return lambda *arguments: plain(*arguments, **parts)

    def ours(*arguments: Any) -> tuple[Any, ...]:
        from fastasync_kernels.qknorm_rope import qknorm_rope
        from fastasync_kernels.tops import split_hint

        run = with_backward(lambda *given: qknorm_rope(*given[:-1], hint=given[-1]))
        q, k, v, dqkv, *weights, dhint = run(*arguments)
        found, _ = split_hint(dhint, dqkv.shape[0] * tokens, QKNORM_PARTS)
        return q, k, v, dqkv, found.columns, *weights, {"rows": found.rows}

    def exact(*arguments: Any) -> tuple[Any, ...]:
        from fastasync_kernels.qknorm_rope import qknorm_rope

        q, k, v, dqkv, *_ = with_backward(lambda *given: qknorm_rope(*given[:-1]))(*arguments)
        return q, k, v, dqkv, *tops(dqkv.flatten(0, 1), QKNORM_PARTS)

    # forward q and k are read and written, backward q, k and three gradients are read, and three written
    return Case("qknorm fwd+bwd, hinted", 3 * width, plain, ours, inputs, 0, 4, exact, compiled)


def swiglu_cases(hidden: int) -> list[Case]:
    """A column's magnitude is known after its last row, so what is cast is made twice, or written and read again."""

    def forward(packed: Tensor) -> tuple[Tensor, ...]:
        return by_kernels().swiglu_cast(packed)

    def exact_forward(packed: Tensor) -> tuple[Tensor, ...]:
        return plain_both(torch.ops.fastasync.swiglu(packed, None))

    def plain_backward(dout: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        kind = torch.promote_types(packed.dtype, torch.float32)
        (a, b), g = packed.to(kind).chunk(2, 1), dout.to(kind)
        s = torch.sigmoid(a)
        gradient = torch.cat([g * b * s * (1 + a * (1 - s)), g * a * s], 1)
        return *plain_both(gradient.to(packed.dtype)), gradient.sum(0)

    def backward(dout: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        return by_kernels().swiglu_backward_cast(dout, packed)

    def exact_backward(dout: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        return plain_both(torch.ops.fastasync.swiglu_backward(dout, packed, True)[0])

    def inputs_backward(x: Tensor) -> list[Any]:
        return [x.flip(0)[:, :hidden].contiguous(), x]

    def plain_forward(packed: Tensor) -> tuple[Tensor, ...]:
        return plain_both(reference.swiglu(packed))

    width = 2 * hidden
    return [
        Case("swiglu, both", width, plain_forward, forward, lambda x: [x], 1, 2, exact_forward),
        Case("swiglu bwd, both", width, plain_backward, backward, inputs_backward, 2, 3, exact_backward),
    ]


def cases(width: int, hidden: int, tokens: int, heads: int) -> list[Case]:
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
        hinted(width, ADALN_PARTS),
        hinted(3 * width, QKNORM_PARTS),
        adaln_case(width, tokens),
        qknorm_case(width, tokens, heads),
        *swiglu_cases(hidden),
        both(width, ADALN_PARTS),
        both(hidden, SWIGLU_PARTS),
        both(2 * hidden, SWIGLU_PARTS),
        Case("columns", width, reference.cast_columns, columns, lambda x: [x, column_tops(x)], 1),
    ]


def check_bits(case: Case, inputs: list[Any]) -> None:
    """Casts and magnitudes are exact: every byte is that of ``exact``, or in fp8 PyTorch's.  Raises WrongResult."""
    ours, theirs = case.ours(*inputs), (case.exact or case.plain)(*inputs)
    pairs = [pair for pair in zip(tensors_of(ours), tensors_of(theirs)) if case.exact or pair[0].dtype == reference.FP8]
    if isinstance(ours[-1], dict):
        pairs.append((ours[-1]["rows"].amax(1), theirs[-1]["rows"].amax(1)))
    for index, (found, known) in enumerate(pairs):
        if found.dtype == reference.FP8:
            found, known = found.view(torch.uint8), known.view(torch.uint8)
        if not torch.equal(found, known):
            count = int((found != known).sum())
            raise WrongResult(f"{case.name}, {case.columns} columns: {count} numbers of result {index} are not exact")


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
        for case in cases(size["width"], size["hidden"], size["tokens"], size["heads"]):

            def make(seed: int, batch: int, case: Case = case, dtype: torch.dtype = dtype) -> list:
                x = Random(bench.device, seed, dtype)(batch * size["tokens"], case.columns)
                return case.inputs(x)

            found = {"reference": case.plain}
            if not bench.small:
                found["reference compiled"] = (
                    case.compiled() if case.compiled else torch.compile(case.plain, dynamic=False)
                )
            if with_kernels:
                check_bits(case, make(0, batch))
                found["triton"] = case.ours
            rows = batch * size["tokens"]
            bench.operation(
                Operation(
                    *("fp8_casts", case.name, f"[{rows}, {case.columns}]", short(dtype)),
                    *(found, make, batch, rows * case.columns * (dtype.itemsize * case.planes + case.written)),
                    check_batch=batch,  # compiling takes seconds: one shape
                )
            )
