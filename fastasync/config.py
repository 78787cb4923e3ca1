"""The configuration: frozen dataclasses, two levels (section.field), validated once before any work starts."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from fastasync_kernels import gated_mlp
from fastasync_kernels.attention import BACKENDS

from fastasync.errors import UserError, unknown_name
from fastasync.objective import MODES, PROPOSALS, sfd_loss_weights
from fastasync.schedule import ROLES


def _choice(default: str, *values: str) -> Any:
    return field(default=default, metadata={"choices": values})


def _number(default: float | int, low: float, high: float = math.inf) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Data:
    """Images or latents, and the seed of everything random."""

    dataset: str = _choice("digits", "digits", "cifar10", "latents")
    root: str = "data"
    seed: int = _number(0, 0, 2**63 - 1)
    flip: bool = False
    verify: bool = True  # dataset=latents: compare the shards' hashes while training, and stop where one is wrong
    images: str = ""  # objective.repa_source=online: the images that root was encoded from
    skip_bad: str = ""  # and the list of bad files that encoding left out


@dataclass(frozen=True)
class Representations:
    """What is denoised: K representations on one token grid, in the order of their channels."""

    names: tuple[str, ...] = ("texture", "semantic")
    channels: tuple[int, ...] = (4, 8)
    roles: tuple[str, ...] = ("lags", "leads")
    grid: int = _number(4, 1, 1024)
    plugin: str = ""  # a Python file that registers further representations
    decoder: str = ""  # of latents: the autoencoder's weights file, a representation's name, a prepared folder
    encoder_steps: int = _number(0, 0)  # of the classifiers; 0: the data set's recipe
    semvae_steps: int = _number(0, 0)  # 0: the data set's recipe
    denoiser_steps: int = _number(0, 0)  # of a network that takes a sampler's noise out of texture's images; 0: none


@dataclass(frozen=True)
class ScheduleChoice:
    """Which schedule is trained and sampled: ``learned`` (by the probe), a named one, or a file."""

    name: str = "learned"
    baselines: tuple[str, ...] = ()  # trained too by `run`, at the same budget, for comparison

    @property
    def others(self) -> tuple[str, ...]:
        """The baselines that are not the run's own schedule, each once."""
        return tuple(dict.fromkeys(name for name in self.baselines if name != self.name))


@dataclass(frozen=True)
class ObjectiveChoice:
    """The training objective.  ``loss_weights`` () means SFD's weights."""

    mode: str = _choice("corrected", *MODES)
    proposal: str = _choice("mixture", *PROPOSALS)
    density: str = _choice("logit_normal", "logit_normal", "uniform")
    loss_weights: tuple[float, ...] = ()
    cosine_weight: float = _number(0.0, 0.0)
    repa_weight: float = _number(0.0, 0.0)
    repa_source: str = _choice("cached", "cached", "online")  # online: the ViT runs in the step, on data.images
    repa_vit: str = "vit_base_patch14_reg4_dinov2"  # online: a timm model
    repa_vit_weights: str = ""  # online: its file

    @property
    def cached_features(self) -> bool:
        """Whether training reads REPA's features with the latents."""
        return self.repa_weight > 0 and self.repa_source == "cached"


@dataclass(frozen=True)
class Model:
    """The DiT.  ``size`` names a row of model.SIZES, or is ``custom`` with depth, width and heads."""

    size: str = _choice("custom", "custom", "S", "B", "L", "XL", "1p0B", "1p6B")
    depth: int = _number(4, 1, 1000)
    width: int = _number(96, 8)
    heads: int = _number(4, 1)
    patch: int = _number(1, 1, 2)
    mlp_multiple: int = _number(1, 1)  # the MLP's hidden width is rounded up to it (1: as published)
    classes: int = _number(10, 1)
    label_dropout: float = _number(0.1, 0.0, 1.0)
    repa_width: int = _number(0, 0)  # 0: no REPA projector
    kernels: str = _choice("auto", "auto", "triton", "reference")
    attention: str = _choice("auto", "auto", *BACKENDS)
    mlp: str = _choice("auto", "auto", *gated_mlp.BACKENDS)  # quack: in bf16, SwiGLU in its products by quack-kernels


