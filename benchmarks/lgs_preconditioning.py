"""Does a preconditioner in the DCT basis, built from the data's power spectrum, save Jacobian products?

With ``L^2 = variance + x_0_weight^2 (1 / power + SNR)^-1`` in the DCT basis, the step's covariance if the data were
Gaussian with that power, ``y = L M^(1/2) z`` with ``M = L^-1 Sigma L^-1`` has the covariance Sigma for any L, and
Lanczos runs on M, whose condition number is smaller (Chow and Saad 2014, for sampling; the spectrum as in Free Hunch).
m = 0 is ``y = L z``: no product at all.

Measured at equal m: the squared error of the draw in units of the step's own standard deviation, on a mixture of
non-stationary textures whose covariance is known exactly; and, with ``--run``, the Frechet distance on a trained
network.

What came out (results/): on the mixture DCT wins 1.3 to 3 times at every m >= 1, less than one product. On the
digits it is a draw at m = 2 and 3, and helps only where the covariance is poor otherwise: with m = 1, and with m = 0,
at T = 10 and at no cost. The library takes m = 2 or 3, so it stays here and is no option of ``LanczosSettings``.
Photographs, with their steeper spectrum, were not tried.

    python benchmarks/lgs_preconditioning.py --run runs/lgs_tiny
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from wellposed.data.bundled import digits
from wellposed.evaluation.features import unit_images
from wellposed.evaluation.frechet import feature_statistics, frechet_floor
from wellposed.lgs.lanczos import krylov_function, lanczos, small_matrix_function
from wellposed.lgs.path_kl import stationary_image_spectrum
from wellposed.lgs.reverse import CovarianceDraw, ReverseCovariance, ReversePoint, StepCost
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings, SamplingRecord, sample
from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import Bridge, from_scheduler
from wellposed.recipes.ddpm_draw import linear_trajectory, load_denoiser
from wellposed.recipes.device import resolved_device
from wellposed.recipes.digit_features import digit_features
from wellposed.recipes.lgs_comparison import Contender, Outcome, compare
from wellposed.report.record import write_result

SIZE = 16


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, float64: rows are the basis vectors."""
    position, frequency = torch.arange(size).double() + 0.5, torch.arange(size).double()
    matrix = torch.cos(math.pi / size * frequency[:, None] * position) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@dataclass(frozen=True, eq=False)
class DCTPreconditionedCovariance:
    """The full covariance by Lanczos on the preconditioned operator.

    ``power``: variance of each DCT coefficient of the data, (channels, height, width). Below ``spectral_below_snr`` no
    product is taken: a network's Jacobian says little there, and the data are Gaussian for all that can be seen.
    """

    power: Tensor
    num_lanczos_steps: int
    spectral_below_snr: float = 1e-2

    @property
    def needs_products(self) -> bool:
        return self.num_lanczos_steps > 0

    def dct(self, x: Tensor, inverse: bool = False) -> Tensor:
        rows, columns = (dct_matrix(size).to(x) for size in self.power.shape[-2:])
        return rows.T @ x @ columns if inverse else rows @ x @ columns.T

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """``scale`` applied to the DCT coefficients."""
        return self.dct(self.dct(x) * scale.to(x), inverse=True)

    def factor(self, bridge: Bridge) -> Tensor:
        """L, float64."""
        snr = (bridge.alpha_t / bridge.sigma_t) ** 2
        posterior = self.power / (1 + snr * self.power)
        return (bridge.variance + bridge.x_0_weight**2 * posterior).sqrt()

    def draw(self, z: Tensor, point: ReversePoint, memory: Any = None) -> CovarianceDraw:
        bridge = point.bridge
        factor = self.factor(bridge)
        if self.num_lanczos_steps == 0 or (bridge.alpha_t / bridge.sigma_t) ** 2 < self.spectral_below_snr:
            return CovarianceDraw(noise=self.scaled(z, factor), cost=StepCost())
        product = point.covariance_product()

        def whitened(v: Tensor) -> Tensor:
            """M v, in three DCTs: L^-1 acts on both sides of C, and the floor is diagonal in the DCT basis."""
            coefficients = self.dct(v)
            inner = self.dct(product(self.dct(coefficients / factor.to(v), inverse=True)))
            scaled = bridge.variance * coefficients / factor.to(v) ** 2 + bridge.x_0_weight**2 * inner / factor.to(v)
            return self.dct(scaled, inverse=True)

        krylov = lanczos(whitened, z, self.num_lanczos_steps)
        # Sigma >= variance, so that no eigenvalue of M lies below variance / max(L)^2.
        floor = bridge.variance / float(factor.max()) ** 2
        root = small_matrix_function(krylov.projection(), lambda eigenvalues: eigenvalues.clamp_min(floor).sqrt())
        noise = self.scaled(krylov_function(krylov, root), factor)
        cost = StepCost(products=krylov.hessenberg.shape[-1], steps=krylov.steps, failed=krylov.failed)
        return CovarianceDraw(noise=noise.to(z.dtype), cost=cost)

    def multiply(self, v: Tensor, point: ReversePoint) -> Tensor:
        return LanczosCovariance(LanczosSettings()).multiply(v, point)


