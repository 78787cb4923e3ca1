"""The watchdog, the limit on the gradient norm, DeepSpeed's JSON, and what launchers say about a process."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastasync.distributed import Session, explained_loss
from fastasync.errors import UserError
from fastasync.optim import library
from fastasync.training import TrainingError
from fastasync.training.deepspeed_engine import check_deepspeed
from fastasync.training.deepspeed_json import deepspeed_json, reduction_fields, zero_of
from fastasync.training.engine import choose_engine
from fastasync.training.interrupt import StopSignal
from fastasync.training.metrics import WINDOW, Tally, TallyReading
from fastasync.training.watchdog import FIRST, Watchdog

ROOT = Path(__file__).parents[2]

# --- stalls -----------------------------------------------------------------------------------------------------


def wait_here(seconds):
    time.sleep(seconds)


def test_a_stall_is_reported_once_with_the_stack():
    said = []
    with Watchdog(0.2 / 60, said.append, rank=3) as watchdog:
        for step in range(5):
            watchdog.beat(step)
            time.sleep(0.02)
        wait_here(0.6)
        assert len(said) == 1
        watchdog.beat(5)
        wait_here(0.6)
    assert len(said) == 2
    assert said[0].startswith("watchdog: rank 3: no step for 0.00")
    assert "after step 4; it is at" in said[0]
    assert "in wait_here" in said[0]


def test_no_alarm_in_time_nor_while_compiling():
    said = []
    with Watchdog(0.2 / 60, said.append):
        time.sleep(0.2 * FIRST * 0.6)  # a first step may take longer
    with Watchdog(0.0, said.append):
        time.sleep(0.1)
    code = compile("def compile_a_frame(wait):\n    wait(0.6)", "/torch/_dynamo/convert_frame.py", "exec")
    names = {}
    exec(code, names)
    with Watchdog(0.1 / 60, said.append) as watchdog:
        watchdog.beat(0)
        names["compile_a_frame"](time.sleep)
    assert said == []
    with Watchdog(0.1 / 60, said.append):  # the first step's, for longer than the limit
        names["compile_a_frame"](time.sleep)
    assert len(said) == 1
    assert "before the first step's end; it compiles" in said[0]
    assert "train.compile=off" in said[0]
    assert "in compile_a_frame" in said[0]


def test_a_stalled_run_says_where(tmp_path, tiny, run, latents, disturbed):
    said = []
    slow = disturbed(latents(), lambda step: time.sleep(0.8) if step == 3 else None)
    run(tiny(train=dict(stall_minutes=0.3 / 60)), tmp_path, slow, say=said.append)
    assert len(said) == 1
    assert "after step 3" in said[0]
    assert "latents.batch" in said[0]


# --- explosions -------------------------------------------------------------------------------------------------


def test_the_limit_is_a_multiple_of_the_median():
    tally = Tally(["loss", "grad_norm"], torch.device("cpu"), max_norm_ratio=10.0)
    norms = [float(norm) for norm in torch.rand(100, generator=torch.Generator().manual_seed(0)) + 1]
    accepted = []
    for step, norm in enumerate(norms, start=1):
        assert math.isinf(float(tally.limit)) == (len(accepted) < WINDOW // 4)
        tally.add([torch.tensor(1.0), torch.tensor(norm)], step)
        accepted.append(norm)
        if step == 50:
            for bad in (1e6, math.nan, math.inf):
                tally.add([torch.tensor(9.0), torch.tensor(bad)], step + 1)
    middle = sorted(accepted[-WINDOW:])[(WINDOW - 1) // 2]  # torch's median is the lower of two
    assert float(tally.limit) == pytest.approx(10 * middle)
    reading = TallyReading(tally.names, tally.values.tolist())
    assert (reading.skipped, reading.skipped_in_a_row, reading.means["loss"]) == (3, 3, 1.0)
    other = Tally(["loss", "grad_norm"], torch.device("cpu"), max_norm_ratio=10.0)
    other.load(json.loads(json.dumps(reading.values, allow_nan=False)))
    assert float(other.limit) == float(tally.limit)


def test_one_large_gradient_changes_nothing(tmp_path, tiny, run, latents, disturbed):
    """A batch 1e4 times too large at step 30 is left out: weights and moments after it are those before it."""
    config = tiny(train=dict(steps=31, log_every=1, checkpoint_every=30, max_norm_ratio=20.0, clip=0.0, warmup=0))
    result = run(config, tmp_path, disturbed(latents(), lambda step: 1e4 if step == 30 else None))
    before, after = (tmp_path / "checkpoints" / f"step_{step:08d}" for step in (30, 31))
    for name in ("model", "ema", "optimizer"):
        assert (before / f"{name}.safetensors").read_bytes() == (after / f"{name}.safetensors").read_bytes()
    assert (result.record["skipped"], result.record["loss"]) == (1, None)


def test_explosions_in_a_row_stop_the_run(tmp_path, tiny, run, latents, disturbed):
    config = tiny(train=dict(steps=60, log_every=2, checkpoint_every=10, max_norm_ratio=20.0, clip=0.0))
    with pytest.raises(TrainingError) as caught:
        run(config, tmp_path, disturbed(latents(), lambda step: 1e4 if step >= 30 else None))
    text = str(caught.value)
    assert "or more than 20 times the median of those before (train.max_norm_ratio)" in text
    assert "steps in a row, from step 31 on" in text
    assert float(text.split("grad_norm ")[1].split(")")[0]) > 1e3
    assert "step_00000030" in text


# --- DeepSpeed's JSON -------------------------------------------------------------------------------------------


def with_json(tiny, tmp_path, content, **fields):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tiny(train=dict(batch=8, deepspeed_config=str(path), **fields))


def test_the_json_follows_the_fields(tiny, tmp_path):
    made = deepspeed_json(tiny(train=dict(batch=24, accumulate=3, clip=0.5, zero=2)), 4)
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (24, 2)
    assert (made["gradient_accumulation_steps"], made["gradient_clipping"]) == (3, 0.5)
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"] == {"stage": 2, "contiguous_gradients": False, "overlap_comm": False}
    assert made["timers"] == {"throughput": {"enabled": False}}
    mine = {"zero_optimization": {"overlap_comm": True}}
    theirs = deepspeed_json(with_json(tiny, tmp_path, mine, zero=2), 2)["zero_optimization"]
    assert theirs == {"stage": 2, "overlap_comm": True}
    mine = {
        "zero_optimization": {"stage": "auto", "overlap_comm": False},
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
        "comms_logger": {"enabled": True},
    }
    merged = deepspeed_json(with_json(tiny, tmp_path, mine, zero=3, clip=1.0), 2)
    assert merged["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert merged["comms_logger"] == {"enabled": True}
    assert merged["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ({}, []),
        ({"zero_optimization": {"stage": "auto"}, "comms_logger": {"enabled": True}}, []),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}, "offload_param": None}}, []),
        ({"zero_optimization": {"reduce_bucket_size": 1000}}, ["zero_optimization.reduce_bucket_size"]),
        ({"communication_data_type": "bf16"}, ["communication_data_type"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel"]),
    ],
)
def test_a_json_about_reduction_leaves_it_to_deepspeed(tiny, tmp_path, content, fields):
    config = with_json(tiny, tmp_path, content)
    assert reduction_fields(config) == fields
    assert ("contiguous_gradients" in deepspeed_json(config, 2)["zero_optimization"]) == (not fields)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param", "cpu_offload"])
@pytest.mark.parametrize("value", [{"device": "cpu"}, {"device": "nvme", "nvme_path": "/disk"}, "cpu", True])
def test_offloading_is_refused_before_any_work(tiny, tmp_path, name, value):
    config = with_json(tiny, tmp_path, {"zero_optimization": {name: value}})
    pytest.importorskip("deepspeed")
    said = rf"train.deepspeed_config: .*ds.json sets zero_optimization.{name} = .*: our optimizer updates on the device"
    with pytest.raises(UserError, match=said + ": leave it out; train.zero=3 and train.memory=full need less"):
        check_deepspeed(config, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com Extra inputs are not permitted"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size Input should be a valid integer"),
        ({"comms_logger": 3}, "TypeError"),
        ({"communication_data_type": "int3"}, "Invalid communication_data_type"),
    ],
)
def test_what_deepspeed_does_not_understand_is_refused_before_any_work(tiny, tmp_path, content, says):
    pytest.importorskip("deepspeed")
    config = with_json(tiny, tmp_path, content)
    with pytest.raises(UserError, match=rf"train.deepspeed_config: .*ds.json: is not understood by DeepSpeed .*{says}"):
        check_deepspeed(config, 2)


def test_a_json_that_deepspeed_understands(tiny, tmp_path):
    pytest.importorskip("deepspeed")
    mine = {"zero_optimization": {"overlap_comm": "auto", "reduce_bucket_size": 5e8}, "steps_per_print": 10}
    mine |= {"train_batch_size": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": False}}  # ours, as they are
    mine |= {"communication_data_type": "fp32", "wall_clock_breakdown": True, "comms_logger": {"enabled": False}}
    mine |= {"tensorboard": {"enabled": False}, "flops_profiler": {"enabled": False}, "sequence_parallel_size": 1}
    check_deepspeed(with_json(tiny, tmp_path, mine), 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gradient_cliping", "did you mean 'gradient_clipping'"),
        ("zero_optimisation", "did you mean 'zero_optimization'"),
        ("stage", "choose one of .*communication_data_type"),  # known, but not there
        ("enabled", "choose one of"),
    ],
)
def test_what_deepspeed_would_not_notice_is_refused_before_any_work(tiny, tmp_path, name, says):
    pytest.importorskip("deepspeed")
    config = with_json(tiny, tmp_path, {"steps_per_print": 10, name: 1.0})
    with pytest.raises(UserError, match=rf"train.deepspeed_config: .*ds.json: '{name}': {says}"):
        check_deepspeed(config, 2)


def test_what_is_held_follows_the_stage_and_the_weights(tiny, tmp_path):
    """bf16 weights are trained under ZeRO 1 and 2 of our own reduction, where gradients are not summed over parts."""
    if library.load("cpu") is None:
        pytest.skip("the compiled AdamW is not built")
    cpu, bf16 = torch.device("cpu"), dict(precision="bf16")

    def zero(content=None, **fields):
        fields = {**bf16, **fields}
        config = tiny(train=fields) if content is None else with_json(tiny, tmp_path, content, **fields)
        return zero_of(config, cpu, 2)

    assert [zero(zero=stage) for stage in range(4)] == [(0, 2, False), (1, 2, True), (2, 2, True), (3, 2, False)]
    assert zero(accumulate=2) == zero(precision="fp32") == zero(optimizer="torch") == (1, 2, False)
    assert zero({"zero_optimization": {"overlap_comm": True}}) == (1, 2, False)
    assert zero({"comms_logger": {"enabled": True}}) == (1, 2, True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"gradient_clipping": 2.0}, r"sets gradient_clipping = 2.0: train.clip \(1.0\) decides this"),
        ({"zero_optimization": {"stage": 3}}, r"sets zero_optimization.stage = 3: train.zero \(1\) decides this"),
        ({"train_micro_batch_size_per_gpu": 3}, r"train.batch / \(ranks x train.accumulate\) \(4\) decides this"),
        ({"optimizer": {"type": "Adam"}}, "train.optimizer, train.lr, train.betas, train.weight_decay decides"),
        ({"managed_gradient_accumulation": False}, "train.accumulate decides this: change the field and leave managed"),
        ({"zero_optimization": None}, "zero_optimization: needs a JSON object"),
        ({"bf16": {"enabled": True}}, "train.precision decides this: change the field and leave bf16 out"),
        ("{", "cannot be read as JSON"),
        ("[1]", "needs a JSON object"),
    ],
)
def test_contradictions_name_both(tiny, tmp_path, content, text):
    with pytest.raises(UserError, match=text) as caught:
        deepspeed_json(with_json(tiny, tmp_path, content), 2)
    assert str(tmp_path / "ds.json") in str(caught.value)


def test_a_json_without_deepspeed_is_refused(tiny):
    with pytest.raises(UserError, match=r"train.deepspeed_config: x.json: train.engine is plain"):
        tiny(train=dict(deepspeed_config="x.json", engine="plain"))
    with pytest.raises(UserError, match="must be above 1"):
        tiny(train=dict(max_norm_ratio=0.5))


# --- processes --------------------------------------------------------------------------------------------------


def test_who_starts_a_process_chooses_the_engine(tiny):
    alone, two = Session({}), Session({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    by_deepspeed = Session({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CROSS_SIZE": "1"})
    assert [choose_engine(tiny(), here) for here in (alone, two, by_deepspeed)] == ["plain", "deepspeed", "deepspeed"]
    assert choose_engine(tiny(train=dict(engine="deepspeed")), alone) == "deepspeed"
    assert choose_engine(tiny(train=dict(deepspeed_config="mine.json")), alone) == "deepspeed"
    with pytest.raises(UserError, match="the launcher started 2: use deepspeed"):
        choose_engine(tiny(train=dict(engine="plain")), two)
    assert (alone.is_main, two.is_main, two.local) == (True, False, 1)
    assert alone.from_main(lambda: 3) == alone.main_first(lambda: 3) == alone.main_only(lambda: 3) == 3


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}])
def test_an_environment_that_makes_no_sense(wrong):
    with pytest.raises(UserError, match="RANK, LOCAL_RANK, WORLD_SIZE"):
        Session(wrong)


def test_errors_of_one_process_are_not_called_lost_ranks():
    with pytest.raises(RuntimeError, match="gloo"), explained_loss():
        raise RuntimeError("gloo")


def test_launchers_repeat_signals():
    """deepspeed sends SIGINT and SIGTERM, the terminal another SIGINT: none of them may end the saving."""
    with StopSignal(launched=True) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGINT
        stop._when -= 10.0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


FAILING = """
import os, signal, sys, time
from fastasync import distributed
from fastasync.training.interrupt import StopSignal
distributed._LAST_WORDS = 5
try:
    with StopSignal(launched=sys.argv[1] == "launched"):
        raise RuntimeError("another rank is gone")
