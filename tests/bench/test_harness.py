"""The benchmarks' own arithmetic: statistics, errors, files, categories; and every subject at sizes of a CPU."""

import functools
import importlib
import os
import re
import subprocess
import sys
import time

import fastasync_kernels
import pytest
import torch
from fastasync_kernels import attention, reference

from bench import gpu_session, harness, plots, profile_step, run, workload
from bench.harness import (
    ROOT,
    Bench,
    Operation,
    Row,
    WrongResult,
    check,
    paired_overhead,
    read_rows,
    summarize,
    with_backward,
)
from bench.subjects import SUBJECTS, block, common, fp8_casts, optimizer, step
from bench.workload import configuration
from fastasync.config import differences

CPU = torch.device("cpu")


@pytest.fixture
def bench():
    lines = []
    made = Bench(CPU, rounds=1, say=lines.append)
    made.lines = lines
    made.copy_rate, made.matmul_rate = 1e9, 1e12
    return made


def test_summary_is_order_statistics():
    found = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == (3.0, 1.4, 4.6, 5)
    assert summarize([2.0]) == (2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="no times"):
        summarize([])


def test_overhead_interval_covers_the_truth():
    """95 % of intervals from noisy pairs contain the true overhead; pairing removes what both share."""
    generator = torch.Generator().manual_seed(0)
    covered, width = 0, []
    for _ in range(400):
        drift = 5 * torch.randn(12, generator=generator, dtype=torch.float64)
        first = 100 + drift + 0.5 * torch.randn(12, generator=generator, dtype=torch.float64)
        second = 101 + drift + 0.5 * torch.randn(12, generator=generator, dtype=torch.float64)
        mean, low, high = paired_overhead(first.tolist(), second.tolist(), 1)
        covered += low <= 0.01 <= high
        width.append(high - low)
        assert low <= mean <= high
    assert 0.91 < covered / 400 < 0.985
    assert sum(width) / 400 < 0.012
    with pytest.raises(ValueError, match="two rounds"):
        paired_overhead([1.0], [1.0], 1)


def test_overhead_interval_of_steps_that_follow_each_other():
    """Ten steps a turn, as `bench.interleaved` takes them, that drift: pairs of steps promise too much, rounds do not.

    Each step's deviation is 0.7 times the last one's and something new.  Turns that follow each other at once still
    share a little, so that the intervals of rounds, too, miss the truth slightly more often than one in twenty.
    """
    generator = torch.Generator().manual_seed(0)
    rounds, warm, inner, repeats = 8, 1, 10, 400
    covered = {1: 0, inner: 0}
    for _ in range(repeats):
        new = torch.randn(2 * rounds * (warm + inner), generator=generator, dtype=torch.float64)
        drift = [float(new[0])]
        for value in new[1:].tolist():
            drift.append(0.7 * drift[-1] + (1 - 0.7**2) ** 0.5 * value)
        turns = torch.tensor(drift, dtype=torch.float64).reshape(rounds, 2, warm + inner)[:, :, warm:]
        turns[1::2] = turns[1::2].flip(1)  # every other round begins with the second
        first, second = ((level + turns[:, which]).flatten().tolist() for which, level in ((0, 100), (1, 101)))
        for each in covered:
            _, low, high = paired_overhead(first, second, each)
            covered[each] += low <= 0.01 <= high
    assert covered[1] / repeats < 0.75
    assert covered[inner] / repeats > 0.9
    with pytest.raises(ValueError, match="two rounds or more of 5"):
        paired_overhead([1.0] * 12, [1.0] * 12, 5)


