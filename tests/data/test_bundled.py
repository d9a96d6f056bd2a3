import pytest
import torch

from wellposed.data import bundled
from wellposed.data.bundled import digits, photographs


def test_digits_as_stored():
    dataset = digits()
    batch = dataset.batch(range(len(dataset)))
    assert batch.images.shape == (1797, 1, 8, 8)
    assert batch.images.min() == -1
    assert batch.images.max() == 1
    assert len(batch.images.unique()) == 17
    assert sorted(batch.labels.unique().tolist()) == list(range(10))


def test_digits_split_without_overlap():
    everything, train, test = (digits(split=split) for split in ("all", "train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    together = torch.cat([train.batch(range(1437)).images, test.batch(range(360)).images])
    torch.testing.assert_close(together, everything.batch(range(1797)).images, rtol=0, atol=0)
    assert len({train.fingerprint(), test.fingerprint(), everything.fingerprint()}) == 3


def test_enlarged_digits_keep_their_mean():
    small, large = (digits(size).batch(range(50)).images for size in (8, 16))
    assert large.shape == (50, 1, 16, 16)
    assert large.abs().max() <= 1
    torch.testing.assert_close(large.mean((1, 2, 3)), small.mean((1, 2, 3)), rtol=0, atol=0.02)


def test_photographs_are_a_function_of_their_seed():
    one, same, other = (photographs(16, 20, seed=seed).batch(range(20)).images for seed in (0, 0, 1))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)
    assert photographs(16, 20).fingerprint() != photographs(16, 20, seed=1).fingerprint()


def test_splits_share_no_picture():
    for pictures in (bundled.COLOUR_PICTURES, bundled.GREY_PICTURES):
        assert not set(pictures["train"]) & set(pictures["test"])
    assert not set(bundled.COLOUR_PICTURES["train"]) & set(bundled.GREY_PICTURES["test"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_patches_are_cut_from_the_pictures(channels, split):
    dataset = photographs(12, 15, split=split, channels=channels, shrink=8, seed=5)
    patches = dataset.source.read(torch.arange(15))
    assert patches.shape == (15, channels, 12, 12)
    names = bundled.COLOUR_PICTURES[split] + (bundled.GREY_PICTURES[split] if channels == 1 else ())
    pictures = [bundled._bundled_picture(name, channels, 8) for name in names]
    windows = [p.unfold(1, 12, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4).flatten(0, 1) for p in pictures]
    found = [{k for k, w in enumerate(windows) if (w == patch).flatten(1).all(1).any()} for patch in patches]
    assert all(found)
    assert len(set().union(*found)) > 1


def test_every_position_can_come_up():
    pictures = [torch.arange(6, dtype=torch.uint8).view(1, 2, 3), torch.arange(10, 12, dtype=torch.uint8).view(1, 1, 2)]
    patches = bundled._random_patches(pictures, 1, 8000, seed=0).flatten()
    counts = torch.bincount(patches.int(), minlength=12)
    assert counts.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 10, 11]
    assert counts[counts > 0].min() > 850


def test_coloured_digits_have_the_shapes_of_digits_and_colours_of_their_own() -> None:
    grey, coloured = bundled.digits(16, split="test"), bundled.coloured_digits(16, split="test", copies=2, seed=3)
    assert len(coloured) == 2 * len(grey)
    assert torch.equal(coloured.labels[: len(grey)], grey.labels)
    ink = (grey.batch(range(20)).images + 1) / 2
    images = (coloured.batch(range(20)).images + 1) / 2
    others = (coloured.batch(range(len(grey), len(grey) + 20)).images + 1) / 2
    assert (images - others).abs().mean() > 0.2
    # Where there is no ink the ground is a ramp: its second differences vanish, but for rounding and where it ends.
    empty = (ink[..., :-2] == 0) & (ink[..., 1:-1] == 0) & (ink[..., 2:] == 0)
    bend = images[..., :-2] - 2 * images[..., 1:-1] + images[..., 2:]
    assert bend.abs()[empty.expand_as(bend)].max() < 1 / 15 + 2 / 255
    assert bend.abs()[empty.expand_as(bend)].median() < 1.5 / 255
    assert coloured.fingerprint() == bundled.coloured_digits(16, split="test", copies=2, seed=3).fingerprint()
    with pytest.raises(ValueError, match="copies"):
        bundled.coloured_digits(copies=0)


def test_bad_input():
    with pytest.raises(ValueError, match="8 x 8"):
        digits(7)
    with pytest.raises(ValueError, match="patch_size <= 75"):
        photographs(80, 4, shrink=4)
    for kwargs in ({"patch_size": 0, "num_patches": 1}, {"patch_size": 8, "num_patches": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            photographs(**kwargs)
