"""The three coordinates of a prediction, against Bayes' rule by enumeration. Identities are numbered as in the docs."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from wellposed.udm.kernels import Absorbing, Masked, Uniform
from wellposed.udm.prediction import (
    Prediction,
    check_alpha,
    log_evidence,
    log_odds,
    to_denoiser,
    to_leave_one_out,
    to_score,
)

ALPHAS = [1e-6, 0.03, 0.5, 0.97, 1 - 1e-9]
CLOSE = {"rtol": 0, "atol": 1e-12}


def logits(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("channel", ["uniform", "masked", "absorbing"])
def test_identity_1_conversions_invert(alpha, channel):
    """loo -> denoiser -> loo and back, on logits; to the rounding of an added log R."""
    raw, tokens = logits(3, 4, 5), torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(1))
    there = to_denoiser(raw, tokens, one(alpha, 3), channel=channel)
    back = to_leave_one_out(there, tokens, one(alpha, 3), channel=channel)
    torch.testing.assert_close(back, raw, rtol=0, atol=1e-13)
    there = to_leave_one_out(raw, tokens, one(alpha, 3), channel=channel)
    torch.testing.assert_close(to_denoiser(there, tokens, one(alpha, 3), channel=channel), raw, rtol=0, atol=1e-13)
    if channel != "masked":
        assert (there - raw).abs().max() > 0.9 * alpha


@pytest.mark.parametrize("alpha", [0.03, 0.5, 0.97])
@pytest.mark.parametrize("kernel", [Uniform(3), Absorbing(3), Masked(3)], ids=lambda k: type(k).__name__)
def test_identity_2_the_conversion_is_bayes_rule(world, channel_of, states_of, alpha, kernel):
    """d and pi by enumeration are each other's conversion, at uncertain positions of every possible state."""
    channel = channel_of(kernel, alpha)
    state = states_of(kernel, world.length)
    uncertain = kernel.open(state)
    observed, survival = state.tokens[uncertain], one(alpha, int(uncertain.sum()))
    denoiser, loo = world.denoiser(channel)[uncertain], world.leave_one_out(channel)[uncertain]
    if kernel.channel != "masked":
        assert (denoiser - loo).abs().max() > alpha / 10
    kinds = {"channel": kernel.channel}
    observed = torch.zeros_like(observed) if kernel.channel == "masked" else observed
    converted = to_denoiser(loo.log(), observed, survival, **kinds).softmax(-1)
    torch.testing.assert_close(converted, denoiser, **CLOSE)
    converted = to_leave_one_out(denoiser.log(), observed, survival, **kinds).softmax(-1)
    torch.testing.assert_close(converted, loo, **CLOSE)


@pytest.mark.parametrize("alpha", [0.03, 0.5, 0.97])
def test_identity_3_score(world, enumeration, alpha):
    """Ratios of p_t by enumeration, from pi and from d; and back to both."""
    channel = enumeration.uniform_channel(alpha, 3)
    p_t, tokens = world.marginal(channel), world.sequences
    expected = torch.empty(len(tokens), world.length, 3, dtype=torch.float64)
    for i in range(world.length):
        for y in range(3):
            replaced = tokens.clone()
            replaced[:, i] = y
            expected[:, i, y] = p_t[enumeration.index_of(replaced, 3)] / p_t
    survival = one(alpha, len(tokens))
    loo, denoiser = world.leave_one_out(channel), world.denoiser(channel)
    torch.testing.assert_close(to_score(loo.log(), tokens, survival), expected, rtol=1e-12, atol=1e-12)
    known = {"alpha": survival, "tokens": tokens}
    of_denoiser = Prediction(kind="denoiser", logits=denoiser.log(), **known).score()
    torch.testing.assert_close(of_denoiser.logits.exp(), expected, rtol=1e-12, atol=1e-12)
    # The one-site conditional p(x_i = y | the others) is the normalised score.
    conditional = alpha * loo + (1 - alpha) / 3
    torch.testing.assert_close(of_denoiser.log_probs().exp(), conditional, **CLOSE)
    of_score = Prediction(kind="score", logits=expected.log(), **known)
    torch.testing.assert_close(of_score.leave_one_out().log_probs().exp(), loo, **CLOSE)
    torch.testing.assert_close(of_score.denoiser().log_probs().exp(), denoiser, **CLOSE)


