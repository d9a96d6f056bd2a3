"""The network against its published layout written out by hand, and what diffusers expects of a model."""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from safetensors import safe_open
from torch import Tensor, nn

from wellposed.udm.transformer import (
    SIZES,
    UniformDiffusionTransformerModel,
    UniformDiffusionTransformerOutput,
    rotary_tables,
    rotate,
)

VOCAB = 11
BATCH, LENGTH = 3, 7
CONFIG = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "cond_dim": 12}
FUSIONS = (None, "separate_linear", "shared_mlp")

# The annotations speak first where they are executed; without them the checks at the door do.
forward_without_annotations = inspect.unwrap(UniformDiffusionTransformerModel.forward)
init_without_annotations = inspect.unwrap(UniformDiffusionTransformerModel.__init__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(*, seed: int = 1, randomised: bool = True, **config: Any) -> UniformDiffusionTransformerModel:
    """With random weights in every layer: a fresh network has a head of zeros and would agree with anything."""
    model = UniformDiffusionTransformerModel(**{"vocab_size": VOCAB, **CONFIG, **config}).eval()
    if randomised:
        source = generator(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(random_weight(name, parameter.shape, source))
    return model


def random_weight(name: str, shape: torch.Size | tuple[int, ...], source: torch.Generator) -> Tensor:
    if "norm" in name:
        return 1 + 0.2 * torch.randn(shape, generator=source)
    scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
    return scale * torch.randn(shape, generator=source)


def tokens(seed: int = 2, *, high: int = VOCAB, length: int = LENGTH) -> Tensor:
    return torch.randint(high, (BATCH, length), generator=generator(seed))


def noise_for(input_ids: Tensor, seed: int = 3) -> Tensor:
    """About half of them equal to x, as where the bit is set."""
    noise = tokens(seed, length=input_ids.shape[1])
    return torch.where(torch.rand(noise.shape, generator=generator(seed)) < 0.5, input_ids % VOCAB, noise)


ALPHA = torch.tensor([0.9, 0.3, 1.0], dtype=torch.float64)
GIVEN = torch.rand(BATCH, LENGTH, generator=generator(4)) < 0.4


# ---------------------------------------------------------------------------------------------------------------------
# The published layout, by its own names


def published_weights(fusion: str | None = None, vocab: int = VOCAB, layers: int = 2) -> dict[str, Tensor]:
    d, c = 16, 12
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (vocab, d),
        "sigma_map.mlp.0.weight": (c, 256),
        "sigma_map.mlp.0.bias": (c,),
        "sigma_map.mlp.2.weight": (c, c),
        "sigma_map.mlp.2.bias": (c,),
        "output_layer.norm_final.weight": (d,),
        "output_layer.linear.weight": (vocab, d),
        "output_layer.linear.bias": (vocab,),
        "output_layer.adaLN_modulation.weight": (2 * d, c),
        "output_layer.adaLN_modulation.bias": (2 * d,),
    }
    for i in range(layers):
        shapes |= {
            f"blocks.{i}.norm1.weight": (d,),
            f"blocks.{i}.attn_qkv.weight": (3 * d, d),
            f"blocks.{i}.attn_out.weight": (d, d),
            f"blocks.{i}.norm2.weight": (d,),
            f"blocks.{i}.mlp.0.weight": (4 * d, d),
            f"blocks.{i}.mlp.0.bias": (4 * d,),
            f"blocks.{i}.mlp.2.weight": (d, 4 * d),
            f"blocks.{i}.mlp.2.bias": (d,),
            f"blocks.{i}.adaLN_modulation.weight": (6 * d, c),
            f"blocks.{i}.adaLN_modulation.bias": (6 * d,),
        }
    if fusion == "separate_linear":
        shapes |= {
            "conditioning_vocab_embed.embedding": (vocab, d),
            "conditioning_input_proj.weight": (d, 2 * d + 1),
            "conditioning_input_proj.bias": (d,),
        }
    if fusion == "shared_mlp":
        shapes |= {
            "conditioning_input_mlp.0.weight": (4 * d, 2 * d + 1),
            "conditioning_input_mlp.0.bias": (4 * d,),
            "conditioning_input_mlp.2.weight": (d, 4 * d),
            "conditioning_input_mlp.2.bias": (d,),
        }
    source = generator(5)
    return {name: random_weight(name, shape, source) for name, shape in shapes.items()}


RENAMED = {  # the table of the module's docstring; what contains another name comes first
    "conditioning_vocab_embed.embedding": "noise_embedding.weight",
    "vocab_embed.embedding": "token_embedding.weight",
    "sigma_map.mlp.0": "time_embedding.linear_1",
    "sigma_map.mlp.2": "time_embedding.linear_2",
    "blocks": "transformer_blocks",
    "attn_qkv": "attn.to_qkv",
    "attn_out": "attn.to_out",
    "output_layer.norm_final": "norm_out",
    "output_layer.adaLN_modulation": "modulation_out",
    "output_layer.linear": "proj_out",
    "adaLN_modulation": "modulation",
    "conditioning_input_proj": "noise_fusion",
    "conditioning_input_mlp": "noise_fusion",
}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for published, weight in weights.items():
        name = published
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        result[name] = weight
    return result


def gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def published_logits(
    weights: Mapping[str, Tensor], x: Tensor, sigma: Tensor, u: Tensor | None = None, heads: int = 2
) -> Tensor:
    """The published network, one position and one head at a time, in float64."""
    w = {name: weight.double() for name, weight in weights.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        out = value @ w[f"{name}.weight"].T
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def norm(name: str, value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def turn(value: Tensor) -> Tensor:
        """Pairs of channels (i, i + half) as complex numbers, turned by their position."""
        half = value.shape[-1] // 2
        angles = torch.arange(len(value)).double()[:, None] / 10_000 ** (torch.arange(half).double() / half)
        turned = torch.complex(value[:, :half], value[:, half:]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attention(name: str, value: Tensor) -> Tensor:
        query, key, content = linear(f"{name}.attn_qkv", value).chunk(3, dim=-1)
        per_head = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), content.chunk(heads, -1), strict=True):
            scores = turn(q) @ turn(k).T / math.sqrt(q.shape[-1])
            per_head.append(scores.softmax(-1) @ v)
        return linear(f"{name}.attn_out", torch.cat(per_head, dim=-1))

    every = []
    for index in range(len(x)):
        h = w["vocab_embed.embedding"][x[index]]
        if u is not None:
            own_table = "conditioning_vocab_embed.embedding" in w
            table = w["conditioning_vocab_embed.embedding" if own_table else "vocab_embed.embedding"]
            joined = torch.cat([h, table[u[index]], (x[index] == u[index]).double()[:, None]], dim=-1)
            if own_table:
                h = linear("conditioning_input_proj", joined)
            else:
                h = linear("conditioning_input_mlp.2", gelu_tanh(linear("conditioning_input_mlp.0", joined)))
        angles = [float(sigma[index]) * math.exp(-math.log(10_000) * i / 128) for i in range(128)]
        waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
        c = silu(linear("sigma_map.mlp.2", silu(linear("sigma_map.mlp.0", waves))))
        for i in range(2):
            name = f"blocks.{i}"
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(f"{name}.adaLN_modulation", c).chunk(6)
            h = h + gate_1 * attention(name, norm(f"{name}.norm1", h) * (1 + scale_1) + shift_1)
            middle = linear(f"{name}.mlp.0", norm(f"{name}.norm2", h) * (1 + scale_2) + shift_2)
            h = h + gate_2 * linear(f"{name}.mlp.2", gelu_tanh(middle))
        shift, scale = linear("output_layer.adaLN_modulation", c).chunk(2)
        every.append(linear("output_layer.linear", norm("output_layer.norm_final", h) * (1 + scale) + shift))
    return torch.stack(every)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_published_weights_fit_after_renaming_and_give_the_published_function(fusion: str | None) -> None:
    weights = published_weights(fusion)
    model = tiny(absorbing_fusion=fusion)
    model.load_state_dict(renamed(weights), strict=True)
    x = tokens()
    u = None if fusion is None else noise_for(x)
    with torch.no_grad():
        logits = model(x, ALPHA, noise_ids=u).logits
    expected = published_logits(weights, x, -ALPHA.log(), u)
    assert expected.std() > 0.5  # the tolerance means something
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)


def test_published_masked_weights_keep_a_row_for_the_mask() -> None:
    weights = published_weights(vocab=VOCAB + 1)
    ours = renamed(weights)
    for name in ("proj_out.weight", "proj_out.bias"):
        ours[name] = ours[name][:VOCAB]
    model = tiny(mask_token=True, time_conditioning=False)
    model.load_state_dict(ours, strict=True)
    x = tokens(high=VOCAB + 1)
    assert (x == VOCAB).any()
    expected = published_logits(weights, x, torch.zeros(BATCH))[..., :VOCAB]
    torch.testing.assert_close(model(x).logits.double(), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and the untrained network


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("size", "width", "layers"), [("very_tiny", 256, 6), ("tiny", 256, 8), ("medium", 1024, 24)])
def test_published_sizes(size: Any, width: int, layers: int) -> None:
    with torch.device("meta"):
        model = UniformDiffusionTransformerModel.of_size(size, vocab_size=15)
    assert (model.proj_out.in_features, len(model.transformer_blocks)) == (width, layers)
    assert [SIZES[name]["num_attention_heads"] for name in SIZES] == [4, 8, 12, 16]


def test_small_has_170_million_parameters_at_the_vocabulary_of_gpt_2() -> None:
    vocab, d, c, layers = 50257, 768, 128, 12
    with torch.device("meta"):
        model = UniformDiffusionTransformerModel.of_size("small", vocab_size=vocab)
    block = 2 * d + (3 * d + d) * d + (8 * d * d + 5 * d) + (c + 1) * 6 * d
    time = (256 + 1) * c + (c + 1) * c
    head = d + (c + 1) * 2 * d + (d + 1) * vocab
    assert count(model) == vocab * d + time + layers * block + head == 169_625_681
    with torch.device("meta"):
        tied = UniformDiffusionTransformerModel.of_size("small", vocab_size=vocab, tie_word_embeddings=True)
        fused = UniformDiffusionTransformerModel.of_size("small", vocab_size=vocab, absorbing_fusion="separate_linear")
    assert count(model) - count(tied) == vocab * d
    assert count(fused) - count(model) == vocab * d + (2 * d + 2) * d


def test_further_arguments_take_precedence_over_the_size() -> None:
    with torch.device("meta"):
        model = UniformDiffusionTransformerModel.of_size(
            "tiny", vocab_size=15, num_layers=1, prediction_kind="denoiser"
        )
    assert len(model.transformer_blocks) == 1 and model.config.prediction_kind == "denoiser"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_untrained_network_says_that_all_tokens_are_equally_likely(fusion: str | None) -> None:
    model = tiny(randomised=False, absorbing_fusion=fusion)
    x = tokens()
    logits = model(x, ALPHA, noise_ids=None if fusion is None else noise_for(x)).logits
    assert logits.shape == (BATCH, LENGTH, VOCAB) and torch.equal(logits, torch.zeros_like(logits))


def test_an_untrained_tied_head_has_logits_of_order_one() -> None:
    logits = tiny(randomised=False, tie_word_embeddings=True)(tokens(), ALPHA).logits
    assert 0.1 < logits.std() < 3


# ---------------------------------------------------------------------------------------------------------------------
# Laws


def test_rotated_products_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator(), dtype=torch.float64).expand(2, 1, 30, 1, 8)
    cos, sin = rotary_tables(30, 8, 1e4, torch.device("cpu"))
    rotated_query, rotated_key = (rotate(states, cos, sin)[0, :, 0] for states in (query, key))
    products = rotated_query @ rotated_key.T
    for distance in range(-29, 30):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-6, rtol=0)
    assert products[0].std() > 0.1
    torch.testing.assert_close(rotated_query.norm(dim=-1), query[0, :, 0].norm(dim=-1), atol=1e-6, rtol=0)
    assert torch.equal(rotated_query[0], query[0, 0, 0])


