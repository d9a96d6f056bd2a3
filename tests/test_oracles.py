import math

import pytest
import torch
from torch.autograd.functional import jacobian

from wellposed.denoisers import Denoiser
from wellposed.oracles import FiniteDataOracle, GaussianMixtureOracle, TokenOracle, gaussian_oracle
from wellposed.paths import Cosine, GaussianPath, RectifiedFlow, VarianceExploding, VariancePreserving

PATHS = [VariancePreserving(Cosine()), VarianceExploding(), RectifiedFlow()]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
T = 0.4


def mixture(path: GaussianPath, dim: int = 3) -> GaussianMixtureOracle:
    generator = torch.Generator().manual_seed(1)
    factors = 0.5 * torch.randn(3, dim, dim, generator=generator, dtype=torch.float64)
    return GaussianMixtureOracle(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.randn(3, dim, generator=generator, dtype=torch.float64),
        covariances=factors @ factors.mT,
        path=path,
    )


def noisy(oracle: GaussianMixtureOracle, count: int = 4, t: float = T) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x_0, _ = oracle.sample(count, generator=generator)
    return oracle.path.add_noise(x_0, torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype), t)


@by_path
def test_mean_is_tweedies_formula(path: GaussianPath) -> None:
    oracle = mixture(path)
    x_t = noisy(oracle).requires_grad_()
    (score,) = torch.autograd.grad(oracle.log_prob(x_t, T).sum(), x_t)
    tweedie = (x_t + path.sigma(T) ** 2 * score) / path.alpha(T)
    torch.testing.assert_close(oracle(x_t, T), tweedie, rtol=1e-12, atol=1e-12)


@by_path
def test_covariance_is_the_jacobian_of_the_mean(path: GaussianPath) -> None:
    oracle = mixture(path)
    for x in noisy(oracle):
        expected = path.sigma(T) ** 2 / path.alpha(T) * jacobian(lambda x: oracle(x[None], T)[0], x)
        torch.testing.assert_close(oracle.posterior_covariance(x[None], T)[0], expected, rtol=1e-12, atol=1e-12)


@by_path
def test_third_cumulant_is_the_jacobian_of_the_covariance(path: GaussianPath) -> None:
    oracle = mixture(path)
    for x in noisy(oracle):
        slope = jacobian(lambda x: oracle.posterior_covariance(x[None], T)[0], x)
        expected = path.sigma(T) ** 2 / path.alpha(T) * slope
        torch.testing.assert_close(oracle.posterior_third_cumulant(x[None], T)[0], expected, rtol=1e-11, atol=1e-11)


def test_moments_of_the_posterior_add_up_to_those_of_the_data() -> None:
    oracle = mixture(RectifiedFlow(), dim=2)
    axis = torch.arange(-8, 8, 0.05, dtype=torch.float64)
    x_t = torch.cartesian_prod(axis, axis)
    density = oracle.log_prob(x_t, T).exp() * 0.05**2
    assert float(density.sum()) == pytest.approx(1, abs=1e-12)
    data_mean = oracle.weights @ oracle.means
    offset = oracle.means - data_mean
    data_covariance = torch.einsum("k,kij->ij", oracle.weights, oracle.covariances)
    data_covariance = data_covariance + torch.einsum("k,ki,kj->ij", oracle.weights, offset, offset)
    mean = oracle(x_t, T)
    torch.testing.assert_close(density @ mean, data_mean, rtol=0, atol=1e-12)
    spread = mean - data_mean
    explained = torch.einsum("b,bi,bj->ij", density, spread, spread)
    remaining = torch.einsum("b,bij->ij", density, oracle.posterior_covariance(x_t, T))
    torch.testing.assert_close(explained + remaining, data_covariance, rtol=0, atol=1e-12)