def test_score_from_the_denoiser_in_closed_form(world, enumeration):
    """Identity 3: s_y = 1 + (R - 1) d_y - (1 - 1/R) d_{x_t} for y other than x_t."""
    alpha, tokens = 0.4, world.sequences
    denoiser = world.denoiser(enumeration.uniform_channel(alpha, 3))
    ratio = 1 + 3 * alpha / (1 - alpha)
    own = denoiser.gather(-1, tokens[..., None])
    expected = (1 + (ratio - 1) * denoiser - (1 - 1 / ratio) * own).scatter(-1, tokens[..., None], 1.0)
    prediction = Prediction(kind="denoiser", logits=denoiser.log(), alpha=one(alpha, len(tokens)), tokens=tokens)
    torch.testing.assert_close(prediction.score().logits.exp(), expected, rtol=1e-12, atol=0)


def test_identity_13_evidence_of_an_active_token():
    """-log(1 - alpha) at u, without the factor K that uniform noise has; nothing for a mask."""
    alpha = torch.tensor([1e-12, 0.3, 0.999], dtype=torch.float64)
    expected = torch.tensor([-math.log1p(-a) for a in alpha.tolist()], dtype=torch.float64)
    torch.testing.assert_close(log_evidence(alpha, 50, "absorbing"), expected, rtol=1e-14, atol=0)
    expected = torch.tensor([math.log1p(50 * a / (1 - a)) for a in alpha.tolist()], dtype=torch.float64)
    torch.testing.assert_close(log_evidence(alpha, 50), expected, rtol=1e-12, atol=0)
    assert not log_evidence(alpha, 50, "masked").any()
    assert log_evidence(torch.tensor([1.0]).double(), 50).isinf().all()
    # log R = softplus(c).
    odds = log_odds(alpha, 50)
    torch.testing.assert_close(log_evidence(alpha, 50), torch.nn.functional.softplus(odds), rtol=1e-11, atol=0)


def test_identity_25_renaming_the_tokens_renames_the_prediction():
    raw, tokens, alpha = (
        logits(2, 3, 6),
        torch.tensor([[0, 5, 2], [1, 1, 4]]),
        torch.tensor([0.2, 0.8], dtype=torch.float64),
    )
    order = torch.tensor([3, 5, 0, 1, 4, 2])  # the new name of each token
    renamed = torch.empty_like(raw)
    renamed[..., order] = raw
    for convert in (to_denoiser, to_leave_one_out, to_score):
        torch.testing.assert_close(
            convert(renamed, order[tokens], alpha)[..., order], convert(raw, tokens, alpha), rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("kind", ["denoiser", "leave_one_out"])
def test_every_way_round_comes_back(kind):
    tokens, alpha = torch.tensor([[0, 3], [2, 2]]), torch.tensor([0.1, 0.9], dtype=torch.float64)
    first = Prediction(kind=kind, logits=logits(2, 2, 4), alpha=alpha, tokens=tokens)
    for way in (["denoiser"], ["leave_one_out"], ["score"], ["score", "denoiser", "leave_one_out", "score"]):
        prediction = first
        for step in way:
            prediction = prediction.to(step)
            assert prediction.kind == step
        torch.testing.assert_close(prediction.to(kind).log_probs(), first.log_probs(), rtol=1e-12, atol=1e-12)
    assert first.to(kind) is first


def test_an_estimated_score_off_the_simplex_is_clipped():
    """p(x = y | others) below its floor (1 - alpha) / K would mean a negative pi."""
    score = torch.tensor([[1.0, 0.01, 3.0]]).double()
    prediction = Prediction(kind="score", logits=score.log(), alpha=one(0.5), tokens=torch.tensor([0]))
    probs = prediction.leave_one_out().log_probs().exp()
    expected = (score / score.sum() - 0.5 / 3).clamp_min(0)
    assert probs[0, 1] == 0
    torch.testing.assert_close(probs, expected / expected.sum(), **CLOSE)


def test_rows_are_the_chosen_positions():
    raw, tokens, alpha = (
        logits(2, 3, 4),
        torch.tensor([[0, 3, 1], [2, 2, 0]]),
        torch.tensor([0.1, 0.9], dtype=torch.float64),
    )
    whole = Prediction(kind="denoiser", logits=raw, alpha=alpha, tokens=tokens)
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    rows = whole.rows(chosen)
    assert rows.alpha.tolist() == [0.1, 0.1, 0.9]
    assert rows.tokens.tolist() == [0, 1, 2]
    torch.testing.assert_close(rows.score().logits, whole.score().logits[chosen], rtol=0, atol=1e-14)
    again = rows.rows(torch.tensor([False, True, True]))
    torch.testing.assert_close(again.leave_one_out().logits, whole.leave_one_out().logits[chosen][1:], rtol=0, atol=0)


def test_a_certain_observation():
    """At alpha = 1 the denoiser repeats its input, and what the others say cannot be had from it."""
    prediction = Prediction(kind="leave_one_out", logits=logits(1, 3), alpha=one(1.0), tokens=torch.tensor([1]))
    assert prediction.denoiser().log_probs().exp().tolist() == [[0, 1, 0]]
    # Where the others exclude the observed token, no inf - inf arises.
    excluded = torch.tensor([[0.0, -math.inf, 1.0]]).double()
    assert not to_denoiser(excluded, torch.tensor([1]), one(1.0)).isnan().any()
    with pytest.raises(ValueError, match="only repeats its input"):
        prediction.denoiser().leave_one_out()
    with pytest.raises(ValueError, match="no score"):
        prediction.score()
    masked = Prediction(
        kind="denoiser", logits=logits(1, 3), alpha=one(1.0), tokens=torch.tensor([3]), channel="masked"
    )
    assert masked.leave_one_out().logits is masked.logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_before_anything_is_added(dtype):
    raw = logits(4, 100, dtype=torch.float32).to(dtype)
    tokens, alpha = torch.tensor([0, 5, 9, 99]), one(0.5, 4)
    result = to_denoiser(raw, tokens, alpha)
    assert result.dtype == torch.float32
    exact = to_denoiser(raw.double(), tokens, alpha)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5)
    prediction = Prediction(kind="leave_one_out", logits=raw, alpha=alpha, tokens=tokens)
    assert prediction.log_probs().dtype == torch.float32
    torch.testing.assert_close(prediction.log_probs().exp().sum(-1), torch.ones(4))
    assert prediction.tempered(0.5).logits.dtype == torch.float32


