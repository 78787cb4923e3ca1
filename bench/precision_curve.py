"""``python -m bench.precision_curve``: the loss of the same training in fp8 and in bf16, and what two seeds differ by.

Trains a preset's network, by the project's own training, on its own latents: in bf16 with two seeds, and in fp8 with
the first seed, hence with the same images, times, noise and initial weights as the first bf16 run.  fp8 is as good as
bf16 here when its loss differs from that of its twin by no more than the two bf16 seeds differ.  ``--runs`` adds
others (``fp32:0``).  Every run continues where it was stopped.  Writes curve.csv and curve.png to ``--out`` as it goes.

``--emulate`` rounds to fp8 as the GPU does, on any device: it shows what rounding does to the loss, and nothing about
speed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import matplotlib
import torch

from bench.harness import commit, device_name
from fastasync.config import Config, apply_settings
from fastasync.errors import UserError
from fastasync.inputs import open_inputs
from fastasync.presets import preset
from fastasync.run import Run
from fastasync.schedule import named_schedule
from fastasync.training import build, train
from fastasync.training.build import choose_device

matplotlib.use("Agg")
RUNS = ("bf16:0", "bf16:1", "fp8:0")
LOG_EVERY = 10  # steps that one recorded loss is the mean of
TAIL = 0.25  # of the steps: what the table's figures are means over


class Point(NamedTuple):
    """One line of curve.csv: the mean loss of the LOG_EVERY steps up to ``step``."""

    date: str
    commit: str
    device: str
    torch: str
    preset: str
    size: str
    run: str
    step: int
    loss: float
    grad_norm: float


def configuration(options: argparse.Namespace, precision: str, seed: int) -> Config:
    """The preset's, with this precision and seed, and the command line's own settings last."""
    base = preset(options.preset)
    settings = [f"train.steps={options.steps}", f"train.precision={precision}", f"data.seed={seed}"]
    settings += [f"train.log_every={LOG_EVERY}", f"train.checkpoint_every={max(options.steps // 4, 1)}"]
    settings += [f"schedule.name={options.schedule}", "schedule.baselines="]
    settings += [f"model.size={options.size}"] if options.size else []
    return apply_settings(base, [*settings, *options.set])


@contextlib.contextmanager
def emulated(wanted: bool) -> Iterator[None]:
    """fp8 of the training inside runs on any device."""
    if wanted:
        with mock.patch.object(build, "use_fp8", functools.partial(build.use_fp8, emulate=True)):
            yield
    else:
        yield


def read_run(folder: Path, facts: Sequence[str], name: str) -> list[Point]:
    """The losses that training recorded."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [Point(*facts, name, r["step"], r["loss"], r["grad_norm"]) for r in records if r.get("loss") is not None]


def write_points(path: Path, points: Sequence[Point]) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Point._fields)
        writer.writerows([f"{v:.7g}" if isinstance(v, float) else v for v in point] for point in points)


def paired(points: Sequence[Point], one: str, other: str) -> list[tuple[int, float]]:
    """(step, loss of ``one`` minus that of ``other``) where both were recorded."""
    losses = {name: {p.step: p.loss for p in points if p.run == name} for name in (one, other)}
    return [(step, loss - losses[other][step]) for step, loss in sorted(losses[one].items()) if step in losses[other]]


def table(points: Sequence[Point], base: str) -> list[str]:
    """Of the last quarter of the steps: each run's mean loss, and its difference from the first bf16 run, in percent.

    The interval is of the mean of the recorded differences, taken as independent (95 %, normal).
    """
    names, last = list(dict.fromkeys(point.run for point in points)), max(point.step for point in points)
    first = (1 - TAIL) * last
    level = statistics.fmean(p.loss for p in points if p.run == base and p.step > first)
    lines = [f"steps {first:.0f} to {last}, mean loss, and difference from {base}:"]
    for name in names:
        tail = [point.loss for point in points if point.run == name and point.step > first]
        gaps = [100 * gap / level for step, gap in paired(points, name, base) if step > first]
        if not tail or not gaps:
            continue
        spread = 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        lines.append(f"  {name:16s} {statistics.fmean(tail):.5f}  {statistics.fmean(gaps):+.2f} % (+- {spread:.2f})")
    return lines


def draw(points: Sequence[Point], base: str, path: Path, title: str) -> None:
    """The losses, and below them each run's difference from ``base``."""
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2))
    for name in dict.fromkeys(point.run for point in points):
        own = [point for point in points if point.run == name]
        (line,) = above.plot([p.step for p in own], [p.loss for p in own], lw=1, label=name)
        gaps = paired(points, name, base)
        if name != base and gaps:
            below.plot(*zip(*gaps), lw=1, color=line.get_color(), label=f"{name} - {base}")
    above.set(ylabel=f"loss, mean of {LOG_EVERY} steps", title=title, yscale="log")
    below.axhline(0, color="black", lw=0.5)
    below.set(xlabel="step", ylabel="difference")
    above.legend(frameon=False)
    if len(below.lines) > 1:
        below.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="bench.precision_curve", description=__doc__.splitlines()[0])
    top.add_argument("--preset", default="cifar10", help="whose images and network (default cifar10; digits on a CPU)")
    top.add_argument("--size", default="", help="another network on the same latents: S, B, L, XL")
    top.add_argument("--steps", type=int, default=2000)
    top.add_argument("--schedule", default="offset:0.3", help="a fixed one (default offset:0.3)")
    top.add_argument("--runs", default=",".join(RUNS), help=f"precision:seed, ... (default {','.join(RUNS)})")
    top.add_argument("--emulate", action="store_true", help="fp8 on any device, slowly")
    top.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="as in fastasync run")
    top.add_argument(
        "--out", type=Path, default=Path("runs/precision"), help="folder of the runs, the CSV, the picture"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    runs = [(name.split(":")[0], int(name.split(":")[1])) for name in options.runs.split(",")]
    out, device = options.out, choose_device("auto")
    facts = [
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
        *(commit(), device_name(device), torch.__version__, options.preset, options.size or "preset"),
    ]
    points: list[Point] = []
    base = next((f"{kind}:{seed}" for kind, seed in runs if kind == "bf16"), options.runs.split(",")[0])
    try:
        shared = configuration(options, "auto", 0)  # one set of latents and encoders for every seed
        inputs = open_inputs(Run(out / "inputs", shared, out / "prepared"), device)
        for precision, seed in runs:
            config = configuration(options, precision, seed)
            name = f"{precision}{' emulated' if precision == 'fp8' and options.emulate else ''}:{seed}"
            reps, folder = config.representations, out / name.replace(" ", "-").replace(":", "-seed")
            schedule = named_schedule(options.schedule, reps.names, reps.roles)
            with emulated(options.emulate):
                result = train(
                    *(config, inputs.latents, schedule, folder),
                    statistics_fingerprint=inputs.statistics_fingerprint,
                    progress=False,
                )
            points += read_run(folder, facts, name)
            write_points(out / "curve.csv", points)
            title = f"{options.preset}, {options.size or 'its own network'}, {device_name(device)}"
            draw(points, base, out / "curve.png", title + (", fp8 emulated" if options.emulate else ""))
            print(f"{name}: {result.step} steps, loss {points[-1].loss:.5f}", flush=True)
    except UserError as error:
        print(f"bench.precision_curve: {error}", file=sys.stderr)
        return 2
    print("\n".join([*table(points, base), f"{out / 'curve.csv'}, {out / 'curve.png'}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
