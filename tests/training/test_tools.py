"""convert and verify: the published layout out and in, and what is wrong with a checkpoint."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastasync.config import apply_settings
from fastasync.errors import UserError
from fastasync.files import sha256_file
from fastasync.model import load_into
from fastasync.presets import preset
from fastasync.probe.network import build_probe, train_surface_probe
from fastasync.run import Run, existing_config
from fastasync.training import build_model, load_model, tools
from fastasync.training.checkpoint import read_tensors, stream_tensors


def command(line):
    """Parsed as the command line does it."""
    top = argparse.ArgumentParser()
    tools.add_parser(top.add_subparsers(dest="command"))
    return top.parse_args([str(part) for part in line])


def test_streamed_files_are_safetensors(tmp_path):
    first, later = {"a/step": torch.tensor(3.0)}, {"b": torch.randn(3, 5), "c": torch.randn(0, 2), "d": torch.randn(7)}
    shapes = {name: value.shape for name, value in later.items()}
    stream_tensors(tmp_path / "x.safetensors", first, shapes, iter(later.items()))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == {*first, *later}
    assert all(torch.equal(found[name], value) for name, value in {**first, **later}.items())
    with read_tensors(tmp_path / "x.safetensors") as read:
        assert torch.equal(read("b"), later["b"])
        assert read("e", missing=None) is None
        with pytest.raises(UserError, match="holds no e: it is of another network"):
            read("e")
    with pytest.raises(ValueError, match="b has shape"):
        stream_tensors(tmp_path / "y.safetensors", first, shapes, iter([("b", torch.zeros(2))]))


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_export_loads_strictly(tmp_path, tiny, run, weights, capsys):
    config = tiny()
    run(config, tmp_path / "run")
    args = command(["convert", tmp_path / "run", tmp_path / "out.pt", "--weights", weights])
    assert tools.convert_command(args) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out.pt")
    assert said.err.strip() == f"{'EMA' if weights == 'ema' else 'raw'} weights of step {config.train.steps}"
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(content) == ["ema"]
    model = build_model(config)
    load_into(model, content["ema"])
    source = load_model(tmp_path / "run", ema=weights == "ema").model.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())


def test_a_damaged_checkpoint_that_is_passed_over_is_said(tmp_path, tiny, run, capsys):
    run(tiny(), tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    with open(newest / "ema.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    assert tools.convert_command(command(["convert", tmp_path / "run", tmp_path / "out.pt"])) == 0
    assert capsys.readouterr().err.startswith(f"skipped checkpoint {newest}: ema.safetensors was altered")
    with pytest.raises(UserError, match="damaged"):
        tools.convert_command(command(["convert", newest, tmp_path / "other.pt"]))
    content = (tmp_path / "out.pt").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        tools.convert_command(command(["convert", tmp_path / "run", tmp_path / "out.pt"]))
    assert (tmp_path / "out.pt").read_bytes() == content


def test_a_run_starts_from_published_weights(tmp_path, tiny, run):
    """Imported, the first loss is that of those weights, and the average starts from them too."""
    config = tiny(train=dict(steps=1, log_every=1, lr=0.0))
    torch.manual_seed(7)
    other = build_model(config)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = {f"module._orig_mod.{name}": value for name, value in other.state_dict().items()}
    torch.save({"ema": state, "model": {name: 2 * value for name, value in state.items()}}, tmp_path / "theirs.pt")
    Run(tmp_path / "run", config).create()
    tools.convert_command(command(["convert", tmp_path / "theirs.pt", tmp_path / "run", "--to", "ours"]))
    said = []
    result = run(config, tmp_path / "run", say=said.append)
    assert said[0] == f"a new run, from the weights in {tmp_path / 'run' / 'start.safetensors'}"
    for file in ("model", "ema"):
        found = load_file(result.checkpoint / f"{file}.safetensors")
        assert all(torch.equal(value, found[name]) for name, value in other.state_dict().items())
    with pytest.raises(UserError, match="this run has checkpoints"):
        tools.convert_command(command(["convert", tmp_path / "theirs.pt", tmp_path / "run", "--to", "ours"]))


@pytest.mark.parametrize("repa", [0, 16])
def test_a_run_starts_from_its_probes_weights(tmp_path, tiny, latents, repa):
    """Of a probe as large as the network, which knows no REPA: its projector is new."""
    config = tiny(probe=dict(depth=2, width=16, heads=2, batch=4, lr=0.01))
    probe = build_probe(config, "cpu")
    train_surface_probe(probe, config, latents(), 3, "cpu", progress=False)
    errors = {"errors.tau": torch.rand(5, 2), "errors.errors": torch.rand(5, 2)}
    save_file({**probe.state_dict(), **errors}, tmp_path / "network.safetensors")
    given = tiny(model=dict(depth=2, repa_width=repa), objective=dict(repa_weight=0.5 if repa else 0.0))
    Run(tmp_path / "run", given).create()
    tools.convert_command(command(["convert", tmp_path / "network.safetensors", tmp_path / "run", "--to", "ours"]))
    found = load_file(tmp_path / "run" / "start.safetensors")
    torch.manual_seed(given.data.seed)
    fresh = build_model(given).state_dict()
    trained = probe.state_dict()
    assert found.keys() == fresh.keys()
    assert (found.keys() == trained.keys()) == (not repa)
    assert all(torch.equal(value, trained.get(name, fresh[name])) for name, value in found.items())
    Run(tmp_path / "wide", tiny(model=dict(width=32))).create()
    with pytest.raises(UserError, match=r"another shape than the run's network: .* probe.depth, probe.width"):
        tools.convert_command(command(["convert", tmp_path / "network.safetensors", tmp_path / "wide", "--to", "ours"]))


def test_a_new_run_of_published_weights_takes_settings(tmp_path, tiny):
    sizes = ["model.depth=1", "model.width=16", "model.heads=2", "representations.grid=2", "train.lr=0.5"]
    settings = [part for setting in sizes for part in ("--set", setting)]
    model = build_model(apply_settings(preset("digits"), sizes))
    torch.save(tools.export_state(model), tmp_path / "theirs.pt")
    line = ["convert", tmp_path / "theirs.pt", tmp_path / "run", "--to", "ours"]
    tools.convert_command(command([*line, "--preset", "digits", *settings]))
    config = existing_config(tmp_path / "run")
    assert (config.preset, config.model.width, config.train.lr) == ("digits", 16, 0.5)
    found = load_file(tmp_path / "run" / "start.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    tools.convert_command(command([*line, "--set", "train.steps=7"]))  # again: what may change within a run may change
    assert existing_config(tmp_path / "run").train.steps == 7
    for options, says in (
        (["--set", "train.lr=0.1"], "other settings"),
        (["--preset", "digits"], "another architecture"),
        (["--set", "train.stps=1"], "did you mean 'steps'"),
    ):
        with pytest.raises(UserError, match=says):
            tools.convert_command(command([*line, *options]))
    for options in (["--preset", "digits"], ["--set", "train.lr=0.1"]):
        with pytest.raises(UserError, match=f"{options[0]}: {options[1]}: goes with --to ours"):
            tools.convert_command(command(["convert", tmp_path / "run", tmp_path / "out.pt", *options]))


def test_a_run_that_was_begun_takes_published_weights_by_its_preset_too(tmp_path):
    """Though its preset sets a field since then that it does not have."""
    small = ["model.size=custom", "model.depth=1", "model.width=16", "model.heads=2", "representations.grid=2"]
    small += ["model.repa_width=0", "objective.repa_weight=0"]
    begun = apply_settings(preset("imagenet256-b"), [*small, "train.max_norm_ratio=0"])
    Run(tmp_path / "run", begun).create()
    torch.save(tools.export_state(build_model(begun)), tmp_path / "theirs.pt")
    settings = [part for setting in small for part in ("--set", setting)]
    line = ["convert", tmp_path / "theirs.pt", tmp_path / "run", "--to", "ours", "--preset", "imagenet256-b"]
    tools.convert_command(command([*line, *settings]))
    assert existing_config(tmp_path / "run") == begun


def test_what_cannot_be_converted(tmp_path, tiny, run):
    with pytest.raises(UserError, match="holds no run: give --preset"):
        tools.convert_command(command(["convert", tmp_path / "x.pt", tmp_path / "run", "--to", "ours"]))
    run(tiny(), tmp_path / "run")
    with pytest.raises(UserError, match="is a folder"):
        tools.convert_command(command(["convert", tmp_path / "run", tmp_path]))
    Run(tmp_path / "wide", tiny(model=dict(width=32))).create()
    torch.save(tools.export_state(build_model(tiny())), tmp_path / "narrow.pt")
    with pytest.raises(UserError, match="weights of another architecture"):
        tools.convert_command(command(["convert", tmp_path / "narrow.pt", tmp_path / "wide", "--to", "ours"]))
    assert not (tmp_path / "wide" / "start.safetensors").exists()
    fresh = tmp_path / "fresh"
    with pytest.raises(UserError, match="weights of another architecture"):
        tools.convert_command(command(["convert", tmp_path / "narrow.pt", fresh, "--to", "ours", "--preset", "digits"]))
    assert not fresh.exists()


def test_verify(tmp_path, tiny, run, capsys):
    result = run(tiny(), tmp_path)
    assert tools.verify_command(command(["verify", tmp_path])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines] == ["step 4", "step 6"]
    assert all(line.endswith("complete") for line in lines)

    def rewrite(change):
        """A damaged file whose hash is right: what a hash cannot see."""
        path = result.checkpoint / "ema.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        manifest = json.loads((result.checkpoint / "manifest.json").read_text())
        manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        (result.checkpoint / "manifest.json").write_text(json.dumps(manifest))

    rewrite(lambda tensors: tensors["pos_embed"].flatten()[:1].fill_(torch.nan))
    with pytest.raises(UserError, match=r"ema.safetensors: pos_embed holds numbers that are not finite"):
        tools.verify_command(command(["verify", result.checkpoint]))
    rewrite(lambda tensors: tensors.update(pos_embed=torch.zeros(2)))
    with pytest.raises(UserError, match=r"pos_embed has shape \[2\], not \[1, 4, 16\]"):
        tools.verify_command(command(["verify", tmp_path]))
    assert "step_00000004: step 4" in capsys.readouterr().out  # the others are still looked at
    rewrite(lambda tensors: tensors.pop("pos_embed"))
    with pytest.raises(UserError, match=r"ema.safetensors is of another network: pos_embed differ"):
        tools.verify_command(command(["verify", result.checkpoint]))
    for step in (4, 6):
        with open(tmp_path / "checkpoints" / f"step_{step:08d}" / "ema.safetensors", "ab") as stream:
            stream.write(b"x")
    with pytest.raises(UserError, match=r"manifest.json: is a file: give a run, its checkpoints, or one of them"):
        tools.verify_command(command(["verify", result.checkpoint / "manifest.json"]))
    with pytest.raises(UserError, match=r"step_00000006: damaged: ema.safetensors has"):
        tools.verify_command(command(["verify", result.checkpoint]))
    assert capsys.readouterr().out == ""  # whoever catches the error says it
    with pytest.raises(UserError, match=r"step_00000006: damaged"):
        tools.verify_command(command(["verify", tmp_path]))
    assert "step_00000004: damaged: ema.safetensors has" in capsys.readouterr().out
