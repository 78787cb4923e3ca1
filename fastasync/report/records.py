"""What the report reads from a run directory: each run's stages as far as they have come."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastasync.data.cifar10 import CLASS_NAMES
from fastasync.data.sfd_folder import is_sfd_folder
from fastasync.data.shards import Index, read_index
from fastasync.errors import UserError
from fastasync.evaluation import Figure, load_figures
from fastasync.probe import ProbeResult
from fastasync.representations.prepare import MANIFEST
from fastasync.run import Run
from fastasync.schedule import Schedule, load_schedule
from fastasync.training import checkpoint
from fastasync.training.metrics import FILE as METRICS
from fastasync.training.start import START


@dataclass(frozen=True)
class Record:
    """A run as far as it has come; what a stage has not made yet is None or empty.

    Attributes:
        run: the directory and the configuration.
        schedule: of schedule.json.
        probe: what learned it; None for a fixed schedule.
        metrics: records of metrics.jsonl, by step.
        figures: of figures.json.
        samples: the folder of the samples to show: latest checkpoint, then most function evaluations.
        protocol: that folder's protocol.json, and ``function_evaluations``.
        shared: the label of the run whose network, with the same schedule, serves this baseline too, or "".
    """

    run: Run
    schedule: Schedule | None
    probe: ProbeResult | None
    metrics: list[dict[str, Any]]
    figures: list[Figure]
    samples: Path | None
    protocol: dict[str, Any]
    shared: str = ""

    @property
    def label(self) -> str:
        """``learned``, the fixed schedule's name, or that of its file."""
        name = self.run.config.schedule.name
        return Path(name).name if name.endswith(".json") else name


def collect(run: Run) -> list[Record]:
    """The run, then its baselines; makes no folder for one that has not been begun.

    A baseline that was not trained because an earlier run has its schedule gets that one's records.  Raises UserError
    for a damaged file, or a baseline of other settings; a missing one is not an error.
    """
    baselines = [run.baseline(name) for name in run.config.schedule.others]
    records: list[Record] = []
    for each in (run, *(each.create() if each.path.exists() else each for each in baselines)):
        record = _record(each)
        twin = next((r for r in records if record.schedule and _same(r.schedule, record.schedule)), None)
        if twin and not checkpoint.steps(each.path / checkpoint.FOLDER):
            record = replace(twin, run=each, probe=None, shared=twin.label)
        records.append(record)
    return records


def _same(one: Schedule | None, other: Schedule) -> bool:
    return one is not None and one.fingerprint == other.fingerprint


def shared_notes(records: Sequence[Record]) -> list[str]:
    """A sentence for each baseline that was not trained because its schedule was, and for each run's own start."""
    notes = [f"{r.label} is the schedule of {r.shared}: one network serves both" for r in records if r.shared]
    started = [r.label for r in records if (r.run.path / START).is_file()]
    return notes + [f"{label} started from the weights in its {START}, not from scratch" for label in started]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} when the file does not exist.  UserError when it is not one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "remove it and run its stage again") from None
    if not isinstance(content, dict):
        raise UserError(str(path), type(content).__name__, "expected a JSON object: remove it and run its stage again")
    return content


def prepared_manifest(run: Run) -> dict[str, Any]:
    """What ``prepare`` noted, {} before it has run."""
    return read_json(run.prepared / MANIFEST)


def latents_index(run: Run) -> Index | None:
    """The index of the folder of latents that the run is trained on; None where there is none (images, SFD's).

    Raises UserError when it cannot be read: the folder may be elsewhere by now.
    """
    data = run.config.data
    return None if data.dataset != "latents" or is_sfd_folder(data.root) else read_index(data.root)


def class_names(run: Run) -> tuple[str, ...]:
    """Of the run's labels, in their order; () where they are not known."""
    if run.config.data.dataset == "cifar10":
        return CLASS_NAMES
    try:
        index = latents_index(run)
    except UserError:  # a picture with numbers is better than none
        return ()
    return () if index is None else index.encoding.class_names


def _record(run: Run) -> Record:
    names = run.config.representations.names
    samples, protocol = _samples(run)
    return Record(
        run=run,
        schedule=load_schedule(run.schedule_file, names) if run.schedule_file.is_file() else None,
        probe=ProbeResult.load(run.probe_folder) if run.config.schedule.name == "learned" else None,
        metrics=_metrics(run.path / METRICS),
        figures=load_figures(run.figures_file) if run.figures_file.is_file() else [],
        samples=samples,
        protocol=protocol,
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The records, without a line that is cut short because training is writing it or was killed."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return sorted(records, key=lambda record: record["step"])


def _samples(run: Run) -> tuple[Path | None, dict[str, Any]]:
    found = []
    for file in sorted(run.samples_folder.glob("*/samples.npz")):
        if zipfile.is_zipfile(file):
            protocol = read_json(file.parent / "protocol.json")
            found.append((file.parent, protocol | _evaluations(file)))
    if not found:
        return None, {}
    rank = ("checkpoint_step", "function_evaluations")
    return max(found, key=lambda item: tuple(float(item[1].get(name, 0.0)) for name in rank))


def _evaluations(file: Path) -> dict[str, float]:
    """What sampling counted: the protocol beside it was written before."""
    try:
        with np.load(file) as arrays:
            return {"function_evaluations": float(arrays["evaluations"].mean())}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}  # whoever reads the images says what is wrong with them
