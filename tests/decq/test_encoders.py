"""The frozen encoders: what they say between their blocks, how many tokens, and other families."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.encoders import ENCODERS, VisionEncoder, encode_tokens, register_encoder

Build = Callable[..., AutoencoderDecQ]

SMALL_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "condenser_layers": (0, 1),
    "num_queries": 2,
}
SMALL_ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def families() -> Iterator[None]:
    """Whatever a test registers is forgotten."""
    before = dict(ENCODERS)
    yield
    ENCODERS.clear()
    ENCODERS.update(before)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_hidden_states_are_the_inputs_of_the_blocks(family: str) -> None:
    """State l enters block l, the last one leaves the last block, and normalised it is the latent."""
    kind = ENCODERS[family]
    encoder = kind.build(hidden_size=64, patch_size=14, num_hidden_layers=3)
    seen: list[torch.Tensor] = []
    blocks = next(m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    encoded = encode_tokens(encoder, kind, pixels)
    assert len(encoded.hidden_states) == 4
    assert all(torch.equal(a, b) for a, b in zip(encoded.hidden_states, seen, strict=False))
    assert encoded.patches(0).shape == encoded.last.shape == (2, 16, 64)
    norm = encoder.get_submodule(kind.norm)
    assert torch.equal(norm(encoded.hidden_states[-1])[:, encoded.num_prefix_tokens :], encoded.last)
    torch.testing.assert_close(encoded.last.mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.last.var(-1, correction=0), torch.ones(2, 16), rtol=0, atol=1e-3)


def test_the_first_state_has_the_positions() -> None:
    encoder = ENCODERS["dinov2"].build(hidden_size=64, patch_size=14, num_hidden_layers=1)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    encoded = encode_tokens(encoder, ENCODERS["dinov2"], pixels)
    assert torch.equal(encoded.hidden_states[0], encoder.embeddings(pixels))
    bare = encoder.embeddings.patch_embeddings(pixels)
    assert (encoded.patches(0) - bare).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("pixels", "patch", "patches"), [(224, 14, 256), (224, 16, 196), (448, 14, 1024), (518, 14, 1369)]
)
def test_published_numbers_of_tokens(pixels: int, patch: int, patches: int) -> None:
    with torch.device("meta"):
        model = AutoencoderDecQ(
            encoder_patch_size=patch, encoder_input_size=pixels, num_queries=8, decoder_num_hidden_layers=1
        )
        image = torch.empty(1, 3, pixels, pixels)
        code = model.eval().encode(image)
    assert code.latent.shape == (1, 768, int(patches**0.5), int(patches**0.5))
    assert code.query_latent.shape == (1, 8, 768)


def test_patches_are_views(build: Build, images: torch.Tensor) -> None:
    encoded = build().encoder_tokens(images)
    for layer, tokens in enumerate(encoded.hidden_states):
        assert encoded.patches(layer).untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert torch.equal(encoded.patches(2), encoded.hidden_states[2][:, 5:])


def test_states_that_nobody_reads_are_not_kept(build: Build, images: torch.Tensor) -> None:
    model = build(num_queries=0)
    without, with_states = (model.encoder_tokens(images, hidden_states=wanted) for wanted in (False, True))
    assert without.hidden_states == ()
    assert torch.equal(without.last, with_states.last)


def test_the_frozen_encoder_runs_once_and_without_a_graph(build: Build, images: torch.Tensor) -> None:
    model, calls = build().train(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    code = model.encode(images)
    assert calls == [False]
    assert code.query_latent.requires_grad and not code.latent.requires_grad
    assert not model.encoder.training and model.decoder.training
    pixels = images.clone().requires_grad_()
    model.encode(pixels).latent.square().sum().backward()
    assert calls == [False, True] and pixels.grad is not None and pixels.grad.any()


def test_an_encoder_that_may_learn_does(build: Build, images: torch.Tensor) -> None:
    model = build(num_queries=0)
    model.encoder.requires_grad_(True)
    (model(images).sample - 0.3).square().mean().backward()
    learning = [p.grad is not None and bool(p.grad.any()) for p in model.encoder.parameters()]
    assert sum(learning) > len(learning) - 5


def clip() -> VisionEncoder:
    return VisionEncoder(
        config_class="CLIPVisionConfig",
        model_class="CLIPVisionModel",
        norm="post_layernorm",
        num_prefix_tokens=lambda config: 1,
        normalizes_tokens=False,
        image_mean=(0.4815, 0.4578, 0.4082),
        image_std=(0.2686, 0.2613, 0.2758),
    )


@pytest.mark.usefixtures("families")
def test_another_family_needs_one_entry(tmp_path: Path) -> None:
    register_encoder("clip", clip())
    published = CLIPVisionModel(CLIPVisionConfig(**SMALL_ENCODER, image_size=64, patch_size=4)).eval()
    model = AutoencoderDecQ.from_encoder(published, "clip", **SMALL_DECODER).eval()
    assert model.config["encoder_norm_mean"] == (0.4815, 0.4578, 0.4082)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    code = model.encode(images)
    tokens = published((images - model.encoder_mean) / model.encoder_std).last_hidden_state[:, 1:]
    expected = torch.nn.functional.layer_norm(tokens, (64,), eps=1e-6)
    torch.testing.assert_close(code.latent.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoencoderDecQ.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images).query_latent, code.query_latent)
    register_encoder("mine", clip())
    with pytest.raises(ValueError, match="another encoder called 'clip'"):
        register_encoder("clip", clip())


@pytest.mark.usefixtures("families")
def test_an_encoder_without_hidden_states_has_no_queries() -> None:
    """One whose states are those of its stages, maps of shrinking size, and not of blocks."""
    config = ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1])
    encoder, kind = ConvNextModel(config).eval(), clip()
    config.patch_size = 4
    with pytest.raises(ValueError, match="ConvNextModel returned 5 hidden states of shape"):
        encode_tokens(encoder, kind, torch.zeros(1, 3, 32, 32))
    encoder = CLIPVisionModel(CLIPVisionConfig(**SMALL_ENCODER, image_size=64, patch_size=4)).eval()
    encoder.forward = lambda pixels, output_hidden_states, call=encoder.forward: call(pixels)
    with pytest.raises(ValueError, match=r"CLIPVisionModel returned 0 hidden states.*for 2 blocks"):
        encode_tokens(encoder, kind, torch.zeros(1, 3, 64, 64))
    assert encode_tokens(encoder, kind, torch.zeros(1, 3, 64, 64), hidden_states=False).last.shape == (1, 256, 64)


def test_masking_of_a_published_mae_is_left_out() -> None:
    """Its configuration says that three patches of four are dropped."""
    published = ViTMAEModel(ViTMAEConfig(**SMALL_ENCODER, image_size=64, patch_size=4)).eval()
    assert published.config.mask_ratio == 0.75
    model = AutoencoderDecQ.from_encoder(published, "mae", **SMALL_DECODER).eval()
    code = model.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert code.latent.shape == (1, 64, 16, 16)


def test_siglip_has_its_own_normalisation() -> None:
    published = SiglipVisionModel(SiglipVisionConfig(**SMALL_ENCODER, image_size=64, patch_size=4)).eval()
    model = AutoencoderDecQ.from_encoder(published, "siglip2", **SMALL_DECODER).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = published(2 * images - 1).last_hidden_state
    torch.testing.assert_close(model.encode(images).latent.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_only_what_differs_is_kept_of_a_published_configuration() -> None:
    usual = ENCODERS["dinov2"].build(hidden_size=64, patch_size=14, num_hidden_layers=2)
    other = ENCODERS["dinov2"].build(
        hidden_size=64, patch_size=14, num_hidden_layers=2, num_attention_heads=2, layer_norm_eps=1e-5
    )
    kept = [AutoencoderDecQ.from_encoder(e, **SMALL_DECODER).config["encoder_config"] for e in (usual, other)]
    assert kept == [None, {"num_attention_heads": 2, "layer_norm_eps": 1e-5}]


def test_an_encoder_of_another_family_is_refused() -> None:
    plain: Any = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, patch_size=14))
    with pytest.raises(ValueError, match="encoder is a Dinov2Model.*dinov2_plain"):
        AutoencoderDecQ.from_encoder(plain, "dinov2", **SMALL_DECODER)
    with pytest.raises(ValueError, match="write one of dinov2"):
        AutoencoderDecQ.from_encoder(plain, "dino", **SMALL_DECODER)
