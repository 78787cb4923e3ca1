"""What a rule chooses that reads the probe's loss surface alone: ``python -m bench.experiments.loss_rule``.

From the rows of the study (no GPU, no training): of its fixed schedules the one with the least ``log L + energy x KE``
on each probe's surface (L: the corrected loss along the schedule, KE: its kinetic energy), for several weights, how far
its trained network is above the best one (100 times the log of FID, mean over the headline samplers, the scan's seeds),
and the mean rank correlation with the trained order.  Beside it B's ``L + beta KE`` over the same schedules, C's rule
on the same probes (the log of the distance in the place of log L), and one schedule for all.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench.science.specs import STUDIES, Study
from bench.science.statistics import spearman
from fastasync.probe.learn import chosen_beta
from fastasync.schedule import kinetic_energy, named_schedule

ENERGIES = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.7)
BETAS = (0.03, 0.1, 0.2, 0.3)
RESULTS = Path(__file__).resolve().parents[1] / "science" / "results"
Values = dict[str, float]  # by schedule


def kinetic(study: Study, name: str) -> float:
    """KE of a fixed schedule on the study's representations."""
    representations = study.common().representations
    return float(kinetic_energy(named_schedule(name, representations.names, representations.roles)))


def ranked(study: Study, folder: Path, column: str) -> dict[tuple[str, int], Values]:
    """What each probe says of every fixed schedule: (variant, seed) -> schedule -> value.

    ``column``: ``objective``, whose rows hold ``L + beta KE``, gives L; ``distance`` is C's.
    """
    beta = chosen_beta(study.common().probe.beta) if column == "objective" else 0.0
    found: dict[tuple[str, int], Values] = defaultdict(dict)
    with open(folder / "probes.csv", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["status"] == "done" and row["schedule"] in study.fixed:
                value = float(row[column]) - beta * kinetic(study, row["schedule"])
                found[row["variant"], int(row["seed"])][row["schedule"]] = value
    return dict(found)


def trained(study: Study, folder: Path, first_seed: int = 100) -> dict[str, float]:
    """Mean log FID of each fixed schedule's networks of the scan (seeds from ``first_seed`` on)."""
    found = defaultdict(list)
    with open(folder / "runs.csv", newline="") as stream:
        for row in csv.DictReader(stream):
            usual = (row["size"], row["objective"], row["representations"], row["start"])
            scan = int(row["seed"]) >= first_seed and int(row["step"]) == study.steps
            figures = [row.get(f"fid_{sampler}") for sampler in study.headline]
            if scan and usual == ("base", "corrected", "pair", "scratch") and all(figures):
                found[row["schedule"]].append(sum(math.log(float(value or 1)) for value in figures) / len(figures))
    return {name: sum(values) / len(values) for name, values in found.items() if name in study.fixed}


def scores(values: Values, kinetics: Values, energy: float) -> Values:
    """``log value + energy x KE`` of each schedule."""
    return {name: math.log(values[name]) + energy * kinetics[name] for name in kinetics}


def describe(found: Sequence[Values], above: Values) -> str:
    """What these scores of the probes choose, and how they rank."""
    chosen = [min(each, key=each.__getitem__) for each in found]
    order = [spearman([each[name] for name in above], list(above.values())) for each in found]
    mean, worst = sum(map(above.__getitem__, chosen)) / len(chosen), max(map(above.__getitem__, chosen))
    counts = {name: chosen.count(name) for name in sorted(set(chosen), key=chosen.count, reverse=True)}
    said = ", ".join(f"{name} ({above[name]:.1f}) {count} times" for name, count in counts.items())
    return f"{mean:.1f} above the best on average, {worst:.1f} at most, order {sum(order) / len(order):+.2f}: {said}"


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.loss_rule", description=__doc__)
    top.add_argument("--preset", choices=STUDIES, action="append", help="default: all")
    for preset in top.parse_args(argv).preset or STUDIES:
        study, folder = STUDIES[preset], RESULTS / preset
        losses, distances = (list(ranked(study, folder, column).values()) for column in ("objective", "distance"))
        quality = trained(study, folder)
        kinetics = {name: kinetic(study, name) for name in quality}
        above = {name: 100 * (value - min(quality.values())) for name, value in quality.items()}
        always = ", ".join(f"{name} {above[name]:.1f}" for name in ("synchronous", "power:2"))
        print(f"{preset}: {len(losses)} probes; always {always}")
        for energy in ENERGIES:
            print(f"  energy {energy:g}: {describe([scores(each, kinetics, energy) for each in losses], above)}")
        for beta in BETAS:
            sums = [{name: each[name] + beta * kinetics[name] for name in kinetics} for each in losses]
            print(f"  L + beta KE, beta {beta:g}: {describe(sums, above)}")
        energy = study.common().probe.energy
        said = describe([scores(each, kinetics, energy) for each in distances], above)
        print(f"  C, energy {energy:g}: {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
