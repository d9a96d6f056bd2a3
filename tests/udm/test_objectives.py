"""Losses: what they are (rates of jumps), whom they want (what each kernel plugs in), what they ignore."""

import math

import pytest
import torch
from torch import nn

from wellposed.batches import TextBatch
from wellposed.paths import Cosine, Linear
from wellposed.training import StepContext
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.models import GivenLogits, TableModel
from wellposed.udm.objectives import jump_nelbo, nelbo_density, sequence_means, token_losses, token_objective
from wellposed.udm.prediction import Prediction

CLOSE = {"rtol": 0, "atol": 1e-12}
KERNELS = [Uniform(3), MaximalCoupling(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)]
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
by_alpha = pytest.mark.parametrize("alpha", [0.03, 0.3, 0.7, 0.97])
SLOPE = -0.8


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def random_rows(count, size, seed=0):
    """Distributions p, clean tokens, and the tokens seen; half of them the clean one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, size, generator=generator, dtype=torch.float64)
    x_0 = torch.randint(0, size, (count,), generator=generator)
    x_t = torch.where(torch.arange(count) % 2 == 0, x_0, torch.randint(0, size, (count,), generator=generator))
    return logits, x_0, x_t


def density(kernel, kind, logits, x_0, seen, alpha):
    rows = len(x_0)
    prediction = Prediction(kind=kind, logits=logits, alpha=one(alpha, rows), tokens=seen, channel=kernel.channel)
    return nelbo_density(kernel, prediction, x_0, torch.full((rows,), SLOPE, dtype=torch.float64))


@by_alpha
def test_identity_6_three_forms_of_the_plug_in_bound(alpha):
    """Rates, divergences and softplus, as published, written out here; through nelbo_density on the other side."""
    size = 5
    logits, x_0, x_t = random_rows(200, size)
    p, rows, beta = logits.softmax(-1), torch.arange(200), -SLOPE / alpha
    clean = torch.nn.functional.one_hot(x_0, size).double()
    bar, bar_p = size * alpha * clean + 1 - alpha, size * alpha * p + 1 - alpha
    own, own_p = bar[rows, x_t], bar_p[rows, x_t]
    ratios = bar.log() - own.log()[:, None] - bar_p.log() + own_p.log()[:, None]
    a = beta / size * (size / own_p - size / own + (bar / own[:, None] * ratios).sum(-1))

    q, q_p = bar / size, bar_p / size
    rho = q[rows, x_t] / q_p[rows, x_t]
    b = beta / (size * q[rows, x_t]) * ((q * (q / q_p).log()).sum(-1) + rho - 1 - rho.log())

    c_odds = math.log(size * alpha) - math.log1p(-alpha)
    raised = torch.nn.functional.softplus(logits.log_softmax(-1) + c_odds, threshold=1e9)
    star, total = math.log1p(math.exp(c_odds)), raised.sum(-1)
    at_t, at_0 = raised[rows, x_t], raised[rows, x_0]
    equal = size / (1 - alpha) * ((-at_t).exp() - math.exp(-star))
    equal = equal + math.exp(-star) * (size * at_t - total - (size - 1) * star)
    other = size / (1 - alpha) * ((-at_t).exp() - 1)
    other = other + math.exp(star) * (star + at_t - at_0) + (size - 1) * at_t + at_0 - total
    c = beta / size * torch.where(x_0 == x_t, equal, other)

    value = density(Uniform(size), "leave_one_out", logits, x_0, x_t, alpha)
    for form in (a, b, c):
        torch.testing.assert_close(value, form, rtol=1e-9, atol=1e-10)
    assert (value >= 0).all()


@by_kernel
def test_the_loss_does_not_depend_on_what_the_head_is(kernel):
    """The same posterior in another coordinate has the same loss: the head and the loss are two choices."""
    logits, x_0, seen = random_rows(50, 3)
    first = Prediction(kind="leave_one_out", logits=logits, alpha=one(0.4, 50), tokens=seen, channel=kernel.channel)
    slope = torch.full((50,), SLOPE, dtype=torch.float64)
    expected = nelbo_density(kernel, first, x_0, slope)
    for kind in ("denoiser", "score") if kernel.channel == "uniform" else ("denoiser",):
        torch.testing.assert_close(nelbo_density(kernel, first.to(kind), x_0, slope), expected, rtol=1e-9, atol=1e-12)


@by_kernel
@by_alpha
def test_identity_7_the_limit_of_short_steps(kernel, alpha):
    """KL of the bridge towards x_0 from the bridge of the prediction, over h, for h = 1e-5.

    For the absorbing kernels both see u, and the bridge is that of ``Absorbing``: they share the training law.
    """
    size, h = 4, 1e-5
    kernel = type(kernel)(size)
    logits, x_0, seen = random_rows(60, size)
    kind = "leave_one_out" if kernel.plugs_in == "leave_one_out" else "denoiser"
    tokens = torch.full_like(seen, size) if kernel.channel == "masked" else seen
    state = TokenState(tokens=tokens[:, None], noise=tokens[:, None] if kernel.has_noise_tokens else None)
    bridge = Absorbing(size).bridge if kernel.has_noise_tokens else kernel.bridge
    alpha_t, alpha_s = one(alpha, 60), one(alpha - SLOPE * h, 60)
    exact = bridge(state, torch.nn.functional.one_hot(x_0, size).double()[:, None], alpha_t, alpha_s)[:, 0]
    guess = bridge(state, logits.softmax(-1)[:, None], alpha_t, alpha_s)[:, 0]
    divergence = (torch.special.xlogy(exact, exact) - torch.special.xlogy(exact, guess)).sum(-1)
    value = density(kernel, kind, logits, x_0, seen, alpha)
    torch.testing.assert_close(value, divergence / h, rtol=1e-3, atol=1e-3)


@by_alpha
def test_identity_18_jumps_are_a_generalised_divergence_of_rates(alpha):
    """sum_y lambda log(lambda / lambda^p) - lambda + lambda^p over y != x_t, lambda = r [y = x_0], lambda^p = r d_y.

    That is the integrand of discrete flow matching with a mixture path, and with u for x_t or the mask for it that of
    the absorbing and masked kernels; for ``Uniform`` the rates are those of the reversed chain.
    """
    logits, x_0, seen = random_rows(80, 4)
    d, rows, r = logits.softmax(-1), torch.arange(80), -SLOPE / (1 - alpha)

    def divergence(rates, rates_p, resting):
        terms = torch.special.xlogy(rates, rates) - torch.special.xlogy(rates, rates_p) - rates + rates_p
        if resting is not None:
            terms[rows, resting] = 0
        return terms.sum(-1)

    clean = torch.nn.functional.one_hot(x_0, 4).double()
    for kernel in (MaximalCoupling(4), Absorbing(4), RefreshedAbsorbing(4)):
        value = density(kernel, "denoiser", logits, x_0, seen, alpha)
        torch.testing.assert_close(value, divergence(r * clean, r * d, seen), rtol=1e-12, atol=1e-12)
    value = density(Masked(4), "denoiser", logits, x_0, seen, alpha)
    torch.testing.assert_close(value, divergence(r * clean, r * d, None), rtol=1e-12, atol=1e-12)

    def reverse_rates(p):
        q = alpha * p + (1 - alpha) / 4
        return -SLOPE / alpha / 4 * q / q[rows, seen][:, None]

    value = density(Uniform(4), "leave_one_out", logits, x_0, seen, alpha)
    expected = divergence(reverse_rates(clean), reverse_rates(d), seen)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def expected_loss(kernel, kind, logits, weights, seen, alpha, *, loss="nelbo"):
    """Mean over x_0 with these weights, one row of logits after the other."""
    size = len(weights)
    count = len(logits)
    rows = logits.repeat_interleave(size, 0)
    x_0, tokens = torch.arange(size).repeat(count), torch.full((count * size,), seen)
    if loss == "nelbo":
        values = density(kernel, kind, rows, x_0, tokens, alpha)
    else:
        model = GivenLogits(logits=rows[:, None], kind=kind, channel=kernel.channel)
        values = token_losses(
            model,
            kernel,
            TextBatch(tokens=x_0[:, None]),
            TokenState(tokens=tokens[:, None]),
            one(alpha, len(rows)),
            torch.full((len(rows),), SLOPE, dtype=torch.float64),
            loss=loss,
        )[:, 0]
    return (values.view(count, size) * weights).sum(-1)


@pytest.mark.parametrize("state", range(9))
def test_identity_8_the_leave_one_out_posterior_minimises_the_plug_in_bound(world, enumeration, state):
    """E_{x_0 ~ d} of the loss, at one of two positions of every state: least at pi, larger at d, flat at pi."""
    alpha, channel = 0.5, enumeration.uniform_channel(0.5, 3)
    denoiser, loo = world.denoiser(channel)[state, 0], world.leave_one_out(channel)[state, 0]
    seen = int(world.sequences[state, 0])

    def value(logits):
        return expected_loss(Uniform(3), "leave_one_out", logits, denoiser, seen, alpha)

    best = value(loo.log()[None])
    noise = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, far = loo.log() + 0.1 * noise, 3 * noise
    assert (value(torch.cat([near, far])) > best).all()
    assert float(value(denoiser.log()[None])) > float(best) + 1e-3
    logits = loo.log()[None].clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(logits).sum(), logits)
    assert float(slope.abs().max()) < 1e-8


@pytest.mark.parametrize("state", [0, 4, 5])
def test_identity_9_the_denoiser_minimises_cross_entropy(world, enumeration, state):
    alpha, channel = 0.5, enumeration.uniform_channel(0.5, 3)
    denoiser, loo = world.denoiser(channel)[state, 0], world.leave_one_out(channel)[state, 0]
    seen = int(world.sequences[state, 0])

    def value(logits, kind="denoiser"):
        return expected_loss(Uniform(3), kind, logits, denoiser, seen, alpha, loss="cross_entropy")

    best = value(denoiser.log()[None])
    noise = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (value(torch.cat([denoiser.log() + 0.1 * noise, 3 * noise])) > best).all()
    assert float(best) == pytest.approx(float(-(denoiser * denoiser.log()).sum()), abs=1e-12)
    assert float(value(loo.log()[None])) > float(best) + 1e-3
    # With a head that is the leave-one-out posterior the same optimum is reached there.
    torch.testing.assert_close(value(loo.log()[None], "leave_one_out"), best, **CLOSE)


@pytest.mark.parametrize("kernel", [MaximalCoupling(3), Masked(3), Absorbing(3)], ids=lambda k: type(k).__name__)
def test_jump_bounds_are_minimised_by_the_denoiser(world, enumeration, channel_of, states_of, kernel):
    """The posterior given all that is observed, u included."""
    alpha, channel = 0.5, channel_of(kernel, 0.5)
    states = states_of(kernel, 2)
    noise = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for state in kernel.open(states)[:, 0].nonzero().flatten()[::3].tolist():
        denoiser = world.denoiser(channel)[state, 0]
        seen = 0 if kernel.channel == "masked" else int(states.tokens[state, 0])
        best = expected_loss(kernel, "denoiser", denoiser.log()[None], denoiser, seen, alpha)
        others = expected_loss(
            kernel, "denoiser", torch.cat([denoiser.log() + 0.1 * noise, 3 * noise]), denoiser, seen, alpha
        )
        assert (others > best).all()


def test_a_jump_bound_is_not_negative_and_vanishes_at_the_truth():
    """Also in float32, where 1 - p would cancel."""
    logits, x_0, resting = random_rows(500, 6)
    assert (jump_nelbo(logits, x_0, resting) >= 0).all()
    sharp = 40 * torch.nn.functional.one_hot(x_0, 6).float()
    values = jump_nelbo(sharp, x_0, resting)
    assert (values >= 0).all()
    assert float(values.max()) < 1e-15
    # An active position whose clean token is u is still uncertain: 1 - p[u].
    value = jump_nelbo(torch.zeros(1, 4), torch.tensor([2]), torch.tensor([2]))
    assert float(value) == pytest.approx(0.75)


@by_kernel
@pytest.mark.parametrize("loss", ["nelbo", "cross_entropy"])
def test_nothing_is_lost_where_nothing_is_uncertain(kernel, loss):
    """0 at given positions, padding, and what is revealed; the model is asked about the others only, in their order."""
    batch, length, size = 40, 6, 3
    x_0 = torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(0))
    given = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.3
    valid = torch.arange(length).expand(batch, -1) < 5
    alpha = torch.linspace(0.05, 0.95, batch, dtype=torch.float64)
    slope = torch.linspace(-0.5, -2, batch, dtype=torch.float64)
    state = kernel.corrupt(x_0, alpha, generator=torch.Generator().manual_seed(2), given=given)
    logits = torch.randn(batch, length, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kind = "denoiser" if loss == "cross_entropy" else kernel.plugs_in
    asked = []

    class Asked(GivenLogits):
        def __call__(self, state, alpha, **inputs):
            asked.append(inputs)
            return super().__call__(state, alpha, **inputs)

    model = Asked(logits=logits, kind=kind, channel=kernel.channel)
    everything = TextBatch(tokens=x_0, given=given, valid=valid)
    losses = token_losses(model, kernel, everything, state, alpha, slope, loss=loss)
    uncertain = kernel.open(state) & ~given & valid
    assert (losses[~uncertain] == 0).all()
    assert (losses[uncertain] > 0).all()
    assert len(asked) == 1
    assert torch.equal(asked[0]["rows"], uncertain)
    assert asked[0]["given"] is given
    assert asked[0]["valid"] is valid
    # One position at a time.
    for row, i in uncertain.nonzero()[::7].tolist():
        tokens = torch.zeros(1, dtype=torch.long) if kernel.channel == "masked" else state.tokens[row, i : i + 1]
        if loss == "nelbo":
            prediction = Prediction(
                kind=kind,
                logits=logits[row, i][None],
                alpha=alpha[row : row + 1],
                tokens=tokens,
                channel=kernel.channel,
            )
            single = nelbo_density(kernel, prediction, x_0[row, i : i + 1], slope[row : row + 1])
        else:
            single = -logits[row, i].log_softmax(-1)[x_0[row, i]][None]
        torch.testing.assert_close(losses[row, i][None], single, rtol=1e-12, atol=0)
    if kernel.channel != "uniform":
        # And none at all where everything is given.
        nothing = TextBatch(tokens=x_0, given=torch.ones_like(given))
        clean = kernel.corrupt(x_0, alpha, generator=None, given=nothing.given)
        assert not token_losses(model, kernel, nothing, clean, alpha, slope, loss=loss).any()


@by_kernel
def test_identity_25_padding_does_not_change_the_loss(enumeration, oracle_of, kernel):
    """A sequence of three with its last position padded loses what the pair alone loses."""
    world = enumeration.World.random(3, 3, seed=5)
    pair = enumeration.World(world.table.sum(-1))
    x_0 = world.sequences
    valid = torch.tensor([True, True, False]).expand(27, -1)
    alpha, slope = one(0.5, 27), torch.full((27,), SLOPE, dtype=torch.float64)
    state = kernel.corrupt(x_0, alpha, generator=torch.Generator().manual_seed(0))
    padded = token_losses(
        TableModel(oracle=oracle_of(world), kernel=kernel),
        kernel,
        TextBatch(tokens=x_0, valid=valid),
        state,
        alpha,
        slope,
    )
    cropped = TokenState(tokens=state.tokens[:, :2], noise=None if state.noise is None else state.noise[:, :2])
    alone = token_losses(
        TableModel(oracle=oracle_of(pair), kernel=kernel),
        kernel,
        TextBatch(tokens=x_0[:, :2]),
        cropped,
        alpha,
        slope,
    )
    torch.testing.assert_close(padded[:, :2], alone, rtol=1e-9, atol=1e-12)
    assert not padded[:, 2].any()
    assert alone.any()


@by_kernel
def test_identity_25_renaming_the_tokens_does_not_change_the_loss(enumeration, oracle_of, kernel):
    world = enumeration.World.random(3, 2, seed=5)
    order = torch.tensor([2, 0, 1])  # the new name of each token
    back = order.argsort()
    renamed = enumeration.World(world.table[back][:, back])
    x_0, alpha, slope = world.sequences, one(0.5, 9), torch.full((9,), SLOPE, dtype=torch.float64)
    names = torch.cat([order, torch.tensor([3])])  # the mask keeps its own
    for seed in range(5):
        state = kernel.corrupt(x_0, alpha, generator=torch.Generator().manual_seed(seed))
        other = TokenState(tokens=names[state.tokens], noise=None if state.noise is None else names[state.noise])
        losses = [
            token_losses(TableModel(oracle=oracle_of(w), kernel=kernel), kernel, TextBatch(tokens=x), s, alpha, slope)
            for w, x, s in ((world, x_0, state), (renamed, order[x_0], other))
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-12)


def test_means_are_over_free_tokens_of_each_sequence():
    losses = torch.tensor([[1.0, 2, 6], [4, 5, 6], [7, 8, 9]])
    free = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    assert sequence_means(losses, free).tolist() == [3.5, 0, 8]


class Recorder(nn.Module):
    """A network with a table of logits for each token; keeps what it was called with."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        self.table = nn.Parameter(torch.randn(size + 1, size, generator=torch.Generator().manual_seed(0), dtype=dtype))
        self.calls = []

    def forward(self, input_ids, alpha, **inputs):
        self.calls.append({"input_ids": input_ids, "alpha": alpha, **inputs})
        return self.table[input_ids[inputs["rows"]]]


