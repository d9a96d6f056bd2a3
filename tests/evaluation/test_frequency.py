import json
import math

import pytest
import torch
from skimage.measure import block_reduce

from wellposed.evaluation.frequency import BandErrors, band_errors
from wellposed.evaluation.image_quality import psnr


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def enlarged(images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return images.repeat_interleave(rows, 2).repeat_interleave(columns, 3)


LISTS = [((32, 32), None), ((32, 32), (32, 8, 1)), ((32, 32), (4, 1)), ((24, 36), None), ((6, 4), ((6, 4), (3, 2), 1))]


@pytest.mark.parametrize(("size", "block_sizes"), LISTS)
def test_bands_sum_to_the_squared_error(size, block_sizes):
    images, targets = noise(5, 3, *size), noise(5, 3, *size, seed=1)
    bands = band_errors(images, targets, block_sizes)
    total = (images - targets).square().mean((1, 2, 3))
    torch.testing.assert_close(bands.mse.sum(1), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        10 * torch.log10(4 / bands.mse.sum(1)), psnr(images, targets, data_range=2.0), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(("size", "block_sizes"), LISTS)
def test_a_band_is_the_energy_of_its_means_less_that_of_coarser_ones(size, block_sizes):
    images, targets = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    bands = band_errors(images, targets, block_sizes)
    for k in range(2):
        error = (images - targets)[k].numpy()
        energies = [
            (block_reduce(error, (1, *block), func=lambda x, axis: x.mean(axis)) ** 2).mean()
            for block in bands.block_sizes
        ]
        expected = torch.tensor(energies, dtype=torch.float64).diff(prepend=torch.zeros(1))
        torch.testing.assert_close(bands.mse[k], expected, rtol=1e-10, atol=1e-14)


def test_default_halves_down_to_pixels():
    assert [size[0] for size in band_errors(noise(1, 1, 16, 16), noise(1, 1, 16, 16)).block_sizes] == [16, 8, 4, 2, 1]
    assert band_errors(noise(1, 1, 12, 8), noise(1, 1, 12, 8)).block_sizes == ((12, 8), (6, 4), (3, 2), (1, 1))
    assert band_errors(noise(1, 1, 7, 4), noise(1, 1, 7, 4)).block_sizes == ((7, 4), (1, 1))
    assert band_errors(noise(1, 1, 1, 1), noise(1, 1, 1, 1)).block_sizes == ((1, 1),)


@pytest.mark.parametrize("block_sizes", [(8, 4, 2, 1), (8, 2, 1), ((8, 8), (4, 2), (2, 2), 1)])
def test_each_pattern_falls_into_its_own_band(block_sizes):
    sizes = [(size, size) if isinstance(size, int) else size for size in block_sizes]
    for k, (rows, columns) in enumerate(sizes):
        pattern = enlarged(noise(2, 3, 8 // rows, 8 // columns), rows, columns)
        if k:
            above = sizes[k - 1]
            pattern = pattern - enlarged(torch.nn.functional.avg_pool2d(pattern, above), *above)
        mse = band_errors(pattern, torch.zeros_like(pattern), block_sizes).mse
        expected = torch.zeros_like(mse)
        expected[:, k] = pattern.square().mean((1, 2, 3))
        torch.testing.assert_close(mse, expected, rtol=1e-12, atol=1e-28)


def test_dimensions_of_the_bands():
    # Summed over all single-pixel errors, a band is the trace of its projection: new blocks, no more.
    pixels = torch.eye(32, dtype=torch.float64).view(32, 1, 8, 4)
    bands = band_errors(pixels, torch.zeros_like(pixels))
    assert bands.block_sizes == ((8, 4), (4, 2), (2, 1), (1, 1))
    assert (bands.mse.sum(0) * 32).tolist() == pytest.approx([1, 3, 12, 16], rel=1e-12)


def test_a_small_band_survives_beside_a_large_one():
    targets = noise(2, 3, 8, 8)
    error = 1e-9 * noise(2, 3, 8, 8, seed=1)
    alone, beside = band_errors(error, 0 * error), band_errors(error + 1.0, torch.zeros_like(targets))
    torch.testing.assert_close(beside.mse[:, 1:], alone.mse[:, 1:], rtol=1e-5, atol=0)


def test_gains_are_paired():
    targets, error = noise(6, 3, 8, 8), noise(6, 3, 8, 8, seed=1)
    baseline = band_errors(targets + error, targets)
    half = band_errors(targets + error / 2, targets)
    for gain in (*half.gains_db(baseline), half.gain_db(baseline)):
        # The same factor in all images: nothing is uncertain, however much the images differ.
        assert gain.value == pytest.approx(20 * math.log10(2), rel=1e-10)
        assert gain.standard_error == pytest.approx(0, abs=1e-10)
    shifted = band_errors(targets + error - error.mean((2, 3), keepdim=True), targets)
    gains = shifted.gains_db(baseline)
    assert gains[0].value > 200
    assert [gain.value for gain in gains[1:]] == pytest.approx([0, 0, 0], abs=1e-10)
    exact = band_errors(targets, targets)
    assert exact.gain_db(exact).value == 0
    assert exact.gain_db(baseline).value == math.inf
    assert baseline.gain_db(exact).value == -math.inf


def test_standard_error_of_a_gain_agrees_with_the_jackknife():
    mse = noise(400, 2).exp()
    ours = BandErrors(block_sizes=((8, 8), (1, 1)), mse=mse)
    theirs = BandErrors(block_sizes=((8, 8), (1, 1)), mse=1.3 * mse + 0.1 * noise(400, 2, seed=1).exp())
    for k, gain in enumerate(ours.gains_db(theirs)):
        left_out = 10 * torch.log10(
            (theirs.mse[:, k].sum() - theirs.mse[:, k]) / (ours.mse[:, k].sum() - ours.mse[:, k])
        )
        jackknife = (399 * left_out.var(correction=0)).sqrt().item()
        assert gain.standard_error == pytest.approx(jackknife, rel=0.02)


def test_merging_equals_one_go_and_records_are_plain():
    images, targets = noise(7, 3, 8, 8), noise(7, 3, 8, 8, seed=1)
    whole = band_errors(images, targets)
    merged = band_errors(images[:3], targets[:3]).merge(band_errors(images[3:], targets[3:]))
    torch.testing.assert_close(merged.mse, whole.mse, rtol=1e-14, atol=0)
    record = json.loads(json.dumps(whole.to_dict()))
    assert record["block_sizes"] == [[8, 8], [4, 4], [2, 2], [1, 1]]
    assert record["mse"] == pytest.approx(whole.mse.mean(0).tolist())
    assert record["standard_error"][0] == pytest.approx(whole.mse[:, 0].std().item() / 7**0.5)
    assert record["num_images"] == 7
    assert "8x8" in str(whole)
    assert "\n" not in str(whole)


def test_float32_images_are_compared_in_float64():
    images, targets = noise(2, 3, 16, 16).float(), noise(2, 3, 16, 16, seed=1).float()
    mse = band_errors(images, targets).mse
    assert mse.dtype == torch.float64
    torch.testing.assert_close(mse, band_errors(images.double(), targets.double()).mse, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block_sizes", "message"),
    [
        ((32, 5, 1), "blocks of 5 x 5 do not divide 32 x 32"),
        ((16, 6, 1), "blocks of 6 x 6 do not divide 16 x 16"),
        ((64, 1), "blocks of 64 x 64 do not divide 32 x 32"),
        ((8, 16, 1), "blocks of 16 x 16 do not divide 8 x 8"),
        ((32, 0, 1), "blocks of 0 x 0"),
        ((32, 8), "do not end in 1"),
        ((), "do not end in 1"),
        ((32, 8, 8, 1), "hold one twice"),
    ],
)
def test_sizes_that_are_no_decomposition(block_sizes, message):
    with pytest.raises(ValueError, match=message):
        band_errors(noise(1, 1, 32, 32), noise(1, 1, 32, 32), block_sizes)


def test_other_bands_or_too_few_images():
    coarse, fine = (band_errors(noise(3, 1, 8, 8), noise(3, 1, 8, 8), sizes) for sizes in ((8, 1), None))
    for compare in (coarse.merge, coarse.gain_db, coarse.gains_db):
        with pytest.raises(ValueError, match="other bands"):
            compare(fine)
    one = band_errors(noise(1, 1, 8, 8), noise(1, 1, 8, 8))
    with pytest.raises(ValueError, match="at least 2"):
        one.means()
    with pytest.raises(ValueError, match="same images"):
        fine.gain_db(one.merge(one))
    with pytest.raises(ValueError, match="3 bands for 1 block sizes"):
        BandErrors(block_sizes=((1, 1),), mse=torch.zeros(2, 3))
