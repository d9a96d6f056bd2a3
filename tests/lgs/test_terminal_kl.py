import itertools
import math

import pytest
import torch

from wellposed.lgs.path_kl import anisotropic_mixture, log_snr_grid, path_kl
from wellposed.lgs.terminal_kl import line_mixture, terminal_divergence
from wellposed.oracles import gaussian_oracle
from wellposed.paths import RectifiedFlow


def test_full_covariance_ends_exactly_for_gaussian_data() -> None:
    oracle = gaussian_oracle(
        mean=torch.tensor([0.3], dtype=torch.float64),
        covariance=torch.tensor([[0.7]], dtype=torch.float64),
        path=RectifiedFlow(),
    )
    exact = terminal_divergence(oracle, log_snr_grid(8), "full")
    assert abs(exact.kl) <= 1e-12
    assert exact.total_variation <= 1e-12
    assert terminal_divergence(oracle, log_snr_grid(8), "beta_tilde").kl > 1e-3


def test_wrong_variance_ends_where_the_recursion_says() -> None:
    """beta_tilde on Gaussian data: the chain stays Gaussian, and its variance follows a scalar recursion."""
    variance, oracle_mean = 0.7, 0.0
    oracle = gaussian_oracle(
        mean=torch.tensor([oracle_mean], dtype=torch.float64),
        covariance=torch.tensor([[variance]], dtype=torch.float64),
        path=RectifiedFlow(),
    )
    grid = log_snr_grid(6)
    snrs = grid.flip(0).tolist()
    state = variance + 1 / snrs[0]
    for noisy, clean in itertools.pairwise(snrs):
        kept = noisy / clean
        gain = kept + (1 - kept) * variance / (variance + 1 / noisy)
        state = gain**2 * state + (clean - noisy) / clean**2
    ratio = (variance + 1 / snrs[-1]) / state
    expected = 0.5 * (ratio - 1 - math.log(ratio))
    assert terminal_divergence(oracle, grid, "beta_tilde").kl == pytest.approx(expected, rel=1e-9)


def test_terminal_divergence_is_of_higher_order_and_below_the_path_kl() -> None:
    oracle = line_mixture()
    for kind, low, high in (("full", -4.1, -3.3), ("isotropic_t", -2.1, -1.8)):
        ends = {}
        for steps in (32, 64):
            ends[steps] = terminal_divergence(oracle, log_snr_grid(steps), kind)
            path = path_kl(oracle, log_snr_grid(steps), [kind]).total(kind)
            assert 0 < ends[steps].kl < path
            # Pinsker.
            assert 2 * ends[steps].total_variation ** 2 <= ends[steps].kl
        assert low <= math.log2(ends[64].kl / ends[32].kl) <= high


@pytest.mark.parametrize("kind", ["full", "isotropic_t", "beta", "beta_tilde"])
def test_nodes_are_close_enough(kind: str) -> None:
    coarse, fine = (
        terminal_divergence(line_mixture(), log_snr_grid(16), kind, spacing=spacing).kl for spacing in (0.4, 0.25)
    )
    assert coarse == pytest.approx(fine, rel=1e-6)


def test_in_one_dimension_three_kinds_coincide() -> None:
    ends = {terminal_divergence(line_mixture(), log_snr_grid(8), kind).kl for kind in ("full", "diagonal", "isotropic")}
    assert len(ends) == 1


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="one dimension, this target has 2"):
        terminal_divergence(anisotropic_mixture(), log_snr_grid(4), "full")