def test_component_probabilities_are_bayes_rule() -> None:
    oracle = mixture(RectifiedFlow())
    x_t = noisy(oracle)
    posterior = oracle.component_log_prob(x_t, T)
    torch.testing.assert_close(posterior.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    for k in range(3):
        joint = oracle.restricted_to([k]).log_prob(x_t, T) + oracle.weights[k].log()
        torch.testing.assert_close(posterior[:, k] + oracle.log_prob(x_t, T), joint)


def test_restriction_renormalises() -> None:
    oracle = mixture(RectifiedFlow()).restricted_to([0, 2])
    torch.testing.assert_close(oracle.weights, torch.tensor([5 / 7, 2 / 7], dtype=torch.float64))


@by_path
def test_one_gaussian_has_the_linear_denoiser(path: GaussianPath) -> None:
    factor = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, covariance = torch.arange(4.0, dtype=torch.float64), factor @ factor.T
    oracle = gaussian_oracle(mean=mean, covariance=covariance, path=path)
    x_t = noisy(oracle)
    alpha, sigma = path.alpha(T), path.sigma(T)
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(oracle(x_t, T), mean + (x_t - alpha * mean) @ gain.T)
    posterior = covariance - alpha * gain @ covariance
    torch.testing.assert_close(oracle.posterior_covariance(x_t, T), posterior.expand(4, 4, 4))
    assert float(oracle.posterior_third_cumulant(x_t, T).abs().max()) == 0


def test_the_clean_end_is_the_identity() -> None:
    oracle = mixture(RectifiedFlow())
    x_0 = noisy(oracle, t=0.0)
    torch.testing.assert_close(oracle(x_0, 0.0), x_0)
    assert float(oracle.posterior_covariance(x_0, 0.0).abs().max()) < 1e-28


def test_images_keep_their_shape() -> None:
    oracle = mixture(RectifiedFlow(), dim=12)
    x_t = noisy(oracle)
    assert torch.equal(oracle(x_t.view(4, 3, 2, 2), T), oracle(x_t, T).view(4, 3, 2, 2))


def test_samples_have_the_moments_of_the_mixture_and_repeat() -> None:
    oracle = mixture(RectifiedFlow())
    samples, components = oracle.sample(200_000, generator=torch.Generator().manual_seed(3))
    again, _ = oracle.sample(200_000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(samples, again)
    share = torch.bincount(components).double() / len(components)
    torch.testing.assert_close(share, oracle.weights, rtol=0, atol=5e-3)
    for k in range(3):
        ours = samples[components == k]
        torch.testing.assert_close(ours.mean(0), oracle.means[k], rtol=0, atol=0.03)
        torch.testing.assert_close(ours.T.cov(), oracle.covariances[k], rtol=0, atol=0.05)


@by_path
def test_finite_data_is_a_mixture_of_points(path: GaussianPath) -> None:
    """The finite data set equals a mixture with zero covariances, which a mixture allows as long as there is noise."""
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    finite = FiniteDataOracle(points=points, path=path)
    limit = GaussianMixtureOracle(
        weights=torch.full((5,), 0.2, dtype=torch.float64),
        means=points,
        covariances=torch.zeros(5, 3, 3, dtype=torch.float64),
        path=path,
    )
    x_t = noisy(limit)
    torch.testing.assert_close(finite(x_t, T), limit(x_t, T))
    torch.testing.assert_close(finite.posterior_covariance(x_t, T), limit.posterior_covariance(x_t, T))


def test_finite_data_covariance_is_the_jacobian_of_the_mean() -> None:
    path = VariancePreserving(Cosine())
    points = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle = FiniteDataOracle(points=points, path=path)
    x_t = points[0] + 0.3
    expected = path.sigma(T) ** 2 / path.alpha(T) * jacobian(lambda x: oracle(x[None], T)[0], x_t).view(4, 4)
    torch.testing.assert_close(oracle.posterior_covariance(x_t[None], T)[0], expected, rtol=1e-12, atol=1e-12)


def test_finite_data_samples_are_its_points() -> None:
    points = torch.arange(4.0).view(4, 1)
    samples = FiniteDataOracle(points=points, path=RectifiedFlow()).sample(
        64, generator=torch.Generator().manual_seed(0)
    )
    assert set(samples.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_finite_data_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no posterior at t = 0.*use t > 0"):
        FiniteDataOracle(points=torch.zeros(2, 1), path=RectifiedFlow())(torch.zeros(1, 1), 0.0)


def test_oracles_are_denoisers() -> None:
    path = RectifiedFlow()
    assert isinstance(mixture(path), Denoiser)
    assert isinstance(FiniteDataOracle(points=torch.zeros(2, 1), path=path), Denoiser)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.tensor([0.5, 0.3], dtype=torch.float64)}, "sum to one"),
        ({"weights": torch.tensor([1.2, -0.2], dtype=torch.float64)}, "positive"),
        ({"weights": torch.tensor([math.nan, 0.5], dtype=torch.float64)}, "positive"),
        ({"covariances": torch.tensor([[[1.0, 0.5], [0.0, 1.0]]] * 2, dtype=torch.float64)}, "symmetric"),
        ({"covariances": torch.tensor([[[1.0, 2.0], [2.0, 1.0]]] * 2, dtype=torch.float64)}, "semi-definite"),
    ],
)
def test_bad_mixtures_are_refused(change: dict, message: str) -> None:
    good = {
        "weights": torch.tensor([0.5, 0.5], dtype=torch.float64),
        "means": torch.zeros(2, 2, dtype=torch.float64),
        "covariances": torch.eye(2, dtype=torch.float64).expand(2, 2, 2),
        "path": RectifiedFlow(),
    }
    with pytest.raises(ValueError, match=message):
        GaussianMixtureOracle(**{**good, **change})


