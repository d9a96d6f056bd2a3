r"""The Lanczos Gaussian sampler: DDPM's reverse step with its full covariance (arXiv 2605.22723).

One step from t to s: a forward pass gives the posterior mean and with it the step's mean ``mu``; Lanczos started at a
standard normal z gives ``y ~ Sigma^(1/2) z`` with ``Sigma = variance I + x_0_weight^2 C``; ``x_s = mu + y``. With m = 0
this is DDPM with its smallest fixed variance, with m = 1 the covariance is isotropic but depends on x_t, and m = 3 is
the published setting. The paper's text was not available when this was written: what is ours (adaptive m, the guards,
the amortised form) is named in docs/methods/lgs.md.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from wellposed.denoisers import Denoiser
from wellposed.lgs.covariance import step_covariance_spectrum
from wellposed.lgs.jacobian import Linearization, ProductMethod, linearize
from wellposed.lgs.lanczos import Krylov, krylov_function, lanczos, small_matrix_function
from wellposed.lgs.reverse import (
    CovarianceDraw,
    ReverseCovariance,
    ReversePoint,
    ReverseStep,
    StepCost,
    refuse_non_finite,
    reverse_step,
    standard_normal,
)
from wellposed.paths import Bridge, PredictionType

__all__ = [
    "CovarianceDraw",
    "LanczosCovariance",
    "LanczosSettings",
    "ReverseCovariance",
    "ReversePoint",
    "ReverseStep",
    "SamplingRecord",
    "StepCost",
    "lanczos_gaussian_step",
    "reverse_step",
    "sample",
]


@dataclass(frozen=True, kw_only=True)
class LanczosSettings:
    r"""How the covariance of a step is drawn from.

    Attributes:
        num_lanczos_steps: m, the most Jacobian products a step may take. 3 is the published setting; 2 already keeps
            the O(1/T^2) path KL.
        tol: None takes m products at every step. A number makes m adaptive: each sample stops once the a-posteriori
            estimate of its relative error is below ``tol``, and a step costs what its hardest sample needs. m is 0
            where the floor alone is that close, which ``max_variance`` tells for free. 1e-2 halves the products
            of 25 steps on image spectra.
        amortize: 0 is off. l > 0 adds one degree to every draw without a product: m products give m + 1 basis vectors,
            and the missing last diagonal entry is the one before it times their ratio at the last step that measured
            it. Every l-th step takes the extra product and measures the ratio, and so does the last noisy step, whose
            condition number is the chain's largest. Ours; the published LGSb may differ. The ratio is a mean over the
            batch, so that a sample then depends slightly on its batch. Not together with ``tol``.
        method: how products are computed (``wellposed.lgs.jacobian``).
        isotropic_below_snr: below this signal-to-noise ratio m is 1: Sigma is isotropic there to a few percent, and the
            network's error in C is amplified by 1/SNR.
        max_variance: largest variance that a clean coordinate can have, ``r^2`` for data in [-r, r]; bounds the m = 1
            covariance. None for unbounded data (latents).
        data_max_eigenvalue: largest eigenvalue of the data's covariance, if known. While SNR times it is below 1, C's
            eigenvalues are clamped to the LMMSE bound (1 / data_max_eigenvalue + SNR)^-1, which holds there on average.
        end_steps: most products at the last noisy step in adaptive mode. Its condition number is the largest of the
            chain, which is where a trained network's negative eigenvalues do the most harm.
        end_noise_limit: None, or p: on the last noisy step y is scaled down to a root mean square of at most
            ``p (2 / 255) sqrt(pi / 2)`` times ``sqrt(max_variance)`` (Analytic-DPM's clip, p = 1 or 2).
    """

    num_lanczos_steps: int = 3
    tol: float | None = None
    amortize: int = 0
    method: ProductMethod = "vjp"
    isotropic_below_snr: float = 1e-2
    max_variance: float | None = 1.0
    data_max_eigenvalue: float | None = None
    end_steps: int = 2
    end_noise_limit: float | None = None

    def __post_init__(self) -> None:
        if self.num_lanczos_steps < 0:
            raise ValueError(
                f"num_lanczos_steps must be >= 0, got {self.num_lanczos_steps}; "
                "0 is DDPM's fixed_small, 3 the published setting"
            )
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol is a relative error and must be positive, got {self.tol}; None takes a fixed m")
        if self.amortize < 0:
            raise ValueError(f"amortize must be >= 0, got {self.amortize}; 2 measures the ratio at every second step")
        if self.amortize and self.tol is not None:
            raise ValueError("amortize extrapolates from a fixed number of products; set tol=None, or amortize=0")
        if self.max_variance is not None and not self.max_variance > 0:
            raise ValueError(f"max_variance must be positive, got {self.max_variance}; None for unbounded data")
        if self.data_max_eigenvalue is not None and not self.data_max_eigenvalue > 0:
            raise ValueError(f"data_max_eigenvalue must be positive, got {self.data_max_eigenvalue}; None if unknown")
        if self.end_noise_limit is not None and self.max_variance is None:
            raise ValueError(
                "end_noise_limit is in units of the data range: set max_variance = r^2 for data in [-r, r]"
            )


@dataclass(frozen=True)
class LanczosCovariance:
    """The full posterior covariance, through Jacobian products."""

    settings: LanczosSettings = field(default_factory=LanczosSettings)

    @property
    def needs_products(self) -> bool:
        """False for m = 0 only."""
        return self.settings.num_lanczos_steps > 0

    def steps_at(self, point: ReversePoint) -> int:
        """The most products that this step may take."""
        settings, bridge = self.settings, point.bridge
        if bridge.alpha_t == 0 or bridge.is_last or self._is_floor_enough(bridge):
            return 0
        if self._is_isotropic(bridge):
            return min(1, settings.num_lanczos_steps)
        if settings.tol is not None and point.ends_at_first_noise:
            return min(settings.end_steps, settings.num_lanczos_steps)
        return settings.num_lanczos_steps

    def _is_floor_enough(self, bridge: Bridge) -> bool:
        """Whether the floor's error is of the order of ``tol``: sqrt(1 + e) - 1 < e / 2, e the largest mean eigenvalue.

        A mean, so that a spectrum with its trace in few directions errs more: 2.3 to 2.8 ``tol`` at the limit on 1/f^2
        images, which adds less than 1 % to a chain's path KL there and saves a quarter to a half of its products.
        """
        tol, largest = self.settings.tol, self.settings.max_variance
        if tol is None or largest is None:
            return False
        return bridge.x_0_weight**2 * largest <= 2 * tol * bridge.variance

    def _is_isotropic(self, bridge: Bridge) -> bool:
        return (bridge.alpha_t / bridge.sigma_t) ** 2 < self.settings.isotropic_below_snr

    def ceiling(self, bridge: Bridge) -> float:
        """The largest eigenvalue of C that is believed at this step."""
        settings = self.settings
        snr = (bridge.alpha_t / bridge.sigma_t) ** 2
        ceiling = math.inf
        if settings.max_variance is not None and self._is_isotropic(bridge):
            ceiling = settings.max_variance
        if settings.data_max_eigenvalue is not None and snr * settings.data_max_eigenvalue < 1:
            ceiling = min(ceiling, 1 / (1 / settings.data_max_eigenvalue + snr))
        return ceiling

    def draw(
        self, z: Float[Tensor, "batch *shape"], point: ReversePoint, memory: "CoefficientRatio | None" = None
    ) -> CovarianceDraw:
        """``Sigma^(1/2) z`` by Lanczos. ``memory`` is the coefficient ratio of an amortised chain."""
        bridge = point.bridge
        num_steps = self.steps_at(point)
        if num_steps == 0:
            return CovarianceDraw(noise=math.sqrt(bridge.variance) * z, cost=StepCost(), memory=memory)
        spectrum = step_covariance_spectrum(bridge, ceiling=self.ceiling(bridge))
        tol, gain = self.settings.tol, bridge.x_0_weight**2
        amortized = self.settings.amortize > 0 and not self._is_isotropic(bridge)
        known = None if point.ends_at_first_noise else memory
        due = known is None or known.age + 1 >= self.settings.amortize
        krylov = lanczos(
            point.covariance_product(),
            z,
            num_steps + int(amortized and due),
            converged=None if tol is None else lambda found: _relative_error(found, spectrum, gain) <= tol,
        )
        matrix = krylov.projection()
        if amortized and due:
            memory = CoefficientRatio.measured(matrix)
        elif amortized and known is not None:
            matrix, memory = known.extended(krylov), known.aged()
        # The floor is the covariance of a sample without usable products; lanczos has zeroed its matrix already.
        coordinates = small_matrix_function(matrix, lambda eigenvalues: spectrum(eigenvalues).sqrt())
        noise = krylov_function(krylov, coordinates).to(z.dtype)
        if point.ends_at_first_noise and self.settings.end_noise_limit is not None:
            noise = self._limited(noise)
        _warn_of_failures(krylov.failed)
        cost = StepCost(
            products=krylov.hessenberg.shape[-1],
            steps=krylov.steps,
            error=_relative_error(krylov, spectrum, gain),
            failed=krylov.failed,
        )
        return CovarianceDraw(noise=noise, cost=cost, memory=memory)

    def _limited(self, noise: Tensor) -> Tensor:
        assert self.settings.end_noise_limit is not None and self.settings.max_variance is not None
        limit = self.settings.end_noise_limit * (2 / 255) * math.sqrt(math.pi / 2 * self.settings.max_variance)
        rms = noise.flatten(1).square().mean(dim=1).sqrt()
        return noise * (limit / rms).clamp(max=1).to(noise.dtype).reshape(-1, *[1] * (noise.ndim - 1))

    def multiply(self, v: Float[Tensor, "batch *shape"], point: ReversePoint) -> Float[Tensor, "batch *shape"]:
        """Sigma v with one product; where the step is isotropic, v times its Rayleigh quotient."""
        bridge = point.bridge
        if not self.needs_products or bridge.alpha_t == 0:
            return bridge.variance * v
        if self._is_isotropic(bridge):
            krylov = lanczos(point.covariance_product(), v, 1)
            _warn_of_failures(krylov.failed)
            spectrum = step_covariance_spectrum(bridge, ceiling=self.ceiling(bridge))
            return krylov_function(krylov, small_matrix_function(krylov.projection(), spectrum))
        image = point.covariance_product()(v)
        finite = image.isfinite().flatten(1).all(dim=1)
        _warn_of_failures(~finite.cpu())
        image = torch.where(finite.reshape(-1, *[1] * (v.ndim - 1)), image, 0)
        return bridge.variance * v + bridge.x_0_weight**2 * image


@dataclass(frozen=True, eq=False)
class CoefficientRatio:
    """How the last diagonal coefficient follows from the one before, measured ``age`` steps ago."""

    ratio: float
    age: int = 0

    @classmethod
    def measured(cls, matrix: Float[Tensor, "batch steps steps"]) -> "CoefficientRatio":
        """The batch mean of the last two diagonal entries' ratio."""
        last, before = matrix[:, -1, -1], matrix[:, -2, -2]
        usable = (last > 0) & (before > 0)
        return cls(float((last[usable] / before[usable]).mean()) if bool(usable.any()) else 1.0)

    def extended(self, krylov: Krylov) -> Float[Tensor, "batch size size"]:
        """The projection with one more row and column: its off-diagonal is known, its diagonal entry guessed."""
        matrix = krylov.projection()
        batch, size, _ = matrix.shape
        wider = matrix.new_zeros(batch, size + 1, size + 1)
        wider[:, :size, :size] = matrix
        rows, last = torch.arange(batch), krylov.steps - 1
        residual = krylov.residual()
        wider[rows, last + 1, last] = wider[rows, last, last + 1] = residual
        wider[rows, last + 1, last + 1] = torch.where(residual > 0, matrix[rows, last, last] * self.ratio, 0)
        return wider

    def aged(self) -> "CoefficientRatio":
        """One step older."""
        return CoefficientRatio(self.ratio, self.age + 1)


def _relative_error(krylov: Krylov, spectrum: Callable[[Tensor], Tensor], gain: float) -> Float[Tensor, " batch"]:
    """Estimated ||y_m - Sigma^(1/2) z|| / ||y_m|| of each sample, from numbers already there.

    For m >= 2: ||y_m - y_(m-1)|| / (rho - 1), the tail of a geometric series whose rate rho the Ritz values tell; for
    m = 1: half the residual over the Rayleigh quotient, the first-order effect of the coupling on a square root. An
    invariant Krylov space has no error.

    Args:
        krylov: after at least one product with C.
        spectrum: eigenvalues of C to those of Sigma.
        gain: d Sigma / d C, which scales the residual.
    """

    def root(eigenvalues: Tensor) -> Tensor:
        return spectrum(eigenvalues).sqrt()

    matrix, residual = krylov.projection(), krylov.residual()
    first = 0.5 * gain * residual / spectrum(matrix[:, 0, 0])
    if matrix.shape[-1] == 1:
        return torch.where(residual > 0, first, 0)
    rows = torch.arange(len(matrix))
    last = krylov.steps - 1
    shorter = matrix.clone()
    shorter[rows, last, :] = 0
    shorter[rows, :, last] = 0
    here, before = small_matrix_function(matrix, root), small_matrix_function(shorter, root)
    # Beyond a sample's own steps the matrix is zero padding, whose eigenvalue 0 is no Ritz value.
    padded = torch.where(torch.arange(matrix.shape[-1]) < krylov.steps[:, None], 0.0, matrix[:, 0, :1])
    ritz = spectrum(torch.linalg.eigvalsh(matrix + torch.diag_embed(padded)))
    root_condition = (ritz.amax(-1) / ritz.amin(-1).clamp_min(torch.finfo(ritz.dtype).tiny)).sqrt()
    rate = (root_condition + 1) / (root_condition - 1).clamp_min(1e-12)
    later = (here - before).norm(dim=-1) / here.norm(dim=-1) / (rate - 1)
    return torch.where(residual > 0, torch.where(krylov.steps > 1, later, first), 0)


def _warn_of_failures(failed: Bool[Tensor, " batch"]) -> None:
    if bool(failed.any()):
        warnings.warn(
            f"{int(failed.sum())} of {len(failed)} samples met a NaN or inf in a Jacobian product and took this step "
            "with the floor covariance (m = 0); run the model in float32 or bfloat16 if this repeats",
            RuntimeWarning,
            stacklevel=3,
        )


def lanczos_gaussian_step(
    x_t: Float[Tensor, "batch *shape"],
    linearization: Linearization,
    bridge: Bridge,
    z: Float[Tensor, "batch *shape"],
    *,
    prediction_type: PredictionType,
    settings: LanczosSettings = LanczosSettings(),
    clip: float | None = None,
) -> Float[Tensor, "batch *shape"]:
    """One full-covariance reverse step: ``bridge.mean(E[x_0 | x_t], x_t) + Sigma^(1/2) z``.

    Args:
        x_t: the state at time t.
        linearization: the network's raw prediction there, with Jacobian products.
        bridge: the step's numbers (``GaussianPath.bridge(t, s)``).
        z: standard normal.
        prediction_type: what the network predicts.
        settings: see ``LanczosSettings``.
        clip: bound of |x_0| in the mean; the covariance is that of the unclipped prediction.
    """
    point = ReversePoint(
        x_t=x_t,
        t=math.nan,
        bridge=bridge,
        prediction=linearization.output,
        prediction_type=prediction_type,
        jacobian_product=linearization.product,
    )
    return reverse_step(point, LanczosCovariance(settings), z, clip=clip).x_s


@dataclass(frozen=True, kw_only=True)
class SamplingRecord:
    """What a run cost, step by step: products taken, products used per sample (mean), largest estimated error.

    ``failed`` counts samples that fell back to the floor covariance at least once. ``evaluations`` counts a forward
    pass as 1 and a Jacobian product as 1 (the published accounting, 1 + m per step).
    """

    products: tuple[int, ...]
    mean_steps: tuple[float, ...]
    max_error: tuple[float, ...]
    failed: int

    @classmethod
    def of(cls, costs: Sequence[StepCost]) -> "SamplingRecord":
        """The record of a chain from its steps."""
        failed = [cost.failed for cost in costs if cost.failed is not None]
        return cls(
            products=tuple(cost.products for cost in costs),
            mean_steps=tuple(0.0 if cost.steps is None else float(cost.steps.double().mean()) for cost in costs),
            max_error=tuple(math.nan if cost.error is None else float(cost.error.max()) for cost in costs),
            failed=int(torch.stack(failed).any(dim=0).sum()) if failed else 0,
        )

    @property
    def evaluations(self) -> int:
        """Forward passes plus products."""
        return len(self.products) + sum(self.products)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "batch *shape"],
    times: Sequence[float],
    covariance: ReverseCovariance,
    *,
    generator: torch.Generator | Sequence[torch.Generator],
    eta: float = 1.0,
    clip: float | Callable[[Tensor], Tensor] | None = None,
    log_prob_gradient: Callable[[Tensor, float], Tensor] | None = None,
    guidance_scale: float = 1.0,
    share_linearization: int = 1,
    callback: Callable[[int, float, Tensor], None] | None = None,
    progress: bool = False,
    **cond: Any,
) -> tuple[Float[Tensor, "batch *shape"], SamplingRecord]:
    r"""Runs a reverse chain from ``times[0]`` to t = 0.

    Args:
        denoiser: any Gaussian denoiser; networks are differentiated through their raw prediction.
        x_T: the state at ``times[0]``.
        times: decreasing times in (0, 1]; a final step from the last one to t = 0 is added.
        covariance: the reverse covariance; ``LanczosCovariance()`` or one of ``wellposed.lgs.baselines``.
        generator: one, or one per sample: sample i of a batch then equals the batch of one with its generator.
        eta: noise level of the DDIM family (``GaussianPath.bridge``); the full covariance belongs at eta = 1.
        clip: bound of |x_0| in the mean, r for data in [-r, r], or a function that bounds x_0.
        log_prob_gradient: (x_t, t) -> grad log p(y | x_t); classifier guidance with the mean shift
            ``guidance_scale Sigma grad`` (2105.05233, algorithm 1, with the full Sigma). First-order in the step: at
            few steps a denoiser of the *conditional* law, posterior mean plus (sigma^2 / alpha) grad, is far closer.
        guidance_scale: its scale.
        share_linearization: l > 1 differentiates the network only at every l-th step and uses those products, with the
            scalars of the new time, at the l - 1 steps after it.
        callback: called with (step, s, x_s) after every step.
        progress: shows a progress bar.
        **cond: conditioning for the denoiser.

    Returns:
        The samples at t = 0, and the record of the run.

    Raises:
        ValueError: if times do not decrease within (0, 1], ``share_linearization`` is below 1, or the model returns a
            NaN or inf.
    """
    if len(times) < 1 or any(not s < t for t, s in zip(times, [*times[1:], 0.0], strict=True)):
        raise ValueError(f"times must decrease strictly within (0, 1] and be at least one, got {list(times)[:5]}...")
    if share_linearization < 1:
        raise ValueError(f"share_linearization must be >= 1, got {share_linearization}; 1 linearises at every step")
    x = x_T
    memory: Any = None
    linearization: Linearization | None = None
    costs: list[StepCost] = []
    steps = list(zip(times, [*times[1:], 0.0], strict=True))
    for index, (t, s) in enumerate(tqdm(steps, disable=not progress, desc="sampling")):
        bridge = denoiser.path.bridge(t, s, eta=eta)
        needs_graph = covariance.needs_products and not (bridge.is_last and log_prob_gradient is None)
        if not needs_graph or index % share_linearization == 0:
            # Before the next graph is built: two at a time would double the peak of memory.
            linearization = None
        if needs_graph and linearization is None:
            linearization = linearize(
                lambda x, t=t: denoiser.predict(x, t, **cond),
                x,
                method=getattr(getattr(covariance, "settings", None), "method", "vjp"),
                module=_network_of(denoiser),
            )
            prediction = linearization.output
        else:
            prediction = denoiser.predict(x, t, **cond)
        refuse_non_finite(prediction, f"step {index}")
        step = reverse_step(
            ReversePoint(
                x_t=x,
                t=t,
                bridge=bridge,
                prediction=prediction,
                prediction_type=denoiser.prediction_type,
                jacobian_product=None if linearization is None else linearization.product,
                ends_at_first_noise=index == len(times) - 2,
            ),
            covariance,
            None if bridge.is_last else standard_normal(x, generator),
            clip=clip,
            guidance=None if log_prob_gradient is None else guidance_scale * log_prob_gradient(x, t),
            memory=memory,
        )
        x, memory = step.x_s, step.memory
        costs.append(step.cost)
        if callback is not None:
            callback(index, s, x)
    return x, SamplingRecord.of(costs)


def _network_of(denoiser: Any) -> nn.Module | None:
    """The network inside a denoiser, through the guidance around it."""
    while denoiser is not None:
        model = getattr(denoiser, "model", None)
        if isinstance(model, nn.Module):
            return model
        denoiser = getattr(denoiser, "denoiser", None)
    return None
