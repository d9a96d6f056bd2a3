"""Whether pictures show what their captions said: a classifier of digit scenes, and the scores that it gives.

What the classifier gets of a picture is measured first, at a shorter side of 32 pixels: the ground, which is the median
of each channel; the distance d of each pixel from it, 1 at the largest; and, with max(0, d - 1/2) as weights, the mean
colour of the ink and its mean place. A square of d about that place goes through three convolutions to tell the digit;
ink and ground are told from the two colours, and the position from the place. So no property is judged by another: a
digit is as legible in any ink, on any ground and anywhere.

It is trained on scenes of the training split only (:func:`wellposed.data.digit_scenes.random_scenes`) and checked on
the test split: other handwriting, in combinations of digit, ink, place and ground that it has not met. What it gets
right there, on drawn pictures, is the ceiling of what any model can reach. Ask a model for scenes of the test split,
too: then no picture that it may have remembered is an answer.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate, silu
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from wellposed.data.digit_scenes import ATTRIBUTES, DigitScene, attributes, draw_all, random_scenes
from wellposed.evaluation.agreement import share_of_hits
from wellposed.evaluation.features import check_unit_range, hash_weights
from wellposed.evaluation.scores import Estimate
from wellposed.recipes.device import resolved_device
from wellposed.recipes.made_with import claim_folder
from wellposed.recipes.optimize import seeded_network
from wellposed.recipes.run_folder import is_main_process
from wellposed.training import PlannedBatches, Player, StepContext, TrainingConfig, derived_seed, train

__all__ = [
    "ALL",
    "AttributeClassifiers",
    "AttributeScore",
    "FollowingScores",
    "SceneClassifier",
    "SceneFeatures",
    "attribute_classifiers",
    "scene_features",
    "score_following",
]

ALL = "all"
"""Name of the score that counts pictures with every property right."""

WEIGHTS_FILE = "classifier.safetensors"
HITS = "hits_on_test_scenes"

SHORTER_SIDE = 32
WINDOW = 20  # a digit has 16
FAINTEST = 0.05  # the largest distance from the ground in a picture without a digit counts as no less

SIZES = ((32, 32), (48, 48), (64, 64), (32, 64), (64, 32), (32, 48), (48, 32))
TRAINING_SCENES = 6000
TEST_SCENES = 1200
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
LARGEST_NOISE = 0.1
LARGEST_SHIFT = 1.5


@dataclass(frozen=True, kw_only=True)
class SceneFeatures:
    """What is measured of pictures before anything is learned.

    Attributes:
        stroke: distance from the ground in a square about the ink, 0 to 1.
        place: mean place of the ink, in heights from above and widths from the left.
        ink: its mean colour.
        ground: median colour of the picture.
    """

    stroke: Float[Tensor, "batch 1 window window"]
    place: Float[Tensor, "batch 2"]
    ink: Float[Tensor, "batch 3"]
    ground: Float[Tensor, "batch 3"]


def scene_features(
    images: Float[Tensor, "batch 3 height width"], shift: Float[Tensor, "batch 2"] | None = None
) -> SceneFeatures:
    """Measure pictures of any shape.

    Args:
        images: about in [0, 1].
        shift: pixels, at a shorter side of 32, by which the square is beside the ink: down and to the right.
    """
    scale = SHORTER_SIDE / min(images.shape[-2:])
    size = [round(scale * length) for length in images.shape[-2:]]
    images = interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    ground = images.flatten(2).median(2).values
    distance = (images - ground[:, :, None, None]).square().sum(1).sqrt()
    distance = distance / distance.amax((1, 2), keepdim=True).clamp_min(FAINTEST)
    # The addend gives a picture without any ink a place: its middle.
    weights = (distance - 0.5).clamp_min(0) + 1e-6
    weights = weights / weights.sum((1, 2), keepdim=True)
    rows, columns = (torch.arange(length, device=images.device) + 0.5 for length in size)
    centre = torch.stack([(weights.sum(2) * rows).sum(1), (weights.sum(1) * columns).sum(1)], 1)
    return SceneFeatures(
        stroke=_windows(distance, centre if shift is None else centre + shift),
        place=centre / torch.tensor(size, device=images.device),
        ink=torch.einsum("bhw,bchw->bc", weights, images),
        ground=ground,
    )


def _windows(
    maps: Float[Tensor, "batch height width"], centres: Float[Tensor, "batch 2"]
) -> Float[Tensor, "batch 1 window window"]:
    offsets = torch.arange(WINDOW, device=maps.device) - (WINDOW - 1) / 2
    # In the units of grid_sample: -1 to 1 from border to border.
    rows, columns = (2 * (centres[:, axis, None] + offsets) / length - 1 for axis, length in enumerate(maps.shape[-2:]))
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1)
    return grid_sample(maps[:, None], grid, align_corners=False)


class SceneClassifier(nn.Module):
    """Logits of every property of a scene, from its features."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.of_stroke = nn.Linear(widths[-1] * (WINDOW // 4) ** 2, 64)
        self.of_place = nn.Linear(2, 64)
        self.of_colours = nn.Linear(6, 64)
        self.dropout = nn.Dropout(0.3)
        self.heads = nn.ModuleDict({name: nn.Linear(64, len(classes)) for name, classes in ATTRIBUTES.items()})

    def forward(self, features: SceneFeatures) -> dict[str, Float[Tensor, "batch _"]]:
        """By the names of the properties."""
        hidden = 2 * features.stroke - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = silu(norm(convolution(hidden)))
        stroke = silu(self.of_stroke(self.dropout(hidden.flatten(1))))
        # Few numbers, in [-4, 4]: from [-1, 1] the first layer takes several times as many steps to spread them.
        place = silu(self.of_place(8 * features.place - 4))
        colours = silu(self.of_colours(8 * torch.cat([features.ink, features.ground], 1) - 4))
        told_from = {"digit": stroke, "colour": colours, "position": place, "background": colours}
        return {name: head(told_from[name]) for name, head in self.heads.items()}

    @torch.no_grad()
    def classes(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch attributes"]:
        """The likeliest class of each property, in the order of ``ATTRIBUTES``, on the CPU."""
        logits = self(scene_features(images.to(self.of_place.weight)))
        return torch.stack([logits[name].argmax(1) for name in ATTRIBUTES], 1).cpu()


@dataclass(frozen=True, kw_only=True)
class AttributeClassifiers:
    """A trained classifier and what it got right where nothing was to be wished for.

    Attributes:
        network: the classifier.
        hits: on drawn pictures of test scenes, which properties it got right, in the order of ``ATTRIBUTES``.
    """

    network: SceneClassifier
    hits: Bool[Tensor, "scenes attributes"]

    @property
    def name(self) -> str:
        """What it is, with its weights' hash."""
        return f"scene classifier {hash_weights(self.network)[:8]}"

    def classes(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch attributes"]:
        """What pictures show, as indices into the names of ``ATTRIBUTES``.

        Args:
            images: of any shape, in [0, 1].

        Raises:
            ValueError: other than three channels, or values outside [0, 1].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; give (batch, 3, height, width)")
        check_unit_range(images)
        return self.network.classes(images)

    def accuracy(self, names: Sequence[str]) -> Estimate:
        """Share of drawn test scenes of which it got all these properties right."""
        return share_of_hits(self.hits[:, _columns(names)].all(1))


def attribute_classifiers(
    folder: str | Path,
    *,
    steps: int = 400,
    num_scenes: int = TRAINING_SCENES,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> AttributeClassifiers:
    """Train a classifier of scenes; a second call with the same folder loads what the first left.

    Pictures have seven sizes between 32 x 32 and 64 x 64 with ratios from 1:2 to 2:1, and some noise, as a model's.

    Args:
        folder: where its weights and checkpoints are kept.
        steps: training steps.
        num_scenes: to train on.
        seed: of its weights, the scenes and the noise.
        device: where it is trained and will run.
        progress: show a progress bar.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: the folder holds one that was trained otherwise, or a damaged file.
    """
    claim_folder(folder, {"steps": steps, "seed": seed, "scenes": num_scenes})
    path = Path(folder) / WEIGHTS_FILE
    network = seeded_network(SceneClassifier, seed)
    if path.is_file():
        hits = _load(network, path)
        network = network.to(resolved_device(device)).eval().requires_grad_(False)
        return AttributeClassifiers(network=network, hits=hits)
    train(
        Player(
            name="classifier",
            model=network,
            objective=_loss,
            optimizer=partial(AdamW, lr=LEARNING_RATE),
            lr_scheduler=partial(LambdaLR, lr_lambda=lambda step: (1 + math.cos(math.pi * step / steps)) / 2),
        ),
        PlannedBatches(dataset=_training_scenes(num_scenes, seed), batch_size=BATCH_SIZE, seed=seed),
        TrainingConfig(
            max_steps=steps, checkpoint_every=steps, keep_last=1, seed=seed, device=device, progress=progress
        ),
        folder,
    )
    network.eval().requires_grad_(False)
    scenes = random_scenes(TEST_SCENES, split="test", seed=seed)
    asked = _asked(scenes)
    hits = torch.cat([network.classes(images) == asked[rows] for rows, images in _drawn(scenes)])
    if is_main_process():
        _save(network, hits, path)
    return AttributeClassifiers(network=network, hits=hits)


@dataclass(frozen=True, kw_only=True)
class AttributeScore:
    """How often pictures show a property that was asked for.

    Attributes:
        share: of the pictures, with its binomial standard error.
        chance: what pictures of random scenes would reach.
        ceiling: what the classifier gets right of drawn pictures.
    """

    share: Estimate
    chance: float
    ceiling: Estimate


@dataclass(frozen=True, kw_only=True)
class FollowingScores:
    """How well pictures follow their captions.

    Attributes:
        count: pictures.
        judge: which classifier told.
        scores: by the names of the properties that were asked for; :data:`ALL` for those pictures that have them all.
    """

    count: int
    judge: str
    scores: Mapping[str, AttributeScore]

    def __str__(self) -> str:
        parts = (
            f"{name} {_percent(one.share)} % (chance {100 * one.chance:.3g}, drawn {100 * one.ceiling.value:.1f})"
            for name, one in self.scores.items()
        )
        return f"{', '.join(parts)}; n={self.count}, {self.judge}"


def score_following(
    images: Float[Tensor, "n 3 height width"] | Iterable[Float[Tensor, "_ 3 _ _"]],
    scenes: Sequence[DigitScene],
    classifiers: AttributeClassifiers,
    *,
    asked: Sequence[str] = tuple(ATTRIBUTES),
) -> FollowingScores:
    """Compare pictures with the scenes whose captions they were drawn from.

    Args:
        images: in [0, 1], of any shape; or batches of them, each of a shape of its own.
        scenes: one for each image, in their order.
        classifiers: which tell what the pictures show.
        asked: the properties that the captions spoke of: ``mentioned(style)``. Others are not scored.

    Raises:
        ValueError: other counts of images and scenes, none at all, an unknown property, or images that are no pictures
            (see :meth:`AttributeClassifiers.classes`).
    """
    columns = _columns(asked)
    batches = images.split(256) if isinstance(images, Tensor) else images
    found = [classifiers.classes(batch) for batch in batches if len(batch)]
    count = sum(map(len, found))
    if not count or count != len(scenes):
        raise ValueError(f"{count} images and {len(scenes)} scenes; give one scene for each image, and at least one")
    hits = (torch.cat(found) == _asked(scenes))[:, columns]
    scores = {
        name: AttributeScore(
            share=share_of_hits(hits[:, i]), chance=1 / len(ATTRIBUTES[name]), ceiling=classifiers.accuracy([name])
        )
        for i, name in enumerate(asked)
    }
    together = AttributeScore(
        share=share_of_hits(hits.all(1)),
        chance=math.prod(one.chance for one in scores.values()),
        ceiling=classifiers.accuracy(asked),
    )
    return FollowingScores(count=count, judge=classifiers.name, scores={**scores, ALL: together})


@dataclass(frozen=True, kw_only=True)
class _LabelledFeatures:
    """A training batch: features of scenes, and their classes in the order of ``ATTRIBUTES``."""

    features: SceneFeatures
    classes: Int[Tensor, "batch attributes"]


@dataclass(frozen=True, kw_only=True)
class _TrainingScenes:
    """Noisy scenes, measured once."""

    everything: _LabelledFeatures
    seed: int

    def __len__(self) -> int:
        return len(self.everything.classes)

    def batch(self, indices: Int[Tensor, "batch"], *, epoch: int = 0) -> _LabelledFeatures:
        features = self.everything.features
        chosen = {field.name: getattr(features, field.name)[indices] for field in fields(features)}
        return _LabelledFeatures(features=SceneFeatures(**chosen), classes=self.everything.classes[indices])

    def fingerprint(self) -> str:
        return f"{len(self)} digit scenes, seed {self.seed}"


def _training_scenes(count: int, seed: int) -> _TrainingScenes:
    """Scenes of the training split, with noise and with the square about the ink somewhat beside it."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "noise"))
    scenes = random_scenes(count, seed=seed)
    measured: list[SceneFeatures] = []
    order: list[int] = []
    for rows, images in _drawn(scenes):
        order += rows
        deviation = LARGEST_NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
        noisy = images + deviation * torch.randn(images.shape, generator=generator)
        shift = LARGEST_SHIFT * (2 * torch.rand(len(images), 2, generator=generator) - 1)
        measured.append(scene_features(noisy, shift))
    names = [field.name for field in fields(SceneFeatures)]
    together = {name: torch.cat([getattr(one, name) for one in measured]) for name in names}
    everything = _LabelledFeatures(features=SceneFeatures(**together), classes=_asked(scenes)[order])
    return _TrainingScenes(everything=everything, seed=seed)


def _drawn(scenes: Sequence[DigitScene]) -> Iterator[tuple[list[int], Float[Tensor, "_ 3 _ _"]]]:
    """Places in the sequence and pictures of them, in [0, 1], by sizes; the sizes take turns."""
    for first, (height, width) in enumerate(SIZES):
        rows = list(range(first, len(scenes), len(SIZES)))
        yield rows, draw_all([scenes[row] for row in rows], height, width) / 255


def _asked(scenes: Sequence[DigitScene]) -> Int[Tensor, "scenes attributes"]:
    return torch.tensor([list(attributes(scene).values()) for scene in scenes])


def _columns(names: Sequence[str]) -> list[int]:
    known = list(ATTRIBUTES)
    if not names or not set(names) <= set(known):
        raise ValueError(f"the properties asked for are {list(names)}; give some of {', '.join(known)}")
    return [known.index(name) for name in names]


def _loss(
    models: Mapping[str, nn.Module], batch: _LabelledFeatures, context: StepContext
) -> tuple[Tensor, dict[str, Tensor]]:
    logits = models[context.player](batch.features)
    losses = {name: cross_entropy(logits[name], batch.classes[:, i]) for i, name in enumerate(ATTRIBUTES)}
    return torch.stack(list(losses.values())).sum(), losses


def _save(network: SceneClassifier, hits: Bool[Tensor, "scenes attributes"], path: Path) -> None:
    partial_file = path.with_name(f".{path.name}")
    weights = {name: weight.cpu().contiguous() for name, weight in network.state_dict().items()}
    save_file({**weights, HITS: hits}, partial_file)
    partial_file.replace(path)


def _load(network: SceneClassifier, path: Path) -> Bool[Tensor, "scenes attributes"]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to train the classifier again") from error
    hits = tensors.pop(HITS)
    network.load_state_dict(tensors)
    return hits


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} +- {100 * share.standard_error:.1f}"
