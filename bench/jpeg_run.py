"""``python -m bench.jpeg_run``: from a folder of JPEGs to scored samples, with the commands of the README.

CIFAR-10 at 64x64 as an ImageFolder of JPEGs -> check-images -> train-semvae -> encode -> check-latents -> probe ->
deepspeed train.py -> sample -> evaluate -> report.  The two networks whose published weights are in no registry are
trained on the same images (bench/jpeg_networks.py).  Every stage is skipped once it is done; stopped anywhere, the same
command continues.  The last lines are a table; --record appends it to bench/results and replaces docs/jpeg-run.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bench.harness import ROOT, commit, device_name
from bench.jpeg_networks import (
    Fit,
    PatchClassifier,
    Pictures,
    autoencoder_loss,
    check_packages,
    classifier_loss,
    fit,
    load_pictures,
    make_autoencoder,
    psnr,
)
from bench.jpeg_table import draw_picture, record, table
from fastasync.cli import main as command_line
from fastasync.data import ImageSet, load_images
from fastasync.errors import UserError
from fastasync.evaluation import (
    ClassifierFeatures,
    FeatureExtractor,
    InceptionFeatures,
    evaluate,
    figures_from,
    load_figures,
    save_figures,
)
from fastasync.files import save_tensors, sha256_file, write_json
from fastasync.representations import build
from fastasync.representations.base import Representation
from fastasync.representations.classifier import Classifier, ClassifierSettings, train_classifier

SIDE, GRID, CHANNELS = 64, 8, 16  # of the images, of the token grid, of each latent
QUALITY, SHARDS = 95, 8
CHUNK = 250  # images at a time in the frozen networks


@dataclass(frozen=True)
class Sizes:
    """How large everything is.  ``vae``, ``vit``, ``semvae`` and ``dit`` end with their steps and batch."""

    images: int
    held_out: int  # test images: what the stand-ins are measured on, and the floor of the figures
    reference: int  # training images that samples are compared with
    samples: int
    nfe: int  # network evaluations of a sample (Heun; one less where the last step is Euler's)
    last_step: float  # local time that Euler takes at the end; 0: Heun to the end
    ranks: int
    precision: str  # of what is trained: bf16 autocast or float32
    ema: float
    budget: float  # of the probe
    vae: tuple[tuple[int, ...], int, int, int]  # widths, layers
    vit: tuple[str, int, int]  # timm's name
    semvae: tuple[int, int, int, int]  # width, depth; it is measured on a tenth of the images, at most 2,000
    dit: tuple[int, int, int, int, int]  # depth, width, heads


# fmt: off
_VIT = "vit_tiny_patch16_224"
SIZES = {
    "tiny": Sizes(60, 20, 40, 20, 4, 0.2, 2, "float32", ema=0.5, budget=1.0, vae=((32, 32, 32, 32), 1, 2, 4),
                  vit=("test_vit", 2, 8), semvae=(16, 1, 4, 8), dit=(1, 32, 2, 4, 8)),
    "cpu": Sizes(4000, 1000, 2000, 1000, 18, 0.0, 2, "bfloat16", ema=0.99, budget=0.05,
                 vae=((32, 64, 64, 64), 1, 1200, 16), vit=(_VIT, 600, 32),
                 semvae=(128, 2, 400, 32), dit=(6, 192, 6, 800, 64)),
    # DeepSpeed's steps are not recorded, so launches bound them: fewer layers, larger batches than in S
    "gpu": Sizes(50000, 10000, 50000, 10000, 50, 0.2, 1, "bfloat16", ema=0.998, budget=0.02,
                 vae=((64, 128, 256, 256), 1, 2500, 64), vit=(_VIT, 1000, 512),
                 semvae=(256, 4, 400, 128), dit=(8, 512, 8, 1500, 1024)),
}
# fmt: on


class Work:
    """The folder of one run: its settings, and what each finished stage took and gave (``stages.json``)."""

    def __init__(self, out: Path, size: str, data: str, inception: str, device: torch.device):
        self.out, self.size, self.sizes, self.device = out, size, SIZES[size], device
        self.data, self.inception = data, inception
        self.images, self.held_out = out / "images", out / "held-out"
        self.vae, self.vit, self.semvae = (
            out / "autoencoder.safetensors", out / "vit.safetensors", out / "semvae" / "semvae.safetensors"
        )  # fmt: skip
        self.latents, self.run, self.reference = out / "latents", out / "run", out / "reference.npz"
        self.record: dict[str, Any] = {"sizes": json.loads(json.dumps(asdict(self.sizes))), "stages": {}}
        if (out / "stages.json").is_file():
            found = json.loads((out / "stages.json").read_text())
            if found["sizes"] != self.record["sizes"]:
                raise UserError("--out", out, f"holds a run of other sizes than {size}: choose another folder")
            self.record = found

    def stage(self, name: str, make: Callable[[], str]) -> None:
        """Do a stage unless it is done; ``make`` returns what it gave, in words.  Its seconds add up over attempts."""
        entry = self.record["stages"].setdefault(name, {"seconds": 0.0, "attempts": 0, "figure": None})
        if entry["figure"] is None:
            print(f"=== {name}", flush=True)
            start, before = time.perf_counter(), entry["seconds"]
            entry["attempts"] += 1
            figure = None
            try:
                figure = make()
            finally:
                date = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
                entry |= {"seconds": before + time.perf_counter() - start, "date": date, "commit": commit()}
                entry["figure"] = figure
                write_json(self.out / "stages.json", self.record)
        print(f"{name}: {entry['seconds']:.1f} s: {entry['figure']}", flush=True)

    # --- what several stages use --------------------------------------------------------------------------------------

    @cached_property
    def train_pictures(self) -> Pictures:
        return load_pictures(self.images, SIDE, self.device)

    @cached_property
    def test_pictures(self) -> Pictures:
        return load_pictures(self.held_out, SIDE, self.device)

    @cached_property
    def autoencoder(self) -> Representation:
        made = build("autoencoder", (3, SIDE, SIDE), GRID, weights=str(self.vae), chunk=CHUNK)
        return made.to(self.device)

    def reconstructed(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 3, S, S] through the autoencoder, on its device."""
        return self.autoencoder.decode(self.autoencoder.encode(images))

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """Inception where its weights and torch-fidelity are there, else a classifier of the same images."""
        try:
            return InceptionFeatures(self.inception, self.device)
        except UserError as error:
            print(f"{error}; scored with a classifier of these images instead: no figure to compare with others")
        file, (pictures, tiny) = self.out / "classifier.safetensors", (self.train_pictures, self.size == "tiny")
        settings = ClassifierSettings((16, 32, 64, 128), steps=2 if tiny else 400, shift=4)
        if not file.exists():
            made = train_classifier(
                pictures.images, pictures.labels, 10, GRID, settings, 1000, mirror=True, device=self.device
            )
            save_tensors(file, made.state_dict())
        model = Classifier((3, SIDE, SIDE), 10, settings.widths, GRID)
        model.load_state_dict(load_file(file))
        return ClassifierFeatures(model.requires_grad_(False), "jpeg-run-classifier", self.device)

    def samples(self) -> Path:
        """The folder that `fastasync sample` wrote."""
        return next(self.run.glob("samples/*/samples.npz")).parent


