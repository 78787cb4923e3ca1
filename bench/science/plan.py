"""Jobs, the ledger of what is done, and what the rest will take."""

from __future__ import annotations

import functools
import math
import statistics as numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure as Picture

from bench.science.runner import Workshop, evaluations_of
from bench.science.specs import BEST_FIXED, LEARNED, SCAN_SEED, SPEC_FIELDS, Spec, Study
from bench.science.table import Row, Table
from fastasync.config import Config
from fastasync.errors import UserError
from fastasync.model import train_flops
from fastasync.stages import planned_flops
from fastasync.training import build_model

DONE, FAILED = "done", "failed"
METRICS = ("fid", "kid")
ABOUT = ("hardware", "commit", "command", "date")
SECONDS = ("train_seconds", "sample_seconds", "score_seconds")
RANK_COLUMNS = ("variant", "seed", "schedule", "status", "error", "distance", "objective")
RANK_FACTS = ("chosen", "probe_steps", "budget", "flops", "probe_seconds", "rank_seconds", *ABOUT)


@dataclass(frozen=True)
class TrainJob:
    """One line of training and the samplers that score it at each of its steps."""

    spec: Spec
    points: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def runnable(self) -> bool:
        return self.spec.schedule != BEST_FIXED

    def __str__(self) -> str:
        return f"{self.spec}, {', '.join(str(step) for step, _ in self.points)} steps"


@dataclass(frozen=True)
class RankJob:
    """A probe of C that ranks all fixed schedules."""

    variant: str
    seed: int
    runnable: bool = True

    def __str__(self) -> str:
        return f"probe {self.variant}, seed {self.seed}"


Job = TrainJob | RankJob


def merge(jobs: Iterable[Job]) -> list[Job]:
    """Each line of training once, with the union of its points, in the order of first mention."""
    points: dict[Spec, dict[int, dict[str, None]]] = {}
    order: dict[Any, Job | None] = {}
    for job in jobs:
        if isinstance(job, RankJob):
            order.setdefault(job, job)
            continue
        order.setdefault(job.spec, None)
        steps = points.setdefault(job.spec, {})
        for step, names in job.points:
            steps.setdefault(step, {}).update(dict.fromkeys(names))
    return [
        job or TrainJob(key, tuple((step, tuple(points[key][step])) for step in sorted(points[key])))
        for key, job in order.items()
    ]


