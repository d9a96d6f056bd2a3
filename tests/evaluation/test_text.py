import json
import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from wellposed.evaluation.ngram import NgramScorer
from wellposed.evaluation.text import (
    PUBLISHED_SCORING,
    CausalScorer,
    CausalTokenScorer,
    LanguageScorer,
    ScoringSettings,
    check_tokens,
    distinct_n,
    generative_perplexity,
    repetition,
    token_entropy,
)

K = 20
EOS = K  # as in GPT-2, one token starts a text and ends it
MARK = "<|endoftext|>"
CONTEXT = 12


def draw(*shape, vocab_size=K, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    config = GPT2Config(
        vocab_size=K + 1, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS
    )
    net = GPT2LMHeadModel(config).double().eval()
    # As initialised it knows nothing, and every score would be log K.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return net


@pytest.fixture(scope="module")
def tokenizer():
    """Letters a, b, ... are tokens 0, 1, ..."""
    inner = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(K)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=MARK, eos_token=MARK)


def decode(tokens):
    return "".join(MARK if token == EOS else chr(97 + token) for token in tokens.tolist())


def log_prob(model, tokens):
    """log p of token i given tokens 0 ... i - 1, for i >= 1, by one plain call."""
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0]
    return torch.log_softmax(logits[:-1], dim=-1).gather(1, tokens[1:, None])[:, 0]


def with_bos(tokens):
    return torch.cat([torch.tensor([EOS]), tokens])


class Unigram:
    """A judge with a table."""

    name = "table"
    reads = "tokens"

    def __init__(self, probabilities):
        self.log = torch.tensor(probabilities, dtype=torch.float64).log()

    def card(self):
        return {"log": self.log.tolist()}

    def negative_log_likelihood(self, tokens, valid=None):
        from wellposed.evaluation.text import NegativeLogLikelihood

        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        nats = torch.where(valid, -self.log[tokens.clamp(min=0)], 0.0).sum(1)
        return NegativeLogLikelihood(nats=nats, num_scored=valid.sum(1))


