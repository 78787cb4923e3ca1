"""Noising in one launch: against the reference and fp64, its gradients, odd shapes, refusals, torch.compile."""

import pytest
import torch
from fastasync_kernels import noising as module
from fastasync_kernels import reference
from fastasync_kernels.noising import noising

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # batch, channels, height, width
    (2, (32, 16), 16, 16),
    (3, (5,), 7, 3),  # one representation, a sample of 105 elements: no multiple of 4
    (2, (3, 2, 1), 5, 5),  # bounds inside counter blocks
    (1, (1, 2, 3, 4, 5, 6, 7, 8), 2, 3),
    (1, (48, 24), 9, 7),  # 4,536 elements: more than one block, not a multiple
]


def batch(shape, dtype=torch.float32, seed=0):
    count, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, sum(channels), height, width, generator=generator).to(dtype).to(DEVICE)
    tau = torch.rand(count, len(channels), generator=generator).to(DEVICE)
    samples = torch.randint(0, 2**32, (count,), generator=generator).to(DEVICE)
    return z, tau, list(channels), samples


def exact(z, tau, channels, seed, step, samples):
    return reference.noising(z.double(), tau.double(), channels, seed, step, samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_twice_the_reference(shape, dtype):
    z, tau, channels, samples = batch(shape, dtype)
    truth = exact(z, tau, channels, 1, 2, samples)
    ours = noising(z, tau, channels, 1, 2, samples)
    theirs = reference.noising(z, tau, channels, 1, 2, samples)
    assert ours.dtype == dtype
    assert ours.shape == z.shape
    # the truth draws with the reference's float32 cosines, which are up to 5 ulp of the radius off (test_philox)
    floor = 5 * 2.0**-23 * 6
    assert float((ours - truth).abs().max()) <= 2 * float((theirs - truth).abs().max()) + floor


def test_output_dtype_is_its_own():
    z, tau, channels, samples = batch(SHAPES[0])
    half = noising(z, tau, channels, 1, 2, samples, dtype=torch.float16)
    assert torch.equal(half, noising(z, tau, channels, 1, 2, samples).half())


def test_ends_are_noise_and_data():
    z, _, channels, samples = batch(SHAPES[2])
    ends = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], device=DEVICE)
    x = noising(z, ends, channels, 1, 2, samples)
    eps = reference.draw_noise(z, 1, 2, samples)
    assert torch.equal(x[0, 3:5], z[0, 3:5])
    assert torch.equal(x[1, :3], z[1, :3])
    torch.testing.assert_close(x[0, :3], eps[0, :3], rtol=0, atol=4e-6)
    torch.testing.assert_close(x[1, 3:5], eps[1, 3:5], rtol=0, atol=4e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_reference(shape):
    z, tau, channels, samples = batch(shape)
    upstream = torch.randn_like(z)
    grads = {}
    for name, function in (("ours", noising), ("theirs", reference.noising), ("exact", exact)):
        leaves = z.clone().requires_grad_(), tau.clone().requires_grad_()
        x = function(leaves[0], leaves[1], channels, 1, 2, samples)
        grads[name] = torch.autograd.grad(x, leaves, upstream.to(x.dtype))
    for ours, theirs, truth in zip(grads["ours"], grads["theirs"], grads["exact"]):
        error = float((theirs.double() - truth.double()).abs().max())
        # dtau sums up to 8,192 numbers; the noise itself differs by ulps of the radius
        assert float((ours.double() - truth.double()).abs().max()) <= 2 * error + 2e-6 * float(truth.abs().max())


def test_gradient_of_tau_is_the_difference_quotient():
    z, tau, channels, samples = batch(SHAPES[2])
    tau = (0.25 + 0.5 * tau).requires_grad_()
    upstream = torch.randn_like(z)
    (noising(z, tau, channels, 1, 2, samples) * upstream).sum().backward()
    for b in range(2):
        for k in range(3):
            step = torch.zeros_like(tau)
            step[b, k] = 0.25  # x is linear in tau: any step is exact
            up, down = (noising(z, tau.detach() + sign * step, channels, 1, 2, samples) for sign in (1, -1))
            quotient = ((up - down).double() * upstream.double()).sum() / 0.5
            assert float(tau.grad[b, k]) == pytest.approx(float(quotient), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("need", ["tau", "z"])
def test_only_what_is_asked_for_gets_a_gradient(need):
    z, tau, channels, samples = batch(SHAPES[2])
    leaf = {"tau": tau, "z": z}[need].requires_grad_()
    noising(z, tau, channels, 1, 2, samples).square().sum().backward()
    assert leaf.grad is not None
    assert (z.grad is None) == (need == "tau")


def test_block_size_and_batch_split_change_nothing(monkeypatch):
    z, tau, channels, samples = batch((3, (48, 24), 9, 7))
    whole = noising(z, tau, channels, 1, 2, samples)
    assert torch.equal(noising(z[1:2], tau[1:2], channels, 1, 2, samples[1:2])[0], whole[1])
    assert torch.equal(noising(z, tau, channels, 1, 2, samples), whole)
    monkeypatch.setattr(module, "BLOCK", 512)
    assert torch.equal(noising(z, tau, channels, 1, 2, samples), whole)


def test_backward_is_repeatable_and_split_free():
    z, tau, channels, samples = batch((3, (48, 24), 9, 7))
    upstream = torch.randn_like(z)

    def dtau(rows):
        leaf = tau[rows].clone().requires_grad_()
        x = noising(z[rows], leaf, channels, 1, 2, samples[rows])
        return torch.autograd.grad(x, leaf, upstream[rows])[0]

    whole = dtau(slice(None))
    assert torch.equal(dtau(slice(None)), whole)
    assert torch.equal(dtau(slice(1, 2))[0], whole[1])


def test_non_contiguous_inputs():
    z, tau, channels, samples = batch((4, (3, 2), 6, 5))
    expected = noising(z, tau, channels, 1, 2, samples)
    strided = noising(
        z.to(memory_format=torch.channels_last), tau.T.contiguous().T, channels, 1, 2, samples.repeat_interleave(2)[::2]
    )
    assert torch.equal(strided, expected)
    leaf = tau.clone().requires_grad_()
    noising(z, leaf, channels, 1, 2, samples).sum().backward()  # an expanded upstream gradient
    assert bool(torch.isfinite(leaf.grad).all())


def test_empty_batch():
    z, tau, channels, samples = batch((0, (3, 2), 4, 4))
    tau.requires_grad_()
    x = noising(z, tau, channels, 1, 2, samples)
    x.sum().backward()
    assert x.shape == z.shape
    assert tau.grad.shape == (0, 2)


def test_step_tensor_and_large_seeds():
    z, tau, channels, samples = batch(SHAPES[2])
    for seed in (0, 1, 2**40 + 1, 2**64 - 3):
        expected = reference.noising(z, tau, channels, seed, 7, samples)
        ours = noising(z, tau, channels, seed, 7, samples)
        torch.testing.assert_close(ours, expected, rtol=0, atol=4e-6)
        assert torch.equal(noising(z, tau, channels, seed, torch.tensor([7], device=DEVICE), samples.int()), ours)


REFUSED = [
    (TypeError, "z must be", {"z": torch.zeros(2, 5, 4, 4, dtype=torch.float64)}),
    (TypeError, "tau must be", {"tau": torch.zeros(2, 2, dtype=torch.float64)}),
    (TypeError, "samples must be", {"samples": torch.zeros(2)}),
    (TypeError, "dtype must be", {"dtype": torch.float64}),
    (TypeError, "step must be", {"step": torch.zeros(1)}),
    (ValueError, "step must be one", {"step": torch.zeros(2, dtype=torch.int64)}),
    (ValueError, "z must have shape", {"z": torch.zeros(2, 5, 16)}),
    (ValueError, "tau must have shape", {"tau": torch.zeros(2, 3)}),
    (ValueError, "samples must have shape", {"samples": torch.zeros(3, dtype=torch.int64)}),
    (ValueError, "sum to 6", {"channels": [3, 3]}),
    (ValueError, "positive", {"channels": [5, 0]}),
    (ValueError, "empty grid", {"z": torch.zeros(2, 5, 0, 4)}),
    (ValueError, "on meta", {"tau": torch.zeros(2, 2, device="meta")}),
    (ValueError, "need CUDA", {"z": torch.zeros(2, 5, 4, 4, device="meta")}),
]


@pytest.mark.parametrize(("error", "message", "change"), REFUSED)
def test_refuses_before_launch(error, message, change):
    arguments = {
        "z": torch.zeros(2, 5, 4, 4),
        "tau": torch.zeros(2, 2),
        "channels": [3, 2],
        "seed": 0,
        "step": 0,
        "samples": torch.arange(2),
        **change,
    }
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error, match=message):
        noising(**arguments)


def test_opcheck():
    z, tau, channels, samples = batch(SHAPES[2])
    for leaves in ((z, tau.requires_grad_()), (z.clone().requires_grad_(), tau)):
        torch.library.opcheck(module._noising_op, (*leaves, channels, 1, 2, None, samples, torch.float32))


def test_compiled_equals_eager_without_graph_breaks():
    z, tau, channels, samples = batch(SHAPES[2])

    def loss(z, tau, step):
        return noising(z, tau, channels, 3, step, samples).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in (1, 2, 3):
        grads = []
        for function in (loss, compiled):
            leaf = tau.clone().requires_grad_()
            value = function(z, leaf, step)
            value.backward()
            grads.append((value.detach(), leaf.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])
