"""Checkpoints as directories: what is kept, full disks, verification, one process at a time."""

import errno
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from fastasync import __version__
from fastasync.errors import UserError
from fastasync.evaluation.protocol import library_versions
from fastasync.training import checkpoint, engine, load_model, verify


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "milestone", "kept"),
    [(1, 0, [10]), (3, 0, [6, 8, 10]), (1, 4, [4, 8, 10]), (2, 3, [3, 6, 9, 10]), (99, 0, [2, 4, 6, 8, 10])],
)
def test_the_last_ones_and_milestones_are_kept(tmp_path, tiny, run, keep, milestone, kept):
    run(tiny(train=dict(steps=10, checkpoint_every=2, keep_checkpoints=keep, milestone_every=milestone)), tmp_path)
    assert names(tmp_path) == [f"step_{step:08d}" for step in kept]


def test_leftovers_of_killed_processes_are_removed(tmp_path, tiny, run):
    root = tmp_path / "checkpoints"
    for name in ("step_00000005.part", "step_00000001.old"):
        (root / name).mkdir(parents=True)
        (root / name / "model.safetensors").write_text("x")
    assert checkpoint.newest(root) == (None, [])
    assert run(tiny(), tmp_path).resumed_from == 0
    assert names(tmp_path) == ["step_00000004", "step_00000006"]


def test_a_checkpoint_is_readable_by_others(tmp_path, tiny, run):
    path = run(tiny(), tmp_path).checkpoint
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in path.iterdir())
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["position"], state["statistics"]) == (6, 6, "statistics-1")
    assert state["versions"]["torch"] == torch.__version__
    assert state["versions"]["fastasync"] == __version__
    for package in ("triton", "deepspeed"):
        if importlib.util.find_spec(package):
            found = importlib.metadata.version(package)
            assert (state["versions"][package], library_versions()[package]) == (found, found)
    assert state["schedule"]["kind"] == "offset"
    assert set(state["random"]) >= {"python", "numpy", "torch"}


def test_random_state_round_trip():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1), np.random.randn()  # noqa: NPY002

    draw()
    state = json.loads(json.dumps(checkpoint.random_state()))
    first = draw()
    draw()
    checkpoint.restore_random(state)
    assert draw() == first


def test_files_reach_the_disk_before_the_name_does(tmp_path, tiny, run, monkeypatch):
    """Every file and the folder are fsynced under the temporary name, the manifest last; then the rename, then the
    parent.  What is removed loses its name first."""
    events = []
    fsync, rename, rmtree = checkpoint._fsync, os.rename, checkpoint.shutil.rmtree
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: (events.append(("fsync", path)), fsync(path)))
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: (events.append(("rename", b)), rename(a, b)))
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda path, **options: (events.append(("rmtree", path)), rmtree(path, **options))
    )
    final = run(tiny(train=dict(keep_checkpoints=1)), tmp_path).checkpoint
    part = final.with_name(final.name + ".part")
    renamed = events.index(("rename", final))
    synced = [path for name, path in events[:renamed] if name == "fsync" and part in (path, path.parent)]
    assert {path.name for path in synced[:-2]} == {path.name for path in final.iterdir()} - {"manifest.json"}
    assert synced[-2:] == [part / "manifest.json", part]
    assert events[renamed + 1] == ("fsync", final.parent)
    removed = [path for name, path in events if name == "rmtree"]
    assert all(path.suffix in (".part", ".old") for path in removed)
    assert final.with_name("step_00000004.old") in removed


# --- a full disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB (needs root and the right to mount)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        not hasattr(os, "geteuid")
        or os.geteuid()
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    try:
        with (folder / "ballast").open("wb", buffering=0) as stream:
            while stream.write(b"x" * 4096) == 4096:
                pass
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017 - the point of it


