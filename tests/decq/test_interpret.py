"""What taps do: shares that sum to one, maps that are distributions, and taps that are cut off do nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.interpret import _without, attention_maps, decoder_attention, tap_report

Build = Callable[..., AutoencoderDecQ]


@pytest.fixture
def pictures() -> torch.Tensor:
    """Of the size that comes out."""
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def telling(build: Build) -> Callable[..., AutoencoderDecQ]:
    """An autoencoder whose condensers and decoder say something, as trained ones do."""

    def make(**fields: object) -> AutoencoderDecQ:
        model = build(**fields)
        generator = torch.Generator().manual_seed(3)
        for part in (model.condensers, model.decoder):
            for weights in part.parameters():
                if weights.ndim > 1:
                    nn.init.normal_(weights, std=1.5 * weights[0].numel() ** -0.5, generator=generator)
        return model

    return make


def tapped_tokens(model: AutoencoderDecQ, pictures: torch.Tensor) -> list[torch.Tensor]:
    return model.tapped(model.encoder_tokens(pictures))


def cut_off(model: AutoencoderDecQ, tap: int) -> None:
    """What a tap adds is zero: both of its last layers say so."""
    condenser = model.condensers.condensers[tap]
    for last in (condenser.attn.to_out, condenser.ffn[-1]):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


@pytest.mark.parametrize("context", ["patch", "all"])
def test_shares_sum_to_one(telling: Build, pictures: torch.Tensor, context: str) -> None:
    report = tap_report(telling(condenser_layers=(0, 1, 3), condenser_context=context), pictures)
    assert report.layers == (0, 1, 3)
    assert all(len(values) == 3 for values in report.to_dict().values())
    assert sum(report.movement) == pytest.approx(1, abs=1e-6)
    assert sum(report.reconstruction) == pytest.approx(1, abs=1e-6)
    assert all(0 <= share <= 1 for share in (*report.movement, *report.reconstruction, *report.attention))
    tokens = 16 if context == "patch" else 21
    assert all(1 / tokens <= share <= 1 for share in report.coverage)
    for error, share in zip(report.error, report.reconstruction, strict=True):
        assert (error > 1) == (share > 0)


@pytest.mark.parametrize("heads", [2, 64])  # with few heads keys are absorbed into the queries
@pytest.mark.parametrize("summed", [1, 2])
def test_leaving_out_no_tap_is_encoding(build: Build, pictures: torch.Tensor, heads: int, summed: int) -> None:
    model = build(condenser_num_heads=heads, num_summed_layers=summed)
    generator = torch.Generator().manual_seed(2)
    mean, std = (torch.rand(3, 64, generator=generator) + 0.5 for _ in range(2))
    model.set_latent_statistics(torch.zeros(1), torch.ones(1), mean, std)
    with torch.no_grad():
        tapped = tapped_tokens(model, pictures)
        whole, first = (model.normalize_queries(_without(model, tapped, tap)) for tap in (None, 0))
        assert torch.equal(whole, model.encode(pictures).query_latent)
        assert not torch.equal(first, whole)


def test_a_tap_that_is_left_out_is_one_that_is_cut_off(telling: Build, pictures: torch.Tensor) -> None:
    model = telling(condenser_layers=(0, 1, 3))
    before = tap_report(model, pictures)
    with torch.no_grad():
        without = model.normalize_queries(_without(model, tapped_tokens(model, pictures), 1))
        error = (model(pictures).sample - pictures).square().mean()
        cut_off(model, 1)
        torch.testing.assert_close(model.encode(pictures).query_latent, without, rtol=1e-5, atol=1e-5)
        worse = (model(pictures).sample - pictures).square().mean()
    assert before.error[1] == pytest.approx(float(worse / error), rel=1e-4)
    after = tap_report(model, pictures)
    assert after.movement[1] == 0 and after.reconstruction[1] == 0
    assert after.error[1] == pytest.approx(1, abs=1e-6)
    assert before.movement[1] > 0
    assert after.movement[0] > before.movement[0]


def test_taps_of_queries_that_are_channels(telling: Build, pictures: torch.Tensor) -> None:
    model = telling(num_queries=None, query_fusion="channels", query_bottleneck_dim=6)
    before = tap_report(model, pictures)
    assert sum(before.movement) == pytest.approx(1, abs=1e-6)
    assert attention_maps(model, pictures).shape == (2, 3, 16, 4, 4)
    with torch.no_grad():
        error = (model(pictures).sample - pictures).square().mean()
        cut_off(model, 1)
        worse = (model(pictures).sample - pictures).square().mean()
    assert before.error[1] == pytest.approx(float(worse / error), rel=1e-4)


def test_taps_that_do_nothing_have_no_share(build: Build, pictures: torch.Tensor) -> None:
    model = build()
    for tap in range(2):
        cut_off(model, tap)
    report = tap_report(model, pictures)
    assert report.movement == report.reconstruction == (0, 0)


def test_movement_is_how_far_queries_go(telling: Build, pictures: torch.Tensor) -> None:
    """By the queries before and after each tap of a model that ends there."""
    model = telling()
    with torch.no_grad():
        first, second = tapped_tokens(model, pictures)
        start = model.condensers.queries.expand(3, -1, -1)
        middle = model.condensers.condensers[0](start, first)
        end = model.condensers.condensers[1](middle, second)
        lengths = [float((b - a).norm(dim=-1).mean()) for a, b in ((start, middle), (middle, end))]
    expected = [length / sum(lengths) for length in lengths]
    assert tap_report(model, pictures).movement == pytest.approx(expected, rel=1e-5)


def test_what_attention_writes_and_what_the_ffn(telling: Build, pictures: torch.Tensor) -> None:
    model = telling()
    with torch.no_grad():
        tokens, condenser = tapped_tokens(model, pictures)[0], model.condensers.condensers[0]
        queries = model.condensers.start(tokens)
        written = condenser.attn(condenser.norm_queries(queries), condenser.norm_tokens(tokens))
        by_ffn = condenser.ffn(condenser.norm_ffn(queries + written))
        mine, others = (float(part.norm(dim=-1).mean()) for part in (written, by_ffn))
    assert tap_report(model, pictures).attention[0] == pytest.approx(mine / (mine + others), rel=1e-5)
    for number, part in enumerate((model.condensers.condensers[0].ffn[-1], model.condensers.condensers[1].attn.to_out)):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
        assert tap_report(model, pictures).attention[number] == pytest.approx(1 - number, abs=1e-6)
    cut_off(model, 1)
    assert tap_report(model, pictures).attention[1] == 0


def test_how_much_the_decoder_reads_of_queries(telling: Build, pictures: torch.Tensor) -> None:
    model = telling()
    read: list[torch.Tensor] = []
    first = model.decoder.decoder_layers[0]
    first.layernorm_before.register_forward_hook(lambda module, inputs, output: read.append(output.detach()))
    masses = decoder_attention(model, pictures)
    attention, (tokens,) = first.attention, read
    assert tokens.shape == (3, 1 + 16 + 3, 32)
    with torch.no_grad():
        query, key = (part(tokens).unflatten(-1, (2, 16)) for part in (attention.to_q, attention.to_k))
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", query, key) / 4, dim=-1)
    assert masses[0] == pytest.approx(float(weights[:, :, 1:17, 17:].sum(-1).mean()), rel=1e-5)
    assert len(masses) == 2 and all(0 < mass < 1 for mass in masses)
    for layer in model.decoder.decoder_layers:
        nn.init.zeros_(layer.attention.to_q.weight)
        nn.init.zeros_(layer.attention.to_q.bias)
    assert decoder_attention(model, pictures) == pytest.approx((3 / 20, 3 / 20), rel=1e-5)
    assert not any(layer.attention._forward_pre_hooks for layer in model.decoder.decoder_layers)


def test_attention_maps_are_distributions(telling: Build, pictures: torch.Tensor) -> None:
    model = telling()
    maps = attention_maps(model, pictures)
    assert maps.shape == (2, 3, 3, 4, 4)
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 3, 3), rtol=0, atol=1e-6)
    # What queries take from the patches by these weights is what the attention gives, head by head.
    with torch.no_grad():
        tokens = tapped_tokens(model, pictures)[0]
        condenser = model.condensers.condensers[0]
        queries = condenser.norm_queries(model.condensers.start(tokens))
        weights = condenser.attn.weights(queries, condenser.norm_tokens(tokens))
        values = condenser.attn.to_v(condenser.norm_tokens(tokens)).unflatten(-1, (2, -1)).transpose(1, 2)
        taken = condenser.attn.to_out((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(taken, condenser.attn(queries, condenser.norm_tokens(tokens)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(maps[0].flatten(2), weights.mean(1))


def test_maps_of_queries_that_read_all_tokens_are_of_the_patches(telling: Build, pictures: torch.Tensor) -> None:
    model = telling(condenser_context="all")
    maps = attention_maps(model, pictures)
    assert maps.shape == (2, 3, 3, 4, 4)
    rest = 1 - maps.sum((-2, -1))
    assert ((rest > 0) & (rest < 1)).all(), "the class and registers have the rest"


def test_coverage_of_equal_weights_is_the_whole_image(build: Build, pictures: torch.Tensor) -> None:
    model = build()
    for condenser in model.condensers.condensers:
        nn.init.zeros_(condenser.attn.to_q.weight)
        nn.init.zeros_(condenser.attn.to_q.bias)
    assert tap_report(model, pictures).coverage == pytest.approx((1, 1), abs=1e-5)
    torch.testing.assert_close(attention_maps(model, pictures), torch.full((2, 3, 3, 4, 4), 1 / 16))
    for condenser in model.condensers.condensers:  # scores so far apart that one token has all the weight
        nn.init.normal_(condenser.attn.to_q.weight, std=1e3, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(condenser.attn.to_k.weight, std=1e3, generator=torch.Generator().manual_seed(1))
    assert tap_report(model, pictures).coverage == pytest.approx((1 / 16, 1 / 16), rel=1e-3)


def test_bad_models(build: Build, pictures: torch.Tensor) -> None:
    for look in (tap_report, attention_maps):
        with pytest.raises(ValueError, match="no queries, and so no taps"):
            look(build(num_queries=0), pictures)
    for fields in ({"num_queries": 0}, {"num_queries": None, "query_fusion": "channels", "query_bottleneck_dim": 6}):
        with pytest.raises(ValueError, match="decoder reads no query tokens"):
            decoder_attention(build(**fields), pictures)
    for look in (tap_report, decoder_attention):
        with pytest.raises(ValueError, match=r"training mode .* call eval\(\)"):
            look(build(noise_tau=0.8).train(), pictures)
    with pytest.raises(ValueError, match="give images of its config's image_size"):
        tap_report(build(), pictures[..., :32, :32])
