"""Which settings suit one model on one machine: measured, not guessed.

``calibrate_schedule`` looks at a few dense generations and places the Matching steps where pairs stop to persist.
``calibrate`` generates the same pictures with every candidate setting and returns the one that is closest to the dense
pictures among those that are fast enough.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from wellposed.dito.config import Recovery, Scope, TokenReductionConfig
from wellposed.dito.forecast import forecast
from wellposed.dito.hooks import apply_token_reduction
from wellposed.dito.observe import observe_outputs
from wellposed.dito.schedule import FixedInterval, MatchingSteps
from wellposed.evaluation.image_quality import psnr
from wellposed.evaluation.speed import Clock, time_calls

__all__ = [
    "Calibration",
    "TriedSetting",
    "calibrate",
    "calibrate_sampler",
    "calibrate_schedule",
    "setting_grid",
]

SpeedMeasure = Literal["latency", "flops"]
Prediction = Callable[[TokenReductionConfig], float]
Progress = Callable[[int, int], None]

DENSE = "dense"
MIN_ROUNDS = 3
TENSORS = ("pt", "np", "latent")


@dataclass(frozen=True, kw_only=True)
class TriedSetting:
    """One setting and what it gave.

    Attributes:
        config: the setting.
        speedup: time of the dense model over time with it, or what was predicted for it.
        psnr: to the dense pictures in dB, mean over pictures; None where it was not generated because its predicted
            speed-up misses the budget.
    """

    config: TokenReductionConfig
    speedup: float
    psnr: float | None

    @property
    def label(self) -> str:
        """The fields that settings differ in, in one line."""
        config = self.config
        parts = [
            f"ratio {config.ratio:g}",
            config.scope,
            "dense K/V" if config.keep_kv else "reduced K/V",
            config.recovery,
            f"every {config.schedule.interval}"
            if isinstance(config.schedule, FixedInterval)
            else type(config.schedule).__name__,
        ]
        if config.block_ratios:
            parts.append(", ".join(f"{block} {ratio:g}" for block, ratio in config.block_ratios.items()))
        return " | ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Everything that was tried.

    Attributes:
        budget: the wanted speed-up.
        is_measured: whether speed-ups are measured, or predicted.
        tried: in the order of the candidates.
        best: the one with the largest PSNR among those with at least the wanted speed-up.
    """

    budget: float
    is_measured: bool
    tried: tuple[TriedSetting, ...]
    best: TriedSetting

    @property
    def config(self) -> TokenReductionConfig:
        """The best setting."""
        return self.best.config

    def table(self) -> str:
        """All settings, the fastest first."""
        return _table(self.tried, self.best)


def setting_grid(
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    scopes: Sequence[Scope] = ("block", "attn"),
    keep_kv: Sequence[bool] = (True, False),
    recoveries: Sequence[Recovery] | None = None,
    intervals: Sequence[int] = (2, 4, 8),
    block_ratios: Sequence[Mapping[str, float]] = ({},),
    **fields: Any,
) -> list[TokenReductionConfig]:
    """Every combination of these.

    Args:
        ratios: shares of the image tokens.
        scopes: "attn" or "block".
        keep_kv: whether all keys and values are computed.
        recoveries: "copy", "delta" or "linear". By default that of ``TokenReductionConfig`` with dense keys, and "copy"
            with reduced ones, where the others help little and cost memory all the same.
        intervals: one dense step in so many.
        block_ratios: other ratios for some blocks, ``{"transformer_blocks.0": 0}`` to leave that one alone.
        **fields: of all configs alike.
    """
    return [
        TokenReductionConfig(
            ratio=ratio,
            scope=scope,
            keep_kv=dense_keys,
            recovery=recovery,
            schedule=FixedInterval(interval=interval),
            block_ratios=blocks,
            **fields,
        )
        for scope, dense_keys, ratio, interval, blocks in itertools.product(
            scopes, keep_kv, ratios, intervals, block_ratios
        )
        for recovery in recoveries or ((TokenReductionConfig.recovery,) if dense_keys else ("copy",))
    ]


