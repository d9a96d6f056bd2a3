"""Token reduction, what it replaces and what else makes a transformer faster, on one model.

A contender is a name and a way to sample: with a reduction of tokens, with fewer steps, behind a cache of the first
block, or with several of these. ``compare`` draws the images of each from the same noise and measures them against
those of the model as it is; ``compare_speed`` measures what is gained, ``compare_penalties`` what a frequency penalty
does. The demo and ``benchmarks/dito_quality.py`` are calls of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from wellposed.dito.adapters import find_blocks
from wellposed.dito.baselines import RandomMatcher, random_pairs, sito, tofu, toma, tomesd
from wellposed.dito.config import Scope, TokenReductionConfig
from wellposed.dito.hooks import TokenReduction, token_reduction
from wellposed.dito.schedule import FixedInterval
from wellposed.evaluation.blocking import blocking, gini
from wellposed.evaluation.features import FeatureExtractor
from wellposed.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance
from wellposed.evaluation.image_quality import psnr
from wellposed.evaluation.speed import Comparison, time_calls
from wellposed.recipes.flow_draw import FlowSampler, draw_images
from wellposed.training.context import derived_seed

__all__ = [
    "INPUT_CONTROLS",
    "Contender",
    "Family",
    "Judge",
    "LoadOutcome",
    "Outcome",
    "Subject",
    "Target",
    "cached_contenders",
    "compare",
    "compare_penalties",
    "compare_speed",
    "extrapolated_contenders",
    "flow_subject",
    "model_flops",
    "pipeline_subject",
    "reduction_contenders",
    "sampled",
    "shorter_contenders",
    "targets",
]

DENSE = "dense"
MOST_DECIBELS = 100.0
"""Images closer than that count as this close: equal ones have an infinite PSNR, which no mean survives."""

# torch counts the attention kernels of GPUs only.
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}

Family = Literal["ours", "published", "dense steps", "criterion", "control", "steps", "cache", "stacked"]

Draw = Callable[[int, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to make faster.

    Attributes:
        name: what it is.
        transformer: the network whose tokens are reduced.
        draw: (seed, number of steps, count) -> as many images in [0, 1]; the same noise for the same seed, and image i
            whatever the count.
        num_inference_steps: how many steps it takes as it is.
        cell: height and width in pixels of a window of 2 x 2 tokens.
        decoder: what makes images of latents; None where pixels are the latents.
    """

    name: str
    transformer: nn.Module
    draw: Draw
    num_inference_steps: int
    cell: tuple[int, int]
    decoder: nn.Module | None = None


def flow_subject(
    name: str, sampler: FlowSampler, *, size: int, num_inference_steps: int = 28, batch_size: int = 16
) -> Subject:
    """A transformer that a recipe of ours has trained: 2 x 2 pixels a token."""

    def draw(seed: int, steps: int, count: int) -> Tensor:
        batches = draw_images(
            sampler, size=size, count=count, num_inference_steps=steps, batch_size=batch_size, seed=seed
        )
        return torch.cat(list(batches))

    return Subject(
        name=name,
        transformer=sampler.network,
        draw=draw,
        num_inference_steps=num_inference_steps,
        cell=(4, 4),
    )


