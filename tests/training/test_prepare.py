"""What is decided before the first step: precision, attention backend, what is recomputed."""

from contextlib import nullcontext

import fastasync_kernels
import pytest
import torch
from fastasync_kernels import attention, gated_mlp, weight_gradient
from safetensors.torch import load_file

from fastasync.config import differences
from fastasync.errors import UserError
from fastasync.model import LightningDiT, Zero, memory_estimate, parameter_count
from fastasync.model.linears import BlockLinear
from fastasync.probe.network import Trainer, build_probe, surface_step
from fastasync.training import PlainEngine, build_model
from fastasync.training.build import (
    USABLE,
    check_training,
    choose_autocast,
    choose_memory,
    prepare_model,
    prepare_sampling,
    use_fp8,
)
from tests.kernels import quack_kit

CPU = torch.device("cpu")


def xl():
    with torch.device("meta"):
        names, size = ("texture", "semantic"), {"depth": 28, "width": 1152, "heads": 16}
        return LightningDiT(channels=(32, 16), names=names, grid=16, classes=1000, repa_width=768, **size)


def test_memory_auto_recomputes_until_it_fits():
    model = xl()
    need = {what: memory_estimate(model, 256, "bf16", what) for what in ("none", "selective", "full")}
    assert need["none"].activations > 1.5 * need["selective"].activations > 3 * need["full"].activations
    assert 85e9 < need["none"].total < 115e9  # 103 GB was measured for this step in plain PyTorch
    for gigabytes, expected in ((140, "none"), (80, "selective"), (40, "full"), (10, "full")):
        assert choose_memory("auto", model, 256, "bf16", gigabytes * 10**9) == expected
    assert choose_memory("auto", model, 256, "bf16", None) == "none"
    assert choose_memory("full", model, 256, "bf16", 10**15) == "full"


def test_memory_auto_under_zero():
    """Of 16 bytes a parameter beside the float32 weights, which make room for bf16 ones, 8 devices hold 2 each."""
    model, count = xl(), parameter_count(xl())
    activations = memory_estimate(model, 256).activations
    for zero, extra in ((Zero(), 16), (Zero(1, 8, True), 2 + 2 + 2 - 4), (Zero(2, 8, True), 2 + 20 / 8 - 4)):
        least = (activations + extra * count) / USABLE
        assert choose_memory("auto", model, 256, "bf16", int(least * 1.001), zero) == "none"
        assert choose_memory("auto", model, 256, "bf16", int(least * 0.999), zero) == "selective"


@pytest.mark.parametrize("memory", ["selective", "full"])
def test_memory_changes_no_step(tmp_path, tiny, run, memory):
    changes = {"plain": {}, memory: {"memory": memory}}
    done = [run(tiny(train=dict(steps=3) | change), tmp_path / name) for name, change in changes.items()]
    one, two = ((result.checkpoint / "model.safetensors").read_bytes() for result in done)
    assert one == two


def test_fp8_is_for_the_linears_of_the_blocks():
    model = xl()
    use_fp8(model, CPU, emulate=True)
    chosen = [name for name, module in model.named_modules() if getattr(module, "fp8", None)]
    assert len(chosen) == 4 * 28
    assert {name.split(".", 2)[2] for name in chosen} == {"attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"}


def test_fp8_needs_a_gpu(tiny):
    with pytest.raises(UserError, match=r"train.precision: fp8: needs a GPU"):
        PlainEngine(build_model(tiny()), tiny(train=dict(precision="fp8")), CPU)
    assert choose_autocast("fp8", CPU) is torch.bfloat16


@pytest.mark.parametrize(
    ("kernels", "compiled", "memory"),
    [
        ("reference", False, "none"),
        ("reference", True, "none"),
        ("triton", False, "none"),
        ("triton", False, "selective"),
    ],
)
def test_fp8_in_the_network(tiny, kernels, compiled, memory):
    """The state dict keeps its names, the output and the gradients stay close."""
    torch.manual_seed(0)
    model = build_model(tiny(model=dict(width=48, heads=2, kernels=kernels)))
    model.set_recompute(memory)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight, std=0.1)
    x, tau, y = torch.randn(4, 4, 2, 2), torch.rand(4, 2), torch.arange(4) % 3
    names, weight = list(model.state_dict()), model.blocks[0].mlp.w12.weight
    expected = model(x, tau, y)
    (known,) = torch.autograd.grad(expected.square().mean(), weight)
    use_fp8(model, CPU, emulate=True)
    v = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)(x, tau, y)
    assert 1e-6 < (v - expected).norm() / expected.norm() < 0.05
    (gradient,) = torch.autograd.grad(v.square().mean(), weight)
    assert 1e-6 < (gradient - known).norm() / known.norm() < 0.1
    assert list(model.state_dict()) == names


