"""Gibbs corrections: which of them leave p_s alone, by the transition matrices of what the code does (identity 19)."""

import itertools
from functools import reduce

import pytest
import torch
from jaxtyping import TypeCheckError

from wellposed.batches import TextBatch
from wellposed.udm import corrector as module
from wellposed.udm.corrector import Corrector, correct, selection_scores
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.models import GivenLogits, TableModel
from wellposed.udm.prediction import Prediction
from wellposed.udm.steps import SamplingRecord, SamplingSettings

CLOSE = {"rtol": 0, "atol": 1e-12}
ALPHA = 0.6
INFORMED = ["lowest_log_margin", "lowest_maxprob", "lowest_current_prob"]
KERNEL = Uniform(3)


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def run(model, tokens, settings, *, alpha=ALPHA, kernel=KERNEL, given=None, valid=None, **rest):
    return correct(
        model,
        kernel,
        TokenState(tokens=tokens),
        one(alpha, len(tokens)),
        corrector=settings,
        canvas=TextBatch(tokens=tokens, given=given, valid=valid),
        settings=SamplingSettings(),
        **rest,
    ).tokens


def conditionals(world, enumeration, alpha=ALPHA):
    """p_s(x_i = y | the others) from p_s itself, (K^L, L, K)."""
    p_s = world.marginal(enumeration.uniform_channel(alpha, world.vocab_size)).view(world.table.shape)
    each = []
    for i in range(world.length):
        g = (p_s / p_s.sum(i, keepdim=True)).movedim(i, -1).unsqueeze(i)
        each.append(g.expand(*world.table.shape, world.vocab_size).reshape(-1, world.vocab_size))
    return torch.stack(each, 1)


def brute_scores(g, tokens, selection):
    """The published scores, of the dense conditional."""
    log_g = g.log()
    own = log_g.gather(-1, tokens[..., None])[..., 0]
    other = log_g.scatter(-1, tokens[..., None], -torch.inf).amax(-1)
    return {"lowest_log_margin": other - own, "lowest_maxprob": -log_g.amax(-1), "lowest_current_prob": -own}[selection]


def transitions(enumeration, scripted, world, model, settings, *, given=None, probes=40):
    """P(sequence after one correction | sequence before), of one chosen position after the other.

    The numbers that choose the position are set; the others are integrated over; the weights of the choice are the
    softmax of the scores, which another test compares with what is chosen.
    """
    tokens, states, length = world.sequences, len(world.sequences), world.length
    free = torch.ones(length, dtype=torch.bool) if given is None else ~given
    prediction = model(
        TokenState(tokens=tokens), one(ALPHA, states), given=None if given is None else given.expand(states, -1)
    )
    scores = selection_scores(prediction.rows(torch.ones_like(tokens, dtype=torch.bool)), settings.selection)
    scores = scores.view(states, length).masked_fill(~free, -torch.inf)
    weights = (scores.double() / settings.selection_temperature).softmax(-1)
    matrix = torch.zeros(states, states, dtype=torch.float64)
    for i in free.nonzero().flatten().tolist():
        pinned = torch.full((length,), 1e-9, dtype=torch.float64)
        pinned[i] = 1 - 1e-15

        def outcome(rows, numbers, pinned=pinned):
            with scripted([pinned.expand(len(rows), -1), *numbers.unbind(1)]):
                mask = None if given is None else given.expand(len(rows), -1)
                after = run(model, tokens[rows], settings, given=mask)
            return enumeration.index_of(after, world.vocab_size)

        numbers = 3 if settings.metropolis else 2
        law = enumeration.law_of_draws(outcome, states, numbers, outcomes=states, probes=probes)
        matrix += weights[:, i, None] * law
    return matrix


