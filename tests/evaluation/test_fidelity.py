"""KID, precision and recall, IS against short direct implementations; what `evaluate` reports and refuses."""

import numpy as np
import pytest
import torch

from fastasync.compat import import_torch_fidelity
from fastasync.errors import UserError
from fastasync.evaluation import (
    ClassifierFeatures,
    GaussianStatistics,
    evaluate,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(seed: int, count: int, dims: int = 6, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)) + shift


def test_kernel_distance_is_the_unbiased_estimator():
    """One subset that is the whole set: the U-statistic of (x.y / D + 1)^3."""
    x, y = normal(0, 40), normal(1, 40, shift=0.5)
    kxx, kyy, kxy = (((a.double() @ b.double().T) / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (40 * 39) for k in (kxx, kyy)]
    expected = float(within[0] + within[1] - 2 * kxy.mean())
    mean, std = kernel_distance(x, y, subsets=1, subset_size=40)
    assert mean == pytest.approx(expected, rel=1e-12)
    assert std == 0


def test_kernel_distance_is_that_of_torch_fidelity():
    import_torch_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(3, 300, dims=64).float(), normal(4, 400, dims=64).float() + 0.1
    theirs = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=20, kid_subset_size=100, rng_seed=5, verbose=False
    )
    mean, std = kernel_distance(x, y, 20, 100, seed=5)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_is_seeded_and_near_zero_for_one_distribution():
    x, y, far = normal(0, 500), normal(1, 500), normal(2, 500, shift=0.3)
    assert kernel_distance(x, y, 20, 100, seed=1) == kernel_distance(x, y, 20, 100, seed=1)
    assert kernel_distance(x, y, 20, 100, seed=1) != kernel_distance(x, y, 20, 100, seed=2)
    assert abs(kernel_distance(x, y, 50, 200)[0]) < 0.1 * kernel_distance(x, far, 50, 200)[0]


def test_precision_recall_against_brute_force():
    samples, reference, k = normal(3, 60, 3, shift=0.8).double(), normal(4, 80, 3).double(), 3

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = torch.stack([(centres - c).norm(dim=1).sort().values[k] for c in centres])
        return float(np.mean([bool(((centres - p).norm(dim=1) <= radii).any()) for p in points]))

    expected = covered(samples, reference), covered(reference, samples)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert precision_recall(samples, reference, k) == pytest.approx(expected, abs=1e-6)  # torch-fidelity: fp32 mean


def test_precision_recall_of_equal_and_distant_sets():
    x = normal(5, 50)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_inception_score_of_uniform_and_certain_predictions():
    assert inception_score(torch.zeros(100, 8))[0] == pytest.approx(1.0)
    certain = torch.eye(8).repeat(25, 1) * 1000
    assert inception_score(certain, splits=1)[0] == pytest.approx(8.0)


def test_functions_refuse_what_they_cannot_use():
    x = normal(6, 10)
    with pytest.raises(UserError, match=r"kid subset_size: 11: choose 2 to 10"):
        kernel_distance(x, normal(7, 20), subset_size=11)
    with pytest.raises(UserError, match="choose 1 to 9"):
        precision_recall(x, x, neighbours=10)
    with pytest.raises(UserError, match=r"\[N, D\]"):
        kernel_distance(x, normal(7, 10, dims=3), subset_size=5)
    with pytest.raises(UserError, match="choose 1 to 10"):
        inception_score(x, splits=11)
    with pytest.raises(UserError, match="NaN or Inf logits"):
        inception_score(torch.full((10, 3), torch.nan))


def test_evaluate_reports_every_metric(extractor, photos):
    result = evaluate(
        photos(200, 1), photos(300, 2), extractor, ("fid", "kid", "precision_recall", "is"), kid_subset_size=150
    )
    assert set(result["settings"]) == {"fid", "kid", "precision", "recall", "is"}
    assert all(np.isfinite(result[name]) for name in ("fid", "kid", "kid_std", "precision", "recall", "is", "is_std"))
    assert (result["samples"], result["reference"]) == (200, 300)
    assert (result["extractor"], result["fingerprint"]) == ("tiny", extractor.fingerprint)
    assert result["settings"]["kid"] == "100 subsets of 150, seed 0"
    assert result["notes"] == []


def test_identical_sets_and_order(extractor, photos):
    images = photos(100, 3)
    scale = float(extractor.extract(images).statistics().cov.trace())
    assert evaluate(images, images.flip(0), extractor)["fid"] <= 1e-6 * scale
    dark = evaluate(photos(100, 4, 0, 200), images, extractor)["fid"]
    darker = evaluate(photos(100, 4, 0, 100), images, extractor)["fid"]
    assert 0 < dark < darker


def test_agrees_with_torch_fidelity(extractor, photos):
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    samples, reference = photos(200, 5, 0, 150), photos(200, 6)
    theirs = [fid_features_to_statistics(extractor(images).double()) for images in (samples, reference)]
    expected = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert evaluate(samples, reference, extractor)["fid"] == pytest.approx(expected, rel=1e-6)


def test_precomputed_features_and_statistics_give_the_same_figures(extractor, photos):
    samples, reference = photos(150, 7), photos(150, 8)
    metrics = ("fid", "kid", "precision_recall", "is")
    from_images = evaluate(samples, reference, extractor, metrics)
    sets = extractor.extract(samples), extractor.extract(reference)
    assert evaluate(*sets, extractor, metrics) == from_images
    by_statistics = evaluate(samples, sets[1].statistics(), extractor, metrics)
    assert by_statistics["fid"] == from_images["fid"]
    assert by_statistics["reference"] == 150
    assert not {"kid", "precision", "recall"} & set(by_statistics)
    assert [note.split()[0] for note in by_statistics["notes"]] == ["kid", "precision_recall"]


def test_notes(tiny, photos):
    headless = ClassifierFeatures(tiny(), "headless")
    result = evaluate(photos(12, 9), photos(40, 10), headless, ("fid", "kid", "is"))
    assert "is" not in result
    assert "is omitted: headless has no classification layer" in result["notes"]
    assert "kid: subsets of 12 instead of 1000, the size of the smaller set" in result["notes"]
    assert "fid: 12 samples for 12 features, the covariance is singular" in result["notes"]


def test_evaluate_refuses(extractor, tiny, photos):
    images = photos(20, 11)
    with pytest.raises(UserError, match="did you mean 'kid'"):
        evaluate(images, images, extractor, ("kit",))
    other = ClassifierFeatures(tiny(seed=1), "other")
    for reference in (other.extract(images), other.extract(images).statistics()):
        with pytest.raises(UserError, match=r"features of the reference.*another extractor than tiny"):
            evaluate(images, reference, extractor)
    with pytest.raises(UserError, match="1 samples"):
        evaluate(images[:1], images, extractor)
    wide = GaussianStatistics(torch.zeros(3).double(), torch.eye(3).double())
    with pytest.raises(UserError, match="12 and 3 features"):
        evaluate(images, wide, extractor)
