"""Batches of latents, from memory and from shards on a disk, and crops from JPEGs: against what a step asks for.

A pass over a loader is timed from its first batch to its last: starting it is left out, and what it prepared ahead by
then is what it goes on preparing.  Files are new, hence in the page cache: this is not the speed of a disk.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_images
from torch import Tensor

from bench.harness import Bench, Summary, WrongResult, paired_overhead, summarize
from bench.workload import configuration, learned_schedule, make_work
from fastasync.config import Config
from fastasync.data import LatentSet, batch_indices
from fastasync.data.shard_loader import ShardLatents
from fastasync.data.shards import Encoding, begin, finish, write_shard
from fastasync.errors import UserError, require
from fastasync.images import ImageLoader, ImageSource, open_images, open_source

Loader = Callable[[], Iterator[Any]]
PASSES = 5  # at most: they are long
DECIBELS = {"dali cpu": 54.0, "dali gpu": 40.0}  # the least PSNR of a crop to 256, as tests/images/test_dali.py has it


def run(bench: Bench) -> None:
    memory(bench)
    for case in (shards, jpegs, training):
        if not bench.time_is_up(f"data, {case.__name__}"):
            with tempfile.TemporaryDirectory() as folder:
                case(bench, Path(folder))


def memory(bench: Bench) -> None:
    count, batch, grid = (256, 32, 4) if bench.small else (65536, 256, 16)
    z = torch.randn(count, 48, grid, grid, device=bench.device)
    labels = torch.randint(1000, (count,), device=bench.device)
    latents = LatentSet(z, labels, 1000, z.flip(-1))
    step = [0]

    def load() -> None:
        where = batch_indices(step[0], batch, count, 0)
        step[0] += 1
        flips = (torch.arange(batch, device=bench.device) % 2).bool()
        latents.batch(where.to(bench.device), flips)

    times = summarize(bench.interleaved({"memory": load}, warm=2)["memory"])
    nbytes, shape = 2 * batch * 48 * grid**2 * 4, f"[{batch}, 48, {grid}, {grid}]"
    bench.add("data", "batch", "in memory", shape, "float32", times, nbytes=nbytes, images=batch)


def passes(bench: Bench, loaders: Mapping[str, Loader], batches: Mapping[str, int]) -> dict[str, Summary]:
    """Milliseconds a batch, of loaders of so many ``batches``; by turns."""

    def turns(make: Loader) -> Iterator[Any]:  # of which every other one is timed
        while True:
            loader = make()
            yield next(loader)
            yield deque(loader, maxlen=0)

    calls = {name: turns(make).__next__ for name, make in loaders.items()}
    times = bench.interleaved(calls, rounds=min(bench.rounds, PASSES))
    return {name: summarize([ms / (batches[name] - 1) for ms in values]) for name, values in times.items()}


def write_shards(folder: Path, encoding: Encoding) -> None:
    """A finished folder of normal latents and features."""
    begin(folder, encoding)
    size, classes = encoding.shard_size, len(encoding.class_names)
    for shard in range(encoding.shards):
        wanted = {name: kind for name, kind in encoding.tensors(size).items() if name != "labels"}
        tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in wanted.items()}
        write_shard(folder, encoding, shard, tensors | {"labels": torch.randint(classes, (size,))})
    finish(folder, encoding)


class OpensEachSample(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """What the peers' loaders do: open the shard, slice one sample, normalise it."""

    def __init__(self, folder: Path, latents: ShardLatents):
        self.folder, self.encoding = folder, latents.index.encoding
        statistics = latents.statistics
        self.mean, self.std = (torch.tensor(v).reshape(-1, 1, 1) for v in (statistics.mean, statistics.std))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shard, row = divmod(index, self.encoding.shard_size)
        with safe_open(self.folder / self.encoding.file(shard), framework="pt", device="cpu") as file:
            parts = [file.get_slice(f"latents.{name}")[row] for name in self.encoding.names]
            return (torch.cat(parts) - self.mean) / self.std, file.get_slice("labels")[row : row + 1][0]


