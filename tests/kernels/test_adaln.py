"""adaLN, plain and fused with the gated residual: against the reference and fp64, odd shapes, refusals, compiled."""

import pytest
import torch
from fastasync_kernels import adaln, reference
from fastasync_kernels.adaln import gated_rmsnorm_modulate, rmsnorm_modulate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
BIASES = [  # of x, and whether the bias is so too or float32
    (torch.float32, True),
    *((torch.float16, alike) for alike in (False, True)),
    *(pytest.param(torch.bfloat16, alike, marks=pytest.mark.gpu) for alike in (False, True)),
]
SHAPES = [(2, 17, 72), (1, 1, 96), (3, 40, 100), (1, 34, 1152), (2, 3, 2)]  # batch, tokens, width
GATED = ("x", "y", "gate", "weight", "shift", "scale")
PLAIN = ("x", "weight", "shift", "scale")
BIASED = (*GATED, "bias")


def draw(shape, dtype=torch.float32, seed=0):
    """Named arguments, the weight in float32, and upstream gradients of x' and h."""
    batch, _, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    arguments = {"x": normal(*shape), "y": normal(*shape)}
    arguments |= {name: normal(batch, width) for name in ("gate", "shift", "scale")}
    arguments["weight"] = (0.5 + torch.rand(width, generator=generator)).to(DEVICE)
    arguments["bias"] = torch.linspace(-3.0, 3.0, width).to(DEVICE)
    return arguments, [normal(*shape), normal(*shape)]


def biased(function):
    """The function of the arguments BIASED, all by position."""
    return lambda *arguments: function(*arguments[:-1], bias=arguments[-1])


