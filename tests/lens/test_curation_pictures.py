"""Measures: their laws. Decoding: whatever the bytes are, a whole picture or the reason why not."""

import importlib.util
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from wellposed.data.decoding import BrokenPictureError
from wellposed.lens.curation_pictures import clarity, decode_quietly, exposure, information, reduced

SPEC = importlib.util.spec_from_file_location("planted_corpus", Path(__file__).with_name("planted_corpus.py"))
assert SPEC and SPEC.loader
corpus = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(corpus)

AREA = 384**2
LIMIT = 1 << 27


CLEAN, PLANTS = corpus.clean_files(), corpus.planted_files()


def decode(content, **options):
    return decode_quietly(content, max_pixels=LIMIT, **options)


def reason(content, **options):
    with pytest.raises(BrokenPictureError) as caught:
        decode(content, **options)
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


def test_laplacian_of_constants_and_ramps_is_zero():
    assert clarity(np.full((9, 7), 77, np.uint8)) == 0
    assert clarity(np.add.outer(3 * np.arange(20), 2 * np.arange(30)).astype(np.uint8)) == 0
    assert clarity(np.zeros((2, 50), np.uint8)) == 0


def test_laplacian_of_a_chequerboard_and_of_a_point():
    board = (np.indices((10, 10)).sum(0) % 2 * 200).astype(np.uint8)
    assert clarity(board) == 800**2  # +-800 in equal numbers
    point = np.zeros((7, 7), np.uint8)
    point[3, 3] = 10  # inside 5 x 5: one -40 and four 10, of mean zero
    assert clarity(point) == pytest.approx((40**2 + 4 * 10**2) / 25)


def test_clarity_goes_with_the_square_of_contrast_and_falls_with_blur():
    grey = np.asarray(corpus.photograph("astronaut").convert("L")) // 2
    assert clarity(2 * grey) == pytest.approx(4 * clarity(grey), rel=1e-6)
    blurred = [np.asarray(Image.fromarray(grey).filter(ImageFilter.GaussianBlur(r))) for r in (0, 1, 2, 4)]
    values = [clarity(picture) for picture in blurred]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] / 50


@pytest.mark.parametrize("levels", [1, 2, 3, 16, 256])
def test_equally_frequent_levels_have_the_logarithm_of_their_number_in_bits(levels):
    grey = np.repeat(np.arange(levels, dtype=np.uint8), 12).reshape(levels, 12)
    assert information(grey) == pytest.approx(math.log2(levels), abs=1e-12)
    assert information(grey[:, ::-1].copy()) == information(grey)


def test_exposure_of_black_white_and_full_colours():
    def one(*colour):
        return exposure(np.full((4, 5, 3), colour, np.uint8))

    assert one(0, 0, 0) == 0 and one(255, 255, 255) == 1
    assert one(255, 0, 0) == one(0, 255, 0) == one(0, 0, 255) == 1
    assert one(51, 10, 0) == pytest.approx(0.2)
    with Image.new("HSV", (3, 3), (40, 99, 153)) as picture:
        assert exposure(np.asarray(picture.convert("RGB"))) == pytest.approx(0.6, abs=1 / 255)


@pytest.mark.parametrize("name", ["astronaut", "grass"])
@pytest.mark.parametrize("times", [1.5, 2, 3])
def test_the_same_picture_in_another_size_measures_nearly_the_same(name, times):
    picture = corpus.photograph(name)
    larger = picture.resize((round(times * corpus.SIDE),) * 2, Image.Resampling.LANCZOS)
    ones, others = [decode(corpus.encoded(one, "JPEG", quality=95), enough=AREA).pixels for one in (picture, larger)]
    one, other = (np.asarray(reduced(image, AREA)) for image in (ones, others))
    assert one.shape == other.shape == (384, 384, 3)
    grey, other_grey = (np.asarray(Image.fromarray(image).convert("L")) for image in (one, other))
    assert 0.6 < clarity(other_grey) / clarity(grey) < 1.1
    assert information(other_grey) == pytest.approx(information(grey), abs=0.1)
    assert exposure(other) == pytest.approx(exposure(one), abs=0.01)
    # Not so without the reduction.
    assert clarity(np.asarray(larger.convert("L"))) < 0.6 * clarity(np.asarray(picture.convert("L")))


def test_nothing_is_enlarged():
    small = corpus.drawing(0, 90)
    assert reduced(small, AREA) is small
    assert reduced(small.resize((4000, 40)), 1600).size == (400, 4)


