"""How should C's probe be trained, so that it ranks schedules as networks trained along them do?

``python -m bench.experiments.probe_rules small-paths:3000 --seed 0 --out ROWS.csv`` trains a probe on CIFAR-10 and
ranks the study's fixed schedules with it, in the encoder's features (which may select) and in Inception's (which may
not: only to tell features from networks).  A variant is SHAPE-TIMES:STEPS, with SHAPE small (4 x 128) or main
(8 x 256) and TIMES

    independent   local times from the whole square
    paths         times along all candidates of C, drawn as training draws them
    mixed         paths, and a quarter of the samples at independent times
    adapted       paths, then for every schedule a copy trained 300 steps more along it alone
    single        a network for every schedule, trained along it alone

A row for each schedule, with the terms of B's objective and what nine intervals lose against fifty; compared with the
trained networks of the study's scan at the end.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.science.plan import Ledger
from bench.science.runner import Workshop
from bench.science.specs import STUDIES, Spec, Way, sampler
from bench.science.statistics import spearman
from fastasync.config import Config
from fastasync.densities import DENSITIES
from fastasync.evaluation import frechet_distance
from fastasync.probe import LossSurface, line_loss
from fastasync.probe.generation import candidate_family, gaussian_statistics
from fastasync.probe.network import PathTimes, autocast, build_probe, surface_errors, train_surface_probe
from fastasync.schedule import Schedule, kinetic_energy, named_schedule
from fastasync.training.build import choose_ops

SHAPES = {"small": (4, 128, 4), "main": (8, 256, 8)}
TIMES = ("independent", "paths", "mixed", "adapted", "single")
ADAPTING = 300  # steps
SAMPLES, FINE = 5000, 500


def full_kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of KID's kernel over whole sets, features [N, D] and [M, D]; blocks of rows of y."""

    def total(a: Tensor, b: Tensor) -> Tensor:
        parts = [((a @ part.T / a.shape[1] + 1) ** 3).sum() for part in b.split(5000)]
        return torch.stack(parts).sum()

    def within(a: Tensor) -> Tensor:
        diagonal = ((a.square().sum(1) / a.shape[1] + 1) ** 3).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y)))


