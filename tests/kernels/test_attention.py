"""Attention backends: the formula, the choice and its cache, the FlashAttention wrappers, errors, torch.compile."""

import functools
import logging
import sys
import types

import fastasync_kernels
import pytest
import torch
from fastasync_kernels import _common
from fastasync_kernels import attention as module
from fastasync_kernels.attention import BACKENDS, BackendUnavailable, attention, available_backends, resolve_backend

from tests.kernels.attention_kit import CUDA, DEVICE, run

XL, CIFAR10 = (256, 16, 256, 72), (256, 8, 64, 32)


def draw(shape=(2, 3, 10, 72), dtype=torch.float32, seed=0):
    """q and k in memory order B, N, heads, Dh and v a slice of a packed tensor, as qknorm_rope returns them."""
    batch, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, tokens, 3, heads, width, generator=generator).to(DEVICE, dtype)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    upstream = torch.randn(batch, heads, tokens, width, generator=generator).to(DEVICE, dtype)
    return (q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2), v), upstream


def exact(tensors, upstream):
    return run(module._reference, tensors, upstream, torch.float64)


# On CUDA, torch's only fused kernel for float32 is the memory-efficient one.  From compute capability 8.0 on it takes
# each product as three of TF32 numbers, whatever allow_tf32 says (its DefaultGemmType<float> is
# OpMultiplyAddFastF32): two numbers of 11 bits hold 22 of float32's 24, so one token does not get v back bit for bit.
# Float32 attention there is judged against the unfused formula with the same products.


