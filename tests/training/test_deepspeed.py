"""Real DeepSpeed on two gloo ranks: the same numbers as one process, whatever the ZeRO stage, and nothing lost.

Starting two ranks takes seconds, so each launch serves many tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastasync.errors import UserError
from fastasync.model import train_flops
from fastasync.training import build_model, checkpoint
from tests.training.deepspeed_kit import (
    REPOSITORY,
    assert_same,
    curve,
    environment,
    launch,
    launcher,
    load_tiny_run,
    records,
    tensors,
    train_fields,
)

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

STAGES = {  # name: changed fields of train, and DeepSpeed's JSON
    "zero0": (dict(zero=0), None),
    "zero1": (dict(zero=1), None),
    "zero2": (dict(zero=2), None),
    "zero2-buckets": (dict(zero=2), None),
    "zero3": (dict(zero=3), None),
    # without its threshold, parameters as small as these would not be sharded at all
    "zero3-sharded": (dict(zero=3), {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "zero3-recomputed": (dict(zero=3, memory="full"), {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "zero2-torch-adamw": (dict(zero=2, optimizer="torch"), None),
    "zero2-compiled": (dict(zero=2, compile="regional"), None),
    # DeepSpeed's own reduction, in buckets too small for some gradients
    "zero1-undivided": (dict(zero=1, accumulate=1), {"zero_optimization": {"reduce_bucket_size": 2000}}),
    "zero2-deepspeeds": (dict(zero=2), {"zero_optimization": {"overlap_comm": True}}),
    "zero2-undivided": (dict(zero=2, accumulate=1), None),
    # without a clip, for the order in which a norm is summed would show
    "zero1-bf16-undivided": (dict(zero=1, precision="bf16", accumulate=1, clip=0.0), None),
    "zero2-bf16-undivided": (dict(zero=2, precision="bf16", accumulate=1, clip=0.0), None),
    "zero1-bf16-deepspeeds": (
        dict(zero=1, precision="bf16", accumulate=1, clip=0.0),
        {"zero_optimization": {"overlap_comm": False}},
    ),
}
RECORDED = {  # name: of which stage, the event on rank 1, and how often each rank records
    "zero1-recorded": ("zero1", "recorded", [1, 1]),
    "zero1-bf16-recorded": ("zero1-bf16-undivided", "recorded", [1, 1]),
    "zero1-full": ("zero1", "full memory", [1, 1]),
    "zero1-auto": ("zero1", "recorded", [1, 1]),
    "zero1-auto-little": ("zero1", "little memory", [1, 0]),
    "zero1-auto-busy": ("zero1", "busy device", [1, 0]),
    "zero1-auto-unable": ("zero1", "no library", [0, 0]),
    "zero2-auto": ("zero2", "recorded", [0, 0]),
}
RESUMED = ("zero1", "zero2", "zero3-sharded", "zero2-bf16-undivided")  # those of them that are stopped on the way too


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything that the first launch leaves behind: one folder for each job, and the results."""
    tiny_run = load_tiny_run()
    folder = tmp_path_factory.mktemp("deepspeed")

    def plain(name, **changes):
        data = tiny_run.gaussian_latents(mirror=True)
        config = tiny_run.tiny(**train_fields(**changes))
        return tiny_run.run(config, folder / name, data, say=lambda line: None)

    with pytest.MonkeyPatch.context() as patch:  # gone again afterwards, also where nothing had imported it
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)  # seconds to import
        plain("plain")
        plain("plain-bf16-undivided", precision="bf16", accumulate=1)
        plain("whole", steps=12)
        plain("parts", steps=3)
        plain("skips", steps=24, log_every=4, max_norm_ratio=1.2, clip=0.0, lr=1e-3)
        jobs = []
        for name, (changes, settings) in STAGES.items():
            if settings is not None:
                changes = {**changes, "deepspeed_config": str(folder / f"{name}.json")}
                (folder / f"{name}.json").write_text(json.dumps(settings))
            jobs.append(dict(name=name, out=folder / name, config=train_fields(**changes)))
            if name in ("zero2-buckets", "zero2-bf16-undivided"):
                jobs[-1]["bucket"] = 1500  # of 14,000 numbers, in several buckets
            if name in RESUMED:  # next: ZeRO 3 leaves its own F.linear in the process, which rounds in another way
                again = {**jobs[-1], "out": folder / f"{name}-resumed"}
                jobs += [{**again, "name": f"{name} stopped", "event": "stop"}, {**again, "name": f"{name} resumed"}]
        # one process, then ZeRO 2 on two ranks, ZeRO 1, ZeRO 3, (below) one process again
        for steps, zero in ((5, 2), (7, 1), (9, 3), (10, 0)):
            fields = train_fields(steps=steps, zero=zero)
            jobs.append(dict(name=f"parts {steps}", out=folder / "parts", config=fields))
        for name, (of, event, _) in RECORDED.items():
            # DeepSpeed's timers, which are not for who goes around it, must not be left running
            (folder / f"{name}.json").write_text(json.dumps({"wall_clock_breakdown": True}))
            graph = dict(cuda_graph="on", deepspeed_config=str(folder / f"{name}.json"))
            if "auto" in name:
                graph = dict(cuda_graph="auto")
            config = train_fields(**STAGES[of][0], **graph)
            jobs.append(dict(name=name, out=folder / name, config=config, event=event))
        left = train_fields(zero=1, deepspeed_config=str(folder / "zero1-recorded.json"))
        jobs.append(dict(name="left", out=folder / "left", config=left, event="recorded"))
        skips = train_fields(steps=24, log_every=4, max_norm_ratio=1.2, clip=0.0, lr=1e-3, zero=1)
        jobs.append(dict(name="skips zero1", out=folder / "skips1", config=skips))
        skips = train_fields(steps=24, log_every=4, max_norm_ratio=1.2, clip=0.0, lr=1e-3, zero=0)
        jobs.append(dict(name="skips zero0", out=folder / "skips0", config=skips))
        jobs.append(dict(name="nan", out=folder / "nan", config=train_fields(zero=2), event="nan"))
        jobs.append(dict(name="nan0", out=folder / "nan0", config=train_fields(zero=0), event="nan"))
        jobs.append(dict(name="full disk", out=folder / "full", config=train_fields(zero=2), event="full disk"))
        # eager and with small buckets, which each rank would cut for itself
        chosen = train_fields(zero=2, precision="bf16", accumulate=1) | dict(model=dict(mlp_multiple=8))
        for event in ("differently", "impossibly"):
            jobs.append(dict(name=event, out=folder / event, config=chosen, event=event, bucket=1500))
        jobs.append(dict(name="indivisible", out=folder / "no", config=train_fields(batch=10)))
        by_rank = launch(folder, jobs)
        plain("parts", steps=12)
    results = {job["name"]: [rank[i] for rank in by_rank] for i, job in enumerate(jobs)}
    return folder, results