def context(rows, batch_size, step=0):
    return StepContext(player="net", step=step, seed=0, rows=rows, batch_size=batch_size, device=torch.device("cpu"))


def batch_of(count, length=5, size=3, *, given=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, size, (count, length), generator=generator)
    mask = torch.rand(count, length, generator=generator) < 0.4 if given else None
    return TextBatch(tokens=tokens, given=mask)


@by_kernel
@pytest.mark.parametrize("loss", ["nelbo", "cross_entropy"])
def test_an_objective_is_the_mean_of_token_losses(kernel, loss):
    """At times spread over [t_min, 1]; the corruption is of the kernel's law; given tokens stay clean."""
    network, batch = Recorder(3), batch_of(64)
    objective = token_objective(kernel, schedule=Cosine(), loss=loss, head="denoiser", t_min=0.1)
    value, extra = objective({"net": network}, batch, context(range(64), 64))
    assert extra == {}
    (call,) = network.calls
    assert call["given"] is batch.given
    assert ("noise_ids" in call) == kernel.has_noise_tokens
    noisy = call["input_ids"]
    assert torch.equal(noisy[batch.given], batch.tokens[batch.given])
    # One time for each of 64 equal parts of [0.1, 1].
    t = torch.acos(call["alpha"]) / (math.pi / 2)
    cells = ((1 - t) / 0.9 * 64).sort().values
    assert (cells.diff() - 1).abs().max() < 1e-6
    assert 0 <= float(cells[0]) < 1
    # Replayed from what the network saw.
    state = TokenState(tokens=noisy, noise=call.get("noise_ids"))
    losses = token_losses(
        GivenLogits(logits=network.table[noisy], kind="denoiser", channel=kernel.channel),
        kernel,
        batch,
        state,
        call["alpha"],
        Cosine().alpha_derivative(t),
        loss=loss,
    )
    free = ~batch.given
    expected = (losses.sum(-1) / free.sum(-1).clamp_min(1)).mean()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    value.backward()
    assert network.table.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", [Uniform(3), Absorbing(3)], ids=lambda k: type(k).__name__)
