from itertools import combinations

import numpy as np
import pytest
from matplotlib.lines import Line2D

from wellposed.report.styles import (
    AUTOENCODER_STYLES,
    COVARIANCE_STYLES,
    METHOD_STYLES,
    TOKEN_REDUCTION_STYLES,
    TOKEN_STYLES,
    method_style,
)

TABLES = [COVARIANCE_STYLES, TOKEN_STYLES, TOKEN_REDUCTION_STYLES, AUTOENCODER_STYLES]
NAMES = ["covariances", "tokens", "token reduction", "autoencoders"]

# Linear RGB as it looks without one kind of cone, at full severity: Machado, Oliveira and Fernandes 2009.
VISIONS = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = XYZ @ np.ones(3)


def linear_rgb(color):
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(linear):
    """CIE 1976 L*a*b*, in which colours 2 apart can just be told from each other."""
    t = XYZ @ np.clip(linear, 0, 1) / WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
@pytest.mark.parametrize("vision", VISIONS)
def test_colors_can_be_told_apart_with_every_colour_vision(vision, table):
    seen = {name: lab(np.array(VISIONS[vision]) @ linear_rgb(style.color)) for name, style in table.items()}
    distance, *pair = min((float(np.linalg.norm(seen[a] - seen[b])), a, b) for a, b in combinations(seen, 2))
    assert distance > 7.5, pair


def test_colors_stand_out_from_white():
    for name, style in METHOD_STYLES.items():
        luminance = XYZ[1] @ linear_rgb(style.color)
        assert 1.05 / (luminance + 0.05) > 1.75, name


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_no_two_methods_look_alike_without_colour(table):
    looks = [(style.marker, style.dash, style.hollow, style.width) for style in table.values()]
    assert len(set(looks)) == len(looks)


def test_a_name_has_one_style():
    assert len(METHOD_STYLES) == sum(map(len, TABLES))


def test_markers_are_known_to_matplotlib():
    assert all(style.marker in Line2D.markers for style in METHOD_STYLES.values())


def test_unknown_methods_are_refused_and_unnamed_ones_take_turns():
    with pytest.raises(ValueError, match="write one of full, lgs"):
        method_style("lanczos")
    assert method_style("lgs", 3) == METHOD_STYLES["lgs"]
    assert len({method_style(None, position) for position in range(6)}) == 6
    assert method_style(None, 6) == method_style(None, 0)
