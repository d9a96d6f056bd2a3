"""Latents in shards: read back bit for bit, mirrored by the images' own coins, whole or not there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wellposed.batches import LatentBatch
from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.data.latents import LatentDataset, LatentIndex, write_latents

COUNT = 11


@pytest.fixture
def images() -> ImageDataset:
    pixels = torch.rand(COUNT, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ImageDataset(name="eleven", source=StoredPixels(pixels=pixels), labels=torch.arange(COUNT) % 3)


def index(**changes: Any) -> LatentIndex:
    chosen = {"name": "eleven", "source": "a" * 64, "count": COUNT, "shard_size": 4, "mirrored": True}
    return LatentIndex(**(chosen | changes))


class Identity:
    """An encoder whose patch latents are the pixels, and whose queries are their rows' means; it counts its images."""

    def __init__(self, images: ImageDataset, *, queries: bool = True, fails_at: int | None = None) -> None:
        self.images, self.queries, self.fails_at = images, queries, fails_at
        self.encoded: list[int] = []

    def __call__(self, some: range, mirrored: bool) -> LatentBatch:
        if self.fails_at in some:
            raise KeyboardInterrupt
        self.encoded += some
        batch = self.images.batch(some)
        pixels = batch.images.flip(-1) if mirrored else batch.images
        means = pixels.cumsum(-1).mean(2).mT if self.queries else None
        return LatentBatch(latents=pixels, query_latents=means, labels=batch.labels)


def assert_same(one: LatentBatch, other: LatentBatch) -> None:
    for name in ("latents", "query_latents", "labels"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("queries", [True, False])
def test_what_is_read_is_what_was_encoded(tmp_path: Path, images: ImageDataset, queries: bool) -> None:
    encode = Identity(images, queries=queries)
    write_latents(tmp_path, index(mirrored=False), encode, batch_size=3)
    assert sorted(encode.encoded) == list(range(COUNT))
    dataset = LatentDataset.open(tmp_path)
    assert (len(dataset), dataset.name) == (COUNT, "eleven")
    for some in (range(COUNT), [10, 0, 7, 7, 3], torch.tensor([5])):
        batch = dataset.batch(some)
        for row, position in enumerate(torch.as_tensor(some).tolist()):
            alone = encode(range(position, position + 1), False)
            for name in ("latents", "query_latents", "labels"):
                values = getattr(batch, name)
                assert values is None or torch.equal(values[row], getattr(alone, name)[0]), name
        assert (batch.query_latents is None) != queries


def test_a_set_without_classes(tmp_path: Path, images: ImageDataset) -> None:
    write_latents(tmp_path, index(), Identity(replace(images, labels=None)))
    assert LatentDataset.open(tmp_path, flip=True).batch([2, 9]).labels is None


def test_images_are_mirrored_by_their_own_coins(tmp_path: Path, images: ImageDataset) -> None:
    write_latents(tmp_path, index(), Identity(images))
    order = torch.tensor([5, 2, 2, 0, 10, 4, 1, 3, 9])
    seen = []
    for seed in (0, 7):
        dataset = LatentDataset.open(tmp_path, flip=True, seed=seed)
        for epoch in range(4):
            batch = dataset.batch(order, epoch=epoch)
            pixels = replace(images, flip=True, seed=seed).batch(order, epoch=epoch)
            assert torch.equal(batch.latents, pixels.images)
            assert torch.equal(batch.query_latents, pixels.images.cumsum(-1).mean(2).mT), (
                "queries go with their patches"
            )
            assert torch.equal(batch.labels, pixels.labels)
            seen.append(batch.latents)
    assert len({tuple(one.flatten().tolist()) for one in seen}) == len(seen)
    plain = LatentDataset.open(tmp_path)
    assert torch.equal(plain.batch(order, epoch=3).latents, images.batch(order).images)


@pytest.mark.parametrize(("shard_size", "batch_size"), [(1, 5), (3, 2), (COUNT, 4), (100, 100)])
def test_batches_do_not_depend_on_shards(
    tmp_path: Path, images: ImageDataset, shard_size: int, batch_size: int
) -> None:
    write_latents(tmp_path / "a", index(), Identity(images))
    write_latents(tmp_path / "b", index(shard_size=shard_size), Identity(images), batch_size=batch_size)
    sets = [LatentDataset.open(tmp_path / name, flip=True, seed=3) for name in "ab"]
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    assert_same(*(dataset.batch(order, epoch=2) for dataset in sets))
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == -(-COUNT // shard_size)


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def test_interrupted_writing_goes_on(tmp_path: Path, images: ImageDataset) -> None:
    write_latents(tmp_path / "whole", index(), Identity(images))
    folder = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        write_latents(folder, index(), Identity(images, fails_at=6), batch_size=2)
    (folder / ".00001.safetensors.123").write_bytes(b"half of it")  # a process that was killed while it wrote
    before = identities(folder)
    assert list(before) == ["00000.safetensors"]
    with pytest.raises(ValueError, match=r"lacks 2 of 3 shards, e\.g\. 00001.*call write_latents again"):
        LatentDataset.open(folder)
    encode, told = Identity(images), []
    write_latents(folder, index(), encode, on_progress=lambda done, total: told.append((done, total)))
    assert sorted(set(encode.encoded)) == list(range(4, COUNT))
    assert told == [(1, 3), (2, 3), (3, 3)]
    (folder / "00001.safetensors").unlink()
    encode = Identity(images)
    write_latents(folder, index(), encode)
    assert sorted(set(encode.encoded)) == [4, 5, 6, 7]
    after = identities(folder)
    assert before.items() <= after.items(), "what was there is not written again"
    assert_same(*(LatentDataset.open(tmp_path / n).batch(range(COUNT)) for n in ("whole", "latents")))


def test_ranks_write_different_shards(tmp_path: Path, images: ImageDataset) -> None:
    write_latents(tmp_path / "one", index(), Identity(images))
    mine = [Identity(images), Identity(images)]
    write_latents(tmp_path / "two", index(), mine[1], rank=1, world_size=2)
    first = identities(tmp_path / "two")
    assert list(first) == ["00001.safetensors"]
    write_latents(tmp_path / "two", index(), mine[0], rank=0, world_size=2)
    assert sorted(set(mine[0].encoded)) == [*range(4), *range(8, COUNT)]
    assert sorted(set(mine[1].encoded)) == list(range(4, 8))
    assert first.items() <= identities(tmp_path / "two").items()
    assert_same(*(LatentDataset.open(tmp_path / n).batch(range(COUNT)) for n in ("one", "two")))


def test_more_ranks_than_shards(tmp_path: Path, images: ImageDataset) -> None:
    write_latents(tmp_path, index(), Identity(images), rank=5, world_size=8)
    assert identities(tmp_path) == {}


def test_bfloat16_is_rounded_once(tmp_path: Path, images: ImageDataset) -> None:
    write_latents(tmp_path / "wide", index(), Identity(images))
    write_latents(tmp_path / "narrow", index(dtype="bfloat16"), Identity(images))
    wide, narrow = (LatentDataset.open(tmp_path / n, flip=True).batch(range(COUNT)) for n in ("wide", "narrow"))
    for name in ("latents", "query_latents"):
        assert getattr(narrow, name).dtype == torch.float32
        assert torch.equal(getattr(narrow, name), getattr(wide, name).bfloat16().float())
        assert not torch.equal(getattr(narrow, name), getattr(wide, name))
    assert torch.equal(wide.labels, narrow.labels)


def test_fingerprint_sees_what_a_batch_depends_on(tmp_path: Path) -> None:
    base = LatentDataset(folder=tmp_path, index=index())
    assert base.fingerprint() == replace(base, folder=tmp_path / "elsewhere").fingerprint()
    assert base.fingerprint() == replace(base, seed=5).fingerprint(), "a seed without flips changes nothing"
    others = [
        replace(base, flip=True),
        replace(base, flip=True, seed=5),
        *(replace(base, index=index(**one)) for one in ({"source": "b"}, {"count": 9}, {"dtype": "bfloat16"})),
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "b" * 64}, "source 'a+', not 'b+'"),
        ({"shard_size": 5}, "shard_size 4, not 5"),
        ({"mirrored": False}, "mirrored True, not False"),
        ({"dtype": "bfloat16"}, "dtype 'float32', not 'bfloat16'"),
        ({"name": "twelve", "count": 12}, "name 'eleven', not 'twelve'; count 11, not 12"),
    ],
)
def test_a_folder_of_other_latents_is_refused(
    tmp_path: Path, images: ImageDataset, change: dict[str, Any], message: str
) -> None:
    write_latents(tmp_path, index(), Identity(images))
    with pytest.raises(ValueError, match=f"holds other latents: {message}; choose another folder"):
        write_latents(tmp_path, index(**change), Identity(images))


