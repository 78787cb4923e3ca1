"""The network on the Triton kernels: the same numbers as on the reference, one graph, the same training."""

import copy
import dataclasses
import pickle

import fastasync_kernels
import pytest
import torch
from fastasync_kernels.fp8_linear import fp8_linear, fp8_mlp

from fastasync.config import Model, Train
from fastasync.errors import UserError
from fastasync.model import LightningDiT, dit
from fastasync.model.dit import ATTENTION, MLP
from fastasync.model.linears import BlockLinear
from fastasync.model.recompute import RECOMPUTE
from fastasync.objective import Objective, Times, stratified
from fastasync.training import build as build_module

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def pair(build):
    """The same weights on the reference and on the kernels; REPA on."""

    def make(count=2, **changes):
        changes = {"grid": 2, "depth": 2} | changes
        models = [build(count, repa_width=12, kernels=name, **changes) for name in ("reference", "triton")]
        return [model.to(DEVICE) for model in models]

    return make


def outputs(network, model, inputs):
    """Velocity, projected tokens, and the gradients of every parameter and input."""
    x, tau, y = (part.detach().clone().to(DEVICE) for part in inputs)
    x.requires_grad_()
    tau.requires_grad_()
    v, tokens = network(x, tau, y, return_repa=True)
    loss = v.square().mean() + tokens.tanh().mean()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [x, tau, *parameters.values()])
    return {"v": v.detach(), "repa": tokens.detach(), **dict(zip(["x", "tau", *parameters], gradients))}


def error_of(results, truth):
    """Root of the summed squares of the tensors' relative errors: one wrong tensor is enough to be seen."""
    errors = [(results[name].double() - exact).norm() / exact.norm() for name, exact in truth.items()]
    return float(torch.stack(errors).square().sum().sqrt())


def assert_no_worse(ours, reference, inputs):
    """At most twice the reference's distance from the same network in float64."""
    exact = copy.deepcopy(reference).double()
    truth = outputs(exact, exact, [part.double() if part.is_floating_point() else part for part in inputs])
    allowed = 2 * error_of(outputs(reference, reference, inputs), truth)
    assert error_of(ours, truth) <= allowed < 0.05  # a wrong tensor has an error near 1


