"""Results as files: rows in a CSV that is rewritten as a whole, and tables for people in Markdown beside it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
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


class Table:
    """Rows with fixed columns, the first ``keys`` of which identify a row; in memory and in one CSV file."""

    def __init__(self, path: Path, columns: Sequence[str], keys: int):
        self.path, self.columns, self.keys = path, list(columns), keys
        self.rows: dict[tuple[str, ...], Row] = {}
        if path.exists():
            with open(path, newline="") as stream:
                reader = csv.DictReader(stream)
                found = reader.fieldnames or []
                if list(found[:keys]) != self.columns[:keys]:
                    raise UserError(str(path), ",".join(found[:keys]), "is of another version: move it away")
                self.columns += [name for name in found if name not in self.columns]
                for row in reader:
                    key = tuple(row[name] for name in self.columns[:keys])
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
