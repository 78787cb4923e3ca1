"""The probe's share of a run: its training steps and its forward passes in seconds, against the run's own steps."""

from __future__ import annotations

import torch

from bench.harness import Bench, summarize
from bench.subjects.step import build
from bench.workload import configuration, latents, learned_schedule
from fastasync.model import forward_flops, train_flops
from fastasync.probe.budget import plan_probe
from fastasync.probe.network import Trainer, autocast, build_probe, surface_step
from fastasync.training.graph import Part


def run(bench: Bench) -> None:
    size, batch = ("tiny", 8) if bench.small else ("XL", 256)
    config = configuration(size, batch, "ours eager" if bench.small else "ours regional")
    probe = build_probe(config, bench.device)
    z, y, _ = latents(config, bench.device, 1)[0]
    tau = torch.rand(batch, len(config.representations.names), device=bench.device)
    trainer, half = Trainer(probe, config.probe.lr, config.train.steps), bench.device.type == "cuda"
    advance = surface_step(probe, trainer, config, bench.device)

    def train() -> None:
        trainer.prepare()
        advance(trainer.done, [Part(z, y, tau, tau)])
        trainer.average_weights()

    def sample() -> None:
        with torch.no_grad(), autocast(bench.device):
            probe(z, tau, y)

    # one after the other, as a probe and its run use a GPU: side by side XL's activations leave the probe no memory
    calls = {"probe step": train, "probe forward": sample}
    measured = bench.interleaved(calls, rounds=min(bench.rounds, 4), warm=5, inner=10)
    works = build(bench, "probe", size, batch, ("ours eager" if bench.small else "ours regional",))
    for work in works.values():
        schedule = learned_schedule(work.config)
        calls = {"run step": lambda work=work, schedule=schedule: work.step(schedule)}
        measured |= bench.interleaved(calls, rounds=min(bench.rounds, 4), warm=2, inner=5)
    times = {name: summarize(values) for name, values in measured.items()}
    note = ""
    if works:
        run_flops = train_flops(next(iter(works.values())).engine.model) * batch * config.train.steps
        plan = plan_probe(config.probe, forward_flops(probe), run_flops)
        forwards = (
            config.probe.budget * run_flops / forward_flops(probe) - 3 * plan.steps * config.probe.batch
        ) / batch
        seconds = plan.steps * times["probe step"].median * config.probe.batch / batch
        seconds += max(forwards, 0.0) * times["probe forward"].median
        share = seconds / (config.train.steps * times["run step"].median)
        note = f"{config.probe.budget:.2%} of the run's FLOPs take {share:.2%} of its time ({config.train.steps} steps)"
    for name, found in times.items():
        bench.add("probe", size, name, f"batch {batch}", "bf16" if half else "fp32", found, images=batch, note=note)
