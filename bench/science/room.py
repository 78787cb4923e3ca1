"""Question 9: how much room is there above the best fixed schedule, whatever rule chooses?

Random members of the learned class, and smooth leads of many sizes and places (convex or not), are trained on the
scan's first seed, the best of them again on the headline seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Picture

from bench.science import plots
from bench.science.compare import against, fids, geometric
from bench.science.plan import Job, Ledger, Question, Report, Section, TrainJob
from bench.science.runner import Workshop
from bench.science.specs import MEMBERS, SCAN_SEED, Spec
from fastasync.schedule import named_schedule


def _members(ledger: Ledger) -> list[str]:
    return [*(f"random:{number}" for number in range(ledger.study.members)), *ledger.study.shapes]


def _means(ledger: Ledger, names: Sequence[str]) -> dict[str, float]:
    """Mean over the headline samplers of log FID on the scan's first seed, of those that have all of them."""
    means = {}
    for name in names:
        found = [ledger.figure(Spec(name, SCAN_SEED), ledger.study.steps, sampler) for sampler in ledger.study.headline]
        known = [math.log(max(value, 1e-9)) for value in found if value is not None]
        if len(known) == len(found):
            means[name] = float(np.mean(known))
    return means


def _best(ledger: Ledger) -> str | None:
    """The best of them, once every one has been trained (or has failed)."""
    means = _means(ledger, _members(ledger))
    return None if any(map(ledger.missing, _first(ledger))) else min(means, key=means.__getitem__, default=None)


def _first(ledger: Ledger) -> list[Job]:
    points = ((ledger.study.steps, ledger.study.headline),)
    return [TrainJob(Spec(name, SCAN_SEED), points) for name in _members(ledger)]


def _jobs(ledger: Ledger, workshop: Workshop) -> list[Job]:
    points = ((ledger.study.steps, ledger.study.headline),)
    jobs, best = _first(ledger), _best(ledger)
    again = dict.fromkeys([best, "synchronous", ledger.rival]) if best else ()
    return [*jobs, *(TrainJob(Spec(name, seed), points) for seed in ledger.seeds for name in again if name)]


def _picture(ledger: Ledger) -> Picture | None:
    """FID by the last headline sampler against the lead, on the scan's first seed; None before anything is trained."""
    reps, sampler = ledger.study.common().representations, ledger.study.headline[-1]
    families: dict[str, list[tuple[float, float]]] = {}
    for name in (*ledger.study.fixed, *_members(ledger)):
        value = ledger.figure(Spec(name, SCAN_SEED), ledger.study.steps, sampler)
        if value is None:
            continue
        kind, _, rest = name.partition(":")
        made = MEMBERS.get(kind, named_schedule)
        label = f"at a mean time of {rest.partition('@')[2]}" if kind == "lead" else kind
        families.setdefault(label, []).append((made(name, reps.names, reps.roles).lead(), value))
    joined = {label: pairs for label, pairs in families.items() if len(pairs) > 1 and label != "random"}
    return plots.leads(joined, {k: v for k, v in families.items() if k not in joined}) if families else None


def _report(ledger: Ledger) -> Report:
    study, rows, again, sentences = ledger.study, [], [], []
    reps = study.common().representations
    fixed, members = _means(ledger, study.fixed), _means(ledger, _members(ledger))
    for name in sorted(members, key=members.__getitem__):
        schedule = MEMBERS[name.partition(":")[0]](name, reps.names, reps.roles)
        rows.append(
            {"schedule": name, "lead": schedule.lead(), **fids(ledger, Spec(name, 0), study.headline, [SCAN_SEED])}
        )
    best = _best(ledger)
    if best and fixed:
        rival = min(fixed, key=fixed.__getitem__)
        change = math.expm1(members[best] - fixed[rival])
        sentences.append(
            f"On the seed that they were chosen on, the best of {len(members)} schedules is {change:+.1%} against "
            f"the best of {len(fixed)} fixed schedules ({rival}); their spread is "
            f"{math.expm1(np.std(list(members.values()), ddof=1)):.1%}."
        )
        for name in dict.fromkeys(["synchronous", ledger.rival, best]):
            again.append({"schedule": name, **fids(ledger, Spec(name, 0), study.headline),
                          "all": geometric(ledger, Spec(name, 0), study.headline)})  # fmt: skip
        for sampler in study.headline:
            found = against(ledger, Spec(best, 0), Spec(ledger.rival, 0), study.steps, sampler)
            if found:
                sentences.append(f"{sampler}: {best} against {ledger.rival} {found} ({found.verdict}).")
    sections = [
        Section("members", f"Random members of the learned class, and leads of L at m (lead:L@m), on seed {SCAN_SEED}: "
                "FID, the best first.",
                ["schedule", "lead", *study.headline], rows),
        Section("again", "The best of them on the headline seeds: FID.", ["schedule", *study.headline, "all"], again),
    ]  # fmt: skip
    return Report(sections, sentences, _picture(ledger))


QUESTION = Question(9, "How much room there is above the best fixed schedule", _jobs, _report)
