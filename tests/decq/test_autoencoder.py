"""AutoencoderDecQ: without queries it is diffusers' AutoencoderRAE, with them the patches stay what they were."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderRAE, attention_backend
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.encoders import ENCODERS

WEIGHTS = "diffusion_pytorch_model.safetensors"
CHANNELS: dict[str, Any] = {"num_queries": None, "query_fusion": "channels", "query_bottleneck_dim": 6}
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


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("saved", "changes", "message"),
    [
        ({}, {"num_queries": 0}, r"weights of queries that this model would leave out, e\.g\. _query_latents"),
        ({}, {"condenser_layers": (0,)}, r"e\.g\. condensers\.condensers\.1\."),
        (CHANNELS, {"num_queries": 0}, "would leave out"),
        (
            {},
            {"num_queries": 2, "ignore_mismatched_sizes": True},
            r"condensers\.queries \(3, 64\) instead of \(2, 64\)",
        ),
    ],
)
def test_queries_of_a_file_are_not_dropped(
    build: Build, tmp_path: Path, saved: dict[str, Any], changes: dict[str, Any], message: str, low_cpu_mem_usage: bool
) -> None:
    build(**saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoencoderDecQ.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **changes)


def test_statistics_of_an_rae_fit_its_latents(sizes: dict[str, Any]) -> None:
    theirs = rae(sizes)
    theirs._latents_std = torch.zeros(64, 4, 4)
    with pytest.raises(ValueError, match="std of the latents has entries that are not positive"):
        AutoencoderDecQ.from_rae(theirs)
    theirs._latents_std = torch.ones(64, 8, 8)
    with pytest.raises(ValueError, match=r"must broadcast to \(64, 4, 4\)"):
        AutoencoderDecQ.from_rae(theirs, num_queries=3, condenser_layers=(0,))


def without_queries(build: Build, model: AutoencoderDecQ, **fields: Any) -> AutoencoderDecQ:
    plain = build(num_queries=0, **fields)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    return plain


def test_queries_leave_the_patches_alone(build: Build, images: torch.Tensor) -> None:
    model = build()
    assert torch.equal(model.encode(images).latent, without_queries(build, model).encode(images).latent)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("context", ["patch", "all"])
def test_every_encoder(build: Build, images: torch.Tensor, encoder: str, context: str) -> None:
    model = build(encoder_type=encoder, condenser_context=context)
    code = model.encode(images)
    assert code.latent.shape == (3, 64, 4, 4)
    assert code.query_latent.shape == (3, 3, 64)
    assert model.decode(code.latent, code.query_latent).sample.shape == (3, 3, 64, 64)


@pytest.mark.parametrize("fields", [{}, CHANNELS], ids=["tokens", "channels"])
def test_gradients_reach_everything_but_the_encoder(build: Build, images: torch.Tensor, fields: dict[str, Any]) -> None:
    model = build(noise_tau=0.8, **fields).train()
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


@pytest.mark.gpu
def test_noise_is_drawn_where_its_generator_is(build: Build, images: torch.Tensor) -> None:
    model = build(noise_tau=0.8).train()
    expected = model.encode(images, generator=torch.Generator().manual_seed(1))
    found = model.to("cuda").encode(images.cuda(), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.latent.cpu(), expected.latent, rtol=0, atol=1e-3)


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


@pytest.mark.parametrize("fields", [{}, CHANNELS], ids=["tokens", "channels"])
def test_slicing_changes_nothing(build: Build, images: torch.Tensor, fields: dict[str, Any]) -> None:
    model = build(**fields)
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
        ({"query_fusion": "sum"}, '"tokens" or "channels"'),
        ({"query_bottleneck_dim": 6}, 'leave it out, or write query_fusion="channels"'),
        ({**CHANNELS, "num_queries": 8}, "each of the 16 patches has one: give 16, or None"),
        ({**CHANNELS, "query_bottleneck_dim": None}, "give 3 to 64 channels"),
        ({**CHANNELS, "query_bottleneck_dim": 2}, "query_bottleneck_dim is 2; give 3 to 64"),
        ({**CHANNELS, "query_bottleneck_dim": 65}, "query_bottleneck_dim is 65; give 3 to 64"),
        ({"num_summed_layers": 5}, "blocks 1 to 4"),
        ({"decoder_position_range": 0}, "decoder_position_range"),
        ({"condenser_num_heads": 3}, "does not divide"),
        ({"latents_mean": torch.zeros(5)}, r"mean of the latents has shape \(5,\); it must broadcast to \(64, 4, 4\)"),
        # Would broadcast with a batch of 64 images, of as many channels.
        ({"latents_std": torch.ones(64, 64, 4, 4)}, r"std of the latents has shape \(64, 64, 4, 4\)"),
        ({"latents_std": torch.ones(16, 64)}, r"must broadcast to \(64, 4, 4\)"),
        ({"latents_mean": [float("nan")]}, "not finite"),
        ({"latents_std": [[[0.0]]] * 64}, "not positive"),
        ({"latents_mean": torch.zeros(64, 4, 4), "reshape_to_2d": False}, r"must broadcast to \(16, 64\)"),
        ({"latents_shape": [64, 8, 8]}, r"saved statistics of the latents have shape \(64, 8, 8\)"),
        ({"query_latents_shape": [8, 64]}, r"saved statistics of the query latents .* broadcast to \(3, 64\)"),
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
    with pytest.raises(ValueError, match=r"expected \(3, 3, 64\)"):
        model.decode(code.latent, code.query_latent[:, :2])
    with pytest.raises(ValueError, match=r"expected \(batch, 64, side, side\)"):
        model.decode(code.latent.flatten(2).unflatten(2, (2, 8)), code.query_latent)
    with pytest.raises(ValueError, match="got 18 tokens"):
        model.unpack(torch.zeros(1, 18, 64))
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
    model.set_latent_statistics(torch.zeros(64, 4, 4), torch.ones(1))
    with pytest.raises(ValueError, match=r"each element, \(64, 4, 4\): latents of another grid than 4 x 4 have none"):
        model.decode(torch.zeros(3, 64, 6, 6), code.query_latent)
    model.set_latent_statistics(torch.zeros(64, 1, 1), torch.ones(1))
    assert model.decode(torch.zeros(3, 64, 6, 6), code.query_latent).sample.shape == (3, 3, 64, 64)


def test_the_decoder_looks_at_the_queries(build: Build, images: torch.Tensor) -> None:
    model = build().double()
    code = model.encode(images.double())
    own = model.decode(code.latent, code.query_latent).sample
    others = model.decode(code.latent, code.query_latent.roll(1, 0)).sample
    assert ((own - others).flatten(1).abs().amax(1) > 1e-4).all()
    # Each slot has its place in the decoder, whatever the order in which condensers see them.
    assert (own - model.decode(code.latent, code.query_latent.flip(1)).sample).abs().max() > 1e-5


def test_slots_of_the_whole_encoder_are_exchangeable(build: Build, images: torch.Tensor) -> None:
    model = build().double()
    before = model.encode(images.double()).query_latent
    torch.testing.assert_close(before.mean(-1), torch.zeros_like(before[..., 0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(before.var(-1, correction=0), torch.ones_like(before[..., 0]), rtol=0, atol=1e-3)
    model.condensers.queries.data = model.condensers.queries.data[[2, 0, 1]]
    torch.testing.assert_close(model.encode(images.double()).query_latent, before[:, [2, 0, 1]], rtol=1e-9, atol=1e-12)


def test_statistics_normalise_what_they_were_taken_of(build: Build, images: torch.Tensor) -> None:
    model = build()
    raw = model.encode(images)
    reconstruction = model.decode(raw.latent, raw.query_latent).sample
    given = [part for z in (raw.latent, raw.query_latent) for part in (z.mean(0), z.std(0, correction=0))]
    model.set_latent_statistics(*given)
    code = model.encode(images)
    for z in (code.latent, code.query_latent):
        torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), rtol=0, atol=1e-3)
        torch.testing.assert_close(z.var(0, correction=0), torch.ones_like(z[0]), rtol=0, atol=1e-2)
    torch.testing.assert_close(model.decode(code.latent, code.query_latent).sample, reconstruction, rtol=0, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("reshape_to_2d", [False, True])
def test_saved_and_loaded(
    build: Build, images: torch.Tensor, tmp_path: Path, low_cpu_mem_usage: bool, reshape_to_2d: bool
) -> None:
    model = build(reshape_to_2d=reshape_to_2d, num_summed_layers=2, scaling_factor=0.7, decoder_position_range=4)
    raw = model.encode(images)
    model.set_latent_statistics(raw.latent.mean(0), torch.tensor([2.0]), torch.zeros(1), raw.query_latent.std(0))
    code = model.encode(images)
    model.save_pretrained(tmp_path)
    again = AutoencoderDecQ.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {n: v for n, v in again.config.items() if n[0] != "_"} == {
        n: v for n, v in model.config.items() if n[0] != "_"
    }
    copy = AutoencoderDecQ.from_config(model.config).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.encode(images).latent, code.latent)
    for a, b in zip(again.encode(images, return_dict=False), code.to_tuple(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again.decode(*code.to_tuple()).sample, model.decode(*code.to_tuple()).sample)


@pytest.mark.parametrize("part", ["latents_mean", "latents_std"])
def test_half_the_statistics_of_an_rae(sizes: dict[str, Any], images: torch.Tensor, tmp_path: Path, part: str) -> None:
    theirs = rae(sizes, **{"latents_mean": None, "latents_std": None, part: torch.full((64, 4, 4), 0.5)})
    theirs.save_pretrained(tmp_path / "rae")
    for ours in (AutoencoderDecQ.from_rae(theirs), AutoencoderDecQ.from_pretrained(tmp_path / "rae")):
        assert torch.equal(ours.encode(images).latent, theirs.encode(images).latent)
        ours.save_pretrained(tmp_path / "ours")
        again = AutoencoderDecQ.from_pretrained(tmp_path / "ours")
        assert torch.equal(again.encode(images).latent, theirs.encode(images).latent)


def test_a_copy_of_an_rae_is_where_and_what_it_was(sizes: dict[str, Any]) -> None:
    theirs = rae(sizes, noise_tau=0.8)
    assert not AutoencoderDecQ.from_rae(theirs).training
    assert AutoencoderDecQ.from_rae(theirs.train()).training
    half = AutoencoderDecQ.from_rae(theirs.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has 3 queries already"):
        AutoencoderDecQ.from_rae(AutoencoderDecQ.from_rae(theirs, num_queries=3, condenser_layers=(0,)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # Heads are no tensors: diffusers' model would load them, and make other latents of an image.
        ({"encoder_config": {"num_attention_heads": 2}}, "num_attention_heads': 2"),
        ({"decoder_position_range": 4}, "decoder_position_range is 4"),
        ({"encoder_type": "dinov3"}, "the encoders dinov2, siglip2, mae"),
        ({"num_summed_layers": 2}, "no summed layers"),
        ({"encoder_type": "siglip2"}, "cannot build an AutoencoderRAE"),
    ],
)
def test_what_an_rae_cannot_be(build: Build, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    model = build(num_queries=0, **fields)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path, as_rae=True)
    assert not list(tmp_path.iterdir())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near(build: Build, images: torch.Tensor, autocast: bool) -> None:
    model = build()
    whole = [*model.encode(images).to_tuple(), model(images).sample]
    half = model if autocast else build().to(torch.bfloat16)
    pixels = images if autocast else images.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        near = [*half.encode(pixels).to_tuple(), half(pixels).sample]
    for a, b in zip(near, whole, strict=True):
        assert a.isfinite().all() and 0 < relative(a, b) < 0.012


def test_weights_kept_in_eight_bits(build: Build, images: torch.Tensor) -> None:
    model = build()
    exact = model(images).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.condensers.condensers[0].attn.to_k.weight.dtype == torch.float8_e4m3fn
    assert 0 < relative(model(images).sample, exact) < 0.1


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("fields", [{"num_queries": 0}, {}, CHANNELS], ids=["none", "tokens", "channels"])
def test_offloaded_in_groups(
    build: Build, images: torch.Tensor, tmp_path: Path, offload_type: str, fields: dict[str, Any]
) -> None:
    """To disk: a tensor that is not brought back in time holds nothing."""
    model = build(**fields)
    code, sample = model.encode(images).to_tuple(), model(images).sample
    cpu = torch.device("cpu")
    model.enable_group_offload(
        cpu, cpu, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(model.encode(images).to_tuple(), code, strict=True))
        assert torch.equal(model.decode(*code).sample, sample)
        assert torch.equal(model(images).sample, sample)


def test_attention_backends_and_fused_projections(build: Build, images: torch.Tensor) -> None:
    model = build()
    sample = model(images).sample
    with attention_backend("native"):  # restores the default of all models, which the next line changes
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(model(images).sample, sample)
        model.reset_attention_backend()
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(images).sample, sample)
    model.unfuse_qkv_projections()
    assert len(model.attn_processors) == 2 + 2


def test_images_of_another_size_are_resized(build: Build, images: torch.Tensor) -> None:
    model = build()
    large = torch.nn.functional.interpolate(images, 80, mode="bilinear")
    small = torch.nn.functional.interpolate(large, 56, mode="bicubic")
    assert torch.equal(model.encode(large).latent, model.encode(small).latent)


def test_latents_of_another_grid_keep_the_queries_whole(build: Build, images: torch.Tensor) -> None:
    """Patches are resized to the decoder's grid, as in RAEDecoder; queries are not."""
    model = build().double()
    code = model.encode(images.double())
    constant = code.latent.mean((2, 3), keepdim=True)
    wide, square = (model.decode(constant.expand(-1, -1, n, n), code.query_latent).sample for n in (6, 4))
    torch.testing.assert_close(wide, square, rtol=1e-9, atol=1e-9)


