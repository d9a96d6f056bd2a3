import pytest
import torch

from wellposed.training import TrainingConfig
from wellposed.training.players import check_players


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "two words"}, "'two words' is no identifier"),
        ({"every": 0}, "every is 0; write 1"),
        ({"start": -1}, "count from 0"),
        ({"ema_start": -1}, "count from 0"),
        ({"phases": (0,)}, r"phases are \(0,\); write steps from 1 on that rise"),
        ({"phases": (3, 3)}, r"phases are \(3, 3\); write"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0; write a number in \(0, 1\)"),
        ({"ema_decay": 0.0}, r"ema_decay is 0.0; write a number in \(0, 1\)"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; write a positive norm"),
        ({"clip_norm": float("nan")}, "write a positive norm"),
    ],
)
def test_wrong_settings_of_a_player(toy, changes, message):
    with pytest.raises(ValueError, match=message):
        toy.player(**changes)


def test_players_that_cannot_play_together(toy):
    with pytest.raises(ValueError, match="at least one player"):
        check_players([])
    with pytest.raises(ValueError, match="two players are called 'net'"):
        check_players([toy.player(), toy.player()])
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        check_players(toy.player(model=toy.network().requires_grad_(False)))
    shared = toy.network()
    with pytest.raises(ValueError, match="players 'net' and 'b' train the same parameter"):
        check_players([toy.player(model=shared), toy.player(name="b", model=torch.nn.Sequential(shared))])


def test_players_may_share_what_is_frozen(toy):
    backbone = toy.network().requires_grad_(False)
    heads = [torch.nn.Sequential(backbone, toy.network(seed=seed)) for seed in (1, 2)]
    players = [toy.player(name=name, model=head) for name, head in zip("ab", heads, strict=True)]
    assert check_players(players) == tuple(players)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: 0}, f"{name} is 0; write a number of at least 1")
            for name in ("max_steps", "gradient_accumulation", "checkpoint_every", "keep_last", "log_every")
        ],
        ({"precision": "fp16"}, "precision is 'fp16'; write one of 'fp32', 'bf16'"),
        ({"sharding": "zero"}, "sharding is 'zero'; write one of 'ddp', 'fsdp2'"),
    ],
)
def test_wrong_settings_of_a_run(changes, message):
    config = TrainingConfig(max_steps=1)
    for name, value in changes.items():
        object.__setattr__(config, name, value)  # around the type checks of the test run, which a user does not have
    with pytest.raises(ValueError, match=message):
        config.__post_init__()
