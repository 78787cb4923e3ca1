"""Hidden units of zeros in a gated MLP's products: the results and gradients of the MLP without them."""

import pytest
import torch
import torch.nn.functional as F
from fastasync_kernels import gated_mlp, reference, weight_gradient
from fastasync_kernels.fp8_linear import fp8_mlp
from fastasync_kernels.zeros import NO_ZEROS, ROUNDED, Zeros, fast_width, hidden_zeros

from tests.kernels import quack_kit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16
NAMES = ["y", "dx", "dw12", "db12", "dw3", "db3"]
WIDTH, HIDDEN, UNITS = 32, 85, 43  # 128 with the zeros


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def draw(dtype, weights=None, hidden=HIDDEN, rows=(3, 16)):
    """x, w12, b12, w3, b3, and the output's gradient."""
    count = torch.Size(rows).numel()
    inputs, g = gated_mlp._draw(gated_mlp.Shape(count, WIDTH, hidden, WIDTH), torch.float32, torch.device(DEVICE))
    x, *parameters = inputs
    return [x.view(*rows, WIDTH).to(dtype), *(p.to(weights or dtype) for p in parameters)], g.view(*rows, WIDTH).to(
        dtype
    )


def run(function, inputs, g):
    return gated_mlp._results(function, inputs, g, True)


def plain(x, w12, b12, w3, b3):
    """In x's dtype, without zeros, as with PyTorch alone."""
    w12, b12, w3, b3 = (part.to(x.dtype) for part in (w12, b12, w3, b3))
    return F.linear(reference.swiglu(F.linear(x, w12, b12)), w3, b3)


def with_zeros(x, w12, b12, w3, b3, parts=1):
    beside12, beside3 = hidden_zeros(UNITS)
    packed = weight_gradient.linear(x, w12, b12, parts, beside12)
    return weight_gradient.linear(reference.swiglu(packed), w3, b3, parts, beside3)


def test_widths():
    widths = [fast_width(width) for width in (1024, 2048, 3072, 2736, 2730, 4778, 682, 85, 48, 8)]
    assert widths == [1024, 2048, 3072, 2736, 2752, 4800, 704, 128, 48, 64]
    assert 128 % ROUNDED == 0  # the tiles of GEMMs, which no such width adds one to


@pytest.mark.parametrize("zeros", [Zeros(3, 0, 2), Zeros(0, 5), Zeros(1, 2, 3), NO_ZEROS])
def test_beside_and_without(zeros):
    weight, bias = torch.arange(1.0, 25).view(6, 4), torch.arange(1.0, 7)
    wide, wide_bias = zeros.beside(weight), zeros.beside(bias)
    assert wide.shape == zeros.shape_beside(weight) == (6 + zeros.rows * zeros.groups, 4 + zeros.columns)
    grouped = wide.view(zeros.groups, -1, wide.shape[1])
    inner = 6 // zeros.groups
    assert torch.equal(grouped[:, :inner, :4], weight.view(zeros.groups, inner, 4))
    assert wide.count_nonzero() == 24
    assert wide_bias.view(zeros.groups, -1)[:, :inner].flatten().equal(bias)
    assert wide_bias.count_nonzero() == 6
    assert torch.equal(zeros.beside_again(weight), wide)
    for wider, original in ((wide, weight), (wide_bias, bias)):
        assert torch.equal(zeros.without(wider), original)
        assert zeros.without(wider).is_contiguous()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("dtype", "weights"), [(torch.float32, None), (HALF, HALF), (HALF, torch.float32)])
def test_linears_no_worse_than_twice_those_without(dtype, weights, parts, no_worse):
    inputs, g = draw(dtype, weights)
    truth = run(plain, [part.double() for part in inputs], g.double())
    no_worse(run(lambda *a: with_zeros(*a, parts), inputs, g), run(plain, inputs, g), truth, NAMES)


