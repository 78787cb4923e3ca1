"""A small convolutional classifier: frozen, it is the encoder of the semantic latent; on another seed, the scorer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from fastasync_kernels.reference import philox_uniform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, silu
from tqdm import tqdm

from fastasync.data.images import check_images, check_labels
from fastasync.data.order import batch_indices
from fastasync.errors import UserError
from fastasync.representations.base import ImageShape
from fastasync.representations.texture import to_float

AUGMENTATION_STREAM = 6  # Philox stream


@dataclass(frozen=True)
class ClassifierSettings:
    """Architecture and training of a classifier.

    ``widths``: channels of each stage; every stage after the first halves the side.  ``shift``: largest random
    translation in pixels, either way.  AdamW with a one-cycle learning rate whose peak is ``learning_rate``.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    steps: int = 300
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    shift: int = 1


class _Unit(nn.Module):
    """Convolution 3x3, group normalisation, SiLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(max(outputs // 16, 1), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return silu(self.norm(self.convolution(x)))


class _Stage(nn.Module):
    """One unit that sets width and side, then a residual pair."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.enter = _Unit(inputs, outputs, stride)
        self.residual = nn.Sequential(_Unit(outputs, outputs), _Unit(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return x + self.residual(x)


class Classifier(nn.Module):
    """Images float32 [N, C, H, W] in [-1, 1] (``to_float``) -> logits [N, classes].

    ``grid``: the side at which ``feature_map`` is taken; one of the stages must have it.  Group normalisation: no
    running statistics, so training and evaluation mode are the same function.
    """

    def __init__(self, image_shape: ImageShape, classes: int, widths: tuple[int, ...], grid: int):
        super().__init__()
        sides = [image_shape[1] // 2**stage for stage in range(len(widths))]
        if (
            grid not in sides
            or image_shape[1] != image_shape[2]
            or sides[-1] * 2 ** (len(widths) - 1) != image_shape[1]
        ):
            raise UserError("grid", grid, f"must be one of the classifier's feature map sides {sides}")
        self.image_shape, self.classes, self.grid = image_shape, classes, grid
        self.map_stage = sides.index(grid)
        self.map_channels, self.feature_dim = widths[self.map_stage], widths[-1]
        inputs = (image_shape[0], *widths[:-1])
        self.stages = nn.ModuleList(
            _Stage(before, after, 1 if i == 0 else 2) for i, (before, after) in enumerate(zip(inputs, widths))
        )
        self.head = nn.Linear(widths[-1], classes)

    def feature_map(self, images: Tensor) -> Tensor:
        """Images float32 [N, C, H, W] -> features [N, map_channels, grid, grid]."""
        x = images
        for stage in self.stages[: self.map_stage + 1]:
            x = stage(x)
        return x

    def features_from_map(self, feature_map: Tensor) -> Tensor:
        """The rest of the network after ``feature_map`` -> [N, feature_dim]."""
        x = feature_map
        for stage in self.stages[self.map_stage + 1 :]:
            x = stage(x)
        return x.mean((2, 3))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: images float32 [N, C, H, W] in [-1, 1] -> [N, feature_dim]."""
        return self.features_from_map(self.feature_map(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def augment(x: Tensor, seed: int, step: int, samples: Tensor, shift: int, mirror: bool) -> Tensor:
    """Random translation by up to ``shift`` pixels (reflected border), and mirroring; pure in (seed, step, sample).

    x float32 [B, C, H, W]; samples int64 [B].  Philox stream 6.
    """
    draws = philox_uniform(seed, step, samples.to(x.device), 3, stream=AUGMENTATION_STREAM)
    batch, colours, height, width = x.shape
    rows = torch.arange(height, device=x.device)[None] + (draws[:, :1] * (2 * shift + 1)).long()
    columns = torch.arange(width, device=x.device)[None].expand(batch, -1)
    if mirror:
        columns = torch.where(draws[:, 1:2] < 0.5, columns.flip(1), columns)
    columns = columns + (draws[:, 2:] * (2 * shift + 1)).long()
    padded = pad(x, (shift,) * 4, mode="reflect") if shift else x
    sample = torch.arange(batch, device=x.device)[:, None, None, None]
    colour = torch.arange(colours, device=x.device)[None, :, None, None]
    return padded[sample, colour, rows[:, None, :, None], columns[:, None, None, :]]


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    grid: int,
    settings: ClassifierSettings,
    seed: int,
    mirror: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    title: str = "classifier",
) -> Classifier:
    """Train on images uint8 [N, C, H, W], labels int64 [N]; returns it frozen, on ``device``.

    Deterministic given the seed (bitwise on one machine with one thread count).  On CUDA: bfloat16 autocast, channels
    last.  Raises UserError on bad images, labels or grid and when the loss is not finite.
    """
    check_images(images, title)
    check_labels(labels, len(images), classes, title)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        colours, height, width = images.shape[1:]
        model = Classifier((colours, height, width), classes, settings.widths, grid)
    on_gpu = device.type == "cuda"
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    images, labels = images.to(device), labels.to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=on_gpu)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=settings.steps)
    batch = min(settings.batch, len(images))
    bar = tqdm(range(settings.steps), desc=title, disable=not progress, leave=False)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for step in bar:
            samples = batch_indices(step, batch, len(images), seed).to(device)
            x = augment(to_float(images[samples]), seed, step, samples, settings.shift, mirror)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                logits = model(x.contiguous(memory_format=layout))
            loss = cross_entropy(logits.float(), labels[samples], label_smoothing=settings.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == settings.steps - 1:  # reading the loss waits for the device
                value = float(loss.detach())
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if not math.isfinite(value):
                    raise UserError(f"{title}: loss", value, "lower its learning rate")
    return model.requires_grad_(False).eval()


@torch.no_grad()
def image_features(model: Classifier, images: Tensor, batch: int = 1000) -> Tensor:
    """Penultimate features of images uint8 [N, C, H, W] (anywhere) -> float32 [N, feature_dim] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.features(to_float(part.to(device))).float().cpu() for part in images.split(batch)])


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """The share of images uint8 [N, C, H, W] whose most likely class is their label."""
    head = model.head.weight.float().cpu(), model.head.bias.float().cpu()
    logits = torch.nn.functional.linear(image_features(model, images, batch), *head)
    return float((logits.argmax(1) == labels.cpu()).double().mean())