def test_rows_survive_the_file(tmp_path, bench):
    bench.add("a", "b, c", "v", "[1]", "f", summarize([1.0, 2.0]), nbytes=1e6, note='says "x", 95 % of it')
    bench.add("a", "b", "w", "[1]", "f", summarize([4.0]), flops=2e9, images=8)
    path = tmp_path / "folder" / "gpu.csv"
    harness.write_rows(path, bench.rows[:1])
    harness.write_rows(path, bench.rows[1:])
    back = harness.read_rows(path)
    assert [(r.case, r.variant, r.ms, r.count, r.note) for r in back] == [
        (r.case, r.variant, r.ms, r.count, r.note) for r in bench.rows
    ]
    assert back[0].gb_per_s == pytest.approx(1e6 / 1.5e-3 / 1e9, rel=1e-5)
    assert back[0].share == pytest.approx(1e6 / 1e9 / 1.5e-3, rel=1e-5)  # floor's time over the measured time
    assert (back[1].gb_per_s, back[1].images_per_s) == (None, pytest.approx(2000))
    assert back[1].tflop_per_s == pytest.approx(0.5)
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        harness.write_rows(path, bench.rows)


def test_check_refuses_what_is_worse_than_the_reference():
    x = [torch.linspace(0.1, 3, 1000)]
    reference = {"reference": lambda x: x.exp()}
    assert check(reference | {"same": lambda x: torch.exp(x)}, x)["same"] < 1e-6
    for wrong in (
        lambda x: x.exp() * (1 + 1e-6),
        lambda x: x.exp() * float("nan"),
        lambda x: (x.exp(), x),
        lambda x: x.half().exp().float(),
    ):
        with pytest.raises(WrongResult):
            check(reference | {"wrong": wrong}, x)


def test_with_backward_gives_outputs_and_gradients():
    a, b = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    out, grad = with_backward(lambda a, b: a * b)(a, b, [torch.tensor([1.0, 2.0, 3.0])])
    assert (out.tolist(), grad.tolist()) == ([2.0] * 3, [2.0, 4.0, 6.0])


def test_interleaving_times_every_variant_in_turn(bench):
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.002) for name in "ab"}
    times = bench.interleaved(calls, rounds=2, warm=1, inner=2, before=lambda: order.append("|"))
    assert "".join(order) == "|aaa|bbb|bbb|aaa"
    assert [len(values) for values in times.values()] == [4, 4]
    assert all(2 <= ms < 100 for values in times.values() for ms in values)


@pytest.mark.parametrize("broken", [lambda x: x.exp() * 1.01, lambda x: x.no_such_method()])
def test_a_compiled_baseline_that_fails_or_is_wrong_is_left_out_and_said(bench, broken):
    """Of ours, compiled or not, a wrong result ends the subject."""
    x = [torch.linspace(0.1, 3, 1000)]
    calls = {"reference": torch.exp, "reference compiled": broken, "triton": torch.exp}
    bench.operation(Operation("s", "c", "[]", "f", calls, lambda seed, batch: x, 1))
    assert [row.variant for row in bench.rows] == ["reference", "triton"]
    assert bench.skipped[0].startswith("s c [] f, reference compiled: ")
    with pytest.raises(WrongResult):
        bench.operation(
            Operation("s", "c", "[]", "f", calls | {"triton compiled": lambda x: 1.01 * x.exp()}, lambda *_: x, 1)
        )


def test_out_of_time_is_said(bench):
    bench.deadline = time.monotonic() - 1
    bench.operation(Operation("s", "c", "[]", "f", {}, lambda seed, batch: [], 1))
    assert bench.rows == []
    assert bench.skipped == ["s c [] f: out of time"]


