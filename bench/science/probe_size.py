"""Question 2: how small can the probe be, and can the main run start from its weights?"""

from __future__ import annotations

import math
from typing import Any

from bench.science import plots
from bench.science.compare import fids
from bench.science.plan import Job, Ledger, Question, Report, Section, TrainJob
from bench.science.rules import EARLIER, rank_agreement, rank_jobs, scan_jobs
from bench.science.runner import Workshop
from bench.science.specs import Spec
from bench.science.statistics import paired, summary

_SHAPE = "main shape"  # the variant with the main network's shape: the one whose weights can be taken over
_STARTED = ("C", "synchronous")  # the latter tells what the start is worth without the schedule


def _variants(ledger: Ledger) -> tuple[str, ...]:
    return tuple(name for name in ledger.study.probes if not name.startswith("for ") and name not in EARLIER)


def warm(seed: int, schedule: str = "C") -> Spec:
    """The run that starts from the weights of the probe of its seed, which chose C's schedule."""
    return Spec(schedule, seed, probe=_SHAPE, start="probe")


def cold(seed: int, schedule: str = "C") -> Spec:
    """The same schedule, trained from scratch for the whole budget."""
    return Spec(schedule, seed, probe=_SHAPE) if schedule == "C" else Spec(schedule, seed)


def _jobs(ledger: Ledger, workshop: Workshop) -> list[Job]:
    study = ledger.study
    # the probe's own steps are part of the warm run's budget
    rest = study.steps - workshop.probe_steps(_SHAPE)
    jobs: list[Job] = [*rank_jobs(ledger, _variants(ledger)), *scan_jobs(ledger)]
    for schedule in _STARTED:
        for seed in ledger.seeds:
            jobs.append(TrainJob(cold(seed, schedule), ((study.steps, study.headline),)))
            jobs.append(TrainJob(warm(seed, schedule), ((rest, study.headline),)))
    return jobs


def _warm_steps(ledger: Ledger) -> int | None:
    """The step at which the warm runs were scored."""
    steps = [
        int(row["step"]) for row in ledger.runs.rows.values() if row["start"] == "probe" and row["probe"] == _SHAPE
    ]
    return max(steps, default=None)


def _report(ledger: Ledger) -> Report:
    rows, points, sentences = [], {}, []
    for variant in _variants(ledger):
        own = [ledger.ranks.get(variant, seed, "C") for seed in ledger.seeds]
        facts = [row for row in own if row and row["status"] == "done"]
        found = [rank for seed in ledger.seeds if (rank := rank_agreement(ledger, variant, seed))]
        if not facts:
            continue
        row: dict[str, Any] = {
            "probe": variant,
            "steps": facts[0]["probe_steps"],
            "share of the run": f"{ledger.fact(facts[0], 'budget'):.2%}",
            "FLOPs": facts[0]["flops"],
            "seconds": str(summary([ledger.fact(fact, "probe_seconds") for fact in facts])),
            "choices": ", ".join(fact["chosen"] for fact in facts),
        }
        for column in ("Spearman of C", "Spearman of B"):
            values = [float(rank[column]) for rank in found if not math.isnan(rank[column])]
            row[column] = str(summary(values)) if values else ""
            if values and column == "Spearman of C":
                points[variant] = [(ledger.fact(facts[0], "flops"), value) for value in values]
        row["schedules"] = found[0]["schedules"] if found else ""
        rows.append(row)
    columns = ["probe", "steps", "share of the run", "FLOPs", "seconds", "schedules", "Spearman of C", "Spearman of B"]
    sections = [Section("size", "Probes and how they rank the trained schedules.", [*columns, "choices"], rows)]
    step = _warm_steps(ledger)
    if step is not None:
        study, pairs = ledger.study, []
        for schedule in _STARTED:
            for start, spec, at in (
                ("scratch", cold(0, schedule), study.steps),
                ("the probe's weights", warm(0, schedule), step),
            ):
                figures = fids(ledger, spec, study.headline, step=at)
                pairs.append({"schedule": schedule, "start": start, "steps": at, **figures})
            for sampler in study.headline:
                # different steps: pair by hand
                ours = ledger.by_seed(warm(0, schedule), step, sampler)
                found = paired(ours, ledger.by_seed(cold(0, schedule), study.steps, sampler))
                if found:
                    sentences.append(f"{schedule} from the probe's weights at {sampler}: {found} ({found.verdict}).")
        caption = "The same schedule from scratch and from the probe's weights, the probe's steps counted: FID."
        sections.append(Section("start", caption, ["schedule", "start", "steps", *study.headline], pairs))
    picture = plots.scatter(points, "FLOPs of the probe", "Spearman with trained networks") if points else None
    return Report(sections, sentences, picture)


QUESTION = Question(2, "How small the probe can be, and starting from its weights", _jobs, _report)
