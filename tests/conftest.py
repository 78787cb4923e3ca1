"""For every test: one thread, the same random numbers each time, and without a GPU Triton's interpreter."""

import dataclasses
import importlib
import importlib.util
import os
import random
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # several threads in several processes wait for each other; for child processes too

import numpy
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` leaves it: tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported, which fastasync.model does


def patch_the_language_once(interpreter):
    """Let a kernel's calls of other jitted functions leave the language as the launch has patched it.

    Triton's interpreter looks through all of triton.language again at each such call, of which there are several in
    every program: a third of the kernel tests' time.  It finds nothing to patch then but what it has replaced itself.
    """
    patch = interpreter._patch_lang

    def patch_once(function):
        ours = interpreter.tl, interpreter.tl.core
        languages = [value for value in function.__globals__.values() if value is ours[0] or value is ours[1]]
        if languages and not any(interpreter.tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()  # of no changes
        return patch(function)

    interpreter._patch_lang = patch_once


def make_types_once(interpreter):
    """Let the interpreter's tensors share what says no more than their type: a fifth of the kernel tests' time.

    Every operation makes several types and tensors anew, whose shapes are tuples of wrapped numbers, looks its numpy
    type up in a dictionary that it builds, and computes whether integers overflow, which it only asserts in debugging.
    """
    core = interpreter.tl.core
    block, tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    blocks, shapes, numpy_types = {}, {}, {}

    def quick_block(self, element_ty, shape):
        key = str(element_ty), *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key], element_ty=element_ty)

    def quick_tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            tensor(self, handle, type)
            shapes[key] = dict(self.__dict__)
        self.__dict__.update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    def quick_numpy_type(kind):
        key = str(kind.scalar)
        if key not in numpy_types:
            numpy_types[key] = numpy_type(kind)
        return numpy_types[key]

    core.block_type.__init__, core.tensor.__init__ = quick_block, quick_tensor
    interpreter._get_np_dtype = quick_numpy_type
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def take_one_number_for_an_index(interpreter):
    """Triton 3.6 takes int() of an array of one number, which is an error of numpy's since 2.4; 3.7 does this."""
    patch = interpreter._patch_lang_tensor

    def patch_with_ours(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_ours


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    for adapt in (patch_the_language_once, make_types_once, take_one_number_for_an_index):
        adapt(importlib.import_module("triton.runtime.interpreter"))


def pytest_collection_modifyitems(items):
    """Files that take long are begun first, so that no worker is left with one at the end (the order is the sort's)."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
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


@pytest.fixture
def fp8_rounding(monkeypatch):
    """Triton's interpreter loses the carry where rounding to e4m3 reaches the next power of two: torch rounds."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def exact(values, source, target, mode):
        if target.name != "fp8e4nv":
            return convert(values, source, target, mode)
        return torch.from_numpy(values.astype("float32")).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", exact)


@pytest.fixture
def noise_images():
    """Writes twelve images of noise, of two classes, below a folder."""

    def write(root, shape=(40, 36), extension="png"):
        generator = numpy.random.default_rng(0)
        for number in range(12):
            folder = root / f"class {number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (*shape, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.{extension}")
        return root

    return write
