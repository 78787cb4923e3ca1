"""Questions 3 and 4: does the schedule carry over to a larger network and longer training, and what does it save?"""

from __future__ import annotations

from bench.science import plots
from bench.science.compare import against, fids, of_shared_seeds
from bench.science.plan import Job, Ledger, Question, Report, Section, TrainJob
from bench.science.runner import Workshop
from bench.science.specs import Spec
from bench.science.statistics import steps_to_reach, summary


def _schedules(ledger: Ledger) -> list[str]:
    return list(dict.fromkeys(["synchronous", ledger.rival, "C"]))


def _larger(ledger: Ledger, workshop: Workshop) -> list[Job]:
    """A larger network at the same steps, and the base network at four times the steps."""
    study = ledger.study
    large: list[Job] = [
        TrainJob(Spec(name, seed, size="large"), ((study.steps, study.headline),))
        for seed in ledger.seeds
        for name in _schedules(ledger)
    ]
    return [*large, *_long(ledger, workshop)]


def _long(ledger: Ledger, workshop: Workshop) -> list[Job]:
    """The learning rate is constant, so one long run holds every shorter one: its checkpoints are scored on the way.

    By the last sampler, which question 4 reads; at the budget and at the end by all of them.
    """
    study = ledger.study
    whole = (study.steps, study.milestones[-1])
    points = tuple((step, study.headline if step in whole else study.headline[-1:]) for step in study.milestones)
    return [TrainJob(Spec(name, seed), points) for seed in ledger.seeds for name in _schedules(ledger)]


def _transfer_report(ledger: Ledger) -> Report:
    study, rows, sentences = ledger.study, [], []
    longer = [step for step in study.milestones if step > study.steps]
    for size, step in (("base", study.steps), ("large", study.steps), *(("base", step) for step in longer)):
        for name in _schedules(ledger):
            spec = Spec(name, 0, size=size)
            rows.append(
                {"network": size, "steps": step, "schedule": name, **fids(ledger, spec, study.headline, step=step)}
            )
        for sampler in study.headline:
            for rival in _schedules(ledger)[:-1]:
                found = against(ledger, Spec("C", 0, size=size), Spec(rival, 0, size=size), step, sampler)
                if found:
                    sentences.append(f"{size}, {step} steps, {sampler}: C against {rival} {found} ({found.verdict}).")
    caption = "FID of the schedule found for the base network and budget, elsewhere."
    return Report([Section("transfer", caption, ["network", "steps", "schedule", *study.headline], rows)], sentences)


def _saved(ledger: Ledger, ours: str, rival: str, budget: int) -> list[float | None]:
    """For each seed, how many times fewer steps ``ours`` needs for what ``rival`` has after ``budget``; None: it does
    not get there.  Seeds that say nothing are left out: measured too late, or not far enough."""
    study = ledger.study
    sampler, last = study.headline[-1], study.milestones[-1]
    saved: list[float | None] = []
    for seed, goal in ledger.by_seed(Spec(rival, 0), budget, sampler).items():
        curve = [(step, ledger.figure(Spec(ours, seed), step, sampler)) for step in study.milestones]
        known = [(step, value) for step, value in curve if value is not None]
        if len(known) < 2 or known[0][1] <= goal:
            continue
        reached = steps_to_reach([step for step, _ in known], [value for _, value in known], goal)
        if reached is None and known[-1][0] < last:
            continue
        saved.append(None if reached is None else budget / reached)
    return saved


def _efficiency_report(ledger: Ledger) -> Report:
    study, rows, sentences = ledger.study, [], []
    sampler = study.headline[-1]
    steps, last = study.milestones, study.milestones[-1]
    found = {
        name: {step: ledger.by_seed(Spec(name, 0), step, sampler) for step in steps} for name in _schedules(ledger)
    }
    series = of_shared_seeds(found)
    goals = {}
    for rival in _schedules(ledger)[:-1]:
        final = list(found[rival][study.steps].values())
        if final:
            goals[f"{rival} at {study.steps} steps"] = summary(final).mean
    for ours in dict.fromkeys(["C", ledger.rival]):
        for rival in _schedules(ledger)[:-1]:
            for budget in (study.steps, last) if rival != ours else ():
                saved = _saved(ledger, ours, rival, budget)
                if not saved:
                    continue
                reached_by = [value for value in saved if value is not None]
                speedup = str(summary(reached_by)) if reached_by else "never"
                rows.append(
                    {
                        "schedule": ours,
                        "goal": f"{rival} at {budget} steps",
                        "reached by": f"{len(reached_by)} of {len(saved)} seeds",
                        "times fewer steps": speedup,
                    }
                )
                what = f"what {rival} has after {budget} steps"
                often = f"{ours} reaches {what} with {speedup} times fewer steps."
                sentences.append(often if reached_by else f"{ours} does not reach {what}.")
    caption = (
        f"Steps needed for the FID of others ({sampler}; straight lines in log step and log FID; the picture: at each "
        "step, of the seeds that all its curves have)."
    )
    section = Section("efficiency", caption, ["schedule", "goal", "reached by", "times fewer steps"], rows)
    picture = plots.curves(series, "training steps", goals) if any(any(p.values()) for p in series.values()) else None
    return Report([section], sentences, picture)


LARGER = Question(
    3, "Whether the schedule carries over to a larger network and longer training", _larger, _transfer_report
)
EFFICIENCY = Question(4, "Training steps that the learned schedule saves", _long, _efficiency_report)