def test_entropy_agrees_with_a_counter():
    tokens = draw(7, 30)
    expected = [-sum(n / 30 * math.log(n / 30) for n in Counter(row).values()) for row in tokens.tolist()]
    torch.testing.assert_close(token_entropy(tokens), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_entropy_at_its_ends():
    tokens = torch.stack([torch.arange(16), torch.full((16,), 3), torch.arange(16) % 2])
    torch.testing.assert_close(token_entropy(tokens), torch.tensor([math.log(16), 0.0, math.log(2)]).double())


def test_entropy_knows_frequencies_only():
    tokens = draw(5, 40)
    names = torch.randperm(K, generator=torch.Generator().manual_seed(1)) * 1000
    torch.testing.assert_close(token_entropy(names[tokens].flip(1)), token_entropy(tokens), rtol=1e-13, atol=0)


def test_padding_counts_in_nothing():
    tokens = draw(3, 20, vocab_size=4)
    lengths = (20, 11, 6)
    valid = torch.arange(20) < torch.tensor(lengths)[:, None]
    padded = torch.where(valid, tokens, -100)
    for function in (token_entropy, lambda t, valid=None: repetition(t, 2, valid)):
        apart = torch.cat([function(row[None, :n]) for row, n in zip(tokens, lengths, strict=True)])
        torch.testing.assert_close(function(padded, valid), apart, rtol=1e-13, atol=0)
    assert distinct_n(padded[2:], 2, valid[2:]) == distinct_n(tokens[2:, :6], 2)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_distinct_and_repetition_agree_with_sets(n):
    tokens = draw(6, 25, vocab_size=3)
    grams = [[tuple(row[i : i + n]) for i in range(25 - n + 1)] for row in tokens.tolist()]
    everything = [gram for row in grams for gram in row]
    assert distinct_n(tokens, n) == len(set(everything)) / len(everything)
    expected = torch.tensor([1 - len(set(row)) / len(row) for row in grams], dtype=torch.float64)
    torch.testing.assert_close(repetition(tokens, n), expected, rtol=0, atol=1e-15)


def test_ngrams_cross_neither_padding_nor_the_range_of_integers():
    tokens = torch.tensor([[1, 2, 9, 1, 2, 3]])
    valid = torch.tensor([[True, True, False, True, True, True]])
    assert repetition(tokens, 2, valid).item() == pytest.approx(1 - 2 / 3)
    # 25 tokens of a vocabulary of 2^40 have no number of 64 bits; equal ones are still found.
    large = draw(1, 30, vocab_size=2**40)
    assert repetition(torch.cat([large, large], dim=1), 25).item() == pytest.approx(1 - 30 / 36)


def test_scores_are_those_of_the_model(model):
    tokens = draw(4, 9)
    score = CausalTokenScorer(model=model, name="tiny", bos_token_id=EOS).negative_log_likelihood(tokens)
    expected = torch.stack([-log_prob(model, with_bos(row)).sum() for row in tokens])
    torch.testing.assert_close(score.nats, expected, rtol=1e-12, atol=0)
    assert score.num_scored.tolist() == [9] * 4
    # The model is not indifferent, so that this says something.
    assert (expected / 9).std() > 0.05


def test_without_a_start_the_first_token_is_only_context(model):
    tokens = draw(3, 9)
    expected = torch.stack([-log_prob(model, row).sum() for row in tokens])
    for scorer in (
        CausalTokenScorer(model=model, name="tiny"),
        CausalTokenScorer(
            model=model, name="tiny", bos_token_id=EOS, settings=ScoringSettings(prepend_bos=False), batch_size=2
        ),
    ):
        score = scorer.negative_log_likelihood(tokens)
        torch.testing.assert_close(score.nats, expected, rtol=1e-12, atol=0)
        assert score.num_scored.tolist() == [8] * 3
        assert scorer.card()["prepend_bos"] is False


def test_a_text_that_begins_with_the_start_gets_no_second_one(model):
    scorer = CausalTokenScorer(model=model, name="tiny", bos_token_id=EOS)
    tokens = draw(1, 8)
    once, twice = scorer.negative_log_likelihood(tokens), scorer.negative_log_likelihood(with_bos(tokens[0])[None])
    assert torch.equal(once.nats, twice.nats) and torch.equal(once.num_scored, twice.num_scored)


@pytest.mark.parametrize(("length", "stride"), [(12, 6), (13, 6), (30, 6), (31, 1), (40, 11), (5, 3)])
def test_windows_score_every_token_once_with_enough_context(model, length, stride):
    tokens = draw(1, length)[0]
    expected, windows = torch.zeros((), dtype=torch.float64), 0
    for i in range(1, length):
        # In the first window all that came before; then the window that i falls into fixes where its context begins.
        start = 0 if i < CONTEXT else CONTEXT + (i - CONTEXT) // stride * stride - (CONTEXT - stride)
        windows = max(windows, start)
        expected -= log_prob(model, tokens[start : i + 1])[-1]
    scorer = CausalTokenScorer(model=model, name="tiny", settings=ScoringSettings(stride=stride))
    score = scorer.negative_log_likelihood(tokens[None])
    assert score.nats.item() == pytest.approx(expected.item(), rel=1e-12)
    assert score.num_scored.item() == length - 1
    assert (windows > 0) == (length > CONTEXT)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_neither_batches_nor_padding_nor_neighbours_matter(model, batch_size):
    """With 7 sequences the last batch is incomplete, and its sequences are scored like the others."""
    sequences = [draw(n, seed=n) for n in (9, 3, 17, 1, 12, 5, 26)]
    scorer = CausalTokenScorer(model=model, name="tiny", bos_token_id=EOS, batch_size=batch_size)
    together = scorer.score_sequences(sequences)
    alone = [scorer.score_sequences([sequence]).nats for sequence in sequences]
    torch.testing.assert_close(together.nats, torch.cat(alone), rtol=1e-12, atol=0)
    assert together.num_scored.tolist() == [len(sequence) for sequence in sequences]
    width = 26
    padded = torch.stack([torch.cat([s, torch.full((width - len(s),), -1)]) for s in sequences])
    masked = scorer.negative_log_likelihood(padded, padded >= 0)
    assert torch.equal(masked.nats, together.nats)


def test_settings_choose_what_is_scored(model):
    tokens = torch.cat([draw(4), torch.tensor([EOS]), draw(3, seed=1), torch.tensor([EOS, EOS])])
    logs = -log_prob(model, with_bos(tokens))

    def score(**settings):
        scorer = CausalTokenScorer(
            model=model, name="tiny", bos_token_id=EOS, eos_token_id=EOS, settings=ScoringSettings(**settings)
        )
        found = scorer.score_sequences([tokens])
        return found.nats.item(), found.num_scored.item()

    assert score() == (pytest.approx(logs.sum().item()), 10)
    assert score(repeated_eos=False) == (pytest.approx(logs[:8].sum().item()), 8)
    assert score(max_tokens=6) == (pytest.approx(logs[:6].sum().item()), 6)


def test_published_settings_repeat_the_published_protocol(model):
    """Its code: pad with the end of text, shift, weigh by (not an end of text) or (the first one), divide the sums."""
    texts = [draw(10), torch.cat([draw(3, seed=1), torch.tensor([EOS]), draw(4, seed=2), torch.tensor([EOS])]), draw(7)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=EOS)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]).long()
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits.transpose(-1, -2)
    nats = torch.nn.functional.cross_entropy(logits[..., :-1], padded[..., 1:], reduction="none")
    counted = ((padded == EOS).cumsum(-1) == 1) | (padded != EOS)
    # The published code scores the first padding of a text without an end of text as if the text had ended there.
    counted &= mask.bool()
    scorer = CausalTokenScorer(model=model, name="tiny", bos_token_id=EOS, eos_token_id=EOS, settings=PUBLISHED_SCORING)
    score = scorer.score_sequences(texts)
    torch.testing.assert_close(score.nats, (nats * counted[:, 1:]).sum(1), rtol=1e-12, atol=0)
    assert torch.equal(score.num_scored, counted[:, 1:].sum(1))