def test_deepspeed_beside_the_plain_engine(tmp_path):
    """In a process of its own: DeepSpeed's process group would outlive the test, for whoever forks after it."""
    pytest.importorskip("deepspeed")
    command = ["-m", "bench.run", "engine", "--device", "cpu", "--rounds", "2", "--record", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "DS_BUILD_OPS": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "cpu.csv")
    assert [row.variant for row in rows if row.subject == "engine"] == ["ours eager", "ours zero1"]
    assert "overhead" in rows[-1].note


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name != "engine"])
def test_subject_runs_on_a_cpu(bench, subject):
    importlib.import_module(f"bench.subjects.{subject}").run(bench)
    assert bench.rows
    assert {row.subject for row in bench.rows} == {subject}
    assert all(row.ms > 0 and row.ms_low <= row.ms <= row.ms_high for row in bench.rows)
    if subject in ("noising", "attention", "optimizer", "step"):
        assert any("CUDA" in line or "GPU" in line or "apex" in line for line in bench.skipped)
    if subject == "encode":
        whole = [row for row in bench.rows if row.case == "whole"]
        assert {row.dtype for row in whole} == {"float32", "bfloat16"} or any(
            "diffusers" in line for line in bench.skipped
        )
        assert all("for images" in row.note and "for the disk" in row.note for row in whole)
    if subject == "data":
        found = {row.variant for row in bench.rows} | {"dali cpu" for line in bench.skipped if "not installed" in line}
        assert found == {
            "in memory",
            "opens each sample",
            "shards, direct",
            "shards, ahead",
            "pillow",
            "dali cpu",
            "from shards",
        }


@pytest.mark.parametrize(
    "subject", ["noising", "loss", "adaln", "qknorm_rope", "swiglu", "mlp", "sampling", "fp8_casts"]
)
def test_kernels_pass_the_benchmarks_check(bench, subject, monkeypatch, fp8_rounding):
    """The Triton variants, in the interpreter: what a GPU will time is compared with the reference in the same way."""
    module = importlib.import_module(f"bench.subjects.{subject}")
    triton = fastasync_kernels.select("triton", "cpu")
    monkeypatch.setattr(common, "kernels", lambda *_: triton)
    if hasattr(module, "kernels"):
        monkeypatch.setattr(module, "kernels", lambda *_: triton)
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    checked = []
    monkeypatch.setattr(bench, "operation", lambda op: checked.append(check(op.variants, op.make(0, min(op.batch, 2)))))
    module.run(bench)
    assert checked
    assert all("triton" in errors for errors in checked)


@pytest.mark.parametrize("wrong", [None, "q_norm.weight", "proj.bias"])
def test_a_blocks_variants_are_compared(bench, wrong, monkeypatch):
    """The kernels' block in the interpreter, and the same with one weight or bias changed by a hundredth."""

    def trained(*arguments):
        network = made(*arguments)
        if wrong and arguments[2] == "ours eager":
            with torch.no_grad():
                network.blocks[0].attn.get_parameter(wrong).mul_(1.01)
        return network

    made = block.trained
    monkeypatch.setattr(block, "trained", trained)
    monkeypatch.setattr(block, "kernels", lambda *_: True)
    ours = workload.VARIANTS["ours eager"]
    monkeypatch.setitem(workload.VARIANTS, "ours eager", {**ours, "model": {**ours["model"], "kernels": "triton"}})
    if wrong:
        with pytest.raises(WrongResult, match="triton: result"):
            block.run(bench)
    else:
        block.run(bench)
        assert [row.variant for row in bench.rows] == ["pytorch", "triton"] * 2


@pytest.mark.parametrize("changed", [{"lr": 1.001e-2}, {"weight_decay": 0.11}, {"ema_decay": 0.901}, {"eps": 2e-8}])
def test_a_wrong_optimizer_is_not_timed(bench, changed, monkeypatch):
    build = optimizer.build_optimizer

    def wrong(params, impl, **options):
        return build(params, impl, **(options | changed if impl == "fused" else options))

    monkeypatch.setattr(optimizer, "build_optimizer", wrong)
    with pytest.raises(WrongResult, match="fused: result"):
        optimizer.run(bench)
    assert not bench.rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_are_compared_with_torchs_in_float64(dtype):
    random = common.Random(CPU, 0, dtype)
    given = [[random(*shape, scale=scale) for shape in ((64, 33), (7,))] for scale in (0.02, 1e-3)]
    calls = {impl: functools.partial(optimizer.updated, impl) for impl in ("torch", "fused")}
    kept = [tensor.clone() for tensor in harness.tensors_of(given)]
    assert max(check(calls, given).values()) < 1e-5
    assert all(torch.equal(*pair) for pair in zip(kept, harness.tensors_of(given)))