def shards(bench: Bench, folder: Path) -> None:
    """imagenet256-xl's latents on one thread; the aim is 5 times a loader that opens each sample."""
    count, batch, size = (512, 64, 32) if bench.small else (4096, 256, 256)
    names, channels, classes = ("texture", "semantic"), (32, 16), tuple("0123456789")
    encoding = Encoding("-", count, 0, classes, (3, 256, 256), 16, names, channels, ("-", "-"), False, "float32", size)
    write_shards(folder, encoding)
    batches = [batch_indices(step, batch, count, 0) for step in range(min(count // batch, 9))]
    latents = ShardLatents(folder, bench.device)
    opens, order = OpensEachSample(folder, latents), [indices.tolist() for indices in batches]
    loader = torch.utils.data.DataLoader(opens, batch_sampler=order, pin_memory=bench.device.type == "cuda")

    def ahead() -> Iterator[Any]:
        latents.prefetch(lambda n: (batches[n], None), 0, len(batches), workers=1)
        yield from map(latents.batch, batches)
        latents.close()

    loaders: dict[str, Loader] = {
        "opens each sample": lambda: ([part.to(bench.device, non_blocking=True) for part in pair] for pair in loader),
        "shards, direct": lambda: map(latents.batch, batches),
        "shards, ahead": ahead,
    }
    for (truth, labels), *others in zip(*(list(make()) for make in loaders.values())):
        if not all(torch.allclose(z, truth, 1e-6, 1e-6) and torch.equal(y, labels) for z, y in others):
            raise WrongResult("data, cached latents: not the samples of the files")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = passes(bench, loaders, dict.fromkeys(loaders, len(batches)))
    torch.set_num_threads(threads)
    for name, found in times.items():
        note = f"{times['opens each sample'].median / found.median:.1f} times opening each sample"
        bench.add("data", "cached latents", name, f"[{batch}, 48, 16, 16]", "float32", found, images=batch, note=note)


def write_jpegs(folder: Path, count: int, large: int = 0) -> ImageSource:
    """JPEGs of ImageNet's usual size, 500 x 375, from scikit-learn's photographs; every ``large``-th is 1000 x 750."""
    (folder / "class").mkdir(parents=True)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    for number in range(count):
        left, top = 11 * number % 140, 7 * number % 52
        crop = photos[number % 2].crop((left, top, left + 500, top + 375))
        if large and number % large == 0:
            crop = crop.resize((1000, 750), Image.Resampling.BICUBIC)
        crop.save(folder / "class" / f"{number}.jpg", quality=(90, 95)[number // 2 % 2], subsampling=2)
    return open_source(folder)


def psnr(found: Tensor, expected: Tensor) -> Tensor:
    """Decibels of each image uint8 [n, ...] to the expected one, float64 [n]."""
    return 10 * torch.log10(255**2 / (found.cpu() - expected.cpu().double()).square().flatten(1).mean(1))


def jpegs(bench: Bench, folder: Path) -> None:
    """Decoded, and ADM's crop to 256.

    The pass on the GPU is longer: it comes after seconds in which the GPU has idled, and its clocks take a tenth of a
    second to rise.
    """
    count, batch, batches, longest = (16, 16, 5, 5) if bench.small else (512, 256, 17, 257)
    source, names = write_jpegs(folder, count), ["pillow"]
    try:
        require("nvidia.dali", "dali")
        names += ["dali cpu"] if bench.small else ["dali cpu", "dali gpu"]
    except UserError as error:
        bench.skip("data, JPEG decoding with DALI", str(error))

    lengths = {name: longest if name == "dali gpu" else batches for name in names}

    def crops(name: str, order: Tensor) -> ImageLoader:
        device = "cuda" if name == "dali gpu" else "cpu"
        return open_images(source, 256, batch, "pil" if name == "pillow" else "dali", order=order, device=device)

    orders = {name: torch.arange(batch * length) % count for name, length in lengths.items()}
    loaders = {name: crops(name, order) for name, order in orders.items()}
    notes = {name: f"{loaders[name].workers} threads" for name in names}
    for name in names[1:]:
        pairs = zip(crops(name, torch.arange(count)), crops("pillow", torch.arange(count)))
        decibels = torch.cat([psnr(one.images, other.images) for one, other in pairs])
        if not decibels.min() >= DECIBELS[name]:
            raise WrongResult(f"{name}: {decibels.min():.1f} dB to Pillow's crop, must be {DECIBELS[name]} or more")
        notes[name] += f", PSNR to Pillow's {decibels.min():.1f} to {decibels.max():.1f} dB"
    times = passes(bench, {name: loader.__iter__ for name, loader in loaders.items()}, lengths)
    for name, found in times.items():
        shape = f"[{batch}, 3, 256, 256]"
        bench.add("data", "JPEG to 256", name, shape, "uint8", found, images=batch, note=notes[name])


def encoding_of(config: Config, count: int, shard_size: int, images: str = "-") -> Encoding:
    """Of shards that a configuration trains on, with REPA's features; ``images``: the fingerprint of their images."""
    reps, model = config.representations, config.model
    classes, features = tuple(map(str, range(model.classes))), ((reps.grid // model.patch) ** 2, model.repa_width)
    shape, made_by = (3, 16 * reps.grid, 16 * reps.grid), ("-",) * len(reps.names)
    kinds = (reps.grid, reps.names, reps.channels, made_by, False, "float32", shard_size, "-", features)
    return Encoding(images, count, 0, classes, shape, *kinds)


class FromShards(Sequence[tuple[Tensor, Tensor, Tensor | None]]):
    """The batches of a training run, as its loop gets them from shards."""

    def __init__(self, latents: ShardLatents, batch: int):
        self.latents, self.batch = latents, batch
        latents.prefetch(lambda number: (self.order(number), None), 0, len(self))

    def order(self, number: int) -> Tensor:
        return batch_indices(number, self.batch, len(self.latents), 0)

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        indices, device = self.order(number), self.latents.device
        z, y = self.latents.batch(indices)
        assert self.latents.features is not None
        return z, y, self.latents.features(indices, None).to(device, non_blocking=True)


def training(bench: Bench, folder: Path) -> None:
    """A training step on batches from shards, REPA's features with them, in pairs with the same step on four batches
    in memory: what it waits for."""
    size, batch, count, shard = ("tiny", 8, 64, 16) if bench.small else ("XL", 256, 4096, 256)
    config = configuration(size, batch, "ours eager" if bench.small else "ours regional")
    write_shards(folder, encoding_of(config, count, shard))
    with ShardLatents(folder, bench.device, features=True) as files:
        read = FromShards(files, batch)
        memory = make_work(config, bench.device, [read[number] for number in range(4)])
        works = {"in memory": memory, "from shards": make_work(config, bench.device, read, [memory])}
        schedule = learned_schedule(config)
        calls = {name: lambda work=work: work.step(schedule) for name, work in works.items()}
        for call in calls.values():
            for _ in range(5):  # compiles, tunes
                call()
        # long turns: during the other's, batches are read ahead
        inner = 3 if bench.small else 10
        times = bench.interleaved(calls, rounds=min(max(bench.rounds, 2), 8), inner=inner)
    overhead = paired_overhead(times["in memory"], times["from shards"], inner)
    note = f"overhead {overhead.mean:+.2%}, 95 % interval {overhead.low:+.2%} to {overhead.high:+.2%}"
    for name, values in times.items():
        extra = note if name == "from shards" else ""
        bench.add("data", f"step {size}", name, f"batch {batch}", "bf16", summarize(values), images=batch, note=extra)
