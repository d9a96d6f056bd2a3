"""DiT^DH: published sizes, tokens that do not mix up, rotary patches."""

from collections.abc import Callable

import pytest
import torch

from wellposed.decq.transformer import DecQTransformer2DModel, rotary_tables, rotate

Build = Callable[..., DecQTransformer2DModel]


def test_an_untrained_network_says_zero() -> None:
    network = DecQTransformer2DModel(
        sample_size=4, in_channels=8, num_queries=2, hidden_size=16, num_layers=1, num_attention_heads=2,
        head_hidden_size=16, head_num_layers=1, head_num_attention_heads=2, num_classes=3,
    )  # fmt: skip
    output = network(
        torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 3]), query_hidden_states=torch.randn(2, 2, 8)
    )
    assert not output.sample.any()
    assert not output.query_sample.any()


def test_every_input_reaches_both_outputs(build_generator: Build) -> None:
    network = build_generator().double()
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 32, 4, 4, generator=generator, dtype=torch.float64)
    queries = torch.randn(2, 3, 32, generator=generator, dtype=torch.float64)
    t, labels = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([1, 4])

    def call(p: torch.Tensor = patches, q: torch.Tensor = queries, time: torch.Tensor = t, c: torch.Tensor = labels):
        return network(p, time, c, query_hidden_states=q, return_dict=False)

    base = call()
    for changed in (call(p=patches + 0.1), call(q=queries + 0.1), call(time=t + 0.1), call(c=labels - 1)):
        assert all((a - b).abs().amax() > 1e-6 for a, b in zip(base, changed, strict=True))
    # An image's velocity is its own.
    alone = network(patches[:1], t[:1], labels[:1], query_hidden_states=queries[:1], return_dict=False)
    for a, b in zip(alone, base, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=1e-10, atol=1e-12)


def test_rotation_depends_on_differences_only() -> None:
    cos, sin = (table.double() for table in rotary_tables(5, 8, 100.0, torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    rotated_q, rotated_k = (rotate(x.expand(1, 25, 1, 8), cos, sin)[0, :, 0] for x in (query, key))
    scores = (rotated_q @ rotated_k.T).view(5, 5, 5, 5)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=1e-5, atol=1e-5)
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3


def test_queries_are_not_rotated() -> None:
    cos, sin = rotary_tables(2, 8, 100.0, torch.device("cpu"))
    states = torch.randn(1, 7, 2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(states, cos, sin)[:, 4:], states[:, 4:])


def test_gradient_checkpointing_changes_nothing(build_generator: Build) -> None:
    network = build_generator().train()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 32, 4, 4, generator=generator), torch.rand(2, generator=generator), torch.tensor([1, 2])
    queries = torch.randn(2, 3, 32, generator=generator)
    gradients = []
    for _ in range(2):
        network.zero_grad()
        network(*inputs, query_hidden_states=queries).sample.square().mean().backward()
        gradients.append(network.trunk_projection.patches.weight.grad.clone())
        network.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)


def test_bad_inputs(build_generator: Build) -> None:
    network, plain = build_generator(), build_generator(num_queries=0)
    t, labels = torch.rand(1), torch.tensor([0])
    with pytest.raises(ValueError, match="patch latents"):
        network(torch.zeros(1, 32, 5, 5), t, labels, query_hidden_states=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="has queries"):
        network(torch.zeros(1, 32, 4, 4), t, labels)
    with pytest.raises(ValueError, match="leave them out"):
        plain(torch.zeros(1, 32, 4, 4), t, labels, query_hidden_states=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="multiple of four"):
        build_generator(hidden_size=20)
