"""Published files of representation autoencoders and of their generators (bytetriper/RAE), as models of ours.

    rae = load_rae_checkpoint("facebook/dinov2-with-registers-base", "decoders/model.pt", "stats/stat.pt")
    pipe = DecQPipeline(
        rae, load_dit_dh_checkpoint("DiTDH-XL/stage2_model.pt"), ShiftedFlowScheduler(),
        guide=load_dit_dh_checkpoint("DiTDH-S/stage2_model.pt"),
    )

They are models without queries (K = 0); ``AutoencoderDecQ.from_rae(rae, num_queries=8)`` adds some to be trained.

Sizes are read off the tensors. Every tensor must be there, none may be left over, and tables that are computed here
(positions, rotary angles) must be those of the file; what is amiss is named. Files are read as safetensors or with
``weights_only=True``: code in them never runs.

Where implementations that load without complaint could disagree, and what holds here as there:

===========================  ==========================================================================
time                         sines, then cosines, of 2 pi t W; W is in the file
positions of the trunk       sine-cosine, columns in the first half of the channels, patches counted
rotary angles                rows in the first half of a head, columns in the second; channels 2 i, 2 i + 1 turn
``qkv``                      all heads of q, then of k, then of v
``w12``                      silu of the first half, times the second
``adaLN_modulation``         shift, scale, gate of attention, then of the MLP; of the last layer shift, scale
labels                       one row more than classes, the last for "no class"
positions of the decoder     patches counted, which diffusers' ``AutoencoderRAE`` does only where there are 16 in a row
===========================  ==========================================================================

Two epsilons: there, latents are (z - mean) / sqrt(var + 1e-5), here (z - mean) / (std + 1e-5). The std that is kept is
sqrt(var + 1e-5) - 1e-5, so that both are one number. (diffusers' converter keeps sqrt(var + 1e-5), so that its
latents differ by a part in 10^5.)
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wellposed.decq.autoencoder import STD_EPS, AutoencoderDecQ
from wellposed.decq.encoders import ENCODERS
from wellposed.decq.transformer import SIZES, DecQTransformer2DModel, rotary_tables
from wellposed.weight_files import check_weights, network_weights, read_weights

__all__ = ["load_dit_dh_checkpoint", "load_rae_checkpoint", "load_rae_decoder", "load_rae_statistics"]

DECODER_FILE = "a decoder of RAE (decoders/.../model.pt)"
STATISTICS_FILE = "statistics of latents, {'mean', 'var'} (stats/.../stat.pt)"
DIT_DH_FILE = "a DiT^DH of RAE (DiTs/.../stage2_model.pt)"
DECODER_MARK = "decoder_embed.weight"
DIT_DH_MARK = "s_embedder.proj.weight"
VARIANCE_EPS = 1e-5
# Averages of weights were taken of fixed tables too, which shifts them by what rounding leaves.
TABLE_TOLERANCE = 1e-3

# Heads of the published decoders by their width; no tensor tells.
DECODER_HEADS = {768: 12, 1024: 16, 1152: 16}
DIT_DH_HEAD_HEADS = 16

# Pairs of our spelling and theirs.
DECODER_NAMES = (
    (r"\.attention\.to_q\.", ".attention.attention.query."),
    (r"\.attention\.to_k\.", ".attention.attention.key."),
    (r"\.attention\.to_v\.", ".attention.attention.value."),
    (r"\.attention\.to_out\.0\.", ".attention.output.dense."),
)
DIT_DH_NAMES = (
    (r"^head_projection\.patches\.", "x_embedder.proj."),
    (r"^trunk_projection\.patches\.", "s_embedder.proj."),
    (r"^condition_projection\.", "s_projector."),
    (r"^time_embedding\.frequencies$", "t_embedder.W"),
    (r"^time_embedding\.mlp\.", "t_embedder.mlp."),
    (r"^class_embedding\.", "y_embedder.embedding_table."),
    (r"^norm_out\.", "final_layer.norm_final."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^modulation_out\.", "final_layer.adaLN_modulation.1."),
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn\.to_qkv\.", ".attn.qkv."),
    (r"\.attn\.to_out\.", ".attn.proj."),
    (r"\.mlp\.proj_in\.", ".mlp.w12."),
    (r"\.mlp\.proj_out\.", ".mlp.w3."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
)


def load_rae_checkpoint(
    encoder: str | Path | nn.Module,
    decoder: str | Path,
    statistics: str | Path | None = None,
    *,
    encoder_type: str = "dinov2",
    ema: bool = True,
    **config: Any,
) -> AutoencoderDecQ:
    """A published representation autoencoder from its parts, in evaluation mode.

    Args:
        encoder: what the ``from_pretrained`` of the encoder's class takes, or the model itself.
        decoder: the file ``model.pt``.
        statistics: the file ``stat.pt``; None leaves the latents as the encoder's norm makes them.
        encoder_type: "dinov2" (with registers), "siglip2" or "mae".
        ema: which weights of a file that holds the trained and the averaged ones.
        config: further fields of the autoencoder, e.g. ``noise_tau``; also ``decoder_num_attention_heads`` for a
            decoder that is none of the published sizes. No ``num_queries``: published files have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such files, or files that do not fit one another; queries.
    """
    _check_encoder_type(encoder_type)
    _refuse_queries(config, "load it without, and add them with AutoencoderDecQ.from_rae(rae, num_queries=...)")
    weights = network_weights(decoder, DECODER_MARK, DECODER_FILE, ema=ema)
    sizes = _decoder_sizes(weights, decoder)
    model = ENCODERS[encoder_type].load(encoder)
    pixels = sizes["decoder_position_range"] * int(cast(Any, model.config).patch_size)
    autoencoder = AutoencoderDecQ.from_encoder(
        model, encoder_type, **{**sizes, "encoder_input_size": pixels, **config, "num_queries": 0}
    )
    _fill_decoder(autoencoder, weights, decoder)
    if statistics is not None:
        load_rae_statistics(statistics, autoencoder)
    return autoencoder.eval()


def load_rae_decoder(path: str | Path, autoencoder: AutoencoderDecQ, *, ema: bool = True) -> AutoencoderDecQ:
    """Fill the decoder of a model without queries from a published file.

    Args:
        path: the file ``model.pt``.
        autoencoder: the model, of the file's sizes; it is returned.
        ema: which weights of a file that holds the trained and the averaged ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, one of other sizes, a model with queries.
    """
    _fill_decoder(autoencoder, network_weights(path, DECODER_MARK, DECODER_FILE, ema=ema), path)
    return autoencoder


def load_rae_statistics(path: str | Path, autoencoder: AutoencoderDecQ) -> AutoencoderDecQ:
    """Give a model the statistics of a published file; those of queries stay as they are.

    Args:
        path: the file ``stat.pt``, mean and variance of each number of a patch latent.
        autoencoder: the model; it is returned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one for other latents.
    """
    held = read_weights(path, STATISTICS_FILE)
    if not {"mean", "var"} <= held.keys():
        raise ValueError(f"{str(path)!r} holds {', '.join(sorted(held)) or 'nothing'}; expected {STATISTICS_FILE}")
    mean, variance = (held[name].double().reshape(held[name].shape[-3:]) for name in ("mean", "var"))
    if not bool((variance >= 0).all()):
        raise ValueError(f"{str(path)!r} has variances that are negative or no numbers; expected {STATISTICS_FILE}")
    std = (variance + VARIANCE_EPS).sqrt() - STD_EPS
    if not autoencoder.config["reshape_to_2d"]:
        mean, std = (values.flatten(1).T for values in (mean, std))
    autoencoder.set_latent_statistics(mean.float(), std.float())
    return autoencoder


def load_dit_dh_checkpoint(path: str | Path, *, ema: bool = True, **config: Any) -> DecQTransformer2DModel:
    """A published generator, in evaluation mode.

    Args:
        path: the file ``stage2_model.pt``: weights, or a state of training that holds them.
        ema: which weights of a file that holds the trained and the averaged ones.
        config: what tensors do not say: ``mlp_ratio`` if it is not 4, and ``num_attention_heads``,
            ``head_num_attention_heads`` and ``sample_size`` for files without rotary tables that have other sizes than
            the published ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; the message names the tensors that are missing, unknown or of another shape.
            Queries.
    """
    _refuse_queries(config, "for a generator with queries train a DecQTransformer2DModel(..., num_queries=...)")
    weights = network_weights(path, DIT_DH_MARK, DIT_DH_FILE, ema=ema)
    network = DecQTransformer2DModel(**{**_dit_dh_sizes(weights, path), **config, "num_queries": 0})
    named = dict(_dit_dh_names(network))
    tables = _dit_dh_tables(network)
    wanted = {theirs: network.state_dict()[ours] for ours, theirs in named.items()}
    # Their projections of latents are convolutions with a kernel of one pixel.
    held = {name: w.flatten(1) if name.endswith("embedder.proj.weight") else w for name, w in weights.items()}
    check_weights(held, wanted | {name: table for name, table in tables.items() if name in held}, path, DIT_DH_FILE)
    _check_tables(held, tables, path)
    network.load_state_dict({ours: held[theirs].float() for ours, theirs in named.items()})
    return network.eval()


def _refuse_queries(config: Mapping[str, Any], instead: str) -> None:
    if config.get("num_queries"):
        raise ValueError(f"num_queries is {config['num_queries']}, but published files have no queries; {instead}")


def _check_encoder_type(encoder_type: str) -> None:
    if encoder_type not in ENCODERS:
        raise ValueError(f"encoder_type is {encoder_type!r}; write one of {', '.join(ENCODERS)}")


def _fill_decoder(autoencoder: AutoencoderDecQ, weights: Mapping[str, Tensor], path: str | Path) -> None:
    if autoencoder.config["num_queries"]:
        raise ValueError(
            f"the model has {autoencoder.config['num_queries']} queries, of which a published decoder knows nothing; "
            "load it into a model with num_queries=0, and add queries with AutoencoderDecQ.from_rae(...)"
        )
    own = autoencoder.decoder.state_dict()
    named = {ours: _renamed(ours, DECODER_NAMES) for ours in own}
    tables = {"decoder_pos_embed": cast(Tensor, autoencoder.decoder.decoder_pos_embed)}
    check_weights(weights, {theirs: own[ours] for ours, theirs in named.items()} | tables, path, DECODER_FILE)
    _check_tables(weights, tables, path)
    autoencoder.decoder.load_state_dict({ours: weights[theirs].float() for ours, theirs in named.items()})


def _decoder_sizes(weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Fields of the autoencoder, as far as the decoder's tensors tell."""
    first = "decoder_layers.0.intermediate.dense.weight"
    _check_present(weights, ("decoder_pos_embed", "decoder_pred.weight", first), path, DECODER_FILE)
    width = len(weights[DECODER_MARK])
    grid = math.isqrt(weights["decoder_pos_embed"].shape[-2] - 1)
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": _count(weights, r"decoder_layers\.(\d+)\."),
        "decoder_intermediate_size": len(weights[first]),
        # Where the width is none of the published, the class has a default, and a caller knows better.
        **({"decoder_num_attention_heads": DECODER_HEADS[width]} if width in DECODER_HEADS else {}),
        "patch_size": math.isqrt(len(weights["decoder_pred.weight"]) // 3),
        "decoder_position_range": grid,
    }