def test_half_precision_states_turn_by_exact_angles() -> None:
    states = torch.randn(1, 30, 2, 8, generator=generator()).bfloat16()
    cos, sin = rotary_tables(30, 8, 1e4, torch.device("cpu"))
    expected = rotate(states.double(), cos, sin)
    assert torch.equal(rotate(states, cos, sin), expected.to(torch.bfloat16))


def test_the_rotary_base_is_the_configured_one() -> None:
    cos, _ = rotary_tables(4, 6, 50.0, torch.device("cpu"))
    expected = torch.tensor([[math.cos(m * 50.0 ** (-i / 3)) for i in range(3)] for m in range(4)])
    torch.testing.assert_close(cos, expected, atol=1e-6, rtol=0)
    model, other = tiny(), tiny(rope_base=50)
    x = tokens()
    assert (model(x, ALPHA).logits - other(x, ALPHA).logits).abs().max() > 1e-3


def test_padding_is_neither_seen_nor_counted() -> None:
    model = tiny()
    x = tokens()
    attention_mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [2]])
    padded = model(x, ALPHA, attention_mask=attention_mask).logits
    other_padding = torch.where(attention_mask, x, (x + 5) % VOCAB)
    torch.testing.assert_close(
        model(other_padding, ALPHA, attention_mask=attention_mask).logits[attention_mask], padded[attention_mask]
    )
    for index, valid in enumerate((LENGTH, 4, 2)):
        alone = model(x[index : index + 1, :valid], ALPHA[index : index + 1]).logits[0]
        torch.testing.assert_close(padded[index, :valid], alone, atol=1e-5, rtol=0)
    assert (padded - model(x, ALPHA).logits)[attention_mask].abs().max() > 1e-3


