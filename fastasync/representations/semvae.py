"""SemVAE: a small variational autoencoder that compresses a frozen encoder's features to a few channels per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from tqdm import tqdm

from fastasync.data.order import batch_indices
from fastasync.errors import UserError
from fastasync.representations.statistics import StreamingStatistics

Features = Callable[[Tensor], Tensor]  # indices int64 [B] -> features float32 [B, D, H, W] on the training device


@dataclass(frozen=True)
class SemVAESettings:
    """Architecture and training of a SemVAE.

    ``heads`` 0: every token on its own (an MLP); otherwise a transformer with that many attention heads.
    Loss: MSE + (1 - cosine) + kl_weight * KL, the KL summed over a token's channels, all averaged over tokens.  AdamW,
    one-cycle learning rate.
    """

    width: int = 64
    depth: int = 1
    heads: int = 4
    steps: int = 300
    batch: int = 64
    learning_rate: float = 4e-3
    kl_weight: float = 1e-7


class _Block(nn.Module):
    """Pre-norm transformer block over tokens [B, N, width]; without heads only its MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        if heads:
            if width % heads:
                raise UserError("semvae heads", heads, f"must divide the width {width}")
            self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.heads:
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out(scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class _Tower(nn.Module):
    """Feature map [B, inputs, H, W] -> [B, outputs, H, W] through ``depth`` blocks of ``width``."""

    def __init__(self, inputs: int, outputs: int, grid: int, width: int, depth: int, heads: int):
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, grid * grid, width)) if heads else None
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-2:]
        tokens = self.enter(x.flatten(2).transpose(1, 2))
        if self.position is not None:
            tokens = tokens + self.position
        return self.leave(self.blocks(tokens)).transpose(1, 2).unflatten(2, side)


class SemVAE(nn.Module):
    """Features [B, feature_dim, grid, grid] <-> latents [B, channels, grid, grid].

    Works on features standardised per channel; their mean and standard deviation are buffers, set by ``train_semvae``.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, feature_dim: int, channels: int, grid: int, width: int = 64, depth: int = 1, heads: int = 0):
        super().__init__()
        self.feature_dim, self.channels, self.grid = feature_dim, channels, grid
        self.encoder = _Tower(feature_dim, 2 * channels, grid, width, depth, heads)
        self.decoder = _Tower(channels, feature_dim, grid, width, depth, heads)
        self.register_buffer("feature_mean", torch.zeros(1, feature_dim, 1, 1))
        self.register_buffer("feature_std", torch.ones(1, feature_dim, 1, 1))

    def standardise(self, features: Tensor) -> Tensor:
        """(features - mean) / std per channel."""
        return (features - self.feature_mean) / self.feature_std

    def posterior(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features -> mean and log-variance, each [B, channels, grid, grid]; log-variance in [-30, 20]."""
        mean, logvar = self.encoder(standardised).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, features: Tensor) -> Tensor:
        """The posterior's mean, float32 [B, channels, grid, grid]."""
        return self.posterior(self.standardise(features))[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, channels, grid, grid] -> features [B, feature_dim, grid, grid] on their own scale."""
        return self.decoder(latents) * self.feature_std + self.feature_mean


def semvae_losses(vae: SemVAE, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(mse, cosine, kl), scalars: of standardised features against their reconstruction from mean + std * noise.

    ``noise`` [B, channels, grid, grid], None for the posterior's mean.  cosine is the mean over tokens of
    cos(target, reconstruction); kl = sum over channels of (mean^2 + var - 1 - log var) / 2, averaged over tokens.
    """
    target = vae.standardise(features)
    mean, logvar = vae.posterior(target)
    latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
    output = vae.decoder(latents)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(1).mean()
    return (output - target).square().mean(), cosine_similarity(output, target, dim=1).mean(), kl


def train_semvae(
    features: Features,
    count: int,
    feature_dim: int,
    channels: int,
    grid: int,
    settings: SemVAESettings,
    seed: int,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> SemVAE:
    """Train on ``features(indices)`` of ``count`` images; the features are made batch by batch and never stored.

    Returns the SemVAE frozen, on ``device``.  Deterministic given the seed.  UserError when the loss is not finite.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = SemVAE(feature_dim, channels, grid, settings.width, settings.depth, settings.heads)
    vae = vae.to(device)
    batch = min(settings.batch, count)
    statistics = StreamingStatistics(feature_dim)
    for part in torch.arange(count).split(batch):
        statistics.update(features(part))
    mean, std = statistics.result()
    vae.feature_mean.copy_(mean.reshape(1, -1, 1, 1))
    vae.feature_std.copy_(std.clamp(min=1e-6).reshape(1, -1, 1, 1))  # a feature that never varies stays zero
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    bar = tqdm(range(settings.steps), desc="SemVAE", disable=not progress, leave=False)
    for step in bar:
        x = features(batch_indices(step, batch, count, seed))
        noise = torch.randn(len(x), channels, grid, grid, generator=generator).to(device)
        mse, cosine, kl = semvae_losses(vae, x, noise)
        loss = mse + (1.0 - cosine) + settings.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == settings.steps - 1:
            bar.set_postfix(mse=f"{float(mse.detach()):.4f}", cosine=f"{float(cosine.detach()):.4f}", refresh=False)
            if not torch.isfinite(loss):
                raise UserError("SemVAE: loss", float(loss.detach()), "lower its learning rate")
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def reconstruction(vae: SemVAE, features: Features, count: int, batch: int = 1000) -> dict[str, float]:
    """Quality over ``count`` images, from the posterior's mean: {"mse", "cosine", "kl"} of standardised features."""
    totals = torch.zeros(3, dtype=torch.float64)
    for part in torch.arange(count).split(batch):
        totals += torch.stack([value.double().cpu() for value in semvae_losses(vae, features(part))]) * len(part)
    return dict(zip(("mse", "cosine", "kl"), (totals / count).tolist()))
