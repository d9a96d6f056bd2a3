"""Several ranks compute what one computes."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from wellposed.training import NonFiniteError, TrainingInterrupted, train
from wellposed.training.distributed import Workers, average_gradients, worker_group


def two_players(toy, seed=0):
    """A generator whose loss goes through its critic, and the critic, which plays in every second step."""

    def generator_loss(models, batch, context):
        fake = models["generator"](context.normal((4,)).double())
        return (fake - batch).square().mean() - 0.1 * models["critic"](fake).mean(), {}

    def critic_loss(models, batch, context):
        with torch.no_grad():
            fake = models["generator"](context.normal((4,)).double())
        critic = models["critic"]
        return critic(fake).square().mean() + (critic(batch) - 1).square().mean(), {}

    common = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "clip_norm": 0.5}
    return [
        toy.player(name="generator", model=toy.network(seed=seed), objective=generator_loss, ema_decay=0.9, **common),
        toy.player(name="critic", model=toy.network(seed=seed + 1), objective=critic_loss, every=2, **common),
    ]


def trained(toy, out, players, **changes):
    """Final weights and averages as whole tensors."""
    result = train(players, toy.data(), toy.config(**changes), out)
    tensors = [p.detach() for player in players for p in player.model.parameters()]
    tensors += [w for average in result.averages.values() for w in average.weights.values()]
    return [t.full_tensor() if isinstance(t, DTensor) else t.clone() for t in tensors]


def assert_close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_and_one_can_go_on_from_two(toy, on_ranks, tmp_path, sharding):
    whole = trained(toy, tmp_path / "one", two_players(toy), max_steps=5)

    def work(out, steps):
        # Each rank starts elsewhere: the main rank's weights count.
        players = two_players(toy, seed=10 * dist.get_rank())
        return trained(toy, tmp_path / out, players, max_steps=steps, sharding=sharding, gradient_accumulation=2)

    for of_rank in on_ranks(2, work, "two", 5):
        assert_close(of_rank, whole)
    on_ranks(2, work, "fewer", 3)
    assert_close(trained(toy, tmp_path / "fewer", two_players(toy), max_steps=5), whole)


def test_fsdp2_resumes_exactly_and_reshards(toy, on_ranks, tmp_path):
    def work(out, steps):
        config = {"max_steps": steps, "checkpoint_every": 3, "keep_last": 9, "sharding": "fsdp2"}
        return trained(toy, tmp_path / out, two_players(toy), **config)

    straight = on_ranks(2, work, "straight", 7)[0]
    for copy in ("resumed", "resharded"):
        shutil.copytree(tmp_path / "straight/checkpoints/step_00000003", tmp_path / copy / "checkpoints/step_00000003")
    assert_same(on_ranks(2, work, "resumed", 7)[0], straight)
    on_ranks(1, work, "resharded", 5)
    assert_close(on_ranks(2, work, "resharded", 7)[0], straight)


def test_a_loss_may_call_other_methods_than_forward(toy, on_ranks, tmp_path):
    """DistributedDataParallel would leave these gradients unaveraged without a word."""

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = toy.network()

        def encode(self, x):
            return self.parts[2](self.parts[0](x))

        def decode(self, code):
            return self.parts[3](code)

    def loss(models, batch, context):
        model = models[context.player]
        return (model.decode(model.encode(batch)) - batch).square().mean(), {}

    def work(out, sharding):
        return trained(toy, out, [toy.player(model=Autoencoder(), objective=loss)], sharding=sharding)

    whole = work(tmp_path / "one", "ddp")
    for sharding in ("ddp", "fsdp2"):
        assert_close(on_ranks(2, work, tmp_path / sharding, sharding)[0], whole)


def test_parameters_used_on_some_ranks_only_are_averaged_and_unused_ones_stay_out(on_ranks):
    def work():
        rank = dist.get_rank()
        here, there, nowhere = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        here.grad = torch.full((2,), 1.0 + rank)
        if rank == 1:
            there.grad = torch.full((2,), 4.0)
        parameters = [here, there, nowhere]
        average_gradients(parameters, Workers(rank=rank, world_size=2, device=torch.device("cpu")))
        return [p.grad for p in parameters]

    for here, there, nowhere in on_ranks(2, work):
        assert here.tolist() == [1.5, 1.5]
        assert there.tolist() == [2.0, 2.0]
        assert nowhere is None


def test_buckets_of_gradients_are_averaged_alike(on_ranks, monkeypatch):
    monkeypatch.setattr("wellposed.training.distributed.BUCKET_ELEMENTS", 5)
    shapes = [(2, 2), (3,), (7,), (1,)]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.float64]

    def work():
        parameters = [nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, number + 10.0 * dist.get_rank())
        average_gradients(parameters, Workers(rank=dist.get_rank(), world_size=2, device=torch.device("cpu")))
        return [p.grad for p in parameters]

    for gradients in on_ranks(2, work):
        for number, gradient in enumerate(gradients):
            assert gradient.shape == shapes[number]
            assert (gradient == number + 5).all()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_all_ranks_refuse_what_is_not_finite_on_one(toy, on_ranks, tmp_path, sharding):
    def loss(models, batch, context):
        value, metrics = toy.denoise(models, batch, context)
        return value * float("nan") if context.step == 2 and dist.get_rank() == 1 else value, metrics

    def work():
        with pytest.raises(NonFiniteError, match="step 2, player 'net'"):
            train(toy.player(objective=loss), toy.data(), toy.config(sharding=sharding), tmp_path)
        return True

    assert on_ranks(2, work) == [True, True]


def test_a_signal_on_one_rank_stops_all_at_the_same_step(toy, on_ranks, tmp_path):
    def work():
        import signal

        from wellposed.training import Callback

        class Signal(Callback):
            def on_step_end(self, run):
                if run.step == 3 and not run.workers.is_main:
                    signal.raise_signal(signal.SIGTERM)

        with pytest.raises(TrainingInterrupted) as stopped:
            train(toy.player(), toy.data(), toy.config(), tmp_path, callbacks=[Signal()])
        return stopped.value.step, stopped.value.checkpoint.name

    assert on_ranks(2, work) == [(3, "step_00000003")] * 2


def test_ranks_wait_for_what_one_does_at_a_checkpoint(toy, on_ranks, tmp_path):
    """The next step begins when the main rank has drawn its samples."""

    def work():
        import time

        from wellposed.training import Callback

        times = {}

        class Draw(Callback):
            def on_checkpoint(self, run, path):
                if run.workers.is_main:
                    time.sleep(0.3)
                    times.setdefault("drawn", time.monotonic())  # after the first step

        class Told(type(toy.data())):
            def batch_at(self, step, part=0, parts=1):
                times[step] = time.monotonic()
                return super().batch_at(step, part, parts)

        data = Told(dataset=toy.Points(), batch_size=8)
        train(toy.player(), data, toy.config(max_steps=2, checkpoint_every=1), tmp_path, callbacks=[Draw()])
        return times

    main, other = on_ranks(2, work)
    assert other[1] >= main["drawn"]  # one clock for all processes of a machine


def test_evaluating_a_sharded_model_leaves_it_as_it_was(toy, on_ranks, tmp_path):
    """FSDP2 could go on computing with a gathered copy of the averaged weights."""

    def work(out, evaluate):
        from wellposed.training import Callback

        class Evaluate(Callback):
            def on_step_end(self, run):
                with run.evaluating("net") as model:
                    model(torch.zeros(1, 4, dtype=torch.float64))

        players = [toy.player(ema_decay=0.9)]
        config = toy.config(sharding="fsdp2")
        train(players, toy.data(), config, out, callbacks=[Evaluate()] if evaluate else [])
        return [p.detach().full_tensor() for p in players[0].model.parameters()]

    assert_same(on_ranks(2, work, tmp_path / "a", True)[0], on_ranks(2, work, tmp_path / "b", False)[0])


def test_running_statistics_are_the_same_on_all_ranks(toy, on_ranks, tmp_path):
    def work():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
        train(toy.player(model=model), toy.data(), toy.config(), tmp_path)
        return model[1].running_mean

    first, second = on_ranks(2, work)
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def test_a_group_that_is_open_is_used_and_left_open(on_ranks):
    def work():
        with worker_group("cpu") as workers:
            assert workers.world_size == 2
        return dist.is_initialized()

    assert on_ranks(2, work) == [True, True]


def test_a_group_without_cpu_tensors_is_refused(monkeypatch):
    with worker_group("cpu"):
        monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
        with pytest.raises(ValueError, match="carries no CPU tensors; open it with"), worker_group("cpu"):
            pass


def test_the_own_group_is_closed_after_an_exception():
    def work():
        with worker_group("cpu") as workers:
            assert (workers.rank, workers.world_size) == (0, 1)
            raise KeyError("work")

    with pytest.raises(KeyError):
        work()
    assert not dist.is_initialized()


def test_an_error_on_the_main_rank_reaches_all(on_ranks):
    def work():
        def fail():
            raise PermissionError(13, "not allowed")

        with worker_group("cpu") as workers, pytest.raises(PermissionError, match="not allowed"):
            workers.main_does(fail)
        with worker_group("cpu") as workers:
            return workers.main_does(lambda: "from the main rank")

    assert on_ranks(2, work) == ["from the main rank"] * 2


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, conftest as toy\n"
        "from wellposed.training import train\n"
        "player = toy.player(ema_decay=0.9)\n"
        "result = train(player, toy.data(), toy.config(max_steps=int(sys.argv[1])), sys.argv[2])\n"
        "torch.save([p.detach() for p in player.model.parameters()], sys.argv[2] + '/weights.pt')\n"
    )

    def run(launcher, steps, out):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        command = [*launcher, str(script), str(steps), str(tmp_path / out)]
        subprocess.run(command, check=True, env=environment, timeout=120)
        return torch.load(tmp_path / out / "weights.pt", weights_only=True)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    straight = run([sys.executable], 6, "one")
    run(torchrun, 3, "two")
    assert_close(run(torchrun, 6, "two"), straight)