def assert_same(ours, expected):
    """The same operations in the same precision: float32 rounding at most."""
    for name, value in expected.items():
        error = (ours[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 2e-5, (name, float(error))


@pytest.mark.parametrize(("count", "changes"), [(1, {}), (2, {}), (3, {"width": 24, "patch": 2, "grid": 4})])
def test_equals_the_reference(pair, batch, count, changes):
    reference, triton = pair(count, **changes)
    inputs = batch(reference)
    assert_no_worse(outputs(triton, triton, inputs), reference, inputs)


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_compiles_without_a_graph_break(pair, batch, compile_parts, what):
    """``fullgraph`` raises at a graph break, in the forward pass and in what autograd traces."""
    reference, triton = pair()
    inputs = batch(reference)
    compiled = copy.deepcopy(triton)
    compile_parts(compiled, what)
    torch._dynamo.utils.counters.clear()
    assert_no_worse(outputs(compiled, compiled, inputs), reference, inputs)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (1 if what == "model" else 2)  # blocks: without and with a branch


@pytest.mark.parametrize(
    ("what", "kernels", "compiled"),
    [("selective", "triton", "blocks"), ("full", "triton", ""), ("selective", "reference", "")]
    + [("full", "reference", "blocks"), ("selective", "triton", "model"), ("full", "triton", "model")],
)
def test_recomputation_changes_no_gradient(build, batch, compile_parts, what, kernels, compiled):
    model = build(2, repa_width=12, kernels=kernels, grid=2, depth=2).to(DEVICE)
    inputs = batch(model)
    expected = outputs(model, model, inputs)
    other = copy.deepcopy(model)
    other.set_recompute(what)
    compile_parts(other, compiled)
    assert_same(outputs(other, other, inputs), expected)


@pytest.fixture
def fp8(build, batch, compile_parts, monkeypatch):
    """Results of two blocks whose linears are in fp8; on request with all casts in two passes, without hints."""

    def run(hints=True, compiled="", recompute="none"):
        model = build(2, repa_width=12, repa_depth=1, kernels="triton", grid=2, depth=2, width=48).to(DEVICE)
        build_module.use_fp8(model, torch.device(DEVICE), emulate=True)
        assert {linear.fp8 for linear in model.modules() if isinstance(linear, BlockLinear)} == {"triton"}
        if not hints:
            monkeypatch.setattr(dit, "fp8_linear_hinted", lambda x, *rest: (fp8_linear(x, *rest[:2]), None))
            monkeypatch.setattr(dit, "fp8_mlp_hinted", lambda x, *rest: (fp8_mlp(x, *rest[:4]), None))
        model.set_recompute(recompute)
        compile_parts(model, compiled)
        return outputs(model, model, batch(model))

    return run


def assert_equal_but_for_summed_biases(ours, expected):
    """The biases of a hinted linear are summed by its cast, in another order, after the gradient is rounded."""
    for name, value in expected.items():
        if name.endswith(("qkv.bias", "proj.bias", "w12.bias", "w3.bias")):
            assert_same({name: ours[name]}, {name: value})
        else:
            assert torch.equal(ours[name], value), name


def test_fp8_with_hints_gives_the_gradients_without(fp8):
    """REPA reads the first block's result beside the second block, and its gradient is added to the hinted one."""
    assert_equal_but_for_summed_biases(fp8(), fp8(hints=False))


@pytest.mark.parametrize(
    ("compiled", "recompute"), [("blocks", "none"), ("blocks", "selective"), ("", "full"), ("model", "none")]
)
def test_fp8_with_hints_compiled_and_recomputed(fp8, compiled, recompute):
    torch._dynamo.utils.counters.clear()
    assert_same(fp8(compiled=compiled, recompute=recompute), fp8())
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == {"": 0, "blocks": 2, "model": 1}[compiled]


def test_recomputation_keeps_less(build, batch, kept_bytes):
    model = build(2, kernels="reference", width=64, depth=4).to(DEVICE)
    inputs = batch(model, 4)
    kept = {}
    for what in ("none", "full"):
        model.set_recompute(what)
        kept[what] = kept_bytes(model, [part.to(DEVICE) for part in inputs])
    assert kept["full"] < 0.4 * kept["none"]
    with pytest.raises(ValueError, match="selective"):
        model.set_recompute("some")


def test_attention_by_name(build, batch):
    inputs = batch(build())
    expected = build()(*inputs)
    for name in ("sdpa", "reference"):
        model = build(attention=name)
        assert model.choose_attention(3, torch.float32) == name
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    auto = build()
    assert auto.choose_attention(3, torch.float32) == "sdpa"
    assert pickle.loads(pickle.dumps(auto))._ops == auto._ops
    with pytest.raises(UserError, match=r"model.attention: nothing: choose one of auto, cudnn"):
        build(attention="nothing")
    with pytest.raises(UserError, match=r"model.attention: cudnn: .*available: .*sdpa"):
        build(attention="cudnn").choose_attention(3, torch.float32)


def test_the_chosen_attention_stays_until_the_network_moves(build, monkeypatch):
    """DeepSpeed calls ``.to`` with the device on which the network is."""
    monkeypatch.setattr(dit.kernels_attention, "resolve_backend", lambda *_: "reference")  # as if it were the fastest
    model = build()
    assert model._ops.attention == "sdpa"
    model.choose_attention(3, torch.float32)
    assert model.to("cpu").float()._ops.attention == "reference"
    model.to("meta")
    assert model._ops is None or model._ops.attention == "sdpa"


def test_config_offers_every_backend_and_recomputation():
    items = [*dataclasses.fields(Model), *dataclasses.fields(Train)]
    choices = {item.name: item.metadata.get("choices") for item in items}
    assert choices["attention"] == ATTENTION
    assert choices["mlp"] == MLP
    assert choices["memory"] == ("auto", *RECOMPUTE)


def losses(kernels, steps, data_seed, dtype, size, batch=16, grid=2, attention=""):
    """The loss curve of a small network that learns normals with a mean, by noise number ``data_seed``."""
    torch.manual_seed(0)
    model = LightningDiT(
        channels=(3, 2), names=("texture", "semantic"), grid=grid, classes=3, heads=2, kernels=kernels, **size
    ).to(DEVICE)
    if attention:
        model.choose_attention(batch, dtype, backend=attention)
        assert model.chosen_attention == attention
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(3, 5, grid, grid, generator=generator)
    objective = Objective((3, 2), (0.6, 0.8), density=None, cosine_weight=0.5)  # type: ignore[arg-type]
    ops = fastasync_kernels.select(kernels, DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    samples, curve = torch.arange(batch), []
    for step in range(steps):
        y = (samples + step) % 3
        noise = torch.randn(batch, 5, grid, grid, generator=generator)
        s = stratified(data_seed, step, samples, batch)[:, None].expand(batch, 2)
        times = Times(s, s, torch.ones_like(s)).to(DEVICE)
        labels = ops.drop_labels(y.to(DEVICE), 3, 0.1, data_seed, step, samples.to(DEVICE))

        def network(x, tau, labels):
            with torch.autocast(DEVICE, dtype, enabled=dtype is not torch.float32):
                return model(x, tau, labels)

        keys = {"seed": data_seed, "step": step, "samples": samples.to(DEVICE)}
        terms = objective(network, (mean[y] + 0.3 * noise).to(DEVICE), labels, times, ops=ops, **keys)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        curve.append(float(terms.total.detach()))
    return torch.tensor(curve)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["corrected", "sfd"])
def test_the_noised_state_in_the_autocast_dtype_changes_no_bit(build, batch, kernels, mode):
    """The network rounds it to that dtype first thing; the target is formed without it."""
    dtype = torch.bfloat16 if kernels == "reference" or DEVICE == "cuda" else torch.float16  # the interpreter's
    model = build(2, repa_width=12, grid=2, depth=2).to(DEVICE)
    z, tau, y = (part.to(DEVICE) for part in batch(model, 6))
    objective = Objective((4, 2), (0.6, 0.8), None, mode, cosine_weight=0.5, repa_weight=0.5)  # type: ignore[arg-type]
    ops, samples = fastasync_kernels.select(kernels, DEVICE), torch.arange(6, device=DEVICE)
    features, seen, results = torch.randn(6, 4, 12, device=DEVICE), [], []

    def network(x, *inputs, **options):
        seen.append(x.dtype)
        with torch.autocast(DEVICE, dtype):
            return model(x, *inputs, **options)

    for given in (None, dtype):
        keys = {"seed": 3, "step": 2, "samples": samples, "ops": ops, "features": features, "dtype": given}
        terms = objective(network, z, y, Times(tau, tau, 1 + tau), **keys)
        results.append([*terms, *torch.autograd.grad(terms.total, list(model.parameters()))])
    assert seen == [torch.float32, dtype]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def spread_of(curves, window):
    """Largest difference of two curves, averaged over ``window`` steps."""
    one, two = (curve.unfold(0, window, window).mean(1) for curve in curves)
    return float((one - two).abs().max())


def test_trains_like_the_reference_for_a_few_steps():
    size = {"depth": 1, "width": 16}
    ours, reference = (losses(kernels, 4, 0, torch.float32, size, batch=4) for kernels in ("triton", "reference"))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    other = losses("reference", 4, 1, torch.float32, size, batch=4)
    assert spread_of((reference, other), 2) > 1e-2  # the curves of two seeds do differ


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_like_the_reference(dtype):
    """200 steps: as close as two seeds of the reference are, while they learn (the loss falls by 30 %)."""
    size = {"depth": 4, "width": 96}
    ours = losses("triton", 200, 0, dtype, size)
    first, second = (losses("reference", 200, seed, dtype, size) for seed in (0, 1))
    assert first[-20:].mean() < 0.7 * first[:5].mean()
    assert spread_of((ours, first), 20) <= spread_of((first, second), 20)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["triton", "mixed"])
def test_trains_like_the_reference_with_our_attention(attention):
    """The same in bf16 with 64 tokens and heads of 32, the cifar10 preset's, by what it trains with."""
    size = {"depth": 4, "width": 64}
    ours = losses("triton", 200, 0, torch.bfloat16, size, grid=8, attention=attention)
    first, second = (losses("reference", 200, seed, torch.bfloat16, size, grid=8) for seed in (0, 1))
    assert first[-20:].mean() < 0.7 * first[:5].mean()
    assert spread_of((ours, first), 20) <= spread_of((first, second), 20)
