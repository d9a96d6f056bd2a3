import errno
import io
import json
import logging
import os
import struct
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wellposed.data.buckets import Size, cover_and_crop
from wellposed.data.shards import CAPTIONING_FILE, ShardedImages, ShardSample, index_shards, write_shards


def painted(number, width=48, height=40):
    """A picture that says its number (to 25) in blue, and where a pixel is in red and green."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([2 * columns, 2 * rows, 0 * rows + 10 * number], -1).astype(np.uint8))


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(number, **changes):
    fields = {
        "key": f"sample_{number}",
        "picture": encoded(painted(number, width=48 + number)),
        "caption": " ".join(["word"] * (number + 1)),
        "captions": {"dense": f"a dense caption of {number}", "brief": f"brief {number}"},
        "metadata": {"source": "painted", "number": number},
    }
    return ShardSample(**(fields | changes))


def samples(count=5):
    return [sample(number) for number in range(count)]


def written(folder, count=5, **options):
    return write_shards(samples(count), folder, **({"samples_per_shard": 3} | options))


def numbers(batch):
    """Which pictures a batch has."""
    return ((batch.images[:, 2].mean((1, 2)) + 1) * 12.75).round().int().tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def foreign(path, members, end=True):
    """A shard as another program may have written it: (name, content) in order."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 12345
            tar.addfile(member, io.BytesIO(content))
    return path


# Writing


def test_a_shard_is_an_ordinary_tar_file_with_the_original_bytes(tmp_path):
    shards = written(tmp_path)
    assert [path.name for path in shards] == ["00000.tar", "00001.tar"]
    with tarfile.open(shards[0]) as tar:
        assert tar.getnames() == [f"sample_{n}.{suffix}" for n in range(3) for suffix in ("png", "txt", "json")]
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}
        held = {name: tar.extractfile(name).read() for name in tar.getnames()}
    assert held["sample_1.png"] == sample(1).picture
    assert held["sample_1.txt"] == b"word word"
    assert json.loads(held["sample_1.json"]) == {
        "width": 49,
        "height": 40,
        "words": 2,
        "captions": {"dense": "a dense caption of 1", "brief": "brief 1"},
        "source": "painted",
        "number": 1,
    }


def test_every_kind_of_picture_has_its_suffix(tmp_path):
    kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    given = [sample(n, picture=encoded(painted(n), kind)) for n, kind in enumerate(kinds)]
    (shard,) = write_shards(given, tmp_path)
    with tarfile.open(shard) as tar:
        assert [name for name in tar.getnames() if name.split(".")[1] in kinds.values()] == [
            f"sample_{n}.{suffix}" for n, suffix in enumerate(kinds.values())
        ]
    pictures = ShardedImages.open(tmp_path).batch(range(3), Size(40, 48)).images
    assert (pictures - pictures[1])[:, :2].abs().max() < 0.15


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in "ab":
        written(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_interrupted_writer_goes_on(tmp_path):
    written(tmp_path / "straight", count=8)

    def breaks_off():
        yield from samples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(breaks_off(), tmp_path / "broken", samples_per_shard=3)
    assert sorted(contents(tmp_path / "broken")) == ["00000.npz", "00000.tar"], "what is there is whole"
    before = (tmp_path / "broken/00000.tar").stat().st_mtime_ns
    assert len(written(tmp_path / "broken", count=8)) == 3
    assert (tmp_path / "broken/00000.tar").stat().st_mtime_ns == before
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    "others",
    [samples(4), samples(6), [sample(1), sample(0), sample(2)], [*samples(2), sample(2, caption="another")]],
    ids=["fewer", "more", "order", "caption"],
)
def test_shards_with_other_samples_are_not_taken_for_these(tmp_path, others):
    written(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"tar is there and holds \d other samples.*first_shard, or remove the shard"):
        write_shards(others, tmp_path, samples_per_shard=3)
    assert contents(tmp_path) == before


def test_writers_share_a_folder(tmp_path):
    write_shards(samples(2), tmp_path, prefix="a-")
    write_shards(samples(2), tmp_path, prefix="b-", first_shard=7)
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == ["a-00000.tar", "b-00007.tar"]
    assert len(ShardedImages.open(tmp_path)) == 4


