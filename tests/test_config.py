"""Configuration: presets, settings, round trips, and errors that name the field, the value and the remedy."""

import dataclasses

import pytest
import torch
import yaml

from fastasync.config import Config, apply_settings, config_from_dict, differences, flatten, load_config
from fastasync.errors import UserError
from fastasync.model import parameter_count
from fastasync.presets import PRESETS, preset
from fastasync.training import build_model


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_yaml(name):
    config = preset(name)
    assert config.preset == name
    assert PRESETS[name].summary
    assert config_from_dict(yaml.safe_load(config.to_yaml())) == config


def test_every_preset_builds_its_network():
    """On the meta device.  The published sizes are counted by hand in tests/model; each row names the right one."""
    xl = 682_765_424
    expected = {
        "digits": 723_884, "cifar10": 9_889_600, "cifar10-components": 9_877_288, "imagenet256-xl": xl,
        "imagenet256-s": 39_483_824, "imagenet256-b": 137_632_304, "imagenet256-l": 465_533_712,
        "imagenet256-xxl": 1_037_191_472, "imagenet256-xl-sfd": xl, "autoguidance-b": 130_287_408,
    }  # fmt: skip
    with torch.device("meta"):
        found = {name: parameter_count(build_model(preset(name))) for name in PRESETS}
    assert found == expected


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).data.dataset == "latents"])
def test_imagenet_presets_skip_a_gradient_explosion(name):
    assert preset(name).train.max_norm_ratio == 10


def test_presets_say_what_they_are():
    assert preset("imagenet256-xl-sfd").objective.mode == "sfd"
    assert preset("imagenet256-b").model.size == "B"
    assert preset("imagenet256-b").model.classes == 1000
    for name in PRESETS:  # a folder of latents has no encoder that C could select with
        assert preset(name).data.dataset != "latents" or preset(name).probe.estimator != "C"
    assert preset("imagenet256-xl").loss_weights == (32 / 48, 2 * 16 / 48)


def test_settings_convert_to_the_fields_type():
    config = apply_settings(
        Config(), ["train.lr=1e-3", "train.steps=1e3", "sample.steps=3,4", "sample.ema=false", "data.root= some dir "]
    )
    assert (config.train.lr, config.train.steps, config.sample.steps) == (1e-3, 1000, (3, 4))
    assert config.sample.ema is False
    assert apply_settings(config, ["data.seed=9223372036854775807"]).data.seed == 2**63 - 1
    assert config.data.root == "some dir"
    assert Config().train.steps != 0
    assert dataclasses.is_dataclass(config.train)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("trian.steps=1", "did you mean 'train'"),
        ("train.step=1", "did you mean 'steps'"),
        ("train.steps=ten", "train.steps: ten: needs a whole number"),
        ("train.steps=1.5", "whole number"),
        ("train.steps=0", "at least 1"),
        ("train.steps=nan", "whole number"),
        ("train.lr=inf", "needs a number"),
        ("train.ema=1", "at most 0.9999999"),
        ("sample.seed=-1", "at most 9223372036854775807"),
        ("sample.count=0", "at least 1 and at most 100000000"),
        ("sample.ema=maybe", "true or false"),
        ("train.steps", "section.field=value"),
        ("steps=3", "section.field=value"),
        ("model.size=XXL", "model.size"),
        ("objective.mode=corected", "did you mean 'corrected'"),
        ("representations.channels=4", "one for each of texture, semantic"),
        ("representations.channels=4,0", "at least 1"),
        ("representations.names=texture,texture", "each once"),
        ("representations.roles=lags,follows", "use leads, lags, free"),
        ("objective.loss_weights=1,-1", "numbers >= 0"),
        ("evaluate.metrics=", "at least one of"),
        ("model.width=90", "multiple of"),
        ("probe.heads=3", "probe.width"),
        ("representations.grid=5", "ok"),
        ("sample.guidance_interval=0.9,0.1", "low < high"),
        ("sample.guidance_scale=1,2,3", "give 1 or 2"),
        ("sample.classes=3,10", "from 0 to 9"),
        ("sample.guidance=autoguidance", "weak"),
        ("evaluate.metrics=fid,fdi", "did you mean 'fid'"),
        ("train.betas=0.9", "two numbers"),
        ("sample.steps=", "at least 1"),
        ("sample.integrator=dopri5 sample.grid_power=2", "chooses its own steps"),
        ("sample.integrator=dopri5 sample.last_step=0.1", "chooses its own steps"),
        ("probe.beta=-1", ">= 0"),
    ],
)
def test_bad_settings_are_one_clear_line(setting, says):
    if says == "ok":
        apply_settings(Config(), [setting])
        return
    with pytest.raises(UserError) as caught:
        apply_settings(Config(), setting.split())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        preset("digit")


def test_bad_files(tmp_path):
    for text in ("train: [1", "- 1", "train: 3", "train: {steps: [1]}", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError):
            load_config(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "config.yaml").write_text("")  # the file is named: nobody wrote a setting
    with pytest.raises(UserError, match=r"config\.yaml: holds no sections"):
        load_config(tmp_path / "config.yaml")


def test_differences_ignore_what_may_change():
    config = preset("digits")
    other = apply_settings(config, ["sample.count=7", "train.steps=9", "train.lr=0.5", "probe.width=128"])
    assert differences(config, other) == ["probe.width", "train.lr"]
    assert set(flatten(config)) == set(flatten(other))


def test_baselines_are_other_schedules_each_once():
    config = apply_settings(preset("digits"), ["schedule.name=synchronous"])
    assert config.schedule.others == ("offset:0.3",)
    assert apply_settings(config, ["schedule.baselines=cascade,cascade,learned"]).schedule.others == (
        "cascade",
        "learned",
    )
