"""Results as files: rows in a CSV that is rewritten as a whole, and tables for people in Markdown beside it.

Several processes may share a CSV: each change is made to what the file holds by then, under a lock.
"""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastasync.errors import UserError
from fastasync.files import atomic_path

Row = dict[str, str]


def as_text(value: Any) -> str:
    """A cell: five significant digits for a float, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return " ".join(str(value).split())


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock ``path`` (a file of its own) against other processes; whether it is ours: without ``wait`` it may
    be in other hands.  The system frees it however the process ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(str(path.parent), error.strerror, "choose a folder that can be written to") from None
    try:
        try:
            # a POSIX record lock, which worker processes do not inherit
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


class Table:
    """Rows with fixed columns, the first ``keys`` of which identify a row; in memory and in one CSV file."""

    def __init__(self, path: Path, columns: Sequence[str], keys: int):
        self.path, self.columns, self.keys = path, list(columns), keys
        self.rows: dict[tuple[str, ...], Row] = {}
        self.refresh()

    def refresh(self) -> None:
        """The rows that the file holds now: other processes add to it, and people remove some."""
        self.rows = {}
        if not self.path.exists():
            return
        with open(self.path, newline="") as stream:
            reader = csv.DictReader(stream)
            found = list(reader.fieldnames or [])
            if found[: self.keys] != self.columns[: self.keys]:
                raise UserError(str(self.path), ",".join(found[: self.keys]), "is of another version: move it away")
            self.columns += [name for name in found if name not in self.columns]
            for row in reader:
                key = tuple(row[name] for name in self.columns[: self.keys])
                self.rows[key] = {name: row.get(name) or "" for name in self.columns}

    def get(self, *key: Any) -> Row | None:
        """The row of a key, or None."""
        return self.rows.get(tuple(as_text(part) for part in key))

    def put(self, values: Mapping[str, Any]) -> None:
        """Add a row or change the given columns of the one with its key, and write the file."""
        row = {name: as_text(value) for name, value in values.items()}
        unknown = row.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are not in {self.path.name}")
        key = tuple(row[name] for name in self.columns[: self.keys])
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            self.refresh()
            self._put(key, row)

    def _put(self, key: tuple[str, ...], row: Row) -> None:
        self.rows[key] = {**dict.fromkeys(self.columns, ""), **self.rows.get(key, {}), **row}
        write_csv(self.path, self.columns, self.rows.values())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file, atomically."""
    with atomic_path(path) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: as_text(row.get(name)) for name in columns} for row in rows)


def markdown(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(as_text(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)
