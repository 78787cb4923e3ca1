"""Largest magnitudes on the way: exact where an operation writes, and the casts and gradients are the same bits."""

import pytest
import torch
from fastasync_kernels import adaln, adaln_tops, fp8_casts, qknorm_rope, reference
from fastasync_kernels.fp8_linear import (
    ADALN_PARTS,
    QKNORM_PARTS,
    fp8_linear,
    fp8_linear_hinted,
    fp8_mlp,
    fp8_mlp_hinted,
    unhinted,
)
from fastasync_kernels.tops import Tops, hint_size, split_hint

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [(2, 17, 72), (1, 1, 96), (3, 40, 100), (2, 34, 1152), (0, 5, 96)]  # batch, tokens, width


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def rough(*shape, dtype=torch.bfloat16, seed=0):
    """Rows of very different sizes."""
    return (draw(*shape, seed=seed) * torch.logspace(-2, 2, shape[-2], device=DEVICE)[:, None]).to(dtype)


def adaln_arguments(shape, dtype):
    batch, _, width = shape
    x, y = (draw(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    gate, shift, scale = (draw(batch, width, dtype=dtype, seed=seed) for seed in (3, 4, 5))
    return x, y, gate, 1 + 0.1 * draw(width, seed=6), shift, scale


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def same_bytes(ours, theirs):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))


def assert_tops(tops, matrix):
    flat = matrix.flatten(0, -2).float().abs()
    assert torch.equal(tops.rows.amax(1), flat.amax(1) if flat.numel() else flat.sum(1))
    assert torch.equal(tops.columns, flat.amax(0) if flat.numel() else flat.sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_adaln_gives_the_magnitudes_of_h_and_the_same_h(shape, dtype):
    x, y, gate, *rest = adaln_arguments(shape, dtype)
    h, tops = adaln_tops.rmsnorm_modulate_tops(x, *rest)
    assert torch.equal(h, adaln.rmsnorm_modulate(x, *rest))
    assert_tops(tops, h)
    residual, h, tops = adaln_tops.gated_rmsnorm_modulate_tops(x, y, gate, *rest)
    assert same((residual, h), adaln.gated_rmsnorm_modulate(x, y, gate, *rest))
    assert_tops(tops, h)
    assert adaln_tops.gated_rmsnorm_modulate_tops(x, y, gate, *rest, tops=False)[2] is None


@pytest.mark.parametrize("tops", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_adalns_backward_gives_the_magnitudes_of_dy_and_the_same_gradients(shape, dtype, tops):
    leaves = [t.requires_grad_() for t in adaln_arguments(shape, dtype)]
    rows, width = shape[0] * shape[1], shape[2]
    hint = torch.full((hint_size(rows, width, ADALN_PARTS),), torch.nan, device=DEVICE).requires_grad_()  # not read
    upstream = [draw(*shape, dtype=dtype, seed=seed) for seed in (7, 8)]
    out = adaln_tops.gated_rmsnorm_modulate_tops(*leaves, hint=hint, tops=tops)[:2]
    *ours, dhint = torch.autograd.grad(out, [*leaves, hint], upstream)
    assert same(ours, torch.autograd.grad(adaln.gated_rmsnorm_modulate(*leaves), leaves, upstream))
    found, count = split_hint(dhint, rows, ADALN_PARTS)
    assert_tops(found, ours[1])
    assert float(count) == 1
    residual, h, *_ = adaln_tops.gated_rmsnorm_modulate_tops(*leaves, hint=hint, tops=tops)
    for one, gradient in ((residual, upstream[0]), (h, upstream[1])):  # only one of the two is used
        dy, dhint = torch.autograd.grad(one, [leaves[1], hint], gradient, retain_graph=True)
        assert_tops(split_hint(dhint, rows, ADALN_PARTS)[0], dy)


@pytest.mark.parametrize("rows", [2, 4])
def test_several_rows_at_a_time_and_other_chunks(monkeypatch, rows):
    leaves = [t.requires_grad_() for t in adaln_arguments((2, 37, 72), torch.float32)]
    for name in ("TOPS_FORWARD", "TOPS_GATED_FORWARD", "TOPS_BACKWARD"):
        monkeypatch.setattr(adaln, name, getattr(adaln, name)._replace(chunk=8, rows=rows))
    hint = torch.zeros(hint_size(74, 72, ADALN_PARTS), device=DEVICE).requires_grad_()
    out = adaln_tops.gated_rmsnorm_modulate_tops(*leaves, hint=hint)
    assert_tops(out[2], out[1])
    dy, dhint = torch.autograd.grad(out[1], [leaves[1], hint], draw(2, 37, 72, seed=9))
    assert_tops(split_hint(dhint, 74, ADALN_PARTS)[0], dy)
    h, tops = adaln_tops.rmsnorm_modulate_tops(leaves[0], *leaves[3:])
    assert_tops(tops, h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 2, 8), (1, 3, 3, 16), (35, 2, 1, 16), (2, 4, 16, 72), (0, 4, 2, 8)])