def fastasync(*words: object) -> None:
    """A command of the command line, printed as it would be typed.  UserError when it fails (it has said why)."""
    line = [str(word) for word in words]
    print(f"$ fastasync {shlex.join(line)}", flush=True)
    if code := command_line(line):
        raise UserError(f"fastasync {line[0]}", f"ended with {code}", "see above; the same command continues here")


# --- the stages, in order ---------------------------------------------------------------------------------------------


def write_jpegs(folder: Path, images: np.ndarray[Any, np.dtype[np.uint8]], indices: Sequence[int]) -> int:
    """Images [N, 3, H, W], upscaled by bicubic interpolation, as JPEGs named by ``indices``; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for image, index in zip(images, indices, strict=True):
        path = folder / f"{index:05d}.jpg"
        picture = Image.fromarray(image.transpose(1, 2, 0)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(path, quality=QUALITY)
        total += path.stat().st_size
    return total


def jpegs(work: Work) -> str:
    """The first images of each class as JPEGs, by a process for each class (forked: without CUDA in it)."""
    total, counts = 0, (work.sizes.images, work.sizes.held_out)
    for split, folder, count in zip(("train", "test"), (work.images, work.held_out), counts):
        found: ImageSet = load_images("cifar10", work.data, split)
        chosen = [
            (found.labels == label).nonzero().flatten()[: count // found.classes] for label in range(found.classes)
        ]
        folders = [folder / name for name in found.class_names]
        images, indices = (found.images[one].numpy() for one in chosen), (one.tolist() for one in chosen)
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
            total += sum(pool.map(write_jpegs, folders, images, indices))
    return f"{counts[0]:,} + {counts[1]:,} JPEGs of {SIDE}x{SIDE}, quality {QUALITY}, {total / 1e6:.1f} MB"


def check_images(work: Work) -> str:
    fastasync("check-images", work.images, "--list", work.out / "bad.txt")
    return "no bad file"


def train_autoencoder(work: Work) -> str:
    """A small AutoencoderKL, saved as diffusers names its weights; the representation reads that."""
    widths, layers, steps, batch = work.sizes.vae
    vae = make_autoencoder(widths, layers, CHANNELS).to(work.device)
    plan = Fit(steps, batch, precision=work.sizes.precision)
    images = work.train_pictures.images
    fit(vae, autoencoder_loss(vae, images), len(images), plan, work.out / "autoencoder.pt", "autoencoder")
    save_tensors(work.vae, vae.state_dict())
    held_out = work.test_pictures.images
    quality = psnr(work.reconstructed(held_out), held_out)
    size = sum(parameter.numel() for parameter in vae.parameters())
    return f"{size / 1e6:.2f} M parameters, {steps:,} steps of {batch}; PSNR {quality:.2f} dB of held-out images"


def train_vit(work: Work) -> str:
    """The stand-in for DINOv2: a ViT trained from nothing to classify these images."""
    name, steps, batch = work.sizes.vit
    model = PatchClassifier(name, 10, GRID).to(work.device)
    plan = Fit(steps, batch, 5e-4, 0.05, work.sizes.precision)
    loss = classifier_loss(model, work.train_pictures)
    fit(model, loss, len(work.train_pictures.images), plan, work.out / "vit.pt", "vit")
    save_tensors(work.vit, model.vit.state_dict())
    right = model.accuracy(work.test_pictures)
    return f"{name}, {steps:,} steps of {batch}, with labels; accuracy {right:.1%} of held-out images"


def train_semvae(work: Work) -> str:
    width, depth, steps, batch = work.sizes.semvae
    measured = min(work.sizes.images // 10, 2000)  # reading images takes most of this stage
    fastasync(
        "train-semvae", "--data", work.images, "--out", work.semvae.parent, "--vit", work.sizes.vit[0],
        "--vit-weights", work.vit, "--size", SIDE, "--grid", GRID, "--channels", CHANNELS, "--width", width,
        "--depth", depth, "--heads", 4, "--steps", steps, "--batch", batch, "--learning-rate", 1e-3, "--warmup", 50,
        "--held-out", measured, "--probe-images", 5 * measured, "--statistics-images", 2 * measured,
        "--save-every", 200, "--device", work.device.type,
    )  # fmt: skip
    quality = json.loads(work.semvae.with_suffix(".json").read_text())["quality"]
    cosine, latents, features = (quality[name] for name in ("held_out_cosine", "probe_latents", "probe_features"))
    return f"cosine {cosine:.3f}; linear probe {latents:.1%} from latents, {features:.1%} from the ViT's mean token"


def encode(work: Work) -> str:
    fastasync(
        "encode", work.images, "--out", work.latents, "--skip-bad", work.out / "bad.txt",
        "--representations", "autoencoder,dino_semantic", "--option", f"autoencoder.weights={work.vae}",
        "--option", f"autoencoder.chunk={CHUNK}", "--option", f"dino_semantic.chunk={CHUNK}",
        "--option", f"dino_semantic.vit={work.sizes.vit[0]}", "--option", f"dino_semantic.vit_weights={work.vit}",
        "--option", f"dino_semantic.semvae={work.semvae}", "--size", SIDE, "--grid", GRID,
        "--shard-size", -(-work.sizes.images // SHARDS), "--batch", CHUNK, "--device", work.device.type,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in work.latents.glob("*.safetensors"))
    return f"{SHARDS} shards, both views, {size / 1e6:.1f} MB"


def check_latents(work: Work) -> str:
    fastasync("check-latents", work.latents)
    return "all as they were written"


def settings(work: Work) -> list[str]:
    """What differs from preset imagenet256-s."""
    depth, width, heads, steps, batch = work.sizes.dit
    inception, large = isinstance(work.extractor, InceptionFeatures), width >= 384
    chosen = {
        "data.root": work.latents, "representations.channels": f"{CHANNELS},{CHANNELS}", "representations.grid": GRID,
        "representations.decoder": work.vae, "model.size": "custom", "model.depth": depth, "model.width": width,
        "model.heads": heads, "model.mlp_multiple": 64 if large else 1, "model.classes": 10,
        "model.repa_width": 0, "objective.repa_weight": 0,
        "train.steps": steps, "train.batch": batch, "train.lr": 8e-4 if large else 1e-3,
        "train.warmup": steps // 20, "train.ema": work.sizes.ema, "train.clip": 1, "train.compile": "off",
        "train.engine": "deepspeed", "train.zero": 1, "train.device": work.device.type,
        "train.precision": {"float32": "fp32", "bfloat16": "bf16"}[work.sizes.precision],
        "train.checkpoint_every": max(steps // 3, 1),
        "probe.depth": max(depth // 3, 1), "probe.width": min(width // 3 // 8 * 8, 128), "probe.heads": 2,
        "probe.batch": batch, "probe.lr": 1e-3, "probe.budget": work.sizes.budget,
        "sample.count": work.sizes.samples, "sample.batch": min(work.sizes.samples, 1000),
        "sample.integrator": "heun_euler" if work.sizes.last_step else "heun",
        "sample.last_step": work.sizes.last_step, "sample.steps": work.sizes.nfe // 2, "evaluate.metrics": "fid",
        "evaluate.features": "inception" if inception else "classifier", "evaluate.weights": work.inception,
        "evaluate.reference": work.reference,
    }  # fmt: skip
    return [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]


def probe(work: Work) -> str:
    fastasync("probe", "--preset", "imagenet256-s", "--out", work.run, *settings(work))
    from fastasync.probe import ProbeResult

    found = ProbeResult.load(work.run / "probe")
    assert found is not None
    share = found.budget["spent_flops"] / found.budget["limit_flops"] * work.sizes.budget
    return f"estimator {found.estimator}, lead {found.schedule.lead():.3f}, {share:.1%} of the run's FLOPs"


def train(work: Work) -> str:
    """`deepspeed train.py`: gloo ranks on a CPU, one process on a GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ranks = 1 if work.device.type == "cuda" else work.sizes.ranks
    launcher = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
    if work.device.type == "cuda":  # with --num_gpus the launcher takes GPU 0, whatever CUDA_VISIBLE_DEVICES says
        visible = (environment.pop("CUDA_VISIBLE_DEVICES", "") or "0").split(",")[0].strip()
        launcher[1:3] = ["--include", f"localhost:{visible}"]
        if not visible.isdigit():  # GPU-..., MIG-...: the launcher counts, torchrun leaves the names to CUDA
            environment["CUDA_VISIBLE_DEVICES"] = visible
            launcher = ["torch.distributed.run", "--nproc-per-node=1", f"--master-port={port}"]
    words = [*launcher, str(ROOT / "train.py"), "--out", str(work.run)]
    print(f"$ python -m {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", *words]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise UserError("deepspeed train.py", f"ended with {code}", "see above; the same command continues here")
    records = [json.loads(line) for line in (work.run / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    return f"{last['step']:,} steps of {work.sizes.dit[-1]}, {ranks} rank(s), ZeRO 1; loss {last['loss']:.3f}"


def reference(work: Work) -> str:
    """Statistics of the reference; the distances of real images, and of these reconstructed, are the floor."""
    chosen = torch.arange(work.sizes.reference) * work.sizes.images // work.sizes.reference  # the same of each class
    statistics = work.extractor.extract(work.train_pictures.images[chosen.to(work.device)]).statistics()
    statistics.save(work.reference)
    real = work.test_pictures.images
    floor, decoder = (
        evaluate(images, statistics, work.extractor)["fid"] for images in (real, work.reconstructed(real))
    )
    return (
        f"FID of {len(real):,} held-out images {floor:.2f}, reconstructed {decoder:.2f}, against {len(chosen):,} "
        f"training images; {work.extractor.name}"
    )


def sample(work: Work) -> str:
    fastasync("sample", "--out", work.run)
    way = f"last step {work.sizes.last_step:g} by Euler" if work.sizes.last_step else "Heun to the end"
    return f"{work.sizes.samples:,} samples, at most {work.sizes.nfe} evaluations, {way}"


def score(work: Work) -> str:
    """`fastasync evaluate`; with the classifier, which a folder of latents does not know, the same from Python."""
    if isinstance(work.extractor, InceptionFeatures):
        fastasync("evaluate", "--out", work.run)
    else:
        from fastasync.evaluation import GaussianStatistics

        folder = work.samples()
        with np.load(folder / "samples.npz") as arrays:
            images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).contiguous()
            evaluations = float(arrays["evaluations"].mean())
        protocol = json.loads((folder / "protocol.json").read_text())
        del protocol["steps"]
        about = {"reference": work.reference.name, "reference_fingerprint": sha256_file(work.reference)}
        result = evaluate(images, GaussianStatistics.load(work.reference), work.extractor)
        figures = figures_from(result, {**protocol, **about, "function_evaluations": evaluations})
        save_figures(work.run / "figures.json", figures)
    return "; ".join(figure.describe() for figure in load_figures(work.run / "figures.json"))


def report(work: Work) -> str:
    fastasync("report", "--out", work.run)
    with np.load(work.samples() / "samples.npz") as arrays:
        samples, labels = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["labels"])
    found = work.test_pictures
    first = torch.stack([(found.labels == label).nonzero()[0, 0] for label in range(len(found.class_names))])
    real = found._replace(images=found.images[first], labels=found.labels[first])
    made = real._replace(images=work.reconstructed(real.images))
    drawn = Pictures(samples, labels, real.class_names)
    draw_picture({"held-out": (real, 1), "decoded": (made, 1), "samples": (drawn, 4)}, work.out / "jpeg-run.png")
    return f"{work.run / 'report.html'} and {work.out / 'jpeg-run.png'}"


