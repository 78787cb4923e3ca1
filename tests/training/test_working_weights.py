"""bf16 weights that the optimizer rounds from its float32 ones: the same numbers as casting in every step."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastasync.optim import library
from fastasync.presets import preset
from fastasync.training import engine
from fastasync.training.build import build_model, choose_device, round_linears

pytestmark = pytest.mark.skipif(library.load("cpu") is None, reason="the compiled AdamW was not built (no g++)")


def files(out, step):
    folder = out / "checkpoints" / f"step_{step:08d}"
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


def assert_equal(one, other):
    for file in one:
        assert one[file].keys() == other[file].keys()
        for name, value in one[file].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, other[file][name]), f"{file} {name}"


def working(tiny, **train):
    """How many parameters of a plain engine are bf16, and how many there are."""
    config = tiny(train=train)
    made = engine.PlainEngine(build_model(config), config, choose_device("cpu"))
    kinds = [p.dtype for p in made.model.parameters()]
    return kinds.count(torch.bfloat16), len(kinds)


def test_the_same_numbers_as_autocasts(tiny, run, tmp_path, monkeypatch):
    config = tiny(train=dict(precision="bf16"))
    run(config, tmp_path / "kept")
    monkeypatch.setattr(engine, "use_working_weights", lambda *_: None)
    run(config, tmp_path / "cast")
    assert_equal(files(tmp_path / "kept", 6), files(tmp_path / "cast", 6))
    # and they are not rounded: what is trained has more digits than the working weights
    weight = files(tmp_path / "kept", 6)["model"]["blocks.0.attn.qkv.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_resumed_bit_for_bit_and_from_float32(tiny, run, tmp_path):
    run(tiny(train=dict(precision="bf16")), tmp_path / "whole")
    run(tiny(train=dict(precision="bf16", steps=3)), tmp_path / "parts")
    run(tiny(train=dict(precision="bf16")), tmp_path / "parts")
    assert_equal(files(tmp_path / "parts", 6), files(tmp_path / "whole", 6))


def test_a_weight_without_moments_in_the_checkpoint_starts_from_its_float32_value(tiny, tmp_path):
    config = tiny(train=dict(precision="bf16"))
    made = engine.PlainEngine(build_model(config), config, choose_device("cpu"))
    made.save(tmp_path)
    saved = load_file(tmp_path / "optimizer.safetensors")
    save_file(
        {name: value for name, value in saved.items() if ".qkv.weight" not in name}, tmp_path / "optimizer.safetensors"
    )
    again = engine.PlainEngine(build_model(config), config, choose_device("cpu"))
    again.load(tmp_path)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(again._weights()[name], load_file(tmp_path / "model.safetensors")[name])
    again.save(tmp_path)
    assert load_file(tmp_path / "optimizer.safetensors").keys() == saved.keys()


@pytest.mark.parametrize(
    "train", [dict(precision="fp32"), dict(precision="bf16", optimizer="torch"), dict(precision="bf16", accumulate=2)]
)
def test_where_they_would_change_the_numbers_there_are_none(tiny, train):
    assert working(tiny, **train)[0] == 0


def test_what_is_a_working_weight(tiny):
    """Linears and the patch embedding, but for the biases whose gradients the kernels sum, and the norms."""
    config = tiny(train=dict(precision="bf16"))
    made = engine.PlainEngine(build_model(config), config, choose_device("cpu"))
    full = {name for name, p in made.model.named_parameters() if p.dtype == torch.float32}
    block = ["attn.k_norm.weight", "attn.proj.bias", "attn.q_norm.weight", "attn.qkv.bias", "mlp.w12.bias"]
    wanted = {f"blocks.0.{name}" for name in [*block, "norm1.weight", "norm2.weight"]}
    assert full == wanted | {"final_layer.norm_final.weight", "y_embedder.embedding_table.weight"}


def test_rounded_for_sampling_the_results_are_autocasts():
    config = preset("digits")
    torch.manual_seed(0)
    model = build_model(config).eval()
    for p in model.parameters():  # adaLN and the output layer start at zero
        torch.nn.init.normal_(p, std=0.02)
    inputs = torch.randn(3, sum(model.channels), model.grid, model.grid), torch.rand(3, 2), torch.tensor([0, 1, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(*inputs)
        round_linears(model, torch.bfloat16)
        assert {p.dtype for p in model.blocks[0].mlp.parameters()} == {torch.bfloat16}
        assert wanted.abs().sum() > 0
        assert torch.equal(model(*inputs), wanted)