class Ledger:
    """What is done: runs.csv (one row for each run and checkpoint) and probes.csv (one for each probe and schedule)."""

    def __init__(self, study: Study, seeds: Sequence[int], out: Path, only: Sequence[str] | None = None):
        self.study, self.seeds, self.out, self.only = study, list(seeds), out, only
        figures = [f"{metric}_{name}" for name in study.samplers for metric in METRICS]
        adaptive = ["nfe_dopri5"] if "dopri5" in study.samplers else []
        facts = ["status", "error", *figures, *adaptive, "fingerprint", "lead", "same_as", *SECONDS, *ABOUT]
        self.runs = Table(out / "runs.csv", [*SPEC_FIELDS, "step", *facts], len(SPEC_FIELDS) + 1)
        self.ranks = Table(out / "probes.csv", [*RANK_COLUMNS, *RANK_FACTS], 3)

    def refresh(self) -> None:
        """What other processes have done since."""
        self.runs.refresh()
        self.ranks.refresh()

    @property
    def scan_seeds(self) -> list[int]:
        return [SCAN_SEED + i for i in range(self.study.scan_seeds)]

    def row(self, spec: Spec, step: int) -> Row | None:
        return self.runs.get(*(getattr(spec, name) for name in SPEC_FIELDS), step)

    def figure(self, spec: Spec, step: int, sampler: str, metric: str = "fid") -> float | None:
        """A figure, or None when it is not there (yet, or because the run failed)."""
        row = self.row(spec, step)
        column = f"{metric}_{sampler}"
        text = row.get(column, "") if row else ""
        try:
            value = float(text) if text else None
        except ValueError:
            value = math.nan
        if value is not None and (math.isnan(value) or (metric == "fid" and value <= 0)):
            raise UserError(str(self.runs.path), text, f"is no {metric}: {column} of {spec}, {step} steps")
        return value

    def fact(self, row: Row, column: str) -> float:
        """A number of a probe's row.  Raises UserError that names the cell."""
        try:
            return float(row[column])
        except ValueError:
            what = f"is no {column} of probe {row['variant']}, seed {row['seed']}, {row['schedule']}: remove that row"
            raise UserError(str(self.ranks.path), repr(row[column]), what) from None

    def twin(self, spec: Spec, step: int, samplers: Sequence[str], shared: Row) -> Row | None:
        """The row of the same training with the same schedule under another name, when it has these samplers.

        ``shared``: what both must have besides (the schedule's fingerprint, the hardware, the commit).
        """
        same = {name: str(getattr(spec, name)) for name in SPEC_FIELDS if name not in ("schedule", "probe")}
        same |= {"step": str(step), "status": DONE, "same_as": "", **shared}
        for row in self.runs.rows.values():
            scored = all(row[f"fid_{name}"] for name in samplers)
            if scored and row["schedule"] != spec.schedule and same.items() <= row.items():
                return row
        return None

    def by_seed(
        self, spec: Spec, step: int, sampler: str, seeds: Sequence[int] | None = None, metric: str = "fid"
    ) -> dict[int, float]:
        """Figures of the same line of training over seeds: those that exist."""
        found = {
            seed: self.figure(replace(spec, seed=seed), step, sampler, metric)
            for seed in (self.seeds if seeds is None else seeds)
        }
        return {seed: value for seed, value in found.items() if value is not None}

    def missing(self, job: Job) -> Job | None:
        """What of a job is still to do, or None.  A failed run is not tried again unless its row is removed."""
        if isinstance(job, RankJob):
            names = (*self.study.fixed, "C", "B")
            rows = [self.ranks.get(job.variant, job.seed, name) for name in names]
            failed = any(row and row["status"] == FAILED for row in rows)
            return None if failed or all(rows) else job
        left = []
        for step, names in job.points:
            row = self.row(job.spec, step)
            if row and row["status"] == FAILED:
                continue
            rest = tuple(name for name in names if self.figure(job.spec, step, name) is None)
            if rest:
                left.append((step, rest))
        return TrainJob(job.spec, tuple(left)) if left else None

    def asked(self, job: Job) -> bool:
        """Whether it is among the runs that were asked for (``only``: runs along these schedules)."""
        return self.only is None or (isinstance(job, TrainJob) and job.spec.schedule in self.only)

    # --- the fixed competitors --------------------------------------------------------------------------------------

    def scan(self, sampler: str) -> dict[str, list[float]]:
        """Figures of each fixed schedule over the scan's seeds."""
        return {
            name: list(self.by_seed(Spec(name, 0), self.study.steps, sampler, self.scan_seeds).values())
            for name in self.study.fixed
        }

    def best_fixed(self) -> dict[str, str] | None:
        """The best fixed schedule of the scan for each headline sampler, and under "all" by the mean of log FID.

        None until every run of the scan is done or has failed.
        """
        jobs = [
            TrainJob(Spec(name, seed), ((self.study.steps, self.study.headline),))
            for name in self.study.fixed
            for seed in self.scan_seeds
        ]
        if any(self.missing(job) for job in jobs):
            return None
        logs: dict[str, dict[str, float]] = {}
        for sampler in self.study.headline:
            scanned = self.scan(sampler)
            # a schedule that failed on some seed does not stand
            logs[sampler] = {
                name: float(np.mean(np.log(np.maximum(values, 1e-9))))
                for name, values in scanned.items()
                if len(values) == len(self.scan_seeds)
            }
        if not all(logs.values()):
            return None
        best = {sampler: min(values, key=values.__getitem__) for sampler, values in logs.items()}
        common = set.intersection(*(set(values) for values in logs.values()))
        best["all"] = min(sorted(common), key=lambda name: sum(values[name] for values in logs.values()))
        return best

    def rivals(self) -> list[str]:
        """The best fixed schedules, the overall one first; the placeholder until they are known."""
        best = self.best_fixed()
        return list(dict.fromkeys([best["all"], *best.values()])) if best else [BEST_FIXED]

    @property
    def rival(self) -> str:
        """The best fixed schedule overall, or the placeholder."""
        return self.rivals()[0]


