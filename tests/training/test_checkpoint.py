"""A checkpoint is whole or not there, and the one before it survives whatever happens."""

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from wellposed.training import Callback, CheckpointError, train
from wellposed.training.checkpoint import CheckpointStore, Progress
from wellposed.training.distributed import worker_group


def progress(step):
    return Progress(step=step, seed=0, data={"dataset": "x"}, updates={"net": step}, metrics={"net/loss": 1.0})


@pytest.fixture
def store(tmp_path):
    with worker_group("cpu") as workers:
        yield CheckpointStore(tmp_path / "checkpoints", workers, keep_last=2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(store):
    state = {"net": {"weight": torch.arange(3.0), "nested": {"lr": 0.1, "flags": (True, None)}, "empty": {}}}
    path = store.save(state, progress(7))
    fresh = {"net": {"weight": torch.zeros(3), "nested": {"lr": 0.0, "flags": (False, None)}, "empty": {}}}
    store.load(path, fresh)
    assert fresh["net"]["weight"].tolist() == [0, 1, 2]
    assert fresh["net"]["nested"] == {"lr": 0.1, "flags": (True, None)}
    assert store.progress(path) == progress(7)


def test_only_the_newest_are_kept(store):
    (store.folder / ".step_00000003.partial").mkdir(parents=True)  # of a session that crashed
    for step in (5, 99_999_999, 100_000_000):
        store.save({"weight": torch.zeros(1)}, progress(step))
    assert names(store.folder) == ["step_100000000", "step_99999999"]
    assert store.latest().name == "step_100000000"


def test_what_is_not_complete_is_not_seen_and_is_written_over(store):
    assert store.latest() is None
    good = store.save({"weight": torch.zeros(1)}, progress(1))
    shutil.copytree(good, store.folder / ".step_00000009.partial")
    for name, missing in (("step_00000002", ".metadata"), ("step_00000003", "progress.json")):
        shutil.copytree(good, store.folder / name)
        (store.folder / name / missing).unlink()
    (store.folder / "step_best").mkdir()
    assert store.latest() == good
    assert store.save({"weight": torch.ones(1)}, progress(2)) == store.folder / "step_00000002"
    store.save({"weight": torch.ones(1)}, progress(9))
    assert [path.name for path in store.complete()] == ["step_00000002", "step_00000009"]


def test_a_step_saved_twice_is_the_second(store):
    """After resuming from an older checkpoint because a newer one was removed by hand, say."""
    for value in (1.0, 2.0):
        path = store.save({"weight": torch.full((1,), value)}, progress(1))
    fresh = {"weight": torch.zeros(1)}
    store.load(path, fresh)
    assert fresh["weight"].item() == 2.0


def test_a_full_disk_keeps_the_previous_checkpoint(toy, tmp_path, monkeypatch):
    """The system refuses to let any file grow beyond 2 kB, which the shards need and the small files do not."""

    class FillDisk(Callback):
        def on_step_end(self, run):
            if run.step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CheckpointError) as failure:
            train(toy.player(), toy.data(), toy.config(checkpoint_every=2), tmp_path, callbacks=[FillDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    message = str(failure.value)
    assert "step_00000004 could not be written" in message
    assert "step_00000002 is intact" in message
    assert "Make room" in message
    assert names(tmp_path / "checkpoints") == ["step_00000002"]
    resumed, straight = toy.player(), toy.player()
    train(resumed, toy.data(), toy.config(), tmp_path)
    train(straight, toy.data(), toy.config(), tmp_path / "straight")
    for a, b in zip(toy.weights(resumed.model), toy.weights(straight.model), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("moment", ["shards", "metadata", "progress", "rename"])
def test_an_error_at_any_moment_of_writing(store, monkeypatch, moment):
    good = store.save({"weight": torch.zeros(1)}, progress(1))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_when(original, condition):
        def call(*args, **kwargs):
            if condition(*args):
                raise full
            return original(*args, **kwargs)

        return call

    match moment:
        case "shards" | "metadata":
            suffix = ".distcp" if moment == "shards" else ".metadata.tmp"
            original = FileSystem.create_stream
            patched = fail_when(original, lambda self, path, mode: str(path).endswith(suffix))
            monkeypatch.setattr(FileSystem, "create_stream", patched)
        case "progress":
            patched = fail_when(Path.open, lambda self, mode="r": self.name == "progress.json" and mode == "w")
            monkeypatch.setattr(Path, "open", patched)
        case "rename":
            patched = fail_when(Path.rename, lambda self, target: Path(target).name == "step_00000002")
            monkeypatch.setattr(Path, "rename", patched)
    with pytest.raises(CheckpointError, match="No space left on device.*step_00000001 is intact"):
        store.save({"weight": torch.ones(1)}, progress(2))
    assert names(store.folder) == ["step_00000001"]
    if moment == "shards":
        with pytest.raises(OSError, match="No space left on device"):
            store.load(good, {"weight": torch.ones(1)})
    monkeypatch.undo()
    fresh = {"weight": torch.ones(1)}
    store.load(good, fresh)
    assert fresh["weight"].item() == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with worker_group("cpu") as workers:
        store = CheckpointStore(tmp_path / "file" / "checkpoints", workers, keep_last=2)
        with pytest.raises(CheckpointError, match="could not be written.*there is no earlier one"):
            store.save({"weight": torch.ones(1)}, progress(2))


def test_a_removal_cut_short_leaves_nothing_that_looks_complete(store, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
    for step in (1, 2, 3):
        store.save({"weight": torch.zeros(1)}, progress(step))
    assert [path.name for path in store.complete()] == ["step_00000002", "step_00000003"]


def test_a_damaged_checkpoint_is_refused(store):
    path = store.save({"weight": torch.zeros(1000)}, progress(1))
    (shard,) = path.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match="remove it to resume from the one before"):
        store.load(path, {"weight": torch.ones(1000)})


def test_damaged_progress_is_refused(store):
    path = store.save({"weight": torch.zeros(1)}, progress(1))
    for damaged in ('{"step": 1', '{"step": 1}'):
        (path / "progress.json").write_text(damaged)
        with pytest.raises(ValueError, match="remove the checkpoint to resume from the one before"):
            store.progress(path)


def test_another_structure_is_refused(store):
    path = store.save({"net": {"weight": torch.zeros(3)}}, progress(1))
    for other in ({"net": {"bias": torch.zeros(3)}}, {"net": {"weight": torch.zeros(4)}}):
        with pytest.raises(ValueError, match="does not fit these players.*start in another folder"):
            store.load(path, other)
