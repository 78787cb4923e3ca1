"""DeepSpeed with one process against the plain engine: a whole training step under ZeRO 1, in pairs, and its memory."""

from __future__ import annotations

from bench.harness import Bench, paired_overhead, summarize
from bench.subjects.step import build, peak_gib
from bench.workload import learned_schedule


def run(bench: Bench) -> None:
    size, batch = ("tiny", 8) if bench.small else ("XL", 256)
    plain = "ours eager" if bench.small else "ours regional"
    works = build(bench, "engine", size, batch, (plain, "ours zero1"))
    calls = {}
    for name, work in works.items():
        schedule = learned_schedule(work.config)
        calls[name] = lambda work=work, schedule=schedule: work.step(schedule)
    memory = {name: peak_gib(bench, call) for name, call in calls.items()}
    times = bench.interleaved(calls, rounds=10 if not bench.small else 3, warm=1, inner=4)
    for name, values in times.items():
        note = ""
        if name != plain and plain in times:
            overhead = paired_overhead(times[plain], values, 4)
            note = f"overhead {overhead.mean:+.2%}, 95 % interval {overhead.low:+.2%} to {overhead.high:+.2%}"
        precision = works[name].config.train.precision
        # both engines' weights and states are on the device: what the other one holds is counted too
        bench.add(
            *("engine", size, name, f"batch {batch}", precision, summarize(values)),
            images=batch,
            gib=memory[name],
            note=note,
        )
