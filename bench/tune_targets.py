"""What ``bench.tune`` sweeps: kernels at XL's shapes, their launch parameters, and what each value of these may be.

In the order of what a training step has to gain.  Chunks that are no powers of two are among the options as they
balance: with P programs on a multiprocessor at a time, the last of ceil(programs / (132 P)) rounds may be nearly empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from fastasync_kernels import adaln, adaln_tops, qknorm_rope, reference, swiglu
from fastasync_kernels.fp8_linear import ADALN_PARTS
from fastasync_kernels.tops import Tops, hint_size
from torch import Tensor

from bench.harness import with_backward
from fastasync.model.embeddings import rope_tables

EPS = 1e-6
Draw = Callable[..., Tensor]  # bench.subjects.common.Random's call
Point = dict[str, int | None]  # knob -> value


class Knob(NamedTuple):
    """One launch parameter: fields of a module's constant that take one value together."""

    constant: str
    fields: tuple[str, ...]
    options: tuple[int | None, ...]


@dataclass(frozen=True)
class Target:
    """One kernel in one direction.

    ``inputs(draw, batch)`` are ``run``'s; ``proof(draw, batch)`` those of ``reference`` and ``ours``, which return
    every output and gradient.  ``nbytes``: the fewest that must move at ``batch``.
    """

    kernel: str
    direction: str
    module: ModuleType
    knobs: dict[str, Knob]
    inputs: Callable[[Draw, int], Sequence[Any]]
    run: Callable[..., Any]
    proof: Callable[[Draw, int], Sequence[Any]]
    reference: Callable[..., Any]
    ours: Callable[..., Any]
    nbytes: Callable[[int, int], int]

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.direction}"

    def current(self) -> Point:
        """What the module has."""
        return {name: getattr(getattr(self.module, k.constant), k.fields[0]) for name, k in self.knobs.items()}

    def possible(self, point: Point) -> bool:
        """Whether every chunk is a whole number of its rows."""
        with self.setting(point):
            launches = [getattr(self.module, constant) for constant in {k.constant for k in self.knobs.values()}]
        return all(launch.chunk % launch.rows == 0 for launch in launches)

    @contextmanager
    def setting(self, point: Point) -> Iterator[None]:
        """Launches inside have these parameters."""
        before = {knob.constant: getattr(self.module, knob.constant) for knob in self.knobs.values()}
        try:
            for name, value in point.items():
                knob = self.knobs[name]
                now = getattr(self.module, knob.constant)
                setattr(self.module, knob.constant, now._replace(**dict.fromkeys(knob.fields, value)))
            yield
        finally:
            for constant, launch in before.items():
                setattr(self.module, constant, launch)


def words(point: Point) -> str:
    """``chunk=32 warps=4``; 0 and None are what the kernel or the compiler chooses."""
    return " ".join(f"{name}={'auto' if value in (None, 0) else value}" for name, value in point.items())


_STAGES = (1, 2, 3, 4)