@pytest.mark.parametrize("kernel", [Uniform(3), MaximalCoupling(3)], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("head", ["leave_one_out", "denoiser"])
@pytest.mark.parametrize("selection", INFORMED)
def test_scores_are_those_of_the_exact_conditional(world, oracle_of, enumeration, kernel, head, selection):
    """Whatever the network's head is, and whatever the kernel plugs in: a trap of the published code."""
    tokens, g = world.sequences, conditionals(world, enumeration)
    model = TableModel(oracle=oracle_of(world), kernel=kernel, kind=head)
    prediction = model(TokenState(tokens=tokens), one(ALPHA, 9), rows=torch.ones_like(tokens, dtype=torch.bool))
    scores = selection_scores(prediction.leave_one_out(), selection).view(9, 2)
    torch.testing.assert_close(scores, brute_scores(g, tokens, selection), **CLOSE)


def test_scores_of_another_kind_of_prediction_are_converted(world, oracle_of, enumeration):
    tokens, g = world.sequences, conditionals(world, enumeration)
    model = TableModel(oracle=oracle_of(world), kernel=KERNEL, kind="denoiser")
    rows = model(TokenState(tokens=tokens), one(ALPHA, 9), rows=torch.ones_like(tokens, dtype=torch.bool))
    for prediction in (rows, rows.score()):
        scores = selection_scores(prediction, "lowest_log_margin").view(9, 2)
        torch.testing.assert_close(scores, brute_scores(g, tokens, "lowest_log_margin"), **CLOSE)


def test_scores_in_float32_and_in_chunks(monkeypatch):
    """K = 50257: margins from half-precision logits agree with the dense float64 conditional to 1e-4."""
    from wellposed.udm import draws

    logits = 3 * torch.randn(6, 50257, generator=torch.Generator().manual_seed(0))
    tokens, alpha = torch.arange(6), torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6], dtype=torch.float64)
    logits[torch.arange(6), tokens] = torch.tensor([0.0, 5, 12, -10, 20, 3])
    for dtype in (torch.float32, torch.bfloat16):
        rounded = logits.to(dtype)
        pi = rounded.double().softmax(-1)
        g = alpha[:, None] * pi + (1 - alpha[:, None]) / 50257
        for chunk in (10**9, 100_000):
            monkeypatch.setattr(draws, "CACHED", chunk)
            prediction = Prediction(kind="leave_one_out", logits=rounded, alpha=alpha, tokens=tokens)
            for selection in INFORMED:
                scores = selection_scores(prediction, selection)
                torch.testing.assert_close(scores.double(), brute_scores(g, tokens, selection), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head", ["leave_one_out", "denoiser"])
@pytest.mark.parametrize("kernel", [Uniform(3), MaximalCoupling(3)], ids=lambda k: type(k).__name__)
def test_a_chosen_position_is_drawn_from_its_exact_conditional(world, oracle_of, enumeration, scripted, kernel, head):
    model = TableModel(oracle=oracle_of(world), kernel=kernel, kind=head)
    tokens, g = world.sequences, conditionals(world, enumeration)

    def outcome(rows, numbers):
        chosen = torch.tensor([1 - 1e-15, 1e-9], dtype=torch.float64).expand(len(rows), -1)
        with scripted([chosen, *numbers.unbind(1)]):
            after = run(model, tokens[rows], Corrector(steps=1, k=1, selection="random"), kernel=kernel)
        assert torch.equal(after[:, 1], tokens[rows, 1])
        return after[:, 0]

    law = enumeration.law_of_draws(outcome, 9, 2, outcomes=3)
    torch.testing.assert_close(law, g[:, 0], **CLOSE)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (Corrector(steps=1, k=1, selection="random"), 0.0),
        *((Corrector(steps=1, k=1, selection=s, metropolis=True), 0.0) for s in INFORMED[1:]),
        (Corrector(steps=1, k=1, selection="lowest_log_margin", metropolis=True, selection_temperature=0.5), 0.0),
        *((Corrector(steps=1, k=1, selection=s), 1e-3) for s in INFORMED),
    ],
    ids=lambda v: f"{v.selection}{'-metropolis' * v.metropolis}" if isinstance(v, Corrector) else str(v),
)
def test_identity_19_what_leaves_the_marginal_alone(world, oracle_of, enumeration, scripted, settings, error):
    """A position chosen at random, or an informed choice with its Metropolis test, to 1e-12; without it, not."""
    p_s = world.marginal(enumeration.uniform_channel(ALPHA, 3))
    model = TableModel(oracle=oracle_of(world), kernel=KERNEL)
    matrix = transitions(enumeration, scripted, world, model, settings)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(9, dtype=torch.float64), **CLOSE)
    moved = enumeration.total_variation(p_s @ matrix, p_s)
    assert settings.exact == (error == 0)
    if error:
        assert moved > error
    else:
        assert moved < 1e-12
        # In detailed balance, and not because nothing happens.
        flow = p_s[:, None] * matrix
        torch.testing.assert_close(flow, flow.T, **CLOSE)
        assert float(matrix.diagonal().max()) < 0.99


