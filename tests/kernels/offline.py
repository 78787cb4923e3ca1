"""Builds kernels for sm_90 without a GPU; run by test_offline_compile in a process without Triton's interpreter.

First every OFFLINE case of every kernel module: compiles, and reports spilled registers.  Then every public operation
with real arguments, up to the launch itself.  Prints one line each and leaves with status 1 when one failed or spilled.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import traceback

import fastasync_kernels
import torch
import triton
from fastasync_kernels import _common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)


def registry():
    """(module name, case) of every kernel module that exports OFFLINE."""
    for found in pkgutil.iter_modules(fastasync_kernels.__path__):
        module = importlib.import_module(f"fastasync_kernels.{found.name}")
        for case in getattr(module, "OFFLINE", ()):
            yield found.name, case


def compile_case(case):
    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) - set(names)
    missing = set(names) - set(case.signature) - set(case.constexprs)
    if unknown or missing:
        raise ValueError(f"arguments that the kernel lacks: {sorted(unknown)}; not given: {sorted(missing)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in case.divisible]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, case.constexprs, attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": case.num_warps})


def resources(cubin):
    """(registers, bytes of stack and local memory) from the cubin; the latter are spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump printed no resources: {text!r}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def run_registry():
    failed, count = 0, 0
    for module, case in registry():
        count += 1
        types = "/".join(dict.fromkeys(kind for kind in case.signature.values() if kind.startswith("*")))
        label = f"{module}.{case.kernel.__name__} {types}"
        try:
            registers, spilled = resources(compile_case(case).asm["cubin"])
        except Exception:
            failed += 1
            print(f"FAILED {label}\n{traceback.format_exc()}")
            continue
        failed += spilled > 0
        print(f"{'SPILLED' if spilled else 'ok'} {label}: {registers} registers, {spilled} bytes spilled")
    print(f"{count} builds, {failed} failed")
    return failed


class NoDevice:
    """What Triton's launcher asks of a driver before it launches."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def operations(ops):
    """(name, call) of public operations, forward and backward, on CPU tensors that stand for the GPU's."""
    channels, samples = [32, 16], torch.arange(2)

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def back(*outputs):
        sum(output.float().sum() for output in outputs if output.requires_grad).backward()

    data = torch.zeros(2, 48, 16, 16)
    per = torch.zeros(2, 2, requires_grad=True)
    step = torch.zeros(1, dtype=torch.int64)
    for seed, number in ((1, 0), (2**64 - 1, step)):  # int32 and int64 keys; a step from memory
        key = (channels, seed, number, samples)
        yield f"noising {seed}", lambda k=key: back(ops.noising(data, per, *k, dtype=torch.bfloat16))
        yield f"flow_errors {seed}", lambda k=key: back(*ops.flow_errors(tensor(2, 48, 16, 16), data, *k, cosine=True))
        yield f"corrected_loss {seed}", lambda k=key: back(*ops.corrected_loss(tensor(2, 48, 16, 16), data, per, *k))
    odd = tensor(2, 48, 3, 7, dtype=torch.float32)  # aligned by nothing
    key = (channels, 5, 6, samples)
    yield "flow_errors, odd grid", lambda: back(*ops.flow_errors(odd, odd.detach(), *key))
    one = (tensor(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), [1], 1, 1, torch.arange(1))
    yield "corrected_loss of ones", lambda: back(*ops.corrected_loss(*one, 0.5))  # integers of 1 become constants
    yield "noising of data", lambda: back(ops.noising(odd, per, *key))
    yield "corrected_loss, cosine", lambda: back(*ops.corrected_loss(odd, odd.detach(), per, *key, 0.5))
    with_weak = (data, tensor(2, 48, 16, 16), tensor(2, 48, 16, 16), per, per, channels)
    yield "guided_update", lambda: back(ops.guided_update(*with_weak))
    yield "unguided", lambda: back(ops.guided_update(data, tensor(2, 48, 16, 16), None, None, per, channels))
    width, weight = 1152, tensor(1152)
    tokens, row = tensor(2, 256, width), tensor(2, width)
    yield "rmsnorm_modulate", lambda: back(ops.rmsnorm_modulate(tokens, weight, row, row))
    yield "gated", lambda: back(*ops.gated_rmsnorm_modulate(tokens, tokens, row, weight, row, row))
    yield "swiglu", lambda: back(ops.swiglu(tensor(2, 256, 6144)))
    head, table = tensor(72), torch.zeros(256, 72)
    yield "qknorm_rope", lambda: back(*ops.qknorm_rope(tensor(2, 256, 3 * width), head, head, table, table, 16))


def run_launches():
    ops = importlib.import_module("fastasync_kernels.triton_ops")  # before INTERPRET changes: block sizes hang on it
    launches = 0
    launch = triton.runtime.jit.JITFunction.run

    def prepare(self, *args, grid, warmup, **kwargs):
        nonlocal launches
        launches += 1
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.jit.JITFunction.run = prepare
    triton.runtime.driver.set_active(NoDevice())
    _common.INTERPRET = True  # lets CPU tensors through the checks
    failed = 0
    for name, call in operations(ops):
        before = launches
        try:
            call()
        except Exception:
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}")
        else:
            print(f"ok {name}: {launches - before} launches")
    return failed


if __name__ == "__main__":
    sys.exit(1 if run_registry() + run_launches() else 0)
