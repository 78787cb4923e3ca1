"""Peak memory of a step with each amount of recomputation, beside its estimate, and what it costs in time.

Results are not compared here: the subject ``step`` does it with nothing recomputed, tests/model with the rest.
"""

from __future__ import annotations

from bench.harness import Bench, summarize
from bench.subjects.step import build, peak_gib
from bench.workload import learned_schedule
from fastasync.model import memory_estimate


def run(bench: Bench) -> None:
    size, batch = ("tiny", 8) if bench.small else ("XL", 256)
    for what in ("none", "selective", "full"):
        if bench.time_is_up(f"memory {what}"):
            return
        for work in build(
            bench, f"memory {what}", size, batch, ("ours eager" if bench.small else "ours regional",)
        ).values():
            model = work.engine.model
            model.set_recompute(what)
            schedule = learned_schedule(work.config)

            def call(work=work, schedule=schedule) -> None:  # type: ignore[no-untyped-def]
                work.step(schedule)

            call()
            gib = peak_gib(bench, call)
            times = bench.interleaved({what: call}, rounds=2, warm=1, inner=5)[what]
            estimate = memory_estimate(model, batch, "fp32" if bench.small else "bf16", what).total / 2**30
            bench.add(
                *("memory", size, what, f"batch {batch}", work.config.train.precision, summarize(times)),
                images=batch,
                gib=gib,
                note=f"estimated {estimate:.1f} GiB",
            )
