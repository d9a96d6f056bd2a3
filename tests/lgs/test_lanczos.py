"""Laws of the Krylov basis on operators with prescribed spectra, and what happens where there is none."""

import math

import pytest
import torch
from torch import Tensor

from wellposed.lgs.lanczos import krylov_function, lanczos, small_matrix_function


def rotation(dim: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]


def symmetric(spectrum: Tensor, seed: int = 0) -> Tensor:
    basis = rotation(len(spectrum), torch.Generator().manual_seed(seed))
    return basis @ torch.diag(spectrum) @ basis.T


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product_with(*matrices: Tensor):
    """One operator for every sample of the batch."""
    stacked = torch.stack(matrices)
    return lambda v: torch.einsum("bij,bj->bi", stacked.to(v.dtype), v)


def root_times(product, z: Tensor, steps: int) -> Tensor:
    krylov = lanczos(product, z, steps)
    return krylov_function(krylov, small_matrix_function(krylov.projection(), lambda e: e.clamp_min(0).sqrt()))


SPECTRA = {
    "uniform": torch.linspace(0.5, 2.0, 24, dtype=torch.float64),
    "ill-conditioned": torch.logspace(-6, 2, 24, dtype=torch.float64),
    "indefinite": torch.linspace(-1.0, 1.0, 24, dtype=torch.float64),
    "two values": torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(12),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_arnoldi_relation_at_every_depth(name: str, dtype: torch.dtype) -> None:
    matrices = [symmetric(SPECTRA[name], seed=seed) for seed in (0, 1)]
    product = product_with(*matrices)
    z = normal(2, 24).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for steps in range(1, 9):
        krylov = lanczos(product, z, steps)
        basis = krylov.vectors.double()
        images = torch.einsum("bij,bkj->bki", torch.stack(matrices), basis[:, :-1])
        # Where the space became invariant, both sides lack the residual that was dropped, 1e-6 of the image at most.
        slack = 1e-6 if name == "two values" else 0
        scale = SPECTRA[name].abs().max()
        assert (images - torch.einsum("bjk,bji->bki", krylov.hessenberg, basis)).abs().max() <= scale * (
            tolerance + slack
        )
        gram = basis @ basis.mT
        alive = gram.diagonal(dim1=1, dim2=2).round()
        assert (gram - torch.diag_embed(alive)).abs().max() <= tolerance


def test_projection_of_an_asymmetric_operator_is_that_of_its_symmetric_part() -> None:
    matrix = symmetric(SPECTRA["uniform"]) + 0.3 * normal(24, 24, seed=3) / math.sqrt(24)
    krylov = lanczos(product_with(matrix), normal(1, 24), 5)
    basis = krylov.vectors[0, :5]
    expected = basis @ ((matrix + matrix.T) / 2) @ basis.T
    assert (krylov.projection()[0] - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("steps", [6, 9])
def test_full_depth_is_exact_and_more_steps_than_dimensions_do_no_harm(steps: int) -> None:
    spectrum = torch.linspace(0.1, 3.0, 6, dtype=torch.float64)
    z = normal(4, 6)
    y = root_times(lambda v: spectrum * v, z, steps)
    assert (y - spectrum.sqrt() * z).abs().max() <= 1e-12


def test_one_step_is_rayleigh_scaling() -> None:
    spectrum = torch.linspace(0.1, 3.0, 50, dtype=torch.float64)
    z = normal(3, 50)
    quotient = (spectrum * z**2).sum(-1, keepdim=True) / (z**2).sum(-1, keepdim=True)
    assert (root_times(lambda v: spectrum * v, z, 1) - quotient.sqrt() * z).abs().max() <= 1e-13


def test_error_at_condition_number_four_falls_like_a_third_per_step() -> None:
    spectrum = torch.linspace(1.0, 4.0, 1000, dtype=torch.float64)
    z = normal(8, 1000)
    exact = spectrum.sqrt() * z
    errors = [
        ((root_times(lambda v: spectrum * v, z, m) - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()
        for m in range(1, 9)
    ]
    assert errors[2] <= 5e-3
    assert errors[0] == pytest.approx(0.18, rel=0.15) and errors[3] == pytest.approx(5.5e-4, rel=0.25)
    assert 3.3 <= errors[6] / errors[7] <= 4.2


@pytest.mark.parametrize("value", [2.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multiples_of_the_identity_break_down_to_an_exact_answer(value: float, dtype: torch.dtype) -> None:
    z = normal(3, 40).to(dtype)
    for steps in (1, 2, 5):
        krylov = lanczos(lambda v: value * v, z, steps)
        y = krylov_function(krylov, small_matrix_function(krylov.projection(), lambda e: (0.25 + 2 * e).sqrt()))
        torch.testing.assert_close(y, math.sqrt(0.25 + 2 * value) * z)
        assert krylov.residual().max() == 0
        assert not krylov.failed.any()


def test_samples_of_one_batch_break_down_each_for_itself() -> None:
    spectra = torch.stack(
        [
            torch.full((24,), 2.0, dtype=torch.float64),
            SPECTRA["uniform"],
            torch.zeros(24, dtype=torch.float64),
            SPECTRA["two values"],
        ]
    )
    z = normal(4, 24)
    y = root_times(lambda v: spectra * v, z, 6)
    alone = torch.cat([root_times(lambda v, row=row: row * v, z[i : i + 1], 6) for i, row in enumerate(spectra)])
    assert (y - alone).abs().max() <= 1e-13
    exact = spectra.sqrt() * z
    assert (y - exact)[[0, 2, 3]].abs().max() <= 1e-9
    assert (y - exact)[1].abs().max() > 1e-9


def test_vanishing_rayleigh_quotients_do_not_hide_an_invariant_space() -> None:
    # [[0, 1], [1, 0]] in a plane: both quotients are 0 though the space closes after two steps.
    basis = rotation(24, torch.Generator().manual_seed(5))
    matrix = torch.outer(basis[:, 0], basis[:, 1]) + torch.outer(basis[:, 1], basis[:, 0])
    for dtype in (torch.float64, torch.float32):
        krylov = lanczos(product_with(matrix), basis[:, :1].T.to(dtype), 5)
        assert krylov.vectors[0, 2:].abs().max() == 0
        assert (krylov.hessenberg[0, :2, :2] - torch.tensor([[0.0, 1.0], [1.0, 0.0]])).abs().max() <= 1e-6


def test_a_zero_start_vector_gives_zero() -> None:
    z = torch.zeros(2, 10, dtype=torch.float64)
    assert (root_times(lambda v: 3 * v, z, 3) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_product_that_is_not_finite_fails_its_sample_only(bad: float) -> None:
    calls = 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        image = torch.linspace(1, 2, v.shape[1]) * v
        if calls == 2:  # after a first product that was good
            image[1] = bad
        return image

    z = normal(3, 30).float()
    krylov = lanczos(product, z, 3)
    assert krylov.failed.tolist() == [False, True, False]
    assert (krylov.projection()[1] == 0).all() and krylov.hessenberg.isfinite().all()
    y = krylov_function(krylov, small_matrix_function(krylov.projection(), lambda e: (0.5 + e).sqrt()))
    torch.testing.assert_close(y[1], math.sqrt(0.5) * z[1])
    clean = lanczos(lambda v: torch.linspace(1, 2, v.shape[1]) * v, z, 3)
    torch.testing.assert_close(krylov.projection()[[0, 2]], clean.projection()[[0, 2]])


def test_converged_samples_keep_their_depth_while_others_go_on() -> None:
    spectrum = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    z = normal(3, 40)
    depths = torch.tensor([1, 3, 2])

    def converged(krylov) -> Tensor:
        return krylov.hessenberg.shape[-1] >= depths

    krylov = lanczos(lambda v: spectrum * v, z, 6, converged=converged)
    assert krylov.steps.tolist() == [1, 3, 2]
    assert krylov.hessenberg.shape[-1] == 3
    for sample, depth in enumerate(depths.tolist()):
        alone = lanczos(lambda v: spectrum * v, z[sample : sample + 1], depth)
        cut = krylov.projection()[sample]
        assert (cut[:depth, :depth] - alone.projection()[0]).abs().max() <= 1e-13
        assert cut[depth:].abs().max() == 0 if depth < 3 else True
        assert krylov.residual()[sample] == pytest.approx(alone.residual().item(), rel=1e-12)


def test_basis_is_float32_or_wider_and_the_product_sees_the_samples_shape() -> None:
    seen: list[tuple[torch.Size, torch.dtype]] = []

    def product(v: Tensor) -> Tensor:
        seen.append((v.shape, v.dtype))
        return 2 * v

    lanczos(product, torch.ones(2, 3, 4, 4, dtype=torch.bfloat16), 1)
    lanczos(product, torch.ones(2, 3, 4, 4, dtype=torch.float64), 1)
    assert seen == [((2, 3, 4, 4), torch.float32), ((2, 3, 4, 4), torch.float64)]


@pytest.mark.parametrize("steps", [0, -1])
def test_at_least_one_step(steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps must be >= 1"):
        lanczos(lambda v: v, torch.ones(2, 4), steps)
