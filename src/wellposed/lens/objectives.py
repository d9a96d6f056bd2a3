r"""Pre-training of Lens: flow matching on captioned images of many sizes (arXiv 2605.21573).

    t = sigmoid(mu(n) + s xi),   x_t = (1 - t) z + t eps,   L = mean |v(x_t, t, c) - (eps - z)|^2,

with z the n normalised tokens of an image, c its caption's features, xi and eps standard normal, and
mu(n) = 1 + 0.3 (n - 256) / 3840: larger pictures are noisier for longer. Autoencoder and text encoder are frozen.

The paper says neither s (1 here, as in SD3) nor whether captions are dropped. Guidance needs a network that knows
images without text, so that one caption in ten is dropped; dropped means *no text tokens*, the only unconditional input
that inference uses, and not the encoding of an empty prompt.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wellposed.batches import TextImageBatch
from wellposed.lens.latents import SIDE, Autoencoder, encode_images
from wellposed.lens.text_encoder import TextFeatures
from wellposed.lens.transformer import LensTransformer2DModel, LensTransformerBlock
from wellposed.training import Objective, StepContext
from wellposed.training.metrics import ROWS, SUM

__all__ = [
    "NOISE_LEVELS",
    "PackedImages",
    "encoding",
    "freeze_unread",
    "loss_by_group",
    "text_to_image_objective",
    "training_flops",
    "training_mu",
    "training_times",
]

NOISE_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the ranges of t for which the loss is logged."""

ONCE_AN_IMAGE = ("img_mod", "txt_mod", "time_text_embed", "norm_out")
# What comes before all adapters: it reads images, text and times.
FIRST = (*ONCE_AN_IMAGE, "img_in", "txt_in", "blocks.0.attn.img_qkv", "blocks.0.attn.txt_qkv")

TextEncoder = Callable[[Sequence[str]], TextFeatures]


class PackedImages(NamedTuple):
    """Images of one size as the network sees them.

    Attributes:
        tokens: normalised, row by row.
        rows: of the grid.
        columns: of the grid.
    """

    tokens: Float[Tensor, "batch tokens packed"]
    rows: int
    columns: int


def training_mu(num_tokens: int) -> float:
    """mu(n), the mean of logit t: 1 at 256 tokens, 1.06 at 1024, 1.3 at 4096. It goes on beyond both ends.

    Args:
        num_tokens: n, image tokens.
    """
    return 1.0 + 0.3 * (num_tokens - 256) / 3840


def training_times(
    context: StepContext, num_tokens: int, *, std: float = 1.0, stratified: bool = True
) -> Float[Tensor, " rows"]:
    """Times of a share, logit-normal with mean mu(n); float64, on the CPU.

    Args:
        context: the share's.
        num_tokens: n, image tokens of its images.
        std: s, of logit t.
        stratified: spread the quantiles of xi evenly over the whole batch, whose shares may have other n; each is
            distributed as without.
    """
    quantile = context.uniform(stratified=stratified).clamp(1e-9, 1 - 1e-9)
    return torch.sigmoid(training_mu(num_tokens) + std * torch.special.ndtri(quantile))


