import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wellposed.evaluation.image_quality import psnr, ssim


def pairs(data_range=1.0, size=(17, 23), channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, channels, *size, generator=generator, dtype=torch.float64)
    targets = images + 0.1 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images * data_range, targets * data_range


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_agrees_with_scikit_image(data_range, channels):
    images, targets = pairs(data_range, channels=channels)
    for k in range(len(images)):
        x, y = images[k].numpy(), targets[k].numpy()
        expected = structural_similarity(
            y, x, data_range=data_range, gaussian_weights=True, use_sample_covariance=False, channel_axis=0
        )
        assert ssim(images, targets, data_range=data_range)[k].item() == pytest.approx(expected, rel=1e-11)
        expected = peak_signal_noise_ratio(y, x, data_range=data_range)
        assert psnr(images, targets, data_range=data_range)[k].item() == pytest.approx(expected, rel=1e-12)


def test_equal_images():
    images, _ = pairs()
    assert psnr(images, images, data_range=1.0).isinf().all()
    torch.testing.assert_close(ssim(images, images, data_range=1.0), torch.ones(4).double(), rtol=1e-12, atol=0)


def test_symmetric_and_scale_free():
    images, targets = pairs()
    for metric in (psnr, ssim):
        value = metric(images, targets, data_range=1.0)
        torch.testing.assert_close(metric(targets, images, data_range=1.0), value, rtol=1e-12, atol=0)
        torch.testing.assert_close(metric(9 * images, 9 * targets, data_range=9.0), value, rtol=1e-10, atol=0)


def test_one_value_for_each_image():
    images, targets = pairs()
    for metric in (psnr, ssim):
        alone = torch.cat([metric(images[k : k + 1], targets[k : k + 1], data_range=1.0) for k in range(4)])
        torch.testing.assert_close(metric(images, targets, data_range=1.0), alone, rtol=1e-12, atol=0)


def test_bad_input():
    images, targets = pairs()
    with pytest.raises(ValueError, match="data_range"):
        psnr(images, targets, data_range=0.0)
    with pytest.raises(ValueError, match="use psnr"):
        ssim(images[..., :10], targets[..., :10], data_range=1.0)
