"""Where labelled images come from: a tree of class folders, or WebDataset tars.  Both are read by index."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from fastasync.errors import UserError
from fastasync.files import digest_tensors, save_tensors
from fastasync.images.read import Files, Place, library, read_places
from fastasync.images.transforms import plain_size

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TAR_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
INDEX_PREFIX = ".fastasync-index-"
_CHECK = "see `fastasync check-images`"


@dataclass(frozen=True)
class ImageSource(ABC):
    """N labelled image files.  ``paths`` are their display names, unique, relative to the source.

    ``sizes`` are in bytes (-1: not readable), ``labels`` int64 [N] indexes ``class_names``; ``left_out`` counts the
    images removed by ``without``, ``ignored`` names files of the source that are no images.
    """

    name: str
    class_names: tuple[str, ...]
    paths: Sequence[str] = field(repr=False)
    labels: Tensor = field(repr=False)
    sizes: Tensor = field(repr=False)
    left_out: int = 0
    ignored: tuple[str, ...] = field(default=(), repr=False)

    per_image: ClassVar[tuple[str, ...]] = ("labels", "sizes")  # the tensors with one entry for each image

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def path(self, index: int) -> str:
        """Display name of an image, which is also its name in lists of bad files."""
        return self.paths[index]

    def label(self, index: int) -> int:
        """Class of an image."""
        return int(self.labels[index])

    def read(self, index: int) -> bytes:
        """The bytes of an image file.  UserError, naming it, when they cannot be read."""
        try:
            return self._read(index)
        except OSError as error:
            raise UserError(self.path(index), error.strerror or str(error), _CHECK) from None

    def read_many(self, indices: Sequence[int], threads: int) -> Files:
        """Several image files, read on ``threads`` threads at once where the compiled reader was built.

        Raises as ``read`` does.
        """
        places = self._places(indices)
        # of -1 bytes is what could not be read when it was listed
        if library() is None or any(place.size < 0 for place in places):
            files = Files([np.empty(0, np.uint8)] * len(indices), np.zeros((len(indices), 2), np.int32))
            again = list(range(len(indices)))
        else:
            files, again = read_places(places, threads)
        for number in again:
            data = self.read(indices[number])
            files.data[number] = np.frombuffer(data, np.uint8)
            files.sizes[number] = plain_size(data) or (0, 0)
        return files

    @abstractmethod
    def _places(self, indices: Sequence[int]) -> list[Place]:
        """Where the bytes are."""

    @abstractmethod
    def _read(self, index: int) -> bytes:
        """The bytes, or an OSError."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, labels and classes of the images: not of the pixels, and not of the location."""
        names = hashlib.sha256("\0".join(self.paths).encode(errors="surrogateescape")).hexdigest()
        return digest_tensors({"labels": self.labels, "sizes": self.sizes}, names, self.class_names)

    def without(self, paths: Collection[str]) -> Self:
        """The source without the images named ``paths`` (names it does not have are ignored); classes stay.

        UserError when nothing is left.
        """
        unwanted = set(paths)
        keep = [index for index, path in enumerate(self.paths) if path not in unwanted]
        if not keep:
            raise UserError(self.name, "no image left", f"all {len(self)} are in the list of bad files")
        chosen = torch.tensor(keep)
        tensors = {name: getattr(self, name)[chosen] for name in self.per_image}
        left_out = self.left_out + len(self) - len(keep)
        return dataclasses.replace(self, paths=[self.paths[index] for index in keep], left_out=left_out, **tensors)


@dataclass(frozen=True)
class FolderSource(ImageSource):
    """A tree with one folder for each class, as torchvision's ImageFolder reads it."""

    root: Path = Path()

    def _places(self, indices: Sequence[int]) -> list[Place]:
        sizes = self.sizes[indices].tolist()
        return [Place(os.path.join(self.root, self.paths[index]), 0, size, True) for index, size in zip(indices, sizes)]

    def _read(self, index: int) -> bytes:
        [(path, _, size, _)] = self._places([index])
        descriptor = os.open(path, os.O_RDONLY)  # open() takes twice the time, which counts at 15,000 images/s
        try:
            data = os.read(descriptor, size + 1)
        finally:
            os.close(descriptor)
        return data if len(data) == size else Path(path).read_bytes()  # of another size than when it was listed


@dataclass(frozen=True)
class TarSource(ImageSource):
    """WebDataset tars, never unpacked: image i is ``sizes[i]`` bytes at ``offsets[i]`` of ``tars[members[i]]``."""

    tars: tuple[Path, ...] = ()
    members: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)
    offsets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)

    per_image: ClassVar[tuple[str, ...]] = ("labels", "sizes", "members", "offsets")

    def _places(self, indices: Sequence[int]) -> list[Place]:
        columns = (part[indices].tolist() for part in (self.members, self.offsets, self.sizes))
        return [Place(self.tars[member], offset, size, False) for member, offset, size in zip(*columns)]

    def _read(self, index: int) -> bytes:
        [(tar, offset, size, _)] = self._places([index])
        with open(tar, "rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{tar} was cut short since it was indexed: {len(data)} of {size} bytes at {offset}")
        return data


