"""Folders of latents as SFD and LightningDiT write them, read as they are.

Safetensors shards (in the order of their names) with ``latents``, ``latents_sv`` (semantic; not in LightningDiT's),
``feats_dino``, each also as ``*_flip``, and ``labels``; statistics in ``latents_stats.pt`` and ``latents_sv_stats.pt``.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from fastasync.data.shard_loader import MappedLatents, Names
from fastasync.data.shards import DTYPES, ENCODING, INDEX, MappedFile
from fastasync.errors import UserError
from fastasync.representations.statistics import LatentStatistics

KEYS = {"texture": "latents", "semantic": "latents_sv"}
FEATURES = "feats_dino"
_AGAIN = "download or extract it again"
_STATISTICS = "copy it from where the latents or the checkpoint came from: the model only fits that one"


def is_sfd_folder(directory: str | Path) -> bool:
    """Whether it holds safetensors files, and nothing of ``fastasync encode``."""
    directory = Path(directory)
    ours = any((directory / name).exists() for name in (ENCODING, INDEX))
    return not ours and any(directory.glob("*.safetensors"))


class SFDLatents(MappedLatents):
    """The latents of such a folder; ``names`` are the representations found: texture, and semantic if it is there.

    Args:
        directory: the folder.
        device: where batches go.
        features: also give the DINO features, [B, tokens, D].
        classes: how many there are (default: one more than the largest label).

    Raises UserError, naming the file, when statistics are missing, shards differ in what they hold, a shard is cut
    short, or its tensors do not hold the same number of images.
    """

    def __init__(
        self,
        directory: str | Path,
        device: str | torch.device = "cpu",
        *,
        features: bool = False,
        classes: int | None = None,
    ):
        folder = Path(directory)
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UserError(str(directory), "no safetensors files", "give a folder of latents")
        files = [MappedFile(path, _AGAIN) for path in paths]
        first = files[0].tensors
        self.names = tuple(name for name, key in KEYS.items() if key in first)
        keys = [KEYS[name] for name in self.names]
        if "latents" not in keys:
            raise UserError(str(paths[0]), "no `latents` in it", "give a folder of SFD's or LightningDiT's latents")
        if features:
            if FEATURES not in first:
                raise UserError(str(paths[0]), f"no `{FEATURES}` in it", "set objective.repa_weight to 0")
            keys.append(FEATURES)
        flip = all(f"{key}_flip" in first for key in keys)
        wanted = [*keys, *(f"{key}_flip" for key in keys if flip)]
        for file in files:
            _check_shard(file, wanted, first)
        if classes is None:
            classes = 1 + max(int(file.tensors["labels"].max()) for file in files)
        channels = [first[key].shape[1] for key in keys]
        self.channels = tuple(channels)
        values = [_read_statistics(folder / f"{KEYS[name]}_stats.pt", n) for name, n in zip(self.names, channels)]
        mean, std = (torch.cat([value[which] for value in values]).tolist() for which in (0, 1))
        sources = tuple(f"folder:{KEYS[name]}" for name in self.names)
        parts = [Names(key, f"{key}_flip" if flip else None) for key in keys]
        super().__init__(
            files,
            parts[: len(self.names)],
            LatentStatistics(tuple(mean), tuple(std), sources),
            classes,
            parts[-1] if features else None,
            device,
        )


def _check_shard(file: MappedFile, wanted: list[str], first: dict[str, Tensor]) -> None:
    """UserError unless the shard holds ``wanted``, like the ``first`` shard, for as many images as it has labels."""
    labels = file.tensors.get("labels")
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        raise UserError(f"{file.path}: labels", "missing or not whole numbers [N], N > 0", _AGAIN)
    for key in wanted:
        tensor = file.tensors.get(key)
        if tensor is None:
            raise UserError(f"{file.path}: {key}", "missing (the first shard has it)", _AGAIN)
        if tensor.dtype not in DTYPES.values() or tensor.ndim not in (3, 4):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise UserError(f"{file.path}: {key}", found, f"must be one of {', '.join(DTYPES)}, [N, C, h, w]")
        if len(tensor) != len(labels):
            raise UserError(f"{file.path}: {key}", f"{len(tensor)} images, {len(labels)} labels", _AGAIN)
        like = first[key.removesuffix("_flip")]
        if (tensor.dtype, tensor.shape[1:]) != (like.dtype, like.shape[1:]):
            found = f"{tensor.dtype} {list(tensor.shape[1:])} per image"
            raise UserError(f"{file.path}: {key}", found, f"the first shard has {like.dtype} {list(like.shape[1:])}")


def _read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """(mean, std), float64 [channels]."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (content[key].double().flatten() for key in ("mean", "std"))
    except FileNotFoundError:
        raise UserError(str(path), "missing: the latents cannot be normalised", _STATISTICS) from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(path), f"no statistics in it ({type(error).__name__})", _STATISTICS) from None
    if not len(mean) == len(std) == channels:
        raise UserError(str(path), f"{len(mean)} channels, the latents have {channels}", _STATISTICS)
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(str(path), "a mean or std that is not finite and positive", _STATISTICS)
    return mean, std