def test_a_full_disk_names_the_shard_and_keeps_the_others(tmp_path, monkeypatch):
    synchronise, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # shard and index of the first, then the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*1 before it are complete.*00001.tar") as caught:
        written(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(contents(tmp_path)) == ["00000.npz", "00000.tar"]
    monkeypatch.undo()
    written(tmp_path)
    assert len(ShardedImages.open(tmp_path)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "a.b"}, "the key 'a.b' cannot name"),
        ({"key": ""}, "the key '' cannot name"),
        ({"key": "/etc"}, "cannot name"),
        ({"key": "k" * 96}, "1 to 95"),
        ({"caption": " \n"}, r"sample 'sample_0': its caption is ' \\n'; give a text"),
        ({"caption": "half \ud83d"}, "its caption is 'half"),
        ({"captions": {"dense": ""}}, "its caption 'dense' is ''"),
        ({"metadata": {"width": 3}}, r"metadata may not hold \['width'\]"),
    ],
)
def test_bad_samples(changes, message):
    with pytest.raises(ValueError, match=message):
        sample(0, **changes)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        written(tmp_path, samples_per_shard=0)
    with pytest.raises(ValueError, match=r"00000.tar: sample 'sample_0': its picture is missing or cannot be read"):
        write_shards([sample(0, picture=b"GIF89a")], tmp_path)
    with pytest.raises(ValueError, match="the key 'sample_0' comes twice"):
        write_shards([sample(0), sample(0)], tmp_path)
    assert contents(tmp_path) == {}


# Reading


def test_batches_follow_their_indices(tmp_path):
    written(tmp_path, count=7)
    dataset = ShardedImages.open(tmp_path)
    assert len(dataset) == 7
    assert dataset.sizes.tolist() == [[40, 48 + n] for n in range(7)]
    batch = dataset.batch([4, 0, 6, 4], Size(40, 48))
    assert numbers(batch) == [4, 0, 6, 4]
    assert batch.captions == ("word " * 4 + "word", "word", "word " * 6 + "word", "word " * 4 + "word")
    assert batch.weight == 1.0
    left = (52 - 48) // 2
    red = (batch.images[0, 0, 0] + 1) * 127.5
    torch.testing.assert_close(red, 2.0 * torch.arange(left, left + 48), rtol=0, atol=1e-3)
    assert numbers(dataset.batch(torch.tensor([3]), Size(8, 8))) == [3]
    for indices in ([], [7], [-1]):
        with pytest.raises(ValueError, match="give some of 0 to 6"):
            dataset.batch(indices, Size(8, 8))


def test_memory_is_used_again_only_when_nobody_holds_it(tmp_path):
    written(tmp_path)
    dataset = ShardedImages.open(tmp_path)
    first = dataset.batch([0, 1], Size(40, 48))
    place, part = first.images.data_ptr(), first.images[1:, :, 3].numpy()
    copy = part.copy()
    del first
    second = dataset.batch([2, 3], Size(40, 48))
    assert second.images.data_ptr() != place, "a part is still held"
    assert (part == copy).all()
    del part
    smaller = dataset.batch([4], Size(20, 20))
    assert smaller.images.data_ptr() == place
    assert numbers(smaller) == [4] and numbers(second) == [2, 3]
    larger = dataset.batch([0, 1, 2, 3], Size(40, 48))
    assert numbers(larger) == [0, 1, 2, 3] and numbers(smaller) == [4]


def test_pictures_are_covered_and_never_enlarged_by_accident(tmp_path):
    written(tmp_path)
    pixels = np.asarray(cover_and_crop(painted(2, width=50), Size(20, 20))).astype(np.float32)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ShardedImages.open(tmp_path).batch([2], Size(20, 20)).images[0], expected)
    with pytest.raises(ValueError, match="40 x 48 pixels does not cover 41 x 20"):
        ShardedImages.open(tmp_path).batch([0], Size(41, 20))
    assert ShardedImages.open(tmp_path, upscale=True).batch([0], Size(41, 20)).images.shape == (1, 3, 41, 20)