def test_wrong_compiled_casts_end_nothing(bench, monkeypatch, fp8_rounding):
    """With the forms that only a GPU compiles: every case has its row, and each compiled one is left out and said."""

    def wrong(result):
        if isinstance(result, tuple | list):
            return type(result)(wrong(part) for part in result)
        return 1.01 * result if isinstance(result, torch.Tensor) and result.dtype == torch.float32 else result

    monkeypatch.setattr(bench, "small", False)
    monkeypatch.setattr(fp8_casts, "check_fp8", lambda device: None)
    monkeypatch.setattr(fp8_casts, "sizes", lambda bench: common.TINY)
    monkeypatch.setattr(fp8_casts, "dtypes", lambda bench: [torch.bfloat16])
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: wrong(function(*inputs)))
    fp8_casts.run(bench)
    cases = fp8_casts.cases(*(common.TINY[name] for name in ("width", "hidden", "tokens", "heads")))
    assert [(row.case, row.variant) for row in bench.rows] == [(case.name, "reference") for case in cases]
    left_out = [line for line in bench.skipped if ", reference compiled: WrongResult: " in line]
    assert len(left_out) == len(cases)


def test_the_casts_sums_are_judged_by_float64s():
    """In float32 they would be their own truth, and another order of the same sum, though closer to it, wrong."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def closer(x):
        *casts, total = fp8_casts.plain_both(x, True)
        return *casts, x.double().sum(0).to(total.dtype)

    calls = {"reference": lambda x: fp8_casts.plain_both(x, True), "reference compiled": closer}
    assert check(calls, [x])["reference"] > 0
    total = fp8_casts.plain_both(x.double(), True)[-1]
    assert torch.equal(total, x.double().sum(0))
    assert fp8_casts.plain_both(x, True)[-1].dtype == torch.float32
    calls["reference compiled"] = lambda x: (*fp8_casts.plain_both(x, True)[:-1], 1.00001 * closer(x)[-1])
    with pytest.raises(WrongResult, match="reference compiled: result 4"):
        check(calls, [x])


def test_one_wrong_number_in_fp8_is_seen(fp8_rounding):
    case = next(case for case in fp8_casts.cases(64, 128, 8, 4) if case.name == "columns")
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    fp8_casts.check_bits(case, case.inputs(x))

    def wrong(*inputs):
        values, scale = case.plain(*inputs)
        values.view(torch.uint8)[3, 5] ^= 1
        return values, scale

    with pytest.raises(WrongResult, match="columns, 64 columns: 1 numbers of result 0"):
        fp8_casts.check_bits(case._replace(ours=wrong), case.inputs(x))


@pytest.mark.parametrize("name", ["adaln gated, tops", "qknorm fwd+bwd, hinted"])
def test_a_rows_magnitude_that_is_not_the_written_tensors_is_seen(fp8_rounding, name):
    pytest.importorskip("triton")
    case = next(case for case in fp8_casts.cases(64, 128, 4, 4) if case.name == name)
    inputs = case.inputs(torch.randn(16, case.columns, generator=torch.Generator().manual_seed(0)))
    fp8_casts.check_bits(case, inputs)

    def wrong(*inputs):
        *results, rows = case.ours(*inputs)
        rows["rows"][5] *= 1.001
        return *results, rows

    with pytest.raises(WrongResult, match=re.escape(f"{name}, {case.columns} columns: 1 numbers of")):
        fp8_casts.check_bits(case._replace(ours=wrong), inputs)


def test_plans_of_a_step_by_size_and_variants():
    def asked(**options):
        return step.asked(Bench(CPU, **options))

    assert asked() == list(step.PLANS)
    assert {size for size, _, _ in asked(sizes=["S", "B"])} == {"S", "B"}
    both = ("ours regional", "ours regional plain MLP")
    assert asked(variants=both, sizes=["XL"]) == [("XL", 256, both)]
    # any variants, at every size: not only those of a plan
    assert asked(variants=both[:1]) == [(size, 256, both[:1]) for size in ("XL", "cifar10", "B", "S", "L")]
    configs = [configuration("XL", 256, name) for name in both]
    assert differences(*configs) == []  # what was trained is the same
    assert [config.model.mlp for config in configs] == ["auto", "plain"]


def test_a_variant_is_recorded_if_its_name_says_so():
    """What is named "auto" decides as train.cuda_graph=auto; PyTorch's optimizer cannot be recorded."""
    for name in workload.VARIANTS:
        train = configuration("S", 256, name).train
        said = train.cuda_graph if train.optimizer == "auto" else "off"
        assert said == ("on" if "graph" in name else "auto" if "auto" in name else "off"), name