def test_a_sequence_of_nothing_but_padding_is_finite() -> None:
    model = tiny().train()
    attention_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    attention_mask[1] = False
    logits = model(tokens(), ALPHA, attention_mask=attention_mask).logits
    logits[attention_mask].square().mean().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rows_are_the_rows_of_the_whole_and_the_head_sees_no_others() -> None:
    for tied in (False, True):
        model = tiny(tie_word_embeddings=tied)
        rows = torch.rand(BATCH, LENGTH, generator=generator(6)) < 0.4
        seen: list[torch.Size] = []
        head = model.token_embedding if tied else model.proj_out
        head.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output.shape))
        chosen = model(tokens(), ALPHA, rows=rows).logits
        assert seen[-1] == chosen.shape == (int(rows.sum()), VOCAB)
        torch.testing.assert_close(chosen, model(tokens(), ALPHA).logits[rows], atol=1e-6, rtol=1e-5)
        none = model(tokens(), ALPHA, rows=torch.zeros_like(rows)).logits
        assert none.shape == (0, VOCAB)


def test_without_time_conditioning_alpha_is_ignored_and_means_one() -> None:
    model = tiny(time_conditioning=False)
    x = tokens()
    expected = model(x).logits
    assert torch.equal(model(x, ALPHA).logits, expected)
    timed = tiny()
    torch.testing.assert_close(timed(x, torch.ones(BATCH)).logits, expected)
    assert (timed(x, ALPHA).logits - expected)[:2].abs().amax(dim=(1, 2)).min() > 1e-2