@dataclass(frozen=True)
class Train:
    """The optimizer and the loop."""

    steps: int = _number(1000, 1, 10**9)
    batch: int = _number(128, 1)
    accumulate: int = _number(1, 1)  # parts that a batch is computed in, one after the other
    lr: float = _number(1e-3, 0.0, 10.0)
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = _number(0.0, 0.0)
    warmup: int = _number(0, 0)
    clip: float = _number(0.0, 0.0)  # largest gradient norm; 0: no clipping
    ema: float = _number(0.9999, 0.0, 0.9999999)
    optimizer: str = _choice("auto", "auto", "fused", "torch", "apex")
    precision: str = _choice("auto", "auto", "fp32", "bf16", "fp8")  # fp8: the block linears
    compile: str = _choice("off", "off", "regional", "model")
    memory: str = _choice("auto", "auto", "none", "selective", "full")  # what is recomputed; auto: until it fits
    cuda_graph: str = _choice("auto", "off", "on", "auto")  # replay the step; auto: what gains, if it fits
    device: str = _choice("auto", "auto", "cpu", "cuda")
    engine: str = _choice("auto", "auto", "plain", "deepspeed")  # auto: deepspeed where a launcher started several
    zero: int = _number(1, 0, 3)  # DeepSpeed's stage; the plain engine has none
    deepspeed_config: str = ""  # a DeepSpeed JSON, merged into what is made from these fields
    max_norm_ratio: float = _number(0.0, 0.0)  # skip a step whose gradient norm exceeds this x the median; 0: never
    stall_minutes: float = _number(10.0, 0.0)  # report where a run stands without a step for so long; 0: never
    log_every: int = _number(20, 1)
    wandb: str = ""  # the Weights & Biases project that gets the records too; empty: none
    checkpoint_every: int = _number(500, 1)
    keep_checkpoints: int = _number(2, 1)
    milestone_every: int = _number(0, 0)  # checkpoints at its multiples are kept for ever; 0: none


@dataclass(frozen=True)
class Probe:
    """How the schedule is learned.  The FLOPs of everything here are counted against ``budget`` x the planned run."""

    estimator: str = _choice("C", "A", "B", "C", "D")
    budget: float = _number(0.01, 0.0, 1.0)
    depth: int = _number(2, 1, 1000)
    width: int = _number(64, 8)
    heads: int = _number(2, 1)
    batch: int = _number(128, 1)
    lr: float = _number(1e-3, 0.0, 10.0)
    train_share: float = _number(0.7, 0.0, 1.0)  # of the budget; the rest samples (C) or fits (B, D)
    times: str = _choice("paths", "paths", "independent")  # C, D: trained along the candidates, or anywhere
    energy: float = _number(0.2, 0.0)  # C: of kinetic energy beside the log of the distance; 0: the distance alone
    loss_energy: float = _number(0.4, 0.0, 1e6)  # D: of kinetic energy beside the log of the loss; 0: the loss alone
    beta: tuple[float, ...] = (0.01, 0.03, 0.1)  # weights of the kinetic energy; the middle one decides for A and B
    loss_weights: tuple[float, ...] = ()  # (): 1 for what lags or is free, 0 for what leads
    sampling_steps: int = _number(10, 1)  # of the integrator that C scores with
    seed: int = _number(1, 0, 2**63 - 1)


@dataclass(frozen=True)
class Sample:
    """Sampling.  ``steps`` are intervals of the grid; Heun spends two function evaluations on each."""

    count: int = _number(1000, 1, 10**8)
    batch: int = _number(500, 1, 10**6)
    integrator: str = _choice("heun", "euler", "heun", "heun_euler", "dopri5")
    grid_power: float = _number(1.0, 0.1, 10.0)  # of the time grid: above 1, steps shrink towards the data
    last_step: float = _number(
        0.0, 0.0, 0.9
    )  # local time that the last step takes, whatever the schedule; 0: the grid's
    steps: tuple[int, ...] = (25,)  # one figure for each
    labels: str = _choice("balanced", "balanced", "random")
    classes: tuple[int, ...] = ()  # only these; (): all
    guidance: str = _choice("none", "none", "cfg", "autoguidance")
    guidance_scale: tuple[float, ...] = (1.5,)  # one, or one for each representation
    guidance_interval: tuple[float, ...] = (0.0, 1.0)  # of local time
    weak_checkpoint: str = ""  # AutoGuidance's weak model
    ema: bool = True
    precision: str = _choice("auto", "auto", "fp32", "bf16", "fp8")  # auto: training's, bf16 after fp8
    cuda_graph: str = _choice("auto", "off", "on", "auto")  # replay passes of the network; auto: if it gains
    seed: int = _number(0, 0, 2**63 - 1)


