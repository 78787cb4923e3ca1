"""The run from JPEGs to scored samples, in miniature: its stages, what continues, what it leaves to look at."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from bench import jpeg_networks, jpeg_run, jpeg_table, plots
from bench.harness import read_rows
from bench.jpeg_networks import Fit, Pictures, fit
from fastasync.data import ImageSet, load_images
from fastasync.errors import UserError


def colours(name, root, split):
    """Digits in the layout of CIFAR-10, so that no test needs its 139 MB."""
    found = load_images("digits", root, split)
    images = found.images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1).contiguous()
    names = tuple(f"digit {name}" for name in found.class_names)
    return ImageSet(images, found.labels, found.classes, names, name, mirror=True)


# --- the stand-ins ----------------------------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def loss(self, step, samples):
        return (self.weight - samples.float().mean() - step).square().sum()


def test_a_stand_in_continues_bit_for_bit(tmp_path):
    plan = Fit(steps=9, batch=4, weight_decay=0.1, precision="float32", save_every=3)
    whole, stopped, resumed = Line(), Line(), Line()
    assert fit(whole, whole.loss, 10, plan, tmp_path / "whole.pt", "whole") == 9

    def interrupted(step, samples):
        if step == 5:
            raise KeyboardInterrupt
        return stopped.loss(step, samples)

    with pytest.raises(KeyboardInterrupt):
        fit(stopped, interrupted, 10, plan, tmp_path / "part.pt", "part")
    assert fit(resumed, resumed.loss, 10, plan, tmp_path / "part.pt", "part") == 6
    assert torch.equal(whole.weight, resumed.weight)
    assert fit(resumed, resumed.loss, 10, plan, tmp_path / "part.pt", "part") == 0
    with pytest.raises(UserError, match="part: loss: nan: lower its learning rate"):
        fit(Line(), lambda step, samples: Line().weight.sum() * float("nan"), 10, plan, tmp_path / "x.pt", "part")


def test_peak_signal_to_noise():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert jpeg_networks.psnr(images, images + 255) == pytest.approx(0.0)
    assert jpeg_networks.psnr(images, images + 51) == pytest.approx(13.979, abs=1e-3)  # 20 log10 5


# --- stages, table and picture ----------------------------------------------------------------------------------------


def test_a_stage_is_done_once_and_its_seconds_add_up(tmp_path):
    def work():
        return jpeg_run.Work(tmp_path, "tiny", "data", "", torch.device("cpu"))

    def fails():
        raise UserError("disk", "full", "free some")

    with pytest.raises(UserError):
        work().stage("encode", fails)
    work().stage("encode", lambda: "8 shards")
    work().stage("encode", fails)
    entry = json.loads((tmp_path / "stages.json").read_text())["stages"]["encode"]
    assert (entry["attempts"], entry["figure"]) == (2, "8 shards")
    with pytest.raises(UserError, match="holds a run of other sizes than cpu"):
        jpeg_run.Work(tmp_path, "cpu", "data", "", torch.device("cpu"))


def test_missing_packages_name_their_extras(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert jpeg_run.main(["--size", "tiny", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.endswith("deepspeed not installed: pip install 'fastasync[deepspeed,imagenet]'\n")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nvidia" else name)
    jpeg_networks.check_packages()
    assert "(extra dali): Pillow reads the images" in capsys.readouterr().out


def test_rows_are_recorded_once_and_the_picture_stays_small(tmp_path, monkeypatch, capsys):
    noise = Pictures(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8) % 2, ("cat", "dog"))
    monkeypatch.setattr(jpeg_table, "LARGEST", 50_000)
    jpeg_table.draw_picture({"held-out": (noise, 2), "samples": (noise, 9)}, tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.size == (88 + 11 * 66 + 12, 22 + 2 * 66)
        assert picture.mode == "P"  # reduced to a palette
    entry = {"seconds": 1.5, "attempts": 2, "figure": "fid 3", "date": "2026-11-25", "commit": "abc"}
    rows = jpeg_table.table({"evaluate": entry}, "tiny", "cpu", "60 images", "float32")
    assert "evaluate            1.5  fid 3" in capsys.readouterr().out
    for _ in range(2):
        path = jpeg_table.record(rows, tmp_path / "run.png", tmp_path, tmp_path / "docs" / "copy.png")
    (row,) = read_rows(path)
    assert (path.name, row.case, row.ms, row.count, row.note) == ("jpeg_run-cpu.csv", "evaluate", 1500.0, 2, "fid 3")
    assert (tmp_path / "docs" / "copy.png").read_bytes() == (tmp_path / "run.png").read_bytes()
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    assert plots.main([]) == 2  # not taken for a GPU's benchmarks


def test_the_launcher_takes_the_gpu_that_is_visible(tmp_path, monkeypatch):
    """DeepSpeed's --num_gpus takes the first of the machine, and its --include counts all of the machine's."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 0.5}\n')
    size = jpeg_run.SIZES["gpu"]
    calls = []

    def run(command, env, check):
        calls.append((command, env))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(jpeg_run.subprocess, "run", run)
    for visible, chosen in (("1", "localhost:1"), (None, "localhost:0")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        said = jpeg_run.train(SimpleNamespace(device=torch.device("cuda"), sizes=size, run=tmp_path))
        assert said == f"5 steps of {size.dit[-1]}, 1 rank(s), ZeRO 1; loss 0.500"
        command, environment = calls.pop()
        assert command[command.index("--include") + 1] == chosen
        assert "--num_gpus" not in command
        assert "CUDA_VISIBLE_DEVICES" not in environment
    for name in ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-0b2c1d5e-58d1-5a0c-9a1c-2f1f7c8a1b2d"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{name},GPU-another")
        jpeg_run.train(SimpleNamespace(device=torch.device("cuda"), sizes=size, run=tmp_path))
        command, environment = calls.pop()
        assert command[2:4] == ["torch.distributed.run", "--nproc-per-node=1"]
        assert environment["CUDA_VISIBLE_DEVICES"] == name  # whole: a number in it is not an index


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_jpegs_to_scored_samples(tmp_path, monkeypatch, capsys):
    """Every stage with the public commands, one rank under DeepSpeed, without Inception; then nothing is left to do."""
    for package in jpeg_networks.NEEDS:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.setattr(jpeg_run, "load_images", colours)
    monkeypatch.setitem(jpeg_run.SIZES, "tiny", replace(jpeg_run.SIZES["tiny"], ranks=1))
    out = tmp_path / "run"
    words = ["--size", "tiny", "--out", str(out), "--inception", str(tmp_path / "none.pt")]
    assert jpeg_run.main(words) == 0
    said = capsys.readouterr().out
    assert "none.pt: no such file" in said
    assert "4 steps of 8, 1 rank(s), ZeRO 1" in said
    (figure,) = json.loads((out / "run" / "figures.json").read_text())
    assert (figure["name"], figure["protocol"]["samples"], figure["protocol"]["reference_count"]) == ("fid", 20, 40)
    assert figure["protocol"]["extractor"] == "jpeg-run-classifier"
    assert (out / "run" / "report.html").is_file()
    assert (out / "jpeg-run.png").stat().st_size < 500_000
    for name in jpeg_run.STAGES:
        monkeypatch.setitem(jpeg_run.STAGES, name, None)  # would fail if it were called
    assert jpeg_run.main(words) == 0
    assert "=== " not in capsys.readouterr().out