@pytest.mark.parametrize("name", [name for name in STAGES if "bf16" not in name])
def test_every_stage_equals_one_process(runs, name):
    """The EMA above all: it is optimizer state that ZeRO shards."""
    folder, results = runs
    assert all("error" not in result for result in results[name]), results[name]
    assert_same(folder / name, folder / "plain")


@pytest.mark.parametrize("name", RECORDED)
def test_steps_around_deepspeeds_engine_are_the_same_numbers(runs, name):
    """Where one rank does not record, the rest of the run is DeepSpeed's again on both.  Of divided batches DeepSpeed's
    engine scales the output's gradient as it passes, whose layout, and the order of a bias's sum, are others then.
    """
    folder, results = runs
    assert [result["recorded"] for result in results[name]] == RECORDED[name][2]
    replay = RECORDED[name][1:] == ("recorded", [1, 1])
    assert [result["replays"] for result in results[name]] == [replay, replay]
    allowed = dict(rtol=0, atol=0) if "bf16" in name else dict(rtol=1e-6, atol=1e-8)
    assert_same(folder / name, folder / RECORDED[name][0], **allowed)
    assert torch.equal(curve(folder / name), curve(folder / RECORDED[name][0]))


@pytest.mark.parametrize("name", [*RECORDED, *(name for name in STAGES if "zero3" not in name)])
def test_no_node_of_autograd_outlives_a_step(runs, name):
    """It would stay bound to the stream that it was made on, which a recording must not touch."""
    _, results = runs
    assert [result["nodes"] for result in results[name]] == [0, 0]