def test_qknorms_backward_gives_the_magnitudes_of_dqkv_and_the_same_gradients(shape, dtype):
    batch, tokens, heads, head = shape
    packed = 3 * heads * head
    weights = [(1 + 0.1 * draw(head, seed=seed)).requires_grad_() for seed in (1, 2)]
    tables = draw(tokens, head, seed=3).cos(), draw(tokens, head, seed=4).sin()
    leaves = [draw(batch, tokens, packed, dtype=dtype).requires_grad_(), *weights]
    hint = torch.full((hint_size(batch * tokens, packed, QKNORM_PARTS),), torch.nan, device=DEVICE).requires_grad_()
    upstream = [draw(batch, heads, tokens, head, dtype=dtype, seed=seed) for seed in (5, 6, 7)]
    *ours, dhint = torch.autograd.grad(
        qknorm_rope.qknorm_rope(*leaves, *tables, heads, hint=hint), [*leaves, hint], upstream
    )
    theirs = torch.autograd.grad(qknorm_rope.qknorm_rope(*leaves, *tables, heads), leaves, upstream)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours[1:], theirs[1:]):  # sums of fewer samples at a time
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    found, count = split_hint(dhint, batch * tokens, QKNORM_PARTS)
    assert_tops(found, ours[0])
    assert float(count) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ())])
@pytest.mark.parametrize("shape", [(1, 16), (37, 80), (130, 48), (64, 1152), (300, 32)])
def test_one_pass_casts_the_same_bits_as_two(shape, dtype):
    x = rough(*shape, dtype=dtype)
    rows, scale, top = reference.cast_rows(x, True)
    known = [rows, scale, *reference.cast_columns(x, top)]
    parts = x.float().abs().unflatten(1, (4, -1)).amax(2)
    assert same_bytes(fp8_casts.cast_both(x, Tops(parts, top)), known)
    for count in (
        1.0,
        0.0,
        2.0,
    ):  # of the whole tensor; given to nobody; of two readers, whose magnitudes are not its own
        wrong = 1.0 if count == 1 else 0.3 * count
        hint = torch.cat([wrong * parts.flatten(), wrong * top, torch.tensor([count], device=DEVICE)])
        *ours, total = fp8_casts.cast_hinted(x, hint, 4, True)
        assert same_bytes(ours, known), count
        truth = x.double().sum(0)
        allowed = (x.float().sum(0).double() - truth).norm() + 2.0**-24 * x.double().abs().sum(0).norm()
        assert float((total.double() - truth).norm()) <= 2 * float(allowed)
        assert fp8_casts.cast_hinted(x, hint, 4, False)[4].shape == (0,)