@dataclass(frozen=True)
class Evaluate:
    """Scoring."""

    features: str = _choice("classifier", "classifier", "inception")
    weights: str = "weights/inception.pt"
    metrics: tuple[str, ...] = ("fid", "kid")
    split: str = _choice("train", "train", "test")
    reference: str = ""  # data.dataset=latents: an npz with mu and sigma, or with images (arr_0)


@dataclass(frozen=True)
class Config:
    """Everything that defines a run.  ``preset`` is the name it started from."""

    preset: str = "digits"
    data: Data = field(default_factory=Data)
    representations: Representations = field(default_factory=Representations)
    schedule: ScheduleChoice = field(default_factory=ScheduleChoice)
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    probe: Probe = field(default_factory=Probe)
    sample: Sample = field(default_factory=Sample)
    evaluate: Evaluate = field(default_factory=Evaluate)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, tuples as lists: what config.yaml holds."""

        def plain(value: Any) -> Any:
            if dataclasses.is_dataclass(value):
                return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
            return list(value) if isinstance(value, tuple) else value

        return plain(self)

    def to_yaml(self) -> str:
        """The text of config.yaml."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)

    @property
    def sampling_precision(self) -> str:
        """Of sampling: its field, or for "auto" training's, with bf16 in the place of fp8."""
        chosen = self.train.precision if self.sample.precision == "auto" else self.sample.precision
        return "bf16" if self.sample.precision == "auto" and chosen == "fp8" else chosen

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """lam_k of the training objective: the field, or SFD's weights for these channels and roles."""
        return self.objective.loss_weights or sfd_loss_weights(
            self.representations.channels, self.representations.roles
        )


# May change between invocations on one run directory: they do not alter what was trained.
FREE_FIELDS = (
    "data.root",
    "data.images",
    "data.skip_bad",
    "data.verify",
    "representations.decoder",
    "schedule.baselines",
    "model.kernels",
    "model.attention",
    "model.mlp",
    "train.steps",
    "train.accumulate",
    "train.compile",
    "train.memory",
    "train.cuda_graph",
    "train.device",
    "train.engine",
    "train.zero",
    "train.deepspeed_config",
    "train.stall_minutes",
    "train.log_every",
    "train.wandb",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.milestone_every",
    "sample.*",
    "evaluate.*",
)


# Fields that presets set otherwise since some of their runs were begun, and what they were before (see keep_begun).
_IMAGENET = ("imagenet256", "autoguidance")  # what these presets' names begin with
_BEFORE: dict[tuple[str, str], tuple[Any, tuple[str, ...]]] = {
    ("train", "max_norm_ratio"): (0.0, _IMAGENET),
    ("probe", "estimator"): ("B", _IMAGENET),
    ("probe", "budget"): (0.1, ("cifar10",)),
}


def keep_begun(config: Config, begun: Config) -> Config:
    """A preset's ``config`` as it was when a run was ``begun`` with it."""
    for (section, name), (before, presets) in _BEFORE.items():
        same = config.preset == begun.preset and config.preset.startswith(presets)
        if same and getattr(getattr(begun, section), name) == before:
            own = dataclasses.replace(getattr(config, section), **{name: before})
            config = dataclasses.replace(config, **{section: own})
    return config


def differences(one: Config, other: Config) -> list[str]:
    """Fields in which two configurations differ and that may not change within a run: ``section.field``, sorted."""
    first, second = flatten(one), flatten(other)
    changed = [name for name in first if name != "preset" and first[name] != second[name]]
    return sorted(name for name in changed if name not in FREE_FIELDS and f"{name.split('.')[0]}.*" not in FREE_FIELDS)


