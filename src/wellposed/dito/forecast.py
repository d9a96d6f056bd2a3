"""What token reduction will do to a model, before it does it: FLOPs, speed-up, memory, and which setting to take.

Counted are matrix products and attention, a multiply-add as two operations. For a block of width d with plain layers,
N image tokens, T text tokens, L = N + T rows, of which Lq are queries and Lk keys,

    linear layers of attention 8 L d^2,   MLP 16 L d^2 (ratio 4; SwiGLU of ratio 3: 18),   attention 4 Lq Lk d.

The numbers of a model are read off its layers, so that it may lie on the meta device, without weights. They are a
ceiling: what is no product (norms, rotations, moving rows) takes time and counts nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn

from wellposed.dito.adapters import (
    BlockAdapter,
    DescribedBlock,
    Flux2Dual,
    Flux2Single,
    FluxDual,
    FluxSingle,
    HostBlock,
    JointBlock,
    PlainBlock,
    QwenBlock,
    ZImageBlock,
    find_blocks,
)
from wellposed.dito.config import Scope, TokenReductionConfig
from wellposed.dito.matching import TokenWindows, num_reduced_tokens
from wellposed.dito.schedule import FixedInterval

__all__ = [
    "BlockFlops",
    "Flops",
    "Forecast",
    "Recommendation",
    "SiteForecast",
    "StepCounts",
    "block_flops",
    "count_steps",
    "forecast",
    "interval_speed_up",
    "recommend",
]


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one call for one sample, as a function of its rows.

        query Q + key K + text T + fixed + image_pair Q K + joint_pair (Q + T)(K + T) + cross_pair Q T

    with Q image tokens as queries, K as keys and T text tokens. What a query row costs includes the MLP, which runs on
    the same rows.

    Attributes:
        query: of each image row in the layers that only queries need.
        key: of each image row in the projections to keys and values.
        text: of each text row.
        fixed: of the sample, whatever its length: modulation layers.
        image_pair: of a query and a key in attention among image tokens.
        joint_pair: of a query and a key in attention over text and image.
        cross_pair: of an image query and a text key in cross-attention.
    """

    query: int = 0
    key: int = 0
    text: int = 0
    fixed: int = 0
    image_pair: int = 0
    joint_pair: int = 0
    cross_pair: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            query=self.query + other.query,
            key=self.key + other.key,
            text=self.text + other.text,
            fixed=self.fixed + other.fixed,
            image_pair=self.image_pair + other.image_pair,
            joint_pair=self.joint_pair + other.joint_pair,
            cross_pair=self.cross_pair + other.cross_pair,
        )

    def linear(self, queries: int, keys: int, text: int) -> int:
        """Of the linear layers."""
        return self.query * queries + self.key * keys + self.text * text + self.fixed

    def attention(self, queries: int, keys: int, text: int) -> int:
        """Of the products of queries, keys and values."""
        joint = (queries + text) * (keys + text)
        return self.image_pair * queries * keys + self.joint_pair * joint + self.cross_pair * queries * text

    def total(self, queries: int, keys: int, text: int) -> int:
        """Of both."""
        return self.linear(queries, keys, text) + self.attention(queries, keys, text)


@dataclass(frozen=True, kw_only=True)
class BlockFlops:
    """A transformer block, with what the scope "attn" reduces apart from what it leaves.

    Attributes:
        attentions: the self-attention modules by their name.
        rest: the MLP, cross-attention, modulation, and output layers that lie outside the attention module.
    """

    attentions: dict[str, Flops]
    rest: Flops

    @classmethod
    def plain(cls, width: int, *, mlp: float = 16.0) -> "BlockFlops":
        """Joint attention of square layers and an MLP of ``mlp * width**2`` FLOPs a row: the model of the docstring."""
        per_row = 4 * width**2
        attention = Flops(query=per_row, key=per_row, text=2 * per_row, joint_pair=4 * width)
        return cls(attentions={"attn": attention}, rest=Flops(query=round(mlp * width**2), text=round(mlp * width**2)))

    @property
    def whole(self) -> Flops:
        """All of it."""
        return sum(self.attentions.values(), self.rest)

    def total(self, num_image: int, num_text: int, *, kept: int | None = None, scope: Scope, keep_kv: bool) -> int:
        """FLOPs for one sample with ``kept`` of the image tokens; dense if None."""
        if kept is None:
            return self.whole.total(num_image, num_image, num_text)
        keys = num_image if keep_kv else kept
        if scope == "block":
            return self.whole.total(kept, keys, num_text)
        reduced = sum(attention.total(kept, keys, num_text) for attention in self.attentions.values())
        return reduced + self.rest.total(num_image, num_image, num_text)


