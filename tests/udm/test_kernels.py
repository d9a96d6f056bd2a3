"""Corruption and reverse steps of each kernel, exactly: the law of what the code draws, against enumeration.

Draws are functions of uniform numbers, so their law is the volume of the numbers that lead to each outcome; see
``law_of_draws``. Identities are numbered as in the docs.
"""

import itertools

import pytest
import torch

from wellposed.batches import TextBatch
from wellposed.udm.kernels import (
    Absorbing,
    Masked,
    MaximalCoupling,
    RefreshedAbsorbing,
    TokenState,
    Uniform,
    kernel_named,
    own_log_prob,
    uniform_bridge,
)
from wellposed.udm.models import GivenLogits, TableModel
from wellposed.udm.steps import SamplingSettings, ancestral_step

CLOSE = {"rtol": 0, "atol": 1e-12}
KERNELS = [Uniform(3), MaximalCoupling(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)]
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
STEPS = [(0.1, 0.3), (0.3, 0.5), (0.4, 1.0)]
by_step = pytest.mark.parametrize("step", STEPS)


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def numbers_of(kernel):
    """How many uniform numbers a reverse step consumes for each position."""
    return 5 if isinstance(kernel, RefreshedAbsorbing) else 2


def pick(state, rows):
    return TokenState(tokens=state.tokens[rows], noise=None if state.noise is None else state.noise[rows])


def once(table, states, alpha):
    """A model at some of these states, from one call of the table for all."""
    logits = table(states, one(alpha, len(states.tokens))).logits
    return lambda rows: GivenLogits(logits=logits[rows], kind=table.kind, channel=table.channel)


def step_law(enumeration, scripted, symbols_of, kernel, model, states, step, position):
    """The law of one position's state after ``ancestral_step``, for each of the states before it."""
    symbols = 9 if kernel.has_noise_tokens else 3 + (kernel.channel == "masked")

    def outcome(rows, numbers):
        state = pick(states, rows)
        with scripted(numbers.unbind(1)):
            after = ancestral_step(
                model(rows),
                kernel,
                state,
                one(step[0], len(rows)),
                one(step[1], len(rows)),
                canvas=TextBatch(tokens=state.tokens),
                settings=SamplingSettings(),
            )
        return symbols_of(kernel, after)[:, position]

    rows, count = len(states.tokens), numbers_of(kernel)
    return enumeration.law_of_draws(outcome, rows, count, outcomes=symbols)


@by_kernel
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_corruption_has_its_law(enumeration, scripted, channel_of, symbols_of, kernel, alpha):
    x_0 = torch.arange(3)[:, None]

    def outcome(rows, numbers):
        with scripted(numbers.unbind(1)):
            state = kernel.corrupt(x_0[rows], one(alpha, len(rows)), generator=None)
        assert (state.noise is not None) == kernel.has_noise_tokens
        return symbols_of(kernel, state)[:, 0]

    channel = channel_of(kernel, alpha)
    numbers = 1 if kernel.channel == "masked" else 2
    law = enumeration.law_of_draws(outcome, 3, numbers, outcomes=channel.shape[1])
    torch.testing.assert_close(law, channel, **CLOSE)


