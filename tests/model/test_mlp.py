"""The network with its MLPs by quack-kernels, of which a stand-in computes the products here."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from fastasync_kernels import gated_mlp

from fastasync.errors import UserError
from fastasync.model import activation_memory
from fastasync.model.recompute import kept_numbers

pytest.importorskip("triton")
HALF = torch.bfloat16


@pytest.fixture
def quack(monkeypatch):
    """quack's stand-in (tests/kernels/quack_kit.py); names of the operations that were called, in order."""
    path = Path(__file__).parents[1] / "kernels" / "quack_kit.py"
    spec = importlib.util.spec_from_file_location("quack_kit", path)
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    kit.install(monkeypatch)
    torch._dynamo.reset()
    yield sys.modules
    kit.forget(monkeypatch)


@pytest.fixture
def model(build):
    """Two blocks, width 32 and hidden width 88, whose MLPs are quack's."""
    made = build(2, repa_width=12, grid=2, depth=2, width=32, mlp_multiple=8)
    made._ops = made._ops._replace(mlp="quack")
    return made


def outputs(network, model, inputs, dtype=HALF):
    """Velocity, and the gradients of every parameter, under autocast."""
    with torch.autocast("cpu", dtype, enabled=dtype is HALF):
        v, tokens = network(*inputs, return_repa=True)
    loss = v.square().mean() + tokens.tanh().mean()
    parameters = dict(model.named_parameters())
    return {"v": v.detach(), **dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))}


def assert_no_worse(ours, theirs, truth):
    """At most twice as far from float64 as the other, and half a unit in the last place of bf16."""
    for name, exact in truth.items():
        error, allowed = (float((results[name].double() - exact).norm()) for results in (ours, theirs))
        assert error <= 2 * allowed + 2.0**-9 * float(exact.norm()), name


def test_as_close_to_float64_as_the_plain_network(quack, model, batch):
    inputs = batch(model)
    plain = copy.deepcopy(model)
    plain._ops = plain._ops._replace(mlp="plain")
    exact = copy.deepcopy(plain).double()
    wide = [part.double() if part.is_floating_point() else part for part in inputs]
    truth = outputs(exact, exact, wide, torch.float64)
    ours, theirs = outputs(model, model, inputs), outputs(plain, plain, inputs)
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert_no_worse(ours, theirs, truth)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)  # the stand-in did compute it


@pytest.mark.parametrize("what", ["model", "blocks"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_and_recomputed_without_a_graph_break(quack, model, batch, what, recompute):
    """``fullgraph`` raises at a graph break, in the forward pass and in what autograd traces."""
    inputs = batch(model)
    expected = outputs(model, model, inputs)
    compiled = copy.deepcopy(model)
    compiled.set_recompute(recompute)
    if what == "model":
        compiled.compile(backend="aot_eager", fullgraph=True)
    for block in compiled.blocks if what == "blocks" else ():
        block.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    found = outputs(compiled, compiled, inputs)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (1 if what == "model" else 2)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_eagerly(quack, model, batch, recompute):
    inputs = batch(model)
    expected = outputs(model, model, inputs)
    model.set_recompute(recompute)
    found = outputs(model, model, inputs)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