STAGES: dict[str, Callable[[Work], str]] = {
    "jpegs": jpegs, "check-images": check_images, "autoencoder": train_autoencoder, "vit": train_vit,
    "train-semvae": train_semvae, "encode": encode, "check-latents": check_latents, "probe": probe, "train": train,
    "reference": reference, "sample": sample, "evaluate": score, "report": report,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.jpeg_run", description=__doc__)
    top.add_argument("--size", choices=SIZES, help="default: gpu where there is one, else cpu")
    top.add_argument("--out", type=Path, help="folder of the run (default runs/jpeg-SIZE)")
    top.add_argument("--data", default="data", help="folder of CIFAR-10 (default data)")
    top.add_argument("--inception", default="weights/inception.pt", help="weights; without them a classifier scores")
    top.add_argument("--record", action="store_true", help="append to bench/results, replace docs/jpeg-run.png")
    chosen = top.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = chosen.size or ("gpu" if device.type == "cuda" else "cpu")
    try:
        check_packages()
        out = chosen.out or Path("runs") / f"jpeg-{size}"
        out.mkdir(parents=True, exist_ok=True)
        work = Work(out, size, chosen.data, chosen.inception, device)
        for name, make in STAGES.items():
            work.stage(name, lambda make=make: make(work))  # type: ignore[misc]
        shape, dtype = f"{work.sizes.images} images 3x{SIDE}x{SIDE}", work.sizes.precision
        rows = table(work.record["stages"], size, device_name(device), shape, dtype)
        if chosen.record:
            print(record(rows, work.out / "jpeg-run.png"))
    except UserError as error:
        print(f"jpeg-run: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("jpeg-run: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage's seconds are kept
    sys.exit(main())