def interval_speed_up(dense: int, reduced: int, interval: int) -> float:
    """Speed-up of one dense step and ``interval - 1`` reduced ones over as many dense steps."""
    return interval * dense / (dense + (interval - 1) * reduced)


def block_flops(host: HostBlock) -> BlockFlops:
    """Of a block of a host, from the sizes of its layers."""
    attentions = {name.rpartition(".")[2]: module for name, module in host.attentions()}
    counted = dict.fromkeys(attentions, Flops())
    rest = Flops()
    for name, layer in host.module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        part = name.partition(".")[0]
        flops = _of_block_layer(name.split("."), layer, host)
        if part in counted:
            counted[part] += flops
        else:
            rest += flops
    for name, attention in attentions.items():
        joint = not isinstance(host.adapter, PlainBlock) and name != "attn2"
        pair = 4 * int(getattr(attention, "inner_dim"))  # noqa: B009  (modules promise tensors only)
        counted[name] += Flops(joint_pair=pair) if joint else Flops(image_pair=pair)
    if isinstance(host.adapter, PlainBlock) and (cross := getattr(host.module, "attn2", None)) is not None:
        rest += Flops(cross_pair=4 * cross.inner_dim)
    return BlockFlops(attentions=counted, rest=rest)


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """How many steps of a generation are of which kind.

    Attributes:
        dense: dense steps that match nothing: the warm-up but its last, and those at the end.
        match: Matching steps, dense too.
        reduce: Reduction steps.
    """

    dense: int
    match: int
    reduce: int


def count_steps(config: TokenReductionConfig, num_inference_steps: int) -> StepCounts:
    """The steps that ``config`` makes of a generation.

    A schedule that decides while it runs is counted as if nothing had been measured, ``ratio_by_pmr`` as if every step
    reduced the full ratio.
    """
    counts = {"dense": 0, "match": 0, "reduce": 0}
    last = None
    for step in range(num_inference_steps):
        at_the_end = step >= max(config.warmup_steps, num_inference_steps - config.end_dense_steps)
        if step < config.warmup_steps - 1 or at_the_end:
            counts["dense"] += 1
        elif _is_matching(config, step, last):
            counts["match"] += 1
            last = step
        else:
            counts["reduce"] += 1
    return StepCounts(**counts)


