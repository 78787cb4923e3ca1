"""What estimator D chooses for a fraction of its probe's budget: ``python -m bench.experiments.small_probes``.

D draws no samples, so that a probe of a percent of a run pays for itself, where C's comparison alone costs more.  For
each seed and budget one probe on the study's latents (made anew where they are not there); a line of
``results/<preset>/small_probes.csv`` in the folder of the study each.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.harness import commit
from bench.science.runner import Workshop
from bench.science.specs import STUDIES

BUDGETS = ("0.1", "0.025", "0.01", "0.005", "0.0025")
ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("budget", "seed", "chosen", "lead", "share", "seconds", "error", "hardware", "commit", "date")


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.small_probes", description=__doc__)
    top.add_argument("--preset", choices=STUDIES, default="cifar10")
    top.add_argument("--seeds", type=int, nargs="+", default=[9, 10, 11])
    top.add_argument("--budgets", nargs="+", default=BUDGETS, help="of the run's FLOPs, the probe's network in them")
    top.add_argument("--out", type=Path, help="default: the study's rows")
    top.add_argument("--work", type=Path, help="default: the study's")
    arguments = top.parse_args(argv)
    preset = arguments.preset
    study = replace(STUDIES[preset], probes={each: (f"probe.budget={each}",) for each in arguments.budgets})
    out = arguments.out or ROOT / "bench" / "science" / "results" / preset
    workshop = Workshop(study, out, arguments.work or ROOT / "runs" / f"science-{preset}")
    path = out / "small_probes.csv"
    out.mkdir(parents=True, exist_ok=True)
    begun = path.exists()
    with path.open("a", newline="") as stream:
        rows = csv.DictWriter(stream, COLUMNS)
        if not begun:
            rows.writeheader()
        for seed in arguments.seeds:
            for budget in arguments.budgets:
                row = {"budget": budget, "seed": seed, "hardware": workshop.hardware, "commit": commit()}
                row["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
                start = time.monotonic()
                try:
                    found = workshop.probe("D", budget, seed)
                except Exception as error:  # a row all the same
                    row["error"] = str(error)
                else:
                    spent, facts = found.budget, found.diagnostics
                    row |= {"chosen": facts["label"], "lead": f"{facts['chosen']['lead']:.3f}"}
                    row["share"] = f"{spent['spent_flops'] * float(budget) / spent['limit_flops']:.5f}"
                row["seconds"] = f"{time.monotonic() - start:.1f}"
                rows.writerow(row)
                stream.flush()
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
