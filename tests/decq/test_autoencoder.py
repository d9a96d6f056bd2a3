"""AutoencoderDecQ: without queries it is diffusers' AutoencoderRAE, with them the patches stay what they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderRAE

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.encoders import ENCODERS

WEIGHTS = "diffusion_pytorch_model.safetensors"
Build = Callable[..., AutoencoderDecQ]


def rae(sizes: dict[str, Any], **fields: Any) -> AutoencoderRAE:
    generator = torch.Generator().manual_seed(2)
    statistics = {
        "latents_mean": torch.randn(64, 4, 4, generator=generator),
        "latents_std": torch.rand(64, 4, 4, generator=generator) + 0.5,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return AutoencoderRAE(**{**sizes, **statistics, **fields}).eval()


@pytest.mark.parametrize("encoder", ["dinov2", "mae"])
@pytest.mark.parametrize("training", [False, True])
def test_without_queries_it_is_the_rae(
    sizes: dict[str, Any], images: torch.Tensor, encoder: str, training: bool
) -> None:
    theirs = rae(sizes, encoder_type=encoder, noise_tau=0.8, scaling_factor=1.3)
    ours = AutoencoderDecQ.from_rae(theirs)
    for model in (theirs, ours):
        model.train(training)
    pairs = [model(images, generator=torch.Generator().manual_seed(3)).sample for model in (theirs, ours)]
    assert torch.equal(*pairs)
    codes = [model.encode(images, generator=torch.Generator().manual_seed(3)).latent for model in (theirs, ours)]
    assert torch.equal(*codes)


def test_it_loads_what_the_rae_saved_and_the_other_way(
    sizes: dict[str, Any], images: torch.Tensor, tmp_path: Path
) -> None:
    theirs = rae(sizes)
    theirs.save_pretrained(tmp_path / "rae")
    ours = AutoencoderDecQ.from_pretrained(tmp_path / "rae")
    assert ours.config["num_queries"] == 0
    assert torch.equal(ours(images).sample, theirs(images).sample)
    ours.save_pretrained(tmp_path / "back", as_rae=True)
    assert torch.equal(AutoencoderRAE.from_pretrained(tmp_path / "back")(images).sample, theirs(images).sample)


def test_a_truncated_checkpoint_is_an_error(build: Build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=WEIGHTS):
        AutoencoderDecQ.from_pretrained(tmp_path)


def test_queries_leave_the_patches_alone(build: Build, images: torch.Tensor) -> None:
    with_queries = build()
    without = build(num_queries=0)
    without.load_state_dict({name: with_queries.state_dict()[name] for name in without.state_dict()})
    assert torch.equal(with_queries.encode(images).latent, without.encode(images).latent)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("context", ["patch", "all"])
def test_every_encoder(build: Build, images: torch.Tensor, encoder: str, context: str) -> None:
    model = build(encoder_type=encoder, condenser_context=context)
    code = model.encode(images)
    assert code.latent.shape == (3, 64, 4, 4)
    assert code.query_latent.shape == (3, 3, 64)
    assert model.decode(code.latent, code.query_latent).sample.shape == (3, 3, 64, 64)


def test_gradients_reach_everything_but_the_encoder(build: Build, images: torch.Tensor) -> None:
    model = build(noise_tau=0.8).train()
    model.enable_gradient_checkpointing()
    (model(images).sample - images.mean()).square().mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    largest = {n: p.grad.abs().max() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert set(largest) == {n for n, p in model.named_parameters() if p.requires_grad}
    # A constant added to all of a query's scores changes no softmax: the gradient of these is what rounding leaves.
    constants = {f"condensers.condensers.{i}.attn.to_k.bias" for i in range(2)}
    for name, gradient in largest.items():
        other = largest[name.replace("to_k.bias", "to_k.weight")]
        assert gradient < 1e-4 * other if name in constants else gradient > 0


def test_noise_has_one_deviation_for_patches_and_queries(build: Build, images: torch.Tensor) -> None:
    model = build(noise_tau=0.8)
    clean = model.encode(images)
    model.train()
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    noisy = model.encode(images, generator=generators)
    patches, queries = noisy.latent - clean.latent, noisy.query_latent - clean.query_latent
    sigma = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(i)) for i in range(3)]) * 0.8
    torch.testing.assert_close(patches.flatten(1).std(1), sigma, rtol=0.1, atol=0)
    torch.testing.assert_close(queries.flatten(1).std(1), sigma, rtol=0.25, atol=0)


def test_each_image_has_its_own_noise(build: Build, images: torch.Tensor) -> None:
    model = build(noise_tau=0.8).train()
    together = model.encode(images, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    alone = model.encode(images[1:2], generator=[torch.Generator().manual_seed(1)])
    torch.testing.assert_close(together.latent[1:2], alone.latent)
    torch.testing.assert_close(together.query_latent[1:2], alone.query_latent)


def test_statistics_normalise_and_are_saved(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    raw = model.encode(images)
    mean, std = raw.latent.mean(0), raw.latent.std(0) + 0.1
    query_mean, query_std = raw.query_latent.mean(0), raw.query_latent.std(0) + 0.1
    model.set_latent_statistics(mean, std, query_mean, query_std)
    code = model.encode(images)
    torch.testing.assert_close(code.latent, (raw.latent - mean) / (std + 1e-5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        code.query_latent, (raw.query_latent - query_mean) / (query_std + 1e-5), rtol=1e-4, atol=1e-4
    )
    reconstruction = model.decode(code.latent, code.query_latent).sample
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").stat().st_size < 3000
    again = AutoencoderDecQ.from_pretrained(tmp_path)
    assert torch.equal(again.decode(code.latent, code.query_latent).sample, reconstruction)


def test_packing_is_undone(build: Build, images: torch.Tensor) -> None:
    model = build()
    code = model.encode(images)
    tokens = model.pack(code.latent, code.query_latent)
    assert tokens.shape == (3, 19, 64)
    assert torch.equal(tokens[:, 5], code.latent[:, :, 1, 1])
    latent, queries = model.unpack(tokens)
    assert torch.equal(latent, code.latent)
    assert torch.equal(queries, code.query_latent)


def test_slicing_changes_nothing(build: Build, images: torch.Tensor) -> None:
    model = build()
    whole = model(images).sample
    model.enable_slicing()
    torch.testing.assert_close(model(images).sample, whole)


def test_summed_layers(build: Build, images: torch.Tensor) -> None:
    model = build(num_summed_layers=3)
    encoded = model.encoder_tokens(images)
    width = (64,)
    layers = [torch.nn.functional.layer_norm(encoded.patches(layer), width) for layer in (2, 3, 4)]
    expected = torch.nn.functional.layer_norm(sum(layers), width)
    latent = model.encode(images).latent.flatten(2).transpose(1, 2)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)


def test_a_published_encoder_is_taken_over(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    source = build()
    encoder = ENCODERS["dinov2"].build(hidden_size=64, patch_size=14, num_hidden_layers=4, image_size=56)
    encoder.layernorm.weight = torch.nn.Parameter(torch.ones(64))
    encoder.layernorm.bias = torch.nn.Parameter(torch.zeros(64))
    encoder.save_pretrained(tmp_path)
    fields = {
        name: source.config[name]
        for name in ("encoder_input_size", "decoder_hidden_size", "decoder_num_hidden_layers", "num_queries")
    }
    model = AutoencoderDecQ.from_encoder(
        str(tmp_path), decoder_num_attention_heads=2, decoder_intermediate_size=48, condenser_layers=(1,), **fields
    ).eval()
    mean, std = model.encoder_mean, model.encoder_std
    expected = encoder((images - mean) / std).last_hidden_state[:, 5:]
    torch.testing.assert_close(model.encode(images).latent.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"condenser_layers": (0, 4)}, "condenser_layers"),
        ({"condenser_layers": (2, 0)}, "increasing"),
        ({"condenser_layers": ()}, "one or more"),
        ({"encoder_input_size": 60}, "no multiple"),
        ({"image_size": 60}, "make 64"),
        ({"encoder_type": "vgg"}, "register_encoder"),
        ({"num_queries": -1}, "plain RAE"),
        ({"condenser_context": "cls"}, '"patch" or "all"'),
        ({"num_summed_layers": 5}, "blocks 1 to 4"),
    ],
)
def test_fields_that_do_not_fit(build: Build, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**fields)


def test_bad_calls(build: Build, images: torch.Tensor) -> None:
    model, plain = build(), build(num_queries=0)
    code = model.encode(images)
    with pytest.raises(ValueError, match="query_latent is missing"):
        model.decode(code.latent)
    with pytest.raises(ValueError, match="expected"):
        model.decode(code.latent, code.query_latent[:, :2])
    with pytest.raises(ValueError, match="leave it out"):
        plain.decode(code.latent, code.query_latent)
    with pytest.raises(ValueError, match="square"):
        model.encode(images[..., :42])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        model.encode(2 * images - 1)
    with pytest.raises(ValueError, match="must broadcast"):
        model.set_latent_statistics(torch.zeros(5), torch.ones(5))
    with pytest.raises(ValueError, match="not positive"):
        model.set_latent_statistics(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="without as_rae"):
        model.save_pretrained("nowhere", as_rae=True)
