"""Classifier and SemVAE: what they learn, and that they learn it again."""

import pytest
import torch

from fastasync.data import load_images
from fastasync.errors import UserError
from fastasync.representations.classifier import (
    Classifier,
    ClassifierSettings,
    accuracy,
    augment,
    image_features,
    train_classifier,
)
from fastasync.representations.prepare import RECIPES, make_recipe
from fastasync.representations.semvae import SemVAE, SemVAESettings, reconstruction, semvae_losses, train_semvae
from fastasync.representations.texture import to_float

SHORT = ClassifierSettings(widths=(8, 16), steps=8, batch=32)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", ".", "train")


def _train(digits, seed, **kwargs):
    return train_classifier(digits.images, digits.labels, 10, 4, SHORT, seed, progress=False, **kwargs)


def test_training_is_deterministic_and_leaves_the_global_generator_alone(digits):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = _train(digits, 1), _train(digits, 1), _train(digits, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not any(p.requires_grad for p in first.parameters())


def test_the_classifiers_parts_agree(digits):
    model = _train(digits, 0)
    x = to_float(digits.images[:7])
    feature_map = model.feature_map(x)
    assert feature_map.shape == (7, model.map_channels, 4, 4)
    assert torch.equal(model.features_from_map(feature_map), model.features(x))
    assert model.features(x).shape == (7, model.feature_dim)
    torch.testing.assert_close(image_features(model, digits.images[:7], batch=3), model.features(x))
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))  # no statistics across the batch
    predicted = model(to_float(digits.images)).argmax(1)
    assert accuracy(model, digits.images, digits.labels) == pytest.approx(
        float((predicted == digits.labels).float().mean())
    )


def test_the_cifar10_recipe_fits_together():
    recipe = make_recipe("cifar10")
    model = Classifier((3, 32, 32), 10, recipe.classifier.widths, recipe.grid)
    with torch.no_grad():
        assert model.feature_map(torch.zeros(1, 3, 32, 32)).shape == (1, 256, 8, 8)
        assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    assert recipe.options["semantic"]["channels"] == 16


def test_recipes_can_be_changed_without_touching_the_table():
    recipe = make_recipe("cifar10", ("texture", "semantic"), encoder_steps=5, semvae_steps=6, semantic_channels=7)
    assert recipe.classifier.steps == 5
    assert recipe.options["semantic"]["channels"] == 7
    assert recipe.options["semantic"]["semvae"]["steps"] == 6
    assert recipe.options["semantic"]["semvae"]["width"] == RECIPES["cifar10"].options["semantic"]["semvae"]["width"]
    assert RECIPES["cifar10"].options["semantic"]["semvae"]["steps"] == 2000
    with pytest.raises(UserError, match="'cifar': did you mean 'cifar10'"):
        make_recipe("cifar")


def test_a_grid_that_no_stage_has():
    with pytest.raises(UserError, match=r"grid: 3: must be one of .*\[8, 4\]"):
        Classifier((1, 8, 8), 10, (8, 16), 3)


def test_a_loss_that_is_not_finite_stops(digits):
    settings = ClassifierSettings(widths=(8, 16), steps=60, batch=32, learning_rate=float("inf"))
    with pytest.raises(UserError, match="classifier: loss: nan: lower its learning rate"):
        train_classifier(digits.images, digits.labels, 10, 4, settings, 0, progress=False)


def test_labels_are_checked_before_training(digits):
    with pytest.raises(UserError, match="label of image"):
        train_classifier(digits.images, digits.labels, 9, 4, SHORT, 0, progress=False)


def test_augmentation_shifts_and_mirrors_whole_images():
    """Every output is one of the (2 shift + 1)^2 x 2 expected ones, all of which occur, evenly."""
    x = torch.arange(64.0).reshape(1, 1, 8, 8).expand(3600, -1, -1, -1)
    samples = torch.arange(3600)
    out = augment(x, 0, 5, samples, 1, mirror=True)
    padded = torch.nn.functional.pad(x[:1], (1,) * 4, mode="reflect")
    views = [padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    expected = torch.cat(views + [view.flip(-1) for view in views])
    match = (out[:, None] == expected[None]).flatten(2).all(2)
    assert torch.equal(match.sum(1), torch.ones(3600, dtype=torch.int64))
    assert int(match.sum(0).min()) > 140  # expected 200, standard deviation 14
    assert torch.equal(out[100:130], augment(x[:30], 0, 5, samples[100:130], 1, mirror=True))
    assert torch.equal(augment(x, 0, 5, samples, 0, mirror=False), x)


def _features(count=600, seed=0):
    """Features [count, 12, 4, 4] on a 3-dimensional curved surface, far from standardised; the last never varies."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 3, 4, 4, generator=generator)
    mixing = torch.randn(11, 3, generator=generator)
    features = torch.tanh(torch.einsum("dc,nchw->ndhw", mixing, hidden)) * 5 + 20
    return torch.cat([features, torch.full((count, 1, 4, 4), 2.0)], dim=1)


@pytest.mark.parametrize("heads", [0, 2])
def test_semvae_learns_to_reconstruct(heads):
    features = _features()
    settings = SemVAESettings(width=32, heads=heads, steps=150, batch=64, learning_rate=5e-3)

    def lookup(indices):
        return features[indices]

    vae = train_semvae(lookup, 600, 12, 4, 4, settings, seed=0, progress=False)
    quality = reconstruction(vae, lookup, 600)
    assert quality["mse"] < 0.12  # 1 is what the mean would give (0.92 with the dead channel)
    assert quality["cosine"] > 0.93
    latents = vae.encode(features)
    assert latents.shape == (600, 4, 4, 4)
    torch.testing.assert_close(vae.feature_mean.flatten(), features.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    error = (vae.decode(latents) - features)[:, :11].square().mean() / features[:, :11].var()
    assert error < 0.12  # decode is on the features' own scale


def test_semvae_training_is_deterministic():
    features = _features(100)
    settings = SemVAESettings(width=16, heads=2, steps=5, batch=32)
    first, again = (
        train_semvae(lambda indices: features[indices], 100, 12, 2, 4, settings, seed=4, progress=False)
        for _ in range(2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@torch.no_grad()
def test_semvae_losses_against_their_formulas():
    torch.manual_seed(0)
    vae, features = SemVAE(6, 2, 3, width=8, heads=2), torch.randn(5, 6, 3, 3)
    mse, cosine, kl = semvae_losses(vae, features)
    mean, logvar = vae.posterior(features)
    output = vae.decoder(mean)
    assert mse == pytest.approx(float(((output - features) ** 2).mean()))
    tokens = [(output[n, :, i, j], features[n, :, i, j]) for n in range(5) for i in range(3) for j in range(3)]
    assert cosine == pytest.approx(
        float(torch.stack([a @ b / a.norm() / b.norm() for a, b in tokens]).mean()), rel=1e-5
    )
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).sum(1).mean()
    assert kl == pytest.approx(float(exact), rel=1e-5)


def test_a_large_kl_weight_closes_the_channel():
    features = _features(300)
    settings = SemVAESettings(width=16, heads=0, steps=120, batch=64, learning_rate=1e-2, kl_weight=10.0)
    vae = train_semvae(lambda indices: features[indices], 300, 12, 2, 4, settings, seed=0, progress=False)
    assert reconstruction(vae, lambda indices: features[indices], 300)["kl"] < 0.01
