"""A figure and everything that changes it: no number is stored or printed without its protocol."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from fastasync.errors import UserError
from fastasync.files import write_json

_TYPES: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}
_TITLES = {"kid": "KID", "is": "inception score", "precision": "precision", "recall": "recall"}
_PACKAGES = ("fastasync", "torch", "triton", "deepspeed", "torchvision", "torch-fidelity", "torchdiffeq", "numpy")


def library_versions() -> dict[str, str]:
    """Installed versions of the packages that can move a figure, and Python's."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)  # with the build, +cpu or +cu130
    return versions


def metric_title(metric: str, extractor: str) -> str:
    """FID only for Inception's features; in another network's it is a Frechet distance, on another scale."""
    if metric == "fid":
        return "FID" if extractor.startswith("inception") else "Fréchet distance"
    return _TITLES.get(metric, metric)


def hardware_name(device: torch.device | str = "cpu") -> str:
    """The GPU's name, or the CPU architecture and number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def today() -> str:
    """The date in UTC, ISO format."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@dataclass(frozen=True)
class Protocol:
    """What a figure was measured with.

    Attributes:
        samples: number of generated images.
        reference: name of the reference set, e.g. ``cifar10-train``.
        reference_count: images in it, 0 where a file of statistics does not say.
        reference_fingerprint: sha256 of it, or of its statistics.
        extractor: name of the feature extractor.
        extractor_fingerprint: sha256 of its weights.
        schedule: name of the schedule.
        schedule_fingerprint: hash of its parameters.
        integrator: euler, heun, heun_euler, dopri5, and the grid's power where it is not 1.
        function_evaluations: network evaluations per image (the mean, for an adaptive integrator).
        guidance: kind, scales and interval in words, e.g. ``none`` or ``autoguidance 1.5``.
        labels: ``balanced`` or ``random``.
        precision: of the network while sampling, e.g. ``bf16``.
        seed: of noise and labels.
        checkpoint_step: training step of the weights.
        ema: decay of the averaged weights, 0 for the raw ones.
        decode: how latents became uint8 images, batch size included when the decoder depends on it.
        hardware: that made the samples, see `hardware_name`.
        metric: settings of the metric itself, e.g. ``100 subsets of 1000, seed 0``.
        versions: package -> version.
        date: UTC, ISO format.
    """

    samples: int
    reference: str
    reference_count: int
    reference_fingerprint: str
    extractor: str
    extractor_fingerprint: str
    schedule: str
    schedule_fingerprint: str
    integrator: str
    function_evaluations: float
    guidance: str
    labels: str
    precision: str
    seed: int
    checkpoint_step: int
    ema: float
    decode: str
    hardware: str
    metric: str = ""
    versions: dict[str, str] = field(default_factory=library_versions)
    date: str = field(default_factory=today)

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Protocol).items():
            value = getattr(self, name)
            allowed = _TYPES.get(kind, (dict,))
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise UserError(f"protocol.{name}", repr(value), f"expected {allowed[-1].__name__}")
        if self.labels not in ("balanced", "random"):
            raise UserError("protocol.labels", self.labels, "choose balanced or random")
        for name, least in (("samples", 1), ("reference_count", 0)):
            if getattr(self, name) < least:
                raise UserError(f"protocol.{name}", getattr(self, name), f"must be at least {least}")

    def describe(self) -> str:
        """All of it on one line."""
        weights = f"EMA {self.ema:g}" if self.ema else "raw weights"
        size = self.reference_count or "size unknown"
        parts = (
            f"{self.samples} samples",
            f"reference {self.reference} {_short(self.reference_fingerprint)} ({size})",
            f"{self.extractor} {_short(self.extractor_fingerprint)}",
            f"schedule {self.schedule} {_short(self.schedule_fingerprint)}",
            f"{self.integrator}, {self.function_evaluations:g} NFE",
            "unguided" if self.guidance == "none" else self.guidance,
            f"{self.labels} labels",
            self.precision,
            f"seed {self.seed}",
            f"step {self.checkpoint_step}, {weights}",
            f"decode {self.decode}",
            self.metric,
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            self.hardware,
            self.date,
        )
        return "; ".join(" ".join(part.split()) for part in parts if part)


def _short(fingerprint: str) -> str:
    return fingerprint[:8]


@dataclass(frozen=True)
class Figure:
    """One number with its protocol.

    Attributes:
        name: fid, kid, precision, recall, is, or any other name.
        value: the number, finite.
        protocol: how it was measured.
        spread: standard deviation that the metric itself reports (KID, IS), or None.
    """

    name: str
    value: float
    protocol: Protocol
    spread: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("value", self.value), ("spread", self.spread)):
            if name == "spread" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"figure {self.name}: {name}", repr(value), "must be a finite number")

    def describe(self) -> str:
        """``fid 3.152 [50000 samples; reference ...]`` on one line."""
        spread = "" if self.spread is None else f" +- {self.spread:.2g}"
        return f"{self.name} {self.value:.4g}{spread} [{self.protocol.describe()}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Figure:
        """Inverse of `to_dict`; UserError for a missing or unknown field or a wrong type."""
        plain = _known_fields(cls, values, "figure")
        protocol = Protocol(**_known_fields(Protocol, plain["protocol"], "protocol"))
        return cls(**{**plain, "protocol": protocol})


def _known_fields(kind: type, values: object, label: str) -> dict[str, Any]:
    """``values`` as a dict with exactly the fields of the dataclass ``kind``: a stored figure has no defaults."""
    if not isinstance(values, Mapping):
        raise UserError(label, repr(values)[:60], "expected an object")
    names = {f.name for f in fields(kind)}
    for name in sorted(names ^ set(values)):
        problem = "missing" if name in names else "unknown field"
        raise UserError(f"{label}.{name}", problem, "the file was written by another version, or edited")
    return dict(values)


def figures_from(result: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[Figure]:
    """Figures of an `evaluate` result: it fills counts, extractor and metric settings, ``protocol`` gives the rest.

    Args:
        result: what `fastasync.evaluation.evaluate` returned.
        protocol: the remaining fields of `Protocol` by name.
    """
    shared = {"reference_count": result["reference"] or 0, **protocol}
    shared |= {"samples": result["samples"], "extractor": result["extractor"]}
    shared["extractor_fingerprint"] = result["fingerprint"]
    return [
        Figure(name, result[name], Protocol(**{**shared, "metric": metric}), result.get(f"{name}_std"))
        for name, metric in result["settings"].items()
    ]


def save_figures(path: Path | str, figures: Iterable[Figure]) -> None:
    """Write figures as a JSON list; an existing file is replaced only once the new one is complete."""
    write_json(path, [figure.to_dict() for figure in figures])


def load_figures(path: Path | str) -> list[Figure]:
    """Read what `save_figures` wrote; UserError for a missing, truncated or edited file."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "run the evaluate stage first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"not JSON ({error})", "remove this file and evaluate again") from None
    if not isinstance(values, list):
        raise UserError(str(path), type(values).__name__, "is no list of figures: remove this file and evaluate again")
    try:
        return [Figure.from_dict(value) for value in values]
    except UserError as error:
        raise UserError(str(path), f"holds no figures ({error})", "remove this file and evaluate again") from None