def flatten(config: Config) -> dict[str, Any]:
    """``{"section.field": value}`` for every field (``preset`` under its own name)."""
    flat: dict[str, Any] = {}
    for section, values in config.to_dict().items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return flat


def _exactly(bound: float | int) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:.10g}"


def _convert(name: str, text: Any, kind: Any) -> Any:
    """A value of the field's type from YAML or the command line, or a UserError that says what was expected."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(text, str):
            text = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
        if not isinstance(text, (list, tuple)):
            text = [text]
        return tuple(_convert(name, part, item) for part in text)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if kind is bool:
        if isinstance(text, bool):
            return text
        if str(text).lower() in ("true", "false"):
            return str(text).lower() == "true"
    elif kind is str:
        if isinstance(text, str):
            return text
    elif not isinstance(text, bool):
        try:
            value = float(text)
            if kind is float and math.isfinite(value):
                return value
            if kind is int and value == int(value):
                # 1e3 is a whole number too, but a float cannot hold every one
                return int(text) if str(text).strip().lstrip("+-").isdigit() else int(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise UserError(name, text, f"needs {expected}")


def _section_from(cls: type, name: str, data: Any, base: Any) -> Any:
    if not isinstance(data, dict):
        raise UserError(name, data, "is a section: give its fields")
    kinds = typing.get_type_hints(cls)
    known = {item.name: item for item in dataclasses.fields(cls)}
    changes = {}
    for key, value in data.items():
        if key not in known:
            raise unknown_name(f"{name}: field", key, known)
        changes[key] = _convert(f"{name}.{key}", value, kinds[key])
    return dataclasses.replace(base, **changes)


def config_from_dict(data: Any, base: Config | None = None) -> Config:
    """Fields of ``data`` ({section: {field: value}}) over ``base`` (default: the defaults), validated."""
    base = base or Config()
    if not isinstance(data, dict):
        raise UserError("configuration", type(data).__name__, "needs sections with fields")
    sections = {item.name for item in dataclasses.fields(Config)}
    changes: dict[str, Any] = {}
    for name, value in data.items():
        if name not in sections:
            raise unknown_name("configuration: section", name, sections)
        if name == "preset":
            changes[name] = _convert(name, value, str)
        else:
            current = getattr(base, name)
            changes[name] = _section_from(type(current), name, value, current)
    config = dataclasses.replace(base, **changes)
    validate(config)
    return config


def apply_settings(config: Config, settings: typing.Iterable[str]) -> Config:
    """``section.field=value`` strings over a configuration."""
    data: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise UserError("--set", setting, "write --set section.field=value")
        data.setdefault(section, {})[key] = value.strip()
    return config_from_dict(data, config)


def load_config(path: str | Path) -> Config:
    """The configuration that ``Config.to_yaml`` wrote."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("configuration file", path, f"cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise UserError(
            "configuration file", path, "holds no sections with fields: bring it back, or use another --out"
        )
    try:
        return config_from_dict(data)
    except UserError as error:
        raise UserError("configuration file", path, f"{error}") from None