def encoding(vae: Autoencoder, *, sample: bool = True) -> Callable[[TextImageBatch, StepContext], PackedImages]:
    """Tokens of a share's images, encoded as they come.

    Args:
        vae: the frozen autoencoder; it is moved to where the run is.
        sample: draw from the posterior; otherwise take its mode, as cached latents do.
    """
    side = SIDE * 2 ** (len(vae.config["block_out_channels"]) - 1)
    vae.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(batch: TextImageBatch, context: StepContext) -> PackedImages:
        nn.Module.to(vae, context.device)
        generators = context.generators if sample else None
        # Out of autocast: what is encoded is a function of the image and not of the run's precision.
        with torch.autocast(context.device.type, enabled=False):
            tokens = encode_images(vae, batch.images, sample=sample, generator=generators)
        height, width = batch.images.shape[2:]
        return PackedImages(tokens, height // side, width // side)

    return encode


def text_to_image_objective(
    images: Callable[[TextImageBatch, StepContext], PackedImages],
    text: TextEncoder,
    *,
    caption_dropout: float = 0.1,
    time_std: float = 1.0,
    stratified: bool = True,
    grids: Sequence[tuple[int, int]] = (),
) -> Objective:
    """Flow matching of a ``LensTransformer2DModel``.

    The loss of a share is its mean, times the weight that its batch bears. It is also logged by noise level and by
    grid, as ``loss_t0.25`` for rows with t in [0.25, 0.5), as ``loss_4x6`` for rows x columns of tokens, each without
    the weight and over the steps since the last line (:class:`wellposed.training.metrics.GroupLosses`).

    Args:
        images: (batch, context) -> tokens: :func:`encoding`, or one that reads them.
        text: captions -> features on any device, e.g. a ``LensTextEncoder``, or its ``FeatureCache``.
        caption_dropout: share of images that are learned without text.
        time_std: s.
        stratified: see :func:`training_times`.
        grids: token grids for which the loss is logged.

    Raises:
        ValueError: a share outside [0, 1), a standard deviation that is not positive.
    """
    if not 0 <= caption_dropout < 1 or not time_std > 0:
        raise ValueError(
            f"caption_dropout is {caption_dropout} and time_std {time_std}; give a share in [0, 1) and a positive "
            "number"
        )

    def objective(
        models: Mapping[str, nn.Module], batch: TextImageBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        z, rows, columns = images(batch, context)
        t = training_times(context, rows * columns, std=time_std, stratified=stratified)
        is_kept = context.uniform() >= caption_dropout
        with torch.no_grad():
            features = text(batch.captions).to(context.device)
        noise = context.normal(tuple(z.shape[1:]))
        level = t.to(z.device, torch.float32)[:, None, None]
        predicted = models[context.player](
            hidden_states=(1 - level) * z + level * noise,
            encoder_hidden_states=features.layers,
            encoder_hidden_states_mask=features.mask & is_kept.to(features.mask.device)[:, None],
            timestep=level.flatten(),
            img_shapes=[(1, rows, columns)] * len(z),
        ).sample
        losses = (predicted.float() - (noise - z)).square().mean((1, 2))
        found = losses.detach()
        metrics = {"unweighted": found.mean(), **_by_level(found, t), **_by_grid(found, (rows, columns), grids)}
        return batch.weight * losses.mean(), metrics

    return objective


def _by_level(losses: Float[Tensor, " rows"], t: Float[Tensor, " rows"]) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for low, high in pairwise(NOISE_LEVELS):
        inside = ((t >= low) & (t < high)).to(losses.device, losses.dtype)
        metrics |= _contribution(f"t{low:g}", losses, inside)
    return metrics


def _by_grid(
    losses: Float[Tensor, " rows"], grid: tuple[int, int], grids: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for rows, columns in grids:
        metrics |= _contribution(f"{rows}x{columns}", losses, torch.full_like(losses, (rows, columns) == grid))
    return metrics


def _contribution(group: str, losses: Tensor, inside: Tensor) -> dict[str, Tensor]:
    return {SUM + group: (losses * inside).mean(), ROWS + group: inside.mean()}


def loss_by_group(lines: Iterable[Mapping[str, float | int]], player: str) -> dict[str, float]:
    """Losses by noise level and by grid, each the mean over the lines of a ``metrics.jsonl`` that have it.

    Args:
        lines: any of them.
        player: the network's.
    """
    found: dict[str, list[float]] = defaultdict(list)
    start = f"{player}/loss_"
    for line in lines:
        for name in line:
            if name.startswith(start):
                found[name.removeprefix(start)].append(line[name])
    return {group: fmean(losses) for group, losses in found.items()}


def freeze_unread(network: LensTransformer2DModel) -> None:
    """Freeze what no loss can reach: the last block updates text that nothing reads any more.

    Its ``to_add_out``, ``txt_norm2`` and ``txt_mlp`` never have a gradient, which stops distributed engines and leaves
    optimizers without a state to resume. They stay in the checkpoint, as published. Other weights of that block's text
    (``norm_added_q``, the query third of ``txt_qkv``, four chunks of ``txt_mod``) share tensors with living ones and
    get zeros.
    """
    for part in _unread(network):
        part.requires_grad_(False)


def _unread(network: LensTransformer2DModel) -> tuple[nn.Module, ...]:
    last = cast(LensTransformerBlock, network.transformer_blocks[-1])
    return last.attn.to_add_out, last.txt_norm2, last.txt_mlp


def training_flops(network: LensTransformer2DModel, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one image in a step of training: forward and backward.

    Forward, two for each weight of a matrix and each token that meets it, and 4 S^2 d for the two products of each
    attention over S = image and text tokens. Norms and rotations, below a percent, are left out.

    A backward pass multiplies twice for each product: for the one factor's gradient and for the other's. Attention thus
    has three times the operations of its forward pass, whatever is trained, and so has a matrix that is trained. A
    frozen one has twice as many, or once where nothing that is trained comes before it, or nothing that is read after.

    Args:
        network: with frozen what is not trained.
        image_tokens: n.
        text_tokens: of one image.
    """
    unread = {module for part in _unread(network) for module in part.modules()}

    def passes(name: str, module: nn.Linear) -> int:
        if module.weight.requires_grad:
            return 3
        return 1 if module in unread or any(part in name for part in FIRST) else 2

    linear = _linear_flops(network, image_tokens, text_tokens, passes)
    return linear + 3 * _attention_flops(network, image_tokens, text_tokens)


def _linear_flops(
    network: LensTransformer2DModel, image_tokens: int, text_tokens: int, passes: Callable[[str, nn.Linear], int]
) -> float:
    once = by_image = by_text = 0
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weights = passes(name, module) * module.weight.numel()
        if any(part in name for part in ONCE_AN_IMAGE):
            once += weights
        elif "txt_" in name or "to_add_out" in name:
            by_text += weights
        else:
            by_image += weights
    return 2.0 * (once + by_image * image_tokens + by_text * text_tokens)


def _attention_flops(network: LensTransformer2DModel, image_tokens: int, text_tokens: int) -> float:
    width = network.config["num_attention_heads"] * network.config["attention_head_dim"]
    return 4.0 * (image_tokens + text_tokens) ** 2 * width * network.config["num_layers"]
