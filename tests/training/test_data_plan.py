import threading
from dataclasses import dataclass

import pytest
import torch

from wellposed.training.data_plan import PlannedBatches, Prefetched, to_device


def test_an_epoch_visits_every_sample_once_in_a_new_order(toy):
    data = toy.data(batch_size=10)
    epochs = [torch.cat([data.indices_at(epoch * 3 + batch) for batch in range(3)]) for epoch in range(2)]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(30))
        assert order.tolist() != list(range(30))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_dropped_and_wrapped_batches(toy):
    dropping, wrapping = toy.data(batch_size=8), toy.data(batch_size=8, incomplete="wrap")
    assert (dropping.steps_per_epoch, wrapping.steps_per_epoch) == (3, 4)
    order = torch.cat([wrapping.indices_at(step) for step in range(4)])
    assert order[:30].sort().values.tolist() == list(range(30))
    assert order[30:].tolist() == order[:2].tolist()
    assert torch.cat([dropping.indices_at(step) for step in range(3)]).tolist() == order[:24].tolist()


def test_a_set_smaller_than_a_batch_can_be_wrapped(toy):
    data = PlannedBatches(dataset=toy.Points(3), batch_size=8, incomplete="wrap")
    assert data.steps_per_epoch == 1
    assert set(data.indices_at(0).tolist()) == {0, 1, 2}
    assert data.batch_at(5).shape == (8, 4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_shares_of_a_step_make_up_its_batch(toy, parts):
    data = toy.data()
    whole = data.batch_at(7)
    shares = [data.batch_at(7, part, parts) for part in range(parts)]
    assert torch.equal(torch.stack(shares, dim=1).reshape(8, 4), whole)


def test_a_batch_does_not_depend_on_what_was_asked_before(toy):
    walked, jumped = toy.data(), toy.data()
    for step in range(10):
        walked.batch_at(step)
    assert torch.equal(walked.batch_at(10), jumped.batch_at(10))
    assert not torch.equal(toy.data(seed=1).batch_at(10), jumped.batch_at(10))


def test_the_epoch_reaches_the_data_set(toy):
    class Epochs(toy.Points):
        def batch(self, indices, *, epoch=0):
            return torch.full((len(indices),), epoch)

    data = toy.data(dataset=Epochs())
    assert [int(data.batch_at(step)[0]) for step in (0, 2, 3, 6)] == [0, 0, 1, 2]


def test_the_fingerprint_tells_orders_apart(toy):
    changes = [{}, {"seed": 1}, {"batch_size": 4}, {"incomplete": "wrap"}, {"dataset": toy.Points(29)}]
    fingerprints = [str(toy.data(**change).fingerprint()) for change in changes]
    assert len(set(fingerprints)) == len(changes)
    assert str(toy.data().fingerprint()) == fingerprints[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "at least one sample"),
        ({"batch_size": 31}, "fewer than one batch of 31; lower batch_size or write incomplete='wrap'"),
        ({"batch_size": 1, "incomplete": "wrap", "empty": True}, "has 0 samples"),
    ],
)
def test_wrong_settings(toy, changes, message):
    if changes.pop("empty", False):
        changes["dataset"] = toy.Points(0)
    with pytest.raises(ValueError, match=message):
        toy.data(**changes)


def test_an_unknown_rule_for_incomplete_batches(toy):
    data = toy.data()
    object.__setattr__(data, "incomplete", "pad")  # around the type checks of the test run, which a user does not have
    with pytest.raises(ValueError, match="write 'drop' or 'wrap'"):
        data.__post_init__()


def test_prefetched_batches_are_the_same_batches_fetched_earlier(toy):
    class Noting(toy.Points):
        def __init__(self):
            super().__init__()
            self.threads = set()

        def batch(self, indices, *, epoch=0):
            self.threads.add(threading.current_thread().name)
            return super().batch(indices)

    dataset = Noting()
    plain, prefetched = toy.data(), Prefetched(toy.data(dataset=dataset), ahead=2)
    for step in (0, 1, 2, 5, 6, 1):
        for part in range(2):
            assert torch.equal(prefetched.batch_at(step, part, 2), plain.batch_at(step, part, 2))
    assert all(name.startswith("prefetch") for name in dataset.threads)
    assert prefetched.fingerprint() == plain.fingerprint()
    assert (prefetched.batch_size, prefetched.steps_per_epoch) == (8, 3)
    with pytest.raises(ValueError, match="at least 1"):
        Prefetched(plain, ahead=0)


def test_an_error_while_prefetching_comes_up_where_its_batch_is_due(toy):
    class Broken(toy.Points):
        def batch(self, indices, *, epoch=0):
            if epoch == 1:
                raise OSError("no such picture")
            return super().batch(indices)

    data = Prefetched(toy.data(dataset=Broken()), ahead=2)
    for step in range(3):
        data.batch_at(step)
    with pytest.raises(OSError, match="no such picture"):
        data.batch_at(3)


def test_to_device_reaches_every_tensor():
    @dataclass(frozen=True)
    class Record:
        images: torch.Tensor
        labels: torch.Tensor | None
        name: str

    device = torch.device("meta")
    batch = {"a": [Record(torch.zeros(2), None, "x")], "b": (torch.zeros(1), 3)}
    moved = to_device(batch, device)
    assert moved["a"][0].images.device == device
    assert (moved["a"][0].labels, moved["a"][0].name) == (None, "x")
    assert moved["b"][0].device == device
    assert moved["b"][1] == 3
