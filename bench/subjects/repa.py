"""What REPA costs a training step: off, with features cached in shards, with features that the step makes of images.

The three are whole steps on batches from shards, by turns.  Random weights of the ViT's shape, files in the page cache.
"""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import Bench, WrongResult, paired_overhead, summarize
from bench.subjects.data import FromShards, encoding_of, write_jpegs, write_shards
from bench.workload import configuration, learned_schedule, make_work
from fastasync.config import config_from_dict
from fastasync.data.shard_loader import ShardLatents
from fastasync.errors import UserError
from fastasync.images import ImageSource
from fastasync.representations.vit import DINOV2_B
from fastasync.representations.weights import import_model_package
from fastasync.training.repa import OnlineFeatures

Batch = tuple[Tensor, Tensor, Tensor | None]
STEPS = 10**4  # more than a run of the bench makes


class Without(FromShards):
    """Batches without features."""

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override]
        z, y = self.latents.batch(self.order(number))
        return z, y, None


class Online(FromShards):
    """Batches whose features the ViT makes of their images; each number once, in order."""

    def __init__(self, latents: ShardLatents, batch: int, features: OnlineFeatures):
        super().__init__(latents, batch)
        self.features, self.numbers = features, itertools.count()

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override]
        if number != next(self.numbers):
            raise IndexError(f"batch {number} is asked for out of order")
        z, y = self.latents.batch(self.order(number))
        return z, y, self.features(self.order(number), None)


def run(bench: Bench) -> None:
    try:
        network = import_model_package("timm").create_model("test_vit" if bench.small else DINOV2_B, num_classes=0)
    except UserError as error:
        bench.skip("repa", str(error))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(network.state_dict(), folder / "vit.pth")
        source = write_jpegs(folder / "set", 16 if bench.small else 512)
        steps(bench, folder, source, network.embed_dim)


def steps(bench: Bench, folder: Path, source: ImageSource, width: int) -> None:
    size, batch = ("tiny", 8) if bench.small else ("XL", 256)
    vit = {"repa_vit": "test_vit" if bench.small else DINOV2_B, "repa_vit_weights": str(folder / "vit.pth")}
    given = {"model": {"repa_width": width}, "objective": {**vit, "repa_source": "online"}}
    given["data"] = {"dataset": "latents", "root": str(folder / "latents"), "images": str(folder / "set")}
    online = config_from_dict(given, configuration(size, batch, "ours eager" if bench.small else "ours regional"))
    off = config_from_dict({"model": {"repa_width": 0}, "objective": {"repa_weight": 0.0}}, online)
    count = len(source)
    write_shards(folder / "latents", encoding_of(online, count, min(256, count), source.fingerprint))
    with ExitStack() as stack:

        def shards(features: bool) -> ShardLatents:  # each has a reader of its own, which reads ahead for it alone
            return stack.enter_context(ShardLatents(folder / "latents", bench.device, features=features))

        files = {"off": shards(False), "cached": shards(True), "online": shards(False)}
        features = OnlineFeatures(online, files["online"])
        made = Online(files["online"], batch, features)
        stack.enter_context(features.reading(lambda number: (made.order(number), None), 0, STEPS))
        works = {"off": make_work(off, bench.device, Without(files["off"], batch))}
        works["cached"] = make_work(online, bench.device, FromShards(files["cached"], batch))
        works["online"] = make_work(online, bench.device, made, [works["cached"]])
        schedule = learned_schedule(online)
        calls = {name: lambda work=work: work.step(schedule) for name, work in works.items()}
        for call in calls.values():
            for _ in range(5):  # compiles, tunes
                call()
        waited = features.waited
        inner = 2 if bench.small else 10  # long turns: during the others', images are read ahead
        times = bench.interleaved(calls, rounds=min(max(bench.rounds, 2), 8), inner=inner)
        waited = features.waited - waited
        if any(each.served_directly for each in files.values()):
            raise WrongResult("repa: a batch was not read ahead")
    for name, values in times.items():
        note = ""
        if name != "off":
            cost = paired_overhead(times["off"], values, inner)
            note = f"against off {cost.mean:+.2%}, 95 % interval {cost.low:+.2%} to {cost.high:+.2%}"
        if name == "online":
            note += f"; waited {waited / (sum(values) / 1e3):.2%} of its time for images"
        bench.add("repa", f"step {size}", name, f"batch {batch}", "bf16", summarize(values), images=batch, note=note)
