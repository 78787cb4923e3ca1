"""SwiGLU: against the reference and fp64, odd shapes, strides, refusals, torch.compile."""

import pytest
import torch
from fastasync_kernels import reference
from fastasync_kernels import swiglu as module
from fastasync_kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [(2, 17, 144), (1, 1, 2), (70, 200), (2, 3, 5460), (5, 6144), (256,)]


def draw(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packed = 3 * torch.randn(*shape, generator=generator)
    upstream = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    return packed.to(DEVICE, dtype), upstream.to(DEVICE, dtype)


def run(function, packed, upstream, dtype=None):
    leaf = packed.detach().to(dtype or packed.dtype).requires_grad_()
    out = function(leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, upstream.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient_no_worse_than_twice_the_reference(shape, dtype, no_worse):
    packed, upstream = draw(shape, dtype)
    truth = run(reference.swiglu, packed, upstream, torch.float64)
    no_worse(run(swiglu, packed, upstream), run(reference.swiglu, packed, upstream), truth, ["out", "dpacked"])


def test_far_from_zero_nothing_overflows():
    a = torch.tensor([-200.0, -90.0, -1e-30, 0.0, 90.0, 200.0], device=DEVICE)
    packed = torch.cat((a, torch.ones_like(a)))
    out, grad = run(swiglu, packed, torch.ones_like(a))
    expected = run(reference.swiglu, packed, torch.ones_like(a))
    torch.testing.assert_close(out, expected[0], rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(grad, expected[1], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty(shape):
    out, grad = run(swiglu, *draw(shape))
    assert out.shape == (*shape[:-1], 4)
    assert grad.shape == shape


def test_strided_input_and_gradients_equal_contiguous_ones():
    wide, _ = draw((6, 100), seed=1)
    packed = wide[:, 10:42].requires_grad_()
    for upstream in (torch.ones(1, device=DEVICE).expand(6, 16), torch.randn(16, 6, device=DEVICE).t()):
        out = swiglu(packed)
        (grad,) = torch.autograd.grad(out, packed, upstream)
        expected = run(swiglu, packed.detach().contiguous(), upstream.contiguous())
        assert torch.equal(out, expected[0])
        assert torch.equal(grad, expected[1])


def test_nothing_but_the_input_is_kept():
    packed, _ = draw((4, 64), seed=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(packed.requires_grad_())
    assert [t.data_ptr() for t in kept] == [packed.data_ptr()]


def test_the_same_bits_every_time_and_for_every_block(monkeypatch):
    packed, upstream = draw((9, 200), torch.float16, seed=3)
    first = run(swiglu, packed, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, run(swiglu, packed, upstream)))
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(module, name, getattr(module, name)._replace(chunk=4, rows=4, columns=32))
    assert all(torch.equal(a, b) for a, b in zip(first, run(swiglu, packed, upstream)))


def test_compiled_whole_equals_eager():
    packed, upstream = draw((2, 5, 24), seed=4)
    compiled = torch.compile(lambda t: swiglu(2.0 * t), backend="aot_eager", fullgraph=True)
    expected = run(lambda t: swiglu(2.0 * t), packed, upstream)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, packed, upstream), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_equals_eager(dtype):
    packed, upstream = draw((4, 256, 6144), dtype, seed=5)
    compiled = torch.compile(swiglu, fullgraph=True)
    expected = run(swiglu, packed, upstream)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, packed, upstream), expected))


def test_registration_of_the_operators():
    packed, upstream = draw((3, 8), seed=6)
    bias = torch.zeros(8, device=packed.device)
    for given in (None, bias.requires_grad_()):
        torch.library.opcheck(torch.ops.fastasync.swiglu, (packed.clone().requires_grad_(), given))
        torch.library.opcheck(torch.ops.fastasync.swiglu_backward, (upstream, packed, given is not None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(7, 10), (2, 150, 64), (3, 1, 2), (1, 2100), (0, 6)])
def test_gradient_of_the_bias(shape, dtype):
    packed, upstream = draw(shape, dtype, seed=7)
    bias = torch.full(shape[-1:], torch.nan, device=packed.device, requires_grad=True)  # its values are not read
    out = swiglu(packed.requires_grad_(), bias=bias)
    assert torch.equal(out, swiglu(packed))
    found = torch.autograd.grad(out, (packed, bias), upstream)
    assert torch.equal(found[0], torch.autograd.grad(swiglu(packed), packed, upstream)[0])
    wide = packed.detach().double().requires_grad_()
    (rows,) = torch.autograd.grad(reference.swiglu(wide), wide, upstream.double())
    exact = rows.reshape(-1, shape[-1]).sum(0)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1].double(), exact, rtol=2e-6, atol=2e-6 * float(1 + exact.abs().max()))
    torch.compiler.reset()
    compiled = torch.compile(lambda t, b: swiglu(t, bias=b), backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(packed, bias), (packed, bias), upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_bias_of_another_shape_or_dtype_is_refused():
    packed, _ = draw((2, 8), seed=8)
    with pytest.raises(ValueError, match="bias"):
        swiglu(packed, bias=torch.zeros(4, device=packed.device))
    with pytest.raises(TypeError, match="bias"):
        swiglu(packed, bias=torch.zeros(8, dtype=torch.float64, device=packed.device))


def test_another_device_is_refused():
    packed, _ = draw((2, 8), seed=9)
    with pytest.raises(ValueError, match="bias is on meta, the other arguments on"):
        swiglu(packed, bias=torch.zeros(8, device="meta"))
    # the check itself: the dispatcher would send a meta tensor to the shape-only implementation
    with pytest.raises(ValueError, match="packed is on meta: the Triton kernels need CUDA; choose kernels=reference"):
        module._check(packed.to("meta"))


@pytest.mark.gpu
def test_a_tensor_of_a_cpu_beside_one_of_a_gpu_is_refused():
    packed, _ = draw((2, 8), seed=9)
    with pytest.raises(ValueError, match="bias is on cpu, the other arguments on cuda"):
        swiglu(packed, bias=torch.zeros(8))
    with pytest.raises(ValueError, match="packed is on cpu: the Triton kernels need CUDA"):
        swiglu(packed.cpu())


@pytest.mark.parametrize(
    ("packed", "error", "words"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), TypeError, "packed must be .* not torch.float64"),
        (torch.zeros(2, 3), ValueError, r"packed must be \[..., 2 F\], not \[2, 3\]"),
        (torch.zeros(2, 0), ValueError, r"packed must be \[..., 2 F\]"),
        (torch.zeros(4, 6).t(), ValueError, "cannot be read as rows"),
        (torch.zeros(2, 5, 8, device=DEVICE)[:, 1:], ValueError, "cannot be read as rows"),
        (torch.zeros(2, 8, 5).transpose(1, 2), ValueError, "cannot be read as rows"),
    ],
)
def test_refusals(packed, error, words):
    with pytest.raises(error, match=words):
        swiglu(packed.to(DEVICE))