def _adaln(size: dict[str, int]) -> dict[str, Target]:
    tokens, width = size["tokens"], size["width"]

    def tensors(draw: Draw, batch: int, grad: bool = False) -> dict[str, Tensor]:
        rows = {
            name: draw(batch, tokens, width, grad=grad and name in "xy") for name in ("x", "y", "dresidual", "dout")
        }
        conditions = {name: draw(batch, width, grad=grad, scale=0.5) for name in ("gate", "shift", "scale")}
        weight = (1 + draw(width, dtype=torch.float32, scale=0.1)).requires_grad_(grad)
        return {**rows, **conditions, "weight": weight, "bias": draw(width, dtype=torch.float32, grad=grad)}

    def knobs(constant: str, backward: bool, limits: tuple[int | None, ...]) -> dict[str, Knob]:
        chunks = (8, 16, 20, 22, 26, 32, 37, 43, 52, 64, 86, 128, 256)
        found = {
            "chunk": Knob(constant, ("chunk",), chunks),
            "maxnreg": Knob(constant, ("maxnreg",), limits),
            "stages": Knob(constant, ("stages",), _STAGES),
            "warps": Knob(constant, ("warps",), (0, 2, 8)),
            "rows": Knob(constant, ("rows",), (1, 2, 4)),
        }
        if backward:
            found["reduce"] = Knob("REDUCE", ("columns",), (64, 128, 256, 512))
        return found

    def target(
        direction: str, constant: str, gated: bool, bias: bool, backward: bool, magnitudes: bool = False
    ) -> Target:
        def inputs(draw: Draw, batch: int) -> Sequence[Any]:
            t = tensors(draw, batch)
            second, gate = (t["y"], t["gate"]) if gated else (None, None)
            found = []
            if magnitudes:  # one number more than columns: the backward pass writes a one there
                rows = draw(batch * tokens, ADALN_PARTS, dtype=torch.float32)
                found = [Tops(rows, draw(width + 1, dtype=torch.float32)[:-1])]
            if not backward:
                return [t["x"], second, gate, t["weight"], t["shift"], t["scale"], EPS, *found]
            dtype = torch.float32 if bias else None
            last = t["dresidual"] if gated else None
            return [t["x"], second, gate, t["weight"], t["scale"], last, t["dout"], EPS, dtype, *found]

        def proof(draw: Draw, batch: int) -> Sequence[Any]:
            t = tensors(draw, batch, backward)
            leaves = [t[n] for n in (("x", "y", "gate") if gated else ("x",)) + ("weight", "shift", "scale")]
            leaves += [t["bias"]] if bias else []
            return [*leaves, [t["dresidual"], t["dout"]] if gated else [t["dout"]]] if backward else leaves

        def of(module: Any) -> Callable[..., Any]:
            if not gated:
                function = module.rmsnorm_modulate
            elif bias:
                function = lambda *a: module.gated_rmsnorm_modulate(*a[:6], bias=a[6])  # noqa: E731
            else:
                function = module.gated_rmsnorm_modulate
            return with_backward(function) if backward else function

        planes = {(False, False): 2, (False, True): 3, (True, False): 4, (True, True): 6}[gated, backward]
        limits = (
            (None, 64, 80) if not backward else (None, 120, 128, 144, 168) if gated else (None, 80, 96, 128)
        )  # others spill
        return Target(
            *("adaln", direction, adaln, knobs(constant, backward, limits), inputs),
            adaln._launch_backward if backward else adaln._launch_forward,
            *(proof, of(reference), of(with_magnitudes if magnitudes else adaln)),
            lambda batch, itemsize: planes * batch * tokens * width * itemsize,
        )

    with_magnitudes = SimpleNamespace(
        rmsnorm_modulate=lambda *a: adaln_tops.rmsnorm_modulate_tops(*a)[0],
        gated_rmsnorm_modulate=lambda *a: adaln_tops.gated_rmsnorm_modulate_tops(
            *a, hint=a[0].new_empty(hint_size(a[0].shape[0] * tokens, width, ADALN_PARTS), dtype=torch.float32)
        )[:2],
    )
    return {
        "tops bwd": target("gated backward, magnitudes", "TOPS_BACKWARD", True, False, True, True),
        "tops gated fwd": target("gated forward, magnitudes", "TOPS_GATED_FORWARD", True, False, False, True),
        "tops fwd": target("forward, magnitudes", "TOPS_FORWARD", False, False, False, True),
        "bwd": target("backward", "BACKWARD", False, False, True),
        "gated bwd bias": target("gated backward, bias", "BIAS_BACKWARD", True, True, True),
        "gated bwd": target("gated backward", "GATED_BACKWARD", True, False, True),
        "gated fwd": target("gated forward", "GATED_FORWARD", True, False, False),
        "fwd": target("forward", "FORWARD", False, False, False),
    }


