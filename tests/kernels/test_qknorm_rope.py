"""QK-norm and RoPE from packed qkv: against the reference and fp64, layouts, views, refusals, torch.compile."""

import pytest
import torch
from fastasync_kernels import qknorm_rope as module
from fastasync_kernels import reference
from fastasync_kernels.attention import attention
from fastasync_kernels.qknorm_rope import qknorm_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
BIASES = [  # of qkv, and whether the bias is so too or float32
    (torch.float32, True),
    *((torch.float16, alike) for alike in (False, True)),
    *(pytest.param(torch.bfloat16, alike, marks=pytest.mark.gpu) for alike in (False, True)),
]
SHAPES = [(3, 5, 2, 72), (1, 1, 16, 72), (2, 3, 6, 64), (18, 1, 1, 96), (2, 2, 3, 100), (1, 2, 5, 4)]  # B, N, heads, Dh


def draw(shape, dtype=torch.float32, seed=0):
    """qkv, both weights (float32), cos and sin of unrelated angles for every column, and three upstream gradients."""
    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    qkv = normal(batch, tokens, 3 * heads * width).to(DEVICE, dtype)
    weights = [(0.5 + torch.rand(width, generator=generator)).to(DEVICE) for _ in range(2)]
    angle = normal(tokens, width)
    upstream = [normal(batch, heads, tokens, width).to(DEVICE, dtype) for _ in range(3)]
    return [qkv, *weights, angle.cos().to(DEVICE), angle.sin().to(DEVICE)], heads, upstream


