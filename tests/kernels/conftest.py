"""How the kernels' results are judged."""

import pytest


@pytest.fixture(autouse=True)
def rounding(fp8_rounding):
    """For every kernel."""


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
