"""Statistics are exact over any batches and ranks, and latents of images are what encoding says."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.data.latents import LatentDataset
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.latents import EncodedImages, Moments, cache_latents, latent_statistics
from wellposed.training.distributed import Workers

Build = Callable[..., AutoencoderDecQ]

SPEC = importlib.util.spec_from_file_location("ranks", Path(__file__).parents[1] / "training" / "conftest.py")
assert SPEC is not None and SPEC.loader is not None
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)
on_ranks = ranks.on_ranks

COUNT = 9
ALONE = Workers(rank=0, world_size=1, device=torch.device("cpu"))
CHANNELS: dict[str, Any] = {"num_queries": None, "query_fusion": "channels", "query_bottleneck_dim": 6}
SMALL = {"encoder_input_size": 28, "encoder_num_hidden_layers": 3, "decoder_num_hidden_layers": 1}


def image_set(**changes: Any) -> ImageDataset:
    pixels = torch.randint(0, 256, (COUNT, 3, 28, 28), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    fields = {"name": "nine", "source": StoredPixels(pixels=pixels), "labels": torch.arange(COUNT) % 4}
    return ImageDataset(**(fields | changes))


def stream(*shape: int) -> torch.Tensor:
    """Values whose mean is large beside their deviation, which differs from element to element."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return 1000 + values * torch.linspace(0.1, 3, shape[1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [7, 7, 7, 2], [2, 20, 1]])
def test_moments_are_those_of_all(sizes: list[int]) -> None:
    values = stream(23, 4, 3)
    moments = Moments()
    for part in values.split(sizes):
        moments.update(part)
    assert moments.count == 23
    # 1000^2 of float64 leave 1e-10 of a variance to a sum of squares; pairwise updates keep what the values have.
    torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.variance(), values.var(0, correction=0), rtol=1e-12, atol=0)


def test_moments_of_narrow_values_are_wide() -> None:
    values = stream(23, 4).bfloat16()
    moments = Moments()
    for part in values.split(5):
        moments.update(part)
    torch.testing.assert_close(moments.variance(), values.double().var(0, correction=0), rtol=1e-12, atol=0)