def pipeline_subject(
    name: str, pipe: Any, prompts: Sequence[Any], *, num_inference_steps: int, call: Mapping[str, Any]
) -> Subject:
    """Any text-to-image pipeline of diffusers; image i is of prompt i, and of the first again after the last.

    Args:
        name: what it is.
        pipe: the pipeline, where it is to run.
        prompts: at least one.
        num_inference_steps: of the pipeline as it is used.
        call: further arguments of its call, such as height, width and guidance_scale.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts; give at least one, a line each")

    def draw(seed: int, steps: int, count: int) -> Tensor:
        images: list[Tensor] = []
        for number in range(count):
            generator = torch.Generator().manual_seed(derived_seed(seed, "image", number))
            prompt = prompts[number % len(prompts)]
            drawn = pipe(prompt, generator=generator, num_inference_steps=steps, output_type="pt", **call).images
            images.append(drawn.float().cpu())
        return torch.cat(images)

    patch = pipe.transformer.config.get("patch_size")
    # FLUX packs 2 x 2 latents into a token outside of its transformer, which then says patch_size = 1.
    token = getattr(pipe, "vae_scale_factor", 8) * (patch if isinstance(patch, int) and patch > 1 else 2)
    return Subject(
        name=name,
        transformer=pipe.transformer,
        draw=draw,
        num_inference_steps=num_inference_steps,
        cell=(2 * token, 2 * token),
        decoder=getattr(getattr(pipe, "vae", None), "decoder", None),
    )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to sample.

    Attributes:
        name: as in tables and plots.
        family: what it is an example of.
        reduction: the settings of token reduction, but for the seed; None for none.
        num_inference_steps: the number of steps; None for the subject's.
        cache_threshold: of FirstBlockCache; None for none.
        extrapolated_every: TaylorSeer in lite mode computes one step in so many, and extrapolates the network's last
            features linearly in the others; None for none.
    """

    name: str
    family: Family
    reduction: TokenReductionConfig | None = None
    num_inference_steps: int | None = None
    cache_threshold: float | None = None
    extrapolated_every: int | None = None

    @property
    def ratio(self) -> float | None:
        """Of the tokens that a Reduction step leaves out."""
        return None if self.reduction is None else self.reduction.ratio

    @property
    def scope(self) -> Scope | None:
        """What is reduced."""
        return None if self.reduction is None else self.reduction.scope


