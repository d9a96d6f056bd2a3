import math

import pytest

from wellposed.report.series import Reference, Series, decay_factor, fitted_slope, smoothed

STEPS = [8, 32, 128, 512]


def test_slope_of_a_power_is_its_exponent():
    assert fitted_slope(STEPS, [3.0 / n**2 for n in STEPS]) == pytest.approx(-2, abs=1e-12)


def test_slope_within_a_range_sees_nothing_else():
    values = [100.0, 1 / 32, 1 / 128, -5.0]
    assert fitted_slope(STEPS, values, (32, 128)) == pytest.approx(-1, abs=1e-12)
    assert fitted_slope(STEPS, values) != pytest.approx(-1, abs=0.1)


def test_slope_leaves_out_what_has_no_logarithm():
    x = [0, 1, 2, None, 4, 8, 16]
    y = [1.0, 1.0, 2.0, 3.0, math.nan, 8.0, 0.0]
    assert fitted_slope(x, y) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("x", [[], [2], [2, 2]])
def test_one_position_has_no_slope(x):
    assert math.isnan(fitted_slope(x, [1.0] * len(x)))
    assert math.isnan(decay_factor(x, [1.0] * len(x)))


def test_decay_factor_of_a_geometric_sequence():
    assert decay_factor(range(7), [0.5 * 3.0**-m for m in range(7)]) == pytest.approx(1 / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"y": [1.0]}, "y of the series 'full' has 1 entries for 2"),
        ({"y": [1.0, 2.0], "error": [1.0]}, "error of"),
        ({"y": [1.0, 2.0], "point_labels": ["a"]}, "point_labels of"),
        ({"y": [1.0, 2.0], "band": ([1.0, 2.0], [3.0])}, r"band\[1\] of"),
        ({"y": [1.0, 2.0], "method": None}, "neither method nor label"),
    ],
)
def test_uneven_series_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Series(**({"x": [1, 2], "method": "full"} | parts))


@pytest.mark.parametrize("parts", [{"y": [1.0, 2.0]}, {"y": 1.0, "x": [1, 2]}])
def test_a_reference_is_a_level_or_a_law(parts):
    with pytest.raises(ValueError, match="one number y and no x"):
        Reference(label="a", **parts)


def test_smoothing_is_a_mean_over_neighbours():
    assert smoothed([1.0, 2.0, 6.0, math.nan], 1)[:3] == [1.0, 2.0, 6.0]
    assert smoothed([1.0, 2.0, 6.0, math.nan], 3) == [1.5, 3.0, 4.0, 6.0]
    assert math.isnan(smoothed([math.nan], 3)[0])
    assert smoothed([4.0] * 9, 5) == [4.0] * 9