def _qknorm_rope(size: dict[str, int]) -> dict[str, Target]:
    tokens, width, heads = size["tokens"], size["width"], size["heads"]
    head = width // heads
    operators = torch.ops.fastasync

    def shared(draw: Draw, batch: int, grad: bool = False) -> list[Any]:
        qkv = draw(batch, tokens, 3 * width, grad=grad)
        weights = [draw(head, dtype=torch.float32, grad=grad) for _ in range(2)]
        return [qkv, *weights, *(table.to(qkv.device) for table in rope_tables(head, int(tokens**0.5))), heads]

    def douts(draw: Draw, batch: int) -> list[Tensor]:
        return [draw(batch, tokens, heads, head).transpose(1, 2) for _ in range(3)]

    def target(direction: str, constant: str, bias: bool, backward: bool) -> Target:
        def inputs(draw: Draw, batch: int) -> Sequence[Any]:
            if not backward:
                return [*shared(draw, batch), EPS, "bnhd"]
            return [*douts(draw, batch), *shared(draw, batch), EPS, torch.float32 if bias else None]

        def proof(draw: Draw, batch: int) -> Sequence[Any]:
            leaves = shared(draw, batch, backward)
            leaves += [draw(3 * width, dtype=torch.float32, grad=True)] if bias else []
            return [*leaves, douts(draw, batch)] if backward else leaves

        def of(module: Any) -> Callable[..., Any]:
            function = module.qknorm_rope
            if bias:
                function = lambda *a: module.qknorm_rope(*a[:6], bias=a[6])  # noqa: E731
            return with_backward(function) if backward else function

        chunks = (4, 8, 16, 22, 32, 43, 64)
        limits = (None, 96, 128, 168) if backward else (None, 64, 80)
        knobs = {
            "maxnreg": Knob(constant, ("maxnreg",), limits),
            "stages": Knob(constant, ("stages",), _STAGES),
            "chunk": Knob(constant, ("chunk",), chunks),
            "warps": Knob(constant, ("warps",), (0, 1, 2, 4, 8)),
        }
        return Target(
            *("qknorm_rope", direction, qknorm_rope, knobs, inputs),
            operators.qknorm_rope_backward if backward else operators.qknorm_rope,
            *(proof, of(reference), of(qknorm_rope)),
            lambda batch, itemsize: (8 if backward else 4) * batch * tokens * width * itemsize,
        )

    return {
        "bwd bias": target("backward, bias", "BIAS_BACKWARD", True, True),
        "bwd": target("backward", "BACKWARD", False, True),
        "fwd": target("forward", "FORWARD", False, False),
    }


def _swiglu(size: dict[str, int]) -> dict[str, Target]:
    tokens, hidden = size["tokens"], size["hidden"]
    operators = torch.ops.fastasync

    def target(direction: str, constant: str, bias: bool, backward: bool) -> Target:
        def inputs(draw: Draw, batch: int) -> Sequence[Any]:
            packed = draw(batch, tokens, 2 * hidden)
            return [draw(batch, tokens, hidden), packed, bias] if backward else [packed, None]

        def proof(draw: Draw, batch: int) -> Sequence[Any]:
            leaves = [draw(batch, tokens, 2 * hidden, grad=backward)]
            leaves += [draw(2 * hidden, dtype=torch.float32, grad=True)] if bias else []
            return [*leaves, [draw(batch, tokens, hidden)]] if backward else leaves

        def of(module: Any) -> Callable[..., Any]:
            function = module.swiglu
            if bias:
                function = lambda *a: module.swiglu(a[0], bias=a[1])  # noqa: E731
            return with_backward(function) if backward else function

        knobs = {
            "rows": Knob(constant, ("rows",) if bias else ("rows", "chunk"), (1, 2, 4, 8)),
            "warps": Knob(constant, ("warps",), (2, 4, 8)),
            "columns": Knob(constant, ("columns",), (512, 1024, 2048)),
            "maxnreg": Knob(constant, ("maxnreg",), (None, 64, 80, 96)),
        }
        if bias:
            loop = {"chunk": (16, 32, 64, 128, 256), "stages": _STAGES}
            knobs = {name: Knob(constant, (name,), options) for name, options in loop.items()} | knobs
        return Target(
            *("swiglu", direction, swiglu, knobs, inputs),
            operators.swiglu_backward if backward else operators.swiglu,
            *(proof, of(reference), of(swiglu)),
            lambda batch, itemsize: (5 if backward else 3) * batch * tokens * hidden * itemsize,
        )

    return {
        "bwd bias": target("backward, bias", "BIAS_BACKWARD", True, True),
        "bwd": target("backward", "BACKWARD", False, True),
        "fwd": target("forward", "FORWARD", False, False),
    }


KERNELS = {"adaln": _adaln, "qknorm_rope": _qknorm_rope, "swiglu": _swiglu}
_ORDER = ("adaln bwd", "qknorm_rope bwd bias", "adaln gated bwd bias", "adaln gated bwd", "qknorm_rope fwd")


def targets(size: dict[str, int], kernels: Sequence[str]) -> list[Target]:
    """Those of the named kernels, the ones with most to gain first."""
    found = {f"{name} {key}": target for name in kernels for key, target in KERNELS[name](size).items()}
    return [found[name] for name in sorted(found, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER))]
