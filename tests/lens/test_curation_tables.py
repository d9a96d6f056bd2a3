"""Files that grow line by line: cut anywhere they are read up to there, and go on from there."""

import logging

import pytest

from wellposed.lens.curation_tables import append_lines, read_lines

LINES = [{"text": "一座灯塔"}, {"text": "a fox\u2028and a \x85 mark"}, {"text": "白い灯台"}]


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "deep/down.jsonl"
    assert list(read_lines(path)) == []
    append_lines(path, LINES[:1])
    append_lines(path, LINES[1:], sync=True)
    append_lines(path, [])
    assert list(read_lines(path)) == LINES


def test_a_line_cut_anywhere_also_within_a_letter_is_written_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    append_lines(path, LINES)
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(read_lines(path)) == LINES[:2]
        append_lines(path, LINES[2:])
        assert path.read_bytes() == whole
    path.write_bytes(whole[:3])
    append_lines(path, LINES[:1])
    assert list(read_lines(path)) == LINES[:1]


@pytest.mark.parametrize("damage", [b"{", b"\xe4\xb8", b""])
def test_damaged_lines_are_left_out_and_told(tmp_path, damage, caplog):
    path = tmp_path / "x.jsonl"
    append_lines(path, LINES)
    first, *others = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, damage, *others]))
    with caplog.at_level(logging.WARNING):
        assert list(read_lines(path)) == LINES
    assert "x.jsonl: line 2 is left out" in caplog.text
