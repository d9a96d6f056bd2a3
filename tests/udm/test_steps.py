"""One step: what is tempered, what is truncated, what moves, and what it costs."""

import math

import pytest
import torch

from wellposed.batches import TextBatch
from wellposed.udm.draws import Truncation
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.models import GivenLogits, TableModel
from wellposed.udm.steps import (
    Plugged,
    SamplingRecord,
    SamplingSettings,
    ancestral_step,
    confidence_step,
    free_positions,
)

CLOSE = {"rtol": 0, "atol": 1e-12}
KERNELS = [Uniform(3), MaximalCoupling(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)]
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def plugged(model, state, alpha, kind, **settings):
    return Plugged(
        model=model,
        state=state,
        alpha=alpha,
        canvas=TextBatch(tokens=state.tokens),
        kind=kind,
        settings=SamplingSettings(**settings),
        record=SamplingRecord(),
    )


def step_law(enumeration, scripted, kernel, model, tokens, t, s, settings, position=0):
    """The exact law of one position after a step of a kernel without noise tokens."""

    def outcome(rows, numbers):
        with scripted(numbers.unbind(1)):
            after = ancestral_step(
                model(len(rows)),
                kernel,
                TokenState(tokens=tokens.expand(len(rows), -1)),
                one(t, len(rows)),
                one(s, len(rows)),
                canvas=TextBatch(tokens=tokens.expand(len(rows), -1)),
                settings=settings,
            )
        return after.tokens[:, position]

    return enumeration.law_of_draws(outcome, 1, 2, outcomes=kernel.vocab_size)[0]


@pytest.mark.parametrize("temperature", [0.8, 1.1])
@pytest.mark.parametrize("head", ["leave_one_out", "denoiser"])
def test_identity_21_where_the_temperature_goes(world, oracle_of, temperature, head):
    """Tempering the denoiser and converting back leaves R^(1/tau - 1) on x_t; tempering pi leaves the evidence alone.

    Whatever the head is.
    """
    tokens, alpha = world.sequences, 0.4
    state, ratio = TokenState(tokens=tokens), 1 + 3 * alpha / (1 - alpha)
    model = TableModel(oracle=oracle_of(world), kernel=Uniform(3), kind=head)
    pi = model(state, one(alpha, 9)).leave_one_out().log_probs()
    rows = torch.ones_like(tokens, dtype=torch.bool)
    exact = (pi / temperature).log_softmax(-1).flatten(0, 1)
    spurious = math.log(ratio) * (1 / temperature - 1)
    own = torch.nn.functional.one_hot(tokens.flatten(), 3).double()
    for temper, expected in (
        ("leave_one_out", exact),
        ("denoiser", (exact + spurious * own).log_softmax(-1)),
    ):
        tempered = plugged(
            model, state, one(alpha, 9), "leave_one_out", temperature=temperature, temper=temper
        ).predict(rows)
        assert tempered.kind == "leave_one_out"
        torch.testing.assert_close(tempered.log_probs(), expected, **CLOSE)
    # For a kernel that plugs in the denoiser, pi is tempered and the evidence is then added whole.
    denoiser = plugged(model, state, one(alpha, 9), "denoiser", temperature=temperature).predict(rows)
    expected = (exact + math.log(ratio) * own).log_softmax(-1)
    torch.testing.assert_close(denoiser.log_probs(), expected, **CLOSE)


def test_the_size_of_the_spurious_factor():
    """K = 50257, tau = 0.8: 8.6, 15, 26 and 47 at alpha = 0.1, 0.5, 0.9 and 0.99; 0.46 to 0.25 for tau = 1.1."""
    alpha = torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    state = TokenState(tokens=torch.zeros(4, 1, dtype=torch.long))
    model = GivenLogits(logits=torch.zeros(4, 1, 50257, dtype=torch.float64), kind="leave_one_out")
    rows = torch.ones(4, 1, dtype=torch.bool)
    factors = []
    for temperature in (0.8, 1.1):
        prediction = plugged(model, state, alpha, "leave_one_out", temperature=temperature, temper="denoiser").predict(
            rows
        )
        factors.append((prediction.logits[:, 0] - prediction.logits[:, 1]).exp())
    torch.testing.assert_close(factors[0], torch.tensor([8.6, 15, 26, 47], dtype=torch.float64), rtol=0.05, atol=0)
    torch.testing.assert_close(factors[1][[0, 3]], torch.tensor([0.46, 0.25], dtype=torch.float64), rtol=0.02, atol=0)