def test_float32_is_enough_for_a_large_vocabulary():
    """K = 50257 near both ends: the scalars are float64, the vocabulary float32."""
    raw, tokens = logits(4, 50257), torch.tensor([0, 17, 50256, 3])
    alpha = torch.tensor([1e-3, 0.5, 1 - 1e-6, 1 - 1e-12], dtype=torch.float64)
    exact = Prediction(kind="denoiser", logits=raw, alpha=alpha, tokens=tokens)
    single = Prediction(kind="denoiser", logits=raw.float(), alpha=alpha, tokens=tokens)
    for kind in ("leave_one_out", "score"):
        torch.testing.assert_close(single.to(kind).logits.double(), exact.to(kind).logits, rtol=0, atol=2e-5)


def test_a_temperature_divides_the_logits():
    prediction = Prediction(kind="denoiser", logits=logits(2, 3), alpha=one(0.5, 2), tokens=torch.tensor([0, 1]))
    assert prediction.tempered(1) is prediction
    torch.testing.assert_close(prediction.tempered(0.5).logits, 2 * prediction.logits)
    assert prediction.tempered(0.5).kind == "denoiser"


def test_what_does_not_fit_together_is_refused():
    raw, tokens = logits(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    # A ValueError, or a TypeCheckError where shapes are checked before.
    with pytest.raises((ValueError, TypeCheckError)):
        to_denoiser(raw, tokens[:, :2], one(0.5, 2))
    with pytest.raises(ValueError, match="one for each sequence"):
        to_denoiser(raw, tokens, one(0.5, 3))
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, 4\)"):
            Prediction(kind="denoiser", logits=raw, alpha=one(0.5, 2), tokens=tokens + bad)
    for bad in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            to_score(raw, tokens, one(bad, 2))
    with pytest.raises(ValueError, match="score compares tokens"):
        Prediction(kind="score", logits=raw, alpha=one(0.5, 2), tokens=tokens, channel="absorbing")
    with pytest.raises(ValueError, match="score compares tokens"):
        Prediction(kind="denoiser", logits=raw, alpha=one(0.5, 2), tokens=tokens, channel="absorbing").score()


def test_alpha_is_kept_in_float64():
    assert check_alpha(torch.tensor([0.5], dtype=torch.float32)).dtype == torch.float64
    nothing = check_alpha(torch.zeros(0))
    assert nothing.dtype == torch.float64
