"""The gated MLP by quack-kernels: a stand-in for its products on a CPU, quack itself on a GPU; the choice."""

import contextlib
import logging
import subprocess
import sys

import pytest
import torch
from fastasync_kernels import gated_mlp as module
from fastasync_kernels import reference
from fastasync_kernels._timing import recorded_milliseconds
from fastasync_kernels.gated_mlp import Shape, as_halves, by_turns, plain_mlp, resolve_mlp

from tests.kernels import quack_kit

CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")
HALF = torch.bfloat16
NAMES = ["y", "dx", "dw12", "db12", "dw3", "db3"]
XL = Shape(65536, 1152, 3072, 1152)
plain = plain_mlp(reference.swiglu)


@pytest.fixture
def quack():
    """The stand-in, on the CPU."""
    torch.compiler.reset()
    with quack_kit.installed():
        yield


@pytest.fixture
def real():
    """quack itself, which must take XL's shape here."""
    reason = module.refusal("cuda", HALF, XL)
    if reason:
        pytest.skip(f"quack {reason}")
    return torch.device("cuda")


def draw(shape=(3, 11), width=16, hidden=40, outputs=24, dtype=torch.float32, device=CPU):
    """x [*shape, width], the weights and biases, and the output's gradient."""
    inputs, g = module._draw(Shape(torch.Size(shape).numel(), width, hidden, outputs), dtype, device)
    return [inputs[0].view(*shape, width), *inputs[1:]], g.view(*shape, outputs)


def run(function, inputs, g):
    return module._results(function, inputs, g, True)


def test_gate_and_up_by_turns_and_back():
    halves = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    turned = by_turns(halves, torch.float16)
    assert turned.tolist() == [[1, 2], [5, 6], [3, 4], [7, 8]]
    assert turned.is_contiguous()
    for dtype in (torch.float16, torch.float32):
        back = as_halves(turned, dtype)
        assert back.dtype == dtype
        assert back.is_contiguous()
        assert torch.equal(back.float(), halves)
    assert by_turns(torch.arange(6), torch.int64).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
@pytest.mark.parametrize(
    "sizes", [{}, {"shape": (1,), "hidden": 8}, {"shape": (0, 4)}, {"shape": (2, 3, 5), "width": 8}]
)
def test_no_worse_than_twice_the_separate_operations(quack, dtype, sizes, no_worse):
    inputs, g = draw(**sizes, dtype=dtype)
    truth = run(plain, [part.double() for part in inputs], g.double())
    no_worse(run(module.gated_mlp, inputs, g), run(plain, inputs, g), truth, NAMES)


def test_in_float64_all_gradients_are_autograds(quack):
    inputs, g = draw(dtype=torch.float64)
    for name, ours, theirs in zip(NAMES, run(module.gated_mlp, inputs, g), run(plain, inputs, g)):
        tolerance = 1e-6 if name.startswith("db") else 1e-12  # the sums over the rows are float32
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_strided_input_and_gradient(quack):
    inputs, g = draw()
    expected = run(module.gated_mlp, inputs, g[:, :1].expand_as(g).contiguous())
    x = torch.stack([inputs[0], inputs[0]], -1)[..., 0]
    found = run(module.gated_mlp, [x, *inputs[1:]], g[:, :1].expand_as(g))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("parts", [(1, 1), (2, 4)])
def test_weights_in_another_dtype_and_gradients_in_parts(quack, parts, no_worse):
    """float32 weights, which are rounded to x's dtype: gradients have the dtypes of what they are of."""
    (x, *weights), g = draw((4, 16), dtype=HALF)
    wide = [x, *(weight.float() for weight in weights)]
    found = run(lambda *a: module.gated_mlp(*a, parts), wide, g)
    assert [value.dtype for value in found] == [HALF, HALF, *4 * [torch.float32]]
    truth = run(plain, [part.double() for part in wide], g.double())
    theirs = run(plain, [x, *weights], g)
    no_worse(found, [value.to(like.dtype) for value, like in zip(theirs, found)], truth, NAMES)


def test_compiled_equals_eager(quack):
    inputs, g = draw(dtype=HALF)
    compiled = torch.compile(lambda x, *a: module.gated_mlp(2 * x, *a), backend="aot_eager", fullgraph=True)
    expected = run(lambda x, *a: module.gated_mlp(2 * x, *a), inputs, g)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, inputs, g), expected))