def test_alpha_is_read_in_any_precision() -> None:
    model = tiny()
    x = tokens()
    exact = torch.tensor([0.75, 0.5, 1.0], dtype=torch.float64)
    expected = model(x, exact).logits
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.testing.assert_close(model(x, exact.to(dtype)).logits, expected)


def test_given_tokens_are_marked() -> None:
    model, plain = tiny(given_embedding=True), tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "given_vector"}, strict=True)
    x = tokens()
    unmarked = plain(x, ALPHA).logits
    torch.testing.assert_close(model(x, ALPHA).logits, unmarked)
    torch.testing.assert_close(model(x, ALPHA, given=torch.zeros_like(GIVEN)).logits, unmarked)
    marked = model(x, ALPHA, given=GIVEN).logits
    assert (marked - unmarked).abs().max() > 1e-2
    # Marking adds the vector: the same as a token whose own vector has it already.
    with torch.no_grad():
        plain.token_embedding.weight[0] += model.given_vector
    zeros = torch.zeros_like(x)
    everywhere = torch.ones_like(GIVEN)
    torch.testing.assert_close(model(zeros, ALPHA, given=everywhere).logits, plain(zeros, ALPHA).logits)


def test_the_mark_changes_nothing_at_first_but_learns_at_once() -> None:
    model = tiny(given_embedding=True)
    nn.init.zeros_(model.given_vector)
    x = tokens()
    torch.testing.assert_close(model(x, ALPHA, given=GIVEN).logits, model(x, ALPHA).logits)
    model(x, ALPHA, given=GIVEN).logits.square().sum().backward()
    assert model.given_vector.grad.abs().min() > 0
    fresh = tiny(given_embedding=True, randomised=False)
    assert torch.equal(fresh.given_vector, torch.zeros(16))