def test_blocks_stay_on_one_device(build: Build) -> None:
    blocks = set(build()._get_no_split_modules("auto"))
    assert {"ViTMAELayer", "Condenser", "Dinov2WithRegistersLayer"} <= blocks
    assert blocks <= {type(module).__name__ for module in build().modules()} | {"Dinov2WithRegistersEmbeddings"}


# --- queries as channels of the patches


@pytest.mark.parametrize("reshape_to_2d", [False, True])
def test_channels_of_queries_stand_behind_those_of_the_patches(
    build: Build, images: torch.Tensor, reshape_to_2d: bool
) -> None:
    model = build(**CHANNELS, reshape_to_2d=reshape_to_2d)
    assert (model.config["num_queries"], model.num_query_tokens, model.latent_channels) == (16, 0, 70)
    (latent,) = model.encode(images, return_dict=False)
    assert latent.shape == ((3, 70, 4, 4) if reshape_to_2d else (3, 16, 70))
    assert model.encode(images).query_latent is None
    tokens = model.pack(latent)
    assert tokens.shape == (3, 16, 70)
    assert torch.equal(model.unpack(tokens)[0], latent) and model.unpack(tokens)[1] is None
    plain = without_queries(build, model, reshape_to_2d=reshape_to_2d)
    assert torch.equal(tokens[..., :64], plain.pack(plain.encode(images).latent))
    queries = model.condensers(model.tapped(model.encoder_tokens(images)))
    # Statistics of no images still divide by 1 + 1e-5.
    torch.testing.assert_close(tokens[..., 64:] * (1 + 1e-5), queries, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(queries.mean(-1), torch.zeros(3, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(queries.var(-1, correction=0), torch.ones(3, 16), rtol=0, atol=1e-3)
    assert (queries[:, 1:] - queries[:, :-1]).abs().amax(-1).min() > 1e-3, "each patch has its own"


def test_the_decoder_reads_all_channels_by_one_matrix(build: Build, images: torch.Tensor) -> None:
    model = build(**CHANNELS).double()
    latent = model.encode(images.double()).latent
    sample = model.decode(latent).sample
    assert sample.shape == (3, 3, 64, 64)
    sizes = {name: model.config[name] for name in model.config if name.startswith("decoder_") and "range" not in name}
    theirs = RAEDecoder(hidden_size=70, num_patches=16, image_size=64, **sizes).double().eval()
    weights = {name: value for name, value in model.decoder.state_dict().items() if "query" not in name}
    joined = torch.cat([weights["decoder_embed.weight"], model.decoder.query_embed.weight], dim=1)
    theirs.load_state_dict({**weights, "decoder_embed.weight": joined}, strict=False)
    theirs.decoder_pos_embed = model.decoder.decoder_pos_embed
    pixels = theirs.unpatchify(theirs(latent.flatten(2).transpose(1, 2) * (1 + 1e-5)).logits)
    torch.testing.assert_close(sample, pixels * model.encoder_std + model.encoder_mean, rtol=1e-9, atol=1e-9)
    others = torch.cat([latent[:, :64], latent[:, 64:].roll(1, 0)], dim=1)
    assert ((sample - model.decode(others).sample).flatten(1).abs().amax(1) > 1e-4).all()


def test_parameters_of_channels(build: Build) -> None:
    """Queries, condensers, a bottleneck with a bias, and the decoder's matrix without."""
    n, d, c, wide = 16, 64, 6, 32
    more = sum(p.numel() for p in build(**CHANNELS).parameters()) - sum(
        p.numel() for p in build(num_queries=0).parameters()
    )
    assert more == 2 * (12 * d**2 + 15 * d) + n * d + (d * c + c) + c * wide


def test_noise_of_channels_is_that_of_the_patches(build: Build, images: torch.Tensor) -> None:
    """One deviation for each image; the patches' noise is what a plain autoencoder draws from the same generator."""
    model = build(**CHANNELS, noise_tau=0.8)
    plain = without_queries(build, model, noise_tau=0.8)
    clean = model.encode(images).latent
    noisy, noisy_patches = (
        one.train().encode(images, generator=[torch.Generator().manual_seed(i) for i in range(3)]).latent
        for one in (model, plain)
    )
    assert torch.equal(noisy[:, :64], noisy_patches)
    sigma = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(i)) for i in range(3)]) * 0.8
    torch.testing.assert_close((noisy - clean)[:, 64:].flatten(1).std(1), sigma, rtol=0.25, atol=0)


