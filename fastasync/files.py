"""Files that a crash never leaves half-written, and that are read back only when their hash is right."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastasync.errors import UserError

_PART = 2**23  # bytes that are hashed at a time: large, as a thread takes Python's lock from the others between two
PARTIAL = ".partial"  # suffix of a file that is still being written (and of what a killed process leaves)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it is fsynced and renamed to ``path``, else removed.

    Raises UserError when there is no space or no permission; ``path`` is then as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                str(path), "no space left on the device", "free some and run the same command again"
            ) from None
        if number in (errno.EFBIG, errno.EIO):
            remedy = "check the disk and its limits, and run the same command again"
            raise UserError(str(path), os.strerror(number), remedy) from None
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(str(path), os.strerror(number), "choose a folder that can be written to") from None
        where = getattr(error, "filename", None)
        if number and isinstance(where, str | Path) and Path(where) in (partial, path, *path.parents):
            raise UserError(str(path), os.strerror(number), "choose another place") from None
        raise  # of something else that was read or written meanwhile
    finally:
        with suppress(NotADirectoryError):  # a file stands where the folder should be
            partial.unlink(missing_ok=True)


def error_number(error: OSError | SafetensorError) -> int | None:
    """The operating system's number of an error; safetensors reports it within its text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(found.group(1)) if found else None)


def remove_partials(directory: str | Path, stem: str = "") -> None:
    """Remove what a killed process left of files in ``directory`` whose names begin with ``stem``."""
    for leftover in Path(directory).glob(f".{stem}*{PARTIAL}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sha256_file(path: str | Path, between: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.  ``between`` is called after every part that was read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        buffer = memoryview(bytearray(min(os.fstat(stream.fileno()).st_size, _PART) or 1))
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            between()
    return digest.hexdigest()


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically (NaN and infinity refused)."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file atomically; returns its SHA-256."""
    path = Path(path)
    with atomic_path(path) as partial:
        # in a folder of its own: save_file begins with a .tmpXXXXXX, which nobody removes after a kill
        with TemporaryDirectory(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent) as folder:
            made = Path(folder) / "tensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, made, metadata)
            made.chmod(0o644)  # safetensors makes it readable by its owner only
            os.replace(made, partial)
        digest = sha256_file(partial)
    return digest


def load_tensors(path: str | Path, sha256: str, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.  UserError (naming the file, with ``remedy``) when missing or altered."""
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "missing", remedy)
    found = sha256_file(path)
    if found != sha256:
        raise UserError(str(path), f"hash {found[:12]}, expected {sha256[:12]} (truncated or altered)", remedy)
    return load_file(path)


def digest_tensors(tensors: Mapping[str, Tensor], *facts: object) -> str:
    """SHA-256 over named tensors (name, dtype, shape, bytes; sorted by name) and JSON-able ``facts``."""
    state = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous()
        state.update(f"\n{name} {array.dtype} {tuple(array.shape)}\n".encode())
        state.update(array.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
