"""The bound on the likelihood, and the probe that tells a leave-one-out posterior from a denoiser."""

import math

import pytest
import torch

from wellposed.batches import TextBatch
from wellposed.paths import as_time
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.likelihood import likelihood_bound, own_token_sensitivity, prior_divergence
from wellposed.udm.models import GivenLogits, TableModel

ROWS = 60_000


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def held_out(world, rows=ROWS, *, batches=4):
    """Sequences in the exact proportions of the data, shuffled."""
    counts = (world.law * rows).round().long()
    tokens = world.sequences.repeat_interleave(counts, 0)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    return [TextBatch(tokens=part) for part in tokens.chunk(batches)]


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.5, 0.99])
@pytest.mark.parametrize("size", [2, 5])
def test_the_prior_term_is_a_divergence_by_enumeration(enumeration, alpha, size):
    q = enumeration.uniform_channel(alpha, size)[0]
    assert prior_divergence(alpha, size) == pytest.approx(float((q * (q * size).log()).sum()), rel=1e-6, abs=1e-16)


def test_the_prior_term_at_the_published_setting():
    """3e-3 nats a token at alpha(1) = 1e-3 and K = 50257."""
    assert prior_divergence(1e-3, 50257) == pytest.approx(3.0e-3, abs=2e-4)


class Middle:
    """alpha from 0.9 down to 0.1: away from the clean end, where single densities are rare and large."""

    def alpha(self, t):
        return 0.9 - 0.8 * as_time(t)

    def alpha_derivative(self, t):
        return torch.full_like(as_time(t), -0.8)


def information(world, channel):
    """I(x_0; y) by enumeration."""
    joint = world.joint(channel)
    independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    return float((torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, independent)).sum())


@pytest.mark.parametrize(
    "kernel", [Uniform(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)], ids=lambda k: type(k).__name__
)
def test_with_the_exact_model_the_bound_is_the_information_that_was_lost(world, oracle_of, channel_of, kernel):
    """Between two times the density integrates to I(x_0; x_s) - I(x_0; x_t), of pairs (x, u) where there is a u.

    In nats a token, by the estimator that a run reports, within three standard errors.
    """
    complete = kernel.channel == "uniform"
    bound = likelihood_bound(
        TableModel(oracle=oracle_of(world), kernel=kernel),
        kernel,
        held_out(world),
        generator=torch.Generator().manual_seed(0),
        schedule=Middle(),
        complete=complete,
    )
    at = [information(world, channel_of(kernel, float(Middle().alpha(t)))) / 2 for t in (0.0, 1e-3, 1.0)]
    assert 5e-4 < bound.standard_error < 5e-3
    assert (1 - 1e-3) * bound.diffusion == pytest.approx(at[1] - at[2], abs=3 * bound.standard_error)
    assert bound.tokens == 2 * sum(len(batch.tokens) for batch in held_out(world))
    assert bound.perplexity == math.exp(bound.total)
    if complete:
        assert bound.prior == pytest.approx(prior_divergence(0.1, 3), rel=1e-12)
        assert bound.slab == pytest.approx(at[0] - at[1], rel=0.05)
        assert bound.total == pytest.approx((1 - 1e-3) * bound.diffusion + bound.prior + bound.slab, abs=1e-15)
    else:
        assert (bound.prior, bound.slab) == (None, None)
        assert bound.total == bound.diffusion


def test_with_the_exact_model_the_complete_bound_is_the_entropy(world, oracle_of):
    """Identity 10 on the default schedule."""
    bound = likelihood_bound(
        TableModel(oracle=oracle_of(world), kernel=Uniform(3)),
        Uniform(3),
        held_out(world),
        generator=torch.Generator().manual_seed(0),
        complete=True,
    )
    assert bound.standard_error < 0.05
    assert bound.total == pytest.approx(world.entropy() / 2, abs=3 * bound.standard_error)


def test_another_model_and_another_process_have_a_larger_bound(world, oracle_of):
    """Maximal coupling is loose at its optimum; a denoiser plugged in is worse than the leave-one-out posterior."""
    exact = world.entropy() / 2
    table = TableModel(oracle=oracle_of(world), kernel=Uniform(3), kind="denoiser")

    def misread(state, alpha, **asked):
        return GivenLogits(logits=table(state, alpha).logits, kind="leave_one_out")(state, alpha, rows=asked["rows"])

    for model, kernel in ((table, MaximalCoupling(3)), (misread, Uniform(3))):
        bound = likelihood_bound(model, kernel, held_out(world), generator=torch.Generator().manual_seed(0))
        assert bound.diffusion > exact + 0.05


def test_given_tokens_and_padding_are_not_counted(enumeration, oracle_of):
    """The conditional entropy of the second token given the first, with a third one padded."""
    world = enumeration.World.random(3, 3, seed=8)
    pair = world.table.sum(-1)
    conditional = float(-(pair * (pair / pair.sum(1, keepdim=True)).log()).sum())
    batches = [
        TextBatch(
            tokens=batch.tokens,
            given=torch.tensor([True, False, False]).expand(len(batch.tokens), -1),
            valid=torch.tensor([True, True, False]).expand(len(batch.tokens), -1),
        )
        for batch in held_out(world)
    ]
    bound = likelihood_bound(
        TableModel(oracle=oracle_of(world), kernel=Uniform(3)),
        Uniform(3),
        batches,
        generator=torch.Generator().manual_seed(0),
        complete=True,
    )
    assert bound.tokens == sum(len(batch.tokens) for batch in batches)
    assert bound.total == pytest.approx(conditional, abs=3 * bound.standard_error)


