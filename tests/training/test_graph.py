"""Recorded steps: the same training from fixed memory, and who gets a recording."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from fastasync import stages
from fastasync.config import config_from_dict
from fastasync.errors import UserError
from fastasync.model import train_flops
from fastasync.optim import FusedAdamW, build_optimizer
from fastasync.training import PlainEngine, build_model, engine, graph
from fastasync.training.build import prepare_sampling
from fastasync.training.graph import (
    HIDDEN,
    LAUNCH_BOUND,
    MAYBE_BOUND,
    SPARE,
    WARM_UP,
    GraphedForward,
    GraphedStep,
    Memory,
    Part,
    to_be_watched,
    wants_forward_graph,
    wants_graph,
)
from tests.training.graph_kit import Pretend


@pytest.mark.parametrize(
    ("changes", "skips"),
    [
        (dict(steps=8, accumulate=2, log_every=1, lr=2.0**-6), False),  # rates that float32 holds
        (dict(steps=24, log_every=4, max_norm_ratio=1.2, clip=0.0, lr=2.0**-10), True),
    ],
)
def test_training_from_fixed_memory_is_the_same(tmp_path, tiny, run, monkeypatch, changes, skips):
    """Weights and records of a run whose steps read nothing but the fixed tensors, against the plain loop."""
    config = tiny(train=dict(warmup=4) | changes)
    plain = run(config, tmp_path / "plain")
    monkeypatch.setattr(Pretend, "recorded", 0)
    monkeypatch.setattr(engine, "GraphedStep", Pretend)
    monkeypatch.setattr(engine, "wants_graph", lambda *_: True)
    recorded = run(config, tmp_path / "recorded")
    assert Pretend.recorded == 1
    assert (plain.record["skipped"] > 0) == skips
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (plain.checkpoint / name).read_bytes() == (recorded.checkpoint / name).read_bytes(), name


class Full(Pretend):
    """A recording for which the memory ends when the gradients are already there."""

    def _record(self, run):
        super()._record(run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlainEngine, "step", out_of_memory)
            run()


def out_of_memory(*_):
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError as error:  # torch hides it behind the second one
        raise RuntimeError("the recording cannot be ended") from error


def test_a_recording_without_memory_leaves_the_training_as_it_was(tmp_path, tiny, run, monkeypatch, caplog):
    config = tiny(train=dict(steps=8, accumulate=2, log_every=1, lr=2.0**-6, warmup=4))
    plain = run(config, tmp_path / "plain").checkpoint
    monkeypatch.setattr(Full, "recorded", 0)
    monkeypatch.setattr(engine, "GraphedStep", Full)
    monkeypatch.setattr(engine, "wants_graph", lambda *_: True)
    tried = run(config, tmp_path / "tried").checkpoint
    assert Full.recorded == 1  # and not once more at each of the steps that follow
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "ran out of memory" in r.msg]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (plain / name).read_bytes() == (tried / name).read_bytes(), name


def test_other_errors_of_a_recording_are_not_hidden():
    class Broken(Pretend):
        def _record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    step = Broken(lambda *_: (), torch.device("cpu"))
    for number in range(WARM_UP):
        step(number, [])
    with pytest.raises(RuntimeError, match="not permitted"):
        step(WARM_UP, [])


@pytest.mark.parametrize(("memory", "records"), [(Memory(100, 125), 1), (Memory(100, 124), 0)])
def test_auto_records_where_the_memory_is_free(monkeypatch, caplog, memory, records):
    assert SPARE == 1.25
    caplog.set_level(logging.INFO, "fastasync")
    monkeypatch.setattr(Pretend, "memory", memory)
    monkeypatch.setattr(Pretend, "recorded", 0)
    step = Pretend(lambda step, parts: (step.clone(), parts[0].z + 1), torch.device("cpu"), careful=True)
    for number in range(WARM_UP + 3):
        count, z = step(number, [Part(*torch.full((4, 1), float(number)))])
        assert (int(count), float(z)) == (number, number + 1)
    assert Pretend.recorded == records
    assert step.forgotten == WARM_UP  # so that the peak is of one warm step alone
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("steps are recorded as a CUDA graph" if records else "steps are not recorded")


@pytest.mark.parametrize(("left", "records"), [(0.0, 1), (0.09, 1), (0.11, 0), (0.6, 0)])
def test_a_watched_step_is_recorded_where_launches_bind_it(monkeypatch, caplog, left, records):
    """``left``: of the third step's time is the device's, after the host has launched everything."""
    assert HIDDEN == 0.1
    caplog.set_level(logging.INFO, "fastasync")
    looks = iter([100.0, 100.0 + 4 * (1 - left), 104.0])  # at the clock: before, launched, done
    monkeypatch.setattr(graph.time, "perf_counter", lambda: next(looks))
    monkeypatch.setattr(Pretend, "recorded", 0)
    step = Pretend(lambda step, parts: (step.clone(), parts[0].z + 1), torch.device("cpu"), watch=True)
    for number in range(WARM_UP + 3):
        count, z = step(number, [Part(*torch.full((4, 1), float(number)))])
        assert (int(count), float(z)) == (number, number + 1)
    assert Pretend.recorded == records
    assert step.refused == (not records)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("launches bind steps" if records else "steps are not recorded")
    assert f"{left:.0%} of its time is left" in said


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
    assert not wants_graph("auto", cpu, fused, 1.0, "fp8")
    with pytest.raises(UserError, match=r"train.cuda_graph: on: needs a CUDA device"):
        wants_graph("on", cpu, fused, 1.0, "bf16")
    monkeypatch.setattr(FusedAdamW, "backend", "cuda")
    assert wants_graph("auto", cuda, fused, LAUNCH_BOUND / 2, "bf16")
    assert wants_graph("auto", cuda, fused, LAUNCH_BOUND * 2, "bf16")
    assert not wants_graph("auto", cuda, fused, MAYBE_BOUND, "bf16")
    assert to_be_watched("auto", LAUNCH_BOUND * 2, "bf16")
    assert not to_be_watched("auto", LAUNCH_BOUND / 2, "bf16")
    assert not to_be_watched("auto", LAUNCH_BOUND * 2, "fp8")
    assert not to_be_watched("on", LAUNCH_BOUND * 2, "bf16")
    assert wants_graph("on", cuda, fused, LAUNCH_BOUND * 2, "bf16")
    assert wants_graph("auto", cuda, fused, LAUNCH_BOUND * 2, "fp8")
    assert not wants_graph("off", cuda, fused, 1.0, "fp8")
    with pytest.raises(UserError, match="compiled AdamW"):
        wants_graph("on", cuda, torchs, 1.0, "bf16")


def test_a_part_of_a_divided_batch_decides(tiny, monkeypatch):
    """It has as many launches as a whole one."""
    asked = []
    monkeypatch.setattr(engine, "wants_graph", lambda choice, device, optimizer, flops, precision: asked.append(flops))
    monkeypatch.setattr(engine, "to_be_watched", lambda choice, flops, precision: asked.append(flops))
    for parts in (1, 4):
        PlainEngine(build_model(tiny()), tiny(train=dict(batch=8, accumulate=parts)), torch.device("cpu"))
    assert asked[0] == asked[1] == 4 * asked[2] == 4 * asked[3] == 8 * train_flops(build_model(tiny()))


def test_on_is_refused_without_cuda(tiny):
    with pytest.raises(UserError, match=r"train.cuda_graph"):
        PlainEngine(build_model(tiny()), tiny(train=dict(cuda_graph="on")), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("compiled", "graph", "changes"),
    [
        ("off", "on", {}),
        ("model", "on", {}),
        ("off", "auto", {}),
        ("regional", "auto", dict(accumulate=2, max_norm_ratio=20.0)),
    ],
)
def test_recorded_training_on_the_gpu(tmp_path, tiny, run, compiled, graph, changes, caplog):
    """The replayed steps train as the plain ones do, and a resumed run goes on recording."""
    caplog.set_level(logging.INFO, "fastasync")
    if FusedAdamW([torch.nn.Parameter(torch.ones(2, device="cuda"))]).backend != "cuda":
        pytest.skip("the CUDA library is not built")
    train = dict(steps=12, checkpoint_every=8, device="cuda", optimizer="fused", compile=compiled, precision="fp32")
    train |= changes
    plain = run(tiny(train=train | dict(cuda_graph="off")), tmp_path / "plain")
    run(tiny(train=train | dict(cuda_graph=graph, steps=8)), tmp_path / "recorded")
    recorded = run(tiny(train=train | dict(cuda_graph=graph)), tmp_path / "recorded")
    said = [record.getMessage() for record in caplog.records if "steps are" in record.msg]
    assert [line.split(":")[0] for line in said] == ["steps are recorded as a CUDA graph"] * (2 * (graph == "auto"))
    one, two = (load_file(result.checkpoint / "model.safetensors") for result in (plain, recorded))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


class Watched(GraphedStep):
    """Remembers what it has measured."""

    def _memory(self):
        self.measured = super()._memory()
        return self.measured


@pytest.mark.gpu
def test_memory_is_that_of_one_warm_step_on_the_gpu():
    """Not of the steps before, which compile and measure, and what stays between steps is no need."""
    calls, small, large = 0, 2**26, 2**29

    def function(step, parts):
        nonlocal calls
        calls += 1
        work = torch.ones((large if calls < WARM_UP else small) // 4, device="cuda")
        return work.sum(), parts[0].z.sum()

    stays = torch.empty(2**25, dtype=torch.uint8, device="cuda")
    step = Watched(function, torch.device("cuda"), careful=True)
    for number in range(WARM_UP + 3):
        total, given = step(number, [Part(*torch.full((4, 1), float(number), device="cuda"))])
        size = large if number + 1 < WARM_UP else small
        assert (float(total), float(given)) == (size / 4, number)
    assert step._replay is not None
    assert small <= step.measured.needed < small + 2**22
    assert large <= step.measured.free <= torch.cuda.mem_get_info()[1] - stays.numel()


@pytest.mark.gpu
def test_a_recording_that_runs_out_of_memory_on_the_gpu(caplog):
    """A real one: the training goes on as without it, and so does the device."""
    caplog.set_level(logging.INFO, "fastasync")

    def train(record):
        torch.manual_seed(0)
        network = torch.nn.Linear(64, 64, device="cuda")
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, capturable=True)

        def function(step, parts):
            network(parts[0].z).square().mean().backward()
            if torch.cuda.is_current_stream_capturing():
                torch.empty(2**46, dtype=torch.uint8, device="cuda")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return (network.weight.detach().sum(),)

        step = function
        if record:
            step = GraphedStep(function, torch.device("cuda"), lambda: optimizer.zero_grad(set_to_none=True), True)
        for number in range(WARM_UP + 4):
            generator = torch.Generator("cuda").manual_seed(number)
            z = torch.randn(8, 64, device="cuda", generator=generator)
            (total,) = step(number, [Part(z, z, z, z)])
        return network.weight.detach().cpu(), float(total)

    (plain, total), (tried, same) = train(False), train(True)
    assert torch.equal(plain, tried)
    assert total == same
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == ["steps are recorded as a CUDA graph", "steps are not recorded"]
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


class PretendForward(GraphedForward):
    """As ``Pretend``, for passes of sampling."""

    recorded = 0
    room = True

    def _wait(self):
        pass

    def _record(self, run):
        self.recorded += 1
        if not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return run


def pass_arguments(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    x, tau = torch.randn(batch, 3, 2, 2, generator=generator), torch.rand(batch, 2, generator=generator)
    return x, tau, torch.arange(batch)


def one_pass(x, tau, y):
    return (x * tau.sum(1)[:, None, None, None]).sin() + y[:, None, None, None]


def test_passes_of_the_first_shape_are_replayed():
    graphed = PretendForward(one_pass, torch.device("cpu"))
    kept = []
    for number in range(WARM_UP + 4):  # the last batch is smaller, and may come at any time
        for batch in (5, 4) if number == 1 or number > WARM_UP + 1 else (5,):
            kept.append((pass_arguments(batch, number), graphed(*pass_arguments(batch, number))))
        assert graphed.recorded == (number >= WARM_UP)
    for arguments, found in kept:  # what was returned is not overwritten by later passes
        assert torch.equal(found, one_pass(*arguments))
    other = [value.double() if value.is_floating_point() else value for value in pass_arguments(5, 1)]
    assert graphed(*other).dtype == torch.float64
    assert graphed.recorded == 1


def test_passes_go_on_where_a_recording_finds_no_memory(caplog):
    graphed = PretendForward(one_pass, torch.device("cpu"))
    graphed.room = False
    for number in range(WARM_UP + 4):
        arguments = pass_arguments(3, number)
        assert torch.equal(graphed(*arguments), one_pass(*arguments))
    assert graphed.recorded == 1
    assert [line.getMessage().split(":")[0] for line in caplog.records] == ["passes are not recorded"]


def test_each_shape_of_passes_is_looked_at_for_itself(monkeypatch):
    """The larger batch hides its launches, the smaller one does not; they come by turns."""
    clock = [0.0]
    monkeypatch.setattr(graph.time, "perf_counter", lambda: clock[0])

    class Timed(PretendForward):
        def _wait(self):
            clock[0] += 1.0 if self.large else 0.0

    def call(x, tau, y):
        clock[0] += 1.0
        return one_pass(x, tau, y)

    graphed = Timed(call, torch.device("cpu"), watch=True)
    for number in range(WARM_UP + 2):
        for batch in (8, 4):
            graphed.large = batch == 8
            graphed(*pass_arguments(batch, number))
    assert graphed.recorded == 1
    assert graphed._recorded[0][0] == (4, 3, 2, 2)


@pytest.mark.parametrize("choice", ["auto", "on"])
def test_an_engine_looks_where_it_is_auto(tiny, run, tmp_path, monkeypatch, choice):
    asked = []

    class Asked(Pretend):
        def __init__(self, *args, watch=False, careful=False, **kwargs):
            asked.append((watch, careful))
            super().__init__(*args, watch=False, careful=False, **kwargs)

    monkeypatch.setattr(engine, "GraphedStep", Asked)
    monkeypatch.setattr(engine, "wants_graph", lambda *_: True)
    monkeypatch.setattr(graph, "LAUNCH_BOUND", 0.0)
    run(tiny(train=dict(cuda_graph=choice)), tmp_path / choice)
    assert asked == [(choice == "auto", choice == "auto")]


@pytest.mark.parametrize(("choice", "watch"), [("auto", [True]), ("on", [False]), ("off", [])])
def test_sampling_looks_where_it_is_auto(tiny, monkeypatch, choice, watch):
    asked = []
    monkeypatch.setattr(stages, "GraphedForward", lambda call, device, watch: asked.append(watch))
    monkeypatch.setattr(stages, "wants_forward_graph", lambda choice, device: choice != "off")
    config = config_from_dict({"sample": dict(cuda_graph=choice)}, tiny())
    stages._velocity(config, build_model(config).eval(), torch.device("cpu"), "none")
    assert asked == watch


@pytest.mark.parametrize(("left", "records"), [(0.0, 1), (0.09, 1), (0.11, 0)])
def test_a_watched_pass_is_recorded_where_launches_bind_it(monkeypatch, caplog, left, records):
    caplog.set_level(logging.INFO, "fastasync")
    looks = iter([100.0, 100.0 + 4 * (1 - left), 104.0])  # at the clock: before, launched, done
    monkeypatch.setattr(graph.time, "perf_counter", lambda: next(looks))
    graphed = PretendForward(one_pass, torch.device("cpu"), watch=True)
    for number in range(WARM_UP + 3):
        for batch in (5, 4) if number == 1 else (5,):
            arguments = pass_arguments(batch, number)
            assert torch.equal(graphed(*arguments), one_pass(*arguments))
    assert graphed.recorded == records
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("launches bind passes" if records else "passes are not recorded")


def test_which_passes_may_be_recorded():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [wants_forward_graph(choice, cuda) for choice in ("auto", "on", "off")] == [True, True, False]
    assert not wants_forward_graph("auto", cpu)
    with pytest.raises(UserError, match=r"sample\.cuda_graph.*needs a CUDA device, this is cpu"):
        wants_forward_graph("on", cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_recorded_passes_are_the_same_on_the_gpu(precision):
    """Of a real network with our kernels, bit by bit."""
    torch.manual_seed(0)
    shape = dict(size="custom", depth=2, width=128, heads=4, classes=10)
    model = build_model(config_from_dict({"representations": dict(channels=[6, 2], grid=8), "model": shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model = model.cuda().eval().requires_grad_(False)
    dtype = prepare_sampling(model, 16, precision, torch.device("cuda"))

    def call(x, tau, y):
        with torch.no_grad(), torch.autocast("cuda", dtype):
            return model(x, tau, y)

    graphed, plain, found = GraphedForward(call, torch.device("cuda")), [], []
    for number in range(WARM_UP + 4):
        generator = torch.Generator("cuda").manual_seed(number)
        x = torch.randn(16, 8, 8, 8, device="cuda", generator=generator)
        tau, y = torch.rand(16, 2, device="cuda", generator=generator), torch.arange(16, device="cuda") % 10
        plain.append(call(x, tau, y))
        found.append(graphed(x, tau, y))
        call(x + 1, tau, y)  # what others do to the memory between two passes is no matter
    assert graphed._replay is not None
    assert all(torch.equal(one, other) for one, other in zip(plain, found))


@pytest.mark.gpu
def test_a_watched_pass_of_launches_is_recorded_on_the_gpu():
    """So many that it is bound by them on a device that others use too."""

    def call(x, tau, y):
        for _ in range(2000):  # some 4 us each on the host, 2 on the device
            x = x + 1
        return x

    graphed = GraphedForward(call, torch.device("cuda"), watch=True)
    arguments = torch.ones(2, device="cuda"), torch.ones(2, device="cuda"), torch.arange(2, device="cuda")
    found = [graphed(*arguments) for _ in range(WARM_UP + 2)]
    assert graphed._replay is not None
    assert all(float(each.sum()) == 2 * 2001 for each in found)


@pytest.mark.gpu
def test_a_pass_that_hides_its_launches_is_not_recorded_on_the_gpu():
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def call(x, tau, y):
        out = large
        for _ in range(20):  # 1.4 ms each
            out = out @ large
        return x + out.sum()

    graphed = GraphedForward(call, torch.device("cuda"), watch=True)
    for _ in range(WARM_UP + 2):
        graphed(torch.ones(2, device="cuda"), torch.ones(2, device="cuda"), torch.arange(2, device="cuda"))
    assert graphed._replay is None
    (hidden,) = graphed._hidden.values()
    assert hidden > HIDDEN
