"""How the kernels' results are judged."""

import pytest
import torch
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """Triton's interpreter loses the carry where rounding to e4m3 reaches the next power of two: torch rounds."""
    convert = interpreter._convert_float

    def exact(values, source, target, mode):
        if target.name != "fp8e4nv":
            return convert(values, source, target, mode)
        return torch.from_numpy(values.astype("float32")).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", exact)


@pytest.fixture(scope="session")
def no_worse():
    """Asserts that results are at most twice as far from the fp64 truth as the same-precision reference (L2 norm).

    The floor, half an ulp of float32 on every element, is for references that happen to be exact.
    """

    def check(ours, theirs, truth, names=None):
        for index, (a, b, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
            name = names[index] if names else index
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            error, allowed = ((t.detach().double() - exact).norm().item() for t in (a, b))
            assert error <= 2 * allowed + 2.0**-24 * exact.norm().item(), f"{name}: {error} against {allowed}"

    return check
