"""Our reduction for ZeRO 1 and 2 over NCCL, and DeepSpeed's for 0 and 3, on two GPUs against one process.

What is compared depends on no measurement (operations of PyTorch, float32 products in float32), but for one run with
Triton's kernels whose other backends are chosen by their times.
"""

import json
from typing import NamedTuple

import pytest
import torch

from fastasync.optim import library
from tests.training.deepspeed_kit import assert_same, curve, launch, tensors, train_fields

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

DEVICE, STEPS = "cuda", 6
FIXED = dict(kernels="reference", attention="reference", mlp="plain")
RECORDED = dict(bf16=2, fp8=1)  # and the parts of their batches
ORDER = 1e-4  # relative, for float32 sums in another order; two gloo ranks are off by 3e-6


def job(name, out=None, model=FIXED, **changes):
    train = dict(device=DEVICE, steps=STEPS, accumulate=1, clip=0.0, cuda_graph="off") | changes
    return dict(name=name, out=out or name, config=train_fields(**train) | dict(model=model), bucket=1500)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Their folder, and each rank's results by the name of a job."""
    folder = tmp_path_factory.mktemp("nccl")
    plain = [job(f"plain-{precision}", precision=precision) for precision in ("fp32", "bf16")]
    plain.append(job("plain-parts", precision="fp32", accumulate=2, clip=1.0))
    plain.append(job("start", precision="fp32", steps=1, lr=0.0))
    jobs = [
        job(f"zero{zero}-{precision}", precision=precision, zero=zero)  # buckets of 1,500 of 14,000 numbers
        for precision in ("fp32", "bf16")
        for zero in (1, 2)
    ]
    for steps, zero in ((2, 1), (4, 2), (STEPS, 1)):  # through checkpoints
        parts = dict(accumulate=2, clip=1.0, zero=zero, steps=steps)
        jobs.append(job(f"parts-{steps}", "parts", precision="fp32", **parts))
    jobs.append(job("measured", model={}, precision="bf16", zero=2))
    # DeepSpeed's own reduction; 3 last, as it leaves its own F.linear in the process
    whole = dict(zero_optimization=dict(stage3_param_persistence_threshold=0))  # else it keeps so small weights whole
    (folder / "sharded.json").write_text(json.dumps(whole))
    jobs.append(job("zero0-fp32", precision="fp32", zero=0))
    jobs.append(job("zero3-fp32", precision="fp32", zero=3, deepspeed_config=str(folder / "sharded.json")))
    start(folder, plain, ranks=None)
    return folder, start(folder, jobs)


def start(folder, jobs, **options):
    """Each rank's results by the name of a job."""
    for each in jobs:
        each["out"] = folder / each["out"]
    by_rank = launch(folder, jobs, NVIDIA_TF32_OVERRIDE="0", DS_ACCELERATOR=DEVICE, **options)
    return {each["name"]: [rank[i] for rank in by_rank] for i, each in enumerate(jobs)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The same of steps that are replayed and steps that are not."""
    folder = tmp_path_factory.mktemp("recorded")
    jobs = []
    for precision, parts in RECORDED.items():
        for graph in ("off", "on"):
            fields = dict(precision=precision, zero=1, accumulate=parts, clip=parts - 1.0, cuda_graph=graph)
            jobs.append(job(f"{precision}-{graph}", model=FIXED | dict(kernels="auto"), **fields))
    return folder, start(folder, jobs)


class State(NamedTuple):
    """What training changed, each kind as one vector: weights and averages less what they began at, both moments."""

    weights: torch.Tensor
    averages: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


def state(folder, name):
    found, start = tensors(folder / name, STEPS), tensors(folder / "start", 1)["model"]
    moments = found["optimizer"]
    assert {float(value) for key, value in moments.items() if key.endswith("/step")} == {STEPS}

    def vector(values):
        return torch.cat([values[key].double().flatten() for key in sorted(values)])

    def ending(entry):
        return vector({key: value for key, value in moments.items() if key.endswith(f"/{entry}")})

    moved = [vector(found[file]) - vector(start) for file in ("model", "ema")]
    return State(*moved, ending("exp_avg"), ending("exp_avg_sq"))


@pytest.mark.parametrize(
    ("name", "plain"),
    [*((f"zero{stage}-fp32", "plain-fp32") for stage in range(4)), ("parts", "plain-parts")],
)
def test_two_ranks_are_one_process_in_float32(runs, name, plain):
    """``parts``: of a batch divided in two, clipped, through checkpoints from ZeRO 1 to 2 and back."""
    folder, results = runs
    assert [result["resumed_from"] for result in results["parts-6"]] == [4, 4]
    assert all("error" not in result for result in results.get(name, []))
    for kind, found, wanted in zip(State._fields, state(folder, name), state(folder, plain)):
        assert float((found - wanted).norm()) <= ORDER * float(wanted.norm()), kind
    torch.testing.assert_close(curve(folder / name), curve(folder / plain), rtol=ORDER, atol=0)


@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-bf16", "measured"])
def test_two_ranks_round_as_one_process_in_bf16(runs, name):
    """At most twice as far from float32 as the plain engine's bf16."""
    folder, results = runs
    working = ["torch.bfloat16", "torch.float32"] if library.load(DEVICE) else ["torch.float32"]
    assert [result["kinds"] for result in results[name]] == [working, working]
    for kind, found, theirs, exact in zip(
        State._fields, *(state(folder, each) for each in (name, "plain-bf16", "plain-fp32"))
    ):
        assert 0 < float((found - exact).norm()) <= 2 * float((theirs - exact).norm()), kind


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_1_and_2_are_the_same_numbers(runs, precision):
    """A sum of two is the same in any order."""
    folder, _ = runs
    one, two = (tensors(folder / f"zero{zero}-{precision}", STEPS) for zero in (1, 2))
    for file, values in one.items():
        assert all(torch.equal(two[file][key], value) for key, value in values.items()), file


@pytest.mark.skipif(not library.load(DEVICE), reason="the CUDA library is not built")
@pytest.mark.parametrize("precision", RECORDED)
def test_recorded_steps_of_two_ranks_are_the_same_numbers(recorded, precision):
    """A bias's sum but for its order: DeepSpeed's engine scales the output's gradient of a divided batch."""
    folder, results = recorded
    on, off = f"{precision}-on", f"{precision}-off"
    assert [result.get("error") for result in results[on]] == [None, None]
    assert [result["replays"] for result in results[on]] == [True, True]
    assert [result["replays"] for result in results[off]] == [False, False]
    allowed = dict(rtol=1e-5, atol=1e-7) if RECORDED[precision] > 1 else dict(rtol=0, atol=0)
    assert_same(folder / on, folder / off, **allowed)


def test_ranks_run_the_same_backends(runs):
    first, second = (result["backends"] for result in runs[1]["measured"])
    assert first == second
