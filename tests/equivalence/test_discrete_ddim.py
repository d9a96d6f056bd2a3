"""diffusers' sampler for uniform noise has the same conversion, posterior and Gibbs conditional; a choice differs.

Its correctors are called exact without a condition there: that holds for one position at a time, chosen at random.
"""

import pytest
import torch
from diffusers import DiscreteDDIMScheduler

from wellposed.batches import TextBatch
from wellposed.udm.corrector import Corrector, correct, selection_scores
from wellposed.udm.kernels import TokenState, Uniform, uniform_bridge
from wellposed.udm.models import GivenLogits
from wellposed.udm.prediction import Prediction, to_leave_one_out
from wellposed.udm.sampler import split_budget
from wellposed.udm.steps import SamplingSettings, ancestral_step

STEPS = 10


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


def logits_of(*shape, dtype=torch.float64):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def scheduler(**config):
    made = DiscreteDDIMScheduler(num_inference_steps=STEPS, **config)
    made.set_timesteps(STEPS)
    return made


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 0.999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_conversion_to_leave_one_out_logits(alpha, dtype):
    raw, tokens = (
        logits_of(2, 5, 7, dtype=dtype),
        torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1)),
    )
    theirs = DiscreteDDIMScheduler._to_loo_logits(raw, tokens, alpha)
    ours = to_leave_one_out(raw, tokens, one(alpha, 2))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)
    assert not torch.equal(ours, raw)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_the_posterior_towards_one_clean_token(step):
    """Their three routes, averaged over many draws, against ``uniform_bridge`` with one-hot x_0."""
    size, count = 4, 200_000
    alpha_t, alpha_s = step / STEPS, (step + 1) / STEPS
    # Their masses, as code has them.
    survival = alpha_t / alpha_s
    for x_0, x_t in ((1, 1), (1, 2)):
        same = float(x_0 == x_t)
        masses = torch.tensor(
            [
                alpha_s * (1 - survival) / size + survival * alpha_s * same,
                survival * (1 - alpha_s) / size,
                (1 - survival) * (1 - alpha_s) / size,
            ],
            dtype=torch.float64,
        )
        clean, stay, noise = (masses / masses.sum()).tolist()
        expected = torch.full((size,), noise / size, dtype=torch.float64)
        expected[x_0] += clean
        expected[x_t] += stay
        one_hot = torch.nn.functional.one_hot(torch.tensor([x_0]), size).double()
        bridge = uniform_bridge(torch.tensor([x_t]), one_hot, one(alpha_t), one(alpha_s))[0]
        torch.testing.assert_close(bridge, expected, rtol=0, atol=1e-14)
        if step not in (1, 5, STEPS - 1):
            continue
        logits = torch.full((1, count, size), -1e4).index_fill(-1, torch.tensor([x_0]), 0.0)
        out = scheduler().step(
            logits, step, torch.full((1, count), x_t), temperature=1.0, generator=torch.Generator().manual_seed(step)
        )
        law = torch.bincount(out.prev_sample[0], minlength=size) / count
        assert float((law - bridge).abs().sum() / 2) < 5e-3


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_step_of_theirs_and_of_ours_have_one_law(step):
    """They draw x_0 from the denoiser and step towards it; we plug the leave-one-out posterior in. 2e5 draws each."""
    size, count = 4, 200_000
    alpha_t, alpha_s = step / STEPS, (step + 1) / STEPS
    tokens, raw = torch.full((1, count), 2), logits_of(size).expand(1, count, -1)
    theirs = (
        scheduler().step(raw, step, tokens, temperature=1.0, generator=torch.Generator().manual_seed(1)).prev_sample
    )
    ours = ancestral_step(
        GivenLogits(logits=raw, kind="denoiser"),
        Uniform(size),
        TokenState(tokens=tokens),
        one(alpha_t),
        one(alpha_s),
        canvas=TextBatch(tokens=tokens),
        settings=SamplingSettings(),
        generator=torch.Generator().manual_seed(2),
    ).tokens
    laws = [torch.bincount(each[0], minlength=size) / count for each in (theirs, ours)]
    assert float((laws[0] - laws[1]).abs().sum() / 2) < 5e-3
    loo = to_leave_one_out(raw[:, :1], tokens[:, :1], one(alpha_t)).softmax(-1)
    exact = uniform_bridge(tokens[:, :1], loo, one(alpha_t), one(alpha_s))[0, 0]
    assert float((laws[0] - exact).abs().sum() / 2) < 5e-3


