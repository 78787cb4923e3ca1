"""``make profile``: a trace of training steps (chrome://tracing), and a table of device time by category.

Its rows (subject ``profile``) are what the step-time breakdown is drawn from.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.harness import RESULTS, Bench, Summary, device_name, write_rows
from bench.subjects.step import build
from bench.workload import VARIANTS, learned_schedule

# the first pattern that is found in a kernel's name decides
CATEGORIES = (
    ("communication", r"nccl|gloo|all_?reduce|all_?gather"),
    ("attention", r"flash|fmha|sdpa|attention|fa4"),
    ("optimizer", r"fastasync::|multi_tensor|adam|norm_kernel|update_kernel|advance_kernel|AdamW|foreach"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|splitk|_scaled_mm|::(add)?mm$|convolution|::bmm"),
    ("copies", r"memcpy|memset"),
    ("element-wise", r"triton_|elementwise|_forward_kernel|_backward_kernel|reduce|vectorized|_kernel|aten::|Backward"),
)


def category(name: str) -> str:
    """Which kind of work a kernel (on a CPU: an operator) is, by its name."""
    return next((kind for kind, pattern in CATEGORIES if re.search(pattern, name, re.IGNORECASE)), "other")


def by_category(events: Sequence[tuple[str, float]], steps: int) -> dict[str, float]:
    """Milliseconds a step of each category, from (name, microseconds) of every event."""
    totals = dict.fromkeys([kind for kind, _ in CATEGORIES] + ["other"], 0.0)
    for name, microseconds in events:
        totals[category(name)] += microseconds / 1e3 / steps
    return totals


def busy_and_idle(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """From (start, end) of every kernel, of any stream: the time in which one runs, and that in which none does."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    span = until - min(start for start, _ in intervals) if intervals else 0.0
    return busy, span - busy


def record(
    bench: Bench, step: Callable[[], object], steps: int
) -> tuple[profile, list[tuple[str, float]], list[tuple[float, float]]]:
    """Profile ``steps`` calls: the profile, (name, microseconds) of each kernel, (start, end) of each.

    On a CPU: of each operator, and no spans.
    """
    cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiled:
        for _ in range(steps):
            step()
        bench.synchronize()
    found = profiled.events() or []
    if not cuda:
        return profiled, [(event.name, event.self_cpu_time_total) for event in found], []
    # annotations span the kernels inside them: they would be counted twice
    kernels = [event for event in found if event.device_type == DeviceType.CUDA]
    kernels = [e for e in kernels if not getattr(e, "is_user_annotation", False) and not e.name.startswith("##")]
    events = [(event.name, event.self_device_time_total) for event in kernels]
    return profiled, events, [(event.time_range.start, event.time_range.end) for event in kernels]


def longest(events: Sequence[tuple[str, float]], steps: int, count: int) -> list[str]:
    """A line for each of the ``count`` kernels that take longest."""
    times: dict[str, list[float]] = {}
    for name, microseconds in events:
        times.setdefault(name, []).append(microseconds / 1e3 / steps)
    return [
        f"  {sum(each):9.3f} ms  {len(each) / steps:6g} calls  {category(name):13s} {name[:110]}"
        for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:count]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.profile_step", description=__doc__)
    cuda = torch.cuda.is_available()
    top.add_argument("--size", default="XL" if cuda else "tiny", help="XL, L, B, S, cifar10 or tiny")
    top.add_argument("--batch", type=int, default=256 if cuda else 8)
    top.add_argument("--variant", choices=VARIANTS, default="ours regional" if cuda else "ours eager")
    top.add_argument("--steps", type=int, default=3)
    top.add_argument("--out", type=Path, default=Path("runs/profile"))
    top.add_argument("--results", type=Path, default=RESULTS)
    top.add_argument("--record", action="store_true", help="on a CPU, too, write results/cpu.csv")
    chosen = top.parse_args(argv)
    device = torch.device("cuda" if cuda else "cpu")
    bench = Bench(device, rounds=1)
    works = build(bench, "profile", chosen.size, chosen.batch, (chosen.variant,))
    if not works:
        return 1
    (work,) = works.values()
    schedule = learned_schedule(work.config)
    profiled, events, spans = record(bench, lambda: work.step(schedule), chosen.steps)
    chosen.out.mkdir(parents=True, exist_ok=True)
    trace = chosen.out / f"{chosen.size}-{chosen.variant.replace(' ', '-')}.json.gz"
    profiled.export_chrome_trace(str(trace))
    totals = by_category(events, chosen.steps)
    everything = sum(totals.values())
    for kind, ms in sorted(totals.items(), key=lambda item: -item[1]):
        note = f"{ms / everything:.1%} of {everything:.4g} ms" if everything else ""
        times, shape = Summary(ms, ms, ms, chosen.steps), f"{chosen.size} batch {chosen.batch}"
        bench.add("profile", kind, chosen.variant, shape, work.config.train.precision, times, note=note)
    for line in longest(events, chosen.steps, 40):
        print(line)
    print(f"{len(events) / chosen.steps:g} {'launches' if cuda else 'operators'} a step")
    if cuda:
        busy, idle = (each / 1e3 / chosen.steps for each in busy_and_idle(spans))
        print(f"{busy:.4g} ms a step in which a kernel runs, {idle:.4g} ms in which none does")
    if cuda or chosen.record:
        write_rows(chosen.results / f"{device_name(device)}.csv", bench.rows)
    print(f"trace in {trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