def test_every_parameter_has_a_gradient_also_where_nothing_is_given() -> None:
    """DistributedDataParallel refuses a step that leaves one out."""
    for fusion in FUSIONS:
        for tied in (False, True):
            model = tiny(given_embedding=True, absorbing_fusion=fusion, tie_word_embeddings=tied, mask_token=True)
            x = tokens()
            model(x, ALPHA, noise_ids=None if fusion is None else noise_for(x)).logits.square().sum().backward()
            assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("fusion", ["separate_linear", "shared_mlp"])
def test_a_fused_network_sees_the_noise_and_whether_it_matches(fusion: str) -> None:
    model = tiny(absorbing_fusion=fusion)
    x = tokens()
    active = model(x, ALPHA, noise_ids=x).logits
    revealed = model(x, ALPHA, noise_ids=(x + 1) % VOCAB).logits
    assert (active - revealed).abs().max() > 1e-2
    with torch.no_grad():
        first = model.noise_fusion if fusion == "separate_linear" else model.noise_fusion[0]
        first.weight[:, -1] *= -1  # the weights of the bit
    torch.testing.assert_close(model(x, ALPHA, noise_ids=(x + 1) % VOCAB).logits, revealed)
    assert (model(x, ALPHA, noise_ids=x).logits - active).abs().max() > 1e-2


def test_a_tied_head_is_the_input_table() -> None:
    tied, untied = tiny(tie_word_embeddings=True, mask_token=True), tiny(mask_token=True)
    weights = tied.state_dict()
    weights["proj_out.weight"] = weights["token_embedding.weight"][:VOCAB]
    weights["proj_out.bias"] = weights.pop("token_embedding.bias")
    untied.load_state_dict(weights, strict=True)
    x = tokens(high=VOCAB + 1)
    torch.testing.assert_close(tied(x, ALPHA).logits, untied(x, ALPHA).logits)


def test_evaluation_is_deterministic_and_training_drops() -> None:
    model = tiny(dropout=0.5)
    x = tokens()
    assert torch.equal(model(x, ALPHA).logits, model(x, ALPHA).logits)
    model.train()
    assert not torch.equal(model(x, ALPHA).logits, model(x, ALPHA).logits)


def test_dropout_falls_on_what_each_part_adds() -> None:
    """With probability one nothing is added, as if all gates were shut."""
    model, shut = tiny(dropout=1.0).train(), tiny()
    for block in shut.transformer_blocks:
        nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(block.modulation.bias)
    torch.testing.assert_close(model(tokens(), ALPHA).logits, shut(tokens(), ALPHA).logits)


def test_the_order_of_sequences_does_not_matter() -> None:
    model = tiny()
    order = [2, 0, 1]
    torch.testing.assert_close(model(tokens()[order], ALPHA[order]).logits, model(tokens(), ALPHA).logits[order])


# ---------------------------------------------------------------------------------------------------------------------
# What diffusers expects of a model


def test_a_tuple_on_request() -> None:
    model = tiny()
    output, (logits,) = model(tokens(), ALPHA), model(tokens(), ALPHA, return_dict=False)
    assert isinstance(output, UniformDiffusionTransformerOutput) and torch.equal(output.logits, logits)
    assert torch.equal(output[0], logits)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True, "mask_token": True},
        {"absorbing_fusion": "separate_linear", "given_embedding": True},
        {"absorbing_fusion": "shared_mlp", "tie_word_embeddings": True},
        {"prediction_kind": "denoiser", "time_conditioning": False, "rope_base": 50.0, "dropout": 0.0},
    ],
)
def test_save_and_load(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**config)
    model.save_pretrained(tmp_path)
    loaded, report = UniformDiffusionTransformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert ("proj_out.weight" in model.state_dict()) != config.get("tie_word_embeddings", False)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in config} == config and written["vocab_size"] == VOCAB
    x = tokens()
    u = noise_for(x) if "absorbing_fusion" in config else None
    assert not loaded.training
    assert torch.equal(loaded(x, ALPHA, noise_ids=u).logits, model(x, ALPHA, noise_ids=u).logits)


