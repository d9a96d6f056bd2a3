"""Laws of discrete diffusion that need several parts at once: tight bounds, large vocabularies, long sequences.

On the left the room's losses, models and steps; on the right enumeration. Identities are numbered as in
docs/methods/udm.md; the others are in tests/udm.
"""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from wellposed.batches import TextBatch
from wellposed.oracles import TokenOracle
from wellposed.udm.grids import alpha_grid, geometric_rate
from wellposed.udm.kernels import (
    Absorbing,
    Masked,
    MaximalCoupling,
    RefreshedAbsorbing,
    TokenState,
    Uniform,
    uniform_bridge,
)
from wellposed.udm.models import GivenLogits, TableModel
from wellposed.udm.objectives import token_losses
from wellposed.udm.sampler import sample

SPEC = importlib.util.spec_from_file_location("enumeration", Path(__file__).parents[1] / "udm" / "enumeration.py")
assert SPEC is not None and SPEC.loader is not None
enumeration = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(enumeration)

CHANNELS = {
    "uniform": enumeration.uniform_channel,
    "masked": enumeration.masked_channel,
    "absorbing": enumeration.absorbing_channel,
}


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def integrated_bound(kernel, world, model):
    """The integral over t of E[sum of token losses], alpha = 1 - t, with the room's losses and every (x_0, x_t)."""
    size, length = world.vocab_size, world.length
    if kernel.has_noise_tokens:
        pairs = enumeration.all_sequences(size * size, length)
        states = TokenState(tokens=pairs // size, noise=pairs % size)
    else:
        states = TokenState(tokens=enumeration.all_sequences(size + (kernel.channel == "masked"), length))
    total = 0.0
    for t, weight in zip(*(each.tolist() for each in enumeration.gauss_legendre_times(60)), strict=True):
        joint = world.joint(CHANNELS[kernel.channel](1 - t, size))
        clean, noisy = joint.nonzero(as_tuple=True)
        state = TokenState(tokens=states.tokens[noisy], noise=None if states.noise is None else states.noise[noisy])
        rows = len(clean)
        losses = token_losses(
            model, kernel, TextBatch(tokens=world.sequences[clean]), state, one(1 - t, rows), one(-1.0, rows)
        )
        total += weight * float((joint[clean, noisy] * losses.sum(-1)).sum())
    return total


@pytest.mark.parametrize(
    "kernel", [Uniform(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)], ids=lambda k: type(k).__name__
)
def test_identity_10_the_bounds_are_tight(kernel):
    """With the exact posterior they integrate to the entropy of the data, and that is the least they can be."""
    world = enumeration.World.random(3, 2)
    oracle = TokenOracle.from_table(world.table)
    assert oracle.entropy() == pytest.approx(world.entropy(), abs=1e-14)
    bound = integrated_bound(kernel, world, TableModel(oracle=oracle, kernel=kernel))
    assert bound == pytest.approx(world.entropy(), abs=1e-8)


@pytest.mark.parametrize("misread", [False, True], ids=["maximal-coupling", "denoiser-plugged-in"])
def test_identity_10_these_bounds_are_not(misread):
    """Maximal coupling's, whose path is not Markov, and that of a denoiser read as the leave-one-out posterior."""
    world = enumeration.World.random(3, 2)
    kernel = Uniform(3) if misread else MaximalCoupling(3)
    table = TableModel(oracle=TokenOracle.from_table(world.table), kernel=kernel, kind="denoiser")

    def model(state, alpha, **asked):
        prediction = table(state, alpha)
        return GivenLogits(logits=prediction.logits, kind="leave_one_out")(state, alpha, rows=asked["rows"])

    assert integrated_bound(kernel, world, model if misread else table) > world.entropy() + 0.1


def test_identity_24_absorbing_posteriors_approach_masked_ones_like_one_over_k():
    """At K of a language an absorbing model is a masked one whose mask shows a flag and a meaningless token."""
    distances = []
    for size in (3, 10, 30, 100):
        world = enumeration.World.random(size, 2, seed=size)
        oracle = TokenOracle.from_table(world.table)
        x_0 = oracle.sample(300, generator=torch.Generator().manual_seed(0))
        kernel, alpha = Absorbing(size), one(0.5, 300)
        state = kernel.corrupt(x_0, alpha, generator=torch.Generator().manual_seed(1))
        active = kernel.open(state)
        masked = TokenState(tokens=state.tokens.masked_fill(active, size))
        laws = [
            TableModel(oracle=oracle, kernel=k, kind="denoiser")(s, alpha, rows=active).log_probs().exp()
            for k, s in ((kernel, state), (Masked(size), masked))
        ]
        distances.append(float((laws[0] - laws[1]).abs().sum(-1).mean() / 2))
    assert distances[0] > 0.05
    assert all(after < before for before, after in pairwise(distances))
    scaled = [distance * size for distance, size in zip(distances, (3, 10, 30, 100), strict=True)]
    assert scaled[3] == pytest.approx(scaled[2], rel=0.25)


@pytest.mark.parametrize(
    "kernel",
    [Uniform(3), MaximalCoupling(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)],
    ids=lambda k: type(k).__name__,
)
def test_identity_25_a_step_commutes_with_renaming_the_tokens(kernel):
    """The bridge of the renamed state, at the renamed data's posterior, is the renamed bridge."""
    world, order = enumeration.World.random(3, 2), torch.tensor([2, 0, 1])
    back = order.argsort()
    renamed = enumeration.World(world.table[back][:, back])
    names = torch.cat([order, torch.tensor([3])])
    state = kernel.corrupt(world.sequences, one(0.4, 9), generator=torch.Generator().manual_seed(0))
    other = TokenState(tokens=names[state.tokens], noise=None if state.noise is None else names[state.noise])
    laws = []
    for each, where in ((world, state), (renamed, other)):
        model = TableModel(oracle=TokenOracle.from_table(each.table), kernel=kernel)
        clean = model(where, one(0.4, 9)).to(kernel.plugs_in).log_probs().exp()
        laws.append(kernel.bridge(where, clean, one(0.4, 9), one(0.6, 9)))
    expected = laws[0][..., names.argsort()[: laws[0].shape[-1]]]
    torch.testing.assert_close(laws[1], expected, rtol=0, atol=1e-12)


# --- Sequences of any length ------------------------------------------------------------------------------------------
#
# The data are uniform on {0...0, 1...1}: entropy and dual total correlation are log 2 at every length d. By symmetry
# the number of ones is all that matters of a state, so that chains of any length are computed exactly.


def log_binomial(count, p):
    """log of the probabilities of 0..count ones, from those of (zero, one), neither of them a difference from 1."""
    k = torch.arange(count + 1, dtype=torch.float64)
    choose = math.lgamma(count + 1) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    return choose + torch.special.xlogy(k, p[1]) + torch.special.xlogy(count - k, p[0])


def one_token_transitions(rule, length, alpha_t, alpha_s):
    """P(x_s = y) of a zero and of a one, for each number of ones, (d + 1, 2, 2), with the room's model and bridge."""
    oracle = TokenOracle(sequences=torch.tensor([[0] * length, [1] * length]), weights=one(0.5, 2), vocab_size=2)
    tokens = (torch.arange(length) >= length - torch.arange(length + 1)[:, None]).long()
    rows = length + 1
    prediction = TableModel(oracle=oracle, kernel=Uniform(2))(TokenState(tokens=tokens), one(alpha_t, rows))
    if rule == "tau-leaping":
        # Every token jumps at the rate of the reversed chain that its state had at the start of the step.
        score = prediction.score().logits.exp().gather(-1, 1 - tokens[..., None])
        flip = -torch.expm1(-math.log(alpha_s / alpha_t) * score / 2)
        law = torch.cat([1 - flip, flip], -1)
        law = torch.where(tokens[..., None] == 0, law, law.flip(-1))
    else:
        plugged = prediction if rule == "leave-one-out" else prediction.denoiser()
        law = uniform_bridge(tokens, plugged.log_probs().exp(), one(alpha_t, rows), one(alpha_s, rows))
    return torch.stack([law[:, 0], law[:, -1]], 1)  # the first is a zero, the last a one, where there are any


def noisy_counts(length, alpha):
    """The law of the number of ones."""
    q = enumeration.uniform_channel(alpha, 2)
    return (log_binomial(length, q[0]).exp() + log_binomial(length, q[1]).exp()) / 2


def path_divergence(rule, length, grid):
    """Sum over steps of E KL(p(x_s | x_t), the step): what the sampler's independence of positions costs in all.

    It bounds the divergence of what comes out. The true law of a step is a mixture of two products, one for each x_0.
    """
    coin, total = one(0.5, 2), 0.0
    for alpha_t, alpha_s in pairwise(grid.tolist()):
        step = one_token_transitions(rule, length, alpha_t, alpha_s)
        towards = enumeration.uniform_posterior_bridge(alpha_t, alpha_s, 2)
        q = enumeration.uniform_channel(alpha_t, 2).log()
        counts = noisy_counts(length, alpha_t)
        for ones in (counts[: length // 2 + 1] > 1e-12).nonzero().flatten().tolist():  # the others by symmetry
            zeros = length - ones
            evidence = torch.log_softmax(zeros * q[:, 0] + ones * q[:, 1], 0)
            true = torch.stack(
                [
                    evidence[x_0] + log_binomial(zeros, towards[x_0, 0])[:, None] + log_binomial(ones, towards[x_0, 1])
                    for x_0 in range(2)
                ]
            ).logsumexp(0)
            guess = log_binomial(zeros, step[ones, 0] if zeros else coin)[:, None] + log_binomial(
                ones, step[ones, 1] if ones else coin
            )
            # Below e^-80 probabilities of the step may have left the range of float64.
            weight = counts[ones] * (1 if zeros == ones else 2)
            total += float(weight * torch.where(true > -80, true.exp() * (true - guess), 0.0).sum())
    return total


def output_divergence(rule, length, grid):
    """KL of the data from what comes out of the whole chain, started at the exact law of its first time."""
    law = noisy_counts(length, float(grid[0]))
    for alpha_t, alpha_s in pairwise(grid.tolist()):
        step, after = one_token_transitions(rule, length, alpha_t, alpha_s), torch.zeros_like(law)
        for ones in range(length + 1):
            appear = log_binomial(length - ones, step[ones, 0]).exp()
            stay = log_binomial(ones, step[ones, 1]).exp()
            both = torch.nn.functional.conv1d(appear[None, None], stay.flip(0)[None, None], padding=ones)
            after += law[ones] * both[0, 0]
        law = after
    return float(-(2 * law[[0, -1]]).log().mean())


STEPS = 36
KAPPA = geometric_rate(-math.log(1e-3), STEPS)


def test_the_cost_of_parallel_steps_does_not_grow_with_the_length():
    """At a fixed kappa, of the order of kappa times the dual total correlation, log 2; tau-leaping pays per token."""
    grid = alpha_grid(STEPS, "geometric")
    loo = [path_divergence("leave-one-out", length, grid) for length in (8, 60, 150)]
    assert max(loo) < 2 * KAPPA * math.log(2)
    assert loo[2] == pytest.approx(loo[1], rel=0.06)  # 0.23, 0.61, 0.63: it has levelled off
    leaping = [path_divergence("tau-leaping", length, grid) for length in (30, 60)]
    assert leaping[1] > 1.7 * leaping[0]
    assert leaping[1] > 5 * loo[1]


def test_what_comes_out_does_not_worsen_with_the_length():
    grid = alpha_grid(12, "geometric")
    loo, leaping = (
        [output_divergence(rule, length, grid) for length in (4, 16, 64)] for rule in ("leave-one-out", "tau-leaping")
    )
    assert 0 < loo[0] < 1e-3
    assert loo[0] > loo[1] > loo[2] > -1e-12
    assert leaping[0] > 4 * loo[0]
    assert leaping[1] > 2 * leaping[0]
    assert leaping[2] > 2 * leaping[1]


def test_halving_kappa_halves_the_cost():
    """For the leave-one-out posterior. A denoiser plugged in keeps an error that no number of steps removes."""
    more = next(n for n in range(STEPS, 4 * STEPS) if geometric_rate(-math.log(1e-3), n) < KAPPA / 2)
    coarse, fine = alpha_grid(STEPS, "geometric"), alpha_grid(more, "geometric")
    for length in (4, 16):
        ratio = path_divergence("leave-one-out", length, fine) / path_divergence("leave-one-out", length, coarse)
        assert 0.4 < ratio < 0.55
    kept = path_divergence("denoiser", 4, fine) / path_divergence("denoiser", 4, coarse)
    assert kept > 0.75


def test_independent_tokens_cost_nothing_at_any_length():
    """Without dependence one step is exact with the leave-one-out posterior; a denoiser's error is per token.

    One token and two, three steps.
    """
    world = enumeration.World(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))
    product = TokenOracle.from_table(torch.einsum("a,b->ab", world.table, world.table))
    denoiser = []
    for oracle, length in (
        (TokenOracle(sequences=world.sequences, weights=world.table, vocab_size=3), 1),
        (product, 2),
    ):
        tokens = enumeration.all_sequences(3, length)
        rows, model = len(tokens), TableModel(oracle=oracle, kernel=Uniform(3))
        worst = {}
        for alpha_t, alpha_s in pairwise([0.01, 0.5, 0.9, 1.0]):
            q, bridge = (
                enumeration.uniform_channel(alpha_t, 3),
                enumeration.uniform_posterior_bridge(alpha_t, alpha_s, 3),
            )
            posterior = world.denoiser(q)[:, 0]
            exact = torch.einsum("xa,axe->xe", posterior, bridge)[tokens]
            prediction = model(TokenState(tokens=tokens), one(alpha_t, rows))
            for name, plugged in (("leave-one-out", prediction), ("denoiser", prediction.denoiser())):
                law = uniform_bridge(tokens, plugged.log_probs().exp(), one(alpha_t, rows), one(alpha_s, rows))
                weight = world.marginal(q)[tokens].prod(-1)
                divergence = (exact * (exact / law).log()).sum((-1, -2))
                worst[name] = worst.get(name, 0.0) + float((weight * divergence).sum())
        assert abs(worst["leave-one-out"]) < 1e-12
        denoiser.append(worst["denoiser"])
    assert denoiser[0] > 0.1
    assert denoiser[1] == pytest.approx(2 * denoiser[0], rel=1e-12)


def test_long_sequences_from_few_steps():
    """64 tokens that are all equal, 20 steps in parallel, through the sampler itself."""
    length = 64
    oracle = TokenOracle(sequences=torch.tensor([[0] * length, [1] * length]), weights=one(0.5, 2), vocab_size=2)
    model = TableModel(oracle=oracle, kernel=Uniform(2))
    tokens, record = sample(
        model,
        Uniform(2),
        TextBatch(tokens=torch.zeros(400, length, dtype=torch.long)),
        alpha_grid(20, "geometric"),
        generator=torch.Generator().manual_seed(0),
    )
    assert record.evaluations == 20
    assert torch.isin(tokens.sum(-1), torch.tensor([0, length])).all()
    assert float((tokens[:, 0] == 1).double().mean()) == pytest.approx(0.5, abs=0.08)
