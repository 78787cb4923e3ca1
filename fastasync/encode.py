"""``fastasync encode``: images -> shards of latents, with any bundle.  Resumable at the shard, parallel over ranks."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from fastasync.data.images import ImageSet
from fastasync.data.sfd_folder import is_sfd_folder
from fastasync.data.shards import (
    DTYPES,
    ENCODING,
    FEATURES_DTYPE,
    INDEX,
    Encoding,
    begin,
    check_latents,
    finish,
    is_finished,
    write_shard,
)
from fastasync.errors import UserError, unknown_name
from fastasync.files import remove_partials
from fastasync.images import ImageSource, open_images, open_source, require_checked
from fastasync.representations import Bundle, build, load_plugin, load_prepared
from fastasync.representations.base import registered
from fastasync.representations.weights import checked_device


class FeatureEncoder(Protocol):
    """A frozen network whose features REPA aligns with: images uint8 [n, 3, S, S] -> [n, tokens, width]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, width)."""

    def fingerprint(self) -> str:
        """Hash of what defines the features."""

    def __call__(self, images: Tensor) -> Tensor: ...


class EncodeReport(NamedTuple):
    """Shards that this call made and found finished, those that other ranks still have to make, and bad files left
    out of the source.

    ``seconds``: from the first batch, when it was there, to the last shard on the disk; of these ``waited`` for images
    to be read and decoded, and ``wrote`` for the disk.  The GPU may have been at work while the program waited.
    """

    made: int
    kept: int
    missing: int
    left_out: int
    seconds: float = 0.0
    waited: float = 0.0
    wrote: float = 0.0


class _Clock:
    """Seconds since the first wait ended, and within later ones."""

    def __init__(self) -> None:
        self.start = 0.0
        self.spent = {"images": 0.0, "disk": 0.0}

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        after = time.perf_counter()
        if self.start:
            self.spent[what] += after - before
        else:
            self.start = after

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start if self.start else 0.0


def encode(
    source: ImageSource | ImageSet,
    bundle: Bundle,
    out_dir: str | Path,
    *,
    shard_size: int = 4096,
    batch: int = 256,
    flip: bool = True,
    dtype: str = "float32",
    features: FeatureEncoder | None = None,
    rank: int = 0,
    world: int = 1,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> EncodeReport:
    """Encode all images of ``source``, in its order, into shards of ``shard_size`` images.

    Rank r of ``world`` makes shards r, r + world, ...; ranks share nothing but the folder, and whoever finds all
    shards finished writes the index.  Run again with the same arguments (any world size), it makes what is missing.

    Args:
        source: image files, or a set in memory.
        bundle: the representations (its statistics, if any, are not used).
        out_dir: a new folder, or one of the same encoding.
        batch: images that are encoded at once; a shard's last batch may be smaller.
        flip: also encode every image mirrored.
        dtype: of the stored latents: float32, float16 or bfloat16.  Statistics are those of the stored values.
        features: also store REPA's features (float16; for ImageNet at 256 tokens of width 768, 0.5 TB a view).
        device: where the representations run; images arrive there.
        backend, workers: of the image loader (see ``open_images``).

    Raises UserError, before any image is read where that is possible: bad arguments, more ranks than shards, a folder
    of another encoding, no permission, not enough disk; later: an image that cannot be decoded, latents that are not
    finite, a channel that never varies, a full disk.  Finished shards are kept; where there are none, nothing is.
    """
    from fastasync.training.out_of_memory import explained_batch  # imports the network

    out, device = Path(out_dir), torch.device(device)
    encoding = _encoding(source, bundle, shard_size, flip, dtype, features)
    if batch < 1:
        raise UserError("--batch", batch, "must be at least 1")
    if world < 1:
        raise UserError("world size", world, "must be at least 1")
    if not 0 <= rank < world:
        raise UserError("rank", rank, f"must be in 0..{world - 1}")
    if world > encoding.shards:
        smaller = f", or --shard-size of at most {encoding.count // world}" if encoding.count >= world else ""
        what = f"more ranks than the {encoding.shards} shards"
        raise UserError("world size", f"{world}: {what}", f"use at most {encoding.shards} ranks{smaller}")
    mine = range(rank, encoding.shards, world)
    with _begun(out, encoding), _only_process(out, mine):
        begin(out, encoding)  # again: a rank that was refused meanwhile may have withdrawn it
        _remove_partials(out, encoding, mine, alone=world == 1)
        wanted = [shard for shard in mine if not is_finished(out, encoding, shard)]
        _check_space(out, encoding)
        bundle.to(device)
        sizes = {shard: encoding.bounds(shard)[1] - encoding.bounds(shard)[0] for shard in mine}
        with tqdm(
            total=sum(sizes.values()),
            initial=sum(size for shard, size in sizes.items() if shard not in wanted),
            desc=f"encode, rank {rank}" if world > 1 else "encode",
            unit="img",
            disable=not progress,
        ) as bar:
            loader = {"backend": backend, "workers": workers}
            with explained_batch("--batch", batch, device, " (finished shards are kept)", _smaller_chunks(bundle)):
                clock = _make(source, bundle, out, encoding, wanted, batch, features, device, loader, bar)
        counts = len(wanted), len(mine) - len(wanted), finish(out, encoding), encoding.left_out
        return EncodeReport(*counts, *clock)


def _smaller_chunks(bundle: Bundle) -> list[str]:
    """The options that halve how many images each representation takes at a time: larger than that, --batch is free."""
    chunks = {}
    for item in bundle.representations:
        chunk: int = getattr(item, "chunk", getattr(getattr(item, "vit", None), "chunk", 1))
        if chunk > 1:
            chunks[item.name] = chunk // 2
    return [" ".join(f"--option {name}.chunk={half}" for name, half in chunks.items())] if chunks else []


@contextmanager
def _begun(out: Path, encoding: Encoding) -> Iterator[None]:
    """Begin the folder, or continue it.  Who began it, and fails before any shard is there, leaves no trace of it."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    begun_before = (out / ENCODING).exists()
    try:
        begin(out, encoding)
        yield
    except BaseException:
        if not begun_before:
            with suppress(OSError):  # another rank works there
                _withdraw(out, there)
        raise