@by_kernel
def test_given_positions_stay_clean_and_certain(kernel):
    x_0 = torch.randint(0, 3, (500, 4), generator=torch.Generator().manual_seed(0))
    given = torch.rand(500, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    state = kernel.corrupt(x_0, one(0.0, 500), generator=torch.Generator().manual_seed(2), given=given)
    assert torch.equal(state.tokens[given], x_0[given])
    assert not torch.equal(state.tokens[~given], x_0[~given])
    if kernel.channel != "uniform":
        # A clue whose noise token were the clue itself would look uncertain.
        assert torch.equal(kernel.open(state), ~given)
    prior = kernel.prior(x_0, generator=torch.Generator().manual_seed(2), given=given)
    assert torch.equal(prior.tokens, state.tokens)
    if state.noise is not None:
        others = (state.noise - x_0)[given] % 3
        assert torch.bincount(others, minlength=3)[1:].min() > 300  # uniform over the other tokens
        assert (others != 0).all()


@by_kernel
def test_the_likelihood_is_the_channel_up_to_a_factor(enumeration, channel_of, states_of, kernel):
    for alpha in (0.2, 0.7):
        state = states_of(kernel, 1)
        likelihood = kernel.likelihood(state, one(alpha, len(state.tokens)))[:, 0]
        channel = channel_of(kernel, alpha).T
        expected = channel / channel.sum(-1, keepdim=True)
        torch.testing.assert_close(likelihood / likelihood.sum(-1, keepdim=True), expected, **CLOSE)


@by_step
def test_identity_4_the_plug_in_bridge_at_the_leave_one_out_posterior_is_exact(enumeration, step):
    """p(x_s at i | x_t) from the joint law of three times, by marginalising everything else."""
    world = enumeration.World.random(3, 2, seed=3)
    t, s = step
    path = enumeration.uniform_path(t, s, 3)
    q_t = enumeration.uniform_channel(t, 3)
    expected = torch.stack(
        [
            torch.einsum("ab,aex,by->xye", world.table, path, q_t),
            torch.einsum("ab,ax,bey->xye", world.table, q_t, path),
        ],
        2,
    ).reshape(9, 2, 3)
    expected = expected / expected.sum(-1, keepdim=True)
    arguments = (one(t, 9), one(s, 9))
    bridge = uniform_bridge(world.sequences, world.leave_one_out(q_t), *arguments)
    torch.testing.assert_close(bridge, expected, **CLOSE)
    # The mean over the denoiser of the bridges towards each token is the same; the denoiser plugged in is not.
    towards = enumeration.uniform_posterior_bridge(t, s, 3)
    denoiser = world.denoiser(q_t)
    mixed = torch.einsum("nlk,knle->nle", denoiser, towards[:, world.sequences])
    torch.testing.assert_close(bridge, mixed, **CLOSE)
    assert (uniform_bridge(world.sequences, denoiser, *arguments) - expected).abs().max() > 1e-2


@by_step
def test_identity_5_the_bridge_is_normalised_and_towards_one_token_it_is_bayes(enumeration, step):
    t, s = step
    probs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    tokens = torch.tensor([0, 1, 2, 3, 1])
    bridge = uniform_bridge(tokens, probs, one(t, 5), one(s, 5))
    torch.testing.assert_close(bridge.sum(-1), torch.ones(5, dtype=torch.float64), **CLOSE)
    assert (bridge >= 0).all()
    # In the form that the sum is said to have: weights over K alpha_t p[x_t] + 1 - alpha_t.
    own = probs.gather(-1, tokens[:, None])
    weights = (s - t) * probs + (1 - t / s) * (1 - s) / 4
    weights = weights.scatter_add(-1, tokens[:, None], 4 * t * own + t / s - t)
    torch.testing.assert_close(weights.sum(-1, keepdim=True), 4 * t * own + 1 - t, **CLOSE)
    towards = enumeration.uniform_posterior_bridge(t, s, 4)
    for x_0, x_t in itertools.product(range(4), repeat=2):
        one_hot = torch.nn.functional.one_hot(torch.tensor([x_0]), 4).double()
        row = uniform_bridge(torch.tensor([x_t]), one_hot, one(t), one(s))
        torch.testing.assert_close(row[0], towards[x_0, x_t], **CLOSE)


@by_kernel
def test_identity_11_the_last_step_draws_from_the_denoiser(world, oracle_of, channel_of, states_of, kernel):
    state = states_of(kernel, world.length)
    rows, t = len(state.tokens), 0.4
    channel = channel_of(kernel, t)
    model = TableModel(oracle=oracle_of(world), kernel=kernel)
    prediction = model(state, one(t, rows))
    plugged = prediction.to(kernel.plugs_in) if kernel.channel != "masked" else prediction
    bridge = kernel.bridge(state, plugged.log_probs().exp(), one(t, rows), one(1.0, rows))
    expected = world.denoiser(channel)
    if kernel.channel == "masked":
        assert not bridge[..., 3].any()
        bridge = bridge[..., :3]
    possible = expected.isfinite().all(-1).all(-1)
    torch.testing.assert_close(bridge[possible], expected[possible], **CLOSE)


@by_step
@by_kernel
def test_identity_12_a_step_has_the_law_of_the_dense_bridge(
    world, oracle_of, enumeration, scripted, states_of, symbols_of, kernel, step
):
    """Route-first, of either position of every state, with the exact model."""
    states = states_of(kernel, world.length)
    if kernel.has_noise_tokens:
        states = pick(states, slice(None, None, 7))  # 12 of 81
    rows = len(states.tokens)
    table = TableModel(oracle=oracle_of(world), kernel=kernel)
    model = once(table, states, step[0])
    clean = table(states, one(step[0], rows)).to(kernel.plugs_in).log_probs().exp()
    bridge = kernel.bridge(states, clean, one(step[0], rows), one(step[1], rows))
    for position in range(world.length):
        law = step_law(enumeration, scripted, symbols_of, kernel, model, states, step, position)
        if kernel.has_noise_tokens:
            law = law.view(rows, 3, 3)
            if not isinstance(kernel, RefreshedAbsorbing):
                noise = torch.nn.functional.one_hot(states.noise[:, position], 3).double()
                torch.testing.assert_close(law.sum(1), noise, **CLOSE)
            law = law.sum(-1)
        torch.testing.assert_close(law, bridge[:, position], **CLOSE)


def test_identity_12_drawn_with_a_generator(world, oracle_of, enumeration):
    """The same with random numbers: 2e5 steps from one state."""
    kernel, tokens = Uniform(3), torch.tensor([[0, 2]]).expand(200_000, -1)
    model = TableModel(oracle=oracle_of(world), kernel=kernel)
    state, t, s = TokenState(tokens=tokens), one(0.4, len(tokens)), one(0.7, len(tokens))
    clean = model(TokenState(tokens=tokens[:1]), t[:1]).log_probs().exp()
    each = kernel.bridge(TokenState(tokens=tokens[:1]), clean, t[:1], s[:1])[0]
    after = ancestral_step(
        model,
        kernel,
        state,
        t,
        s,
        canvas=TextBatch(tokens=tokens),
        settings=SamplingSettings(),
        generator=torch.Generator().manual_seed(0),
    )
    law = enumeration.law_of(after.tokens, 3)
    assert enumeration.total_variation(law, torch.outer(each[0], each[1]).flatten()) < 5e-3


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_identity_13_pair_law(world, enumeration, channel_of, states_of, alpha):
    """Forgetting u leaves the pair (x_0, x_t) of uniform diffusion; a revealed position is certain."""
    kernel = Absorbing(3)
    channel = channel_of(kernel, alpha)
    torch.testing.assert_close(channel.view(3, 3, 3).sum(-1), enumeration.uniform_channel(alpha, 3), **CLOSE)
    state = states_of(kernel, world.length)
    revealed = ~kernel.open(state)
    certain = torch.nn.functional.one_hot(state.tokens, 3).double()
    denoiser = world.denoiser(channel)
    torch.testing.assert_close(denoiser[revealed], certain[revealed], **CLOSE)
    assert (denoiser - certain)[~revealed].abs().max() > 0.1


@pytest.fixture(scope="module")
def known():
    """Laws of steps that several tests look at."""
    return {}


@pytest.fixture
def one_site_steps(enumeration, scripted, states_of, symbols_of, known):
    """P(state after | state before, x_0) of one position, (9, 3, M), from the production step told what x_0 is."""

    def steps(kernel, step):
        if (kernel, step) not in known:
            known[kernel, step] = compute_one_site_steps(enumeration, scripted, states_of, symbols_of, kernel, step)
        return known[kernel, step]

    return steps


def compute_one_site_steps(enumeration, scripted, states_of, symbols_of, kernel, step):
    single = states_of(kernel, 1)
    count = len(single.tokens)
    rows = torch.arange(3).repeat_interleave(count)
    states = pick(single, torch.arange(count).repeat(3))
    log_one_hot = torch.eye(3, dtype=torch.float64).log()

    def model(chosen):
        logits = log_one_hot[rows[chosen]][:, None]
        return GivenLogits(logits=logits, kind=kernel.plugs_in, channel=kernel.channel)

    law = step_law(enumeration, scripted, symbols_of, kernel, model, states, step, 0)
    return law.view(3, count, -1).transpose(0, 1)


@by_step
@by_kernel
def test_identities_14_and_15_a_step_carries_the_marginal_over(world, one_site_steps, channel_of, kernel, step):
    """The law at t, a draw of all clean tokens from their joint posterior, then the production step towards them.

    The result is the law at s, of the pair (x, u) for absorbing kernels. (14: Absorbing, 15: RefreshedAbsorbing.)
    """
    t, s = step
    towards = one_site_steps(kernel, step)
    joint = world.joint(channel_of(kernel, t)).view(3, 3, *[towards.shape[0]] * 2)
    after = torch.einsum("abpq,pax,qby->xy", joint, towards, towards).flatten()
    torch.testing.assert_close(after, world.marginal(channel_of(kernel, s)), **CLOSE)


def test_identity_14_the_factorised_posterior_is_only_approximate(
    world, oracle_of, enumeration, scripted, channel_of, states_of, symbols_of
):
    """What one parallel step costs: positions drawn independently given x_t. It vanishes with the step."""
    kernel, t = Absorbing(3), 0.3
    states = states_of(kernel, world.length)
    model = once(TableModel(oracle=oracle_of(world), kernel=kernel), states, t)
    errors = []
    for s in (0.9, 0.36):
        first, second = (
            step_law(enumeration, scripted, symbols_of, kernel, model, states, (t, s), i) for i in range(2)
        )
        after = torch.einsum("n,nx,ny->xy", world.marginal(channel_of(kernel, t)), first, second).flatten()
        errors.append(enumeration.total_variation(after, world.marginal(channel_of(kernel, s))))
    assert errors[0] > 5e-2
    # Of second order in the step: a tenth of it leaves a hundredth.
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


@by_step
def test_identity_16_the_noise_token_given_both_ends(enumeration, one_site_steps, step):
    """p(u | x_0, x_s): x_s where they differ, else x_s with probability 1 / (1 + (K - 1) alpha_s)."""
    s = step[1]
    kernel = RefreshedAbsorbing(3)
    towards = one_site_steps(kernel, step).view(9, 3, 3, 3)
    pair = enumeration.absorbing_channel(s, 3).view(3, 3, 3)  # x_0, x_s, u
    conditional = pair / pair.sum(-1, keepdim=True)
    kept = 1 / (1 + 2 * s)
    for x_0, x_s in itertools.product(range(3), repeat=2):
        if x_0 == x_s or s < 1:
            rule = torch.full((3,), (1 - kept) / 2, dtype=torch.float64) if x_0 == x_s else torch.zeros(3).double()
            rule[x_s] = kept if x_0 == x_s else 1.0
            torch.testing.assert_close(conditional[x_0, x_s], rule, **CLOSE)
    for before, x_0 in itertools.product(range(9), range(3)):
        x, u = divmod(before, 3)
        if x not in (u, x_0):
            continue  # a revealed token that is not x_0 cannot be
        law = towards[before, x_0]
        reached = law.sum(-1) > 1e-9
        refreshed = law[reached] / law[reached].sum(-1, keepdim=True)
        torch.testing.assert_close(refreshed, conditional[x_0][reached], rtol=0, atol=1e-9)


@by_step
def test_identity_17_maximal_coupling(enumeration, one_site_steps, step):
    """It carries q_t(. | x_0) to q_s(. | x_0), and x_s = x_t as often as any coupling can have it."""
    t, s = step
    kernel = MaximalCoupling(3)
    bridge = one_site_steps(kernel, step)  # x_t, x_0, x_s
    q_t, q_s = enumeration.uniform_channel(t, 3), enumeration.uniform_channel(s, 3)
    torch.testing.assert_close(torch.einsum("ax,xae->ae", q_t, bridge), q_s, **CLOSE)
    stays = torch.einsum("ax,xax->a", q_t, bridge)
    torch.testing.assert_close(stays, torch.minimum(q_t, q_s).sum(-1), **CLOSE)
    # The bridge of Uniform has the same marginals and moves more often.
    other = one_site_steps(Uniform(3), step)
    torch.testing.assert_close(torch.einsum("ax,xae->ae", q_t, other), q_s, **CLOSE)
    if s < 1:
        assert (torch.einsum("ax,xax->a", q_t, other) < stays - 1e-4).all()


def test_absorbing_paths_are_not_those_of_the_uniform_chain(enumeration):
    """Equal laws at any one time, but (x_s, x_t) given x_0 differs: TV 0.133 for K = 5, alpha = (0.6, 0.35).

    The refreshed kernel has the uniform chain's bridge back.
    """
    t, s, size = 0.35, 0.6, 5
    uniform = enumeration.uniform_path(t, s, size)[0]  # x_0 = 0: (x_s, x_t)
    absorbing = torch.zeros(size, size, dtype=torch.float64)
    for u in range(size):  # survives both, dies in between, is dead
        for x_s, x_t, weight in ((0, 0, t), (0, u, s - t), (u, u, 1 - s)):
            absorbing[x_s, x_t] += weight / size
    torch.testing.assert_close(absorbing.sum(0), uniform.sum(0), **CLOSE)
    torch.testing.assert_close(absorbing.sum(1), uniform.sum(1), **CLOSE)
    assert enumeration.total_variation(absorbing.flatten(), uniform.flatten()) == pytest.approx(0.133, abs=5e-4)
    # Of the production bridges, over the pair (x_t, u) given x_0 = 0.
    pairs = enumeration.absorbing_channel(t, size)[0].view(size, size)
    x, u = (each.flatten()[:, None] for each in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    state, towards = TokenState(tokens=x, noise=u), torch.eye(size, dtype=torch.float64)[:1].expand(size**2, 1, -1)
    for kernel, expected in ((Absorbing(size), absorbing), (RefreshedAbsorbing(size), uniform)):
        bridge = kernel.bridge(state, towards, one(t, size**2), one(s, size**2)).view(size, size, size)
        path = torch.einsum("xu,xue->ex", pairs, bridge)
        torch.testing.assert_close(path, expected, **CLOSE)


@by_kernel
def test_positions_that_are_not_free_stay(world, oracle_of, states_of, kernel):
    states = states_of(kernel, world.length)
    rows = len(states.tokens)
    valid = torch.tensor([True, False]).expand(rows, -1)
    model = TableModel(oracle=oracle_of(world), kernel=kernel)
    moved = torch.zeros(2, dtype=torch.bool)
    for seed in range(20):
        after = ancestral_step(
            model,
            kernel,
            states,
            one(0.4, rows),
            one(0.8, rows),
            canvas=TextBatch(tokens=states.tokens, valid=valid),
            settings=SamplingSettings(),
            generator=torch.Generator().manual_seed(seed),
        )
        moved |= (after.tokens != states.tokens).any(0)
        if states.noise is not None:
            assert torch.equal(after.noise[:, 1], states.noise[:, 1])
    assert moved.tolist() == [True, False]


def test_own_log_prob_in_chunks(monkeypatch):
    from wellposed.udm import draws

    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.arange(9) % 7
    expected = logits.log_softmax(-1)[torch.arange(9), tokens]
    torch.testing.assert_close(own_log_prob(logits, tokens), expected, rtol=0, atol=0)
    monkeypatch.setattr(draws, "CACHED", 15)
    torch.testing.assert_close(own_log_prob(logits, tokens), expected, rtol=0, atol=1e-15)
    assert own_log_prob(logits[:0], tokens[:0]).shape == (0,)
    assert own_log_prob(logits.bfloat16(), tokens).dtype == torch.float32


def test_states_and_sizes_that_make_no_sense_are_refused():
    for kernel in KERNELS:
        with pytest.raises(ValueError, match=r"clean tokens must lie in \[0, 3\), got 0 to 3"):
            kernel.corrupt(torch.tensor([[0, 3]]), one(0.5), generator=None)
        with pytest.raises(ValueError, match=r"got -1 to 2"):
            kernel.corrupt(torch.tensor([[-1, 2]]), one(0.5), generator=None)
    with pytest.raises(ValueError, match="at least two tokens"):
        Uniform(1)
    for kernel in (Absorbing(3), RefreshedAbsorbing(3)):
        with pytest.raises(ValueError, match=r"TokenState\(tokens=x, noise=u\)"):
            kernel.open(TokenState(tokens=torch.tensor([[0]])))


@by_kernel
def test_kernels_have_names_in_configurations(kernel):
    names = {Uniform: "uniform", MaximalCoupling: "maximal_coupling", Masked: "masked", Absorbing: "absorbing"}
    assert kernel_named(names.get(type(kernel), "refreshed_absorbing"), 3) == kernel
    with pytest.raises(ValueError, match="write one of uniform, masked, absorbing"):
        kernel_named("gaussian", 3)
