import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from wellposed.evaluation.frontier import Frontier, FrontierPoint, compare, perplexity_at_entropy
from wellposed.evaluation.ngram import NgramScorer
from wellposed.evaluation.text import generative_perplexity


def frontier(curves, name="a", **changes):
    """From, per seed, a list of (entropy, log perplexity); the temperatures are 1, 2, ..."""
    points = tuple(
        FrontierPoint(
            setting=float(i + 1),
            entropies=tuple(curve[i][0] for curve in curves),
            log_perplexities=tuple(curve[i][1] for curve in curves),
        )
        for i in range(len(curves[0]))
    )
    fields = {
        "name": name,
        "knob": "temperature",
        "seeds": tuple(range(len(curves))),
        "points": points,
        "scorer": "judge",
        "scorer_card": {"kind": "judge"},
        "length": 64,
        "num_samples": 16,
    }
    return Frontier(**{**fields, **changes})


def line(entropies, slope=1.0, offset=0.0):
    return [(h, slope * h + offset) for h in entropies]


def test_reads_a_line_exactly_and_hits_the_points():
    found = frontier([line([3.0, 4.0, 5.5], slope=0.7, offset=0.2)])
    for entropy in (3.0, 3.3, 4.0, 5.1, 5.5):
        reading = perplexity_at_entropy(found, entropy)
        assert reading.perplexity == pytest.approx(math.exp(0.7 * entropy + 0.2), rel=1e-14)
        assert reading.log_standard_error is None


def test_order_of_the_entropies_is_free():
    """A larger temperature need not mean a larger entropy."""
    knots = [(4.0, 2.0), (3.0, 1.0), (5.0, 4.0)]
    assert perplexity_at_entropy(frontier([knots]), 4.5).perplexity == pytest.approx(math.exp(3.0))
    assert frontier([knots]).entropy_range == (3.0, 5.0)


def test_points_of_equal_entropy_count_as_their_mean():
    knots = [(3.0, 1.0), (4.0, 2.0), (4.0, 4.0), (5.0, 6.0)]
    assert perplexity_at_entropy(frontier([knots]), 4.0).perplexity == pytest.approx(math.exp(3.0))
    assert perplexity_at_entropy(frontier([knots]), 3.5).perplexity == pytest.approx(math.exp(2.0))


def test_readings_are_means_over_seeds_of_the_logarithm():
    found = frontier([line([3.0, 5.0], offset=d) for d in (-0.1, 0.0, 0.4)])
    reading = perplexity_at_entropy(found, 4.0)
    assert reading.perplexity == pytest.approx(math.exp(4.1))
    assert reading.log_standard_error == pytest.approx(np.std([-0.1, 0.0, 0.4], ddof=1) / math.sqrt(3))


def test_nothing_is_extrapolated():
    found = frontier([line([3.0, 5.0]), line([3.5, 6.0])])
    assert found.entropy_range == (3.5, 5.0)
    for entropy in (3.4, 5.1, math.nan):
        with pytest.raises(ValueError, match=r"outside of what 'a' reaches with every seed, \[3.5, 5\] nats; widen"):
            perplexity_at_entropy(found, entropy)


def test_points_have_standard_errors_over_seeds():
    point = FrontierPoint(setting=0.9, log_perplexities=(1.0, 2.0, 6.0), entropies=(4.0, 4.2, 4.4))
    assert point.perplexity == pytest.approx(math.exp(3.0))
    assert point.log_standard_error == pytest.approx(math.sqrt(7.0 / 3))
    assert point.entropy == pytest.approx(4.2)
    assert point.entropy_standard_error == pytest.approx(0.2 / math.sqrt(3))


def test_gap_of_shifted_curves_is_the_shift():
    knots = [(3.0, 1.0), (3.7, 1.2), (4.1, 2.9), (5.0, 3.0)]
    a = frontier([[(h, y + 0.25) for h, y in knots]])
    gap = compare(a, frontier([knots], "b"))
    assert gap.log_gap == pytest.approx(0.25, abs=1e-14)
    assert gap.ratio == pytest.approx(math.exp(0.25))
    assert gap.entropy_range == (3.0, 5.0)
    assert gap.standard_error is None
    assert compare(a, a).log_gap == 0.0


