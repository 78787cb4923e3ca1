"""What the learned schedule costs: its step against the synchronous one, in pairs, with a 95 % interval; and the host's
share of it, the drawing of the times."""

from __future__ import annotations

import time

from bench.harness import Bench, paired_overhead, summarize
from bench.subjects.step import build
from bench.workload import learned_schedule, synchronous
from fastasync.training.build import build_objective


def run(bench: Bench) -> None:
    size, batch = ("tiny", 8) if bench.small else ("XL", 256)
    works = build(bench, "schedule_overhead", size, batch, ("ours eager" if bench.small else "ours regional",))
    for work in works.values():
        schedules = {"synchronous": synchronous(work.config), "learned": learned_schedule(work.config)}
        calls = {name: (lambda s=schedule, work=work: work.step(s)) for name, schedule in schedules.items()}
        # turns of four steps of one kind: single steps would each overlap the other kind's work on the host
        times = bench.interleaved(calls, rounds=10 if not bench.small else 3, warm=1, inner=4)
        overhead = paired_overhead(times["synchronous"], times["learned"], 4)
        text = f"overhead {overhead.mean:+.3%}, 95 % interval {overhead.low:+.3%} to {overhead.high:+.3%}"
        for name, values in times.items():
            note = text if name == "learned" else ""
            bench.add(
                *("schedule_overhead", f"step {size}", name, f"batch {batch}", work.config.train.precision),
                summarize(values),
                images=batch,
                note=note,
            )
        objective, (where,) = build_objective(work.config), work.engine.positions()
        for name, schedule in schedules.items():
            times_at, host, block = objective.times_by_step(schedule, seed=0, samples=where, total=batch), [], 32
            for first in range(0, 10 * block, block):  # drawn a block at a time: a step's share of it
                start = time.perf_counter()
                times_at(first)
                host.append((time.perf_counter() - start) * 1e3 / block)
            found = summarize(host[2:])
            bench.add("schedule_overhead", "drawing times (CPU)", name, f"batch {batch}", "float64", found)