def run(function, arguments, heads, upstream, dtype=None, bias=None, **options):
    """q, k, v and the gradients of qkv, of both weights and of the bias if there is one."""
    tables = [t.to(dtype or t.dtype) for t in arguments[3:]]
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in arguments[:3]]
    if bias is not None:
        options["bias"] = bias.detach().to(dtype or bias.dtype).requires_grad_()
    out = function(*leaves, *tables, heads, **options)
    leaves += [options["bias"]] if bias is not None else []
    grads = torch.autograd.grad(out, leaves, [g.to(out[0].dtype) for g in upstream])
    return [t.detach() for t in (*out, *grads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_no_worse_than_twice_the_reference(shape, dtype, no_worse):
    arguments, heads, upstream = draw(shape, dtype)
    truth = run(reference.qknorm_rope, arguments, heads, upstream, torch.float64)
    theirs = run(reference.qknorm_rope, arguments, heads, upstream)
    ours = run(qknorm_rope, arguments, heads, upstream)
    no_worse(ours, theirs, truth, ["q", "k", "v", "dqkv", "dq_weight", "dk_weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_part_of_the_packed_gradient(dtype, no_worse):
    """One norm over dqkv could hide an error in a small part: q, k and v one by one, and v exactly."""
    arguments, heads, upstream = draw((2, 3, 2, 72), dtype, seed=1)
    results = [
        run(qknorm_rope, arguments, heads, upstream),
        run(reference.qknorm_rope, arguments, heads, upstream),
        run(reference.qknorm_rope, arguments, heads, upstream, torch.float64),
    ]
    no_worse(*[result[3].chunk(3, dim=-1) for result in results], ["dq", "dk", "dv"])
    assert torch.equal(results[0][3].chunk(3, dim=-1)[2], upstream[2].transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("dtype", "bias_like_qkv"), BIASES)
@pytest.mark.parametrize("shape", [*SHAPES, (35, 2, 2, 4)])
def test_gradient_of_a_bias_is_the_sum_of_dqkv_and_nothing_else_changes(shape, dtype, bias_like_qkv, no_worse):
    arguments, heads, upstream = draw(shape, dtype, seed=13)
    bias = torch.linspace(-3.0, 3.0, arguments[0].shape[-1], dtype=dtype if bias_like_qkv else None).to(DEVICE)
    truth = run(reference.qknorm_rope, arguments, heads, upstream, torch.float64, bias)
    torch.testing.assert_close(truth[-1], truth[3].sum((0, 1)))
    theirs = run(reference.qknorm_rope, arguments, heads, upstream, bias=bias)
    ours = run(qknorm_rope, arguments, heads, upstream, bias=bias)
    no_worse(ours, theirs, truth, ["q", "k", "v", "dqkv", "dq_weight", "dk_weight", "dbias"])
    no_worse(*[result[-1].chunk(3) for result in (ours, theirs, truth)], ["dq_bias", "dk_bias", "dv_bias"])
    for function, with_bias in ((qknorm_rope, ours), (reference.qknorm_rope, theirs)):
        assert all(torch.equal(a, b) for a, b in zip(with_bias[:3], run(function, arguments, heads, upstream)))
    # not read
    repeated = run(qknorm_rope, arguments, heads, upstream, bias=torch.full_like(bias, float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(repeated, ours, strict=True))


def test_weights_may_have_the_dtype_of_qkv(no_worse):
    arguments, heads, upstream = draw((2, 3, 2, 72), torch.float16, seed=2)
    arguments[1:3] = [weight.half() for weight in arguments[1:3]]
    truth = run(reference.qknorm_rope, arguments, heads, upstream, torch.float64)
    no_worse(
        run(qknorm_rope, arguments, heads, upstream), run(reference.qknorm_rope, arguments, heads, upstream), truth
    )


@pytest.mark.parametrize("shape", [(0, 3, 2, 72), (2, 0, 2, 72)])
def test_empty_batch_and_no_tokens(shape):
    arguments, heads, upstream = draw(shape)
    bias = torch.ones(3 * 2 * 72, device=DEVICE)
    q, k, v, dqkv, dq_weight, dk_weight, dbias = run(qknorm_rope, arguments, heads, upstream, bias=bias)
    assert q.shape == k.shape == v.shape == (shape[0], 2, shape[1], 72)
    assert dqkv.shape == arguments[0].shape
    assert not dq_weight.any()
    assert not dk_weight.any()
    assert dbias.shape == bias.shape
    assert not dbias.any()


def test_memory_order_is_a_choice_and_v_is_a_view():
    arguments, heads, upstream = draw((2, 3, 3, 8), seed=3)
    rows, planes = (run(qknorm_rope, arguments, heads, upstream, layout=layout) for layout in module.LAYOUTS)
    assert all(torch.equal(a, b) for a, b in zip(rows, planes))
    q, k, v = qknorm_rope(*arguments, heads)
    assert all(part.transpose(1, 2).is_contiguous() for part in (q, k))
    assert all(part.is_contiguous() for part in qknorm_rope(*arguments, heads, layout="bhnd")[:2])
    assert v.data_ptr() == arguments[0][:, :, 2 * 3 * 8 :].data_ptr()
    assert v.untyped_storage().data_ptr() == arguments[0].untyped_storage().data_ptr()


def test_strided_input_and_gradients_equal_contiguous_ones():
    arguments, heads, _ = draw((2, 5, 3, 8), seed=4)
    wide = torch.randn(2, 7, 100, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    view = wide[:, 1:6, 10:82].requires_grad_()
    upstream = [
        torch.randn(2, 5, 3, 8, device=DEVICE).transpose(1, 2),
        torch.randn(2, 3, 8, 5, device=DEVICE).transpose(2, 3),
        torch.ones(1, device=DEVICE).expand(2, 3, 5, 8),
    ]
    out = qknorm_rope(view, *arguments[1:], heads)
    (grad,) = torch.autograd.grad(out, view, upstream)
    packed = [view.detach().contiguous(), *arguments[1:]]
    expected = run(qknorm_rope, packed, heads, [g.contiguous() for g in upstream])
    assert all(torch.equal(a, b) for a, b in zip((*out, grad), expected))


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_output_alone(used):
    arguments, heads, upstream = draw((2, 3, 2, 8), seed=6)
    qkv = arguments[0].clone().requires_grad_()
    out = qknorm_rope(qkv, *arguments[1:], heads)
    (grad,) = torch.autograd.grad(out[used], qkv, upstream[used])
    zeros = [g if part == used else torch.zeros_like(g) for part, g in enumerate(upstream)]
    assert torch.equal(grad, run(qknorm_rope, arguments, heads, zeros)[3])


def test_the_split_into_programs_changes_only_the_order_of_sums(monkeypatch):
    arguments, heads, upstream = draw((5, 1, 2, 72), seed=7)
    biases = (None, torch.ones(3 * 2 * 72, device=DEVICE))
    wholes = [run(qknorm_rope, arguments, heads, upstream, bias=bias) for bias in biases]
    for name in ("FORWARD", "BACKWARD", "BIAS_BACKWARD"):
        monkeypatch.setattr(module, name, getattr(module, name)._replace(chunk=2))
    for whole, bias in zip(wholes, biases):
        split = run(qknorm_rope, arguments, heads, upstream, bias=bias)
        assert all(torch.equal(a, b) for a, b in zip(whole[:4], split[:4]))
        for a, b in zip(whole[4:], split[4:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time():
    arguments, heads, upstream = draw((3, 2, 2, 72), torch.float16, seed=8)
    first = run(qknorm_rope, arguments, heads, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, run(qknorm_rope, arguments, heads, upstream)))


def test_compiled_whole_equals_eager():
    """Both with attention behind it, as in the model, and with q, k and the view v leaving the compiled region."""
    arguments, heads, upstream = draw((2, 3, 2, 8), seed=9)

    def block(qkv, *rest):
        return (attention(*qknorm_rope(qkv * 2.0, *rest), backend="reference"),)

    for function in (block, qknorm_rope):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        count = 1 if function is block else 3
        expected = run(function, arguments, heads, upstream[:count])
        got = run(compiled, arguments, heads, upstream[:count])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bias_of_a_linear_before_it_compiled_and_eager():
    arguments, heads, upstream = draw((2, 3, 2, 8), seed=14)
    generator = torch.Generator().manual_seed(15)
    matrix, bias = (torch.randn(*size, generator=generator).to(DEVICE) for size in ((48, 48), (48,)))

    def split(x, *rest, bias):
        return qknorm_rope(torch.nn.functional.linear(x, matrix, bias.detach()), *rest, bias=bias)

    def whole(x, *rest, bias):
        return reference.qknorm_rope(torch.nn.functional.linear(x, matrix, bias), *rest)

    expected = run(split, arguments, heads, upstream, bias=bias)
    for a, b in zip(expected, run(whole, arguments, heads, upstream, bias=bias), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    got = run(compiled, arguments, heads, upstream, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_weight_for_q_and_k_gets_both_gradients_compiled_too():
    arguments, heads, upstream = draw((2, 2, 2, 8), seed=12)
    apart = run(qknorm_rope, arguments[:2] + arguments[1:2] + arguments[3:], heads, upstream)

    def shared(qkv, weight, *rest):
        return qknorm_rope(qkv, weight, weight, *rest)

    for function in (shared, torch.compile(shared, backend="aot_eager", fullgraph=True)):
        qkv, weight = (t.clone().requires_grad_() for t in arguments[:2])
        grads = torch.autograd.grad(function(qkv, weight, *arguments[3:], heads), (qkv, weight), upstream)
        assert torch.equal(grads[0], apart[3])
        torch.testing.assert_close(grads[1], apart[4] + apart[5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_inductor_equals_eager(dtype, with_bias):
    arguments, heads, upstream = draw((4, 256, 16, 72), dtype, seed=10)
    bias = torch.ones(3 * 16 * 72, device=DEVICE) if with_bias else None
    compiled = torch.compile(qknorm_rope, fullgraph=True)
    expected = run(qknorm_rope, arguments, heads, upstream, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, arguments, heads, upstream, bias=bias), expected))


def test_registration_of_the_operators():
    arguments, heads, upstream = draw((2, 2, 2, 4), seed=11)
    torch.library.opcheck(torch.ops.fastasync.qknorm_rope, (*arguments, heads, 1e-6, "bnhd"))
    for bias in (None, torch.float32):
        torch.library.opcheck(torch.ops.fastasync.qknorm_rope_backward, (*upstream, *arguments, heads, 1e-6, bias))
    torch.library.opcheck(torch.ops.fastasync.qknorm_rope_backward_hint, (*upstream, *arguments, heads, 1e-6))


@pytest.mark.parametrize(
    ("index", "change", "error", "words"),
    [
        (0, lambda t: t.double(), TypeError, "qkv must be .* not torch.float64"),
        (0, lambda t: t[0], ValueError, "qkv must have shape"),
        (0, lambda t: t[..., :-1], ValueError, "23 features, which is not 3 x 2 heads"),
        (0, lambda t: t[..., :18], ValueError, "even and at least 4"),
        (0, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "qkv has stride 3"),
        (1, lambda t: t.half(), TypeError, "q_weight must be torch.float32"),
        (2, lambda t: t[:2], ValueError, "k_weight must have shape"),
        (3, lambda t: t.half(), TypeError, "cos must be torch.float32"),
        (4, lambda t: t[:2], ValueError, "sin must have shape"),
        (4, lambda t: t.t().contiguous().t(), ValueError, "sin must be contiguous"),
    ],
)
def test_refusals(index, change, error, words):
    arguments, heads, _ = draw((1, 3, 2, 4))
    arguments[index] = change(arguments[index])
    with pytest.raises(error, match=words):
        qknorm_rope(*arguments, heads)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.half(), TypeError, "bias must be torch.float32"),
        (lambda t: t[:-1], ValueError, "bias must have shape"),
        (lambda t: t.to("meta"), ValueError, "bias is on meta, the other arguments on"),
    ],
)
def test_refused_biases(change, error, words):
    arguments, heads, _ = draw((1, 3, 2, 4))
    with pytest.raises(error, match=words):
        qknorm_rope(*arguments, heads, bias=change(torch.ones(24, device=DEVICE)))


def test_unknown_layout_is_refused():
    arguments, heads, _ = draw((1, 3, 2, 4))
    with pytest.raises(ValueError, match="layout must be one of bnhd, bhnd, not 'nbhd'"):
        qknorm_rope(*arguments, heads, layout="nbhd")


def test_another_device_is_refused():
    arguments, heads, _ = draw((1, 3, 2, 4))
    # the check itself: the dispatcher would send a meta tensor to the shape-only implementation
    with pytest.raises(ValueError, match="sin is on meta, the other arguments on"):
        module._check(*arguments[:4], arguments[4].to("meta"), heads, "bnhd")
