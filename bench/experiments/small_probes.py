"""What estimator D chooses for a fraction of its probe's budget: ``python -m bench.experiments.small_probes``.

D draws no samples, so that a probe of a percent of a run pays for itself, where C's comparison alone costs more.  For
each seed and budget that has no line yet one probe on the study's latents (made anew where they are not there), and a
line in ``small_probes.csv`` beside the study's rows, with what the probe cost or why there is none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.harness import commit
from bench.science.runner import Workshop
from bench.science.specs import STUDIES
from bench.science.table import Table
from fastasync.errors import UserError

BUDGETS = (0.1, 0.025, 0.01, 0.005, 0.0025)
ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("budget", "seed", "chosen", "lead", "share", "seconds", "error", "hardware", "commit", "date")


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.small_probes", description=__doc__)
    top.add_argument("--preset", choices=STUDIES, default="cifar10")
    top.add_argument("--seeds", type=int, nargs="+", default=[9, 10, 11])
    top.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the run's FLOPs")
    top.add_argument("--out", type=Path, help="default: the study's rows")
    top.add_argument("--work", type=Path, help="default: the study's")
    arguments = top.parse_args(argv)
    preset = arguments.preset
    study = replace(STUDIES[preset], probes={str(each): (f"probe.budget={each}",) for each in arguments.budgets})
    out = arguments.out or ROOT / "bench" / "science" / "results" / preset
    workshop = Workshop(study, out, arguments.work or ROOT / "runs" / f"science-{preset}")
    table = Table(out / "small_probes.csv", COLUMNS, 2)
    workshop.inputs("pair")  # no probe's seconds
    for seed, budget in ((seed, budget) for seed in arguments.seeds for budget in arguments.budgets):
        if table.get(budget, seed):
            continue
        row = {"budget": budget, "seed": seed, "hardware": workshop.hardware, "commit": commit()}
        row["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
        start = time.monotonic()
        try:
            found = workshop.probe("D", str(budget), seed)
        except UserError as error:  # a budget that pays for too few steps is a result
            row["error"] = str(error)
        else:
            spent, facts = found.budget, found.diagnostics
            row |= {"chosen": facts["label"], "lead": facts["chosen"]["lead"]}
            row["share"] = budget * spent["spent_flops"] / spent["limit_flops"]
        row["seconds"] = round(time.monotonic() - start, 1)
        table.put(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
