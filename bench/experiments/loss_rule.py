"""What a rule chooses that reads the probe's loss surface alone: ``python -m bench.experiments.loss_rule``.

From the rows of the study (no GPU, no training): of its fixed schedules the one with the least ``log L + energy x KE``
on each probe's surface (L: the corrected loss along the schedule, KE: its kinetic energy), for several weights, and how
far its trained network is above the best one (mean over the headline samplers of log FID, the scan's seeds).
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench.science.specs import STUDIES, Study
from fastasync.probe.learn import chosen_beta
from fastasync.schedule import kinetic_energy, named_schedule

ENERGIES = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.7)
RESULTS = Path(__file__).resolve().parents[1] / "science" / "results"
Surface = dict[str, float]  # L by schedule


def kinetic(study: Study, name: str) -> float:
    """KE of a fixed schedule on the study's representations."""
    representations = study.common().representations
    return float(kinetic_energy(named_schedule(name, representations.names, representations.roles)))


def surfaces(study: Study, folder: Path) -> dict[tuple[str, int], Surface]:
    """L of every fixed schedule by each probe: (variant, seed) -> schedule -> L.  The rows hold ``L + beta KE``."""
    beta = chosen_beta(study.common().probe.beta)
    found: dict[tuple[str, int], Surface] = defaultdict(dict)
    with open(folder / "probes.csv", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["status"] == "done" and row["schedule"] in study.fixed:
                loss = float(row["objective"]) - beta * kinetic(study, row["schedule"])
                found[row["variant"], int(row["seed"])][row["schedule"]] = loss
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


def choice(surface: Surface, kinetics: dict[str, float], energy: float) -> str:
    """The schedule with the least ``log L + energy x KE``."""
    return min(kinetics, key=lambda name: math.log(surface[name]) + energy * kinetics[name])


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.loss_rule", description=__doc__)
    top.add_argument("--preset", choices=STUDIES, action="append", help="default: all")
    for preset in top.parse_args(argv).preset or STUDIES:
        study, folder = STUDIES[preset], RESULTS / preset
        quality, probes = trained(study, folder), surfaces(study, folder)
        kinetics = {name: kinetic(study, name) for name in quality}
        best = min(quality.values())
        above = {name: 100 * (value - best) for name, value in quality.items()}
        print(f"{preset}: {len(probes)} probes; synchronous is {above['synchronous']:.1f} % above the best of the scan")
        for energy in ENERGIES:
            chosen = [choice(surface, kinetics, energy) for surface in probes.values()]
            counts = {name: chosen.count(name) for name in sorted(set(chosen), key=chosen.count, reverse=True)}
            said = ", ".join(f"{name} ({above[name]:.1f} %) {count} times" for name, count in counts.items())
            mean, worst = sum(map(above.__getitem__, chosen)) / len(chosen), max(map(above.__getitem__, chosen))
            print(f"  energy {energy:g}: {mean:.1f} % above the best on average, {worst:.1f} at most: {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
