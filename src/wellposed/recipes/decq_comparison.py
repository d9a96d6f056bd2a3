"""Autoencoders with and without queries, and generators on their latents, on equal ground.

An arm is a recipe that differs from the others in its queries, taps or summed layers only: the same frozen encoder,
decoder, images, order of images, steps and seeds. ``compare_reconstructions`` trains stage one of each and measures
what it gains over the first; ``compare_generation`` trains stage two and follows the Frechet distance along the way.
The demo and ``benchmarks/decq_quality.py`` are calls of them.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from wellposed.data.images import ImageDataset
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.interpret import TapReport, tap_report
from wellposed.decq.transformer import DecQTransformer2DModel
from wellposed.evaluation.features import unit_images
from wellposed.evaluation.frechet import FeatureStatistics, frechet_distance
from wellposed.evaluation.frequency import BandErrors
from wellposed.recipes.decq import concatenated
from wellposed.recipes.latent_draw import draw_images
from wellposed.recipes.latent_evaluate import Reconstruction, measure_reconstruction
from wellposed.recipes.latent_recipe import LatentRecipe
from wellposed.recipes.latent_stages import (
    GENERATOR,
    autoencoder_stage,
    generator_stage,
    latent_stage,
    pipeline_of,
)
from wellposed.recipes.real_images import RealImages
from wellposed.recipes.run_folder import write_json
from wellposed.recipes.stages import StageOptions, Trained
from wellposed.training import Callback, Run

__all__ = [
    "Arm",
    "Convergence",
    "GenerationCurve",
    "ReconstructionOutcome",
    "arms",
    "compare_generation",
    "compare_reconstructions",
    "convergence",
    "stage_one",
    "time_to_reach",
]

RAE = "RAE"
TAP_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the autoencoders that are compared.

    Attributes:
        name: as in tables and plots.
        recipe: how it is made.
        autoencoder: name of the arm whose stage one it has too, differing in stage two only; None for its own.
    """

    name: str
    recipe: LatentRecipe
    autoencoder: str | None = None


def arms(
    recipe: LatentRecipe,
    taps: Mapping[str, Sequence[int]],
    *,
    query_counts: Sequence[int] = (2, 8, 16),
    summed_layers: int = 4,
    concatenated_channels: int = 8,
) -> list[Arm]:
    """The published ablations over a frozen encoder, and the sum of the last layers with and without queries.

    Args:
        recipe: what they have in common.
        taps: placements by name; ``"spread"`` is the default one.
        query_counts: K at the default placement; 8 is also that of the other placements.
        summed_layers: k.
        concatenated_channels: to which queries are reduced that are channels of the patches.
    """
    plain = recipe.with_queries(0)
    found = [Arm(name=RAE, recipe=plain)]
    for placement, layers in taps.items():
        counts = query_counts if placement == "spread" else (8,)
        found += [Arm(name=f"K = {count}, {placement}", recipe=recipe.with_queries(count, layers)) for count in counts]
    found += [
        Arm(name=f"last {summed_layers} layers", recipe=plain.with_queries(0, num_summed_layers=summed_layers)),
        Arm(
            name=f"last {summed_layers} layers, K = 8",
            recipe=recipe.with_queries(8, taps["spread"], num_summed_layers=summed_layers),
        ),
        Arm(
            name="feature concat",
            recipe=concatenated(recipe.with_queries(None, taps["spread"]), channels=concatenated_channels),
        ),
    ]
    return found


@dataclass(frozen=True, kw_only=True)
class ReconstructionOutcome:
    """Stage one of an arm with one seed.

    Attributes:
        arm: its name.
        seed: of weights, noise and order.
        psnr: mean over the test images, dB.
        ssim: likewise.
        bands: mean squared error by frequency, coarse to fine.
        block_sizes: of the bands, in pixels.
        gain: of the mean squared error over the first arm with the same seed, dB, with its error over images.
        band_gains: likewise, of each band.
        taps: what each tap does; None without queries.
        parameters: that are trained.
    """

    arm: str
    seed: int
    psnr: float
    ssim: float
    bands: tuple[float, ...]
    block_sizes: tuple[int, ...]
    gain: tuple[float, float]
    band_gains: tuple[tuple[float, float], ...]
    taps: TapReport | None
    parameters: int