def reduction_contenders(
    transformer: nn.Module, *, ratio: float, scope: Scope, interval: int = 4, cache_threshold: float | None = None
) -> list[Contender]:
    """Ours, the published baselines, and what separates the two, all with k = floor(ratio N) tokens dropped.

    ======================  ========================================================================================
    ours                    ``paper`` (copies, reduced keys), the same with log-size bias, with dense K/V, and with
                            dense K/V, linear recovery and a dense last step: ``default``
    published               ToMeSD, ToFu, SiTo, ToMA and random pairs: no dense step, pairs chosen anew in every step
    dense steps             the same with the dense steps that ours has: equal compute
    criterion               the same again with pairs chosen by output, the one thing changed
    control                 ours with pairs chosen by input, or at random
    stacked                 ``default`` behind a cache
    ======================  ========================================================================================

    Args:
        transformer: the model; ToFu prunes in the first half of its blocks.
        ratio: share of the image tokens.
        scope: of all of them, also where the published one is another.
        interval: one dense step in so many.
        cache_threshold: of the stacked one, whose first block stays dense for the cache to judge by; None for none.
    """
    every = FixedInterval(interval=interval)
    blocks = [block.name for block in find_blocks(transformer)]
    first_half = blocks[: len(blocks) // 2]
    plain = TokenReductionConfig.paper(ratio=ratio, scope=scope, schedule=every, round_to=1)
    best = TokenReductionConfig(ratio=ratio, scope=scope, schedule=every, round_to=1)
    published = {
        "tomesd": tomesd(ratio, scope=scope),
        "tofu": tofu(ratio, scope=scope, pruned_blocks=first_half),
        "sito": sito(ratio, scope=scope),
        "toma": toma(ratio, scope=scope),
        "random": random_pairs(ratio, scope=scope),
    }
    with_dense_steps = {
        "tomesd": tomesd(ratio, scope=scope, dense_steps=every),
        "tofu": tofu(ratio, scope=scope, dense_steps=every, pruned_blocks=first_half),
        "sito": sito(ratio, scope=scope, dense_steps=every),
        "toma": toma(ratio, scope=scope, dense_steps=every),
        "random": random_pairs(ratio, scope=scope, dense_steps=every),
    }
    by_output = {
        "tomesd": tomesd(ratio, scope=scope, dense_steps=every, criterion="output"),
        "tofu": tofu(ratio, scope=scope, dense_steps=every, criterion="output", pruned_blocks=first_half),
        "sito": sito(ratio, scope=scope, dense_steps=every, criterion="output"),
        "toma": toma(ratio, scope=scope, dense_steps=every, criterion="output"),
    }
    found = [
        Contender(name="paper", family="ours", reduction=plain),
        Contender(name="paper + bias", family="ours", reduction=replace(plain, proportional_attention=True)),
        Contender(name="dense K/V", family="ours", reduction=replace(plain, keep_kv=True)),
        Contender(name="default", family="ours", reduction=best),
        Contender(name="default, end reduced", family="ours", reduction=replace(best, end_dense_steps=0)),
        Contender(name="default, delta", family="ours", reduction=replace(best, recovery="delta")),
        *(Contender(name=name, family="published", reduction=config) for name, config in published.items()),
        *(
            Contender(name=f"{name} + dense steps", family="dense steps", reduction=config)
            for name, config in with_dense_steps.items()
        ),
        *(
            Contender(name=f"{name} by output", family="criterion", reduction=config)
            for name, config in by_output.items()
        ),
        Contender(name="input, reused", family="control", reduction=_without_penalty(plain, metric="input")),
        Contender(name="random, reused", family="control", reduction=_without_penalty(plain, matcher=RandomMatcher())),
        Contender(name="default by input", family="control", reduction=_without_penalty(best, metric="input")),
        Contender(
            name="default by chance", family="control", reduction=_without_penalty(best, matcher=RandomMatcher())
        ),
    ]
    if cache_threshold is not None:
        behind = replace(best, block_ratios={blocks[0]: 0.0})
        found.append(
            Contender(name="cache + default", family="stacked", reduction=behind, cache_threshold=cache_threshold)
        )
    return found


def _without_penalty(config: TokenReductionConfig, **changes: Any) -> TokenReductionConfig:
    return replace(config, frequency_penalty=0.0, **changes)


def shorter_contenders(step_counts: Sequence[int]) -> list[Contender]:
    """The model as it is, with fewer steps."""
    return [Contender(name=f"{steps} steps", family="steps", num_inference_steps=steps) for steps in step_counts]


def cached_contenders(transformer: nn.Module, thresholds: Sequence[float]) -> list[Contender]:
    """diffusers' FirstBlockCache; none for a transformer that takes no cache."""
    if not hasattr(transformer, "enable_cache"):
        return []
    return [Contender(name=f"cache {one:g}", family="cache", cache_threshold=one) for one in thresholds]


def extrapolated_contenders(transformer: nn.Module, intervals: Sequence[int]) -> list[Contender]:
    """diffusers' TaylorSeer, of first order and in lite mode; none for a transformer that takes no cache.

    It extrapolates whole steps as ``default`` extrapolates the tokens that a step leaves out.
    """
    if not hasattr(transformer, "enable_cache"):
        return []
    return [Contender(name=f"TaylorSeer {one}", family="cache", extrapolated_every=one) for one in intervals]


@contextmanager
def sampled(subject: Subject, contender: Contender, seed: int) -> Iterator[TokenReduction | None]:
    """Within the block, the subject's transformer samples as the contender does; destinations are drawn from ``seed``.

    A reduction is applied before the cache, and taken off after it.
    """
    model: Any = subject.transformer
    with ExitStack() as stack:
        reduction = None
        if contender.reduction is not None:
            config = replace(contender.reduction, seed=derived_seed(seed, "destinations"))
            reduction = stack.enter_context(token_reduction(model, config=config))
        if contender.cache_threshold is not None:
            model.enable_cache(FirstBlockCacheConfig(threshold=contender.cache_threshold))
            stack.callback(model.disable_cache)
        if contender.extrapolated_every is not None:
            model.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=contender.extrapolated_every,
                    disable_cache_before_step=2,
                    max_order=1,
                    taylor_factors_dtype=torch.float32,
                    use_lite_mode=True,
                )
            )
            stack.callback(model.disable_cache)
        yield reduction


