"""Denoisers: models as posterior means.

The one agreement of every Gaussian room: a denoiser maps ``(x_t, t, **cond)`` to ``E[x_0 | x_t]``, the posterior mean
of the clean sample. t is in [0, 1] with 0 = data and 1 = noise; training index i of a discrete schedule with N steps is
t = (i + 1) / N. Whoever differentiates a denoiser asks for its raw prediction instead, because the step from a
network's output to the posterior mean amplifies low-precision rounding and is better taken after the differentiation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wellposed.paths import (
    GaussianPath,
    PredictionType,
    RectifiedFlow,
    as_prediction_type,
    convert_prediction,
    from_scheduler,
    prediction_coefficients,
)

__all__ = [
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Denoiser",
    "NetworkDenoiser",
    "from_diffusers",
    "posterior_mean",
]


@runtime_checkable
class Denoiser(Protocol):
    """What samplers sample with: a path, a prediction on it, and the posterior mean that the prediction says."""

    @property
    def path(self) -> GaussianPath:
        """The Gaussian path the denoiser belongs to."""
        ...

    @property
    def prediction_type(self) -> PredictionType:
        """What ``predict`` returns."""
        ...

    def predict(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """The raw prediction, differentiable in ``x_t``."""
        ...

    def __call__(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """E[x_0 | x_t]."""
        ...


def posterior_mean(
    prediction: Float[Tensor, "batch *shape"],
    x_t: Float[Tensor, "batch *shape"],
    t: float | Tensor,
    path: GaussianPath,
    prediction_type: PredictionType,
) -> Float[Tensor, "batch *shape"]:
    """E[x_0 | x_t] from a prediction at time(s) t: one float, or one per sample (batch,)."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    if alpha.ndim == 1:
        alpha, sigma = (scale.reshape(-1, *[1] * (x_t.ndim - 1)) for scale in (alpha, sigma))
    return convert_prediction(prediction, x_t, source=prediction_type, target="sample", alpha=alpha, sigma=sigma)