def test_no_images_and_no_room(tmp_path: Path) -> None:
    for wrong in ({"count": 0}, {"shard_size": 0}):
        with pytest.raises(ValueError, match="at least 1 of each"):
            index(**wrong)


def test_damage_is_named(tmp_path: Path, images: ImageDataset) -> None:
    with pytest.raises(FileNotFoundError, match="holds no latents"):
        LatentDataset.open(tmp_path)
    write_latents(tmp_path, index(), Identity(images))
    shard, about = tmp_path / "00001.safetensors", tmp_path / "index.json"
    dataset, whole, described = LatentDataset.open(tmp_path, flip=True), shard.read_bytes(), about.read_text()
    everything = range(COUNT)
    for length in (0, 100, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"00001\.safetensors cannot be read .*remove it"):
            dataset.batch(everything)
        assert len(dataset.batch([0, 10]).latents) == 2, "other shards can still be read"
    shard.write_bytes(whole)
    tensors = load_file(shard)
    for other in (
        {name: values[:2] for name, values in tensors.items()},
        {name: values for name, values in tensors.items() if not name.startswith("mirrored_")},
    ):
        save_file({name: values.contiguous() for name, values in other.items()}, shard)
        with pytest.raises(ValueError, match="cannot be read"):
            [dataset.batch(everything, epoch=epoch) for epoch in range(8)]
    for damaged in ("{", "[]", json.dumps({"name": "eleven"}), described.replace("11", "0")):
        about.write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            LatentDataset.open(tmp_path)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            write_latents(tmp_path, index(), Identity(images))


def test_bad_calls(tmp_path: Path, images: ImageDataset) -> None:
    write_latents(tmp_path, index(mirrored=False), Identity(images))
    with pytest.raises(ValueError, match="no mirrored latents; write them with mirrored=True"):
        LatentDataset.open(tmp_path, flip=True)
    for wrong in ([], [0, COUNT], [-1]):
        with pytest.raises(ValueError, match="give some of 0 to 10"):
            LatentDataset.open(tmp_path).batch(wrong)
