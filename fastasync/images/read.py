"""Reading a batch of files in one call that leaves Python's lock alone (csrc/read_files.cpp).

Each file costs Python four system calls, after each of which it waits for its lock: beside a busy main thread several
reading threads were slower than one (bench/NOTES.md).  The headers of JPEGs are looked at there too.  Where the library
was not built, Python does both.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ABI = 2  # kAbi in csrc/read_files.cpp


class Place(NamedTuple):
    """Where an image's bytes are: ``size`` bytes from ``offset`` of a file, which ends there if it is ``whole``."""

    path: str | Path
    offset: int
    size: int
    whole: bool


class Files(NamedTuple):
    """Image files: their bytes, each uint8 [bytes], and ``sizes``, int32 [n, 2]: their ``plain_size``, else (0, 0)."""

    data: list[np.ndarray]
    sizes: np.ndarray


@functools.cache
def library() -> Any | None:
    """The compiled reader, or None when it was not built.  An unusable one is warned about, once."""
    path = Path(__file__).with_name("_read_files.so")
    if not path.exists():
        return None
    try:
        found = ctypes.CDLL(str(path))
        if found.fastasync_read_files_abi() != ABI:
            raise OSError(f"{path} was built from other sources than this package")
    except (OSError, AttributeError) as error:
        warnings.warn(f"{error}; Python reads files instead (rebuild: pip install -e .)", stacklevel=2)
        return None
    pointer = ctypes.c_void_p
    found.fastasync_read_files.argtypes = [pointer, pointer, ctypes.c_int64, pointer, ctypes.c_int, pointer, pointer]
    found.fastasync_read_files.restype = None
    return found


def read_places(places: Sequence[Place], threads: int) -> tuple[Files, list[int]]:
    """What is at each place, read on ``threads`` threads, and the numbers of what could not be read as it should be.

    The data are parts of one block of memory, which lives as long as any of them.
    """
    reader = library()
    assert reader is not None
    count = len(places)
    table = np.zeros((count, 4), np.int64)  # struct Place of csrc/read_files.cpp
    table[:, 0], table[:, 1] = [place.offset for place in places], [place.size for place in places]
    table[:, 3] = [place.whole for place in places]
    ends = table[:, 1].cumsum()
    table[:, 2] = ends - table[:, 1]
    block = np.empty(int(ends[-1]) if count else 0, np.uint8)
    paths = (ctypes.c_char_p * count)(*[os.fsencode(place.path) for place in places])
    codes, sizes = np.empty(count, np.int32), np.empty((count, 2), np.int32)
    arrays = codes.ctypes.data, sizes.ctypes.data
    reader.fastasync_read_files(paths, table.ctypes.data, count, block.ctypes.data, threads, *arrays)
    bounds = zip(table[:, 2].tolist(), ends.tolist())
    return Files([block[start:end] for start, end in bounds], sizes), codes.nonzero()[0].tolist()