@pytest.mark.parametrize("k", [1, 2])
def test_identity_19_with_random_numbers(world, oracle_of, enumeration, k):
    """80,000 sequences in the exact proportions of p_s, two corrections: what stays and what does not."""
    p_s = world.marginal(enumeration.uniform_channel(ALPHA, 3))
    counts = (p_s * 80_000).round().long()
    tokens = world.sequences.repeat_interleave(counts, 0)
    model = TableModel(oracle=oracle_of(world), kernel=KERNEL)
    cases = [Corrector(steps=2, k=k, selection="random"), Corrector(steps=2, k=k)]
    if k == 1:
        cases.append(Corrector(steps=2, k=1, metropolis=True))
    for settings in cases:
        after = run(model, tokens, settings, generator=torch.Generator().manual_seed(0))
        moved = enumeration.total_variation(enumeration.law_of(after, 3), p_s)
        assert (moved < 8e-3) == settings.exact, settings
        if not settings.exact:
            assert moved > 0.02


def test_several_metropolis_moves_are_the_power_of_one(world, oracle_of, enumeration, scripted):
    """The prediction at an accepted proposal serves the next move: 80,000 chains of 3 moves from one sequence."""
    model = TableModel(oracle=oracle_of(world), kernel=KERNEL)
    single = transitions(
        enumeration, scripted, world, model, Corrector(steps=1, k=1, metropolis=True, selection_temperature=0.7)
    )
    start = 5
    tokens = world.sequences[start].expand(80_000, -1)
    settings = Corrector(steps=3, k=1, metropolis=True, selection_temperature=0.7)
    after = run(model, tokens, settings, generator=torch.Generator().manual_seed(1))
    expected = reduce(torch.matmul, [single] * 3)[start]
    assert enumeration.total_variation(enumeration.law_of(after, 3), expected) < 8e-3


@pytest.mark.parametrize(
    "settings",
    [Corrector(steps=1, k=1, selection="random"), Corrector(steps=1, k=1, metropolis=True)],
    ids=["random", "metropolis"],
)
def test_corrections_are_exact_given_a_clue(oracle_of, enumeration, scripted, settings):
    """The law of the free positions, given a clean token at another one, is left alone too."""
    world = enumeration.World.random(2, 3, seed=4)
    given = torch.tensor([False, True, False])
    model = TableModel(oracle=oracle_of(world), kernel=Uniform(2))
    q = enumeration.uniform_channel(ALPHA, 2)
    law = torch.einsum("abc,ax,cz->xbz", world.table, q, q)
    law = law / law.sum((0, 2), keepdim=True)  # conditional on the clue, for either
    matrix = transitions(enumeration, scripted, world, model, settings, given=given, probes=128)
    torch.testing.assert_close(law.flatten() @ matrix, law.flatten(), **CLOSE)
    for before, after in itertools.product(range(8), repeat=2):
        if world.sequences[before, 1] != world.sequences[after, 1]:
            assert matrix[before, after] == 0


