"""Runs that end in a model that draws what a prompt says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wellposed.recipes.recipe import Actions, Recipe, RequiredFile, TrainingSettings

__all__ = [
    "FollowingEvaluation",
    "LoraSettings",
    "PretrainingStage",
    "Source",
    "T2ISamplingSettings",
    "TextToImageRecipe",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a part of the run comes from: its captioned images, its autoencoder, its text encoder.

    Attributes:
        get: (folder for it in the run, the user's data folder, what it is made for, seed, device) -> the part. It may
            make one and keep it in the folder; a second call finds it there.
        what: it is, in a few words, for the record.
        files: what the user has to get for it.
    """

    get: Callable[[Path, Path, Any, int, str], Any]
    what: str
    files: tuple[RequiredFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A low-rank adapter (arXiv 2106.09685) beside the projections of attention of both streams.

    Attributes:
        rank: r.
        alpha: the adapter is scaled by alpha / r.
        mlps: also beside the matrices of the MLPs, for 2.8 times the parameters.
    """

    rank: int = 64
    alpha: float | int = 64
    mlps: bool = False


@dataclass(frozen=True, kw_only=True)
class PretrainingStage:
    """One stage of pre-training; each goes on from the averaged weights of the one before.

    Attributes:
        name: of its folder.
        buckets: () -> the ``Buckets``: sizes of images, and how many make a share.
        shares: of a step: ranks times accumulated shares. Each share has images of one bucket.
        training: how long and how fast; its ``batch_size`` is the mean number of images of a step. Images that a rank
            computes at a time are those of a share.
        weighting: "share": all shares weigh the same, so that an image of four times the area weighs four times as much
            where a quarter of them make a share (as published, by our reading); "token": all tokens do.
        caption_dropout: share of images learned without text.
        time_std: of logit t.
        sample_posterior: draw latents from the autoencoder's posterior, instead of its mode.
        gradient_checkpointing: compute blocks again in the backward pass instead of keeping them.
        adapter: train this alone, beside weights that stay as they are; None to train these.

    Raises:
        ValueError: ``training.samples_at_a_time``.
    """

    name: str
    buckets: Callable[[], Any]
    shares: int
    training: TrainingSettings
    weighting: Literal["share", "token"] = "share"
    caption_dropout: float = 0.1
    time_std: float = 1.0
    sample_posterior: bool = True
    gradient_checkpointing: bool = False
    adapter: LoraSettings | None = None

    def __post_init__(self) -> None:
        if self.training.samples_at_a_time is not None:
            raise ValueError(
                f"stage {self.name!r} has training.samples_at_a_time = {self.training.samples_at_a_time}, but a rank "
                "computes a share at a time; leave it out, and give buckets of smaller batch_sizes and more shares"
            )

    def settings(self) -> dict[str, Any]:
        """Fields that are values, and the sizes.

        Raises:
            ValueError: a mean number of images that no mixture of these buckets has.
        """
        buckets = self.buckets()
        counts = [self.shares * size for size in buckets.batch_sizes.values()]
        if not min(counts) <= self.training.batch_size <= max(counts):
            raise ValueError(
                f"stage {self.name!r} has training.batch_size = {self.training.batch_size}, but {self.shares} shares "
                f"of its buckets are {min(counts)} to {max(counts)} images; give one of these, or change shares or "
                "buckets, which say how many are computed"
            )
        shapes = {base: [list(size) for size in sizes] for base, sizes in buckets.by_base.items()}
        values = {name: value for name, value in asdict(self).items() if name != "buckets"}
        return {**values, "shapes": shapes, "batch_sizes": dict(buckets.batch_sizes)}


@dataclass(frozen=True, kw_only=True)
class T2ISamplingSettings:
    """How images are drawn.

    Attributes:
        size: height and width.
        num_inference_steps: T.
        guidance_scale: w; 1 for none.
        batch_size: images drawn together.
    """

    size: tuple[int, int]
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class FollowingEvaluation:
    """Whether pictures show what their prompts say, told by classifiers.

    Attributes:
        prompts: (count, style, language, seed) -> scenes that none of the training pictures shows, prompts that
            describe them, and the names of the properties that these prompts speak of.
        judge: (folder for it in the run, seed, device) -> a function of (batches of images in [0, 1], scenes, names of
            properties) -> ``FollowingScores``.
        num_samples: prompts of each kind.
        guidance_scales: to evaluate at.
        sizes: heights and widths to evaluate at.
        styles: of prompts.
        languages: of prompts.
    """

    prompts: Callable[[int, str, str, int], tuple[Sequence[Any], list[str], tuple[str, ...]]]
    judge: Callable[[Path, int, str], Callable[[Any, Sequence[Any], tuple[str, ...]], Any]]
    num_samples: int
    guidance_scales: tuple[float, ...] = (1.0,)
    sizes: tuple[tuple[int, int], ...] = ()
    styles: tuple[str, ...] = ("dense",)
    languages: tuple[str, ...] = ("en",)


@dataclass(frozen=True, kw_only=True)
class TextToImageRecipe(Recipe):
    """A run from captioned images to a model that draws.

    What it exports is a ``LensPipeline``.

    Attributes:
        corpus: -> the training images and captions, at any size; made for the recipe itself.
        autoencoder: -> the frozen autoencoder, see ``wellposed.lens.latents.Autoencoder``; made for the corpus.
        text_encoder: -> the frozen ``LensTextEncoder``; made for the corpus. Or a ``BaseTextEncoder``, that of a
            pipeline which the run goes on from and its own pipeline refers to.
        network: (autoencoder, text encoder) -> the ``LensTransformer2DModel``, untrained; None for the one of the
            pipeline that the run goes on from.
        stages: of pre-training, one or more.
        sampling: how images are drawn.
        evaluation: how they are scored; None where only people judge.
        caption_style: of the captions trained on, or shares of several.
        languages: of the captions trained on, in equal shares.
        cache_features: keep text features on disk, so that every caption is encoded once.
        shown: prompts of the pictures that each checkpoint leaves.
        shown_captions: how many captions of the corpus are drawn beside them.

    Raises:
        ValueError: no stage, or several without a network: what is trained of another pipeline is kept at the end.
    """

    corpus: Source
    autoencoder: Source
    text_encoder: Source
    stages: tuple[PretrainingStage, ...]
    sampling: T2ISamplingSettings
    network: Callable[[Any, Any], Any] | None = None
    evaluation: FollowingEvaluation | None = None
    caption_style: str | Mapping[str, float] = "dense"
    languages: tuple[str, ...] = ("en",)
    cache_features: bool = True
    shown: tuple[str, ...] = field(default_factory=tuple[str, ...])
    shown_captions: int = 0

    def __post_init__(self) -> None:
        if not self.stages or (self.network is None and len(self.stages) > 1):
            raise ValueError(
                f"{self.name} has {len(self.stages)} stages; give at least one, and one alone where the run goes on "
                "from another pipeline"
            )

    @property
    def options(self) -> frozenset[str]:
        """A prompt."""
        return frozenset({"prompt"})

    def required_files(self) -> tuple[RequiredFile, ...]:
        """Captioned images, autoencoder, text encoder."""
        files = (*self.corpus.files, *self.autoencoder.files, *self.text_encoder.files)
        return tuple(dict.fromkeys(files))  # a pipeline holds more than one part

    def settings(self) -> dict[str, Any]:
        """Everything that is a plain value."""
        scored = None
        if self.evaluation is not None:
            scored = {
                name: getattr(self.evaluation, name)
                for name in ("num_samples", "guidance_scales", "sizes", "styles", "languages")
            }
        return {
            "corpus": self.corpus.what,
            "autoencoder": self.autoencoder.what,
            "text_encoder": self.text_encoder.what,
            "caption_style": self.caption_style,
            "languages": self.languages,
            "stages": [stage.settings() for stage in self.stages],
            "sampling": asdict(self.sampling),
            "evaluation": scored,
        }

    @property
    def actions(self) -> Actions:
        """Every stage; pictures of prompts, scored by what they show."""
        from wellposed.recipes.t2i_evaluate import score_t2i
        from wellposed.recipes.t2i_sample import sample_t2i
        from wellposed.recipes.t2i_train import train_t2i

        return Actions(train=train_t2i, sample=sample_t2i, evaluate=score_t2i)
