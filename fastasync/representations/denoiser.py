"""A convolutional network that takes out of an image what noise a sampler left in its latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastasync_kernels.reference import philox_normal, philox_uniform
from torch import Tensor, nn
from tqdm import tqdm

from fastasync.data.order import batch_indices
from fastasync.errors import UserError

NOISE_STREAM, LEVEL_STREAM = 9, 10  # Philox streams


@dataclass(frozen=True)
class DenoiserSettings:
    """Architecture and training: ``depth`` residual blocks of ``width`` channels at full resolution.

    ``noise``: each image of a batch gets Gaussian noise of a deviation between 0 and this, in those of its latents'
    channels.  AdamW with a one-cycle learning rate whose peak is ``learning_rate``.
    """

    width: int = 64
    depth: int = 4
    steps: int = 2000
    batch: int = 256
    learning_rate: float = 1e-3
    noise: float = 0.15


class Denoiser(nn.Module):
    """Images float32 [N, colours, H, W] in [-1, 1], noisy -> the mean of what they may have been.

    Untrained it changes nothing.
    """

    def __init__(self, colours: int, width: int, depth: int):
        super().__init__()
        self.enter = nn.Conv2d(colours, width, 3, padding=1)
        self.blocks = nn.ModuleList(_block(width) for _ in range(depth))
        self.leave = nn.Conv2d(width, colours, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter(images)
        for block in self.blocks:
            x = x + block(x)
        return images + self.leave(x)


def _block(width: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(2):
        parts += [nn.GroupNorm(max(width // 16, 1), width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*parts)


def noised(latents: Tensor, deviation: Tensor, noise: float, seed: int, step: int, samples: Tensor) -> Tensor:
    """Latents [B, C, h, w] + noise, the channels' deviations [C] times a level in [0, ``noise``) that each image draws.

    A pure function of (seed, step, sample).
    """
    draws = philox_normal(seed, step, samples, latents[0].numel(), stream=NOISE_STREAM).view_as(latents)
    level = noise * philox_uniform(seed, step, samples, 1, stream=LEVEL_STREAM)
    return latents + level[:, :, None, None] * deviation[:, None, None] * draws


def train_denoiser(
    model: Denoiser,
    images: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    deviation: Tensor,
    count: int,
    settings: DenoiserSettings,
    seed: int,
    progress: bool = True,
) -> dict[str, float]:
    """Train ``model`` to give back ``images(indices)``, float32 in [-1, 1] on its device, from their noised latents.

    ``encode`` and ``decode`` go to latents and back.  Returns ``mse``, the mean squared error of the last tenth of the
    steps, and ``noisy``, what it was before the denoiser.  Deterministic given the seed.  UserError when the loss is
    not finite.
    """
    device = deviation.device
    on_gpu = device.type == "cuda"
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=on_gpu)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    batch, last = min(settings.batch, count), max(settings.steps // 10, 1)
    errors = torch.zeros(2, dtype=torch.float64, device=device)
    bar = tqdm(range(settings.steps), desc="denoiser", disable=not progress, leave=False)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for step in bar:
            samples = batch_indices(step, batch, count, seed)
            x = images(samples)
            noisy = decode(noised(encode(x), deviation, settings.noise, seed, step, samples.to(device)))
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                clean = model(noisy)
            loss = (clean.float() - x).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            if step >= settings.steps - last:
                errors += torch.stack([loss.detach(), (noisy - x).square().mean()])
            if step % 50 == 0 or step == settings.steps - 1:  # reading the loss waits for the device
                value = float(loss.detach())
                bar.set_postfix(mse=f"{value:.2e}", refresh=False)
                if not math.isfinite(value):
                    raise UserError("denoiser: loss", value, "lower its learning rate")
    model.requires_grad_(False).eval()
    mse, noisy_mse = (errors / last).tolist()
    return {"mse": mse, "noisy": noisy_mse}
