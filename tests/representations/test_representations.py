"""Representations, registry, plugins, statistics and bundle."""

import math

import pytest
import torch

from fastasync.data import load_images
from fastasync.errors import UserError
from fastasync.representations import (
    Bundle,
    Classifier,
    LatentStatistics,
    Representation,
    build,
    check_same_statistics,
    load_plugin,
    register,
    registered,
    with_statistics,
)
from fastasync.representations.base import checked_encode
from fastasync.representations.statistics import StreamingStatistics

DIGIT, PHOTO = (1, 8, 8), (3, 32, 32)

PLUGIN = '''
import torch
from fastasync.representations import Representation, register

@register("{name}")
class Edges(Representation):
    """Mean absolute horizontal difference in each cell."""

    def __init__(self, image_shape, grid, gain: float = 1.0):
        super().__init__(image_shape, grid)
        self.channels = image_shape[0]
        self.gain = gain

    def encode(self, images):
        edges = self.gain * images.float().diff(dim=-1).abs()
        return torch.nn.functional.adaptive_avg_pool2d(edges, self.grid){suffix}
'''


def _random_images(shape, count=10, seed=0):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _plugin(tmp_path, name="edges", suffix="", file="edges.py"):
    path = tmp_path / file
    path.write_text(PLUGIN.format(name=name, suffix=suffix))
    return path


@pytest.mark.parametrize(("shape", "grid", "channels"), [(DIGIT, 4, 4), (PHOTO, 8, 48), ((1, 8, 8), 8, 1)])
def test_texture_round_trip_is_exact(shape, grid, channels):
    texture = build("texture", shape, grid)
    every_value = torch.arange(256, dtype=torch.uint8).repeat(48).reshape(-1, *shape)
    latents = texture.encode(every_value)
    assert latents.shape == (len(every_value), channels, grid, grid)
    assert (float(latents.min()), float(latents.max())) == (-1.0, 1.0)
    assert torch.equal(texture.decode(latents), every_value)


def test_texture_patches_lie_where_their_token_lies():
    image = torch.zeros(1, *PHOTO, dtype=torch.uint8)
    image[0, 1, 4 * 2 + 3, 4 * 5 + 1] = 255  # token (2, 5), green, row 3, column 1
    latents = build("texture", PHOTO, 8).encode(image)
    assert (latents == 1).nonzero().tolist() == [[0, 1 * 16 + 3 * 4 + 1, 2, 5]]


def test_texture_decoding_clamps():
    texture = build("texture", DIGIT, 4)
    assert texture.decode(torch.full((1, 4, 4, 4), 9.0)).unique().tolist() == [255]
    assert texture.decode(torch.full((1, 4, 4, 4), -9.0)).unique().tolist() == [0]


def test_texture_by_principal_components():
    """Patches that are mixtures of two patterns: two components hold them, uncorrelated, and give them back."""
    generator = torch.Generator().manual_seed(0)
    flat, stripes = torch.full((2, 2), 40.0), torch.tensor([[12.0, -12.0], [12.0, -12.0]])
    weights = torch.randn(2, 300, 1, 4, 1, 4, 1, generator=generator).clamp(-2.5, 2.5)
    pixels = 128 + weights[0] * flat[:, None, :] + weights[1] * stripes[:, None, :]
    images = pixels.reshape(300, 1, 8, 8).round().byte()
    texture = build("texture", DIGIT, 4, channels=2)
    assert texture.fit(images, 0)["explained"] == pytest.approx(1, abs=2e-4)  # the rest is rounding
    torch.testing.assert_close(texture.basis @ texture.basis.T, torch.eye(2))
    torch.testing.assert_close(texture.basis[0], torch.full((4,), 0.5), atol=2e-2, rtol=0)
    latents = texture.encode(images)
    assert latents.shape == (300, 2, 4, 4)
    assert latents.dtype == torch.float32
    rows = latents.movedim(1, -1).flatten(0, -2).double()
    covariance = rows.T @ rows / len(rows)
    torch.testing.assert_close(rows.mean(0), torch.zeros(2).double(), atol=1e-6, rtol=0)
    assert abs(covariance[0, 1]) < 1e-6 * covariance[0, 0]
    assert covariance[0, 0] > covariance[1, 1]
    assert (texture.decode(latents).int() - images.int()).abs().max() <= 2
    again = build("texture", DIGIT, 4, channels=2)
    again.fit(images.flip(0), 0)
    assert torch.equal(again.basis, texture.basis)
    assert again.fingerprint() == texture.fingerprint()
    assert texture.fingerprint() != build("texture", DIGIT, 4).fingerprint()


def test_all_principal_components_give_the_pixels_back():
    images = _random_images(DIGIT, 200)
    texture = build("texture", DIGIT, 4, channels=4)
    assert texture.fit(images, 0) == {"explained": pytest.approx(1)}
    assert torch.equal(texture.decode(texture.encode(images)), images)


