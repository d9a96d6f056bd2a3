"""Tokens from uniform numbers: their exact law, and what a draw may depend on."""

import pytest
import torch

from wellposed.udm import draws
from wellposed.udm.draws import Truncation, draw_tokens, random_tokens, uniform_numbers

CLOSE = {"rtol": 0, "atol": 1e-12}


def rows(count=4, vocab_size=6, seed=0, dtype=torch.float64):
    return 2 * torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_law(enumeration, logits, **settings):
    """The lengths of the intervals of numbers that lead to each token."""

    def outcome(row, numbers):
        each = {name: value[row] if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
        return draw_tokens(logits[row], numbers[:, 0], **each)

    return enumeration.law_of_draws(outcome, len(logits), 1, outcomes=logits.shape[1])


def test_a_draw_has_the_law_of_the_softmax(enumeration):
    logits = rows()
    logits[0, 2] = logits[1, 0] = logits[1, 5] = -torch.inf
    torch.testing.assert_close(exact_law(enumeration, logits), logits.softmax(-1), **CLOSE)


def test_an_excluded_token_is_left_out_and_the_rest_keeps_its_proportions(enumeration):
    logits, excluded = rows(), torch.tensor([0, 3, 5, 1])
    expected = logits.softmax(-1).scatter(-1, excluded[:, None], 0)
    law = exact_law(enumeration, logits, excluded=excluded)
    torch.testing.assert_close(law, expected / expected.sum(-1, keepdim=True), **CLOSE)


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        (Truncation(top_p=0.5), [0, 1]),  # 0.4 alone does not hold a half
        (Truncation(top_p=0.39), [0]),
        (Truncation(top_p=0.41), [0, 1]),
        (Truncation(top_p=0.999), [0, 1, 2, 3]),
        (Truncation(top_k=3), [0, 1, 2]),
        (Truncation(top_k=9), [0, 1, 2, 3]),
        (Truncation(min_p=0.4), [0, 1, 2]),  # 0.2 is half of 0.4
        (Truncation(min_p=0.6), [0, 1]),
        (Truncation(top_p=0.8, top_k=3), [0, 1, 2]),
        (Truncation(top_k=2, top_p=0.5), [0]),  # 0.4 is more than half of what top_k has left
        (Truncation(), [0, 1, 2, 3]),
    ],
)
def test_truncation_keeps_the_likeliest_tokens(enumeration, truncation, kept):
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.stack([probs.log(), probs.log()[order]])
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = probs[kept] / probs[kept].sum()
    law = exact_law(enumeration, logits, truncation=truncation)
    torch.testing.assert_close(law, torch.stack([expected, expected[order]]), **CLOSE)
    assert truncation.keeps_all == (truncation == Truncation())


def test_truncation_after_exclusion_still_leaves_a_token():
    """A draw that must differ from the likeliest token, cut down to one token, is the second likeliest."""
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    drawn = draw_tokens(
        logits, torch.tensor([0.99]).double(), truncation=Truncation(top_p=0.5), excluded=torch.tensor([0])
    )
    assert drawn.tolist() == [1]


@pytest.mark.parametrize("number", [0.0, 2**-53, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(number):
    """At either end of the unit interval, for zeros in front, behind and in between."""
    logits = torch.full((4, 5), -torch.inf)
    for row, allowed in enumerate([[2], [1, 3], [0, 4], [4]]):
        logits[row, allowed] = 0.0
    drawn = draw_tokens(logits, torch.full((4,), number, dtype=torch.float64))
    assert drawn.tolist() == ([2, 1, 0, 4] if number < 0.5 else [2, 3, 4, 4])


def test_running_sums_are_float64():
    """In float32 the tail of a large vocabulary would be a staircase: its tokens are all reached here."""
    size = 2**15
    logits = torch.zeros(1, size)
    logits[0, 0] = 18.0  # 2000 times as likely as all the others together: each of them has 1.5e-8
    probs = logits.double().softmax(-1)[0]
    inside = probs.cumsum(-1) - probs / 2
    drawn = draw_tokens(logits.expand(100, -1), inside[-100:])
    assert drawn.tolist() == list(range(size - 100, size))


def test_rows_do_not_know_each_other(monkeypatch):
    """A row's token is the same alone, among others, and however many rows are handled at once."""
    logits = rows(7, 11)
    numbers = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {"truncation": Truncation(top_p=0.9), "excluded": torch.arange(7)}
    whole = draw_tokens(logits, numbers, **settings)
    monkeypatch.setattr(draws, "CACHED", 25)
    assert torch.equal(draw_tokens(logits, numbers, **settings), whole)
    for i in range(7):
        alone = draw_tokens(
            logits[i : i + 1], numbers[i : i + 1], truncation=Truncation(top_p=0.9), excluded=torch.tensor([i])
        )
        assert alone.tolist() == whole[i : i + 1].tolist()
    assert draw_tokens(logits[:0], numbers[:0]).tolist() == []


def test_random_tokens_are_uniform(enumeration):
    law = enumeration.law_of_draws(lambda row, numbers: random_tokens(numbers[:, 0], 7), 1, 1, outcomes=7)
    torch.testing.assert_close(law, torch.full((1, 7), 1 / 7, dtype=torch.float64), **CLOSE)
    assert random_tokens(torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64), 50257).tolist() == [0, 50256, 50256]


def test_one_generator_a_sequence_makes_it_independent_of_the_batch():
    tokens = torch.zeros(3, 4, dtype=torch.long)

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = uniform_numbers(tokens, generators(1, 2, 3))
    assert together.dtype == torch.float64
    assert torch.equal(uniform_numbers(tokens[:1], generators(2)), together[1:2])
    assert torch.equal(uniform_numbers(tokens[:2], generators(3, 1)), together[[2, 0]])
    assert not torch.equal(together[0], together[1])
    # A generator advances.
    source = generators(1, 2, 3)
    uniform_numbers(tokens, source)
    assert not torch.equal(uniform_numbers(tokens, source), together)
    single = uniform_numbers(tokens, torch.Generator().manual_seed(1))
    assert single.shape == (3, 4)
    assert torch.equal(single[0], together[0])


def test_wrong_numbers_and_values_are_refused():
    with pytest.raises(ValueError, match="got 2 generators for 3 sequences"):
        uniform_numbers(torch.zeros(3, 4, dtype=torch.long), [torch.Generator(), torch.Generator()])
    for wrong in ({"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"min_p": 1.0}, {"min_p": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Truncation(**wrong)
