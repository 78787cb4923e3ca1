"""A run that was stopped and resumed ends, bit for bit, where an uninterrupted one does."""

import json
import os
import signal

import pytest
import torch

from fastasync.errors import UserError
from fastasync.schedule import named_schedule
from fastasync.training import EXIT_CODE, Interrupted, load_model
from fastasync.training.checkpoint import newest, read_state

TIMING = ("images_per_second", "data_share", "mfu", "memory_gib")


def outcome(out):
    """Hashes of the last checkpoint's tensors, its state without the configuration, and the metrics without timings."""
    path = newest(out / "checkpoints").path
    files = json.loads((path / "manifest.json").read_text())["files"]
    hashes = {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}
    state = read_state(path)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in record.items() if key not in TIMING} for record in records]
    return hashes, (state.step, state.position, state.tally, state.random, state.schedule), metrics


def stop_at(step, number=signal.SIGTERM, times=1):
    def event(now):
        if now == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return event


@pytest.mark.parametrize("stop", range(6))
def test_stopped_at_any_step_and_resumed_is_bitwise_the_same(tmp_path, tiny, run, latents, disturbed, stop):
    config = tiny(train=dict(log_every=4), data=dict(flip=True))
    data = latents(mirror=True)
    run(config, tmp_path / "whole", data)
    number = signal.SIGTERM if stop % 2 else signal.SIGINT
    with pytest.raises(Interrupted) as caught:
        run(config, tmp_path / "parts", disturbed(data, stop_at(stop, number)))
    assert caught.value.code == EXIT_CODE == 75
    assert caught.value.step == stop + 1
    assert read_state(caught.value.checkpoint).step == stop + 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    result = run(config, tmp_path / "parts", data)
    assert (result.resumed_from, result.step) == (stop + 1, 6)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_many_stops_global_generators_and_more_steps(tmp_path, tiny, run, latents, disturbed):
    """Stopped at every step; train.steps raised on the way; the global generators are restored too."""
    config = tiny(train=dict(log_every=1))
    run(config, tmp_path / "whole")
    for step in range(6):
        torch.rand(3)  # another process would be in another state
        with pytest.raises(Interrupted):
            run(config, tmp_path / "parts", disturbed(latents(), stop_at(step), first=step))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_longer_run_continues_where_it_ended(tmp_path, tiny, run):
    run(tiny(), tmp_path / "parts")
    result = run(tiny(train=dict(steps=10)), tmp_path / "parts")
    run(tiny(train=dict(steps=10)), tmp_path / "whole")
    assert (result.resumed_from, result.step) == (6, 10)
    assert outcome(tmp_path / "parts")[0] == outcome(tmp_path / "whole")[0]
    again = run(tiny(train=dict(steps=10)), tmp_path / "parts")
    assert (again.resumed_from, again.record) == (10, None)
    with pytest.raises(UserError, match=r"train.steps: 8: the run is at step 10"):
        run(tiny(train=dict(steps=8)), tmp_path / "parts")


def test_second_interrupt_stops_at_once(tmp_path, tiny, run, latents, disturbed):
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path, disturbed(latents(), stop_at(3, signal.SIGINT, times=2)))
    assert newest(tmp_path / "checkpoints").path is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_metrics_hold_each_step_once(tmp_path, tiny, run, latents, disturbed):
    """Killed after step 6 was logged, the newest checkpoint at 4: step 6 is logged once; a torn line is dropped."""
    config = tiny(train=dict(steps=8))
    run(config, tmp_path / "whole")

    def crash(step):
        if step == 7:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(config, tmp_path / "parts", disturbed(latents(), crash))
    metrics = tmp_path / "parts" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [2, 4, 6]
    with metrics.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert run(config, tmp_path / "parts").resumed_from == 4
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [2, 4, 6, 8]
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoints_do_not_stand_for_complete_ones(tmp_path, tiny, run, latents, disturbed, keep):
    """Resumed from step 2, stopped at 3: what was saved at 3 is kept, whatever lies damaged at 4 and 6."""
    config = tiny(train=dict(steps=6, checkpoint_every=2, keep_checkpoints=3))
    run(config, tmp_path)
    for step in (4, 6):
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "ema.safetensors").write_bytes(b"")
    config = tiny(train=dict(steps=6, checkpoint_every=2, keep_checkpoints=keep))
    with pytest.raises(Interrupted) as caught:
        run(config, tmp_path, disturbed(latents(), stop_at(2), first=2))
    assert read_state(caught.value.checkpoint).step == 3
    assert newest(tmp_path / "checkpoints").path == caught.value.checkpoint
    result = run(config, tmp_path)
    assert (result.resumed_from, result.step) == (3, 6)


