"""Folders of somebody's own pictures: what is taken, what is refused and by which words, where it is trained."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wellposed.data.bucketed import BucketedBatches
from wellposed.data.buckets import Size
from wellposed.recipes.own_pictures import LargestBase, own_pictures, published_buckets


def paint(path: Path, size: tuple[int, int] = (20, 24), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def captioned(folder: Path, count: int) -> Path:
    for number in range(count):
        paint(folder / f"{number}.png", seed=number)
        (folder / f"{number}.txt").write_text(f"picture number {'abcdefghij'[number]}")
    return folder


def test_every_picture_with_its_caption(tmp_path: Path) -> None:
    """In folders or not, with texts or JSON, blank and tiny ones too; hidden files are nobody's business."""
    source = captioned(tmp_path / "mine", 2)
    Image.new("RGB", (9, 7)).save(source / "black.jpg", quality=95)
    (source / "black.json").write_text(json.dumps({"caption": "a black nothing", "place": "home"}))
    paint(source / "deeper" / "c.webp", seed=5)
    (source / "deeper" / "c.txt").write_text("  un café, à Paris\n")
    (source / ".DS_Store").write_bytes(b"no picture")
    images = own_pictures(source, tmp_path / "corpus", seed=0)
    assert images.captions(range(4)) == (
        "picture number a",
        "picture number b",
        "a black nothing",
        "un café, à Paris",
    )
    assert images.sizes.tolist() == [[20, 24], [20, 24], [7, 9], [20, 24]]
    assert images.batch([2], Size(16, 16)).images.amax() == -1, "a set may be enlarged; its buckets say how far"


def test_a_set_stays_what_a_run_began_with(tmp_path: Path) -> None:
    source = captioned(tmp_path / "mine", 2)
    first = own_pictures(source, tmp_path / "corpus", seed=0)
    (source / "0.txt").write_text("something else")
    (source / "1.png").unlink()
    again = own_pictures(source, tmp_path / "corpus", seed=0)
    assert again.fingerprint() == first.fingerprint()
    assert again.captions(range(2)) == first.captions(range(2))


def test_what_cannot_be_trained_on_is_named(tmp_path: Path) -> None:
    """And once it is mended the same call goes on."""
    source = captioned(tmp_path / "mine", 1)
    paint(source / "mute.png", seed=7)
    paint(source / "blank.png", seed=8)
    (source / "blank.txt").write_text(" \n")
    (source / "notes.docx").write_bytes(b"PK no picture")
    (source / "odd.jpg").write_bytes(b"\xff\xd8\xff half a picture")
    (source / "odd.txt").write_text("half a picture")
    with pytest.raises(ValueError, match=r"4 files in .*mine cannot be trained on: ") as caught:
        own_pictures(source, tmp_path / "corpus", seed=0)
    for name in ("mute.png", "blank.png", "notes.docx", "odd.jpg"):
        assert name in str(caught.value)
    assert "into a .txt of the same name" in str(caught.value)
    (source / "mute.txt").write_text("not mute any more")
    for name in ("blank.png", "blank.txt", "notes.docx", "odd.jpg", "odd.txt"):
        (source / name).unlink()
    assert own_pictures(source, tmp_path / "corpus", seed=0).captions(range(2))[1] == "not mute any more"


def test_many_faults_are_counted_and_some_named(tmp_path: Path) -> None:
    for number in range(11):
        paint(tmp_path / "mine" / f"{number:02d}.png", seed=number)
    with pytest.raises(ValueError, match=r"11 files in .*07\.png \(no caption.*; and 3 more\. Write"):
        own_pictures(tmp_path / "mine", tmp_path / "corpus", seed=0)


def test_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a caption without a picture")
    with pytest.raises(ValueError, match=r"no samples in '.*mine'; give a folder with pictures"):
        own_pictures(tmp_path / "mine", tmp_path / "corpus", seed=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        own_pictures(tmp_path / "nowhere", tmp_path / "corpus", seed=0)


def test_pictures_that_look_alike_are_kept_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = captioned(tmp_path / "mine", 3)
    with Image.open(source / "1.png") as picture:
        picture.resize((48, 40), Image.Resampling.BICUBIC).save(source / "larger.jpg", quality=95)
    (source / "larger.txt").write_text("another caption of the same")
    with caplog.at_level(logging.WARNING, logger="wellposed"):
        images = own_pictures(source, tmp_path / "corpus", seed=0)
    assert len(images) == 4
    assert "1 groups of pictures" in caplog.text and "1.png = larger.jpg" in caplog.text
    caplog.clear()
    own_pictures(source, tmp_path / "corpus", seed=0)
    assert not caplog.text


def test_a_picture_belongs_to_the_largest_base_that_it_fills() -> None:
    buckets = published_buckets()
    assert len(buckets.shapes) == 27
    for native, base, shape in (
        ((3000, 4000), 1024, (864, 1152)),
        ((1024, 1024), 1024, (1024, 1024)),
        ((940, 940), 1024, (1024, 1024)),  # enlarged by less than a tenth
        ((900, 900), 768, (768, 768)),
        ((480, 640), 512, (448, 608)),
    ):
        (number,) = {int(n) for n in buckets.choices(np.array([native]))[0] if n >= 0}
        assert buckets.shapes[number] == (base, Size(*shape))
    assert (buckets.choices(np.array([(400, 400)])) < 0).all()


def test_nothing_is_repeated_to_fill_a_share(tmp_path: Path) -> None:
    """Pictures of five ratios and sizes: each comes up once an epoch, but for the last step's beginning anew."""
    for number, size in enumerate([(20, 24), (24, 20), (40, 40), (41, 43), (12, 16)]):
        paint(tmp_path / "mine" / f"{number}.png", size, seed=number)
        (tmp_path / "mine" / f"{number}.txt").write_text("a caption")
    images = own_pictures(tmp_path / "mine", tmp_path / "corpus", seed=0)
    buckets = LargestBase(
        by_base={16: (Size(16, 16), Size(16, 24)), 32: (Size(32, 32), Size(32, 40))}, batch_sizes={16: 1, 32: 1}
    )
    planned = BucketedBatches(dataset=images, buckets=buckets, shares=2)
    report = planned.report()
    assert (report.repeats, report.starved, report.too_small) == (0, (), 1)
    seen = [int(planned.indices_at(step, part)[0]) for step in range(2) for part in range(2)]
    assert sorted(seen) == [0, 1, 2, 3]
    assert {int(planned.indices_at(s, p)[0]): planned.bucket_at(s, p) for s in range(2) for p in range(2)}[2] == (
        32,
        32,
    )
