"""What a rule chooses that reads the probe's loss surface alone: ``python -m bench.experiments.loss_rule``.

From the rows of the study (no GPU, no training): of its fixed schedules the one with the least ``log L + energy x KE``
on each probe's surface (L: the corrected loss along the schedule, KE: its kinetic energy), for several weights, how far
its trained network is above the best one (100 times the log of FID, mean over the headline samplers, the scan's seeds),
and the mean rank correlation with the trained order.  Beside it B's ``L + beta KE`` over the same schedules, C's rule
on the same probes (the log of the distance in the place of log L), and one schedule for all.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.science.plan import DONE, Ledger
from bench.science.specs import STUDIES, Study
from bench.science.statistics import spearman
from fastasync.probe.generation import gentle_score
from fastasync.probe.learn import chosen_beta
from fastasync.schedule import kinetic_energy, named_schedule

ENERGIES = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.7)
BETAS = (0.03, 0.1, 0.2, 0.3)
RESULTS = Path(__file__).resolve().parents[1] / "science" / "results"
Values = dict[str, float]  # by schedule


def kinetic_energies(study: Study) -> Values:
    """KE of the study's fixed schedules on its representations."""
    representations = study.common().representations
    schedules = {name: named_schedule(name, representations.names, representations.roles) for name in study.fixed}
    return {name: float(kinetic_energy(schedule)) for name, schedule in schedules.items()}


def ranked(ledger: Ledger, column: str) -> dict[tuple[str, int], Values]:
    """What each probe says of every fixed schedule: (variant, seed) -> schedule -> the column's number."""
    found: dict[tuple[str, int], Values] = defaultdict(dict)
    for row in ledger.ranks.rows.values():
        if row["status"] == DONE and row["schedule"] in ledger.study.fixed:
            found[row["variant"], int(row["seed"])][row["schedule"]] = ledger.fact(row, column)
    return dict(found)


def trained(ledger: Ledger) -> Values:
    """Mean over the headline samplers and the scan's seeds of log FID, of each fixed schedule that has them all."""
    scans = [ledger.scan(sampler) for sampler in ledger.study.headline]
    logs = {name: [np.log(scan[name]).mean() for scan in scans if scan[name]] for name in ledger.study.fixed}
    return {name: float(np.mean(values)) for name, values in logs.items() if len(values) == len(scans)}


def scores(values: Values, kinetics: Values, energy: float) -> Values:
    """``log value + energy x KE`` of each schedule."""
    return {name: gentle_score(values[name], kinetics[name], energy) for name in kinetics}


def describe(found: Sequence[Values], above: Values) -> str:
    """What these scores of the probes choose, and how they rank."""
    chosen = [min(each, key=each.__getitem__) for each in found]
    order = [spearman([each[name] for name in above], list(above.values())) for each in found]
    mean, worst = sum(map(above.__getitem__, chosen)) / len(chosen), max(map(above.__getitem__, chosen))
    counts = Counter(chosen).most_common()
    said = ", ".join(f"{name} ({above[name]:.1f}) {count} times" for name, count in counts)
    return f"{mean:.1f} above the best on average, {worst:.1f} at most, order {sum(order) / len(order):+.2f}: {said}"


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.loss_rule", description=__doc__)
    top.add_argument("--preset", choices=STUDIES, action="append", help="default: all")
    for preset in top.parse_args(argv).preset or STUDIES:
        ledger = Ledger(STUDIES[preset], [], RESULTS / preset)
        quality, probe = trained(ledger), ledger.study.common().probe
        kinetics = {name: value for name, value in kinetic_energies(ledger.study).items() if name in quality}
        beta = chosen_beta(probe.beta)  # the rows hold L + beta KE
        losses = [
            {name: each[name] - beta * kinetics[name] for name in kinetics}
            for each in ranked(ledger, "objective").values()
        ]
        above = {name: 100 * (value - min(quality.values())) for name, value in quality.items()}
        always = ", ".join(f"{name} {above[name]:.1f}" for name in ("synchronous", "power:2"))
        print(f"{preset}: {len(losses)} probes; always {always}")
        for energy in ENERGIES:
            print(f"  energy {energy:g}: {describe([scores(each, kinetics, energy) for each in losses], above)}")
        for beta in BETAS:
            sums = [{name: each[name] + beta * kinetics[name] for name in kinetics} for each in losses]
            print(f"  L + beta KE, beta {beta:g}: {describe(sums, above)}")
        found = [scores(each, kinetics, probe.energy) for each in ranked(ledger, "distance").values()]
        print(f"  C, energy {probe.energy:g}: {describe(found, above)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