@pytest.mark.parametrize("name", CLEAN)
def test_whole_pictures_are_decoded_whatever_their_names(name):
    content = CLEAN[name]
    with Image.open(io.BytesIO(content)) as picture:
        kind, size = picture.format, picture.size
    whole = decode(content)
    assert whole.kind == kind and whole.pixels.mode == "RGB"
    assert (whole.width, whole.height) == whole.pixels.size
    assert sorted(whole.pixels.size) == sorted(size)
    assert whole.deep == (name == "clean/deep.png")


def test_a_camera_on_its_side_is_put_upright():
    upright = corpus.drawing(4).crop((0, 0, 400, 380))
    turned = decode(corpus.on_its_side(upright))
    assert (turned.width, turned.height) == turned.pixels.size == (400, 380)
    difference = np.abs(np.asarray(turned.pixels, np.int64) - np.asarray(upright))
    assert difference.mean() < 3


def test_transparency_is_white_and_sixteen_bits_become_eight():
    holes = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode(corpus.encoded(holes)).pixels).min() == 255
    deep = (np.arange(256, dtype=np.uint16)[None] << 8) + 255
    assert np.array_equal(np.asarray(decode(corpus.encoded(Image.fromarray(deep))).pixels)[0, :, 1], np.arange(256))


def test_a_reduced_jpeg_shows_the_same_and_knows_its_size():
    content = corpus.encoded(corpus.photograph("coffee", 1600), "JPEG", quality=92)
    whole, enough = decode(content), decode(content, enough=AREA)
    assert enough.pixels.size == (400, 400) and whole.pixels.size == (1600, 1600)
    assert (enough.width, enough.height) == (1600, 1600)
    small = np.asarray(whole.pixels.resize((400, 400), Image.Resampling.BOX), np.float64)
    assert np.abs(small - np.asarray(enough.pixels)).mean() < 1


@pytest.mark.parametrize(("name", "plant"), [p for p in PLANTS.items() if p[1][1] == "readable"])
def test_broken_files_are_refused_for_the_right_reason(name, plant):
    content, _, expected = plant
    if expected != "broken metadata":
        assert reason(content) == reason(content, enough=AREA) == expected


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 5}])
@pytest.mark.parametrize("enough", [None, 20**2])
def test_jpeg_headers_that_promise_too_much_are_found_out(options, enough):
    content = corpus.encoded(corpus.photograph("china", 96), "JPEG", quality=80, **options)
    assert decode(content, enough=enough).width == 96
    for width, height in ((96, 112), (96, 200), (112, 96), (200, 96)):
        assert reason(corpus.jpeg_of_claimed_size(content, width, height), enough=enough) == "lying header"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}])
def test_pictures_that_end_in_the_grey_of_missing_data_are_believed(options):
    half = Image.new("RGB", (96, 96), (128, 128, 128))
    half.paste(corpus.photograph("china", 96).crop((0, 0, 96, 40)))
    for picture in (half, half.convert("L"), Image.new("RGB", (96, 96), (128, 128, 128))):
        assert decode(corpus.encoded(picture, "JPEG", **options)).width == 96


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_png_headers_that_promise_too_much_are_found_out_and_black_ends_are_believed(mode):
    half = Image.new("RGB", (61, 50))
    half.paste(corpus.drawing(1, 61).crop((0, 0, 61, 30)))
    content = corpus.encoded(half.convert(mode))
    assert decode(content).height == 50
    assert reason(corpus.png_of_claimed_size(content, 61, 51)) == "lying header"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_cut_anywhere_never_pass_half_shown(kind):
    """Of a PNG the last pixels come before the last bytes: cut there it still shows everything."""
    content = corpus.encoded(corpus.drawing(3, 64), kind)
    whole = np.asarray(decode(content).pixels)
    for cut in np.linspace(1, len(content) - 1, 40).astype(int):
        shown = shown_or_reason(content[:cut])
        if isinstance(shown, str):
            assert shown in ("truncated", "not a picture", "undecodable", "lying header")
        else:
            assert np.array_equal(shown, whole) and cut > len(content) - 30


def shown_or_reason(content):
    try:
        return np.asarray(decode(content).pixels)
    except BrokenPictureError as error:
        return error.reason


def test_limits_hold_before_anything_is_decoded():
    content = corpus.encoded(corpus.drawing(0, 64))
    assert decode_quietly(content, max_pixels=64 * 64).width == 64
    with pytest.raises(BrokenPictureError, match="too many pixels: 64 x 64, the limit is 4095"):
        decode_quietly(content, max_pixels=64 * 64 - 1)


def test_floating_point_pictures_are_refused():
    assert reason(corpus.encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")) == "undecodable"
