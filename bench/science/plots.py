"""The study's pictures: figures seed by seed, curves with their spread, and the probe's ranks against trained ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from fastasync.report.style import COLOURS, below, colour, settings, text

Series = Mapping[str, Mapping[int, Sequence[float]]]  # label -> x -> values of the seeds


def sampler_title(name: str) -> str:
    """``heun_euler17@0.2`` -> ``17 evaluations, heun_euler``; other names as they are."""
    found = re.fullmatch(r"(heun|euler|heun_euler)(\d+)(?:@[\d.]+)?", name)
    return f"{found[2]} evaluations, {found[1]}" if found else name


def seed_points(
    series: Mapping[str, Mapping[str, Sequence[float]]], others: Mapping[str, Mapping[str, Sequence[float]]]
) -> Figure:
    """One panel for each sampler: every seed a dot, the mean a bar; ``others`` (the scan's fixed schedules) in grey.

    series: label -> sampler -> values; others: sampler -> label -> values.
    """
    samplers = list(others)
    with settings():
        figure = Figure(figsize=(4.2 * len(samplers), 3.8), layout="constrained")
        for axes, sampler in zip(figure.subplots(1, len(samplers), squeeze=False)[0], samplers):
            labels = [*series, *(f"{name} (scan)" for name in others[sampler])]
            values = [list(points.get(sampler, ())) for points in series.values()]
            values += [list(points) for points in others[sampler].values()]
            for at, points in enumerate(values):
                shade = colour(at) if at < len(series) else "#999999"
                axes.plot(points, [at] * len(points), "o", color=shade, markersize=5, alpha=0.7)
                if points:
                    axes.plot([np.mean(points)] * 2, [at - 0.3, at + 0.3], color=shade, linewidth=2)
            axes.set_yticks(range(len(labels)), [text(label) for label in labels], fontsize=8)
            axes.invert_yaxis()
            axes.set_xlabel("FID (lower is better)")
            axes.set_title(sampler_title(sampler))
    return figure


def curves(series: Series, x_label: str, goals: Mapping[str, float] | None = None) -> Figure:
    """Mean over seeds with the range between them shaded, both axes logarithmic; ``goals``: horizontal lines."""
    with settings():
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        handles = []
        for index, (label, points) in enumerate(series.items()):
            xs = [x for x in sorted(points) if len(points[x])]
            if not xs:
                continue
            means = [float(np.mean(points[x])) for x in xs]
            axes.fill_between(
                xs, [min(points[x]) for x in xs], [max(points[x]) for x in xs], color=colour(index), alpha=0.15
            )
            axes.plot(xs, means, "o-", color=colour(index), linewidth=2, markersize=4)
            handles.append(Line2D([], [], color=colour(index), linewidth=2, label=text(label)))
        for name, goal in (goals or {}).items():
            axes.axhline(goal, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                text(name), (1, goal), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        every = sorted({x for points in series.values() for x in points if len(points[x])})
        axes.set_xticks(every, [f"{x:,}" for x in every])  # what was measured, as plain numbers
        axes.xaxis.set_minor_formatter(NullFormatter())
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(x_label)
        axes.set_ylabel("FID (lower is better)")
        if handles:
            below(figure, handles, columns=3)
    return figure


def leads(
    lines: Mapping[str, Sequence[tuple[float, float]]], dots: Mapping[str, Sequence[tuple[float, float]]]
) -> Figure:
    """FID against the largest lead: families whose members are joined, and others."""
    with settings():
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        handles = []
        for index, (label, pairs) in enumerate([*lines.items(), *dots.items()]):
            style: dict[str, Any] = {
                "color": colour(index),
                "marker": "os^"[index // len(COLOURS)],
                "linestyle": "-" if label in lines else "",
            }
            axes.plot(*zip(*sorted(pairs)), **style, linewidth=2, markersize=5, alpha=0.8)
            handles.append(Line2D([], [], **style, label=text(label)))
        axes.set_xlabel("largest lead of the semantic latent, in local time")
        axes.set_ylabel("FID (lower is better)")
        below(figure, handles, columns=3)
    return figure


def scatter(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Figure:
    """Pairs of numbers by label, x logarithmic."""
    with settings():
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        handles = []
        for index, (label, pairs) in enumerate(series.items()):
            axes.plot(*zip(*pairs), "o", color=colour(index), markersize=6, alpha=0.8)
            handles.append(Line2D([], [], color=colour(index), marker="o", linestyle="", label=text(label)))
        axes.set_xscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if handles:
            below(figure, handles, columns=3)
    return figure
