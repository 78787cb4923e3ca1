"""Colours, line styles and matplotlib settings that the pictures share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind can tell apart; the first is the run's own schedule.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ORACLE = "#000000"
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))  # of the representations, in order
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


def colour(index: int) -> str:
    """Of the index-th schedule; they repeat after six."""
    return COLOURS[index % len(COLOURS)]


def style(index: int) -> Any:
    """Line style of the index-th representation; they repeat after four."""
    return STYLES[index % len(STYLES)]


def text(value: str) -> str:
    """A name for matplotlib, which would read a dollar sign as mathematics."""
    return value.replace("$", r"\$")


def settings() -> Any:
    """Context in which a picture is drawn."""
    return rc_context(_SETTINGS)


def below(figure: Figure, handles: Sequence[Any], columns: int = 6) -> None:
    """One legend for all panels, under them."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), handlelength=2.8)


def hide(axes: Axes, reason: str) -> None:
    """An empty panel that says why."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, ha="center", va="center", color="#666666", transform=axes.transAxes, wrap=True)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    # no Software entry: the same run gives the same bytes whatever the library's version string
    figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()