@pytest.mark.parametrize("reshape_to_2d", [False, True])
def test_channels_are_saved_and_loaded(build: Build, images: torch.Tensor, tmp_path: Path, reshape_to_2d: bool) -> None:
    model = build(**CHANNELS, reshape_to_2d=reshape_to_2d, scaling_factor=0.7)
    raw = model.encode(images).latent
    reconstruction = model.decode(raw).sample
    model.set_latent_statistics(raw.mean(0) / 0.7, raw.std(0, correction=0) / 0.7)
    latent = model.encode(images).latent
    torch.testing.assert_close(latent.mean(0), torch.zeros_like(latent[0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(latent.std(0, correction=0), torch.full_like(latent[0], 0.7), rtol=0, atol=1e-2)
    torch.testing.assert_close(model.decode(latent).sample, reconstruction, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["num_queries"], saved["query_fusion"], saved["query_bottleneck_dim"]) == (16, "channels", 6)
    assert saved["latents_shape"] == list(latent.shape[1:]) and saved["query_latents_shape"] is None
    copy = AutoencoderDecQ.from_config(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for again in (AutoencoderDecQ.from_pretrained(tmp_path), copy):
        assert torch.equal(again.encode(images).latent, latent)
        assert torch.equal(again.decode(latent).sample, model.decode(latent).sample)


def test_models_saved_before_there_were_channels(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    assert (model.config["query_fusion"], model.config["query_bottleneck_dim"]) == ("tokens", None)
    assert not any("bottleneck" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in before.items() if n not in ("query_fusion", "query_bottleneck_dim")}))
    assert torch.equal(AutoencoderDecQ.from_pretrained(tmp_path)(images).sample, model(images).sample)


def test_channels_of_no_queries_are_the_rae(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    plain = build(**{**CHANNELS, "num_queries": 0})
    assert (plain.latent_channels, plain.num_query_tokens, plain.condensers) == (64, 0, None)
    plain.save_pretrained(tmp_path, as_rae=True)
    assert torch.equal(AutoencoderRAE.from_pretrained(tmp_path)(images).sample, plain(images).sample)
    with pytest.raises(ValueError, match=r"AutoencoderRAE knows no queries \(16 here\)"):
        build(**CHANNELS).save_pretrained(tmp_path / "channels", as_rae=True)


@pytest.mark.parametrize("reshape_to_2d", [False, True])
def test_an_rae_gets_channels_to_train(sizes: dict[str, Any], images: torch.Tensor, reshape_to_2d: bool) -> None:
    """Its own keep their statistics and their decoder; with a matrix of zeros the new ones change nothing."""
    shape = (64, 4, 4) if reshape_to_2d else (16, 64)
    statistics = {"latents_mean": torch.full(shape, 0.3), "latents_std": torch.full(shape, 1.5)}
    theirs = rae(sizes, reshape_to_2d=reshape_to_2d, **statistics)
    ours = AutoencoderDecQ.from_rae(theirs, condenser_layers=(0,), **CHANNELS)
    patches, latent = theirs.encode(images).latent, ours.encode(images).latent
    axis = 1 if reshape_to_2d else 2
    assert torch.equal(latent.narrow(axis, 0, 64), patches)
    queries = latent.narrow(axis, 64, 6)
    torch.testing.assert_close(queries.mean(axis), torch.zeros_like(queries.mean(axis)), rtol=0, atol=1e-5)
    torch.nn.init.zeros_(ours.decoder.query_embed.weight)
    torch.testing.assert_close(ours.decode(latent).sample, theirs.decode(patches).sample, rtol=0, atol=1e-6)


def test_bad_calls_with_channels(build: Build, images: torch.Tensor) -> None:
    model = build(**CHANNELS)
    latent = model.encode(images).latent
    with pytest.raises(ValueError, match=r"expected \(batch, 70, side, side\)"):
        model.decode(latent[:, :64])
    with pytest.raises(ValueError, match="no query tokens, leave it out"):
        model.decode(latent, torch.zeros(3, 16, 6))
    with pytest.raises(ValueError, match="only to a model with query tokens"):
        model.set_latent_statistics(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"must broadcast to \(70, 4, 4\)"):
        model.set_latent_statistics(torch.zeros(64, 4, 4), torch.ones(64, 4, 4))


def test_a_query_for_each_patch_may_be_a_token_too(build: Build, images: torch.Tensor) -> None:
    model = build(num_queries=None)
    assert model.config["num_queries"] == model.num_query_tokens == 16
    assert model.encode(images).query_latent.shape == (3, 16, 64)


@pytest.mark.compile
def test_its_blocks_compile(build: Build, images: torch.Tensor) -> None:
    model = build()
    with torch.no_grad():
        sample = model(images).sample
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(images).sample, sample)
        torch.testing.assert_close(
            torch.compile(build().encode, backend="eager")(images).query_latent, model.encode(images).query_latent
        )