def test_times_are_spread_evenly_over_their_span(world, oracle_of):
    """One in each equal part of [1e-3, 1], and of [0, 1e-3] for the slab; never 0, where the density is not defined."""
    table, alphas = TableModel(oracle=oracle_of(world), kernel=Uniform(3)), []

    def model(state, alpha, **asked):
        alphas.append(alpha)
        return table(state, alpha, **asked)

    batch = TextBatch(tokens=world.sequences.repeat(10, 1))
    likelihood_bound(model, Uniform(3), [batch], generator=torch.Generator().manual_seed(0), complete=True)
    for alpha, low, high in ((alphas[0], 1e-3, 1.0), (alphas[1], 0.0, 1e-3)):
        t = (1 - alpha) / (1 - 1e-3)
        cells = ((high - t) / (high - low) * 90).sort().values
        assert float((cells.diff() - 1).abs().max()) < 1e-6
        assert 0 <= float(cells[0]) < 1
        assert float(t.min()) > 0


def test_more_times_a_sequence_lower_the_error(world, oracle_of):
    model, batches = TableModel(oracle=oracle_of(world), kernel=Masked(3)), held_out(world, 2000)
    bounds = [
        likelihood_bound(
            model,
            Masked(3),
            batches,
            generator=torch.Generator().manual_seed(0),
            times_per_sequence=times,
            schedule=Middle(),
        )
        for times in (1, 4)
    ]
    assert bounds[1].standard_error == pytest.approx(bounds[0].standard_error / 2, rel=0.1)
    assert bounds[0].tokens == bounds[1].tokens


def test_identity_27_the_probe_sees_no_own_token_in_a_leave_one_out_posterior(world, oracle_of):
    """0 for the exact one in either coordinate; for a denoiser read as one, its mean change by enumeration."""
    kernel, alpha = Uniform(3), 0.5
    state = TokenState(tokens=world.sequences.repeat(40, 1))
    rows = len(state.tokens)

    def probe(model):
        return own_token_sensitivity(
            model,
            state,
            one(alpha, rows),
            vocab_size=3,
            generator=torch.Generator().manual_seed(0),
        )

    for kind in ("leave_one_out", "denoiser"):
        assert probe(TableModel(oracle=oracle_of(world), kernel=kernel, kind=kind)) < 1e-14
    table = TableModel(oracle=oracle_of(world), kernel=kernel, kind="denoiser")

    def misread(where, alpha, *, rows=None):
        return GivenLogits(logits=table(where, alpha).logits, kind="leave_one_out")(where, alpha, rows=rows)

    denoiser = table(TokenState(tokens=world.sequences), one(alpha, 9)).log_probs().exp().view(3, 3, 2, 3)
    first = torch.stack([(denoiser[:, :, 0] - denoiser[:, :, 0].roll(k, 0)).abs().sum(-1) / 2 for k in (1, 2)])
    second = torch.stack([(denoiser[:, :, 1] - denoiser[:, :, 1].roll(k, 1)).abs().sum(-1) / 2 for k in (1, 2)])
    expected = float((first.mean() + second.mean()) / 2)
    assert expected > 0.2
    assert probe(misread) == pytest.approx(expected, rel=0.03)


def test_the_probe_is_independent_of_the_batch_with_a_generator_for_each_sequence(world, oracle_of):
    table = TableModel(oracle=oracle_of(world), kernel=Uniform(3), kind="denoiser")

    def misread(where, alpha, *, rows=None):
        return GivenLogits(logits=table(where, alpha).logits, kind="leave_one_out")(where, alpha, rows=rows)

    def probe(rows):
        return own_token_sensitivity(
            misread,
            TokenState(tokens=world.sequences[rows]),
            one(0.5, len(rows)),
            vocab_size=3,
            positions=2,
            trials=2,
            generator=[torch.Generator().manual_seed(row) for row in rows],
        )

    assert probe([0, 4, 8]) == pytest.approx(sum(probe([row]) for row in (0, 4, 8)) / 3, rel=1e-12)


def test_bounds_that_cannot_be_are_refused(world, oracle_of):
    for kernel in (Masked(3), Absorbing(3), RefreshedAbsorbing(3)):
        model = TableModel(oracle=oracle_of(world), kernel=kernel)
        with pytest.raises(ValueError, match=f"{type(kernel).__name__} .* infinite prior term"):
            likelihood_bound(model, kernel, held_out(world, 100), generator=torch.Generator(), complete=True)
    model = TableModel(oracle=oracle_of(world), kernel=Uniform(3))
    with pytest.raises(ValueError, match="no sequences to score"):
        likelihood_bound(model, Uniform(3), [], generator=torch.Generator())
    single = likelihood_bound(model, Uniform(3), [TextBatch(tokens=world.sequences[:1])], generator=torch.Generator())
    assert single.standard_error == math.inf
