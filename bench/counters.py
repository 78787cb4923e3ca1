"""``python -m bench.counters SUBJECT ...``: what binds our kernels, by the GPU's counters (Nsight Compute's ``ncu``).

Runs the Triton variant of every operation of the subjects (noising, loss, adaln, qknorm_rope, swiglu, fp8_casts) once
under ncu, from cold caches, and prints a line for each kernel: shares of peak of memory and of instruction issue, warps
that are there and that could issue, and what the others wait for.  The raw page goes to ``--out`` beside the table.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import itertools
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import Bench, Operation, Row, Summary

SUBJECTS = ("noising", "loss", "adaln", "qknorm_rope", "swiglu", "fp8_casts")
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy")
LABEL = "case: "  # begins the names of the ranges, by which a kernel's operation is found in ncu's table
# column of the table -> ncu's metric
METRICS = {
    "us": "gpu__time_duration.sum",
    "memory %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "SM %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "issued a cycle": "smsp__issue_active.avg.per_cycle_active",
    "warps": "smsp__warps_active.avg.per_cycle_active",
    "could issue": "smsp__warps_eligible.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
}
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


class Counted(Bench):
    """Runs each operation's kernel once, where ncu counts, and times nothing."""

    def measure_ceilings(self) -> None:
        """Nothing: ncu knows the peaks."""

    def add(self, *_: Any, **__: Any) -> Row:
        """Nothing is timed."""
        return Row(*[""] * 10, *Summary(0.0, 0.0, 0.0, 0))

    def operation(self, op: Operation) -> None:
        function = op.variants.get("triton")
        if function is None:
            return
        inputs = op.make(1, op.batch)
        for _ in range(2):  # compiles and tunes
            function(*inputs)
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_push(f"{LABEL}{op.subject}, {op.case}, {op.shape}, {op.dtype}")
        torch.cuda.profiler.start()
        function(*inputs)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        torch.cuda.nvtx.range_pop()


def kernels(page: str) -> list[dict[str, str]]:
    """A row for each kernel in ncu's raw page (CSV: names, then units, then kernels)."""
    start = page.index('"ID"')  # what the program printed comes before
    names, units, *lines = csv.reader(io.StringIO(page[start:]))
    rows = [_row(dict(zip(names, line)), dict(zip(names, units))) for line in lines if len(line) == len(names)]
    for before, row in itertools.pairwise(rows):  # autograd's thread is in no range: its kernels come after
        row["operation"] = row["operation"] or before["operation"]
    return rows


def _row(cells: Mapping[str, str], units: Mapping[str, str]) -> dict[str, str]:
    # ncu writes the range's name, then a colon and its colour and payload
    ranges = [found[1] for cell in cells.values() if (found := re.search(rf"{LABEL}([^\":]+)", cell))]
    values = {name: value for name, metric in METRICS.items() if (value := _number(cells.get(metric, ""))) is not None}
    if "us" in values:
        values["us"] *= _MICROSECONDS[units[METRICS["us"]]]
    stalls = {found[1]: _number(cell) or 0.0 for name, cell in cells.items() if (found := _STALL.fullmatch(name))}
    waits = sorted(((value, name) for name, value in stalls.items() if name != "selected"), reverse=True)
    whole = sum(stalls.values())
    return {
        "operation": ranges[0] if ranges else "",
        "kernel": cells.get("Kernel Name", "")[:60],
        **{name: f"{values[name]:.3g}" if name in values else "" for name in METRICS},
        "wait for": ", ".join(f"{name} {value / whole:.0%}" for value, name in waits[:3]) if whole else "",
    }


def _number(cell: str) -> float | None:
    """A number as ncu writes it; None for "n/a" and the like."""
    try:
        value = float(cell.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def count(subjects: Sequence[str]) -> None:
    """What runs under ncu."""
    device = torch.device("cuda")
    bench = Counted(device)
    for name in subjects:
        importlib.import_module(f"bench.subjects.{name}").run(bench)


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.counters", description=__doc__.splitlines()[0])
    top.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"any of {', '.join(SUBJECTS)} (default: all)")
    top.add_argument("--out", type=Path, default=Path("runs/counters"))
    top.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # under ncu already
    chosen = top.parse_args(argv)
    subjects = chosen.subjects or list(SUBJECTS)
    unknown = [name for name in subjects if name not in SUBJECTS]
    problem = f"no subject {unknown[0]!r}: choose from {', '.join(SUBJECTS)}" if unknown else ""
    problem = problem or ("" if torch.cuda.is_available() else "needs a CUDA device")
    problem = problem or ("" if chosen.here or shutil.which("ncu") else "needs ncu (Nsight Compute) on the PATH")
    if problem:
        print(f"counters: error: {problem}", file=sys.stderr)
        return 2
    if chosen.here:
        count(subjects)
        return 0
    # clocks as they are; nothing outside the ranges is counted
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--csv", "--page", "raw"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "bench.counters", "--here", *subjects]
    found = subprocess.run(command, capture_output=True, text=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "raw.csv").write_text(found.stdout)
    if found.returncode or '"ID"' not in found.stdout:
        print(f"counters: error: ncu failed: {(found.stderr or found.stdout).strip()[-1500:]}", file=sys.stderr)
        return 1
    rows = kernels(found.stdout)
    if not rows:
        print("counters: error: ncu counted no kernel", file=sys.stderr)
        return 1
    with open(chosen.out / "kernels.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{name} {value}" if name in METRICS else value for name, value in row.items()))
    print(f"table in {chosen.out / 'kernels.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
