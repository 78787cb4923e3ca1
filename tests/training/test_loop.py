"""The loop: what it learns, what it refuses, and when it stops."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file

from fastasync.data import LatentSet
from fastasync.errors import UserError
from fastasync.training import PlainEngine, TrainingError, build_model, engine
from fastasync.training.checkpoint import newest, read_state
from fastasync.training.engine import split_positions
from fastasync.training.loop import learning_rate


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def gaussian_optimum(mean, std):
    """Smallest E ||v - u||^2 of z ~ N(mean, std^2) per number, averaged over logit-normal times."""
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    tau = torch.sigmoid(torch.special.ndtri(u))
    variance = tau.square() * std**2 + (1 - tau).square()
    return float((1 + std**2 - (std**2 * tau - (1 - tau)).square() / variance).mean())


def test_loss_falls_to_the_gaussian_optimum(tmp_path, tiny, run):
    """Independent normals: the corrected loss starts at sum lam_k (1 + E z^2), since the network is zero at first, and
    falls to the optimum, which no schedule changes."""
    mean = torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None, None]
    z = mean + 0.5 * torch.randn(1024, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    data = LatentSet(z, torch.zeros(1024, dtype=torch.int64), 3)
    train = dict(steps=200, batch=128, log_every=1, lr=5e-3, checkpoint_every=200)
    config = tiny(train=train, objective=dict(loss_weights=[0.75, 0.25]))
    run(config, tmp_path, data)
    first, *_, last = records(tmp_path)
    assert first["loss"] == pytest.approx(1.25 + 0.75 * 1 + 0.25 * (0.25 + 4) / 2, rel=0.1)
    assert first["lr"] == pytest.approx(5e-3 / 3)
    assert (last["lr"], last["skipped"], last["mfu"]) == (5e-3, 0, None)
    late = records(tmp_path)[-50:]
    best = gaussian_optimum(mean, 0.5)
    assert 0.97 * best < sum(record["loss"] for record in late) / 50 < 1.15 * best
    assert all(record["images_per_second"] > 0 and 0 < record["memory_gib"] < 64 for record in late)
    assert all(0 < record["data_share"] < 1 for record in late)


def test_three_representations(tmp_path, tiny, run):
    names, roles = ["texture", "lowfreq", "semantic"], ["lags", "free", "leads"]
    config = tiny(representations=dict(names=names, channels=[2, 1, 1], roles=roles), objective=dict(mode="corrected"))
    run(config, tmp_path)
    assert [key for key in records(tmp_path)[0] if key.startswith("loss/")] == [f"loss/{name}" for name in names]


def test_records_are_means_over_the_steps_between(tmp_path, tiny, run):
    run(tiny(train=dict(log_every=1)), tmp_path / "each")
    run(tiny(train=dict(log_every=3)), tmp_path / "third")
    each = records(tmp_path / "each")
    for i, record in enumerate(records(tmp_path / "third")):
        for name in ("loss", "loss/semantic", "grad_norm"):
            mean = sum(part[name] for part in each[3 * i : 3 * i + 3]) / 3
            assert record[name] == pytest.approx(mean, rel=1e-12)


def test_warm_up_is_linear(tiny):
    config = tiny(train=dict(lr=0.4, warmup=4))
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert learning_rate(tiny(train=dict(lr=0.4, warmup=0)), 0) == 0.4


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_gradients_are_clipped(tmp_path, tiny, run, clip):
    """After one step the first moment is (1 - beta_1) times the clipped gradient; the record has the norm before."""
    result = run(tiny(train=dict(steps=1, log_every=1, clip=clip)), tmp_path)
    moments = load_file(result.checkpoint / "optimizer.safetensors")
    first = torch.cat([value.flatten() for name, value in moments.items() if name.endswith("/exp_avg")])
    norm = records(tmp_path)[0]["grad_norm"]
    assert norm > 0.1
    expected = norm if clip == 0 else min(norm, clip)
    assert float(first.norm()) == pytest.approx(0.1 * expected, rel=1e-4)


def test_average_follows_the_weights(tmp_path, tiny, run):
    """ema_1 = d w_0 + (1 - d) w_1, from the weights before the first update on."""
    config = tiny(train=dict(steps=1, ema=0.9, lr=0.1, warmup=0))
    torch.manual_seed(config.data.seed)
    before = build_model(config).state_dict()
    result = run(config, tmp_path)
    after, average = (load_file(result.checkpoint / f"{name}.safetensors") for name in ("model", "ema"))
    assert average.keys() == after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for name in before:
        torch.testing.assert_close(average[name], 0.9 * before[name] + 0.1 * after[name], rtol=1e-5, atol=1e-6)


# --- parts of a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (2, 1), (4, 3)])
def test_positions_are_each_taken_once(world, accumulate):
    parts = [part for rank in range(world) for part in split_positions(24, world, rank, accumulate)]
    assert torch.cat(parts).sort().values.tolist() == list(range(24))
    assert {len(part) for part in parts} == {24 // (world * accumulate)}


def test_indivisible_batch_names_the_nearest():
    with pytest.raises(
        UserError, match=r"train.batch: 25: must divide into 2 ranks x train.accumulate = 3; nearest: 24"
    ):
        split_positions(25, 2, 0, 3)


@pytest.mark.parametrize("mode", ["corrected", "sfd"])
def test_accumulation_changes_nothing(tmp_path, tiny, run, mode):
    objective = dict(mode=mode, cosine_weight=0.5)
    for parts in (1, 4):
        config = tiny(train=dict(accumulate=parts, log_every=1, lr=1e-2), objective=objective)
        run(config, tmp_path / str(parts))
    for one, four in zip(records(tmp_path / "1"), records(tmp_path / "4"), strict=True):
        for name in ("loss", "loss/texture", "loss/semantic", "cosine", "grad_norm"):
            assert four[name] == pytest.approx(one[name], rel=2e-5), name


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_noised_state_is_in_the_precision_of_the_network(tmp_path, tiny, run, monkeypatch, precision, dtype):
    seen, forward = set(), PlainEngine.forward
    monkeypatch.setattr(PlainEngine, "forward", lambda self, x, *rest: seen.add(x.dtype) or forward(self, x, *rest))
    run(tiny(train=dict(steps=1, precision=precision)), tmp_path)
    assert seen == {dtype}


# --- numerics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["regional", "model"])
def test_compiled_equals_eager(tmp_path, tiny, run, monkeypatch, what):
    monkeypatch.setattr(engine, "_BACKEND", "aot_eager")  # the graphs and their gradients; inductor would take a minute
    torch._dynamo.reset()
    for name in ("off", what):
        run(tiny(train=dict(compile=name, log_every=1, steps=4), model=dict(depth=2)), tmp_path / name)
    for eager, compiled in zip(records(tmp_path / "off"), records(tmp_path / what), strict=True):
        for name in ("loss", "loss/texture", "loss/semantic", "grad_norm"):
            assert compiled[name] == pytest.approx(eager[name], rel=2e-5), name
    # the same names: a checkpoint of either continues in the other
    result = run(tiny(train=dict(steps=6), model=dict(depth=2)), tmp_path / what)
    assert result.resumed_from == 4


def test_bf16_autocast_stays_close(tmp_path, tiny, run):
    for precision in ("fp32", "bf16"):
        run(tiny(train=dict(precision=precision, steps=20, log_every=20)), tmp_path / precision)
    (full,), (half,) = records(tmp_path / "fp32"), records(tmp_path / "bf16")
    assert half["loss"] != full["loss"]
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02)


class WithFeatures:
    """Latents whose REPA features are fixed directions, one for each label."""

    def __init__(self, latents):
        self.latents, self.classes, self.device = latents, latents.classes, latents.device
        self.table = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.latents)

    def batch(self, indices, flips=None):
        return self.latents.batch(indices, flips)

    def features(self, indices, flips=None):
        return self.table[self.latents.labels[indices]]


def test_repa_is_trained_where_there_are_features(tmp_path, tiny, run, latents):
    sections = dict(
        model=dict(depth=2, repa_width=12, label_dropout=0.0),
        objective=dict(repa_weight=1.0),
        train=dict(steps=15, log_every=1, lr=1e-2),
    )
    run(tiny(**sections), tmp_path, WithFeatures(latents()))
    first, *_, last = records(tmp_path)
    assert first["repa"] == pytest.approx(1.0, abs=0.3)
    assert last["repa"] < 0.5
    assert last["loss"] > last["repa"]  # the weighted total holds it
    with pytest.raises(UserError, match=r"objective.repa_weight: 1.0: these latents hold no features"):
        run(tiny(**sections), tmp_path / "none")
    sections["model"]["repa_width"] = 16
    with pytest.raises(UserError, match=r"model.repa_width: 16: the features' width is 12"):
        run(tiny(**sections), tmp_path / "none", WithFeatures(latents()))
    sections["model"]["repa_width"] = 0
    with pytest.raises(UserError, match=r"model.repa_width: 0: objective.repa_weight needs a projector"):
        run(tiny(**sections), tmp_path / "none", WithFeatures(latents()))


# --- what stops it ----------------------------------------------------------------------------------------------


def test_one_bad_step_is_skipped(tmp_path, tiny, run, latents, disturbed):
    """A NaN at the last step: weights, EMA and moments are those after the step before; the record says one skip."""
    run(tiny(train=dict(steps=5, checkpoint_every=9)), tmp_path / "before")
    data = disturbed(latents(), lambda step: float("nan") if step == 5 else None)
    run(tiny(train=dict(steps=6, checkpoint_every=9)), tmp_path / "skipped", data)
    hashes = []
    for name in ("before", "skipped"):
        manifest = json.loads((newest(tmp_path / name / "checkpoints").path / "manifest.json").read_text())
        hashes.append([manifest["files"][file]["sha256"] for file in ("model.safetensors", "ema.safetensors")])
    assert hashes[0] == hashes[1]
    last = records(tmp_path / "skipped")[-1]
    fifth = records(tmp_path / "before")[-1]
    assert (last["step"], last["skipped"]) == (6, 1)
    assert last["loss"] == fifth["loss"]  # of steps 5 and 6 only step 5 counts


@pytest.mark.parametrize("log_every", [1, 1000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_three_bad_steps_in_a_row_stop_it(tmp_path, tiny, run, latents, disturbed, log_every, value):
    """Also where no step is logged: the next checkpoint is refused.  The last good one is named, and can be resumed."""
    config = tiny(train=dict(steps=20, log_every=log_every))
    data = disturbed(latents(), lambda step: value if step in (2, 5, 6, 7) else None)
    with pytest.raises(TrainingError) as caught:
        run(config, tmp_path, data)
    good = tmp_path / "checkpoints" / "step_00000004"
    assert newest(tmp_path / "checkpoints").path == good
    text = str(caught.value)
    assert text.startswith(
        "training stopped at step 8: 3 steps in a row, from step 6 on, had a gradient that is not fin"
    )
    assert f"the last good checkpoint is {good}" in text
    assert re.search(r"learning rate 0.001, loss (nan|inf|\d.*), .*grad_norm (nan|inf)", text)
    assert caught.value.exit_code not in (0, 2, 75)
    assert run(config, tmp_path).resumed_from == 4


def test_without_a_checkpoint_it_says_so(tmp_path, tiny, run, latents, disturbed):
    with pytest.raises(TrainingError, match=r"from step 1 on.*the last good checkpoint is none yet"):
        run(tiny(train=dict(log_every=1)), tmp_path, disturbed(latents(), lambda step: float("nan")))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("part", ["weight", "average", "moment"])
def test_bad_weights_never_replace_a_good_checkpoint(tmp_path, tiny, run, monkeypatch, part):
    """An update that overflowed at the very step of a checkpoint: no gradient has shown it yet."""
    step = PlainEngine.step

    def poisoned(self, *arguments):
        norm = step(self, *arguments)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 8:
            weight = self.model.y_embedder.embedding_table.weight
            state = self.optimizer.state[weight]
            target = {"weight": weight.data, "average": state["ema"], "moment": state["exp_avg_sq"]}[part]
            target[0, 0] = float("inf")
        return norm

    monkeypatch.setattr(PlainEngine, "step", poisoned)
    with pytest.raises(TrainingError, match=f"step 8: {part}.* y_embedder.embedding_table.weight.*step_00000004"):
        run(tiny(train=dict(steps=8)), tmp_path)
    assert newest(tmp_path / "checkpoints").path.name == "step_00000004"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004"]


# --- what it refuses --------------------------------------------------------------------------------------------


def test_data_that_do_not_fit(tmp_path, tiny, run, latents):
    for config, data, message in (
        (tiny(train=dict(batch=33)), latents(32), "train.batch: 33: is larger than the set: give at most 32"),
        (tiny(model=dict(classes=4)), latents(), "model.classes: 4: the latents have 3 classes"),
        (
            tiny(representations=dict(channels=[2, 3])),
            latents(),
            r"representations.channels: C, H, W = \(5, 2, 2\): the latents are \(4, 2, 2\)",
        ),
        (tiny(train=dict(accumulate=3)), latents(), "train.batch: 8: must divide into .*; nearest: 9"),
    ):
        with pytest.raises(UserError, match=message):
            run(config, tmp_path / "run", data)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_cuda_asked_for_and_absent(tmp_path, tiny, run, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("fastasync_kernels._common.INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train.device: cuda: no CUDA device is available here; use auto or cpu"):
        run(tiny(train=dict(device="cuda")), tmp_path / "run")
    with pytest.raises(UserError, match=r"model.kernels: triton: .*choose kernels=reference"):
        run(tiny(model=dict(kernels="triton")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_steps_that_are_not_logged_do_not_wait_for_the_gpu(tmp_path, tiny, run, latents, kernels):
    """As many host-device synchronisations in 10 steps as in 40.  The optimizer must be the compiled one."""
    base = latents(mirror=True)
    data = LatentSet(base.z.cuda(), base.labels.cuda(), 3, base.flipped.cuda())
    counts = []
    for steps in (10, 10, 40):  # the first run only warms up
        train = dict(steps=steps, log_every=1000, checkpoint_every=1000, device="cuda", optimizer="fused")
        config = tiny(train=train, model=dict(kernels=kernels), data=dict(flip=True))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(config, tmp_path / f"{len(counts)}", data)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert counts[1] == counts[2] > 0
    assert read_state(newest(tmp_path / "2" / "checkpoints").path).step == 40