def test_moments_of_ranks_are_merged(on_ranks: Callable[..., list[Any]]) -> None:
    values = stream(23, 4, 3)

    def work() -> list[Any]:
        rank = dist.get_rank()
        moments = Moments()
        for part in (values[:4], values[4:])[rank].split(3):
            moments.update(part)
        merged = moments.over_ranks(Workers(rank=rank, world_size=2, device=torch.device("cpu")))
        return [merged.count, merged.mean, merged.variance()]

    first, second = on_ranks(2, work)
    assert first[0] == second[0] == 23
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    torch.testing.assert_close(first[1], values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(first[2], values.var(0, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("fields", [{}, {"num_queries": 0}, CHANNELS], ids=["tokens", "none", "channels"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_statistics_normalise_the_set(build: Build, fields: dict[str, Any], mirrored: bool) -> None:
    model, images = build(**fields, **SMALL).double(), image_set()
    queries = model.num_query_tokens
    statistics = latent_statistics(model, images, ALONE, batch_size=4, mirrored=mirrored)
    assert statistics.count == COUNT
    assert (statistics.query_mean is not None) == (statistics.query_std is not None) == bool(queries)
    encoded = EncodedImages(model, images)
    before = [encoded.encode(range(COUNT), mirrored=flipped) for flipped in (False, True)[: 1 + mirrored]]
    statistics.apply_to(model)
    after = [encoded.encode(range(COUNT), mirrored=flipped) for flipped in (False, True)[: 1 + mirrored]]
    for name in ("latents", "query_latents") if queries else ("latents",):
        raw, normal = (torch.cat([getattr(one, name) for one in some]).double() for some in (before, after))
        variance = raw.var(0, correction=0)
        torch.testing.assert_close(normal.mean(0), torch.zeros_like(variance), rtol=0, atol=1e-5)
        # Less than 1 by the two epsilons: that of the variance, and that of the autoencoder's division.
        expected = variance / ((variance + 1e-5).sqrt() + 1e-5).square()
        torch.testing.assert_close(normal.var(0, correction=0), expected, rtol=1e-4, atol=1e-5)
        assert (expected > 0.9).all() and (variance.max() > 4 * variance.min())
    assert after[0].latents.shape[1] == model.latent_channels


def test_statistics_do_not_depend_on_batches(build: Build) -> None:
    model, images = build(**SMALL), image_set()
    one, other = (latent_statistics(model, images, ALONE, batch_size=size) for size in (2, COUNT))
    for name in ("mean", "std", "query_mean", "query_std"):
        # The encoder's own float32 rounding differs with the batch.
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)


def test_statistics_do_not_depend_on_those_before_nor_on_flips(build: Build) -> None:
    model, images = build(scaling_factor=1.7, **SMALL), image_set(flip=True, seed=3)
    fresh = latent_statistics(model, replace(images, flip=False), ALONE)
    generator = torch.Generator().manual_seed(1)
    shapes = ((64, 2, 2), (3, 64))
    mean, query_mean = (torch.randn(shape, generator=generator) for shape in shapes)
    std, query_std = (torch.rand(shape, generator=generator) + 0.5 for shape in shapes)
    model.set_latent_statistics(mean, std, query_mean, query_std)
    again = latent_statistics(model, images, ALONE)
    for name in ("mean", "std", "query_mean", "query_std"):
        torch.testing.assert_close(getattr(again, name), getattr(fresh, name), rtol=1e-4, atol=1e-5)


def test_ranks_share_the_statistics(build: Build, on_ranks: Callable[..., list[Any]]) -> None:
    model, images = build(**SMALL).double(), image_set()
    whole = latent_statistics(model, images, ALONE)
    names = ("mean", "std", "query_mean", "query_std")

    def work() -> list[torch.Tensor]:
        told = []
        workers = Workers(rank=dist.get_rank(), world_size=2, device=torch.device("cpu"))
        found = latent_statistics(
            model, images, workers, batch_size=2, on_progress=lambda done, total: told.append((done, total))
        )
        assert told[-1] == ((5, 5) if workers.is_main else (4, 4))
        return [getattr(found, name) for name in names]

    first, second = on_ranks(2, work)
    for name, a, b in zip(names, first, second, strict=True):
        assert torch.equal(a, b), name
        torch.testing.assert_close(a, getattr(whole, name), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="9 images cannot be shared by 10 ranks"):
        latent_statistics(model, images, replace(ALONE, world_size=10))


@pytest.mark.parametrize("queries", [3, 0])
def test_encoded_images_are_the_images_encoded(build: Build, queries: int) -> None:
    model, images = build(num_queries=queries, noise_tau=0.8, **SMALL), image_set(flip=True, seed=4)
    encoded = EncodedImages(model, images)
    assert (len(encoded), encoded.name) == (COUNT, "nine")
    order = [3, 8, 0, 3]
    batch, pixels = encoded.batch(order, epoch=2), images.batch(order, epoch=2)
    code = model.encode((pixels.images + 1) / 2)
    assert torch.equal(batch.latents, code.latent)
    assert torch.equal(batch.labels, pixels.labels)
    assert torch.equal(batch.query_latents, code.query_latent) if queries else batch.query_latents is None
    assert not batch.latents.requires_grad
    for mirrored in (False, True):
        plain = replace(images, flip=False).batch(order).images
        code = model.encode(((plain.flip(-1) if mirrored else plain) + 1) / 2)
        assert torch.equal(encoded.encode(order, mirrored=mirrored).latents, code.latent)
    assert EncodedImages(model, replace(images, labels=None)).encode([0], mirrored=True).labels is None
    with pytest.raises(ValueError, match=r"training mode and would add noise; call eval\(\)"):
        EncodedImages(model.train(), images).batch([0])


def test_fingerprint_knows_what_weights_do_not(build: Build, tmp_path: Path) -> None:
    images = image_set()
    base = EncodedImages(build(**SMALL), images)
    base.autoencoder.save_pretrained(tmp_path)
    again = AutoencoderDecQ.from_pretrained(tmp_path)
    assert EncodedImages(again, images).fingerprint() == base.fingerprint()
    others = [
        EncodedImages(build(num_summed_layers=2, **SMALL), images),
        EncodedImages(build(condenser_layers=(0, 1), **SMALL), images),
        EncodedImages(build(**CHANNELS, **SMALL), images),
        EncodedImages(base.autoencoder, replace(images, flip=True)),
        EncodedImages(base.autoencoder, replace(images, labels=None)),
    ]
    moved = build(**SMALL)
    torch.nn.init.zeros_(moved.condensers.queries)
    assert len({one.fingerprint() for one in (base, *others, EncodedImages(moved, images))}) == 7
    # As it was before there were channels of queries: latents that were kept then are not thrown away.
    assert base.fingerprint().endswith(" 9ba74b476ad3cc3bcf65336156487fe02f6abc3ba0aff3cbb2d44aaeb6f4a54b")


def test_cached_latents_are_those_of_every_epoch(build: Build, tmp_path: Path) -> None:
    """In batches of one, so that the encoder rounds alike."""
    model, images = build(**SMALL), image_set(flip=True, seed=3)
    told: list[tuple[int, int]] = []
    cached = cache_latents(
        model,
        images,
        tmp_path,
        ALONE,
        shard_size=4,
        batch_size=1,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    encoded = EncodedImages(model, images)
    for epoch in range(3):
        for position in range(COUNT):
            one, other = (some.batch([position], epoch=epoch) for some in (cached, encoded))
            for name in ("latents", "query_latents", "labels"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert cached.fingerprint() != replace(cached, seed=4).fingerprint()


def test_cached_latents_have_the_channels_of_queries(build: Build, tmp_path: Path) -> None:
    model, images = build(**CHANNELS, **SMALL), image_set()
    cached = cache_latents(model, images, tmp_path, ALONE, batch_size=1).batch([2])
    assert cached.latents.shape == (1, 70, 2, 2) and cached.query_latents is None
    assert torch.equal(cached.latents, EncodedImages(model, images).batch([2]).latents)


def test_a_cache_is_of_its_images_and_its_autoencoder(build: Build, tmp_path: Path) -> None:
    model, images = build(**SMALL), image_set()
    cached = cache_latents(model, images, tmp_path, ALONE, dtype="bfloat16")
    assert cached.index.dtype == "bfloat16" and not cached.index.mirrored
    again = cache_latents(model, images, tmp_path, ALONE, dtype="bfloat16")
    assert again == cached == LatentDataset.open(tmp_path)
    other = build(num_summed_layers=2, **SMALL)
    for arguments in (
        (other, images, "bfloat16"),
        (model, replace(images, flip=True), "bfloat16"),
        (model, images, "float32"),
    ):
        with pytest.raises(ValueError, match="holds other latents"):
            cache_latents(arguments[0], arguments[1], tmp_path, ALONE, dtype=arguments[2])


def test_images_that_are_cropped_anew_have_no_latents_to_keep(build: Build, tmp_path: Path) -> None:
    model, images = build(**SMALL), image_set(crop=14)
    assert EncodedImages(model, images).batch([0, 1]).latents.shape == (2, 64, 2, 2)
    for keep in (
        lambda: cache_latents(model, images, tmp_path, ALONE),
        lambda: latent_statistics(model, images, ALONE),
    ):
        with pytest.raises(ValueError, match="give the set without crop"):
            keep()


def test_ranks_write_one_cache(build: Build, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    model, images = build(**SMALL), image_set()
    whole = cache_latents(model, images, tmp_path / "one", ALONE, shard_size=2, batch_size=1)

    def work() -> list[torch.Tensor]:
        workers = Workers(rank=dist.get_rank(), world_size=2, device=torch.device("cpu"))
        cached = cache_latents(model, images, tmp_path / "two", workers, shard_size=2, batch_size=1)
        batch = cached.batch(range(COUNT))
        return [batch.latents, batch.query_latents]

    expected = whole.batch(range(COUNT))
    for latents, queries in on_ranks(2, work):
        assert torch.equal(latents, expected.latents)
        assert torch.equal(queries, expected.query_latents)
