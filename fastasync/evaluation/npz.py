"""Reading and writing npz files: statistics, and sample sets in the format of the ADM evaluation suite."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastasync.data.images import check_images
from fastasync.errors import UserError
from fastasync.files import atomic_path


def save_arrays(path: Path | str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed npz; an existing file is replaced only once the new one is complete."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path | str, required: tuple[str, ...], remedy: str) -> dict[str, np.ndarray]:
    """All arrays of an npz.

    Raises:
        UserError: missing, truncated, corrupt or pickled file, or a required array is not in it.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise UserError(str(path), "a single array", remedy)
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise UserError(str(path), "no such file", remedy) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(str(path), f"truncated or not an npz ({error})", remedy) from None
    missing = [name for name in required if name not in arrays]
    if missing:
        raise UserError(str(path), f"no array {missing[0]} (has {', '.join(arrays) or 'none'})", remedy)
    return arrays


def save_npz(path: Path | str, images: Tensor) -> None:
    """Write samples for the ADM suite: ``arr_0`` uint8 [N, H, W, 3].

    Args:
        path: the npz file.
        images: uint8 [N, 3 or 1, H, W]; grey images are repeated to three channels.
    """
    check_images(images, str(path))
    save_arrays(path, {"arr_0": images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()})


def load_npz(path: Path | str, count: int | None = None, size: int | None = None) -> Tensor:
    """Read an ADM sample file as uint8 [N, 3, H, W].

    Args:
        path: npz with ``arr_0`` uint8 [N, H, W, 3].
        count: the number of images it must hold, if that matters.
        size: the height and width they must have, if that matters.

    Raises:
        UserError: missing or truncated file, no ``arr_0``, other dtype, shape, count or size.
    """
    remedy = "give an npz with arr_0 uint8 [N, H, W, 3]"
    array = load_arrays(path, ("arr_0",), remedy)["arr_0"]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or array.shape[0] == 0:
        raise UserError(f"{path}: arr_0", f"{array.dtype} {array.shape}", remedy)
    if count is not None and len(array) != count:
        raise UserError(f"{path}: arr_0", f"{len(array)} images", f"expected {count}")
    if size is not None and array.shape[1:3] != (size, size):
        raise UserError(f"{path}: arr_0", f"{array.shape[1]}x{array.shape[2]} images", f"expected {size}x{size}")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