def compare_reconstructions(
    chosen: Sequence[Arm],
    encoder: nn.Module,
    folder: Path,
    *,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    device: str = "cpu",
    block_sizes: Sequence[int],
    count: int | None = None,
    on_outcome: Callable[[ReconstructionOutcome, Reconstruction], None] = lambda outcome, made: None,
) -> list[ReconstructionOutcome]:
    """Train stage one of every arm with every seed, and measure it on the test images.

    Autoencoders are kept in ``folder`` by arm and seed; finished ones are taken from there.

    Args:
        chosen: the arms; gains are over the first.
        encoder: the frozen one of all.
        folder: of autoencoders.
        seeds: of the trainings.
        steps: of each, None for the recipe's.
        device: where they run.
        block_sizes: of the frequency bands, coarse to fine, ending with 1.
        count: test images, None for all.
        on_outcome: called with each outcome and its reconstructions.
    """
    outcomes: list[ReconstructionOutcome] = []
    for seed in seeds:
        baseline: BandErrors | None = None
        for arm in chosen:
            autoencoder = stage_one(arm, encoder, folder, seed=seed, steps=steps, device=device).model
            test = arm.recipe.test_images()
            made = measure_reconstruction(autoencoder, test, count=count, block_sizes=block_sizes)
            baseline = made.bands if baseline is None else baseline
            outcome = _outcome(arm, seed, autoencoder, made, baseline, test)
            outcomes.append(outcome)
            on_outcome(outcome, made)
    return outcomes


def stage_one(
    arm: Arm, encoder: nn.Module, folder: Path, *, seed: int, steps: int | None = None, device: str = "cpu"
) -> Trained[AutoencoderDecQ]:
    """An arm's autoencoder, trained or taken from the folder."""
    options = StageOptions(seed=seed, device=device, steps=steps)
    where = _folder_of(arm.autoencoder or arm.name, seed, folder)
    return autoencoder_stage(arm.recipe, encoder, arm.recipe.training_images(), where, options)


def _outcome(
    arm: Arm,
    seed: int,
    autoencoder: AutoencoderDecQ,
    made: Reconstruction,
    baseline: BandErrors,
    images: ImageDataset,
) -> ReconstructionOutcome:
    gain = made.bands.gain_db(baseline)
    trained = [p for name, p in autoencoder.named_parameters() if not name.startswith("encoder.")]
    return ReconstructionOutcome(
        arm=arm.name,
        seed=seed,
        psnr=made.psnr,
        ssim=made.ssim,
        bands=tuple(made.bands.mse.mean(0).tolist()),
        block_sizes=tuple(height for height, _ in made.bands.block_sizes),
        gain=(gain.value, gain.standard_error),
        band_gains=tuple((one.value, one.standard_error) for one in made.bands.gains_db(baseline)),
        taps=None if autoencoder.condensers is None else tap_report(autoencoder, _some(images, autoencoder)),
        parameters=sum(p.numel() for p in trained),
    )


def _some(images: ImageDataset, autoencoder: AutoencoderDecQ) -> Tensor:
    batch = images.batch(range(min(TAP_IMAGES, len(images)))).images
    return unit_images(batch).to(autoencoder.device)


@dataclass(frozen=True, kw_only=True)
class GenerationCurve:
    """Stage two of an arm with one seed.

    Attributes:
        arm: its name.
        seed: of weights, noise and order; the autoencoder is that of the same seed.
        steps: of training, where the distance was measured.
        epochs: passes over the images that these are.
        seconds: CPU time of training up to there, without measuring and saving, nor the first step of a process.
        frechet: distance of samples from the averaged weights to the training images.
        discarded: the last distance with the patches decoded by the plain autoencoder of the same patch latents and
            seed; None without query tokens, or where no such one stands before the arm.
    """

    arm: str
    seed: int
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    seconds: tuple[float, ...]
    frechet: tuple[float, ...]
    discarded: float | None = None


