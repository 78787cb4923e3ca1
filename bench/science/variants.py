"""Questions 5 to 8: few-step sampling, the objective, a third representation, and how samples are made."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.science import plots, specs
from bench.science.compare import against, fids, of_shared_seeds
from bench.science.plan import METRICS, Job, Ledger, Question, Report, Section, TrainJob
from bench.science.runner import Workshop
from bench.science.specs import OBJECTIVES, Spec, nfe
from bench.science.statistics import paired
from fastasync.schedule import load_schedule

# --- 5: function evaluations --------------------------------------------------------------------------------------


def _step_count_specs(ledger: Ledger, seed: int) -> list[Spec]:
    chosen = [Spec("C", seed, probe=f"for {steps} steps") for steps in ledger.study.few_steps]
    return [*(Spec(name, seed) for name in dict.fromkeys(["synchronous", ledger.rival, "C"])), *chosen]


def _step_counts(ledger: Ledger, workshop: Workshop) -> list[Job]:
    points = ((ledger.study.steps, ledger.study.curve),)
    return [TrainJob(spec, points) for seed in ledger.seeds for spec in _step_count_specs(ledger, seed)]


def _step_counts_report(ledger: Ledger) -> Report:
    study, rows, found, sentences = ledger.study, [], {}, []
    for spec in _step_count_specs(ledger, 0):
        rows.append({"schedule": spec.label, **fids(ledger, spec, study.curve)})
        found[spec.label] = {nfe(name) or 0: ledger.by_seed(spec, study.steps, name) for name in study.curve}
    series = of_shared_seeds(found)
    for steps in study.few_steps:
        tuned = Spec("C", 0, probe=f"for {steps} steps")
        for name in (name for name in study.curve if nfe(name) and specs.sampler(name).intervals == steps):
            change = against(ledger, tuned, Spec("C", 0), study.steps, name)
            if change:
                sentences.append(f"Chosen for {steps} steps, {name}: {change} against C ({change.verdict}).")
    for name in study.curve:
        for rival in dict.fromkeys(["synchronous", ledger.rival]):
            change = against(ledger, Spec("C", 0), Spec(rival, 0), study.steps, name)
            if change:
                sentences.append(f"{name}: C against {rival} {change} ({change.verdict}).")
    picture = None
    if any(any(points.values()) for points in series.values()):
        picture = plots.curves(series, "function evaluations")
    caption = "FID by function evaluations (the picture: at each number, of the seeds that all its curves have)."
    section = Section("evaluations", caption, ["schedule", *study.curve], rows)
    return Report([section], sentences, picture)


# --- 6: the objective -----------------------------------------------------------------------------------------------


def _objective_specs(ledger: Ledger, seed: int) -> list[Spec]:
    """C's schedule under every objective, and the best fixed one without the correction: is it the schedule or not?

    For synchronous the corrected and the uncorrected objective are the same.
    """
    ours = [Spec("C", seed, objective=name) for name in OBJECTIVES]
    return [*ours, *(Spec(ledger.rival, seed, objective=name) for name in ("corrected", "uncorrected"))]


def _objectives(ledger: Ledger, workshop: Workshop) -> list[Job]:
    points = ((ledger.study.steps, ledger.study.headline),)
    return [TrainJob(spec, points) for seed in ledger.seeds for spec in _objective_specs(ledger, seed)]


def _objectives_report(ledger: Ledger) -> Report:
    study, rows, sentences = ledger.study, [], []
    specs = _objective_specs(ledger, 0)
    for spec in specs:
        rows.append({"schedule": spec.schedule, "objective": spec.objective, **fids(ledger, spec, study.headline)})
    rival = Spec(ledger.rival, 0, objective="uncorrected")
    pairs = [(spec, replace(spec, objective="corrected")) for spec in specs if spec.objective != "corrected"]
    for ours, theirs in (*pairs, (Spec("C", 0, objective="uncorrected"), rival)):
        for sampler in study.headline:
            found = against(ledger, ours, theirs, study.steps, sampler)
            if found:
                names = [f"{spec.schedule} {spec.objective}" for spec in (ours, theirs)]
                sentences.append(f"{sampler}: {names[0]} against {names[1]} {found} ({found.verdict}).")
    columns = ["schedule", "objective", *study.headline]
    return Report([Section("objective", "Objectives: FID.", columns, rows)], sentences)


# --- 7: three representations -----------------------------------------------------------------------------------------


def _triple(ledger: Ledger, seed: int) -> list[Spec]:
    names = dict.fromkeys(["synchronous", ledger.rival, "C"])
    return [Spec(name, seed, representations="triple") for name in names]


def _third(ledger: Ledger, workshop: Workshop) -> list[Job]:
    points = ((ledger.study.steps, ledger.study.headline),)
    pair = [Spec(name, seed) for seed in ledger.seeds for name in ("synchronous", "C")]
    triple = [spec for seed in ledger.seeds for spec in _triple(ledger, seed)]
    return [TrainJob(spec, points) for spec in (*pair, *triple)]


def _third_report(ledger: Ledger) -> Report:
    study, rows, orders, sentences = ledger.study, [], [], []
    for spec in (Spec("synchronous", 0), Spec("C", 0), *_triple(ledger, 0)):
        rows.append({"representations": spec.representations, "schedule": spec.schedule,
                     **fids(ledger, spec, study.headline)})  # fmt: skip
    for seed in ledger.seeds:
        path = Workshop.schedule_path(ledger.out, Spec("C", seed, representations="triple"))
        if path.exists():
            schedule = load_schedule(path)
            halfway = [float(schedule.invert(k, torch.tensor(0.5))) for k in range(schedule.count)]
            order = sorted(zip(halfway, schedule.names))
            orders.append({"seed": seed, "kind": schedule.kind,
                           "order (s at half)": ", ".join(f"{name} {s:.2f}" for s, name in order)})  # fmt: skip
    for sampler in study.headline:
        for ours, theirs in (
            (Spec("C", 0, representations="triple"), Spec("synchronous", 0, representations="triple")),
            (Spec("C", 0, representations="triple"), Spec("C", 0)),
        ):
            found = against(ledger, ours, theirs, study.steps, sampler)
            if found:
                sentences.append(f"{sampler}: {ours.label} against {theirs.label} {found} ({found.verdict}).")
    sections = [
        Section("third", "Two and three representations: FID.", ["representations", "schedule", *study.headline], rows),
        Section("order", "The learned order.", ["seed", "kind", "order (s at half)"], orders),
    ]
    return Report(sections, sentences)


# --- 8: how samples are made ------------------------------------------------------------------------------------------


def _integrator_specs(seed: int) -> list[Spec]:
    """Two fixed schedules, one that moves together and one that ends steeply: nothing that another question finds."""
    return [Spec(name, seed) for name in ("synchronous", "power:3")]


def _integrators(ledger: Ledger, workshop: Workshop) -> list[Job]:
    exact = [name for name in ledger.study.headline if nfe(name) is None]
    names = (*(name for group in ledger.study.integrators for name in group), *exact)
    points = ((ledger.study.steps, names),)
    return [TrainJob(spec, points) for seed in ledger.seeds for spec in _integrator_specs(seed)]


def _integrators_report(ledger: Ledger) -> Report:
    study, sections, sentences = ledger.study, [], []
    exact = [name for name in study.headline if nfe(name) is None]
    for group in study.integrators:
        columns, usual = [*group, *exact], group[0]
        rows = [
            {"schedule": spec.label, "figure": metric, **fids(ledger, spec, columns, metric=metric)}
            for spec in _integrator_specs(0)
            for metric in METRICS
        ]
        if any(row[name] for row in rows for name in columns):
            caption = f"About {nfe(usual)} evaluations; after ^ the grid's power, after @ the last step's local time."
            sections.append(Section(f"about-{nfe(usual)}", caption, ["schedule", "figure", *columns], rows))
        for spec in _integrator_specs(0):
            for name in group[1:]:
                found = paired(*(ledger.by_seed(spec, study.steps, sampler) for sampler in (name, usual)))
                if found:
                    sentences.append(f"{spec.label}: {name} against {usual} {found} ({found.verdict}).")
    return Report(sections, sentences)


STEP_COUNTS = Question(5, "FID against function evaluations", _step_counts, _step_counts_report)
OBJECTIVE = Question(6, "Whether the corrected objective matters", _objectives, _objectives_report)
INTEGRATORS = Question(8, "How samples are made: integrator and time grid", _integrators, _integrators_report)
THIRD = Question(7, "A third representation", _third, _third_report)
