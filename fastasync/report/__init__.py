"""Plots of a run and its page: schedule.png, samples.png, curves.png and report.html."""

from __future__ import annotations

from pathlib import Path

from fastasync.files import atomic_path
from fastasync.report.curves import curves_png
from fastasync.report.html import page
from fastasync.report.records import collect
from fastasync.report.samples_grid import samples_grid
from fastasync.report.schedule_plot import schedule_png
from fastasync.report.table import comparison_table
from fastasync.run import Run


def write_report(run: Run) -> Path:
    """Write the pictures and report.html into the run directory (each baseline gets its own samples.png).

    What a stage has not made yet is left out, and the page says which command makes it.  Returns the page's path.
    Raises UserError when a file of the run is damaged.
    """
    records = collect(run)
    schedule, curves = schedule_png(records), curves_png(records)
    samples = [samples_grid(record) for record in records]
    content = page(records, schedule, samples, curves)  # all that can fail comes before the first file is replaced
    pictures = {run.path / "schedule.png": schedule, run.path / "curves.png": curves}
    pictures |= {record.run.path / "samples.png": grid.png if grid else None for record, grid in zip(records, samples)}
    for path, picture in pictures.items():
        if picture is not None:
            with atomic_path(path) as partial:
                partial.write_bytes(picture)
    target = run.path / "report.html"
    with atomic_path(target) as partial:
        partial.write_text(content, encoding="utf-8")
    return target


__all__ = ["comparison_table", "write_report"]