def compare_generation(
    chosen: Sequence[Arm],
    encoder: nn.Module,
    folder: Path,
    real: RealImages,
    *,
    generators: Path | None = None,
    seeds: Sequence[int] = (0,),
    reconstruction_steps: int | None = None,
    steps: int | None = None,
    every: int,
    count: int,
    sampling_steps: int,
    device: str = "cpu",
    on_curve: Callable[[GenerationCurve, Tensor], None] = lambda curve, images: None,
) -> list[GenerationCurve]:
    """Train a generator on the latents of every arm with every seed, and follow its Frechet distance.

    Args:
        chosen: the arms; the first one is the plain autoencoder. Where queries are discarded, patches are decoded by
            the plain one before the arm that sums as many layers.
        encoder: the frozen one of all.
        folder: of autoencoders, shared with :func:`compare_reconstructions`, and of their latents.
        real: what samples are compared with.
        generators: folder of generators, None for the same.
        seeds: of the trainings.
        reconstruction_steps: of stage one.
        steps: of stage two, None for the recipe's.
        every: training steps between measurements.
        count: samples of each.
        sampling_steps: of the scheduler's grid.
        device: where they run.
        on_curve: called with each curve and its last samples.

    Raises:
        ValueError: a first arm with queries.
    """
    if chosen[0].recipe.autoencoder_fields.get("num_queries") != 0:
        raise ValueError(f"the first arm, {chosen[0].name!r}, has queries; put the plain autoencoder first")
    curves: list[GenerationCurve] = []
    for seed in seeds:
        plain: dict[int, AutoencoderDecQ] = {}
        for arm in chosen:
            autoencoder = stage_one(arm, encoder, folder, seed=seed, steps=reconstruction_steps, device=device).model
            summed = autoencoder.config["num_summed_layers"]
            if autoencoder.condensers is None:
                plain[summed] = autoencoder
            where = _folder_of(arm.name, seed, generators or folder) / "generator"
            options = StageOptions(seed=seed, device=device, steps=steps)
            images = arm.recipe.training_images()
            cache = _folder_of(arm.autoencoder or arm.name, seed, folder) / "latents"
            latents = latent_stage(arm.recipe, autoencoder, images, cache, options)
            measure = _Measure(arm.recipe, autoencoder, real, count, sampling_steps, seed)
            follow = _FollowFrechet(measure, every, where / "curve.json")
            generator = generator_stage(arm.recipe, autoencoder, latents, where, options, callbacks=[follow]).model
            samples = torch.cat(list(measure.samples(generator)))
            discards = autoencoder.num_query_tokens > 0 and summed in plain
            discarded = measure(generator, patch_decoder=plain[summed]) if discards else None
            per_epoch = len(images) / arm.recipe.generation.training.batch_size
            curve = GenerationCurve(
                arm=arm.name,
                seed=seed,
                steps=tuple(follow.steps),
                epochs=tuple(step / per_epoch for step in follow.steps),
                seconds=tuple(follow.seconds),
                frechet=tuple(follow.frechet),
                discarded=discarded,
            )
            curves.append(curve)
            on_curve(curve, samples)
    return curves


def time_to_reach(curve: GenerationCurve, value: float, *, by: str = "steps") -> float | None:
    """Steps, epochs or seconds after which a curve is first at or below a value, on straight lines between its points.

    None where it never is.
    """
    times: Sequence[float] = getattr(curve, by)
    for index, distance in enumerate(curve.frechet):
        if distance <= value:
            if index == 0:
                return float(times[0])
            before = curve.frechet[index - 1]
            share = (before - value) / (before - distance)
            return times[index - 1] + share * (times[index] - times[index - 1])
    return None


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """How many times faster an arm is at the best distance of the plain autoencoder's generator.

    Attributes:
        arm: its name.
        by: what is counted: "steps", "epochs" or "seconds".
        ratios: for each seed, the plain one's time to its own best over the arm's to the same; None where the arm never
            gets there.
        censored: how many never do. All that is known of such a seed is that its ratio is below ``at_most``.
        at_most: for each seed that never does, the plain one's time over all of the arm's.
        mean: of the ratios, with its standard error (NaN for one seed); None where one is censored, since a mean of
            those that got there would be of the lucky ones.
    """

    arm: str
    by: str
    ratios: tuple[float | None, ...]
    censored: int
    at_most: tuple[float, ...]
    mean: tuple[float, float] | None


