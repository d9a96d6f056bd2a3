import stat

import pytest

from wellposed.report.files import write_atomically


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