def calibrate_schedule(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    threshold: float = 0.6,
    longest: int = 8,
    ratio: float = 0.5,
    scope: Scope = "block",
    seeds: Sequence[int] = (0,),
    **call_kwargs: Any,
) -> MatchingSteps:
    """Matching steps from dense generations: the next one as late as PMR(t, t + g) >= ``threshold`` allows.

    PMR is averaged over sites, prompts and seeds. The steps hold for the number of inference steps they were measured
    with. For a sampler that is no pipeline, :func:`wellposed.dito.observe.observe_outputs` around it and
    ``summary().matching_steps(threshold)`` do the same.

    Args:
        pipe: a diffusers pipeline with a transformer.
        prompts: its first argument, one generation each: texts, or class labels for a class-conditional one.
        threshold: the smallest PMR at which pairs are still reused.
        longest: the largest gap between Matching steps.
        ratio: share of the tokens that pairs drop.
        scope: whose outputs are watched.
        seeds: one generation for each prompt and seed.
        **call_kwargs: of the pipeline's call: ``num_inference_steps``, ``guidance_scale``, ``height``, ...

    Raises:
        ValueError: no prompts, numbers out of range, or a model that cannot be reduced.
    """
    draws = _pipeline_draws(pipe, prompts, seeds, {"output_type": "latent", **call_kwargs})
    if longest < 1:
        raise ValueError(f"longest is {longest}; it is the largest number of steps between two Matching steps, >= 1")
    with observe_outputs(pipe, ratio=ratio, gaps=range(1, longest + 1), scope=scope) as observed, torch.no_grad():
        for draw in draws:
            draw()
    return observed.summary().matching_steps(threshold)


def calibrate(
    pipe: Any,
    prompts: Sequence[Any],
    budget: float,
    *,
    candidates: Sequence[TokenReductionConfig] | None = None,
    seeds: Sequence[int] = (0,),
    by: SpeedMeasure = "latency",
    clock: Clock = "wall",
    progress: Progress | None = None,
    **call_kwargs: Any,
) -> Calibration:
    """The setting whose pictures are closest to the dense ones at a wanted speed-up.

        found = calibrate(pipe, ["a lighthouse", "a cat"], 1.3, num_inference_steps=28)
        print(found.table())
        apply_token_reduction(pipe, found.config)

    Every setting generates the same pictures from the same noise, and settings take turns, so that a slow minute of the
    machine meets all of them. The time of a setting contains installing it, which is milliseconds. Compile the model
    afterwards: installing hooks again and again would time the compiler.

    Args:
        pipe: a diffusers pipeline with a transformer that can be reduced, and no token reduction on it.
        prompts: its first argument, one generation each: texts, or class labels for a class-conditional one.
        budget: the wanted speed-up, above 1: 1.3 is 1.3 times faster than dense.
        candidates: settings to try; by default ``setting_grid()``, less what the model refuses.
        seeds: of the noise; a picture for each prompt and seed.
        by: "latency" measures speed-ups here; "flops" takes them from :func:`wellposed.dito.forecast.forecast`, and
            generates only with settings that reach the budget.
        clock: "process" is steadier on a shared CPU, and blind to what a GPU does.
        progress: called with the number of finished generations and of all, before each.
        **call_kwargs: of the pipeline's call: ``num_inference_steps``, ``height``, ... With ``output_type="latent"``
            nothing is decoded, and PSNR refers to the range of the dense latents.

    Raises:
        ValueError: no prompts, no candidates, a budget of at most 1, a candidate that the model refuses, or no setting
            that is fast enough; the message then holds the table of all that were tried.
    """
    call_kwargs = {"output_type": "pt", **call_kwargs}
    if by not in get_args(SpeedMeasure):
        raise ValueError(f"by is {by!r}; write one of {', '.join(get_args(SpeedMeasure))}")
    return _search(
        pipe,
        _pipeline_draws(pipe, prompts, seeds, call_kwargs),
        budget,
        candidates=candidates,
        predict=_forecaster(pipe, call_kwargs) if by == "flops" else None,
        clock=clock,
        data_range=1.0 if call_kwargs["output_type"] == "pt" else None,
        progress=progress,
    )