def _draw(subject: Subject, contender: Contender, seed: int, count: int) -> Tensor:
    with sampled(subject, contender, seed):
        return subject.draw(seed, contender.num_inference_steps or subject.num_inference_steps, count)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What images are compared with beyond the dense ones.

    Attributes:
        extractor: features of images in [0, 1].
        reference: of the real images.
    """

    extractor: FeatureExtractor
    reference: FeatureStatistics

    def distance(self, images: Float[Tensor, "n channels height width"]) -> float:
        """Frechet distance to the real images."""
        return frechet_distance(feature_statistics(images, self.extractor), self.reference)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One contender.

    Attributes:
        name: the contender's.
        family: the contender's.
        scope: of its reduction; None without one.
        ratio: of its reduction; None without one.
        psnr: mean over images of the PSNR to the dense image from the same noise in decibels, one for each seed.
        psnr_std: standard deviation over all images.
        frechet: Frechet distance to real images, one for each seed; empty where there is no judge.
        blocking: mean over images, see :func:`wellposed.evaluation.blocking.blocking`.
        flops: the model's floating-point operations over those of the dense one.
        latency: time over that of the dense one, where it was measured.
    """

    name: str
    family: Family
    scope: Scope | None
    ratio: float | None
    psnr: tuple[float, ...]
    psnr_std: float
    frechet: tuple[float, ...]
    blocking: float
    flops: float
    latency: float | None = None

    @property
    def mean_psnr(self) -> float:
        """Over the seeds."""
        return fmean(self.psnr)

    @property
    def mean_frechet(self) -> float | None:
        """Over the seeds."""
        return fmean(self.frechet) if self.frechet else None


def model_flops(
    subject: Subject, contender: Contender | None = None, *, seed: int = 0, count: int = 1
) -> tuple[float, Float[Tensor, "count channels height width"]]:
    """Floating-point operations of the transformer, matching included, in drawing ``count`` images; and the images."""
    total = 0
    mode = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)

    def begin(*_: Any) -> None:
        mode.__enter__()

    def end(*_: Any) -> None:
        nonlocal total
        mode.__exit__(None, None, None)
        total += mode.get_total_flops()

    before = subject.transformer.register_forward_pre_hook(begin)
    after = subject.transformer.register_forward_hook(end)
    try:
        if contender is None:
            images = subject.draw(seed, subject.num_inference_steps, count)
        else:
            images = _draw(subject, contender, seed, count)
    finally:
        before.remove()
        after.remove()
    return float(total), images


def compare(
    subject: Subject,
    contenders: Sequence[Contender],
    *,
    seeds: Sequence[int],
    num_images: int,
    judge: Judge | None = None,
    num_judged: int = 0,
    judged: Callable[[Contender], bool] = lambda _: True,
    on_outcome: Callable[[Outcome, Tensor], None] | None = None,
) -> list[Outcome]:
    """Every contender against the dense model, which comes first, under the name "dense".

    For each seed all start from the same noise; destinations are drawn from the seed too.

    Args:
        subject: the model.
        contenders: who.
        seeds: of noise and destinations.
        num_images: images for each seed, for PSNR and blocking.
        judge: for Frechet distances, or None.
        num_judged: images for each seed, for those.
        judged: which contenders are; the dense model always is.
        on_outcome: called with each outcome and its images for the first seed.
    """
    dense = {seed: subject.draw(seed, subject.num_inference_steps, max(num_images, num_judged)) for seed in seeds}
    flops_each, _ = model_flops(subject)

    def distance(images: Mapping[int, Tensor]) -> tuple[float, ...]:
        return () if judge is None else tuple(judge.distance(images[seed][:num_judged]) for seed in seeds)

    first = Outcome(
        name=DENSE,
        family="steps",
        scope=None,
        ratio=None,
        psnr=(MOST_DECIBELS,) * len(seeds),
        psnr_std=0.0,
        frechet=distance(dense),
        blocking=1.0,
        flops=1.0,
        latency=1.0,
    )
    if on_outcome is not None:
        on_outcome(first, dense[seeds[0]])
    outcomes = [first]
    for contender in contenders:
        is_judged = judge is not None and judged(contender)
        count = max(num_images, num_judged) if is_judged else num_images
        flops, images = model_flops(subject, contender, seed=seeds[0], count=count)
        drawn = {seeds[0]: images, **{seed: _draw(subject, contender, seed, count) for seed in seeds[1:]}}
        decibels = [_decibels(drawn[seed][:num_images], dense[seed][:num_images]) for seed in seeds]
        blocks = [blocking(drawn[seed][:num_images], dense[seed][:num_images], subject.cell).mean() for seed in seeds]
        outcome = Outcome(
            name=contender.name,
            family=contender.family,
            scope=contender.scope,
            ratio=contender.ratio,
            psnr=tuple(float(one.mean()) for one in decibels),
            psnr_std=float(torch.cat(decibels).std()) if num_images * len(seeds) > 1 else 0.0,
            frechet=distance(drawn) if is_judged else (),
            blocking=float(torch.stack(blocks).mean()),
            flops=flops / count / flops_each,
        )
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome, drawn[seeds[0]])
    return outcomes