@dataclass(frozen=True, kw_only=True)
class SiteForecast:
    """One module whose tokens are reduced. FLOPs and bytes are those of the whole batch.

    Attributes:
        name: of the module.
        num_tokens: image tokens N.
        num_reduced: of which a Reduction step does not compute these.
        dense_flops: of a dense call.
        reduced_flops: of a call in a Reduction step.
        matching_flops: of the similarities of one match.
        plan_bytes: of the indices: which rows to keep, which to drop, and where every row is recovered from.
        offset_bytes: of what recovery keeps of outputs: with "delta" a row for each dropped token, with "linear" two,
            and one for each row of the sequence.
    """

    name: str
    num_tokens: int
    num_reduced: int
    dense_flops: int
    reduced_flops: int
    matching_flops: int
    plan_bytes: int
    offset_bytes: int

    @property
    def speed_up(self) -> float:
        """Of the module in a Reduction step, by FLOPs."""
        return self.dense_flops / self.reduced_flops


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a configuration means for a model and a size of picture; ``str()`` is a table.

    Speed-ups are ratios of FLOPs. Where attention runs at a lower rate than matrix products (CPUs) time gains more than
    that, where small calls leave a GPU idle it gains less.

    Attributes:
        model: name of the transformer's class.
        config: the settings.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        num_text: text tokens T.
        batch_size: samples in one call.
        num_inference_steps: of the generation.
        steps: how many are dense, Matching and Reduction steps.
        sites: the modules that are reduced.
        outside_flops: FLOPs of a call that no site contains, dense at every step.
        num_contexts: calls of the model a step with plans of their own: 2 where guidance calls it twice.
    """

    model: str
    config: TokenReductionConfig
    height: int
    width: int
    num_text: int
    batch_size: int
    num_inference_steps: int
    steps: StepCounts
    sites: tuple[SiteForecast, ...]
    outside_flops: int
    num_contexts: int = 1

    @property
    def dense_flops(self) -> int:
        """Of one dense call of the model."""
        return self.outside_flops + sum(site.dense_flops for site in self.sites)

    @property
    def reduced_flops(self) -> int:
        """Of one call in a Reduction step, with its matching where every step matches."""
        reduced = self.outside_flops + sum(site.reduced_flops for site in self.sites)
        return reduced + self.matching_flops if self.config.rematch else reduced

    @property
    def matching_flops(self) -> int:
        """Of matching once at every site; twice where the schedule measures the pairs that it replaces."""
        schedule = self.config.schedule
        times = 2 if self.config.ratio_by_pmr is not None or (schedule is not None and schedule.measures) else 1
        return times * sum(site.matching_flops for site in self.sites)

    @property
    def outside_share(self) -> float:
        """Share of a dense call's FLOPs outside the sites, which bounds any speed-up by its inverse."""
        return self.outside_flops / self.dense_flops

    @property
    def step_speed_up(self) -> float:
        """Of a Reduction step over a dense one."""
        return self.dense_flops / self.reduced_flops

    @property
    def speed_up(self) -> float:
        """Of the whole generation, dense and Matching steps included."""
        steps = self.steps
        # With rematch no pairs outlive the step that they were chosen in, and dense steps choose none.
        matching = 0 if self.config.rematch else steps.match * self.matching_flops
        spent = (steps.dense + steps.match) * self.dense_flops + matching
        return self.num_inference_steps * self.dense_flops / (spent + steps.reduce * self.reduced_flops)

    @property
    def plan_bytes(self) -> int:
        """Of the correspondences of all sites."""
        return self.num_contexts * sum(site.plan_bytes for site in self.sites)

    @property
    def offset_bytes(self) -> int:
        """Of what recovery keeps of outputs, all sites together; 0 with "copy"."""
        return self.num_contexts * sum(site.offset_bytes for site in self.sites)

    def __str__(self) -> str:
        config, steps = self.config, self.steps
        tokens = self.sites[0].num_tokens if self.sites else 0
        unit, name = (1e12, "TFLOP") if self.dense_flops >= 1e12 else (1e9, "GFLOP")
        kv = "keys and values dense" if config.keep_kv else "keys and values reduced"
        lines = [
            f"{self.model}, {self.height} x {self.width} px: {tokens} image and {self.num_text} text tokens, "
            f"batch {self.batch_size}, {self.num_inference_steps} steps",
            f'ratio {config.ratio:g}, scope "{config.scope}", {kv}, {config.recovery} recovery',
            "",
            f"{'sites':44}{'tokens':>14}{name:>9}{'reduced':>9}{'speed-up':>10}",
        ]
        lines += [_site_line(sites, unit) for sites in _runs(self.sites)]
        outside = self.outside_flops / unit
        lines += [
            f"{'outside the sites':44}{'':14}{outside:9.3f}{outside:9.3f}  ({self.outside_share:.0%} of a dense call)",
            "",
            f"steps     {steps.match} Matching (dense), {steps.reduce} Reduction, {steps.dense} other dense",
            f"speed-up  {self.step_speed_up:.2f}x in a Reduction step, {self.speed_up:.2f}x over all steps (by FLOPs)",
            f"matching  {self.matching_flops / self.dense_flops:.2%} of a dense call, when it is done",
            f"memory    {_readable(self.plan_bytes)} of plans, {_readable(self.offset_bytes)} of earlier outputs",
        ]
        return "\n".join(lines)


