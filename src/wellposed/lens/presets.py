"""The sizes and the settings that the released Lens networks are made for.

Nine shapes around 1024 x 1024 and nine around 1440 x 1440 have names; any other size divisible by 16 works too.
1024-pixel shapes have 3888 to 4232 image tokens, the others 7676 and more: none lies just above the 4300 at which the
published shift breaks off (:mod:`wellposed.lens.scheduler`). A size of one's own may.
"""

from dataclasses import dataclass
from typing import Literal

from wellposed.data.buckets import Buckets, Size

__all__ = [
    "RELEASES",
    "SIZES",
    "TRAINING_BUCKETS",
    "Release",
    "SamplingSettings",
    "Size",
    "check_size",
    "nearest_size",
    "preset_size",
]

SIDE = 16  # pixels to a side of a token

Release = Literal["base", "rl", "turbo"]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a released network is meant to be sampled.

    Attributes:
        num_inference_steps: T.
        guidance_scale: w; 1 for none.
    """

    num_inference_steps: int
    guidance_scale: float


RELEASES: dict[Release, SamplingSettings] = {
    "base": SamplingSettings(num_inference_steps=50, guidance_scale=5.0),
    "rl": SamplingSettings(num_inference_steps=20, guidance_scale=5.0),
    "turbo": SamplingSettings(num_inference_steps=4, guidance_scale=1.0),
}
"""Lens-Base, Lens (after reinforcement learning) and Lens-Turbo."""

# Height and width; the other orientations follow.
_UPRIGHT: dict[int, dict[str, tuple[int, int]]] = {
    1024: {"1:2": (1472, 736), "9:16": (1376, 768), "2:3": (1248, 832), "3:4": (1152, 864), "1:1": (1024, 1024)},
    1440: {"1:2": (2080, 1040), "9:16": (1936, 1088), "2:3": (1760, 1168), "3:4": (1616, 1216), "1:1": (1440, 1440)},
}


def _both_orientations(upright: dict[str, tuple[int, int]]) -> dict[str, Size]:
    sizes = {ratio: Size(*size) for ratio, size in upright.items()}
    lying = {":".join(reversed(ratio.split(":"))): Size(width, height) for ratio, (height, width) in sizes.items()}
    return sizes | lying


SIZES: dict[int, dict[str, Size]] = {base: _both_orientations(upright) for base, upright in _UPRIGHT.items()}
"""By base resolution and by ratio, width to height: ``SIZES[1024]["16:9"]`` is ``(768, 1376)``."""

# Height and width; the other orientations follow.
_UPRIGHT_IN_TRAINING: dict[int, tuple[tuple[int, int], ...]] = {
    512: ((704, 352), (672, 384), (640, 416), (608, 448), (512, 512)),
    768: ((1088, 544), (1024, 576), (960, 640), (896, 672), (768, 768)),
    1024: ((1472, 736), (1376, 768), (1248, 832), (1152, 864), (1024, 1024)),
}

TRAINING_BUCKETS = Buckets(
    by_base={
        base: tuple(dict.fromkeys([Size(*size) for size in upright] + [Size(*size[::-1]) for size in upright[::-1]]))
        for base, upright in _UPRIGHT_IN_TRAINING.items()
    },
    batch_sizes={512: 24, 768: 10, 1024: 6},
)
"""The 27 shapes of training in mixed resolutions, all made of multiples of 32, and images per device such that steps at
the three bases take about equally long."""


def preset_size(aspect_ratio: str = "1:1", base_resolution: int = 1024) -> Size:
    """A published size.

    Args:
        aspect_ratio: width to height, such as "16:9".
        base_resolution: 1024 or 1440.

    Raises:
        ValueError: a ratio or a resolution without a preset.
    """
    sizes = SIZES.get(base_resolution)
    if sizes is None or aspect_ratio not in sizes:
        raise ValueError(
            f"there is no preset {aspect_ratio!r} at {base_resolution}; give one of {', '.join(SIZES[1024])} at "
            f"{' or '.join(map(str, SIZES))}, or height and width"
        )
    return sizes[aspect_ratio]


def nearest_size(height: int, width: int, side: int = SIDE) -> Size:
    """The closest size that is made of whole tokens of ``side`` pixels."""
    return Size(*(max(1, round(length / side)) * side for length in (height, width)))


def check_size(height: int, width: int, side: int = SIDE) -> Size:
    """The size, if it is made of whole tokens.

    Raises:
        ValueError: it is not; the message names the nearest one that is.
    """
    size = Size(height, width)
    if min(size) < 1 or height % side or width % side:
        near = nearest_size(height, width, side)
        raise ValueError(
            f"height is {height} and width {width}; both must be positive multiples of {side}. Nearest: "
            f"height={near.height}, width={near.width}"
        )
    return size
