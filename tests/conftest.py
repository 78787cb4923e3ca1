"""For every test: one thread, the same random numbers each time, and without a GPU Triton's interpreter."""

import os
import random
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # several threads in several processes wait for each other; for child processes too

import numpy
import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` leaves it: tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported, which fastasync.model does


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    """Tests that draw without a generator of their own draw the same numbers whichever worker runs them, and when."""
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(0)
