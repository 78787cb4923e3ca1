"""curves.png: losses, gradient norm and speed over training, and the figures of merit by function evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastasync.evaluation.protocol import metric_title
from fastasync.report import style
from fastasync.report.records import Record
from fastasync.report.table import Table, build_table

_SMOOTH_FROM = 60  # records from which on a moving mean is drawn
_MAX_LABELLED = 12  # bars
_SMALL = 0.05  # figures that are all below this are shown in thousandths: KID


def curves_png(records: Sequence[Record]) -> bytes | None:
    """Training and figures of the run and its baselines; None before training has logged anything."""
    if not any(record.metrics for record in records):
        return None
    names, table = records[0].run.config.representations.names, build_table(records)
    metrics = list(dict.fromkeys(column.metric for column in table.columns))
    with style.settings():
        figure = Figure(figsize=(11.6, 6.4), layout="constrained")
        (total, parts, norm), (speed, *bars) = figure.subplots(2, 3)
        for index, record in reversed(list(enumerate(records))):
            colour, width = style.colour(index), 2.0 if index == 0 else 1.3
            _line(total, record, "loss", color=colour, lw=width)
            for k, name in enumerate(names):
                _line(parts, record, f"loss/{name}", color=colour, lw=width, ls=style.style(k))
            _line(norm, record, "grad_norm", color=colour, lw=width)
            _line(speed, record, "images_per_second", color=colour, lw=width)
        _limit([total], records, ["loss"])
        _limit([parts], records, [f"loss/{name}" for name in names])
        _limit([norm], records, ["grad_norm"])
        total.set_title("Training loss")
        parts.set_title("Loss of each representation")
        norm.set_title("Gradient norm")
        speed.set(title="Images per second", ylim=(0, None))
        for axes in (total, parts, norm, speed):
            axes.set_xlabel("step")
        for axes, metric in zip(bars, [*metrics[:2], None, None]):
            if metric is None:
                style.hide(axes, "" if metrics else "no figures yet:\nrun the evaluate stage")
            else:
                _bars(axes, table, metric)
        handles = [
            Line2D([], [], color=style.colour(i), lw=2.6, label=style.text(record.label))
            for i, record in enumerate(records)
        ]
        if len(names) > 1:
            handles += [
                Line2D([], [], color="#666666", lw=1.8, ls=style.style(k), label=style.text(name))
                for k, name in enumerate(names)
            ]
        style.below(figure, handles)
        return style.png(figure)


def _series(record: Record, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; a value that was not finite is NaN, a gap in the line."""
    found = [(r["step"], np.nan if r[key] is None else r[key]) for r in record.metrics if key in r]
    steps, values = zip(*found) if found else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over about 2 % of the records, shorter at the ends; NaN does not count."""
    window = np.ones(2 * max(1, len(values) // 100) + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    count = np.convolve(known.astype(float), window, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _line(axes: Axes, record: Record, key: str, **look: Any) -> None:
    steps, values = _series(record, key)
    if len(values) >= _SMOOTH_FROM:
        values = _smooth(values)
    axes.plot(steps, values, marker="o" if len(values) == 1 else None, ms=4, **look)


def _limit(panels: Sequence[Axes], records: Sequence[Record], keys: Sequence[str]) -> None:
    """Let the start of training run out of the picture: the rest would be a flat line."""
    parts = [_series(record, key)[1] for record in records for key in keys]
    parts = [_smooth(part) if len(part) >= _SMOOTH_FROM else part for part in parts]
    tails = [part[len(part) // 20 :] for part in parts if len(part) >= 20]
    values = np.concatenate(tails) if tails else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
        for axes in panels:
            axes.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)


def _bars(axes: Axes, table: Table, metric: str) -> None:
    columns = [column for column in table.columns if column.metric == metric]
    width = 0.8 / len(table.rows)
    values = [figure.value for row in table.rows for column, figure in row.cells.items() if column in columns]
    scale = 1000.0 if max(map(abs, values)) < _SMALL else 1.0
    labelled = len(columns) * len(table.rows) <= _MAX_LABELLED
    for number, row in enumerate(table.rows):
        for place, column in enumerate(columns):
            figure = row.cells.get(column)
            if figure is None:
                continue
            x = place + (number - (len(table.rows) - 1) / 2) * width
            value, spread = scale * figure.value, scale * (figure.spread or 0.0)
            axes.bar(x, value, 0.92 * width, color=style.colour(number), yerr=spread or None, ecolor="#444444")
            if labelled:
                axes.annotate(
                    f"{value:#.3g}".rstrip("."), (x, max(value + spread, 0.0)), xytext=(0, 2),
                    textcoords="offset points", ha="center", va="bottom", fontsize=8,
                )  # fmt: skip
    axes.set_xticks(range(len(columns)), [style.text(column.where) for column in columns])
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set_title(style.text(metric_title(metric, table.extractor)) + (" × 1000" if scale != 1 else ""))
    axes.axhline(0, color="#666666", lw=0.8)
