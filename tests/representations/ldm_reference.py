"""The latent-diffusion autoencoder in plain PyTorch, with its checkpoint's parameter names: what weights mean.

Written from the paper's description and the published checkpoints' names: residual blocks of GroupNorm(32), SiLU and
3x3 convolutions; single-head attention of 1x1 convolutions; downsampling that pads right and below; nearest upsampling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, HW]
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Resample(nn.Module):
    def __init__(self, channels: int, down: bool):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)) if self.down else interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(Block(inputs if n == 0 else outputs, outputs) for n in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[n](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            Block(channels, channels),
            Attention(channels),
            Block(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int, attention: list[bool], z: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(Level(a, b, blocks, here) for a, b, here in zip(before, widths, attention))
        for level in self.down[:-1]:
            level.downsample = Resample(level.block[-1].conv2.out_channels, down=True)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), nn.Conv2d(widths[-1], 2 * z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int, attention: list[bool], z: int):
        super().__init__()
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(Level(a, b, blocks + 1, here) for a, b, here in zip(before, widths, attention))
        for level in self.up[1:]:
            level.upsample = Resample(level.block[-1].conv2.out_channels, down=False)
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # up.0 is the finest
            h = level(h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(silu(self.norm_out(h)))


class LDMAutoencoder(nn.Module):
    """``attention``: for each level, finest first."""

    def __init__(self, ch: int, ch_mult: tuple[int, ...], blocks: int, attention: list[bool], z: int):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.encoder = Encoder(widths, blocks, attention, z)
        self.decoder = Decoder(widths, blocks, attention, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