def test_pictures_are_seen_as_a_viewer_shows_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = encoded(painted(0, width=48, height=24), "JPEG", exif=exif, quality=95)
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    grey, palette = Image.new("L", (30, 20), 51), Image.new("P", (30, 20), 0)
    palette.putpalette([204, 204, 204])
    pictures = [turned, *map(encoded, (clear, grey, palette))]
    write_shards([sample(n, picture=picture) for n, picture in enumerate(pictures)], tmp_path)
    dataset = ShardedImages.open(tmp_path)
    assert dataset.sizes.tolist() == [[48, 24], [20, 30], [20, 30], [20, 30]]
    shown = dataset.batch([0], Size(48, 24)).images[0]
    down = (shown[0, 1:] - shown[0, :-1]).mean() * 127.5
    assert down == pytest.approx(2, abs=0.1), "what was the column is the row"
    images = dataset.batch([1, 2, 3], Size(20, 30)).images
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.tensor([1.0, -0.6, 0.6]))


def test_a_random_crop_depends_on_seed_index_and_epoch_alone(tmp_path):
    write_shards([sample(n, picture=encoded(painted(0, 120, 10))) for n in range(40)], tmp_path)
    dataset = ShardedImages.open(tmp_path, crop="random", seed=3)

    def lefts(indices, epoch):
        return ((dataset.batch(indices, Size(10, 10), epoch=epoch).images[:, 0, 0, 0] + 1) * 63.75).round().int()

    first = lefts(range(40), 0)
    assert first.min() < 15 and first.max() > 95 and first.unique().numel() > 20
    assert lefts([7, 3, 3], 0).tolist() == first[[7, 3, 3]].tolist()
    assert (lefts(range(40), 1) != first).sum() > 30
    assert (
        (ShardedImages.open(tmp_path).batch(range(40), Size(10, 10)).images[:, 0, 0, 0] * 127.5 + 127.5).round() == 110
    ).all()


def test_captions_of_a_style(tmp_path):
    written(tmp_path)
    assert ShardedImages.open(tmp_path, caption_style="brief").captions([3, 1]) == ("brief 3", "brief 1")
    dense = ShardedImages.open(tmp_path, caption_style="dense")
    assert dense.batch([2], Size(8, 8)).captions == ("a dense caption of 2",)
    assert dense.words().tolist() == [5] * 5
    with pytest.raises(
        ValueError, match=r"sample 'sample_0': it has no caption in the style 'poetic'; the shard has 'b"
    ):
        ShardedImages.open(tmp_path, caption_style="poetic")


def test_a_mixture_of_styles_is_drawn_anew_in_every_epoch(tmp_path):
    picture = encoded(painted(0))
    write_shards([sample(n, picture=picture) for n in range(100)], tmp_path)
    dataset = ShardedImages.open(tmp_path, caption_style={"dense": 0.75, "brief": 0.25}, seed=1)
    everyone = range(100)
    drawn = np.array([["dense" in text for text in dataset.captions(everyone, epoch=epoch)] for epoch in range(4)])
    assert abs(drawn.mean() - 0.75) < 5 * (0.75 * 0.25 / drawn.size) ** 0.5
    assert abs((drawn[0] == drawn[1]).mean() - (0.75**2 + 0.25**2)) < 0.25, "epochs are independent"
    some = dataset.batch([9, 4], Size(8, 8), epoch=2).captions
    assert ["dense" in text for text in some] == drawn[2][[9, 4]].tolist()
    assert dataset.words(epoch=3).tolist() == [5 if dense else 2 for dense in drawn[3]]
    for shares in ({"dense": 0.5, "brief": 0.4}, {}, {"dense": 1.5, "brief": -0.5}):
        with pytest.raises(ValueError, match="shares that add up to 1"):
            ShardedImages.open(tmp_path, caption_style=shares)


def test_words_are_counted(tmp_path):
    written(tmp_path, count=25)
    dataset = ShardedImages.open(tmp_path)
    assert dataset.words().tolist() == list(range(1, 26))
    assert dataset.word_histogram() == {0: 9, 10: 10, 20: 6}
    assert dataset.word_histogram(20) == {0: 19, 20: 6}


def test_what_captions_cost_is_read_where_it_is_known(tmp_path):
    written(tmp_path)
    assert ShardedImages.open(tmp_path).captioning_cost == {}
    (tmp_path / CAPTIONING_FILE).write_text('{"usd": 12.5}')
    assert ShardedImages.open(tmp_path).captioning_cost == {"usd": 12.5}
    (tmp_path / CAPTIONING_FILE).write_text('{"usd": "much"}')
    with pytest.raises(ValueError, match="what the captions cost"):
        ShardedImages.open(tmp_path)


