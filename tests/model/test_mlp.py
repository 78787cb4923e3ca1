"""The network with its MLPs by quack-kernels, of which a stand-in computes the products here."""

import copy
import gc
import pickle

import pytest
import torch
from fastasync_kernels import gated_mlp, reference

from fastasync.errors import UserError
from fastasync.model import activation_memory
from fastasync.model.dit import select_ops
from fastasync.training import build as build_module
from fastasync.training.build import use_fp8
from tests.kernels import quack_kit

HALF = torch.bfloat16


@pytest.fixture
def quack():
    """quack's stand-in, tests/kernels/quack_kit.py."""
    torch._dynamo.reset()
    with quack_kit.installed():
        yield


def perturbed(build, **changes):
    """Two blocks, hidden width 96, as initialised and a little off: adaLN's zeros would hide the MLPs, and wilder
    weights make rounding wild."""
    made = build(2, zero=True, **({"grid": 2, "depth": 2, "width": 32, "mlp_multiple": 16, "repa_width": 12} | changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return made


@pytest.fixture
def model(build):
    """One whose MLPs are quack's."""
    made = perturbed(build)
    made._ops = made._ops._replace(mlp="quack")
    return made


def outputs(network, model, inputs, dtype=HALF):
    """Velocity, and the gradients of every parameter, under autocast."""
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype is HALF):
        v, tokens = network(*inputs, return_repa=True)
    loss = v.square().mean() + tokens.tanh().mean()
    parameters = dict(model.named_parameters())
    return {"v": v.detach(), **dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))}


def assert_close(results, truth):
    """bf16's errors are 3 % here at most, a wrong tensor's is near 1.  (That the MLP alone is no worse than twice the
    plain operations is tested beside it.)"""
    for name, exact in truth.items():
        assert float((results[name].double() - exact).norm()) <= 0.1 * float(exact.norm()), name


def test_the_network_as_in_float64(quack, model, batch):
    inputs = batch(model)
    plain = copy.deepcopy(model)
    plain._ops = plain._ops._replace(mlp="plain")
    exact = copy.deepcopy(plain).double()
    wide = [part.double() if part.is_floating_point() else part for part in inputs]
    truth = outputs(exact, exact, wide, torch.float64)
    ours, theirs = outputs(model, model, inputs), outputs(plain, plain, inputs)
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert_close(ours, truth)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)  # the stand-in did compute it