def test_registration_of_the_operators(quack):
    (x, w12, b12, w3, _), g = draw((33,))
    for keep in (True, False):
        torch.library.opcheck(torch.ops.fastasync.gated_product, (x, w12, b12, keep))
    packed = torch.randn(33, 80)
    torch.library.opcheck(torch.ops.fastasync.gated_product_backward, (g, w3, packed))
    found = module._gated_backward_op(g, w3, packed)
    fake = module._gated_backward_op(*(part.to("meta") for part in (g, w3, packed)))
    assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in fake]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dtype_that_quack_does_not_take_is_refused_before_it_is_imported(dtype, monkeypatch):
    def imported():
        raise AssertionError("quack")

    monkeypatch.setattr(module, "_products", imported)
    (x, *weights), _ = draw(dtype=dtype)
    for call in (lambda: module.gated_mlp(x, *weights), lambda: module.freeze_mlp(*weights, dtype, "quack")):
        with pytest.raises(TypeError, match=f"bfloat16 or torch.float16, not {dtype}"):
            call()
    with pytest.raises(TypeError, match=f"x is {dtype}, the weights were frozen in torch.bfloat16"):
        module.frozen_mlp(x, module.freeze_mlp(*weights, HALF, "quack"), reference.swiglu)


def test_the_activation_is_not_kept_and_without_gradients_nothing_is(quack, monkeypatch):
    products = module._products()
    asked = []
    monkeypatch.setattr(
        products, "gemm_gated", lambda *a, **k: asked.append(k["store_preact"]) or quack_kit.gemm_gated(*a, **k)
    )
    inputs, _ = draw((7,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        module.gated_mlp(*(part.requires_grad_() for part in inputs))
    assert sorted(kept) == [(7, 16), (7, 80), (24, 40), (80, 16)]
    with torch.no_grad():
        module.gated_mlp(*inputs)
    module.gated_mlp(*(part.detach() for part in inputs))
    assert asked == [True, False, False]


def test_only_the_gradients_that_are_asked_for(quack):
    inputs, g = draw()
    expected = run(module.gated_mlp, inputs, g)
    leaves = [part.detach().requires_grad_(index in (0, 3)) for index, part in enumerate(inputs)]
    found = torch.autograd.grad(module.gated_mlp(*leaves), [leaves[0], leaves[3]], g)
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[4])


@pytest.mark.parametrize(
    ("sizes", "parts", "words"),
    [
        ({"hidden": 12}, (1, 1), "multiples of 8, not 12"),
        ({"width": 20}, (1, 1), "multiples of 8, not 20"),
        ({"outputs": 6}, (1, 1), "multiples of 8, not 6"),
        ({}, (2, 1), r"parts \(2, 1\) must divide the 33 rows"),
        ({}, (1, 0), r"parts \(1, 0\) must divide"),
    ],
)
def test_refused_sizes(quack, sizes, parts, words):
    with pytest.raises(ValueError, match=words):
        module.gated_mlp(*draw(**sizes)[0], parts)


def test_refused_shapes(quack):
    x, w12, b12, w3, b3 = draw()[0]
    with pytest.raises(ValueError, match=r"\[..., K\], \[2 F, K\] and \[N, F\], not \[3, 11, 16\], \[24, 40\]"):
        module.gated_mlp(x, w3, b12, w12, b3)
    with pytest.raises(ValueError, match=r"biases must be \[2 F\] and \[N\], not"):
        module.gated_mlp(x, w12, b12[:-2], w3, b3)
    with pytest.raises(ValueError, match="w3 on meta: all must be on one device"):
        module.gated_mlp(x, w12, b12, w3.to("meta"), b3)


def test_the_compiler_is_not_imported():
    """Two seconds of every command, rank and test that starts a process."""
    code = "import sys, fastasync.config; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- which backend ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(quack, monkeypatch):
    """A machine that looks as if it had a GPU; returns a function that sets its compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stand-in")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def capability(major):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))

    capability(9)
    return capability


@pytest.mark.parametrize(
    ("major", "dtype", "shape", "words"),
    [
        (9, HALF, XL, ""),
        (10, HALF, XL, ""),
        (8, HALF, XL, "needs compute capability 9.0, not 8.0"),
        (9, torch.float32, XL, "needs bfloat16, not torch.float32"),
        (9, torch.float16, XL, "needs bfloat16, not torch.float16"),
        (
            9,
            HALF,
            XL._replace(hidden=682),
            "needs sizes that are multiples of 8, not 682 (model.mlp_multiple rounds the hidden width up)",
        ),
        (9, HALF, XL._replace(rows=7), ""),
    ],
)
def test_what_it_needs(hopper, major, dtype, shape, words):
    hopper(major)
    assert module.refusal("cuda", dtype, shape) == words


def test_missing_package_is_named_with_its_extra(hopper, monkeypatch):
    for name in quack_kit.modules():
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    module._missing.cache_clear()
    sys.modules.pop("fastasync_kernels.quack_products", None)
    assert module.refusal("cuda", HALF, XL) == (
        "quack-kernels is not installed (no module quack.activation): pip install 'fastasync[quack]'"
    )
    assert resolve_mlp("auto", reference.swiglu, "cuda", HALF, XL) == "plain"
    with pytest.raises(
        module.MlpUnavailable, match=r"quack cannot be used: .*fastasync\[quack\]'; choose auto or plain"
    ):
        resolve_mlp("quack", reference.swiglu, "cuda", HALF, XL)


def test_another_version_is_told(hopper, monkeypatch):
    del sys.modules["quack.epilogue"].gemm_epilogue
    assert "cannot be imported (ImportError: cannot import name 'gemm_epilogue'" in module.refusal("cuda", HALF, XL)


@pytest.mark.parametrize("folder", ["wheels", "site-packages"])
def test_a_folder_that_quack_does_not_work_from_is_told(hopper, monkeypatch, tmp_path, folder):
    for name in quack_kit.modules():
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / folder / "quack").mkdir(parents=True)
    (tmp_path / folder / "quack" / "__init__.py").write_text("raise TypeError('no fail-closed semantic key')")
    monkeypatch.syspath_prepend(tmp_path / folder)
    module._missing.cache_clear()
    sys.modules.pop("fastasync_kernels.quack_products", None)
    remedy = module.EXTRA
    if folder == "wheels":
        remedy = f"it lies in {tmp_path / folder}, and works only from a folder called site-packages"
    assert module.refusal("cuda", HALF, XL) == (
        f"quack-kernels cannot be imported (TypeError: no fail-closed semantic key): {remedy}"
    )


def test_without_a_gpu():
    assert module.refusal("cpu", HALF, XL) == "needs a CUDA device, not cpu"
    assert resolve_mlp("auto", reference.swiglu, "cpu", HALF, XL) == "plain"
    assert resolve_mlp("plain", reference.swiglu, "cpu", HALF, XL) == "plain"
    with pytest.raises(module.MlpUnavailable, match="'cublas' is none of auto, plain, quack"):
        resolve_mlp("cublas", reference.swiglu, "cpu", HALF, XL)
    with pytest.raises(module.MlpUnavailable, match="quack cannot be used: needs a CUDA device"):
        resolve_mlp("quack", reference.swiglu, "cpu", HALF, XL)


@pytest.mark.parametrize(("ms", "chosen"), [(0.9, "quack"), (0.99, "plain"), (1.2, "plain")])
def test_auto_takes_what_is_faster_once(hopper, monkeypatch, caplog, ms, chosen):
    measured = []
    monkeypatch.setattr(module, "_fault", lambda *a: "")
    monkeypatch.setattr(module, "_times", lambda *a: measured.append(a) or {"plain": 1.0, "quack": ms})
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert resolve_mlp("auto", reference.swiglu, "cuda", HALF, XL) == chosen
    assert len(measured) == 1
    assert f"MLP: {chosen} for [65536, 1152, 3072, 1152] torch.bfloat16, forward and backward" in caplog.text
    assert f"(plain 1.000 ms, quack {ms:.3f} ms)" in caplog.text
    assert resolve_mlp("auto", reference.swiglu, "cuda", HALF, XL, gradient=False) == chosen
    assert resolve_mlp("quack", reference.swiglu, "cuda", HALF, XL) == "quack"
    assert resolve_mlp("auto", reference.swiglu, "cuda", HALF, XL._replace(rows=0)) == "plain"
    assert len(measured) == 2


def test_no_memory_to_measure(hopper, monkeypatch):
    def times(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(module, "_fault", lambda *a: "")
    monkeypatch.setattr(module, "_times", times)
    assert resolve_mlp("auto", reference.swiglu, "cuda", HALF, XL) == "plain"


def test_wrong_results_are_found(quack, monkeypatch):
    inputs, g = draw((40,), dtype=HALF)
    assert module.disagreement(inputs, g, True) == ""
    assert module.disagreement(inputs, g, False) == ""
    products = module._products()
    right = products.gated_backward

    def wrong(*arguments):
        dpacked, h, sums = right(*arguments)
        return dpacked, h, sums.roll(1)

    monkeypatch.setattr(products, "gated_backward", wrong)
    assert module.disagreement(inputs, g, False) == ""
    assert module.disagreement(inputs, g, True).startswith("gradient of b12 has error")
    monkeypatch.setattr(products, "gated", lambda *a: (None, torch.full((40, 40), torch.nan, dtype=HALF)))
    assert module.disagreement(inputs, g, False).startswith("output has error nan")


def test_wrong_results_are_not_used(hopper, monkeypatch, caplog):
    monkeypatch.setattr(module, "_fault", lambda *a: "gradient of b12 has error 3")
    assert resolve_mlp("auto", reference.swiglu, "cuda", HALF, XL) == "plain"
    assert "quack left out, its results are wrong on cuda: gradient of b12" in caplog.text
    with pytest.raises(module.MlpUnavailable, match="its results are wrong on cuda"):
        resolve_mlp("quack", reference.swiglu, "cuda", HALF, XL)


def test_a_failure_is_not_called_a_wrong_result(hopper, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no compiler")

    module._fault.cache_clear()
    monkeypatch.setattr(module, "_draw", fails)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(module.MlpUnavailable, match=r"could not be tried \(RuntimeError: no compiler\)"):
        resolve_mlp("quack", reference.swiglu, "cuda", HALF, XL)
    module._fault.cache_clear()


def test_tiles_are_chosen_where_they_were_measured(quack, hopper):
    products = module._products()
    assert dict(products.FORWARD)["tile_n"] == 192
    like = torch.empty(0, device="meta")
    assert products._config(like, products.FORWARD) is None
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda")})()
    assert products._config(on_gpu, products.FORWARD) is products.FORWARD
    hopper(10)
    assert products._config(on_gpu, products.FORWARD) is None


# --- quack itself -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 130, 1000, 4096])
@pytest.mark.parametrize("sizes", [(1152, 3072, 1152), (64, 72, 24), (1024, 2728, 1024)])
@pytest.mark.parametrize("compiled", [False, True])
def test_quack_no_worse_than_twice_the_separate_operations(real, no_worse, rows, sizes, compiled):
    inputs, g = module._draw(Shape(rows, *sizes), HALF, real)
    truth = run(plain, [part.double() for part in inputs], g.double())
    torch.compiler.reset()  # of one function eight shapes are compiled, and a worker may get all twelve
    function = torch.compile(module.gated_mlp, fullgraph=True, dynamic=False) if compiled else module.gated_mlp
    found = run(function, inputs, g)
    no_worse(found, run(plain, inputs, g), truth, NAMES)
    assert all(torch.equal(a, b) for a, b in zip(found, run(function, inputs, g)))  # the same bits every time


@pytest.mark.gpu
def test_quack_far_from_zero(real, no_worse):
    """Gates between -500 and 500: exp(-a) overflows, and nothing may become infinite or NaN."""
    inputs, g = module._draw(Shape(300, 64, 128, 64), HALF, real)
    inputs[0] *= 128
    truth = run(plain, [part.double() for part in inputs], g.double())
    no_worse(run(module.gated_mlp, inputs, g), run(plain, inputs, g), truth, NAMES)


@pytest.mark.gpu
def test_quack_recorded_equals_unrecorded(real):
    inputs, g = module._draw(Shape(4096, 1152, 3072, 1152), HALF, real)
    expected = run(module.gated_mlp, inputs, g)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run(module.gated_mlp, inputs, g)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(module.gated_mlp, inputs, g)
    for value in found:
        value.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.gpu
def test_times_by_turns(caplog):
    """A run that waits for the GPU cannot be recorded: its launches are in its time, and that is said."""
    caplog.set_level(logging.INFO)
    a, b = (torch.randn(size, size, device="cuda") for size in (256, 4096))
    found = recorded_milliseconds(
        {"small": lambda: a @ a, "large": lambda: b @ b, "waits": lambda: (a @ a).sum().item()}
    )
    assert 0 < found["small"] < found["large"]
    assert "waits cannot be recorded" in caplog.text
    torch.testing.assert_close(a @ a, (a.double() @ a.double()).float(), rtol=1e-2, atol=1e-1)  # all is well after it


@pytest.mark.gpu
def test_quack_is_chosen_by_the_measured_times(real, caplog):
    from fastasync_kernels.swiglu import swiglu

    caplog.set_level(logging.INFO)
    chosen = resolve_mlp("auto", swiglu, real, HALF, XL)
    assert f"MLP: {chosen} for {list(XL)}" in caplog.text
