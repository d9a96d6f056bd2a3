"""Published sizes and settings; what is no size."""

import math

import pytest

from wellposed.lens.presets import RELEASES, SIZES, TRAINING_BUCKETS, check_size, nearest_size, preset_size
from wellposed.lens.scheduler import shift_mu

# Height x width, as the published code has them.
PUBLISHED = {
    1024: "1472x736 1376x768 1248x832 1152x864 1024x1024 864x1152 832x1248 768x1376 736x1472",
    1440: "2080x1040 1936x1088 1760x1168 1616x1216 1440x1440 1216x1616 1168x1760 1088x1936 1040x2080",
}
IN_TRAINING = {  # height x width of the upright half
    512: "704x352 672x384 640x416 608x448 512x512",
    768: "1088x544 1024x576 960x640 896x672 768x768",
    1024: "1472x736 1376x768 1248x832 1152x864 1024x1024",
}
RATIOS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")


@pytest.mark.parametrize("base", PUBLISHED)
def test_sizes_are_the_published_ones(base: int) -> None:
    sizes = [preset_size(ratio, base) for ratio in RATIOS]
    assert " ".join(f"{size.height}x{size.width}" for size in sizes) == PUBLISHED[base]
    assert set(SIZES[base]) == set(RATIOS)
    for ratio, (height, width) in SIZES[base].items():
        wide, high = map(int, ratio.split(":"))
        assert check_size(height, width) == (height, width)
        assert math.isclose(width / height, wide / high, rel_tol=0.012)
        assert math.isclose(height * width, base**2, rel_tol=0.06)


def test_large_sizes_follow_from_the_small_ones_but_for_one_number() -> None:
    enlarged = {
        (ratio, side): round(getattr(size, side) * 1.40625 / 16) * 16
        for ratio, size in SIZES[1024].items()
        for side in size._fields
    }
    odd = {key: value for key, value in enlarged.items() if value != getattr(SIZES[1440][key[0]], key[1])}
    assert odd == {("1:2", "height"): 2064, ("2:1", "width"): 2064}


def test_no_preset_lies_just_above_the_cliff() -> None:
    tokens = {base: sorted({h * w // 256 for h, w in sizes.values()}) for base, sizes in SIZES.items()}
    assert tokens[1024] == [3888, 4056, 4096, 4128, 4232]
    assert min(tokens[1440]) == 7676
    mu = {n: shift_mu(n, 20) for found in tokens.values() for n in found}
    assert min(mu.values()) > 1.75 > shift_mu(4301, 20) > 1.18  # a size of one's own may


def test_release_settings() -> None:
    found = {name: (s.num_inference_steps, s.guidance_scale) for name, s in RELEASES.items()}
    assert found == {"base": (50, 5.0), "rl": (20, 5.0), "turbo": (4, 1.0)}


def test_other_sizes() -> None:
    assert check_size(16, 4096) == (16, 4096)
    assert nearest_size(1001, 1033) == (1008, 1040)
    assert nearest_size(3, 1024) == (16, 1024)
    for height, width, near in ((1000, 1024, "height=992"), (1024, 1030, "width=1024"), (0, 64, "height=16")):
        with pytest.raises(ValueError, match=near):
            check_size(height, width)
    with pytest.raises(ValueError, match="give one of 1:2, "):
        preset_size("5:4")
    with pytest.raises(ValueError, match="at 1024 or 1440"):
        preset_size("1:1", 2048)


def test_training_buckets_are_the_published_ones() -> None:
    for base, upright in IN_TRAINING.items():
        sizes = {tuple(map(int, size.split("x"))) for size in upright.split()}
        assert set(TRAINING_BUCKETS.by_base[base]) == sizes | {size[::-1] for size in sizes}
        assert len(TRAINING_BUCKETS.by_base[base]) == 9
    assert len(TRAINING_BUCKETS.shapes) == 27
    assert all(side % 32 == 0 for _, size in TRAINING_BUCKETS.shapes for side in size)
    assert TRAINING_BUCKETS.batch_sizes == {512: 24, 768: 10, 1024: 6}
    tokens = [size.height * size.width // 256 for _, size in TRAINING_BUCKETS.shapes]
    assert (min(tokens), max(tokens)) == (968, 4232)
    assert set(TRAINING_BUCKETS.by_base[1024]) == set(SIZES[1024].values())
