import math

import numpy as np
import pytest
from PIL import Image

from wellposed.data.buckets import BucketCount, BucketReport, Buckets, Size, cover_and_crop

BUCKETS = Buckets(
    by_base={
        64: (Size(48, 96), Size(64, 64), Size(96, 48)),
        32: (Size(32, 32), Size(24, 48), Size(48, 24)),
    },
    batch_sizes={32: 8, 64: 2},
)


def places(width, height):
    """A picture whose red and green say column and row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def test_buckets_are_numbered_by_base():
    assert [base for base, _ in BUCKETS.shapes] == [32, 32, 32, 64, 64, 64]
    assert BUCKETS.shapes[0] == (32, (32, 32))
    assert BUCKETS.shapes[5] == (64, (96, 48))


def test_the_nearest_shape_is_that_of_the_closest_log_ratio():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 300, (200, 2))
    numbers = BUCKETS.choices(sizes)
    for (height, width), row in zip(sizes.tolist(), numbers.tolist(), strict=True):
        native = Size(height, width)
        for base, number in zip((32, 64), row, strict=True):
            distances = {
                size: abs(math.log(height / width * size.width / size.height)) for size in BUCKETS.by_base[base]
            }
            nearest = BUCKETS.nearest(native, base)
            assert distances[nearest] == pytest.approx(min(distances.values()), abs=1e-12)
            fits = height >= nearest.height and width >= nearest.width
            assert (number >= 0) == fits
            if fits:
                assert BUCKETS.shapes[number] == (base, nearest)


def test_a_picture_belongs_where_it_need_not_grow():
    fits = BUCKETS.choices(np.array([(64, 64), (63, 64), (31, 64), (31, 31), (23, 5000)])) >= 0
    # 31 x 64 is nearest to 24 x 48.
    assert fits.tolist() == [[True, True], [True, False], [True, False], [False, False], [False, False]]


def test_tolerance_lets_small_enlargements_in():
    tolerant = Buckets(by_base={64: (Size(64, 64),)}, batch_sizes={64: 1}, tolerance=0.05)
    assert tolerant.choices(np.array([(61, 61), (60, 64)])).tolist() == [[0], [-1]]


def test_one_shape_for_all():
    fixed = Buckets.fixed(Size(16, 32), batch_size=3)
    assert fixed.shapes == ((22, Size(16, 32)),)
    assert fixed.nearest(Size(99, 1), 22) == (16, 32)
    assert fixed.batch_sizes == {22: 3}


def test_bad_buckets():
    square = {64: (Size(64, 64),)}
    for fields, message in (
        ({"by_base": {}, "batch_sizes": {}}, "at least one"),
        ({"by_base": square, "batch_sizes": {32: 1}}, r"shapes for \[64\] and batch_sizes numbers for \[32\]"),
        ({"by_base": square, "batch_sizes": {64: 0}}, "0 images in a share"),
        ({"by_base": {64: ()}, "batch_sizes": {64: 1}}, "at least one shape"),
        ({"by_base": {64: (Size(0, 64),)}, "batch_sizes": {64: 1}}, "positive numbers"),
        ({"by_base": {64: (Size(64, 64), Size(32, 32))}, "batch_sizes": {64: 1}}, "two shapes of one ratio"),
        ({"by_base": square, "batch_sizes": {64: 1}, "tolerance": -0.1}, "tolerance is -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            Buckets(**fields)
    with pytest.raises(ValueError, match=r"no shapes at base 128; bases are \[32, 64\]"):
        BUCKETS.nearest(Size(64, 64), 128)


@pytest.mark.parametrize(("place", "corner"), [((0.0, 0.0), 0), ((0.5, 0.5), 20), ((0.0, 1.0), 40)])
def test_a_picture_that_fits_is_cut_at_whole_pixels(place, corner):
    cut = np.asarray(cover_and_crop(places(100, 60), Size(60, 60), place=place))
    assert cut.shape == (60, 60, 3)
    assert (cut[:, :, 0] == corner + np.arange(60)).all()
    assert (cut[:, :, 1] == np.arange(60)[:, None]).all()


def test_a_reduced_picture_covers_and_keeps_its_ratio():
    cut = np.asarray(cover_and_crop(places(200, 100), Size(25, 25))).astype(float)
    scale = 4
    middle = scale * (np.arange(25) + 0.5) - 0.5
    assert np.abs(cut[2:-2, 2:-2, 0] - (50 + middle)[None, 2:-2]).max() <= 1
    assert np.abs(cut[2:-2, 2:-2, 1] - middle[2:-2, None]).max() <= 1
    lower = np.asarray(cover_and_crop(places(100, 200), Size(25, 25), place=(1.0, 0.0))).astype(float)
    assert np.abs(lower[2:-2, :, 1] - (100 + middle)[2:-2, None]).max() <= 1


def test_no_picture_grows_by_accident():
    with pytest.raises(ValueError, match=r"60 x 100 pixels does not cover 61 x 20.*upscale=True"):
        cover_and_crop(places(100, 60), Size(61, 20))
    assert cover_and_crop(places(100, 60), Size(61, 20), upscale=True).size == (20, 61)
    with pytest.raises(ValueError, match=r"place is \(0.5, 1.5\)"):
        cover_and_crop(places(100, 60), Size(6, 6), place=(0.5, 1.5))


def test_any_size_can_be_covered():
    """The box that is cut out never leaves the picture by rounding."""
    random = np.random.default_rng(1)
    for width, height, rows, columns in random.integers(1, 90, (500, 4)).tolist():
        place = tuple(random.random(2).tolist())
        cut = cover_and_crop(places(width, height), Size(rows, columns), place=place, upscale=True)
        assert cut.size == (columns, rows)


def test_the_report_is_a_table():
    full = BucketCount(base=32, size=Size(32, 32), batch_size=8, images=1_016, shares=127)
    starved = BucketCount(base=64, size=Size(48, 96), batch_size=4, images=3, shares=1)
    empty = BucketCount(base=64, size=Size(96, 48), batch_size=4, images=0, shares=0)
    report = BucketReport(images=1_030, too_small=11, cropped=0.0523, buckets=(full, starved, empty))
    assert (full.repeats, starved.repeats, empty.repeats, report.repeats) == (0, 1, 0, 1)
    assert report.starved == (starved,)
    assert str(report) == (
        "base   size  images  a share  shares  repeats\n"
        "  32  32x32   1,016        8     127        0\n"
        "  64  48x96       3        4       1        1  starved\n"
        "  64  96x48       0        4       0        0\n"
        "1,030 images: 11 too small for every bucket and left out, 1 repeats an epoch; 5.2 % of the pixels are cropped "
        "away"
    )
