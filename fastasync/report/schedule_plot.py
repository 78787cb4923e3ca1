"""schedule.png: local noising times over global time, their speed, and the path over the probe's loss surface."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D

from fastasync.probe import ProbeResult
from fastasync.report import style
from fastasync.report.records import Record
from fastasync.schedule import Schedule

_Curve = tuple[np.ndarray, np.ndarray, np.ndarray]
_POINTS = 1001
_MAX_PANELS = 6  # pairs of representations that are drawn


def schedule_png(records: Sequence[Record]) -> bytes | None:
    """The picture of all schedules, the run's own first and thick; None before any exists.  Draws K >= 1."""
    drawn = [(index, record) for index, record in enumerate(records) if record.schedule is not None]
    if not drawn:
        return None
    names = records[0].run.config.representations.names
    pairs = list(itertools.combinations(range(len(names)), 2))
    pairs = pairs if len(pairs) <= _MAX_PANELS else []
    curves = {index: _curve(record.schedule) for index, record in drawn if record.schedule is not None}
    oracle = _oracle(records[0].probe)
    with style.settings():
        wide = {0: 6.0, 1: 10.8}.get(len(pairs), 11.6)
        figure = Figure(figsize=(wide, 5.6), layout="constrained")
        grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.15)) if pairs else figure.add_gridspec(1, 1)
        left = grid[0].subgridspec(2, 1, height_ratios=(1.6, 1))
        upper = figure.add_subplot(left[0])
        lower = figure.add_subplot(left[1], sharex=upper)
        for index in reversed(curves):  # the run's own schedule on top
            _draw_curves(upper, lower, curves[index], index)
        upper.set(title="Local noising time", ylabel="τ   (0 noise, 1 data)", ylim=(-0.02, 1.02), xlim=(0, 1))
        lower.set(ylabel="dτ/ds", xlabel="global time s", ylim=(0, None))
        upper.tick_params(labelbottom=False)
        if pairs:
            _draw_paths(figure, grid[1], names, pairs, curves, records[0].probe, oracle)
        style.below(figure, _legend(drawn, names, oracle is not None and bool(pairs)))
        return style.png(figure)


def _curve(schedule: Schedule) -> _Curve:
    """s [n], tau [n, K], dtau/ds [n, K]; a kink, and the end, has its point just inside the piece."""
    kinks = torch.tensor(schedule.kinks(), dtype=torch.float64)
    s = torch.cat([torch.linspace(0, 1, _POINTS, dtype=torch.float64), kinks - 1e-9, kinks + 1e-9]).clamp(0, 1 - 1e-9)
    s = s.sort().values
    with torch.no_grad():
        tau, dtau = schedule(s)
    return s.numpy(), tau.numpy(), dtau.numpy()


def _oracle(probe: ProbeResult | None) -> np.ndarray | None:
    """The oracle's path [n, K], if the probe was asked for it."""
    found = probe.diagnostics.get("oracle") if probe else None
    return np.asarray(found["path"], dtype=float) if found else None


def _width(index: int) -> float:
    return 2.6 if index == 0 else 1.3


def _draw_curves(upper: Axes, lower: Axes, curve: _Curve, index: int) -> None:
    s, tau, dtau = curve
    look: dict[str, Any] = {"color": style.colour(index), "lw": _width(index)}
    same = bool(np.allclose(tau, tau[:, :1]))  # synchronous: one line is enough
    for k in range(1 if same else tau.shape[1]):
        upper.plot(s, tau[:, k], ls=style.style(k), **look)
        lower.plot(s, dtau[:, k], ls=style.style(k), **look)


def _draw_paths(
    figure: Figure,
    place: SubplotSpec,
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    curves: dict[int, _Curve],
    probe: ProbeResult | None,
    oracle: np.ndarray | None,
) -> None:
    """The paths in the unit square: the later representation across (semantic), the earlier one up (texture)."""
    columns = 1 if len(pairs) == 1 else 2 if len(pairs) <= 4 else 3
    panels = place.subgridspec(-(-len(pairs) // columns), columns)
    for number, (up, across) in enumerate(pairs):
        axes = figure.add_subplot(panels[number // columns, number % columns])
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xlabel(f"τ {style.text(names[across])}")
        axes.set_ylabel(f"τ {style.text(names[up])}")
        title = "Path" if len(pairs) == 1 else "Path, pair by pair" if number == 0 else ""
        if len(pairs) > 1:
            axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        if len(names) == 2 and probe is not None and "errors" in probe.surface:
            title = f"Path over the probe's error: {_draw_surface(figure, axes, probe, names)}"
        axes.set_title(title, fontsize=10)
        if oracle is not None:
            axes.plot(oracle[:, across], oracle[:, up], color=style.ORACLE, lw=1.4, ls=(0, (2, 1)), clip_on=False)
        for index in reversed(curves):
            tau = curves[index][1]
            # a white rim keeps the line apart from the contours
            axes.plot(tau[:, across], tau[:, up], color="white", lw=_width(index) + 2, clip_on=False)
            axes.plot(tau[:, across], tau[:, up], color=style.colour(index), lw=_width(index), clip_on=False)
        if 0 in curves:
            s, tau, _ = curves[0]
            for quarter in (0.25, 0.5, 0.75):
                at = (float(np.interp(quarter, s, tau[:, across])), float(np.interp(quarter, s, tau[:, up])))
                axes.plot(*at, "o", ms=6, mfc="white", mec=style.colour(0), mew=1.6, clip_on=False)
                if len(pairs) == 1:
                    axes.annotate(
                        f"s = {quarter:g}", at, xytext=(9, -4), textcoords="offset points", fontsize=8.5, va="top",
                        bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
                    )  # fmt: skip


def _draw_surface(figure: Figure, axes: Axes, probe: ProbeResult, names: Sequence[str]) -> str:
    """Filled contours of ``sum_k lam_k l_k``; returns its formula in words."""
    lam = probe.diagnostics.get("chosen", {}).get("lam") or [1.0] * len(names)
    axis, errors = probe.surface["tau"], probe.surface["errors"]
    value = errors @ np.asarray(lam, dtype=float)  # [first, last]: rows go up the picture
    filled = axes.contourf(axis, axis, value, levels=16, cmap="Greys", vmin=value.min(), vmax=value.max() * 1.25)
    axes.contour(axis, axis, value, levels=filled.levels, colors="white", linewidths=0.5)
    axes.grid(False)
    bar = figure.colorbar(filled, ax=axes, shrink=0.8, pad=0.03)
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]
    terms = [(weight, style.text(name)) for weight, name in zip(lam, names) if weight]
    return " + ".join(name if weight == 1 else f"{weight:.3g} {name}" for weight, name in terms)


def _legend(drawn: Sequence[tuple[int, Record]], names: Sequence[str], oracle: bool) -> list[Line2D]:
    handles = [
        Line2D([], [], color=style.colour(index), lw=_width(index), label=style.text(record.label))
        for index, record in drawn
    ]
    if oracle:
        handles.append(Line2D([], [], color=style.ORACLE, lw=1.4, ls=(0, (2, 1)), label="oracle"))
    if len(names) > 1:
        handles += [
            Line2D([], [], color="#666666", lw=1.8, ls=style.style(k), label=style.text(name))
            for k, name in enumerate(names)
        ]
    return handles
