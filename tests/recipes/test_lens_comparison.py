"""Text-to-image runs side by side: curves by arm and seed, each made once, whatever interrupts it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.test_lens import few, small_recipe, smallest_encoder, untrained_vae
from wellposed.data.buckets import Buckets, Size
from wellposed.data.captioned_digits import CaptionedDigits, captioned_digits
from wellposed.recipes import caption_following, lens_comparison
from wellposed.recipes.caption_following import attribute_classifiers, score_following
from wellposed.recipes.lens_comparison import Arm, FollowingCurve, compare_following, held_out_loss
from wellposed.recipes.t2i_recipe import PretrainingStage, TextToImageRecipe
from wellposed.recipes.t2i_stages import Parts
from wellposed.training import Run

KIND = "en, 16 x 16, w = 2"


class Killed(Exception):
    pass


def judge(folder: Path, seed: int, device: str) -> Any:
    classifiers = attribute_classifiers(folder, steps=2, num_scenes=128, seed=seed, device=device)
    return lambda images, scenes, asked: score_following(images, scenes, classifiers, asked=asked)


def recipe(**changes: Any) -> TextToImageRecipe:
    """Four steps, measured at the second and the last."""
    buckets = partial(Buckets.fixed, Size(16, 16), batch_size=4)
    stage = PretrainingStage(name="only", buckets=buckets, shares=1, training=few(batch_size=4, **changes))
    evaluation = small_recipe().evaluation
    assert evaluation is not None
    evaluation = replace(evaluation, judge=judge, num_samples=4, sizes=(), styles=("dense",), guidance_scales=(2.0,))
    return small_recipe(stages=(stage,), evaluation=evaluation, shown=())


def corpus(style: Any) -> CaptionedDigits:
    return captioned_digits(12, (16, 16), style=style)


ARMS = [Arm(name=f"{style} captions", recipe=recipe(), corpus=corpus(style)) for style in ("dense", "brief")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    autoencoder = untrained_vae(Path(), Path(), captioned_digits(40, (16, 16)), 0, "cpu")
    folder = tmp_path_factory.mktemp("parts") / "encoder"
    return Parts(
        corpus=None, autoencoder=autoencoder, text_encoder=smallest_encoder(folder, Path(), corpus("dense"), 0, "cpu")
    )


@pytest.fixture(scope="module", autouse=True)
def in_little() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_following, "TEST_SCENES", 28)
        patch.setattr(lens_comparison, "held_out_loss", partial(held_out_loss, count=8, size=(16, 16)))
        yield


def compared(folder: Path, parts: Parts, arms: list[Arm] = ARMS[:1], seeds: tuple[int, ...] = (0,)) -> Any:
    return compare_following(arms, parts.autoencoder, parts.text_encoder, folder, seeds=seeds)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, parts: Parts, in_little: None) -> tuple[Path, list[FollowingCurve]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, compared(folder, parts, ARMS, (0, 1))


def results(curve: FollowingCurve) -> list[Any]:
    """All but the time that it took."""
    return [replace(one, seconds=0.0) for one in curve.measurements]


def test_curves_of_every_arm_and_seed(whole: tuple[Path, list[FollowingCurve]]) -> None:
    folder, curves = whole
    assert [(curve.arm, curve.seed) for curve in curves] == [
        ("dense captions", 0),
        ("brief captions", 0),
        ("dense captions", 1),
        ("brief captions", 1),
    ]
    for curve in curves:
        assert [(one.steps, one.images) for one in curve.measurements] == [(2, 8), (4, 16)]
        for one in curve.measurements:
            assert set(one.following) == {KIND}
            assert set(one.following[KIND]) == {"digit", "colour", "position", "background", "all"}
            assert one.loss > 0 and one.seconds > 0 and (one.model_flops or 0) > 0
    dense, brief, other_seed, _ = curves
    assert dense.measurements[-1].words > 2 * brief.measurements[-1].words
    assert results(dense) != results(other_seed)
    history = json.loads((folder / "dense-captions-0" / "history.json").read_text())
    assert history["loss"] == [[one.images, one.loss] for one in dense.measurements]
    assert set(history) == {"loss", "digit", "colour", "position", "background", "all"}


def test_finished_runs_are_taken_from_the_folder(
    whole: tuple[Path, list[FollowingCurve]], parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "advance", lambda self, data: pytest.fail("trained again"))
    folder, curves = whole
    told: list[FollowingCurve] = []
    again = compare_following(ARMS, parts.autoencoder, parts.text_encoder, folder, seeds=(0, 1), on_curve=told.append)
    assert again == curves == told


def test_runs_of_other_settings_are_not_taken(whole: tuple[Path, list[FollowingCurve]], parts: Parts) -> None:
    others = [replace(ARMS[0], recipe=recipe(learning_rate=0.5)), replace(ARMS[0], corpus=corpus("brief"))]
    for arm in others:
        with pytest.raises(ValueError, match="dense-captions-0 was made with (stages|corpus) = "):
            compared(whole[0], parts, [arm])


@pytest.mark.parametrize("dies", ["training", "measuring"])
def test_an_interrupted_run_goes_on_with_what_it_measured(
    dies: str,
    whole: tuple[Path, list[FollowingCurve]],
    parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It dies in the third step, or while the checkpoint of the second is measured."""
    measured: list[float] = []
    advance, loss = Run.advance, lens_comparison.held_out_loss

    def dying(self: Run, data: Any) -> None:
        if self.step == 2 and dies == "training":
            raise Killed
        advance(self, data)

    def counting(*given: Any, **named: Any) -> float:
        if dies == "measuring":
            raise Killed
        measured.append(loss(*given, **named))
        return measured[-1]

    monkeypatch.setattr(lens_comparison, "held_out_loss", counting)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", dying)
        with pytest.raises(Killed):
            compared(tmp_path, parts)
    assert not (tmp_path / "dense-captions-0" / "curve.json").exists()
    dies = "no more"
    (curve,) = compared(tmp_path, parts)
    assert results(curve) == results(whole[1][0])
    assert len(measured) == 2, "each of the two checkpoints once"

    # It died when all was measured, and nothing said so yet.
    for name in ("curve.json", "callbacks.json", "history.json"):
        (tmp_path / "dense-captions-0" / name).unlink()
    assert compared(tmp_path, parts) == [curve]
    assert len(measured) == 2
    assert (tmp_path / "dense-captions-0" / "history.json").is_file()


def test_the_held_out_loss_is_the_same_with_kept_features(parts: Parts, tmp_path: Path) -> None:
    network = recipe().network
    assert network is not None
    lens = network(parts.autoencoder, parts.text_encoder).eval()
    # Its last layer begins at zero, and then no feature counts.
    torch.nn.init.normal_(lens.proj_out.weight, std=0.2)
    losses = [
        held_out_loss(lens, parts, features=features, count=10, size=(16, 16))
        for features in (None, tmp_path, tmp_path)
    ]
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert list(tmp_path.rglob("*")), "they are kept"