def test_gap_is_the_exact_mean_over_the_common_interval():
    """Knots that interleave and ends that do not agree, against a fine grid."""
    generator = np.random.default_rng(0)
    a = np.transpose([np.sort(generator.uniform(2, 5, 6)), generator.normal(size=6)]).tolist()
    b = np.transpose([np.sort(generator.uniform(3, 6, 7)), generator.normal(size=7)]).tolist()
    low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
    middles = low + (np.arange(200_000) + 0.5) / 200_000 * (high - low)
    expected = np.mean(np.interp(middles, *np.transpose(a)) - np.interp(middles, *np.transpose(b)))
    gap = compare(frontier([a]), frontier([b], "b"))
    assert gap.entropy_range == (low, high)
    assert gap.log_gap == pytest.approx(expected, abs=1e-9)
    assert compare(frontier([b], "b"), frontier([a])).log_gap == pytest.approx(-gap.log_gap, abs=1e-14)


def test_errors_of_independent_seeds_add_in_squares_and_paired_ones_cancel():
    offsets = (-0.2, 0.1, 0.4)
    a = frontier([line([3.0, 5.0], offset=1.0 + d) for d in offsets])
    b = frontier([line([3.0, 5.0], offset=d) for d in offsets], "b")
    one = np.std(offsets, ddof=1) / math.sqrt(3)
    apart, paired = compare(a, b), compare(a, b, paired=True)
    assert apart.log_gap == paired.log_gap == pytest.approx(1.0)
    assert apart.standard_error == pytest.approx(math.sqrt(2) * one)
    assert paired.standard_error == pytest.approx(0.0, abs=1e-12)
    assert str(apart) == "log perplexity +1 +- 0.24 over entropies [3, 5] nats"
    single = frontier([line([3.0, 5.0])], "c")
    assert compare(a, single).standard_error is None


def scores(temperatures=(0.8, 1.0), seeds=(0, 1), length=20, count=6, judge=None):
    tokens = torch.arange(200) % 7
    judge = judge or NgramScorer.fit(tokens, 7, order=2)
    found = {}
    for temperature in temperatures:
        found[temperature] = {}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed + round(1000 * temperature))
            samples = torch.randint(
                2 + round(5 * temperature / max(temperatures)), (count, length), generator=generator
            )
            found[temperature][seed] = generative_perplexity(samples.clamp(max=6), judge)
    return found


def test_from_scores_holds_them_and_survives_json():
    held = scores(temperatures=(1.0, 0.8), seeds=(3, 1))
    found = Frontier.from_scores("udm", "temperature", held)
    assert found.seeds == (1, 3)
    assert [point.setting for point in found.points] == [0.8, 1.0]
    for point in found.points:
        for i, seed in enumerate(found.seeds):
            assert math.exp(point.log_perplexities[i]) == pytest.approx(held[point.setting][seed].value)
            assert point.entropies[i] == held[point.setting][seed].entropy
    assert (found.length, found.num_samples) == (20, 6)
    assert Frontier.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_scores_that_cannot_be_compared_make_no_frontier():
    held = scores()
    other_judge = scores(judge=NgramScorer.fit(torch.arange(50) % 7, 7, order=1))
    for wrong, message in (
        ({}, "no scores"),
        ({0.8: {}}, "no scores"),
        ({0.8: held[0.8], 1.0: {0: held[1.0][0]}}, r"at temperature 1 the seeds are \[0\]; expected \[0, 1\]"),
        ({0.8: held[0.8], 1.0: other_judge[1.0]}, "are mixed; take one judge"),
        ({0.8: held[0.8], 1.0: scores(length=21)[1.0]}, "entropy depends on it"),
        ({0.8: held[0.8], 1.0: scores(count=5)[1.0]}, "equal numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Frontier.from_scores("udm", "temperature", wrong)


def test_frontiers_that_cannot_be_compared():
    a = frontier([line([3.0, 5.0])])
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(a, replace(a, scorer_card={"kind": "other"}))
    with pytest.raises(ValueError, match="at length 64, 'a' by 'judge' at length 65"):
        compare(a, replace(a, length=65))
    with pytest.raises(ValueError, match=r"no interval in common"):
        compare(a, frontier([line([5.0, 6.0])], "b"))
    with pytest.raises(ValueError, match="do not pair"):
        compare(a, replace(a, seeds=(7,)), paired=True)


def test_refusals():
    a = frontier([line([3.0, 5.0])])
    for changes, message in (
        ({"seeds": ()}, "seeds are"),
        ({"points": ()}, "settings are"),
        ({"points": a.points[::-1]}, "rising order"),
        ({"seeds": (0, 1)}, "for 2 seeds"),
        ({"points": (replace(a.points[0], entropies=(math.nan,)),)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(a, **changes)
    with pytest.raises(ValueError, match="each once"):
        frontier([line([3.0, 5.0])] * 2, seeds=(1, 1))
