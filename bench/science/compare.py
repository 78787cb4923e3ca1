"""Cells that several questions' tables share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.science.plan import Ledger
from bench.science.specs import Spec
from bench.science.statistics import Paired, paired, summary


def fids(
    ledger: Ledger,
    spec: Spec,
    samplers: Sequence[str],
    seeds: Sequence[int] | None = None,
    step: int | None = None,
    metric: str = "fid",
) -> dict[str, Any]:
    """``{sampler: "mean ± deviation"}`` over seeds, and how many where some lack; empty where nothing is measured."""
    cells = {}
    for sampler in samplers:
        values = list(ledger.by_seed(spec, step or ledger.study.steps, sampler, seeds, metric).values())
        lacking = len(values) < len(ledger.seeds if seeds is None else seeds)
        count = f" ({len(values)} seed{'s' if len(values) > 1 else ''})" if lacking else ""
        cells[sampler] = f"{summary(values)}{count}" if values else ""
    return cells


def geometric(ledger: Ledger, spec: Spec, samplers: Sequence[str], step: int | None = None) -> str:
    """The geometric mean of the FID over samplers: mean ± deviation over the seeds that have all of them."""
    found = [ledger.by_seed(spec, step or ledger.study.steps, sampler) for sampler in samplers]
    seeds = set.intersection(*(set(values) for values in found))
    means = [math.exp(sum(math.log(max(values[s], 1e-9)) for values in found) / len(found)) for s in sorted(seeds)]
    return str(summary(means)) if means else ""


def against(ledger: Ledger, ours: Spec, theirs: Spec, step: int, sampler: str, metric: str = "fid") -> Paired | None:
    """Our line of training against theirs, paired by seed; None without a common seed."""
    return paired(
        ledger.by_seed(ours, step, sampler, metric=metric), ledger.by_seed(theirs, step, sampler, metric=metric)
    )


def of_shared_seeds(found: Mapping[str, Mapping[int, Mapping[int, float]]]) -> dict[str, dict[int, list[float]]]:
    """Curve -> x -> values, from curve -> x -> seed -> value: at each x of the seeds that every curve measured there
    has, since means over different seeds do not compare.  Curves with no values at all are left out."""
    shared: dict[str, dict[int, list[float]]] = {label: {} for label, points in found.items() if any(points.values())}
    for x in sorted({x for points in found.values() for x in points}):
        here = {label: found[label][x] for label in shared if found[label].get(x)}
        seeds = set.intersection(*map(set, here.values())) if here else set()
        for label, values in here.items() if seeds else ():
            shared[label][x] = [values[seed] for seed in sorted(seeds)]
    return shared
