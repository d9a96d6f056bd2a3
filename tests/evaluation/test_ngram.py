import math
from collections import Counter, defaultdict

import pytest
import torch
from safetensors.torch import save_file

from wellposed.evaluation.ngram import NgramScorer
from wellposed.evaluation.text import LanguageScorer

K = 6


def markov(length, *, vocab_size=K, seed=0, sharpness=2.0):
    """A second-order chain, and its exact log-likelihood per token."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.softmax(
        sharpness * torch.randn(vocab_size, vocab_size, vocab_size, generator=generator, dtype=torch.float64), dim=-1
    )
    tokens, total = [0, 1], 0.0
    uniforms = torch.rand(length, generator=generator, dtype=torch.float64).tolist()
    cumulative = table.cumsum(-1).tolist()
    logs = table.log().tolist()
    for u in uniforms:
        a, b = tokens[-2:]
        row = cumulative[a][b]
        token = next((k for k in range(vocab_size) if u < row[k]), vocab_size - 1)
        total += logs[a][b][token]
        tokens.append(token)
    return torch.tensor(tokens[2:]), total / length


def sequences(lengths, *, vocab_size=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Squares make some tokens rare, so that counts of 1, 2, 3, 4 and more all occur.
    return [(torch.rand(n, generator=generator).square() * vocab_size).long() for n in lengths]


def perplexity(scorer, tokens):
    score = scorer.negative_log_likelihood(tokens)
    return math.exp(score.nats.sum() / score.num_scored.sum())


class ByDictionaries:
    """Interpolated modified Kneser-Ney, written down once more with dictionaries."""

    def __init__(self, texts, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        self.occurrences = [Counter() for _ in range(order + 1)]
        left = [defaultdict(set) for _ in range(order + 1)]
        for text in texts:
            for n in range(1, order + 1):
                for i in range(len(text) - n + 1):
                    gram = tuple(text[i : i + n])
                    self.occurrences[n][gram] += 1
                    left[n][gram].add(text[i - 1] if i else "start")
        self.continuations = [Counter({gram: len(seen) for gram, seen in table.items()}) for table in left]

    def discount(self, table, count):
        n = Counter(table.values())
        if all(n[k] for k in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            d = [0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
            if all(0 < d[k] <= k for k in (1, 2, 3)):
                return d[min(count, 3)]
        return (0.0, 0.5, 1.0, 1.5)[min(count, 3)]

    def probability(self, context, token, *, top=True):
        """``context`` has at most order - 1 tokens."""
        n = len(context) + 1
        table = (self.occurrences if top else self.continuations)[n]
        lower = 1 / self.vocab_size if n == 1 else self.probability(context[1:], token, top=False)
        followers = [table[(*context, w)] for w in range(self.vocab_size)]
        if not sum(followers):
            return lower
        count = table[(*context, token)]
        freed = sum(self.discount(table, c) for c in followers)
        return (count - self.discount(table, count) + freed * lower) / sum(followers)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_agrees_with_the_formula_written_with_dictionaries(order):
    texts = sequences([40, 7, 3, 60, 1])
    scorer = NgramScorer.fit(texts, K, order=order)
    reference = ByDictionaries([text.tolist() for text in texts], K, order)
    for text in [*texts, *sequences([30, 5], seed=1)]:
        row = text.tolist()
        expected = [
            math.log(reference.probability(tuple(row[max(0, i - order + 1) : i]), row[i])) for i in range(len(row))
        ]
        torch.testing.assert_close(
            scorer.log_prob(text[None])[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_both_ways_to_the_discounts_are_taken_above():
    texts = sequences([40, 7, 3, 60, 1])
    fallback = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    taken = [top.discounts.equal(fallback) for top, _ in NgramScorer.fit(texts, K, order=4)._statistics]
    assert any(taken) and not all(taken)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [5, 300])
def test_sums_to_one_over_the_vocabulary(order, length):
    scorer = NgramScorer.fit(sequences([length, 3, 40]), K, order=order)
    # Contexts of every length from none to more than the model can use; most of the long ones were never seen.
    for context in sequences(range(8), seed=3):
        rows = torch.cat([context.expand(K, -1), torch.arange(K)[:, None]], dim=1)
        assert scorer.log_prob(rows)[:, -1].exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_every_token_is_possible():
    scorer = NgramScorer.fit(torch.zeros(50, dtype=torch.long), K, order=3)
    assert scorer.log_prob(torch.arange(K)[None]).isfinite().all()


def test_finds_the_entropy_rate_of_a_chain():
    tokens, log_likelihood = markov(60_000)
    scorer = NgramScorer.fit(tokens[:50_000], K, order=3)
    assert math.log(perplexity(scorer, tokens[None, 50_000:])) == pytest.approx(-log_likelihood, abs=0.03)


def test_prefers_text_over_shuffled_text_and_context_over_none():
    tokens, _ = markov(20_000, vocab_size=20, sharpness=3.0)
    train, test = tokens[:18_000], tokens[18_000:].reshape(20, 100)
    scorer, unigram = NgramScorer.fit(train, 20, order=3), NgramScorer.fit(train, 20, order=1)
    shuffled = test.flatten()[torch.randperm(test.numel(), generator=torch.Generator().manual_seed(0))].reshape(20, 100)
    assert perplexity(scorer, test) < 0.5 * perplexity(unigram, test)
    assert perplexity(scorer, shuffled) > 3 * perplexity(scorer, test)
    assert perplexity(unigram, shuffled) == pytest.approx(perplexity(unigram, test), rel=1e-9)


def test_sequences_do_not_touch():
    rows = torch.stack(sequences([20] * 5))
    apart = NgramScorer.fit(rows, K, order=3)
    assert apart.fingerprint == NgramScorer.fit(list(rows), K, order=3).fingerprint
    assert apart.fingerprint != NgramScorer.fit(rows.flatten(), K, order=3).fingerprint
    # Nor do the rows that are scored.
    one_by_one = torch.cat([apart.log_prob(row[None]) for row in rows])
    assert torch.equal(apart.log_prob(rows), one_by_one)


def test_padding_ends_a_context_and_costs_nothing():
    scorer = NgramScorer.fit(sequences([200]), K, order=4)
    first, second = sequences([5, 6], seed=2)
    padding = torch.tensor([-100, K])
    row = torch.cat([padding[:1], first, padding, second, padding[1:]])[None]
    valid = torch.tensor([False] + [True] * 5 + [False] * 2 + [True] * 6 + [False])[None]
    zero = torch.zeros(1, dtype=torch.float64)
    expected = torch.cat([zero, scorer.log_prob(first[None])[0], zero, zero, scorer.log_prob(second[None])[0], zero])
    assert torch.equal(scorer.log_prob(row, valid)[0], expected)
    score = scorer.negative_log_likelihood(row, valid)
    assert score.num_scored.tolist() == [11]
    assert score.nats.item() == pytest.approx(-expected.sum().item(), rel=1e-14)


def test_large_vocabularies_need_no_short_order():
    """50257^6 is far beyond 64 bits; the trie's keys are not."""
    text = torch.randint(50257, (300,), generator=torch.Generator().manual_seed(0))
    scorer = NgramScorer.fit(text, 50257, order=6)
    # Each gram occurs once, so the longest context all but knows what comes next.
    assert scorer.log_prob(text[None])[0, 6:].exp().min() > 0.4
    assert scorer.log_prob(text.flip(0)[None])[0, 6:].exp().max() < 0.01


