"""The command line on the real thing in miniature: every stage, resuming, and bad input (one line, exit code 2)."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastasync import stages
from fastasync.cli import main
from fastasync.config import apply_settings, differences, keep_begun
from fastasync.errors import UserError
from fastasync.model import LightningDiT
from fastasync.presets import preset
from fastasync.run import Run, existing_config
from fastasync.schedule import named_schedule, save_schedule

TINY = [
    "representations.encoder_steps=15", "representations.semvae_steps=10", "schedule.baselines=synchronous",
    "model.depth=2", "model.width=32", "model.heads=2", "train.steps=12", "train.batch=32", "train.warmup=4",
    "train.log_every=4", "train.checkpoint_every=6", "probe.width=16", "probe.heads=2", "probe.depth=1",
    "probe.batch=8", "probe.budget=1.0", "probe.estimator=B", "sample.count=40",
    "sample.batch=16", "sample.steps=2,3", "evaluate.metrics=fid",
]  # fmt: skip


def arguments(out, *more, stage="run"):
    settings = [part for setting in (*TINY, *more) for part in ("--set", setting)]
    return [stage, "--preset", "digits", "--out", str(out), *settings]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(arguments(out)) == 0
    return out


def test_run_directory_holds_everything(run):
    for name in (
        "config.yaml", "versions.json", "schedule.json", "metrics.jsonl", "figures.json", "samples.png",
        "schedule.png", "curves.png", "report.html", "checkpoints/step_00000012/manifest.json", "probe/probe.json",
        "prepared/prepared.json", "baselines/synchronous/figures.json",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    figures = json.loads((run / "figures.json").read_text())
    assert {figure["protocol"]["function_evaluations"] for figure in figures} == {4.0, 6.0}
    assert all(figure["protocol"]["samples"] == 40 for figure in figures)
    budget = json.loads((run / "probe" / "probe.json").read_text())["budget"]
    assert budget["spent_flops"] <= budget["limit_flops"]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [4, 8, 12]


def test_running_again_says_done_and_changes_nothing(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.npz")} | {
        path: path.read_bytes() for path in run.rglob("*.safetensors")
    }
    assert main(["run", "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "prepare: done" in said
    assert "probe: done" in said
    assert "sample: done" in said
    for path, content in before.items():
        assert content == (path.stat().st_mtime_ns if isinstance(content, int) else path.read_bytes())


def test_stages_alone_and_more_steps(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert main(["train", "--out", str(copy), "--set", "train.steps=16"]) == 0
    assert (copy / "checkpoints" / "step_00000016").is_dir()
    assert main(["evaluate", "--out", str(copy), "--set", "sample.steps=2", "--set", "sample.integrator=dopri5"]) == 0
    figure = json.loads((copy / "figures.json").read_text())[0]["protocol"]
    assert figure["integrator"] == "dopri5"
    assert figure["checkpoint_step"] == 16
    assert figure["function_evaluations"] > 6
    assert main(["report", "--out", str(copy)]) == 0
    assert "synchronous" in capsys.readouterr().out


def test_generation_in_the_loop_and_the_oracle(tmp_path, capsys):
    out = tmp_path / "c"
    more = ["probe.estimator=C", "probe.train_share=0.2", "probe.sampling_steps=2", "train.steps=150"]
    assert main([*arguments(out, *more, stage="probe"), "--oracle"]) == 0
    found = json.loads((out / "probe" / "probe.json").read_text())
    assert "synchronous" in {row["label"] for row in found["candidates"]}
    assert found["budget"]["flops"]["scoring"] > 0
    assert found["budget"]["spent_flops"] <= found["budget"]["limit_flops"]
    assert found["diagnostics"]["oracle"]["value"] > 0
    assert (out / "schedule.json").is_file()
    assert "estimator C" in capsys.readouterr().out


def test_a_cosine_without_clipping_is_warned_of(tmp_path, capsys):
    """The warning's reason: the first gradient's norm."""
    more = [
        "schedule.name=offset:0.3",
        "objective.mode=sfd",
        "objective.cosine_weight=1",
        "train.log_every=1",
        "train.clip=0",
    ]
    assert main(arguments(tmp_path / "sfd", *more, "train.steps=2", stage="train")) == 0
    assert "train.clip=1 prevents it" in capsys.readouterr().out
    with open(tmp_path / "sfd" / "metrics.csv") as lines:
        norms = [float(row["grad_norm"]) for row in csv.DictReader(lines)]
    assert norms[0] > 1e6 * norms[1]
    assert main(arguments(tmp_path / "sfd", *more, "train.steps=3", stage="train")) == 0
    assert "prevents it" not in capsys.readouterr().out  # begun already
    assert main(arguments(tmp_path / "clip", *more, "train.steps=2", "train.clip=1", stage="train")) == 0
    assert "prevents it" not in capsys.readouterr().out


def test_texture_by_components_with_a_denoiser(tmp_path):
    out = tmp_path / "components"
    more = ["representations.channels=3,8", "representations.denoiser_steps=5", "schedule.name=offset:0.3"]
    assert main(arguments(out, *more, "schedule.baselines=")) == 0
    made = json.loads((out / "prepared" / "prepared.json").read_text())
    assert made["identity"]["options"]["texture"] == {"channels": 3, "denoiser": {"steps": 5}}
    figures = made["parts"]["representation-texture.safetensors"]
    assert 0.8 < figures["explained"] < 1
    assert 0 < figures["mse"] < 1
    assert (out / "report.html").is_file()


def test_an_interrupted_probe_of_another_length_is_named_and_kept(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastasync.probe.learn.sweep", killed)
        assert main(arguments(out)) == 130
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    longer = ["train", "--out", out, "--set", "train.steps=20"]
    refused(capsys, longer, "train.steps: 20", "a run of 12 steps", str(out / "probe"), "fastasync probe")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["probe", "--out", str(out), "--set", "train.steps=12"]) == 0
    assert main([str(part) for part in longer]) == 0
    assert (out / "checkpoints" / "step_00000020").is_dir()


def test_guided_sampling_and_class_lists(run, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    chosen, choose_attention, choose_mlp = [], LightningDiT.choose_attention, LightningDiT.choose_mlp
    for name, choose in (("choose_attention", choose_attention), ("choose_mlp", choose_mlp)):

        def noted(model, *arguments, name=name, choose=choose, **options):
            chosen.append((name, arguments, options))
            return choose(model, *arguments, **options)

        monkeypatch.setattr(LightningDiT, name, noted)
    shutil.copytree(run, copy)
    weak = f"sample.weak_checkpoint={run}"
    for settings in (["sample.guidance=cfg", "sample.classes=3,4"], ["sample.guidance=autoguidance", weak]):
        shutil.rmtree(copy / "samples")
        options = [part for setting in (*settings, "sample.steps=2") for part in ("--set", setting)]
        chosen.clear()
        assert main(["sample", "--out", str(copy), *options]) == 0
        networks = 2 if weak in settings else 1  # the weak one chooses as the main one does
        assert chosen[:2] * networks == chosen
        assert [name for name, *_ in chosen[:2]] == ["choose_attention", "choose_mlp"]
        file = next(copy.glob("samples/*/samples.npz"))
        guidance = json.loads((file.parent / "protocol.json").read_text())["guidance"]
        by = " by run step_00000012 " if weak in settings else ""
        assert guidance.startswith(f"{settings[0].partition('=')[2]} 1.5 in [0, 1]{by}")
        with np.load(file) as arrays:
            assert arrays["arr_0"].shape == (40, 8, 8, 3)
            if "sample.classes=3,4" in settings:
                assert set(arrays["labels"]) == {3, 4}


def test_data_is_short_for_its_root(tmp_path, capsys):
    for stage in ("train", "run", "probe", "prepare", "sample", "evaluate"):
        assert main([stage, "--preset", "imagenet256-xl", "--data", "some where=1", "--out", "x", "--dry-run"]) == 0
        assert "root: some where=1" in capsys.readouterr().out
    missing = ["train", "--preset", "imagenet256-xl", "--out", tmp_path / "x", "--data", tmp_path / "none"]
    refused(capsys, missing, str(tmp_path / "none"), "no such folder")
    both = [*missing, "--set", "data.root=elsewhere"]
    refused(capsys, both, f"--data: {tmp_path / 'none'}: --set data.root=elsewhere says it too: give one of them")
    digits = ["train", "--preset", "digits", "--out", tmp_path / "x", "--data", tmp_path, "--dry-run"]
    refused(capsys, digits, f"--data: {tmp_path}: data.dataset=digits reads no folder: add --set data.dataset=latents")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["schedule.name=ofset:0.3"], "schedule: ofset:0.3: use one of"),
        (["schedule.baselines=ofset:0.3"], "schedule: ofset:0.3: use one of"),
        (["train.batch=100", "train.accumulate=3"], "train.batch: 100: must divide into 1 ranks"),
    ],
)
def test_a_dry_run_refuses_what_needs_no_data_to_be_refused(tmp_path, capsys, settings, said):
    changes = [word for setting in settings for word in ("--set", setting)]
    refused(capsys, ["run", "--preset", "imagenet256-xl", "--out", tmp_path / "x", "--dry-run", *changes], said)


def test_a_run_that_was_begun_keeps_what_its_preset_sets_since(tmp_path, capsys):
    """The same command goes on: Slurm's script repeats it.  What --set says counts as ever."""
    out = tmp_path / "run"
    Run(out, apply_settings(preset("imagenet256-xl"), ["train.max_norm_ratio=0"])).create()
    command = ["train", "--preset", "imagenet256-xl", "--out", str(out), "--dry-run"]
    for more, ratio in (([], 0.0), (["--set", "train.max_norm_ratio=7"], 7.0)):
        assert main([*command, *more]) == 0
        assert f"max_norm_ratio: {ratio}" in capsys.readouterr().out
    assert main([*command[:4], str(tmp_path / "new"), "--dry-run"]) == 0
    assert "max_norm_ratio: 10.0" in capsys.readouterr().out
    smaller = [(name, "probe.budget=0.1") for name in ("cifar10", "cifar10-components")]
    for name, setting in (("imagenet256-xl-sfd", "probe.estimator=B"), *smaller):
        begun = apply_settings(preset(name), [setting])
        assert differences(preset(name), begun) == [setting.split("=")[0]]
        assert differences(keep_begun(preset(name), begun), begun) == []
    begun = apply_settings(preset("digits"), ["probe.estimator=B"])  # the user's, not a preset's from before
    assert keep_begun(preset("digits"), begun) == preset("digits")
    five = apply_settings(preset("imagenet256-b"), ["train.max_norm_ratio=5"])
    for begun in (preset("digits"), five):  # another preset, another value of the user's
        assert keep_begun(preset("imagenet256-b"), begun) == preset("imagenet256-b")
    assert differences(keep_begun(preset("imagenet256-xl"), existing_config(out)), existing_config(out)) == []


