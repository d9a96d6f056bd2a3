r"""The covariances that the literature and the toolkits use, behind the interface of ``LanczosCovariance``.

All are diagonal or isotropic: ``Sigma = variance I + x_0_weight^2 diag(c)`` with an estimate c of the diagonal of
Cov[x_0 | x_t], clamped to [0, r^2] for data in [-r, r]. With a = alpha_t^2 and b = sigma_t^2:

| class | c | from |
| --- | --- | --- |
| ``FixedSmall`` | 0 (the variance is "beta-tilde") | 2006.11239 |
| ``FixedLarge`` | the step's noise "beta" in place of Sigma | 2006.11239 |
| ``AnalyticCovariance`` | (b / a) (1 - Gamma_t), Gamma_t = E mean_i eps_i^2 | 2201.06503 |
| ``HeadCovariance("npr")`` | (b / a) e, e trained on (eps - eps_net)^2 | 2206.07309 |
| ``HeadCovariance("sn")`` | (b / a) (h - eps_net^2), h trained on eps^2 | 2206.07309 |
| ``HeadCovariance("ocm")`` | (b / a) (1 + h), h trained on sigma^2 v * (grad (v . score)) | 2406.10808 |

The three heads are small networks on (x_t, t, eps_net) with the denoiser frozen; ``head_objective`` is what the one
training loop minimises for them. The originals share the denoiser's features; a head of its own sees the same inputs
and can be trained on any denoiser without opening it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wellposed.batches import ImageBatch
from wellposed.denoisers import Denoiser
from wellposed.lgs.jacobian import linearize
from wellposed.lgs.reverse import CovarianceDraw, ReversePoint, StepCost, standard_normal
from wellposed.paths import convert_prediction
from wellposed.training import Objective, StepContext

__all__ = [
    "AnalyticCovariance",
    "CovarianceHead",
    "FixedLarge",
    "FixedSmall",
    "HeadCovariance",
    "HeadKind",
    "head_objective",
    "head_training_objective",
    "noise_second_moment",
    "probed_diagonal",
]

HeadKind = Literal["npr", "sn", "ocm"]


@dataclass(frozen=True)
class _Diagonal(ABC):
    """Draws with a diagonal covariance; a subclass says the step's variance."""

    @property
    def needs_products(self) -> bool:
        """Never."""
        return False

    @abstractmethod
    def variance(self, point: ReversePoint) -> float | Tensor:
        """Of the step, one number or one per coordinate."""

    def draw(self, z: Float[Tensor, "batch *shape"], point: ReversePoint, memory: Any = None) -> CovarianceDraw:
        """sqrt(variance) z."""
        variance = self.variance(point)
        scale = variance.sqrt().to(z.dtype) if isinstance(variance, Tensor) else math.sqrt(variance)
        return CovarianceDraw(noise=scale * z, cost=StepCost())

    def multiply(self, v: Float[Tensor, "batch *shape"], point: ReversePoint) -> Float[Tensor, "batch *shape"]:
        """variance v."""
        variance = self.variance(point)
        return variance.to(v.dtype) * v if isinstance(variance, Tensor) else variance * v


@dataclass(frozen=True)
class FixedSmall(_Diagonal):
    """beta-tilde: the variance as if x_0 were known. diffusers' ``fixed_small``, ``LanczosCovariance`` with m = 0."""

    def variance(self, point: ReversePoint) -> float:
        """The bridge's."""
        return point.bridge.variance


@dataclass(frozen=True)
class FixedLarge(_Diagonal):
    """beta: the variance that the forward path adds between s and t (over r on other than variance-preserving paths).

    It is exact for standard normal data. diffusers' ``fixed_large``; at eta other than 1 scaled by eta^2.
    """

    def variance(self, point: ReversePoint) -> float:
        """sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2."""
        bridge = point.bridge
        added = bridge.sigma_t**2 - (bridge.alpha_t / bridge.alpha_s) ** 2 * bridge.sigma_s**2
        posterior = bridge.sigma_s**2 * added / bridge.sigma_t**2
        return added * bridge.variance / posterior if posterior > 0 else added


