import json
from pathlib import Path

import pytest

from wellposed.demo import DemoSettings, run_demo

TINY = DemoSettings(
    training_steps=3,
    head_steps=2,
    step_counts=(2, 3, 4),
    num_samples=70,
    path_kl_steps=(4, 8, 16, 32, 64),
    max_products=3,
    guidance_steps=(3,),
    guidance_scales=(1.0,),
    guidance_samples=60,
    guided_digits=20,
    classifier_steps=2,
    token_steps=(2, 8, 32),
    text_files=4,
    text_training_steps=3,
    text_temperatures=(0.8, 1.0),
    text_evaluations=4,
    text_samples=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, settings=TINY)
    return folder


def test_the_page_has_every_section_and_the_measured_numbers(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    for section in ("rates", "samples", "cost", "depth", "guidance", "published", "tokens", "gap", "frontier", "texts"):
        assert f'id="{section}"' in page
    outcomes = json.loads((folder / "covariances" / "record.json").read_text())["metrics"]["outcomes"]
    assert {row["steps"] for row in outcomes} == {2, 3, 4}
    assert len({row["name"] for row in outcomes}) == 13
    assert all(row["failed"] == 0 for row in outcomes)


def test_full_covariance_wins_on_the_exact_target(folder: Path) -> None:
    metrics = json.loads((folder / "path_kl" / "record.json").read_text())["metrics"]
    assert metrics["full"][-1] < metrics["diagonal"][-1] < metrics["isotropic"][-1] < metrics["beta"][-1]


def test_the_exact_bound_is_the_entropy_and_the_misread_denoiser_misses_the_data(folder: Path) -> None:
    metrics = json.loads((folder / "tokens" / "record.json").read_text())["metrics"]
    assert abs(metrics["bound"]["leave_one_out"] - metrics["entropy"]) < 1e-6
    assert metrics["bound"]["denoiser"] > metrics["entropy"] + 0.5
    assert metrics["distance"]["udm_loo"][-1] < 0.05 < metrics["distance"]["udm_misread"][-1]


def test_running_again_computes_nothing_and_writes_the_same_page(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")}
    page = (folder / "index.html").read_bytes()
    run_demo(folder, settings=TINY)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")} == before
    assert (folder / "index.html").read_bytes() == page


def test_a_folder_in_use_is_refused_without_resume(folder: Path) -> None:
    with pytest.raises(ValueError, match="--resume"):
        run_demo(folder, settings=TINY, resume=False)
