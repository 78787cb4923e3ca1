"""build_optimizer and its implementations, the EMA's readers, the loader of the libraries, and offline compilation."""

import importlib
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastasync.errors import UserError
from fastasync.optim import IMPLEMENTATIONS, FusedAdamW, build_optimizer, ema_parameters, library, swapped_in_ema
from fastasync.optim.baselines import TorchAdamW

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "ema_decay": 0.9}
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 4)).to(dtype)
    model[2].bias.requires_grad_(False)
    return model


def train(model, optimizer, steps, max_norm=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        norms.append(float(optimizer.clip_and_step(max_norm)))
    return norms


class AdamLike(torch.optim.AdamW):
    """Has the signature of NVIDIA apex's FusedAdam."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, lr, betas, eps, weight_decay)


@pytest.fixture
def nvidia_apex(monkeypatch):
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    apex.__spec__ = importlib.machinery.ModuleSpec("apex", None, is_package=True)
    monkeypatch.setattr(optimizers, "FusedAdam", AdamLike, raising=False)
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def test_all_implementations_do_the_same(nvidia_apex):
    found = {}
    for impl in IMPLEMENTATIONS:
        model = small_model()
        optimizer = build_optimizer(model.parameters(), impl, **OPTIONS)
        norms = train(model, optimizer, 20)
        # resume from a state dict in the middle
        other = build_optimizer(model.parameters(), impl, **OPTIONS)
        other.load_state_dict(optimizer.state_dict())
        norms += train(model, other, 10, seed=1)
        assert max(norms) > 0.1 > min(norms), "clipping must matter in some steps"
        found[impl] = (norms, dict(model.named_parameters()), ema_parameters(other, model))
        assert set(other.ema_state()) == {p for p in model.parameters() if p.requires_grad}
    norms, weights, averaged = found["fused"]
    for other_norms, other_weights, other_averaged in found.values():
        assert other_norms == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_averaged, averaged, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(averaged["0.weight"], weights["0.weight"], atol=1e-4)


def test_torch_implementation_skips_and_keeps_precision():
    model = small_model(torch.bfloat16)
    optimizer = build_optimizer(model.parameters(), "torch", **OPTIONS)
    assert isinstance(optimizer, TorchAdamW)
    train(model, optimizer, 3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    averaged = ema_parameters(optimizer, model)
    assert all(value.dtype == torch.float32 for value in averaged.values())
    model[0].weight.grad[1, 1] = float("nan")
    kept = {name: value.clone() for name, value in averaged.items()}
    assert not torch.isfinite(optimizer.clip_and_step(1.0))
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    torch.testing.assert_close(ema_parameters(optimizer, model), kept, rtol=0, atol=0)
    other = build_optimizer(model.parameters(), "torch", **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(ema_parameters(other, model), kept, rtol=0, atol=0)


def test_without_an_ema_the_weights_stand_for_it():
    model = small_model()
    for impl in ("fused", "torch"):
        optimizer = build_optimizer(model.parameters(), impl, lr=1e-2)
        train(model, optimizer, 2)
        assert optimizer.ema_state() == {}
        torch.testing.assert_close(ema_parameters(optimizer, model), dict(model.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_with_the_ema_gives_the_weights_back(dtype):
    model = small_model(dtype)
    optimizer = build_optimizer(model.parameters(), **OPTIONS)
    with swapped_in_ema(optimizer, model):  # before the first step: the weights themselves
        pass
    train(model, optimizer, 5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    averaged = ema_parameters(optimizer, model)
    assert list(averaged) == [name for name, _ in model.named_parameters()]
    addresses = [p.data_ptr() for p in model.parameters()]
    with swapped_in_ema(optimizer, model):
        for name, p in model.named_parameters():
            assert torch.equal(p, averaged[name].to(dtype))
        assert [p.data_ptr() for p in model.parameters()] == addresses
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="boom"), swapped_in_ema(optimizer, model):
        raise ValueError("boom")
    assert not torch.equal(averaged["0.weight"].to(dtype), before["0.weight"])
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)


def test_masters_start_from_full_precision():
    exact = [torch.randn(5, 3, generator=torch.Generator().manual_seed(1))]
    p = nn.Parameter(torch.zeros(5, 3, dtype=torch.bfloat16))
    optimizer = FusedAdamW([p], **OPTIONS)
    optimizer.init_state(masters=exact)
    assert torch.equal(optimizer.state[p]["master"], exact[0])
    assert torch.equal(optimizer.state[p]["ema"], exact[0])
    assert torch.equal(p.detach(), exact[0].to(torch.bfloat16))
    assert float(optimizer.state[p]["step"]) == 0
    with pytest.raises(UserError, match="masters"):
        optimizer.init_state(masters=[])


def test_unknown_implementation_and_bad_settings():
    params = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(UserError, match="auto, fused, torch, apex"):
        build_optimizer(params, "adam")
    for impl in ("fused", "torch"):
        with pytest.raises(UserError, match=r"optimizer\.lr"):
            build_optimizer(params, impl, lr=-1.0)


def test_apex_missing_and_the_unrelated_package_of_that_name(tmp_path, monkeypatch):
    params = [nn.Parameter(torch.zeros(2))]
    if importlib.util.find_spec("apex") is None:
        with pytest.raises(UserError, match="NVIDIA apex is not installed"):
            build_optimizer(params, "apex")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(UserError, match="unrelated web package"):
        build_optimizer(params, "apex")
    monkeypatch.delitem(sys.modules, "apex", raising=False)


def test_apex_without_its_kernels(nvidia_apex, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(AdamLike, "__init__", refuse)
    with pytest.raises(UserError, match="requires cuda extensions"):
        build_optimizer([nn.Parameter(torch.zeros(2))], "apex")


def test_a_library_that_cannot_be_used_is_named_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    load = library.load.__wrapped__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("cpu") is None  # not built: nothing to say
    (tmp_path / "_adamw_cpu.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="runs in PyTorch instead"):
        assert load("cpu") is None
    source = tmp_path / "old.c"
    source.write_text("int fastasync_adamw_abi(void) { return -1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "_adamw_old.so"), str(source)], check=True)
    with pytest.warns(UserWarning, match="built from other sources"):
        assert load("old") is None


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda_library_builds_and_says_when_there_is_no_gpu(tmp_path, build_libraries):
    folder = build_libraries(tmp_path, cuda=True)
    assert (folder / "_adamw_cuda.so").exists()
    if torch.cuda.is_available():
        library.Library(folder / "_adamw_cuda.so")
    else:
        with pytest.raises(OSError, match=r"fused AdamW: .*CUDA"):
            library.Library(folder / "_adamw_cuda.so")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_kernels_compile_for_hopper_without_spills(tmp_path):
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        "-arch=sm_90",
        "-Xptxas",
        "-v",
        "-cubin",
        "-o",
        str(tmp_path / "adamw.cubin"),
    ]
    result = subprocess.run([*command, str(ROOT / "csrc" / "fused_adamw.cu")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = result.stderr
    assert report.count("Compiling entry function") == 4
    assert report.count(" 0 bytes spill stores, 0 bytes spill loads") >= 4
    assert "warning" not in report
    registers = [int(line.split("Used ")[1].split()[0]) for line in report.splitlines() if "Used " in line]
    assert max(registers) <= 64  # four blocks of 256 threads per multiprocessor
