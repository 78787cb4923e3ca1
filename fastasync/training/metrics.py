"""What a run reports: running sums on the device, one record every few steps, to files and boards."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastasync.errors import UserError
from fastasync.files import atomic_path, remove_partials
from fastasync.training.sinks import CSV, CsvFile, WandbRun

FILE, BOARD = "metrics.jsonl", "tensorboard"
WINDOW = 64  # gradient norms that the median of train.max_norm_ratio is of (it counts from a quarter of them on)

# Dense bf16 peak with float32 accumulation, FLOP/s, by words of the device's name (the vendors' data sheets).
# The first match counts, so a longer name stands before the one it contains.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known (a CPU, a GPU not in the table)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAK_FLOPS if re.search(rf"\b{words}\b", name)), None)


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on a GPU, resident for a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Tally:
    """Sums over the steps since the last record, and a count of the skipped ones; float64 on the device.

    Adding never waits for the device; reading does.  A step whose gradient norm is not finite, or above ``limit``, was
    skipped by the optimizer: it is counted, and enters no mean.  The sums themselves are always finite.

    ``max_norm_ratio``: the limit is this times the median of the last norms (0: no limit).
    """

    _EXTRA = 5  # counted steps; skipped in a row now, at most, in all; first step of the longest row

    def __init__(self, names: Sequence[str], device: torch.device, max_norm_ratio: float = 0.0):
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names) + self._EXTRA, dtype=torch.float64, device=device)
        self.offending = torch.zeros(
            len(self.names), dtype=torch.float64, device=device
        )  # terms of the last skipped step
        self._ratio = max_norm_ratio
        # the last norms, -1 where there is none yet; the limit stays in one place, for a recorded step to read
        self._norms = torch.full((WINDOW if max_norm_ratio else 0,), -1.0, dtype=torch.float64, device=device)
        self.limit = torch.full((), math.inf, dtype=torch.float32, device=device) if max_norm_ratio else None

    @property
    def values(self) -> Tensor:
        """Everything that a checkpoint keeps, float64 on the device."""
        return torch.cat([self.sums, self._norms])

    def add(self, terms: Sequence[Tensor], step: int) -> None:
        """One step's terms (scalars or vectors, ``names`` in order; the last is the gradient norm)."""
        row = torch.cat([term.detach().reshape(-1).to(torch.float64) for term in terms])
        good = row[-1].isfinite()
        if self.limit is not None:
            good = good & (row[-1].to(torch.float32) <= self.limit)
            place = step % WINDOW
            self._norms[place] = torch.where(good, row[-1], self._norms[place])
            self._set_limit()
        usable = row.isfinite().all() & good
        sums, (count, now, worst, total, first) = self.sums[: -self._EXTRA], self.sums[-self._EXTRA :]
        self.offending = torch.where(good, self.offending, row)
        now = torch.where(good, 0.0, now + 1)
        first = torch.where(now > worst, step - now + 1, first)
        skips = torch.stack([count + usable, now, torch.maximum(worst, now), total + ~good, first])
        self.sums = torch.cat([sums + torch.where(usable, row, 0.0), skips])

    def _set_limit(self) -> None:
        if self.limit is not None:
            known = self._norms >= 0
            median = torch.where(known, self._norms, math.nan).nanmedian()
            self.limit.copy_(torch.where(known.sum() >= WINDOW // 4, self._ratio * median, math.inf))

    def restart(self) -> None:
        """Forget the sums (not the skips): a record was written."""
        self.sums[: len(self.names) + 1] = 0.0

    def load(self, values: Sequence[float]) -> None:
        """Continue from a reading's ``values``."""
        every = torch.tensor(values, dtype=torch.float64)
        self.sums.copy_(every[: len(self.sums)])
        self._norms.copy_(every[len(self.sums) :])
        self._set_limit()


class TallyReading:
    """A tally on the host: ``means`` over the steps that counted (None: not finite or none), and the skips."""

    def __init__(self, names: Sequence[str], values: list[float]):
        self.values = values
        count, _, worst, total, first = values[len(names) : len(names) + 5]
        means = [value / count if count else math.nan for value in values[: len(names)]]
        self.means = {name: mean if math.isfinite(mean) else None for name, mean in zip(names, means)}
        self.skipped_in_a_row, self.skipped, self.first_skipped = int(worst), int(total), int(first)


class Stopwatch:
    """Images per second between records, without what is not training (saving), and how much of it data took."""

    def __init__(self, batch: int):
        self.batch, self.steps, self.waited, self.start = batch, 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside gets a batch."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def read(self) -> tuple[float, float]:
        """Images/s since the last call, and the share of that time in which this process was getting batches.

        A GPU that is still busy with earlier steps does not notice: of its time this is an upper bound.
        """
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        rate, share = self.steps * self.batch / seconds, self.waited / seconds
        self.steps, self.waited, self.start = 0, 0.0, now
        return rate, share

    def leave_out(self, since: float) -> None:
        """Do not count the time from ``since`` (of ``time.perf_counter``) to now."""
        self.start += time.perf_counter() - since


class MetricsLog:
    """Appends records to metrics.jsonl, metrics.csv, TensorBoard (if installed) and a ``project`` of Weights & Biases.

    Opened at step ``step``, it drops what was logged beyond: a run that was killed and resumed has each step once.

    Args:
        out_dir: the run's folder.
        step: where training starts.
        project: of Weights & Biases; empty: none.
        facts: the configuration, for the project.

    Raises:
        UserError: a file cannot be written, or the project's run cannot be started.
    """

    def __init__(self, out_dir: Path, step: int, project: str = "", facts: dict[str, Any] | None = None):
        self.path = out_dir / FILE
        for name in (FILE, CSV):
            remove_partials(out_dir, f"{name}.")
        self._others: list[CsvFile | WandbRun] = []
        try:
            kept = [line for line in self._lines() if _step_of(line) <= step]
            with atomic_path(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed in close()
            self._others.append(CsvFile(out_dir / CSV, map(json.loads, kept)))
        except OSError as error:
            raise UserError(str(self.path), error.strerror, "choose a folder that can be written to") from None
        self._board: Any = None
        with suppress(ImportError):  # TensorBoard is optional: metrics.jsonl holds the same
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out_dir / BOARD), purge_step=step + 1)
        if project:
            try:
                self._others.append(WandbRun(project, out_dir, step, facts or {}))
            except BaseException:
                self.close()
                raise

    def _lines(self) -> list[str]:
        return self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []

    def write(self, record: dict[str, Any]) -> None:
        """One record; ``step`` is its key.  Values are numbers or None."""
        with self._explained():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            for other in self._others:
                other.write(record)
            if self._board is not None:
                for name, value in record.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Everything so far is on the disk: before a checkpoint that counts on it."""
        with self._explained():
            self._file.flush()
            os.fsync(self._file.fileno())
            for other in self._others:
                other.sync()
            if self._board is not None:
                self._board.flush()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "free some space and run again: it continues from the last checkpoint"
            raise UserError(str(self.path), error.strerror, remedy) from None

    def close(self) -> None:
        for part in (self._file, self._board, *self._others):
            with suppress(OSError):  # a full disk was reported by write or sync; what is lost is logged again on resume
                if part is not None:
                    part.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that was cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
