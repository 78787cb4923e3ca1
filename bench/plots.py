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

# of a variant wherever it is drawn, bright enough for black letters; no two of one subject are alike
COLORS = {
    **dict.fromkeys(("reference", "pytorch"), "#b0b0b0"),
    **dict.fromkeys(("reference compiled", "pytorch compiled"), "#6f87a6"),
    **{"triton": "#c8553d", "triton compiled": "#e3a08f", "quack": "#4f8a6b", "quack compiled": "#a3c9b2"},
    **{"cudnn": "#6f87a6", "sdpa": "#a3b36f", "efficient": "#d8a448", "mixed": "#a98bc2"},
    **{"fa2": "#bfe3e4", "fa3": "#86c5c8", "fa4": "#4fa3a8"},
}
ROOFLINE = ("noising", "loss", "adaln", "qknorm_rope", "swiglu", "fp8_casts", "sampling", "attention", "mlp")
MUST = 0.75  # of copy bandwidth, of each element-wise kernel
PALETTE = ("#4c6a92", "#c8553d", "#8a9a5b", "#d8a448", "#7d6b91", "#b0b0b0")
INTERVAL = re.compile(r"overhead ([+-][\d.]+)%, 95 % interval ([+-][\d.]+)% to ([+-][\d.]+)%")
ROUNDS_SINCE = "2026-11-27"  # commit 269dc89, of the evening before: paired_overhead counts rounds, no longer steps


def latest(rows: Sequence[Row]) -> list[Row]:
    """The newest row of each thing measured (rows are in the order of their dates)."""
    return list({(r.subject, r.case, r.variant, r.shape, r.dtype): r for r in rows}.values())


def about(rows: Sequence[Row]) -> str:
    """Where, with what and when the rows were measured; of several commits the first and the last measured."""
    ordered = sorted(rows, key=lambda row: row.date)

    def span(values: Sequence[str]) -> str:
        return values[0] if len(set(values)) == 1 else f"{values[0]} to {values[-1]}"

    versions = " and ".join(sorted({row.torch for row in rows}))
    commits = list(dict.fromkeys(row.commit for row in ordered))
    measured = commits[0] if len(commits) == 1 else f"{len(commits)} commits, {commits[0]} to {commits[-1]}"
    return f"{rows[0].device}, torch {versions}, {span([row.date[:10] for row in ordered])}, {measured}"