def token_oracle(length: int = 3, size: int = 3, seed: int = 0) -> TokenOracle:
    table = torch.rand((size,) * length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TokenOracle.from_table(table / table.sum())


def likelihoods(batch: int, length: int, size: int, seed: int = 1) -> torch.Tensor:
    """Any: of what is seen at each position, for every clean token there."""
    return torch.rand(batch, length, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_tokens_of_a_table_are_all_its_sequences() -> None:
    oracle = token_oracle()
    table = oracle.weights.view(3, 3, 3)
    for sequence, weight in zip(oracle.sequences.tolist(), oracle.weights.tolist(), strict=True):
        assert float(table[tuple(sequence)]) == weight
    assert oracle.vocab_size == 3
    single = TokenOracle.from_table(torch.tensor([0.25, 0.75]).double())
    assert single.sequences.tolist() == [[0], [1]]


def test_token_posteriors_are_bayes_rule() -> None:
    """Summed over all sequences one by one, for arbitrary likelihoods, with and without the own position."""
    oracle, seen = token_oracle(), likelihoods(5, 3, 3)
    denoiser, loo = (oracle.posterior(seen, leave_one_out=leave) for leave in (False, True))
    for row in range(5):
        for i in range(3):
            whole, without = torch.zeros(3).double(), torch.zeros(3).double()
            for z, weight in zip(oracle.sequences.tolist(), oracle.weights.tolist(), strict=True):
                others = math.prod(float(seen[row, j, z[j]]) for j in range(3) if j != i)
                without[z[i]] += weight * others
                whole[z[i]] += weight * others * float(seen[row, i, z[i]])
            torch.testing.assert_close(denoiser[row, i], whole / whole.sum(), rtol=1e-12, atol=0)
            torch.testing.assert_close(loo[row, i], without / without.sum(), rtol=1e-12, atol=0)
        evidence = torch.tensor(
            [
                weight * math.prod(float(seen[row, j, z[j]]) for j in range(3))
                for z, weight in zip(oracle.sequences.tolist(), oracle.weights.tolist(), strict=True)
            ]
        )
        assert float(oracle.log_prob(seen)[row]) == pytest.approx(math.log(float(evidence.sum())), rel=1e-6)


def test_a_leave_one_out_posterior_does_not_see_its_own_position() -> None:
    """Not even where that is certain, which total minus own would turn into inf - inf."""
    oracle, seen = token_oracle(), likelihoods(4, 3, 3)
    expected = oracle.posterior(seen, leave_one_out=True)
    for i in range(3):
        for own in (likelihoods(4, 3, 3, seed=5)[:, i], torch.eye(3).double()[[0, 1, 2, 0]]):
            changed = seen.clone()
            changed[:, i] = own
            posterior = oracle.posterior(changed, leave_one_out=True)
            torch.testing.assert_close(posterior[:, i], expected[:, i], rtol=1e-12, atol=0)
            assert not torch.allclose(posterior[:, (i + 1) % 3], expected[:, (i + 1) % 3], rtol=1e-3)
    # A certain position is certain in the denoiser.
    seen[:, 1] = torch.tensor([0.0, 1.0, 0.0])
    certain = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(4, -1)
    torch.testing.assert_close(oracle.posterior(seen, leave_one_out=False)[:, 1], certain, rtol=1e-14, atol=0)


def test_long_sequences_of_tokens_do_not_underflow() -> None:
    """1000 positions, two sequences: the log-odds add up."""
    oracle = TokenOracle(
        sequences=torch.tensor([[0] * 1000, [1] * 1000]),
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        vocab_size=2,
    )
    seen = torch.full((1, 1000, 2), 1e-3, dtype=torch.float64)
    seen[:, :, 1] = 1e-3 * math.exp(0.01)
    probs = oracle.posterior(seen, leave_one_out=True)
    assert float(probs[0, 500, 1]) == pytest.approx(1 / (1 + math.exp(-0.01 * 999)), rel=1e-12)
    assert float(oracle.log_prob(seen)) == pytest.approx(1000 * math.log(1e-3) + math.log((1 + math.exp(10)) / 2))


def test_token_entropy_and_samples_are_those_of_the_weights() -> None:
    weights = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    oracle = TokenOracle(sequences=torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]]), weights=weights, vocab_size=2)
    assert oracle.entropy() == pytest.approx(math.log(2), abs=1e-15)
    tokens = oracle.sample(10_000, generator=torch.Generator().manual_seed(0))
    assert (tokens[:, 0] == tokens[:, 1]).all()
    assert float(tokens[:, 0].double().mean()) == pytest.approx(0.5, abs=0.02)


def test_token_oracles_refuse_what_is_no_law_and_what_cannot_be_seen() -> None:
    pair = torch.tensor([[0, 0], [1, 1]])
    for weights in ([0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ValueError, match="probabilities that sum to one"):
            TokenOracle(sequences=pair, weights=torch.tensor(weights).double(), vocab_size=2)
    for sequences in (pair + 1, pair - 1):
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, 2\)"):
            TokenOracle(sequences=sequences, weights=torch.tensor([0.5, 0.5]).double(), vocab_size=2)
    oracle = TokenOracle(sequences=pair, weights=torch.tensor([0.5, 0.5]).double(), vocab_size=2)
    contradiction = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()
    with pytest.raises(ValueError, match="impossible under every sequence"):
        oracle.posterior(contradiction, leave_one_out=False)
    # Each of the two is possible without the other.
    assert oracle.posterior(contradiction, leave_one_out=True).tolist() == [[[0, 1], [1, 0]]]