@dataclass(frozen=True, eq=False, kw_only=True)
class NetworkDenoiser:
    """A diffusers-style network ``model(x, timestep=..., **cond)`` on a Gaussian path; made by ``from_diffusers``.

    ``timestep_of`` maps t in [0, 1] to the number that the network's time embedding expects. Where the network also
    predicts a variance (2C output channels) only the first C are the prediction.
    """

    model: nn.Module
    path: GaussianPath
    prediction_type: PredictionType
    timestep_of: Callable[[Tensor], Tensor]

    def predict(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """The network's output at (x_t, t); ``cond`` goes to its forward as keyword arguments."""
        times = torch.as_tensor(t, dtype=torch.float64)
        timestep = self.timestep_of(times).to(x_t.device).expand(len(x_t))
        # By name: transformers that are conditioned on text take it as their third or fourth argument.
        output = self.model(x_t, timestep=timestep, **cond)
        output = output if isinstance(output, Tensor) else output[0]
        return output[:, : x_t.shape[1]] if output.shape[1] == 2 * x_t.shape[1] else output

    def __call__(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """E[x_0 | x_t], unclipped."""
        return posterior_mean(self.predict(x_t, t, **cond), x_t, t, self.path, self.prediction_type)


def from_diffusers(model: nn.Module, scheduler: Any, *, prediction_type: str | None = None) -> NetworkDenoiser:
    """A diffusers model and the scheduler it was trained with, as a denoiser.

    The network is called with the training index ``N t - 1``, rounded to the nearest one where its embedding is a table
    of N rows; flow-matching networks are called with ``N t``, or with t itself for the Flux family, which scales
    inside.

    Args:
        model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel, FluxTransformer2DModel
            or any module whose forward takes the sample first and a ``timestep``.
        scheduler: its diffusers scheduler; gives the path and the prediction type.
        prediction_type: overrides the scheduler's.

    Raises:
        ValueError: for a scheduler whose path is unknown, an unknown prediction type, or a guidance-distilled network,
            whose output is not a conditional mean.
    """
    config = getattr(model, "config", {})
    refuse_guidance_embedding(config)
    path = from_scheduler(scheduler)
    train_steps = path.num_train_timesteps or int(scheduler.config.num_train_timesteps)
    if isinstance(path, RectifiedFlow):
        scale = 1 if type(model).__name__.startswith("Flux") else train_steps
        return NetworkDenoiser(
            model=model,
            path=path,
            prediction_type=as_prediction_type(prediction_type or "flow_prediction"),
            timestep_of=lambda t: (t * scale).float(),
        )
    has_table = config.get("time_embedding_type", None) == "learned"

    def training_index(t: Tensor) -> Tensor:
        index = (t * train_steps - 1).clamp(0, train_steps - 1)
        nearest = index.round()
        # Times in float32 miss the index by up to 1e-4 of a step.
        on_grid = bool(((index - nearest).abs() < 1e-3).all())
        return nearest.long() if has_table or on_grid else index.float()

    return NetworkDenoiser(
        model=model,
        path=path,
        prediction_type=as_prediction_type(prediction_type or scheduler.config.prediction_type),
        timestep_of=training_index,
    )


def refuse_guidance_embedding(config: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: if the network takes the guidance scale as an input (``config.guidance_embeds``, as FLUX.1-dev does): it
        was distilled, so its output is no conditional mean and its Jacobian no covariance.
    """
    if config.get("guidance_embeds", False):
        raise ValueError(
            "this network has config.guidance_embeds: it was distilled to imitate guidance, so its output is not "
            "E[x_0 | x_t] and its Jacobian is not a posterior covariance; use an undistilled checkpoint"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassifierFreeGuidance:
    """``uncond + scale (cond - uncond)``, on any denoiser (2207.12598, with scale = 1 + w: 1 is no guidance).

    ``unconditional`` holds the keyword arguments that replace those of the call in the unconditional branch. The guided
    field is the posterior mean of no data distribution for scale > 1; its Jacobian is a covariance only after clamping.
    """

    denoiser: Denoiser
    scale: float
    unconditional: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> GaussianPath:
        """That of the wrapped denoiser."""
        return self.denoiser.path

    @property
    def prediction_type(self) -> PredictionType:
        """That of the wrapped denoiser: guidance is linear, so it acts alike on all four types."""
        return self.denoiser.prediction_type

    def predict(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """The guided raw prediction."""
        conditional = self.denoiser.predict(x_t, t, **cond)
        if self.scale == 1:
            return conditional
        unconditional = self.denoiser.predict(x_t, t, **{**cond, **self.unconditional})
        return unconditional + self.scale * (conditional - unconditional)

    def __call__(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """The guided posterior mean."""
        return posterior_mean(self.predict(x_t, t, **cond), x_t, t, self.path, self.prediction_type)


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassifierGuidance:
    """A denoiser and a classifier as one denoiser: ``E[x_0 | x_t] + scale (sigma^2 / alpha) grad log p(y | x_t)``.

    Bayes' rule on scores (2011.13456, section 5; 2105.05233, algorithm 2). Sampled as one denoiser, its Jacobian, and
    with it the reverse covariance, contains the classifier's Hessian. ``log_prob`` maps (x_t, t) to one log p(y | x_t)
    per sample, and is differentiated twice.
    """

    denoiser: Denoiser
    log_prob: Callable[[Tensor, float], Tensor]
    scale: float = 1.0

    @property
    def path(self) -> GaussianPath:
        """That of the wrapped denoiser."""
        return self.denoiser.path

    @property
    def prediction_type(self) -> PredictionType:
        """That of the wrapped denoiser."""
        return self.denoiser.prediction_type

    def predict(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """The guided raw prediction, at one time for the whole batch."""
        moment = float(t)
        alpha, sigma = float(self.path.alpha(moment)), float(self.path.sigma(moment))
        # The noise moves by -scale sigma grad, which stays finite where the shift of x_0 does not (alpha -> 0).
        _, weight = prediction_coefficients("epsilon", self.prediction_type, alpha, sigma)
        gradient = torch.func.grad(lambda x: self.log_prob(x, moment).sum())(x_t)
        return self.denoiser.predict(x_t, t, **cond) - weight * self.scale * sigma * gradient

    def __call__(
        self, x_t: Float[Tensor, "batch *shape"], t: float | Tensor, **cond: Any
    ) -> Float[Tensor, "batch *shape"]:
        """The guided posterior mean."""
        return posterior_mean(self.predict(x_t, t, **cond), x_t, t, self.path, self.prediction_type)
