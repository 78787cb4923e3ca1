"""How the benchmarks measure: cold caches, device events, interleaved variants, ceilings of the same run, CSV rows.

A variant is a function.  Operations take their tensors from several input sets in turn, together larger than the
second-level cache, and on CUDA each variant is recorded as one graph over all its sets, so that what is timed is
kernels and not launches.  Every round times every variant, in an order that turns.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastasync_kernels import fp8_linear, reference
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COLD = 3  # the input sets together hold this many second-level caches
MAX_SETS = 32
DATASHEET_BF16, DATASHEET_FP8 = 989e12, 1979e12  # H100 and H200 SXM, dense, FLOP/s: what MFU is a share of
FP8 = ("fp8", "float8_e4m3fn")  # a row's dtype where its products are in fp8


class WrongResult(AssertionError):
    """A variant's result is further from the truth than it may be; it is not timed."""


class Summary(NamedTuple):
    """Milliseconds: median, 10th and 90th percentile, and how many were measured."""

    median: float
    low: float
    high: float
    count: int


def summarize(times: Sequence[float]) -> Summary:
    """Order statistics with linear interpolation; ValueError for no times."""
    ordered = sorted(times)
    if not ordered:
        raise ValueError("no times to summarize")

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return Summary(statistics.median(ordered), at(0.1), at(0.9), len(ordered))


class Overhead(NamedTuple):
    """How much slower the second of a pair is, as a share of the first: mean and 95 % interval."""

    mean: float
    low: float
    high: float


def paired_overhead(first: Sequence[float], second: Sequence[float], inner: int) -> Overhead:
    """Student's interval of the mean of ``(second_i - first_i) / mean(first)`` over the rounds i (at least 2).

    ``inner``: how many times each turn has (``Bench.interleaved``).  A round counts once, by the means of its turns:
    steps that follow each other share the clock and the temperature, and are no independent measurements.
    """
    if len(first) != len(second) or len(first) < 2 * inner or len(first) % inner:
        raise ValueError(f"needs two rounds or more of {inner} times, not {len(first)} and {len(second)} times")
    turns = [[statistics.fmean(times[i : i + inner]) for i in range(0, len(times), inner)] for times in (first, second)]
    base = statistics.fmean(first)
    shares = [(b - a) / base for a, b in zip(*turns)]
    mean = statistics.fmean(shares)
    half = float(stats.t.ppf(0.975, len(shares) - 1)) * statistics.stdev(shares) / math.sqrt(len(shares))
    return Overhead(mean, mean - half, mean + half)


@dataclass
class Row:
    """One line of results/<gpu>.csv.  Milliseconds a call; rates and shares are None where they say nothing.

    Rows in fp8 have fp8's ceiling and datasheet where ``Bench.measure_ceilings`` found one; earlier rows bf16's.
    """

    date: str
    commit: str
    device: str
    torch: str
    triton: str
    subject: str
    case: str
    variant: str
    shape: str
    dtype: str
    ms: float
    ms_low: float
    ms_high: float
    count: int
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    copy_gb_per_s: float | None = None  # ceilings of the same run
    matmul_tflop_per_s: float | None = None
    share: float | None = None  # of the ceiling that binds: the floor's time over the measured time
    mfu: float | None = None
    images_per_s: float | None = None
    gib: float | None = None
    note: str = ""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV file; its columns are Row's.  A file of other columns is refused, never mixed."""
    names = [item.name for item in dataclasses.fields(Row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with open(path, newline="") as stream:
            found = next(csv.reader(stream))
        if found != names:
            raise ValueError(f"{path} has other columns ({', '.join(found)}): move it aside")
    with open(path, "a", newline="") as stream:
        writer = csv.writer(stream)
        if fresh:
            writer.writerow(names)
        for row in rows:
            values = dataclasses.astuple(row)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values])


def read_rows(path: Path) -> list[Row]:
    """What ``write_rows`` wrote."""
    kinds = {item.name: str(item.type) for item in dataclasses.fields(Row)}

    def value(name: str, text: str) -> Any:
        if "float" in kinds[name]:
            return float(text) if text else None
        return int(text) if kinds[name] == "int" else text

    with open(path, newline="") as stream:
        return [Row(**{name: value(name, text) for name, text in line.items()}) for line in csv.DictReader(stream)]


