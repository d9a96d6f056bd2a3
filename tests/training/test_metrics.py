import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from wellposed.training import metrics
from wellposed.training.metrics import MetricsFile, plain_duration, progress_report
from wellposed.training.trackers import TensorBoardLog, TrackioLog


def test_a_file_goes_on_after_the_resumed_step(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    first = MetricsFile(path, resumed_step=0)
    for step in (10, 20, 30):
        first.write({"step": step, "loss": step / 10})
    first.close()
    with path.open("a") as file:
        file.write('[1, 2]\n{"loss": 3}\n{"step": 40, "lo')
    second = MetricsFile(path, resumed_step=20)
    second.write({"step": 30, "loss": 0.0})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 0.0}]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    file.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    file.close()


def test_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resumed_step=0)
    file.write({"step": 1})
    room, file._file = file._file, Path("/dev/full").open("a")  # noqa: SIM115
    file.write({"step": 2})
    assert "metrics.jsonl cannot be written (No space left on device)" in caplog.text
    file.close()
    assert "lacks its last lines" in caplog.text
    room.close()
    assert path.read_text() == '{"step": 1}\n'


def test_plain_lines_come_at_intervals_and_at_the_end(capsys, monkeypatch):
    now = iter([0.0, 0.5, 1.0, 11.0, 12.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(now)))
    report = progress_report(0, 4, silent=False)
    for step in range(1, 5):
        report.show(step, f"net {step}")
    report.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 3/4", "step 4/4"]
    assert lines[1] == "step 3/4  net 3  0:00:04 left"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = progress_report(1, 4, silent=False)
    report.show(4, "net 0.5")
    report.close()
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "net 0.5" in shown


def test_silence(capsys):
    report = progress_report(0, 4, silent=True)
    report.show(4, "net 0.5")
    report.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3_723.0, "1:02:03")])
def test_durations(seconds, text):
    assert plain_duration(seconds) == text


@pytest.mark.parametrize(
    ("package", "tracker"),
    [("tensorboard", lambda: TensorBoardLog("folder")), ("trackio", lambda: TrackioLog("project", "run"))],
)
def test_a_tracker_that_is_not_installed_says_what_to_install(package, tracker, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} is not installed; pip install "wellposed\[track\]"'):
        tracker()


def test_tensorboard_gets_every_scalar(toy, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra track")
    from wellposed.training import train

    train(toy.player(), toy.data(), toy.config(), tmp_path / "run", callbacks=[TensorBoardLog(tmp_path / "events")])
    reader = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = reader(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("net/loss")] == [1, 2, 3, 4, 5]