def run(function, names, arguments, upstream, dtype=None):
    """Outputs and the gradients of every argument; in ``dtype`` if given."""
    leaves = [arguments[name].detach().to(dtype or arguments[name].dtype).requires_grad_() for name in names]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad(out, leaves, [g.to(out[0].dtype) for g in upstream[-len(out) :]])
    return [t.detach() for t in (*out, *grads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_no_worse_than_twice_the_reference(shape, dtype, no_worse):
    arguments, upstream = draw(shape, dtype)
    for name, names in (("gated_rmsnorm_modulate", GATED), ("rmsnorm_modulate", PLAIN)):
        theirs = getattr(reference, name)
        truth = run(theirs, names, arguments, upstream, torch.float64)
        results = ["x'", "h"][-(len(truth) - len(names)) :] + [f"d{name}" for name in names]
        ours = run(getattr(adaln, name), names, arguments, upstream)
        no_worse(ours, run(theirs, names, arguments, upstream), truth, results)


@pytest.mark.parametrize(("dtype", "bias_like_x"), BIASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_bias_is_the_sum_of_dy_and_nothing_else_changes(shape, dtype, bias_like_x, no_worse):
    arguments, upstream = draw(shape, dtype, seed=9)
    if bias_like_x:
        arguments["bias"] = arguments["bias"].to(dtype)
    theirs = biased(reference.gated_rmsnorm_modulate)
    truth = run(theirs, BIASED, arguments, upstream, torch.float64)
    torch.testing.assert_close(truth[-1], truth[3].sum((0, 1)))
    ours = run(biased(gated_rmsnorm_modulate), BIASED, arguments, upstream)
    no_worse(ours, run(theirs, BIASED, arguments, upstream), truth, ["x'", "h"] + [f"d{name}" for name in BIASED])
    for function in (gated_rmsnorm_modulate, reference.gated_rmsnorm_modulate):
        with_bias = run(biased(function), BIASED, arguments, upstream)
        assert all(torch.equal(a, b) for a, b in zip(with_bias[:2], run(function, GATED, arguments, upstream)))
    arguments["bias"] = torch.full_like(arguments["bias"], float("nan"))  # not read
    repeated = run(biased(gated_rmsnorm_modulate), BIASED, arguments, upstream)
    assert all(torch.equal(a, b) for a, b in zip(repeated, ours, strict=True))


def test_weight_may_have_the_dtype_of_x(no_worse):
    arguments, upstream = draw((2, 9, 96), torch.float16)
    arguments["weight"] = arguments["weight"].half()
    truth = run(reference.rmsnorm_modulate, PLAIN, arguments, upstream, torch.float64)
    theirs = run(reference.rmsnorm_modulate, PLAIN, arguments, upstream)
    no_worse(run(rmsnorm_modulate, PLAIN, arguments, upstream), theirs, truth)


@pytest.mark.parametrize("shape", [(0, 5, 96), (2, 0, 96)])
def test_empty_batch_and_no_tokens(shape):
    arguments, upstream = draw(shape)
    for ours in (
        run(gated_rmsnorm_modulate, GATED, arguments, upstream),
        run(rmsnorm_modulate, PLAIN, arguments, upstream),
    ):
        assert all(not t.any() for t in ours)
    assert run(rmsnorm_modulate, PLAIN, arguments, upstream)[2].shape == (96,)
    dbias = run(biased(gated_rmsnorm_modulate), BIASED, arguments, upstream)[-1]
    assert dbias.shape == (96,)
    assert not dbias.any()


def test_strided_inputs_equal_contiguous_ones():
    arguments, _ = draw((2, 11, 96), seed=1)
    six = torch.randn(2, 6 * 96, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    wide = {name: torch.randn(2, 14, 130, device=DEVICE) for name in "xy"}
    arguments |= {name: tensor[:, 2:13, 20:116] for name, tensor in wide.items()}
    arguments |= dict(zip(("gate", "shift", "scale"), six.chunk(6, dim=1)))
    upstream = [
        torch.randn(11, 2, 96, device=DEVICE).transpose(0, 1),
        torch.ones(1, 1, 1, device=DEVICE).expand(2, 11, 96),
    ]
    strided = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    out = gated_rmsnorm_modulate(*(strided[name] for name in GATED))
    grads = torch.autograd.grad(out, [strided[name] for name in GATED], upstream)
    packed = {name: tensor.detach().contiguous() for name, tensor in arguments.items()}
    expected = run(gated_rmsnorm_modulate, GATED, packed, [g.contiguous() for g in upstream])
    for a, b in zip((*out, *grads), expected):
        assert torch.equal(a, b)


def test_residual_or_modulated_output_alone():
    arguments, (dresidual, dout) = draw((2, 9, 96), seed=3)
    leaves = [arguments[name].requires_grad_() for name in GATED]
    zero = torch.zeros_like(dout)
    residual, h = gated_rmsnorm_modulate(*leaves)
    expected = torch.autograd.grad((residual, h), leaves, (zero, dout), retain_graph=True)
    for a, b in zip(torch.autograd.grad(h, leaves, dout, retain_graph=True), expected):
        assert torch.equal(a, b)
    dx, dy, dgate, *rest = torch.autograd.grad(residual, leaves, dresidual, retain_graph=True)
    assert torch.equal(dx, dresidual)
    assert torch.equal(dy, dresidual * arguments["gate"][:, None])
    torch.testing.assert_close(dgate, (dresidual * arguments["y"]).sum(1), rtol=1e-5, atol=1e-5)
    assert all(not t.any() for t in rest)


def test_the_split_into_programs_changes_only_the_order_of_sums(monkeypatch):
    arguments, upstream = draw((2, 40, 72), seed=4)
    whole = run(biased(gated_rmsnorm_modulate), BIASED, arguments, upstream)
    for name in ("GATED_FORWARD", "BIAS_BACKWARD"):
        monkeypatch.setattr(adaln, name, getattr(adaln, name)._replace(chunk=8))
    split = run(biased(gated_rmsnorm_modulate), BIASED, arguments, upstream)
    for index, (a, b) in enumerate(zip(whole, split)):
        if index < 4:  # x', h, dx, dy
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_the_same_bits_every_time():
    arguments, upstream = draw((3, 40, 100), torch.float16, seed=5)
    first = run(gated_rmsnorm_modulate, GATED, arguments, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, run(gated_rmsnorm_modulate, GATED, arguments, upstream)))


def test_compiled_whole_equals_eager():
    arguments, upstream = draw((2, 9, 96), seed=6)

    def two_halves(x, y, gate, weight, shift, scale):
        h = rmsnorm_modulate(x, weight, shift, scale)
        return gated_rmsnorm_modulate(x, y * h, gate, weight, shift, scale)

    compiled = torch.compile(two_halves, backend="aot_eager", fullgraph=True)
    expected = run(two_halves, GATED, arguments, upstream)
    for a, b in zip(run(compiled, GATED, arguments, upstream), expected):
        assert torch.equal(a, b)


def test_bias_of_a_linear_before_it_compiled_and_eager():
    arguments, upstream = draw((2, 9, 96), seed=10)
    matrix = torch.randn(96, 96, generator=torch.Generator().manual_seed(11)).to(DEVICE) / 10

    def split(x, y, *rest):
        y = torch.nn.functional.linear(y, matrix, rest[-1].detach())
        return biased(gated_rmsnorm_modulate)(x, y, *rest)

    def whole(x, y, *rest):
        return reference.gated_rmsnorm_modulate(x, torch.nn.functional.linear(y, matrix, rest[-1]), *rest[:-1])

    expected = run(split, BIASED, arguments, upstream)
    for a, b in zip(expected, run(whole, BIASED, arguments, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    got = run(compiled, BIASED, arguments, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [GATED, BIASED])
def test_inductor_equals_eager(dtype, names):
    arguments, upstream = draw((4, 256, 1152), dtype, seed=7)
    function = biased(gated_rmsnorm_modulate) if names == BIASED else gated_rmsnorm_modulate
    expected = run(function, names, arguments, upstream)
    for a, b in zip(run(torch.compile(function, fullgraph=True), names, arguments, upstream), expected):
        assert torch.equal(a, b)


def test_registration_of_the_operators():
    arguments, (dresidual, dout) = draw((2, 3, 8), seed=8)
    values = [arguments[name] for name in GATED]
    leaves = [value.clone().requires_grad_() for value in values]
    x, y, gate, weight, _, scale = values
    ops = torch.ops.fastasync
    saved = (dresidual, dout, x, y, gate, weight, scale, 1e-6)
    for bias in (None, arguments["bias"].requires_grad_()):
        torch.library.opcheck(ops.gated_rmsnorm_modulate, (*leaves, 1e-6, bias))
        torch.library.opcheck(ops.gated_rmsnorm_modulate_backward, (*saved, None if bias is None else bias.dtype))
    torch.library.opcheck(ops.rmsnorm_modulate, (leaves[0], *leaves[3:], 1e-6))
    torch.library.opcheck(ops.rmsnorm_modulate_backward, (dout, x, weight, scale, 1e-6))


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("x", lambda t: t.double(), TypeError, "x must be .* not torch.float64"),
        ("x", lambda t: t[0], ValueError, "x must have shape"),
        ("x", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "x has stride 3"),
        ("y", lambda t: t.half(), TypeError, "y must be torch.float32"),
        ("y", lambda t: t[:, :2], ValueError, "y must have shape"),
        ("gate", lambda t: t[:1], ValueError, "gate must have shape"),
        ("shift", lambda t: t.half(), TypeError, "shift must be torch.float32"),
        ("scale", lambda t: t.t().contiguous().t(), ValueError, "scale has stride 2"),
        ("weight", lambda t: t.half(), TypeError, "weight must be torch.float32"),
        ("weight", lambda t: t[:-1], ValueError, "weight must have shape"),
        ("bias", lambda t: t.half(), TypeError, "bias must be torch.float32"),
        ("bias", lambda t: t[:-1], ValueError, "bias must have shape"),
    ],
)
def test_refusals(name, change, error, words):
    arguments, _ = draw((2, 3, 8))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=words):
        biased(gated_rmsnorm_modulate)(*(arguments[name] for name in BIASED))
    if name in PLAIN:
        with pytest.raises(error, match=words):
            rmsnorm_modulate(*(arguments[name] for name in PLAIN))


def test_another_device_is_refused():
    arguments, _ = draw((2, 3, 8))
    # the check itself: the dispatcher would send a meta tensor to the shape-only implementation
    with pytest.raises(ValueError, match="scale is on meta, the other arguments on"):
        adaln._check(arguments["x"], None, arguments["weight"], {"scale": arguments["scale"].to("meta")})
    with pytest.raises(ValueError, match="x is on meta: the Triton kernels need CUDA; choose kernels=reference"):
        adaln._check(arguments["x"].to("meta"), None, arguments["weight"], {})