def test_fp8_leaves_linears_whose_sizes_it_cannot_take(tiny, caplog):
    """Width 32: the MLP's hidden size is 85, as cifar10's would be 682."""
    model = build_model(tiny(model=dict(width=32, depth=1)))
    use_fp8(model, CPU, emulate=True)
    block = model.blocks[0]
    kinds = {linear: linear.fp8 for linear in (block.attn.qkv, block.attn.proj, block.mlp.w12, block.mlp.w3)}
    assert list(kinds.values()) == ["reference", "reference", None, None]
    assert "fp8: 2 of 4 block linears stay in bf16, blocks.0.mlp.w12 [170, 32]" in caplog.text


def test_free_fields_may_change_within_a_run(tiny):
    changes = {"train": dict(memory="full", cuda_graph="auto"), "model": dict(attention="reference")}
    assert differences(tiny(), tiny(**changes)) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_weight_gradients_in_parts(tiny, monkeypatch, compiled):
    """The rest of the network notices nothing; one graph without a break (undivided ones are compiled elsewhere)."""
    config, gradients = tiny(train=dict(precision="bf16")), []
    reps = config.representations
    x, tau = torch.randn(8, sum(reps.channels), reps.grid, reps.grid), torch.rand(8, len(reps.names))
    y = torch.zeros(8, dtype=torch.int64)
    for parts in (1, 2):
        monkeypatch.setattr(weight_gradient, "choose_parts", lambda *_, parts=parts: parts)
        torch.manual_seed(0)
        model = prepare_model(build_model(config), config, CPU, 8)
        for p in model.parameters():  # adaLN and the last layer begin at zero
            p.data += 0.02 * torch.randn_like(p)
        linears = [module for module in model.modules() if isinstance(module, BlockLinear)]
        assert {linear.parts for linear in linears} == {parts}
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled and parts > 1 else model
        with torch.autocast("cpu", torch.bfloat16):
            forward(x, tau, y).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).norm()) <= 2.0**-7 * float(gradient.norm()), name
    assert any(not torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_the_width_of_products_is_chosen_before_what_is_measured_at_it(tiny, monkeypatch):
    """Hidden width 42 is computed as 64; the parameters keep theirs."""
    pytest.importorskip("triton")
    config = tiny(train=dict(precision="bf16"), model=dict(kernels="triton"))
    asked, shapes = [], []
    monkeypatch.setattr(weight_gradient, "choose_parts", lambda rows, *shape: asked.append(shape[:2]) or 1)
    monkeypatch.setattr(gated_mlp, "resolve_mlp", lambda *a: shapes.append(a[4]) or "plain")
    plain = build_model(config)
    expected = {name: value.shape for name, value in plain.state_dict().items()}
    model = prepare_model(plain, config, CPU, 4)
    assert model.product_hidden == 64
    assert set(asked) == {(48, 16), (16, 16), (128, 16), (16, 64)}
    assert [shape.hidden for shape in shapes] == [64]
    assert {name: value.shape for name, value in model.state_dict().items()} == expected


def test_the_mlps_are_chosen_for_bf16(tiny, monkeypatch):
    """Not under ZeRO 3, which gathers weights for each layer's own call."""
    asked = []
    monkeypatch.setattr(gated_mlp, "resolve_mlp", lambda *a: asked.append(a[3:]) or "quack")
    chosen = {}
    for precision, zero in (("bf16", 1), ("fp32", 1), ("bf16", 3)):
        config = tiny(train=dict(precision=precision, zero=zero), model=dict(mlp="quack"))
        chosen[precision, zero] = prepare_model(build_model(config), config, CPU, 8).chosen_mlp
    assert chosen == {("bf16", 1): "quack", ("fp32", 1): "quack", ("bf16", 3): "plain"}
    shape = gated_mlp.Shape(32, 16, 42, 16)
    assert asked == [(torch.bfloat16, shape, True), (torch.float32, shape, True)]


def test_triton_on_some_ranks_only_is_refused(tiny):
    """Its operations give biases their gradients at other times than PyTorch's."""
    config = tiny()
    with pytest.raises(UserError, match=r"model.kernels: auto: Triton does not run on ranks 0, 2: set it to reference"):
        prepare_model(build_model(config), config, CPU, 8, lambda own: [own, own._replace(fused=True), own])


def test_memory_auto_counts_what_the_mlps_keep():
    model = xl()
    model._ops = model._ops._replace(mlp="quack")
    saved = 28 * 256 * 256 * 3072 * 2
    need = [memory_estimate(each, 256, "bf16", "none").total for each in (xl(), model)]
    assert need[0] - need[1] == saved
    between = (need[0] - memory_estimate(xl(), 256).weights) / 0.9 - saved / 2
    assert [choose_memory("auto", each, 256, "bf16", int(between)) for each in (xl(), model)] == ["selective", "none"]


@pytest.mark.parametrize(
    ("train", "model", "words"),
    [
        (dict(precision="bf16"), {}, "needs a CUDA device, not cpu"),
        (dict(precision="bf16", zero=3), {}, "does not go with train.zero=3: choose auto or plain"),
    ],
)
def test_a_named_mlp_that_cannot_run_is_refused_before_any_work(tiny, train, model, words):
    with pytest.raises(UserError, match=f"model.mlp: quack: {words}"):
        check_training(tiny(train=train, model=dict(mlp="quack") | model), CPU)
    check_training(tiny(train=train), CPU)


def test_a_named_mlp_on_a_gpu(tiny, monkeypatch):
    """With a device that looks like one: fp8, a size that TMA cannot read, a package that is not there."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(UserError, match=r"model.mlp: quack: does not go with train.precision=fp8"):
        check_training(tiny(train=dict(precision="fp8"), model=dict(mlp="quack")), cuda)
    with pytest.raises(UserError, match=r"model.mlp: quack: needs sizes that are multiples of 8, not 42"):
        check_training(tiny(train=dict(precision="bf16"), model=dict(mlp="quack", kernels="reference")), cuda)
    monkeypatch.setattr(fastasync_kernels, "_fault", lambda device: "")
    for right in (dict(kernels="reference", mlp_multiple=8), dict(kernels="triton")):  # with zeros to a multiple of 64
        with quack_kit.installed():
            check_training(tiny(train=dict(precision="bf16"), model=dict(mlp="quack") | right), cuda)


def test_a_named_attention_with_wrong_gradients_trains_nothing_and_samples(tiny, monkeypatch):
    """fa4 by a stand-in that runs here and doubles q's gradient."""
    monkeypatch.setattr(attention, "_faults", {})
    monkeypatch.setattr(attention, "_reason", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setitem(attention._RUN, "fa4", lambda q, k, v: attention._sdpa(2 * q - q.detach(), k, v))
    config = tiny(model=dict(attention="fa4"))
    for train in (
        lambda: check_training(config, CPU),
        lambda: prepare_model(build_model(config), config, CPU, 8),
        lambda: surface_step(probe := build_probe(config, CPU), Trainer(probe, 0.1, 2), config, CPU),
    ):
        with pytest.raises(UserError, match=r"model.attention: fa4: .* \(off by 1, .* choose auto, cudnn or sdpa"):
            train()
    model = build_model(config)
    prepare_sampling(model, 8, "fp32", CPU)
    assert model.chosen_attention == "fa4"


def test_a_step_by_quacks_stand_in(tmp_path, tiny, run, monkeypatch, caplog):
    """The loop, the optimizer and the checkpoints notice nothing: the losses are close, names and shapes the same."""
    done, losses = {}, {}
    for mlp in ("plain", "quack"):
        monkeypatch.setattr(gated_mlp, "resolve_mlp", lambda *a, mlp=mlp: mlp)
        config = tiny(train=dict(steps=3, precision="bf16", compile="off"), model=dict(mlp_multiple=8))
        with quack_kit.installed():
            done[mlp] = run(config, tmp_path / mlp)
        losses[mlp] = load_file(done[mlp].checkpoint / "model.safetensors")
    assert {name: value.shape for name, value in losses["plain"].items()} == {
        name: value.shape for name, value in losses["quack"].items()
    }
    for name, value in losses["plain"].items():
        torch.testing.assert_close(losses["quack"][name], value, rtol=0, atol=5e-3, msg=name)
    assert any(not torch.equal(losses["quack"][name], value) for name, value in losses["plain"].items())