def test_what_decides_whether_steps_are_recorded(runs):
    """The FLOPs of a rank's part of the batch, for ZeRO 1 alone."""
    _, results = runs
    (((choice, flops, precision),),) = {tuple(map(tuple, result["wanted"])) for result in results["zero1-auto"]}
    config = load_tiny_run().tiny(**train_fields(**STAGES["zero1"][0]))
    assert (choice, precision) == ("auto", config.train.precision)
    assert flops == train_flops(build_model(config)) * config.train.batch // (2 * config.train.accumulate)
    assert [result["wanted"] for result in results["zero2-auto"]] == [[], []]


def test_auto_leaves_steps_to_deepspeed_where_its_settings_are_given(runs):
    """They may ask for what only its engine does: timers, monitors."""
    folder, results = runs
    assert [result["recorded"] for result in results["left"]] == [0, 0]
    assert_same(folder / "left", folder / "zero1", rtol=1e-6, atol=1e-8)


def test_who_reduces_is_said_where_a_json_decides_it(runs):
    _, results = runs
    line = "DeepSpeed reduces gradients, not we, as train.deepspeed_config sets zero_optimization.overlap_comm"
    assert [result["warnings"] for result in results["zero2-deepspeeds"]] == [[line], []]
    for name in ("zero2", "zero3-sharded"):
        assert [result["warnings"] for result in results[name]] == [[], []]


def test_bf16_is_the_plain_engines_bf16(runs):
    folder, _ = runs
    losses = [curve(folder / name)[:, 0] for name in ("zero1-bf16-undivided", "plain-bf16-undivided")]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
    weights = tensors(folder / "zero1-bf16-undivided", 6)["ema"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["zero1-bf16-undivided", "zero2-bf16-undivided"])
def test_working_weights_and_our_reduction_change_nothing(runs, name):
    """DeepSpeed's own reduction of float32 weights' gradients, which autocast casts, is the reference."""
    folder, results = runs
    assert [result["kinds"] for result in results[name]] == 2 * [["torch.bfloat16", "torch.float32"]]
    assert [result["kinds"] for result in results["zero1-bf16-deepspeeds"]] == 2 * [["torch.float32"]]
    found, wanted = tensors(folder / name, 6), tensors(folder / "zero1-bf16-deepspeeds", 6)
    for file in wanted:
        assert found[file].keys() == wanted[file].keys()
        for key, value in wanted[file].items():
            # an update's last digit depends on where in a vector a number stands, and may turn a bf16 rounding; had
            # training begun at rounded weights, they would be off by 1e-4, ten times what is allowed
            allowed = 1e-5 if file != "optimizer" else 5e-3 * float(value.abs().max())
            torch.testing.assert_close(found[file][key], value, rtol=0, atol=allowed, msg=f"{file} {key}")
    torch.testing.assert_close(curve(folder / name), curve(folder / "zero1-bf16-deepspeeds"), rtol=1e-5, atol=1e-5)


def test_zero_1_and_2_are_the_same_numbers(runs):
    folder, _ = runs
    one, two = (tensors(folder / f"zero{stage}-bf16-undivided", 6) for stage in (1, 2))
    for file, expected in one.items():
        assert all(torch.equal(two[file][key], value) for key, value in expected.items())


def test_shards_begin_at_whole_packs(runs):
    """16 bytes, of the bf16 weights too."""
    for result in runs[1]["zero1-bf16-undivided"]:
        assert [size % 16 for size in result["shards"]] == [0, 0]


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_goes_on_bit_for_bit(runs, name):
    folder, results = runs
    for stopped, resumed in zip(results[f"{name} stopped"], results[f"{name} resumed"]):
        assert (stopped["code"], resumed["resumed_from"]) == (75, 3)
    found, wanted = tensors(folder / f"{name}-resumed", 6), tensors(folder / name, 6)
    for file, values in wanted.items():
        assert found[file].keys() == values.keys()
        assert all(torch.equal(found[file][key], value) for key, value in values.items()), file
    assert torch.equal(curve(folder / f"{name}-resumed"), curve(folder / name))


