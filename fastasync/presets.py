"""Named runs: one row each, as changes to the configuration's defaults."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastasync.config import Config, config_from_dict
from fastasync.errors import unknown_name


class Preset(NamedTuple):
    """What `fastasync presets` prints, and the fields that differ from the defaults (or from ``base``)."""

    summary: str
    base: str | None
    changes: dict[str, dict[str, Any]]


_DIGITS: dict[str, dict[str, Any]] = {
    "data": dict(dataset="digits"),
    "representations": dict(channels=[4, 8], grid=4),
    "schedule": dict(baselines=["synchronous", "offset:0.3"]),
    "model": dict(depth=4, width=96, heads=4, classes=10),
    "train": dict(steps=500, batch=128, lr=2e-3, warmup=50, ema=0.99, clip=1.0, checkpoint_every=250),
    # 1 % of a two-minute run is one second: the smallest useful probe is larger, and says so
    "probe": dict(depth=2, width=64, heads=2, batch=128, lr=2e-3, budget=0.25),
    "sample": dict(count=1500, batch=500, steps=[5, 15]),
    "evaluate": dict(features="classifier", metrics=["fid"]),
}
_CIFAR10: dict[str, dict[str, Any]] = {
    "data": dict(dataset="cifar10", flip=True),
    "representations": dict(channels=[48, 16], grid=8),
    "schedule": dict(baselines=["synchronous", "offset:0.3", "power:2"]),
    "model": dict(depth=8, width=256, heads=8, mlp_multiple=64, classes=10),
    "train": dict(steps=10000, batch=256, lr=4e-4, warmup=500, ema=0.999, clip=1.0, checkpoint_every=2000),
    # as the study's quarter probe (755 steps): four times as much is not shown to choose better, less was not tried,
    # and for much less C cannot compare (PROTOCOL.md)
    "probe": dict(depth=4, width=128, heads=4, batch=256, lr=1e-3, budget=0.025),
    "sample": dict(count=50000, batch=2500, integrator="heun_euler", last_step=0.2, steps=[9, 25]),
    "evaluate": dict(features="inception", metrics=["fid", "kid"]),
}
_IMAGENET: dict[str, dict[str, Any]] = {
    "data": dict(dataset="latents", flip=True),
    "representations": dict(channels=[32, 16], grid=16),
    "model": dict(size="XL", classes=1000, repa_width=768),
    "objective": dict(repa_weight=1.0),
    "train": dict(
        steps=400_000, batch=256, lr=1e-4, ema=0.9999, compile="regional", checkpoint_every=5000, max_norm_ratio=10
    ),
    # a folder of latents has no encoder whose features could select: D
    # of the FLOPs; in seconds up to 3.7 times that, as so small a network reaches fewer FLOP/s than XL (bench probe)
    "probe": dict(estimator="D", depth=12, width=384, heads=6, batch=256, lr=3e-4, budget=0.0025),
    "sample": dict(count=50000, batch=250, integrator="dopri5"),
    "evaluate": dict(features="inception", metrics=["fid"]),
}

PRESETS: dict[str, Preset] = {
    "digits": Preset("scikit-learn's 8x8 digits, 0.7M parameters, 2 CPU cores, minutes", None, _DIGITS),
    "cifar10": Preset("CIFAR-10 at 32x32, 10M parameters, one GPU, minutes", None, _CIFAR10),
    "cifar10-components": Preset(
        "the same with textures of 24 principal components, decoded with a denoiser",
        "cifar10",
        {"representations": dict(channels=[24, 16], denoiser_steps=2000)},
    ),
    "imagenet256-xl": Preset("ImageNet 256 latents, LightningDiT-XL/1, 80 epochs", None, _IMAGENET),
    "imagenet256-s": Preset("the same with LightningDiT-S/1", "imagenet256-xl", {"model": dict(size="S")}),
    "imagenet256-b": Preset("the same with LightningDiT-B/1", "imagenet256-xl", {"model": dict(size="B")}),
    "imagenet256-l": Preset("the same with LightningDiT-L/1", "imagenet256-xl", {"model": dict(size="L")}),
    "imagenet256-xxl": Preset("the same with LightningDiT-1p0B/1", "imagenet256-xl", {"model": dict(size="1p0B")}),
    "imagenet256-xl-sfd": Preset(
        "the baseline: SFD's objective and offset, XL/1",
        "imagenet256-xl",
        {"schedule": dict(name="offset:0.3"), "objective": dict(mode="sfd", cosine_weight=1.0)},
    ),
    "autoguidance-b": Preset(
        "the weak model for AutoGuidance: B/1, 70 k iterations",
        "imagenet256-xl",
        {"model": dict(size="B", repa_width=0), "objective": dict(repa_weight=0.0), "train": dict(steps=70_000)},
    ),
}


def preset(name: str) -> Config:
    """The configuration of a preset.  Raises UserError that suggests the nearest name for an unknown one."""
    if name not in PRESETS:
        raise unknown_name("--preset", name, PRESETS)
    row = PRESETS[name]
    base = preset(row.base) if row.base else Config()
    return config_from_dict({"preset": name, **row.changes}, base)