def split(x):
    """x as a sum of two TF32 numbers, up to 2**-22 of it: the first cut off, the second rounded."""
    big = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return big, (((x - big).view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def product_of_three(a, b):
    (a_big, a_small), (b_big, b_small) = split(a), split(b)
    return a_big @ b_big + (a_big @ b_small + a_small @ b_big)


class ProductOfThree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return product_of_three(a, b)

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        return product_of_three(gradient, b.mT), product_of_three(a.mT, gradient)


def reference_of_three(q, k, v):
    scores = ProductOfThree.apply(q, k.mT) * q.shape[-1] ** -0.5
    return ProductOfThree.apply(scores.softmax(-1), v)


def test_the_products_of_three_are_what_they_claim():
    x = torch.randn(10_000)
    big, small = split(x)
    for part in (big, small):
        assert not (part.view(torch.int32) & 0x1FFF).any()
    lost = ((big.double() + small.double() - x) / x).abs().max()
    assert 2.0**-24 < lost <= 2.0**-22
    tensors, upstream = draw()
    truth = exact(tensors, upstream)
    plain, three = (run(f, tensors, upstream) for f in (module._reference, reference_of_three))
    for a, b, true in zip(plain, three, truth):  # 2**-22 against 2**-24: at most four times the error, and not TF32's
        assert (b.double() - true).norm() <= 4 * (a.double() - true).norm()


def test_the_formula():
    (q, k, v), _ = draw((1, 1, 4, 8), torch.float64)
    weights = torch.exp(torch.einsum("id,jd->ij", q[0, 0], k[0, 0]) / 8**0.5)
    expected = (weights / weights.sum(1, keepdim=True)) @ v[0, 0]
    torch.testing.assert_close(attention(q, k, v, "reference")[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reference_computes_in_float32_even_under_autocast(dtype, no_worse):
    tensors, upstream = draw(dtype=dtype)
    plain = run(module._reference, tensors, upstream)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention(*tensors, backend="reference")
    assert torch.equal(out, plain[0])


@pytest.mark.parametrize("shape", [(2, 3, 10, 72), (0, 2, 5, 8), (3, 1, 33, 64)])
def test_sdpa_and_auto_no_worse_than_twice_the_reference(shape, no_worse):
    tensors, upstream = draw(shape)
    names = ["out", "dq", "dk", "dv"]
    assert torch.get_float32_matmul_precision() == "highest"  # or the reference would be TF32's, and anything would do
    theirs = run(reference_of_three if CUDA else module._reference, tensors, upstream)
    truth = exact(tensors, upstream)
    for backend in ("sdpa", "auto"):
        no_worse(run(lambda q, k, v, b=backend: attention(q, k, v, b), tensors, upstream), theirs, truth, names)


def test_one_token_attends_to_itself():
    (q, k, v), upstream = draw((1, 2, 1, 8))
    out, dq, dk, dv = run(attention, (q, k, v), upstream)
    lost = 2.0**-22 if CUDA else 0.0  # by an operand of a product, see above
    largest = float((q * k).sum(-1).abs().max()) * 8**-0.5  # the weight is exp(score - score), each rounded
    assert ((out - v).abs() <= lost * v.abs()).all()
    assert ((dv - upstream).abs() <= lost * (1 + largest) * upstream.abs()).all()
    # the true gradient is zero: dout v - dout out, two sums of 8 products that may round differently
    bound = (2 * 8 * 2.0**-24 + 3 * lost) * float(upstream.norm() * v.norm() * max(q.norm(), k.norm()))
    assert max(dq.abs().max(), dk.abs().max()) <= bound


def taken(backend, tensors, gradient):
    try:
        resolve_backend(backend, DEVICE, tensors[0].dtype, tuple(tensors[0].shape), gradient)
    except BackendUnavailable as error:
        if backend not in ("fa4", "fa3", "fa2"):  # of what is ours or PyTorch's nothing may be wrong
            raise AssertionError(backend) from error
        return False
    return True


def right_or_refused(backend, tensors, upstream, theirs, truth, no_worse):
    """Asserts that a backend's results are right where ``resolve_backend`` takes it, and are not where it refuses it.

    True: taken for training.
    """
    names = [f"{backend} {name}" for name in ("out", "dq", "dk", "dv")]
    with torch.no_grad():
        if taken(backend, tensors, False):
            no_worse([attention(*tensors, backend=backend)], theirs[:1], truth[:1], names)
    if taken(backend, tensors, True):
        no_worse(run(functools.partial(attention, backend=backend), tensors, upstream), theirs, truth, names)
        return True
    with pytest.raises(Exception) as refused:  # a backend that fails raises anything
        no_worse(run(module._RUN[backend], tensors, upstream), theirs, truth, names)
    print(f"{backend} is refused for {list(tensors[0].shape)} {tensors[0].dtype}: {refused.value}")
    return False


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 16, 256, 72), (2, 6, 64, 64), (3, 2, 100, 72), (2, 8, 64, 32)])
def test_every_available_backend_compiled_and_eager(shape, dtype, no_worse):
    tensors, upstream = draw(shape, dtype)
    truth, theirs = exact(tensors, upstream), run(module._sdpa, tensors, upstream)
    for backend, reason in available_backends(DEVICE, dtype, shape).items():
        if reason:
            continue
        if not right_or_refused(backend, tensors, upstream, theirs, truth, no_worse):
            continue
        torch.compiler.reset()
        compiled = torch.compile(functools.partial(attention, backend=backend), fullgraph=True)
        no_worse(run(compiled, tensors, upstream), theirs, truth)


def test_auto_on_cpu_is_sdpa_without_a_measurement(monkeypatch):
    monkeypatch.setattr(module, "_measure", None)
    assert resolve_backend("auto", "cpu", torch.bfloat16, XL) == "sdpa"


def test_compiled_whole_equals_eager():
    tensors, upstream = draw()
    for backend in ("sdpa", "reference"):
        torch.compiler.reset()
        function = functools.partial(attention, backend=backend)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        expected = run(function, tensors, upstream)
        assert all(torch.equal(a, b) for a, b in zip(run(compiled, tensors, upstream), expected))


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A CUDA device of compute capability 9.0 as far as availability goes, where every package is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended GPU")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(module, "_missing", lambda backend: "")
    monkeypatch.setattr(module, "_choices", {})
    monkeypatch.setattr(module, "_faults", {})


def test_auto_takes_the_fastest_once_for_each_shape_dtype_and_direction(pretend_cuda, monkeypatch, caplog):
    calls = []

    def measure(candidates, device, dtype, shape, gradient):
        calls.append((tuple(candidates), dtype, shape, gradient))
        return {name: 1.0 + index for index, name in enumerate(candidates if gradient else reversed(candidates))}

    monkeypatch.setattr(module, "_measure", measure)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert [resolve_backend("auto", "cuda", torch.bfloat16, XL) for _ in range(3)] == ["cudnn"] * 3
        assert resolve_backend("auto", "cuda", torch.bfloat16, XL, gradient=False) == "triton"
        assert resolve_backend("auto", "cuda", torch.float32, XL) == "sdpa"
        assert resolve_backend("auto", "cuda", torch.bfloat16, (0, *XL[1:])) == "sdpa"
    every = BACKENDS[:-1]  # but for reference
    assert [call[0] for call in calls] == [every, every[:-1], ("sdpa", "efficient")]  # mixed is for gradients
    assert len(caplog.records) == 3
    assert "cudnn for [256, 16, 256, 72] torch.bfloat16, forward and backward, on pretended GPU" in caplog.text
    resolve_backend("auto", "cuda", torch.bfloat16, (256, 16, 1024, 72))
    assert calls[-1][0] == BACKENDS[:-3]  # triton and mixed are for shorter sequences


def test_a_backend_that_fails_when_measured_is_left_out_and_named(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())

    def milliseconds(backend, q, k, v, gradient):
        assert v.stride(2) == 3 * k.stride(2), "v must be the strided view that the model hands over"
        assert q.requires_grad is gradient
        if backend == "fa4":
            raise RuntimeError("no kernel image")
        return {"cudnn": 2.0, "sdpa": 1.0}[backend]

    def wrong(q, k, v):
        return 1.01 * module._sdpa(q, k, v)

    monkeypatch.setattr(module, "_faults", {})
    monkeypatch.setattr(module, "_milliseconds", milliseconds)
    stand_ins = {
        "cudnn": module._sdpa,
        "fa4": module._sdpa,
        "fa3": wrong,
        "fa2": lambda q, k, v: (q + k + v) * torch.nan,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setitem(module._RUN, name, stand_in)
    names = ["cudnn", "fa4", "fa3", "fa2", "sdpa"]
    times = module._measure(names, torch.device("cpu"), torch.float32, (2, 3, 4, 8), True)
    assert times == {"cudnn": 2.0, "sdpa": 1.0}
    assert "fa4 left out, it failed on [2, 3, 4, 8] torch.float32: no kernel image" in caplog.text
    assert "fa3 left out, it failed on [2, 3, 4, 8] torch.float32: off by 0.01" in caplog.text
    assert "fa2 left out, it failed on [2, 3, 4, 8] torch.float32: off by nan" in caplog.text


def wrong_gradient(q, k, v):
    """The formula, and twice the gradient of q."""
    return module._sdpa(2 * q - q.detach(), k, v)


@pytest.fixture
def packages(monkeypatch):
    """``packages(fa4=function)``: stand-ins for other packages' backends, on this device; counts what they compute."""
    calls = []
    monkeypatch.setattr(module, "_faults", {})
    if not CUDA:
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    reason = module._reason
    monkeypatch.setattr(module, "_reason", lambda name, *a: "" if name in ("fa4", "fa3", "fa2") else reason(name, *a))

    def install(**functions):
        for name, function in functions.items():
            counted = lambda *a, name=name, function=function: (calls.append(name), function(*a))[1]  # noqa: E731
            monkeypatch.setitem(module._RUN, name, counted)
        return calls

    return install


def test_a_named_package_with_wrong_gradients_is_refused_for_training_and_taken_for_sampling(packages):
    calls = packages(fa4=wrong_gradient, fa3=module._sdpa, fa2=lambda q, k, v: torch.nan * q)
    shape = (2, 3, 16, 24)
    others = "cudnn or sdpa" if CUDA else "sdpa"
    dtype = torch.float16 if CUDA else torch.float32
    allowed = "0.02" if CUDA else "0.001"
    for batch in (2, 5, 5):
        with pytest.raises(BackendUnavailable) as refused:
            resolve_backend("fa4", DEVICE, dtype, (batch, *shape[1:]))
        assert str(refused.value) == (
            f"attention backend fa4 is wrong or fails here (off by 1, at most {allowed} is rounding) on "
            f"[{batch}, 3, 16, 24] {dtype}, forward and backward, on {DEVICE}: choose auto, {others}"
        )
        assert resolve_backend("fa4", DEVICE, dtype, (batch, *shape[1:]), gradient=False) == "fa4"
        assert resolve_backend("fa3", DEVICE, dtype, (batch, *shape[1:])) == "fa3"
    assert calls == ["fa4", "fa4", "fa3"]  # once for each direction, whatever the batch
    with pytest.raises(BackendUnavailable, match=r"fa2 is wrong or fails here \(off by nan, .*, forward, on "):
        resolve_backend("fa2", DEVICE, dtype, shape, gradient=False)
    assert resolve_backend("fa2", DEVICE, dtype, (0, *shape[1:])) == "fa2"  # nothing to be wrong about
    tensors, upstream = draw(shape, dtype)
    assert torch.equal(attention(*tensors, backend="fa4"), module._sdpa(*tensors))
    with pytest.raises(BackendUnavailable, match="fa4 is wrong"):
        run(functools.partial(attention, backend="fa4"), tensors, upstream)


def test_a_named_package_that_fails_is_refused_and_lack_of_memory_is_not_its_fault(packages):
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel image")]

    def fail(q, k, v):
        raise errors.pop(0)

    calls, call = packages(fa4=fail), ("fa4", DEVICE, torch.float32, (2, 3, 4, 8))
    with pytest.raises(torch.OutOfMemoryError):
        resolve_backend(*call)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=r"fails here \(RuntimeError: no kernel image\)"):
            resolve_backend(*call)
    assert len(calls) == 2


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gradient_that_is_not_a_number_is_refused(packages, which):
    def broken(*tensors):
        tensors = list(tensors)
        if tensors[which].requires_grad:
            tensors[which] = tensors[which].view_as(tensors[which])
            tensors[which].register_hook(lambda gradient: torch.nan * gradient)
        return module._sdpa(*tensors)

    packages(fa3=broken)
    with pytest.raises(BackendUnavailable, match="off by nan"):
        resolve_backend("fa3", DEVICE, torch.float32, (2, 3, 4, 8))
    assert resolve_backend("fa3", DEVICE, torch.float32, (2, 3, 4, 8), gradient=False) == "fa3"


def test_the_check_leaves_the_random_numbers_alone(packages):
    packages(fa4=module._sdpa)
    torch.manual_seed(0)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(0)
    resolve_backend("fa4", DEVICE, torch.float32, (2, 3, 4, 8))
    assert torch.equal(torch.rand(3, device=DEVICE), expected)


def test_a_backend_that_is_wrong_and_taken_or_right_and_refused_is_seen(packages, monkeypatch, no_worse):
    """By the check of every available backend on a GPU."""
    packages(fa4=wrong_gradient, fa3=module._sdpa)
    tensors, upstream = draw((2, 3, 16, 24))
    facts = exact(tensors, upstream), run(module._sdpa, tensors, upstream)
    check = functools.partial(right_or_refused, tensors=tensors, upstream=upstream, no_worse=no_worse)
    check = functools.partial(check, truth=facts[0], theirs=facts[1])
    assert check("fa3")
    assert not check("fa4")
    monkeypatch.setattr(module, "_fault", lambda *_: "")
    with pytest.raises(AssertionError, match="fa4 dq"):
        check("fa4")
    monkeypatch.setattr(module, "_fault", lambda *_: "off")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check("fa3")


@pytest.mark.gpu
def test_auto_measures_on_the_gpu():
    for gradient in (True, False):
        choice = resolve_backend("auto", "cuda", torch.bfloat16, XL, gradient)
        assert not available_backends("cuda", torch.bfloat16, XL)[choice]


# --- what is available, and errors --------------------------------------------------------------------------------


def test_reasons_on_cpu():
    reasons = available_backends("cpu", torch.bfloat16, XL)
    assert list(reasons) == list(BACKENDS)
    usable = {"sdpa", "reference"} | ({"triton"} if _common.INTERPRET else set())
    assert {name for name, reason in reasons.items() if not reason} == usable
    assert all(reasons[name] == "needs a CUDA device, not cpu" for name in ("cudnn", "fa4", "fa3", "fa2", "efficient"))


@pytest.mark.parametrize(
    ("backend", "dtype", "tokens", "width", "words"),
    [
        ("cudnn", torch.float32, 8, 72, "needs float16 or bfloat16, not torch.float32"),
        ("fa2", torch.bfloat16, 8, 100, "multiple of 8, not 100"),
        ("cudnn", torch.bfloat16, 8, 256, "at most 128, not 256"),
        ("fa4", torch.bfloat16, 8, 256, ""),
        ("efficient", torch.float64, 8, 72, "does not take torch.float64"),
        ("sdpa", torch.float64, 8, 100, ""),
        ("triton", torch.float16, 128, 100, ""),
        ("triton", torch.bfloat16, 257, 72, "needs 1 to 256 tokens, not 257"),
        ("triton", torch.bfloat16, 0, 72, "needs 1 to 256 tokens, not 0"),
        ("triton", torch.bfloat16, 64, 136, "head dimension of 1 to 128, not 136"),
        ("triton", torch.float32, 64, 32, "needs float16 or bfloat16, not torch.float32"),
        ("mixed", torch.bfloat16, 257, 72, "needs 1 to 256 tokens, not 257"),
        ("mixed", torch.bfloat16, 64, 100, "multiple of 8, not 100"),
    ],
)
def test_reasons_on_a_gpu(pretend_cuda, backend, dtype, tokens, width, words):
    reason = available_backends("cuda", dtype, (1, 1, tokens, width))[backend]
    assert bool(reason) == bool(words)
    assert words in reason


def test_triton_needs_itself_and_compute_capability_8(pretend_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0, not 7.x" in available_backends("cuda", torch.float16, CIFAR10)["triton"]
    monkeypatch.setattr(_common, "INTERPRET", False)
    assert available_backends("cpu", torch.float16, CIFAR10)["triton"] == "needs a CUDA device, not cpu"
    monkeypatch.delattr(fastasync_kernels, "medium_attention", raising=False)
    monkeypatch.setitem(sys.modules, "fastasync_kernels.medium_attention", None)
    assert "Triton cannot be imported" in available_backends("cuda", torch.float16, CIFAR10)["triton"]


def test_a_missing_or_broken_package_is_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # the import system's mark of a missing module
    module._missing.cache_clear()
    assert module._missing("fa3").startswith("flash_attn_interface cannot be imported (ModuleNotFoundError: ")
    other = types.ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", other)
    module._missing.cache_clear()
    assert "has no flash_attn_func of the form this code calls" in module._missing("fa3")
    other.flash_attn_func = lambda q, k, v: q
    module._missing.cache_clear()
    assert module._missing("fa3") == ""
    module._missing.cache_clear()


def test_unknown_and_unavailable_backends_are_named_errors():
    (q, k, v), _ = draw((1, 1, 4, 8))
    words = "'flash' is none of auto, cudnn, fa4, fa3, fa2, sdpa, efficient, triton, mixed, reference"
    with pytest.raises(BackendUnavailable, match=words):
        attention(q, k, v, "flash")
    with pytest.raises(BackendUnavailable, match=words):
        resolve_backend("flash", "cpu", torch.float32, (1, 1, 4, 8))
    usable = "sdpa, triton, reference" if _common.INTERPRET else "sdpa, reference"
    words = f"cudnn cannot be used: needs a CUDA device, not cpu; available: {usable}"
    with pytest.raises(BackendUnavailable, match=words):
        attention(q.cpu(), k.cpu(), v.cpu(), "cudnn")
    with pytest.raises(ValueError, match=r"shape must be \[B, heads, N, Dh\]"):
        resolve_backend("sdpa", "cpu", torch.float32, (1, 4, 8))


def test_tensors_that_do_not_match_are_refused():
    (q, k, v), _ = draw((1, 2, 4, 8))
    with pytest.raises(TypeError, match="one dtype"):
        attention(q, k.half(), v)
    with pytest.raises(ValueError, match="one shape"):
        attention(q, k[:, :1], v)
    with pytest.raises(ValueError, match="one shape"):
        attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="one device"):
        attention(q, k, v.to("meta"))


# --- the FlashAttention wrappers, around stand-ins with the packages' calling conventions --------------------------


def stand_in_formula(q, k, v):
    """[B, N, heads, Dh] like FlashAttention."""
    return module._reference(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def stand_in_fa4():
    def forward(q, k, v, qv=None, softmax_scale=None, causal=True, return_lse=False):
        assert softmax_scale == q.shape[-1] ** -0.5
        assert return_lse
        assert not causal
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
        return stand_in_formula(q, k, v).contiguous(), scores.logsumexp(-1).contiguous(), None, None, None

    def backward(q, k, v, out, dout, lse, softmax_scale=None, causal=True, dq=None, dk=None, dv=None):
        assert not causal
        p = torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale - lse[..., None])
        ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - (dout * out).sum(-1).transpose(1, 2)[..., None])
        dq.copy_(torch.einsum("bhij,bjhd->bihd", ds, k) * softmax_scale)
        dk.copy_(torch.einsum("bhij,bihd->bjhd", ds, q) * softmax_scale)
        dv.copy_(torch.einsum("bhij,bihd->bjhd", p, dout))
        return dq, dk, dv

    stand_in = types.ModuleType("flash_attn.cute.interface")
    stand_in._flash_attn_fwd, stand_in._flash_attn_bwd = forward, backward
    return stand_in


