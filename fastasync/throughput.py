"""How long training takes on GPUs: from the measured steps in bench/results, never from a figure in the code."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastasync.config import Config, Train
from fastasync.training.graph import LAUNCH_BOUND, MAYBE_BOUND, launch_bound, ranks_may_record

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"  # of a checkout; an installed package has none
COMMAND = "make bench SUBJECT=step"
_SAME = 0.01  # networks whose FLOPs for an image differ by less are one
_FAR = 30  # a network that takes so many times more or fewer says nothing: what limits the two is not the same
# train.compile in the variants' names, and with recorded steps
_COMPILED = {"off": "eager", "regional": "regional", "model": "whole"}
_RECORDED = {"off": "graph uncompiled", "regional": "regional graph", "model": "graph"}
_ON_SEVERAL = re.compile(r" on (\d+)$")  # GPUs, in a case of bench.scaling


@dataclass(frozen=True)
class Measured:
    """A row of the subject ``step`` or ``scaling``: a whole training step, as one GPU does it.

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
        """Images in a GPU's step, where the row says so."""
        found = re.match(r"batch (\d+)", self.shape)
        return int(found[1]) if found else None

    def away(self, batch: float) -> float:
        """How far another batch is: the log of their ratio."""
        return abs(math.log(self.batch / batch)) if self.batch else math.inf

    def __str__(self) -> str:
        about = f"{self.case}, {self.variant}, {self.shape}; {self.date[:10]}, commit {self.commit}"
        return f"{self.images_per_s:.0f} img/s on one {self.device} ({about})"


def _rows(folder: Path, subject: str) -> Iterator[dict[str, str]]:
    """What the bench wrote of one subject on GPUs."""
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", errors="replace") as stream:
            for row in csv.DictReader(stream):
                if row.get("subject") == subject and row.get("device") != "cpu":
                    yield row


def _measured(row: dict[str, str], gpus: int = 1) -> Measured | None:
    """One row, the images of each of ``gpus``; None for a line that is no such row."""
    try:
        images, tflop = float(row["images_per_s"]) / gpus, float(row["tflop_per_s"])
        names = {name: row[name] for name in ("date", "commit", "device", "case", "variant", "shape")}
        if images > 0 and tflop > 0:
            return Measured(**names, images_per_s=images, flops=tflop * 1e12 / images)
    except (KeyError, TypeError, ValueError):
        pass
    return None


def measured_steps(folder: Path = RESULTS) -> list[Measured]:
    """Every training step that was measured on a GPU; lines that are no such row are passed over."""
    return [found for row in _rows(folder, "step") if (found := _measured(row))]


def measured_ranks(stages: Collection[int], folder: Path = RESULTS) -> list[Measured]:
    """Every step of several GPUs under these stages of ZeRO with our reduction; images/s of one GPU."""
    names = [f"zero {stage}{which}" for stage in stages for which in ("", " strong")]
    found = []
    for row in _rows(folder, "scaling"):
        several = _ON_SEVERAL.search(row.get("case") or "")
        ours = (row.get("variant") or "").removesuffix(" recorded") in names
        if several and ours and "zero_optimization" not in (row.get("note") or ""):
            found.append(_measured(row, int(several[1])))
    return [each for each in found if each]


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
    records = by == "ours" and _may_record(train, gpus)
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
        return round(abs(math.log(row.flops / flops)), 2), row.away(batch), row.variant not in wanted

    if train.precision == "fp32":
        return None
    near = (row for row in rows if tells(row) and 1 / _FAR < row.flops / flops < _FAR)
    newest_first = sorted(near, key=lambda row: row.date, reverse=True)
    return min(newest_first, key=distance, default=None)


def _may_record(train: Train, gpus: int) -> bool:
    """Whether steps are recorded where ``train.cuda_graph`` asks for it."""
    return train.optimizer in ("auto", "fused") and (gpus == 1 or ranks_may_record(train))


def choose_ranks(config: Config, flops: int, rows: Sequence[Measured], gpus: int) -> Measured | None:
    """The row of several GPUs that a run on ``gpus`` is like: its network in bf16, the nearest batch on a GPU.

    ``rows``: of ``measured_ranks``, of the run's ZeRO and of ZeRO 1, which stands in for others.  A run that records
    nothing is like no row of recorded steps.
    """
    train = config.train
    if train.precision not in ("auto", "bf16") or config.model.kernels == "reference":
        return None
    batch = train.batch / (gpus * train.accumulate)
    recorded = _may_record(train, gpus) and launch_bound(train.cuda_graph, flops * batch, MAYBE_BOUND)

    def distance(row: Measured) -> tuple[float, bool, bool]:
        own = row.variant.startswith(f"zero {train.zero}")
        return row.away(batch), row.variant.endswith("recorded") != recorded, not own

    same = [row for row in rows if abs(row.flops / flops - 1) < _SAME]
    same = [row for row in same if recorded or not row.variant.endswith("recorded")]
    return min(sorted(same, key=lambda row: row.date, reverse=True), key=distance, default=None)


def expected_hours(config: Config, flops: int, gpus: int, folder: Path = RESULTS) -> dict[str, str]:
    """Lines of ``--dry-run``: hours of training on one GPU and on ``gpus``, and what they rest on.

    ``flops``: of the training step of one image (``fastasync.model.train_flops``).
    """
    rows, train = measured_steps(folder), config.train
    row, of_many = choose_step(config, flops, rows), choose_step(config, flops, rows, gpus)
    ranks = choose_ranks(config, flops, measured_ranks({train.zero, 1}, folder), gpus)
    each = train.batch / (gpus * train.accumulate)
    if ranks and of_many and ranks.away(each) <= of_many.away(each):
        of_many = ranks
    if row is None or of_many is None:
        how = "only bf16 and fp8 are" if train.precision == "fp32" else f"`{COMMAND}` in a checkout does, on a GPU"
        return {"expected hours of training": f"unknown: no step like this run's is measured in {folder}; {how}"}
    ratio, basis = row.flops / flops, "measured for this network"
    if abs(ratio - 1) > _SAME:
        basis = f"an estimate, not measured: scaled by the FLOPs of an image, {flops:.3g} here, {row.flops:.3g} there"
        if ratio > 1:
            basis += "; a smaller network uses less of a GPU, so it takes longer than this"
    one, many = (train.batch * train.steps * flops / each.flops / each.images_per_s / 3600 for each in (row, of_many))
    known = "perfect scaling is assumed, not measured"
    if of_many != row:
        known = f"from {of_many}; {known}"
    if of_many is ranks:
        known = f"from {of_many}, on each; beyond so many perfect scaling is assumed"
    return {
        "measured training step": str(row),
        f"expected hours of training on 1 {row.device}": f"{one:.3g} ({basis})",
        f"expected hours of training on {gpus} {row.device}": f"{many / gpus:.3g} ({known}; {each:g} "
        "images on each GPU at a time here)",
    }