def test_fingerprint_sees_what_a_batch_depends_on(tmp_path):
    written(tmp_path / "a")
    write_shards([*samples(4), sample(4, caption="another")], tmp_path / "b", samples_per_shard=3)
    write_shards([*samples(4), sample(4, picture=sample(3).picture)], tmp_path / "c", samples_per_shard=3)
    written(tmp_path / "d", samples_per_shard=2)
    opened = [ShardedImages.open(tmp_path / name) for name in "abc"]
    opened += [ShardedImages.open(tmp_path / "a", **options) for options in ({"crop": "random"}, {"upscale": True})]
    opened += [
        ShardedImages.open(tmp_path / "a", caption_style=style) for style in ("dense", {"dense": 0.5, "brief": 0.5})
    ]
    opened += [ShardedImages.open(tmp_path / "a", crop="random", seed=1)]
    assert len({dataset.fingerprint() for dataset in opened}) == len(opened)
    same = [ShardedImages.open(tmp_path / "a", seed=1), ShardedImages.open(tmp_path / "d")]
    assert {dataset.fingerprint() for dataset in same} == {opened[0].fingerprint()}, "not what makes no difference"


def test_threads_read_at_once_and_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr("wellposed.data.shards.MOST_OPEN", 2)
    written(tmp_path, count=12, samples_per_shard=2)
    dataset = ShardedImages.open(tmp_path)
    before = set(Path("/dev/fd").iterdir())
    found: dict[int, list[int]] = {}

    def read(thread):
        order = np.random.default_rng(thread).permutation(12).tolist()
        found[thread] = [numbers(dataset.batch([n], Size(8, 8)))[0] for n in order] == order

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
    assert len(set(Path("/dev/fd").iterdir()) - before) <= 2


# What others wrote, and what is wrong


def members(number, **changes):
    """Members of a sample, some of them changed or, by None, left out."""
    parts = {"jpg": encoded(painted(number), "JPEG"), "txt": b"a caption", "json": b'{"width": 48, "height": 40}'}
    return [(f"{number}.{suffix}", content) for suffix, content in (parts | changes).items() if content is not None]


def test_shards_of_other_origin_get_their_index(tmp_path):
    odd = [("__meta__.txt", b"about this shard"), ("folder/3.jpeg", members(3)[0][1]), ("folder/3.txt", "né".encode())]
    long = "k" * 150  # not in the header of a tar file, but in one before it
    odd += [(f"{long}.cls", b"7"), (f"{long}.JPG", members(4)[0][1]), (f"{long}.txt", b"long")]
    foreign(tmp_path / "x.tar", members(0) + members(1, cls=b"3", json=b'{"captions": ["one", "two"]}') + odd)
    with pytest.raises(FileNotFoundError, match=r"x.tar has no index beside it; write it with index_shards"):
        ShardedImages.open(tmp_path)
    progress = []
    assert index_shards(tmp_path, on_progress=lambda *done: progress.append(done)) == 1
    assert progress == [(1, 1)]
    assert index_shards(tmp_path) == 0
    dataset = ShardedImages.open(tmp_path)
    assert dataset.captions(range(4)) == ("a caption", "a caption", "né", "long")
    assert numbers(dataset.batch(range(4), Size(40, 48))) == [0, 1, 3, 4]


