"""What is decided before the first step: precision, attention backend, what is recomputed."""

import pytest
import torch
from fastasync_kernels import weight_gradient

from fastasync.config import differences
from fastasync.errors import UserError
from fastasync.model import LightningDiT, memory_estimate
from fastasync.model.dit import BlockLinear
from fastasync.training import PlainEngine, build_model
from fastasync.training.build import choose_autocast, choose_memory, prepare_model, use_fp8

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
    """The rest of the network notices nothing; one graph without a break."""
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
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            forward(x, tau, y).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).norm()) <= 2.0**-7 * float(gradient.norm()), name
    assert any(not torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
