"""diffusers' DiscreteDDIMScheduler and ours: the same law at temperature 1, number for number where it has numbers."""

from typing import Any

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from torch import Tensor

from wellposed.schedulers import LeaveOneOutDDIMScheduler
from wellposed.udm import to_leave_one_out
from wellposed.udm.corrector import selection_scores
from wellposed.udm.kernels import uniform_bridge
from wellposed.udm.prediction import Prediction

STEPS, K = 8, 5
LOGITS = torch.tensor([0.7, -1.0, 1.2, 0.0, -0.4], dtype=torch.float64)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The probabilities of every draw that diffusers makes, and for x_0 a draw of each token in turn."""
    calls: list[Tensor] = []
    original = torch.multinomial

    def multinomial(probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(probs)
        if probs.shape == (K, K):
            return torch.arange(K).unsqueeze(-1)
        return original(probs, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return calls


def their_law(recorded: list[Tensor], step: int, token: int, temperature: float) -> Tensor:
    """p(x_s): K copies of one position of which copy k draws x_0 = k, weighted as diffusers weights them."""
    scheduler = DiscreteDDIMScheduler()
    scheduler.set_timesteps(STEPS)
    tokens = torch.full((1, K), token)
    scheduler.step(LOGITS.expand(1, K, K), step, tokens, temperature=temperature)
    clean, routes = recorded[0][0].double(), recorded[1].double()
    eye = torch.eye(K, dtype=torch.float64)
    law = routes[:, :1] * eye + routes[:, 1:2] * eye[token] + routes[:, 2:] / K
    return clean @ law


@pytest.mark.parametrize("token", [1, 2])
@pytest.mark.parametrize("step", range(STEPS))
def test_law_of_a_step_is_the_bridge_at_the_leave_one_out_posterior(
    recorded: list[Tensor], step: int, token: int
) -> None:
    observed, rows = torch.tensor([token]), LOGITS[None]
    alpha_t, alpha_s = (torch.tensor([value], dtype=torch.float64) for value in (step / STEPS, (step + 1) / STEPS))
    plugged = rows if step == 0 else to_leave_one_out(rows, observed, alpha_t)
    expected = uniform_bridge(observed, plugged.softmax(-1), alpha_t, alpha_s)[0]
    # Theirs is float32, and its routes are divided by a sum of the order of 1/K.
    torch.testing.assert_close(their_law(recorded, step, token, 1.0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_frequencies_of_our_steps_are_their_law(recorded: list[Tensor], step: int) -> None:
    copies, token = 400_000, 1
    ours = LeaveOneOutDDIMScheduler()
    ours.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(step)
    out = ours.step(
        LOGITS.expand(1, copies, K), step, torch.full((1, copies), token), temperature=1.0, generator=generator
    )
    found = out.prev_sample.flatten().bincount(minlength=K).double() / copies
    torch.testing.assert_close(found, their_law(recorded, step, token, 1.0), rtol=0, atol=3e-3)
    # And the clean tokens with it.
    clean = out.sampled_tokens.flatten().bincount(minlength=K).double() / copies
    torch.testing.assert_close(clean, LOGITS.softmax(-1), rtol=0, atol=3e-3)
    torch.testing.assert_close(out.sampled_probs, LOGITS.softmax(-1)[out.sampled_tokens])


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_at_temperature_zero_both_take_the_same_clean_tokens(step: int) -> None:
    logits = torch.randn(2, 40, K, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(K, (2, 40), generator=torch.Generator().manual_seed(2))
    outputs = []
    for kind in (DiscreteDDIMScheduler, LeaveOneOutDDIMScheduler):
        scheduler = kind()
        scheduler.set_timesteps(STEPS)
        outputs.append(scheduler.step(logits, step, tokens, generator=torch.Generator().manual_seed(3)))
    theirs, ours = outputs
    assert torch.equal(ours.sampled_tokens, theirs.sampled_tokens)
    torch.testing.assert_close(ours.sampled_probs, theirs.sampled_probs)
    if step == STEPS - 1:
        assert torch.equal(ours.prev_sample, theirs.prev_sample)


@pytest.mark.parametrize("selection", ["lowest_log_margin", "lowest_maxprob", "lowest_current_prob"])
@pytest.mark.parametrize("step", [0, 3, STEPS - 2])
def test_positions_are_chosen_by_the_same_scores(monkeypatch: pytest.MonkeyPatch, step: int, selection: Any) -> None:
    """Their keys less their Gumbel noise are our scores, and the conditionals that they resample from are ours."""
    logits = torch.randn(2, 7, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = torch.randint(K, (2, 7), generator=torch.Generator().manual_seed(2))
    scheduler = DiscreteDDIMScheduler(corrector_selection=selection, corrector_k=7)
    scheduler.set_timesteps(STEPS)
    keys: list[Tensor] = []
    conditionals: list[Tensor] = []
    topk, multinomial = torch.topk, torch.multinomial
    monkeypatch.setattr(torch, "topk", lambda x, k, dim: keys.append(x) or topk(x, k=k, dim=dim))
    monkeypatch.setattr(torch, "multinomial", lambda p, **options: conditionals.append(p) or multinomial(p, **options))
    scheduler.step_correct(logits, step, tokens, generator=torch.Generator().manual_seed(3))
    noise = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3))
    alpha = (step + 1) / STEPS
    prediction = Prediction(
        kind="denoiser",
        logits=logits.flatten(0, 1),
        alpha=torch.full((14,), alpha, dtype=torch.float64),
        tokens=tokens.flatten(),
    ).leave_one_out()
    scores = selection_scores(prediction, selection).view(tokens.shape)
    torch.testing.assert_close(scores, keys[0] + torch.log(-torch.log(noise)).double(), rtol=0, atol=1e-9)
    conditional = alpha * prediction.log_probs().exp() + (1 - alpha) / K
    order = topk(keys[0], k=7, dim=-1).indices
    theirs = conditionals[0].view(2, 7, K)
    expected = conditional.view(2, 7, K).gather(1, order.unsqueeze(-1).expand(-1, -1, K))
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("selection", ["random", "lowest_log_margin"])
def test_frequencies_after_a_correction_are_theirs(selection: str) -> None:
    """Two positions, one of them resampled: the law of the pair, from many sequences of each."""
    copies, step = 200_000, 3
    logits = torch.stack([LOGITS, LOGITS.flip(0)]).float().expand(copies, 2, K)
    tokens = torch.tensor([[1, 2]]).expand(copies, 2)
    laws, draws = [], []
    for kind in (DiscreteDDIMScheduler, LeaveOneOutDDIMScheduler):
        scheduler = kind(corrector_selection=selection, corrector_k=1, corrector_selection_tau=2.0)
        scheduler.set_timesteps(STEPS)
        out = scheduler.step_correct(logits, step, tokens, generator=torch.Generator().manual_seed(4))
        pairs = out.prev_sample[:, 0] * K + out.prev_sample[:, 1]
        laws.append(pairs.bincount(minlength=K * K).double() / copies)
        assert out.sampled_tokens.shape == out.sampled_probs.shape == (copies, 1)
        drawn = torch.cat([out.sampled_tokens.double(), out.sampled_probs.double()], -1)
        draws.append((drawn * 1e4).round().unique(dim=0))
    torch.testing.assert_close(laws[1], laws[0], rtol=0, atol=5e-3)
    # The probabilities are those of the tokens: five tokens at either of two positions.
    assert torch.equal(draws[1], draws[0])
    assert len(draws[0]) == 2 * K
    assert float((laws[1] > 0).sum()) == 2 * K - 1


def test_both_return_the_same_things() -> None:
    logits = torch.randn(2, 7, K, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(K, (2, 7), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"corrector_k": 3, "num_inference_steps": STEPS}
    for call in ("step", "step_correct"):
        theirs, ours = (
            getattr(kind(**options), call)(logits, 2, tokens, generator=torch.Generator().manual_seed(3))
            for kind in (DiscreteDDIMScheduler, LeaveOneOutDDIMScheduler)
        )
        assert type(ours) is type(theirs)
        assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}
        assert ours.prev_sample.dtype == theirs.prev_sample.dtype
