"""torch.compile: the whole model and each block are one graph, and change no result."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("repa", [False, True])
def test_whole_model(build, batch, backend, repa):
    model = build(2, repa_width=12)
    inputs = batch(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected, actual = model(*inputs, return_repa=repa), compiled(*inputs, return_repa=repa)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_under_autocast(build, batch, count):
    model = build(count, patch=2)
    x, tau, y = batch(model)
    tau.requires_grad_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for network in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            v = network(x, tau, y)
        v.square().mean().backward()
        results.append([v.detach(), tau.grad, *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
        tau.grad = None
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_regional(build, batch, kernels):
    """Blocks compiled one by one: no graph break, and two graphs (with and without a pending branch) serve them all."""
    model = build(2, depth=6, repa_width=12, kernels=kernels)
    inputs = batch(model)
    expected = model(*inputs, return_repa=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(*inputs, return_repa=True), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2