finally:
    os.kill(os.getpid(), signal.SIGTERM)
    print("last words", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("kind", "seconds", "code", "heard"),
    [("launched", 0, 1, True), ("launched", 30, -signal.SIGALRM, True), ("alone", 0, -signal.SIGTERM, False)],
)
def test_a_failing_rank_says_why_though_its_launcher_ends_it(kind, seconds, code, heard):
    """Of several ranks torchrun ends the others as soon as one has ended; who takes too long is ended all the same."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING, kind, str(seconds)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("last words" in done.stdout) is heard


STUCK = """
import ctypes, os, signal, sys, threading, time
from fastasync.training import interrupt
interrupt.STUCK = 2.0
with interrupt.StopSignal(True, lambda: print("stuck", flush=True)) as stop:
    print("ready", flush=True)
    end = time.monotonic() + 6
    lock, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    if sys.argv[1] == "collective":  # a call that no signal ends, as gloo's and NCCL's are
        library.pthread_mutex_lock(lock)
    if sys.argv[1] == "saving":  # the same, for as long as another rank writes
        threading.Timer(5.0, library.pthread_mutex_unlock, [lock]).start()
        with stop.patient():
            library.pthread_mutex_lock(lock)
    while time.monotonic() < end:  # and a wait for another rank that polls
        time.sleep(0.05)
print("stopped" if stop.received else "heard nothing", flush=True)
"""


@pytest.mark.parametrize(
    ("where", "said", "code"), [("collective", "stuck", 75), ("polling", "stopped", 0), ("saving", "stopped", 0)]
)
def test_a_rank_that_hangs_in_a_call_after_a_signal_ends_with_a_line(where, said, code, started):
    with started([sys.executable, "-c", STUCK, where]) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == (f"{said}\n", code)
