"""samples.png: a class-labelled grid, one class a row."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastasync.errors import UserError
from fastasync.report.records import Record, class_names

COLUMNS, ROWS = 10, 12
_CELL, _LARGEST = 64, 128  # pixels: tiny images are enlarged to about the first, large ones reduced to the second
_GAP, _FONT, _NAME = 3, 17, 24  # pixels; letters of a class name, at most


class Grid(NamedTuple):
    """The PNG, and how many classes it shows out of how many were sampled."""

    png: bytes
    shown: int
    classes: int


def samples_grid(record: Record) -> Grid | None:
    """The first images of each class, in the order of their index; None before there are samples.

    Raises UserError when the sample file is damaged.
    """
    if record.samples is None:
        return None
    path = record.samples / "samples.npz"
    remedy = "remove its folder and sample again"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["labels"]
        classes = np.unique(labels)
        rows = {int(label): np.flatnonzero(labels == label)[:COLUMNS] for label in classes[:ROWS]}
        images = _read(path, np.unique(np.concatenate(list(rows.values()))))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError, ValueError) as error:
        raise UserError(str(path), f"truncated or not a sample file ({error})", remedy) from None
    titles = _titles(list(rows), class_names(record.run))
    return Grid(_draw(rows, images, titles, _caption(record)), len(rows), len(classes))


def _titles(labels: list[int], names: tuple[str, ...]) -> dict[int, str]:
    """``3 cat``; of a class without a name, or whose name is its number, the number."""
    known = {label: names[label] for label in labels if label < len(names)}
    short = {label: name if len(name) <= _NAME else f"{name[: _NAME - 1]}…" for label, name in known.items()}
    return {
        label: str(label) if known.get(label) in (None, str(label)) else f"{label} {short[label]}" for label in labels
    }


def _read(path: Path, indices: np.ndarray) -> dict[int, np.ndarray]:
    """The images [H, W, 3] with these increasing indices, without reading the file into memory (50k can be 10 GB)."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if len(shape) != 4 or shape[3] != 3 or fortran or dtype != np.uint8:
            raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 [N, H, W, 3]")
        size, start = int(np.prod(shape[1:])), stream.tell()
        images = {}
        for index in indices.tolist():
            stream.seek(start + index * size)
            content = stream.read(size)
            if len(content) < size:
                raise EOFError(f"arr_0 ends before image {index}")
            images[index] = np.frombuffer(content, dtype=np.uint8).reshape(shape[1:])
    return images


def _resize(image: np.ndarray) -> Image.Image:
    """Whole multiples of a tiny image, pixel for pixel; a large one reduced."""
    picture = Image.fromarray(image)
    side = max(picture.size)
    if side > _LARGEST:
        return picture.resize([round(n * _LARGEST / side) for n in picture.size], Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    factor = max(1, _CELL // side)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _caption(record: Record) -> str:
    known = record.protocol
    if not known:
        return record.label
    count = known.get("function_evaluations")
    nfe = "" if count is None else f"{count:g} evaluations, "
    return f"{record.label}: {known.get('integrator')}, {nfe}step {known.get('checkpoint_step')}"


def _draw(rows: dict[int, np.ndarray], images: dict[int, np.ndarray], titles: dict[int, str], caption: str) -> bytes:
    font = ImageFont.load_default(_FONT)
    margin = int(max(font.getlength(title) for title in titles.values())) + 20
    example = _resize(next(iter(images.values())))
    wide, high = example.width + _GAP, example.height + _GAP
    columns, top = max(len(indices) for indices in rows.values()), _FONT + 16
    width = max(margin + columns * wide, int(font.getlength(caption)) + 20)
    sheet = Image.new("RGB", (width, top + len(rows) * high), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((10, top // 2), caption, "#222222", font=font, anchor="lm")
    for row, (label, indices) in enumerate(rows.items()):
        y = top + row * high
        pen.text((margin - 10, y + example.height // 2), titles[label], "#222222", font=font, anchor="rm")
        for column, index in enumerate(indices.tolist()):
            sheet.paste(_resize(images[index]), (margin + column * wide, y))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return stream.getvalue()
