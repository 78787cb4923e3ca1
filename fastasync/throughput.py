"""How long training takes on GPUs: from the measured steps in bench/results, never from a figure in the code."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastasync.config import Config
from fastasync.training.graph import LAUNCH_BOUND, MAYBE_BOUND, launch_bound

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"  # of a checkout; an installed package has none
COMMAND = "make bench SUBJECT=step"
_SAME = 0.01  # networks whose FLOPs for an image differ by less are one
_FAR = 30  # a network that takes so many times more or fewer says nothing: what limits the two is not the same
_SPEED_UP = re.compile(r"([\d.]+)x the plain engine on one GPU")  # what bench.scaling notes
# train.compile in the variants' names, and with recorded steps
_COMPILED = {"off": "eager", "regional": "regional", "model": "whole"}
_RECORDED = {"off": "graph uncompiled", "regional": "regional graph", "model": "graph"}


@dataclass(frozen=True)
class Measured:
    """A row of the subject ``step``: a whole training step on one GPU.

    ``flops``: of the training step of one image, from the row's own TFLOP/s and images/s.
    """

    date: str
    commit: str
    device: str
    case: str
    variant: str
    shape: str
    images_per_s: float
    flops: float

    @property
    def batch(self) -> int | None:
        """Images in a step, where the row says so."""
        found = re.match(r"batch (\d+)", self.shape)
        return int(found[1]) if found else None

    def __str__(self) -> str:
        about = f"{self.case}, {self.variant}, {self.shape}; {self.date[:10]}, commit {self.commit}"
        return f"{self.images_per_s:.0f} img/s on one {self.device} ({about})"


def measured_steps(folder: Path = RESULTS) -> list[Measured]:
    """Every training step that was measured on a GPU; lines that are no such row are passed over."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", errors="replace") as stream:
            for row in csv.DictReader(stream):
                if row.get("subject") != "step" or row.get("device") == "cpu":
                    continue
                try:
                    images, tflop = float(row["images_per_s"]), float(row["tflop_per_s"])
                    names = {name: row[name] for name in ("date", "commit", "device", "case", "variant", "shape")}
                    if images > 0 and tflop > 0:
                        found.append(Measured(**names, images_per_s=images, flops=tflop * 1e12 / images))
                except (KeyError, TypeError, ValueError):
                    continue
    return found


def choose_step(config: Config, flops: int, rows: Sequence[Measured], gpus: int = 1) -> Measured | None:
    """The row that says most about a run whose network takes ``flops`` for an image: None where none does.

    The nearest network, then the nearest batch to what one of ``gpus`` has at a time, then the variant that the
    configuration runs, then the newest.
    """
    train = config.train
    batch = train.batch / (gpus * train.accumulate)
    by = "pytorch" if config.model.kernels == "reference" else "ours"
    wanted = [f"{by} {_COMPILED[train.compile]}"]
    looks = ["ours auto"] if train.compile == "regional" else []
    # of several ranks `auto` records nothing
    records = by == "ours" and (gpus == 1 or train.cuda_graph == "on")
    if records and launch_bound(train.cuda_graph, flops * batch, LAUNCH_BOUND):
        wanted = [f"ours {_RECORDED[train.compile]}", *looks]
    elif records and launch_bound(train.cuda_graph, flops * batch, MAYBE_BOUND):
        wanted = looks or wanted
    if train.precision == "fp8":
        wanted = ["ours fp8 graph", "ours fp8 auto"] if records and train.cuda_graph != "off" else ["ours fp8"]

    def tells(row: Measured) -> bool:
        """Another way to compile says something about this run, another implementation or precision does not."""
        return row.variant.startswith(by) and (" fp8" in row.variant) == (train.precision == "fp8")

    def distance(row: Measured) -> tuple[float, float, bool]:
        other_batch = abs(math.log(row.batch / batch)) if row.batch else math.inf
        return round(abs(math.log(row.flops / flops)), 2), other_batch, row.variant not in wanted

    if train.precision == "fp32":
        return None
    near = (row for row in rows if tells(row) and 1 / _FAR < row.flops / flops < _FAR)
    newest_first = sorted(near, key=lambda row: row.date, reverse=True)
    return min(newest_first, key=distance, default=None)


def measured_scaling(zero: int, folder: Path = RESULTS) -> list[str]:
    """The newest measured speed-up of several GPUs over one, for each batch on a GPU, under ZeRO ``zero``."""
    newest: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", errors="replace") as stream:
            for row in csv.DictReader(stream):
                speed_up = _SPEED_UP.match(row.get("note") or "")
                if row.get("subject") != "scaling" or row.get("device") == "cpu" or not speed_up:
                    continue
                if row.get("variant") in (f"zero {zero}", f"zero {zero} strong"):
                    what = f"{row['case']} {row['device']}, {row['shape']}"
                    said = f"{what}: {speed_up[1]} times one ({row['date'][:10]}, commit {row['commit']})"
                    newest[what] = max(newest.get(what, ("", "")), (row["date"], said))
    return [said for _, said in newest.values()]


def expected_hours(config: Config, flops: int, gpus: int, folder: Path = RESULTS) -> dict[str, str]:
    """Lines of ``--dry-run``: hours of training on one GPU and on ``gpus``, and what they rest on.

    ``flops``: of the training step of one image (``fastasync.model.train_flops``).
    """
    rows, train = measured_steps(folder), config.train
    row, of_many = choose_step(config, flops, rows), choose_step(config, flops, rows, gpus)
    if row is None or of_many is None:
        how = "only bf16 and fp8 are" if train.precision == "fp32" else f"`{COMMAND}` in a checkout does, on a GPU"
        return {"expected hours of training": f"unknown: no step like this run's is measured in {folder}; {how}"}
    ratio, basis = row.flops / flops, "measured for this network"
    if abs(ratio - 1) > _SAME:
        basis = f"an estimate, not measured: scaled by the FLOPs of an image, {flops:.3g} here, {row.flops:.3g} there"
        if ratio > 1:
            basis += "; a smaller network uses less of a GPU, so it takes longer than this"
    one, many = (train.batch * train.steps * flops / each.flops / each.images_per_s / 3600 for each in (row, of_many))
    scaling = "; ".join(measured_scaling(train.zero, folder))
    known = (
        f"perfect scaling is assumed; measured: {scaling}" if scaling else "perfect scaling is assumed, not measured"
    )
    if of_many != row:
        known = f"from {of_many}; {known}"
    each = train.batch / (gpus * train.accumulate)
    return {
        "measured training step": str(row),
        f"expected hours of training on 1 {row.device}": f"{one:.3g} ({basis})",
        f"expected hours of training on {gpus} {row.device}": f"{many / gpus:.3g} ({known}; {each:g} "
        "images on each GPU at a time here)",
    }