def forecast(
    transformer: nn.Module,
    config: TokenReductionConfig,
    *,
    height: int,
    width: int,
    text_tokens: int | None = None,
    batch_size: int = 1,
    num_inference_steps: int = 28,
    num_contexts: int = 1,
    vae_scale_factor: int = 8,
) -> Forecast:
    """What ``config`` will do to ``transformer``: nothing is run and no weight is read.

    Args:
        transformer: a supported transformer of diffusers; its weights may be on the meta device.
        config: the settings.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        text_tokens: rows of the prompt's embedding; None for what the model's own pipeline pads prompts to, or 128
            where it pads to the longest prompt.
        batch_size: samples in one call of the model: twice the pictures where guidance is batched.
        num_inference_steps: of the generation.
        num_contexts: calls of the model a step with plans of their own: 2 where guidance calls it twice.
        vae_scale_factor: pixels to a side of one latent.

    Raises:
        ValueError: an unsupported model, sizes or counts out of range, or a window that does not fit.
    """
    if min(batch_size, num_inference_steps, num_contexts, vae_scale_factor) < 1 or (text_tokens or 0) < 0:
        raise ValueError(
            f"batch_size is {batch_size}, num_inference_steps {num_inference_steps}, num_contexts {num_contexts}, "
            f"vae_scale_factor {vae_scale_factor} and text_tokens {text_tokens}; all are counts, and only text_tokens "
            "may be 0"
        )
    blocks = find_blocks(transformer)
    adapter = blocks[0].adapter
    rows, columns = _grid(transformer, adapter, height, width, vae_scale_factor)
    num_tokens = rows * columns
    num_text = _usual_text_tokens(blocks[0]) if text_tokens is None else text_tokens
    # Z-Image pads both parts of its sequence to whole tiles; what is padding is no image token and stays.
    padded_image, padded_text = num_tokens, num_text
    if isinstance(adapter, ZImageBlock):
        padded_image, padded_text = (-(-count // 32) * 32 for count in (num_tokens, num_text))
    others = padded_text + padded_image - num_tokens
    windows = TokenWindows.of_coordinates(
        torch.cartesian_prod(torch.arange(rows), torch.arange(columns)), config.window
    )
    element_bytes = _dtype(transformer).itemsize
    outside = _outside_flops(transformer, blocks, padded_image, padded_text)
    sites: list[SiteForecast] = []
    for host in blocks:
        counted = block_flops(host)
        if config.scope == "block":
            modules = {host.name: counted.whole}
        else:
            modules = {f"{host.name}.{name}": flops for name, flops in counted.attentions.items()}
            outside += counted.rest.total(num_tokens, num_tokens, others)
        channels = _channels(host)
        length = num_tokens + (others if _has_text_inside(host.adapter, config.scope) else 0)
        for name, flops in modules.items():
            # Rows that a matrix product works on beside the image's: none where the text is only attended to.
            beside = others if flops.joint_pair else 0
            num_reduced = num_reduced_tokens(
                num_tokens, windows.num_sources, beside, config.ratio_of(host.name), config.round_to
            )
            dense = flops.total(num_tokens, num_tokens, others)
            if num_reduced == 0:
                outside += dense
                continue
            kept = num_tokens - num_reduced
            sites.append(
                SiteForecast(
                    name=name,
                    num_tokens=num_tokens,
                    num_reduced=num_reduced,
                    dense_flops=batch_size * dense,
                    reduced_flops=batch_size * flops.total(kept, num_tokens if config.keep_kv else kept, others),
                    # Of every source with every destination, and with their mean.
                    matching_flops=batch_size * 2 * windows.num_sources * (windows.num_windows + 1) * channels,
                    plan_bytes=batch_size * _plan_bytes(num_tokens, num_reduced, length),
                    offset_bytes=batch_size * element_bytes * channels * _kept_rows(config, num_reduced, length),
                )
            )
    return Forecast(
        model=type(transformer).__name__,
        config=config,
        height=height,
        width=width,
        num_text=num_text,
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        steps=count_steps(config, num_inference_steps),
        sites=tuple(sites),
        outside_flops=batch_size * outside,
        num_contexts=num_contexts,
    )


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A configuration, and why; ``str()`` says it all.

    Attributes:
        config: the settings.
        advised: whether to use token reduction here at all.
        reasons: one sentence each.
        forecast: what the settings do.
    """

    config: TokenReductionConfig
    advised: bool
    reasons: tuple[str, ...]
    forecast: Forecast = field(repr=False)

    def __str__(self) -> str:
        verdict = "Recommended:" if self.advised else "Advised against; if you do it nevertheless:"
        return "\n".join([verdict, *(f"  - {reason}" for reason in self.reasons), "", str(self.forecast)])


# Rules of thumb, not measurements.
FEW_STEPS = 8  # up to here neighbouring steps differ too much for an interval of four, or to skip some instead
LITTLE_GAIN = 1.1  # speed-up by FLOPs, of which time gains less
FEW_ROWS = 1024  # of a call, in batch and sequence together


def recommend(
    transformer: nn.Module,
    *,
    height: int,
    width: int,
    ratio: float = 0.5,
    text_tokens: int | None = None,
    batch_size: int = 1,
    num_inference_steps: int = 28,
    num_contexts: int = 1,
    vae_scale_factor: int = 8,
    memory_limit: int | None = None,
) -> Recommendation:
    """A setting for this model and this size of picture. The rules and their thresholds are ours.

    Whole blocks with dense keys and values: attention alone leaves the MLP, which is most of a wide model. One Matching
    step in four, in two for models of few steps, which also have no dense step to spare at the end. A recovery that
    keeps less, if what it keeps of earlier outputs does not fit. Advised against where little is gained by FLOPs, or
    the sequence is so short that a GPU is not busy anyway.

    Args:
        ratio: share of the image tokens to drop.
        memory_limit: bytes that recovery may keep of earlier outputs; None for no limit.
        transformer: as all others, see :func:`forecast`.

    Raises:
        ValueError: as :func:`forecast`; a ratio of 0.
    """
    if ratio == 0:
        raise ValueError("a ratio of 0 reduces nothing, so there is nothing to recommend; choose one in (0, 0.75]")

    def look(**changes: Any) -> Forecast:
        return forecast(
            transformer,
            TokenReductionConfig(ratio=ratio, **changes),
            height=height,
            width=width,
            text_tokens=text_tokens,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            num_contexts=num_contexts,
            vae_scale_factor=vae_scale_factor,
        )

    few = num_inference_steps <= FEW_STEPS
    changes: dict[str, Any] = {"scope": "block"}
    if few:
        changes |= {"schedule": FixedInterval(interval=2), "end_dense_steps": 0}
    chosen = look(**changes)
    attention = look(**{**changes, "scope": "attn"})
    reasons = [
        f'scope "block": a Reduction step has a ceiling of {chosen.step_speed_up:.2f}x with the MLP and of '
        f"{attention.step_speed_up:.2f}x without; {attention.outside_share:.0%} of the model lie outside attention"
    ]
    if few:
        reasons.append(f"one Matching step in two, and none dense at the end: of {num_inference_steps} each one counts")
    else:
        reasons.append(
            f"with {num_inference_steps} steps, try fewer steps or a cache (FirstBlockCache) first: where neighbouring "
            "steps are alike, skipping some costs less than reducing all; token reduction then stacks on top"
        )
    for recovery in ("delta", "copy"):
        if memory_limit is None or chosen.offset_bytes <= memory_limit:
            break
        if chosen.config.recovery == recovery:
            continue
        reasons.append(
            f'{recovery} recovery: "{chosen.config.recovery}" keeps {_readable(chosen.offset_bytes)} of earlier '
            f"outputs, more than the limit of {_readable(memory_limit)}"
        )
        chosen = look(**changes, recovery=recovery)
    if chosen.offset_bytes:
        reasons.append(f"{chosen.config.recovery} recovery, which keeps {_readable(chosen.offset_bytes)}")
    advised = True
    if chosen.speed_up < LITTLE_GAIN:
        advised = False
        dense = chosen.steps.dense + chosen.steps.match
        reasons.append(
            f"but {dense} of {num_inference_steps} steps are dense, which leaves {chosen.speed_up:.2f}x over all"
        )
    num_rows = chosen.num_text + (chosen.sites[0].num_tokens if chosen.sites else 0)
    if batch_size * num_rows < FEW_ROWS:
        advised = False
        reasons.append(
            f"but {batch_size * num_rows} rows are few: shorter calls leave a GPU idle rather than finish earlier"
        )
    return Recommendation(config=chosen.config, advised=advised, reasons=tuple(reasons), forecast=chosen)


_QUERY_LAYERS = {"to_q", "to_out", "ff", "img_mlp", "feed_forward", "proj_mlp", "proj_out"}
_KEY_LAYERS = {"to_k", "to_v"}
_TEXT_LAYERS = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "txt_mlp"}
# fuse_qkv_projections adds these beside the layers that they replace.
_DUPLICATE_LAYERS = {"to_qkv", "to_added_qkv", "to_kv"}
_SINGLE_STREAM = (FluxSingle, Flux2Single, ZImageBlock)

_IMAGE_LAYERS = {"x_embedder", "img_in", "pos_embed", "proj_out", "proj_out_2", "all_x_embedder"}
_PROMPT_LAYERS = {"context_embedder", "txt_in", "caption_projection", "cap_embedder"}


def _channels(host: HostBlock) -> int:
    """Of the image stream."""
    attention: Any = host.attentions()[0][1]
    if isinstance(host.adapter, DescribedBlock):
        return int(getattr(attention, host.adapter.layout.image_qkv).in_features)
    return int(attention.query_dim)


def _of_block_layer(path: Sequence[str], layer: nn.Linear, host: HostBlock) -> Flops:
    """Adapters and quantised layers lie below the layer that they belong to, so that any part of the path counts."""
    names = set(path)
    each = 2 * layer.in_features * layer.out_features
    in_text = isinstance(host.adapter, _SINGLE_STREAM)
    cross = isinstance(host.adapter, PlainBlock) and path[0] == "attn2"
    if "to_qkv_mlp_proj" in names:
        inner = int(getattr(host.attentions()[0][1], "inner_dim"))  # noqa: B009
        key = each * 2 * inner // layer.out_features
        return Flops(query=each - key, key=key, text=each)
    if isinstance(host.adapter, DescribedBlock):
        if host.adapter.layout.image_qkv in names:
            return Flops(query=each // 3, key=each - each // 3)
        if host.adapter.layout.text_qkv in names:
            return Flops(text=each)
    if names & _DUPLICATE_LAYERS:
        return Flops()
    if names & _QUERY_LAYERS:
        return Flops(query=each, text=each if in_text else 0)
    if names & _KEY_LAYERS and not cross:
        return Flops(key=each, text=each if in_text else 0)
    if names & _TEXT_LAYERS or names & _KEY_LAYERS:
        return Flops(text=each)
    return Flops(fixed=each)


def _outside_flops(transformer: nn.Module, blocks: Sequence[HostBlock], num_image: int, num_text: int) -> int:
    """Embeddings, output layers, refiners and conditioning, for one sample."""
    inside = {host.name for host in blocks}
    total = 0
    for name, module in transformer.named_modules():
        path = name.split(".")
        if ".".join(path[:2]) in inside:
            continue
        if "refiner" in path[0]:
            if len(path) == 2:
                rows = num_image if path[0] == "noise_refiner" else num_text
                refiner = block_flops(HostBlock(name, module, blocks[0].adapter))
                total += refiner.whole.total(rows, rows, 0)
            continue
        if isinstance(module, nn.Linear):
            each = 2 * module.in_features * module.out_features
        elif isinstance(module, nn.Conv2d):
            each = 2 * module.in_channels * module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        else:
            continue
        if path[0] in _IMAGE_LAYERS:
            total += each * num_image
        elif path[0] in _PROMPT_LAYERS:
            total += each * num_text
        elif path[0] == "all_final_layer" and path[-1] == "linear":  # Z-Image's sees the text too
            total += each * (num_image + num_text)
        else:
            total += each
    return total


def _grid(
    transformer: nn.Module, adapter: BlockAdapter, height: int, width: int, vae_scale_factor: int
) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    settings: Any = getattr(transformer, "config", None)
    if isinstance(adapter, FluxDual | FluxSingle | Flux2Dual | Flux2Single | QwenBlock):
        patch = 2  # the pipelines pack latents before the model sees them, whatever its patch_size says
    elif isinstance(adapter, ZImageBlock):
        patch = int(settings.all_patch_size[0])
    else:
        patch = getattr(settings, "patch_size", None)
        if not isinstance(patch, int):
            raise ValueError(
                f"config.patch_size of {type(transformer).__name__} is {patch!r}, so that a picture's tokens cannot be "
                "counted; expected a number, latents to a side of a token"
            )
    side = vae_scale_factor * patch
    if min(height, width) < side:
        raise ValueError(f"{height} x {width} px; a token is {side} px wide, so both sides take at least that")
    return height // side, width // side


def _usual_text_tokens(host: HostBlock) -> int:
    match host.adapter:
        case FluxDual() | FluxSingle() | Flux2Dual() | Flux2Single():
            return 512
        case JointBlock():
            return 77 + 256  # CLIP's and T5's
        case PlainBlock():
            return 300 if getattr(host.module, "attn2", None) is not None else 0
        case _:
            return 128


def _has_text_inside(adapter: BlockAdapter, scope: Scope) -> bool:
    """Whether the rows that a site reduces have text among them, which is kept."""
    return isinstance(adapter, _SINGLE_STREAM) and not (scope == "block" and isinstance(adapter, FluxSingle))


def _plan_bytes(num_tokens: int, num_reduced: int, length: int) -> int:
    """Of one sample: int64 of the image, and of the sequence where it is longer; int32 rows of the flattened batch."""
    keep_drop_recover = 2 * num_tokens + (2 * length if length > num_tokens else 0)
    return 8 * keep_drop_recover + 4 * (2 * length + num_reduced)


def _kept_rows(config: TokenReductionConfig, num_reduced: int, length: int) -> int:
    """Rows of earlier outputs, from the second Matching step on."""
    match config.recovery:
        case "copy":
            return 0
        case "delta":
            return num_reduced
        case "linear":
            return 2 * num_reduced + length


def _dtype(transformer: nn.Module) -> torch.dtype:
    return next((p.dtype for p in transformer.parameters() if p.is_floating_point()), torch.float32)


def _is_matching(config: TokenReductionConfig, step: int, last: int | None) -> bool:
    if step < config.warmup_steps:
        return True
    return config.schedule is not None and config.schedule.is_matching(step, -1 if last is None else last, ())


def _runs(sites: Sequence[SiteForecast]) -> list[list[SiteForecast]]:
    """Neighbours that cost the same, so that a table has a line for them together."""

    def kind(site: SiteForecast) -> tuple[Any, ...]:
        stem = "".join(character for character in site.name if not character.isdigit())
        return stem, site.num_reduced, site.dense_flops, site.reduced_flops

    return [list(group) for _, group in groupby(sites, kind)]


def _site_line(sites: Sequence[SiteForecast], unit: float) -> str:
    first = sites[0]
    name = first.name if len(sites) == 1 else f"{len(sites)} x {first.name} ..."
    tokens = f"{first.num_tokens} -> {first.num_tokens - first.num_reduced}"
    dense = sum(site.dense_flops for site in sites) / unit
    reduced = sum(site.reduced_flops for site in sites) / unit
    return f"{name:44}{tokens:>14}{dense:9.3f}{reduced:9.3f}{first.speed_up:9.2f}x"


def _readable(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"
