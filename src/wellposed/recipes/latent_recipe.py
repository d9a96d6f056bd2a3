"""Runs that end in images of a generator on the latents of a representation autoencoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wellposed.recipes.ddpm_recipe import FeatureEvaluation, FIDEvaluation
from wellposed.recipes.recipe import Actions, Recipe, RequiredFile, TrainingSettings

__all__ = [
    "EncoderSource",
    "GenerationSettings",
    "GuideSettings",
    "LatentRecipe",
    "LatentSamplingSettings",
    "ReconstructionSettings",
]

UNKNOWN = "no figure is known"


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """Where the frozen encoder comes from.

    Attributes:
        get: (folder of the run's encoder, the user's data folder, seed, device) -> the encoder, a model of
            transformers; it may train one and keep it in the folder.
        what: it is, in a few words, for the record.
        files: what the user has to get for it.
    """

    get: Callable[[Path, Path, int, str], Any]
    what: str
    files: tuple[RequiredFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings:
    """Stage one: queries, condensers and decoder, against a frozen encoder.

    Attributes:
        training: of the autoencoder.
        perceptual: (device, the user's data folder, the encoder) -> (reconstructions, images) -> one distance for each,
            images in [0, 1]; None for the L1 distance alone.
        perceptual_weight: of it.
        discriminator: (device, the user's data folder, the encoder) -> the network that judges; None for none.
        discriminator_training: of that.
        discriminator_start: first step at which it is trained.
        adversarial_start: first step at which the autoencoder is trained against it.
        adversarial_weight: of that term, beside the adaptive weight.
        encoder: "frozen"; or, as ablations, "finetune" trains it with the rest, and "distill" does that with a penalty
            on the distance of its patch tokens from those of a frozen copy.
        distillation_weight: of that penalty.
        files: what the user has to get for perceptual network and discriminator.
    """

    training: TrainingSettings
    perceptual: Callable[[str, Path, Any], Any] | None = None
    perceptual_weight: float = 1.0
    discriminator: Callable[[str, Path, Any], Any] | None = None
    discriminator_training: TrainingSettings | None = None
    discriminator_start: int = 0
    adversarial_start: int = 0
    adversarial_weight: float = 0.75
    encoder: Literal["frozen", "finetune", "distill"] = "frozen"
    distillation_weight: float = 1.0
    files: tuple[RequiredFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Stage two: flow matching on patch and query latents together.

    Attributes:
        training: of the generator.
        reduction: "separate" means of patches and queries, or one "joint" mean over all tokens.
        query_weight: of the queries' mean.
        time_law: of t before the shift, "logit_normal" or "uniform".
        shift_counts_queries: whether the numbers of the queries count for the time shift too.
        class_dropout: share of labels that are forgotten, for classifier-free guidance.
        cache: keep the latents in shards; without it images are encoded in every step.
        cache_dtype: name of the format in which they are kept.
    """

    training: TrainingSettings
    reduction: Literal["separate", "joint"] = "separate"
    query_weight: float = 1.0
    time_law: Literal["logit_normal", "uniform"] = "logit_normal"
    shift_counts_queries: bool = False
    class_dropout: float = 0.1
    cache: bool = True
    cache_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class GuideSettings:
    """A worse generator on the same latents, for AutoGuidance.

    Attributes:
        network: (autoencoder, classes) -> the network.
        training: how it is trained; shorter than the generator.
    """

    network: Callable[[Any, int], Any]
    training: TrainingSettings


@dataclass(frozen=True, kw_only=True)
class LatentSamplingSettings:
    """How images are drawn.

    Attributes:
        step_counts: what to evaluate at.
        num_inference_steps: where one number is asked for; the scheduler's grid says what it counts.
        solver: "euler" or "heun".
        grid: "points" as published, or "steps" (see ``ShiftedFlowScheduler``).
        guidance_scale: w; 1 for none. With a guide it is AutoGuidance, else classifier-free.
        guidance_interval: times between which guidance acts.
        batch_size: images drawn together.
    """

    step_counts: tuple[int, ...]
    num_inference_steps: int = 50
    solver: Literal["euler", "heun"] = "euler"
    grid: Literal["points", "steps"] = "points"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 64

    @property
    def guidance(self) -> str:
        """Of labels: "" for none, else ", w = 1.6", and the times within which it acts where these are not all."""
        if self.guidance_scale == 1:
            return ""
        low, high = self.guidance_interval
        times = "" if (low, high) == (0, 1) else f" for t in [{low:g}, {high:g}]"
        return f", w = {self.guidance_scale:g}{times}"


@dataclass(frozen=True, kw_only=True)
class LatentRecipe(Recipe):
    """A run of two stages: an autoencoder over a frozen encoder, then a generator on its latents.

    What it exports is a ``DecQPipeline``; the autoencoder alone is its ``vae``.

    Attributes:
        encoder: where the frozen encoder comes from.
        autoencoder: (encoder, further fields) -> the ``AutoencoderDecQ`` over it, untrained but for the encoder.
        autoencoder_fields: those further fields, as plain values: number of queries, taps, ...
        generator: (autoencoder, classes) -> the ``DecQTransformer2DModel``, untrained.
        dataset: (path of ``images``, or of the data folder) -> the training images, an ``ImageDataset``.
        reconstruction_dataset: likewise -> the images of stage one, where they are framed otherwise; None for the same.
        test_dataset: likewise -> images to reconstruct.
        reconstruction: stage one.
        generation: stage two.
        guide: a guide to train as well, or None.
        sampling: how images are drawn.
        evaluation: how they are scored.
        images: the images, where the user has to get them.
        variations: how it differs from the recipe that it was made from, in the words of :meth:`varied`.
        published: what to expect of the recipe's variants, by their variations, where that is known.
    """

    encoder: EncoderSource
    autoencoder: Callable[..., Any]
    generator: Callable[[Any, int], Any]
    dataset: Callable[[Path], Any]
    test_dataset: Callable[[Path], Any]
    reconstruction: ReconstructionSettings
    generation: GenerationSettings
    sampling: LatentSamplingSettings
    evaluation: FeatureEvaluation | FIDEvaluation
    autoencoder_fields: dict[str, Any] = field(default_factory=dict[str, Any])
    reconstruction_dataset: Callable[[Path], Any] | None = None
    guide: GuideSettings | None = None
    images: RequiredFile | None = None
    variations: frozenset[str] = frozenset()
    published: Mapping[frozenset[str], str] = field(default_factory=dict[frozenset[str], str])

    @property
    def options(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def training_images(self) -> Any:
        """The data set.

        Raises:
            FileNotFoundError: its files are missing.
        """
        return self.dataset(self._images_path())

    def reconstruction_images(self) -> Any:
        """The images of stage one.

        Raises:
            FileNotFoundError: their files are missing.
        """
        return (self.reconstruction_dataset or self.dataset)(self._images_path())

    def test_images(self) -> Any:
        """Images to reconstruct.

        Raises:
            FileNotFoundError: their files are missing.
        """
        return self.test_dataset(self._images_path())

    def _images_path(self) -> Path:
        return self.folder if self.images is None else self.images.found_in(self.folder)

    def required_files(self) -> tuple[RequiredFile, ...]:
        """Images, encoder, what judges reconstructions and what scores samples."""
        found = [] if self.images is None else [self.images]
        found += [*self.encoder.files, *self.reconstruction.files]
        if isinstance(self.evaluation, FIDEvaluation):
            found += [self.evaluation.reference, self.evaluation.inception]
        return tuple(found)

    def settings(self) -> dict[str, Any]:
        """Everything that is a plain value."""
        return {
            "encoder": self.encoder.what,
            "autoencoder": self.autoencoder_fields,
            "reconstruction": _plain(self.reconstruction),
            "generation": _plain(self.generation),
            "guide": None if self.guide is None else asdict(self.guide.training),
            "sampling": asdict(self.sampling),
            "evaluation": {"num_samples": self.evaluation.num_samples},
        }

    @property
    def actions(self) -> Actions:
        """Both stages; images of the second, scored beside reconstructions of the first."""
        from wellposed.recipes.latent_evaluate import score_latent, score_table
        from wellposed.recipes.latent_sample import sample_latent
        from wellposed.recipes.latent_train import train_latent

        return Actions(
            train=train_latent,
            sample=sample_latent,
            evaluate=lambda recipe, run, **chosen: score_table(score_latent(recipe, run, **chosen)),
        )

    def with_queries(
        self, num_queries: int | None, layers: Sequence[int] | None = None, **fields: Any
    ) -> "LatentRecipe":
        """The recipe with other queries and taps; 0 queries are a plain representation autoencoder.

        Args:
            num_queries: K, None for one for each patch.
            layers: taps, None for the recipe's.
            fields: further fields of the autoencoder, such as ``num_summed_layers``.
        """
        chosen = {**self.autoencoder_fields, "num_queries": num_queries, **fields}
        if layers is not None:
            chosen["condenser_layers"] = tuple(layers)
        held = self.autoencoder_fields.items()
        how = [f"{name} = {value}" for name, value in chosen.items() if (name, value) not in held]
        return self.varied(*how, autoencoder_fields=chosen)

    def varied(self, *how: str, **changes: Any) -> "LatentRecipe":
        """The recipe with other fields. Its summary says how it differs, and it expects what was published of that.

        Args:
            how: each variation in a few words; none where the recipe stays what it is.
            changes: fields.
        """
        if not how:
            return replace(self, **changes)
        variations = self.variations | set(how)
        expected = self.published.get(variations, UNKNOWN)
        summary = f"{self.summary}; here {', '.join(how)}"
        return replace(self, summary=summary, variations=variations, expected=expected, **changes)


def _plain(settings: Any) -> dict[str, Any]:
    """Fields that are values; of functions only whether there is one."""
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    return {
        name: asdict(value) if isinstance(value, TrainingSettings) else bool(value) if callable(value) else value
        for name, value in values.items()
        if name != "files"
    }
