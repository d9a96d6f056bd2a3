import stat

import pytest

from wellposed.report.files import read_metrics, write_atomically


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    path = write_atomically(tmp_path / "a" / "b.txt", b"content")
    assert path.read_bytes() == b"content"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_others_may_read_the_file(tmp_path):
    mode = write_atomically(tmp_path / "page.html", b"").stat().st_mode
    assert stat.S_IMODE(mode) == 0o644


def test_an_interruption_leaves_the_previous_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "b.txt", b"before")

    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_keep_the_last_line_of_a_step_and_drop_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n\n{"step": 2, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert [row["loss"] for row in read_metrics(path)] == [2.0, 0.5]


def test_damaged_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 holds a list"):
        read_metrics(path)