def _dit_dh_sizes(weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Arguments of the network, as far as its tensors tell."""
    labels = "y_embedder.embedding_table.weight"
    _check_present(weights, ("x_embedder.proj.weight", labels, "blocks.0.norm1.weight"), path, DIT_DH_FILE)
    (width, channels), head_width = weights[DIT_DH_MARK].shape[:2], len(weights["x_embedder.proj.weight"])
    blocks = _count(weights, r"blocks\.(\d+)\.")
    norms = [weights.get(f"blocks.{index}.norm1.weight") for index in range(blocks)]
    in_trunk = sum(norm is not None and len(norm) == width for norm in norms)
    sizes: dict[str, Any] = {
        "in_channels": channels,
        "hidden_size": width,
        "num_layers": in_trunk,
        "num_attention_heads": {s["hidden_size"]: s["num_attention_heads"] for s in SIZES.values()}.get(width, 16),
        "head_hidden_size": head_width,
        "head_num_layers": blocks - in_trunk,
        "head_num_attention_heads": DIT_DH_HEAD_HEADS,
        "num_classes": len(weights[labels]) - 1,
    }
    for prefix, part, size in (("", "enc", width), ("head_", "dec", head_width)):
        table = weights.get(f"{part}_feat_rope.freqs_cos")
        if table is not None:
            sizes |= {f"{prefix}num_attention_heads": size // table.shape[1], "sample_size": math.isqrt(len(table))}
    if "pos_embed" in weights:
        sizes["sample_size"] = math.isqrt(weights["pos_embed"].shape[-2])
    return sizes


def _dit_dh_names(network: DecQTransformer2DModel) -> Iterator[tuple[str, str]]:
    """(our name, theirs) of each tensor; their blocks are one list, the head's behind the trunk's."""
    behind = len(network.transformer_blocks)
    for ours in network.state_dict():
        place = re.sub(r"^head_blocks\.(\d+)", lambda found: f"blocks.{behind + int(found[1])}", ours)
        yield ours, _renamed(place, DIT_DH_NAMES)


def _dit_dh_tables(network: DecQTransformer2DModel) -> dict[str, Tensor]:
    """What their files hold and this network computes."""
    config, device = network.config, torch.device("cpu")
    tables = {"pos_embed": cast(Tensor, network.positions)[None]}
    for prefix, part in (("", "enc"), ("head_", "dec")):
        head_dim = config[f"{prefix}hidden_size"] // config[f"{prefix}num_attention_heads"]
        cos, sin = rotary_tables(config["sample_size"], head_dim, config["rope_base"], device)
        tables |= {f"{part}_feat_rope.freqs_cos": cos, f"{part}_feat_rope.freqs_sin": sin}
    return tables


def _check_tables(weights: Mapping[str, Tensor], tables: Mapping[str, Tensor], path: str | Path) -> None:
    for name, table in tables.items():
        if name in weights and float((weights[name].float() - table).abs().max()) > TABLE_TOLERANCE:
            raise ValueError(
                f"{str(path)!r}: {name} is not the table that this model computes, so that its weights were trained "
                "for other positions"
            )


def _check_present(weights: Mapping[str, Tensor], names: tuple[str, ...], path: str | Path, expected: str) -> None:
    absent = [name for name in names if name not in weights]
    if absent:
        raise ValueError(f"{str(path)!r} holds other weights (missing {', '.join(absent)}); expected {expected}")


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in weights if (found := re.match(pattern, name))), default=-1)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in table:
        name = re.sub(ours, theirs, name)
    return name
