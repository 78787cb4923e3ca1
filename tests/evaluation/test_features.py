"""Extractors: batching, value range, fingerprints, bad input."""

import pytest
import torch

from fastasync.errors import UserError
from fastasync.evaluation import ClassifierFeatures, frechet_distance


def test_features_are_the_modules_on_minus_one_to_one(tiny, photos):
    module, images = tiny(), photos(10, 1)
    extractor = ClassifierFeatures(module, "tiny")
    expected = module.features(images.double().div(127.5).sub(1).float())
    torch.testing.assert_close(extractor(images), expected.detach())
    assert extractor(images).dtype == torch.float32
    assert not extractor(images).requires_grad


def test_independent_of_batch_size(tiny, photos):
    images = photos(37, 2)
    small, large = (ClassifierFeatures(tiny(), "tiny", batch_size=size, has_logits=True) for size in (5, 100))
    torch.testing.assert_close(small.extract(images).features, large.extract(images).features)
    torch.testing.assert_close(small.extract(images).logits, large.extract(images).logits)


def test_logits_only_when_asked_for(tiny, photos):
    assert ClassifierFeatures(tiny(), "tiny").extract(photos(3, 3)).logits is None
    with_head = ClassifierFeatures(tiny(), "tiny", has_logits=True).extract(photos(3, 3))
    assert with_head.logits.shape == (3, 5)


def test_fingerprint_follows_the_weights(tiny):
    module = tiny()
    before = ClassifierFeatures(module, "tiny").fingerprint
    assert before == ClassifierFeatures(tiny(), "another name").fingerprint
    assert before != ClassifierFeatures(tiny(seed=1), "tiny").fingerprint
    with torch.no_grad():
        module.conv.bias[0] += 1e-6
    assert before != ClassifierFeatures(module, "tiny").fingerprint


def test_statistics_carry_the_extractor(tiny, photos):
    one, other = (ClassifierFeatures(tiny(seed=seed), "tiny").extract(photos(50, 4)) for seed in (0, 1))
    assert frechet_distance(one.statistics(), one.statistics()) < 1e-10
    with pytest.raises(UserError, match="extract both sets with the same one"):
        frechet_distance(one.statistics(), other.statistics())


def test_grey_images(tiny, photos):
    assert ClassifierFeatures(tiny(channels=1), "grey")(photos(4, 5, channels=1)).shape == (4, 12)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)]
    + [torch.zeros(2, 8, 8, 3, dtype=torch.uint8)],
    ids=["float", "one image", "none", "channels last"],
)
def test_bad_images(extractor, images):
    with pytest.raises(UserError, match="tiny"):
        extractor(images)


def test_bad_modules(tiny):
    with pytest.raises(UserError, match=r"method features\(x\)"):
        ClassifierFeatures(torch.nn.Linear(2, 2), "linear")
    headless = tiny()
    del headless.head
    with pytest.raises(UserError, match=r"method head\(x\)"):
        ClassifierFeatures(headless, "tiny", has_logits=True)
    with pytest.raises(UserError, match="batch_size"):
        ClassifierFeatures(tiny(), "tiny", batch_size=0)
