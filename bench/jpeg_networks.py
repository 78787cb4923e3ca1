"""Stand-ins for weights that no package registry holds, trained on the run's own images (see bench/jpeg_run.py).

A small AutoencoderKL of diffusers' for the published texture autoencoder; for DINOv2 one of timm's vision transformers,
trained as a classifier with the images' labels.  Both are saved in the layouts that `fastasync encode` reads.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from fastasync.data.order import batch_indices
from fastasync.errors import UserError
from fastasync.files import atomic_path
from fastasync.images import open_images, open_source
from fastasync.representations.classifier import augment
from fastasync.representations.texture import to_float
from fastasync.representations.vit import IMAGENET_MEAN, IMAGENET_STD
from fastasync.representations.weights import import_model_package

NEEDS = {"diffusers": "imagenet", "timm": "imagenet", "torchvision": "imagenet", "deepspeed": "deepspeed"}
BATCH = 250  # images at a time where nothing is trained
SHIFT = 4  # pixels: the classifier's augmentation


def check_packages() -> None:
    """UserError that names the extras of all missing packages; a line for DALI, without which Pillow reads."""
    missing = {name: extra for name, extra in NEEDS.items() if importlib.util.find_spec(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        raise UserError("packages", f"{', '.join(missing)} not installed", f"pip install 'fastasync[{extras}]'")
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        print("nvidia.dali not installed (extra dali): Pillow reads the images")


class Pictures(NamedTuple):
    """Images uint8 [N, 3, S, S] and labels int64 [N], on one device, and the classes' names."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


def load_pictures(folder: Path, side: int, device: torch.device) -> Pictures:
    """All images of a folder of class folders, through the loader that `encode` uses."""
    source = open_source(folder)
    batches = list(open_images(source, side, BATCH, device=device))
    images, labels = torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
    return Pictures(images, labels.to(device), source.class_names)


@dataclass(frozen=True)
class Fit:
    """How a stand-in is trained: AdamW, linear warm-up over a twentieth of the steps, then a cosine to zero."""

    steps: int
    batch: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    precision: str = "bfloat16"
    save_every: int = 200

    def rate(self, step: int) -> float:
        """Learning rate of 0-based ``step``."""
        warmup = max(self.steps // 20, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min((step + 1) / warmup, 1.0) * cosine


def fit(model: nn.Module, loss: Callable[[int, Tensor], Tensor], count: int, plan: Fit, state: Path, title: str) -> int:
    """Minimise ``loss(step, indices of images)`` over ``plan.steps`` batches of ``count`` images.

    Continues from the file ``state``, which it writes every ``plan.save_every`` steps and at the end.  Returns how many
    steps it made.  UserError when the loss is not finite.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, weight_decay=plan.weight_decay, fused=cuda)
    first = 0
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = int(saved["step"])
    model.train()
    bar = tqdm(range(first, plan.steps), title, plan.steps, initial=first)
    ahead: dict[int, Tensor] = {}  # the batches of many steps go to the device at once: each copy waits for it
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        if step not in ahead:
            steps = range(step, min(step + plan.save_every, plan.steps))
            batches = torch.stack([batch_indices(each, min(plan.batch, count), count, seed=0) for each in steps])
            ahead = dict(zip(steps, batches.to(device)))
        samples = ahead[step]
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
            value = loss(step, samples)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = step + 1 == plan.steps
        if (step + 1) % plan.save_every == 0 or last:
            number = float(value.detach())
            if not math.isfinite(number):
                raise UserError(f"{title}: loss", number, "lower its learning rate")
            bar.set_postfix(loss=f"{number:.4f}")
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with atomic_path(state) as partial:
                torch.save(content, partial)
    model.eval()
    return plan.steps - first


# --- the texture autoencoder ---------------------------------------------------------------------------------------


def make_autoencoder(widths: tuple[int, ...], layers: int, channels: int) -> Any:
    """A random AutoencoderKL: the grid is the side / 2^(levels - 1); seeded."""
    kind = import_model_package("diffusers").AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(
            in_channels=3,
            out_channels=3,
            latent_channels=channels,
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=layers,
        )


def autoencoder_loss(vae: Any, images: Tensor, kl_weight: float = 1e-6) -> Callable[[int, Tensor], Tensor]:
    """L1 of mirrored images and of their edges, from a sample of the posterior, + kl_weight * KL (an image's sum).

    Edges are differences of neighbouring pixels, which weigh fine detail up.
    """

    def loss(step: int, samples: Tensor) -> Tensor:
        draws = torch.Generator(images.device).manual_seed(step)
        x = to_float(images[samples])
        mirrored = torch.rand(len(x), 1, 1, 1, generator=draws, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=draws, device=x.device)
        error = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float() - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum((1, 2, 3)).mean()
        return error.abs().mean() + edges + kl_weight * kl

    return loss


def psnr(one: Tensor, other: Tensor) -> float:
    """Mean over images uint8 [N, C, H, W] of 10 log10(255^2 / MSE), in dB."""
    pairs = zip(one.split(BATCH), other.split(BATCH))
    error = torch.cat([(a.double() - b.double()).square().mean((1, 2, 3)) for a, b in pairs]).clamp(min=1e-9)
    return float((10 * torch.log10(255.0**2 / error)).mean())


# --- the vision transformer -----------------------------------------------------------------------------------------


class PatchClassifier(nn.Module):
    """A timm ViT under a linear classifier of its mean patch token: the tokens that the semantic latent is made of.

    Images uint8 [N, 3, S, S] are resized and normalised as FrozenViT does.
    """

    def __init__(self, name: str, classes: int, grid: int):
        super().__init__()
        timm = import_model_package("timm")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # the weights keep timm's own shapes: position embeddings are resampled to the grid on the fly
            self.vit = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
            self.head = nn.Linear(self.vit.num_features, classes)
        self.side = grid * self.vit.patch_embed.patch_size[0]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 [N, 3, S, S] in [-1, 1] -> logits."""
        x = interpolate((((x + 1) / 2) - self.mean) / self.std, (self.side, self.side), mode="bicubic")
        return self.head(self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :].mean(1))

    @torch.no_grad()
    def accuracy(self, pictures: Pictures) -> float:
        """Share of images whose most likely class is theirs."""
        parts = zip(pictures.images.split(BATCH), pictures.labels.split(BATCH))
        right = sum(int((self(to_float(images)).argmax(1) == labels).sum()) for images, labels in parts)
        return right / len(pictures.images)


def classifier_loss(model: PatchClassifier, pictures: Pictures) -> Callable[[int, Tensor], Tensor]:
    """Cross-entropy, label smoothing 0.1, of images that are moved by up to 4 pixels and mirrored."""

    def loss(step: int, samples: Tensor) -> Tensor:
        x = augment(to_float(pictures.images[samples]), 1, step, samples, SHIFT, mirror=True)
        return cross_entropy(model(x).float(), pictures.labels[samples], label_smoothing=0.1)

    return loss