def conditional(raw, tokens, alpha):
    """log p(x = y | the other positions), from the score: another way than theirs to the same."""
    return Prediction(kind="denoiser", logits=raw, alpha=one(alpha, len(raw)), tokens=tokens).score().log_probs()


@pytest.mark.parametrize("step", [0, 4, 8])
def test_the_conditional_that_a_correction_draws_from(step):
    """What they compute before drawing, seen through the positions they choose: the probabilities they report."""
    size, length = 5, 6
    raw = logits_of(3, length, size)
    tokens = torch.randint(0, size, (3, length), generator=torch.Generator().manual_seed(1))
    sampler = scheduler(corrector_steps=1, corrector_k=length, corrector_selection="random")
    prev, drawn, probs, _ = sampler.step_correct(
        raw, step, tokens, generator=torch.Generator().manual_seed(2), return_dict=False
    )
    ours = conditional(raw, tokens, (step + 1) / STEPS)
    # Every position is drawn once, in an order of theirs; each reports the probability of what it drew.
    reported = ours.gather(-1, prev[..., None])[..., 0].exp()
    torch.testing.assert_close(reported.sort(-1).values, probs.sort(-1).values, rtol=0, atol=1e-12)
    assert drawn.shape == prev.shape


@pytest.mark.parametrize("selection", ["lowest_log_margin", "lowest_maxprob", "lowest_current_prob"])
def test_least_confident_positions_are_the_same(selection):
    """At a selection temperature near 0 both take the k largest scores; the scores are the same functions of g."""
    size, length, k, step = 5, 12, 4, 4
    raw = logits_of(3, length, size)
    tokens = torch.randint(0, size, (3, length), generator=torch.Generator().manual_seed(1))
    alpha = (step + 1) / STEPS
    sampler = scheduler(corrector_steps=1, corrector_k=k, corrector_selection=selection, corrector_selection_tau=1e-6)
    log_g = conditional(raw, tokens, alpha)
    theirs = sampler._select_positions(tokens, log_g, torch.Generator().manual_seed(3))
    prediction = Prediction(kind="denoiser", logits=raw, alpha=one(alpha, 3), tokens=tokens)
    rows = prediction.leave_one_out().rows(torch.ones_like(tokens, dtype=torch.bool))
    scores = selection_scores(rows, selection).view(3, length)
    assert torch.equal(scores.topk(k).indices.sort(-1).values, theirs.sort(-1).values)
    moved = correct(
        GivenLogits(logits=raw, kind="denoiser"),
        Uniform(size),
        TokenState(tokens=tokens),
        one(alpha, 3),
        corrector=Corrector(steps=1, k=k, selection=selection, selection_temperature=1e-6),
        canvas=TextBatch(tokens=tokens),
        settings=SamplingSettings(),
        generator=torch.Generator().manual_seed(3),
    ).tokens
    allowed = torch.zeros_like(tokens, dtype=torch.bool).scatter(-1, theirs, True)
    assert not (moved != tokens)[~allowed].any()
    assert (moved != tokens)[allowed].any()


def test_a_budget_is_split_as_their_pipeline_splits_it():
    """``corrected = (N - 1) // (1 + C)``, ``steps = N - C corrected``."""
    for n in (1, 2, 10, 48, 256):
        for c in range(1, 5):
            corrected = (n - 1) // (1 + c)
            assert split_budget(n, Corrector(steps=c)) == (n - c * corrected, corrected)
