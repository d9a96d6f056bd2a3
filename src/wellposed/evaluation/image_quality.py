"""Fidelity of one image to another: PSNR and SSIM, one value per image."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

__all__ = ["psnr", "ssim"]

# Wang, Bovik, Sheikh and Simoncelli (2004): Gaussian of 1.5 pixels on 11 x 11, and the two stabilisers.
GAUSSIAN_STD = 1.5
WINDOW = 11
K1, K2 = 0.01, 0.03


def psnr(
    images: Float[Tensor, "batch channels height width"],
    targets: Float[Tensor, "batch channels height width"],
    *,
    data_range: float,
) -> Float[Tensor, "batch"]:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / mean squared error), in decibels; infinite for equal images.

    Args:
        images: any scale.
        targets: the same scale.
        data_range: difference of the largest and the smallest value a pixel can have: 1 for [0, 1], 2 for [-1, 1].

    Raises:
        ValueError: other shapes, or data_range not positive.
    """
    _check(images, targets, data_range)
    mean_squared_error = (images - targets).square().mean((1, 2, 3))
    return 10.0 * torch.log10(data_range**2 / mean_squared_error)


def ssim(
    images: Float[Tensor, "batch channels height width"],
    targets: Float[Tensor, "batch channels height width"],
    *,
    data_range: float,
) -> Float[Tensor, "batch"]:
    """Structural similarity (Wang et al. 2004), mean over channels and over the windows that lie inside the image.

    With m, v, c the Gaussian-weighted means, variances and covariance of a window:
    (2 m_x m_y + C_1)(2 c + C_2) / ((m_x^2 + m_y^2 + C_1)(v_x + v_y + C_2)), C_i = (K_i data_range)^2.

    Args:
        images: any scale.
        targets: the same scale.
        data_range: as in :func:`psnr`.

    Raises:
        ValueError: other shapes, images below 11 x 11, or data_range not positive.
    """
    _check(images, targets, data_range)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels are smaller than SSIM's window of "
            f"{WINDOW} x {WINDOW}; use psnr"
        )
    mean_x, mean_y = _blur(images), _blur(targets)
    variance_x = _blur(images.square()) - mean_x.square()
    variance_y = _blur(targets.square()) - mean_y.square()
    covariance = _blur(images * targets) - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels _ _"]:
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / GAUSSIAN_STD).square())
    weights = weights / weights.sum()
    channels = images.shape[1]
    rows = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return functional.conv2d(functional.conv2d(images, rows, groups=channels), columns, groups=channels)


def _check(images: Tensor, targets: Tensor, data_range: float) -> None:
    if images.shape != targets.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, targets {tuple(targets.shape)}; they must agree")
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}; give 1.0 for values in [0, 1], 2.0 for [-1, 1]")
