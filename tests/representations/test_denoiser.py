"""Texture's denoiser: what it is trained on, and that it takes noise out."""

import pytest
import torch

from fastasync.data import load_images
from fastasync.errors import UserError
from fastasync.representations import build
from fastasync.representations.denoiser import noised
from fastasync.representations.texture import to_float

SHAPE = (1, 8, 8)
SMALL = {"width": 16, "depth": 1, "batch": 32, "learning_rate": 4e-3, "noise": 0.3}


@pytest.fixture(scope="module")
def images():
    return load_images("digits", ".", "train").images


def _texture(**options):
    return build("texture", SHAPE, 4, **options)


def test_the_noise_is_a_pure_function_and_has_the_levels_it_should():
    latents, samples = torch.zeros(4000, 2, 3, 3), torch.arange(4000)
    deviation = torch.tensor([1.0, 10.0])
    out = noised(latents, deviation, 0.5, 7, 3, samples)
    assert torch.equal(noised(latents[50:60], deviation, 0.5, 7, 3, samples[50:60]), out[50:60])
    assert not torch.equal(noised(latents[:1], deviation, 0.5, 7, 4, samples[:1]), out[:1])
    # variance of level x normal, level uniform below 0.5: 0.5^2 / 3; 36,000 numbers a channel in 4,000 levels
    assert torch.allclose(out.square().mean((0, 2, 3)) / (0.25 / 3), deviation.square(), rtol=0.06)
    levels = (out[:, 0].flatten(1).square().sum(1) / 9).sqrt()
    assert levels.max() > 0.6
    assert levels.min() < 0.02


@pytest.mark.parametrize("channels", [None, 3])
def test_it_takes_noise_out(images, channels):
    texture = _texture(channels=channels, denoiser={**SMALL, "steps": 150})
    figures = texture.fit(images, 0, progress=False)
    assert figures["mse"] < 0.8 * figures["noisy"]
    assert not any(parameter.requires_grad for parameter in texture.parameters())
    latents = texture.encode(images[:500])
    deviation = latents.std((0, 2, 3))
    noisy = latents + 0.2 * deviation[:, None, None] * torch.randn(
        latents.shape, generator=torch.Generator().manual_seed(1)
    )

    def error(decoded):
        return (to_float(decoded) - to_float(images[:500])).square().mean()

    with_it, texture.denoiser = error(texture.decode(noisy)), None
    assert with_it < 0.7 * error(texture.decode(noisy))


def test_untrained_it_changes_nothing_and_trained_it_is_the_same_again(images):
    assert torch.equal(_texture(denoiser={}).decode(_texture().encode(images[:9])), images[:9])
    first, second = (_texture(denoiser={**SMALL, "steps": 3}) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    untrained = first.fingerprint()
    first.fit(images, 5, progress=False), second.fit(images, 5, progress=False)
    assert first.fingerprint() == second.fingerprint() != untrained
    second.fit(images, 6, progress=False)
    assert first.fingerprint() != second.fingerprint()


def test_errors(images):
    with pytest.raises(UserError, match="denoiser setting: 'stps': did you mean 'steps'"):
        _texture(denoiser={"stps": 3})
    with pytest.raises(UserError, match="representation texture: channels: 5: must be 1 to 4"):
        _texture(channels=5)
    with pytest.raises(UserError, match="denoiser: loss: nan: lower its learning rate"):
        _texture(denoiser={**SMALL, "steps": 60, "learning_rate": float("inf")}).fit(images, 0, progress=False)
