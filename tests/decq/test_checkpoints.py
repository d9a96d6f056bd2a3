"""Published files, against the networks that they hold written out in their own layouts."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
from safetensors.torch import save_file
from torch import Tensor, nn

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.checkpoints import (
    _dit_dh_sizes,
    load_dit_dh_checkpoint,
    load_rae_checkpoint,
    load_rae_decoder,
    load_rae_statistics,
)
from wellposed.decq.encoders import ENCODERS
from wellposed.decq.transformer import DecQTransformer2DModel

SPEC = importlib.util.spec_from_file_location("original_networks", Path(__file__).with_name("original_networks.py"))
assert SPEC is not None and SPEC.loader is not None
originals = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(originals)
Decoder, DiTDH, randomised = originals.Decoder, originals.DiTDH, originals.randomised
published_images, published_latents = originals.published_images, originals.published_latents

CHANNELS, WIDTH, HEADS, PATCH = 64, 32, 2, 6
DIT_DH = {"channels": 8, "side": 5, "widths": (24, 32), "depths": (2, 1), "heads": (2, 4), "classes": 3}


@pytest.fixture
def encoder() -> nn.Module:
    return randomised(
        ENCODERS["dinov2"].build(hidden_size=CHANNELS, patch_size=14, num_hidden_layers=2, num_attention_heads=2)
    )


def decoder(side: int = 4) -> Any:
    return randomised(Decoder(CHANNELS, WIDTH, 2, HEADS, 48, side, PATCH))


def dit_dh(**sizes: Any) -> Any:
    return randomised(DiTDH(**{**DIT_DH, **sizes}))


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def statistics(side: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (CHANNELS, side, side)
    # Small variances are where the place of an epsilon shows.
    return {
        "mean": torch.randn(shape, generator=generator),
        "var": torch.rand(shape, generator=generator).pow(4) + 1e-4,
    }


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("side", [4, 16, 18])
def test_a_published_rae(encoder: nn.Module, tmp_path: Path, side: int) -> None:
    theirs, stats = decoder(side), statistics(side)
    rae = load_rae_checkpoint(
        encoder,
        saved(theirs.state_dict(), tmp_path / "model.pt"),
        saved(stats, tmp_path / "stat.pt"),
        decoder_num_attention_heads=HEADS,
    )
    assert not rae.training
    images = torch.rand(2, 3, 14 * side, 14 * side, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        latents = published_latents(encoder, images, **stats)
        torch.testing.assert_close(rae.encode(images).latent, latents, rtol=1e-5, atol=1e-5)
        expected = published_images(theirs, latents, **stats)
        torch.testing.assert_close(rae.decode(latents).sample, expected, rtol=0, atol=1e-5)
        again = AutoencoderDecQ.from_pretrained(round_trip(rae, tmp_path / "ours"))
        assert torch.equal(again.decode(latents).sample, rae.decode(latents).sample)


def round_trip(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def test_only_grids_of_sixteen_have_the_positions_of_diffusers(encoder: nn.Module, tmp_path: Path) -> None:
    """diffusers spreads every grid over 0 to 16; the published decoders count patches."""
    theirs = decoder(18)
    rae = load_rae_checkpoint(
        encoder, saved(theirs.state_dict(), tmp_path / "model.pt"), decoder_num_attention_heads=HEADS
    )
    spread = RAEDecoder(
        hidden_size=CHANNELS, decoder_hidden_size=WIDTH, num_patches=18**2, decoder_num_attention_heads=HEADS
    )
    assert (spread.decoder_pos_embed - theirs.decoder_pos_embed).abs().max() > 0.1
    torch.testing.assert_close(rae.decoder.decoder_pos_embed, theirs.decoder_pos_embed.data, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="decoder_position_range is 18"):
        rae.save_pretrained(tmp_path / "diffusers", as_rae=True)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_decoder_for_a_model_that_is_there(encoder: nn.Module, tmp_path: Path, suffix: str) -> None:
    path, theirs = tmp_path / f"model.{suffix}", decoder()
    if suffix == "pt":
        save = {"ema": {f"module.{name}": value for name, value in theirs.state_dict().items()}, "step": 3}
        torch.save(save, path)
    else:
        save_file(theirs.state_dict(), path)
    fields = {"decoder_hidden_size": WIDTH, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": HEADS}
    fields |= {"decoder_intermediate_size": 48, "patch_size": PATCH, "encoder_input_size": 56}
    plain, with_queries = (
        AutoencoderDecQ.from_encoder(
            encoder, **fields, decoder_position_range=4, num_queries=count, condenser_layers=(0,)
        )
        for count in (0, 2)
    )
    load_rae_statistics(saved(statistics(), tmp_path / "stat.pt"), load_rae_decoder(path, plain))
    latents = normal(2, CHANNELS, 4, 4)
    with torch.no_grad():
        expected = published_images(theirs, latents, **statistics())
        torch.testing.assert_close(plain.decode(latents).sample, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="with num_queries=0, and add queries"):
        load_rae_decoder(path, with_queries)
    with pytest.raises(ValueError, match=r"num_queries is 8, but .* no queries; .* AutoencoderDecQ.from_rae"):
        load_rae_checkpoint(encoder, path, num_queries=8)
    started = AutoencoderDecQ.from_rae(plain, num_queries=2, condenser_layers=(0,))
    assert torch.equal(started.decoder.decoder_pred.weight, theirs.decoder_pred.weight)
    assert torch.equal(started._latents_std, plain._latents_std)


def test_statistics_of_a_sequence_are_those_of_the_picture(encoder: nn.Module, tmp_path: Path) -> None:
    files = saved(decoder().state_dict(), tmp_path / "model.pt"), saved(statistics(), tmp_path / "stat.pt")
    square, rows = (
        load_rae_checkpoint(encoder, *files, decoder_num_attention_heads=HEADS, reshape_to_2d=shape)
        for shape in (True, False)
    )
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    codes = [model.encode(images).latent for model in (square, rows)]
    torch.testing.assert_close(codes[0].flatten(2).transpose(1, 2), codes[1])


PLACES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "weights": lambda weights: weights,
    "ema of a training": lambda weights: {
        "model": {name: value + 1 for name, value in weights.items()},
        "ema": weights,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}},
        "train_steps": 3,
    },
    "compiled and wrapped": lambda weights: {"model": {f"module._orig_mod.{n}": w for n, w in weights.items()}},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_published_generator(tmp_path: Path, place: str) -> None:
    theirs = dit_dh()
    ours = load_dit_dh_checkpoint(saved(PLACES[place](theirs.state_dict()), tmp_path / "stage2_model.pt"))
    assert not ours.training
    assert (ours.config["num_attention_heads"], ours.config["head_num_attention_heads"]) == (2, 4)
    assert (ours.config["num_layers"], ours.config["head_num_layers"], ours.null_class) == (2, 1, 3)
    x, t, labels = normal(4, 8, 5, 5), torch.tensor([0.0, 0.0069, 0.6, 1.0]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, labels).sample, theirs(x, t, labels), rtol=0, atol=1e-5)


def test_without_tables_a_caller_says_what_they_said(tmp_path: Path) -> None:
    theirs = dit_dh()
    weights = {n: w for n, w in theirs.state_dict().items() if "rope" not in n and n != "pos_embed"}
    path = saved(weights, tmp_path / "stage2_model.pt")
    ours = load_dit_dh_checkpoint(path, num_attention_heads=2, head_num_attention_heads=4, sample_size=5)
    x, t, labels = normal(2, 8, 5, 5), torch.tensor([0.3, 0.9]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, labels).sample, theirs(x, t, labels), rtol=0, atol=1e-5)


def test_a_published_generator_has_no_queries(tmp_path: Path) -> None:
    path = saved(dit_dh().state_dict(), tmp_path / "stage2_model.pt")
    with pytest.raises(ValueError, match=r"num_queries is 8, but .* no queries; .* DecQTransformer2DModel"):
        load_dit_dh_checkpoint(path, num_queries=8)
    assert load_dit_dh_checkpoint(path, num_queries=0).config["num_queries"] == 0


def test_published_sizes_are_known(tmp_path: Path) -> None:
    """A file of DiT^DH-S without its tables, none of whose tensors has any numbers."""
    with torch.device("meta"):
        sizes = DecQTransformer2DModel.of_size("S", num_queries=0).config
    weights = {"s_embedder.proj.weight": (384, 768, 1, 1), "x_embedder.proj.weight": (2048, 768, 1, 1)}
    weights |= {"y_embedder.embedding_table.weight": (1001, 384)}
    weights |= {f"blocks.{i}.norm1.weight": (384 if i < 12 else 2048,) for i in range(14)}
    found = _dit_dh_sizes({n: torch.empty(s, device="meta") for n, s in weights.items()}, "file")
    assert found == {name: sizes[name] for name in found}


def test_weights_that_were_trained_beside_the_averages(tmp_path: Path) -> None:
    weights = dit_dh().state_dict()
    path = saved(PLACES["ema of a training"](weights), tmp_path / "last.pt")
    # A table that was shifted with the rest is one of other positions.
    with pytest.raises(ValueError, match=r"pos_embed|rope"):
        load_dit_dh_checkpoint(path, ema=False)
    state = {"model": {**weights, "proj": torch.ones(1)}, "ema": weights}
    with pytest.raises(ValueError, match="1 unknown, such as proj"):
        load_dit_dh_checkpoint(saved(state, path), ema=False)
    assert load_dit_dh_checkpoint(path).config["in_channels"] == 8


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.pop(name)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: change(weights[name])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("blocks.1.mlp.w3.bias"), r"1 missing, such as blocks\.1\.mlp\.w3\.bias"),
        (without("s_projector.weight"), "s_projector"),
        (without("x_embedder.proj.weight"), "missing x_embedder"),
        (without("s_embedder.proj.weight"), "no tensor 's_embedder.proj.weight'"),
        (changed("final_layer.linear.weight", lambda w: w[:, 1:]), "of another shape, such as final_layer.linear"),
        (changed("pos_embed", lambda w: w.roll(1, 1)), "trained for other positions"),
        (changed("dec_feat_rope.freqs_sin", torch.neg), "dec_feat_rope.freqs_sin is not the table"),
        (lambda weights: weights.update({"blocks.0.attn.q_norm.weight": torch.ones(12)}), "1 unknown, such as blocks"),
    ],
)
def test_other_generators_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    weights = dict(dit_dh().state_dict())
    damage(weights)
    with pytest.raises(ValueError, match=message):
        load_dit_dh_checkpoint(saved(weights, tmp_path / "stage2_model.pt"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("decoder_layers.1.attention.attention.key.bias"), "1 missing, such as decoder_layers.1.attention"),
        (without("decoder_pos_embed"), "missing decoder_pos_embed"),
        (without("trainable_cls_token"), "trainable_cls_token"),
        (changed("decoder_embed.weight", lambda w: w[:, 1:]), "of another shape, such as decoder_embed.weight"),
        (changed("decoder_pos_embed", lambda w: w.roll(1, 1)), "trained for other positions"),
        (lambda weights: weights.update({"mask_token": torch.ones(1)}), "1 unknown, such as mask_token"),
    ],
)
def test_other_decoders_are_refused(
    encoder: nn.Module, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    weights = dict(decoder().state_dict())
    damage(weights)
    with pytest.raises(ValueError, match=message):
        load_rae_checkpoint(encoder, saved(weights, tmp_path / "model.pt"), decoder_num_attention_heads=HEADS)


def test_bad_statistics(encoder: nn.Module, tmp_path: Path) -> None:
    rae = load_rae_checkpoint(
        encoder, saved(decoder().state_dict(), tmp_path / "model.pt"), decoder_num_attention_heads=HEADS
    )
    for values, message in (
        ({"mean": torch.zeros(64, 4, 4)}, "holds mean; expected"),
        ({"mean": torch.zeros(64, 4, 4), "var": -torch.ones(64, 4, 4)}, "negative"),
        ({"mean": torch.zeros(32, 4, 4), "var": torch.ones(32, 4, 4)}, "must broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rae_statistics(saved(values, tmp_path / "stat.pt"), rae)


def test_bad_files(encoder: nn.Module, tmp_path: Path) -> None:
    path = saved(dit_dh().state_dict(), tmp_path / "stage2_model.pt")
    with pytest.raises(ValueError, match="no tensor 'decoder_embed.weight'"):
        load_rae_checkpoint(encoder, path)
    with pytest.raises(ValueError, match="register_encoder|one of dinov2"):
        load_rae_checkpoint(encoder, path, encoder_type="vgg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is the download complete"):
        load_dit_dh_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_dit_dh_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="several networks"):
        load_dit_dh_checkpoint(saved({"a": dit_dh().state_dict(), "b": dit_dh().state_dict()}, path))
    # What a file could run is not run.
    with pytest.raises(ValueError, match="could run code"):
        load_dit_dh_checkpoint(saved({**dit_dh().state_dict(), "args": Path("x")}, path))
