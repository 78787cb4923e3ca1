"""Training steps on one GPU and on several of one host: ``python -m bench.scaling --gpus 2``.

One process times the plain engine and DeepSpeed's ZeRO 1; then torchrun's ranks time the plain engine on the first GPU
alone (the baseline, before and after) and on each at once without a word between them (GPUs differ, and the slowest
decides), ZeRO 1 and 2 with the same batch on every GPU (weak scaling), ZeRO 1 with the baseline's batch divided among
them, and ZeRO 1 as DeepSpeed itself reduces.  What is recomputed in the backward pass the baseline chooses, for all.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

from bench.harness import RESULTS, ROOT, Bench, Row, Summary, device_name, summarize, write_rows
from bench.profile_step import busy_and_idle, by_category, longest, record
from bench.subjects.step import peak_gib
from bench.workload import Work, configuration, latents, learned_schedule, make_work
from fastasync.config import Config, config_from_dict
from fastasync.distributed import session
from fastasync.model import train_flops
from fastasync.training.build import choose_device
from fastasync.training.engine import PlainEngine, build_engine

ALONE_SHARE = 0.4  # of the time, for the part with one process
INNER, WARM = 5, 2  # timed and untimed steps of a round
PROFILED = 2  # steps
# DeepSpeed's reduction as it is fastest: after the backward pass, in two buckets (bench/NOTES.md)
BY_DEEPSPEED = {"overlap_comm": False, "reduce_scatter": False, "reduce_bucket_size": 500_000_000}


class Leg(NamedTuple):
    """One thing to time.  ``zero`` None: the plain engine.  ``batch``: of a GPU.  ``settings``: DeepSpeed's JSON."""

    variant: str
    zero: int | None
    batch: int
    settings: str = ""


