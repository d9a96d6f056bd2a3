"""Condensers: their size, the two ways to compute their attention, the symmetry of their slots."""

import pytest
import torch

from wellposed.decq.condenser import (
    AbsorbedCondenserAttnProcessor,
    CondenserAttention,
    CondenserAttnProcessor,
    DetailCondensers,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("queries", "absorbed"), [(8, True), (64, False)])
def test_tokens_are_projected_only_where_that_is_cheaper(queries: int, absorbed: bool) -> None:
    processor = CondenserAttention(64, 4, queries).processor
    assert isinstance(processor, AbsorbedCondenserAttnProcessor if absorbed else CondenserAttnProcessor)


def test_both_ways_are_one_function_with_one_gradient() -> None:
    attention = CondenserAttention(24, 3, 5).double()
    results = []
    for processor in (CondenserAttnProcessor(), AbsorbedCondenserAttnProcessor()):
        attention.set_processor(processor)
        queries, tokens = normal(2, 5, 24).requires_grad_(), normal(2, 11, 24, seed=1).requires_grad_()
        output = attention(queries, tokens)
        weights = [p for name, p in attention.named_parameters() if name != "to_k.bias"]
        results.append((output, *torch.autograd.grad(output.sin().sum(), [queries, tokens, *weights])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_attention_weights_are_those_of_the_output() -> None:
    attention = CondenserAttention(24, 3, 5).double()
    queries, tokens = normal(2, 5, 24), normal(2, 11, 24, seed=1)
    weights = attention.weights(queries, tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    values = attention.to_v(tokens).unflatten(-1, (3, -1)).transpose(1, 2)
    by_hand = attention.to_out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(queries, tokens), by_hand, rtol=1e-11, atol=1e-12)


def test_permuting_slots_permutes_query_latents() -> None:
    condensers = DetailCondensers(6, (0, 1), width=24, heads=3).double()
    tokens = [normal(2, 11, 24, seed=seed) for seed in (1, 2)]
    before = condensers(tokens)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    condensers.queries.data = condensers.queries.data[order]
    torch.testing.assert_close(condensers(tokens), before[:, order], rtol=1e-11, atol=1e-12)


def test_query_latents_are_normalised() -> None:
    latents = DetailCondensers(6, (0,), width=24, heads=3).double()([normal(2, 11, 24)])
    torch.testing.assert_close(latents.mean(-1), torch.zeros_like(latents[..., 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(latents.var(-1, correction=0), torch.ones_like(latents[..., 0]), rtol=0, atol=1e-3)


def test_a_bottleneck_comes_after_the_norm_and_before_another() -> None:
    condensers = DetailCondensers(6, (0,), width=24, heads=3, bottleneck_dim=5).double()
    tokens = normal(2, 11, 24)
    queries = condensers.condensers[0](condensers.start(tokens), tokens)
    normed = torch.nn.functional.layer_norm(queries, (24,), eps=1e-6)
    reduced = normed @ condensers.bottleneck.weight.T + condensers.bottleneck.bias
    latents = condensers([tokens])
    torch.testing.assert_close(latents, torch.nn.functional.layer_norm(reduced, (5,), eps=1e-6))
    # So that no latent can outgrow the noise of training.
    condensers.bottleneck.weight.data *= 100
    condensers.bottleneck.bias.data *= 100
    torch.testing.assert_close(condensers([tokens]), latents, rtol=1e-4, atol=1e-4)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="divisors"):
        CondenserAttention(24, 5, 3)