def test_flash_attention_4_wrapper(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", stand_in_fa4())
    module._missing.cache_clear()
    assert module._missing("fa4") == ""
    module._missing.cache_clear()
    tensors, upstream = draw()
    expected = run(module._reference, tensors, upstream)
    got = run(module._fa4, tensors, upstream)
    compiled = run(torch.compile(module._fa4, backend="aot_eager", fullgraph=True), tensors, upstream)
    for a, b, c in zip(expected, got, compiled):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        assert torch.equal(b, c)
    assert got[0].transpose(1, 2).is_contiguous()
    small, upstream = draw((1, 2, 4, 8))
    q, k, v = (t.transpose(1, 2).contiguous() for t in small)
    torch.library.opcheck(torch.ops.fastasync.fa4, tuple(t.requires_grad_() for t in (q, k, v)))


@pytest.mark.parametrize("pair", [True, False])  # versions of FlashAttention-3 differ in returning the log-sum-exp
def test_flash_attention_3_wrapper(monkeypatch, pair):
    stand_in = types.ModuleType("flash_attn_interface")
    stand_in.flash_attn_func = lambda q, k, v: (stand_in_formula(q, k, v), None) if pair else stand_in_formula(q, k, v)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
    tensors, upstream = draw()
    got = run(module._RUN["fa3"], tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, run(module._reference, tensors, upstream)))
