import math

import numpy as np
import pytest
import scipy.linalg
import torch

from wellposed.evaluation.features import FeatureExtractor
from wellposed.evaluation.frechet import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    frechet_distance_from_features,
    frechet_floor,
    frechet_score,
)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(n, dim, seed, rank=None):
    mixing = normal(rank or dim, dim, seed=seed + 1)
    return FeatureStatistics.from_features(normal(n, rank or dim, seed=seed) @ mixing + normal(dim, seed=seed + 2))


def by_sqrtm(a, b):
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    return float(((a.mean - b.mean) ** 2).sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace().real)


def mean_colour():
    return FeatureExtractor(function=lambda x: x.mean((2, 3)), name="mean colour", weights_hash="0" * 64)


@pytest.mark.parametrize("dim", [1, 5, 40])
def test_agrees_with_the_matrix_square_root(dim):
    a, b = statistics(200, dim, 0), statistics(150, dim, 10)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-10)


def test_closed_form_for_commuting_covariances():
    d1, d2 = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 0.0]).double()
    a = FeatureStatistics(mean=torch.zeros(3).double(), covariance=d1.diag(), n=10)
    b = FeatureStatistics(mean=torch.tensor([3.0, 0.0, 4.0]).double(), covariance=d2.diag(), n=10)
    assert frechet_distance(a, b) == pytest.approx(25.0 + 1.0 + 4.0, rel=1e-14)


def test_distance_to_itself_is_zero_also_when_singular():
    for a in (statistics(100, 30, 0), statistics(10, 30, 0), statistics(100, 30, 0, rank=3), statistics(1, 30, 0)):
        assert frechet_distance(a, a) <= 1e-12 * (1 + a.covariance.trace().item())


def test_symmetric_and_invariant_under_rotation():
    a, b = statistics(20, 30, 0), statistics(100, 30, 5)
    q = torch.linalg.qr(normal(30, 30, seed=9)).Q
    turned = [FeatureStatistics(mean=q @ s.mean, covariance=q @ s.covariance @ q.T, n=s.n) for s in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_singular_covariances_of_disjoint_support():
    a = FeatureStatistics(
        mean=torch.zeros(4).double(), covariance=torch.diag(torch.tensor([2.0, 0, 0, 0])).double(), n=9
    )
    b = FeatureStatistics(
        mean=torch.zeros(4).double(), covariance=torch.diag(torch.tensor([0, 3.0, 0, 0])).double(), n=9
    )
    assert frechet_distance(a, b) == pytest.approx(5.0, rel=1e-14)


def test_merging_equals_one_go():
    features = normal(57, 6, seed=0) * 3 + 100
    parts = [FeatureStatistics.from_features(part) for part in features.split([1, 20, 6, 30])]
    merged = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    assert merged.n == 57
    torch.testing.assert_close(merged.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, features.T.cov(), rtol=1e-11, atol=1e-12)


def test_float32_features_far_from_zero_keep_their_covariance():
    features = (normal(1000, 3, seed=0) + 1000).float()
    torch.testing.assert_close(
        FeatureStatistics.from_features(features).covariance, features.double().T.cov(), rtol=1e-11, atol=1e-12
    )


def test_save_and_load(tmp_path):
    a = statistics(50, 7, 0)
    a.save(tmp_path / "a.npz")
    b = FeatureStatistics.load(tmp_path / "a.npz")
    assert b.n == 50
    assert b.fingerprint() == a.fingerprint()
    assert frechet_distance(a, b) < 1e-12
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_loads_published_statistics_without_a_count(tmp_path):
    a = statistics(50, 7, 0)
    np.savez(tmp_path / "published.npz", mu=a.mean.numpy().astype(np.float32), sigma=a.covariance.numpy())
    b = FeatureStatistics.load(tmp_path / "published.npz")
    assert b.n is None
    assert b.mean.dtype == torch.float64
    b.save(tmp_path / "again.npz")
    assert FeatureStatistics.load(tmp_path / "again.npz").n is None
    with pytest.raises(ValueError, match="known n"):
        b.merge(a)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="mu and sigma"):
        FeatureStatistics.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="sigma"):
        FeatureStatistics.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(ValueError, match="plain arrays"):
        FeatureStatistics.load(tmp_path / "pickled.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ValueError, match="plain arrays"):
        FeatureStatistics.load(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="npz"):
        statistics(5, 2, 0).save(tmp_path / "a.pt")


def test_refuses_other_dimensions_and_nan():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(statistics(9, 3, 0), statistics(9, 4, 0))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics.from_features(torch.tensor([[math.nan, 1.0], [0.0, 1.0]]))


def test_streaming_over_batches_equals_one_tensor():
    images = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = feature_statistics(images, mean_colour(), batch_size=30)
    pieces = feature_statistics(iter(images.split(7)), mean_colour())
    assert pieces.n == whole.n == 30
    assert frechet_distance(whole, pieces) < 1e-12
    with pytest.raises(ValueError, match="no images"):
        feature_statistics(iter(()), mean_colour())


def test_score_carries_its_card():
    generator = torch.Generator().manual_seed(0)
    images, real = torch.rand(20, 3, 4, 4, generator=generator), torch.rand(50, 3, 4, 4, generator=generator)
    reference = feature_statistics(real, mean_colour())
    score = frechet_score(images, extractor=mean_colour(), reference=reference, reference_name="noise")
    expected = frechet_distance_from_features(images.mean((2, 3)), real.mean((2, 3)))
    assert score.value == pytest.approx(expected, rel=1e-6)
    record = score.to_dict()
    assert (record["num_images"], record["reference_num_images"]) == (20, 50)
    assert record["reference_hash"] == reference.fingerprint()
    assert record["value_range"] == [0.0, 1.0]
    assert "\n" not in str(score)
    assert all(part in str(score) for part in ("mean colour", "n=20", "noise", "[0, 1]"))
    assert "FID" not in str(score)


def test_images_outside_the_unit_range_are_refused_and_never_stretched():
    reference = feature_statistics(torch.rand(9, 3, 4, 4), mean_colour())
    for images in (torch.full((2, 3, 4, 4), -0.1), torch.full((2, 3, 4, 4), 255.0), torch.full((2, 3, 4, 4), math.nan)):
        with pytest.raises(ValueError, match="unit_images"):
            frechet_score(images, extractor=mean_colour(), reference=reference, reference_name="noise")


def test_floor_shrinks_with_the_number_of_images():
    features = normal(1200, 10, seed=0)
    generator = torch.Generator().manual_seed(0)
    few, many = (frechet_floor(features, num_images=n, generator=generator) for n in (30, 600))
    assert 0 < many < few / 4
    with pytest.raises(ValueError, match="num_images"):
        frechet_floor(features, num_images=1200, generator=generator)