def test_no_rows_launch_nothing():
    x = draw(0, 32)
    hint = torch.zeros(hint_size(0, 32, 4), device=DEVICE)
    shapes = [(0, 32), (0, 1), (32, 0), (32, 1)]
    assert [t.shape for t in fp8_casts.cast_both(x, split_hint(hint, 0, 4)[0])] == shapes
    *found, total = fp8_casts.cast_hinted(x, hint, 4, True)
    assert [t.shape for t in found] == shapes
    assert torch.equal(total, torch.zeros(32, device=DEVICE))


def test_a_number_above_its_magnitude_becomes_nan():
    x = rough(40, 48, dtype=torch.float32)
    tops = Tops(x.abs().amax(1, keepdim=True), x.abs().amax(0))
    x[3, 5] *= 1e6
    rows, _, columns, _ = (t.float() for t in fp8_casts.cast_both(x, tops))
    assert rows.isnan().nonzero().tolist() == [[3, 5]]
    assert columns.isnan().nonzero().tolist() == [[5, 3]]


def layer(x, y, gate, weight, shift, scale, matrix, bias, how):
    """A norm, a linear in fp8, a gated norm: through the hint, or through the plain operations."""
    if how == "plain":
        h = adaln.rmsnorm_modulate(x, weight, shift, scale)
        z = fp8_linear(h, matrix, bias)
        return adaln.gated_rmsnorm_modulate(y, z, gate, weight, shift, scale), z
    h, tops = adaln_tops.rmsnorm_modulate_tops(x, weight, shift, scale)
    z, hint = fp8_linear_hinted(h, matrix, bias, tops, ADALN_PARTS)
    return adaln_tops.gated_rmsnorm_modulate_tops(y, z, gate, weight, shift, scale, hint=hint)[:2], unhinted(z, hint)


def layer_leaves(dtype):
    x, y, gate, *rest = adaln_arguments((2, 70, 48), dtype)
    leaves = [x, y, gate, *rest, draw(48, 48, seed=10), draw(48, seed=11)]
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("again", [False, True])
def test_gradients_through_a_hint_are_those_without(dtype, again):
    """``again``: the linear's result has a second reader, who knows no hint."""
    leaves = layer_leaves(dtype)
    results = []
    for how in ("plain", "hint"):
        outputs, z = layer(*leaves, how)
        outputs = [*outputs, 3 * z] if again else list(outputs)
        upstream = [draw(2, 70, 48, dtype=dtype, seed=seed) for seed in range(20, 20 + len(outputs))]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    *plain, plain_bias = results[0]
    *hinted, hinted_bias = results[1]
    assert same(hinted, plain)
    torch.testing.assert_close(hinted_bias, plain_bias, rtol=1e-5, atol=1e-4)  # the same sum in another order


def test_two_readers_of_one_hint_and_none():
    """Both norms hand back magnitudes, which are not those of the sum of their gradients; or nobody does."""
    leaves = layer_leaves(torch.float32)
    x, y, gate, weight, shift, scale, matrix, bias = leaves
    z, hint = fp8_linear_hinted(x, matrix, bias, None, ADALN_PARTS)
    outs = [
        adaln_tops.gated_rmsnorm_modulate_tops(start, z, gate, weight, shift, scale, hint=hint)[1] for start in (x, y)
    ]
    plain = fp8_linear(x, matrix, bias)
    known = [adaln.gated_rmsnorm_modulate(start, plain, gate, weight, shift, scale)[1] for start in (x, y)]
    upstream = [draw(2, 70, 48, seed=seed) for seed in (30, 31)]
    for ours, theirs, g in ((outs, known, upstream), ([z], [plain], upstream[:1])):
        ours = torch.autograd.grad(ours, [x, matrix], g, retain_graph=True)
        assert same(ours, torch.autograd.grad(theirs, [x, matrix], g, retain_graph=True))


