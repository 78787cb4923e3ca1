"""Question 1: which rule (A, B, C, D) gives the best trained model, and does it beat every fixed schedule?"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from bench.science import plots
from bench.science.compare import against, fids, geometric
from bench.science.plan import Job, Ledger, Question, RankJob, Report, Section, TrainJob
from bench.science.runner import Workshop
from bench.science.specs import Spec
from bench.science.statistics import spearman, summary
from fastasync.probe.generation import gentle_score
from fastasync.probe.surface import path_gap
from fastasync.schedule import kinetic_energy, load_schedule, named_schedule

# variants: C scored by as many steps as the sampler's finest grid has (tried on seeds 3 to 8, not better), and as it
# was until 2026-11-26, and until that day's evening
EARLIER = ("for 25 steps", "independent", "by distance alone")


def scan_jobs(ledger: Ledger) -> list[Job]:
    """Every fixed schedule on the scan's own seeds."""
    points = ((ledger.study.steps, ledger.study.headline),)
    return [TrainJob(Spec(name, seed), points) for seed in ledger.scan_seeds for name in ledger.study.fixed]


def rank_jobs(ledger: Ledger, variants: tuple[str, ...] = ("base",)) -> list[Job]:
    """The probes that rank the fixed schedules."""
    return [RankJob(variant, seed) for variant in variants for seed in ledger.seeds]


def _jobs(ledger: Ledger, workshop: Workshop) -> list[Job]:
    points = ((ledger.study.steps, ledger.study.headline),)
    schedules = dict.fromkeys(["synchronous", *ledger.rivals(), *ledger.study.rules])
    headline = [TrainJob(Spec(name, seed), points) for seed in ledger.seeds for name in schedules]
    return [*rank_jobs(ledger), *scan_jobs(ledger), *headline]


def _scan(ledger: Ledger) -> Section:
    rows = []
    best = ledger.best_fixed() or {}
    for name in ledger.study.fixed:
        specs = Spec(name, 0)
        row = {"schedule": name, **fids(ledger, specs, ledger.study.headline, ledger.scan_seeds)}
        row["best for"] = ", ".join(sampler for sampler, winner in best.items() if winner == name)
        rows.append(row)
    columns = ["schedule", *ledger.study.headline, "best for"]
    return Section("scan", "Fixed schedules on the scan's own seeds: FID, mean ± deviation.", columns, rows)


def trained_against_synchronous(ledger: Ledger, name: str, seed: int | None = None) -> float | None:
    """Mean over the scan's seeds (or one) and headline samplers of log(FID / FID of synchronous), paired by seed."""
    seeds = ledger.scan_seeds if seed is None else [seed]
    logs = []
    for sampler in ledger.study.headline:
        ours = ledger.by_seed(Spec(name, 0), ledger.study.steps, sampler, seeds)
        base = ledger.by_seed(Spec("synchronous", 0), ledger.study.steps, sampler, seeds)
        logs += [math.log(max(ours[s], 1e-9) / max(base[s], 1e-9)) for s in ours.keys() & base.keys()]
    return float(np.mean(logs)) if logs else None


def rank_agreement(ledger: Ledger, variant: str, seed: int) -> dict[str, float | int] | None:
    """Spearman's correlation of a probe's order of the fixed schedules with the trained: by C's score, distance and J.

    Its own choices are left out: not every probe's were trained, and correlations of different sets do not compare.
    """
    distance: list[tuple[float, float]] = []
    score: list[tuple[float, float]] = []
    objective: list[tuple[float, float]] = []
    energy = ledger.study.probe_config("C", variant, seed).probe.energy
    reps = ledger.study.common().representations
    for name in ledger.study.fixed:
        row, trained = ledger.ranks.get(variant, seed, name), trained_against_synchronous(ledger, name)
        if row is None or row["status"] != "done" or trained is None:
            continue
        if not math.isnan(apart := ledger.fact(row, "distance")):
            with torch.no_grad():
                kinetic = float(kinetic_energy(named_schedule(name, reps.names, reps.roles)))
            distance.append((apart, trained))
            score.append((gentle_score(apart, kinetic, energy), trained))
        objective.append((ledger.fact(row, "objective"), trained))
    if len(score) < 3:
        return None
    return {
        "schedules": len(score),
        "Spearman of C": spearman(*zip(*score)),
        "Spearman of the distance": spearman(*zip(*distance)),
        "Spearman of B": spearman(*zip(*objective)),
    }


