"""The account of a run: exact over resumes and crashes, with what the data count, on one process and on two."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wellposed.training import Callback, PlannedBatches, Prefetched, train
from wellposed.training.loop import METRICS_FILE
from wellposed.training.usage import USAGE_FILE, Usage, UsageMeter, read_usage, usage_before

# The network of the toy: 4 -> 8 -> 4, on eight rows, whose input needs no gradient.
STEP_FLOPS = 2 * 8 * (2 * 4 * 8 + 3 * 8 * 4)

USAGE = Usage(
    device="A100",
    kind="cuda",
    devices=4,
    peak_flop_per_second=100.0,
    peak_source="nominal",
    seconds=10.0,
    device_seconds=40.0,
    peak_flop=4000.0,
    steps=5,
    samples=20,
    model_flops=1000.0,
    counters={"caption_words": 300.0},
)


class Counting(PlannedBatches):
    """Data that say what their steps amount to: more in later ones."""

    @property
    def captioning_cost(self):
        return {"usd": 12.5}

    def counts_at(self, step, part, parts):
        share = (part + 1) / (parts * (parts + 1) / 2)  # later parts have more
        return {"flops": 1000 * (step + 1) * share, "caption_words": (10 + step) * share}


def crash_at(step):
    class Crash(Callback):
        def on_step_end(self, run):
            if run.step == step:
                raise RuntimeError("power cut")

    return Crash()


def usage_of(folder):
    return read_usage(folder / USAGE_FILE)


def lines_of(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_a_run_keeps_its_account(toy, tmp_path):
    train(toy.player(), toy.data(), toy.config(), tmp_path)
    usage = usage_of(tmp_path)
    assert (usage.kind, usage.devices, usage.peak_source) == ("cpu", 1, "measured")
    assert (usage.steps, usage.repeated_steps, usage.samples) == (5, 0, 40)
    assert usage.model_flops == 5 * STEP_FLOPS
    assert usage.counters == {}
    assert usage.captioning == {}
    assert usage.device_seconds == usage.seconds > 0
    assert usage.peak_flop == pytest.approx(usage.seconds * usage.peak_flop_per_second, rel=1e-12)
    assert usage.mfu == usage.model_flops / usage.peak_flop
    assert not list(tmp_path.glob("*.partial"))
    seconds = [line["seconds"] for line in lines_of(tmp_path)]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= usage.seconds
    assert all(line["mfu"] > 0 for line in lines_of(tmp_path))


@pytest.mark.parametrize("shares", [1, 2, 8])
def test_shares_do_not_change_the_count(toy, tmp_path, shares):
    train(toy.player(), toy.data(), toy.config(gradient_accumulation=shares, max_steps=2), tmp_path)
    assert usage_of(tmp_path).model_flops == 2 * STEP_FLOPS


def test_players_that_rest_cost_nothing(toy, tmp_path):
    players = [toy.player(name="a"), toy.player(name="b", model=toy.network(seed=1), every=2, start=3)]
    train(players, toy.data(), toy.config(max_steps=7), tmp_path)
    assert usage_of(tmp_path).model_flops == (7 + 2) * STEP_FLOPS


@pytest.mark.parametrize("stop", [None, 2, 3, 4])
def test_terms_that_come_later_are_counted_from_then_on(toy, tmp_path, stop):
    """The same, whether the run goes on before, in or after the step in which they come."""

    def objective(models, batch, context):
        loss, metrics = toy.denoise(models, batch, context)
        for begins in (3, 5):
            if context.step >= begins:
                loss = loss + toy.denoise(models, batch, context)[0]
        return loss, metrics

    def players():
        growing = toy.player(name="a", objective=objective, phases=(3, 5))
        return [growing, toy.player(name="b", model=toy.network(seed=1), every=2)]

    for steps in (7,) if stop is None else (stop, 7):
        train(players(), toy.data(), toy.config(max_steps=steps), tmp_path)
    assert usage_of(tmp_path).model_flops == (3 * 1 + 2 * 2 + 2 * 3 + 4) * STEP_FLOPS


def test_model_flops_leave_out_what_checkpointing_repeats(toy, tmp_path):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = toy.network()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    train(toy.player(model=Saving()), toy.data(), toy.config(max_steps=2), tmp_path)
    assert usage_of(tmp_path).model_flops == 2 * STEP_FLOPS


def test_what_the_data_count_is_summed(toy, tmp_path):
    data = Counting(dataset=toy.Points(), batch_size=8)
    train(toy.player(), Prefetched(data), toy.config(max_steps=4), tmp_path)
    usage = usage_of(tmp_path)
    assert usage.model_flops == 1000 + 2000 + 3000 + 4000
    assert usage.counters == {"caption_words": 10 + 11 + 12 + 13}
    assert usage.captioning == {"usd": 12.5}


def test_each_rank_counts_what_it_computed(toy, on_ranks, tmp_path):
    def work():
        asked = []

        class Told(Counting):
            def counts_at(self, step, part, parts):
                asked.append((step, part, parts))
                return super().counts_at(step, part, parts)

        data = Told(dataset=toy.Points(), batch_size=8)
        train(toy.player(), Prefetched(data), toy.config(max_steps=2, gradient_accumulation=2), tmp_path)
        return asked

    assert on_ranks(2, work) == [[(0, rank, 2), (1, rank, 2)] for rank in range(2)]
    assert usage_of(tmp_path).counters["caption_words"] == pytest.approx(10 + 11)


def test_going_on_adds_up(toy, tmp_path):
    data = Counting(dataset=toy.Points(), batch_size=8)
    seconds = []
    for steps in (2, 3, 7):
        train(toy.player(), data, toy.config(max_steps=steps), tmp_path / "stopped")
        seconds.append(usage_of(tmp_path / "stopped").seconds)
    train(toy.player(), data, toy.config(max_steps=7), tmp_path / "straight")
    stopped, straight = usage_of(tmp_path / "stopped"), usage_of(tmp_path / "straight")
    assert seconds == sorted(seconds)
    assert (stopped.steps, stopped.samples, stopped.repeated_steps) == (7, 56, 0)
    assert (stopped.model_flops, stopped.counters) == (straight.model_flops, straight.counters)
    train(toy.player(), data, toy.config(max_steps=7), tmp_path / "stopped")
    assert usage_of(tmp_path / "stopped") == stopped  # nothing was done


def test_steps_done_again_take_time_and_count_once(toy, tmp_path):
    config = toy.config(max_steps=6, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        train(toy.player(), toy.data(), config, tmp_path, callbacks=[crash_at(5)])
    crashed = usage_of(tmp_path)
    assert (crashed.steps, crashed.samples) == (5, 40)
    train(toy.player(), toy.data(), config, tmp_path)
    usage = usage_of(tmp_path)
    assert (usage.steps, usage.repeated_steps, usage.samples) == (6, 1, 48)
    assert usage.model_flops == 6 * STEP_FLOPS
    assert usage.seconds > crashed.seconds
    assert lines_of(tmp_path)[-1]["seconds"] > crashed.seconds


def test_a_crash_before_the_first_checkpoint_took_time_too(toy, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        train(toy.player(), toy.data(), toy.config(), tmp_path, callbacks=[crash_at(3)])
    crashed = usage_of(tmp_path)
    train(toy.player(), toy.data(), toy.config(), tmp_path)
    usage = usage_of(tmp_path)
    assert (usage.steps, usage.repeated_steps, usage.samples) == (5, 3, 40)
    assert usage.seconds > crashed.seconds


def test_a_fresh_start_begins_a_new_account(toy, tmp_path):
    (tmp_path / USAGE_FILE).write_text(json.dumps({"device": "x"}))
    train(toy.player(), toy.data(), toy.config(), tmp_path, resume="never")
    assert usage_of(tmp_path).repeated_steps == 0


def test_a_lost_or_damaged_account_is_taken_from_the_checkpoint(toy, tmp_path, caplog):
    for damage in (lambda file: file.unlink(), lambda file: file.write_text("{")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train(toy.player(), toy.data(), toy.config(max_steps=3), folder)
        damage(folder / USAGE_FILE)
        train(toy.player(), toy.data(), toy.config(), folder)
        assert (usage_of(folder).steps, usage_of(folder).model_flops) == (5, 5 * STEP_FLOPS)
    assert "is not the account of a run" in caplog.text


def test_two_ranks_are_two_devices(toy, on_ranks, tmp_path):
    for sharding in ("ddp", "fsdp2"):
        folder = tmp_path / sharding

        def work(folder=folder, sharding=sharding):
            data = Counting(dataset=toy.Points(), batch_size=8) if sharding == "ddp" else toy.data()
            train(toy.player(), data, toy.config(max_steps=2, sharding=sharding), folder)

        on_ranks(2, work)
        usage = usage_of(folder)
        assert (usage.devices, usage.samples) == (2, 16)
        assert usage.device_seconds == pytest.approx(2 * usage.seconds)
        assert usage.model_flops == pytest.approx(3000 if sharding == "ddp" else 2 * STEP_FLOPS, rel=1e-12)
        assert usage.counters == (pytest.approx({"caption_words": 21}, rel=1e-12) if sharding == "ddp" else {})


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
def test_flops_of_compiled_models_are_the_data_s_to_count(toy, tmp_path):
    train(toy.player(), toy.data(), toy.config(compile=True), tmp_path / "plain")
    assert usage_of(tmp_path / "plain").model_flops is None
    assert usage_of(tmp_path / "plain").mfu is None
    assert "mfu" not in lines_of(tmp_path / "plain")[0]
    data = Counting(dataset=toy.Points(), batch_size=8)
    train(toy.player(), data, toy.config(compile=True, max_steps=2), tmp_path / "counting")
    assert usage_of(tmp_path / "counting").model_flops == 3000


class Ticks:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def meter(toy, folder, before=None, **changes):
    from wellposed.training.distributed import worker_group

    clock = Ticks()
    with worker_group("cpu") as workers:
        made = UsageMeter(folder / USAGE_FILE, workers, toy.data(**changes), "fp32", before, clock=clock)
    return made, clock


def test_the_arithmetic_of_a_session(toy, tmp_path):
    account, clock = meter(toy, tmp_path)
    peak = account.usage().peak_flop_per_second
    clock.now += 2
    account.count(0, 8, 500.0)
    assert account.rates() == {
        "samples_per_second": 4.0,
        "samples": 8,
        "seconds": 2.0,
        "mfu": pytest.approx(500 / (2 * peak)),
    }
    clock.now += 4
    account.count(1, 8, 700.0)
    assert account.rates() == {
        "samples_per_second": 2.0,
        "samples": 16,
        "seconds": 6.0,
        "mfu": pytest.approx(700 / (4 * peak)),
    }
    clock.now += 1
    account.count(2, 8, None)
    assert account.usage().model_flops is None
    assert "mfu" not in account.rates()


def test_another_device_in_another_session(toy, tmp_path):
    account, clock = meter(toy, tmp_path, USAGE)
    clock.now += 3
    usage = account.usage()
    assert (usage.kind, usage.devices) == ("cpu", 1)
    assert usage.seconds == 13
    assert usage.device_seconds == 43
    assert usage.peak_flop == pytest.approx(4000 + 3 * usage.peak_flop_per_second)
    assert usage.device_hours == pytest.approx(43 / 3600)


def test_between_checkpoints_it_is_written_now_and_then(toy, tmp_path):
    account, clock = meter(toy, tmp_path)
    clock.now += 9
    account.count(0, 8, 1.0)
    assert not (tmp_path / USAGE_FILE).exists()
    clock.now += 9
    account.count(1, 8, 1.0)
    assert usage_of(tmp_path).steps == 2


def test_a_session_without_a_step_leaves_no_trace(toy, tmp_path):
    account, clock = meter(toy, tmp_path)
    clock.now += 100
    account.close()
    assert not (tmp_path / USAGE_FILE).exists()


def test_a_disk_that_is_full_does_not_stop_a_run(toy, tmp_path, caplog):
    account, _ = meter(toy, tmp_path / "no_such_folder")
    account.count(0, 8, 1.0)
    account.write()
    assert "cannot be written" in caplog.text


def test_an_account_survives_its_file(tmp_path):
    (tmp_path / USAGE_FILE).write_text(json.dumps(USAGE.__dict__))
    assert usage_of(tmp_path) == USAGE


def test_time_is_the_last_known_and_all_else_the_checkpoint_s(tmp_path):
    path = tmp_path / USAGE_FILE
    later = replace(USAGE, seconds=14.0, steps=8, samples=32, model_flops=1600.0, repeated_steps=1)
    path.write_text(json.dumps(later.__dict__))
    assert usage_before(path, USAGE.__dict__) == replace(USAGE, seconds=14.0, repeated_steps=4)
    path.unlink()
    assert usage_before(path, USAGE.__dict__) == USAGE
    assert usage_before(path, {}) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "must be a mapping"),
        ('{"steps": 1}', "missing"),
        (json.dumps(USAGE.__dict__ | {"colour": 1}), "unexpected keyword argument 'colour'"),
        (json.dumps(USAGE.__dict__ | {"counters": {"words": -1}}), "words is -1; an amount is a number >= 0"),
        (json.dumps(USAGE.__dict__ | {"counters": {"words": "many"}}), "words"),
    ],
)
def test_what_is_no_account_is_named(tmp_path, content, said):
    path = tmp_path / USAGE_FILE
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"usage\.json is not the account of a run \((.|\n)*{said}"):
        read_usage(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"counters": {"words": -2.0}}, "words is -2.0"),
    ],
)
def test_amounts_are_not_negative(change, said):
    with pytest.raises(ValueError, match=f"{said}; an amount is a number >= 0"):
        replace(USAGE, **change)


def test_data_that_count_nonsense_are_told(toy, tmp_path):
    class Wrong(PlannedBatches):
        def counts_at(self, step, part, parts):
            return {"caption_words": float("nan")}

    with pytest.raises(ValueError, match=r"counts_at\(0\) of the data says caption_words is nan"):
        train(toy.player(), Wrong(dataset=toy.Points(), batch_size=8), toy.config(), tmp_path)


def test_the_account_changes_no_bit_of_a_run(toy, tmp_path, monkeypatch):
    weights = []
    for compiled in (False, True):  # what is taken for compiled is not counted
        monkeypatch.setattr("wellposed.training.run._is_compiled", lambda model, compiled=compiled: compiled)
        player = toy.player(model=toy.network(dropout=0.3), ema_decay=0.9)
        train(player, toy.data(), toy.config(), tmp_path / str(compiled))
        weights.append(toy.weights(player.model))
    assert usage_of(tmp_path / "True").model_flops is None
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)
