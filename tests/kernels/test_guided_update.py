"""The sampler's guided increment: against the reference and fp64, its gradients, odd shapes, refusals."""

import pytest
import torch
from fastasync_kernels import guided_update as module
from fastasync_kernels import reference
from fastasync_kernels.guided_update import guided_update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, (32, 16), 16, 16), (3, (5,), 7, 3), (2, (3, 2, 1), 5, 5), (1, (48, 24), 9, 7)]


def batch(shape, dtype=torch.float32, seed=0):
    count, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    size = (count, sum(channels), height, width)
    x, v, weak = (torch.randn(size, generator=generator).to(dtype).to(DEVICE) for _ in "xvw")
    scale, dtau = (torch.rand(count, len(channels), generator=generator).to(DEVICE) for _ in "sd")
    return x, v, weak, 1 + scale, dtau, list(channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_twice_the_reference(shape, guided, dtype):
    x, v, weak, scale, dtau, channels = batch(shape, dtype)
    results = []
    for function, wide in ((guided_update, False), (reference.guided_update, False), (reference.guided_update, True)):
        inputs = [x, v, weak, scale, dtau] if guided else [x, v, dtau]
        leaves = [(tensor.double() if wide else tensor.clone()).requires_grad_() for tensor in inputs]
        arguments = leaves if guided else [leaves[0], leaves[1], None, None, leaves[2]]
        out = function(*arguments, channels)
        results.append([out.detach(), *torch.autograd.grad((out * torch.cos(v).to(out.dtype)).sum(), leaves)])
        assert out.dtype == leaves[0].dtype
    for ours, theirs, exact in zip(*results):
        error = float((theirs.double() - exact).abs().max())
        rounding = torch.finfo(ours.dtype).eps * float(exact.abs().max())
        assert float((ours.double() - exact).abs().max()) <= 2 * error + rounding


def test_velocities_may_have_their_own_dtypes():
    x, v, weak, scale, dtau, channels = batch(SHAPES[2])
    out = guided_update(x, v.half(), weak, scale, dtau, channels)
    torch.testing.assert_close(out, reference.guided_update(x, v.half(), weak, scale, dtau, channels))
    assert out.dtype == torch.float32


def test_bitwise_repeatable_and_independent_of_the_batch():
    x, v, weak, scale, dtau, channels = batch((4, (48, 24), 9, 7))

    def gradients(part):
        leaves = [tensor[part].clone().requires_grad_() for tensor in (x, v, weak, scale, dtau)]
        out = guided_update(*leaves, channels)
        return [out.detach(), *torch.autograd.grad((out * torch.cos(v[part])).sum(), leaves)]

    whole, again, half = gradients(slice(None)), gradients(slice(None)), gradients(slice(1, 3))
    assert all(torch.equal(one, other) for one, other in zip(whole, again))
    assert all(torch.equal(one[1:3], other) for one, other in zip(whole, half))


def test_non_contiguous_empty_and_any_block(monkeypatch):
    x, v, weak, scale, dtau, channels = batch((3, (48, 24), 9, 7))
    expected = guided_update(x, v, weak, scale, dtau, channels)
    last = torch.channels_last
    strided = guided_update(
        x.to(memory_format=last), v.to(memory_format=last), weak, scale, dtau.T.contiguous().T, channels
    )
    assert torch.equal(strided, expected)
    assert torch.equal(guided_update(x[1:2], v[1:2], weak[1:2], scale[1:2], dtau[1:2], channels), expected[1:2])
    monkeypatch.setattr(module, "BLOCK", 512)
    assert torch.equal(guided_update(x, v, weak, scale, dtau, channels), expected)
    empty = [tensor[:0] for tensor in (x, v, weak, scale, dtau)]
    empty[4].requires_grad_()
    guided_update(*empty, channels).sum().backward()
    assert empty[4].grad.shape == (0, 2)


REFUSED = [
    (TypeError, "x must be", {"x": torch.zeros(2, 5, 4, 4, dtype=torch.float64)}),
    (TypeError, "scale must be", {"scale": torch.zeros(2, 2, dtype=torch.float64)}),
    (TypeError, "v_weak must be", {"v_weak": torch.zeros(2, 5, 4, 4, dtype=torch.int32)}),
    (ValueError, "same shape", {"v": torch.zeros(1, 5, 4, 4)}),
    (ValueError, "dtau must have shape", {"dtau": torch.zeros(2, 3)}),
    (ValueError, "needs a scale", {"scale": None}),
    (ValueError, "sum to 7", {"channels": [5, 2]}),
    (ValueError, "on meta", {"v": torch.zeros(2, 5, 4, 4, device="meta")}),
]


@pytest.mark.parametrize(("error", "message", "change"), REFUSED)
def test_refuses_before_launch(error, message, change):
    state = torch.zeros(2, 5, 4, 4)
    values = torch.zeros(2, 2)
    arguments = {"x": state, "v": state, "v_weak": state, "scale": values, "dtau": values, "channels": [3, 2], **change}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error, match=message):
        guided_update(**arguments)


def test_opcheck():
    x, v, weak, scale, dtau, channels = batch(SHAPES[2])
    leaves = [tensor.requires_grad_() for tensor in (x, v, weak, scale, dtau)]
    torch.library.opcheck(module._update_op, (*leaves, channels))
    torch.library.opcheck(module._update_op, (x, v, None, None, dtau, channels))


def test_compiled_equals_eager_without_graph_breaks():
    x, v, weak, scale, dtau, channels = batch(SHAPES[2])

    def step(x, dtau):
        return guided_update(x, v, weak, scale, dtau, channels).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (step, compiled):
        leaves = x.clone().requires_grad_(), dtau.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