@dataclass(frozen=True, kw_only=True)
class _Estimated(_Diagonal):
    """A diagonal estimate of Cov[x_0 | x_t], clamped as its authors' codes do.

    ``max_variance`` is r^2 for data in [-r, r] (1 for [-1, 1], 0.25 for [0, 1]). ``end_noise_limit`` p: the standard
    deviation of the last noisy step is at most ``p (2 / 255) sqrt(pi / 2) sqrt(max_variance)`` (2201.06503, its code).
    """

    max_variance: float = 1.0
    end_noise_limit: float | None = None

    @abstractmethod
    def clean_variance(self, point: ReversePoint) -> float | Tensor:
        """The estimate c, before the clamp."""

    def variance(self, point: ReversePoint) -> float | Tensor:
        """variance + x_0_weight^2 clamp(c)."""
        clean = self.clean_variance(point)
        bounded = (
            clean.clamp(0, self.max_variance) if isinstance(clean, Tensor) else min(max(clean, 0.0), self.max_variance)
        )
        variance = point.bridge.variance + point.bridge.x_0_weight**2 * bounded
        if self.end_noise_limit is None or not point.ends_at_first_noise:
            return variance
        limit = (self.end_noise_limit * 2 / 255) ** 2 * (math.pi / 2) * self.max_variance
        return variance.clamp(max=limit) if isinstance(variance, Tensor) else min(variance, limit)


@dataclass(frozen=True, kw_only=True)
class AnalyticCovariance(_Estimated):
    """Analytic-DPM: the best variance that depends on t alone, from ``noise_second_moment``."""

    second_moment: dict[float, float]

    def clean_variance(self, point: ReversePoint) -> float:
        """(b / a) (1 - Gamma_t)."""
        if point.t not in self.second_moment:
            known = ", ".join(f"{t:g}" for t in sorted(self.second_moment)[:8])
            raise ValueError(
                f"Gamma_t was not estimated at t = {point.t:g} (known: {known}, ...); call noise_second_moment with "
                "the times that you sample at"
            )
        return (point.bridge.sigma_t / point.bridge.alpha_t) ** 2 * (1 - self.second_moment[point.t])


@torch.no_grad()
def noise_second_moment(
    denoiser: Denoiser,
    batches: Sequence[Float[Tensor, "batch *shape"]],
    times: Sequence[float],
    *,
    generator: torch.Generator,
    clip: float | Callable[[Tensor], Tensor] | None = 1.0,
    **cond: Any,
) -> dict[float, float]:
    """Gamma_t = E[||eps_net(x_t)||^2] / d at each time, over clean batches (Analytic-DPM's ``ms_eps``).

    Args:
        denoiser: the denoiser.
        batches: clean samples.
        times: those of the chain.
        generator: of the noise.
        clip: bound of |x_0|, or a function that bounds x_0; eps_net is recomputed from the clipped posterior mean, as
            the published estimate does.
        **cond: conditioning.
    """
    moments: dict[float, float] = {}
    for t in times:
        alpha, sigma = float(denoiser.path.alpha(t)), float(denoiser.path.sigma(t))
        total, count = 0.0, 0
        for x_0 in batches:
            x_t = denoiser.path.add_noise(x_0, standard_normal(x_0, generator), t)
            mean = denoiser(x_t, t, **cond)
            if clip is not None:
                mean = clip(mean) if callable(clip) else mean.clamp(-clip, clip)
            epsilon = convert_prediction(mean, x_t, source="sample", target="epsilon", alpha=alpha, sigma=sigma)
            total += float(epsilon.double().square().sum())
            count += epsilon.numel()
        moments[t] = total / count
    return moments


