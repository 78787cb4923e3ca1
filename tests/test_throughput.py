"""Expected hours come from the rows of bench/results; what was not measured is said to be an estimate, or unknown."""

import csv
import re

import pytest
import torch

from fastasync import stages
from fastasync.cli import main
from fastasync.config import apply_settings
from fastasync.model import train_flops
from fastasync.presets import preset
from fastasync.throughput import RESULTS, choose_step, expected_hours, measured_steps
from fastasync.training import build_model

COLUMNS = ("date", "commit", "device", "subject", "case", "variant", "shape", "dtype", "tflop_per_s", "images_per_s",
           "note")  # fmt: skip


def flops_of(config):
    with torch.device("meta"):
        return train_flops(build_model(config))


XL = flops_of(preset("imagenet256-xl"))


@pytest.fixture
def results(tmp_path):
    """results(*changes) -> a folder with a row for each change of an XL step at 500 img/s."""

    def make(*changes):
        with open(tmp_path / "gpu.csv", "w", newline="") as stream:
            table = csv.DictWriter(stream, COLUMNS)
            table.writeheader()
            for change in changes:
                row = {
                    "date": "2026-11-24 06:00:00", "commit": "abc1234", "device": "gpu-9", "subject": "step",
                    "case": "XL", "variant": "ours regional", "shape": "batch 256, 48x16x16", "dtype": "auto",
                    "images_per_s": 500, "tflop_per_s": 500 * XL / 1e12, **change,
                }  # fmt: skip
                table.writerow(row)
        return tmp_path

    return make


def hours(lines, gpus):
    """The number of the line on so many GPUs, and what is said about it."""
    (text,) = (text for name, text in lines.items() if re.search(rf" on {gpus} ", name))
    number, _, about = text.partition(" ")
    return float(number), about


def test_hours_of_the_measured_network(results):
    config = preset("imagenet256-xl")
    lines = expected_hours(config, XL, 8, results({}))
    one, about = hours(lines, 1)
    assert one == pytest.approx(400_000 * 256 / 500 / 3600, rel=5e-3)
    assert about == "(measured for this network)"
    eight, about = hours(lines, 8)
    assert eight == pytest.approx(one / 8, rel=5e-3)
    assert "perfect scaling is assumed, not measured; 32 images on each GPU" in about
    assert "gpu-9" in lines["measured training step"]
    assert "2026-11-24, commit abc1234" in lines["measured training step"]


def test_steps_of_several_gpus_tell_more_of_several(results):
    """The nearest batch on a GPU under the run's ZeRO, the newest; not by DeepSpeed's own reduction."""

    def two(each, rate, **changes):  # images on a GPU, images/s of one
        row = {"subject": "scaling", "case": "XL on 2", "variant": "zero 1", "shape": f"batch {each} a GPU"}
        return {**row, "images_per_s": 2 * rate, "tflop_per_s": rate * XL / 1e12, **changes}

    rows = [
        two(256, 400),
        two(32, 270, date="2026-11-26 01:00:00"),
        two(32, 200),
        two(32, 100, note='memory none; {"zero_optimization":{}}', date="2026-11-27 01:00:00"),
        two(32, 90, variant="plain at once", date="2026-11-27 01:00:00"),
        two(32, 80, variant="zero 1 by DeepSpeed", date="2026-11-27 01:00:00"),
        two(32, 70, case="XL on 1", variant="plain", date="2026-11-27 01:00:00"),
        two(32, 150, variant="zero 2"),
        two(32, 490, variant="zero 1 recorded"),
        two(256, 450, variant="zero 1 recorded"),  # as auto does not at 256 images
    ]
    alone = ({}, {"shape": "batch 64, 48x16x16", "images_per_s": 450}, {"variant": "ours fp8", "dtype": "fp8"})
    folder, config = results(*alone, *rows), preset("imagenet256-xl")
    whole = config.train.steps * config.train.batch / 3600

    def eight(*settings):
        return hours(expected_hours(apply_settings(config, settings), XL, 8, folder), 8)

    found, about = eight("train.cuda_graph=off")
    assert found == pytest.approx(whole / (8 * 270), rel=5e-3)
    assert "from 270 img/s on one gpu-9 (XL on 2, zero 1, batch 32 a GPU; 2026-11-26" in about
    assert "on each; beyond so many perfect scaling is assumed; 32 images on each GPU" in about
    assert eight("train.zero=2")[0] == pytest.approx(whole / (8 * 150), rel=5e-3)
    found, about = eight("train.zero=3")  # has no row: ZeRO 1's that is not recorded
    assert found == pytest.approx(whole / (8 * 270), rel=5e-3)
    assert "zero 1, batch 32 a GPU" in about
    for settings in ((), ("train.cuda_graph=on",)):  # auto looks at such steps
        assert eight(*settings)[0] == pytest.approx(whole / (8 * 490), rel=5e-3)
    assert eight("train.deepspeed_config=its.json")[0] == pytest.approx(whole / (8 * 270), rel=5e-3)
    assert eight("train.batch=2048")[0] == pytest.approx(8 * whole / (8 * 400), rel=5e-3)
    assert eight("train.batch=2048", "train.cuda_graph=on")[0] == pytest.approx(8 * whole / (8 * 450), rel=5e-3)
    assert "perfect scaling is assumed, not measured" in eight("train.precision=fp8")[1]
    one, _ = hours(expected_hours(config, XL, 8, folder), 1)
    assert one == pytest.approx(whole / 500, rel=5e-3)
    small = apply_settings(config, ("model.size=B",))  # another network: no row of several GPUs
    assert "zero" not in hours(expected_hours(small, flops_of(small), 8, folder), 8)[1]