@pytest.mark.parametrize(
    "damage",
    [
        "flipped byte",
        "truncated",
        "longer",
        "missing file",
        "no manifest",
        "cut manifest",
        "empty manifest",
        "not a manifest",
        "renamed",
    ],
)
def test_damaged_checkpoint_is_skipped_and_named(tmp_path, tiny, run, damage):
    config = tiny(train=dict(steps=6, checkpoint_every=2, keep_checkpoints=3))
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts")
    last = tmp_path / "parts" / "checkpoints" / "step_00000006"
    weights, manifest = last / "ema.safetensors", last / "manifest.json"
    if damage == "flipped byte":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        reason = "ema.safetensors was altered"
    elif damage == "truncated":
        os.truncate(last / "optimizer.safetensors", 100)
        reason = "optimizer.safetensors has 100 bytes instead of"
    elif damage == "longer":
        with (last / "state.json").open("a") as stream:
            stream.write(" ")
        reason = "state.json has"
    elif damage == "missing file":
        (last / "model.safetensors").unlink()
        reason = "model.safetensors is missing"
    elif damage == "no manifest":
        manifest.unlink()
        reason = "manifest.json is missing"
    elif damage == "cut manifest":
        os.truncate(manifest, 40)
        reason = "manifest.json cannot be read"
    elif damage == "empty manifest":
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**content, "files": {}}))
        reason = "state.json is not in manifest.json"
    elif damage == "not a manifest":
        manifest.write_text("[1, 2]")
        reason = "manifest.json cannot be read"
    else:
        last = last.rename(last.with_name("step_00000009"))
        reason = "holds step 6"
    said = []
    result = run(config, tmp_path / "parts", say=said.append)
    assert result.resumed_from == 4
    assert said[0].startswith(f"skipped checkpoint {last}: {reason}"), said
    assert said == result.messages
    if damage != "renamed":  # its folder is not step 6's, so it stays
        assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_resume_goes_by_step_not_by_date_or_size(tmp_path, tiny, run):
    config = tiny(train=dict(checkpoint_every=2, keep_checkpoints=9))
    run(config, tmp_path)
    old = tmp_path / "checkpoints" / "step_00000002"
    os.utime(old, (4e9, 4e9))
    (old / "notes.txt").write_text("x" * 100_000)
    assert newest(tmp_path / "checkpoints").path.name == "step_00000006"


def test_all_damaged_is_an_error_not_a_new_start(tmp_path, tiny, run):
    run(tiny(), tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is complete: restore one, or remove this folder to start over"):
        run(tiny(), tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_another_run_is_refused(tmp_path, tiny, run):
    run(tiny(), tmp_path)
    before = outcome(tmp_path)
    longer = tiny(train=dict(steps=8))
    changed = tiny(train=dict(steps=8, lr=0.5, batch=4), model=dict(depth=2))
    with pytest.raises(UserError) as caught:
        run(changed, tmp_path)
    for name in ("model.depth = 1 (now 2)", "train.batch = 8 (now 4)", "train.lr = 0.001 (now 0.5)", "step_00000006"):
        assert name in str(caught.value)
    assert "train.steps" not in str(caught.value)
    with pytest.raises(UserError, match="statistics statistics-1, these have other"):
        run(longer, tmp_path, statistics_fingerprint="other")
    other = named_schedule("offset:0.4", longer.representations.names, longer.representations.roles)
    with pytest.raises(UserError, match="was trained on another offset schedule"):
        run(longer, tmp_path, schedule=other)
    assert outcome(tmp_path) == before


def test_what_may_change_does(tmp_path, tiny, run):
    run(tiny(), tmp_path)
    other = tiny(
        train=dict(steps=8, log_every=1, checkpoint_every=1, keep_checkpoints=1, milestone_every=6, accumulate=2),
        sample=dict(count=7),
        evaluate=dict(split="test"),
    )
    assert run(other, tmp_path).step == 8
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]


def test_loaded_model_is_the_trained_one(tmp_path, tiny, run):
    config = tiny(schedule=dict(name="offset:0.3"))
    result = run(config, tmp_path)
    loaded, raw = load_model(tmp_path), load_model(result.checkpoint, ema=False)
    assert (loaded.info.step, loaded.info.statistics) == (6, "statistics-1")
    assert (loaded.config, loaded.schedule.to_json()) == (config, raw.schedule.to_json())
    assert not loaded.model.training
    x, tau, y = torch.randn(5, 4, 2, 2), torch.rand(5, 2), torch.arange(5) % 4
    assert not torch.equal(loaded.model(x, tau, y), raw.model(x, tau, y))
    names = dict(loaded.model.named_parameters())
    assert any(not torch.equal(p, names[name]) for name, p in raw.model.named_parameters())
    assert all(torch.equal(p, loaded.model.get_buffer(name)) for name, p in raw.model.named_buffers())
