"""``python -m bench.run [SUBJECT ...]``: check, time, print, and append to bench/results/<gpu>.csv."""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import RESULTS, Bench, Row, WrongResult, device_name, write_rows
from bench.subjects import SUBJECTS
from bench.workload import SIZES, VARIANTS


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    top.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"any of {', '.join(SUBJECTS)} (default: all)")
    top.add_argument("--rounds", type=int, default=20, help="rounds of timing (default 20)")
    top.add_argument("--minutes", type=float, help="begin no new case after this long")
    top.add_argument("--sizes", default="", help=f"of step: any of {', '.join(SIZES)} (default: all)")
    top.add_argument("--variants", default="", help="of step (at each size) and sampling: only these, as 'a,b'")
    top.add_argument("--batch", type=int, default=0, help="of step: images in a step (default: each plan's, 256)")
    top.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    top.add_argument("--record", action="store_true", help="on a CPU, too, write results/cpu.csv")
    top.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    return top


def run_subjects(bench: Bench, subjects: Sequence[str]) -> list[str]:
    """Run the subjects; returns what failed.  One subject's failure does not end the others."""
    failures = []
    bench.say(f"{device_name(bench.device)}, torch {torch.__version__}, small sizes: {bench.small}")
    bench.measure_ceilings()
    for name in subjects:
        if bench.time_is_up(name):
            continue
        bench.say(f"{name}:")
        start = time.monotonic()
        try:
            importlib.import_module(f"bench.subjects.{name}").run(bench)
        except Exception as error:  # reported at the end, with a non-zero exit code
            kind = "WRONG" if isinstance(error, WrongResult) else type(error).__name__
            failures.append(f"{name}: {kind}: {' '.join(str(error).split())[:300]}")
            bench.say(f"  FAILED {failures[-1]}")
        torch._dynamo.reset()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        bench.say(f"  ({time.monotonic() - start:.1f} s)")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    unknown = [name for name in arguments.subjects if name not in SUBJECTS]
    if unknown:
        print(f"bench: error: no subject {unknown[0]!r}: choose from {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    sizes = [size for size in arguments.sizes.split(",") if size]
    unknown = [size for size in sizes if size not in SIZES]
    if unknown:
        print(f"bench: error: no size {unknown[0]!r}: choose from {', '.join(SIZES)}", file=sys.stderr)
        return 2
    variants = [name for name in arguments.variants.split(",") if name]
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        print(f"bench: error: no variant {unknown[0]!r}: choose from {', '.join(VARIANTS)}", file=sys.stderr)
        return 2
    if arguments.batch < 0:
        print(f"bench: error: --batch {arguments.batch}: needs a positive number of images", file=sys.stderr)
        return 2
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = arguments.results / f"{device_name(device)}.csv"
    keep = device.type == "cuda" or arguments.record

    def sink(row: Row) -> None:
        if keep:
            write_rows(path, [row])

    # which backends were chosen, by what times, why others were left out, and what is recorded as a CUDA graph
    logging.basicConfig(format="  %(message)s", stream=sys.stdout)
    for source in ("fastasync_kernels", "fastasync.training.graph"):
        logging.getLogger(source).setLevel(logging.INFO)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else what is called compiled goes on eagerly
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else math.inf
    rounds = 3 if device.type == "cpu" and arguments.rounds == 20 else arguments.rounds
    bench = Bench(device, rounds, deadline, sink, sizes=sizes, variants=variants, batch=arguments.batch)
    failures = run_subjects(bench, arguments.subjects or SUBJECTS)
    for line in bench.skipped:
        print(f"skipped: {line}")
    for line in failures:
        print(f"FAILED: {line}")
    print(f"rows in {path}" if keep else "a CPU's numbers are not recorded (--record writes results/cpu.csv)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
