from functools import partial

import pytest
import torch

from wellposed.training import describe, train


def test_sizes_are_those_of_the_run(toy, tmp_path):
    frozen = toy.network(seed=1).requires_grad_(False)
    player = toy.player(model=torch.nn.Sequential(frozen, toy.network()), ema_decay=0.9)
    description = describe(player, toy.data(), toy.config(gradient_accumulation=2))
    of_player = description.players[0]
    train(player, toy.data(), toy.config(), tmp_path)
    weights = 4 * 8 + 8 + 8 * 4 + 4
    assert (of_player.parameters, of_player.trainable) == (2 * weights, weights)
    assert of_player.weight_bytes == 2 * weights * 8
    assert of_player.gradient_bytes == of_player.average_bytes == weights * 8
    # Adam: two moments of each weight, and a float32 count for each of the four tensors.
    assert of_player.optimizer_bytes == 2 * weights * 8 + 4 * 4
    assert description.share == 4
    assert description.steps_per_epoch == 3
    assert description.bytes_per_rank == of_player.total_bytes


def test_describing_changes_nothing(toy):
    player = toy.player()
    before = toy.weights(player.model)
    describe(player, toy.data(), toy.config())
    assert all(p.grad is None for p in player.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, toy.weights(player.model), strict=True))


def test_sharding_divides_the_memory(toy):
    whole = describe(toy.player(), toy.data(), toy.config(), world_size=4)
    shared = describe(toy.player(), toy.data(), toy.config(sharding="fsdp2"), world_size=4)
    assert shared.bytes_per_rank == whole.bytes_per_rank // 4
    assert shared.share == 2


def test_the_text_names_what_matters(toy):
    class Reads(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    float(p.grad.sum())

    players = [
        toy.player(),
        toy.player(name="critic", model=toy.network(seed=1), optimizer=partial(Reads, lr=1.0)),
    ]
    text = str(describe(players, toy.data(), toy.config(max_steps=30)))
    for part in ("net", "critic", "Sequential", "76", "steps: 30 of 8 samples, 10 epochs; 8 at a time", "memory"):
        assert part in text
    assert "not counted: the optimizer of critic" in text


def test_what_cannot_run_is_refused(toy):
    with pytest.raises(ValueError, match="make batch_size a multiple of 3"):
        describe(toy.player(), toy.data(), toy.config(), world_size=3)
    with pytest.raises(ValueError, match="two players are called"):
        describe([toy.player(), toy.player()], toy.data(), toy.config())
