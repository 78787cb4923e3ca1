"""``python -m bench.tune``: which launch parameters are fastest here, at XL/1's shapes and batch 256.

Coordinate descent: one parameter of a kernel at a time, all its values timed by turns with the setting to beat, each
checked against the reference first; what is 0.5 % faster is kept, until a turn through all parameters changes nothing.
Times are the benchmarks' own: cold caches, recorded graphs, medians.  Every candidate is a row of the CSV the moment it
is known, and so are those that fail to compile, spill registers or compute something else.  Nothing is changed: put
the settings of the table at the top of the kernels' modules.

``--rehearse``: tiny shapes in Triton's interpreter, to see that all of it runs.  ``--offline``: compiles for sm_90
without a GPU, and says registers, shared memory, programs on a multiprocessor and how full the last round of them is.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import faulthandler
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import RESULTS, Bench, WrongResult, check, device_name, summarize
from bench.subjects.common import XL, Random

TINY = {"width": 16, "heads": 2, "hidden": 24, "tokens": 4}  # of a rehearsal
BATCH, CHECKED = 256, 16  # samples; both multiples of 16, so that one build of a kernel does for both
GAIN = 0.995  # of the time of the setting to beat: what is kept
TURNS = 3


@dataclasses.dataclass
class Candidate:
    """One row of the CSV.  Times in milliseconds; ``ratio`` to the setting to beat, round by round (median)."""

    date: str
    commit: str
    device: str
    torch: str
    triton: str
    kernel: str
    direction: str
    setting: str
    status: str  # timed, current, best, compiled, spilled, failed, wrong
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    programs: int | None = None  # on a multiprocessor at a time
    rounds: float | None = None  # of programs, until all have run
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    ratio: float | None = None
    share: float | None = None  # of copy bandwidth, on the fewest bytes
    note: str = ""


def zeros(
    *shape: int, grad: bool = False, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
) -> Tensor:  # Random's call, for compiling: memory that nobody touches takes no room
    return torch.zeros(shape, dtype=dtype).requires_grad_(grad)


def reason(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Sweep:
    """What one run of the sweep shares.  ``mode``: gpu, rehearse or offline."""

    def __init__(self, mode: str, out: Path, seconds: float, rounds: int = 12):
        self.mode, self.out, self.rounds = mode, out, rounds
        self.begin, self.limit = time.monotonic(), seconds
        self.device = torch.device("cuda" if mode == "gpu" else "cpu")
        self.dtype = torch.float32 if mode == "rehearse" else torch.bfloat16
        self.batch, self.checked = (2, 2) if mode == "rehearse" else (BATCH, CHECKED)
        self.size = TINY if mode == "rehearse" else XL
        self.bench = Bench(self.device, rounds, say=lambda line: None)
        if mode != "offline":
            self.bench.measure_ceilings()
        out.parent.mkdir(parents=True, exist_ok=True)
        names = [field.name for field in dataclasses.fields(Candidate)]
        if not out.exists():
            self._append([names])
        elif out.read_text().split("\n", 1)[0] != ",".join(names):
            raise SystemExit(f"bench.tune: {out} has other columns: move it aside")

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        with open(self.out, "a", newline="") as stream:
            csv.writer(stream).writerows(rows)

    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - (time.monotonic() - self.begin)

    def row(self, target: Any, point: Any, status: str, **figures: Any) -> Candidate:
        """Keep one candidate."""
        from bench.tune_targets import words

        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        made = Candidate(date, *self.bench._facts, target.kernel, target.direction, words(point), status, **figures)
        values = dataclasses.astuple(made)
        self._append([[f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values]])
        return made

    # --- building -------------------------------------------------------------------------------------------------

    def build(self, target: Any, points: Sequence[Any], inputs: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """Compile these settings, several at a time; setting in words -> what the kernel takes, or its error.

        In the interpreter nothing is built.
        """
        from bench.tune_targets import words

        if self.mode == "rehearse":
            return {words(point): {} for point in points}
        import triton

        from bench.offline import MULTIPROCESSORS, compiling, resources, without_a_gpu

        seen: dict[str, Any] = {}
        failed: dict[str, str] = {}
        name = ""

        def keep(kernel: str, built: Any, options: dict[str, Any]) -> None:
            if kernel not in ("_reduce_kernel", "_sum_kernel"):  # the second stage of a reduction
                seen[name] = built, options

        with ExitStack() as stack:
            stack.enter_context(compiling(keep) if self.mode == "gpu" else without_a_gpu(keep))
            if hasattr(triton, "AsyncCompileMode"):
                pool = stack.enter_context(ThreadPoolExecutor(min(os.cpu_count() or 1, 12)))
                stack.enter_context(triton.AsyncCompileMode(pool, ignore_errors=True))
            for point in points:
                name = words(point)
                try:
                    with target.setting(point):
                        target.run(*inputs)
                except Exception as error:  # ours, Triton's or the assembler's: a candidate that cannot be
                    failed[name] = reason(error)
        found: dict[str, dict[str, Any]] = {}
        for point in points:
            name = words(point)
            try:
                if name in failed:
                    raise RuntimeError
                built, options = seen[name]
                kernel = built.result() if hasattr(built, "result") else built
            except Exception as error:
                found[name] = {"note": failed.get(name) or reason(error)}
                continue
            try:
                taken = resources(kernel)
            except Exception as error:  # no cuobjdump there: the times are what matters
                if self.mode != "gpu":
                    raise
                self.bench.skip("registers", reason(error))
                found[name] = {}
                continue
            programs = taken.programs(options["num_warps"])
            rounds = math.prod(options["grid"]) / (MULTIPROCESSORS * max(programs, 1))
            found[name] = {**taken._asdict(), "programs": programs, "rounds": rounds}
        return found

    def sound(self, target: Any, point: Any, built: dict[str, Any]) -> bool:
        """Whether a built setting may be timed: no spills, and the reference's results.  If not, its row says so."""
        if "note" in built:
            self.row(target, point, "failed", **built)
            return False
        if built.get("spilled"):
            self.row(target, point, "spilled", **built)
            return False
        draw = Random(self.device, 0, self.dtype)
        try:
            with target.setting(point):
                check({"reference": target.reference, "ours": target.ours}, target.proof(draw, self.checked))
        except Exception as error:  # a launch can fail too, for want of shared memory
            status = "wrong" if isinstance(error, WrongResult) else "failed"
            self.row(target, point, status, **built, note=reason(error))
            return False
        return True

    # --- timing ---------------------------------------------------------------------------------------------------

    def times(self, target: Any, points: Sequence[Any], sets: Sequence[Any], rounds: int) -> list[list[float]]:
        """Milliseconds of each setting, round by round, by turns."""

        def under(point: Any) -> Callable[..., Any]:
            def run(*inputs: Any) -> Any:
                with target.setting(point):
                    return target.run(*inputs)

            return run

        calls = {str(index): self.bench._over_sets(under(point), sets)[0] for index, point in enumerate(points)}
        found = self.bench.interleaved(calls, rounds)
        return [[ms / len(sets) for ms in found[str(index)]] for index in range(len(points))]

    def figures(self, target: Any, own: Sequence[float], beaten: Sequence[float]) -> dict[str, Any]:
        """A row's times, against those of the setting to beat in the same rounds."""
        found = summarize(own)
        floor = 1e3 * target.nbytes(self.batch, self.dtype.itemsize) / self.bench.copy_rate
        ratio = statistics.median(a / b for a, b in zip(own, beaten))
        times = {"ms": found.median, "ms_low": found.low, "ms_high": found.high}
        return {**times, "ratio": ratio, "share": floor / found.median}

    def tune(self, target: Any, seconds: float, few: bool) -> str:
        """Descend from the module's setting for at most ``seconds``; the table's line."""
        from bench.tune_targets import words

        until = min(time.monotonic() + seconds, self.begin + self.limit)
        count = 2
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = max(2, math.ceil(3 * cache / target.nbytes(self.batch, self.dtype.itemsize)))
        sets = [target.inputs(Random(self.device, seed, self.dtype), self.batch) for seed in range(count)]
        start = target.current()
        built = self.build(target, [start], sets[0])
        if not self.sound(target, start, built[words(start)]):
            return f"{target.name:34s} the current setting fails: see {self.out}"
        best, tried, ended = dict(start), {words(start)}, "out of time"
        for _ in range(1 if few else TURNS):
            before = dict(best)
            for name, knob in target.knobs.items():
                options = knob.options[:2] if few else knob.options
                points = [{**best, name: value} for value in options if value != best[name]]
                points = [point for point in points if words(point) not in tried and target.possible(point)]
                if not points or time.monotonic() > until:
                    continue
                tried |= {words(point) for point in points}
                built |= self.build(target, points, sets[0])
                points = [point for point in points if self.sound(target, point, built[words(point)])]
                if not points:
                    continue
                beaten, *rest = self.times(target, [best, *points], sets, self.rounds)
                figures = [self.figures(target, own, beaten) for own in rest]
                self.row(target, best, "current", **built[words(best)], **self.figures(target, beaten, beaten))
                for point, found in zip(points, figures):
                    self.row(target, point, "timed", **built[words(point)], **found)
                least = min(range(len(points)), key=lambda index: figures[index]["ratio"])
                if figures[least]["ratio"] < GAIN:
                    best = points[least]
            if (few or best == before) and time.monotonic() <= until:
                ended = "done"
                break
        old, new = self.times(target, [start, best], sets, 2 * self.rounds)
        now = self.row(target, best, "best", **built[words(best)], **self.figures(target, new, old))
        was = self.figures(target, old, old)
        changed = {name: value for name, value in best.items() if value != start[name]}
        if changed and (now.ratio or 1) > GAIN:
            ended += ", no better when measured again"
        return (
            f"{target.name:34s} {1e3 * was['ms']:8.1f} us {was['share']:6.1%} -> {1e3 * (now.ms or 0):8.1f} us "
            f"{now.share:6.1%}  {words(changed) or 'unchanged'}  [from {words(start)}; {len(tried)} tried, {ended}]"
        )

    def survey(self, target: Any, few: bool) -> list[str]:
        """Build what one step from the current setting reaches; a line for each that has no spills."""
        from bench.tune_targets import words

        start = target.current()
        points = [start]
        for name, knob in target.knobs.items():
            options = knob.options[:2] if few else knob.options
            near = [{**start, name: value} for value in options if value != start[name]]
            points += [point for point in near if target.possible(point)]
        built = self.build(target, points, target.inputs(zeros, self.batch))
        lines = [target.name]
        for point in points:
            found = built[words(point)]
            status = "failed" if "note" in found else "spilled" if found["spilled"] else "compiled"
            self.row(target, point, status, **found)
            if status != "compiled":
                lines.append(f"  {status}: {words(point)} {found.get('note', '')[:100]}")
                continue
            full = found["rounds"] / math.ceil(found["rounds"])
            taken = f"{found['registers']:3d} registers {found['shared']:6d} B shared, {found['programs']:2d} programs"
            lines.append(f"  {words(point):60s} {taken}, {found['rounds']:5.2f} rounds, {full:4.0%} full")
        return lines


