"""Where a run's records go beside metrics.jsonl: a table (metrics.csv), and a project of Weights & Biases."""

from __future__ import annotations

import csv
import logging
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fastasync.errors import UserError, not_installed, require
from fastasync.files import atomic_path

CSV, WANDB = "metrics.csv", "wandb"
_ID = "fastasync-run-id"  # in the folder that wandb keeps its own files in

_log = logging.getLogger(__name__)


class CsvFile:
    """``metrics.csv``: a line for each record, a column for each of its names, an empty cell for None.

    Args:
        path: the file.
        records: what it holds to begin with, by step: those of metrics.jsonl.  It is written anew, so that it never
            has a line more or less than they, whatever a killed process or another version left.

    Numbers are written as in metrics.jsonl.  Raises OSError.
    """

    def __init__(self, path: Path, records: Iterable[Mapping[str, Any]]):
        self.path = path
        self._start(list(records))

    def _start(self, rows: list[Mapping[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        with atomic_path(self.path) as partial, open(partial, "w", newline="") as stream:
            if rows:
                table = csv.DictWriter(stream, self._columns, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
        self._file = open(self.path, "a", buffering=1, newline="")  # noqa: SIM115 - closed in close()
        self._table = csv.DictWriter(self._file, self._columns, lineterminator="\n")

    def write(self, record: Mapping[str, Any]) -> None:
        if not record.keys() <= set(self._columns):  # the first record, or a version that logs more: another header
            self._file.close()
            with open(self.path, newline="") as stream:
                rows: list[Mapping[str, Any]] = list(csv.DictReader(stream))
            self._start([*rows, record])
        else:
            self._table.writerow(record)

    def sync(self) -> None:
        """Everything so far is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class WandbRun:
    """A run in a project of Weights & Biases; a resumed training continues the same one.

    Where it is resumed from before its last record, wandb leaves out the steps that it has already: they are the same.
    Its own environment variables hold: ``WANDB_MODE=offline`` writes to the run's folder alone, for ``wandb sync``.
    A service that fails does not end a training: that is said once, and the files go on.

    Args:
        project: its name.
        folder: the run's directory; its name is the run's.
        step: where training starts: 0 makes a new run.
        facts: the configuration.

    Raises:
        UserError: the package is missing, or the run cannot be started (no key, no network).
    """

    def __init__(self, project: str, folder: Path, step: int, facts: Mapping[str, Any]):
        package, note = wandb_package(), folder / WANDB / _ID
        if step == 0 or not note.is_file():
            with atomic_path(note) as partial:
                partial.write_text(uuid.uuid4().hex)
        name, identity = folder.resolve().name, note.read_text().strip()
        try:
            self._run: Any = package.init(
                project=project, name=name, id=identity, resume="allow", dir=str(folder), config=dict(facts)
            )
        except Exception as error:  # the package's own kinds, and its transports'
            remedy = "log in with `wandb login`, or set WANDB_MODE=offline, or leave the field empty"
            raise UserError("train.wandb", f"{project}: {_short(error)}", remedy) from None

    def write(self, record: Mapping[str, Any]) -> None:
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        if self._run is not None:
            self._guarded(lambda run: run.log(values, step=record["step"], commit=True))

    def sync(self) -> None:
        """Nothing: wandb sends in the background, and a checkpoint does not count on it."""

    def close(self) -> None:
        if self._run is not None:
            self._guarded(lambda run: run.finish())
        self._run = None

    def _guarded(self, call: Any) -> None:
        try:
            call(self._run)
        except Exception as error:  # see the class: never at the cost of a training
            _log.warning("wandb gets no more records of this run (%s)", _short(error))
            self._run = None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def wandb_package() -> ModuleType:
    """The package wandb, or a UserError that names the extra."""
    package = require("wandb", "wandb")
    if not hasattr(package, "init"):  # a folder called wandb, which its runs leave where they ran, imports as a package
        raise not_installed("wandb", "wandb")
    return package
