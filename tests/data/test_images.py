import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wellposed.data.images import (
    ADMFraming,
    Framing,
    ImageDataset,
    PictureFiles,
    StoredPixels,
    coin_flips,
    image_folder,
    read_picture,
)


def ramp(n=6, channels=1, height=2, width=4):
    """Pixels that all differ, so that any mix-up shows."""
    return torch.arange(n * channels * height * width, dtype=torch.uint8).view(n, channels, height, width)


def stored(**kwargs):
    return ImageDataset(name="ramp", source=StoredPixels(pixels=ramp()), **kwargs)


def paint(path: Path, colour, size=(8, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_bytes_become_floats_in_the_scale_of_models():
    images = StoredPixels(pixels=torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3))
    batch = ImageDataset(name="three", source=images).batch([0])
    torch.testing.assert_close(batch.images.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert batch.images.dtype == torch.float32
    assert batch.labels is None


def test_batch_follows_its_indices():
    dataset = stored(labels=torch.arange(6) * 10)
    batch = dataset.batch([4, 0, 4])
    assert batch.labels.tolist() == [40, 0, 40]
    torch.testing.assert_close(batch.images, torch.cat([dataset.batch([i]).images for i in (4, 0, 4)]), rtol=0, atol=0)
    torch.testing.assert_close(dataset.batch(torch.tensor([4, 0, 4])).images, batch.images, rtol=0, atol=0)
    assert len(dataset) == 6
    assert len(dataset.batch(range(6)).images) == 6


def test_bad_indices():
    for indices, message in (([], "empty"), ([0, 6], "images 0 to 5"), ([-1], "images 0 to 5")):
        with pytest.raises(ValueError, match=message):
            stored().batch(indices)


def test_bad_sets():
    with pytest.raises(ValueError, match="6 images and 5 labels"):
        stored(labels=torch.arange(5))
    with pytest.raises(ValueError, match="is empty"):
        ImageDataset(name="none", source=StoredPixels(pixels=ramp(n=0)))
    with pytest.raises(ValueError, match=r"span \[0, 255\]"):
        StoredPixels(pixels=torch.tensor([0.0, 255.0]).view(1, 1, 1, 2))
    with pytest.raises(ValueError, match="float64"):
        StoredPixels(pixels=torch.zeros(1, 1, 1, 2, dtype=torch.float64))


def test_a_flip_depends_on_seed_index_and_epoch_alone():
    dataset, plain = stored(flip=True, seed=3), stored()
    order = [5, 2, 2, 0, 4, 1, 3]
    together = dataset.batch(order, epoch=7).images
    alone = torch.cat([dataset.batch([i], epoch=7).images for i in order])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    original = plain.batch(order).images
    mirrored = [not torch.equal(a, b) for a, b in zip(together, original, strict=True)]
    assert True in mirrored
    assert False in mirrored
    expected = torch.where(torch.tensor(mirrored)[:, None, None, None], original.flip(-1), original)
    torch.testing.assert_close(together, expected, rtol=0, atol=0)


def test_coins_are_fair_and_independent():
    indices = torch.arange(100_000)
    base = coin_flips(0, indices, 0).double() * 2 - 1
    others = {
        "next index": base.roll(1),
        "next epoch": coin_flips(0, indices, 1).double() * 2 - 1,
        "next seed": coin_flips(1, indices, 0).double() * 2 - 1,
        "seed and epoch exchanged": coin_flips(5, indices, 9).double() * (coin_flips(9, indices, 5).double() * 4 - 2),
    }
    bound = 5 / 100_000**0.5
    assert abs(base.mean()) < bound
    for name in ("next index", "next epoch", "next seed"):
        assert abs((base * others[name]).mean()) < bound, name
    assert not torch.equal(coin_flips(5, indices, 9), coin_flips(9, indices, 5))
    assert coin_flips(-1, indices, 0).double().mean().item() == pytest.approx(0.5, abs=bound)


def test_fingerprint_sees_what_a_batch_depends_on():
    labels = torch.arange(6)
    base = stored(labels=labels).fingerprint()
    assert base == stored(labels=labels).fingerprint()
    pixels = ramp()
    pixels[3, 0, 1, 1] += 1
    others = [
        ImageDataset(name="ramp", source=StoredPixels(pixels=pixels), labels=labels),
        ImageDataset(name="ramp", source=StoredPixels(pixels=ramp().view(6, 1, 4, 2)), labels=labels),
        stored(labels=labels.flip(0)),
        stored(),
        stored(labels=labels, flip=True),
        stored(labels=labels, flip=True, seed=1),
    ]
    assert len({base, *(dataset.fingerprint() for dataset in others)}) == 7
    assert stored(labels=labels, seed=1).fingerprint() == base, "a seed without flips changes nothing"


def numbered(n=200, height=5, width=7, **kwargs):
    """Images in which a pixel says where it is: row / 10 + column / 100, so that a crop names its corner."""
    places = torch.arange(height)[:, None] / 10 + torch.arange(width) / 100
    return ImageDataset(name="numbered", source=StoredPixels(pixels=places.expand(n, 1, -1, -1).clone()), **kwargs)


def test_crops_are_squares_of_the_image_at_every_place():
    dataset = numbered(n=3000, crop=3, seed=2)
    batch = dataset.batch(range(3000)).images
    windows = numbered(n=1).batch([0]).images[0, 0].unfold(0, 3, 1).unfold(1, 3, 1)
    assert windows.shape == (3, 5, 3, 3)
    matches = (batch[:, :, None] == windows.flatten(0, 1)).flatten(3).all(-1)[:, 0]
    assert (matches.sum(1) == 1).all()
    counts = matches.sum(0)
    # 3000 draws of 15 places, 200 each: five standard deviations are 68.
    assert (counts - 200).abs().max() < 68
    assert torch.equal(
        numbered(n=9, width=5, crop=5).batch(range(9)).images, numbered(n=9, width=5).batch(range(9)).images
    )


def test_a_crop_depends_on_seed_index_and_epoch_alone():
    dataset = numbered(crop=3, seed=4)
    order = [5, 2, 2, 0, 199, 1]
    together = dataset.batch(order, epoch=7).images
    assert torch.equal(together, torch.cat([dataset.batch([i], epoch=7).images for i in order]))
    assert torch.equal(together[1], together[2])
    everything = range(200)
    corners = [
        numbered(crop=3, seed=seed).batch(everything, epoch=epoch).images[:, 0, 0, 0]
        for seed, epoch in ((4, 0), (4, 1), (5, 0))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (corners[one] == corners[other]).float().mean() < 0.25, "a fifteenth of them by chance"


def test_crops_and_flips_are_independent():
    both = numbered(n=3000, crop=3, flip=True, seed=6).batch(range(3000)).images
    cropped = numbered(n=3000, crop=3, seed=6).batch(range(3000)).images
    mirrored = coin_flips(6, torch.arange(3000), 0)
    assert torch.equal(both, torch.where(mirrored[:, None, None, None], cropped.flip(-1), cropped))
    rows, columns = ((cropped[:, 0, 0, 0] * factor).double() for factor in (1, 10))
    coins = mirrored.double()
    for corner in (rows, columns % 1):
        assert abs(torch.corrcoef(torch.stack([corner, coins]))[0, 1]) < 5 / 3000**0.5


def test_fingerprint_knows_crops():
    base = numbered()
    assert base.fingerprint() == numbered(seed=3).fingerprint()
    others = [numbered(crop=3), numbered(crop=4), numbered(crop=3, seed=1), numbered(crop=3, flip=True)]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    # What a set without crops is called must stay: runs are resumed by it.
    sha = hashlib.sha256(f"{base.source.fingerprint()} False None".encode()).hexdigest()
    assert base.fingerprint() == sha


def test_crops_that_do_not_fit():
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"crop is {size}; the images have 5 x 7 pixels, give 1 to 5"):
            numbered(crop=size).batch([0])


def test_folder_is_cropped(tmp_path):
    paint(tmp_path / "0.png", 7)
    assert image_folder(tmp_path, 6, crop=4).batch([0]).images.shape == (1, 3, 4, 4)


def test_folder_with_classes(tmp_path):
    paint(tmp_path / "red" / "b.png", (255, 0, 0))
    paint(tmp_path / "red" / "a.JPG", (255, 0, 0))
    paint(tmp_path / "blue" / "deeper" / "c.png", (0, 0, 255))
    (tmp_path / "red" / "notes.txt").write_text("no picture")
    dataset = image_folder(tmp_path, 4)
    assert dataset.class_names == ("blue", "red")
    batch = dataset.batch(range(3))
    assert batch.labels.tolist() == [0, 1, 1]
    assert batch.images.shape == (3, 3, 4, 4)
    torch.testing.assert_close(batch.images[0, :, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_folder_without_classes(tmp_path):
    paint(tmp_path / "0.png", 255, mode="L")
    dataset = image_folder(tmp_path, 4, channels=1)
    assert dataset.labels is None
    assert dataset.batch([0]).images.shape == (1, 1, 4, 4)


def test_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        image_folder(tmp_path / "none", 4)
    with pytest.raises(ValueError, match="no pictures"):
        image_folder(tmp_path, 4)
    paint(tmp_path / "0.png", 0)
    paint(tmp_path / "class" / "0.png", 0)
    with pytest.raises(ValueError, match="both directly in it and in sub-folders"):
        image_folder(tmp_path, 4)
    (tmp_path / "0.png").write_bytes((tmp_path / "class" / "0.png").read_bytes()[:40])
    (tmp_path / "class" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"0\.png' cannot be read"):
        image_folder(tmp_path, 4).batch([0])
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "none.png")


def test_files_are_turned_upright_but_for_the_reference_of_imagenet(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    columns = np.tile(np.arange(0, 80, 10, dtype=np.uint8), (8, 1))
    Image.fromarray(columns).save(tmp_path / "0.png", exif=exif)
    Image.fromarray(columns).save(tmp_path / "1.png")
    for framing, first in ((Framing, columns.T), (ADMFraming, columns)):
        files = PictureFiles(root=tmp_path, names=("0.png", "1.png"), framing=framing(size=8, channels=1))
        np.testing.assert_array_equal(files.read(torch.arange(2))[:, 0], np.stack([first, columns]))


def test_fingerprint_of_files_knows_framing_and_content_but_not_the_place(tmp_path):
    for folder in ("here", "there"):
        paint(tmp_path / folder / "0.png", 7)
    here, there = (image_folder(tmp_path / folder, 4) for folder in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() != image_folder(tmp_path / "here", 5).fingerprint()
    paint(tmp_path / "there" / "0.png", 7, size=(80, 60))
    assert here.fingerprint() != there.fingerprint()


def test_framing_cuts_the_central_square_and_the_box():
    columns = np.tile(np.arange(8, dtype=np.uint8), (4, 1))
    central = Framing(size=4, channels=1).apply(Image.fromarray(columns))
    assert central[0, 0].tolist() == [2, 3, 4, 5]
    box = Framing(size=2, box=(5, 0, 7, 2), channels=1).apply(Image.fromarray(columns))
    assert box[0].tolist() == [[5, 6], [5, 6]]
    with pytest.raises(ValueError, match="at least 1"):
        Framing(size=0)


def test_reduction_is_free_of_aliasing_but_for_nearest():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    for resize_filter in ("box", "bilinear", "bicubic", "lanczos"):
        reduced = Framing(size=8, resize_filter=resize_filter, channels=1).apply(Image.fromarray(stripes))
        assert np.abs(reduced[0, 2:6, 2:6].astype(int) - 127).max() <= 4, resize_filter
    nearest = Framing(size=8, resize_filter="nearest", channels=1).apply(Image.fromarray(stripes))
    assert set(nearest.flatten().tolist()) <= {0, 255}


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert Framing(size=4).apply(clear).min() == 255


def test_files_are_read_in_the_order_asked_for(tmp_path):
    for i, level in enumerate((0, 100, 200)):
        paint(tmp_path / f"{i}.png", level, mode="L")
    files = PictureFiles(root=tmp_path, names=("0.png", "1.png", "2.png"), framing=Framing(size=2, channels=1))
    assert files.read(torch.tensor([2, 0]))[:, 0, 0, 0].tolist() == [200, 0]
