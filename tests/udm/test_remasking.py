"""Revision of what is revealed: it keeps the marginals, for any sigma that it may take."""

import pytest
import torch
from jaxtyping import TypeCheckError

from wellposed.batches import TextBatch
from wellposed.paths import Linear
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.models import GivenLogits, TableModel
from wellposed.udm.remasking import Remasking, largest_sigma, remasking_step
from wellposed.udm.sampler import sample
from wellposed.udm.steps import SamplingRecord, SamplingSettings

CLOSE = {"rtol": 0, "atol": 1e-12}
KERNELS = [Masked(3), Absorbing(3)]
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def pick(state, rows):
    return TokenState(tokens=state.tokens[rows], noise=None if state.noise is None else state.noise[rows])


def remask(model, kernel, state, t, s, sigma, **canvas):
    rows = len(state.tokens)
    return remasking_step(
        model,
        kernel,
        state,
        one(t, rows),
        one(s, rows),
        sigma,
        canvas=TextBatch(tokens=state.tokens, **canvas),
        settings=SamplingSettings(),
    )


def one_site(enumeration, scripted, states_of, symbols_of, kernel, t, s, sigma):
    """P(state after | state before, x_0), (M, 3, M), from the production step told what x_0 is."""
    single = states_of(kernel, 1)
    count = len(single.tokens)
    truth = torch.arange(3).repeat_interleave(count)
    states = pick(single, torch.arange(count).repeat(3))
    one_hot = torch.eye(3, dtype=torch.float64).log()

    def outcome(rows, numbers):
        model = GivenLogits(logits=one_hot[truth[rows]][:, None], kind="denoiser", channel=kernel.channel)
        with scripted(numbers.unbind(1)):
            return symbols_of(kernel, remask(model, kernel, pick(states, rows), t, s, sigma))[:, 0]

    return enumeration.law_of_draws(outcome, 3 * count, 2, outcomes=count).view(3, count, count).transpose(0, 1)


@by_kernel
@pytest.mark.parametrize("step", [(0.3, 0.5), (0.7, 0.8), (0.6, 0.6), (0.4, 1.0)])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_identity_20_the_marginal_is_kept(
    world, enumeration, scripted, channel_of, states_of, symbols_of, kernel, step, fraction
):
    """From the law at t to the law at s, for any sigma up to the largest: of whole sequences, of pairs (x, u)."""
    t, s = step
    sigma = fraction * min(1, (1 - s) / t)
    towards = one_site(enumeration, scripted, states_of, symbols_of, kernel, t, s, sigma)
    joint = world.joint(channel_of(kernel, t)).view(3, 3, *[towards.shape[0]] * 2)
    after = torch.einsum("abpq,pax,qby->xy", joint, towards, towards).flatten()
    torch.testing.assert_close(after, world.marginal(channel_of(kernel, s)), **CLOSE)
    # It does revise: a revealed token goes back with probability sigma.
    revealed = 0 if kernel.channel == "masked" else 1  # x = 0, and u = 1 where there is one
    hidden = 3 if kernel.channel == "masked" else 4  # the mask, or x = u = 1
    assert float(towards[revealed, 0, hidden]) == pytest.approx(sigma, abs=1e-12)


def test_a_new_noise_token_would_not_keep_the_pair_law(enumeration):
    """u := x instead of x := u, with the same probabilities: u comes to equal the clean token too often."""
    t, s, size = 0.6, 0.7, 3
    sigma = float(largest_sigma(torch.tensor(t), torch.tensor(s)))
    reveal = (s - (1 - sigma) * t) / (1 - t)
    before = enumeration.absorbing_channel(t, size).view(size, size, size)
    after = {rule: torch.zeros(size, size, size, dtype=torch.float64) for rule in ("x := u", "u := x")}
    for x_0 in range(size):
        for x in range(size):
            for u in range(size):
                mass = before[x_0, x, u]
                for rule, law in after.items():
                    if x == u:
                        law[x_0, x_0, u] += reveal * mass
                        law[x_0, u, u] += (1 - reveal) * mass
                    else:
                        law[x_0, x, u] += (1 - sigma) * mass
                        back = u if rule == "x := u" else x
                        law[x_0, back, back] += sigma * mass
    expected = enumeration.absorbing_channel(s, size).view(size, size, size)
    torch.testing.assert_close(after["x := u"], expected, **CLOSE)
    assert enumeration.total_variation(after["u := x"].flatten(1), expected.flatten(1)) > 0.05


@by_kernel
def test_given_tokens_and_padding_are_not_revised(kernel):
    tokens = torch.tensor([[0, 1, 2, 0]]).expand(200, -1)
    noise = torch.tensor([[1, 2, 0, 2]]).expand(200, -1) if kernel.has_noise_tokens else None
    given = torch.tensor([[True, False, False, False]]).expand(200, -1)
    valid = torch.tensor([[True, True, True, False]]).expand(200, -1)
    state = TokenState(tokens=tokens, noise=noise)
    model = GivenLogits(logits=torch.zeros(200, 4, 3), kind="denoiser", channel=kernel.channel)
    after = remasking_step(
        model,
        kernel,
        state,
        one(0.5, 200),
        one(0.5, 200),
        0.5,
        canvas=TextBatch(tokens=tokens, given=given, valid=valid),
        settings=SamplingSettings(),
        generator=torch.Generator().manual_seed(0),
    )
    changed = (after.tokens != tokens).double().mean(0)
    assert changed[[0, 3]].tolist() == [0, 0]
    assert changed[[1, 2]].tolist() == pytest.approx([0.5, 0.5], abs=0.12)