def test_lowfreq_keeps_the_mean_and_drops_the_detail():
    images = _random_images(PHOTO)
    low = build("lowfreq", PHOTO, 8)
    latents = low.encode(images)
    assert latents.shape == (10, 3, 8, 8)
    assert not low.decodes
    whole = build("lowfreq", PHOTO, 8, size=1).encode(images)
    expected = (images.double() / 127.5 - 1).mean((2, 3)).float()
    torch.testing.assert_close(whole, expected[:, :, None, None].expand(-1, -1, 8, 8))
    checker = (torch.arange(32)[:, None] + torch.arange(32)[None]).remainder(2).mul(255).byte().expand(1, 3, 32, 32)
    torch.testing.assert_close(low.encode(checker), torch.zeros(1, 3, 8, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("textur", DIGIT, 4), "representation: 'textur': did you mean 'texture'"),
        (lambda: build("texture", DIGIT, 0), "grid: 0: must be at least 1"),
        (lambda: build("lowfreq", PHOTO, -8), "grid: -8: must be at least 1"),
        (lambda: build("texture", (3, 0, 0), 4), "image size: 0x0: must be at least 1"),
        (lambda: build("texture", DIGIT, 3), "grid: 3: must divide"),
        (lambda: build("texture", (1, 8, 6), 2), "square only"),
        (lambda: build("lowfreq", DIGIT, 4, sise=2), "option: 'sise': did you mean 'size'"),
        (lambda: build("lowfreq", DIGIT, 4, size=9), "lowfreq size: 9"),
        (lambda: build("autoencoder", PHOTO, 8, sample="yes"), "autoencoder: sample: 'yes': must be true or false"),
        (lambda: build("autoencoder", PHOTO, 8, chunk="32"), "autoencoder: chunk: '32': must be a whole number"),
        (lambda: build("autoencoder", PHOTO, 8, seed=True), "autoencoder: seed: True: must be a whole number"),
        (lambda: build("autoencoder", PHOTO, 8, weights=3), "autoencoder: weights: 3: must be a text"),
        (lambda: build("semantic", DIGIT, 4), "no encoder"),
        (lambda: build("semantic", DIGIT, 2, Classifier(DIGIT, 10, (16, 16), 4)), "feature map has side 4"),
        (
            lambda: build("semantic", DIGIT, 4, Classifier(DIGIT, 10, (16, 16), 4), semvae={"widht": 3}),
            "'widht': did you mean 'width'",
        ),
        (
            lambda: build("semantic", DIGIT, 4, Classifier(DIGIT, 10, (16, 16), 4), semvae={"heads": 5}),
            "heads: 5: must divide the width 64",
        ),
        (lambda: Bundle([]), "name at least one"),
        (lambda: Bundle([build("lowfreq", DIGIT, 4)]), "decode to images: none: a bundle needs exactly one"),
        (lambda: Bundle([build("texture", DIGIT, 4), build("texture", DIGIT, 4)]), "each may appear once"),
        (lambda: Bundle([build("texture", DIGIT, 4), build("lowfreq", DIGIT, 2)]), r"grid: \[2, 4\]"),
        (lambda: Bundle([build("texture", DIGIT, 4), build("lowfreq", PHOTO, 4)]), "image shape"),
        (lambda: Bundle([build("texture", DIGIT, 4)]).normalise(torch.zeros(1, 4, 4, 4)), "no statistics"),
        (lambda: Bundle([build("texture", DIGIT, 4)], LatentStatistics((0.0,), (1.0,), ("",))), "1 channels"),
        (lambda: Bundle([build("texture", DIGIT, 4)]).encode(_random_images((1, 16, 16))), "1x16x16: must be 1x8x8"),
        (lambda: check_same_statistics("a" * 64, "b" * 64), "fingerprint bbbbbbbbbbbb: the checkpoint was .* aaaaaaaa"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_two_decoders_are_refused():
    @register("pixels")
    class Pixels(type(build("texture", DIGIT, 4))):  # type: ignore[misc]
        pass

    with pytest.raises(UserError, match="texture, pixels: a bundle needs exactly one"):
        Bundle([build("texture", DIGIT, 4), build("pixels", DIGIT, 4)])


def test_same_statistics_pass():
    check_same_statistics("a", "a")


def test_a_third_representation_from_a_user_file(tmp_path):
    assert load_plugin(_plugin(tmp_path)) == ("edges",)
    assert {"texture", "semantic", "lowfreq", "edges"} <= set(registered())
    images = load_images("digits", ".", "train").images
    encoder = Classifier(DIGIT, 10, (16, 16), 4)
    bundle = Bundle(
        [
            build("texture", DIGIT, 4),
            build("edges", DIGIT, 4, gain=0.1),
            build("semantic", DIGIT, 4, encoder, channels=3),
        ]
    )
    assert (bundle.names, bundle.channels) == (("texture", "edges", "semantic"), (4, 1, 3))
    raw = bundle.encode(images)
    assert raw.shape == (1500, 8, 4, 4)
    parts = bundle.split(raw)
    assert [part.shape[1] for part in parts] == [4, 1, 3]
    for part, item in zip(parts, bundle.representations):
        assert torch.equal(part, item.encode(images))
    assert torch.equal(bundle.concatenate(parts), raw)
    bundle = with_statistics(bundle, raw.split(400))
    assert torch.equal(bundle.decode(bundle.normalise(raw)), images)


def test_an_edited_plugin_replaces_the_old_one_and_has_another_fingerprint(tmp_path):
    load_plugin(_plugin(tmp_path))
    before = build("edges", DIGIT, 4)
    load_plugin(_plugin(tmp_path, suffix=" * 2"))
    after = build("edges", DIGIT, 4)
    images = _random_images(DIGIT)
    assert torch.equal(after.encode(images), before.encode(images) * 2)
    assert before.fingerprint() != after.fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "registers no representation"),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        (PLUGIN.format(name="texture", suffix=""), "'texture': already registered"),
    ],
)
def test_bad_plugins(tmp_path, content, message):
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_plugin(path)


