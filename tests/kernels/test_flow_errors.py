"""Errors of the velocity, their gradient, and the corrected loss: against the reference and fp64."""

import pytest
import torch
from fastasync_kernels import flow_errors as module
from fastasync_kernels import reference
from fastasync_kernels.flow_errors import corrected_loss, flow_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # batch, channels, height, width
    (2, (32, 16), 16, 16),
    (3, (5,), 7, 3),  # a grid of 21: no multiple of 4
    (2, (3, 2, 1), 5, 4),
    (1, (1, 2, 3, 4, 5, 6, 7, 8), 2, 2),
    (1, (5, 3), 18, 20),  # more positions than one tile is wide, no power of two
    (2, (2, 5), 1, 3),
]


def batch(shape, dtype=torch.float32, seed=0):
    count, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    v, z = (torch.randn(count, sum(channels), height, width, generator=generator).to(dtype).to(DEVICE) for _ in "vz")
    weight = (0.1 + torch.rand(count, len(channels), generator=generator)).to(DEVICE)
    samples = torch.randint(0, 2**32, (count,), generator=generator).to(DEVICE)
    return v, z, weight, list(channels), samples


def gradients(function, v, z, weight, channels, samples, cosine):
    """errors, cosines, and dv of a sum of both with different weights."""
    v = v.clone().requires_grad_()
    errors, cosines = function(v, z, channels, 1, 2, samples, cosine=cosine)
    total = (errors * weight).sum()
    if cosine:
        total = total + (cosines * weight[:, 0] * 0.7).sum()
    return errors.detach(), cosines.detach(), torch.autograd.grad(total, v)[0]