def convergence(
    curves: Sequence[GenerationCurve], plain: Sequence[GenerationCurve], *, by: str = "epochs"
) -> Convergence:
    """Of one arm's curves against those of the plain autoencoder with the same seeds.

    Raises:
        ValueError: no curves, or a seed that the plain autoencoder has no curve of.
    """
    theirs = {curve.seed: curve for curve in plain}
    lacking = sorted({curve.seed for curve in curves} - theirs.keys())
    if not curves or lacking:
        raise ValueError(f"{len(curves)} curves, and none of the plain autoencoder for seeds {lacking}; give both")
    ratios: list[float | None] = []
    at_most: list[float] = []
    for curve in curves:
        best = min(theirs[curve.seed].frechet)
        base, own = time_to_reach(theirs[curve.seed], best, by=by), time_to_reach(curve, best, by=by)
        assert base is not None
        ratios.append(None if own is None else base / own)
        if own is None:
            at_most.append(base / getattr(curve, by)[-1])
    reached = [ratio for ratio in ratios if ratio is not None]
    error = stdev(reached) / len(reached) ** 0.5 if len(reached) > 1 else float("nan")
    return Convergence(
        arm=curves[0].arm,
        by=by,
        ratios=tuple(ratios),
        censored=len(at_most),
        at_most=tuple(at_most),
        mean=None if at_most else (fmean(reached), error),
    )


@dataclass(frozen=True)
class _Measure:
    """The Frechet distance of a generator's samples."""

    recipe: LatentRecipe
    autoencoder: AutoencoderDecQ
    real: RealImages
    count: int
    sampling_steps: int
    seed: int

    def samples(
        self, generator: DecQTransformer2DModel, *, patch_decoder: AutoencoderDecQ | None = None
    ) -> Iterator[Tensor]:
        pipe = pipeline_of(self.recipe, self.autoencoder, generator, patch_decoder=patch_decoder)
        return draw_images(
            pipe,
            self.recipe.sampling,
            count=self.count,
            num_inference_steps=self.sampling_steps,
            seed=self.seed,
            discard_queries=patch_decoder is not None,
        )

    def __call__(self, generator: DecQTransformer2DModel, *, patch_decoder: AutoencoderDecQ | None = None) -> float:
        drawn = self.samples(generator, patch_decoder=patch_decoder)
        features = torch.cat([part.cpu() for part in self.real.extractor.batches(drawn, image_format="8-bit")])
        return frechet_distance(FeatureStatistics.from_features(features), self.real.statistics)


class _FollowFrechet(Callback):
    """Measures along the way; what was measured before an interruption is read again."""

    def __init__(self, measure: _Measure, every: int, path: Path) -> None:
        self.measure, self.every, self.path = measure, every, path
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.steps: list[int] = held.get("steps", [])
        self.seconds: list[float] = held.get("seconds", [])
        self.frechet: list[float] = held.get("frechet", [])
        self._at_checkpoint: dict[str, float] = held.get("checkpoint", {})
        self._clock: float | None = None
        self._elapsed = 0.0

    def on_step_end(self, run: Run) -> None:
        """Measure, if it is time."""
        now = time.process_time()
        if self._clock is None:
            self._go_on_from(run.step - 1)
        else:
            self._elapsed += now - self._clock
        if run.step % self.every == 0:
            with run.evaluating(GENERATOR) as network:
                assert isinstance(network, DecQTransformer2DModel)
                value = self.measure(network)
            self.steps.append(run.step)
            self.seconds.append(self._elapsed)
            self.frechet.append(value)
            self._write()
        self._clock = time.process_time()

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Note the time that a continuation starts with; of one that it starts with itself, nothing is lost."""
        starts = self._clock is None
        if starts:
            self._go_on_from(run.step)
        self._at_checkpoint = {"step": run.step, "seconds": self._elapsed}
        self._write()
        self._clock = None if starts else time.process_time()

    def _go_on_from(self, step: int) -> None:
        kept = sum(measured <= step for measured in self.steps)
        self.steps, self.seconds, self.frechet = self.steps[:kept], self.seconds[:kept], self.frechet[:kept]
        last = self.seconds[-1] if self.seconds else 0.0
        self._elapsed = self._at_checkpoint["seconds"] if self._at_checkpoint.get("step") == step else last

    def _write(self) -> None:
        curve = {"steps": self.steps, "seconds": self.seconds, "frechet": self.frechet}
        write_json(self.path, {**curve, "checkpoint": self._at_checkpoint})


def _folder_of(arm: str, seed: int, folder: Path) -> Path:
    return folder / f"{_slug(arm)}-{seed}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