def _decibels(images: Tensor, dense: Tensor) -> Float[Tensor, " batch"]:
    return psnr(images.double(), dense.double(), data_range=1.0).clamp(max=MOST_DECIBELS)


def compare_speed(
    subject: Subject,
    contenders: Sequence[Contender],
    *,
    count: int,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> Comparison:
    """Time of a whole generation of ``count`` images, by name; "dense" is the baseline. They take turns.

    Putting a contender on the model and taking it off again is part of its time.
    """
    calls: dict[str, Callable[[], object]] = {
        DENSE: lambda: subject.draw(seed, subject.num_inference_steps, count),
        **{one.name: lambda one=one: _draw(subject, one, seed, count) for one in contenders},
    }
    device = next(subject.transformer.parameters()).device
    return time_calls(calls, repeats=repeats, warmup=warmup, baseline=DENSE, device=device)


@dataclass(frozen=True, kw_only=True)
class LoadOutcome:
    """What a frequency penalty does at one ratio.

    Attributes:
        ratio: share of the tokens that is dropped.
        penalty: the coefficient.
        psnr: as in :class:`Outcome`, one for each seed.
        blocking: one for each seed.
        latent_blocking: the same of the latents; that of the pixels again where they are the latents.
        gini: of the counts of how often each token was dropped, mean over sites and images; 0 is even.
        most: the largest share of the Reduction steps in which one token was dropped, mean over sites and images.
    """

    ratio: float
    penalty: float
    psnr: tuple[float, ...]
    blocking: tuple[float, ...]
    latent_blocking: tuple[float, ...]
    gini: float
    most: float


def compare_penalties(
    subject: Subject,
    config: TokenReductionConfig,
    *,
    ratios: Sequence[float],
    penalties: Sequence[float],
    seeds: Sequence[int],
    num_images: int,
    on_outcome: Callable[[LoadOutcome, Tensor], None] | None = None,
) -> list[LoadOutcome]:
    """Quality, blocking and evenness for every penalty at every ratio, all else as in ``config``.

    ``num_images`` should be drawn in one batch: counts are those of the last generation. ``on_outcome`` is called with
    each outcome and its images for the first seed.
    """
    dense = {seed: _images_and_latents(subject, seed, num_images) for seed in seeds}
    outcomes: list[LoadOutcome] = []
    for ratio in ratios:
        for penalty in penalties:
            chosen = replace(config, ratio=ratio, frequency_penalty=penalty)
            contender = Contender(name=f"penalty {penalty:g}", family="ours", reduction=chosen)
            decibels: list[float] = []
            blocks: list[float] = []
            latent_blocks: list[float] = []
            uneven: list[float] = []
            most: list[float] = []
            shown = dense[seeds[0]][0]
            for seed in seeds:
                with sampled(subject, contender, seed) as reduction:
                    images, latents = _images_and_latents(subject, seed, num_images)
                    assert reduction is not None
                    counts = torch.stack(list(reduction.drop_counts().values()))
                    reductions = sum(record.mode == "reduce" for record in reduction.steps)
                shown = images if seed == seeds[0] else shown
                true, true_latents = dense[seed]
                height, width = (extent // (images.shape[-1] // latents.shape[-1]) for extent in subject.cell)
                decibels.append(float(_decibels(images, true).mean()))
                blocks.append(float(blocking(images, true, subject.cell).mean()))
                latent_blocks.append(float(blocking(latents, true_latents, (height, width)).mean()))
                uneven.append(float(gini(counts).mean()))
                most.append(float(counts.amax(2).double().mean()) / reductions)
            outcome = LoadOutcome(
                ratio=ratio,
                penalty=penalty,
                psnr=tuple(decibels),
                blocking=tuple(blocks),
                latent_blocking=tuple(latent_blocks),
                gini=fmean(uneven),
                most=fmean(most),
            )
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome, shown)
    return outcomes


def _images_and_latents(subject: Subject, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Images, and the latents that the decoder was given for them.

    Raises:
        ValueError: an autoencoder that decodes in tiles.
    """
    given: list[Tensor] = []
    if subject.decoder is None:
        images = subject.draw(seed, subject.num_inference_steps, count)
        return images, images
    # (batch, channels, rows, columns), with one frame before the rows in autoencoders that know videos too.
    watch = subject.decoder.register_forward_pre_hook(
        lambda _, args: given.append(args[0].flatten(1, -3).float().cpu())
    )
    try:
        images = subject.draw(seed, subject.num_inference_steps, count)
    finally:
        watch.remove()
    if sum(map(len, given)) != len(images):
        raise ValueError("the autoencoder decodes in tiles, whose borders are no tokens'; call vae.disable_tiling()")
    return images, torch.cat(given)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A claim and what was measured.

    Attributes:
        claim: in words.
        wanted: the number that ``measured`` is to reach.
        measured: the number.
        spread: standard deviation of it over seeds; 0 with one seed.
    """

    claim: str
    wanted: float
    measured: float
    spread: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.measured >= self.wanted


INPUT_CONTROLS = ("tomesd + dense steps", "tofu + dense steps", "sito + dense steps", "toma + dense steps")


def targets(outcomes: Sequence[Outcome]) -> list[Target]:
    """What this library set out to show, for each scope and ratio up to 0.5 among the outcomes.

    Differences of PSNR are taken seed by seed. "The best input-similarity control" is, of ToMeSD, ToFu, SiTo and ToMA
    with dense steps and of ours with pairs chosen by input, the one with the highest mean. ``paper`` and ``default``
    each have to exceed it; the second also has dense K/V and delta recovery, so it says less about the criterion.
    """
    found: list[Target] = []
    settings = sorted({(one.scope, one.ratio) for one in outcomes if one.scope is not None and one.ratio is not None})
    for scope, ratio in settings:
        if ratio > 0.5:
            continue
        at = {one.name: one for one in outcomes if (one.scope, one.ratio) == (scope, ratio)}
        if not {"paper", "default", "default, delta", "tomesd", "input, reused", *INPUT_CONTROLS} <= at.keys():
            continue
        best = max((at[name] for name in (*INPUT_CONTROLS, "input, reused")), key=lambda one: one.mean_psnr)
        where = f"{scope}, ratio {ratio:g}"
        for name in ("paper", "default"):
            found.append(_gain(f"{where}: {name} over ToMeSD as published", 3.6, at[name], at["tomesd"]))
            found.append(_gain(f"{where}: {name} over the best control by input ({best.name})", 1.5, at[name], best))
        found += [
            _gain(f"{where}: {name} over paper", 8.0, at[name], at["paper"]) for name in ("default, delta", "default")
        ]
        for name in ("paper", "default"):
            # Frechet distances take many images: not everyone is judged in every scope.
            if ratio == 0.5 and at["tomesd"].frechet and at[name].frechet:
                quotients = [a / b for a, b in zip(at["tomesd"].frechet, at[name].frechet, strict=True)]
                claim = f"{where}: Frechet distance of ToMeSD as published over that of {name}"
                found.append(Target(claim=claim, wanted=2.7, measured=fmean(quotients), spread=_spread(quotients)))
    return found


def _gain(claim: str, wanted: float, ours: Outcome, theirs: Outcome) -> Target:
    gains = [a - b for a, b in zip(ours.psnr, theirs.psnr, strict=True)]
    return Target(claim=claim, wanted=wanted, measured=fmean(gains), spread=_spread(gains))


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