def _withdraw(out: Path, there: Path) -> None:
    """Remove a folder in which nothing was made, up to its parent ``there``.  OSError when another rank works in it."""
    if any(out.glob("*shard-*")):
        return
    with open(out / ".lock", "a") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all shards'
        (out / ENCODING).unlink(missing_ok=True)
        (out / ".lock").unlink()
    for folder in (out, *out.absolute().parents):
        if folder.absolute() == there.absolute():
            break
        folder.rmdir()


@contextmanager
def _only_process(out: Path, shards: Iterable[int]) -> Iterator[None]:
    """Hold the locks of ``shards``, which the system frees however the process ends.

    Shard i is byte i of the lock file: ranks do not meet, but processes that all believe to be rank 0 do.  UserError
    when another process makes one of them.
    """
    try:
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(str(out), error.strerror, "choose a folder that can be written to") from None
    try:
        for shard in shards:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
            except (BlockingIOError, PermissionError):
                what = f"another process is encoding shard {shard} here"
                raise UserError(str(out), what, "wait for it, or give each process its own --rank") from None
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _encoding(
    source: ImageSource | ImageSet,
    bundle: Bundle,
    shard_size: int,
    flip: bool,
    dtype: str,
    features: FeatureEncoder | None,
) -> Encoding:
    if dtype not in DTYPES:
        raise unknown_name("--dtype", dtype, DTYPES)
    if shard_size < 1:
        raise UserError("--shard-size", shard_size, "must be at least 1")
    if not len(source):
        raise UserError(source.name, "no images", "give a folder with images")
    shape = source.image_shape if isinstance(source, ImageSet) else (3, *bundle.image_shape[1:])
    if shape != bundle.image_shape or shape[1] != shape[2]:
        found = "x".join(map(str, bundle.image_shape))
        raise UserError("representations: image shape", found, f"the images are {'x'.join(map(str, shape))}, square")
    return Encoding(
        images=source.fingerprint,
        count=len(source),
        left_out=0 if isinstance(source, ImageSet) else source.left_out,
        class_names=tuple(source.class_names),
        image_shape=shape,
        grid=bundle.grid,
        names=bundle.names,
        channels=bundle.channels,
        fingerprints=bundle.fingerprints(),
        flip=flip,
        dtype=dtype,
        shard_size=shard_size,
        features=features.fingerprint() if features else "",
        features_shape=tuple(features.shape) if features else (),
    )


def _remove_partials(out: Path, encoding: Encoding, mine: Iterable[int], alone: bool) -> None:
    """Remove what a killed process left of this rank's files; files that another rank may be writing stay."""
    if alone:
        remove_partials(out)
        return
    for shard in mine:
        remove_partials(out, f"{Path(encoding.file(shard)).stem}.")


def _check_space(out: Path, encoding: Encoding) -> None:
    """UserError when what all ranks have still to write cannot fit on the disk."""
    left = [shard for shard in range(encoding.shards) if not (out / encoding.file(shard)).exists()]
    needed = sum(encoding.bytes(last - first) for first, last in map(encoding.bounds, left))
    free = shutil.disk_usage(out).free
    if needed > free:
        what = f"{needed / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free"
        remedy = "free some, choose another disk, or store less (--dtype float16, --no-flip, no features)"
        raise UserError(str(out), what, remedy)


