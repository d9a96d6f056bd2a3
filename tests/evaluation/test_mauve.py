import json
import math

import pytest
import torch

from wellposed.evaluation.mauve import _k_means, _principal, mauve, mauve_from_histograms


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def histogram(*weights):
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def test_equal_histograms_enclose_everything():
    p = histogram(1, 2, 3, 0)
    assert mauve_from_histograms(p, p) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("c", [1, 2, 5])
def test_closed_form_of_disjoint_histograms(c):
    """The curve is ((1 - w)^c, w^c), so the area is c B(c + 1, c)."""
    p, q = histogram(1, 3, 0, 0), histogram(0, 0, 5, 1)
    expected = math.factorial(c) ** 2 / math.factorial(2 * c)
    assert mauve_from_histograms(p, q, scaling=c, num_points=20_001) == pytest.approx(expected, rel=1e-6)
    assert mauve_from_histograms(p, q, scaling=c) == pytest.approx(expected, abs=0.005)


def test_closed_form_where_one_holds_the_other():
    """p on one bin of two, q uniform, c = 1. With r = ((1 + w) / 2, (1 - w) / 2) the curve is x = sqrt(1 - w^2),
    y = (1 + w) / 2: the area is 1/2, from the vertical stretch at y < 1/2 where x = 1, plus pi / 8.
    """
    p, q = histogram(1, 0), histogram(1, 1)
    assert mauve_from_histograms(p, q, scaling=1, num_points=20_001) == pytest.approx(0.5 + math.pi / 8, abs=1e-5)


def test_agrees_with_the_published_package():
    """Values of mauve-text 0.4.0 (its curve and area, 25 points, scaling constant 5) for these two histograms."""
    p, q = histogram(0, 1, 2, 3, 4), histogram(4, 1, 3, 0, 2)
    assert mauve_from_histograms(p, q) == pytest.approx(0.18746209471270694, abs=1e-12)


def test_symmetric():
    p, q = histogram(0, 1, 2, 3, 4), histogram(4, 1, 3, 0, 2)
    assert mauve_from_histograms(p, q) == pytest.approx(mauve_from_histograms(q, p), rel=1e-12)


def test_falls_as_the_histograms_part():
    p, q = histogram(5, 3, 1, 1), histogram(1, 1, 3, 5)
    scores = [mauve_from_histograms(p, (1 - mix) * p + mix * q) for mix in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 5
    assert mauve_from_histograms(p, q, scaling=1) > mauve_from_histograms(p, q)


def test_features_of_one_law_against_those_of_another():
    p, q = normal(600, 16, seed=0) + 1, normal(600, 16, seed=1) + 1
    direction = torch.zeros(16, dtype=torch.float64).index_fill(0, torch.arange(4), 1.0)
    scores = [mauve(p, q + shift * direction, generator=generator()).value for shift in (0.0, 0.7, 1.5, 6.0)]
    assert scores[0] > 0.9
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.02


def test_the_same_features_score_one():
    p = normal(100, 8, seed=0)
    score = mauve(p, p.flip(0), generator=generator())
    assert score.value == pytest.approx(1.0, abs=1e-12)
    assert (score.num_clusters, score.num_p, score.num_q) == (10, 100, 100)


def test_finds_the_clusters_that_are_there():
    """Four far bundles, of which each set fills three: the score is that of the histograms over them."""
    corners = 10 * torch.eye(4, dtype=torch.float64)
    p = corners.repeat_interleave(torch.tensor([20, 10, 10, 0]), 0) + 0.01 * normal(40, 4, seed=0)
    q = corners.repeat_interleave(torch.tensor([0, 10, 20, 10]), 0) + 0.01 * normal(40, 4, seed=1)
    expected = mauve_from_histograms(histogram(20, 10, 10, 0), histogram(0, 10, 20, 10))
    assert mauve(p, q, num_clusters=4, generator=generator(), num_restarts=20).value == pytest.approx(
        expected, rel=1e-12
    )


def test_keeps_the_fewest_directions_that_hold_the_variance():
    """Spreads whose squares are 8, 4, 2 and 1 in orthogonal directions, after a turn."""
    spreads = torch.tensor([1.0, 8.0, 2.0, 4.0], dtype=torch.float64).sqrt().diag()
    points = torch.cat([spreads, -spreads]) @ torch.linalg.qr(normal(4, 4, seed=0)).Q + 3.0
    for share, kept in ((0.5, [8]), (0.54, [8, 4]), (0.79, [8, 4]), (0.81, [8, 4, 2]), (0.94, [8, 4, 2, 1])):
        squares = _principal(points, share).square().sum(0) / 2
        torch.testing.assert_close(squares, torch.tensor(kept).double(), rtol=1e-10, atol=0)


def test_k_means_leaves_no_cluster_unused():
    """Nearly all first centres coincide, on the copies of one point; the two others get a centre all the same."""
    points = torch.tensor([[10.0, 0.0]] * 12 + [[0.0, 10.0], [10.0, 10.0]], dtype=torch.float64)
    for seed in range(5):
        labels, cost = _k_means(points, 3, 100, generator(seed))
        assert cost == 0.0 and labels.unique().numel() == 3


def test_does_not_depend_on_scale_or_rotation():
    p, q = normal(200, 6, seed=0), normal(150, 6, seed=1) + 0.5
    turn = torch.linalg.qr(normal(6, 6, seed=2)).Q
    expected = mauve(p, q, generator=generator()).value
    assert mauve(3 * p @ turn, 0.1 * q @ turn, generator=generator()).value == pytest.approx(expected, rel=1e-9)


def test_duplicates_leave_clusters_empty_and_nothing_breaks():
    p = torch.ones(30, 3, dtype=torch.float64)
    assert mauve(p, p, generator=generator(), num_clusters=5).value == pytest.approx(1.0, abs=1e-12)


def test_record_is_plain():
    score = mauve(normal(30, 3, seed=0), normal(30, 3, seed=1), generator=generator())
    assert json.loads(json.dumps(score.to_dict()))["value"] == score.value
    assert str(score).startswith("MAUVE 0.") and "k=3, n=30 and 30, c=5" in str(score)


def test_refusals():
    p = normal(30, 3, seed=0)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        mauve(p, p[:, :2], generator=generator())
    with pytest.raises(ValueError, match="no features"):
        mauve(p, p[:0], generator=generator())
    with pytest.raises(ValueError, match="NaN"):
        mauve(p, p / 0, generator=generator())
    with pytest.raises(ValueError, match="num_clusters is 61"):
        mauve(p, p, num_clusters=61, generator=generator())
    with pytest.raises(ValueError, match="histograms"):
        mauve_from_histograms(histogram(1, 1), histogram(1, 1, 1))
    with pytest.raises(ValueError, match="histograms"):
        mauve_from_histograms(histogram(1, 1), 2 * histogram(1, 1))
    with pytest.raises(ValueError, match="scaling is 0"):
        mauve_from_histograms(histogram(1, 1), histogram(1, 1), scaling=0)
