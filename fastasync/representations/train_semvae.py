"""``fastasync train-semvae``: a SemVAE from images through a frozen ViT, or from cached features.

The output folder holds ``metrics.jsonl`` and ``.csv``, ``tensorboard/``, the newest checkpoint (``state.json`` names
it) and, once finished, ``semvae.safetensors`` with ``semvae.json``: what the representation ``dino_semantic`` reads.
Batches, noise and learning rate are pure functions of seed and step, so a resumed run continues as if it had not
stopped.

Under a launcher each rank trains on its part of every batch and the gradients are averaged: the same numbers on any
number of ranks, but for the order of sums.  Rank 0 alone measures, evaluates, writes and prints.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from fastasync_kernels.reference import philox_normal
from torch import Tensor, distributed, nn
from tqdm import tqdm

from fastasync.data.order import batch_indices, epoch_order
from fastasync.distributed import explained_loss, quiet_elsewhere, session
from fastasync.errors import UserError
from fastasync.files import digest_tensors, load_tensors, remove_partials, save_tensors, write_json
from fastasync.representations.semvae import SemVAE, SemVAESettings, semvae_losses
from fastasync.representations.semvae_file import load_semvae, save_semvae
from fastasync.representations.statistics import StreamingStatistics
from fastasync.representations.vit import DINOV2_B, FrozenViT
from fastasync.representations.weights import PRECISIONS, autocast, check_precision, checked_device

FORMAT = 1
STATE, WEIGHTS = "state.json", "semvae.safetensors"
KEYS = ("feats", "feats_dino")  # of our shards; of SFD's
TERMS = ("mse", "cosine", "kl", "grad_norm")
NOISE_STREAM = 0
_READERS = 4  # threads that read cached features
RIDGE = 0.1  # of the linear probe, relative to the variance of the standardised inputs

_IMAGENET = SemVAESettings(768, 4, 12, steps=100_000, batch=256, learning_rate=2e-4)


@dataclass(frozen=True)
class SemVAETraining:
    """How a SemVAE is trained.

    ``semvae``: architecture, steps, batch, peak learning rate (linear warm-up, then a cosine to zero) and KL weight.
    ``held_out``: images kept for evaluation (at most a tenth of the set); ``probe_images``: training images that the
    linear probe is fitted on; ``statistics_images``: those that the features are standardised by.
    """

    semvae: SemVAESettings = _IMAGENET
    channels: int = 16
    warmup: int = 1000
    seed: int = 0
    precision: str = "float32"
    held_out: int = 5000
    probe_images: int = 10_000
    statistics_images: int = 10_000
    log_every: int = 100
    save_every: int = 1000
    evaluate_every: int = 10_000

    def __post_init__(self) -> None:
        check_precision("train-semvae", self.precision)
        for name in ("steps", "batch", "width", "depth"):
            if getattr(self.semvae, name) < 1:
                raise UserError(name, getattr(self.semvae, name), "must be at least 1")
        if self.warmup < 0:
            raise UserError("warmup", self.warmup, "must be at least 0")
        if not 0 <= self.semvae.kl_weight < math.inf:
            raise UserError("KL weight", self.semvae.kl_weight, "must be at least 0")
        for name in ("channels", "held_out", "probe_images", "statistics_images", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 1")
        if not 0 < self.semvae.learning_rate < math.inf:
            raise UserError("learning rate", self.semvae.learning_rate, "must be positive")

    def learning_rate(self, step: int) -> float:
        """Of 0-based ``step``: peak * (step + 1) / warmup, then peak * (1 + cos(pi * progress)) / 2."""
        warmup, steps = min(self.warmup, self.semvae.steps // 10), self.semvae.steps
        if step < warmup:
            return self.semvae.learning_rate * (step + 1) / warmup
        return self.semvae.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class FeatureSource(Protocol):
    """Frozen features of N labelled images, by index.

    ``labels`` int64 [N] (CPU); ``fingerprint`` of the network that makes the features, None if unknown; ``data``: what
    tells the images from others.
    """

    labels: Tensor
    feature_dim: int
    grid: int
    fingerprint: str | None
    data: str

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each batch of indices int64 [b]: floating-point features [b, feature_dim, grid, grid], anywhere."""
        ...