def assert_within_budget(ours, theirs, truth, floor, rounding=0.0):
    """At most twice the reference's error, with a floor for what the noise's own rounding (5 ulp) moves.

    ``rounding``: one more, as a share of the largest number, where that is more than the floor.
    """
    largest = float(truth.abs().max())
    allowed = 2 * float((theirs.double() - truth).abs().max()) + max(floor * max(1.0, largest), rounding * largest)
    assert float((ours.double() - truth).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_twice_the_reference(shape, cosine, dtype):
    v, z, weight, channels, samples = batch(shape, dtype)
    ours = gradients(flow_errors, v, z, weight, channels, samples, cosine)
    theirs = gradients(reference.flow_errors, v, z, weight, channels, samples, cosine)
    truth = gradients(reference.flow_errors, v.double(), z.double(), weight.double(), channels, samples, cosine)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert ours[2].dtype == dtype
    for mine, other, exact in zip(ours, theirs, truth):
        assert_within_budget(mine, other, exact, 1e-6)
    if not cosine:
        assert not ours[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cosine_weight", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_corrected_loss_equals_the_reference(shape, cosine_weight, dtype):
    v, z, weight, channels, samples = batch(shape, dtype)
    results = {}
    for name, function in (("ours", corrected_loss), ("theirs", reference.corrected_loss), ("exact", None)):
        double = function is None
        inputs = [tensor.double() if double else tensor.clone() for tensor in (v, z, weight)]
        leaves = inputs[0].requires_grad_(), inputs[2].requires_grad_()
        function = function or reference.corrected_loss
        loss, errors, cosines = function(leaves[0], inputs[1], leaves[1], channels, 1, 2, samples, cosine_weight)
        assert not errors.requires_grad
        assert not cosines.requires_grad
        results[name] = (loss.detach(), errors, cosines, *torch.autograd.grad(3.0 * loss, leaves))
    for ours, theirs, exact in zip(*results.values()):
        # dv is stored before it is multiplied by the loss's gradient (1 in training, 3 here)
        once_more = 0.0 if ours.dtype == torch.float32 else 0.5 * torch.finfo(ours.dtype).eps
        assert_within_budget(ours, theirs, exact, 1e-6, once_more)


def test_corrected_loss_is_flow_errors_weighted():
    v, z, weight, channels, samples = batch(SHAPES[0])
    v.requires_grad_()
    loss, errors, cosines = corrected_loss(v, z, weight, channels, 1, 2, samples, 0.5)
    separate = flow_errors(v, z, channels, 1, 2, samples, cosine=True)
    assert torch.equal(errors, separate[0])
    assert torch.equal(cosines, separate[1])
    total = ((weight * separate[0]).sum(1) + 0.5 * separate[1]).mean()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(*(torch.autograd.grad(value, v)[0] for value in (loss, total)))


def test_gradient_is_the_difference_quotient():
    v, z, weight, channels, samples = batch(SHAPES[2])
    v.requires_grad_()
    direction = torch.randn_like(v)

    def loss(v):
        return corrected_loss(v, z, weight, channels, 1, 2, samples)[0]

    slope = (torch.autograd.grad(loss(v), v)[0] * direction).sum()
    with torch.no_grad():  # quadratic in v: the central quotient is exact at any step
        quotient = (loss(v + direction) - loss(v - direction)) / 2
    torch.testing.assert_close(slope, quotient, rtol=1e-5, atol=1e-5)

    def cosines(v):
        return flow_errors(v, z, channels, 1, 2, samples, cosine=True)[1].sum()

    slope = (torch.autograd.grad(cosines(v), v)[0] * direction).sum()
    with torch.no_grad():
        quotient = (cosines(v + 0.02 * direction) - cosines(v - 0.02 * direction)) / 0.04
    torch.testing.assert_close(slope, quotient, rtol=3e-3, atol=1e-4)


def test_perfect_velocity_has_no_error():
    _, z, _, channels, samples = batch(SHAPES[0])
    u = z - reference.draw_noise(z, 1, 2, samples)
    errors, cosines = flow_errors(u, z, channels, 1, 2, samples, cosine=True)
    assert float(errors.max()) < 1e-11
    assert float(cosines.abs().max()) < 1e-6


def test_zero_velocity_is_as_in_torch():
    """The output layer starts at zero; torch bounds the norm by 1e-8 and lets no gradient through the bound."""
    v, z, weight, channels, samples = batch(SHAPES[2])
    ours = gradients(flow_errors, v * 0, z, weight, channels, samples, True)
    theirs = gradients(reference.flow_errors, v * 0, z, weight, channels, samples, True)
    assert float(theirs[2].abs().max()) > 1e5  # huge, and so is torch's
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_upstream_gradients_of_only_one_result():
    v, z, _, channels, samples = batch(SHAPES[2])
    for index in (0, 1):
        grads = []
        for function in (flow_errors, reference.flow_errors):
            leaf = v.clone().requires_grad_()
            function(leaf, z, channels, 1, 2, samples, cosine=True)[index].sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_weight_alone_may_need_a_gradient():
    v, z, weight, channels, samples = batch(SHAPES[2])
    weight.requires_grad_()
    loss, errors, _ = corrected_loss(v, z, weight, channels, 1, 2, samples)
    loss.backward()
    torch.testing.assert_close(weight.grad, errors / 2)


def test_second_backward_is_an_error():
    v, z, weight, channels, samples = batch(SHAPES[2])
    v.requires_grad_()
    loss = corrected_loss(v, z, weight, channels, 1, 2, samples)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_scaling_in_place(monkeypatch, factor):
    monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(module, "SCALE_PROGRAMS", 2)  # each walks over several blocks, the last one not full
    x = torch.randn(333, device=DEVICE)
    expected = x * factor
    module._scale_op(x, torch.tensor(factor, device=DEVICE))
    assert torch.equal(x, expected)


def test_repeatable_and_free_of_the_batch_split():
    v, z, weight, channels, samples = batch((2, (9, 7), 10, 14))
    whole = gradients(flow_errors, v, z, weight, channels, samples, True)
    again = gradients(flow_errors, v, z, weight, channels, samples, True)
    one = gradients(flow_errors, v[1:2], z[1:2], weight[1:2], channels, samples[1:2], True)
    for a, b, c in zip(whole, again, one):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


@pytest.mark.parametrize(("cosine", "tile"), [(False, "TILE"), (True, "COSINE_TILE")])
def test_tile_changes_rounding_only(monkeypatch, cosine, tile):
    v, z, weight, channels, samples = batch((1, (20, 7), 18, 20))
    whole = gradients(flow_errors, v, z, weight, channels, samples, cosine)
    asked, tiling = [], module._tiling
    monkeypatch.setattr(module, "_tiling", lambda *sizes: asked.append(sizes[-1]) or tiling(*sizes))
    monkeypatch.setattr(module, tile, 512)
    for a, b in zip(gradients(flow_errors, v, z, weight, channels, samples, cosine), whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert set(asked) == {512}


@pytest.mark.parametrize(
    ("channels", "positions", "expected"),
    [((32, 16), 256, (16, 256)), ((32, 16), 64, (16, 64)), ((4,), 1024, (4, 1024)), ((1,), 3, (1, 4))],
)
def test_tiling_pads_nothing_it_need_not(channels, positions, expected):
    assert module._tiling(channels, positions, 4096) == expected


def test_non_contiguous_inputs():
    v, z, weight, channels, samples = batch((4, (3, 2), 6, 5))
    expected = flow_errors(v, z, channels, 1, 2, samples, cosine=True)
    last = torch.channels_last
    strided = flow_errors(v.to(memory_format=last), z.to(memory_format=last), channels, 1, 2, samples, cosine=True)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected))
    loss = corrected_loss(v, z, weight.T.contiguous().T, channels, 1, 2, samples)[0]
    assert torch.equal(loss, corrected_loss(v, z, weight, channels, 1, 2, samples)[0])


def test_empty_batch():
    v, z, weight, channels, samples = batch((0, (3, 2), 4, 4))
    v.requires_grad_()
    errors, cosines = flow_errors(v, z, channels, 1, 2, samples, cosine=True)
    assert errors.shape == (0, 2)
    assert cosines.shape == (0,)
    for function in (corrected_loss, reference.corrected_loss):
        loss = function(v, z, weight, channels, 1, 2, samples)[0]
        assert float(loss.detach()) == 0
        assert torch.autograd.grad(loss, v)[0].shape == v.shape


def test_step_tensor_and_large_seeds():
    v, z, weight, channels, samples = batch(SHAPES[2])
    step = torch.tensor([7], device=DEVICE)
    for seed in (1, 2**64 - 3):
        errors = flow_errors(v, z, channels, seed, 7, samples)[0]
        torch.testing.assert_close(errors, reference.flow_errors(v, z, channels, seed, 7, samples)[0])
        assert torch.equal(flow_errors(v, z, channels, seed, step, samples.int())[0], errors)
        assert torch.equal(corrected_loss(v, z, weight, channels, seed, step, samples)[1], errors)


REFUSED = [
    (TypeError, "v must be", {"v": torch.zeros(2, 5, 4, 4, dtype=torch.float64)}),
    (TypeError, "z must be", {"z": torch.zeros(2, 5, 4, 4, dtype=torch.int64)}),
    (TypeError, "weight must be", {"weight": torch.zeros(2, 2, dtype=torch.float16)}),
    (TypeError, "samples must be", {"samples": torch.zeros(2)}),
    (ValueError, "same shape", {"z": torch.zeros(3, 5, 4, 4)}),
    (ValueError, "weight must have shape", {"weight": torch.zeros(2, 1)}),
    (ValueError, "sum to 4", {"channels": [2, 2]}),
    (ValueError, "takes no gradient", {"z": torch.zeros(2, 5, 4, 4, requires_grad=True)}),
    (ValueError, "on meta", {"z": torch.zeros(2, 5, 4, 4, device="meta")}),
]


@pytest.mark.parametrize(("error", "message", "change"), REFUSED)
def test_refuses_before_launch(error, message, change):
    arguments = {
        "v": torch.zeros(2, 5, 4, 4),
        "z": torch.zeros(2, 5, 4, 4),
        "weight": torch.zeros(2, 2),
        "channels": [3, 2],
        "seed": 0,
        "step": 0,
        "samples": torch.arange(2),
        **change,
    }
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    with pytest.raises(error, match=message):
        corrected_loss(**arguments)


def test_opcheck():
    v, z, weight, channels, samples = batch(SHAPES[2])
    key = (channels, 1, 2, None, samples)
    torch.library.opcheck(module._errors_op, (v.requires_grad_(), z, *key, True))
    # not test_aot_dispatch: it returns dv itself, which the public function keeps (test_compiled covers that path)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._loss_op, (v, z, weight.requires_grad_(), *key, 0.5, True), test_utils=checks)
    torch.library.opcheck(module._scale_op, (v.detach().clone(), torch.tensor(2.0, device=DEVICE)))


def test_compiled_equals_eager_without_graph_breaks():
    v, z, weight, channels, samples = batch(SHAPES[2])

    def separate(v, step):
        errors, cosines = flow_errors(v, z, channels, 3, step, samples, cosine=True)
        return (errors * weight).sum() + cosines.mean()

    def joint(v, step):
        return 2.0 * corrected_loss(v, z, weight, channels, 3, step, samples, 0.5)[0]

    for loss in (separate, joint):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for step in (1, 2):
            grads = []
            for function in (loss, compiled):
                leaf = v.clone().requires_grad_()
                value = function(leaf, step)
                value.backward()
                grads.append((value.detach(), leaf.grad))
            assert torch.equal(grads[0][0], grads[1][0])
            assert torch.equal(grads[0][1], grads[1][1])
