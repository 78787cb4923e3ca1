"""Everything that turns positions, times, labels and latents into vectors: patches, sin-cos tables, RoPE, time, label.

Conventions are LightningDiT's, since published weights rely on them: tokens run row by row; the fixed position table
encodes columns in its first half and rows in its second; RoPE does rows first, then columns, in interleaved pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SHORT_NAMES = {"texture": "tex", "semantic": "sem"}


def short_name(representation: str) -> str:
    """Name of a representation inside the state dict: ``tex`` and ``sem`` as published, any other name as it is."""
    return _SHORT_NAMES.get(representation, representation)


def _frequencies(count: int, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """``10000^(-i / count)`` for i = 0 .. count - 1."""
    return torch.exp(torch.arange(count, device=device, dtype=dtype) * (-math.log(10_000.0) / count))


def _rows_and_columns(grid: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token, float64 [grid * grid] each, row by row."""
    index = torch.arange(grid * grid)
    return (index // grid).double(), (index % grid).double()


def position_table(width: int, grid: int) -> Tensor:
    """Fixed 2-D sin-cos position embedding, float32 [1, grid * grid, width]: (sin, cos) of columns, then of rows."""
    rows, columns = _rows_and_columns(grid)
    angles = [position[:, None] * _frequencies(width // 4) for position in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()[None]


def rope_tables(head_dim: int, grid: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, float32 [grid * grid, head_dim] each (EVA's two-dimensional RoPE).

    The first half of a head turns with the row, the second with the column; each angle serves one interleaved pair.
    """
    angles = [(p[:, None] * _frequencies(head_dim // 4)).repeat_interleave(2, dim=1) for p in _rows_and_columns(grid)]
    table = torch.cat(angles, dim=1)
    return table.cos().float(), table.sin().float()


def time_sinusoid(tau: Tensor, dim: int = 256) -> Tensor:
    """``[cos(tau f), sin(tau f)]`` with f_i = 10000^(-i / (dim/2)); tau [B] unscaled in [0, 1] -> [B, dim].

    Computed in float32 (float64 for float64 tau) whatever the autocast mode.
    """
    dtype = torch.promote_types(tau.dtype, torch.float32)
    angles = tau.to(dtype)[:, None] * _frequencies(dim // 2, tau.device, dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbedding(nn.Module):
    """Convolution whose kernel and stride are the patch: x [B, C, H, W] -> tokens [B, (H/p)(W/p), width]."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # the convolution leaves channels outermost; every later pass over a token wants its features side by side
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """Tokens [B, N, p * p * C], each ordered (row in patch, column in patch, channel), -> [B, C, H, W]."""
    side = math.isqrt(tokens.shape[1])
    pixels = tokens.reshape(tokens.shape[0], side, side, patch, patch, channels)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], channels, side * patch, side * patch)


class RotaryTables(nn.Module):
    """The RoPE tables as buffers, since published state dicts hold them (``feat_rope.freqs_cos`` and ``freqs_sin``)."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: int):
        super().__init__()
        cos, sin = rope_tables(head_dim, grid)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)


class TimeEmbedding(nn.Module):
    """Local noising time of one representation, tau [B] -> [B, width]: sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tau: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype
        return self.mlp(time_sinusoid(tau, self.frequencies).to(dtype))  # type: ignore[arg-type]


class LabelEmbedding(nn.Module):
    """Class labels y [B] int64 -> [B, width]; the table's last row (index ``classes``) is the null class."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)
