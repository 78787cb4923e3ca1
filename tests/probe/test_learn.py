"""The interface over the estimators: every estimator end to end, budget enforced, resume, determinism, K = 3."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastasync.config import Probe, apply_settings, config_from_dict
from fastasync.errors import UserError
from fastasync.model import forward_flops
from fastasync.presets import preset
from fastasync.probe import joint as joint_module
from fastasync.probe import learn as learn_module
from fastasync.probe import network as network_module
from fastasync.probe import resume as resume_module
from fastasync.probe.budget import Budget, BudgetExceeded, plan_probe
from fastasync.probe.generation import Scorer
from fastasync.probe.learn import ProbeResult, chosen_beta, learn_schedule, probe_loss_weights, probe_plan
from fastasync.probe.network import build_probe
from fastasync.schedule import ConvexSchedule, check_monotone
from tests.probe.probe_cases import ROLES, THREE, THREE_NAMES, THREE_ROLES, WIDE, GaussianLatents, tiny_config

LATENTS = GaussianLatents(WIDE, 512, grid=2).as_set()
SCORER = Scorer.of(lambda z: z.flatten(1)[:, :6], LATENTS, flops=100.0)


def planned(config, steps=60):
    """FLOPs of a run for which half (probe.budget = 0.5) pays for about ``steps`` steps of the probe."""
    network = build_probe(config, "meta")
    return 3 * forward_flops(network) * config.probe.batch * steps / (config.probe.budget * config.probe.train_share)


def learned(config, **options):
    arguments = dict(planned_flops=planned(config), score=SCORER, progress=False)
    return learn_schedule(config, LATENTS, **(arguments | options))


@pytest.mark.parametrize("estimator", ["A", "B", "C", "D"])
def test_every_estimator_end_to_end(estimator, tmp_path):
    config = tiny_config(estimator=estimator, train_share=0.4)
    oracle = estimator != "A"
    result = learned(config, out_dir=tmp_path, oracle=oracle)
    assert result.estimator == estimator
    assert check_monotone(result.schedule) is None
    assert result.budget["spent_flops"] <= result.budget["limit_flops"]
    assert result.budget["spent_flops"] > 0.5 * result.budget["limit_flops"]
    assert sum(result.budget["flops"].values()) == pytest.approx(result.budget["spent_flops"])
    assert result.budget["total_seconds"] > 0
    assert np.isfinite(result.diagnostics["chosen"]["kinetic_energy"])
    assert len(result.sweep) == (2 if estimator == "A" else 3)
    if estimator != "A":
        assert result.surface["errors"].shape == (33, 33, 2)
        assert result.diagnostics["oracle"]["value"] <= result.diagnostics["chosen"]["loss"] + 1e-3
        assert result.diagnostics["curl"][0]["pair"] == ["texture", "semantic"]
    if estimator == "C":
        assert "synchronous" in {row["label"] for row in result.candidates}
        assert result.diagnostics["noise"] > 0
        spent = result.budget["flops"]
        assert set(spent) == {"training", "surface", "reference", "sampling", "scoring"}
        assert spent["reference"] == 100.0 * len(LATENTS)
        assert spent["scoring"] == 100.0 * sum(row["samples"] for row in result.candidates)
    elif estimator == "D":
        assert [row["label"] for row in result.candidates if row["schedule"] == result.schedule.to_json()] == [
            result.candidates[0]["label"]
        ]
        assert result.diagnostics["label"] == result.candidates[0]["label"]
        assert set(result.budget["flops"]) == {"training", "surface"}
    else:
        assert isinstance(result.schedule, ConvexSchedule)
        assert result.schedule.roles == ROLES
    text = "\n".join(result.summary())
    assert f"estimator {estimator}" in text
    assert "KE" in text
    assert "budget" in text
    assert ("oracle: loss" in text) == oracle
    # the files say the same, and a second call reads them instead of working
    again = learned(config, out_dir=tmp_path, oracle=oracle)
    assert again.schedule.to_json() == result.schedule.to_json()
    assert json.loads(json.dumps(again.diagnostics)) == json.loads(json.dumps(result.diagnostics))
    assert again.budget == result.budget
    for name, array in result.surface.items():
        assert np.array_equal(array, again.surface[name])
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(("estimator", "along"), [("B", False), ("C", True), ("D", True)])
def test_whose_probe_is_trained_along_the_candidates(estimator, along, monkeypatch):
    given = []
    train = learn_module.train_surface_probe
    monkeypatch.setattr(learn_module, "train_surface_probe", lambda *args: given.append(args[-1]) or train(*args))
    learned(tiny_config(estimator=estimator, train_share=0.4))
    learned(tiny_config(estimator=estimator, train_share=0.4, times="independent"))
    assert [times is not None for times in given] == [along, False]


def test_ds_energy_decides_and_is_ds_alone():
    labels = [learned(tiny_config(estimator="D", train_share=0.4, loss_energy=e)).diagnostics["label"] for e in (0, 99)]
    assert labels[0] != labels[1] == "synchronous"

    def fingerprints(estimator):  # of what the trained probe depends on
        configs = [tiny_config(estimator=estimator, loss_energy=energy) for energy in (0.4, 0.5)]
        return {learn_module._fingerprint(config, LATENTS, 1e9) for config in configs}

    assert [len(fingerprints(estimator)) for estimator in "ABCD"] == [1, 1, 1, 2]


def test_deterministic_given_the_seed():
    config = tiny_config(estimator="C", train_share=0.4)
    first, second = learned(config), learned(config)
    assert first.schedule.to_json() == second.schedule.to_json()
    assert first.candidates == second.candidates
    assert np.array_equal(first.surface["errors"], second.surface["errors"])
    other = learned(tiny_config(estimator="C", train_share=0.4, seed=2))
    assert not np.array_equal(first.surface["errors"], other.surface["errors"])


@pytest.mark.parametrize("moment", ["sweep", "search"])
def test_an_interrupted_probe_goes_on_from_its_trained_network(moment, tmp_path, monkeypatch):
    config = tiny_config(estimator="C", train_share=0.4)
    uninterrupted = learned(config)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(learn_module, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            learned(config, out_dir=tmp_path)
    assert ProbeResult.load(tmp_path) is None
    with monkeypatch.context() as patch:
        patch.setattr(learn_module, "train_surface_probe", killed)  # must not train again
        resumed = learned(config, out_dir=tmp_path)
    assert resumed.schedule.to_json() == uninterrupted.schedule.to_json()
    assert resumed.candidates == uninterrupted.candidates
    assert resumed.budget["flops"] == uninterrupted.budget["flops"]


@pytest.mark.parametrize("estimator", ["A", "B"])
def test_an_interrupted_training_goes_on_bit_for_bit(estimator, tmp_path, monkeypatch):
    config = tiny_config(estimator=estimator)
    uninterrupted = learned(config)
    module = joint_module if estimator == "A" else network_module
    drawn, steps = module.training_batch, []

    def interrupted(config, latents, step, device):
        if step in (13, 29) and step not in steps:  # before A's warm-up is over, and after it
            steps.append(step)
            raise KeyboardInterrupt
        steps.append(step)
        return drawn(config, latents, step, device)

    monkeypatch.setattr(module, "training_batch", interrupted)
    monkeypatch.setattr(resume_module, "EVERY", 0.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learned(config, out_dir=tmp_path)
        assert len(list(tmp_path.glob("training-*"))) == 1
    resumed = learned(config, out_dir=tmp_path)
    assert steps.count(0) == steps.count(12) == steps.count(28) == 1, "no step was done again"
    assert resumed.schedule.to_json() == uninterrupted.schedule.to_json()
    assert resumed.sweep == uninterrupted.sweep
    assert resumed.budget["flops"] == uninterrupted.budget["flops"]
    assert not list(tmp_path.glob("training*"))


def test_states_of_a_training_are_rare_and_checked(tmp_path, monkeypatch):
    config = tiny_config(estimator="B")
    learned(config, out_dir=tmp_path / "quick")
    assert not list((tmp_path / "quick").glob("training*"))  # seconds of training are not worth a file

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume_module, "EVERY", 0.0)
        patch.setattr(learn_module, "surface_errors", killed)
        with pytest.raises(KeyboardInterrupt):
            learned(config, out_dir=tmp_path)
    (state,) = tmp_path.glob("training-*")
    for other in (tiny_config(estimator="B", seed=9), config_from_dict({"model": dict(mlp_multiple=64)}, config)):
        with pytest.raises(UserError, match="another configuration"):
            learned(other, out_dir=tmp_path, planned_flops=planned(config))
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"training\.json: the probe's training then starts again"):
        learned(config, out_dir=tmp_path)


def test_one_process_probes_in_a_folder(tmp_path, monkeypatch):
    config, folder = tiny_config(estimator="B"), tmp_path / "probe"
    folder.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match="another process is probing here"):
            learned(config, out_dir=folder)
        other.communicate(b"\n")
    found = learned(config, out_dir=folder)
    # a process that had looked before the other one was done looks again when it has the lock
    load, looks = ProbeResult.load, []
    monkeypatch.setattr(
        learn_module.ProbeResult,
        "load",
        lambda *arguments: looks.append(1) or (load(*arguments) if looks[1:] else None),
    )
    monkeypatch.setattr(learn_module, "_independent", None)
    assert learned(config, out_dir=folder).diagnostics == found.diagnostics


def test_what_the_network_does_not_depend_on_may_change_after_an_interruption(tmp_path, monkeypatch):
    config = tiny_config(estimator="C", train_share=0.4)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(learn_module, "search", killed)
        with pytest.raises(KeyboardInterrupt):
            learned(config, out_dir=tmp_path)
    config = config_from_dict({"sample": dict(integrator="euler")}, config)
    with monkeypatch.context() as patch:
        patch.setattr(learn_module, "train_surface_probe", killed)  # must not train again
        resumed = learned(config, out_dir=tmp_path, oracle=True)
    assert resumed.diagnostics["method"] == "euler"
    assert resumed.diagnostics["oracle"]["value"] > 0
    assert resumed.candidates == learned(config).candidates


def test_bad_folders(tmp_path):
    config = tiny_config(estimator="B")
    learned(config, out_dir=tmp_path)
    before = (tmp_path / "probe.json").read_bytes()
    with pytest.raises(UserError, match="another configuration"):
        learned(tiny_config(estimator="B", seed=9), out_dir=tmp_path)
    assert (tmp_path / "probe.json").read_bytes() == before
    (tmp_path / "probe.json").write_text('{"fingerprint": ')
    with pytest.raises(UserError, match=r"probe\.json"):
        learned(config, out_dir=tmp_path)
    (tmp_path / "probe.json").unlink()
    network = tmp_path / "network.safetensors"
    network.write_bytes(network.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated or altered"):
        learned(config, out_dir=tmp_path)


def test_c_needs_a_scorer():
    with pytest.raises(UserError, match=r"probe\.estimator"):
        learned(tiny_config(estimator="C"), score=None)


@pytest.mark.parametrize("estimator", ["A", "B", "C", "D"])
def test_three_representations(estimator):
    representations = dict(names=THREE_NAMES, roles=THREE_ROLES, channels=[1, 1, 1], grid=2)
    config = config_from_dict({"representations": representations}, tiny_config(estimator=estimator, train_share=0.4))
    latents = GaussianLatents(THREE, 512, grid=2).as_set()
    result = learn_schedule(
        config,
        latents,
        planned_flops=planned(config),
        score=Scorer.of(lambda z: z.flatten(1)[:, :6], latents),
        progress=False,
        oracle=True,
    )
    assert result.schedule.count == 3
    assert check_monotone(result.schedule) is None
    if estimator != "A":
        assert result.surface["errors"].shape == (17, 17, 17, 3)
        assert len(result.diagnostics["curl"]) == 3


def test_budget_is_enforced():
    budget = Budget(100.0, "a test")
    budget.spend("training", 60)
    budget.spend("training", 20)
    with pytest.raises(BudgetExceeded, match="a test"):
        budget.spend("sampling", 21)
    assert budget.left == 20  # a refused expense is not counted
    budget.spend("sampling", 20)
    assert budget.to_json()["flops"] == {"training": 80, "sampling": 20}


@pytest.mark.parametrize("estimator", ["A", "B", "C", "D"])
def test_too_small_a_budget_says_what_would_do(estimator):
    config = tiny_config(estimator=estimator, budget=0.01)
    flops = planned(config, steps=5)
    with pytest.raises(UserError, match=r"probe\.budget: 0\.01: .*at least 20") as caught:
        learned(config, planned_flops=flops)
    needed = float(caught.value.remedy.split("set probe.budget to ")[1].split(",")[0])
    assert 0.01 < needed < 0.5
    assert probe_plan(tiny_config(estimator=estimator, budget=needed), flops).steps >= 20


@pytest.mark.parametrize("estimator", ["A", "B", "C", "D"])
def test_plans_stay_under_the_limit(estimator):
    for limit in (3e6, 1e8, 7.7e9):
        probe = Probe(estimator=estimator, batch=10, budget=0.01)
        plan = plan_probe(probe, 1000.0, limit / 0.01)
        step = 3 * 1000 * 10 * (1.8 if estimator == "A" else 1)
        assert plan.steps * step + plan.fit_flops + plan.sample_flops <= limit * (1 + 1e-12)
        share = 1.0 if estimator == "A" else probe.train_share
        assert plan.steps == int(share * limit / step)


def test_too_few_samples_for_c_are_found_before_any_training():
    config = tiny_config(train_share=0.9)
    flops = planned(config, steps=200)
    with pytest.raises(UserError, match=r"probe\.budget: 0\.5: leaves \d+% of what") as caught:
        probe_plan(config, flops)
    assert "set probe.budget" not in caught.value.remedy  # more than the whole run would be needed
    flops = planned(config, steps=1500)
    with pytest.raises(UserError, match=r"probe\.budget: 0\.1: leaves \d+% of what") as caught:
        probe_plan(tiny_config(train_share=0.9, budget=0.1), flops)
    needed = float(caught.value.remedy.split("set probe.budget to ")[1].split(",")[0])
    assert 0.1 < needed <= 1
    assert probe_plan(tiny_config(train_share=0.9, budget=needed), flops).steps >= 20


def test_too_few_errors_for_b_are_found_before_any_training():
    config = tiny_config(estimator="B", train_share=1.0)
    with pytest.raises(UserError, match=r"probe\.train_share: 1\.0: leaves nothing"):
        probe_plan(config, planned(config))
    config = tiny_config(estimator="B", train_share=0.999)
    with pytest.raises(UserError, match=r"probe\.budget: .*to fit a loss surface: .*probe\.train_share"):
        probe_plan(config, planned(config))
    assert probe_plan(tiny_config(estimator="B", train_share=0.9), planned(config)).fit_flops > 0


def test_default_weights():
    assert probe_loss_weights(tiny_config()) == (1.0, 0.0)
    assert probe_loss_weights(tiny_config(loss_weights=[0.5, 2.0])) == (0.5, 2.0)
    assert chosen_beta((0.1, 0.01, 0.03)) == 0.03
    assert chosen_beta((0.1, 0.01)) == 0.01


def test_a_diverging_probe_is_a_clear_error():
    broken = GaussianLatents(WIDE, 512, grid=2)
    broken.z[:] = float("nan")
    with pytest.raises(UserError, match=r"probe\.lr"):
        learn_schedule(
            tiny_config(estimator="B"), broken.as_set(), planned_flops=planned(tiny_config()), progress=False
        )


def test_probe_learns_the_errors_of_the_gaussian():
    """The fitted surface of a trained probe comes near the exact one: the whole chain from latents to surface."""
    config = tiny_config(estimator="B", width=32, heads=2, batch=128)
    latents = GaussianLatents(WIDE, 4096, grid=2).as_set()
    result = learn_schedule(config, latents, planned_flops=planned(config, 400), progress=False)
    axis = torch.from_numpy(result.surface["tau"])
    exact = WIDE.errors(torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1))
    error = (torch.from_numpy(result.surface["errors"]) - exact)[3:-3, 3:-3]
    assert float(error.abs().mean()) < 0.1
    assert float(error.mean()) > -0.02  # no probe is better than the optimal velocity


@pytest.mark.parametrize(("name", "small"), [("digits", True), ("cifar10", True), ("imagenet256-s", False)])
def test_small_probes_are_recorded_and_not_compiled(name, small):
    """By a bound of their own: steps of training that are recorded are compiled all the same."""
    config = preset(name)
    with torch.device("meta"):
        model = build_probe(config, "meta")
    assert network_module.is_recorded(config, model) == small
    for choice, recorded in (("on", True), ("off", False)):
        assert network_module.is_recorded(apply_settings(config, (f"train.cuda_graph={choice}",)), model) == recorded
