"""``fastasync encode`` by stage, at ImageNet's sizes: files, decoding, each network, shards, and the whole command.

Random weights of the published shapes (the texture encoder f16d32 in its published layout, DINOv2-B with registers, its
SemVAE), so the speed is real and the latents mean nothing.  Networks run on one view in each precision that encode has;
the whole command encodes both views.  Its note says for how much of the time it waited for images and for the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Bench, Summary, summarize
from bench.subjects.data import write_jpegs
from fastasync.data.shards import Encoding, write_shard
from fastasync.encode import encode
from fastasync.errors import UserError
from fastasync.images import ImageSource, open_images, open_source
from fastasync.images.dali_loader import READERS, READING_THREADS
from fastasync.images.loader import read_ahead
from fastasync.images.read import library
from fastasync.representations import Bundle, build
from fastasync.representations.autoencoder import ldm_state
from fastasync.representations.semvae import SemVAE
from fastasync.representations.semvae_file import save_semvae
from fastasync.representations.train_semvae import SemVAETraining
from fastasync.representations.vit import DINOV2_B, DinoSemantic, FrozenViT
from fastasync.representations.weights import PRECISIONS, import_model_package

CALLS = 5  # of each stage that is timed by the call


def run(bench: Bench) -> None:
    try:
        import_model_package("diffusers")
        import_model_package("timm")
    except UserError as error:
        bench.skip("encode", str(error))
        return
    size, grid, batch, distinct, count = (32, 2, 4, 8, 16) if bench.small else (256, 16, 256, 512, 4096)
    with tempfile.TemporaryDirectory() as folder:
        source = repeated(write_jpegs(Path(folder) / "set", distinct), Path(folder) / "set", count)
        weights = random_weights(Path(folder), grid, bench.small)
        images = reading(bench, source, size, batch)
        for precision in reversed(PRECISIONS):
            if bench.time_is_up(f"encode, networks in {precision}"):
                continue
            bundle = bundle_of(weights, size, grid, precision)
            bundle.to(bench.device)
            distance = ""
            try:
                distance = latent_distance(bundle, source, size, min(batch, 64), bench.device)
            except UserError as error:  # no DALI
                bench.skip("encode, latent distance", str(error))
            networks(bench, bundle, images, precision, distance)
            if not bench.time_is_up(f"encode, whole in {precision}"):
                whole(bench, bundle, source, Path(folder) / precision, batch, precision)
        for where in (folder, "/dev/shm"):
            if os.path.isdir(where) and not bench.time_is_up(f"encode, shards in {where}"):
                with tempfile.TemporaryDirectory(dir=where) as out:
                    shards(bench, Path(out), size, grid, 16 if bench.small else 4096, memory=where == "/dev/shm")


def repeated(source: ImageSource, root: Path, count: int) -> ImageSource:
    """The folder with links to its files until there are ``count``: as many to read, and as large, as that many."""
    for number in range(len(source), count):
        os.link(root / source.path(number % len(source)), root / "class" / f"{number}.jpg")
    return open_source(root)


def random_weights(folder: Path, grid: int, small: bool) -> dict[str, Any]:
    """Options of the representations ``autoencoder`` and ``dino_semantic``; the files are written."""
    torch.manual_seed(0)
    widths, layers = ((32,) * 5, 1) if small else ((128, 128, 256, 256, 512), 2)
    model = import_model_package("diffusers").AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        layers_per_block=layers,
        latent_channels=32,
    )
    torch.save({"state_dict": ldm_state(model)}, folder / "f16d32.ckpt")
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2} if small else {}
    vit = FrozenViT(grid, random_weights=True, model_options=options)
    defaults = SemVAETraining()
    shape = defaults.semvae
    width, depth, heads = (16, 1, 2) if small else (shape.width, shape.depth, shape.heads)
    semvae = SemVAE(vit.map_channels, defaults.channels, grid, width, depth, heads)
    facts = {"vit": {"name": DINOV2_B, "fingerprint": vit.fingerprint()}}
    save_semvae(folder / "semvae.safetensors", semvae, width, depth, heads, facts)
    semantic = {"semvae": str(folder / "semvae.safetensors"), "random_weights": True, "model_options": options}
    return {"autoencoder": {"weights": str(folder / "f16d32.ckpt")}, "dino_semantic": semantic}


def bundle_of(weights: dict[str, Any], size: int, grid: int, precision: str) -> Bundle:
    shape = (3, size, size)
    return Bundle([build(name, shape, grid, precision=precision, **given) for name, given in weights.items()])


def reading(bench: Bench, source: ImageSource, size: int, batch: int) -> Tensor:
    """Time the files and the loader, each after its first batch; the first batch of images."""
    loader = open_images(source, size, batch, device=bench.device)
    threads, count = f"{loader.workers} threads", len(source)

    def timed(batches: Any, name: str, note: str) -> Any:
        batches = iter(batches)
        first, start = next(batches), time.perf_counter()
        deque(batches, maxlen=0)
        bench.synchronize()
        spent = (time.perf_counter() - start) * 1e3 / (count / batch - 1)
        bench.add(
            "encode", "stage", name, f"[{batch}, 3, {size}, {size}]", "uint8", once(spent), images=batch, note=note
        )
        return first

    order = torch.arange(count).split(batch)
    readers = min(loader.workers, READING_THREADS) if library() else 1
    read = read_ahead(order, lambda indices: [source.read_many(indices, readers)], READERS, 1)
    timed(read, "files", f"{readers} threads for each of {READERS} batches")
    return timed(loader, "decode and crop", f"{loader.backend}, {threads}").images


def once(milliseconds: float) -> Summary:
    return summarize([milliseconds])


@torch.no_grad()
def latent_distance(bundle: Bundle, source: ImageSource, size: int, count: int, device: torch.device) -> str:
    """How far the latents of DALI's crops are from those of Pillow's, relative to the latter's size; in words."""
    crops = [
        next(iter(open_images(source, size, count, backend, device=where))).images.to(device)
        for backend, where in (("dali", device), ("pil", "cpu"))
    ]
    found = []
    for part in bundle.representations:
        ours, theirs = (part.encode(images).float() for images in crops)
        found.append(f"{part.name} {float((ours - theirs).norm() / theirs.norm()):.2%}")
    return f"latents of DALI's crops to those of Pillow's: {', '.join(found)}"


