"""One process: exact resumes, interrupts, and what a step does."""

import json
import os
import signal
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from wellposed.training import Callback, NonFiniteError, TrainingInterrupted, train
from wellposed.training.loop import METRICS_FILE

# What depends on how fast a machine is.
CLOCKED = {"samples_per_second", "seconds", "mfu"}

ADAM = partial(torch.optim.AdamW, lr=1e-2)


def decaying(optimizer):
    return LambdaLR(optimizer, lambda update: 0.9**update)


class At(Callback):
    """Calls ``action(run)`` after step ``step``."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, run):
        if run.step == self.step:
            self.action(run)


def rich_players(toy):
    """Everything that has a state: two players, one late and rare, dropout, averages, schedules, momentum."""

    def through_the_other(models, batch, context):
        out = models["first"](batch)
        return (models["second"](out) - batch).square().mean(), {"half": 0.5}

    first = toy.player(
        name="first",
        model=toy.network(dropout=0.3),
        optimizer=partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
        lr_scheduler=decaying,
        ema_decay=0.8,
        ema_start=2,
        clip_norm=0.3,
    )
    # Adam counts its updates: a checkpoint before the first one must not count as one.
    second = toy.player(name="second", model=toy.network(seed=1), objective=through_the_other, every=3, start=4)
    return [first, second]


def lines_of(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def final_state(toy, players, result, folder):
    weights = toy.weights([player.model for player in players])
    averages = [weight.clone() for average in result.averages.values() for weight in average.weights.values()]
    lines = [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines_of(folder)]
    return weights + averages, lines


# An epoch has 3 steps: 2, 4, 5 and 7 are inside one; the second player first plays in step 6.
@pytest.mark.parametrize("stops", [(2,), (3, 4), (5, 7), (6,)])
def test_stopping_and_going_on_changes_nothing(toy, tmp_path, stops):
    settings = {"gradient_accumulation": 2, "checkpoint_every": 4}

    def run(folder, steps):
        players = rich_players(toy)
        result = train(players, toy.data(), toy.config(max_steps=steps, **settings), folder)
        return final_state(toy, players, result, folder)

    straight_tensors, straight_lines = run(tmp_path / "straight", 11)
    for stop in stops:
        run(tmp_path / "stopped", stop)
    tensors, lines = run(tmp_path / "stopped", 11)
    assert lines == straight_lines
    for a, b in zip(tensors, straight_tensors, strict=True):
        assert torch.equal(a, b)


def test_a_crash_repeats_the_steps_since_the_checkpoint(toy, tmp_path):
    def crash(run):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(toy.player(), toy.data(), toy.config(checkpoint_every=2), tmp_path, callbacks=[At(3, crash)])
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    assert not dist.is_initialized()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    seen = []
    train(toy.player(), toy.data(), toy.config(), tmp_path, callbacks=[At(3, lambda run: seen.append(run.step))])
    assert seen == [3]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_finished_run_is_not_run_again(toy, tmp_path):
    player = toy.player()
    first = train(player, toy.data(), toy.config(), tmp_path)
    again = toy.player()
    second = train(again, toy.data(), toy.config(), tmp_path, callbacks=[At(5, lambda run: pytest.fail("ran"))])
    assert (second.step, second.checkpoint, second.metrics) == (first.step, first.checkpoint, first.metrics)
    for a, b in zip(toy.weights(player.model), toy.weights(again.model), strict=True):
        assert torch.equal(a, b)


def test_shares_add_up_to_the_whole_batch(toy, tmp_path):
    results = []
    for shares in (1, 2, 8):
        player = toy.player()
        result = train(player, toy.data(), toy.config(gradient_accumulation=shares), tmp_path / str(shares))
        results.append((toy.weights(player.model), result.metrics))
    for weights, metrics in results[1:]:
        assert metrics == pytest.approx(results[0][1], rel=1e-10)
        for a, b in zip(weights, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(toy, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="stopped at step 3") as stopped:
        train(
            toy.player(),
            toy.data(),
            toy.config(),
            tmp_path,
            callbacks=[At(3, lambda run: signal.raise_signal(number))],
        )
    assert stopped.value.step == 3
    assert stopped.value.checkpoint == tmp_path / "checkpoints" / "step_00000003"
    assert signal.getsignal(number) is before
    straight, resumed = toy.player(), toy.player()
    train(resumed, toy.data(), toy.config(), tmp_path)
    train(straight, toy.data(), toy.config(), tmp_path / "straight")
    for a, b in zip(toy.weights(straight.model), toy.weights(resumed.model), strict=True):
        assert torch.equal(a, b)


def test_a_signal_during_the_last_step_is_no_interruption(toy, tmp_path):
    callbacks = [At(5, lambda run: signal.raise_signal(signal.SIGINT))]
    assert train(toy.player(), toy.data(), toy.config(), tmp_path, callbacks=callbacks).step == 5


def forked(work):
    """``work`` in a child process; returns its id."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads did not come along, and it would wait for them
        try:
            work()
            os._exit(0)
        except TrainingInterrupted:
            os._exit(75)
        except BaseException:
            os._exit(1)
    return child


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_from_outside_lets_the_step_finish(toy, tmp_path):
    def slow(run):
        (tmp_path / "in_step").touch()
        time.sleep(0.5)

    def work():
        train(toy.player(), toy.data(), toy.config(), tmp_path / "run", callbacks=[At(2, slow)])

    child = forked(work)
    wait_for(tmp_path / "in_step")
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_second_signal_stops_on_the_spot_and_an_echo_does_not(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("wellposed.training.interrupts.ECHO_SECONDS", 0.2)

    def stuck(run):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "echo_survived").touch()
        time.sleep(30)

    child = forked(lambda: train(toy.player(), toy.data(), toy.config(), tmp_path / "run", callbacks=[At(2, stuck)]))
    wait_for(tmp_path / "echo_survived")
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize("where", ["both", "loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(toy, tmp_path, where):
    def objective(models, batch, context):
        loss, metrics = toy.denoise(models, batch, context)
        if context.step == 3:
            match where:
                case "both":
                    loss = loss * float("nan")
                case "loss":
                    loss = loss + float("inf")
                case "gradient":  # the slope of the square root at 0
                    loss = loss + (models[context.player][0].weight * 0).abs().sqrt().sum()
        return loss, metrics

    bad, good = toy.player(objective=objective, ema_decay=0.9), toy.player(ema_decay=0.9)
    with pytest.raises(NonFiniteError, match=r"step 3, player 'net'.*not applied"):
        train(bad, toy.data(), toy.config(checkpoint_every=2), tmp_path / "bad")
    train(good, toy.data(), toy.config(max_steps=3), tmp_path / "good")
    for a, b in zip(toy.weights(bad.model), toy.weights(good.model), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in (tmp_path / "bad" / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_loss_through_another_player_leaves_its_weights_alone(toy, tmp_path):
    def through_the_critic(models, batch, context):
        critic_weight = models["critic"][0].weight
        assert not critic_weight.requires_grad
        return models["critic"](models["net"](batch)).square().mean(), {}

    critic = toy.player(name="critic", model=toy.network(seed=1), start=100)
    before = toy.weights(critic.model)
    net = toy.player(objective=through_the_critic)
    net_before = toy.weights(net.model)
    train([net, critic], toy.data(), toy.config(max_steps=2), tmp_path)
    for parameter, old in zip(critic.model.parameters(), before, strict=True):
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, old)
    assert not torch.equal(toy.weights(net.model)[0], net_before[0])


def test_players_play_when_they_should(toy, tmp_path):
    played = []

    def noted(models, batch, context):
        played.append((context.player, context.step))
        return toy.denoise(models, batch, context)

    players = [
        toy.player(name="a", objective=noted),
        toy.player(name="b", model=toy.network(seed=1), objective=noted, every=2, start=3),
    ]
    train(players, toy.data(), toy.config(max_steps=7), tmp_path)
    assert [step for name, step in played if name == "a"] == list(range(7))
    assert [step for name, step in played if name == "b"] == [4, 6]


def test_frozen_parts_rest(toy, tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = toy.network(dropout=0.5).requires_grad_(False)
            self.head = toy.network(seed=1, dropout=0.5)

        def forward(self, x):
            assert self.head[1].training
            assert not self.frozen[1].training
            return self.head(self.frozen(x))

    model = Head().eval()
    before = toy.weights(model.frozen)
    train(toy.player(model=model, ema_decay=0.9), toy.data(), toy.config(), tmp_path)
    for a, b in zip(before, toy.weights(model.frozen), strict=True):
        assert torch.equal(a, b)


def test_clip_norm_bounds_the_whole_gradient(toy, tmp_path):
    player = toy.player(optimizer=partial(torch.optim.SGD, lr=1.0), clip_norm=1e-3)
    before = toy.weights(player.model)
    result = train(player, toy.data(), toy.config(max_steps=1), tmp_path)
    moved = sum((a - b).square().sum() for a, b in zip(toy.weights(player.model), before, strict=True)) ** 0.5
    assert moved.item() == pytest.approx(1e-3, rel=1e-4)
    assert result.metrics["net/grad_norm"] > 0.1  # the logged norm is the one before clipping


def test_the_average_follows_its_formula(toy, tmp_path):
    player = toy.player(ema_decay=0.3, ema_start=2)
    history = []
    keep = Callback()
    keep.on_step_end = lambda run: history.append(toy.weights(player.model)[0])
    result = train(player, toy.data(), toy.config(), tmp_path, callbacks=[keep])
    expected = history[1]
    for lagging, weight in enumerate(history[2:]):
        decay = min(0.3, (1 + lagging) / (10 + lagging))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(result.averages["net"].weights["0.weight"], expected, rtol=1e-12, atol=0)


def test_evaluating_uses_the_average_and_puts_everything_back(toy, tmp_path):
    player = toy.player(model=toy.network(dropout=0.5), ema_decay=0.9)
    seen = []

    def look(run):
        own = toy.weights(player.model)
        with run.evaluating("net") as model:
            seen.append(torch.equal(model[0].weight, run.averages["net"].weights["0.weight"]))
            seen.append(not model[1].training)
            seen.append(not torch.equal(model[0].weight, own[0]))
        with run.evaluating("net", averaged=False) as model:
            seen.append(torch.equal(model[0].weight, own[0]))
        seen.append(player.model[1].training)
        seen.append(all(torch.equal(a, b) for a, b in zip(own, toy.weights(player.model), strict=True)))

    train(player, toy.data(), toy.config(), tmp_path, callbacks=[At(4, look)])
    assert seen == [True] * 6


def test_bf16_computes_in_bfloat16_over_float32_weights(toy, tmp_path):
    dtypes = set()

    def objective(models, batch, context):
        out = models[context.player](batch.float())
        dtypes.add(out.dtype)
        return (out.float() - batch.float()).square().mean(), {}

    player = toy.player(model=toy.network().float(), objective=objective)
    train(player, toy.data(), toy.config(precision="bf16"), tmp_path)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in player.model.parameters()} == {torch.float32}


def test_the_global_random_state_is_neither_used_nor_changed(toy, tmp_path):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        player = toy.player(model=toy.network(dropout=0.5))
        train(player, toy.data(), toy.config(), tmp_path / str(seed))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(toy.weights(player.model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_metrics_and_callbacks(toy, tmp_path):
    calls = []

    class Record(Callback):
        def on_log(self, run, record):
            calls.append(("log", record["step"]))

        def on_checkpoint(self, run, path):
            assert path.is_dir()
            calls.append(("checkpoint", path.name))

        def on_end(self, run):
            calls.append(("end", run.step))

    player = toy.player(lr_scheduler=decaying)
    config = toy.config(log_every=2, checkpoint_every=3)
    train(player, toy.data(), config, tmp_path, callbacks=[Record()])
    assert calls == [
        ("log", 2),
        ("checkpoint", "step_00000003"),
        ("log", 4),
        ("checkpoint", "step_00000005"),
        ("end", 5),
    ]
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["net/lr"] == pytest.approx(1e-2 * 0.9**3)
    assert set(lines[0]) == {
        "step",
        *CLOCKED,
        "samples",
        *(f"net/{m}" for m in ("loss", "grad_norm", "lr", "largest")),
    }


def test_the_group_and_signals_are_put_back_after_a_failure(toy, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def fail(models, batch, context):
        raise KeyError("objective")

    with pytest.raises(KeyError):
        train(toy.player(objective=fail), toy.data(), toy.config(), tmp_path)
    assert not dist.is_initialized()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"seed": 1}}, "another run: seed 0, now 1"),
        ({"data": {"seed": 1}}, "another run: data"),
        ({"data": {"batch_size": 4}}, "another run: data"),
        ({"player": {"name": "other"}}, r"another run: players \['net'\], now \['other'\]"),
        ({"player": {"ema_decay": 0.9}}, "does not fit these players"),
        ({"config": {"max_steps": 2}}, "is past max_steps = 2; raise max_steps"),
        ({"resume": "never"}, "already holds step_00000003; choose another folder"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(toy, tmp_path, changes, message):
    train(toy.player(), toy.data(), toy.config(max_steps=3), tmp_path)
    with pytest.raises(ValueError, match=message):
        train(
            toy.player(**changes.get("player", {})),
            toy.data(**changes.get("data", {})),
            toy.config(**changes.get("config", {})),
            tmp_path,
            resume=changes.get("resume", "auto"),
        )


def test_weights_of_another_shape_are_refused(toy, tmp_path):
    train(toy.player(), toy.data(), toy.config(max_steps=3), tmp_path)
    wider = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0), nn.SiLU(), nn.Linear(9, 4)).double()
    with pytest.raises(ValueError, match="does not fit these players"):
        train(toy.player(model=wider), toy.data(), toy.config(), tmp_path)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="make batch_size a multiple of 3"):
        train(toy.player(), toy.data(), toy.config(gradient_accumulation=3), tmp_path)


def test_a_loss_that_is_no_mean_is_refused(toy, tmp_path):
    def per_sample(models, batch, context):
        return models[context.player](batch).square().mean(1), {}

    with pytest.raises(ValueError, match=r"shape \(8,\); return its mean"):
        train(toy.player(objective=per_sample), toy.data(), toy.config(), tmp_path)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
def test_compiled_models_train_alike(toy, tmp_path):
    results = []
    for compiled in (False, True):
        player = toy.player()
        train(player, toy.data(), toy.config(compile=compiled), tmp_path / str(compiled))
        results.append(toy.weights(player.model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_on_cuda(toy, tmp_path, sharding):
    def run(folder, *stops):
        for steps in stops:
            players = rich_players(toy)
            config = toy.config(device="cuda", max_steps=steps, sharding=sharding, gradient_accumulation=2)
            result = train(players, toy.data(), config, folder)
        assert players[0].model[0].weight.device.type == "cuda"
        return {name: value for name, value in result.metrics.items() if name not in CLOCKED}

    assert run(tmp_path / "stopped", 3, 9) == run(tmp_path / "straight", 9)


def test_each_share_is_fetched_when_it_is_its_turn(toy, tmp_path):
    """One player holds one batch at a time; two see the same ones, which are asked for once."""
    calls = []

    class Told(type(toy.data())):
        def batch_at(self, step, part=0, parts=1):
            calls.append(f"fetch {step}.{part}")
            return super().batch_at(step, part, parts)

    def objective(models, batch, context):
        calls.append(f"{context.player} {context.step}")
        return toy.denoise(models, batch, context)

    data = Told(dataset=toy.Points(), batch_size=8)
    config = toy.config(gradient_accumulation=2, max_steps=1)
    train(toy.player(objective=objective), data, config, tmp_path / "one")
    assert calls == ["fetch 0.0", "net 0", "fetch 0.1", "net 0"]
    calls.clear()
    players = [toy.player(name=name, model=toy.network(), objective=objective) for name in ("a", "b")]
    train(players, data, config, tmp_path / "two")
    assert calls == ["fetch 0.0", "fetch 0.1", "a 0", "a 0", "b 0", "b 0"]


def test_losses_of_groups_are_means_over_the_steps_since_the_last_line(toy, tmp_path):
    def objective(models, batch, context):
        loss, _ = toy.denoise(models, batch, context)
        late = float(context.step >= 2)
        # A quarter of the samples; none in the first steps.
        return loss, {"sum_late": late * context.step / 4, "rows_late": late / 4, "size": 1.0}

    train(toy.player(objective=objective), toy.data(), toy.config(max_steps=6, log_every=2), tmp_path)
    lines = lines_of(tmp_path)
    assert [line.get("net/loss_late") for line in lines] == [None, 2.5, 4.5]
    assert not any("sum_" in name or "rows_" in name for line in lines for name in line)
    assert all(line["net/size"] == 1.0 for line in lines)
