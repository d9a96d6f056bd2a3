"""The record of a run: left alone by a resume that is refused, and what its samples are drawn with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.test_ddpm_recipe import tiny_digits
from wellposed.recipes import RECIPES, ddpm_train, recipe_of
from wellposed.recipes.run_folder import RunFolder, keep_settings, note_parts, resolved_settings, start_run

HELD = {
    "recipe": "lgs_tiny",
    "seed": 0,
    "steps": 4,
    "weights": "trained",
    "training": {"batch_size": 8, "max_steps": 4},
    "dataset": {"name": "digits", "fingerprint": "abc"},
    "network": {"width": [8, 16], "dropped": 1},
}


def begun(folder: Path) -> RunFolder:
    """A run with three steps behind it."""
    run = start_run(folder, RECIPES["lgs_tiny"](), resume=False)
    keep_settings(run, HELD)
    (folder / "checkpoints" / "step_00000003").mkdir(parents=True)
    return run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 5}, "belongs to another run: seed 0, now 5; give the same to go on with it"),
        ({"weights": "hub/model.bin"}, "weights trained, now hub/model.bin"),
        ({"training": {"batch_size": 4}}, "batch_size 8, now 4"),
        ({"dataset": {"name": "digits", "fingerprint": "abd"}}, "dataset abc, now abd"),
        ({"network": {"width": (8, 8)}}, r"network width \[8, 16\], now \[8, 8\]"),
        ({"architecture": {"depth": 2}, "seed": 1}, "another run: seed 0, now 1; give"),
        ({"steps": 2}, "has 3 steps behind it; give no fewer --steps"),
    ],
)
def test_a_refused_resume_leaves_the_record_alone(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    run = begun(tmp_path / "run")
    before = run.settings_file.read_bytes()
    with pytest.raises(ValueError, match=said):
        keep_settings(run, {**HELD, **changes})
    assert run.settings_file.read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3},
        {"steps": 9, "device": "cuda", "sampling": {"num_inference_steps": 7}},
        {"network": {"width": (8, 16), "new": True}, "training": {"batch_size": 8, "max_steps": 9}},
    ],
)
def test_going_on_brings_the_record_up_to_date(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = begun(tmp_path / "run")
    given = {**{name: value for name, value in HELD.items() if name != "dataset"}, **changes}
    keep_settings(run, given)
    assert run.settings() == {**json.loads(json.dumps(given)), "dataset": HELD["dataset"]}, "its data are known later"


def test_only_the_main_process_keeps_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    keep_settings(run, {**HELD, "seed": 1})
    assert run.settings()["seed"] == 0


def test_parts_are_those_that_have_an_account(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    note_parts(run, ("encoder", "guide"))
    assert not (run.path / "parts.json").exists()
    for name in ("encoder", "judge"):
        (run.path / name).mkdir()
        (run.path / name / "usage.json").touch()
    note_parts(run, ("encoder", "guide"))
    assert json.loads((run.path / "parts.json").read_text()) == ["encoder"]


def test_a_run_that_died_before_its_export_has_it_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint was whole, so that no step is left to do; with another seed or fewer steps it is refused."""
    recipe, run = tiny_digits(), tmp_path / "run"

    def dying(*arguments: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ddpm_train, "averaged_network", dying)
        with pytest.raises(OSError, match="no space"):
            recipe.train(run, device="cpu", progress=False)
    before = (run / "recipe.json").read_bytes()
    for changes in ({"seed": 5}, {"steps": 3}):
        with pytest.raises(ValueError, match="choose another --out"):
            recipe.train(run, device="cpu", progress=False, resume=True, **changes)
        assert (run / "recipe.json").read_bytes() == before
    assert not (run / "pipeline").exists()
    recipe.train(run, device="cpu", progress=False, resume=True)
    assert recipe_of(run).name == "lgs_tiny"
    assert (run / "samples" / "step_00000004.png").is_file()


VARIED: dict[str, dict[str, Any]] = {
    "lgs_tiny": {"num_lanczos_steps": 1, "step_counts": (3, 4)},
    "dito_tiny": {"num_inference_steps": 5},
    "udm_tiny": {"strategy": "confidence", "kernel": "maximal_coupling"},
    "decq_tiny": {"guidance_scale": 1.5, "guidance_interval": (0.25, 1.0)},
    "lens_tiny": {"guidance_scale": 2.0, "size": (48, 32)},
}


@pytest.mark.parametrize("name", VARIED)
def test_a_run_is_sampled_as_it_was_recorded(tmp_path: Path, name: str) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    listed = RECIPES[name]()
    varied = replace(listed, sampling=replace(listed.sampling, **VARIED[name]))
    settings = json.loads(json.dumps(resolved_settings(varied)))
    settings["sampling"]["of another version"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(settings))
    assert recipe_of(tmp_path).sampling == varied.sampling != listed.sampling
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": name}))
    assert recipe_of(tmp_path).sampling == listed.sampling, "its own, where nothing is recorded"