def test_saved_and_loaded_it_is_the_same(tmp_path):
    scorer = NgramScorer.fit(sequences([100, 50]), K, order=3, corpus="squares")
    path = tmp_path / "judge.safetensors"
    scorer.save(path)
    again = NgramScorer.load(path)
    assert again.card() == scorer.card()
    assert again.name == "3-gram Kneser-Ney, squares"
    test = sequences([40], seed=9)[0][None]
    assert torch.equal(again.log_prob(test), scorer.log_prob(test))
    assert [file.name for file in tmp_path.iterdir()] == ["judge.safetensors"]


def test_is_a_scorer():
    scorer = NgramScorer.fit(sequences([100]), K, order=2)
    assert isinstance(scorer, LanguageScorer)
    assert scorer.reads == "tokens"


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no sequence has 5 tokens"):
        NgramScorer.fit(sequences([4, 2]), K, order=5)
    with pytest.raises(ValueError, match="no sequence has 2 tokens"):
        NgramScorer.fit([], K, order=2)
    with pytest.raises(ValueError, match="order is 0"):
        NgramScorer.fit(sequences([4]), K, order=0)
    with pytest.raises(ValueError, match=r"span \[0, 6\]; expected \[0, 5\]"):
        NgramScorer.fit(torch.tensor([0, 6]), K, order=1)
    scorer = NgramScorer.fit(sequences([100]), K, order=2)
    with pytest.raises(ValueError, match="tokenizer"):
        scorer.log_prob(torch.tensor([[0, -1]]))
    with pytest.raises(ValueError, match="safetensors; got 'judge.bin'"):
        scorer.save(tmp_path / "judge.bin")
    with pytest.raises(FileNotFoundError, match=r"NgramScorer\.save"):
        NgramScorer.load(tmp_path / "none.safetensors")
    save_file({"keys.1": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has the format None"):
        NgramScorer.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not a table")
    with pytest.raises(ValueError, match="holds no n-gram tables"):
        NgramScorer.load(tmp_path / "text.safetensors")