def test_resumed_on_other_ranks_stages_and_engines(runs):
    """1 -> 2 -> 1 processes through ZeRO 2, 1, 3 and 0: data, schedule and optimizer continue where they were."""
    folder, results = runs
    assert [results[f"parts {steps}"][0]["resumed_from"] for steps in (5, 7, 9, 10)] == [3, 5, 7, 9]
    assert [record["step"] for record in records(folder / "parts")] == list(range(1, 13))
    assert_same(folder / "parts", folder / "whole", step=12, rtol=2e-4, atol=1e-5)
    state = [checkpoint.read_state(folder / name / "checkpoints" / "step_00000012") for name in ("parts", "whole")]
    assert (state[0].position, state[0].schedule) == (state[1].position, state[1].schedule)


@pytest.mark.parametrize("name", ["skips0", "skips1"])
def test_large_norms_are_skipped_as_in_one_process(runs, name):
    folder, _ = runs
    assert records(folder / "skips")[-1]["skipped"] > 0
    assert [r["skipped"] for r in records(folder / name)] == [r["skipped"] for r in records(folder / "skips")]
    assert_same(folder / name, folder / "skips", step=24, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nan", "nan0"])
def test_a_gradient_that_is_not_finite_stops_every_rank(runs, name):
    """The last good checkpoint stays: nothing of the poisoned steps is in it."""
    folder, results = runs
    main, other = results[name]
    assert main["code"] == other["code"] == 3
    assert "a gradient that is not finite" in main["error"]
    assert "the last good checkpoint is none yet" in main["error"]
    assert not list((folder / name / "checkpoints").glob("*"))


def test_a_full_disk_on_one_rank_ends_all(runs):
    """Rank 0 fails in the middle of a file, between collectives: nobody waits for it, nothing half-written stays."""
    folder, results = runs
    main, other = results["full disk"]
    assert "no space left on the device" in main["error"]
    assert other == {"other": 2}
    assert not list((folder / "full" / "checkpoints").iterdir())


def test_an_indivisible_batch_names_the_nearest(runs):
    _, results = runs
    for result in results["indivisible"]:
        assert result["error"].endswith("must divide into 2 ranks x train.accumulate = 2; nearest: 8")


def test_ranks_that_measured_differently_take_rank_0s_backends(runs):
    """Or PyTorch's, where one cannot run those."""
    _, results = runs
    for event, backends in (("differently", ["reference", "quack"]), ("impossibly", ["sdpa", "plain"])):
        assert [result["backends"] for result in results[event]] == 2 * [[*backends, 1, 1, 1, 1]]


def test_what_does_not_go_together(tiny):
    from fastasync.training.deepspeed_engine import check_deepspeed

    for fields, message in (
        (dict(zero=3, compile="regional"), "train.compile: regional: does not go with train.zero=3"),
        (dict(zero=2, cuda_graph="on"), "train.cuda_graph: on: records steps of several ranks under ZeRO 1 only"),
        (dict(optimizer="apex"), "train.optimizer: apex: keeps no step count"),
    ):
        with pytest.raises(UserError, match=message):
            check_deepspeed(tiny(train=fields), 2)


def test_an_older_deepspeed_is_refused_before_any_work(tiny, monkeypatch):
    from fastasync.training import deepspeed_engine

    monkeypatch.setattr(deepspeed_engine.importlib.metadata, "version", lambda package: "0.19.6")
    with pytest.raises(UserError, match=r"package deepspeed: 0.19.6.* needs 0.19.7 or newer: pip install"):
        deepspeed_engine.check_deepspeed(tiny(train=dict(zero=1)), 1)


def test_one_process_without_a_launcher(runs, tmp_path):
    """``python train.py --set train.engine=deepspeed``."""
    folder, _ = runs
    changes = {"alone": dict(zero=2), "alone1": dict(zero=1), "alone-undivided": dict(zero=1, accumulate=1)}
    rounded = {f"alone-bf16-{zero}": dict(zero=zero, precision="bf16", accumulate=1) for zero in (1, 2)}
    jobs = [
        dict(out=folder / name, config=train_fields(engine="deepspeed", **each))
        for name, each in (changes | rounded).items()
    ]
    (results,) = launch(tmp_path, jobs, ranks=None)
    assert not any("error" in result for result in results)
    assert [result["waits"] for result in results] == 5 * [0]
    for name in changes:
        assert_same(folder / name, folder / "plain")
    for name in rounded:
        assert_same(folder / name, folder / "plain-bf16-undivided", rtol=1e-6, atol=1e-7)


# --- whole programs: the launchers, signals and kill -9 ---------------------------------------------------------

SETTINGS = {
    "representations.encoder_steps": 10,
    "representations.semvae_steps": 10,
    "schedule.name": "offset:0.3",
    "model.depth": 1,
    "model.width": 32,
    "train.batch": 16,
    "train.steps": 100_000,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
}


# train.py, but closing files takes longer than torchrun leaves between two looks at its ranks
SLOW = """import sys, time
from fastasync.cli import main
from fastasync.training.metrics import MetricsLog
close = MetricsLog.close
MetricsLog.close = lambda self: (time.sleep(2), close(self))
sys.exit(main(["train", *sys.argv[1:]]))
"""


def program(out, script=REPOSITORY / "train.py", **changes):
    chosen = [f"--set={key}={value}" for key, value in {**SETTINGS, **changes}.items()]
    return [str(script), "--preset=digits", f"--out={out}", *chosen]


def wait_for_steps(out, count, process, seconds=120):
    end = time.monotonic() + seconds
    start = last_step(out)
    while last_step(out) < start + count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no steps"
        time.sleep(0.05)


def last_step(out):
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def ranks_of(tag, rank):
    """Process ids of rank ``rank`` of the train.py that was started with ``tag``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        mine = f"FASTASYNC_TEST={tag}".encode() in variables and f"RANK={rank}".encode() in variables
        if mine and b"train.py" in command:
            found.append(int(folder.name))
    return found


def test_launchers_signals_and_kill_9(tmp_path, started):
    """deepspeed train.py stopped by SIGTERM; torchrun train.py whose rank 1 is killed; python train.py to the end."""
    out, root = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with started([*launcher("deepspeed"), *program(out)], FASTASYNC_TEST="a") as process:
        wait_for_steps(out, 5, process)
        # to its process group, as schedulers and terminals do: deepspeed's own runner passes nothing on
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert said.count("stopped by a signal at step") == 1, said
    stopped = checkpoint.newest(root)
    assert not stopped.skipped
    assert f"saved {stopped.path}" in said
    assert not list(root.glob("*.part"))

    slow = tmp_path / "slow_train.py"
    slow.write_text(SLOW)
    with started([*launcher("torchrun"), *program(out, slow, **{"train.zero": 2})], FASTASYNC_TEST="b") as process:
        wait_for_steps(out, 5, process)
        (victim,) = ranks_of("b", 1)
        os.kill(victim, signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("resumed from") == 1
    assert f"resumed from {stopped.path}" in said
    line = "rank 0: another process of this run ended or does not answer: the last good checkpoint is "
    assert said.count(line) == 1, said
    kept = checkpoint.newest(root)
    assert not kept.skipped
    assert f"{line}{kept.path}; start again to continue" in said

    last = int(kept.path.name[5:]) + 4
    done = subprocess.run(
        [sys.executable, *program(out, **{"train.steps": last, "train.stall_minutes": 0})],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed from {kept.path}" in done.stderr
    assert f"train: {last} steps done" in done.stdout
    assert [record["step"] for record in records(out)] == list(range(1, last + 1))


def test_one_line_for_what_cannot_start(tmp_path, started):
    """Both ranks meet the same error; it is printed once, and nothing is made."""
    command = program(tmp_path / "run", **{"train.batch": 15, "train.device": "cpu"})
    with started([*launcher("torchrun"), *command], FASTASYNC_TEST="c") as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("fastasync: error")]
    wanted = "fastasync: error: train.batch: 15: must divide into 2 ranks x train.accumulate = 1; nearest: 16"
    assert lines == [wanted], said
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_one_line(tmp_path):
    """As deepspeed's launcher starts rank 0: the port is only taken then."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, *program(tmp_path / "run")],
            env={**environment(), **{name: str(value) for name, value in variables.items()}},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastasync")]
    assert len(lines) == 1
    assert f"127.0.0.1:{port}: the port is in use" in lines[0]
