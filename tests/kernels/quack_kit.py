"""A stand-in for what the package takes from quack-kernels: the same calls in plain PyTorch, on any device."""

import contextlib
import sys
import types
from typing import NamedTuple

import pytest
import torch
from fastasync_kernels import gated_mlp

CACHES = gated_mlp._missing, gated_mlp._fault


class Row(NamedTuple):
    """quack.epilogue.ops.RowVecReduce."""

    name: str


def unpack(pairs):
    return pairs[..., ::2], pairs[..., 1::2]


def pack(first, second):
    return torch.stack((first, second), -1).flatten(-2)


def dswiglu(a, b, dout):
    s = torch.sigmoid(a)
    return dout * b * s * (1 + a * (1 - s)), dout * a * s, a * s * b


def wide(tensor):
    """Epilogues compute in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def product(a, b):
    with torch.autocast(a.device.type, enabled=False):  # which would round float32's
        return wide(a) @ wide(b)


def gemm_gated(a, b, bias=None, activation=None, store_preact=True, tuned=True, config=None):
    assert activation == "swiglu"
    assert not tuned
    packed = product(a, b) + wide(bias)
    gate, up = unpack(packed)
    return packed.to(a.dtype) if store_preact else None, (torch.nn.functional.silu(gate) * up).to(a.dtype)


def gemm_epilogue(outputs, reduces, mode):
    """An epilogue over the whole product at once."""
    assert mode == "packed_cd_b16x2"
    assert all(name == op.name for name, op in reduces.items())

    def wrap(function):
        def run(a, b, c, config=None, tuned=True):
            assert not tuned
            found = function(product(a, b), wide(c))
            assert set(found) == {"D", *outputs, *reduces}
            sums = {name: found[name].sum(0).float() for name in reduces}
            return {"D": found["D"].to(c.dtype), **{name: found[name].to(a.dtype) for name in outputs}, **sums}

        return run

    return wrap


def modules():
    """Names of quack's modules -> stand-ins."""
    contents = {
        "quack": {},
        "quack.activation": {"dswiglu": dswiglu},
        "quack.epilogue": {"gemm_epilogue": gemm_epilogue, "pack": pack, "unpack": unpack},
        "quack.epilogue.ops": {"RowVecReduce": Row},
        "quack.gemm_config": {"GemmConfig": lambda **options: tuple(options.items())},
        "quack.gemm_interface": {"gemm_gated": gemm_gated},
    }
    made = {name: types.ModuleType(name) for name in contents}
    for name, values in contents.items():
        vars(made[name]).update(values)
    return made


@contextlib.contextmanager
def installed():
    """quack is there, inside."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in modules().items():
            patch.setitem(sys.modules, name, stand_in)
        patch.setattr(gated_mlp, "DTYPES", (*gated_mlp.DTYPES, torch.float32, torch.float64))  # plain PyTorch
        forget()
        yield
    forget()


def forget():
    """Nothing is known of quack: neither its module here, nor what was found out about it."""
    sys.modules.pop("fastasync_kernels.quack_products", None)
    gated_mlp._choices.clear()
    for cached in CACHES:
        cached.cache_clear()