class ImageFeatures:
    """Features of images that pass through a frozen ViT.

    ``loader(batches)`` gives, for each batch of indices in order, the images uint8 [b, 3, S, S] (or a tuple that starts
    with them): such as ``lambda batches: open_images(source, 256, 64, batches=batches)``.
    """

    def __init__(
        self, loader: Callable[[Iterable[Tensor]], Iterable[Any]], labels: Tensor, vit: FrozenViT, data: str = ""
    ):
        self.loader, self.labels, self.vit, self.data = loader, labels, vit, data
        self.feature_dim, self.grid = vit.map_channels, vit.grid
        self.fingerprint: str | None = vit.fingerprint()

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in self.loader(batches):
            yield self.vit(batch if isinstance(batch, Tensor) else batch[0])


class CachedFeatures:
    """Features in a folder of safetensors shards: ours (``feats``, [n, tokens, D]) or SFD's (``feats_dino``, a map).

    Shards are mapped, in the order of their names.  UserError when there are none, or they differ in what they hold.
    """

    def __init__(self, directory: str | Path, fingerprint: str | None = None):
        from fastasync.data.shards import INDEX, MappedFile, read_index

        folder = Path(directory)
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UserError("--features", directory, "no safetensors files in it: give a folder of cached features")
        files = [MappedFile(path, "make it again") for path in paths]
        key = next((key for key in KEYS if key in files[0].tensors), None)
        if key is None:
            raise UserError(str(paths[0]), f"neither {' nor '.join(KEYS)} in it", "give a folder of cached features")
        self.parts: list[Tensor] = []
        labels = []
        for file in files:
            features, found = file.tensors.get(key), file.tensors.get("labels")
            like = files[0].tensors[key].shape[1:]
            if features is None or found is None or features.shape[1:] != like or len(found) != len(features):
                raise UserError(str(file.path), f"no `{key}` and `labels` like the first shard's", "make it again")
            self.parts.append(features)
            labels.append(found.long())
        self.labels = torch.cat(labels)
        self.data = digest_tensors({}, [(file.path.name, file.size) for file in files])
        self._ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        shape = self.parts[0].shape
        self.feature_dim = shape[1] if len(shape) == 4 else shape[-1]
        self.grid = shape[-1] if len(shape) == 4 else math.isqrt(shape[1])
        if self._map(self.parts[0][:0]).shape[1:] != (self.feature_dim, self.grid, self.grid):
            raise UserError(f"{paths[0]}: {key}", list(shape), "must be [n, D, grid, grid] or [n, grid * grid, D]")
        recorded = read_index(folder).encoding.features if (folder / INDEX).exists() else ""
        self.fingerprint = recorded or fingerprint
        if fingerprint and fingerprint != self.fingerprint:
            what = f"fingerprint {fingerprint[:12]}, the features were made by {recorded[:12]}"
            raise UserError("--vit-weights", what, "give the weights that the features were made with")

    def _map(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            return features
        side = math.isqrt(features.shape[1])
        shape = (len(features), features.shape[2], side, side)
        return features.transpose(1, 2).reshape(shape) if side**2 == features.shape[1] else features

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        from fastasync.images.loader import read_ahead

        for _, rows in read_ahead(batches, self._rows, _READERS):
            yield self._map(torch.stack(rows))

    def _rows(self, indices: list[int]) -> list[Tensor]:
        """Copies of the features of some images, as they are stored."""
        shards = torch.searchsorted(self._ends, torch.tensor(indices), right=True).tolist()
        starts = [int(self._ends[shard]) - len(self.parts[shard]) for shard in shards]
        return [self.parts[shard][index - start].clone() for shard, start, index in zip(shards, starts, indices)]


def train(
    source: FeatureSource,
    out: str | Path,
    training: SemVAETraining,
    vit: dict[str, Any],
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train, or continue, in the folder ``out``; returns the content of ``semvae.json``.

    ``vit``: the facts on the network behind the features ({"name": ...}).  On SIGTERM or SIGINT it saves and raises
    Interrupted.  Every rank of a launcher calls it.  UserError: the folder is of another run, the set is too small, the
    batch does not divide over the ranks, the loss is not finite.
    """
    from fastasync.training.interrupt import StopSignal, only_process
    from fastasync.training.metrics import MetricsLog
    from fastasync.training.out_of_memory import explained_batch

    out, device, here = Path(out), torch.device(device), session()
    if training.semvae.batch % here.world:
        nearest = max(round(training.semvae.batch / here.world), 1) * here.world
        raise UserError("batch", training.semvae.batch, f"must divide into {here.world} ranks; nearest: {nearest}")
    facts = {"vit": {**vit, "fingerprint": source.fingerprint}, "training": json.loads(json.dumps(asdict(training)))}
    with ExitStack() as stack:
        here.main_only(lambda: stack.enter_context(only_process(out)))
        here.main_only(lambda: remove_partials(out))
        if here.world > 1:
            here.start_group(device)
        stack.enter_context(explained_loss())
        other = " (another training: give a new --out), or more ranks, which divide it"
        stack.enter_context(explained_batch("--batch", training.semvae.batch, device, other, parts=here.world))
        run = _Run(source, out, training, facts, device)
        if here.from_main((out / WEIGHTS).exists) and run.step == training.semvae.steps:
            return load_semvae(out / WEIGHTS)[1]
        if not run.step:
            run.measure_features(progress)
        log = stack.enter_context(MetricsLog(out, run.step)) if here.is_main else None
        hidden, total = not (progress and here.is_main), training.semvae.steps
        bar = stack.enter_context(tqdm(desc="SemVAE", total=total, initial=run.step, disable=hidden))
        quality = run.steps(log, stack.enter_context(StopSignal(launched=here.world > 1)), bar)
        content = {**facts, "quality": quality}
        shape = training.semvae
        here.main_only(lambda: save_semvae(out / WEIGHTS, run.vae, shape.width, shape.depth, shape.heads, content))
        return load_semvae(out / WEIGHTS)[1]


class _Run:
    """One training: its networks, its place, and the folder it is saved in."""

    def __init__(
        self, source: FeatureSource, out: Path, training: SemVAETraining, facts: dict[str, Any], device: torch.device
    ):
        self.source, self.out, self.training, self.device = source, out, training, device
        self.rank, self.world = session().rank, session().world
        s, count = training.semvae, len(source.labels)
        held_out = min(training.held_out, count // 10)
        if held_out < 1 or count - held_out < s.batch:
            need = max(10, -(-10 * s.batch // 9))
            raise UserError("images", count, f"too few for a batch of {s.batch}: give {need} or lower the batch")
        order = epoch_order(training.seed, 0, count)  # shuffled: sets are often sorted by class
        self.held_out, self.images = order[:held_out], order[held_out:]
        labels = {"labels": source.labels}
        data = digest_tensors(labels, source.data, source.feature_dim, source.grid)
        self.identity = {**facts, "images": count, "data": data}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            vae = SemVAE(source.feature_dim, training.channels, source.grid, s.width, s.depth, s.heads)
        self.vae = vae.to(device)
        self.parameters = list(self.vae.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0)
        self.tally = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)  # sums and their count
        self.step = 0
        if (out / STATE).exists():
            self._resume()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint; returns its path.  The previous one is removed only then."""
        tensors = {f"vae.{name}": value for name, value in self.vae.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        path = self.out / f"checkpoint-{self.step:08d}.safetensors"
        sha256 = save_tensors(path, {**tensors, "tally": self.tally})
        content = {"format": FORMAT, "identity": self.identity, "step": self.step, "file": path.name, "sha256": sha256}
        write_json(self.out / STATE, content)
        for old in self.out.glob("checkpoint-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
        return path

    def _resume(self) -> None:
        remedy = f"delete the folder {self.out} and train again"
        try:
            content = json.loads((self.out / STATE).read_text())
            identity, step, file, sha256 = (content[key] for key in ("identity", "step", "file", "sha256"))
        except (ValueError, KeyError, TypeError):
            raise UserError(str(self.out / STATE), "not readable", remedy) from None
        for key, value in self.identity.items():
            if identity.get(key) != value:
                what = _difference(key, identity.get(key), value)
                raise UserError(str(self.out), what, "choose another --out, or delete this folder")
        tensors = load_tensors(self.out / file, sha256, remedy)
        self.vae.load_state_dict({k.removeprefix("vae."): v for k, v in tensors.items() if k.startswith("vae.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.tally = tensors["tally"].to(self.device)
        self.step = step

    # --- training ---------------------------------------------------------------------------------------------------

    def _features(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for features in self.source.stream(batches):
            yield features.to(self.device).float()  # moved first: fewer bytes where they are stored in half precision

    def measure_features(self, progress: bool) -> None:
        """Set the mean and std that the features are standardised by, from some of the training images."""

        def measure() -> tuple[Tensor, Tensor]:
            statistics = StreamingStatistics(self.source.feature_dim)
            parts = self.images[: self.training.statistics_images].split(self.training.semvae.batch)
            for features in tqdm(self._features(parts), "feature statistics", len(parts), disable=not progress):
                statistics.update(features)
            return statistics.result()

        mean, std = session().from_main(measure)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise UserError("features", "NaN or infinity", "check the ViT's weights and precision")
        self.vae.feature_mean.copy_(mean.view(1, -1, 1, 1))
        self.vae.feature_std.copy_(std.clamp(min=1e-6).view(1, -1, 1, 1))  # one that never varies stays zero

    def steps(self, log: Any, stop: Any, bar: tqdm) -> dict[str, float]:
        """Train to the last step; returns the last evaluation.  ``log`` is rank 0's."""
        from fastasync.training.interrupt import Interrupted

        t, total, here = self.training, self.training.semvae.steps, session()
        count, batch = len(self.images), t.semvae.batch
        mine = torch.arange(batch).tensor_split(self.world)[self.rank]
        batches = (self.images[batch_indices(step, batch, count, t.seed)[mine]] for step in range(self.step, total))
        quality: dict[str, float] = {}
        start, done = time.perf_counter(), 0
        for features in self._features(batches):
            stopping = self._train_on(features, mine, stop.received is not None)
            done += batch
            last = self.step == total
            evaluating = last or (t.evaluate_every > 0 and self.step % t.evaluate_every == 0)
            saving = last or stopping or self.step % t.save_every == 0
            if self.step % t.log_every == 0 or evaluating:
                record = self._means()
                bar.set_postfix(mse=f"{record['mse']:.4f}", cosine=f"{record['cosine']:.4f}", refresh=False)
                record["images_per_s"] = done / max(time.perf_counter() - start, 1e-9)
                if evaluating:
                    quality = here.from_main(self.evaluate)
                if log is not None:
                    log.write({"step": self.step, **record, **quality} if evaluating else {"step": self.step, **record})
                start, done = time.perf_counter(), 0
            if saving:
                self._check_finite()
                if log is not None:
                    log.sync()
                path = here.from_main(self.save)
                if stopping and not last:
                    raise Interrupted(self.step, path)
            bar.update()
        # none: resumed after the last step, killed before the weights were written
        return quality or here.from_main(self.evaluate)

    def _train_on(self, features: Tensor, places: Tensor, stopping: bool) -> bool:
        """A step on this rank's part of the batch, the images at ``places``; whether any rank is ``stopping``."""
        t = self.training
        lr = t.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shape = (len(features), t.channels, self.source.grid, self.source.grid)
        places = places.to(self.device)
        noise = philox_normal(t.seed, self.step, places, math.prod(shape[1:]), stream=NOISE_STREAM).view(shape)
        with autocast(self.device, t.precision):
            mse, cosine, kl = semvae_losses(self.vae, features, noise)
        loss = mse + (1.0 - cosine) + t.semvae.kl_weight * kl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        terms = [mse.detach(), cosine.detach(), kl.detach()]
        if self.world > 1:
            *terms, stopped = self._average([*terms, torch.tensor(float(stopping), device=self.device)])
            stopping = float(stopped) > 0
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        row = torch.stack([*terms, norm.detach()]).double()
        self.tally = self.tally + torch.cat([row, row.new_ones(1)])
        self.step += 1
        return stopping

    def _average(self, values: list[Tensor]) -> list[Tensor]:
        """Average the gradients over the ranks, in place, and the numbers ``values``, with one collective."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([part.flatten().float() for part in (*grads, *values)])
        distributed.all_reduce(flat)
        parts = flat.div_(self.world).split([part.numel() for part in (*grads, *values)])
        for grad, part in zip(grads, parts):
            grad.copy_(part.view_as(grad))
        return [part.view(()) for part in parts[len(grads) :]]

    def _means(self) -> dict[str, float]:
        """Means of the terms since the last record.  UserError when one is not finite."""
        self._check_finite()
        values = (self.tally[:-1] / self.tally[-1]).tolist()
        self.tally = torch.zeros_like(self.tally)
        return dict(zip(TERMS, values))

    def _check_finite(self) -> None:
        if not self.tally.isfinite().all():
            remedy = "lower the learning rate, or use --precision float32; the last checkpoint is intact"
            raise UserError("train-semvae: loss", f"not finite by step {self.step}", remedy)

    # --- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out images, from the posterior's mean: reconstruction of standardised features, and linear probes.

        A probe is fitted on training images; ``probe_latents`` reads all of a latent, ``probe_features`` the mean over
        the tokens of the ViT's features: what is to be kept.  Left out where fewer than two classes are seen.
        """
        fit, batch = self.images[: self.training.probe_images], self.training.semvae.batch
        latents, pooled = {}, {}
        terms = torch.zeros(3, dtype=torch.float64)
        for name, indices in (("fit", fit), ("held_out", self.held_out)):
            seen: list[tuple[Tensor, Tensor]] = []
            for features in self._features(indices.split(batch)):
                with autocast(self.device, self.training.precision):
                    seen.append((self.vae.encode(features).float().flatten(1), features.mean((2, 3))))
                    if name == "held_out":
                        losses = semvae_losses(self.vae, features)
                        terms += torch.stack([value.double().cpu() for value in losses]) * len(features)
            latents[name], pooled[name] = (torch.cat(values) for values in zip(*seen))
        if not terms.isfinite().all():
            raise UserError("features of held-out images", "NaN or infinity", "check the ViT's weights and precision")
        means = (terms / len(self.held_out)).tolist()
        quality = dict(zip(("held_out_mse", "held_out_cosine", "held_out_kl"), means))
        labels = self.source.labels
        if len(labels[fit].unique()) > 1:
            known, wanted = labels[fit].to(self.device), labels[self.held_out].to(self.device)
            for name, values in (("probe_latents", latents), ("probe_features", pooled)):
                quality[name] = ridge_accuracy(values["fit"], known, values["held_out"], wanted)
        return quality


def ridge_accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, ridge: float = RIDGE) -> float:
    """Accuracy on (x_test, y_test) of a linear classifier fitted to (x, y): ridge regression of one-hot labels, exact.

    x float [N, D], standardised per column here; y int64 [N].  W = (X'X + ridge N I)^-1 X'Y, or its dual where N < D.
    """
    x, x_test = x.double(), x_test.double()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-12)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    known, targets = y.unique(return_inverse=True)
    onehot = nn.functional.one_hot(targets, len(known)).double()
    bias = onehot.mean(0)
    dual = len(x) < x.shape[1]
    gram = x @ x.T if dual else x.T @ x
    gram.diagonal().add_(ridge * len(x))
    right = onehot - bias
    weights = x.T @ torch.linalg.solve(gram, right) if dual else torch.linalg.solve(gram, x.T @ right)
    return float((known[(x_test @ weights + bias).argmax(1)] == y_test).double().mean())


def _difference(key: str, found: object, asked: object) -> str:
    """What of an identity differs, down to the field."""
    while isinstance(found, dict) and isinstance(asked, dict):
        name = next((name for name in asked if found.get(name) != asked[name]), None)
        if name is None:
            break
        key, found, asked = f"{key} {name}", found.get(name), asked[name]
    return f"was trained with {key} {str(found)[:40]}, asked for {str(asked)[:40]}"


# --- command line ---------------------------------------------------------------------------------------------------


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``train-semvae`` to the command line's subparsers; its namespace has ``handler`` = train_semvae_command."""
    text = "train the SemVAE that compresses a frozen ViT's features to the semantic latent; runs under torchrun too"
    parser = commands.add_parser("train-semvae", help=text, description=text)
    add, default = parser.add_argument, SemVAETraining()
    shape = default.semvae
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", metavar="IMAGES", help="folder of class folders, folder of tars, or a glob of tars")
    data.add_argument("--features", metavar="DIR", help="folder of shards with cached features")
    add("--out", type=Path, required=True, help="output folder; run again to continue")
    add("--vit", default=DINOV2_B, metavar="NAME", help="timm model, or entry of --hub (default %(default)s)")
    add("--vit-weights", default="", metavar="FILE", help="its weights; with --features only compared")
    add("--hub", default="", metavar="DIR", help="folder of a torch.hub repository instead of timm")
    add("--size", type=int, default=256, help="side of the images (default %(default)s)")
    add("--grid", type=int, default=16, help="side of the token grid (default %(default)s)")
    add("--channels", type=int, default=default.channels, help="of the latent (default %(default)s)")
    add("--width", type=int, default=shape.width, help="of the transformers (default %(default)s)")
    add("--depth", type=int, default=shape.depth, help="blocks of each (default %(default)s)")
    add("--heads", type=int, default=shape.heads, help="attention heads; 0: an MLP (default %(default)s)")
    add("--steps", type=int, default=shape.steps, help="(default %(default)s)")
    add("--batch", type=int, default=shape.batch, help="(default %(default)s)")
    add("--learning-rate", type=float, default=shape.learning_rate, help="peak (default %(default)s)")
    add("--kl-weight", type=float, default=shape.kl_weight, help="(default %(default)s)")
    for name in ("warmup", "seed", "held_out", "probe_images", "statistics_images"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name), help="(default %(default)s)")
    for name in ("log_every", "save_every", "evaluate_every"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name), help="steps (default %(default)s)")
    add("--precision", choices=PRECISIONS, default=default.precision, help="of both networks (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--backend", default="auto", help="image loader: auto, dali or pil (default %(default)s)")
    add("--workers", type=int, help="threads that decode (default: one for each CPU)")
    add("--skip-bad", metavar="LIST", help="leave out the files in a list of `fastasync check-images`")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    parser.set_defaults(handler=train_semvae_command)
    return parser


def train_semvae_command(arguments: argparse.Namespace) -> int:
    """Run ``train-semvae``; prints the quality reached and where the weights are; 0.  Raises UserError."""
    a = arguments
    checked_device(a.device)
    if a.device == "cuda":
        from fastasync.training.build import choose_device

        a.device = choose_device("cuda")  # this rank's
    semvae = SemVAESettings(a.width, a.depth, a.heads, a.steps, a.batch, a.learning_rate, a.kl_weight)
    settings = {entry.name: getattr(a, entry.name) for entry in fields(SemVAETraining) if entry.name != "semvae"}
    training = SemVAETraining(semvae, **settings)
    facts = {"name": a.vit, "hub": bool(a.hub)}
    source: FeatureSource
    if a.features:
        vit = FrozenViT(a.grid, a.vit, a.vit_weights, a.hub) if a.vit_weights else None
        source = CachedFeatures(a.features, vit.fingerprint() if vit else None)
    else:
        source = _image_features(a)
    done, say = train(source, a.out, training, facts, a.device), quiet_elsewhere(print)
    for name, value in done["quality"].items():
        say(f"{name}: {value:.4g}")
    say(str(a.out / WEIGHTS))
    return 0


def _image_features(a: argparse.Namespace) -> ImageFeatures:
    from fastasync.images import open_images, open_source, require_checked

    images = require_checked(open_source(a.data), a.skip_bad, skip_bad=True)
    vit = FrozenViT(a.grid, a.vit, a.vit_weights, a.hub, a.precision).to(a.device)

    def loader(batches: Iterable[Tensor]) -> Iterable[Any]:
        options = {"batches": batches, "workers": a.workers, "device": a.device}
        return open_images(images, a.size, a.batch, a.backend, **options)

    return ImageFeatures(loader, images.labels, vit, images.fingerprint)
