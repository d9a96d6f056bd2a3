import subprocess
import sys
from xml.etree import ElementTree

import pytest

from wellposed.report.drawing import tick_label
from wellposed.report.plots import Reference, Series, draw, lines, panels, scatter

STEPS = [5, 10, 25, 50, 100]
SVG = "{http://www.w3.org/2000/svg}"


def texts(picture):
    """Every text of an SVG with its place, in CSS pixels from the upper left."""
    found = {}
    for element in ElementTree.fromstring(picture.data).iter(f"{SVG}text"):
        x, y = (float(element.get(key, "nan")) for key in ("x", "y"))
        if x != x:
            x, y = map(float, element.get("transform").split("translate(")[1].split(")")[0].split())
        found["".join(element.itertext()).strip()] = (x, y)
    return found


def rates(**options):
    series = [
        Series(x=STEPS, y=[3.0 / n**2 for n in STEPS], method="full"),
        Series(x=STEPS, y=[1.0 / n for n in STEPS], method="isotropic", label="best isotropic"),
    ]
    return lines(series, "steps T", "path KL (nats)", xscale="log", yscale="log", **options)


def test_labels_axes_and_slopes_are_text_in_the_file():
    found = texts(draw(rates(title="Mixture", slopes=True)))
    expected = {"steps T", "path KL (nats)", "Mixture", "full: slope −2.00", "best isotropic: slope −1.00"}
    assert expected | {str(n) for n in STEPS} <= set(found)
    assert found["Mixture"][1] < found["path KL (nats)"][1] < found["steps T"][1] < found["full: slope −2.00"][1]


def test_slopes_are_fitted_within_the_range():
    bent = Series(x=STEPS, y=[9.0, 1.0, 1.0 / 2.5**2, 1.0 / 5**2, 1.0 / 10**2], method="full")
    panel = lines([bent], "T", "KL", xscale="log", yscale="log", slopes=True, slope_range=(10, 100))
    assert "full: slope −2.00" in texts(draw(panel))


def test_over_a_linear_axis_the_fit_is_a_factor():
    depths = list(range(7))
    law = [3.0**-m for m in depths]
    panel = lines(
        [Series(x=depths, y=law, method="lgs", band=([v / 2 for v in law], [v * 2 for v in law]))],
        "m",
        "error",
        yscale="log",
        slopes=True,
        references=[Reference(label="3⁻ᵐ", x=depths, y=law), Reference(label="rounding", y=1e-3)],
    )
    assert {"LGS, adaptive m: ×0.33 per unit", "3⁻ᵐ", "rounding", "10⁻³", "0.01"} <= set(texts(draw(panel)))


def test_the_same_panel_gives_the_same_bytes():
    first, second = draw(rates(slopes=True)), draw(rates(slopes=True))
    assert first == second
    assert b"<dc:date>" not in first.data
    assert draw(rates()) != first


def test_colours_are_those_of_the_method():
    picture = draw(rates()).data.decode()
    assert "#132d7d" in picture
    assert "#d55e00" in picture
    assert "#009e73" not in picture


def test_a_figure_is_small_and_as_wide_as_a_phone():
    picture = draw(rates(slopes=True))
    assert picture.media_type == "image/svg+xml"
    assert picture.width == 360
    assert len(picture.data) < 30_000
    assert panels([rates(), rates(), rates()]).width == 3 * 360


def test_missing_and_impossible_points_are_left_out():
    holes = Series(x=[1, 2, None, 4, 8], y=[1.0, None, 3.0, float("nan"), 0.1], method="lgs", error=[0.1] * 5)
    picture = draw(lines([holes], "x", "y", xscale="log", yscale="log"))
    assert b"nan" not in picture.data


def test_curves_without_markers_have_none():
    many = Series(x=list(range(300)), y=[1.0 + i for i in range(300)], label="run")
    with_markers, without = (draw(lines([many], "step", "loss", markers=flag)).data for flag in (True, False))
    assert with_markers.count(b"<use ") - without.count(b"<use ") >= 300


def test_labels_of_points_stand_beside_their_points_and_apart_from_each_other():
    labelled = Series(x=[1, 1.05, 10], y=[1, 1.02, 10], method="lgs", point_labels=["first", "second", ""])
    found = texts(draw(scatter([labelled], "ms", "Fréchet distance")))
    assert {"first", "second"} <= set(found)
    (x1, y1), (x2, y2) = found["first"], found["second"]
    assert abs(x1 - x2) > 20 or abs(y1 - y2) > 7


def test_labels_of_points_stay_within_the_axes():
    corners = Series(x=[1, 100], y=[1, 100], method="lgs", point_labels=["lower left", "upper right"])
    found = texts(draw(scatter([corners], "x", "y")))
    assert 44 <= found["lower left"][0] <= 348
    assert 44 <= found["upper right"][0] <= 348


def test_bad_panels_are_refused():
    one = [Series(x=[1, 2], y=[1, 2], method="lgs")]
    with pytest.raises(ValueError, match="no series"):
        lines([], "x", "y")
    with pytest.raises(ValueError, match="yscale='log'"):
        lines(one, "x", "y", slopes=True)
    with pytest.raises(ValueError, match="no panels"):
        panels([])
    with pytest.raises(ValueError, match="write one of full"):
        draw(lines([Series(x=[1], y=[1], method="unheard")], "x", "y"))


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (25, "25"),
        (1e5, "10⁵"),
        (1e-3, "10⁻³"),
        (2e-4, "2·10⁻⁴"),
        (-0.5, "−0.5"),
        (1e-12, "10⁻¹²"),
    ],
)
def test_tick_labels(value, label):
    assert tick_label(value) == label


def test_without_matplotlib_the_message_says_what_to_install():
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from wellposed.report.plots import Series, draw, lines\n"
        "panel = lines([Series(x=[1], y=[1.0], label='a')], 'x', 'y')\n"
        "try:\n    draw(panel)\n"
        "except ImportError as error:\n    sys.exit(0 if 'wellposed[plots]' in str(error) else 1)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(rates())
    assert dict(matplotlib.rcParams) == before