def test_a_batch_may_be_shared_out(kernel):
    """Whole, or in shares of two processes: each row meets the same time and noise, and the mean is the same."""
    batch, objective = batch_of(8), token_objective(kernel)

    def share(rows):
        part = TextBatch(tokens=batch.tokens[rows.start : rows.stop], given=batch.given[rows.start : rows.stop])
        network = Recorder(3)
        value, _ = objective({"net": network}, part, context(rows, 8))
        return value, network.calls[0]["input_ids"]

    whole, noisy = share(range(8))
    shares = [share(range(4)), share(range(4, 8))]
    assert torch.equal(torch.cat([tokens for _, tokens in shares]), noisy)
    torch.testing.assert_close(sum(value for value, _ in shares) / 2, whole, rtol=1e-12, atol=0)


def test_heads_that_mean_the_same_have_the_same_loss():
    """A head that is the denoiser, converted on the way, against one that gives the leave-one-out posterior."""

    class Converted(Recorder):
        def forward(self, input_ids, alpha, **inputs):
            logits = super().forward(input_ids, alpha, **inputs)
            rows = inputs["rows"]
            each = alpha.repeat_interleave(rows.sum(-1))
            evidence = torch.log1p(3 * each / (1 - each))
            return logits.scatter_add(-1, input_ids[rows][:, None], evidence[:, None])

    batch = batch_of(32, given=False)
    for loss in ("nelbo", "cross_entropy"):
        values = [
            token_objective(Uniform(3), head=head, loss=loss)({"net": network}, batch, context(range(32), 32))[0]
            for head, network in (("leave_one_out", Recorder(3)), ("denoiser", Converted(3)))
        ]
        torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=0)