def test_a_network_of_the_same_configuration() -> None:
    """What EMAModel does when it saves: from_config with the live configuration, defaults and all."""
    model = tiny(mask_token=True, given_embedding=True)
    twin = UniformDiffusionTransformerModel.from_config(model.config)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert {k: v for k, v in twin.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }


def test_save_and_load_in_shards_and_in_half_precision(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = UniformDiffusionTransformerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = model.to(torch.bfloat16)(tokens(), ALPHA).logits
    assert torch.equal(loaded(tokens(), ALPHA).logits, expected)


def test_the_address_of_the_class_is_the_package() -> None:
    assert UniformDiffusionTransformerModel.__module__ == "wellposed"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)])
def test_logits_come_in_the_precision_of_the_weights(dtype: torch.dtype, tolerance: float) -> None:
    for config in ({}, {"tie_word_embeddings": True, "absorbing_fusion": "shared_mlp", "given_embedding": True}):
        u = noise_for(tokens()) if config else None
        given = GIVEN if config else None
        expected = tiny(**config)(tokens(), ALPHA, noise_ids=u, given=given).logits
        logits = tiny(**config).to(dtype)(tokens(), ALPHA, noise_ids=u, given=given).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=tolerance)


def test_autocast_keeps_the_stream_in_float32() -> None:
    model = tiny(tie_word_embeddings=True)
    streams: list[torch.dtype] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _module, _inputs, output: streams.append(output.dtype))
    expected = model(tokens(), ALPHA).logits
    streams.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(), ALPHA).logits
    assert logits.dtype == torch.bfloat16 and streams == [torch.float32] * 2
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointed: bool) -> tuple[dict[str, Tensor], int]:
        model = tiny(dropout=0.0, given_embedding=True).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == checkpointed
        calls: list[int] = []
        for block in model.transformer_blocks:
            block.mlp.register_forward_hook(lambda *_: calls.append(1))
        attention_mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [2]])
        logits = model(tokens(), ALPHA, given=GIVEN, attention_mask=attention_mask).logits
        logits.square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)

    (expected, calls), (found, more_calls) = gradients(False), gradients(True)
    assert (calls, more_calls) == (2, 4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_attention_backends_and_processors() -> None:
    model = tiny()
    expected = model(tokens(), ALPHA).logits
    assert set(model.attn_processors) == {f"transformer_blocks.{i}.attn.processor" for i in range(2)}
    with attention_backend("native"):  # restores diffusers' default, which the next line changes for every model
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(model(tokens(), ALPHA).logits, expected, atol=1e-5, rtol=0)
        model.reset_attention_backend()
    model.transformer_blocks[1].attn.set_attention_backend("_native_cudnn")  # not to be had on a CPU
    with pytest.raises((RuntimeError, UserWarning), match="(?i)kernel"):
        model(tokens(), ALPHA)
    model.reset_attention_backend()
    assert torch.equal(model(tokens(), ALPHA).logits, expected)
    model.fuse_qkv_projections()  # they always are
    assert torch.equal(model(tokens(), ALPHA).logits, expected)


def test_first_block_cache_skips_the_other_blocks() -> None:
    model = tiny(num_layers=4)
    ran: list[int] = []
    for index, block in enumerate(model.transformer_blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    expected = model(tokens(), ALPHA).logits
    ran.clear()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with torch.no_grad(), model.cache_context("text"):
        first = model(tokens(), ALPHA).logits
        second = model(tokens(), ALPHA).logits
        model((tokens() + 3) % VOCAB, ALPHA / 4)
    assert ran == [0, 1, 2, 3, 0, 0, 1, 2, 3]
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-5)
    model.disable_cache()
    torch.testing.assert_close(model(tokens(), ALPHA).logits, expected)


def test_layerwise_casting_spares_embeddings_norms_and_modulation() -> None:
    model = tiny(tie_word_embeddings=True, absorbing_fusion="separate_linear").to(torch.bfloat16)
    u = noise_for(tokens())
    expected = model(tokens(), ALPHA, noise_ids=u).logits
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    small = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert {name.split(".", 2)[2] for name in small} == {
        "attn.to_qkv.weight",
        "attn.to_out.weight",
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
    }
    logits = model(tokens(), ALPHA, noise_ids=u).logits
    torch.testing.assert_close(logits.float(), expected.float(), atol=0.5, rtol=0.2)


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny()
    expected = model(tokens(), ALPHA).logits
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_qkv", "to_out"], init_lora_weights=False))
    assert (model(tokens(), ALPHA).logits - expected).abs().max() > 1e-4
    model.save_lora_adapter(tmp_path)
    model.disable_adapters()
    torch.testing.assert_close(model(tokens(), ALPHA).logits, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def call(model: UniformDiffusionTransformerModel, *args: Any, **kwargs: Any) -> Any:
    return forward_without_annotations(model, *args, **kwargs)


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (torch.full((BATCH, LENGTH), VOCAB), rf"0\.\.{VOCAB - 1}"),
        (torch.full((BATCH, LENGTH), -1), r"input_ids must lie"),
        (torch.zeros(LENGTH, dtype=torch.long), r"\(batch, length\)"),
        (torch.zeros(BATCH, 0, dtype=torch.long), r"none of them 0"),
        (torch.zeros(BATCH, LENGTH), "must be integers"),
    ],
)
def test_refused_tokens(input_ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny(), input_ids, ALPHA)


