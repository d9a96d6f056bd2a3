r"""What queries take from each tapped layer, where they look, and what images have in common by them.

Taps work in series: a tap's condenser moves the queries by D_l = Q_{l+1} - Q_l = A_l + F_l, of which its attention
writes A_l and its FFN F_l. Four numbers say what a tap does:

* its share of the movement, |D_l| / sum |D|, averaged over queries and images;
* the attention's part of what it writes, |A_l| / (|A_l| + |F_l|), of norms that are averaged likewise: how much it
  takes from this layer, and does not make of what the queries have already;
* how much of the image its attention covers: exp(entropy) / number of tokens, 1 for all alike, 1/N for a single one;
* its share of the reconstruction: the error that leaving its condenser out adds, over the sum of those of all taps. The
  queries of the taps behind it then start from what the taps before it left.

On the other side, the mass of the decoder's attention on queries says how much each of its blocks reads of them.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.condenser import Condenser
from wellposed.decq.encoders import EncodedTokens
from wellposed.decq.objectives import check_same_size

__all__ = ["TapReport", "attention_maps", "decoder_attention", "tap_report"]

SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class TapReport:
    """One entry for each tap, in their order.

    Attributes:
        layers: tapped layers.
        movement: share of the movement of the queries; sums to 1.
        attention: the attention's part of what the tap writes; 0 for a tap that writes nothing.
        coverage: share of the tokens that the attention is spread over.
        error: mean squared error of reconstructions without its condenser, over that with all.
        reconstruction: its share of what leaving out adds; sums to 1, 0 for a tap that does not help.
    """

    layers: tuple[int, ...]
    movement: tuple[float, ...]
    attention: tuple[float, ...]
    coverage: tuple[float, ...]
    error: tuple[float, ...]
    reconstruction: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


@torch.no_grad()
def tap_report(autoencoder: AutoencoderDecQ, images: Float[Tensor, "batch channels height width"]) -> TapReport:
    """Of some images in [0, 1].

    Raises:
        ValueError: an autoencoder without queries, or in training mode; images of another size than it makes.
    """
    if autoencoder.training:
        raise ValueError("the autoencoder is in training mode and would add noise; call eval() first")
    encoded = _encoded(autoencoder, images)
    patches, tapped = autoencoder.patch_tokens(encoded), autoencoder.tapped(encoded)
    moved: list[Tensor] = []
    attended: list[Tensor] = []
    covered: list[Tensor] = []
    queries = _start(autoencoder, tapped)
    for condenser, tokens in _condensers(autoencoder, tapped):
        weights = condenser.attention(queries, tokens)
        entropy = -(weights * weights.clamp_min(SMALLEST).log()).sum(-1)
        after = condenser(queries, tokens)
        by_attention = condenser.attn(condenser.norm_queries(queries), condenser.norm_tokens(tokens))
        moved.append((after - queries).norm(dim=-1).mean())
        attended.append(_part(by_attention, after - queries - by_attention))
        covered.append((entropy.exp() / weights.shape[-1]).mean())
        queries = after
    decoded = [
        autoencoder.decode(*autoencoder.as_latents(patches, _without(autoencoder, tapped, tap)), return_dict=False)[0]
        for tap in (None, *range(len(tapped)))
    ]
    check_same_size(decoded[0], images)
    errors = torch.stack([functional.mse_loss(one, images) for one in decoded])
    added = (errors[1:] - errors[0]).clamp_min(0)
    movement = torch.stack(moved)
    return TapReport(
        layers=_layers(autoencoder),
        movement=tuple((movement / movement.sum().clamp_min(SMALLEST)).tolist()),
        attention=tuple(torch.stack(attended).tolist()),
        coverage=tuple(torch.stack(covered).tolist()),
        error=tuple((errors[1:] / errors[0]).tolist()),
        reconstruction=tuple((added / added.sum().clamp_min(SMALLEST)).tolist()),
    )


@torch.no_grad()
def attention_maps(
    autoencoder: AutoencoderDecQ, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "taps batch queries rows columns"]:
    """Where each query looks at each tap, mean over heads; a map sums to 1 where queries read patches only.

    Raises:
        ValueError: an autoencoder without queries.
    """
    tapped = autoencoder.tapped(_encoded(autoencoder, images))
    maps: list[Tensor] = []
    queries = _start(autoencoder, tapped)
    for condenser, tokens in _condensers(autoencoder, tapped):
        weights = condenser.attention(queries, tokens).mean(1)
        patches = weights[..., -(autoencoder.grid**2) :]  # behind class and registers, if those are read
        maps.append(patches.unflatten(-1, (autoencoder.grid, autoencoder.grid)))
        queries = condenser(queries, tokens)
    return torch.stack(maps)


@torch.no_grad()
def decoder_attention(
    autoencoder: AutoencoderDecQ, images: Float[Tensor, "batch channels height width"]
) -> tuple[float, ...]:
    """Of each block of the decoder: the share of the patches' attention that falls on queries.

    Mean over images, heads and patches; K / (1 + patches + K) for a block to which all tokens are alike.

    Raises:
        ValueError: an autoencoder without query tokens, or in training mode.
    """
    if autoencoder.training:
        raise ValueError("the autoencoder is in training mode and would add noise; call eval() first")
    count = autoencoder.num_query_tokens
    if not count:
        raise ValueError("this autoencoder's decoder reads no query tokens; give one with num_queries > 0 as tokens")
    masses: list[float] = []

    def measure(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        masses.append(_mass_on_last(attention, inputs[0], count))

    with ExitStack() as stack:
        for block in autoencoder.decoder.decoder_layers:
            attention = cast(Any, block).attention
            stack.callback(attention.register_forward_pre_hook(measure).remove)
        autoencoder.decode(*autoencoder.encode(images, return_dict=False), return_dict=False)
    return tuple(masses)


def _mass_on_last(attention: Any, tokens: Tensor, count: int) -> float:
    """Attention that the patches, between the class and the last ``count`` tokens, pay to those."""
    query, key = (attention.head_to_batch_dim(part(tokens)) for part in (attention.to_q, attention.to_k))
    weights = attention.get_attention_scores(query, key)
    return float(weights[:, 1:-count, -count:].sum(-1).mean())


def _part(one: Tensor, other: Tensor) -> Tensor:
    """Of the norms of both, that of the first."""
    mine, others = (written.norm(dim=-1).mean() for written in (one, other))
    return mine / (mine + others).clamp_min(SMALLEST)


def _without(autoencoder: AutoencoderDecQ, tapped: list[Tensor], tap: int | None) -> Tensor:
    """What the condensers leave, one tap left out."""
    assert autoencoder.condensers is not None
    queries = _start(autoencoder, tapped)
    for number, (condenser, tokens) in enumerate(_condensers(autoencoder, tapped)):
        if number != tap:
            queries = condenser(queries, tokens)
    return autoencoder.condensers.finish(queries)


def _encoded(autoencoder: AutoencoderDecQ, images: Tensor) -> EncodedTokens:
    if autoencoder.condensers is None:
        raise ValueError("this autoencoder has no queries, and so no taps; give one with num_queries > 0")
    return autoencoder.encoder_tokens(images)


def _start(autoencoder: AutoencoderDecQ, tapped: list[Tensor]) -> Tensor:
    assert autoencoder.condensers is not None
    return autoencoder.condensers.start(tapped[0])


def _condensers(autoencoder: AutoencoderDecQ, tapped: list[Tensor]) -> Iterator[tuple[Condenser, Tensor]]:
    assert autoencoder.condensers is not None
    for condenser, tokens in zip(autoencoder.condensers.condensers, tapped, strict=True):
        assert isinstance(condenser, Condenser)
        yield condenser, tokens


def _layers(autoencoder: AutoencoderDecQ) -> tuple[int, ...]:
    assert autoencoder.condensers is not None
    return autoencoder.condensers.layers