def test_a_step_without_new_tokens_asks_nobody():
    model = GivenLogits(logits=torch.zeros(1, 2, 3), kind="denoiser", channel="masked")
    record = SamplingRecord()
    state = TokenState(tokens=torch.tensor([[0, 1]]))
    remasking_step(
        model,
        Masked(3),
        state,
        one(0.5),
        one(0.6),
        0.5,
        canvas=TextBatch(tokens=state.tokens),
        settings=SamplingSettings(),
        record=record,
        generator=torch.Generator().manual_seed(0),
    )
    assert record.evaluations == 0


@pytest.mark.parametrize(
    "remasking",
    [
        Remasking(),
        Remasking(schedule="rescale", eta=1.0),
        Remasking(schedule="rescale", eta=0.3, switch=0.5),
        Remasking(schedule="cap", eta=1.0),
        Remasking(schedule="loop", eta=0.05),
        Remasking(schedule="constant", eta=0.0),
    ],
    ids=lambda r: f"{r.schedule}-{r.eta}",
)
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 256])
def test_plans_are_possible(remasking, steps):
    """Both probabilities of a step lie in [0, 1], and the grid rises to exactly 1."""
    plan = remasking.plan(steps)
    t, s, sigma = plan.alphas[:-1], plan.alphas[1:], plan.sigmas
    assert (len(plan.alphas), len(sigma)) == (steps + 1, steps)
    assert float(plan.alphas[-1]) == 1
    assert float(plan.alphas[0]) > 0
    assert bool((plan.alphas.diff() >= 0).all())
    reveal = (s - (1 - sigma) * t) / (1 - t)
    assert bool(((sigma >= 0) & (reveal >= -1e-12) & (reveal <= 1 + 1e-12)).all())
    largest = ((1 - s) / t).clamp_max(1)
    times = 1 - torch.arange(steps, dtype=torch.float64) / steps
    match remasking.schedule:
        case "cap":
            expected = largest.clamp_max(remasking.eta)
        case "rescale":
            expected = remasking.eta * largest * (times <= remasking.switch)
        case "constant":
            expected = torch.zeros(steps, dtype=torch.float64)
        case "loop":
            return
    torch.testing.assert_close(sigma, expected, **CLOSE)
    torch.testing.assert_close(plan.alphas[:-1], Linear(1e-3).alpha(times), **CLOSE)


def test_a_loop_revises_on_its_plateau_only():
    plan = Remasking(schedule="loop", eta=0.02, t_on=0.555, t_off=0.045, alpha_on=0.9).plan(100)
    times = 1 - torch.arange(101, dtype=torch.float64) / 100
    plateau = (times <= 0.555) & (times > 0.045)
    assert (plan.alphas[plateau] == 0.9).all()
    assert bool((plan.alphas[times > 0.555] < 0.9).all())
    assert bool((plan.alphas[times <= 0.045] > 0.9).all())
    on = plan.sigmas > 0
    assert (plan.sigmas[on] == 0.02).all()
    assert torch.equal(on, plateau[:-1] & plateau[1:])
    # The legs are linear in time, from 0 and to 1.
    torch.testing.assert_close(plan.alphas[1:45].diff(), torch.full((43,), 0.9 / 44.5, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(plan.alphas[96:].diff(), torch.full((4,), 0.1 / 4.5, dtype=torch.float64), **CLOSE)


@by_kernel
@pytest.mark.parametrize("schedule", ["rescale", "loop"])
def test_revising_chains_end_at_the_data(world, oracle_of, enumeration, kernel, schedule):
    """With the exact model and many steps the law of what comes out is that of the data."""
    count = 10_000
    model = TableModel(oracle=oracle_of(world), kernel=kernel)
    plan = Remasking(schedule=schedule, eta=0.3 if schedule == "rescale" else 0.05).plan(32)
    tokens, record = sample(
        model,
        kernel,
        TextBatch(tokens=torch.zeros(count, 2, dtype=torch.long)),
        plan.alphas,
        sigmas=plan.sigmas,
        generator=torch.Generator().manual_seed(0),
    )
    assert enumeration.total_variation(enumeration.law_of(tokens, 3), world.law) < 0.025
    assert record.evaluations <= 32


def test_what_makes_no_sense_is_refused():
    with pytest.raises((ValueError, TypeCheckError), match="'constant', 'cap', 'rescale'"):
        Remasking(schedule="cosine")
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="write a probability"):
            Remasking(eta=eta)
    for wrong in ({"t_on": 0.04}, {"t_off": 0.0}, {"t_on": 1.0}, {"alpha_on": 1.0}):
        with pytest.raises(ValueError, match="a loop needs"):
            Remasking(schedule="loop", **wrong)
    with pytest.raises(ValueError, match="write schedule='cap'"):
        Remasking(schedule="constant", eta=0.04).plan(10)
    for kernel in (Uniform(3), MaximalCoupling(3)):
        with pytest.raises(ValueError, match=f"{type(kernel).__name__} revises by itself"):
            remask(
                GivenLogits(logits=torch.zeros(1, 1, 3), kind="denoiser"),
                kernel,
                TokenState(tokens=torch.zeros(1, 1, dtype=torch.long)),
                0.5,
                0.6,
                0.1,
            )
    with pytest.raises(ValueError, match=r"TokenState\(tokens=x, noise=u\)"):
        remask(
            GivenLogits(logits=torch.zeros(1, 1, 3), kind="denoiser", channel="absorbing"),
            RefreshedAbsorbing(3),
            TokenState(tokens=torch.zeros(1, 1, dtype=torch.long)),
            0.5,
            0.6,
            0.1,
        )
