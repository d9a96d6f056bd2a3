import contextlib
from pathlib import Path
from typing import Any

import pytest

from wellposed.demo.decq import frozen_encoder
from wellposed.demo.settings import DemoSettings
from wellposed.demo.stages import Stages
from wellposed.evaluation.features import hash_weights


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


def test_an_interrupted_stage_goes_on_and_earlier_ones_do_not(tmp_path: Path) -> None:
    def interrupted(where: Path) -> dict[str, Any]:
        (where / "checkpoint").write_text("half way")
        raise KeyboardInterrupt

    stages = Stages(tmp_path, seed=0, announce=lambda line: None)
    stages.run("first", "First", {}, lambda where: {"value": 1})
    with pytest.raises(KeyboardInterrupt):
        stages.run("second", "Second", {}, interrupted)
    again = Stages(tmp_path, seed=0, announce=lambda line: None)
    assert again.run("first", "First", {}, interrupted).metrics["value"] == 1
    found = again.run("second", "Second", {}, lambda where: {"value": (where / "checkpoint").read_text()})
    assert found.metrics["value"] == "half way"


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(("settings", "seed"), [({"steps": 9}, 0), ({"steps": 4}, 1)])
def test_what_other_settings_left_is_cleared(
    tmp_path: Path, settings: dict[str, Any], seed: int, is_finished: bool
) -> None:
    def left_by(settings: dict[str, Any], seed: int, is_finished: bool) -> list[str]:
        found: list[str] = []

        def compute(where: Path) -> dict[str, Any]:
            found.extend(sorted(path.name for path in where.iterdir()))
            (where / f"checkpoint-{settings['steps']}-{seed}").touch()
            if not is_finished:
                raise KeyboardInterrupt
            return {}

        stages = Stages(tmp_path, seed=seed, announce=lambda line: None)
        with contextlib.suppress(KeyboardInterrupt):
            stages.run("stage", "A stage", settings, compute)
        return found

    assert left_by({"steps": 4}, 0, is_finished) == []
    assert left_by(settings, seed, False) == []
    assert left_by(settings, seed, True) == [f"checkpoint-{settings['steps']}-{seed}"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that no stage of a demo has left there; choose another --out"):
        run(tmp_path, {})
    assert (tmp_path / "stage" / "thesis.txt").read_text() == "years of work"


def test_a_network_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    """The frozen encoder of one step is not that of two, nor what two steps make of it."""

    def weights(folder: Path, steps: int) -> str:
        settings = DemoSettings(detail_copies=1, detail_images=64, detail_encoder_steps=steps)
        return hash_weights(frozen_encoder(Stages(folder, seed=0, announce=lambda line: None), settings, device="cpu"))

    one = weights(tmp_path / "used", 1)
    assert weights(tmp_path / "used", 2) == weights(tmp_path / "fresh", 2) != one


def test_a_damaged_record_is_computed_again(tmp_path: Path) -> None:
    run(tmp_path, {}, value=1.0)
    (tmp_path / "stage" / "record.json").write_text("{")
    assert run(tmp_path, {}, value=2.0)[0] == 2.0