def open_source(where: str | Path | Sequence[str | Path]) -> ImageSource:
    """A folder of class folders, a folder of tars, a glob of tars, or a list of tars.  Raises UserError."""
    if not isinstance(where, (str, Path)):
        return open_tars(where)
    folder = Path(where)
    if folder.is_dir():
        tars = sorted(folder.glob("*.tar"))
        if tars and any(_is_folder(entry) for entry in _entries(folder)):
            raise UserError(str(where), "holds tars and folders", f"for the tars give {folder}/*.tar, else move them")
        return open_tars(tars) if tars else open_folder(folder)
    if folder.suffix == ".tar" or glob.has_magic(str(where)):
        return open_tars(where)
    raise UserError(str(where), "no such folder", "give a folder of class folders, or of WebDataset tars")


def open_folder(root: str | Path) -> FolderSource:
    """The images of ``root``: its subfolders are the classes, in the order of their names; within a class, by name.

    Folders inside a class folder are entered (symbolic links too, unless they lead back up); hidden files and files
    without an image's extension are left out, the latter are named in ``ignored``.  Raises UserError when a folder
    cannot be read, when there is no class, and when a class has no image.
    """
    root = Path(root)
    above = frozenset(_identity(folder) for folder in (root, *root.resolve().parents))
    classes = [entry for entry in _entries(root) if _is_folder(entry) and _identity(entry.path) not in above]
    if not classes:
        loose = any(entry.name.lower().endswith(EXTENSIONS) for entry in _entries(root))
        found = "images, but no class folders" if loose else "no class folders"
        raise UserError(str(root), found, "put the images of each class into a folder of their own")
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    ignored: list[str] = []
    nested = True
    for label, folder in enumerate(classes):
        found_here = sorted(_walk(folder.path, "", above))  # by folder, then by name
        images = [(place, name, size) for place, name, size in found_here if name.lower().endswith(EXTENSIONS)]
        if not images:
            raise UserError(f"{root}: class folder {folder.name}", "no image in it", "add some or remove it")
        nested = nested and all(place for place, _, _ in images)
        paths += [f"{folder.name}/{place}{name}" for place, name, _ in images]
        labels += [label] * len(images)
        sizes += [size for _, _, size in images]
        ignored += [f"{folder.name}/{p}{name}" for p, name, _ in found_here if not name.lower().endswith(EXTENSIONS)]
    names = tuple(folder.name for folder in classes)
    if nested and SPLIT_NAMES.issuperset(names):
        raise UserError(str(root), f"its folders are splits ({', '.join(names)})", f"give {root / names[0]}")
    for path in paths:
        if "\n" in path or "\t" in path or "\r" in path:
            raise UserError(str(root), repr(path), "rename it: tabs and line ends cannot stand in a list of files")
    return FolderSource(
        str(root), names, paths, torch.tensor(labels), torch.tensor(sizes), ignored=tuple(ignored), root=root
    )


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name, hidden entries left out."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(str(folder), error.strerror, "give a folder that can be read") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and inode: the same for every path that leads to the folder."""
    try:
        found = os.stat(folder)
    except OSError as error:
        raise UserError(str(folder), error.strerror, "give a folder that can be read") from None
    return found.st_dev, found.st_ino


def _walk(folder: str, place: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str, int]]:
    """(subfolder with a slash or "", name, bytes) of every file below; a folder that is its own parent is skipped."""
    above |= {_identity(folder)}
    for entry in _entries(folder):
        if not _is_folder(entry):
            try:
                size = entry.stat().st_size
            except OSError:  # a broken link: `read` says so
                size = -1
            yield place, entry.name, size
        elif _identity(entry.path) not in above:
            yield from _walk(entry.path, f"{place}{entry.name}/", above)


def open_tars(tars: str | Path | Sequence[str | Path]) -> TarSource:
    """The samples of WebDataset tars (a glob or a list): ``KEY.jpg`` (jpeg, png, webp) with the class in ``KEY.cls``.

    The index of all tars is built once and kept beside them (in ~/.cache/fastasync where that cannot be written).
    Raises UserError: nothing matches, a tar is cut short or damaged, a sample lacks its image or class.
    """
    if isinstance(tars, (str, Path)):
        files = [Path(file) for file in sorted(glob.glob(str(tars)))]
        name = str(tars)
    else:
        files = [Path(tar) for tar in tars]
        name = str(files[0].parent) if files else "tars"
    if not files:
        raise UserError(name, "no tar", "give a folder, a glob or a list of .tar files")
    try:
        found = [os.stat(file) for file in files]
    except OSError as error:
        raise UserError(str(error.filename), error.strerror, "give .tar files that can be read") from None
    base = Path(os.path.commonpath([file.absolute().parent for file in files]))
    names = [file.absolute().relative_to(base).as_posix() for file in files]
    state = [(tar, stat.st_size, stat.st_mtime_ns) for tar, stat in zip(names, found)]
    index = _cached_index(files, names, state, base)
    paths = bytes(index["paths"].numpy()).decode(errors="surrogateescape").split("\n")
    class_names = tuple(str(label) for label in range(int(index["labels"].max()) + 1))
    return TarSource(
        name,
        class_names,
        paths,
        index["labels"],
        index["sizes"],
        tars=tuple(files),
        members=index["members"],
        offsets=index["offsets"],
    )