def commit() -> str:
    """The short hash of the checkout ($FASTASYNC_COMMIT where there is no .git), with + for local changes."""
    if os.environ.get("FASTASYNC_COMMIT"):
        return os.environ["FASTASYNC_COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def device_name(device: torch.device) -> str:
    """``nvidia-h200``, ``cpu``: the name of the results file."""
    if device.type == "cpu":
        return "cpu"
    return "-".join(torch.cuda.get_device_name(device).lower().replace("/", " ").split())


def has_fp8(device: torch.device) -> bool:
    """Whether ``torch._scaled_mm`` multiplies in fp8 there: compute capability 8.9 (L4) or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, list | tuple) else []


def widened(inputs: Sequence[Any]) -> list[Any]:
    """The inputs with floating-point tensors in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return [wide(part) for part in value] if isinstance(value, tuple | list) and tensors_of(value) else value

    return [wide(value) for value in inputs]


def check(variants: Mapping[str, Callable[..., Any]], inputs: Sequence[Any]) -> dict[str, float]:
    """Relative errors of the variants against the first one in float64; each at most twice the first one's.

    One unit in the last place of the results' own precision is allowed besides: the first variant may be exact, and the
    truth has its noise.  Raises WrongResult.
    """
    reference = next(iter(variants))
    truth = tensors_of(variants[reference](*widened(inputs)))
    errors: dict[str, list[float]] = {}
    for name, function in variants.items():
        results = tensors_of(function(*inputs))
        if len(results) != len(truth):
            raise WrongResult(f"{name}: {len(results)} results, {reference} has {len(truth)}")
        errors[name] = []
        for index, (result, exact) in enumerate(zip(results, map(Tensor.double, truth))):
            size = float(exact.norm())
            error = float((result.detach().double() - exact).norm()) / max(size, 1e-30)
            floor = torch.finfo(result.dtype).eps if result.is_floating_point() else 0.0
            allowed = 2 * errors[reference][index] + floor if name != reference else math.inf
            if not error <= allowed:  # NaN included
                raise WrongResult(f"{name}: result {index} has error {error:.2e}, at most {allowed:.2e} is allowed")
            errors[name].append(error)
    return {name: max(values, default=0.0) for name, values in errors.items()}


def with_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``run(*arguments, douts)`` -> outputs and the gradients of every argument that requires one."""

    def run(*inputs: Any) -> list[Tensor]:
        *arguments, douts = inputs
        with torch.enable_grad():
            outputs = [out for out in tensors_of(forward(*arguments)) if out.requires_grad]
            wanted = [value for value in tensors_of(arguments) if value.requires_grad]
            gradients = torch.autograd.grad(outputs, wanted, tensors_of(douts), allow_unused=True)
        return [*(out.detach() for out in outputs), *(grad for grad in gradients if grad is not None)]

    return run


@dataclass
class Operation:
    """One thing to measure.  The first variant is the reference; ``make(seed, batch)`` gives one input set."""

    subject: str
    case: str
    shape: str
    dtype: str
    variants: dict[str, Callable[..., Any]]
    make: Callable[[int, int], Sequence[Any]]
    batch: int
    nbytes: float = 0.0  # the fewest bytes that must move
    flops: float = 0.0
    check_batch: int = 8


class Bench:
    """A run of the benchmarks: device, sizes, ceilings, and the rows so far.

    ``small``: sizes for a CPU.  ``rounds``: how often each variant is timed.  ``deadline`` (``time.monotonic``): no new
    case is begun after it.  ``sink`` is called with each row.  ``sizes``: networks for ``step``, and
    ``variants``: what is run at each size in the place of its plans.  ``batch``: its images, 0: each plan's own.
    """

    def __init__(
        self,
        device: torch.device,
        rounds: int = 20,
        deadline: float = math.inf,
        sink: Callable[[Row], None] | None = None,
        say: Callable[[str], None] = print,
        sizes: Sequence[str] = (),
        variants: Sequence[str] = (),
        batch: int = 0,
    ):
        self.sizes, self.variants, self.batch = sizes, variants, batch
        self.device, self.rounds, self.deadline, self.sink, self.say = device, rounds, deadline, sink, say
        self.small = device.type == "cpu"
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.copy_rate = self.matmul_rate = self.fp8_rate = 0.0
        try:
            from triton import __version__ as triton_version
        except ImportError:
            triton_version = "none"
        self._facts = (commit(), device_name(device), torch.__version__, triton_version)

    # --- clocks -----------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Run ``call``; the result gives its milliseconds, after ``synchronize``."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1e3
            return lambda: elapsed
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end)

    def interleaved(
        self,
        calls: Mapping[str, Callable[[], Any]],
        rounds: int | None = None,
        warm: int = 1,
        inner: int = 1,
        before: Callable[[], Any] | None = None,
    ) -> dict[str, list[float]]:
        """Milliseconds of every call: ``rounds`` times, by turns, ``warm`` untimed and ``inner`` timed runs of each.

        ``before`` is called, untimed, at each turn.
        """
        names = list(calls)
        pending: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
        for number in range(self.rounds if rounds is None else rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                if before is not None:
                    before()
                for _ in range(warm):
                    calls[name]()
                pending[name] += [self._timed(calls[name]) for _ in range(inner)]
            self.synchronize()
        return {name: [read() for read in reads] for name, reads in pending.items()}

    def time_is_up(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return False
        self.skip(what, "out of time")
        return True

    def skip(self, what: str, why: str) -> None:
        """Say that something was not measured, and why."""
        self.skipped.append(f"{what}: {why}")
        self.say(f"  skipped {what}: {why}")

    # --- ceilings ---------------------------------------------------------------------------------------------------

    def measure_ceilings(self) -> None:
        """Copy bandwidth (bytes read plus written) and the rate of a large matrix product on random data.

        On a GPU that has fp8 products, that of the fp8 linears' product as well, with scales for rows: the ceiling of
        rows in fp8.  No step reaches it: attention, embeddings, adaLN and the final layer are in bf16 there too.
        """
        count, side, dtype = (2**24, 512, torch.float32) if self.small else (2**31, 8192, torch.bfloat16)
        source = torch.empty(count, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        times = self.interleaved({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 10)
        copy, matmul = summarize(times["copy"]), summarize(times["matmul"])
        self.copy_rate, self.matmul_rate = 2e3 * count / copy.median, 2e3 * side**3 / matmul.median
        shape = f"{side}^3"
        self.add("ceilings", "copy", "torch", f"{count} bytes", "uint8", copy, nbytes=2 * count)
        self.add("ceilings", "matmul", "torch", shape, str(dtype).split(".")[1], matmul, flops=2 * side**3)
        if not has_fp8(self.device):
            return
        try:  # after the others, which stay as they were, and by turns with a copy as the product in bf16 is
            rows, columns = (fp8_linear.Fp8Rows(*reference.cast_rows(factor)[:2]) for factor in (a, b))
            product = functools.partial(fp8_linear.product, rows, columns)
            times = self.interleaved({"copy": lambda: target.copy_(source), "matmul": product}, 10)
        except RuntimeError as error:  # a torch without such products for this GPU
            self.skip("ceilings, fp8", " ".join(str(error).split())[:120])
            return
        found = summarize(times["matmul"])
        self.fp8_rate = 2e3 * side**3 / found.median
        self.add("ceilings", "matmul", "torch", shape, "float8_e4m3fn", found, flops=2 * side**3)

    # --- rows -------------------------------------------------------------------------------------------------------

    def add(
        self,
        subject: str,
        case: str,
        variant: str,
        shape: str,
        dtype: str,
        times: Summary,
        *,
        nbytes: float = 0.0,
        flops: float = 0.0,
        images: int = 0,
        gib: float | None = None,
        note: str = "",
    ) -> Row:
        """Print and keep one result.  ``images``: how many one call trains on or makes."""
        seconds = max(times.median, 1e-9) / 1e3
        rate, datasheet = self.matmul_rate, DATASHEET_BF16
        if dtype in FP8 and self.fp8_rate:
            rate, datasheet = self.fp8_rate, DATASHEET_FP8
        floors = [nbytes / self.copy_rate if self.copy_rate else 0, flops / rate if rate else 0]
        row = Row(
            datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
            *self._facts,
            subject, case, variant, shape, dtype, *times,
            gb_per_s=nbytes / seconds / 1e9 if nbytes else None,
            tflop_per_s=flops / seconds / 1e12 if flops else None,
            copy_gb_per_s=self.copy_rate / 1e9 or None,
            matmul_tflop_per_s=rate / 1e12 or None,
            share=max(floors) / seconds if max(floors) else None,
            mfu=flops / seconds / datasheet if images and flops and not self.small else None,
            images_per_s=images / seconds if images else None,
            gib=gib,
            note=note,
        )  # fmt: skip
        self.rows.append(row)
        self.say("  " + describe(row))
        if self.sink is not None:
            self.sink(row)
        return row

    def operation(self, op: Operation) -> None:
        """Check an operation's variants, then time them interleaved, from cold caches."""
        label = f"{op.subject} {op.case} {op.shape} {op.dtype}"
        if self.time_is_up(label):
            return
        small = op.make(0, min(op.batch, op.check_batch))
        first = next(iter(op.variants))
        for name in [name for name in op.variants if name.endswith(" compiled")]:
            try:
                op.variants[name](*small)
                if name == f"{first} compiled":
                    check({first: op.variants[first], name: op.variants[name]}, small)
            except Exception as error:  # torch.compile's failure on a baseline must not end the subject
                reason = " ".join(str(error).split())[:120]
                self.skip(f"{label}, {name}", f"{type(error).__name__}: {reason}")
                del op.variants[name]
        errors = check(op.variants, small)
        count = 2
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = min(max(math.ceil(COLD * cache / max(op.nbytes, 1)), 2), MAX_SETS)
        sets = [op.make(seed, op.batch) for seed in range(1, count + 1)]
        notes = dict.fromkeys(op.variants, "")
        calls = {}
        for name, function in op.variants.items():
            calls[name], notes[name] = self._over_sets(function, sets)
        times = self.interleaved(calls)
        for name in op.variants:
            each = summarize([ms / len(sets) for ms in times[name]])
            note = "; ".join(part for part in (f"error {errors[name]:.1e}", notes[name]) if part)
            self.add(
                op.subject, op.case, name, op.shape, op.dtype, each, nbytes=op.nbytes, flops=op.flops, note=note
            )  # fmt: skip

    def _over_sets(self, function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> tuple[Callable[[], Any], str]:
        """A call that runs ``function`` on every set: on CUDA a recorded graph, where it can be recorded."""

        def plain() -> None:
            for inputs in sets:
                function(*inputs)

        if self.device.type != "cuda":
            return plain, ""
        plain()  # compiles and tunes
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                function(*sets[0])
            torch.cuda.current_stream().wait_stream(aside)
            graph, kept = torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(graph):
                for inputs in sets:
                    kept.append(function(*inputs))  # kept: the next set's results go elsewhere in memory
        except Exception as error:
            torch.cuda.synchronize()
            return plain, f"launches included ({type(error).__name__} while recording)"

        def replay(kept: Any = kept) -> None:
            graph.replay()

        return replay, ""


def describe(row: Row) -> str:
    """One printed line."""
    label = f"{row.subject:12s} {row.case:22s} {row.variant:20s} {row.shape} {row.dtype}:"
    parts = [f"{row.ms:.4g} ms ({row.ms_low:.4g} to {row.ms_high:.4g}, n={row.count})"]
    for value, text in (
        (row.gb_per_s, "{:.0f} GB/s"),
        (row.tflop_per_s, "{:.1f} TFLOP/s"),
        (row.share, "{:.1%} of the ceiling"),
        (row.mfu, "MFU {:.1%}"),
        (row.images_per_s, "{:.0f} img/s"),
        (row.gib, "{:.2f} GiB"),
    ):
        if value is not None:
            parts.append(text.format(value))
    return f"{label} {', '.join(parts)}" + (f"  [{row.note}]" if row.note else "")