def legs(world: int, batch: int) -> list[Leg]:
    """What is timed on ``world`` GPUs, in the order of importance but for the baseline's second time."""
    plain = Leg("plain", None, batch)
    if world == 1:
        return [plain, Leg("zero 1", 1, batch), plain]
    strong = [Leg("zero 1 strong", 1, batch // world)] if batch % world == 0 else []
    theirs = Leg("zero 1 by DeepSpeed", 1, batch, json.dumps({"zero_optimization": BY_DEEPSPEED}))
    return [plain, Leg("zero 1", 1, batch), Leg("zero 2", 2, batch), plain, *strong, theirs]


def config_of(
    leg: Leg, size: str, world: int, memory: str, compiled: str, json: str = "", graph: str = "off"
) -> Config:
    ranks = 1 if leg.zero is None else world
    engine: dict[str, Any] = {"engine": "plain"} if leg.zero is None else {"engine": "deepspeed", "zero": leg.zero}
    if leg.zero is not None and json:
        engine["deepspeed_config"] = json
    changes = {"train": {**engine, "memory": memory, "compile": compiled, "cuda_graph": graph}}
    return config_from_dict(changes, configuration(size, leg.batch * ranks, "ours regional"))


def settings_of_nccl(environment: dict[str, str]) -> str:
    """NCCL's version and what the environment sets for it; of a path only the name."""
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    found = {name: value for name, value in sorted(environment.items()) if name.startswith(("NCCL_", "TORCH_NCCL_"))}
    return f"NCCL {version} " + " ".join(f"{name}={'...' if '/' in v else v}" for name, v in found.items())


class Scaling:
    """The legs of one launch.  All ranks do the same; rank 0 keeps the rows."""

    def __init__(self, bench: Bench, size: str, compiled: str, graph: str = "off"):
        self.bench, self.size, self.compiled, self.here = bench, size, compiled, session()
        self.graph = graph  # train.cuda_graph
        self.memory = "auto"  # until the baseline has chosen
        self.base: list[float] = []  # medians of the baseline
        self.apart = False  # whether every GPU has been timed for itself
        self.json = ""  # a file with other settings of DeepSpeed
        self.control = self.here.start_group(bench.device)

    def world(self, leg: Leg) -> int:
        return 1 if leg.zero is None else self.here.world

    def time_left(self, needed: float) -> bool:
        """Rank 0's clock decides for all."""
        return self.here.from_main(lambda: time.monotonic() + needed < self.bench.deadline)

    def run(self, wanted: Sequence[Leg], rounds: int, profiled: bool = False) -> None:
        longest = 0.0
        for number, leg in enumerate(wanted):
            if not self.time_left(longest):
                if self.here.is_main:
                    self.bench.skip(f"scaling {', '.join(each.variant for each in wanted[number:])}", "out of time")
                break
            start = time.monotonic()
            self.time(leg, rounds, profiled)
            longest = time.monotonic() - start
            torch._dynamo.reset()
            gc.collect()
            if self.bench.device.type == "cuda":
                torch.cuda.empty_cache()

    def time(self, leg: Leg, rounds: int, profiled: bool) -> None:
        """Build, warm up, time; of the plain engine, which is built on every GPU, the first alone and then all."""
        bench, world = self.bench, self.world(leg)
        kept = torch.cuda.memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0
        settings = leg.settings or (Path(self.json).read_text() if leg.zero is not None and self.json else "")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "deepspeed.json"
            file.write_text(settings)
            given = str(file) if settings else ""
            config = config_of(leg, self.size, world, self.memory, self.compiled, given, self.graph)
            data = latents(config_of(leg, self.size, 1, self.memory, self.compiled), bench.device)
            work = make_work(config, bench.device, data, make_engine=PlainEngine if leg.zero is None else build_engine)
        schedule = learned_schedule(config)
        for _ in range(3):  # compiles, tunes, makes the optimizer's state
            loss = work.step(schedule)
        if not bool(torch.isfinite(loss).all()):
            raise ArithmeticError(f"{leg.variant}: the loss is {loss.tolist()}")
        recompute = work.engine.model.blocks[0].recompute
        notes = [f"memory {recompute}, {kept:.1f} GiB before", *([" ".join(settings.split())] if settings else [])]

        def timed() -> tuple[list[float], float | None]:
            gib = peak_gib(bench, lambda: work.step(schedule))
            calls = {"": lambda: work.step(schedule)}
            return bench.interleaved(calls, rounds=rounds, warm=WARM, inner=INNER)[""], gib

        if leg.zero is None:
            if self.memory == "auto":
                self.memory = self.here.from_main(lambda: str(recompute))
            times, gib = self.here.from_main(timed)
        else:
            work.engine.barrier()
            times, gib = timed()
        if self.here.is_main:
            self.report(leg, work, summarize(times), gib, notes)
        if profiled:
            self.profile(leg, work)
        if leg.zero is not None:
            engine: Any = work.engine
            engine._engine.destroy()  # its hooks would keep the network alive
        elif self.here.world > 1 and not self.apart:
            self.apart = True
            self.at_once(leg, work, rounds)

    def at_once(self, leg: Leg, work: Work, rounds: int) -> None:
        """The plain engine on every GPU at the same time: what nothing but a slower GPU costs."""
        schedule = learned_schedule(work.config)
        self.here.from_main(lambda: None)
        times = self.bench.interleaved({"": lambda: work.step(schedule)}, rounds, warm=WARM, inner=INNER)[""]
        medians = torch.zeros(self.here.world)
        medians[self.here.rank] = summarize(times).median
        distributed.all_reduce(medians, group=self.control)
        if self.here.is_main:
            slowest = float(medians.max())
            images = work.config.train.batch * self.here.world
            note = "by GPU: " + ", ".join(f"{ms:.1f}" for ms in medians.tolist())
            summary = Summary(slowest, float(medians.min()), slowest, len(times))
            case = f"{self.size} on {self.here.world}"
            shape, precision = f"batch {leg.batch} a GPU", work.config.train.precision
            variant = "plain at once" + " recorded" * work.engine.recorded
            self.bench.add("scaling", case, variant, shape, precision, summary, images=images, note=note)

    def profile(self, leg: Leg, work: Work) -> None:
        """Print where rank 0's device time goes."""
        schedule = learned_schedule(work.config)

        def step() -> Any:
            return work.step(schedule)

        if leg.zero is None:  # no word between the ranks: of the first alone
            self.here.from_main(lambda: self._profile(leg, step))
        else:
            self._profile(leg, step)

    def _profile(self, leg: Leg, step: Callable[[], Any]) -> None:
        _, events, spans = record(self.bench, step, PROFILED)
        if not self.here.is_main:
            return
        busy, idle = (each / 1e3 / PROFILED for each in busy_and_idle(spans))
        totals = by_category(events, PROFILED)
        said = ", ".join(f"{kind} {ms:.4g}" for kind, ms in totals.items())
        count = len(events) / PROFILED
        self.bench.say(f"  {leg.variant}, ms a step: {said}; busy {busy:.4g}, idle {idle:.4g}; {count:g} launches")
        for line in longest(events, PROFILED, 25):
            self.bench.say(line)

    def report(self, leg: Leg, work: Work, times: Summary, gib: float | None, notes: list[str]) -> None:
        world, config, model = self.world(leg), work.config, work.engine.model
        images = config.train.batch
        if leg.zero is None:
            self.base.append(times.median / images)
        elif self.base:
            speed_up = self.base[-1] / (times.median / images)
            before = ", before" if len(self.base) == 1 else ""
            notes = [f"{speed_up:.3f}x the plain engine on one GPU{before}", *notes]
        if world > 1:
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            notes.append(f"{4 * count / 1e9:.3g} GB of gradients")
        self.bench.add(
            *("scaling", f"{self.size} on {world}", leg.variant + " recorded" * work.engine.recorded),
            *(f"batch {leg.batch} a GPU", config.train.precision),
            times,
            flops=train_flops(model) * leg.batch,  # of one GPU
            images=images,
            gib=gib,
            note="; ".join(notes),
        )

    def all_reduce(self, numbers: int, rounds: int = 10) -> None:
        """Sum as many float32 as XL has gradients, in one piece; the rate is bytes x 2 (N - 1) / N over time."""
        values = torch.zeros(numbers, device=self.bench.device)
        calls = {"": lambda: distributed.all_reduce(values)}
        times = summarize(self.bench.interleaved(calls, rounds=rounds)[""])
        if self.here.is_main:
            world = self.here.world
            moved = 4 * numbers * 2 * (world - 1) / world
            note = settings_of_nccl(dict(os.environ))
            shape = f"{4 * numbers} bytes"
            self.bench.add("scaling", f"on {world}", "all_reduce", shape, "float32", times, nbytes=moved, note=note)


def measure(arguments: argparse.Namespace) -> int:
    """One process of those that `launch` starts."""
    device, here = choose_device("auto"), session()
    cuda = device.type == "cuda"
    path = arguments.results / f"{device_name(device)}.csv"

    def sink(row: Row) -> None:
        if cuda or arguments.record:
            write_rows(path, [row])

    if cuda:
        torch.set_float32_matmul_precision("high")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    bench = Bench(device, deadline=arguments.deadline, sink=sink)
    scaling = Scaling(bench, arguments.size, "regional" if cuda else "off", arguments.cuda_graph)
    scaling.json = str(arguments.deepspeed_json) if arguments.deepspeed_json else ""
    wanted = [leg for leg in legs(here.world, arguments.batch) if not arguments.only or leg.variant in arguments.only]
    if scaling.graph == "on":  # the others' steps are not recorded
        wanted = [leg for leg in wanted if leg.zero in (None, 1) and not leg.settings]
    if not wanted and here.is_main:
        bench.skip("scaling", "nothing of what --only names is timed so")
    scaling.run(wanted, arguments.rounds, arguments.profile)
    if here.world > 1 and scaling.time_left(5):
        scaling.all_reduce(675_000_000 if cuda else 1000)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    here.leave()
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(gpus: int, seconds: float, given: Sequence[str]) -> int:
    """First one process, then ``gpus`` under torchrun; each begins nothing new after its share of ``seconds``."""
    start, codes = time.monotonic(), []
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={gpus}", f"--master-port={free_port()}"]
    for command, share in (([], ALONE_SHARE), (torchrun, 1.0)):
        if command and gpus == 1:
            continue
        deadline = start + seconds * (share if gpus > 1 else 1.0)  # of time.monotonic, which processes of a host share
        words = [sys.executable, *command, "-m", "bench.scaling", *given, "--deadline", f"{deadline:.3f}"]
        # the first GPU alone: another one must not even hold a context
        visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        codes.append(subprocess.run(words, cwd=ROOT, env={**os.environ, **({} if command else visible)}).returncode)
    return next((code for code in codes if code), 0)


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.scaling", description=__doc__)
    cuda = torch.cuda.is_available()
    top.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2, help="on a CPU: gloo ranks")
    top.add_argument("--size", default="XL" if cuda else "tiny")
    top.add_argument("--batch", type=int, default=256 if cuda else 8, help="of each GPU")
    top.add_argument("--rounds", type=int, default=4, help=f"of {WARM} untimed and {INNER} timed steps")
    top.add_argument("--seconds", type=float, default=200.0, help="nothing is begun that would end after this long")
    top.add_argument("--only", action="append", help="plain, zero 1, zero 2 or zero 1 strong; may be repeated")
    top.add_argument("--deepspeed-json", type=Path, help="settings of DeepSpeed to be tried")
    top.add_argument("--cuda-graph", choices=("off", "on", "auto"), default="off", help="train.cuda_graph of all")
    top.add_argument("--profile", action="store_true", help="print each one's device time by category, and its kernels")
    top.add_argument("--results", type=Path, default=RESULTS)
    top.add_argument("--record", action="store_true", help="on a CPU, too, write results/cpu.csv")
    top.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # given to the processes that are started
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = top.parse_args(given)
    if arguments.deadline is None:
        given += ["--results", str(arguments.results.resolve())]  # the processes start in another folder
        if arguments.deepspeed_json:
            given += ["--deepspeed-json", str(arguments.deepspeed_json.resolve())]
        return launch(arguments.gpus, arguments.seconds, given)
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