def test_choices_are_without_replacement_and_proportional_to_their_weights():
    """k = 2 of 4 by keys: first w_i, then w_j among the rest."""
    scores, count = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64), 100_000
    free = torch.ones(count, 4, dtype=torch.bool)
    settings = Corrector(k=2, selection_temperature=0.5)
    chosen = module.choose_positions(scores.expand(count, -1), free, settings, torch.Generator().manual_seed(0))
    assert (chosen.sum(-1) == 2).all()
    w = (scores / 0.5).softmax(-1)
    for i, j in itertools.combinations(range(4), 2):
        expected = w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j])
        seen = (chosen[:, i] & chosen[:, j]).double().mean()
        assert float(seen) == pytest.approx(float(expected), abs=5e-3)
    torch.testing.assert_close(module._log_weights(scores[None], free[:1], settings)[0].exp(), w, **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_what_is_not_free_takes_nobodys_place(k):
    free = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    scores = torch.where(free, 0.0, 50.0).double()
    chosen = module.choose_positions(scores, free, Corrector(k=k), torch.Generator().manual_seed(0))
    assert not (chosen & ~free).any()
    assert torch.equal(chosen.sum(-1), free.sum(-1).clamp_max(k))


@pytest.mark.parametrize(
    "settings",
    [
        Corrector(steps=2, k=1, selection="random"),
        Corrector(steps=2, k=9, selection="random"),
        Corrector(steps=2, k=9),
        Corrector(steps=2, k=1, metropolis=True),
    ],
    ids=["random", "random-9", "informed", "metropolis"],
)
def test_given_tokens_and_padding_never_move(settings):
    """Not even where they are the least confident of all, or where a sequence has fewer free positions than k."""
    batch, length, size = 64, 5, 4
    tokens = torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(0))
    given = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.5
    valid = torch.arange(length).expand(batch, -1) < torch.randint(
        1, length + 1, (batch, 1), generator=torch.Generator().manual_seed(2)
    )
    given[0], valid[1] = True, False  # nothing to do at all
    free = ~given & valid
    logits = torch.randn(batch, length, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = logits.scatter(-1, tokens[..., None], torch.where(free, 3.0, -9.0).double()[..., None])
    model = GivenLogits(logits=logits, kind="leave_one_out")
    moved = torch.zeros_like(free)
    for seed in range(12):
        after = run(
            model,
            tokens,
            settings,
            kernel=Uniform(size),
            alpha=0.3,
            given=given,
            valid=valid,
            generator=torch.Generator().manual_seed(seed),
        )
        moved |= after != tokens
    assert not moved[~free].any()
    assert moved[free].float().mean() > 0.5


def test_a_random_choice_asks_about_chosen_positions_only():
    asked = []

    class Asked(GivenLogits):
        def __call__(self, state, alpha, **inputs):
            asked.append(inputs["rows"])
            return super().__call__(state, alpha, **inputs)

    tokens = torch.zeros(3, 5, dtype=torch.long)
    model = Asked(logits=torch.zeros(3, 5, 4), kind="leave_one_out")
    record = SamplingRecord()
    run(model, tokens, Corrector(steps=4, k=2, selection="random"), kernel=Uniform(4), record=record)
    assert record.evaluations == len(asked) == 4
    assert all((rows.sum(-1) == 2).all() for rows in asked)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        (Corrector(steps=3, k=2), 3),
        (Corrector(steps=3, k=1, selection="random"), 3),
        (Corrector(steps=3, k=1, selection="random", metropolis=True), 3),  # nothing to test
        (Corrector(steps=3, k=1, metropolis=True), 4),
    ],
)
def test_calls_are_as_many_as_announced(settings, calls):
    model = GivenLogits(logits=torch.zeros(1, 3, 4), kind="leave_one_out")
    record = SamplingRecord()
    run(model, torch.zeros(1, 3, dtype=torch.long), settings, kernel=Uniform(4), record=record)
    assert record.evaluations == calls == settings.evaluations


@pytest.mark.parametrize(
    "settings",
    [Corrector(steps=2, k=2), Corrector(steps=2, k=1, selection="random"), Corrector(steps=2, k=1, metropolis=True)],
    ids=["informed", "random", "metropolis"],
)
def test_one_generator_a_sequence_makes_it_independent_of_the_batch(world, oracle_of, settings):
    model, tokens = TableModel(oracle=oracle_of(world), kernel=KERNEL), world.sequences

    def generators(rows):
        return [torch.Generator().manual_seed(10 + row) for row in rows]

    whole = run(model, tokens, settings, generator=generators(range(9)))
    for rows in ([4], [7, 0, 3]):
        assert torch.equal(run(model, tokens[rows], settings, generator=generators(rows)), whole[rows])
    assert not torch.equal(run(model, tokens, settings, generator=generators(range(1, 10))), whole)


def test_what_makes_no_sense_is_refused():
    for wrong, message in (
        ({"steps": 0}, "for no corrector pass None"),
        ({"k": 0}, "for no corrector pass None"),
        ({"selection_temperature": 0}, "write a positive number"),
        ({"metropolis": True, "k": 2}, "write k=1"),
    ):
        with pytest.raises(ValueError, match=message):
            Corrector(**wrong)
    with pytest.raises((ValueError, TypeCheckError), match="'random', 'lowest_log_margin'"):
        Corrector(selection="entropy")
    model = GivenLogits(logits=torch.zeros(1, 1, 3), kind="denoiser")
    for kernel in (Masked(3), Absorbing(3), RefreshedAbsorbing(3)):
        with pytest.raises(ValueError, match=f"{type(kernel).__name__} freezes what it has revealed"):
            run(model, torch.zeros(1, 1, dtype=torch.long), Corrector(), kernel=kernel)
    with pytest.raises(ValueError, match="got 2 generators for 1 sequences"):
        run(model, torch.zeros(1, 1, dtype=torch.long), Corrector(), generator=[torch.Generator(), torch.Generator()])