def seed_agreement(ledger: Ledger) -> list[float]:
    """Spearman's correlation of the trained order of the fixed schedules between each two of the scan's seeds.

    Where two seeds disagree there is no order for a probe to predict.
    """
    found = []
    for first, second in itertools.combinations(ledger.scan_seeds, 2):
        pairs = [
            (one, two)
            for name in ledger.study.fixed
            if (one := trained_against_synchronous(ledger, name, first)) is not None
            and (two := trained_against_synchronous(ledger, name, second)) is not None
        ]
        if len(pairs) > 2:
            found.append(spearman([one for one, _ in pairs], [two for _, two in pairs]))
    return [value for value in found if not math.isnan(value)]


def _choices(ledger: Ledger) -> Section:
    rows = []
    for rule, variant in (*((rule, "base") for rule in ledger.study.rules), *(("C", name) for name in EARLIER)):
        first = None
        for seed in ledger.seeds:
            spec = Spec(rule, seed, probe=variant)
            path = Workshop.schedule_path(ledger.out, spec)
            if not path.exists():
                continue
            schedule = load_schedule(path)
            first = first or schedule
            rank = ledger.ranks.get(variant, seed, rule)
            row = {"rule": spec.label, "seed": seed, "kind": schedule.kind, "lead": schedule.lead()}
            row["gap to the first seed's path"] = path_gap(schedule, first)
            row["label"] = rank["chosen"] if rank and rule == "C" else ""
            rows.append(row)
    columns = ["rule", "seed", "kind", "label", "lead", "gap to the first seed's path"]
    return Section(
        "choices", "What each rule chose, seed by seed (gap: largest difference of a local time).", columns, rows
    )


def _ranking(ledger: Ledger) -> Section:
    rows = []
    for seed in ledger.seeds:
        found = rank_agreement(ledger, "base", seed)
        if found:
            rows.append({"probe's seed": seed, **found})
    columns = ["probe's seed", "schedules", "Spearman of C", "Spearman of the distance", "Spearman of B"]
    caption = "Rank correlation of the probe with trained networks (1: the same order)."
    return Section("ranking", caption, columns, rows)


def _report(ledger: Ledger) -> Report:
    study = ledger.study
    schedules = dict.fromkeys(["synchronous", *ledger.rivals(), *study.rules])
    rows = []
    others = [Spec("C", 0, probe=variant) for variant in EARLIER if variant in study.probes]
    for spec in (*(Spec(name, 0) for name in schedules), *others):
        row = {"schedule": spec.label, **fids(ledger, spec, study.headline)}
        if any(row[sampler] for sampler in study.headline):
            rows.append({**row, "all": geometric(ledger, spec, study.headline)})
    headline = Section("headline", "FID on the headline seeds, mean ± deviation; all: geometric mean.",
                       ["schedule", *study.headline, "all"], rows)  # fmt: skip
    pairs, sentences = [], []
    best = ledger.best_fixed() or {}
    for spec in (Spec(rule, 0) for rule in study.rules):
        for sampler in study.headline:
            for rival in dict.fromkeys([best.get(sampler), "synchronous"]):
                found = against(ledger, spec, Spec(rival, 0), study.steps, sampler) if rival else None
                if found is None:
                    continue
                pairs.append({"rule": spec.label, "sampler": sampler, "against": rival, "change": str(found),
                              "verdict": found.verdict})  # fmt: skip
                sentences.append(f"{spec.label} against {rival} at {sampler}: {found} ({found.verdict}).")
    for spec in others:
        for sampler in study.headline:
            found = against(ledger, Spec("C", 0), spec, study.steps, sampler)
            if found:
                sentences.append(f"C against {spec.label} at {sampler}: {found} ({found.verdict}).")
    paired = Section("paired", "Change of FID paired by seed, against the best fixed schedule at that sampler and "
                     "against synchronous.", ["rule", "sampler", "against", "change", "verdict"], pairs)  # fmt: skip
    ranking = _ranking(ledger)
    for column in ("Spearman of C", "Spearman of the distance", "Spearman of B"):
        values = [row[column] for row in ranking.rows if not math.isnan(row[column])]
        if values:
            sentences.append(f"{column} with the trained order: {summary(values)} over {len(values)} probes.")
    agreement = seed_agreement(ledger)
    if agreement:
        sentences.append(
            "Trained order of the fixed schedules, one scan seed against another: Spearman "
            f"{summary(agreement)} over {len(agreement)} pairs: how well the order that a probe should predict repeats."
        )
    picture = None
    if rows:
        picture = plots.seed_points(
            {
                name: {
                    sampler: list(ledger.by_seed(replace(Spec(name, 0)), study.steps, sampler).values())
                    for sampler in study.headline
                }
                for name in schedules
                if any(ledger.by_seed(Spec(name, 0), study.steps, sampler) for sampler in study.headline)
            },
            {sampler: ledger.scan(sampler) for sampler in study.headline},
        )
    return Report([headline, paired, _scan(ledger), ranking, _choices(ledger)], sentences, picture)


QUESTION = Question(1, "Which rule gives the best trained model", _jobs, _report)