@pytest.mark.parametrize("log_every", [1, 100])
def test_full_disk(tmp_path, small_disk, tiny, run, latents, disturbed, log_every):
    """It fills up at step 6, in the log or in the next checkpoint: one clear line, and the one of step 4 goes on."""
    config, out = tiny(train=dict(steps=12, log_every=log_every)), small_disk / "run"
    data = disturbed(latents(), lambda step: fill(small_disk) if step == 6 else None)
    with pytest.raises(UserError, match=r"(?i)no space left") as caught:
        run(config, out, data)
    assert "metrics.jsonl" in str(caught.value) or "the last good checkpoint is" in str(caught.value)
    assert names(out) == ["step_00000004"]
    assert verify(out / "checkpoints" / "step_00000004") == 4
    with pytest.raises(UserError, match=r"(?i)no space left"):  # still full
        run(config, out)
    assert names(out) == ["step_00000004"]
    (small_disk / "ballast").unlink()
    assert run(config, out).resumed_from == 4
    run(config, tmp_path / "whole")
    manifests = [
        json.loads((folder / "checkpoints/step_00000012/manifest.json").read_text())
        for folder in (out, tmp_path / "whole")
    ]
    assert manifests[0]["files"]["model.safetensors"] == manifests[1]["files"]["model.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_failing_disk(tmp_path, tiny, run, latents, disturbed, monkeypatch, number, call):
    """Every error while saving leaves the last checkpoint and no part, and is one line that names it."""

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    def event(step):
        if step == 6:
            target, name = {
                "fsync": (checkpoint, "_fsync"),
                "rename": (checkpoint.os, "rename"),
                "write": (engine, "save_tensors"),
            }[call]
            monkeypatch.setattr(target, name, fail)

    what = "no space left on the device" if number in (errno.ENOSPC, errno.EDQUOT) else os.strerror(number)
    good = tmp_path / "checkpoints" / "step_00000004"
    with pytest.raises(UserError, match=f"{what}.*the last good checkpoint is {good}"):
        run(tiny(train=dict(steps=12, log_every=100)), tmp_path, disturbed(latents(), event))
    assert names(tmp_path) == ["step_00000004"]
    assert checkpoint.newest(tmp_path / "checkpoints") == (good, [])


# --- verification and loading -----------------------------------------------------------------------------------


def test_verify_reads_no_tensor(tmp_path, tiny, run, monkeypatch):
    path = run(tiny(), tmp_path).checkpoint
    monkeypatch.setattr(checkpoint, "load_file", None)
    assert verify(path) == 6
    with (path / "optimizer.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 128]))
    with pytest.raises(UserError, match=r"damaged: optimizer.safetensors was altered .*; use another one"):
        verify(path)
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nothing")


def test_loading_what_is_not_there(tmp_path, tiny, run):
    with pytest.raises(UserError, match=r"none in .*: train first, or give another path"):
        load_model(tmp_path)
    path = run(tiny(), tmp_path).checkpoint
    assert load_model(tmp_path / "checkpoints").info.step == 6
    (path / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"ema.safetensors has 0 bytes"):
        load_model(path)
    assert load_model(tmp_path).info.step == 4  # the newest complete one


def test_checkpoint_of_another_architecture(tmp_path, tiny, run):
    """A state.json that names another model, with a manifest that agrees."""
    path = run(tiny(), tmp_path).checkpoint
    state = json.loads((path / "state.json").read_text())
    state["config"]["model"]["depth"] = 2
    (path / "state.json").write_text(json.dumps(state))
    checkpoint._write_manifest(path, 6)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"].pop("manifest.json", None)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"of another architecture: blocks.1.adaLN_modulation.1.bias, .* differ"):
        load_model(path)


def test_two_processes_do_not_share_a_run(tmp_path, tiny, run):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, sys; f = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="another process is training here"):
            run(tiny(), tmp_path)
        assert not (tmp_path / "checkpoints").exists()
    finally:
        holder.kill()  # the lock ends with its process, however it ends
        holder.wait()
    assert run(tiny(), tmp_path).step == 6


def test_out_that_is_a_file(tmp_path, tiny, run):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="choose a folder that can be written to"):
        run(tiny(), tmp_path / "run")
