"""Recorded steps: the same training from fixed memory, and who gets a recording."""

import pytest
import torch
from safetensors.torch import load_file

from fastasync.errors import UserError
from fastasync.optim import FusedAdamW, build_optimizer
from fastasync.training import PlainEngine, build_model, engine
from fastasync.training.graph import LAUNCH_BOUND, WARM_UP, GraphedStep, Part, wants_graph


class Pretend(GraphedStep):
    """A recording that runs its function again, on the fixed memory, where a CUDA graph would replay it."""

    recorded = 0

    def _aside(self, run):
        return run()

    def _record(self, run):
        type(self).recorded += 1
        return run


def test_training_from_fixed_memory_is_the_same(tmp_path, tiny, run, monkeypatch):
    """Weights and records of a run whose steps read nothing but the fixed tensors, against the plain loop."""
    config = tiny(train=dict(steps=8, accumulate=2, log_every=1, lr=2.0**-6, warmup=4))  # rates that float32 holds
    plain = run(config, tmp_path / "plain").checkpoint
    monkeypatch.setattr(engine, "GraphedStep", Pretend)
    monkeypatch.setattr(engine, "wants_graph", lambda *_: True)
    recorded = run(config, tmp_path / "recorded").checkpoint
    assert Pretend.recorded == 1
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (plain / name).read_bytes() == (recorded / name).read_bytes(), name


def test_changes_only_what_it_is_given():
    seen = []
    step = Pretend(lambda step, parts: (step.double().clone(), parts[0].z + parts[0].tau), torch.device("cpu"))

    def part(value):
        return Part(torch.full((2,), value), torch.zeros(2), torch.ones(2), torch.ones(2))

    for number in range(WARM_UP + 4):
        count, total = step(number, [part(float(number))])
        seen.append((float(count), total.tolist()))
    assert seen == [(float(n), [n + 1.0] * 2) for n in range(WARM_UP + 4)]
    with pytest.raises(ValueError, match="shorter"):
        step(9, [])


def test_who_gets_a_recording(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(2))
    fused, torchs = FusedAdamW([weight]), build_optimizer([weight], "torch")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not wants_graph("auto", cpu, fused, 1.0)
    with pytest.raises(UserError, match=r"train.cuda_graph: on: needs a CUDA device"):
        wants_graph("on", cpu, fused, 1.0)
    monkeypatch.setattr(FusedAdamW, "backend", "cuda")
    assert wants_graph("auto", cuda, fused, LAUNCH_BOUND / 2)
    assert not wants_graph("auto", cuda, fused, LAUNCH_BOUND * 2)
    assert wants_graph("on", cuda, fused, LAUNCH_BOUND * 2)
    assert not wants_graph("off", cuda, fused, 1.0)
    with pytest.raises(UserError, match="compiled AdamW"):
        wants_graph("on", cuda, torchs, 1.0)


def test_on_is_refused_without_cuda(tiny):
    with pytest.raises(UserError, match=r"train.cuda_graph"):
        PlainEngine(build_model(tiny()), tiny(train=dict(cuda_graph="on")), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "model"])
def test_recorded_training_on_the_gpu(tmp_path, tiny, run, compiled):
    """The replayed steps train as the plain ones do, and a resumed run goes on recording."""
    if FusedAdamW([torch.nn.Parameter(torch.ones(2, device="cuda"))]).backend != "cuda":
        pytest.skip("the CUDA library is not built")
    train = dict(steps=12, checkpoint_every=8, device="cuda", optimizer="fused", compile=compiled, precision="fp32")
    plain = run(tiny(train=train | dict(cuda_graph="off")), tmp_path / "plain")
    run(tiny(train=train | dict(cuda_graph="on", steps=8)), tmp_path / "recorded")
    recorded = run(tiny(train=train | dict(cuda_graph="on")), tmp_path / "recorded")
    one, two = (load_file(result.checkpoint / "model.safetensors") for result in (plain, recorded))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