@torch.no_grad()
def _make(
    source: ImageSource | ImageSet,
    bundle: Bundle,
    out: Path,
    encoding: Encoding,
    wanted: Sequence[int],
    batch: int,
    features: FeatureEncoder | None,
    device: torch.device,
    loader: dict[str, Any],
    bar: tqdm,
) -> tuple[float, float, float]:
    """Make the shards ``wanted``; one is written while the next is encoded.  The report's seconds."""
    clock = _Clock()
    if not wanted:
        return 0.0, 0.0, 0.0
    ranges = [torch.arange(*encoding.bounds(shard)).split(batch) for shard in wanted]
    every = tuple(part for parts in ranges for part in parts)
    batches: Iterator[Any]
    if isinstance(source, ImageSet):
        batches = ((source.images[part].to(device), source.labels[part], part) for part in every)
    else:
        size = encoding.image_shape[1]
        batches = iter(open_images(source, size, batch, batches=every, device=device, **loader))
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        for shard, parts in zip(wanted, ranges):
            first, last = encoding.bounds(shard)
            tensors = {
                name: torch.empty(shape, dtype=kind, pin_memory=device.type == "cuda")
                for name, (kind, shape) in encoding.tensors(last - first).items()
            }
            for part in parts:
                with clock.waiting("images"):
                    images, labels, _ = next(batches)
                rows = slice(int(part[0]) - first, int(part[-1]) + 1 - first)
                tensors["labels"][rows] = labels.cpu()
                _encode_batch(images, bundle, features, encoding, tensors, rows, "")
                if encoding.flip:
                    _encode_batch(images.flip(-1), bundle, features, encoding, tensors, rows, "_flip")
                bar.update(len(part))
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the copies into pinned memory have arrived
            if writing is not None:
                with clock.waiting("disk"):
                    writing.result()
            writing = writer.submit(write_shard, out, encoding, shard, tensors)
        assert writing is not None
        with clock.waiting("disk"):
            writing.result()
    return clock.seconds, clock.spent["images"], clock.spent["disk"]


def _encode_batch(
    images: Tensor,
    bundle: Bundle,
    features: FeatureEncoder | None,
    encoding: Encoding,
    tensors: dict[str, Tensor],
    rows: slice,
    view: str,
) -> None:
    for name, part in zip(bundle.names, bundle.split(bundle.encode(images))):
        tensors[f"latents{view}.{name}"][rows].copy_(part, non_blocking=True)
    if features is not None:
        found = features(images)
        expected = [len(images), *encoding.features_shape]
        if list(found.shape) != expected:
            raise UserError("REPA features", f"shape {list(found.shape)}", f"must be {expected}")
        tensors[f"feats{view}"][rows].copy_(found.to(FEATURES_DTYPE), non_blocking=True)