def textures(num_components: int = 6, seed: int = 0) -> GaussianMixtureOracle:
    """Images of 16 x 16: smooth means, and 1/f^2 textures that are bright in one place and faint in others."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = stationary_image_spectrum(SIZE).reshape(SIZE, SIZE)
    column = torch.fft.ifft2(spectrum).real
    shifts = torch.arange(SIZE)
    rolled = (shifts[:, None] - shifts) % SIZE
    stationary = column[rolled][:, :, rolled].permute(0, 2, 1, 3).reshape(SIZE**2, SIZE**2)
    grid = torch.stack(torch.meshgrid(shifts.double(), shifts.double(), indexing="ij"), dim=-1)
    centres = SIZE * torch.rand(num_components, 2, generator=generator, dtype=torch.float64)
    distance = (grid - centres[:, None, None]).square().sum(-1).flatten(1)
    envelope = 0.25 + 1.25 * torch.exp(-distance / (2 * (SIZE / 4) ** 2))
    factor = torch.linalg.cholesky(stationary + 1e-9 * torch.eye(SIZE**2, dtype=torch.float64))
    means = 0.5 * torch.randn(num_components, SIZE**2, generator=generator, dtype=torch.float64) @ factor.T
    return GaussianMixtureOracle(
        weights=torch.full((num_components,), 1 / num_components, dtype=torch.float64),
        means=means,
        covariances=envelope[:, :, None] * stationary * envelope[:, None, :],
        path=from_scheduler(DDPMScheduler()),
    )


def data_power(oracle: GaussianMixtureOracle) -> Tensor:
    """Variance of the DCT coefficients of the mixture."""
    mean = oracle.weights @ oracle.means
    spread = oracle.means - mean
    covariance = torch.einsum("k,kij->ij", oracle.weights, oracle.covariances)
    covariance = covariance + torch.einsum("k,ki,kj->ij", oracle.weights, spread, spread)
    basis = torch.kron(dct_matrix(SIZE), dct_matrix(SIZE))
    return (basis @ covariance * basis).sum(-1).reshape(1, SIZE, SIZE)


@dataclass(frozen=True, kw_only=True)
class DrawError:
    """Mean of ||Sigma^-1/2 (y_m - y)||^2 over a chain's steps and draws, y being the same draw at full depth.

    The dimension is 256: an error of 2.56 is one of a tenth of a standard deviation in every direction. The condition
    numbers are the largest ones of the operators that Lanczos runs on.
    """

    steps: int
    m: int
    plain: float
    dct: float
    plain_condition: float
    dct_condition: float


def draw_errors(
    oracle: GaussianMixtureOracle, steps: int, depths: Sequence[int], states: int, seed: int
) -> list[DrawError]:
    """Over the noisy steps of one linear trajectory, at states of the forward path."""
    power = data_power(oracle)
    generator = torch.Generator().manual_seed(seed)
    count = oracle.path.num_train_timesteps
    assert count is not None
    times = [(index + 1) / count for index in linear_trajectory(count, steps)]
    sums = {(kind, m): 0.0 for kind in ("plain", "dct") for m in depths}
    worst = {"plain": 1.0, "dct": 1.0}
    for t, s in pairwise(times):
        bridge = oracle.path.bridge(t, s)
        x_0, _ = oracle.sample(states, generator=generator)
        noise = torch.randn(states, SIZE**2, generator=generator, dtype=torch.float64)
        clean = oracle.posterior_covariance(oracle.path.add_noise(x_0, noise, t), t)
        exact = bridge.variance * torch.eye(SIZE**2, dtype=torch.float64) + bridge.x_0_weight**2 * clean
        z = torch.randn(states, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
        point = _point(z, t, bridge, clean)
        preconditioner = DCTPreconditionedCovariance(power, 0)
        basis = torch.kron(dct_matrix(SIZE), dct_matrix(SIZE))
        factors = {
            "plain": torch.eye(SIZE**2, dtype=torch.float64),
            "dct": basis.T @ (preconditioner.factor(bridge).flatten()[:, None] * basis),
        }
        for kind, factor in factors.items():
            inverse = torch.linalg.inv(factor)
            eigenvalues, vectors = torch.linalg.eigh(inverse @ exact @ inverse)
            worst[kind] = max(worst[kind], float((eigenvalues[:, -1] / eigenvalues[:, 0]).max()))
            turned = torch.einsum("bji,bj->bi", vectors, z.flatten(1))
            for m in depths:
                draw = _covariance(kind, m, power).draw(z, point).noise.flatten(1)
                # In the eigenbasis of M the exact draw is sqrt(lambda) z, and Sigma^-1/2 undoes sqrt(lambda).
                coordinates = torch.einsum("bji,bj->bi", vectors, draw @ inverse.T) / eigenvalues.sqrt()
                sums[kind, m] += float((coordinates - turned).square().sum(-1).mean()) / (len(times) - 1)
    return [
        DrawError(
            steps=steps,
            m=m,
            plain=sums["plain", m],
            dct=sums["dct", m],
            plain_condition=worst["plain"],
            dct_condition=worst["dct"],
        )
        for m in depths
    ]


def _covariance(kind: str, m: int, power: Tensor) -> ReverseCovariance:
    if kind == "dct":
        return DCTPreconditionedCovariance(power, m, spectral_below_snr=0.0)
    return LanczosCovariance(LanczosSettings(num_lanczos_steps=m, isotropic_below_snr=0.0, max_variance=None))


def _point(z: Tensor, t: float, bridge: Bridge, clean: Tensor) -> ReversePoint:
    jacobian = bridge.alpha_t / bridge.sigma_t**2 * clean

    def product(v: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", jacobian, v.flatten(1)).reshape(v.shape)

    return ReversePoint(
        x_t=torch.zeros_like(z),
        t=t,
        bridge=bridge,
        prediction=torch.zeros_like(z),
        prediction_type="sample",
        jacobian_product=product,
    )


def digit_outcomes(run: Path, device: torch.device, chosen: argparse.Namespace) -> tuple[list[Outcome], float]:
    """Frechet distances of the trained network, plain and preconditioned."""
    denoiser = load_denoiser(run / "pipeline", device)
    dataset = digits(8, split="train")
    images = dataset.batch(range(len(dataset))).images
    centred = (images - images.mean(dim=0)).double()
    basis = dct_matrix(8)
    power = (basis @ centred @ basis.T).square().mean(dim=0)
    extractor = digit_features(run / "features", device=str(device))
    features = torch.cat(list(extractor.batches(unit_images(images))))
    floor = frechet_floor(features, num_images=len(features) // 2, generator=torch.Generator().manual_seed(0))

    def sampler(covariance: ReverseCovariance) -> Callable[..., tuple[Tensor, SamplingRecord]]:
        return lambda x_T, times, generator: sample(denoiser, x_T, times, covariance, generator=generator, clip=1.0)

    contenders = [
        Contender(name=f"{kind}, m = {m}", family="lanczos", sampler=sampler(covariance))
        for m in chosen.depths
        for kind, covariance in (
            ("plain", LanczosCovariance(LanczosSettings(num_lanczos_steps=m))),
            ("dct", DCTPreconditionedCovariance(power, m)),
        )
    ]

    def show(outcome: Outcome, first: Tensor) -> None:
        spread = " ".join(f"{value:6.2f}" for value in outcome.frechet)
        print(
            f"digits, T = {outcome.steps:<3} {outcome.name:>12}  {spread}  {1000 * outcome.seconds:7.2f} ms", flush=True
        )

    outcomes = compare(
        contenders,
        denoiser=denoiser,
        shape=(1, 8, 8),
        step_counts=chosen.digit_steps,
        num_samples=chosen.samples,
        batch_size=250,
        seeds=chosen.seeds,
        extractor=extractor,
        reference=feature_statistics(unit_images(images), extractor),
        on_outcome=show,
    )
    return outcomes, floor


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of lgs_tiny")
    parser.add_argument("--device", default="cpu", help="of the trained network")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--digit-steps", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--states", type=int, default=8, help="on the mixture, at every step")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    oracle = textures()
    rows: list[DrawError] = []
    for steps in chosen.steps:
        for row in draw_errors(oracle, steps, chosen.depths, chosen.states, seed=0):
            rows.append(row)
            print(
                f"mixture, T = {row.steps:<3} m = {row.m}: plain {row.plain:9.3g} (cond {row.plain_condition:5.1f})  "
                f"dct {row.dct:9.3g} (cond {row.dct_condition:5.1f})  gain {row.plain / row.dct:6.2f}",
                flush=True,
            )
    metrics: dict[str, Any] = {"mixture": [asdict(row) for row in rows]}
    if chosen.run is not None:
        outcomes, floor = digit_outcomes(chosen.run, resolved_device(chosen.device), chosen)
        metrics |= {"digits": [asdict(outcome) for outcome in outcomes], "floor": floor}
    settings = {name: value for name, value in vars(chosen).items() if name not in ("run", "seeds")}
    print(write_result("lgs-preconditioning", metrics, settings, seed=chosen.seeds[0], started=started))


if __name__ == "__main__":
    main()