# --- reports ------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """One table of a question's report: the file it is written to, a caption, columns and rows."""

    name: str
    caption: str
    columns: list[str]
    rows: list[dict[str, Any]]


class Report(NamedTuple):
    """A question's tables, what they say in sentences, and a picture (None: nothing to draw yet)."""

    sections: list[Section]
    sentences: list[str]
    picture: Picture | None = None


class Question(NamedTuple):
    """One of the study's questions: the jobs that it needs, and what it makes of their results."""

    number: int
    title: str
    jobs: Callable[[Ledger, Workshop], list[Job]]
    report: Callable[[Ledger], Report]


# --- what it takes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine for the base network: of a training step, of a forward pass of one image while sampling,
    of scoring one set of samples; ``measured``: medians of finished runs, not assumptions."""

    step: float
    forward: float
    score: float
    measured: bool = False


def relative_cost(study: Study, spec: Spec) -> float:
    """FLOPs of a step of this network, in steps of the base network."""
    usual = Spec("synchronous", 0)
    sized = replace(usual, size=spec.size, representations=spec.representations)
    return _step_flops(study.config(sized)) / _step_flops(study.config(usual))


@functools.cache
def _step_flops(config: Config) -> int:
    with torch.device("meta"):
        return train_flops(build_model(config))


def measured_rates(ledger: Ledger, hardware: str, assumed: Rates) -> Rates:
    """Medians over the finished runs of the base network on this hardware; the assumption where there is none."""
    step, forward, score = [], [], []
    count = ledger.study.common().sample.count
    for row in ledger.runs.rows.values():
        usual = row["size"] == "base" and row["representations"] == "pair"
        if row["status"] != DONE or row["same_as"] or row["hardware"] != hardware or not usual:
            continue
        names = [name for name in ledger.study.samplers if row[f"fid_{name}"]]
        if not names or not all(row[part] for part in SECONDS):
            continue  # emptied by hand, to be done again
        dopri5 = float(row.get("nfe_dopri5") or 0) or None
        evaluations = sum(evaluations_of(name, dopri5) for name in names)
        step.append(float(row["train_seconds"]) / int(row["step"]))
        forward.append(float(row["sample_seconds"]) / (evaluations * count))
        score.append(float(row["score_seconds"]) / len(names))
    if not step:
        return assumed
    return Rates(numbers.median(step), numbers.median(forward), numbers.median(score), True)


_SMALL = 0.3  # a step of a small network takes at least this part of the base network's: launches, not arithmetic


def seconds(job: Job, ledger: Ledger, workshop: Workshop, rates: Rates) -> float:
    """What a job will take."""
    study = ledger.study
    count = study.common().sample.count
    if isinstance(job, RankJob):
        samples = study.rank_samples * len(study.fixed) * 20
        return _probe_seconds(study, "C", job.variant, workshop, rates) + _SMALL * samples * rates.forward
    cost = relative_cost(study, job.spec)
    total = rates.step * cost * max(step for step, _ in job.points)
    for _, names in job.points:
        total += sum(evaluations_of(name) for name in names) * count * rates.forward * cost
        total += len(names) * rates.score
    if job.spec.schedule in LEARNED and not workshop.schedule_file(job.spec).exists():
        total += _probe_seconds(study, job.spec.schedule, job.spec.probe, workshop, rates)
    return total


def _probe_seconds(study: Study, estimator: str, variant: str, workshop: Workshop, rates: Rates) -> float:
    config = study.probe_config(estimator, variant, 0)
    with torch.device("meta"):
        per_step = train_flops(build_model(config)) * config.train.batch
    # the budget in steps of the main network, as if its FLOPs ran at a third of that network's rate
    return 3 * config.probe.budget * planned_flops(config) / per_step * rates.step