COLUMNS = ("variant", "seed", "schedule", "encoder", "inception_kid", "lost", "loss_texture", "loss_semantic", "energy")


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV, with its header when it is new."""
    with open(path, "a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if stream.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


class Bench:
    """One variant of one seed."""

    def __init__(self, workshop: Workshop, variant: str, seed: int, samples: int):
        self.workshop, self.variant, self.samples = workshop, variant, samples
        name, steps = variant.split(":")
        shape, self.times = name.split("-")
        if shape not in SHAPES or self.times not in TIMES:
            raise SystemExit(f"{variant}: SHAPE-TIMES:STEPS with SHAPE of {', '.join(SHAPES)} and TIMES of {TIMES}")
        self.steps = int(steps)
        base = workshop.study.probe_config("C", "base", seed)
        depth, width, heads = SHAPES[shape]
        lr = base.probe.lr if shape == "small" else 4e-4
        self.config: Config = replace(base, probe=replace(base.probe, depth=depth, width=width, heads=heads, lr=lr))
        reps = self.config.representations
        self.device, self.density = workshop.device, DENSITIES[self.config.objective.density]
        self.schedules = {name: named_schedule(name, reps.names, reps.roles) for name in workshop.study.fixed}
        self.family = list(candidate_family(reps.names, reps.roles).values())
        self.inputs = workshop.inputs("pair")
        self.scorer = self.inputs.scorer()
        self.inception, reference = workshop.scoring("pair")
        self.reference = reference.features.features[::5].to(self.device, torch.float64)  # type: ignore[union-attr]

    def along(self, family: Sequence[Schedule], independent: float = 0.0) -> PathTimes:
        return PathTimes(family, self.density, self.config.probe.batch, self.config.probe.seed, independent)

    def train(self, network: Any, steps: int, times: PathTimes | None, lr: float | None = None) -> Any:
        config = self.config if lr is None else replace(self.config, probe=replace(self.config.probe, lr=lr))
        train_surface_probe(network, config, self.inputs.latents, steps, self.device, False, None, times)
        return network

    def velocity(self, network: Any) -> Callable[..., Tensor]:
        def velocity(x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad(), autocast(self.device):
                return network(x, tau, y)

        return velocity

    def sample(self, network: Any, schedule: Schedule, count: int, way: Way) -> Tensor:
        velocity, seed, study = self.velocity(network), self.config.probe.seed, self.workshop.study
        parts = torch.arange(count).split(study.sample_batch)
        return torch.cat([self.workshop.latents(self.config, velocity, schedule, part, way, seed) for part in parts])

    def rank(self, network: Any, name: str, surface: LossSurface | None) -> dict[str, Any]:
        assert self.scorer is not None
        schedule, channels = self.schedules[name], self.config.representations.channels
        usual, fine = (sampler(f"heun_euler{n}@{self.config.sample.last_step:g}") for n in (17, 99))
        z = self.sample(network, schedule, self.samples, usual)
        chosen = torch.cat([self.scorer.features(part).double().cpu() for part in z.split(2500)])
        images = torch.cat([self.inputs.decode(part).cpu() for part in z.split(2500)])
        seen = self.inception(images).to(self.device, torch.float64)
        exact = self.sample(network, schedule, min(FINE, self.samples), fine)
        lost = (z[: len(exact)] - exact).square().mean((0, 2, 3)).split(list(channels))
        row: dict[str, Any] = {
            "encoder": frechet_distance(gaussian_statistics(chosen), self.scorer.reference),
            "inception_kid": full_kernel_distance(seen, self.reference),
            "lost": [round(float(part.mean()), 6) for part in lost],
        }
        if surface is not None:
            with torch.no_grad():
                for k, rep in enumerate(self.config.representations.names):
                    lam = [float(i == k) for i in range(len(channels))]
                    row[f"loss_{rep}"] = float(line_loss(surface, schedule, self.density, lam))
                row["energy"] = float(kinetic_energy(schedule, [0.5, 0.5]))
        return row

    def surface(self, network: Any) -> LossSurface:
        """Of probes of paths from the half of the square where what leads leads: they know no other."""
        ops = choose_ops(self.config.model.kernels, self.device)
        channels, seed = self.config.representations.channels, self.config.probe.seed
        found = surface_errors(self.velocity(network), self.inputs.latents, channels, 40_000, seed=seed, batch=1000,
                               device=self.device, ops=ops, progress=False)  # fmt: skip
        inside = found.tau[:, 0] <= found.tau[:, 1]
        if self.times in ("independent", "mixed"):
            inside[:] = True
        return LossSurface.fit(found.tau[inside], found.errors[inside])

    def run(self) -> Iterator[dict[str, Any]]:
        """A row for each schedule, as soon as it is known."""
        surface, shared = None, None
        if self.times != "single":
            mixed = 0.25 if self.times == "mixed" else 0.0
            family = None if self.times == "independent" else self.along(self.family, mixed)
            shared = self.train(build_probe(self.config, self.device), self.steps, family)
            surface = self.surface(shared)
        for name, schedule in self.schedules.items():
            network = shared
            if self.times == "adapted":
                network = self.train(copy.deepcopy(shared), ADAPTING, self.along([schedule]), 3e-4)
            elif self.times == "single":
                network = self.train(build_probe(self.config, self.device), self.steps, self.along([schedule]))
            yield {"schedule": name, **self.rank(network, name, surface)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="+", help="SHAPE-TIMES:STEPS")
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--out", type=Path, required=True, help="a CSV that rows are added to")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    study = STUDIES[arguments.preset]
    results = Path("bench/science/results") / study.preset
    workshop = Workshop(study, results, arguments.work or Path("runs") / f"science-{study.preset}")
    ledger = Ledger(replace(study, scan_seeds=1), [0], results)
    for variant in arguments.variants:
        start, about = time.perf_counter(), {"variant": variant, "seed": arguments.seed}
        rows = []
        for row in Bench(workshop, variant, arguments.seed, arguments.samples).run():
            rows.append({**about, **row})
            append(arguments.out, rows[-1])
        trained = {
            row["schedule"]: [
                ledger.by_seed(Spec(row["schedule"], 0), study.steps, name, ledger.scan_seeds)
                for name in study.headline
            ]
            for row in rows
        }
        known = {
            name: float(np.mean([np.log(list(part.values())) for part in parts]))
            for name, parts in trained.items()
            if all(parts)
        }
        picked = [row for row in rows if row["schedule"] in known]
        text = ", ".join(
            f"{column} {spearman([row[column] for row in picked], [known[row['schedule']] for row in picked]):+.2f}"
            for column in ("encoder", "inception_kid")
            if len(picked) > 2
        )
        best = min(rows, key=lambda row: row["encoder"])["schedule"]
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"{variant} seed {arguments.seed}: {text}; encoder's best {best}; {took}", flush=True)


if __name__ == "__main__":
    main()
