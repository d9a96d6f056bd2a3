r"""Exact denoisers with exact covariances, in closed form: the ground truth of every law in the tests.

Each is a denoiser (``path``, ``predict``, call = posterior mean) that also knows ``posterior_covariance`` and the
density of ``x_t``. All compute in the dtype of ``x_t``; use float64. Samples have shape (batch, dim) or any (batch,
*shape) with dim elements; a dense covariance is (batch, dim, dim).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wellposed.paths import GaussianPath, PredictionType

__all__ = ["FiniteDataOracle", "GaussianMixtureOracle", "TokenOracle", "gaussian_oracle"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GaussianMixtureOracle:
    r"""Data from ``sum_k w_k N(mu_k, Lambda_k)``.

    Given x_t, component k has posterior weight ``r_k`` proportional to ``w_k N(x_t; alpha mu_k, S_k)`` with
    ``S_k = alpha^2 Lambda_k + sigma^2 I``, mean ``m_k = mu_k + alpha Lambda_k S_k^-1 (x_t - alpha mu_k)`` and
    covariance ``C_k = Lambda_k - alpha^2 Lambda_k S_k^-1 Lambda_k``; mean, covariance and third cumulant of the mixture
    follow. A covariance may be singular as long as sigma > 0.
    """

    weights: Float[Tensor, " components"]
    means: Float[Tensor, "components dim"]
    covariances: Float[Tensor, "components dim dim"]
    path: GaussianPath
    prediction_type: PredictionType = "sample"

    def __post_init__(self) -> None:
        if not bool((self.weights > 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise ValueError(f"weights must be positive and sum to one, got {self.weights.tolist()}")
        if not torch.allclose(self.covariances, self.covariances.mT):
            raise ValueError("covariances must be symmetric")
        if float(self._spectrum[0].min()) < -1e-12:
            raise ValueError(
                f"covariances must be positive semi-definite, smallest eigenvalue {self._spectrum[0].min():g}"
            )

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.linalg.eigh(self.covariances))

    def _scales(self, t: float) -> tuple[float, float]:
        return float(self.path.alpha(t)), float(self.path.sigma(t))

    def _component_posteriors(
        self, x_t: Float[Tensor, "batch dim"], t: float
    ) -> tuple[
        Float[Tensor, "batch components"], Float[Tensor, "batch components dim"], Float[Tensor, "components dim dim"]
    ]:
        """log(w_k N(x_t; ...)), m_k and C_k."""
        alpha, sigma = self._scales(t)
        eigenvalues, basis = self._spectrum
        variance = alpha**2 * eigenvalues + sigma**2
        offset = torch.einsum("kji,bkj->bki", basis, x_t[:, None] - alpha * self.means)
        mahalanobis = (offset**2 / variance).sum(-1)
        log_density = -0.5 * (mahalanobis + variance.log().sum(-1) + x_t.shape[-1] * math.log(2 * math.pi))
        shrink = eigenvalues / variance
        mean = self.means + torch.einsum("kij,bkj->bki", basis, alpha * shrink * offset)
        covariance = torch.einsum("kij,kj,klj->kil", basis, sigma**2 * shrink, basis)
        return log_density + self.weights.log(), mean, covariance

    def log_prob(self, x_t: Float[Tensor, "batch dim"], t: float) -> Float[Tensor, " batch"]:
        """log p_t(x_t)."""
        return torch.logsumexp(self._component_posteriors(x_t, t)[0], dim=-1)

    def component_log_prob(self, x_t: Float[Tensor, "batch dim"], t: float) -> Float[Tensor, "batch components"]:
        """log p(component | x_t): the exact noise-conditional classifier of the components."""
        return torch.log_softmax(self._component_posteriors(x_t, t)[0], dim=-1)

    def predict(self, x_t: Float[Tensor, "batch *shape"], t: float, **cond: Any) -> Float[Tensor, "batch *shape"]:
        """E[x_0 | x_t]."""
        joint, means, _ = self._component_posteriors(x_t.flatten(1), t)
        return torch.einsum("bk,bki->bi", joint.softmax(-1), means).view_as(x_t)

    __call__ = predict

    def posterior_covariance(self, x_t: Float[Tensor, "batch dim"], t: float) -> Float[Tensor, "batch dim dim"]:
        """Cov[x_0 | x_t]."""
        joint, means, covariances = self._component_posteriors(x_t, t)
        weight = joint.softmax(-1)
        spread = means - torch.einsum("bk,bki->bi", weight, means)[:, None]
        return torch.einsum("bk,kij->bij", weight, covariances) + torch.einsum(
            "bk,bki,bkj->bij", weight, spread, spread
        )

    def posterior_third_cumulant(self, x_t: Float[Tensor, "batch dim"], t: float) -> Float[Tensor, "batch dim dim dim"]:
        """K3[x_0 | x_t] = E[(x_0 - m)^(x)3 | x_t], the leading cause of a full-covariance step's remaining path KL."""
        joint, means, covariances = self._component_posteriors(x_t, t)
        weight = joint.softmax(-1)
        spread = means - torch.einsum("bk,bki->bi", weight, means)[:, None]
        cubes = torch.einsum("bk,bki,bkj,bkl->bijl", weight, spread, spread, spread)
        mixed = torch.einsum("bk,bki,kjl->bijl", weight, spread, covariances)
        return cubes + mixed + mixed.permute(0, 2, 1, 3) + mixed.permute(0, 3, 2, 1)

    def sample(
        self, count: int, *, generator: torch.Generator
    ) -> tuple[Float[Tensor, "count dim"], Int[Tensor, " count"]]:
        """Clean samples and their components."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        eigenvalues, basis = self._spectrum
        factor = basis * eigenvalues.clamp_min(0).sqrt()[:, None, :]
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + torch.einsum("bij,bj->bi", factor[component], noise), component

    def restricted_to(self, components: list[int]) -> "GaussianMixtureOracle":
        """The exact conditional data law given that the component is one of ``components``."""
        weights = self.weights[components]
        return GaussianMixtureOracle(
            weights=weights / weights.sum(),
            means=self.means[components],
            covariances=self.covariances[components],
            path=self.path,
        )


def gaussian_oracle(
    *, mean: Float[Tensor, " dim"], covariance: Float[Tensor, "dim dim"], path: GaussianPath
) -> GaussianMixtureOracle:
    """Data from one Gaussian ``N(mean, covariance)``, for which full covariance matching has no error at all."""
    return GaussianMixtureOracle(
        weights=torch.ones(1, dtype=mean.dtype), means=mean[None], covariances=covariance[None], path=path
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class FiniteDataOracle:
    r"""Data uniform on finitely many points: what a network that memorised its training set would predict.

    ``r_i`` proportional to ``exp(-||x_t - alpha x_i||^2 / 2 sigma^2)``; mean and covariance are those of the points
    under r.
    """

    points: Float[Tensor, "points *shape"]
    path: GaussianPath
    prediction_type: PredictionType = "sample"

    def _weights(self, x_t: Float[Tensor, "batch *shape"], t: float) -> Float[Tensor, "batch points"]:
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        if sigma == 0:
            raise ValueError("a finite data set has no posterior at t = 0, where x_t is the clean sample; use t > 0")
        points, x = alpha * self.points.flatten(1), x_t.flatten(1)
        # The squared norms of x_t are common to all points and cancel in the softmax.
        return torch.softmax((x @ points.T - 0.5 * (points**2).sum(-1)) / sigma**2, dim=-1)

    def predict(self, x_t: Float[Tensor, "batch *shape"], t: float, **cond: Any) -> Float[Tensor, "batch *shape"]:
        """E[x_0 | x_t]."""
        return (self._weights(x_t, t) @ self.points.flatten(1)).view_as(x_t)

    __call__ = predict

    def posterior_covariance(self, x_t: Float[Tensor, "batch *shape"], t: float) -> Float[Tensor, "batch dim dim"]:
        """Cov[x_0 | x_t]."""
        weights, points = self._weights(x_t, t), self.points.flatten(1)
        spread = points - (weights @ points)[:, None]
        return torch.einsum("bn,bni,bnj->bij", weights, spread, spread)

    def sample(self, count: int, *, generator: torch.Generator) -> Float[Tensor, "count *shape"]:
        """Points drawn with replacement."""
        return self.points[torch.randint(len(self.points), (count,), generator=generator)]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenOracle:
    r"""Sequences of tokens from a finite list, by enumeration: the exact posteriors of discrete diffusion.

    With ``l_i(k)`` the likelihood of what is seen at position i if its clean token is k, sequence z has a posterior
    weight proportional to ``w_z prod_i l_i(z_i)``; leaving position i out of the product gives the leave-one-out
    posterior there. How tokens fade is the kernel's matter, which gives the likelihoods.

    Attributes:
        sequences: the possible clean sequences.
        weights: their probabilities.
        vocab_size: K.
    """

    sequences: Int[Tensor, "states length"]
    weights: Float[Tensor, " states"]
    vocab_size: int

    def __post_init__(self) -> None:
        if not bool((self.weights >= 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise ValueError("weights must be probabilities that sum to one")
        lowest, highest = int(self.sequences.min()), int(self.sequences.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise ValueError(f"tokens must lie in [0, {self.vocab_size}), got {lowest} to {highest}")

    @classmethod
    def from_table(cls, table: Float[Tensor, "*vocab"]) -> "TokenOracle":
        """The law ``p(x_1, ..., x_L) = table[x_1, ..., x_L]`` over all K^L sequences."""
        axes = [torch.arange(size) for size in table.shape]
        return cls(
            sequences=torch.cartesian_prod(*axes).view(-1, table.ndim),
            weights=table.flatten(),
            vocab_size=table.shape[0],
        )

    def _log_likelihoods(self, likelihood: Float[Tensor, "batch length vocab"]) -> Float[Tensor, "batch states length"]:
        index = self.sequences.T.expand(len(likelihood), -1, -1)
        return likelihood.log().gather(-1, index).transpose(1, 2)

    def log_prob(self, likelihood: Float[Tensor, "batch length vocab"]) -> Float[Tensor, " batch"]:
        """log of the probability of what is seen, up to what the likelihoods leave out."""
        return (self._log_likelihoods(likelihood).sum(-1) + self.weights.log()).logsumexp(-1)

    def posterior(
        self, likelihood: Float[Tensor, "batch length vocab"], *, leave_one_out: bool
    ) -> Float[Tensor, "batch length vocab"]:
        """p(x_0 = k at i | all positions), or | all positions but i.

        Raises:
            ValueError: something that no sequence explains, which has no posterior.
        """
        each = self._log_likelihoods(likelihood)
        if leave_one_out:
            # From both sides instead of total minus own, which is inf - inf where a position is certain.
            empty = torch.zeros_like(each[..., :1])
            before = torch.cat([empty, each[..., :-1].cumsum(-1)], -1)
            after = torch.cat([each[..., 1:].flip(-1).cumsum(-1).flip(-1), empty], -1)
            log_weight = before + after
        else:
            log_weight = each.sum(-1, keepdim=True).expand(each.shape)
        weight = (log_weight + self.weights.log()[:, None]).softmax(1)
        if bool(weight.isnan().any()):
            raise ValueError(
                "what is seen is impossible under every sequence of the oracle; give all sequences some weight "
                "(positions revealed in parallel may contradict each other)"
            )
        index = self.sequences.T.expand(len(likelihood), -1, -1)
        return torch.zeros_like(likelihood).scatter_add(-1, index, weight.transpose(1, 2))

    def entropy(self) -> float:
        """H(x_0) in nats."""
        return float(-torch.special.xlogy(self.weights, self.weights).sum())

    def sample(self, count: int, *, generator: torch.Generator) -> Int[Tensor, "count length"]:
        """Clean sequences."""
        return self.sequences[torch.multinomial(self.weights, count, replacement=True, generator=generator)]