def test_a_tempered_step_is_the_bridge_of_the_tempered_posterior(world, oracle_of, enumeration, scripted):
    """Identity 21, end to end."""
    kernel, t, s = Uniform(3), 0.3, 0.5
    table = TableModel(oracle=oracle_of(world), kernel=kernel)
    for tokens in ([[0, 1]], [[2, 2]]):
        state = TokenState(tokens=torch.tensor(tokens))
        logits = table(state, one(t)).logits
        law = step_law(
            enumeration,
            scripted,
            kernel,
            lambda rows, logits=logits: GivenLogits(logits=logits.expand(rows, -1, -1), kind="leave_one_out"),
            state.tokens,
            t,
            s,
            SamplingSettings(temperature=0.6),
        )
        pi = logits.softmax(-1) ** (1 / 0.6)
        pi = pi / pi.sum(-1, keepdim=True)
        expected = kernel.bridge(state, pi, one(t), one(s))[0, 0]
        torch.testing.assert_close(law, expected, **CLOSE)


def test_truncation_never_touches_the_evidence_for_a_token_that_stays(scripted):
    """The published trap: x_t is outside the nucleus of pi, and yet it is nearly certain.

    In the last step of 64, pi[x_t] = 0.02 means P(x_0 = x_t) = 0.99998 for a vocabulary as large as a language's. A
    bridge of a truncated pi would give it nothing at all.
    """
    size, t = 50257, 1 - 1 / 64
    pi = torch.full((size,), 1e-12, dtype=torch.float64)
    pi[3], pi[7], pi[11] = 0.02, 0.9, 0.08
    pi = pi / pi.sum()
    truncation, tokens, kernel = Truncation(top_p=0.95), torch.tensor([[3]]), Uniform(size)
    assert truncation.apply(pi[None])[0, 3] == 0
    untouched = kernel.bridge(TokenState(tokens=tokens), pi[None, None], one(t), one(1.0))[0, 0]
    assert untouched[3] > 0.99998
    record = SamplingRecord()
    numbers = torch.tensor([[1e-6, 0.5], [1e-4, 0.5], [0.5, 0.5], [0.999999, 0.5]], dtype=torch.float64)
    with scripted(numbers.unbind(1)):
        after = ancestral_step(
            GivenLogits(logits=pi.log().expand(4, 1, -1), kind="leave_one_out"),
            kernel,
            TokenState(tokens=tokens.expand(4, -1)),
            one(t, 4),
            one(1.0, 4),
            canvas=TextBatch(tokens=tokens.expand(4, -1)),
            settings=SamplingSettings(truncation=truncation),
            record=record,
        )
    # It leaves with probability (1 - alpha) / (K alpha pi + 1 - alpha) = 1.6e-5, and then for a token of the nucleus.
    assert after.tokens.flatten().tolist() == [7, 3, 3, 3]
    assert record.evaluations == 1


def test_truncation_cuts_what_a_clean_route_may_draw(enumeration, scripted):
    """The routes keep their masses; only the draw is from the truncated posterior."""
    kernel, t, s, pi = Uniform(4), 0.3, 0.5, torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    for own in range(4):
        tokens = torch.tensor([[own]])
        law = step_law(
            enumeration,
            scripted,
            kernel,
            lambda rows: GivenLogits(logits=pi.log().expand(rows, 1, -1), kind="leave_one_out"),
            tokens,
            t,
            s,
            SamplingSettings(truncation=Truncation(top_k=2)),
        )
        total = 4 * t * pi[own] + 1 - t
        expected = (s - t) * torch.tensor([2 / 3, 1 / 3, 0, 0], dtype=torch.float64) + (1 - t / s) * (1 - s) / 4
        expected[own] += 4 * t * pi[own] + t / s - t
        torch.testing.assert_close(law, expected / total, **CLOSE)