FAULTY = {
    "picture missing": ({"jpg": None}, "its picture is missing"),
    "picture corrupt": ({"jpg": b"\xff\xd8\xff nothing"}, "its picture is missing or cannot be read"),
    "another kind": ({"jpg": b"GIF89a"}, "its picture is missing or cannot be read"),
    "caption missing": ({"txt": None}, "its caption is missing, empty or no UTF-8"),
    "caption empty": ({"txt": b" \n\t"}, "its caption is missing, empty or no UTF-8"),
    "caption no text": ({"txt": b"\xff\xfe\x00"}, "its caption is missing, empty or no UTF-8"),
    "metadata no object": ({"json": b"[1]"}, "its .json is no JSON object"),
    "metadata no JSON": ({"json": b"{"}, "its .json is no JSON object"),
    "another size": ({"json": b'{"width": 480, "height": 40}'}, "its .json declares another width and height"),
    "no size": ({"json": b'{"width": 0, "height": 0}'}, "its .json declares another width and height"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_bad_samples_are_refused_or_left_out(tmp_path, fault, caplog):
    changes, message = FAULTY[fault]
    foreign(tmp_path / "x.tar", members(0) + members(1, **changes) + members(2))
    index_shards(tmp_path)
    with pytest.raises(ValueError, match=rf"x.tar: sample '1': {message}.*on_bad='skip'"):
        ShardedImages.open(tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = ShardedImages.open(tmp_path, on_bad="skip")
    assert numbers(dataset.batch(range(len(dataset)), Size(40, 48))) == [0, 2]
    assert len(dataset.skipped) == 1 and "x.tar: sample '1'" in dataset.skipped[0]
    assert dataset.skipped[0] in caplog.text


def test_samples_without_the_style_can_be_left_out(tmp_path):
    write_shards([sample(0), sample(1, captions={"dense": "this alone"}), sample(2)], tmp_path)
    dataset = ShardedImages.open(tmp_path, caption_style={"dense": 0.5, "brief": 0.5}, on_bad="skip")
    assert numbers(dataset.batch(range(len(dataset)), Size(40, 48))) == [0, 2]
    assert "no caption in the style 'brief'" in dataset.skipped[0]


@pytest.mark.parametrize("indexed", ["before", "after"])
@pytest.mark.parametrize("kept", [0.35, 0.6, 0.9, "all but the end"])
def test_a_shard_that_ends_early(tmp_path, kept, indexed):
    path = foreign(tmp_path / "x.tar", members(0) + members(1) + members(2))
    if indexed == "before":
        index_shards(tmp_path)
    with tarfile.open(path) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
    length = ends[-1] if kept == "all but the end" else int(kept * ends[-1])
    os.truncate(path, length)
    if indexed == "after":
        index_shards(tmp_path)
    with pytest.raises(ValueError, match=r"x.tar.*(ends early|is missing)"):
        ShardedImages.open(tmp_path)
    # Without an index the beginning of the next sample says that a sample is complete.
    proof = 512 if indexed == "after" else 0
    whole = [n for n in range(3) if ends[3 * n + 2] + proof <= length]
    if not whole:
        with pytest.raises(ValueError, match="has no sample to train on"):
            ShardedImages.open(tmp_path, on_bad="skip")
        return
    dataset = ShardedImages.open(tmp_path, on_bad="skip")
    assert numbers(dataset.batch(range(len(dataset)), Size(40, 48))) == whole
    assert dataset.skipped


def test_an_index_of_another_file(tmp_path):
    path = foreign(tmp_path / "x.tar", members(0))
    index_shards(tmp_path)
    foreign(path, [member for number in range(5) for member in members(number)])
    with pytest.raises(ValueError, match=r"index beside .*x.tar is of another file; call index_shards"):
        ShardedImages.open(tmp_path)
    assert index_shards(tmp_path) == 1
    assert len(ShardedImages.open(tmp_path)) == 5
    path.with_suffix(".npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"x.npz is damaged .*call index_shards"):
        ShardedImages.open(tmp_path)


def test_no_shards(tmp_path):
    for call in (ShardedImages.open, index_shards):
        with pytest.raises(FileNotFoundError, match="no shards in"):
            call(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"x.tar is no tar file"):
        index_shards(tmp_path)
    foreign(tmp_path / "x.tar", [])
    index_shards(tmp_path)
    with pytest.raises(ValueError, match="has no sample to train on"):
        ShardedImages.open(tmp_path)


def test_bytes_that_change_after_indexing_are_not_trained_on(tmp_path):
    (path,) = write_shards(samples(3), tmp_path)
    dataset = ShardedImages.open(tmp_path)
    content = bytearray(path.read_bytes())
    content[dataset.rows["picture"][1] + 60] ^= 1
    content[dataset.rows["text"][2] + 1] ^= 1
    path.write_bytes(content)
    assert numbers(dataset.batch([0], Size(8, 8))) == [0]
    with pytest.raises(ValueError, match=r"00000.tar: sample 'sample_1': its picture changed since it was indexed"):
        dataset.batch([0, 1], Size(8, 8))
    with pytest.raises(ValueError, match=r"00000.tar: sample 'sample_2': its texts changed since they were indexed"):
        dataset.batch([2], Size(8, 8))
    os.truncate(path, int(dataset.rows["picture"][1]) + 10)
    with pytest.raises(ValueError, match=r"sample 'sample_2': the shard ends early"):
        dataset.captions([2])


def test_what_only_decoding_shows_is_refused_then(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    whole = encoded(noise, "JPEG")
    cut = whole[: -len(whole) // 4]
    lying = bytearray(encoded(noise))
    lying[16:24] = struct.pack(">II", 96, 20)  # twice as wide as the rows that follow
    lying[29:33] = struct.pack(">I", zlib.crc32(lying[12:29]))
    write_shards([sample(n, picture=bytes(picture)) for n, picture in enumerate((whole, cut, lying))], tmp_path)
    dataset = ShardedImages.open(tmp_path)
    dataset.batch([0], Size(8, 8))
    dataset.rows["height"][0] = 41
    with pytest.raises(ValueError, match=r"sample 'sample_0': its picture has 40 x 48 pixels, not 41 x 48 as indexed"):
        dataset.batch([0], Size(8, 8))
    for bad in (1, 2):
        with pytest.raises(ValueError, match=rf"00000.tar: sample 'sample_{bad}': its picture is missing or cannot be"):
            dataset.batch([bad], Size(8, 8))


def taller(content):
    """A JPEG or PNG file that says it is twice as high as it is."""
    lying = bytearray(content)
    if content.startswith(b"\xff\xd8"):
        place = 2
        while lying[place + 1] not in (0xC0, 0xC2):
            place += 2 + struct.unpack(">H", lying[place + 2 : place + 4])[0]
        lying[place + 5 : place + 7] = struct.pack(">H", 80)
    else:
        lying[20:24] = struct.pack(">I", 80)
        lying[29:33] = struct.pack(">I", zlib.crc32(lying[12:29]))
    return bytes(lying)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_headers_that_lie_about_the_height_are_not_trained_on(tmp_path, kind):
    bad = taller(encoded(painted(1), kind))
    with Image.open(io.BytesIO(bad)) as filled:
        assert np.asarray(filled).shape == (80, 48, 3), "the decoder sees nothing wrong"
    name = {"JPEG": "jpg", "PNG": "png"}[kind]
    foreign(tmp_path / "x.tar", members(0) + members(1, **{"jpg": None, "json": None, name: bad}) + members(2))
    index_shards(tmp_path)
    dataset = ShardedImages.open(tmp_path)
    with pytest.raises(ValueError, match=r"sample '1': its picture is missing or cannot be read.*lying header"):
        dataset.batch([1], Size(8, 8))
    # Found before training by whoever asks for it, once.
    assert [index_shards(tmp_path, decode=True) for _ in range(2)] == [1, 0] and index_shards(tmp_path) == 0
    with pytest.raises(ValueError, match=r"sample '1': its picture is missing or cannot be read"):
        ShardedImages.open(tmp_path)
    dataset = ShardedImages.open(tmp_path, on_bad="skip")
    assert numbers(dataset.batch(range(2), Size(40, 48))) == [0, 2] and len(dataset.skipped) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_metadata_that_cannot_be_read_cost_no_picture(tmp_path):
    """A camera's broken EXIF is no fault of the picture."""
    several = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 2, 6, 6, 0)
    pictures = [encoded(painted(n), kind, exif=several) for n, kind in enumerate(("JPEG", "WEBP", "PNG"))]
    pictures.append(encoded(painted(3), "JPEG", exif=several[:20]))
    write_shards([sample(n, picture=picture) for n, picture in enumerate(pictures)], tmp_path)
    dataset = ShardedImages.open(tmp_path)
    assert dataset.sizes.tolist() == [[40, 48]] * 4
    assert numbers(dataset.batch(range(4), Size(40, 48))) == [0, 1, 2, 3]


def test_captions_without_blanks_are_counted_by_their_signs(tmp_path):
    captions = ["一座红色的灯塔", "a red lighthouse — at dusk", "🌊"]
    write_shards([sample(n, caption=caption) for n, caption in enumerate(captions)], tmp_path)
    assert ShardedImages.open(tmp_path).words().tolist() == [7, 5, 1]


def test_folders_may_be_strings(tmp_path):
    write_shards(iter(samples(2)), str(tmp_path / "deep/down"))
    assert ShardedImages.open(str(tmp_path / "deep/down")).shards == (Path(tmp_path / "deep/down/00000.tar"),)