def _cached_index(files: list[Path], names: list[str], state: list[tuple[str, int, int]], base: Path) -> dict:
    """The index of these tars as they are now, from its file if there is a sound one."""
    file_name = f"{INDEX_PREFIX}{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]}.safetensors"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastasync"
    for folder in (base, home):
        try:
            index = load_file(folder / file_name)
            if bytes(index.pop("digest").numpy()).hex() == digest_tensors(index):
                return index
        except (OSError, KeyError, SafetensorError):  # none there, or a damaged one: built again below
            pass
    index = _build_index(files, names)
    digest = torch.frombuffer(bytearray.fromhex(digest_tensors(index)), dtype=torch.uint8)
    for folder in (base, home):
        try:
            save_tensors(folder / file_name, {**index, "digest": digest})
            break
        except UserError:  # cannot be written there: the index is only a saving of time
            continue
    return index


def _build_index(files: list[Path], names: list[str]) -> dict[str, Tensor]:
    paths: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    for number, file in enumerate(tqdm(files, "index", unit="tar", disable=len(files) < 8)):
        for member, offset, size, label in _samples(file):
            paths.append(f"{names[number]}/{member}")
            rows.append((number, offset, size, label))
    columns = torch.tensor(rows, dtype=torch.int64).unbind(1)
    index = {name: column.clone() for name, column in zip(("members", "offsets", "sizes", "labels"), columns)}
    joined = "\n".join(paths).encode(errors="surrogateescape")
    return {**index, "paths": torch.frombuffer(bytearray(joined), dtype=torch.uint8)}


def _samples(file: Path) -> list[tuple[str, int, int, int]]:
    """(member, offset, bytes, class) of every image of a tar, in its order."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    for member, offset in _tar_members(file):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key, extension = f"{folder}/{stem}", f".{extension.lower()}"
        if "\n" in member.name or "\t" in member.name or "\r" in member.name:
            raise UserError(str(file), repr(member.name), "rename it: tabs and line ends cannot stand in a list")
        if extension in TAR_EXTENSIONS:
            if key in images:
                raise UserError(str(file), f"two images for sample {key.lstrip('/')}", "keep one in each sample")
            images[key] = (member.name, offset, member.size)
        elif extension == ".cls":
            with open(file, "rb") as stream:
                text = os.pread(stream.fileno(), member.size, offset)
            if not text.strip().isdigit():
                raise UserError(f"{file}: {member.name}", repr(text[:20]), "must hold the class, a whole number")
            labels[key] = int(text)
    for key in images.keys() ^ labels.keys():
        lacking = "class (.cls)" if key in images else f"image ({', '.join(TAR_EXTENSIONS)})"
        raise UserError(str(file), f"sample {key.lstrip('/')} has no {lacking}", "each KEY.jpg needs its KEY.cls")
    if not images:
        raise UserError(str(file), "no images", f"its members must end in {', '.join(TAR_EXTENSIONS)}, and in .cls")
    return [(*images[key], labels[key]) for key in images]


def _tar_members(file: Path) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """(member, offset of its data) of the plain files.  UserError unless the tar is whole: it ends with zeros."""
    length = file.stat().st_size
    again = "copy or download it again"
    end = 0  # of the last whole member
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # what it collects would only take memory
                end = member.offset_data + -(-member.size // 512) * 512
                if end > length:
                    where = f"cut short at byte {length}: {member.name} goes on to byte {end}"
                    raise UserError(str(file), where, again)
                if member.isfile():
                    yield member, member.offset_data
    except tarfile.ReadError as error:
        with open(file, "rb") as stream:
            start = stream.read(512)
        if len(start) == 512 and start[257:262] != b"ustar":
            raise UserError(
                str(file), f"not a plain tar ({error})", "unpack its compression or write it again"
            ) from None
        raise UserError(str(file), f"cut short or damaged at byte {end} of {length} ({error})", again) from None
    except OSError as error:
        raise UserError(str(file), error.strerror, "give .tar files that can be read") from None
    with open(file, "rb") as stream:
        mark = os.pread(stream.fileno(), 512, end)
    if mark != bytes(512):  # tarfile takes a broken header, and the end of the file, for the end of the tar
        raise UserError(str(file), f"cut short or damaged at byte {end} of {length}", again)
