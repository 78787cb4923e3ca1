"""The comparison of the run with its baselines: schedules by figures, the best, the difference from synchronous."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastasync.evaluation import Figure
from fastasync.evaluation.protocol import metric_title
from fastasync.probe import ProbeResult
from fastasync.report.records import Record, collect, shared_notes
from fastasync.run import Run

SYNCHRONOUS = "synchronous"
_HIGHER_IS_BETTER = ("is", "precision", "recall")
# What may differ between two figures that are compared: the schedule itself, and when it was measured.
_FREE = ("schedule", "schedule_fingerprint", "date")
_ADAPTIVE = "dopri5"


class Column(NamedTuple):
    """Figures that stand under each other.  ``evaluations`` is None for an adaptive integrator (each row's own)."""

    metric: str
    integrator: str
    evaluations: float | None

    @property
    def where(self) -> str:
        """``18 NFE``, or the adaptive integrator's name; with the grid's power and the guidance where there are any."""
        _, *special = self.integrator.replace(" grid", ", grid", 1).split(", ")
        return self.integrator if self.evaluations is None else ", ".join([f"{self.evaluations:g} NFE", *special])


@dataclass(frozen=True)
class Row:
    """A schedule's name and its figures."""

    label: str
    cells: dict[Column, Figure]


@dataclass(frozen=True)
class Table:
    """Rows in the order of the runs, columns by metric, then function evaluations."""

    rows: list[Row]
    columns: list[Column]
    extractor: str

    def best(self, column: Column) -> Row | None:
        """The row with the best figure; None when there is nothing to compare."""
        found = [row for row in self.rows if column in row.cells]
        pick = max if column.metric in _HIGHER_IS_BETTER else min
        return pick(found, key=lambda row: row.cells[column].value) if len(found) > 1 else None

    def change(self, row: Row, column: Column) -> float | None:
        """Difference from synchronous in percent of it; None for synchronous itself, or without a positive one."""
        base = next((r.cells[column] for r in self.rows if r.label == SYNCHRONOUS and column in r.cells), None)
        if base is None or row.label == SYNCHRONOUS or column not in row.cells or base.value <= 0:
            return None
        return 100 * (row.cells[column].value / base.value - 1)

    def differences(self) -> list[str]:
        """Where figures that stand under each other were measured differently, other than by their schedule."""
        found = []
        for column in self.columns:
            cells = [(row.label, asdict(row.cells[column].protocol)) for row in self.rows if column in row.cells]
            first_label, first = cells[0]
            for label, other in cells[1:]:
                free = (*_FREE, "function_evaluations") if column.evaluations is None else _FREE
                for name, one, two in _unequal(first, other, free):
                    found.append(f"{name}: {one} for {first_label}, {two} for {label}")
        return list(dict.fromkeys(found))


def _unequal(one: Mapping[str, Any], two: Mapping[str, Any], free: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Fields of two protocols that are not equal; of the versions only those packages."""
    for name in dict.fromkeys([*one, *two]):
        first, second = one.get(name), two.get(name)
        if name in free or first == second:
            continue
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _unequal(first, second, ())
        else:
            yield name, first, second


def build_table(records: Sequence[Record]) -> Table:
    """The table of what has been evaluated so far."""
    rows, columns = [], []
    mixed = len({figure.protocol.precision for record in records for figure in record.figures}) > 1
    for record in records:
        cells = {_column(figure, mixed): figure for figure in record.figures}
        rows.append(Row(record.label, cells))
        columns += list(cells)
    metrics = list(dict.fromkeys(column.metric for column in columns))
    ordered = sorted(
        dict.fromkeys(columns), key=lambda c: (metrics.index(c.metric), c.integrator, c.evaluations or 0.0)
    )
    extractors = list(dict.fromkeys(figure.protocol.extractor for row in rows for figure in row.cells.values()))
    return Table(rows, ordered, ", ".join(extractors))


def _column(figure: Figure, mixed: bool) -> Column:
    """``mixed``: samples were made in several precisions, each of which has columns of its own."""
    protocol = figure.protocol
    adaptive = protocol.integrator == _ADAPTIVE
    integrator = protocol.integrator + ("" if protocol.guidance == "none" else f", {protocol.guidance}")
    integrator += f", {protocol.precision}" if mixed else ""
    return Column(figure.name, integrator, None if adaptive else protocol.function_evaluations)


def value_text(figure: Figure) -> str:
    """``2.153`` or ``0.0012 ± 0.0003``."""
    return f"{figure.value:.4g}" + ("" if figure.spread is None else f" ± {figure.spread:.2g}")


def probe_share(record: Record) -> float | None:
    """The probe's FLOPs as a share of the run that it was planned for; None without a probe."""
    if record.probe is None or not record.probe.budget:
        return None
    return record.probe.budget["share_used"] * record.run.config.probe.budget


def probe_line(record: Record) -> str:
    """What the schedule cost, in one line."""
    probe: ProbeResult | None = record.probe
    share = probe_share(record)
    if probe is None or share is None:
        return ""
    budget = probe.budget
    return (
        f"probe (estimator {probe.estimator}): {100 * share:.3g} % of the planned run's training compute "
        f"({budget['spent_flops']:.3g} FLOPs, allowed {100 * record.run.config.probe.budget:.3g} %), "
        f"{budget['total_seconds']:.3g} s"
    )


def comparison_table(run: Run) -> str:
    """The comparison as plain text: schedule, NFE, figures, difference from synchronous, the probe's share.

    ``*`` marks the best of a column.  Says which command makes the figures when there are none.
    """
    records = collect(run)
    table = build_table(records)
    if not table.columns:
        return f"no figures yet: fastasync run --out {run.path}"
    metrics = list(dict.fromkeys(column.metric for column in table.columns))
    places = list(dict.fromkeys(column[1:] for column in table.columns))
    header = ["schedule", "NFE"]
    for metric in metrics:
        header += [metric_title(metric, table.extractor), "vs sync."]
    lines = [header]
    for integrator, evaluations in places:
        for row in table.rows:
            columns = [Column(metric, integrator, evaluations) for metric in metrics]
            figures = [row.cells[column] for column in columns if column in row.cells]
            if not figures:
                continue
            line = [row.label, f"{figures[0].protocol.function_evaluations:g}" + columns[0].where.partition(" NFE")[2]]
            for column in columns:
                if column not in row.cells:
                    line += ["-", ""]
                    continue
                change = table.change(row, column)
                mark = " *" if table.best(column) is row else "  "
                line += [value_text(row.cells[column]) + mark, "" if change is None else f"{change:+.1f} %"]
            lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    justified = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]
    notes = [f"features: {table.extractor}; * best of its column; one seed"]
    notes += [f"note: {sentence}" for sentence in shared_notes(records)]
    notes += [f"note: measured differently: {fault}" for fault in table.differences()]
    notes += [line for line in [probe_line(records[0])] if line]
    return "\n".join([justified[0], "-" * max(map(len, justified)), *justified[1:], *notes])
