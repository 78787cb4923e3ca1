"""MLPs of a hidden width that products are slow at: computed with zeros besides, to the same results."""

import copy

import pytest
import torch
from fastasync_kernels.zeros import hidden_zeros

from fastasync.model import activation_memory
from fastasync.model.dit import SwiGLU
from fastasync.model.linears import BlockLinear
from fastasync.training import build as build_module

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def make(build, kernels="triton", **changes):
    """Width 32: hidden 85, 128 with zeros."""
    return build(2, repa_width=12, kernels=kernels, **({"grid": 2, "depth": 2} | changes)).to(DEVICE)


def outputs(model, inputs, dtype=torch.float32):
    """Velocity, and the gradients of every parameter."""
    with torch.autocast(DEVICE.type, dtype, enabled=dtype is HALF):
        v, tokens = model(*(part.to(DEVICE) for part in inputs), return_repa=True)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(v.square().mean() + tokens.tanh().mean(), list(parameters.values()))
    return {"v": v.detach(), **dict(zip(parameters, gradients))}


def distance(results, truth):
    """Root of the summed squares of the tensors' relative errors."""
    errors = [(results[name].double() - exact).norm() / exact.norm() for name, exact in truth.items()]
    return float(torch.stack(errors).square().sum().sqrt())


def units(model):
    return [mlp.units for mlp in model.modules() if isinstance(mlp, SwiGLU)]


def test_who_is_widened(build):
    """The kernels, at widths that are no multiple of 16; never the reference, which is as published."""
    assert make(build).choose_width() == 128
    assert make(build, width=48).choose_width() == 128
    assert make(build, mlp_multiple=16).choose_width() == 96
    reference = make(build, "reference")
    assert reference.choose_width() == reference.product_hidden == 85
    assert units(reference) == [0, 0]
    model = make(build)
    assert model.product_hidden == 85  # until it is chosen
    model.choose_width()
    assert units(model) == [43, 43]
    assert activation_memory(model, 2) - activation_memory(reference, 2) == 2 * 2 * 4 * 3 * 43 * 2
    model.kernels = "reference"
    assert model.choose_width() == 85


def test_no_worse_than_twice_the_reference(build, batch):
    reference, model = make(build, "reference"), make(build)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.choose_width()
    inputs = batch(model)
    exact = copy.deepcopy(reference).double()
    truth = outputs(exact, [part.double() if part.is_floating_point() else part for part in inputs])
    ours = outputs(model, inputs)
    allowed = 2 * distance(outputs(reference, inputs), truth)
    assert distance(ours, truth) <= allowed < 0.05
    assert {name: value.shape for name, value in ours.items() if name != "v"} == {
        name: value.shape for name, value in model.named_parameters()
    }
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("what", ["model", "blocks"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_without_a_graph_break(build, batch, compile_parts, what, recompute):
    model = make(build)
    model.choose_width()
    inputs = batch(model)
    expected = outputs(model, inputs)
    compiled = copy.deepcopy(model)
    compiled.set_recompute(recompute)
    compile_parts(compiled, what)
    torch._dynamo.utils.counters.clear()
    found = outputs(compiled, inputs)
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 2e-5 * float(value.norm().clamp(min=1e-6)), name
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (1 if what == "model" else 2)


def test_in_fp8_as_a_network_that_is_wider(build, batch, caplog):
    """85 is no multiple of 16: without zeros the MLPs stay in bf16, with them no linear does."""
    model, wider = make(build), make(build, mlp_multiple=128)
    build_module.use_fp8(model, DEVICE, emulate=True)
    assert "fp8: 4 of 8 block linears stay in bf16, blocks.0.mlp.w12 [170, 32]" in caplog.text
    assert model.choose_width() == 128
    state = model.state_dict()
    for prefix in ("blocks.0.mlp.", "blocks.1.mlp."):
        for name, zeros in zip(("w12", "w3"), hidden_zeros(43)):
            state[f"{prefix}{name}.weight"] = zeros.beside(state[f"{prefix}{name}.weight"])
        state[f"{prefix}w12.bias"] = hidden_zeros(43)[0].beside(state[f"{prefix}w12.bias"])
    wider.load_state_dict(state)
    caplog.clear()
    for each in (model, wider):
        build_module.use_fp8(each, DEVICE, emulate=True)
        assert {linear.fp8 for linear in each.modules() if isinstance(linear, BlockLinear)} == {"triton"}
    assert not caplog.records
    found, expected = (outputs(each, batch(model)) for each in (model, wider))
    for name, value in found.items():
        if name.endswith(("mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight")):
            expected[name] = hidden_zeros(43)["w3" in name].without(expected[name])
        assert torch.equal(value, expected[name]), name


def test_sampling_widens_once(build, batch, monkeypatch):
    model = make(build).requires_grad_(False)
    inputs = [part.to(DEVICE) for part in batch(model)]
    model.choose_width()
    model.choose_attention(3, torch.float32, gradient=False)
    with torch.no_grad():
        expected = model(*inputs)
        build_module.prepare_sampling(model, 3, "fp32", DEVICE)
        assert {block.mlp.frozen.w3.shape for block in model.blocks} == {(32, 128)}
        for block in model.blocks:  # as they are, they give the same, but are not asked
            monkeypatch.setattr(block.mlp.w12, "forward", lambda *a, **k: pytest.fail("the frozen weights are there"))
        assert torch.equal(model(*inputs), expected)
        model.blocks[1].mlp.w3.weight.mul_(2)  # changed after all: read again
        with pytest.raises(pytest.fail.Exception):
            model(*inputs)


def test_sampling_in_fp8_casts_the_wider_weights_once(build, batch, monkeypatch):
    model = make(build).requires_grad_(False)
    inputs = [part.to(DEVICE) for part in batch(model)]
    model.choose_width()
    build_module.use_fp8(model, DEVICE, emulate=True)
    with torch.no_grad():
        expected = model(*inputs)
        build_module.use_fp8(model, DEVICE, emulate=True, frozen=True)
        assert model.blocks[0].mlp.w12.frozen.values.shape == (256, 32)
        assert torch.equal(model(*inputs), expected)


@pytest.mark.gpu
def test_compiled_in_bf16_no_worse_than_twice_the_reference(build, batch):
    """As in training, by Inductor; hidden width 170, 192 with zeros."""
    reference, model = (make(build, kernels, grid=8, width=64) for kernels in ("reference", "triton"))
    inputs = batch(reference, 4)
    exact = copy.deepcopy(reference).double()
    truth = outputs(exact, [part.double() if part.is_floating_point() else part for part in inputs])
    allowed = 2 * distance(outputs(reference, inputs, dtype=HALF), truth)
    assert model.choose_width() == 192
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    assert distance(outputs(model, inputs, dtype=HALF), truth) <= allowed
