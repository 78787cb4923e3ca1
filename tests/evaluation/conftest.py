"""Small random networks that stand for feature extractors."""

import pytest
import torch
from torch import nn

from fastasync.evaluation import ClassifierFeatures


class Tiny(nn.Module):
    """A random classifier: features [B, 12], head to 5 classes."""

    def __init__(self, channels: int = 3, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(channels, 12, 3, stride=2)
            self.head = nn.Linear(12, 5)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.fixture
def tiny():
    """Tiny(channels, seed)."""
    return Tiny


@pytest.fixture
def extractor():
    """Features and logits of a Tiny."""
    return ClassifierFeatures(Tiny(), "tiny", batch_size=64, has_logits=True)


@pytest.fixture
def photos():
    """photos(count, seed, low, high, channels) -> uint8 [count, channels, 8, 8]."""

    def make(count: int, seed: int, low: int = 0, high: int = 256, channels: int = 3) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(low, high, (count, channels, 8, 8), dtype=torch.uint8, generator=generator)

    return make
