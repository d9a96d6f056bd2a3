"""Comparisons of autoencoders and of generators: gains over the plain one, curves that survive, times read off them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.evaluation.frechet import FeatureStatistics, frechet_distance
from wellposed.recipes import decq_comparison, latent_stages
from wellposed.recipes.decq import TINY_TAPS, concatenated, decq_tiny, tiny_encoder, with_joint_loss
from wellposed.recipes.decq_comparison import (
    RAE,
    Arm,
    GenerationCurve,
    ReconstructionOutcome,
    arms,
    compare_generation,
    compare_reconstructions,
    convergence,
    stage_one,
    time_to_reach,
)
from wellposed.recipes.latent_evaluate import Reconstruction, measure_reconstruction
from wellposed.recipes.latent_recipe import LatentRecipe
from wellposed.recipes.picture_features import picture_features
from wellposed.recipes.real_images import RealImages, real_images
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.run_folder import write_json
from wellposed.recipes.small_encoder import EncoderShape
from wellposed.training.checkpoint import CheckpointStore
from wellposed.training.run import Run

SIZE, COUNT = 16, 12
SHAPE = EncoderShape(image_size=SIZE, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def few_images(folder: Path) -> ImageDataset:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return ImageDataset(name="twelve", source=StoredPixels(pixels=pixels), labels=torch.arange(COUNT) % 3)


def small_autoencoder(encoder: nn.Module, **fields: Any) -> Any:
    from wellposed.decq.autoencoder import AutoencoderDecQ

    sizes = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    sizes |= {"decoder_intermediate_size": 32, "patch_size": 8, "condenser_num_heads": 2, "noise_tau": 0.8}
    return AutoencoderDecQ.from_encoder(encoder, **{**sizes, "encoder_input_size": SHAPE.image_size, **fields})


def small_generator(autoencoder: Any, num_classes: int) -> Any:
    from wellposed.decq.transformer import DecQTransformer2DModel

    return DecQTransformer2DModel(
        sample_size=autoencoder.grid,
        in_channels=autoencoder.latent_channels,
        num_queries=autoencoder.num_query_tokens,
        num_classes=num_classes,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=2,
        head_hidden_size=16,
        head_num_layers=1,
        head_num_attention_heads=2,
    )


def small_recipe() -> LatentRecipe:
    recipe = decq_tiny()
    training = TrainingSettings(
        max_steps=4, batch_size=6, learning_rate=1e-2, ema_decay=0.5, checkpoint_every=4, log_every=1
    )
    return replace(
        recipe,
        autoencoder=small_autoencoder,
        autoencoder_fields={"num_queries": 2, "condenser_layers": (0, 1)},
        generator=small_generator,
        dataset=few_images,
        test_dataset=few_images,
        reconstruction=replace(recipe.reconstruction, training=training, perceptual=None, discriminator=None),
        generation=replace(recipe.generation, training=replace(training, checkpoint_every=3)),
        sampling=replace(recipe.sampling, batch_size=5),
    )


RECIPE = small_recipe()
ARMS = [
    Arm(name="RAE", recipe=RECIPE.with_queries(0)),
    Arm(name="K = 2, spread", recipe=RECIPE),
    Arm(name="last 2 layers, K = 2", recipe=RECIPE.with_queries(2, (1,), num_summed_layers=2)),
    Arm(name="feature concat", recipe=concatenated(RECIPE, channels=3)),
]
SUMMED = Arm(name="last 2 layers", recipe=RECIPE.with_queries(0, num_summed_layers=2))
JOINT = Arm(name="K = 2, one mean", recipe=with_joint_loss(RECIPE), autoencoder="K = 2, spread")


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return latent_stages.seeded_network(SHAPE.build, 0)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealImages:
    return real_images(
        replace(RECIPE.evaluation, extractor=lambda run, device: picture_features()),
        RECIPE.training_images,
        folder=Path(),
        run=tmp_path_factory.mktemp("real"),
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the comparisons, as they are meant to share it."""
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def outcomes(encoder: nn.Module, folder: Path) -> list[ReconstructionOutcome]:
    told: list[str] = []
    found = compare_reconstructions(
        ARMS, encoder, folder, block_sizes=(16, 8, 1), on_outcome=lambda outcome, made: told.append(outcome.arm)
    )
    assert told == [one.arm for one in found] == [arm.name for arm in ARMS]
    return found


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many each player takes."""
    taken: dict[str, int] = {}
    advance = Run.advance

    def counted(self: Run, data: Any) -> None:
        for name in self.models:
            taken[name] = taken.get(name, 0) + 1
        advance(self, data)

    monkeypatch.setattr(Run, "advance", counted)
    return taken


# --- arms


def test_arms_are_the_published_ablations() -> None:
    found = arms(decq_tiny(), TINY_TAPS)
    fields = {arm.name: arm.recipe.autoencoder_fields for arm in found}
    assert next(iter(fields)) == "RAE" and fields["RAE"]["num_queries"] == 0
    spread, deep = TINY_TAPS["spread"], TINY_TAPS["deep"]
    for count in (2, 8, 16):
        assert fields[f"K = {count}, spread"] == {"num_queries": count, "condenser_layers": spread}
    assert fields["K = 8, deep"] == {"num_queries": 8, "condenser_layers": deep}
    assert fields["last 4 layers"]["num_summed_layers"] == fields["last 4 layers, K = 8"]["num_summed_layers"] == 4
    assert fields["last 4 layers"]["num_queries"] == 0
    assert fields["feature concat"] == {
        "num_queries": None,
        "condenser_layers": spread,
        "query_fusion": "channels",
        "query_bottleneck_dim": 8,
    }
    assert len({decq_comparison._slug(name) for name in fields}) == len(found) == 10
    recipe = decq_tiny()
    described = {name: getattr(recipe, name) for name in ("autoencoder_fields", "summary", "expected", "variations")}
    assert all(replace(arm.recipe, **described) == recipe for arm in found), "nothing else differs"


# --- reconstructions


def test_gains_are_over_the_first_arm(outcomes: list[ReconstructionOutcome], encoder: nn.Module, folder: Path) -> None:
    first = outcomes[0]
    assert first.gain == (0, 0) and set(first.band_gains) == {(0, 0)} and first.taps is None
    for arm, outcome in zip(ARMS, outcomes, strict=True):
        ratio = torch.tensor(sum(first.bands) / sum(outcome.bands), dtype=torch.float64)
        assert outcome.gain[0] == pytest.approx(float(10 * ratio.log10()), abs=1e-9)
        for (gain, error), ours, theirs in zip(outcome.band_gains, outcome.bands, first.bands, strict=True):
            assert gain == pytest.approx(float(10 * torch.tensor(theirs / ours, dtype=torch.float64).log10()), abs=1e-9)
            assert error >= 0
        assert outcome.block_sizes == (16, 8, 1)
        autoencoder = stage_one(arm, encoder, folder, seed=0).model
        made = measure_reconstruction(autoencoder, few_images(folder), block_sizes=(16, 8, 1))
        assert (outcome.psnr, outcome.ssim) == (made.psnr, made.ssim)
        queries = 0 if autoencoder.condensers is None else sum(p.numel() for p in autoencoder.condensers.parameters())
        assert outcome.parameters == queries + sum(p.numel() for p in autoencoder.decoder.parameters())
        if outcome.taps is not None:
            assert outcome.taps.layers == arm.recipe.autoencoder_fields["condenser_layers"]
            assert sum(outcome.taps.movement) == pytest.approx(1, abs=1e-6)


def test_arms_differ_in_nothing_but_their_queries(outcomes: list[ReconstructionOutcome], folder: Path) -> None:
    """They begin with the same encoder; the decoder of the plain one is smaller by what reads queries."""
    from safetensors.torch import load_file

    weights = [
        load_file(folder / f"{decq_comparison._slug(arm.name)}-0" / "model" / "diffusion_pytorch_model.safetensors")
        for arm in ARMS
    ]
    for name in (name for name in weights[0] if name.startswith("encoder.")):
        assert all(torch.equal(other[name], weights[0][name]) for other in weights), name
    more = ({name for name in some if name.startswith("decoder.")} - set(weights[0]) for some in weights)
    tokens = {"decoder.query_embed.weight", "decoder.query_embed.bias", "decoder.query_pos_embed"}
    assert list(more) == [set(), tokens, tokens, {"decoder.query_embed.weight"}]


def test_finished_autoencoders_are_taken_from_the_folder(
    outcomes: list[ReconstructionOutcome], encoder: nn.Module, folder: Path, steps_taken: dict[str, int]
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/model/*.safetensors")}
    assert len(kept) == len(ARMS)
    made: list[Reconstruction] = []
    again = compare_reconstructions(
        ARMS[:2], encoder, folder, block_sizes=(16, 8, 1), on_outcome=lambda outcome, some: made.append(some)
    )
    assert again == outcomes[:2]
    assert steps_taken == {}
    assert [len(some.images) for some in made] == [COUNT, COUNT]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    fewer = compare_reconstructions(ARMS[:1], encoder, folder, block_sizes=(1,), count=7, seeds=(0, 1))
    assert [one.seed for one in fewer] == [0, 1] and fewer[0].psnr != fewer[1].psnr
    assert steps_taken == {"autoencoder": 4}, "the other seed's"


# --- generation


def compared(
    encoder: nn.Module, folder: Path, real: RealImages, chosen: list[Arm], **changes: Any
) -> list[GenerationCurve]:
    settings = {"every": 2, "count": 6, "sampling_steps": 3}
    return compare_generation(chosen, encoder, folder, real, **(settings | changes))


@pytest.fixture(scope="module")
def curves(
    outcomes: list[ReconstructionOutcome], encoder: nn.Module, folder: Path, real: RealImages
) -> list[GenerationCurve]:
    return compared(encoder, folder, real, ARMS)


def test_curves(curves: list[GenerationCurve], folder: Path, real: RealImages) -> None:
    assert [curve.arm for curve in curves] == [arm.name for arm in ARMS]
    for curve in curves:
        assert (curve.steps, curve.epochs) == ((2, 4), (1.0, 2.0)), "twelve images in batches of six"
        assert 0 < curve.seconds[0] < curve.seconds[1]
        assert all(value > 0 for value in curve.frechet)
    # Patches alone go through the plain decoder where they are the plain one's, and the queries are tokens that can be
    # left out: not those of summed layers, nor those with channels of queries.
    assert [curve.discarded is None for curve in curves] == [True, False, True, True]
    assert curves[1].discarded != curves[1].frechet[-1]


def test_the_last_distance_is_that_of_what_is_kept(
    curves: list[GenerationCurve], encoder: nn.Module, folder: Path, real: RealImages, steps_taken: dict[str, int]
) -> None:
    """Taken from the folder, samples and all, without a step."""
    shown: list[torch.Tensor] = []
    again = compared(encoder, folder, real, ARMS[:2], on_curve=lambda curve, samples: shown.append(samples))
    assert again == curves[:2]
    assert steps_taken == {}
    for curve, samples in zip(again, shown, strict=True):
        features = real.extractor(samples, image_format="8-bit")
        distance = frechet_distance(FeatureStatistics.from_features(features), real.statistics)
        assert curve.frechet[-1] == pytest.approx(distance, rel=1e-6)
        assert samples.shape == (6, 3, SIZE, SIZE)
    assert not torch.equal(*shown)


def test_an_arm_may_have_the_autoencoder_of_another(
    curves: list[GenerationCurve], encoder: nn.Module, folder: Path, real: RealImages, steps_taken: dict[str, int]
) -> None:
    plain, joint = compared(encoder, folder, real, [ARMS[0], JOINT])
    assert plain == curves[0]
    assert steps_taken == {"generator": 4}
    assert joint.frechet != curves[1].frechet and joint.discarded is not None
    assert sorted(path.name for path in (folder / "k-2-one-mean-0").iterdir()) == ["generator"]


def test_patches_of_summed_layers_have_their_own_decoder(
    curves: list[GenerationCurve], encoder: nn.Module, folder: Path, real: RealImages
) -> None:
    *_, with_queries = compared(encoder, folder, real, [ARMS[0], SUMMED, ARMS[2]])
    assert replace(with_queries, discarded=None) == curves[2]
    assert with_queries.discarded not in (None, with_queries.frechet[-1])


class Died(Exception):
    """In place of a process that is gone."""


def test_a_curve_survives_an_interruption(
    curves: list[GenerationCurve], encoder: nn.Module, folder: Path, real: RealImages, tmp_path: Path
) -> None:
    """By a clock that steps move by a second, and measuring and saving by a hundred, which do not count."""
    (tmp_path / "k-2-spread-0").mkdir()
    for name in ("rae-0", "k-2-spread-0/checkpoints", "k-2-spread-0/model", "k-2-spread-0/weights"):
        (tmp_path / name).symlink_to(folder / name)
    longer = replace(RECIPE.generation, training=replace(RECIPE.generation.training, max_steps=6))
    chosen = [ARMS[0], replace(ARMS[1], recipe=replace(RECIPE, generation=longer))]
    now, fatal = [0.0], [4]

    def lasting(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            now[0] += seconds
            return function(*arguments, **options)

        return call

    advance = Run.advance

    def step(self: Run, data: Any) -> None:
        # The step after the one behind the checkpoint of 3: 4 is measured, and has to be again.
        if "generator" in self.models and self.step in fatal:
            raise Died
        now[0] += 1
        advance(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "advance", step)
        patch.setattr(decq_comparison.time, "process_time", lambda: now[0])
        patch.setattr(decq_comparison, "draw_images", lasting(100, decq_comparison.draw_images))
        patch.setattr(CheckpointStore, "save", lasting(100, CheckpointStore.save))
        with pytest.raises(Died):
            compared(encoder, tmp_path, real, chosen)
        fatal.clear()
        first, curve = compared(encoder, tmp_path, real, chosen)
    assert first == curves[0]
    assert curve.steps == (2, 4, 6)
    assert curve.frechet[:2] == curves[1].frechet
    # The first step of each process, 1 and 4, is not counted; 2 seconds are there at the checkpoint.
    assert curve.seconds == (1, 2, 4)


def test_the_first_arm_has_no_queries(encoder: nn.Module, folder: Path, real: RealImages) -> None:
    with pytest.raises(ValueError, match="the first arm, 'K = 2, spread', has queries; put the plain"):
        compared(encoder, folder, real, ARMS[1:])


# --- time to reach


def curve_of(frechet: tuple[float, ...]) -> GenerationCurve:
    steps = tuple(range(100, 100 * len(frechet) + 1, 100))
    return GenerationCurve(
        arm="a",
        seed=0,
        steps=steps,
        epochs=tuple(step / 50 for step in steps),
        seconds=tuple(step**2 / 1e4 for step in steps),
        frechet=frechet,
    )


@pytest.mark.parametrize(
    ("value", "by", "expected"),
    [
        (10.0, "steps", 100.0),
        (12.0, "steps", 100.0),
        (9.0, "steps", 120.0),
        (5.0, "steps", 200.0),
        (4.0, "steps", 350.0),
        (4.0, "epochs", 7.0),
        (4.0, "seconds", 9 + 0.5 * (16 - 9)),
        (3.0, "steps", 400.0),
        (2.9, "steps", None),
    ],
)
def test_time_to_reach_is_exact_on_straight_lines(value: float, by: str, expected: float | None) -> None:
    # Worse again in between: only the first time at or below counts.
    found = time_to_reach(curve_of((10.0, 5.0, 5.0, 3.0, 8.0)), value, by=by)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_a_curve_reaches_its_own_best_where_it_is() -> None:
    distances = (9.0, 4.0, 6.0, 2.5, 3.0)
    curve = curve_of(distances)
    assert time_to_reach(curve, min(distances)) == 400
    faster = replace(curve, frechet=tuple(value - 1 for value in distances))
    assert time_to_reach(faster, min(distances)) == pytest.approx(300 + 100 * (5 - 2.5) / (5 - 1.5))


def test_seeds_that_never_get_there_are_counted() -> None:
    def curves(*all_distances: tuple[float, ...]) -> list[GenerationCurve]:
        return [replace(curve_of(distances), seed=seed) for seed, distances in enumerate(all_distances)]

    plain = curves((10.0, 6.0, 4.0), (9.0, 5.0, 5.0))
    faster = convergence(curves((8.0, 4.0, 3.0), (5.0, 4.0, 3.0)), plain)
    assert (faster.arm, faster.by, faster.ratios) == ("a", "epochs", (1.5, 2.0))
    assert (faster.censored, faster.at_most) == (0, ())
    assert faster.mean == pytest.approx((1.75, 0.25))
    some = convergence(curves((8.0, 4.0, 3.0), (9.0, 8.0, 7.0)), plain, by="seconds")
    assert some.ratios == (pytest.approx(9 / 4), None)
    assert (some.censored, some.at_most, some.mean) == (1, (pytest.approx(4 / 9),), None)
    with pytest.raises(ValueError, match=r"none of the plain autoencoder for seeds \[1\]"):
        convergence(curves((1.0,), (1.0,)), plain[:1])


# --- the claim itself


@pytest.mark.slow
def test_queries_bring_colour_back_and_shallow_taps_more_of_it(tmp_path: Path) -> None:
    """On digits in random colours, with an encoder that learned shapes without them: L1 alone, equal steps."""
    recipe = decq_tiny()
    stage = replace(recipe.reconstruction, perceptual=None, discriminator=None)
    recipe = replace(recipe, reconstruction=stage)
    encoder = tiny_encoder(tmp_path / "encoder", recipe.training_images(), steps=150, seed=0, device="cpu")
    chosen = [Arm(name=RAE, recipe=recipe.with_queries(0))]
    chosen += [Arm(name=name, recipe=recipe.with_queries(8, TINY_TAPS[name])) for name in ("shallow", "spread", "deep")]
    found = compare_reconstructions(chosen, encoder, tmp_path, steps=200, block_sizes=(32, 8, 1), count=300)
    plain, shallow, spread, deep = found
    for outcome in (shallow, spread):
        gain, error = outcome.gain
        assert gain - 3 * error > 0.3
        assert outcome.bands[0] < plain.bands[0] / 2, "the error of mean colours"
    assert shallow.gain[0] > deep.gain[0] + 3 * max(shallow.gain[1], deep.gain[1])


def test_a_checkpoint_that_is_called_again_keeps_its_time(tmp_path: Path) -> None:
    """The run that goes on from a checkpoint is called for it first if its callbacks had not finished."""
    path = tmp_path / "curve.json"
    curve = {"steps": [2], "seconds": [5.0], "frechet": [1.0]}
    write_json(path, {**curve, "checkpoint": {"step": 1, "seconds": 2.0}})
    run, measure = Run.__new__(Run), decq_comparison._Measure.__new__(decq_comparison._Measure)
    run.step = 2
    decq_comparison._FollowFrechet(measure, 2, path).on_checkpoint(run, tmp_path)
    assert json.loads(path.read_text()) == {**curve, "checkpoint": {"step": 2, "seconds": 5.0}}