def calibrate_sampler(
    model: Any,
    sample: Callable[[torch.Generator], Tensor],
    budget: float,
    *,
    candidates: Sequence[TokenReductionConfig] | None = None,
    seeds: Sequence[int] = (0,),
    predict: Prediction | None = None,
    clock: Clock = "wall",
    data_range: float | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """As :func:`calibrate`, for a sampler that is no pipeline.

    Args:
        model: the transformer that ``sample`` runs.
        sample: a batch of pictures, its first axis the batch, that depends on the generator alone.
        budget: the wanted speed-up, above 1.
        candidates: settings to try; by default ``setting_grid()``, less what the model refuses.
        seeds: of the generators; at least one.
        predict: the speed-up to expect of a setting, such as ``lambda config: forecast(model, config, height=1024,
            width=1024).speed_up``; then only settings that reach the budget are generated with. None measures it.
        clock: "process" is steadier on a shared CPU.
        data_range: difference of the largest and the smallest value a pixel can have; by default that of the dense
            pictures.
        progress: called with the number of finished generations and of all, before each.

    Raises:
        ValueError: as :func:`calibrate`.
    """
    if not seeds:
        raise ValueError("seeds is empty; give at least one, and a picture is drawn for each")
    draws = [lambda seed=seed: sample(torch.Generator().manual_seed(seed)) for seed in seeds]
    return _search(
        model,
        draws,
        budget,
        candidates=candidates,
        predict=predict,
        clock=clock,
        data_range=data_range,
        progress=progress,
    )


def _search(
    model: Any,
    draws: Sequence[Callable[[], Tensor]],
    budget: float,
    *,
    candidates: Sequence[TokenReductionConfig] | None,
    predict: Prediction | None,
    clock: Clock,
    data_range: float | None,
    progress: Progress | None,
) -> Calibration:
    if not budget > 1:
        raise ValueError(f"budget is {budget}; it is the wanted speed-up over the dense model, such as 1.3")
    configs = _accepted(model, candidates)
    generations = _Generations(model, draws, data_range)
    with torch.no_grad():
        if predict is None:
            tried = _with_measured_speed(generations, configs, clock, progress)
        else:
            predicted = [(config, predict(config)) for config in configs]
            tried = _with_predicted_speed(generations, predicted, budget, progress)
    fast = [setting for setting in tried if setting.speedup >= budget]
    if not fast:
        raise ValueError(
            f"no setting is {budget:g} times faster than the dense model{'' if predict is None else ' by prediction'}; "
            f"the fastest reaches {max(setting.speedup for setting in tried):.3g}. Lower the budget, or try other "
            f"candidates. Tried:\n{_table(tried)}"
        )
    return Calibration(budget=float(budget), is_measured=predict is None, tried=tried, best=max(fast, key=_quality))


def _accepted(model: Any, candidates: Sequence[TokenReductionConfig] | None) -> list[TokenReductionConfig]:
    """The candidates, each installed once for trial; the default ones less those that the model refuses."""
    accepted: list[TokenReductionConfig] = []
    refusals: list[str] = []
    for config in setting_grid() if candidates is None else candidates:
        try:
            apply_token_reduction(model, config).remove()
        except ValueError as refusal:
            if candidates is not None:
                raise
            refusals.append(str(refusal))
        else:
            accepted.append(config)
    if not accepted:
        raise ValueError(refusals[0] if refusals else "candidates is empty; give settings, or None for the usual ones")
    return accepted


class _Generations:
    """The same pictures with different settings; the dense ones are kept to compare with."""

    def __init__(self, model: Any, draws: Sequence[Callable[[], Tensor]], data_range: float | None) -> None:
        self.model = model
        self.draws = draws
        self.data_range = data_range
        self.dense: dict[int, Tensor] = {}
        self.psnrs: dict[int, dict[int, float]] = {}

    def run_dense(self, index: int) -> None:
        """Picture ``index`` as the model makes it."""
        self.dense[index] = self.draws[index]()

    def run(self, setting: int, config: TokenReductionConfig, index: int) -> None:
        """Picture ``index`` with a setting, compared with the dense one."""
        reduction = apply_token_reduction(self.model, config)
        try:
            pictures = self.draws[index]()
        finally:
            reduction.remove()
        dense = self.dense[index]
        data_range = float(dense.max() - dense.min()) if self.data_range is None else self.data_range
        pictures, dense = (x.float().flatten(1)[:, None, None] for x in (pictures, dense))
        found = psnr(pictures, dense, data_range=data_range)
        self.psnrs.setdefault(setting, {})[index] = float(found.mean())

    def mean_psnr(self, setting: int) -> float:
        """Over all pictures."""
        return fmean(self.psnrs[setting].values())


def _with_measured_speed(
    generations: _Generations, configs: Sequence[TokenReductionConfig], clock: Clock, progress: Progress | None
) -> tuple[TriedSetting, ...]:
    rounds = max(MIN_ROUNDS, len(generations.draws))
    done, total = itertools.count(), (1 + rounds) * (1 + len(configs))

    def turns(run: Callable[[int], None]) -> Callable[[], None]:
        order = itertools.cycle(range(len(generations.draws)))

        def turn() -> None:
            if progress is not None:
                progress(next(done), total)
            run(next(order))

        return turn

    calls = {DENSE: turns(generations.run_dense)}
    for setting, config in enumerate(configs):
        calls[str(setting)] = turns(partial(generations.run, setting, config))
    speed = time_calls(calls, repeats=rounds, warmup=1, baseline=DENSE, device=_device(generations.model))
    return tuple(
        TriedSetting(
            config=config,
            speedup=1 / speed.ratio(str(setting), clock=clock).median,
            psnr=generations.mean_psnr(setting),
        )
        for setting, config in enumerate(configs)
    )


def _with_predicted_speed(
    generations: _Generations,
    predicted: Sequence[tuple[TokenReductionConfig, float]],
    budget: float,
    progress: Progress | None,
) -> tuple[TriedSetting, ...]:
    worth_it = [setting for setting, (_, speedup) in enumerate(predicted) if speedup >= budget]
    done, total = itertools.count(), len(generations.draws) * (1 + len(worth_it)) if worth_it else 0
    runs = [generations.run_dense, *(partial(generations.run, setting, predicted[setting][0]) for setting in worth_it)]
    for index, run in itertools.product(range(len(generations.draws)), runs if worth_it else ()):
        if progress is not None:
            progress(next(done), total)
        run(index)
    return tuple(
        TriedSetting(
            config=config,
            speedup=speedup,
            psnr=generations.mean_psnr(setting) if setting in worth_it else None,
        )
        for setting, (config, speedup) in enumerate(predicted)
    )


def _forecaster(pipe: Any, call_kwargs: Mapping[str, Any]) -> Prediction:
    """Of the size and the number of steps that the pipeline is called with, or takes by default."""
    transformer, scale = pipe.transformer, getattr(pipe, "vae_scale_factor", 8)
    sample_size = getattr(pipe, "default_sample_size", None) or transformer.config.get("sample_size")
    usual = None if sample_size is None else sample_size * scale
    height, width = (call_kwargs.get(name) or usual for name in ("height", "width"))
    if height is None or width is None:
        raise ValueError('by="flops" predicts from the size of the picture; give height and width')
    parameters = inspect.signature(type(pipe).__call__).parameters
    steps = call_kwargs.get("num_inference_steps") or parameters["num_inference_steps"].default

    def speed_up(config: TokenReductionConfig) -> float:
        return forecast(
            transformer,
            config,
            height=height,
            width=width,
            num_inference_steps=steps,
            text_tokens=call_kwargs.get("max_sequence_length"),
            vae_scale_factor=scale,
        ).speed_up

    return speed_up


def _device(model: Any) -> torch.device:
    return next(getattr(model, "transformer", model).parameters()).device


def _quality(setting: TriedSetting) -> float:
    return -math.inf if setting.psnr is None or math.isnan(setting.psnr) else setting.psnr


def _table(tried: Sequence[TriedSetting], best: TriedSetting | None = None) -> str:
    rows = [("speed-up", "PSNR", "setting")]
    for setting in sorted(tried, key=lambda each: -each.speedup):
        quality = "-" if setting.psnr is None else f"{setting.psnr:.2f} dB"
        rows.append((f"{setting.speedup:.2f}", quality, setting.label + (" <- best" if setting is best else "")))
    return "\n".join(f"{speed:>8}  {quality:>9}  {label}" for speed, quality, label in rows)


def _pipeline_draws(
    pipe: Any, prompts: Sequence[Any], seeds: Sequence[int], call_kwargs: Mapping[str, Any]
) -> list[Callable[[], Tensor]]:
    """One generation for each prompt and seed."""
    if isinstance(prompts, str) or not len(prompts) or not len(seeds):
        raise ValueError(
            f"prompts is {prompts!r} and seeds {seeds!r}; give a list with at least one prompt, and at least one seed"
        )
    if "generator" in call_kwargs:
        raise ValueError("generator was given, and every picture needs one of its own; give seeds=(0, 1, ...) instead")
    if call_kwargs["output_type"] not in TENSORS:
        raise ValueError(
            f"output_type is {call_kwargs['output_type']!r}; pictures are compared as tensors: write one of "
            f"{', '.join(map(repr, TENSORS))}"
        )

    def draw(prompt: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(pipe(prompt, generator=generator, return_dict=False, **call_kwargs)[0])

    return [partial(draw, prompt, seed) for prompt, seed in itertools.product(prompts, seeds)]
