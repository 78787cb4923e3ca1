"""Builds Triton kernels for sm_90 without a GPU, and says what registers and shared memory they take.

Needs a process without Triton's interpreter.  ``without_a_gpu`` lets launchers run as far as their launch.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from fastasync_kernels import _common
from fastasync_kernels._common import OfflineCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg")
MULTIPROCESSORS, REGISTERS, SHARED, WARPS = 132, 65536, 227 * 1024, 64  # H200; the latter three of one multiprocessor


class Resources(NamedTuple):
    """Of one build: registers a thread, bytes of stack and local memory a thread (spills), bytes of shared memory."""

    registers: int
    spilled: int
    shared: int

    def programs(self, warps: int) -> int:
        """How many programs fit on a multiprocessor at a time: registers come in eights, 1 KB is the system's."""
        by_registers = REGISTERS // (math.ceil(self.registers / 8) * 8 * 32 * warps)
        return min(by_registers, WARPS // warps, 32, SHARED // (self.shared + 1024))


def compile_case(case: OfflineCase) -> Any:
    """The compiled kernel.  Raises ValueError for arguments that the kernel lacks or that are not given."""
    names = case.kernel.arg_names
    options = {"num_warps": case.num_warps} | {k: v for k, v in case.constexprs.items() if k in OPTIONS}
    constexprs = {name: value for name, value in case.constexprs.items() if name not in OPTIONS}
    unknown = (set(case.signature) | set(constexprs)) - set(names)
    missing = set(names) - set(case.signature) - set(constexprs)
    if unknown or missing:
        raise ValueError(f"arguments that the kernel lacks: {sorted(unknown)}; not given: {sorted(missing)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in case.divisible]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=TARGET, options=options)


def resources(kernel: Any) -> Resources:
    """What a compiled kernel takes, read from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump printed no resources: {text!r}")
    registers, stack, local = map(int, found[0])
    return Resources(registers, stack + local, kernel.metadata.shared)


class NoDevice:
    """What Triton's launcher asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(seen: Callable[[str, Any, dict[str, Any]], None]) -> Iterator[None]:
    """Launches compile and do not launch; each calls ``seen`` with the kernel's name, what was built, its options."""
    launch = triton.runtime.jit.JITFunction.run

    def prepare(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        built = launch(self, *args, grid=grid, warmup=True, **kwargs)
        seen(self.__name__, built, {**kwargs, "grid": grid})
        return built

    triton.runtime.jit.JITFunction.run = prepare
    try:
        yield
    finally:
        triton.runtime.jit.JITFunction.run = launch


@contextlib.contextmanager
def without_a_gpu(seen: Callable[[str, Any, dict[str, Any]], None]) -> Iterator[None]:
    """``compiling`` for sm_90, with CPU tensors that stand for a GPU's.  Import the kernels before.

    Triton's driver stays replaced: a process that has been here launches nothing.
    """
    triton.runtime.driver.set_active(NoDevice())
    before, _common.INTERPRET = _common.INTERPRET, True  # lets CPU tensors through the checks
    try:
        with compiling(seen):
            yield
    finally:
        _common.INTERPRET = before
