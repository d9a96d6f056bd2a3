import importlib.util
import io
import logging
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wellposed.batches import TextImageBatch
from wellposed.data.bucketed import BucketedBatches, SizedImages
from wellposed.data.buckets import Buckets, Size
from wellposed.data.shards import ShardedImages, ShardSample, write_shards
from wellposed.training import Player, Prefetched, TrainingConfig, TrainingData, train

SPEC = importlib.util.spec_from_file_location("ranks", Path(__file__).parents[1] / "training/conftest.py")
assert SPEC is not None and SPEC.loader is not None
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)
on_ranks = ranks.on_ranks

THREE = Buckets(
    by_base={base: (Size(base, base), Size(base // 2, base * 2), Size(base * 2, base // 2)) for base in (4, 8, 12)},
    batch_sizes={4: 6, 8: 3, 12: 2},
)


class Largest(Buckets):
    """Another rule of choice."""


class Pictures:
    """Pictures of given sizes; the pixels say which one it is, the caption also in which epoch."""

    def __init__(self, sizes):
        self.sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)

    def __len__(self):
        return len(self.sizes)

    def batch(self, indices, size, *, epoch=0):
        numbers = torch.as_tensor(indices) / len(self)
        images = numbers[:, None, None, None].expand(-1, 3, *size).contiguous()
        return TextImageBatch(images=images, captions=tuple(f"{i} in {epoch}" for i in indices))

    def fingerprint(self):
        return f"{self.sizes.tolist()}"


def many(count=250, seed=0, low=3, high=40):
    return Pictures(np.random.default_rng(seed).integers(low, high, (count, 2)))


def planned(dataset=None, **changes):
    fields = {"dataset": many() if dataset is None else dataset, "buckets": THREE, "shares": 4, "seed": 1}
    return BucketedBatches(**(fields | changes))


def epoch_of(data, epoch=0):
    """Every share of an epoch, as (bucket, indices)."""
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    return [
        (data.bucket_at(step, part), data.indices_at(step, part).tolist())
        for step in steps
        for part in range(data.shares)
    ]


def test_every_share_is_of_one_bucket_that_its_pictures_may_be_in():
    data = planned()
    bases = {size: base for base, size in THREE.shapes}
    assert isinstance(data, TrainingData)
    for size, indices in epoch_of(data):
        base = bases[size]
        assert len(indices) == THREE.batch_sizes[base]
        for index in indices:
            native = Size(*data.dataset.sizes[index].tolist())
            assert size == THREE.nearest(native, base)
            assert THREE.shapes.index((base, size)) in THREE.choices(np.array([native]))
    assert any(len({data.bucket_at(step, part) for part in range(4)}) == 4 for step in range(data.steps_per_epoch)), (
        "shares of a step differ"
    )


@pytest.mark.parametrize("epoch", [0, 5])
def test_an_epoch_has_every_picture_that_is_large_enough(epoch):
    data = planned()
    fits = set(np.flatnonzero((THREE.choices(data.dataset.sizes) >= 0).any(axis=1)).tolist())
    assert 200 < len(fits) < 250
    counts = Counter(i for _, indices in epoch_of(data, epoch) for i in indices)
    assert set(counts) == fits
    assert sum(counts.values()) - len(fits) < 9 * 6 + 3 * 6 * 4, "repeats fill last shares and the last step only"
    by_image: dict[int, set[Size]] = {}
    for size, indices in epoch_of(data, epoch):
        for i in indices:
            by_image.setdefault(i, set()).add(size)
    assert all(len(sizes) == 1 for sizes in by_image.values()), "one bucket in an epoch"


def test_the_odds_of_a_base_are_its_batch_size():
    """For every picture over the epochs, and in every epoch as exactly as whole pictures go."""
    dataset = Pictures([(30, 30)] * 7 + [(10, 10)] * 2 + [(5, 5)] * 3)  # three bases, two, one
    data = planned(dataset, shares=1)
    epochs, chosen = 120, Counter()
    for epoch in range(epochs):
        firsts = {i: size.height for size, indices in epoch_of(data, epoch) for i in indices}
        chosen.update(firsts.items())
        large = Counter(firsts[i] for i in range(7))
        for base, odds in THREE.batch_sizes.items():
            assert abs(large[base] - 7 * odds / 11) < 1
    for first, last, total in ((0, 7, 11), (7, 9, 9)):
        for i in range(first, last):
            for base in (4, 8, 12) if total == 11 else (4, 8):
                odds = THREE.batch_sizes[base] / total
                assert abs(chosen[i, base] / epochs - odds) < 5 * (odds * (1 - odds) / epochs) ** 0.5
    assert all(chosen[i, 4] == epochs for i in range(9, 12))


def test_shares_are_spread_evenly_over_bases():
    data = planned(many(1500, low=24, high=60))
    shares = Counter(size.height * size.width for size, _ in epoch_of(data))
    assert max(shares.values()) - min(shares.values()) <= 12
    assert data.batch_size == pytest.approx(4 * (6 + 3 + 2) / 3, abs=1)


def test_the_plan_is_a_function_of_seed_and_epoch():
    data, again = planned(), planned()
    later = epoch_of(again, 7)
    assert epoch_of(data, 0) == epoch_of(again, 0)
    assert epoch_of(data, 7) == later
    assert epoch_of(data, 7) != epoch_of(data, 0) != epoch_of(planned(seed=2), 0)
    assert epoch_of(planned(seed=-1), 0) != epoch_of(data, 0)


def test_the_last_step_of_an_epoch_begins_it_once_more():
    data = planned(Pictures([(4, 4)] * 20), buckets=Buckets.fixed(Size(4, 4), batch_size=4), shares=3)
    assert data.steps_per_epoch == 2
    shares = [indices for _, indices in epoch_of(data)]
    assert sorted(i for share in shares[:5] for i in share) == list(range(20))
    assert shares[5] == shares[0]


def test_shares_of_a_step_lie_one_after_the_other():
    data = planned()
    for step in range(3):
        spans = data.shares_at(step, 4)
        assert [i for span in spans for i in span] == list(range(spans[-1].stop))
        assert [len(span) for span in spans] == [len(data.indices_at(step, part)) for part in range(4)]
        for part in range(4):
            batch = data.batch_at(step, part, 4)
            assert batch.captions == tuple(f"{i} in 0" for i in data.indices_at(step, part))
            assert batch.images.shape[-2:] == data.bucket_at(step, part)
    assert data.batch_at(data.steps_per_epoch, 0, 4).captions[0].endswith(" in 1")
    for call in (data.shares_at, lambda step, parts: data.batch_at(step, 0, parts)):
        with pytest.raises(
            ValueError, match=r"has 4 shares and the run divides it into 8.*gradient_accumulation = 4 //"
        ):
            call(0, 8)


def test_weights_by_token_make_the_mean_over_shares_that_over_pixels():
    data, plain = planned(weighting="token"), planned()
    for step in range(5):
        batches = [data.batch_at(step, part, 4) for part in range(4)]
        pixels = torch.cat([batch.images[:, 0].flatten() for batch in batches]).double()
        means = torch.tensor([batch.weight * batch.images.double().mean() for batch in batches])
        torch.testing.assert_close(means.mean(), pixels.mean())
        assert sum(batch.weight for batch in batches) == pytest.approx(4)
        assert {plain.batch_at(step, part, 4).weight for part in range(4)} == {1.0}


def test_the_report_counts_an_epoch(caplog):
    sizes = [(4, 4)] * 13 + [(4, 8)] * 2 + [(2, 9)] * 3 + [(3, 3)] * 3
    buckets = Buckets(by_base={4: (Size(4, 4), Size(2, 8), Size(8, 2))}, batch_sizes={4: 6})
    with caplog.at_level(logging.WARNING):
        data = planned(Pictures(sizes), buckets=buckets, shares=2)
    assert "3 of 21 pictures are too small" in caplog.text
    assert "1 buckets have fewer pictures than a share and repeat them within it, such as 2x8 (5 for 6)" in caplog.text
    report = data.report()
    assert [(b.images, b.shares, b.repeats, b.starved) for b in report.buckets] == [
        (13, 3, 5, False),
        (5, 1, 1, True),  # 1 : 2 is equally near to both
        (0, 0, 0, False),
    ]
    assert (report.images, report.too_small, report.repeats) == (21, 3, 6)
    assert report.cropped == pytest.approx((2 * 1 / 2 + 3 * 1 / 9) / 18)
    starved = next(indices for size, indices in epoch_of(data) if size == (2, 8))
    assert sorted(starved[:5]) == list(range(13, 18)) and starved[5] == starved[0]


def test_shards_of_pictures_are_such_data(tmp_path):
    sizes = [(9, 8), (8, 20), (30, 24), (3, 3)] * 5
    samples = []
    for number, (height, width) in enumerate(sizes):
        file = io.BytesIO()
        Image.new("RGB", (width, height), (10 * number, 0, 0)).save(file, "PNG")
        samples.append(ShardSample(key=f"{number}", picture=file.getvalue(), caption=f"picture {number}"))
    write_shards(samples, tmp_path, samples_per_shard=7)
    dataset = ShardedImages.open(tmp_path, crop="random")
    assert isinstance(dataset, SizedImages)
    data = planned(dataset)
    assert data.captioning_cost == {}
    assert data.report().too_small == 5
    for step in range(data.steps_per_epoch):
        for part in range(4):
            batch = data.batch_at(step, part, 4)
            indices = data.indices_at(step, part)
            assert batch.images.shape == (len(indices), 3, *data.bucket_at(step, part))
            assert batch.captions == tuple(f"picture {i}" for i in indices)
            assert ((batch.images[:, 0] + 1) * 127.5).round().mean((1, 2)).tolist() == (10 * indices).tolist()


def test_fingerprint_sees_what_the_order_depends_on():
    others = [
        planned(),
        planned(shares=2),
        planned(seed=2),
        planned(weighting="token"),
        planned(many(seed=1)),
        planned(buckets=Buckets(by_base=THREE.by_base, batch_sizes=THREE.batch_sizes, tolerance=0.1)),
        planned(buckets=Buckets(by_base=THREE.by_base, batch_sizes={4: 6, 8: 3, 12: 1})),
        planned(buckets=Largest(by_base=THREE.by_base, batch_sizes=THREE.batch_sizes)),
    ]
    assert len({str(data.fingerprint()) for data in others}) == len(others)
    assert planned().fingerprint() == planned().fingerprint()


def test_enlargement_is_refused_before_the_first_batch(tmp_path):
    """A picture that lacks a pixel would stop a set that enlarges none in the middle of training."""
    file = io.BytesIO()
    Image.new("RGB", (7, 8)).save(file, "PNG")
    write_shards([ShardSample(key="0", picture=file.getvalue(), caption="a picture")], tmp_path)
    tolerant = Buckets.fixed(Size(8, 8), batch_size=1, tolerance=0.2)
    with pytest.raises(ValueError, match=r"tolerate an enlargement by 0\.2, .* upscale=True, or write tolerance=0"):
        planned(ShardedImages.open(tmp_path), buckets=tolerant)
    data = planned(ShardedImages.open(tmp_path, upscale=True), buckets=tolerant, shares=1)
    assert data.batch_at(0, 0, 1).images.shape == (1, 3, 8, 8)


def test_bad_plans():
    with pytest.raises(ValueError, match="shares is 0"):
        planned(shares=0)
    for sizes in ([(3, 3)], []):
        with pytest.raises(ValueError, match=rf"none of {len(sizes)} pictures is large enough"):
            planned(Pictures(sizes))


def test_threads_that_fetch_ahead_plan_an_epoch_once(monkeypatch):
    plan, calls = BucketedBatches._planned, []
    monkeypatch.setattr(BucketedBatches, "_planned", lambda self, epoch: calls.append(epoch) or plan(self, epoch))
    data = planned(many(60))
    steps = range(3 * data.steps_per_epoch)
    ahead = Prefetched(data, ahead=4)
    fetched = [ahead.batch_at(step, part, 4).captions for step in steps for part in range(4)]
    assert sorted(set(calls)) == sorted(calls)
    assert fetched == [data.batch_at(step, part, 4).captions for step in steps for part in range(4)]
    assert ahead.shares_at(2, 4) == data.shares_at(2, 4)


def test_one_process_then_two_then_one_train_as_one(on_ranks, tmp_path):
    """In the middle of an epoch, with shapes that differ between ranks."""

    def loss(models, batch, context):
        assert len(context.rows) == len(batch.images) == len(batch.captions)
        seen = batch.images.double().mean((2, 3)) * batch.images.shape[-1] + context.normal((3,)).double()
        error = (models["net"](seen) - seen.flip(1)).square().mean()
        return batch.weight * error, {}

    def work(out, steps, shares_each):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3)).double()
        player = Player(
            name="net", model=net, objective=loss, optimizer=partial(torch.optim.AdamW, lr=1e-2), ema_decay=0.9
        )
        config = TrainingConfig(
            max_steps=steps, gradient_accumulation=shares_each, log_every=1, device="cpu", progress=False
        )
        result = train(player, planned(many(120), weighting="token"), config, out)
        return [p.detach() for p in net.parameters()] + list(result.averages["net"].weights.values())

    assert planned(many(120)).steps_per_epoch > 2
    straight = work(tmp_path / "straight", 9, 4)
    work(tmp_path / "resumed", 2, 4)
    on_ranks(2, work, tmp_path / "resumed", 5, 2)
    for ours, theirs in zip(work(tmp_path / "resumed", 9, 4), straight, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"divides it into 3 .*set gradient_accumulation"):
        work(tmp_path / "wrong", 9, 3)