@by_kernel
def test_free_positions_are_neither_given_nor_padding(kernel):
    tokens = torch.zeros(2, 3, dtype=torch.long)
    given = torch.tensor([[True, False, False], [False, False, False]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert free_positions(TextBatch(tokens=tokens)).all()
    assert torch.equal(free_positions(TextBatch(tokens=tokens, given=given)), ~given)
    assert torch.equal(free_positions(TextBatch(tokens=tokens, valid=valid)), valid)
    canvas = TextBatch(tokens=tokens, given=given, valid=valid)
    assert torch.equal(free_positions(canvas), torch.tensor([[False, True, False], [True, True, True]]))
    # A step moves nothing else, and asks about nothing else.
    asked = []

    class Asked(GivenLogits):
        def __call__(self, state, alpha, **inputs):
            asked.append(inputs["rows"])
            assert inputs["given"] is given
            assert inputs["valid"] is valid
            return super().__call__(state, alpha, **inputs)

    state = kernel.prior(tokens, generator=torch.Generator().manual_seed(0), given=given)
    model = Asked(logits=torch.zeros(2, 3, 3), kind="leave_one_out", channel=kernel.channel)
    record = SamplingRecord()
    for seed in range(10):
        after = ancestral_step(
            model,
            kernel,
            state,
            one(0.1, 2),
            one(0.9, 2),
            canvas=canvas,
            settings=SamplingSettings(),
            generator=torch.Generator().manual_seed(seed),
            record=record,
        )
        fixed = ~free_positions(canvas)
        assert torch.equal(after.tokens[fixed], state.tokens[fixed])
        if after.noise is not None:
            assert torch.equal(after.noise[fixed], state.noise[fixed])
    assert asked
    assert not any((rows & ~free_positions(canvas)).any() for rows in asked)
    assert record.evaluations == len(asked)
    if kernel.channel == "masked":
        assert (after.tokens <= 3).all()


@pytest.mark.parametrize("kernel", [MaximalCoupling(3), Masked(3), Absorbing(3)], ids=lambda k: type(k).__name__)
def test_nobody_is_asked_when_nothing_jumps(kernel, scripted):
    """The decision does not need the network: no jump, no call; and only jumping rows are asked about."""
    tokens = torch.full((1, 3), 3 if kernel.channel == "masked" else 1)
    state = TokenState(tokens=tokens, noise=tokens if kernel.has_noise_tokens else None)
    record = SamplingRecord()

    def step(numbers):
        with scripted([torch.tensor([numbers]).double(), torch.full((1, 3), 0.99).double()]):
            return ancestral_step(
                GivenLogits(logits=torch.zeros(1, 3, 3), kind="denoiser", channel=kernel.channel),
                kernel,
                state,
                one(0.5),
                one(0.75),
                canvas=TextBatch(tokens=tokens),
                settings=SamplingSettings(),
                record=record,
            )

    assert step([0.5, 0.9, 0.5001]) is state  # the jump probability is (0.75 - 0.5) / (1 - 0.5) = 0.5
    assert record.evaluations == 0
    after = step([0.5, 0.4999, 0.9])
    assert record.evaluations == 1
    assert after.tokens[0].tolist() == [int(tokens[0, 0]), 2, int(tokens[0, 0])]


def test_an_absorbing_jump_to_its_noise_token_stays_active(scripted):
    kernel = Absorbing(3)
    tokens = torch.tensor([[2]])
    state = TokenState(tokens=tokens, noise=tokens)
    with scripted([torch.zeros(1).double(), torch.tensor([0.99]).double()]):
        after = ancestral_step(
            GivenLogits(logits=torch.zeros(1, 1, 3), kind="denoiser", channel="absorbing"),
            kernel,
            state,
            one(0.5),
            one(0.75),
            canvas=TextBatch(tokens=tokens),
            settings=SamplingSettings(),
        )
    assert after.tokens.tolist() == [[2]]
    assert kernel.open(after).all()


def test_the_confidence_step_writes_where_most_is_gained(oracle_of, enumeration):
    """Gains max_k log d_k - log d_{x_t} by enumeration; the k largest of the free ones are set to their argmax."""
    world = enumeration.World.random(3, 3, seed=1)
    alpha, tokens = 0.3, world.sequences
    denoiser = world.denoiser(enumeration.uniform_channel(alpha, 3)).log()
    own = denoiser.gather(-1, tokens[..., None])[..., 0]
    gain, best = denoiser.amax(-1) - own, denoiser.argmax(-1)
    model = TableModel(oracle=oracle_of(world), kernel=Uniform(3))
    given = torch.zeros_like(tokens, dtype=torch.bool)
    for count in (1, 2, 3, 5):
        after = confidence_step(
            model,
            TokenState(tokens=tokens),
            one(alpha, 27),
            canvas=TextBatch(tokens=tokens),
            count=count,
            settings=SamplingSettings(),
        )
        expected = tokens.clone()
        for row in range(27):
            for i in gain[row].argsort(descending=True)[:count].tolist():
                expected[row, i] = best[row, i]
        assert torch.equal(after.tokens, expected)
    # A position that gains most but is given, or padding, stays, and takes nobody's place.
    given[:, 0] = True
    after = confidence_step(
        GivenLogits(logits=denoiser, kind="denoiser"),
        TokenState(tokens=tokens),
        one(alpha, 27),
        canvas=TextBatch(tokens=tokens, given=given),
        count=1,
        settings=SamplingSettings(),
    )
    expected = tokens.clone()
    for row in range(27):
        i = 1 + int(gain[row, 1:].argmax())
        expected[row, i] = best[row, i]
    assert torch.equal(after.tokens, expected)


def test_settings_that_make_no_sense_are_refused():
    for temperature in (0, -1.0):
        with pytest.raises(ValueError, match="write a positive number"):
            SamplingSettings(temperature=temperature)
    with pytest.raises(ValueError, match="'leave_one_out' or 'denoiser'"):
        SamplingSettings(temper="score")
