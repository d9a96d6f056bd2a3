r"""Classifier guidance with every covariance, measured where the exact answer is known and on a trained network.

With a classifier p(y | x_t) there are two ways to guide, and the covariance enters both:

* ``shift`` (2105.05233, algorithm 1): the step's mean moves by ``scale Sigma grad log p(y | x_t)`` and the noise keeps
  the covariance of the unguided step. First-order: at few steps the shift is not that of the conditional chain, and
  seeing y also changes the covariance, which this form ignores.
* ``posterior``: the classifier is part of the denoiser. ``E[x_0 | x_t, y] = E[x_0 | x_t] + (sigma^2 / alpha) grad
  log p(y | x_t)``, and the Jacobian of that field is the covariance of x_0 given x_t *and* y, classifier's curvature
  included. At scale 1 the full covariance of this field is exact: the conditional chain is matched to second moments.

At scale w > 1 the guided field is the posterior mean of no law, ``p(y | x_t)^w`` being no noised classifier. All
covariances then agree in the limit of many steps only, and not on the conditional law.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wellposed.batches import ImageBatch
from wellposed.data.bundled import digits
from wellposed.denoisers import ClassifierGuidance, Denoiser
from wellposed.evaluation.agreement import class_agreement
from wellposed.evaluation.distribution_distance import energy_distance
from wellposed.evaluation.features import FeatureExtractor, SmallConvNet, unit_images
from wellposed.evaluation.frechet import FeatureStatistics, frechet_distance, frechet_distance_from_features
from wellposed.evaluation.scores import Estimate
from wellposed.lgs.baselines import FixedSmall
from wellposed.lgs.path_kl import anisotropic_mixture
from wellposed.lgs.reverse import CovarianceDraw, ReverseCovariance, ReversePoint, StepCost
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings, sample
from wellposed.paths import GaussianPath, from_scheduler
from wellposed.recipes.ddpm_draw import linear_trajectory
from wellposed.training import PlannedBatches, Player, StepContext, TrainingConfig, train
from wellposed.training.context import derived_seed

__all__ = [
    "MIXTURE_VARIANTS",
    "CovarianceShape",
    "GuidanceForm",
    "GuidedDigits",
    "GuidedDigitsRow",
    "GuidedMixture",
    "GuidedMixtureRow",
    "GuidedVariant",
    "ShapedCovariance",
    "guided_digits_study",
    "guided_mixture_study",
    "train_noisy_classifier",
]

GuidanceForm = Literal["shift", "posterior"]
CovarianceShape = Literal["full", "diagonal", "isotropic", "beta_tilde"]
LogProb = Callable[[Tensor, float], Tensor]

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class ShapedCovariance:
    """The exact posterior covariance cut down to its diagonal or to its mean eigenvalue, both dependent on x_t.

    What the best conceivable diagonal or isotropic method would use. The diagonal takes one product for each dimension:
    for targets of a few dimensions.
    """

    shape: Literal["diagonal", "isotropic"]

    @property
    def needs_products(self) -> bool:
        """Always."""
        return True

    def variance(self, point: ReversePoint) -> Float[Tensor, "batch dim"]:
        """Of each coordinate."""
        product, dim = point.covariance_product(), point.x_t[0].numel()
        unit = torch.eye(dim, dtype=point.x_t.dtype, device=point.x_t.device)
        columns = [product(unit[i].expand_as(point.x_t))[:, i] for i in range(dim)]
        # A guided field's "covariance" may be indefinite; the step's is not less than its floor.
        diagonal = torch.stack(columns, dim=1).clamp_min(0)
        if self.shape == "isotropic":
            diagonal = diagonal.mean(dim=1, keepdim=True).expand_as(diagonal)
        return point.bridge.variance + point.bridge.x_0_weight**2 * diagonal

    def draw(self, z: Float[Tensor, "batch dim"], point: ReversePoint, memory: Any = None) -> CovarianceDraw:
        """sqrt(variance) z."""
        return CovarianceDraw(noise=self.variance(point).sqrt() * z, cost=StepCost(products=z[0].numel()))

    def multiply(self, v: Float[Tensor, "batch dim"], point: ReversePoint) -> Float[Tensor, "batch dim"]:
        """variance v."""
        return self.variance(point) * v


@dataclass(frozen=True)
class _SplitCovariance:
    """One covariance for the noise, another for the guidance shift, to see which of the two matters."""

    noise: ReverseCovariance
    shift: ReverseCovariance

    @property
    def needs_products(self) -> bool:
        """If either does."""
        return self.noise.needs_products or self.shift.needs_products

    def draw(self, z: Float[Tensor, "batch *shape"], point: ReversePoint, memory: Any = None) -> CovarianceDraw:
        """That of ``noise``."""
        return self.noise.draw(z, point, memory)

    def multiply(self, v: Float[Tensor, "batch *shape"], point: ReversePoint) -> Float[Tensor, "batch *shape"]:
        """That of ``shift``."""
        return self.shift.multiply(v, point)


@dataclass(frozen=True, kw_only=True)
class GuidedVariant:
    """A way to guide: the form, the noise's covariance, and the mean shift's (None: that of the noise)."""

    form: GuidanceForm
    noise: CovarianceShape
    shift: CovarianceShape | None = None

    @property
    def name(self) -> str:
        """For tables: "posterior, full", or "shift, full (shift by isotropic)"."""
        return f"{self.form}, {self.noise}" + (f" (shift by {self.shift})" if self.shift else "")


MIXTURE_VARIANTS = (
    *(GuidedVariant(form="posterior", noise=shape) for shape in ("full", "diagonal", "isotropic", "beta_tilde")),
    *(GuidedVariant(form="shift", noise=shape) for shape in ("full", "diagonal", "isotropic", "beta_tilde")),
    *(GuidedVariant(form="shift", noise="full", shift=shape) for shape in ("diagonal", "isotropic")),
)


@dataclass(frozen=True, kw_only=True)
class GuidedMixtureRow:
    """One variant at one number of steps and one scale.

    Attributes:
        variant: how it was guided.
        steps: T.
        scale: guidance scale.
        distance: energy distance to the exact conditional law; unbiased, so 0 within its error is as good as exact.
        limit_distance: to the same guided field run in many steps, which is what few steps try to reach at scale > 1;
            None where it was not asked for.
        agreement: mean of the exact p(y | x_0) over the samples.
    """

    variant: GuidedVariant
    steps: int
    scale: float
    distance: Estimate
    limit_distance: Estimate | None
    agreement: float


@dataclass(frozen=True, kw_only=True)
class GuidedMixture:
    """Rows, and what the exact conditional law itself scores in agreement."""

    rows: tuple[GuidedMixtureRow, ...]
    exact_agreement: float


def guided_mixture_study(
    step_counts: Sequence[int] = (10, 25, 50),
    scales: Sequence[float] = (1.0, 2.0, 5.0),
    *,
    num_samples: int = 4000,
    seed: int = 0,
    variants: Sequence[GuidedVariant] = MIXTURE_VARIANTS,
    components: Sequence[int] = (0, 2),
    limit_steps: int | None = None,
) -> GuidedMixture:
    """Guided sampling of an anisotropic mixture in the plane with the exact classifier p(y | x_t).

    The class y is a set of the mixture's components, so that the conditional law p(x_0 | y) is a mixture too. Mean,
    covariance and classifier are exact: whatever distance remains is the sampler's. All variants start from
    the same noise. The schedule is DDPM's linear one.

    Args:
        step_counts: numbers T of reverse steps.
        scales: guidance scales.
        num_samples: for each row and for the reference.
        seed: of everything drawn.
        variants: ways to guide.
        components: the class.
        limit_steps: also compare with the posterior form, full covariance, at this many steps.
    """
    oracle = anisotropic_mixture(_linear_path())
    denoiser = cast(Denoiser, oracle)
    chosen = list(components)

    def log_prob(x_t: Tensor, t: float) -> Tensor:
        return torch.logsumexp(oracle.component_log_prob(x_t, t)[:, chosen], dim=-1)

    def agreement(x_0: Tensor) -> float:
        return float(log_prob(x_0, 0.0).exp().mean())

    def draw(variant: GuidedVariant, steps: int, scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(seed, "guided mixture", steps))
        start = torch.randn(num_samples, 2, generator=generator, dtype=torch.float64)
        return _guided_sample(
            denoiser, start, steps, _exact_covariance(variant), variant.form, log_prob, scale, generator, clip=None
        )

    reference, _ = oracle.restricted_to(chosen).sample(
        num_samples, generator=torch.Generator().manual_seed(derived_seed(seed, "conditional law"))
    )
    rows: list[GuidedMixtureRow] = []
    for scale in scales:
        limit = None if limit_steps is None else draw(MIXTURE_VARIANTS[0], limit_steps, scale)
        for steps in step_counts:
            for variant in variants:
                samples = draw(variant, steps, scale)
                rows.append(
                    GuidedMixtureRow(
                        variant=variant,
                        steps=steps,
                        scale=scale,
                        distance=energy_distance(samples, reference),
                        limit_distance=None if limit is None else energy_distance(samples, limit),
                        agreement=agreement(samples),
                    )
                )
    return GuidedMixture(rows=tuple(rows), exact_agreement=agreement(reference))


def _linear_path() -> GaussianPath:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return from_scheduler(DDPMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS))


def _exact_covariance(variant: GuidedVariant) -> ReverseCovariance:
    """In two dimensions two products are the whole covariance."""
    exact = LanczosSettings(num_lanczos_steps=2, isotropic_below_snr=0.0, max_variance=None)

    def of(shape: CovarianceShape) -> ReverseCovariance:
        match shape:
            case "full":
                return LanczosCovariance(exact)
            case "diagonal" | "isotropic":
                return ShapedCovariance(shape)
            case "beta_tilde":
                return FixedSmall()

    return of(variant.noise) if variant.shift is None else _SplitCovariance(of(variant.noise), of(variant.shift))


def _guided_sample(
    denoiser: Denoiser,
    start: Float[Tensor, "batch *shape"],
    steps: int,
    covariance: ReverseCovariance,
    form: GuidanceForm,
    log_prob: LogProb,
    scale: float,
    generator: torch.Generator,
    *,
    clip: float | None,
) -> Float[Tensor, "batch *shape"]:
    count = denoiser.path.num_train_timesteps or NUM_TRAIN_TIMESTEPS
    times = [(index + 1) / count for index in linear_trajectory(count, steps)]
    if form == "posterior":
        guided = ClassifierGuidance(denoiser=denoiser, log_prob=log_prob, scale=scale)
        return sample(guided, start, times, covariance, generator=generator, clip=clip)[0]
    return sample(
        denoiser,
        start,
        times,
        covariance,
        generator=generator,
        clip=clip,
        log_prob_gradient=lambda x, t: torch.func.grad(lambda at: log_prob(at, t).sum())(x),
        guidance_scale=scale,
    )[0]


@dataclass(frozen=True, kw_only=True)
class GuidedDigitsRow:
    """One way to guide on digits.

    Attributes:
        form: how the classifier enters.
        num_lanczos_steps: m: 3 is the full covariance, 1 an isotropic one that depends on x_t, 0 is beta-tilde.
        steps: T.
        scale: guidance scale.
        agreement: share of images that a second classifier, trained on clean images apart from the guiding one, takes
            for the digit asked for.
        frechet: Frechet distance of all images, every digit equally often, to the training images.
        seconds: wall-clock time for one image.
    """

    form: GuidanceForm
    num_lanczos_steps: int
    steps: int
    scale: float
    agreement: Estimate
    frechet: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class GuidedDigits:
    """Rows, and what real images score: agreement of held-out ones, Frechet distance of training ones to the rest."""

    rows: tuple[GuidedDigitsRow, ...]
    real_agreement: Estimate
    floor: float


def train_noisy_classifier(
    folder: str | Path, path: GaussianPath, *, size: int = 8, steps: int = 600, seed: int = 0, device: str = "cpu"
) -> SmallConvNet:
    """A classifier p(y | x_t, t) of noised digits, trained by the one loop; a finished one is loaded.

    Args:
        folder: where its checkpoint lies.
        path: the denoiser's; it must come from a discrete schedule.
        size: side of the images.
        steps: training steps.
        seed: of its weights, the noise and the order of the data.
        device: where it is trained and will run.

    Raises:
        ValueError: a path in continuous time.
    """
    count = path.num_train_timesteps
    if count is None:
        raise ValueError(
            "the path has no training steps; give that of a discrete schedule: from_scheduler(DDPMScheduler())"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "noisy classifier"))
        net = SmallConvNet(in_channels=1, num_classes=10, time_conditional=True)

    def objective(
        models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        t = ((context.uniform(stratified=True) * count).long() + 1).double() / count
        x_t = path.add_noise(batch.images, context.normal(tuple(batch.images.shape[1:])), t)
        logits = models[context.player](x_t, t.to(x_t.device, x_t.dtype))
        return nn.functional.cross_entropy(logits, batch.labels), {}

    train(
        Player(name="noisy_classifier", model=net, objective=objective, optimizer=partial(torch.optim.AdamW, lr=2e-3)),
        PlannedBatches(dataset=digits(size, split="train"), batch_size=128, seed=seed, incomplete="wrap"),
        TrainingConfig(max_steps=steps, checkpoint_every=steps, keep_last=1, seed=seed, device=device, progress=False),
        folder,
    )
    return net.eval().requires_grad_(False)


def guided_digits_study(
    denoiser: Denoiser,
    classifier: SmallConvNet,
    extractor: FeatureExtractor,
    *,
    step_counts: Sequence[int] = (10, 25, 50),
    scales: Sequence[float] = (1.0, 2.0, 5.0),
    lanczos_steps: Sequence[int] = (3, 1, 0),
    forms: Sequence[GuidanceForm] = ("posterior", "shift"),
    num_samples: int = 1000,
    batch_size: int = 250,
    seed: int = 0,
) -> GuidedDigits:
    """Guided digits, every class equally often, with the covariances of m Lanczos steps.

    Args:
        denoiser: trained on scikit-learn's digits in [-1, 1].
        classifier: of noised digits, see :func:`train_noisy_classifier`.
        extractor: trained on clean digits (:func:`wellposed.recipes.digit_features.digit_features`). It judges
            agreement too, through the nearest class mean of its features.
        step_counts: numbers T of reverse steps.
        scales: guidance scales.
        lanczos_steps: values of m.
        forms: how the classifier enters.
        num_samples: for each row, a multiple of 10.
        batch_size: drawn together.
        seed: of everything drawn.

    Raises:
        ValueError: ``num_samples`` is no multiple of 10.
    """
    if num_samples < 10 or num_samples % 10:
        raise ValueError(
            f"num_samples is {num_samples}; give a multiple of 10, so that every digit comes equally often"
        )
    device = next(classifier.parameters()).device
    side = digits(8).batch([0]).images.shape[-1]
    judge = _Judge.of(extractor, side)
    labels = torch.arange(num_samples) % 10

    def drawn(form: GuidanceForm, products: int, steps: int, scale: float) -> tuple[Tensor, float]:
        images: list[Tensor] = []
        began = time.perf_counter()
        for start in range(0, num_samples, batch_size):
            wanted = labels[start : start + batch_size].to(device)
            generator = torch.Generator(device).manual_seed(derived_seed(seed, "guided digits", steps, start))
            noise = torch.randn(len(wanted), 1, side, side, generator=generator, device=device)
            covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=products))
            log_prob = partial(_class_log_prob, classifier, wanted)
            images.append(
                _guided_sample(denoiser, noise, steps, covariance, form, log_prob, scale, generator, clip=1.0).cpu()
            )
        return unit_images(torch.cat(images)), (time.perf_counter() - began) / num_samples

    rows: list[GuidedDigitsRow] = []
    for steps in step_counts:
        for scale in scales:
            for form in forms:
                for products in lanczos_steps:
                    images, seconds = drawn(form, products, steps, scale)
                    agreement, frechet = judge.scores(images, labels)
                    rows.append(
                        GuidedDigitsRow(
                            form=form,
                            num_lanczos_steps=products,
                            steps=steps,
                            scale=scale,
                            agreement=agreement,
                            frechet=frechet,
                            seconds=seconds,
                        )
                    )
    return GuidedDigits(rows=tuple(rows), real_agreement=judge.real_agreement, floor=judge.floor(num_samples, seed))


def _class_log_prob(
    classifier: SmallConvNet, labels: Int[Tensor, " batch"], x_t: Float[Tensor, "batch *shape"], t: float
) -> Float[Tensor, " batch"]:
    times = torch.full((len(x_t),), t, dtype=x_t.dtype, device=x_t.device)
    return classifier(x_t, times).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Scores images by features: distance to the training images, and the class whose mean is nearest."""

    extractor: FeatureExtractor
    features: Tensor
    known_labels: Tensor
    class_means: Tensor
    reference: FeatureStatistics
    real_agreement: Estimate

    @classmethod
    def of(cls, extractor: FeatureExtractor, side: int) -> "_Judge":
        known, known_labels = _features(extractor, side, "train")
        held_out, held_out_labels = _features(extractor, side, "test")
        means = torch.stack([known[known_labels == label].mean(dim=0) for label in range(10)])
        return cls(
            extractor=extractor,
            features=known,
            known_labels=known_labels,
            class_means=means,
            reference=FeatureStatistics.from_features(known),
            real_agreement=class_agreement(-torch.cdist(held_out, means), held_out_labels),
        )

    def scores(self, images: Tensor, labels: Tensor) -> tuple[Estimate, float]:
        """Agreement and Frechet distance."""
        features = self.extractor(images).cpu().double()
        statistics = FeatureStatistics.from_features(features)
        return class_agreement(-torch.cdist(features, self.class_means), labels), frechet_distance(
            statistics, self.reference
        )

    def floor(self, count: int, seed: int) -> float:
        """What training images score against the others, every digit equally often, as near to ``count`` as half allow.

        Balanced like the samples: in a random draw the classes' shares fluctuate, which alone would outweigh the rest.
        """
        generator = torch.Generator().manual_seed(derived_seed(seed, "floor"))
        order = torch.randperm(len(self.features), generator=generator)
        shuffled = self.known_labels[order]
        each = min(count // 10, int(self.known_labels.bincount().min()) // 2)
        rank = torch.stack([(shuffled == label).cumsum(0) for label in range(10)])[shuffled, torch.arange(len(order))]
        chosen, others = order[rank <= each], order[rank > each]
        return frechet_distance_from_features(self.features[chosen], self.features[others])


def _features(extractor: FeatureExtractor, side: int, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    dataset = digits(side, split=split)
    batch = dataset.batch(range(len(dataset)))
    assert batch.labels is not None
    return extractor(unit_images(batch.images)).cpu().double(), batch.labels
