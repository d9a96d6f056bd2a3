"""``on_checkpoint`` reaches every checkpoint that a run goes on from, though a process died before it had returned."""

import json

import pytest

from wellposed.training import Callback, train
from wellposed.training.loop import CALLBACKS_FILE
from wellposed.training.usage import USAGE_FILE, read_usage


class Noting(Callback):
    """Notes the step of every checkpoint; dies at one."""

    def __init__(self, dies_at=None):
        self.dies_at, self.steps = dies_at, []

    def on_checkpoint(self, run, path):
        if run.step == self.dies_at:
            raise RuntimeError("power cut")
        assert path.name == f"step_{run.step:08d}"
        assert read_usage(path.parents[1] / USAGE_FILE).steps == run.step
        self.steps.append(run.step)


def died_at(toy, folder, step, callbacks=()):
    config = toy.config(max_steps=6, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        train(toy.player(ema_decay=0.9), toy.data(), config, folder, callbacks=[*callbacks, Noting(step)])


def went_on(toy, folder):
    player, noting = toy.player(ema_decay=0.9), Noting()
    result = train(player, toy.data(), toy.config(max_steps=6, checkpoint_every=2), folder, callbacks=[noting])
    assert result.step == 6
    return noting.steps


@pytest.mark.parametrize(("step", "called"), [(2, [2, 4, 6]), (4, [4, 6]), (6, [6])])
def test_callbacks_that_a_checkpoint_did_not_get_are_called_first(toy, tmp_path, step, called):
    before = Noting()
    died_at(toy, tmp_path, step, [before])
    assert before.steps == list(range(2, step + 1, 2)), "one of two had returned"
    assert went_on(toy, tmp_path) == called
    assert went_on(toy, tmp_path) == [], "a finished run is left alone"


def test_a_later_crash_calls_none_again(toy, tmp_path):
    class Crash(Callback):
        def on_step_end(self, run):
            if run.step == 3:
                raise RuntimeError("power cut")

    config = toy.config(max_steps=6, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        train(toy.player(ema_decay=0.9), toy.data(), config, tmp_path, callbacks=[Crash()])
    assert went_on(toy, tmp_path) == [4, 6]


@pytest.mark.parametrize("note", [None, "{", '{"step": 4}'])
def test_without_a_note_of_the_checkpoint_they_are_called_once(toy, tmp_path, note):
    """A run of an older version has none; a damaged one says nothing."""
    went_on(toy, tmp_path)
    steps, path = read_usage(tmp_path / USAGE_FILE).steps, tmp_path / CALLBACKS_FILE
    assert json.loads(path.read_text()) == {"step": 6}
    path.unlink() if note is None else path.write_text(note)
    assert went_on(toy, tmp_path) == [6]
    assert went_on(toy, tmp_path) == []
    assert read_usage(tmp_path / USAGE_FILE).steps == steps


def test_a_note_that_cannot_be_written_stops_no_run(toy, tmp_path, caplog):
    (tmp_path / "callbacks.partial").mkdir()
    assert went_on(toy, tmp_path) == [2, 4, 6]
    assert "a resume calls the callbacks again" in caplog.text
    assert went_on(toy, tmp_path) == [6]


def test_all_ranks_call_them_again_or_none(toy, on_ranks, tmp_path):
    """Spread weights are gathered by all together: none may do it alone."""

    class Gathering(Callback):
        steps = ()

        def on_checkpoint(self, run, path):
            for parameter in run.models["net"].parameters():
                parameter.full_tensor()
            self.steps = (*self.steps, run.step)

    def resumed():
        gathering = Gathering()
        train(toy.player(), toy.data(), toy.config(max_steps=2, sharding="fsdp2"), tmp_path, callbacks=[gathering])
        return list(gathering.steps)

    assert on_ranks(2, resumed) == [[2], [2]]
    assert on_ranks(2, resumed) == [[], []]
    (tmp_path / CALLBACKS_FILE).unlink()
    assert on_ranks(2, resumed) == [[2], [2]]
