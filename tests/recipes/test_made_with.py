"""A folder says what its part of a run was made with, and is not taken for another's."""

from pathlib import Path

import pytest

from wellposed.recipes.made_with import claim_folder

SETTINGS = {"steps": 4, "sizes": (8, 16), "seed": 0}


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    claim_folder(tmp_path / "part", SETTINGS)
    (tmp_path / "part" / "weights").touch()
    note = (tmp_path / "part" / "made_with.json").read_text()
    claim_folder(tmp_path / "part", {**SETTINGS, "sizes": [8, 16]})
    assert (tmp_path / "part" / "made_with.json").read_text() == note


def test_other_settings_are_named(tmp_path: Path) -> None:
    claim_folder(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"made with steps = 4 \(now 5\), width = None \(now 3\); choose another"):
        claim_folder(tmp_path, {**SETTINGS, "steps": 5, "width": 3})
    claim_folder(tmp_path, SETTINGS)


def test_files_without_a_note_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    with pytest.raises(ValueError, match="to say what its files were made with; choose another folder, or remove"):
        claim_folder(tmp_path, SETTINGS)


def test_a_damaged_note_is_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path, SETTINGS)
    (tmp_path / "made_with.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        claim_folder(tmp_path, SETTINGS)


def test_other_ranks_leave_it_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    claim_folder(tmp_path / "part", SETTINGS)
    assert not (tmp_path / "part").exists()