def test_a_schedule_that_is_learned_asks_for_no_budget_any_more(tmp_path):
    """What its probe would cost now (another sampler, fewer steps) is nobody's concern."""
    run = Run(tmp_path / "run", apply_settings(preset("digits"), ["probe.budget=1e-6"])).create()
    work = ("prepare", "probe", "train")
    with pytest.raises(UserError, match=r"probe\.budget: 1e-06: "):
        stages.preflight(run, work)
    save_schedule(named_schedule("power:2", ("texture", "semantic"), ("lags", "leads")), run.schedule_file)
    stages.preflight(run, work)


def test_dry_run_prints_the_cost_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "dry"
    assert main(["train", "--preset", "imagenet256-xl", "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "parameters: 682,765,424" in said
    assert re.search(r"probe's share of them, at most: 0\.0025", said)
    assert "memory estimate" in said
    assert not out.exists()


def refused(capsys, arguments, *says):
    """The command fails with exit code 2 and one line that says all of ``says``."""
    assert main([str(part) for part in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("fastasync: error: ")]
    assert len(errors) == 1
    for text in says:
        assert text in errors[0]


def test_bad_input_before_any_work(tmp_path, capsys):
    out = tmp_path / "out"
    cases = [
        (
            arguments(
                out, "representations.names=semantic", "representations.channels=8", "representations.roles=free"
            ),
            "representations that decode to images: none",
        ),
        (arguments(out, "schedule.name=offset:1e300"), "from 0 to 1000"),
        (arguments(out, "train.steps=1000000000000"), "train.steps"),
        (arguments(out, "schedule.baselines=offset:0.3,offset-0.3"), "would share"),
        ([*arguments(out, "schedule.name=synchronous"), "--oracle"], "--oracle"),
        (["run", "--preset", "digits", "--out", tmp_path / ("o" * 300)], "File name too long"),
        (["run", "--preset", "digit", "--out", out], "did you mean 'digits'"),
        (["run", "--out", out], "--preset", "holds no run"),
        (arguments(out, "train.stps=3"), "did you mean 'steps'"),
        (arguments(out, "train.steps=many"), "train.steps", "many", "whole number"),
        (arguments(out, "train.device=cuda"), "train.device", "no CUDA device"),
        (arguments(out, "schedule.name=offset:x"), "offset:x", "NUMBER"),
        (arguments(out, "schedule.name=nowhere.json"), "nowhere.json", "cannot be read"),
        (arguments(out, "schedule.baselines=cascad"), "cascad"),
        (arguments(out, "train.batch=2000"), "train.batch", "1500"),
        (arguments(out, "data.dataset=cifar10", f"data.root={tmp_path}"), "cifar10"),
        (arguments(out, "probe.budget=1e-6"), "probe.budget"),
        (arguments(out, "representations.names=texture,semntic"), "semntic", "did you mean 'semantic'"),
        (arguments(out, "representations.plugin=missing.py"), "missing.py"),
        (arguments(out, "model.classes=7"), "model.classes"),
        (arguments(out, "data.flip=true"), "data.flip", "no mirrored images"),
        (arguments(out, "representations.channels=5,8"), "representations.channels", "the encoders give 4,8"),
        (arguments(out, "probe.train_share=1"), "probe.train_share", "leaves nothing"),
        (arguments(out, "train.precision=fp8"), "train.precision", "needs a GPU"),
        (arguments(out, "sample.precision=fp8"), "sample.precision", "needs a GPU"),
        (arguments(out, "sample.cuda_graph=on"), "sample.cuda_graph", "needs a CUDA device"),
        (arguments(out, "train.cuda_graph=on", "train.device=cpu"), "train.cuda_graph", "needs a CUDA device"),
        (arguments(out, "train.optimizer=apex"), "train.optimizer", "NVIDIA apex"),
        (arguments(out, "model.attention=fa3"), "model.attention", "needs a CUDA device"),
        (arguments(out, "sample.count=1"), "sample.count", "at least 2"),
        (arguments(out, "evaluate.reference=a.npz"), "evaluate.reference", "data.dataset=latents"),
        (arguments(out, "sample.guidance=cfg", "model.label_dropout=0"), "sample.guidance", "label_dropout"),
        (arguments(out, "schedule.name=cascade", "schedule.baselines=learned", "probe.budget=1e-6"), "probe.budget"),
        ([*arguments(out, "probe.estimator=A", stage="probe"), "--oracle"], "--oracle", "use B, C or D"),
        (arguments(out, stage="sample"), "train first"),
        (arguments(out, stage="evaluate"), "train first"),
        (arguments(out, stage="report"), "--out", "no run to report on"),
        (["verify", out], str(out), "no such folder"),
    ]
    for case, *says in cases:
        refused(capsys, case, *says)
        assert not out.exists(), f"{case} left something behind"


def test_out_is_never_overwritten(run, tmp_path, capsys):
    refused(capsys, arguments(run, "train.lr=0.5"), "--out", "train.lr")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all my work")
    refused(capsys, arguments(tmp_path / "full"), "--out", "not empty")
    (tmp_path / "file").write_text("x")
    refused(capsys, arguments(tmp_path / "file"), "--out", "is a file")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "all my work"


def test_damage_is_named(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_bytes()
    refused(capsys, ["train", "--out", copy, "--set", "train.steps=5"], "train.steps", "at step 12 already")
    assert (copy / "config.yaml").read_bytes() == config
    evaluate = ["evaluate", "--out", copy, "--set", "evaluate.metrics=fid,precision_recall"]
    for name in ("samples/*/protocol.json", "samples/*/samples.npz", "prepared/reference-train-*.json"):
        for file in copy.glob(name):
            for figures in copy.glob("samples/*/figures-*"):  # known figures are not made again
                figures.unlink()
            content = file.read_bytes()
            file.write_bytes(b"[")
            refused(capsys, evaluate, str(file if "reference" in name else file.parent), "cannot be read")
            file.write_bytes(content)
    schedule = copy / "schedule.json"
    good = schedule.read_text()
    for text, says in (("{", "not JSON"), (good.replace('"semantic"', '"audio"'), "audio")):
        schedule.write_text(text)
        refused(capsys, ["train", "--out", copy], "schedule", says)
    schedule.write_text(json.dumps({"kind": "offset", "names": ["texture", "semantic"], "offsets": [0.5, 0.0]}))
    refused(capsys, ["train", "--out", copy, "--set", "train.steps=20"], "schedule")
    schedule.write_text(good)
    latents = next((copy / "prepared").glob("latents-semantic*"))
    content = bytearray(latents.read_bytes())
    content[-1] ^= 1
    latents.write_bytes(content)
    refused(capsys, ["sample", "--out", copy], latents.name)


def test_figures_of_other_samplers_stay(run, tmp_path, capsys):
    """Those of the same weights: of other steps and other guidance too."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = json.loads((copy / "figures.json").read_text())
    more = ["--set", "sample.steps=2", "--set", "sample.guidance=cfg"]
    assert main(["evaluate", "--out", str(copy), *more]) == 0
    assert main(["evaluate", "--out", str(copy), *more]) == 0  # once more: nothing twice
    after = json.loads((copy / "figures.json").read_text())
    assert after[:-1] == before
    assert after[-1]["protocol"]["guidance"].startswith("cfg")
    assert main(["report", "--out", str(copy)]) == 0
    assert "4, cfg 1.5 in [0, 1]" in capsys.readouterr().out
    for figures in copy.glob("samples/*/figures-*"):
        figures.write_text("{")
    refused(capsys, ["evaluate", "--out", copy], "figures-", "remove this file")


def test_two_processes_do_not_sample_into_one_folder(run, tmp_path, capsys, monkeypatch):
    """The second would join parts that the first one is removing."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    done = next(copy.glob("samples/*/samples.npz"))
    before = done.read_bytes()
    done.unlink()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(done.parent / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        refused(capsys, ["sample", "--out", copy], done.parent.name, "another process is sampling here: wait for it")
        assert not done.exists()
        holder.kill()
    assert main(["sample", "--out", str(copy)]) == 0
    assert done.read_bytes() == before


def test_a_refused_setting_is_not_kept(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_bytes()
    garbage = tmp_path / "weak.pt"
    garbage.write_bytes(b"no weights")
    for weak in (tmp_path, garbage):
        more = ["--set", "sample.guidance=autoguidance", "--set", f"sample.weak_checkpoint={weak}"]
        refused(capsys, ["sample", "--out", copy, *more], str(weak))
        assert (copy / "config.yaml").read_bytes() == config


def test_a_schedule_file_may_go_but_not_change(tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "schedule.json"
    content = {"kind": "offset", "names": ["texture", "semantic"], "offsets": [0.3, 0.0]}
    file.write_text(json.dumps(content))
    assert main(arguments(out, f"schedule.name={file}", "schedule.baselines=", stage="train")) == 0
    file.write_text(json.dumps({**content, "offsets": [0.9, 0.0]}))
    refused(capsys, ["train", "--out", out, "--set", "train.steps=14"], str(file), "another schedule")
    file.unlink()
    assert main(["train", "--out", str(out), "--set", "train.steps=14"]) == 0
    assert main(["report", "--out", str(out)]) == 0


def test_latents_of_another_encoder_are_refused(run, tmp_path, capsys):
    other, copy = tmp_path / "other", tmp_path / "copy"
    assert main(arguments(other, "data.seed=7", "schedule.name=synchronous", stage="train")) == 0
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "prepared")
    config = (copy / "config.yaml").read_text()
    shutil.copytree(other / "prepared", copy / "prepared")
    (copy / "config.yaml").write_text(config.replace("seed: 0, flip", "seed: 7, flip"))
    assert (copy / "config.yaml").read_text() != config
    refused(capsys, ["sample", "--out", copy], "statistics")
    weak = ["--set", "sample.guidance=autoguidance", "--set", f"sample.weak_checkpoint={run}"]
    refused(capsys, ["sample", "--out", other, *weak], "sample.weak_checkpoint", "other latents")


def test_imported_weights_are_sampled_without_training(run, tmp_path, capsys):
    """The network that a run trained, out in the published layout and in again: the same samples."""
    published, out = tmp_path / "published.pt", tmp_path / "out"
    assert main(["convert", str(run), str(published)]) == 0
    options = arguments(out, "schedule.name=learned", stage="convert")[5:]
    convert = ["convert", str(published), str(out), "--to", "ours", "--preset", "digits", *options]
    assert main(convert) == 0
    refused(capsys, ["sample", "--out", out], "schedule.name", "fastasync probe")
    shutil.rmtree(out)
    schedule = f"schedule.name={run / 'schedule.json'}"
    assert main([*convert, "--set", schedule]) == 0
    shutil.copytree(run / "prepared", out / "prepared")
    assert main(["evaluate", "--out", str(out), "--set", "sample.steps=2"]) == 0
    assert "cannot be checked" in capsys.readouterr().out
    (figure,) = json.loads((out / "figures.json").read_text())
    assert figure["protocol"]["checkpoint_step"] == 0
    assert figure["value"] == json.loads((run / "figures.json").read_text())[0]["value"]
    (before,) = out.glob("samples/*")
    (original,) = run.glob("samples/heun-2-*")
    with np.load(before / "samples.npz") as ours, np.load(original / "samples.npz") as theirs:
        assert np.array_equal(ours["arr_0"], theirs["arr_0"])
    shutil.copyfile(run / "checkpoints" / "step_00000012" / "model.safetensors", out / "start.safetensors")
    assert main(["sample", "--out", str(out)]) == 0
    assert len(list(out.glob("samples/*"))) == 2, "other weights, other samples"
    assert main(["report", "--out", str(out)]) == 0
    assert main(["train", "--out", str(out)]) == 0
    assert main(["sample", "--out", str(out)]) == 0
    steps = {json.loads((folder / "protocol.json").read_text())["checkpoint_step"] for folder in out.glob("samples/*")}
    assert steps == {0, 12}
    assert before.is_dir()


def test_damaged_checkpoint_falls_back_and_says_so(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000012" / "ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    assert main(["train", "--out", str(copy)]) == 0
    assert "step_00000012" in capsys.readouterr().err
    newest.write_bytes(newest.read_bytes()[:-10])
    assert main(["sample", "--out", str(copy)]) == 0
    assert f"skipped checkpoint {newest.parent}" in capsys.readouterr().out


def test_a_missing_package_is_named_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    refused(capsys, arguments(tmp_path / "out", "evaluate.metrics=fid,kid"), "torch_fidelity", "fastasync[fid]")
    assert not (tmp_path / "out").exists()


def test_an_error_of_verify_is_said_once(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "".join(capsys.readouterr()).count("no such folder") == 1


def test_a_report_makes_no_baseline(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert main(["report", "--out", str(copy), "--set", "schedule.baselines=synchronous,cascade"]) == 0
    assert [path.name for path in (copy / "baselines").iterdir()] == ["synchronous"]
    assert "cascade" in (copy / "report.html").read_text()
    refused(capsys, ["report", "--out", copy, "--set", "schedule.baselines=cascad"], "cascad")


def test_a_reader_that_leaves_early_is_no_error():
    for unbuffered in ("", "1"):
        process = subprocess.Popen(
            [sys.executable, "-m", "fastasync", "presets"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
        process.stdout.close()  # what `head` does once it has seen enough
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("fastasync.stages.prepare_stage", full)
    refused(capsys, arguments(tmp_path / "out"), "out of memory", "train.accumulate")

    def full_cpu(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("fastasync.stages.prepare_stage", full_cpu)
    refused(capsys, arguments(tmp_path / "out"), "out of memory", "sample.batch")


def test_deepspeed_may_start_every_command(capsys):
    """``deepspeed --module fastasync COMMAND`` puts an option of its own before the command."""
    for option in ("--local_rank=1", "--local-rank=1"):
        assert main([option, "presets"]) == 0
        assert "imagenet256-xl " in capsys.readouterr().out


def test_a_baseline_with_the_runs_schedule_is_not_trained_again(tmp_path, capsys):
    out = tmp_path / "run"
    settings = ("schedule.name=synchronous", "schedule.baselines=offset:0,offset:0.3")
    assert main(arguments(out, *settings)) == 0
    said = capsys.readouterr().out
    assert "offset:0 is the schedule of synchronous: its network serves both" in said
    assert "note: offset:0 is the schedule of synchronous: one network serves both" in said
    assert not (out / "baselines/offset-0/checkpoints").exists()
    assert (out / "baselines/offset-0.3/checkpoints").exists()
    cells = [line.replace("*", "").split()[:3] for line in said.splitlines()]
    figures = {tuple(c[:2]): c[2] for c in cells if len(c) == 3 and c[1] in ("4", "6")}
    for evaluations in ("4", "6"):
        assert figures["offset:0", evaluations] == figures["synchronous", evaluations]
        assert figures["offset:0.3", evaluations] != figures["synchronous", evaluations]
    assert "offset:0 is the schedule of synchronous" in (out / "report.html").read_text()
