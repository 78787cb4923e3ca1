"""Frechet distance and streaming statistics against closed forms, scipy and numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastasync.errors import UserError
from fastasync.evaluation import GaussianStatistics, StatisticsAccumulator, frechet_distance
from fastasync.evaluation.frechet import frechet_influence


def gaussian(seed: int, dims: int, rank: int | None = None, count: int | None = 1000) -> GaussianStatistics:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dims, rank or 3 * dims, generator=generator, dtype=torch.float64)
    mean = torch.randn(dims, generator=generator, dtype=torch.float64)
    return GaussianStatistics(mean, factor @ factor.T / factor.shape[1], count)


def statistics(features: torch.Tensor) -> GaussianStatistics:
    accumulator = StatisticsAccumulator()
    accumulator.update(features)
    return accumulator.statistics()


def rotation(seed: int, dims: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("rank", [None, 7, 1])
def test_identical_statistics_have_distance_zero(rank):
    a = gaussian(0, 50, rank)
    assert frechet_distance(a, a) <= 1e-12 * float(a.cov.trace())


def test_shifted_and_scaled_isotropic_gaussians():
    """N(0, I) against N(m, s^2 I): |m|^2 + D (1 - s)^2."""
    dims, scale = 20, 1.7
    shift = torch.linspace(-1, 1, dims, dtype=torch.float64)
    eye = torch.eye(dims, dtype=torch.float64)
    a, b = GaussianStatistics(torch.zeros_like(shift), eye), GaussianStatistics(shift, scale**2 * eye)
    expected = float(shift.square().sum()) + dims * (1 - scale) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_singular_commuting_covariances():
    """S_a = U diag(w) U^T, S_b = U diag(v) U^T: sum (sqrt w - sqrt v)^2, zeros included."""
    dims = 40
    basis = rotation(1, dims)
    w = torch.rand(dims, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    v = torch.rand(dims, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w[:25], v[15:35] = 0.0, 0.0  # different null spaces
    mean = torch.zeros(dims, dtype=torch.float64)
    a = GaussianStatistics(mean, basis @ w.diag() @ basis.T)
    b = GaussianStatistics(mean, basis @ v.diag() @ basis.T)
    expected = float((w.sqrt() - v.sqrt()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_rank_one_where_the_matrix_square_root_fails():
    """S = f f^T and g g^T: tr (S_a^1/2 S_b S_a^1/2)^1/2 = |f.g|; the square root of S_a S_b is hopeless here."""
    dims = 60
    generator = torch.Generator().manual_seed(4)
    f, g = torch.randn(2, dims, generator=generator, dtype=torch.float64)
    mean = torch.zeros(dims, dtype=torch.float64)
    a, b = GaussianStatistics(mean, torch.outer(f, f)), GaussianStatistics(mean, torch.outer(g, g))
    expected = float(f @ f + g @ g - 2 * (f @ g).abs())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    with np.errstate(all="ignore"):
        root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy())
    by_square_root = float(a.cov.trace() + b.cov.trace()) - 2 * float(np.trace(np.asarray(root)).real)
    assert not abs(by_square_root - expected) < 1e-9 * expected


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scipy_on_well_conditioned_covariances(seed):
    a, b = gaussian(seed, 30), gaussian(100 + seed, 30)
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_rotation_invariance():
    a, b, basis = gaussian(5, 25), gaussian(6, 25, rank=10), rotation(7, 25)
    turned = [GaussianStatistics(basis @ g.mean, basis @ g.cov @ basis.T) for g in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_tiny_negative_eigenvalues_are_clamped():
    basis, values = rotation(8, 10), torch.linspace(1, 2, 10, dtype=torch.float64)
    values[:3] = -1e-17
    a = GaussianStatistics(torch.zeros(10, dtype=torch.float64), basis @ values.diag() @ basis.T)
    assert frechet_distance(a, a) <= 1e-12
    zero = GaussianStatistics(torch.zeros(10, dtype=torch.float64), torch.zeros(10, 10, dtype=torch.float64))
    assert frechet_distance(a, zero) == pytest.approx(float(values[3:].sum()), rel=1e-12)


def test_sampled_gaussians_approach_the_closed_form():
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(100_000, 4, generator=generator)
    y = 2 * torch.randn(100_000, 4, generator=generator) + 1
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(4 + 4, rel=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.floats(-1e5, 1e5), st.booleans())
def test_any_split_and_merge_gives_numpys_covariance(sizes, offset, merged):
    features = torch.randn(sum(sizes) + 2, 5, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)
    features += offset
    total = StatisticsAccumulator()
    for part in features.split([*sizes, 2]):
        if merged:
            share = StatisticsAccumulator()
            share.update(part)
            total.merge(share)
        else:
            total.update(part)
    found = total.statistics()
    assert found.count == len(features)
    np.testing.assert_allclose(found.mean.numpy(), features.numpy().mean(0), rtol=1e-12, atol=1e-12)
    # numpy subtracts the mean of all rows at once: both round at eps * offset
    np.testing.assert_allclose(found.cov.numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_half_precision_features_are_accumulated_in_fp64():
    features = torch.randn(300, 6, generator=torch.Generator().manual_seed(10)).bfloat16()
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics(features).cov.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_and_statistics_are_refused(value):
    features = torch.zeros(10, 3)
    features[4, 1] = value
    with pytest.raises(UserError, match="NaN or Inf in 1 of 10 rows"):
        statistics(features)
    cov = torch.eye(3, dtype=torch.float64)
    cov[0, 0] = value
    with pytest.raises(UserError, match="NaN or Inf"):
        GaussianStatistics(torch.zeros(3, dtype=torch.float64), cov, 10)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_refused(count):
    with pytest.raises(UserError, match=f"{count} samples.*at least two"):
        statistics(torch.zeros(count, 3))


def test_shapes_and_extractors_must_match():
    with pytest.raises(UserError, match="one feature extractor"):
        frechet_distance(gaussian(0, 3), gaussian(0, 4))
    accumulator, other = StatisticsAccumulator(), StatisticsAccumulator()
    accumulator.update(torch.zeros(2, 3))
    other.update(torch.zeros(2, 4))
    with pytest.raises(UserError, match=r"expected \[N, 3\]"):
        accumulator.update(torch.zeros(2, 4))
    with pytest.raises(UserError, match="expected 3"):
        accumulator.merge(other)
    with pytest.raises(UserError, match=r"mean \[D\]"):
        GaussianStatistics(torch.zeros(3), torch.zeros(3, 4))
    a = gaussian(0, 3)
    named = [GaussianStatistics(a.mean, a.cov, 9, extractor) for extractor in ("aaaa", "bbbb", "")]
    with pytest.raises(UserError, match="extractors aaaa and bbbb"):
        frechet_distance(named[0], named[1])
    assert frechet_distance(named[0], named[2]) < 1e-12


def test_save_and_load(tmp_path):
    plain = gaussian(11, 6)
    saved = GaussianStatistics(plain.mean, plain.cov, 123, "abcd")
    saved.save(tmp_path / "s.npz")
    loaded = GaussianStatistics.load(tmp_path / "s.npz")
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.cov, saved.cov)
    assert (loaded.count, loaded.extractor) == (123, "abcd")
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_community_statistics_load(tmp_path):
    a = gaussian(12, 6)
    np.savez(tmp_path / "fid_stats.npz", mu=a.mean.numpy().astype(np.float32), sigma=a.cov.numpy())
    loaded = GaussianStatistics.load(tmp_path / "fid_stats.npz")
    assert loaded.mean.dtype == torch.float64
    assert (loaded.count, loaded.extractor) == (None, "")
    assert frechet_distance(loaded, a) < 1e-12


def test_bad_statistics_files(tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(UserError, match=r"s\.npz: no such file"):
        GaussianStatistics.load(path)
    gaussian(13, 64).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"s\.npz: truncated"):
        GaussianStatistics.load(path)
    path.write_text("not an npz")
    with pytest.raises(UserError, match="not an npz"):
        GaussianStatistics.load(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match="no array sigma"):
        GaussianStatistics.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"cov \[D, D\]"):
        GaussianStatistics.load(path)
    np.savez(path, mu=np.array(["a"]), sigma=np.zeros((1, 1)))
    with pytest.raises(UserError):
        GaussianStatistics.load(path)


def test_influence_is_the_change_of_the_distance_with_a_sample_s_weight():
    """Leaving a sample out changes the distance by -influence / (N - 1), to the first order."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 5, generator=generator, dtype=torch.float64) * torch.arange(1, 6) + 0.5
    reference = gaussian(3, 5)
    influence = frechet_influence(features, reference)
    whole = frechet_distance(statistics(features), reference)
    changes = []
    for i in range(40):
        rest = torch.cat([features[:i], features[i + 1 :]])
        changes.append(whole - frechet_distance(statistics(rest), reference))
    measured = torch.tensor(changes, dtype=torch.float64) * (len(features) - 1)
    assert abs(float(influence.mean())) < 1e-9
    torch.testing.assert_close(measured, influence[:40], rtol=0.05, atol=0.05 * float(influence.std()))


def test_influence_gives_the_standard_error_of_a_distance():
    """Against the spread of the distance over 200 independent sets."""
    reference, distances, errors = gaussian(4, 4), [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(1000, 4, generator=generator, dtype=torch.float64) * 1.5 + 1.0
        distances.append(frechet_distance(statistics(features), reference))
        errors.append(float(frechet_influence(features, reference).std()) / 1000**0.5)
    spread = float(torch.tensor(distances).std())
    assert abs(sum(errors) / len(errors) / spread - 1) < 0.15