def test_low_precision_models_are_summed_in_high_precision(model):
    low = GPT2LMHeadModel(model.config).eval()
    low.load_state_dict(model.state_dict())
    low.to(torch.bfloat16)
    tokens = draw(2, 10)
    score = CausalTokenScorer(model=low, name="tiny").negative_log_likelihood(tokens)
    with torch.no_grad():
        logits = low(tokens).logits
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    torch.testing.assert_close(score.nats, expected.sum(1), rtol=1e-6, atol=0)


def test_texts_are_tokenized_by_the_judge(model, tokenizer):
    rows = [draw(9), torch.cat([draw(3, seed=1), torch.tensor([EOS]), draw(4, seed=2)]), draw(20, seed=3), draw(0)]
    scorer = CausalScorer(model=model, tokenizer=tokenizer, name="tiny")
    score = scorer.negative_log_likelihood([decode(row) for row in rows])
    same = scorer.scorer.score_sequences(rows)
    assert torch.equal(score.nats, same.nats)
    assert score.num_scored.tolist() == [9, 8, 20, 0]
    assert scorer.scorer.bos_token_id == scorer.scorer.eos_token_id == EOS


def test_marks_that_a_tokenizer_adds_are_left_out(model, tokenizer):
    adding = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token=MARK, eos_token=MARK
    )
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{MARK} $A {MARK}", None, [(MARK, EOS)])
    assert adding("abc").input_ids == [EOS, 0, 1, 2, EOS]
    plain, other = (CausalScorer(model=model, tokenizer=held, name="tiny") for held in (tokenizer, adding))
    expected, found = plain.negative_log_likelihood(["abc"]), other.negative_log_likelihood(["abc"])
    assert torch.equal(found.nats, expected.nats) and found.num_scored.tolist() == [3]


def test_loads_from_a_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = CausalScorer.from_pretrained(tmp_path, dtype=torch.float64)
    given = CausalScorer(model=model, tokenizer=tokenizer, name=str(tmp_path))
    assert loaded.card() == given.card()
    assert loaded.card()["dtype"] == "float64"
    texts = ["abc", "hello"]
    assert torch.equal(loaded.negative_log_likelihood(texts).nats, given.negative_log_likelihood(texts).nats)


def test_without_the_hub_the_error_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"cannot load the judge 'gpt2-large'.*hf download gpt2-large.*NgramScorer"):
        CausalScorer.from_pretrained("gpt2-large")
    with pytest.raises(OSError, match="no such local folder"):
        CausalScorer.from_pretrained(tmp_path)


def test_card_says_what_a_score_depends_on(model, tokenizer):
    card = CausalScorer(model=model, tokenizer=tokenizer, name="tiny").card()
    assert json.loads(json.dumps(card)) == card
    assert (card["prepend_bos"], card["context_length"], card["stride"]) == (True, CONTEXT, CONTEXT // 2)
    other = CausalScorer(model=model, tokenizer=tokenizer, name="tiny", settings=PUBLISHED_SCORING).card()
    assert {key for key in card if card[key] != other[key]} == {"prepend_bos", "repeated_eos", "max_tokens"}


def test_perplexity_is_over_all_tokens_and_comes_with_the_entropy():
    tokens = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 2]])
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    judge = Unigram([0.5, 0.25, 0.25])
    score = generative_perplexity(tokens, judge, valid=valid)
    # 3 tokens cost log 2 and 3 cost log 4.
    assert score.value == pytest.approx(2**1.5)
    assert score.per_sample == pytest.approx((2.0, 2**1.75))
    assert score.mean_per_sample == pytest.approx((2 + 2**1.75) / 2)
    assert score.entropy_per_sample == pytest.approx((0.0, 1.5 * math.log(2)))
    assert score.entropy == pytest.approx(0.75 * math.log(2))
    assert score.entropy_standard_error == pytest.approx(0.75 * math.log(2))
    assert (score.num_scored, score.num_tokens, score.length) == (6, 6, 4)
    assert json.loads(json.dumps(score.to_dict()))["scorer_card"] == judge.card()
    assert str(score).startswith("generative perplexity 2.828 +- ")
    assert "at token entropy 0.5199 +- 0.52 nats (table, n=2, length 4)" in str(score)