def validate(config: Config) -> None:
    """Ranges, choices, and what must fit together.  Raises UserError."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values) or isinstance(values, type):
            continue
        for item in dataclasses.fields(values):
            value, name = getattr(values, item.name), f"{section.name}.{item.name}"
            if "choices" in item.metadata and value not in item.metadata["choices"]:
                raise unknown_name(name, value, item.metadata["choices"])
            if "range" in item.metadata:
                low, high = item.metadata["range"]
                if not low <= value <= high:
                    most = f" and at most {_exactly(high)}" if high < math.inf else ""
                    raise UserError(name, value, f"must be at least {_exactly(low)}{most}")
    reps = config.representations
    if not reps.names or len(set(reps.names)) != len(reps.names):
        raise UserError("representations.names", ",".join(reps.names), "give at least one name, each once")
    for name, values in (("channels", reps.channels), ("roles", reps.roles)):
        if len(values) != len(reps.names):
            raise UserError(
                f"representations.{name}", ",".join(map(str, values)), f"give one for each of {', '.join(reps.names)}"
            )
    if min(reps.channels) < 1:
        raise UserError("representations.channels", ",".join(map(str, reps.channels)), "each must be at least 1")
    for role in reps.roles:
        if role not in ROLES:
            raise UserError("representations.roles", role, f"use {', '.join(ROLES)}")
    for name, weights in (
        ("objective.loss_weights", config.objective.loss_weights),
        ("probe.loss_weights", config.probe.loss_weights),
    ):
        if weights and (len(weights) != len(reps.names) or min(weights) < 0 or max(weights) == 0):
            raise UserError(
                name, ",".join(map(str, weights)), f"give {len(reps.names)} numbers >= 0, not all 0, or none"
            )
    for name, width, heads in (
        ("model", config.model.width, config.model.heads),
        ("probe", config.probe.width, config.probe.heads),
    ):
        if (name == "probe" or config.model.size == "custom") and (width % heads or (width // heads) % 4):
            raise UserError(f"{name}.width", width, f"must be a multiple of 4 x {name}.heads = {4 * heads}")
    if reps.grid % config.model.patch:
        raise UserError("model.patch", config.model.patch, f"must divide representations.grid = {reps.grid}")
    if len(config.train.betas) != 2 or not all(0 <= beta < 1 for beta in config.train.betas):
        raise UserError("train.betas", ",".join(map(str, config.train.betas)), "give two numbers in [0, 1)")
    if 0 < config.train.max_norm_ratio <= 1:
        raise UserError("train.max_norm_ratio", config.train.max_norm_ratio, "must be above 1, or 0 for no limit")
    if config.train.deepspeed_config and config.train.engine == "plain":
        raise UserError("train.deepspeed_config", config.train.deepspeed_config, "train.engine is plain: use deepspeed")
    sample = config.sample
    if not sample.steps or min(sample.steps) < 1:
        raise UserError("sample.steps", ",".join(map(str, sample.steps)), "give whole numbers of at least 1")
    if sample.integrator == "dopri5" and sample.grid_power != 1:
        raise UserError("sample.grid_power", sample.grid_power, "dopri5 chooses its own steps: leave it at 1")
    if sample.integrator == "dopri5" and sample.last_step:
        raise UserError("sample.last_step", sample.last_step, "dopri5 chooses its own steps: leave it at 0")
    if len(sample.guidance_scale) not in (1, len(reps.names)):
        raise UserError(
            "sample.guidance_scale", ",".join(map(str, sample.guidance_scale)), f"give 1 or {len(reps.names)} numbers"
        )
    low_high = sample.guidance_interval
    if len(low_high) != 2 or not 0 <= low_high[0] < low_high[1] <= 1:
        raise UserError(
            "sample.guidance_interval", ",".join(map(str, low_high)), "give low,high with 0 <= low < high <= 1"
        )
    if sample.classes and not all(0 <= label < config.model.classes for label in sample.classes):
        raise UserError(
            "sample.classes", ",".join(map(str, sample.classes)), f"labels run from 0 to {config.model.classes - 1}"
        )
    if sample.guidance == "cfg" and config.model.label_dropout == 0:
        raise UserError("sample.guidance", "cfg", "needs a network trained with model.label_dropout above 0")
    if config.evaluate.reference and config.data.dataset != "latents":
        remedy = f"is for data.dataset=latents; {config.data.dataset} is compared with evaluate.split"
        raise UserError("evaluate.reference", config.evaluate.reference, remedy)
    if sample.guidance == "autoguidance" and not sample.weak_checkpoint:
        raise UserError("sample.weak_checkpoint", "(empty)", "AutoGuidance needs a weak model: give its checkpoint")
    known = ("fid", "kid", "precision_recall", "is")
    if not config.evaluate.metrics:
        raise UserError("evaluate.metrics", "(none)", f"give at least one of {', '.join(known)}")
    for metric in config.evaluate.metrics:
        if metric not in known:
            raise unknown_name("evaluate.metrics", metric, known)
    if not config.probe.beta or min(config.probe.beta) < 0:
        raise UserError("probe.beta", ",".join(map(str, config.probe.beta)), "give numbers >= 0")