def test_what_is_refused_or_waits_is_said(capsys):
    command = ["train", "--preset", "imagenet256-xl", "--out", "/nonexistent", "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "ZeRO 3 (with train.compile=off) " in said
    assert "probe on several GPUs: runs on one, the others wait" in said
    assert main([*command, "--set", "train.compile=off", "--set", "schedule.name=offset:0.3"]) == 0
    said = capsys.readouterr().out
    assert "ZeRO 3 (" not in said
    assert "probe on several" not in said


@pytest.mark.parametrize(
    ("name", "smaller"), [("imagenet256-s", True), ("imagenet256-b", True), ("imagenet256-xxl", False)]
)
def test_another_size_is_an_estimate(results, name, smaller):
    config = preset(name)
    flops = flops_of(config)
    one, about = hours(expected_hours(config, flops, 8, results({})), 1)
    assert one == pytest.approx(400_000 * 256 / (500 * XL / flops) / 3600, rel=5e-3)
    assert "an estimate, not measured" in about
    assert ("takes longer than this" in about) == smaller


def test_which_row_counts(results):
    xl = preset("imagenet256-xl")
    rows = [
        {"images_per_s": 1, "date": "2026-11-25 01:00:00", "device": "cpu"},
        {"images_per_s": 2, "date": "2026-11-25 01:00:00", "subject": "loss"},
        {"images_per_s": 3, "date": "2026-11-25 01:00:00", "variant": "pytorch regional"},
        {"images_per_s": 4, "date": "2026-11-25 01:00:00", "variant": "ours whole"},
        {"images_per_s": 5, "date": "2026-11-25 01:00:00", "variant": "ours fp8", "dtype": "fp8"},
        {"images_per_s": 9, "date": "2026-11-24 01:00:00", "variant": "ours fp8 graph", "dtype": "fp8"},
        {"images_per_s": 6, "date": "2026-11-24 01:00:00"},
        {"images_per_s": 7, "date": "2026-11-24 02:00:00"},
        {"images_per_s": "", "date": "2026-11-25 02:00:00"},
        {"images_per_s": "fast", "date": "2026-11-25 02:00:00"},
    ]
    for row in rows:
        row["tflop_per_s"] = row["images_per_s"] * XL / 1e12 if isinstance(row["images_per_s"], int) else 1
    other = {"images_per_s": 8, "tflop_per_s": 8 * XL / 2e12, "date": "2026-11-26 02:00:00"}  # half the FLOPs
    found = measured_steps(results(*rows, other))

    def chosen(*settings):
        row = choose_step(apply_settings(xl, settings), XL, found)
        return row and round(row.images_per_s)

    assert chosen() == 7  # this network and variant, the newest
    assert chosen("train.compile=model") == 4
    assert chosen("train.compile=off") == 4  # not measured: the newest of ours for this network
    assert chosen("train.precision=fp8") == 9
    assert chosen("train.precision=fp8", "train.cuda_graph=off") == 5
    assert chosen("model.kernels=reference") == 3
    assert chosen("train.precision=fp32") is None
    assert choose_step(xl, XL // 2, found).images_per_s == 8
    assert choose_step(xl, XL // 100, found) is None


def test_the_nearest_batch_says_most(results):
    """A newer row of another batch says less: at small ones launches bind a step."""
    sizes = {64: "2026-11-29", 256: "2026-11-24", 1024: "2026-11-28"}
    shapes = [{"shape": f"batch {size}, 48x16x16", "date": f"{day} 01:00:00"} for size, day in sizes.items()]
    found = measured_steps(results(*shapes, {"shape": "48x16x16", "date": "2026-11-30 01:00:00"}))
    for asked, nearest in ((256, 256), (16, 64), (300, 256), (2048, 1024)):
        config = apply_settings(preset("imagenet256-xl"), (f"train.batch={asked}",))
        assert choose_step(config, XL, found).batch == nearest
    config = preset("imagenet256-xl")
    assert choose_step(config, XL, found, gpus=4).batch == 64
    slow = {"shape": "batch 64, 48x16x16", "images_per_s": 250, "tflop_per_s": 250 * XL / 1e12}
    lines = expected_hours(config, XL, 8, results({}, slow))
    (one, _), (eight, about) = hours(lines, 1), hours(lines, 8)
    assert eight == pytest.approx(one / 4, rel=5e-3)  # 250 images a second on each
    assert about.startswith("(from 250 img/s on one gpu-9 (XL, ours regional, batch 64, 48x16x16; ")


@pytest.mark.parametrize(
    ("compiled", "variant"),
    [("off", "ours graph uncompiled"), ("regional", "ours regional graph"), ("model", "ours graph")],
)
def test_recorded_steps_count_for_who_records(results, compiled, variant):
    """The row of the way in which the run compiles, where it is recorded and where it is not."""
    config = apply_settings(preset("imagenet256-xl"), (f"train.compile={compiled}", "train.cuda_graph=on"))
    names = ("ours eager", "ours regional", "ours whole", "ours graph", "ours regional graph", "ours graph uncompiled")
    rows = measured_steps(
        results(*({"variant": name, "date": f"2026-11-2{9 - i} 01:00:00"} for i, name in enumerate(names)))
    )
    assert choose_step(config, XL, rows).variant == variant
    plain = {"off": "ours eager", "regional": "ours regional", "model": "ours whole"}[compiled]
    assert choose_step(apply_settings(config, ("train.cuda_graph=auto",)), XL, rows).variant == plain


def test_steps_that_auto_looks_at(results):
    """It records those that launches bind, of divided batches too; of several ranks those of ZeRO 1."""
    names = ("ours auto", "ours fp8 auto", "ours regional", "ours fp8")
    shape = "batch 64, 48x16x16"
    found = measured_steps(
        results(*({"variant": name, "shape": shape, "date": f"2026-11-2{i} 01:00:00"} for i, name in enumerate(names)))
    )
    for precision, recorded, plain in (("bf16", "ours auto", "ours regional"), ("fp8", "ours fp8 auto", "ours fp8")):
        one = apply_settings(preset("imagenet256-xl"), (f"train.precision={precision}", "train.batch=64"))
        assert choose_step(one, XL, found).variant == recorded
        assert choose_step(apply_settings(one, ("train.cuda_graph=off",)), XL, found).variant == plain
        four = apply_settings(one, ("train.batch=256",))
        assert choose_step(four, XL, found, gpus=4).variant == recorded
        others = ("train.zero=2", "train.zero=0", "train.deepspeed_config=its.json", "train.cuda_graph=off")
        for settings in ((each,) for each in (*others, "train.optimizer=torch")):
            assert choose_step(apply_settings(four, settings), XL, found, gpus=4).variant == plain
        its = ("train.deepspeed_config=its.json", "train.cuda_graph=on")
        assert choose_step(apply_settings(four, its), XL, found, gpus=4).variant == recorded
        assert choose_step(apply_settings(four, ("train.accumulate=4",)), XL, found).variant == recorded


def test_what_is_not_measured_is_unknown(tmp_path, results):
    """Installed without the repository, too: there is no such folder."""
    for row, settings, says in (
        (None, (), "make bench SUBJECT=step"),
        ({"variant": "pytorch regional"}, (), "make bench SUBJECT=step"),
        ({}, ("train.precision=fp32",), "only bf16 and fp8"),
    ):
        config = apply_settings(preset("imagenet256-xl"), settings)
        folder = tmp_path / "nowhere" if row is None else results(row)
        (text,) = expected_hours(config, XL, 8, folder).values()
        assert text.startswith("unknown: ")
        assert says in text
    (text,) = expected_hours(preset("digits"), flops_of(preset("digits")), 8, results({})).values()
    assert text.startswith("unknown: ")  # the step of a network 16,000 times its size says nothing


def test_a_damaged_file_is_passed_over(results):
    folder = results({})
    (folder / "other.csv").write_bytes(b"subject,device\n\xff\xfe,step\nstep\n")
    (folder / "empty.csv").write_text("")
    assert len(measured_steps(folder)) == 1


def test_the_committed_rows_are_read_by_dry_run(capsys):
    """Whatever is measured next: the newest row of the preset's own network and variant is what is printed."""
    assert main(["train", "--preset", "imagenet256-xl", "--out", "/nonexistent", "--dry-run"]) == 0
    said = capsys.readouterr().out
    row = choose_step(preset("imagenet256-xl"), XL, measured_steps())
    assert RESULTS.is_dir()
    assert row.flops == pytest.approx(XL, rel=1e-3)
    assert f"measured training step: {row}" in said
    assert f"expected hours of training on 1 {row.device}: {102.4e6 / row.images_per_s / 3600:.3g} (measured" in said
    assert "expected hours of training on 8" in said


@pytest.mark.parametrize("name", ["imagenet256-s", "imagenet256-l", "imagenet256-xl-sfd", "autoguidance-b"])
def test_every_imagenet_preset_has_hours(name):
    lines = stages.summary(preset(name))
    assert any(line.startswith("expected hours of training on 8") for line in lines)