def test_the_mask_id_needs_a_mask_token() -> None:
    x = torch.full((BATCH, LENGTH), VOCAB)
    assert tiny(mask_token=True)(x, ALPHA).logits.shape[-1] == VOCAB
    with pytest.raises(ValueError, match="mask_token"):
        tiny()(x, ALPHA)
    with pytest.raises(ValueError, match=f"{VOCAB}, got"):
        tiny(mask_token=True)(x + 1, ALPHA)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (None, "time_conditioning=False"),
        (torch.tensor([0.5, 0.0, 0.5]), r"\(0, 1\]"),
        (torch.tensor([0.5, 1.1, 0.5]), r"\(0, 1\]"),
        (torch.tensor([0.5, math.nan, 0.5]), r"\(0, 1\]"),
        (torch.tensor([0.5, 0.5]), r"shape \(3,\)"),
        (torch.tensor(0.5), r"shape \(3,\)"),
        (torch.tensor([1, 1, 1]), "one float"),
    ],
)
def test_refused_alpha(alpha: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny(), tokens(), alpha)


def test_noise_where_it_is_not_seen_and_no_noise_where_it_is() -> None:
    x = tokens()
    with pytest.raises(ValueError, match="does not see the noise"):
        tiny()(x, ALPHA, noise_ids=x)
    fused = tiny(absorbing_fusion="shared_mlp", mask_token=True)
    with pytest.raises(ValueError, match="pass noise_ids"):
        fused(x, ALPHA)
    with pytest.raises(ValueError, match=r"noise_ids must lie in 0\.\.10"):
        fused(x, ALPHA, noise_ids=torch.full_like(x, VOCAB))
    with pytest.raises(ValueError, match="shape of input_ids"):
        call(fused, x, ALPHA, noise_ids=x[:, :-1])


@pytest.mark.parametrize("name", ["given", "attention_mask", "rows"])
@pytest.mark.parametrize("mask", [torch.ones(BATCH, LENGTH), torch.ones(BATCH, LENGTH - 1, dtype=torch.bool)])
def test_refused_masks(name: str, mask: Tensor) -> None:
    with pytest.raises(ValueError, match=f"{name} must be bool"):
        call(tiny(given_embedding=True), tokens(), ALPHA, **{name: mask})


def test_given_needs_a_network_that_can_tell() -> None:
    with pytest.raises(ValueError, match="given_embedding=True"):
        tiny()(tokens(), ALPHA, given=GIVEN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_attention_heads": -1}, "num_attention_heads"),
        ({"attention_head_dim": 7}, "even"),
        ({"absorbing_fusion": "sum"}, "separate_linear"),
        ({"prediction_kind": "score"}, "leave_one_out"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_refused_configurations(config: dict[str, Any], message: str) -> None:
    model = UniformDiffusionTransformerModel.__new__(UniformDiffusionTransformerModel)
    with pytest.raises(ValueError, match=message):
        init_without_annotations(model, **{"vocab_size": VOCAB, **CONFIG, **config})


def test_an_unknown_size() -> None:
    with pytest.raises(ValueError, match="very_tiny, tiny, small, medium"):
        inspect.unwrap(UniformDiffusionTransformerModel.of_size.__func__)(
            UniformDiffusionTransformerModel, "large", vocab_size=5
        )