# --- the command line ------------------------------------------------------------------------------------------------


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``encode`` and ``check-latents``; their namespaces have ``handler`` = the functions below."""
    text = "encode a folder of images (or WebDataset tars) into shards of latents"
    parser = commands.add_parser("encode", help=text, description=text)
    parser.add_argument("where", metavar="DIR", help="folder of class folders, folder of tars, or a glob of tars")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--prepared", type=Path, help="take the representations of this prepared folder")
    parser.add_argument("--representations", metavar="NAMES", help="or these, in order: autoencoder,dino_semantic")
    parser.add_argument("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="of a representation")
    parser.add_argument("--plugin", action="append", default=[], type=Path, help="file that registers representations")
    parser.add_argument("--repa-vit", metavar="NAME", help="also store this timm ViT's features, for REPA")
    parser.add_argument("--repa-weights", metavar="FILE", help="weights of --repa-vit")
    parser.add_argument("--size", type=int, default=256, help="side of the centre crop (%(default)s)")
    parser.add_argument("--grid", type=int, default=16, help="side of the token grid (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=4096, help="images in a shard (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images encoded at once (%(default)s)")
    parser.add_argument("--dtype", default="float32", help=f"of the stored latents: {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--no-flip", action="store_true", help="do not store mirrored images")
    parser.add_argument("--bad", type=Path, metavar="LIST", help="refuse the files of this list of check-images")
    parser.add_argument("--skip-bad", type=Path, metavar="LIST", help="leave out the files of this list")
    parser.add_argument("--backend", default="auto", help="image loader: auto, dali or pil")
    parser.add_argument("--workers", type=int, help="threads of the image loader")
    parser.add_argument("--device", help="default: this rank's GPU if there is one")
    parser.add_argument("--rank", type=int, help="default: RANK or SLURM_PROCID of the environment, else 0")
    parser.add_argument("--world", type=int, help="default: WORLD_SIZE or SLURM_NTASKS of the environment, else 1")
    parser.set_defaults(handler=encode_command)
    text = "verify a folder of encoded latents: hashes, layouts, labels, values and statistics"
    parser = commands.add_parser("check-latents", help=text, description=text)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.set_defaults(handler=check_latents_command)


def encode_command(arguments: argparse.Namespace) -> int:
    """Run ``encode``; 0 when this rank's shards are finished.  Raises UserError."""
    if arguments.repa_weights and not arguments.repa_vit:
        remedy = "needs --repa-vit, the name of its network, such as vit_base_patch14_reg4_dinov2"
        raise UserError("--repa-weights", arguments.repa_weights, remedy)
    rank = _from_environment(arguments.rank, 0, "RANK", "SLURM_PROCID")
    world = _from_environment(arguments.world, 1, "WORLD_SIZE", "SLURM_NTASKS")
    source = require_checked(
        open_source(arguments.where), arguments.skip_bad or arguments.bad, arguments.skip_bad is not None
    )
    local = _from_environment(None, 0, "LOCAL_RANK", "SLURM_LOCALID")
    device = checked_device(arguments.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    bundle, features = _bundle(arguments), None
    if arguments.repa_vit:
        from fastasync.representations.vit import FrozenViT, TokenFeatures

        features = TokenFeatures(FrozenViT(bundle.grid, arguments.repa_vit, arguments.repa_weights or "").to(device))
    report = encode(
        source,
        bundle,
        arguments.out,
        features=features,
        shard_size=arguments.shard_size,
        batch=arguments.batch,
        flip=not arguments.no_flip,
        dtype=arguments.dtype,
        rank=rank,
        world=world,
        device=device,
        backend=arguments.backend,
        workers=arguments.workers,
    )
    left_out = f", {report.left_out} bad files left out" if report.left_out else ""
    state = f"{report.missing} are for other ranks" if report.missing else f"all finished: {arguments.out / INDEX}"
    print(f"encode: {report.made} shards made, {report.kept} kept{left_out}; {state}")
    if report.seconds:
        shares = f"{report.waited / report.seconds:.1%} for images, {report.wrote / report.seconds:.1%} for the disk"
        print(f"encode: {report.seconds:.1f} s after the first batch, of which it waited {shares}")
    return 0


def _bundle(arguments: argparse.Namespace) -> Bundle:
    for path in arguments.plugin:
        load_plugin(path)
    if arguments.prepared is not None:
        return load_prepared(arguments.prepared).bundle
    if arguments.representations is None:
        known = ", ".join(registered())
        remedy = f"give some of {known}, in order (such as autoencoder,dino_semantic), or --prepared FOLDER"
        raise UserError("--representations", "(not given)", remedy)
    names = [name.strip() for name in arguments.representations.split(",")]
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in arguments.option:
        left, equals, value = text.partition("=")
        name, dot, key = left.partition(".")
        if not (equals and dot):
            raise UserError("--option", text, "must be NAME.KEY=VALUE")
        if name not in options:
            raise unknown_name("--option: representation", name, options)
        try:
            options[name][key] = json.loads(value)
        except ValueError:  # not JSON: a plain text, such as a path
            options[name][key] = value
    shape = (3, arguments.size, arguments.size)
    parts = [build(name, shape, arguments.grid, **options[name]) for name in names]
    for part in parts:
        if part.learns:
            remedy = "it learns from the training images, which `encode` does not do: use --prepared RUN/prepared"
            raise UserError(f"representation {part.name}", json.dumps(part.options), remedy)
    return Bundle(parts)


def _from_environment(given: int | None, default: int, *names: str) -> int:
    if given is not None:
        return given
    for name in names:
        if name in os.environ:
            try:
                return int(os.environ[name])
            except ValueError:
                raise UserError(name, repr(os.environ[name]), "must be a whole number") from None
    return default


def check_latents_command(arguments: argparse.Namespace) -> int:
    """Run ``check-latents``: print what is wrong; 0 when nothing is, else 1.  Raises UserError for a bad index."""
    if is_sfd_folder(arguments.directory):
        remedy = "is a folder of SFD or LightningDiT, which has no hashes to compare: training reads it as it is"
        raise UserError("directory", arguments.directory, remedy)
    report = check_latents(arguments.directory)
    for problem in report.problems:
        print(problem)
    count = len(report.problems)
    verdict = f"{count} problem{'s' if count > 1 else ''}" if report.problems else "all as they were written"
    size = f"{report.images:,} images in {report.shards:,} shards, {report.bytes / 1e9:.3g} GB"
    print(f"check-latents: {size}: {verdict}")
    return 1 if report.problems else 0
