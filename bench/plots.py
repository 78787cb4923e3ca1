"""``make plots``: the README's pictures from a results file: shares of the ceilings, step breakdown, overhead."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.harness import RESULTS, ROOT, Row, read_rows

COLORS = {"reference": "#b0b0b0", "reference compiled": "#6f87a6", "triton": "#c8553d"}
PALETTE = ("#4c6a92", "#c8553d", "#8a9a5b", "#d8a448", "#7d6b91", "#b0b0b0")
INTERVAL = re.compile(r"overhead ([+-][\d.]+)%, 95 % interval ([+-][\d.]+)% to ([+-][\d.]+)%")


def latest(rows: Sequence[Row]) -> list[Row]:
    """The newest row of each thing measured (rows are in the order of their dates)."""
    return list({(r.subject, r.case, r.variant, r.shape, r.dtype): r for r in rows}.values())


def finish(figure: plt.Figure, path: Path, title: str, row: Row) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    about = f"{row.device}, torch {row.torch}, {row.date[:10]}, {row.commit}"
    figure.text(0.99, 0.99, about, fontsize=7, color="#666", ha="right", va="top")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def roofline(rows: Sequence[Row], path: Path) -> Path | None:
    """Each operation's floor over its time: how near it is to the ceiling that binds it."""
    found = [r for r in rows if r.subject in ("noising", "loss", "adaln", "qknorm_rope", "swiglu", "attention")]
    found = [r for r in found if r.share is not None]
    if not found:
        return None
    groups = list(dict.fromkeys((r.subject, r.case, r.shape, r.dtype) for r in found))
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(groups) + 1.2), layout="constrained")
    for place, group in enumerate(groups):
        members = [r for r in found if (r.subject, r.case, r.shape, r.dtype) == group]
        height = 0.8 / len(members)
        for index, r in enumerate(members):
            assert r.share is not None
            low, high = (r.share * r.ms / edge for edge in (r.ms_high, r.ms_low))
            spread = [[max(r.share - low, 0)], [max(high - r.share, 0)]]
            color = COLORS.get(r.variant, PALETTE[index % len(PALETTE)])
            axes.barh(place + index * height, r.share, height, xerr=spread, color=color, error_kw={"lw": 0.7})
            axes.text(0.005, place + index * height, f"{r.variant}, {r.ms:.3g} ms", va="center", fontsize=6)
    axes.set_yticks([p + 0.4 for p in range(len(groups))], [f"{s} {c}\n{h} {d}" for s, c, h, d in groups], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_xlabel("share of the measured ceiling (copy bandwidth or bf16 matrix product)")
    return finish(figure, path, "How near each operation is to the hardware", found[-1])


def breakdown(rows: Sequence[Row], path: Path) -> Path | None:
    """Device time of a training step by category (``make profile``), as shares: steps differ in length by far."""
    found = [r for r in rows if r.subject == "profile" and r.ms]  # what took no time has no colour
    if not found:
        return None
    steps = list(dict.fromkeys((r.shape, r.variant) for r in found))
    kinds = list(dict.fromkeys(r.case for r in found))
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(steps) + 1.6), layout="constrained")
    names = []
    for place, step in enumerate(steps):
        times = {kind: sum(r.ms for r in found if (r.shape, r.variant) == step and r.case == kind) for kind in kinds}
        total, left = sum(times.values()), 0.0
        for index, (kind, ms) in enumerate(times.items()):
            share, label = 100 * ms / total, kind if place == 0 else None
            axes.barh(place, share, 0.7, left=left, color=PALETTE[index % len(PALETTE)], label=label)
            if share > 4:
                axes.text(left + share / 2, place, f"{ms:.3g}", ha="center", va="center", fontsize=7, color="white")
            left += share
        names.append(f"{step[0]}, {step[1]}: {total:.3g} ms")
    axes.set_yticks(range(len(steps)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the device's time (numbers: ms)")
    axes.legend(ncols=len(kinds), fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return finish(figure, path, "Where a training step's time goes", found[-1])


def overhead(rows: Sequence[Row], path: Path) -> Path | None:
    """The learned schedule's step against the synchronous one, with 95 % intervals."""
    found = [(r, INTERVAL.search(r.note)) for r in rows if r.subject == "schedule_overhead"]
    points = [(r, [float(text) for text in match.groups()]) for r, match in found if match]
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(points) + 1.4), layout="constrained")
    for place, (_, (mean, low, high)) in enumerate(points):
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=PALETTE[1], capsize=3)
    axes.set_yticks(range(len(points)), [f"{r.case}, {r.shape}" for r, _ in points], fontsize=8)
    axes.set_ylim(-0.6, len(points) - 0.4)
    axes.axvline(0.0, color="black", lw=0.8)
    axes.axvline(1.0, color="#888", lw=0.8, ls="--")
    axes.set_xlabel("% of the synchronous step (dashed: the 1 % that is allowed)")
    return finish(figure, path, "What a learned schedule costs", points[-1][0])


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.plots", description=__doc__)
    top.add_argument("results", nargs="?", type=Path, help="a results file (default: the GPU's newest)")
    top.add_argument("--out", type=Path, default=ROOT / "docs" / "bench")
    chosen = top.parse_args(argv)
    files = sorted(
        (p for p in RESULTS.glob("*.csv") if p.stem != "cpu" and "jpeg_run" not in p.stem),
        key=lambda p: p.stat().st_mtime,
    )
    source = chosen.results or (files[-1] if files else None)
    if source is None or not source.is_file():
        print(f"plots: error: no results of a GPU in {RESULTS}: run make bench on one, or name a file", file=sys.stderr)
        return 2
    rows = latest(read_rows(source))
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("roofline", roofline), ("breakdown", breakdown), ("overhead", overhead)):
        made = draw(rows, chosen.out / f"{name}.png")
        print(made or f"{name}: no rows for it in {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