def wanted(direction: str, only: str) -> bool:
    """Whether ``--only`` means this direction."""
    return direction in only.split(";") if ";" in only else only in direction


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="bench.tune", description=__doc__.splitlines()[0])
    top.add_argument("--kernels", default="adaln,qknorm_rope,swiglu")
    top.add_argument("--only", default="", help="directions that contain this; several in full, with ; between")
    top.add_argument("--seconds", type=float, default=540, help="the whole sweep's limit (default 540)")
    top.add_argument("--rounds", type=int, default=12)
    top.add_argument("--out", type=Path, help="the CSV (default tune/<device>.csv in $OUT, or in bench/results)")
    mode = top.add_mutually_exclusive_group()
    mode.add_argument("--rehearse", action="store_true", help="tiny shapes in the interpreter; times mean nothing")
    mode.add_argument("--offline", action="store_true", help="compile for sm_90 only, without a GPU")
    top.add_argument("--few", action="store_true", help="two values of each parameter, one turn")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    mode = "rehearse" if options.rehearse else "offline" if options.offline else "gpu"
    if mode == "rehearse":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from bench.tune_targets import KERNELS, targets

    names = [name for name in options.kernels.split(",") if name]
    for name in names:
        if name not in KERNELS:
            print(f"bench.tune: error: no kernel {name!r}: choose from {', '.join(KERNELS)}", file=sys.stderr)
            return 2
    if mode == "gpu" and not torch.cuda.is_available():
        print("bench.tune: error: no CUDA device; --rehearse and --offline need none", file=sys.stderr)
        return 2
    if mode != "rehearse":
        faulthandler.dump_traceback_later(options.seconds + 90, exit=True)  # a hang must say where
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    name = device_name(torch.device("cuda")) if mode == "gpu" else mode
    sweep = Sweep(mode, options.out or folder / "tune" / f"{name}.csv", options.seconds, options.rounds)
    lines = []
    chosen = [target for target in targets(sweep.size, names) if wanted(target.direction, options.only)]
    for index, target in enumerate(chosen):
        if sweep.left() < 5:
            lines.append(f"{target.name:34s} not begun: out of time")
            continue
        try:
            if mode == "offline":
                print("\n".join(sweep.survey(target, options.few)), flush=True)
                continue
            share = 1.6 * sweep.left() / (len(chosen) - index)
            lines.append(sweep.tune(target, min(share, sweep.left()), options.few))
        except Exception as error:  # one kernel's failure must not end the others
            lines.append(f"{target.name:34s} FAILED {reason(error)}")
        print(lines[-1], flush=True)
        if mode == "gpu":
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    print("\n".join(["", *lines, f"{time.monotonic() - sweep.begin:.0f} s; every candidate is in {sweep.out}"]))
    return 1 if any("FAILED" in line or "fails" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