def finish(figure: plt.Figure, path: Path, title: str, rows: Sequence[Row]) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.text(0.99, 1 - 0.05 / figure.get_figheight(), about(rows), fontsize=7, color="#666", ha="right", va="top")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def roofline(rows: Sequence[Row], path: Path) -> Path | None:
    """Each operation's floor over its time: how near it is to the ceiling that binds it."""
    found = [r for r in rows if r.subject in ROOFLINE and r.share is not None]
    found = [r for r in found if r.subject != "sampling" or r.case.startswith("guided update")]  # no network
    if not found:
        return None
    groups = dict.fromkeys((r.subject, r.case, r.shape, r.dtype) for r in found)
    ordered = sorted(groups, key=lambda group: ROOFLINE.index(group[0]))
    figure, axes = plt.subplots(figsize=(9, 0.13 * (len(found) + len(groups)) + 1.2), layout="constrained")
    place, middles = 0, []
    for group in ordered:
        members = [r for r in found if (r.subject, r.case, r.shape, r.dtype) == group]
        middles.append(place + (len(members) - 1) / 2)
        for index, r in enumerate(members):
            assert r.share is not None
            low, high = (r.share * r.ms / edge for edge in (r.ms_high, r.ms_low))
            spread = [[max(r.share - low, 0)], [max(high - r.share, 0)]]
            color = COLORS.get(r.variant, PALETTE[index % len(PALETTE)])
            axes.barh(place, r.share, 0.95, xerr=spread, color=color, error_kw={"lw": 0.7})
            axes.text(0.005, place, f"{r.variant}, {r.ms:.3g} ms", va="center", fontsize=6)
            place += 1
        place += 1  # a gap
    axes.set_yticks(middles, [f"{s} {c}\n{h} {d}" for s, c, h, d in ordered], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_xlabel("share of the measured ceiling (copy bandwidth or bf16 matrix product)")
    return finish(figure, path, "How near each operation is to the hardware", found)


def kernels(rows: Sequence[Row], path: Path) -> Path | None:
    """The same in short: a line for each operation that is bound by memory, ours and the compiled reference as dots."""
    shares: dict[str, dict[str, Row]] = {}
    for r in rows:
        if r.subject in ROOFLINE and r.subject not in ("attention", "mlp") and r.share is not None:
            shares.setdefault(f"{r.subject} {r.case}  {r.shape} {r.dtype}", {})[r.variant] = r
    found = {name: of for name, of in shares.items() if "triton" in of}
    if not found:
        return None
    names = sorted(found, key=lambda name: found[name]["triton"].share or 0.0)
    figure, axes = plt.subplots(figsize=(9, 0.16 * len(names) + 1.3), layout="constrained")
    labels = {"triton": "ours", "reference compiled": "compiled PyTorch"}  # each once
    for place, name in enumerate(names):
        dots = [(v, found[name][v].share) for v in ("reference compiled", "triton") if v in found[name]]
        axes.plot([share for _, share in dots], [place] * len(dots), color="#ccc", lw=1.2, zorder=1)
        for variant, share in dots:
            axes.plot(share, place, "o", color=COLORS[variant], ms=4.5, label=labels.pop(variant, None))
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.set_ylim(-0.8, len(names) - 0.2)
    axes.set_xlim(0, 1.05)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.axvline(MUST, color="#888", lw=0.8, ls="--")
    axes.grid(axis="x", lw=0.3)
    axes.set_xlabel(f"share of the copy bandwidth of the same run (dashed: the {MUST:.0%} that is asked for)")
    axes.legend(fontsize=8, loc="lower right")
    drawn = [row for of in found.values() for row in of.values()]
    return finish(figure, path, "How near each kernel is to the memory's speed", drawn)


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
    return finish(figure, path, "Where a training step's time goes", found)


def overhead(rows: Sequence[Row], path: Path) -> Path | None:
    """The learned schedule's step against the synchronous one, with 95 % intervals, and what these count."""
    found = [(r, INTERVAL.search(r.note)) for r in rows if r.subject == "schedule_overhead"]
    points = [(r, [float(text) for text in match.groups()]) for r, match in found if match]
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(points) + 1.8), layout="constrained")
    for place, (_, (mean, low, high)) in enumerate(points):
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=PALETTE[1], capsize=3)
    labels = [f"{r.case}, {r.shape}\n{r.date[:10]}, {r.commit}" for r, _ in points]
    axes.set_yticks(range(len(points)), labels, fontsize=8)
    axes.set_ylim(-0.6, len(points) - 0.4)
    axes.axvline(0.0, color="black", lw=0.8)
    axes.axvline(1.0, color="#888", lw=0.8, ls="--")
    what = "% of the synchronous step (dashed: the 1 % that is allowed)"
    axes.set_xlabel(f"{what}\n{counted([r for r, _ in points])}", fontsize=8)
    return finish(figure, path, "What a learned schedule costs", [row for row, _ in points])


def counted(rows: Sequence[Row]) -> str:
    """What the 95 % intervals of these rows take for independent measurements."""
    early = [row.date < ROUNDS_SINCE for row in rows]
    pairs = f"of before {ROUNDS_SINCE}: pairs of single steps, too narrow"
    if all(early):
        return f"95 % intervals {pairs}"
    return "95 % intervals: rounds of several steps" + (f"; {pairs}" if any(early) else "")


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
    for name, draw in (("roofline", roofline), ("kernels", kernels), ("breakdown", breakdown), ("overhead", overhead)):
        made = draw(rows, chosen.out / f"{name}.png")
        print(made or f"{name}: no rows for it in {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