@pytest.mark.parametrize("known", [False, True])
def test_the_mlp_with_a_hint_is_the_mlp(known):
    shapes = [(150, 32), (96, 32), (1, 96), (64, 48), (1, 64)]
    leaves = [rough(*shape, seed=i) for i, shape in enumerate(shapes)]
    leaves = [(t[0] if len(t) == 1 else t).mul(0.1).requires_grad_() for t in leaves]
    x = leaves[0].detach().float().abs()
    tops = Tops(x.amax(1, keepdim=True), x.amax(0)) if known else None
    g = rough(150, 64, seed=9)
    y, hint = fp8_mlp_hinted(*leaves, tops, ADALN_PARTS)
    sizes = g.float().abs()
    given = torch.cat([sizes.unflatten(1, (4, -1)).amax(2).flatten(), sizes.amax(0), torch.ones(1, device=DEVICE)])
    *ours, db3 = torch.autograd.grad([y, hint], leaves, [g, given])
    expected = fp8_mlp(*leaves)
    *theirs, known_db3 = torch.autograd.grad(expected, leaves, g)
    assert torch.equal(y, expected)
    assert same(ours, theirs)
    torch.testing.assert_close(db3, known_db3, rtol=1e-2, atol=1e-2)  # bf16, summed in another order


def test_compiled_is_one_graph_with_the_same_numbers():
    leaves = layer_leaves(torch.float32)
    upstream = [draw(2, 70, 48, seed=seed) for seed in (20, 21, 22)]

    def network(*inputs):
        outputs, z = layer(*inputs, "hint")
        return *outputs, 3 * z

    expected = network(*leaves)
    compiled = torch.compile(network, fullgraph=True, backend="inductor" if CUDA else "aot_eager")(*leaves)
    ours, theirs = ([*out, *torch.autograd.grad(out, leaves, upstream)] for out in (compiled, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_registration_of_the_operators():
    x, y, gate, weight, shift, scale = (t.requires_grad_() for t in adaln_arguments((2, 3, 16), torch.float32))
    hint = torch.zeros(hint_size(6, 16, ADALN_PARTS), device=DEVICE).requires_grad_()
    ops = torch.ops.fastasync
    torch.library.opcheck(ops.rmsnorm_modulate_tops, (x, weight, shift, scale, 1e-6))
    for given, tops in ((hint, True), (None, False)):
        torch.library.opcheck(ops.gated_rmsnorm_modulate_tops, (x, y, gate, weight, shift, scale, 1e-6, given, tops))
    values = [t.detach() for t in (x, x, y, gate, weight, scale)]
    torch.library.opcheck(ops.gated_rmsnorm_modulate_backward_hint, (None, *values[:1], *values[1:], 1e-6))
    flat = x.detach().flatten(0, 1)
    torch.library.opcheck(ops.cast_both, (flat, flat.abs().amax(1, keepdim=True), flat.abs().amax(0)))
    torch.library.opcheck(ops.cast_hinted, (flat, hint.detach(), ADALN_PARTS, True))


def test_refusals():
    x, y, gate, *rest = adaln_arguments((2, 3, 16), torch.float32)
    with pytest.raises(ValueError, match=r"hint must have shape \[41\]"):
        adaln_tops.gated_rmsnorm_modulate_tops(x, y, gate, *rest, hint=torch.zeros(40, device=DEVICE))
    with pytest.raises(ValueError, match="at least 8 features"):
        adaln_tops.rmsnorm_modulate_tops(x[:, :, :4], rest[0][:4], rest[1][:, :4], rest[2][:, :4])
    tables = torch.ones(3, 4, device=DEVICE)
    qkv, weight = draw(2, 3, 48), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="bias and hint"):
        qknorm_rope.qknorm_rope(qkv, weight, weight, tables, tables, 4, bias=draw(48), hint=draw(3))
    with pytest.raises(ValueError, match="hint must have shape"):
        qknorm_rope.qknorm_rope(qkv, weight, weight, tables, tables, 4, hint=draw(3))
    with pytest.raises(ValueError, match="rows must have shape"):
        fp8_casts.cast_both(x[0], Tops(draw(2, 1), draw(16)))
