"""Casts to fp8 against their definition, the linear layer against the products of what its casts stand for."""

import dataclasses

import pytest
import torch
from fastasync_kernels import fp8_casts, reference, triton_ops
from fastasync_kernels.fp8_linear import fp8_linear, fp8_mlp, frozen_linear, frozen_rows
from fastasync_kernels.tops import hint_size

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FLOATS = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
SHAPES = [(1, 2), (37, 72), (130, 48), (64, 1152), (3, 3456), (5, 6144)]


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator) * torch.logspace(-4, 3, shape[-2])[:, None]
    return rows.to(dtype).to(DEVICE)


def same_fp8(ours, theirs):
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_casts_equal_their_reference(shape, dtype):
    x = draw(*shape, dtype=dtype)
    (rows, scale, top), (rows_, scale_, top_) = (ops.cast_rows(x, True) for ops in (triton_ops, reference))
    assert torch.equal(scale, scale_)
    assert torch.equal(top, top_)
    assert rows.shape == rows_.shape
    assert same_fp8(rows, rows_)
    (columns, divisor), (columns_, divisor_) = (ops.cast_columns(x, top) for ops in (triton_ops, reference))
    assert columns.shape == (shape[1], -(-shape[0] // 16) * 16)
    assert same_fp8(columns, columns_)
    assert torch.equal(divisor, divisor_)
    assert triton_ops.cast_rows(x)[2].shape == (0,)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [72, 1152])
def test_programs_of_many_rows_give_the_same_bits(width, dtype, monkeypatch):
    """As casts of many rows run: several steps a program, rows that end within one."""
    monkeypatch.setattr(fp8_casts, "PROGRAMS", 4)
    monkeypatch.setattr(fp8_casts, "TOPS_PROGRAMS", 4)
    x = draw(301, width, dtype=dtype)
    rows, scale, top = reference.cast_rows(x, True)
    for tops in (False, True):
        ours = triton_ops.cast_rows(x, tops)
        assert same_fp8(ours[0], rows)
        assert torch.equal(ours[1], scale)
    assert torch.equal(ours[2], top)
    hint = torch.zeros(hint_size(*x.shape, 1), device=DEVICE)
    ours = fp8_casts.cast_hinted(x, hint, 1, False)[:4]
    for found, known in zip(ours, (rows, scale, *reference.cast_columns(x, top))):
        assert torch.equal(found.view(torch.uint8), known.view(torch.uint8))


def test_the_reference_is_the_definition():
    x = draw(21, 64)
    rows, scale, top = reference.cast_rows(x, True)
    assert torch.equal(scale[:, 0], x.abs().amax(1) * (1 / 448))
    assert torch.equal(top, x.abs().amax(0))
    assert float(rows.float().abs().max()) == 448
    # e4m3 has 3 bits of mantissa, and steps of 2**-9 below 2**-6
    error = (rows.float() * scale - x).abs()
    assert bool((error <= (x.abs() / 16).maximum(scale * 2.0**-10) * (1 + 1e-5)).all())
    columns, divisor = reference.cast_columns(x, top)
    again = reference.cast_rows(x.t().contiguous())
    assert torch.equal(columns[:, :21].float(), again[0].float())
    assert torch.equal(divisor, again[1])
    assert not columns[:, 21:].float().any()


def test_zeros_stay_zeros_and_nan_stays():
    x = torch.zeros(3, 32, device=DEVICE)
    x[1, 4] = torch.nan
    for ops in (reference, triton_ops):
        rows = ops.cast_rows(x)[0].float()
        assert not rows[[0, 2]].any()
        assert bool(rows[1, 4].isnan())


def test_no_rows_launch_nothing():
    x = draw(0, 32)
    assert [t.shape for t in triton_ops.cast_rows(x, True)] == [(0, 32), (0, 1), (32,)]
    assert [t.shape for t in triton_ops.cast_columns(x, torch.zeros(32, device=DEVICE))] == [
        (32, 0),
        (32, 1),
    ]


def test_rows_of_a_wider_tensor():
    wide = draw(20, 96)
    part = wide[:, 16:80]
    for one, other in zip(triton_ops.cast_rows(part, True), triton_ops.cast_rows(part.contiguous(), True)):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("rows", [7, 32])
def test_the_products_are_of_what_the_casts_stand_for(triton, rows):
    """The three products in float64 of the dequantised factors; what is left is bf16's rounding of the result."""
    ops = triton_ops if triton else reference
    x, g = draw(rows, 64, dtype=torch.bfloat16), draw(rows, 48, dtype=torch.bfloat16, seed=1)
    weight, bias = draw(48, 64, seed=2).requires_grad_(), torch.randn(48, device=DEVICE).requires_grad_()
    leaf = x.detach().requires_grad_()
    y = fp8_linear(leaf, weight, bias, triton)
    dx, dw, dbias = torch.autograd.grad(y, (leaf, weight, bias), g)
    assert (y.dtype, dx.dtype, dw.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)

    def by_rows(t):
        values, scale, _ = ops.cast_rows(t)
        return values.double() * scale.double()

    def by_columns(t):
        values, scale = ops.cast_columns(t, ops.cast_rows(t, True)[2])
        return (values.double() * scale.double()).t()[: len(t)]

    w = weight.detach()
    expected = [by_rows(x) @ by_rows(w).t() + bias.detach().bfloat16().double(), by_rows(g) @ by_columns(w)]
    expected += [by_columns(g).t() @ by_columns(x), g.double().sum(0)]
    for found, truth in zip((y, dx, dw, dbias), expected):
        assert float((found.detach().double() - truth).norm()) <= 2.0**-8 * float(truth.norm())


def test_only_what_is_asked_for():
    x, weight = draw(16, 32, dtype=torch.bfloat16), draw(16, 32, seed=3)
    whole = [t.detach().requires_grad_() for t in (x, weight)]
    g = torch.ones(16, 16, device=DEVICE, dtype=torch.bfloat16)
    both = torch.autograd.grad(fp8_linear(*whole), whole, g)
    assert torch.equal(torch.autograd.grad(fp8_linear(whole[0], weight), whole[0], g)[0], both[0])
    assert torch.equal(torch.autograd.grad(fp8_linear(x, whole[1]), whole[1], g)[0], both[1])
    with torch.no_grad():
        assert torch.equal(fp8_linear(x, weight), fp8_linear(*whole))


def test_a_frozen_weight_gives_the_same():
    x, weight, bias = draw(2, 16, 32, dtype=torch.bfloat16), draw(48, 32, seed=3), draw(1, 48)[0]
    for triton in (False, True):
        known = fp8_linear(x, weight, bias, triton)
        assert torch.equal(frozen_linear(x, frozen_rows(weight, triton), bias, triton), known)


def mlp(x, w12, b12, w3, b3):
    packed = fp8_linear(x, w12, b12.detach())
    return fp8_linear(triton_ops.swiglu(packed, bias=b12), w3, b3)


@pytest.mark.parametrize("rows", [5, 150])
@pytest.mark.parametrize("hidden", [48, 1040])
def test_the_mlp_is_its_three_operations_bit_for_bit(rows, hidden):
    """1,040 columns are two of swiglu's blocks, 150 rows three of its chunks."""
    shapes = [(rows, 32), (2 * hidden, 32), (1, 2 * hidden), (64, hidden), (1, 64)]
    leaves = [draw(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    leaves = [(t[0] if len(t) == 1 else t).mul(0.1).requires_grad_() for t in leaves]
    g = draw(rows, 64, dtype=torch.bfloat16, seed=9)
    y, expected = fp8_mlp(*leaves), mlp(*leaves)
    ours, theirs = ([out, *torch.autograd.grad(out, leaves, g)] for out in (y, expected))
    differ = [
        name for name, a, b in zip(("y", "dx", "dw12", "db12", "dw3", "db3"), ours, theirs) if not torch.equal(a, b)
    ]
    assert differ == []


def test_compiled_equals_eager():
    x = draw(2 * 19, 32, dtype=torch.bfloat16).unflatten(0, (2, 19)).requires_grad_()
    weight, bias = draw(48, 32, seed=4).requires_grad_(), torch.ones(48, device=DEVICE).requires_grad_()
    g = torch.ones(2, 19, 48, device=DEVICE, dtype=torch.bfloat16)
    eager = fp8_linear(x, weight, bias)
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="inductor" if CUDA else "aot_eager")(x, weight, bias)
    for one, other in zip(
        *([y, *torch.autograd.grad(y, (x, weight, bias), g)] for y in (eager, compiled)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@pytest.mark.skipif(CUDA, reason="torchao's emulation, on a CPU")
def test_the_same_recipe_as_torchaos():
    from torchao import float8
    from torchao.float8.config import Float8LinearConfig

    linear = torch.nn.Linear(64, 48)
    x, g = draw(32, 64, dtype=torch.bfloat16), draw(32, 48, dtype=torch.bfloat16, seed=1)
    config = Float8LinearConfig.from_recipe_name("rowwise")
    config = dataclasses.replace(config, emulate=True, round_scales_to_power_of_2=False)
    theirs = float8.convert_to_float8_training(torch.nn.Sequential(linear).bfloat16(), config=config)[0]
    weight, leaf = theirs.weight, x.detach().requires_grad_()
    y = theirs(leaf)
    known = [y, *torch.autograd.grad(y, (leaf, weight), g)]
    y = fp8_linear(leaf, weight, theirs.bias, triton=False)
    for one, other in zip([y, *torch.autograd.grad(y, (leaf, weight), g)], known):
        assert float((one - other).detach().double().norm()) <= 2.0**-7 * float(other.detach().double().norm())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x.double(), TypeError, "float64"),
        (lambda x: x[0], ValueError, "shape"),
        (lambda x: x.t(), ValueError, "contiguous"),
        (lambda x: x[:, :1], ValueError, "columns"),
    ],
)
def test_bad_input_is_refused_before_the_launch(change, error, words):
    with pytest.raises(error, match=words):
        triton_ops.cast_rows(change(draw(8, 32)))


def test_registration_of_the_operators():
    x, ops = draw(5, 32), torch.ops.fastasync
    for tops in (False, True):
        torch.library.opcheck(ops.cast_rows, (x, tops))
    torch.library.opcheck(ops.cast_columns, (x, x.abs().amax(0)))
    torch.library.opcheck(ops.swiglu_cast, (x,))
    torch.library.opcheck(ops.swiglu_backward_cast, (x[:, :16].contiguous(), x))


def test_sizes_that_the_products_cannot_take():
    with pytest.raises(ValueError, match=r"weight has shape \[48, 60\]"):
        fp8_linear(draw(8, 60), draw(48, 60))
