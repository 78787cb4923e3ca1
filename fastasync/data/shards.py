"""Shards of cached latents: their format, how they are written and how they are verified.

A folder holds ``encoding.json`` (what is being made from what), ``shard-NNNNN.safetensors`` with a record
``shard-NNNNN.json`` beside each finished one, and ``index.json`` once all shards are finished.  A shard holds the raw
latents of consecutive images: ``latents.NAME`` [n, C, grid, grid] for every representation, ``latents_flip.NAME`` of
the mirrored images, ``labels`` int64 [n] and optionally frozen features for REPA, ``feats(_flip)`` float16
[n, tokens, width].  Latents are float32 by default, as the peers store them; float16 halves the disk.  Its header says
which shard of which encoding it is: among those of another one it is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastasync.errors import UserError
from fastasync.files import save_tensors, sha256_file, write_json
from fastasync.representations.statistics import LatentStatistics, StreamingStatistics, checked_statistics

FORMAT = 1
ENCODING, INDEX = "encoding.json", "index.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FEATURES_DTYPE = torch.float16
_CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CODES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_CODES |= {"BOOL": torch.bool}
_LOOKED_AT = 100  # entries of a folder that is named in an error
_CHUNK = 16  # images that statistics are computed over at a time: they stay in the cache (2.4 times faster than 256)
_DELETE = "delete it and "
_READABLE = "check its permissions and its disk"  # it may be whole: nobody should be told to delete it
_AGAIN = f"{_DELETE}run the same `fastasync encode` again: only what is missing is made"


class MappedFile:
    """A safetensors file mapped into memory: opened once, read where it is touched, no descriptor kept.

    ``tensors`` are views of the file, ``metadata`` its header's, or None.  Raises UserError, naming the file, when it
    is missing, cut short or no safetensors file; ``remedy`` says what to do then.
    """

    def __init__(self, path: str | Path, remedy: str):
        self.path = Path(path)
        try:
            self.size = self.path.stat().st_size
            with open(self.path, "rb") as stream:
                header = stream.read(min(int.from_bytes(stream.read(8), "little"), self.size))
        except FileNotFoundError:
            raise UserError(str(path), "missing", remedy.removeprefix(_DELETE)) from None
        except OSError as error:
            raise UserError(str(path), error.strerror, _READABLE) from None
        start = 8 + len(header)
        self.tensors: dict[str, Tensor] = {}
        try:
            entries = json.loads(header)
            self.metadata: dict[str, str] | None = entries.pop("__metadata__", None)
            end = start + max(int(entry["data_offsets"][1]) for entry in entries.values())
            if end != self.size:
                raise UserError(str(path), f"{self.size} bytes, its header says {end} (cut short or altered)", remedy)
            whole = torch.from_file(str(path), shared=False, size=self.size, dtype=torch.uint8)
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                values = whole[start + first : start + last].view(_CODES[entry["dtype"]])
                self.tensors[name] = values.view(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(str(path), f"not a readable safetensors file ({_brief(error)})", remedy) from None

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """{name: (dtype, shape)}."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Encoding:
    """What a folder of shards holds and what it was made from; every rank must ask for the same.

    ``images``: the fingerprint of the ``count`` source images; ``left_out``: bad files that were skipped.
    ``fingerprints``: of the representations, in the bundle's order.  ``features``: fingerprint of what made REPA's
    features, with their ``features_shape`` (tokens, width); "" and () when there are none.
    """

    images: str
    count: int
    left_out: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    grid: int
    names: tuple[str, ...]
    channels: tuple[int, ...]
    fingerprints: tuple[str, ...]
    flip: bool
    dtype: str
    shard_size: int
    features: str = ""
    features_shape: tuple[int, ...] = ()
    format: int = FORMAT

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.count // self.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The images [first, last) of a shard."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.count)

    def file(self, shard: int) -> str:
        """Name of a shard's file."""
        return f"shard-{shard:05d}.safetensors"

    def mark(self, shard: int) -> dict[str, str]:
        """The metadata of a shard's file."""
        return {"shard": _digest({**asdict(self), "shard": shard})}

    def owns(self, found: MappedFile, shard: int) -> bool:
        """Whether a file is this shard of this encoding, or was written before headers said so."""
        return found.metadata in (None, self.mark(shard))

    def tensors(self, n: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """{name: (dtype, shape)} of a shard of ``n`` images."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"labels": (torch.int64, (n,))}
        for view in ("", "_flip") if self.flip else ("",):
            for name, channels in zip(self.names, self.channels):
                found[f"latents{view}.{name}"] = (DTYPES[self.dtype], (n, channels, self.grid, self.grid))
            if self.features:
                found[f"feats{view}"] = (FEATURES_DTYPE, (n, *self.features_shape))
        return found

    def bytes(self, n: int) -> int:
        """Bytes of the tensors of ``n`` images."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.tensors(n).values())


@dataclass(frozen=True)
class Index:
    """A finished folder: its encoding, ``{"file", "count", "bytes", "sha256"}`` of each shard, and the statistics."""

    encoding: Encoding
    shards: tuple[dict[str, Any], ...]
    statistics: LatentStatistics


@dataclass
class LatentsReport:
    """What ``check_latents`` found: how much, and a line for each thing that is wrong."""

    shards: int
    images: int
    bytes: int
    problems: list[str] = field(default_factory=list)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically, with a hash of itself."""
    content = json.loads(json.dumps(content, allow_nan=False))  # as it reads back: lists for tuples
    write_json(path, {**content, "digest": _digest(content)})


def read_signed(path: Path, remedy: str) -> dict[str, Any]:
    """Read back what ``write_signed`` wrote.  UserError when it is missing, of another format or altered."""
    try:
        content = json.loads(path.read_text())
        digest = content.pop("digest")
    except FileNotFoundError:
        raise UserError(str(path), "missing", remedy) from None
    except OSError as error:
        raise UserError(str(path), error.strerror, _READABLE) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(str(path), "not readable (altered?)", remedy) from None
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(str(path), f"format {content['format']}", f"this version reads format {FORMAT}: encode again")
    if digest != _digest(content):
        raise UserError(str(path), "altered (its hash is wrong)", remedy)
    return content


def _encoding(content: dict[str, Any]) -> Encoding:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return Encoding(**fields)


def begin(out: Path, encoding: Encoding) -> None:
    """Claim a folder for an encoding, or continue it.  UserError when the folder is something else's."""
    if out.exists() and not out.is_dir():
        raise UserError(str(out), "not a folder", "choose another --out")
    if (out / ENCODING).exists():
        remedy = "choose another folder, or delete this one"
        found = _encoding(read_signed(out / ENCODING, f"delete {out / ENCODING} and run again"))
        for key, value in asdict(encoding).items():
            old = getattr(found, key)
            if key == "images" and old != value:
                before, now = (
                    f"{each.count:,} images, {each.left_out:,} bad ones left out" for each in (found, encoding)
                )
                raise UserError(
                    str(out), f"begun from {before}; asked for {now if now != before else 'others'}", remedy
                )
            if old != value:
                raise UserError(str(out), f"encoded with {key} {_short(old)}, asked for {_short(value)}", remedy)
        return
    if out.is_dir():
        foreign = [entry.name for entry in out.iterdir() if not entry.name.startswith((".", "shard-", INDEX))]
        if foreign:
            raise UserError(str(out), f"holds {foreign[0]}, and no {ENCODING}", "choose an empty or a new folder")
    write_signed(out / ENCODING, asdict(encoding))


def _short(value: object) -> str:
    text = value[:12] or "none" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity; the extremes tell (NaN spreads), in one pass without a copy."""
    return not tensor.is_floating_point() or all(math.isfinite(extreme) for extreme in tensor.aminmax())


def write_shard(out: Path, encoding: Encoding, shard: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard, then its record.  ``tensors`` as ``encoding.tensors`` says, on the CPU.

    Raises UserError for a value that is not finite (which names its representation), or when the disk is full.
    """
    for name, tensor in tensors.items():
        if not _finite(tensor):
            first, _ = encoding.bounds(shard)
            image = first + int((~tensor.flatten(1).isfinite()).any(1).nonzero()[0])
            remedy = "use --dtype float32" if encoding.dtype == "float16" else "the encoder gives NaN or infinity"
            if name.startswith("feats"):
                remedy = "the encoder gives NaN, or features beyond 65,504"
            raise UserError(f"{name} of image {image}", f"not finite in {tensor.dtype}", remedy)
    path = out / encoding.file(shard)
    _write_record(path, encoding, shard, tensors, save_tensors(path, tensors, encoding.mark(shard)))


def _write_record(path: Path, encoding: Encoding, shard: int, tensors: Mapping[str, Tensor], sha256: str) -> None:
    first, last = encoding.bounds(shard)
    streaming = shard_statistics(encoding, tensors)
    content = {
        "file": path.name,
        "count": last - first,
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "values": streaming.count,  # of each channel
        "mean": streaming.mean.tolist(),
        "deviation": streaming.deviation.tolist(),
    }
    write_signed(path.with_suffix(".json"), content)


def shard_statistics(encoding: Encoding, tensors: Mapping[str, Tensor]) -> StreamingStatistics:
    """Of the stored (unmirrored) latents of a shard, in float64."""
    streaming = StreamingStatistics(sum(encoding.channels))
    for parts in zip(*(tensors[f"latents.{name}"].split(_CHUNK) for name in encoding.names)):
        streaming.update(torch.cat(parts, dim=1))
    return streaming


def _record(out: Path, encoding: Encoding, shard: int) -> dict[str, Any] | None:
    """The record of a finished shard, or None; also for a shard of another encoding, or of another place."""
    path = out / encoding.file(shard)
    try:
        record = read_signed(path.with_suffix(".json"), "")
        whole = path.stat().st_size == record["bytes"]
        return record if whole and encoding.owns(MappedFile(path, _AGAIN), shard) else None
    except (UserError, OSError, KeyError):
        return None


def is_finished(out: Path, encoding: Encoding, shard: int) -> bool:
    """Whether a shard is there with its record.  A whole shard that lost its record (a kill between) gets one."""
    if _record(out, encoding, shard) is not None:
        return True
    path, (first, last) = out / encoding.file(shard), encoding.bounds(shard)
    if not path.exists():
        return False
    try:
        found = MappedFile(path, _AGAIN)
    except UserError:
        return False
    if found.layout() != encoding.tensors(last - first) or not encoding.owns(found, shard):
        return False
    _write_record(path, encoding, shard, found.tensors, sha256_file(path))
    return True


def finish(out: Path, encoding: Encoding) -> int:
    """Write the index if every shard is finished; returns how many are not.  Any rank may do it: all write the same.

    The statistics are merged in the order of the shards, so that they do not depend on who made which.
    """
    records = [_record(out, encoding, shard) for shard in range(encoding.shards)]
    missing = sum(record is None for record in records)
    if missing:
        return missing
    streaming = StreamingStatistics(sum(encoding.channels))
    shards = []
    for record in records:
        assert record is not None
        mean, deviation = (torch.tensor(record.pop(key), dtype=torch.float64) for key in ("mean", "deviation"))
        streaming.merge(record.pop("values"), mean, deviation)
        shards.append(record)
    statistics = checked_statistics(streaming, encoding.names, encoding.channels, encoding.fingerprints)
    facts = {"mean": statistics.mean, "std": statistics.std, "fingerprint": statistics.fingerprint()}
    content = json.loads(json.dumps({**asdict(encoding), "shards": shards, "statistics": facts}))
    try:
        if read_signed(out / INDEX, "") == content:
            return 0
    except UserError:  # none yet, or an altered one
        pass
    write_signed(out / INDEX, content)
    return 0


def read_index(directory: str | Path) -> Index:
    """The index of a finished folder.  UserError when there is none, or it is altered."""
    path = Path(directory) / INDEX
    if not path.parent.is_dir():
        raise UserError(str(directory), "no such folder", "give the --out of `fastasync encode` as data.root")
    if not path.exists():
        if (path.parent / ENCODING).exists():
            remedy = "run `fastasync encode` (again): it goes on where it stopped"
            raise UserError(str(directory), "encoding has not finished", remedy)
        what, remedy = _instead_of_latents(path.parent)
        raise UserError(str(directory), f"{what}, not encoded latents", remedy)
    content = read_signed(path, _AGAIN)
    shards, facts = content.pop("shards"), content.pop("statistics")
    encoding = _encoding(content)
    statistics = LatentStatistics(tuple(facts["mean"]), tuple(facts["std"]), encoding.fingerprints)
    if statistics.fingerprint() != facts["fingerprint"]:
        raise UserError(str(path), "statistics are not those of its fingerprint", _AGAIN)
    return Index(encoding, tuple(shards), statistics)


def _instead_of_latents(folder: Path) -> tuple[str, str]:
    """What a folder holds that nothing was encoded into, and what to do."""
    from fastasync.images.sources import EXTENSIONS

    inside = list(islice(folder.iterdir(), _LOOKED_AT))
    if not inside:
        return "is empty", f"run `fastasync encode IMAGES --out {folder}` first"
    deeper = (entry for place in inside if place.is_dir() for entry in islice(place.iterdir(), _LOOKED_AT))
    if any(entry.name.lower().endswith((*EXTENSIONS, ".tar")) for entry in chain(inside, deeper)):
        return "holds images", f"run `fastasync encode {folder} --out LATENTS` and give LATENTS"
    return f"holds no {INDEX}", "give the --out of `fastasync encode` as data.root"


def open_shards(directory: str | Path, index: Index) -> Iterator[MappedFile]:
    """The mapped shards, in order.  UserError when one is missing, of another size, layout, place or encoding."""
    for record in index.shards:
        found = MappedFile(Path(directory) / record["file"], _AGAIN)
        if found.size != record["bytes"]:
            raise UserError(str(found.path), f"{found.size} bytes, the index says {record['bytes']}", _AGAIN)
        expected, layout = index.encoding.tensors(record["count"]), found.layout()
        for name in sorted(expected.keys() | layout.keys()):
            if expected.get(name) != layout.get(name):
                what = f"{name} is {_describe(layout.get(name))}, the index says {_describe(expected.get(name))}"
                raise UserError(str(found.path), what, _AGAIN)
        number = int(found.path.stem.removeprefix("shard-"))
        if not index.encoding.owns(found, number):
            raise UserError(str(found.path), "is another shard, or of another encoding (by its header)", _AGAIN)
        yield found


def _describe(entry: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{str(entry[0]).removeprefix('torch.')} {list(entry[1])}"


def check_hash(found: MappedFile, sha256: str, between: Callable[[], None] = lambda: None) -> None:
    """UserError unless the file's bytes are those that were written.  ``between``: as for ``sha256_file``."""
    now = sha256_file(found.path, between)
    if now != sha256:
        raise UserError(str(found.path), f"altered (hash {now[:12]}, the index says {sha256[:12]})", _AGAIN)


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a shard that was mapped and cannot be read any more."""
    return UserError(str(path), error.strerror, _AGAIN.removeprefix(_DELETE))


def check_latents(directory: str | Path, progress: bool = True, workers: int | None = None) -> LatentsReport:
    """Read every byte: hashes, layouts, labels, finite values, and the statistics computed again.

    ``workers``: threads (default: one for each CPU).  Raises UserError when there is no index or it is altered; what
    is wrong with shards is in the report.
    """
    index = read_index(directory)
    encoding = index.encoding
    report = LatentsReport(len(index.shards), encoding.count, sum(record["bytes"] for record in index.shards))
    streaming = StreamingStatistics(sum(encoding.channels))

    def verify(record: dict[str, Any]) -> StreamingStatistics | str:
        try:
            return _verify_shard(directory, index, record)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="check") as pool:
        found = pool.map(verify, index.shards)
        for part in tqdm(found, "check-latents", len(index.shards), unit="shard", disable=not progress):
            if isinstance(part, str):
                report.problems.append(part)
            else:
                streaming.merge(part.count, part.mean, part.deviation)
    if not report.problems:
        expected = (
            torch.tensor(values, dtype=torch.float64) for values in (index.statistics.mean, index.statistics.std)
        )
        for name, now, then in zip(("mean", "std"), streaming.result(), expected):
            scale = streaming.result()[1]
            off = ((now - then).abs() > 1e-9 * (scale + then.abs())).nonzero()
            if len(off):
                channel = int(off[0])
                what = f"{float(then[channel]):.6g} in the index, {float(now[channel]):.6g} in the shards"
                report.problems.append(f"{directory}: {name} of channel {channel}: {what}: {_AGAIN}")
    return report


def _verify_shard(directory: str | Path, index: Index, record: dict[str, Any]) -> StreamingStatistics:
    """The statistics of a shard's latents.  UserError for the first thing that is wrong with it."""
    (found,) = open_shards(directory, replace(index, shards=(record,)))
    check_hash(found, record["sha256"])
    check_labels(found, len(index.encoding.class_names))
    for name, tensor in found.tensors.items():
        if not _finite(tensor):
            raise UserError(f"{found.path}: {name}", "not finite", _AGAIN)
    return shard_statistics(index.encoding, found.tensors)


def check_labels(file: MappedFile, classes: int) -> None:
    """UserError, naming the first image, unless every label of the shard is in [0, classes)."""
    labels = file.tensors["labels"]
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise UserError(f"{file.path}: label of image {row}", int(labels[row]), f"must be in 0..{classes - 1}")
