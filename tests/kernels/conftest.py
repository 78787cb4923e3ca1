"""How the kernels' results are judged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


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


@pytest.fixture
def offline(tmp_path):
    """Runs a part of offline.py, which must succeed; returns what it said of each kernel or operation."""

    def run(part):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parents[1] / "kernels")])
        environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, str(HERE / "offline.py"), part]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(line[3:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("ok "))

    return run