class CovarianceHead(nn.Module):
    """A small convolutional network (x_t, eps_net, t) -> one number per coordinate.

    Two residual blocks at full resolution with the noise level as a bias: about what the published "complex" heads add
    on top of the U-Net, here without its features. ``kind`` fixes what the number means, and with it the output's
    range: NPR and SN predict a square (softplus), OCM any real number.
    """

    def __init__(self, channels: int, *, kind: HeadKind, width: int = 64) -> None:
        super().__init__()
        if kind not in ("npr", "sn", "ocm"):
            raise ValueError(f"kind must be 'npr', 'sn' or 'ocm', got {kind!r}")
        self.kind = kind
        self.embed = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.level = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(2)
        )
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        epsilon: Float[Tensor, "batch channels height width"],
        alpha: Float[Tensor, " batch"],
        sigma: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The prediction, at noise levels given per sample."""
        level = torch.stack([alpha, (alpha / sigma).log()], dim=-1).to(x_t.dtype)
        hidden = self.embed(torch.cat([x_t, epsilon], dim=1)) + self.level(level)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        out = self.out(hidden)
        return out if self.kind == "ocm" else nn.functional.softplus(out)


@dataclass(frozen=True, kw_only=True)
class HeadCovariance(_Estimated):
    """NPR-, SN- or OCM-DDPM: a trained ``CovarianceHead`` gives the diagonal."""

    head: CovarianceHead

    def clean_variance(self, point: ReversePoint) -> Tensor:
        """(b / a) times e, h - eps_net^2 or 1 + h."""
        epsilon = point.predicted("epsilon")
        batch = len(epsilon)
        scales = (
            torch.full((batch,), scale, device=epsilon.device) for scale in (point.bridge.alpha_t, point.bridge.sigma_t)
        )
        with torch.no_grad():
            h = self.head(point.x_t.to(epsilon.dtype), epsilon, *scales)
        share = {"npr": h, "sn": h - epsilon**2, "ocm": 1 + h}[self.head.kind]
        return (point.bridge.sigma_t / point.bridge.alpha_t) ** 2 * share


def head_objective(
    denoiser: Denoiser,
    head: CovarianceHead | Callable[..., Tensor],
    kind: HeadKind,
    x_0: Float[Tensor, "batch *shape"],
    t: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch *shape"],
    probe: Float[Tensor, "batch *shape"],
    **cond: Any,
) -> Float[Tensor, ""]:
    r"""The regression loss of a head, with the denoiser frozen.

    NPR: ``||(eps - eps_net)^2 - h||^2``; SN: ``||eps^2 - h||^2``; OCM: ``||sigma^2 v * (grad (v . score)) - h||^2``
    with ``score = -eps_net / sigma`` and one Rademacher probe v (2406.10808, Hutchinson's estimate of the diagonal).

    Args:
        denoiser: frozen.
        head: called as ``CovarianceHead.forward``.
        kind: which regression.
        x_0: clean batch.
        t: one time per sample.
        noise: standard normal.
        probe: +-1 entries; used by OCM only.
        **cond: conditioning.
    """
    x_t = denoiser.path.add_noise(x_0, noise, t)
    alpha, sigma = (scale.to(x_0.device, x_0.dtype) for scale in (denoiser.path.alpha(t), denoiser.path.sigma(t)))
    wide = (len(x_0), *[1] * (x_0.ndim - 1))

    def epsilon_at(x: Tensor) -> Tensor:
        return convert_prediction(
            denoiser.predict(x, t, **cond),
            x,
            source=denoiser.prediction_type,
            target="epsilon",
            alpha=alpha.reshape(wide),
            sigma=sigma.reshape(wide),
        )

    if kind == "ocm":
        linear = linearize(epsilon_at, x_t, module=getattr(denoiser, "model", None))
        epsilon = linear.output
        target = -sigma.reshape(wide) * probe * linear.product(probe)
    else:
        with torch.no_grad():
            epsilon = epsilon_at(x_t)
        target = noise**2 if kind == "sn" else (noise - epsilon) ** 2
    return nn.functional.mse_loss(head(x_t, epsilon, alpha, sigma), target)


def head_training_objective(denoiser: Denoiser, kind: HeadKind) -> Objective:
    """``head_objective`` for the one training loop, whose player is the head; the batch is an ``ImageBatch``.

    Times as in ``denoising_objective``: spread evenly over the batch, over the training indices of a discrete path. The
    denoiser is no player: it stays as it is, and has to be on the run's device.

    Args:
        denoiser: frozen; labels of the batch, where it has any, reach it as ``class_labels``.
        kind: that of the head.
    """

    def objective(
        models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count = denoiser.path.num_train_timesteps
        uniform = context.uniform(stratified=True)
        # On a continuous path both ends are out of reach: no noise to predict at 0, perhaps no signal at 1.
        t = uniform.clamp(1e-3, 1 - 1e-3) if count is None else ((uniform * count).long() + 1) / count
        shape = tuple(batch.images.shape[1:])
        noise, probe = context.normal(shape), context.normal(shape).sign()
        cond: dict[str, Any] = {} if batch.labels is None else {"class_labels": batch.labels}
        head = models[context.player]
        return head_objective(denoiser, head, kind, batch.images, t, noise, probe, **cond), {}

    return objective


def probed_diagonal(
    product: Callable[[Tensor], Tensor], like: Tensor, num_probes: int, *, generator: torch.Generator
) -> Tensor:
    """Hutchinson's estimate of an operator's diagonal: the mean of v * A v over Rademacher v (OCM without a head)."""
    total = torch.zeros_like(like)
    for _ in range(num_probes):
        probe = torch.randint(0, 2, like.shape, generator=generator, device=generator.device).to(like) * 2 - 1
        total += probe * product(probe)
    return total / num_probes