def test_missing_plugin(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_plugin(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("[:, :, :2]", r"returned torch.float32 \[10, 1, 2, 4\]: must be float32 \[10, 1, 4, 4\]"),
        (".double()", "returned torch.float64"),
        (".numpy()", "returned ndarray"),
    ],
)
def test_wrong_output_of_a_plugin(tmp_path, suffix, message):
    load_plugin(_plugin(tmp_path, suffix=suffix))
    with pytest.raises(UserError, match=f"representation edges: encode: {message}"):
        checked_encode(build("edges", DIGIT, 4), _random_images(DIGIT))


def test_a_representation_without_channels():
    @register("nochannels")
    class NoChannels(Representation):
        pass

    with pytest.raises(UserError, match="must set channels"):
        build("nochannels", DIGIT, 4)


def test_fingerprints_change_with_weights_options_and_version(monkeypatch):
    def semantic(**options):
        torch.manual_seed(0)
        return build("semantic", DIGIT, 4, Classifier(DIGIT, 10, (16, 16), 4), **options)

    state = torch.random.get_rng_state()
    base = semantic()
    assert base.fingerprint() == semantic().fingerprint()
    fingerprints = {base.fingerprint(), semantic(channels=4).fingerprint(), semantic(semvae={"steps": 7}).fingerprint()}
    weight = base.vae.decoder.leave[1].bias
    weight.data[0] = torch.nextafter(weight.data[0], torch.tensor(9.0))
    fingerprints.add(base.fingerprint())
    encoder_changed = semantic()
    encoder_changed.encoder.stages[0].enter.convolution.weight.data[0, 0, 0, 0] += 1e-3
    fingerprints.add(encoder_changed.fingerprint())
    monkeypatch.setattr(type(base), "version", 2)
    fingerprints.add(semantic().fingerprint())
    assert len(fingerprints) == 6
    torch.random.set_rng_state(state)
    build("semantic", DIGIT, 4, encoder_changed.encoder)
    assert torch.equal(torch.random.get_rng_state(), state)  # building leaves the caller's generator alone


def test_streaming_statistics_equal_the_direct_ones():
    """Against numpy-style two-pass float64, also far from zero where single-pass sums of squares cancel."""
    x = torch.randn(1000, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 10
    x[:, 1] = x[:, 1] * 1e-3 + 1000
    streaming = StreamingStatistics(5)
    for part in x.split([1, 499, 0, 333, 167]):
        streaming.update(part)
    mean, std = streaming.result()
    exact = x.double()
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=1e-14, atol=0)
    torch.testing.assert_close(std, exact.std((0, 2, 3)), rtol=1e-12, atol=0)


def test_bundle_normalises_exactly_over_the_training_set():
    images = load_images("digits", ".", "train").images
    bundle = Bundle([build("texture", DIGIT, 4), build("lowfreq", DIGIT, 4)])
    raw = bundle.encode(images)
    bundle = with_statistics(bundle, raw.split(100))
    z = bundle.normalise(raw).double()
    assert z.shape[1:] == (5, 4, 4)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(bundle.denormalise(z.float()), raw, atol=1e-6, rtol=1e-6)
    assert bundle.statistics is not None
    other = LatentStatistics(
        (math.nextafter(bundle.statistics.mean[0], 9), *bundle.statistics.mean[1:]),
        bundle.statistics.std,
        bundle.statistics.representations,
    )
    assert other.fingerprint() != bundle.statistics.fingerprint()


def test_a_channel_that_never_varies_is_named():
    bundle = Bundle([build("texture", DIGIT, 4), build("lowfreq", DIGIT, 4)])
    raw = bundle.encode(_random_images(DIGIT))
    raw[:, 4] = 3.0
    with pytest.raises(UserError, match=r"representation lowfreq: std of channel 0: .*must be positive"):
        with_statistics(bundle, raw.split(4))
    raw[:, 4] = float("nan")
    with pytest.raises(UserError, match="representation lowfreq: std of channel 0: nan"):
        with_statistics(bundle, raw.split(4))
