"""One limited session on a GPU machine, from a checkout that is not installed: ``python3 bench/gpu_session.py``.

Builds the compiled AdamW, runs the tests that need a GPU, then the benchmarks in order of importance, each in its own
process and with what is left of the time.  Everything is written as it goes to --out ($OUT, or bench/results):
session.log, <gpu>.csv and a trace.  Prints a short table last.  ``--stages`` chooses; ``--minutes`` is kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its files must not shadow other modules
sys.path.insert(1, str(ROOT / "kernels"))

TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "8"]  # on CUDA every kernel test runs compiled
# name -> (the most seconds it may take, command); in order of importance
STAGES: dict[str, tuple[float, list[str]]] = {
    "build": (150, ["setup.py", "-q", "build_ext", "--inplace"]),
    "tests": (200, [*TESTS, "-m", "not slow", "tests/kernels", "tests/optim"]),  # slow: offline builds
    "ops": (300, ["-m", "bench.run", "noising", "loss", "adaln", "qknorm_rope", "swiglu", "attention", "optimizer"]),
    "mlp": (120, ["-m", "bench.run", "mlp"]),
    "step": (400, ["-m", "bench.run", "step"]),
    "step-cifar10": (150, ["-m", "bench.run", "step", "--sizes", "cifar10"]),
    "schedule_overhead": (120, ["-m", "bench.run", "schedule_overhead"]),
    "profile": (120, ["-m", "bench.profile_step"]),
    "block": (120, ["-m", "bench.run", "block"]),
    "memory": (150, ["-m", "bench.run", "memory"]),
    "sampling": (200, ["-m", "bench.run", "sampling"]),
    "probe": (150, ["-m", "bench.run", "probe"]),
    "fp8": (60, ["-m", "bench.run", "fp8"]),
    "fp8_casts": (60, ["-m", "bench.run", "fp8_casts"]),
    "data": (90, ["-m", "bench.run", "data"]),
    "encode": (150, ["-m", "bench.run", "encode"]),
    "repa": (170, ["-m", "bench.run", "repa"]),
    "graph-tests": (120, [*TESTS, "-m", "gpu", "tests/training/test_graph.py"]),
    "model-tests": (200, [*TESTS, "-m", "gpu", "tests/model", "tests/training"]),
}
# only where --stages names them; the last three need what `fastasync fetch` brings: CIFAR-10, and Inception's weights
PRECISION = ["-m", "bench.precision_curve", "--preset", "cifar10", "--size", "S", "--steps", "1500"]
STUDY = ["-m", "bench.science.study", "--preset", "cifar10", "--work", "runs/science"]
ON_REQUEST: dict[str, tuple[float, list[str]]] = {
    "engine": (150, ["-m", "bench.run", "engine"]),  # needs DeepSpeed
    "tune": (300, ["-m", "bench.tune"]),
    "dali-variants": (180, ["-m", "bench.experiments.dali_variants"]),  # needs DALI
    "short-attention": (120, ["-m", "bench.experiments.short_attention"]),
    "precision": (480, [*PRECISION, "--set", "train.compile=regional"]),
    "integrators": (420, [*STUDY, "--questions", "8", "--seeds", "1", "--set", "sample.count=10000"]),
    "cifar10": (585, ["-m", "fastasync", "run", "--preset", "cifar10", "--out", "runs/cifar10"]),
}
SPARE = 15.0  # seconds kept for the table


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def command_of(stage: str, seconds: float, out: Path, rounds: int) -> list[str]:
    """The stage's command line, with its own deadline where it has one."""
    command = [sys.executable, *(STAGES | ON_REQUEST)[stage][1]]
    if "bench.run" in command:
        command += ["--minutes", f"{0.85 * seconds / 60:.2f}", "--results", str(out), "--rounds", str(rounds)]
        command += ["--record"]
    if "bench.tune" in command:
        command += ["--seconds", f"{0.85 * seconds:.0f}", "--out", str(out / "tune" / "sweep.csv")]
    if "bench.experiments.dali_variants" in command:
        command += ["--seconds", f"{0.85 * seconds:.0f}"]
    if any(part.startswith("bench.experiments.") for part in command):
        command += ["--results", str(out)]
    if "bench.precision_curve" in command:
        command += ["--out", str(out / "precision")]
    if "bench.science.study" in command:
        command += ["--out", str(out / "science")]
    if "bench.profile_step" in command:
        command += ["--results", str(out), "--out", str(out / "profile"), "--record"]
    return command


def run_stage(stage: str, seconds: float, out: Path, rounds: int) -> str:
    """Run one stage; what it prints goes to session.log, and its results to the screen.  Returns how it ended."""
    start = time.monotonic()
    print(f"=== {stage} (at most {seconds:.0f} s)", flush=True)
    log = out / "session.log"  # one file, to bring back from the GPU machine
    before = log.stat().st_size if log.exists() else 0
    with open(log, "a") as stream:
        process = subprocess.Popen(
            command_of(stage, seconds, out, rounds),
            cwd=ROOT,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(seconds)
            ended = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # every thread's stack goes to the log: where does it stand?
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            ended = "out of time"
    lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
    shown = [line[:230] for line in lines if line.startswith(("  ", "FAILED", "ERROR", "E  ")) or "passed" in line]
    print("\n".join((shown or lines)[-60:]), flush=True)
    print(f"=== {stage}: {ended}, {time.monotonic() - start:.0f} s", flush=True)
    return ended


def table(out: Path) -> list[str]:
    """The results in few columns."""
    from bench.harness import read_rows

    lines = []
    for path in sorted(out.glob("*.csv")):
        for row in read_rows(path):
            share = f"{row.share:6.1%}" if row.share is not None else "      "
            rate = f"{row.images_per_s:7.0f} img/s" if row.images_per_s else ""
            what = f"{row.subject} {row.case} {row.variant} {row.shape} {row.dtype}"
            lines.append(f"{row.ms:10.4f} ms {share} {rate:13s} {what[:110]}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--minutes", type=float, default=9.0, help="the whole session's limit (default 9)")
    top.add_argument("--stages", default=",".join(STAGES), help=f"comma-separated, of {', '.join(STAGES | ON_REQUEST)}")
    top.add_argument("--rounds", type=int, default=20)
    top.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"))
    chosen = top.parse_args(argv)
    stages = [name for name in chosen.stages.split(",") if name]
    for name in stages:
        if name not in STAGES | ON_REQUEST:
            top.error(f"no stage {name!r}: choose from {', '.join(STAGES | ON_REQUEST)}")
    end = time.monotonic() + 60 * chosen.minutes - SPARE
    chosen.out.mkdir(parents=True, exist_ok=True)
    ended = {}
    for name in stages:
        left = end - time.monotonic()
        if left < 20:
            ended[name] = "no time left"
            continue
        ended[name] = run_stage(name, min(left, (STAGES | ON_REQUEST)[name][0]), chosen.out, chosen.rounds)
    print("\n".join(table(chosen.out)[-70:]))
    print("; ".join(f"{name}: {how}" for name, how in ended.items()))
    return 0 if all(how == "ok" for how in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
