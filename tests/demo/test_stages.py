from pathlib import Path
from typing import Any

import pytest

from wellposed.demo.stages import Stages


def run(folder: Path, settings: dict[str, Any], seed: int = 0, value: float = 1.0) -> tuple[float, list[str]]:
    said: list[str] = []
    stages = Stages(folder, seed=seed, announce=said.append)
    record = stages.run("stage", "A stage", settings, lambda where: {"value": value})
    return record.metrics["value"], said


def test_a_finished_stage_is_read_again(tmp_path: Path) -> None:
    run(tmp_path, {"steps": (4, 8)}, value=1.0)
    assert run(tmp_path, {"steps": (4, 8)}, value=2.0) == (1.0, ["A stage: done before"])


@pytest.mark.parametrize(("settings", "seed"), [({"steps": (4, 9)}, 0), ({"steps": (4, 8)}, 1)])
def test_other_settings_or_seed_compute_again(tmp_path: Path, settings: dict[str, Any], seed: int) -> None:
    run(tmp_path, {"steps": (4, 8)}, value=1.0)
    assert run(tmp_path, settings, seed=seed, value=2.0)[0] == 2.0


def test_an_interrupted_stage_starts_again_and_earlier_ones_do_not(tmp_path: Path) -> None:
    def interrupted(where: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    stages = Stages(tmp_path, seed=0, announce=lambda line: None)
    stages.run("first", "First", {}, lambda where: {"value": 1})
    with pytest.raises(KeyboardInterrupt):
        stages.run("second", "Second", {}, interrupted)
    again = Stages(tmp_path, seed=0, announce=lambda line: None)
    assert again.run("first", "First", {}, interrupted).metrics["value"] == 1
    assert again.run("second", "Second", {}, lambda where: {"value": 2}).metrics["value"] == 2


def test_a_damaged_record_is_computed_again(tmp_path: Path) -> None:
    run(tmp_path, {}, value=1.0)
    (tmp_path / "stage" / "record.json").write_text("{")
    assert run(tmp_path, {}, value=2.0)[0] == 2.0
