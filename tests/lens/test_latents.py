"""Packing by a one-hot position, its inverse, the autoencoder's statistics, images there and back."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from torch import Tensor

from wellposed.lens.latents import decode_tokens, encode_images, latent_statistics, pack_latents, unpack_latents


def test_where_a_position_goes() -> None:
    """Channel c at (2 i + r, 2 j + s) is channel 4 c + 2 r + s of token i * columns + j."""
    for c, i, r, j, s in ((0, 0, 0, 0, 1), (2, 1, 1, 2, 0), (1, 0, 1, 2, 1), (2, 1, 0, 0, 0)):
        latents = torch.zeros(1, 3, 4, 6)
        latents[0, c, 2 * i + r, 2 * j + s] = 1
        assert pack_latents(latents).nonzero().tolist() == [[0, i * 3 + j, 4 * c + 2 * r + s]]


def test_packing_is_undone_exactly_and_is_diffusers_own() -> None:
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = pack_latents(latents)
    assert tokens.shape == (2, 15, 16)
    assert torch.equal(unpack_latents(tokens, 3, 5), latents)
    assert torch.equal(tokens, Flux2Pipeline._pack_latents(Flux2Pipeline._patchify_latents(latents)))


def images(height: int = 32, width: int = 48, batch: int = 2) -> Tensor:
    return 2 * torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3)) - 1


def test_encoding_from_its_definition(tiny_vae: AutoencoderKLFlux2) -> None:
    with torch.no_grad():
        tokens = encode_images(tiny_vae, images())
        latents: Any = tiny_vae.encode(images()).latent_dist.mode()
    assert tokens.shape == (2, 2 * 3, 16)
    mean, var = tiny_vae.bn.running_mean, tiny_vae.bn.running_var
    for token, channel in ((0, 0), (4, 7), (5, 15)):
        i, j, c, r, s = token // 3, token % 3, channel // 4, channel % 4 // 2, channel % 2
        expected = (latents[:, c, 2 * i + r, 2 * j + s] - mean[channel]) / (var[channel] + 1e-4).sqrt()
        torch.testing.assert_close(tokens[:, token, channel], expected)


def test_decoding_undoes_normalisation_and_packing(tiny_vae: AutoencoderKLFlux2) -> None:
    with torch.no_grad():
        tokens = encode_images(tiny_vae, images())
        latents: Any = tiny_vae.encode(images()).latent_dist.mode()
        mean, std = latent_statistics(tiny_vae)
        torch.testing.assert_close(unpack_latents(tokens * std + mean, 2, 3), latents, rtol=1e-5, atol=1e-5)
        found, expected = decode_tokens(tiny_vae, tokens, 2, 3), tiny_vae.decode(latents).sample
    assert found.shape == (2, 3, 32, 48)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mode_and_sample(tiny_vae: AutoencoderKLFlux2) -> None:
    def tokens(**how: Any) -> Tensor:
        with torch.no_grad():
            return encode_images(tiny_vae, images(), **how)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(tokens(), tokens())
    assert torch.equal(tokens(sample=True, generator=seeded(0)), tokens(sample=True, generator=seeded(0)))
    assert not torch.equal(tokens(sample=True, generator=seeded(0)), tokens(sample=True, generator=seeded(1)))
    one_each = tokens(sample=True, generator=[seeded(0), seeded(1)])
    assert torch.equal(one_each, tokens(sample=True, generator=[seeded(0), seeded(1)]))
    drawn = torch.stack([tokens(sample=True, generator=seeded(seed)) for seed in range(100)])
    error = (drawn.mean(0) - tokens()).abs() / drawn.std(0)
    assert error.max() < 0.5


def test_statistics_are_never_those_of_the_batch(tiny_vae: AutoencoderKLFlux2) -> None:
    with torch.no_grad():
        expected, before = encode_images(tiny_vae, images()), tiny_vae.bn.running_mean.clone()
        tiny_vae.train()
        assert torch.equal(encode_images(tiny_vae, images()), expected)
    assert torch.equal(tiny_vae.bn.running_mean, before)


def test_half_an_autoencoder_gives_whole_tokens(tiny_vae: AutoencoderKLFlux2) -> None:
    with torch.no_grad():
        whole = encode_images(tiny_vae, images())
        tokens = encode_images(tiny_vae.to(torch.bfloat16), images())
        decoded = decode_tokens(tiny_vae, tokens, 2, 3)
    assert (tokens.dtype, decoded.dtype) == (torch.float32, torch.bfloat16)
    assert [part.dtype for part in latent_statistics(tiny_vae)] == [torch.float32] * 2
    torch.testing.assert_close(tokens, whole, rtol=0.1, atol=0.1)


def test_the_published_autoencoder() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
    state = vae.state_dict()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 84_046_115
    assert len(state) == 251
    assert vae.bn.eps == 1e-4
    mean, std = latent_statistics(vae)
    assert mean.shape == std.shape == (128,)


def test_errors(tiny_vae: AutoencoderKLFlux2) -> None:
    with pytest.raises(ValueError, match="even sizes"):
        pack_latents(torch.zeros(1, 4, 3, 4))
    with pytest.raises(ValueError, match="2 x 4 of them"):
        unpack_latents(torch.zeros(1, 6, 16), 2, 4)
    with pytest.raises(ValueError, match="multiples of 16, e.g. 32 x 16"):
        encode_images(tiny_vae, images(40, 20))