@pytest.mark.parametrize("what", ["model", "blocks"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_and_recomputed_without_a_graph_break(quack, model, batch, compile_parts, what, recompute):
    """``fullgraph`` raises at a graph break, in the forward pass and in what autograd traces."""
    inputs = batch(model)
    expected = outputs(model, model, inputs)
    compiled = copy.deepcopy(model)
    compiled.set_recompute(recompute)
    compile_parts(compiled, what)
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


def test_other_dtypes_and_fp8_are_not_quacks(model, batch, monkeypatch):
    """Chosen for bf16: float32 (an evaluation without autocast, say) and linears in fp8 go their own way."""
    monkeypatch.setattr(gated_mlp, "gated_mlp", lambda *a: pytest.fail("called"))
    inputs = batch(model)
    plain = copy.deepcopy(model)
    plain._ops = plain._ops._replace(mlp="plain")
    assert torch.equal(model(*inputs), plain(*inputs))
    use_fp8(model, torch.device("cpu"), emulate=True)
    with torch.autocast("cpu", HALF):
        v = model(*inputs)
    expected = plain(*inputs).detach()
    assert 1e-6 < float((v.detach() - expected).norm() / expected.norm()) < 0.1


def test_without_gradients(quack, model, batch):
    """Of another batch than its weights' gradients were divided for."""
    inputs = batch(model)
    for block in model.blocks:
        block.mlp.w12.parts = block.mlp.w3.parts = 7
    with torch.autocast("cpu", HALF):
        with torch.no_grad():
            found = model(*inputs)
        for block in model.blocks:
            block.mlp.w12.parts = block.mlp.w3.parts = 2
        assert torch.equal(model(*inputs).detach(), found)


def frozen(model):
    for block in model.blocks:
        block.mlp.freeze(HALF, "quack")
    return model


def sampled(model, inputs):
    with torch.no_grad(), torch.autocast("cpu", HALF):
        return model(*inputs)


def test_frozen_weights_are_turned_once(quack, model, batch, monkeypatch):
    inputs = batch(model)
    expected, gradients = sampled(model, inputs), outputs(model, model, inputs)
    frozen(model)
    turned, by_turns = [], gated_mlp.by_turns
    monkeypatch.setattr(gated_mlp, "by_turns", lambda *a: turned.append(1) or by_turns(*a))
    for _ in range(2):
        assert torch.equal(sampled(model, inputs), expected)
    assert not turned
    assert all(torch.equal(value, gradients[name]) for name, value in outputs(model, model, inputs).items())
    assert turned  # with gradients it is the parameters that are read


@pytest.mark.parametrize("name", ["w12.weight", "w12.bias", "w3.weight", "w3.bias"])
@pytest.mark.parametrize("how", ["in place", "another tensor"])
def test_frozen_weights_that_change_are_read_again(quack, model, batch, name, how):
    inputs = batch(model)
    frozen(model)
    before = sampled(model, inputs)
    parameter = model.blocks[1].mlp.get_parameter(name)
    if how == "in place":
        with torch.no_grad():
            parameter.mul_(-2)
    else:
        parameter.data = -2 * parameter.data
    after = sampled(model, inputs)
    assert not torch.equal(after, before)
    thawed = copy.deepcopy(model)
    for block in thawed.blocks:
        block.mlp.frozen = None
    assert torch.equal(after, sampled(thawed, inputs))
    assert torch.equal(after, sampled(frozen(model), inputs))


def test_frozen_and_compiled(quack, model, batch):
    inputs = batch(model)
    expected = sampled(model, inputs)
    for block in frozen(model).blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(sampled(model, inputs), expected)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_quack_itself_with_frozen_weights(build, batch, compiled):
    """As in sampling: the same results, bit for bit."""
    torch._dynamo.reset()
    model = perturbed(build, grid=8, width=64, kernels="triton", mlp="quack").cuda()
    if reason := gated_mlp.refusal("cuda", HALF, gated_mlp.Shape(64, 64, 176, 64)):
        pytest.skip(f"quack {reason}")
    mlp, ops = model.blocks[0].mlp, model._ops._replace(mlp="quack")
    h = torch.randn(4, 64, 64, device="cuda", dtype=HALF)
    run = torch.compile(mlp, fullgraph=True) if compiled else mlp
    with torch.no_grad(), torch.autocast("cuda", HALF):
        expected, _ = run(h, ops)
        build_module.prepare_sampling(model, 4, "bf16", torch.device("cuda"))
        assert model.chosen_mlp == "quack"
        assert mlp.frozen is not None
        assert torch.equal(run(h, model._ops)[0], expected)
        inputs = [part.cuda() for part in batch(model, 4)]
        v = model(*inputs)
        for block in model.blocks:
            block.mlp.frozen = None
        assert torch.equal(model(*inputs), v)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_quack_itself(build, batch, compiled):
    """On the kernels, a block compiled by Inductor as in training."""
    torch._dynamo.reset()
    model = perturbed(build, grid=8, width=64, kernels="triton", mlp="quack").cuda()
    if reason := gated_mlp.refusal("cuda", HALF, gated_mlp.Shape(64, 64, 176, 64)):
        pytest.skip(f"quack {reason}")
    inputs = [part.cuda() for part in batch(model, 4)]
    exact = perturbed(build, grid=8, width=64, kernels="reference").cuda().double()
    exact.load_state_dict(model.state_dict())
    assert model.choose_mlp(4, HALF) == "quack"
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, dynamic=False)
    wide = [part.double() if part.is_floating_point() else part for part in inputs]
    truth = outputs(exact, exact, wide, torch.float64)
    assert_close(outputs(model, model, inputs), truth)


def test_it_keeps_one_hidden_width_less(quack, build, batch, kept_bytes):
    model = build(1, grid=8, depth=1, width=32, mlp_multiple=8, patch=1)
    inputs, kept, estimates = batch(model, 16), {}, {}
    for mlp in ("plain", "quack"):
        model._ops = select_ops("reference", torch.device("cpu"), "sdpa", mlp)
        kept[mlp], estimates[mlp] = kept_bytes(model, inputs, HALF), activation_memory(model, 16)
    plane = 16 * 64 * 88 * 2
    assert estimates["plain"] - estimates["quack"] == plane
    assert kept["plain"] - kept["quack"] >= plane


@pytest.mark.gpu
@pytest.mark.parametrize("mlp", ["plain", "quack"])
def test_recomputed_whole_a_compiled_block_keeps_its_inputs_alone(build, batch, kept_bytes, mlp):
    """At XL's shapes, where Inductor's partition would keep products: an additional block adds x and y, 2 widths."""
    if mlp == "quack" and (reason := gated_mlp.refusal("cuda", HALF, gated_mlp.Shape(4096, 1152, 3072, 1152))):
        pytest.skip(f"quack {reason}")
    kept = {}
    for depth in (2, 4):
        torch._dynamo.reset()
        model = build(2, grid=16, depth=depth, width=1152, heads=16, kernels="triton", mlp=mlp).cuda()
        model.choose_attention(16, HALF)
        assert model.choose_mlp(16, HALF) == mlp
        model.set_recompute("full")
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
        kept[depth] = kept_bytes(model, [part.cuda() for part in batch(model, 16)], HALF)
    assert (kept[4] - kept[2]) / 2 < 2.5 * 1152 * 16 * 256 * 2


def living_bytes():
    """Of all tensors that Python knows, each storage once (by its handle: what compiling leaves has no address)."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def test_recomputed_selectively_it_keeps_no_hidden_width_more(quack, build, batch):
    """Selective recomputation holds its tensors itself, so that autograd's hooks do not see them."""
    model = build(1, grid=8, depth=1, width=32, mlp_multiple=8, patch=1)
    model.set_recompute("selective")
    inputs, kept, estimates = batch(model, 16), {}, {}
    for mlp in ("plain", "quack"):
        model._ops = select_ops("reference", torch.device("cpu"), "sdpa", mlp)
        before = living_bytes()
        with torch.autocast("cpu", HALF):
            v = model(*inputs)
        kept[mlp], estimates[mlp] = living_bytes() - before, activation_memory(model, 16, "bf16", "selective")
        v.square().mean().backward()
        model.zero_grad()
        del v
    plane = 16 * 64 * 88 * 2
    assert estimates["plain"] - estimates["quack"] == plane  # of the block that is recomputed just then
    assert kept["plain"] > 2 * plane
    assert abs(kept["quack"] - kept["plain"]) < 0.5 * plane


def test_what_is_chosen(build, monkeypatch):
    asked = []

    def resolve(backend, swiglu, device, dtype, shape, gradient):
        asked.append((backend, swiglu, shape, gradient))
        return "plain" if backend == "plain" else "quack"

    monkeypatch.setattr(gated_mlp, "resolve_mlp", resolve)
    model = build(2, grid=4, width=32, mlp_multiple=8, kernels="reference")
    assert model.mlp == "auto"
    assert model.chosen_mlp == "plain"
    assert model.choose_mlp(5, HALF) == "plain"  # the reference is PyTorch alone
    named = build(2, grid=4, width=32, mlp_multiple=8, kernels="reference", mlp="quack")
    assert named.choose_mlp(5, HALF, gradient=False) == named.chosen_mlp == "quack"
    named.choose_attention(5, torch.float32)
    assert named.chosen_mlp == "quack"
    assert pickle.loads(pickle.dumps(named))._ops == named._ops
    assert named.to("cpu").chosen_mlp == "quack"  # not moved
    assert named.to("meta").chosen_mlp == "plain"  # moved: it has to be chosen again
    shape = gated_mlp.Shape(80, 32, 88, 32)
    assert asked == [("plain", reference.swiglu, shape, True), ("quack", reference.swiglu, shape, False)]
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # in Triton's interpreter
    kernels = build(2, grid=4, width=32, mlp_multiple=8, kernels="triton", mlp="auto").to(device)
    assert kernels.choose_mlp(5, HALF) == "quack"
    assert asked[-1][0] == "auto"


def test_names_and_what_cannot_run_here(build):
    with pytest.raises(UserError, match=r"model.mlp: fused: choose one of auto, plain, quack"):
        build(mlp="fused")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(UserError, match=r"model.mlp: quack: .*needs bfloat16|needs a CUDA device"):
        build(mlp="quack").to(device).choose_mlp(2, torch.float32)