def test_a_step_of_another_batch(bench, monkeypatch):
    monkeypatch.setattr(step, "build", lambda bench, subject, size, batch, names: asked.append(batch) or {})
    asked = []
    for bench.batch in (0, 12):
        step.run(bench)
    assert asked == [8, 12]


class NoGradient(torch.autograd.Function):
    """x, whose gradient is zero."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def no_rope(qkv, q_weight, k_weight, cos, sin, heads, **options):
    return reference.qknorm_rope(qkv, q_weight, k_weight, torch.ones_like(cos), torch.zeros_like(sin), heads, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"qknorm_rope": no_rope},
        {"swiglu": lambda packed, bias=None: 2 * reference.swiglu(packed, bias=bias)},
        {"swiglu": lambda packed, bias=None: NoGradient.apply(reference.swiglu(packed, bias=bias))},
    ],
)
def test_a_plans_variants_are_compared_before_they_are_timed(bench, wrong, monkeypatch):
    """Each start is at the same weights, though variants share them: the learning rate of the warm-up is zero.

    The network has two blocks only, so that what is found here is coarser than in 28 (bench/subjects/step.py).
    """
    make_work = step.make_work

    def made(config, *arguments):
        work = make_work(config, *arguments)
        if config.train.optimizer == "auto":
            work.engine.model._ops = work.engine.model._ops._replace(**wrong)
        return work

    monkeypatch.setattr(step, "make_work", made)
    names = ("pytorch eager", "ours eager")
    if wrong:
        with pytest.raises(WrongResult, match=r"ours eager: gradient .* from pytorch eager's, at most 3%"):
            step.build(bench, "step", "tiny", 8, names)
    else:
        works = step.build(bench, "step", "tiny", 8, names)
        starts = [step.warm_up(work) for work in works.values()]
        assert all(torch.equal(*pair) for pair in zip(*starts))
        before = [p.clone() for p in works[names[1]].engine.model.parameters()]
        works[names[1]].step(workload.learned_schedule(works[names[1]].config))
        assert not all(torch.equal(*pair) for pair in zip(before, works[names[0]].engine.model.parameters()))


def test_rounding_to_bf16_is_allowed(bench, monkeypatch):
    ours = workload.VARIANTS["ours eager"]
    monkeypatch.setitem(workload.VARIANTS, "ours eager", {**ours, "train": {**ours["train"], "precision": "bf16"}})
    assert len(step.build(bench, "step", "tiny", 8, ("pytorch eager", "ours eager"))) == 2
    assert bench.lines[-1].startswith("  step tiny ours eager: gradient ")
    assert "gradient 0.00%" not in bench.lines[-1]


def test_a_plain_mlp_is_timed_beside_quacks_only(bench, monkeypatch):
    """Where nobody has another the variant would be the same step twice."""
    names = ("ours eager", "ours eager plain MLP")
    monkeypatch.setitem(workload.VARIANTS, names[1], {**workload.VARIANTS[names[0]], "model": {"mlp": "plain"}})
    assert list(step.build(bench, "step", "tiny", 8, names)) == [names[0]]
    assert "step tiny ours eager plain MLP: model.mlp: plain: no other variant has another" in bench.skipped[-1]
    monkeypatch.setattr(step, "chosen_mlp", lambda work: "quack")
    assert list(step.build(bench, "step", "tiny", 8, names)) == list(names)


def test_command_line(tmp_path, capsys):
    assert run.main(["nosuch"]) == 2
    assert "no subject 'nosuch'" in capsys.readouterr().err
    assert run.main(["step", "--sizes", "S,XXL"]) == 2
    assert "no size 'XXL'" in capsys.readouterr().err
    assert run.main(["step", "--variants", "ours regional,theirs"]) == 2
    assert "no variant 'theirs'" in capsys.readouterr().err
    assert run.main(["step", "--batch", "-8"]) == 2
    assert "--batch -8" in capsys.readouterr().err
    assert run.main(["swiglu", "--rounds", "1", "--results", str(tmp_path), "--device", "cpu"]) == 0
    assert "not recorded" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run.main(["swiglu", "--rounds", "1", "--results", str(tmp_path), "--device", "cpu", "--record"]) == 0
    assert {row.subject for row in harness.read_rows(tmp_path / "cpu.csv")} == {"ceilings", "swiglu"}


def test_a_failing_subject_does_not_end_the_others(bench, monkeypatch):
    class Broken:
        def run(self, bench):
            raise WrongResult("triton: result 0")

    real = importlib.import_module
    monkeypatch.setattr(run.importlib, "import_module", lambda name: Broken() if name.endswith("loss") else real(name))
    failures = run.run_subjects(bench, ["loss", "swiglu"])
    assert failures == ["loss: WRONG: triton: result 0"]
    assert "swiglu" in {row.subject for row in bench.rows}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "GEMM"),
        ("kernel_cutlass_kernel_quackepiloguefrontendGemmMod_swiglu_gradient_72e03896d1eb", "GEMM"),
        ("void at::native::multi_tensor_apply_kernel<...>", "optimizer"),
        ("fastasync::update_kernel<true>(...)", "optimizer"),
        ("triton_red_fused_native_layer_norm_0", "element-wise"),
        ("_backward_kernel", "element-wise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", "communication"),
        ("something", "other"),
    ],
)
def test_kernels_have_a_category(kernel, kind):
    assert profile_step.category(kernel) == kind


def test_time_by_category_is_a_steps():
    totals = profile_step.by_category([("nvjet_a", 3000.0), ("nvjet_b", 1000.0), ("triton_poi", 500.0)], 2)
    assert (totals["GEMM"], totals["element-wise"], totals["other"]) == (2.0, 0.25, 0.0)


def test_idle_time_counts_no_overlap_twice():
    assert profile_step.busy_and_idle([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == (4.0, 2.0)
    assert profile_step.busy_and_idle([]) == (0.0, 0.0)


def test_plots(tmp_path, bench, capsys):
    for ms, variant in ((3.0, "reference"), (1.0, "triton")):
        bench.add("swiglu", "fwd", variant, "[1]", "bf16", summarize([ms, ms * 1.1]), nbytes=8e5)
    for kind in ("GEMM", "attention"):
        bench.add("profile", kind, "ours", "XL batch 256", "", summarize([10.0]))
    note = "overhead +0.120%, 95 % interval -0.050% to +0.290%"
    bench.add("schedule_overhead", "step XL", "learned", "batch 256", "bf16", summarize([360.0]), note=note)
    harness.write_rows(tmp_path / "gpu.csv", bench.rows)
    assert plots.main([str(tmp_path / "gpu.csv"), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}.png" for name in ("roofline", "kernels", "breakdown", "overhead")
    }
    assert plots.main([str(tmp_path / "none.csv")]) == 2
    newest = plots.latest([*bench.rows, *(Row(**{**vars(row), "ms": 9.0}) for row in bench.rows[:1])])
    assert len(newest) == len(bench.rows)
    assert newest[0].ms == 9.0


def test_what_runs_the_gpu_tests_names_files_that_exist():
    """A path that was moved would be run, or left out, by nobody."""
    commands = [*gpu_session.STAGES.values(), *gpu_session.ON_REQUEST.values()]
    words = [word for _, command in commands for word in command] + (ROOT / "Makefile").read_text().split()
    paths = {word.removeprefix("--ignore=") for word in words if word.removeprefix("--ignore=").startswith("tests/")}
    assert {"tests/kernels", "tests/optim"} <= paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_a_session_has_a_stage_for_every_subject():
    commands = [command for _, command in (gpu_session.STAGES | gpu_session.ON_REQUEST).values()]
    assert set(SUBJECTS) <= {word for command in commands if "bench.run" in command for word in command}


def test_a_pictures_corner_names_all_commits_and_days(bench):
    row = bench.add("swiglu", "fwd", "triton", "[1]", "bf16", summarize([1.0]))

    def measured(commit, day):
        return Row(**{**vars(row), "commit": commit, "date": f"2026-11-{day} 10:00:00", "torch": "2.11"})

    rows = [measured("bbb", 25), measured("ccc", 26), measured("aaa", 24), measured("aaa", 26)]
    assert plots.about(rows[:1]) == "cpu, torch 2.11, 2026-11-25, bbb"
    assert plots.about(rows) == "cpu, torch 2.11, 2026-11-24 to 2026-11-26, 3 commits, aaa to ccc"


def test_a_picture_of_intervals_says_what_they_count(bench):
    row = bench.add("schedule_overhead", "step XL", "learned", "batch 256", "bf16", summarize([360.0]))
    old, new = (Row(**{**vars(row), "date": f"2026-11-{day} 10:00:00"}) for day in (26, 27))
    pairs = "of before 2026-11-27: pairs of single steps, too narrow"
    assert plots.counted([old]) == f"95 % intervals {pairs}"
    assert plots.counted([new]) == "95 % intervals: rounds of several steps"
    assert plots.counted([old, new]) == f"95 % intervals: rounds of several steps; {pairs}"


@pytest.mark.parametrize(
    "names",
    [
        attention.BACKENDS,
        ("reference", "reference compiled", "triton"),
        [f"{form}{how}" for form in ("pytorch", "triton", "quack") for how in ("", " compiled")],
    ],
)
def test_variants_of_one_subject_have_colors_of_their_own(names):
    assert len({plots.COLORS[name] for name in names}) == len(names)


def test_session_keeps_its_time(tmp_path, monkeypatch, capsys):
    """A stage that hangs is ended and says where, the next ones run with what is left, and the table is printed."""
    monkeypatch.setattr(gpu_session, "SPARE", 0.0)
    hang = "import time\ndef stand_still():\n    time.sleep(60)\nprint('  begun', flush=True)\nstand_still()"
    stages = {
        "hangs": (1.0, ["-c", hang]),
        "works": (30.0, ["-c", "print('  done')"]),
        "fails": (30.0, ["-c", "raise SystemExit(3)"]),
    }
    monkeypatch.setattr(gpu_session, "STAGES", stages)
    start = time.monotonic()
    assert gpu_session.main(["--minutes", "1", "--stages", "hangs,works,fails", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 20
    said = capsys.readouterr().out
    assert "hangs: out of time; works: ok; fails: exit code 3" in said
    log = (tmp_path / "session.log").read_text()
    assert log.startswith("  begun\n")
    assert "in stand_still" in log
    assert log.endswith("  done\n")
    with pytest.raises(SystemExit):
        gpu_session.main(["--stages", "nothing"])
