r"""One reverse step with any covariance: what it may look at, what it draws, what it cost.

The mean is ``bridge.mean(E[x_0 | x_t], x_t)`` for all; a ``ReverseCovariance`` is the rest. ``wellposed.lgs.sampler``
has the Lanczos one, ``wellposed.lgs.baselines`` those it replaces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wellposed.lgs.covariance import posterior_covariance_product
from wellposed.paths import Bridge, PredictionType, convert_prediction

__all__ = [
    "CovarianceDraw",
    "ReverseCovariance",
    "ReversePoint",
    "ReverseStep",
    "StepCost",
    "refuse_non_finite",
    "reverse_step",
    "standard_normal",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReversePoint:
    """What a reverse covariance may look at: the state, the network's say on it, and the step to take."""

    x_t: Float[Tensor, "batch *shape"]
    t: float
    bridge: Bridge
    prediction: Float[Tensor, "batch *shape"]
    prediction_type: PredictionType
    jacobian_product: Callable[[Tensor], Tensor] | None = None
    ends_at_first_noise: bool = False

    def predicted(self, target: PredictionType) -> Float[Tensor, "batch *shape"]:
        """The prediction as another type, unclipped, in float32 or wider."""
        working = torch.promote_types(self.x_t.dtype, torch.float32)
        return convert_prediction(
            self.prediction.to(working),
            self.x_t.to(working),
            source=self.prediction_type,
            target=target,
            alpha=self.bridge.alpha_t,
            sigma=self.bridge.sigma_t,
        )

    def covariance_product(self) -> Callable[[Tensor], Tensor]:
        """v -> C v."""
        if self.jacobian_product is None:
            raise ValueError("this point carries no Jacobian products; linearise the model at x_t first")
        return posterior_covariance_product(
            self.jacobian_product,
            alpha=self.bridge.alpha_t,
            sigma=self.bridge.sigma_t,
            prediction_type=self.prediction_type,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StepCost:
    """What one step's covariance took.

    ``products``: Jacobian products of the whole batch; ``steps``: products that each sample used; ``error``: estimated
    relative error of each sample's noise; ``failed``: samples that fell back to the floor covariance because a product
    was not finite. The last three are None where nothing was estimated.
    """

    products: int = 0
    steps: Int[Tensor, " batch"] | None = None
    error: Float[Tensor, " batch"] | None = None
    failed: Bool[Tensor, " batch"] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CovarianceDraw:
    """A draw ``noise ~ N(0, Sigma)``, what it cost, and what the next step's draw may use (``memory``)."""

    noise: Float[Tensor, "batch *shape"]
    cost: StepCost
    memory: Any = None


@runtime_checkable
class ReverseCovariance(Protocol):
    """A choice of covariance for the reverse step: Lanczos here, the published alternatives in ``baselines``."""

    @property
    def needs_products(self) -> bool:
        """Whether the model has to be linearised at every step."""
        ...

    def draw(self, z: Float[Tensor, "batch *shape"], point: ReversePoint, memory: Any = None) -> CovarianceDraw:
        """Noise with the step's covariance from a standard normal z."""
        ...

    def multiply(self, v: Float[Tensor, "batch *shape"], point: ReversePoint) -> Float[Tensor, "batch *shape"]:
        """Sigma v: what classifier guidance shifts the mean by."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ReverseStep:
    """A step taken: ``x_s``, the clean sample that its mean used, what it cost, and the memory for the next one."""

    x_s: Float[Tensor, "batch *shape"]
    x_0: Float[Tensor, "batch *shape"]
    cost: StepCost
    memory: Any


def reverse_step(
    point: ReversePoint,
    covariance: ReverseCovariance,
    z: Float[Tensor, "batch *shape"] | None,
    *,
    clip: float | Callable[[Tensor], Tensor] | None = None,
    guidance: Float[Tensor, "batch *shape"] | None = None,
    memory: Any = None,
) -> ReverseStep:
    """One reverse step with any covariance.

    Args:
        point: the state and the step.
        covariance: whose draw to take.
        z: standard normal; not used, and may be None, on the last step, which takes no noise.
        clip: bound of |x_0| in the mean, or a function that bounds x_0.
        guidance: a gradient g (scale times grad log p(y | x_t)); the mean moves by Sigma g.
        memory: that of the last step.
    """
    x_0 = point.predicted("sample")
    if clip is not None:
        x_0 = clip(x_0) if callable(clip) else x_0.clamp(-clip, clip)
    x_s = point.bridge.mean(x_0, point.x_t.to(x_0.dtype))
    cost = StepCost()
    if not point.bridge.is_last and z is not None:
        draw = covariance.draw(z.to(x_s.dtype), point, memory)
        x_s, cost, memory = x_s + draw.noise, draw.cost, draw.memory
    if guidance is not None:
        watched = _WatchedProduct(point.jacobian_product)
        watched_point = point if point.jacobian_product is None else replace(point, jacobian_product=watched)
        x_s = x_s + covariance.multiply(guidance.to(x_s.dtype), watched_point)
        cost = watched.added_to(cost)
    dtype = point.x_t.dtype
    return ReverseStep(x_s=x_s.to(dtype), x_0=x_0.to(dtype), cost=cost, memory=memory)


class _WatchedProduct:
    """A product that remembers how often it was taken, and for which samples it was not finite."""

    def __init__(self, product: Callable[[Tensor], Tensor] | None) -> None:
        self.product = product
        self.count = 0
        self.failed: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        assert self.product is not None
        image = self.product(v)
        self.count += 1
        self.failed = ~image.isfinite().flatten(1).all(dim=1)
        return image

    def added_to(self, cost: StepCost) -> StepCost:
        if self.failed is None:
            return cost
        failed = self.failed.cpu() if cost.failed is None else cost.failed | self.failed.cpu()
        return replace(cost, products=cost.products + self.count, failed=failed)


def standard_normal(
    like: Float[Tensor, "batch *shape"], generator: torch.Generator | Sequence[torch.Generator] | None
) -> Float[Tensor, "batch *shape"]:
    """One draw in ``like``'s shape and dtype, made where each generator lives.

    Args:
        like: gives shape, dtype and the device of the result.
        generator: one for all, one per sample, or None for torch's own.

    Raises:
        ValueError: for a list of another length.
    """
    from diffusers.utils.torch_utils import randn_tensor

    many = list(generator) if isinstance(generator, Sequence) else generator
    if isinstance(many, list) and len(many) != len(like):
        raise ValueError(
            f"got a list of {len(many)} generators for a batch of {len(like)}; pass one, or one per sample"
        )
    return randn_tensor(like.shape, generator=many, device=like.device, dtype=like.dtype)


def refuse_non_finite(prediction: Tensor, where: str) -> None:
    """Raises:
    ValueError: if a network's prediction has a NaN or inf; ``where`` says at which step.
    """
    if not bool(prediction.isfinite().all()):
        raise ValueError(
            f"the model returned NaN or inf at {where}; check its weights and input range, or run it in float32"
        )