def test_the_zeros_stay_zeros():
    """So whatever the kernels between the products find in them, they find zeros, in both directions."""
    (x, w12, b12, w3, _), g = draw(torch.float32)
    beside12, beside3 = hidden_zeros(UNITS)
    packed = weight_gradient.linear(x, w12, b12, 1, beside12).requires_grad_()
    y = weight_gradient.linear(reference.swiglu(packed), w3, None, 1, beside3)
    (gradient,) = torch.autograd.grad(y, packed, g)
    for each in (packed, gradient):
        assert each.unflatten(-1, (2, -1))[..., :HIDDEN].count_nonzero() > 0.9 * 2 * HIDDEN * 48
        assert not each.unflatten(-1, (2, -1))[..., HIDDEN:].any()


@pytest.mark.parametrize("weights", [HALF, torch.float32])
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_what_is_kept_has_no_zeros(weights, backend):
    """Weights go into the backward pass as they are: the wider ones are of one product at a time."""
    inputs, _ = draw(HALF, weights, rows=(48,))
    function = torch.compile(with_zeros, fullgraph=True, backend=backend) if backend else with_zeros
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*(part.detach().requires_grad_() for part in inputs))
    sizes = {t.data_ptr(): t.numel() for t in kept if 48 not in t.shape and t.numel()}  # not the activations
    assert sorted(sizes.values()) == [WIDTH * HIDDEN, 2 * WIDTH * HIDDEN]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_compiled_equals_eager(dtype):
    inputs, g = draw(dtype)
    compiled = torch.compile(with_zeros, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    tolerance = 2**-7 if dtype is HALF else 1e-5  # Inductor does not round silu(a)
    for name, one, other in zip(NAMES, run(compiled, inputs, g), run(with_zeros, inputs, g)):
        assert float((one - other).norm()) <= tolerance * float(other.norm()), name


# --- in quack's products (a stand-in here, itself on a GPU) and in fp8 ------------------------------------------------


@pytest.fixture
def quack():
    if DEVICE == "cuda":
        if reason := gated_mlp.refusal("cuda", HALF, gated_mlp.Shape(48, WIDTH, HIDDEN + UNITS, WIDTH)):
            pytest.skip(f"quack {reason}")
        yield
    else:
        with quack_kit.installed():
            yield


@pytest.mark.parametrize("compiled", [False, True])
def test_quack_no_worse_than_twice_the_mlp_without(quack, compiled, no_worse):
    inputs, g = draw(HALF)
    truth = run(plain, [part.double() for part in inputs], g.double())

    def function(*inputs):
        return gated_mlp.gated_mlp(*inputs, (2, 1), UNITS)

    ours = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    no_worse(run(ours, inputs, g), run(plain, inputs, g), truth, NAMES)
    with pytest.raises(ValueError, match="multiples of 8, not 86"):
        gated_mlp.gated_mlp(*inputs, (1, 1), 1)


@pytest.mark.parametrize("backend", ["plain", "quack"])
def test_frozen_with_zeros(quack, backend):
    inputs, _ = draw(HALF)
    frozen = gated_mlp.freeze_mlp(*inputs[1:], HALF, backend, UNITS)
    assert frozen.w3.shape == (WIDTH, HIDDEN + UNITS)
    assert frozen.stands_for(*inputs[1:])
    found = gated_mlp.frozen_mlp(inputs[0], frozen, reference.swiglu)
    known = with_zeros if backend == "plain" else lambda *a: gated_mlp.gated_mlp(*a, (1, 1), UNITS)
    with torch.no_grad():
        assert torch.equal(found, known(*inputs))


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_is_that_of_wider_parameters_bit_for_bit(compiled):
    """Rows and columns of zeros change no other's largest magnitude."""
    pytest.importorskip("triton")
    inputs, g = draw(HALF, torch.float32)
    beside12, beside3 = hidden_zeros(UNITS)
    x, w12, b12, w3, b3 = inputs
    wide = [x, beside12.beside(w12), beside12.beside(b12), beside3.beside(w3), b3]
    expected = run(fp8_mlp, wide, g)
    expected[2:5] = [beside12.without(expected[2]), beside12.without(expected[3]), beside3.without(expected[4])]

    def function(*inputs):
        return fp8_mlp(*inputs, UNITS)

    found = run(torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function, inputs, g)
    assert [name for name, a, b in zip(NAMES, found, expected) if not torch.equal(a, b)] == []
    with pytest.raises(ValueError, match=r"weight has shape \[170, 32\]: fp8 needs multiples of 16"):
        fp8_mlp(*inputs)