def test_standard_error_is_that_of_repeated_experiments():
    """Samples of unequal length: the spread of the log perplexity over 400 experiments of 50 samples."""
    judge = Unigram([0.7, 0.2, 0.1])
    tokens = draw(400 * 50, 12, vocab_size=3)
    valid = torch.arange(12) < 2 + draw(400 * 50, 1, vocab_size=10, seed=1)
    # Long samples are cheap ones: length and cost vary together, which a plain mean would not know of.
    tokens = torch.where(valid.sum(1, keepdim=True) > 6, torch.zeros_like(tokens), tokens)
    scores = [
        generative_perplexity(rows, judge, valid=mask)
        for rows, mask in zip(tokens.split(50), valid.split(50), strict=True)
    ]
    logs = torch.tensor([math.log(score.value) for score in scores])
    stated = torch.tensor([score.log_standard_error for score in scores])
    assert stated.mean().item() == pytest.approx(logs.std().item(), rel=0.12)


def test_a_single_sample_has_no_standard_error(model):
    score = generative_perplexity(draw(1, 9), CausalTokenScorer(model=model, name="tiny", bos_token_id=EOS))
    assert score.log_standard_error is None and score.entropy_standard_error is None
    assert "+-" not in str(score)


def test_both_kinds_of_judge(model, tokenizer):
    tokens = draw(5, 9)
    reads_tokens = CausalTokenScorer(model=model, name="tiny", bos_token_id=EOS)
    reads_texts = CausalScorer(model=model, tokenizer=tokenizer, name="tiny")
    ngram = NgramScorer.fit(draw(100), K, order=2)
    for judge in (reads_tokens, reads_texts, ngram, Unigram([1.0])):
        assert isinstance(judge, LanguageScorer)
    texts = [decode(row) for row in tokens]
    assert generative_perplexity(tokens, reads_texts, texts=texts).value == pytest.approx(
        generative_perplexity(tokens, reads_tokens).value, rel=1e-12
    )
    expected = ngram.negative_log_likelihood(tokens).nats.sum().item() / tokens.numel()
    assert generative_perplexity(tokens, ngram).value == pytest.approx(math.exp(expected))
    with pytest.raises(ValueError, match="reads token ids: leave out texts"):
        generative_perplexity(tokens, ngram, texts=texts)
    with pytest.raises(
        ValueError, match=r"one for each of the 5 samples; got none: pass texts=tokenizer\.decode_batch"
    ):
        generative_perplexity(tokens, reads_texts)
    with pytest.raises(ValueError, match="got 4"):
        generative_perplexity(tokens, reads_texts, texts=texts[:4])
    # A sample that says nothing to the judge is told apart from a cheap one.
    assert generative_perplexity(tokens, reads_texts, texts=["", *texts[1:]]).per_sample[0] is None
    with pytest.raises(ValueError, match="no token to score"):
        generative_perplexity(tokens, reads_texts, texts=[""] * 5)


def test_refusals(model, tokenizer):
    tokens = draw(2, 4)
    for function in (token_entropy, lambda t, valid=None: repetition(t, 2, valid)):
        with pytest.raises(ValueError, match="a sample"):
            function(tokens, torch.tensor([[True] * 4, [False] * 4]))
        with pytest.raises(ValueError, match="no samples"):
            function(tokens[:0])
        with pytest.raises(ValueError, match="span"):
            function(-tokens - 1)
    with pytest.raises(ValueError, match="no samples"):
        generative_perplexity(tokens[:0], Unigram([1.0]))
    with pytest.raises(ValueError, match=r"\(2, 3\) and tokens \(2, 4\)"):
        check_tokens(tokens, K, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no 5-grams"):
        distinct_n(tokens, 5)
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n(tokens, 0)
    scorer = CausalTokenScorer(model=model, name="tiny")
    with pytest.raises(ValueError, match=r"expected \[0, 20\]"):
        scorer.negative_log_likelihood(tokens + 21)
    for wrong in ({"stride": 12}, {"context_length": 5, "stride": 0}):
        with pytest.raises(ValueError, match="stride"):
            CausalTokenScorer(model=model, name="tiny", settings=ScoringSettings(**wrong))
    with pytest.raises(ValueError, match="max_tokens is 1"):
        ScoringSettings(max_tokens=1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        CausalTokenScorer(model=model, name="tiny", batch_size=0)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        CausalTokenScorer(model=GPT2LMHeadModel(model.config), name="tiny")
    small = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=1)).eval()
    with pytest.raises(ValueError, match="the tokenizer has 21 tokens and the model 5"):
        CausalScorer(model=small, tokenizer=tokenizer, name="tiny")
