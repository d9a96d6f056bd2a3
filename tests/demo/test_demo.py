import json
from pathlib import Path

import pytest

from wellposed.demo import DemoSettings, run_demo

TINY = DemoSettings(
    training_steps=3,
    head_steps=2,
    step_counts=(2, 3, 4),
    num_samples=70,
    judge_steps=30,
    analytic_images=64,
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
    text_validation=32,
    reduction_training_steps=2,
    reduction_steps=8,
    reduction_images=1,
    reduction_ratios=(0.5,),
    reduction_shorter=(4,),
    reduction_cache_thresholds=(0.1,),
    reduction_extrapolated=(2,),
    reduction_penalties=(0.0, 0.3),
    penalised_ratios=(0.25, 0.5),
    detail_copies=1,
    detail_images=120,
    detail_encoder_steps=2,
    detail_steps=2,
    detail_generation_steps=2,
    detail_measurements=2,
    detail_samples=50,
    detail_sampling_steps=3,
    captions_pictures=60,
    captions_autoencoder_steps=2,
    captions_steps=2,
    captions_mixed_steps=2,
    captions_samples=10,
    captions_judge_steps=2,
    captions_judge_scenes=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, settings=TINY)
    return folder


def test_the_page_has_every_section_and_the_measured_numbers(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    lgs = ("rates", "samples", "cost", "depth", "guidance", "published")
    udm, dito = ("tokens", "gap", "frontier", "texts"), ("skipping", "place", "persistence", "penalty")
    for section in (*lgs, *udm, *dito, "detail", "taps", "generating", "prompts", "captions"):
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


def test_every_way_to_skip_work_is_compared_with_the_dense_images(folder: Path) -> None:
    rows = json.loads((folder / "reduction" / "record.json").read_text())["metrics"]["outcomes"]
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {
        *("dense", "default", "dense K/V", "paper", "tomesd", "sito", "toma", "random", "cache + default"),
        *("tomesd + dense steps", "sito + dense steps", "toma + dense steps", "4 steps", "cache 0.1"),
        "TaylorSeer 2",
    }
    assert all(row["flops"] < 1 for name, row in by_name.items() if not name.startswith(("dense", "cache")))
    assert by_name["4 steps"]["flops"] == pytest.approx(4 / 8)
    # Controls cost what ours does, and time is not measured for them.
    assert by_name["tomesd + dense steps"]["flops"] > by_name["tomesd"]["flops"]
    assert [name for name, row in by_name.items() if row["latency"] is None] == [
        "dense",
        *(name for name in by_name if name.endswith("dense steps")),
    ]


def test_the_verdict_is_the_measured_one(folder: Path) -> None:
    rows = json.loads((folder / "reduction" / "record.json").read_text())["metrics"]["outcomes"]
    ours = next(row for row in rows if row["name"] == "default")
    as_cheap = [row for row in rows if row["family"] in ("steps", "cache") and row["flops"] <= ours["flops"]]
    assert {row["name"] for row in as_cheap} == {"4 steps", "TaylorSeer 2"}
    best = max(as_cheap, key=lambda row: row["psnr"][0])
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert f"By FLOPs ours takes {ours['flops']:.0%} of the dense model, at {ours['psnr'][0]:.1f} dB." in page
    difference = best["psnr"][0] - ours["psnr"][0]
    where = (
        "level with" if abs(difference) < 0.05 else f"{abs(difference):.1f} dB {'above' if difference > 0 else 'below'}"
    )
    label = "4 steps" if best["name"] == "4 steps" else "TaylorSeer, one step in 2"
    assert f"{label} ({best['flops']:.0%}): {best['psnr'][0]:.1f} dB, {where} ours." in page


def test_both_scopes_are_watched_and_a_penalty_spreads_drops(folder: Path) -> None:
    outputs = json.loads((folder / "outputs" / "record.json").read_text())["metrics"]
    assert set(outputs) == {"attn", "block"}
    assert all(watched["num_steps"] == 8 and len(watched["sites"]) == 5 for watched in outputs.values())
    penalty = json.loads((folder / "penalty" / "record.json").read_text())["metrics"]
    for rows in penalty.values():
        assert [(row["ratio"], row["penalty"]) for row in rows] == [(0.25, 0.0), (0.25, 0.3), (0.5, 0.0), (0.5, 0.3)]
        assert rows[1]["gini"] < rows[0]["gini"] and rows[3]["gini"] < rows[2]["gini"]
    page = (folder / "index.html").read_text(encoding="utf-8")
    section = page.split('<section id="penalty">')[1].split("</section>")[0]
    assert section.count("data:image/png") == 1 + 2 * len(rows), "crops: the dense ones, and those of every setting"


def test_running_again_computes_nothing_and_writes_the_same_page(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")}
    page = (folder / "index.html").read_bytes()
    run_demo(folder, settings=TINY)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")} == before
    assert (folder / "index.html").read_bytes() == page


def test_a_folder_in_use_is_refused_without_resume(folder: Path) -> None:
    with pytest.raises(ValueError, match="--resume"):
        run_demo(folder, settings=TINY, resume=False)