def networks(bench: Bench, bundle: Bundle, images: Tensor, precision: str, note: str) -> None:
    """Each network on one view of a batch that is on the device."""
    texture, semantic = bundle.representations
    assert isinstance(semantic, DinoSemantic)
    features = semantic.vit(images)
    calls = {
        "texture encoder": lambda: texture.encode(images),
        "ViT": lambda: semantic.vit(images),
        "SemVAE": lambda: semantic.vae.encode(features),
        "all, one view": lambda: bundle.encode(images),
    }
    with torch.no_grad():
        times = bench.interleaved(calls, rounds=min(bench.rounds, CALLS))
    shape = str(list(images.shape))
    for name, values in times.items():
        text = f"one view; {note}" if note and name.startswith("all") else "one view"
        bench.add("encode", "stage", name, shape, precision, summarize(values), images=len(images), note=text)


def whole(bench: Bench, bundle: Bundle, source: ImageSource, out: Path, batch: int, precision: str) -> None:
    """The command itself, from its first batch on, both views; its shards are smaller than usual to have several."""
    report = encode(
        source, bundle, out, shard_size=max(batch, len(source) // 4), batch=batch, device=bench.device, progress=False
    )
    ms = report.seconds * 1e3 / (len(source) / batch)
    waited, wrote = report.waited / report.seconds, report.wrote / report.seconds
    note = f"both views; waited {waited:.2%} of {report.seconds:.1f} s for images, {wrote:.2%} for the disk"
    shape = f"[{batch}, 3, {bundle.image_shape[1]}, {bundle.image_shape[2]}]"
    bench.add("encode", "whole", "fastasync encode", shape, precision, once(ms), images=batch, note=note)


def shards(bench: Bench, out: Path, size: int, grid: int, count: int, memory: bool) -> None:
    """A shard of both views in float32 and its statistics, hash and record."""
    names, channels = ("texture", "semantic"), (32, 16)
    encoding = Encoding(
        "-", count, 0, ("a",), (3, size, size), grid, names, channels, ("-", "-"), True, "float32", count
    )
    tensors = {name: torch.randn(shape) for name, (_, shape) in encoding.tensors(count).items() if name != "labels"}
    tensors["labels"] = torch.zeros(count, dtype=torch.int64)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        write_shard(out, encoding, 0, tensors)
        times.append((time.perf_counter() - start) * 1e3)
    name = f"shard of {count}, in {'memory' if memory else 'a folder'}"
    shape = f"2 x [{count}, 48, {grid}, {grid}]"
    nbytes = encoding.bytes(count)
    bench.add(
        "encode", "stage", name, shape, "float32", summarize(times), nbytes=nbytes, images=count, note="both views"
    )
