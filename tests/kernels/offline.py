"""Builds kernels for sm_90 without a GPU, in a process without Triton's interpreter: ``offline.py builds | launches``.

``builds``: every OFFLINE case of every kernel module compiles; reports spilled registers (test_offline_builds).
``launches``: every public operation with real arguments, up to the launch itself (test_offline_launches).
Prints one line each and leaves with status 1 when one failed or spilled.
"""

import importlib
import pkgutil
import sys
import traceback

import fastasync_kernels
import torch
from fastasync_kernels.medium_attention import medium_attention
from fastasync_kernels.short_attention import short_attention

from bench.offline import compile_case, resources, without_a_gpu


def registry():
    """(module name, case) of every kernel module that exports OFFLINE."""
    for found in pkgutil.iter_modules(fastasync_kernels.__path__):
        if found.name == "quack_products":  # needs quack-kernels, and has no kernel in Triton
            continue
        module = importlib.import_module(f"fastasync_kernels.{found.name}")
        for case in getattr(module, "OFFLINE", ()):
            yield found.name, case


def run_registry():
    failed, count = 0, 0
    for module, case in registry():
        count += 1
        types = "/".join(dict.fromkeys(kind for kind in case.signature.values() if kind.startswith("*")))
        label = f"{module}.{case.kernel.__name__} {types}"
        try:
            registers, spilled, _ = resources(compile_case(case))
        except Exception:
            failed += 1
            print(f"FAILED {label}\n{traceback.format_exc()}")
            continue
        failed += spilled > 0
        print(f"{'SPILLED' if spilled else 'ok'} {label}: {registers} registers, {spilled} bytes spilled")
    print(f"{count} builds, {failed} failed")
    return failed


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
        yield f"drop_labels {seed}", lambda s=seed, n=number: ops.drop_labels(samples, 10, 0.1, s, n, samples)
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
    bias = tensor(width, dtype=torch.float32)
    yield "gated, bias", lambda: back(*ops.gated_rmsnorm_modulate(tokens, tokens, row, weight, row, row, bias=bias))
    wide = tensor(6144, dtype=torch.float32)
    yield "swiglu, bias", lambda: back(ops.swiglu(tensor(2, 256, 6144), bias=wide))
    head, table = tensor(72), torch.zeros(256, 72)
    heads = (head, head, table, table, 16)
    yield "qknorm_rope", lambda: back(*ops.qknorm_rope(tensor(2, 256, 3 * width), *heads))
    packed = tensor(3 * width)
    yield "qknorm_rope, bias", lambda: back(*ops.qknorm_rope(tensor(2, 256, 3 * width), *heads, bias=packed))
    # no operations of ours by name, but a backend of attention
    for function, shape in ((short_attention, (2, 64, 3, 8, 32)), (medium_attention, (2, 256, 3, 16, 72))):
        parts = [part.transpose(1, 2) for part in tensor(*shape).unbind(2)]
        yield function.__name__, lambda f=function, p=parts: back(f(*p))


def run_launches():
    ops = importlib.import_module("fastasync_kernels.triton_ops")  # before INTERPRET changes: block sizes hang on it
    launches, failed = [], 0
    with without_a_gpu(lambda name, built, options: launches.append(name)):
        for name, call in operations(ops):
            before = len(launches)
            try:
                call()
            except Exception:
                failed += 1
                print(f"FAILED {name}\n{traceback.format_exc()}")
            else:
                print(f"ok {name}: {len(launches) - before} launches")
    return failed


if __name__ == "__main__":
    sys.exit(1 if {"builds": run_registry, "launches": run_launches}[sys.argv[1]]() else 0)