def test_networks_that_do_not_take_given_are_not_handed_it():
    network = Recorder(3)
    token_objective(Uniform(3), knows_given=False)({"net": network}, batch_of(4), context(range(4), 4))
    assert "given" not in network.calls[0]


def test_losses_are_finite_in_half_precision_at_either_end():
    """bfloat16 logits, K = 1000, alpha within 1e-9 of both ends; the gradient too."""
    size = 1000
    logits = torch.randn(4, 1, size, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    x_0 = torch.tensor([[1], [2], [3], [4]])
    alpha = torch.tensor([1e-9, 1e-3, 0.999, 1 - 1e-9], dtype=torch.float64)
    slope = torch.full((4,), -1.0, dtype=torch.float64)
    for kernel in (Uniform(size), MaximalCoupling(size), Masked(size), Absorbing(size)):
        seen = torch.full_like(x_0, size) if kernel.channel == "masked" else torch.tensor([[1], [7], [3], [9]])
        state = TokenState(tokens=seen, noise=seen if kernel.has_noise_tokens else None)
        model = GivenLogits(logits=logits, kind="leave_one_out", channel=kernel.channel)
        losses = token_losses(model, kernel, TextBatch(tokens=x_0), state, alpha, slope)
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert gradient.isfinite().all()


def test_objectives_that_make_no_sense_are_refused():
    for wrong, message in (
        ({"head": "score"}, "write 'leave_one_out' or 'denoiser'"),
        ({"t_min": 1.0}, r"write a time in \[0, 1\)"),
        ({"t_min": -0.1}, r"write a time in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            token_objective(Uniform(3), **wrong)
    with pytest.raises(Exception, match="'nelbo'"):  # a ValueError, or a TypeCheckError where annotations are executed
        token_objective(Uniform(3), loss="mse")
    objective = token_objective(Uniform(3), schedule=Linear(1e-3))
    with pytest.raises(ValueError, match=r"clean tokens must lie in \[0, 3\)"):
        objective({"net": Recorder(3)}, TextBatch(tokens=torch.tensor([[0, 3]])), context(range(1), 1))
