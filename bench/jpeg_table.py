"""What bench/jpeg_run.py leaves to look at: one picture, and a results file with a row for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from bench.harness import RESULTS, ROOT, Row, read_rows, write_rows
from bench.jpeg_networks import Pictures
from fastasync.files import atomic_path

PICTURE = ROOT / "docs" / "jpeg-run.png"
LARGEST = 480_000  # bytes of the picture
_MARGIN, _TOP, _GAP, _BETWEEN, _FONT = 88, 22, 2, 6, 13


def draw_picture(parts: Mapping[str, tuple[Pictures, int]], path: Path) -> None:
    """A row for each class; side by side the first images of each of the ``parts``: title -> (images, how many)."""
    names, font = next(iter(parts.values()))[0].class_names, ImageFont.load_default(_FONT)
    side = next(iter(parts.values()))[0].images.shape[-1]
    cell = side + _GAP
    width = _MARGIN + sum(count * cell + _BETWEEN for _, count in parts.values())
    sheet, left = Image.new("RGB", (width, _TOP + cell * len(names)), "white"), _MARGIN
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        pen.text((_MARGIN - 8, _TOP + row * cell + side // 2), name, "#222222", font=font, anchor="rm")
    for title, (pictures, count) in parts.items():
        pen.text((left, _TOP // 2), title, "#222222", font=font, anchor="lm")
        for row in range(len(names)):
            for place, index in enumerate((pictures.labels == row).nonzero().flatten()[:count].tolist()):
                tile = Image.fromarray(pictures.images[index].permute(1, 2, 0).cpu().numpy())
                sheet.paste(tile, (left + place * cell, _TOP + row * cell))
        left += count * cell + _BETWEEN
    with atomic_path(path) as partial:
        sheet.save(partial, "PNG", optimize=True)
        if partial.stat().st_size > LARGEST:
            sheet.quantize(256).save(partial, "PNG", optimize=True)


def table(stages: Mapping[str, Mapping[str, Any]], size: str, device: str, shape: str, dtype: str) -> list[Row]:
    """Print the stages and return them as rows of a results file: ms of the whole stage, ``count`` attempts."""
    rows = []
    print(f"\n{'stage':14s} {'seconds':>8s}  figure ({size}, {device}, torch {torch.__version__})")
    for name, entry in stages.items():
        print(f"{name:14s} {entry['seconds']:8.1f}  {entry['figure']}")
        ms = 1e3 * entry["seconds"]
        facts = (entry["date"], entry["commit"], device, torch.__version__, "", "jpeg_run", name, size)
        rows.append(Row(*facts, shape, dtype, ms, ms, ms, entry["attempts"], note=entry["figure"]))
    print(f"{'total':14s} {sum(row.ms for row in rows) / 1e3:8.1f}")
    return rows


def record(rows: Sequence[Row], picture: Path, results: Path = RESULTS, target: Path = PICTURE) -> Path:
    """Append what is not there yet to results/jpeg_run-<hardware>.csv, and copy the picture; returns the former."""
    path = results / f"jpeg_run-{rows[0].device}.csv"
    known = {(row.date, row.case) for row in read_rows(path)} if path.is_file() else set()
    write_rows(path, [row for row in rows if (row.date, row.case) not in known])
    with atomic_path(target) as partial:
        partial.write_bytes(picture.read_bytes())
    return path
