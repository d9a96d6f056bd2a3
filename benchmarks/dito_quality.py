"""What token reduction loses and gains: ours, what it replaces, fewer steps and a cache, on one model.

Targets (this library's own): our reading of the published method (``paper``: copies, reduced keys) and our ``default``
each exceed ToMeSD as published by 3.6 dB of PSNR to the dense image and the best input-similarity control at equal
compute by 1.5 dB, at ratios 0.25 and 0.5 in both scopes; dense K/V with delta recovery adds 8 dB to ``paper``; at 0.5,
the Frechet distance of ToMeSD is 2.7 times ours. Fewer steps, FirstBlockCache and TaylorSeer stand in the same table,
and ours behind a cache. Latency is of a whole generation, in CPU time of the process on a CPU and wall-clock time on a
GPU; FLOPs are counted as they run.

A frequency penalty is meant against blocking. Its table has PSNR, gradient energy across the borders of 2 x 2 windows
over that inside relative to the dense image, of pixels and of latents, and how evenly tokens are dropped; ``--pages``
has it with crops.

    python benchmarks/dito_quality.py                                 # digits and photographs; trained if missing
    python benchmarks/dito_quality.py --sets mnist_dit --data DATA  # a DiT that others trained, on MNIST
    python benchmarks/dito_quality.py --sets cifar10 --data DATA    # the longer run, on CIFAR-10
    python benchmarks/dito_quality.py --pipeline PATH --preset flux_1024 --prompts FILE --device cuda --dtype bfloat16

The folder of data holds ``loaders.py`` and, for each set, ``mnist/`` and ``mnist_dit/``, or ``cifar10/`` and
``cifar_resnet/``; FILE has a prompt in each line; PATH is what ``DiffusionPipeline.from_pretrained`` takes. A
pipeline's images are compared with its own dense ones; FID is left to those who have 50,000 of them.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.dito.config import Scope, TokenReductionConfig
from wellposed.evaluation.features import FeatureExtractor, unit_images
from wellposed.evaluation.frechet import FeatureStatistics, frechet_floor
from wellposed.evaluation.speed import Comparison
from wellposed.recipes.ddpm_recipe import FeatureEvaluation
from wellposed.recipes.device import resolved_device
from wellposed.recipes.dito import dito_photographs, dito_tiny, small_flux
from wellposed.recipes.dito_comparison import (
    INPUT_CONTROLS,
    Contender,
    Judge,
    LoadOutcome,
    Outcome,
    Subject,
    Target,
    cached_contenders,
    compare,
    compare_penalties,
    compare_speed,
    extrapolated_contenders,
    flow_subject,
    pipeline_subject,
    reduction_contenders,
    shorter_contenders,
    targets,
)
from wellposed.recipes.flow_draw import image_noise, load_flow
from wellposed.recipes.flow_recipe import FlowRecipe
from wellposed.recipes.real_images import real_images
from wellposed.report.page import Grid, Page, Section, Table, write_page
from wellposed.report.pictures import Picture, tile_images
from wellposed.report.record import write_result

RATIOS = (0.25, 0.5, 0.75)
SCOPES: tuple[Scope, ...] = ("attn", "block")
PENALTIES = (0.0, 0.02, 0.05, 0.1, 0.3)
SHARES_OF_STEPS = (24 / 28, 20 / 28, 16 / 28, 14 / 28)
CACHE_THRESHOLDS = (0.05, 0.1, 0.2)
EXTRAPOLATED_EVERY = (2, 3, 4)
STACKED_THRESHOLD = 0.1
JUDGED_RATIO = 0.5
# Many more images than PSNR takes: those of whole blocks, and of attention what the published scope is.
JUDGED = {
    None: {"14 steps", "25 steps", "cache 0.2", "TaylorSeer 2"},
    "attn": {"paper", "tomesd"},
    "block": {
        *("paper", "default", "tomesd", "tofu", "sito", "toma", "random", "tomesd + dense steps", "default by chance"),
        "cache + default",
    },
}
# Those whose time is that of another, whatever they choose by.
UNTIMED = {"criterion", "control"}

CROPPED = 3

QUICK = frozenset({"paper", "default", "default, delta", "tomesd", "input, reused", "cache + default", *INPUT_CONTROLS})

PUBLISHED = """\
published, as a public digest of arXiv 2605.22011 quotes it (not measured here; other models, other images):
  FLUX 1024 px, ratio 0.25: PSNR 25.21 dB, ToMeSD 21.59      SD3 1024 px, ratio 0.25: PSNR 26.83 dB, ToMeSD 23.32
  FLUX 1024 px, ratio 0.50: FID 33.47, ToMeSD 90.00          FLUX latency: up to -18.6 %"""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a published model is called."""

    num_inference_steps: int
    call: dict[str, Any]


PRESETS = {
    "flux_1024": Preset(
        num_inference_steps=28,
        call={"height": 1024, "width": 1024, "guidance_scale": 3.5, "max_sequence_length": 512},
    ),
    "sd3_1024": Preset(num_inference_steps=28, call={"height": 1024, "width": 1024, "guidance_scale": 7.0}),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model, and what its images are judged by."""

    subject: Subject
    judge: Judge | None
    card: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is measured."""

    seeds: tuple[int, ...]
    images: int
    judged: int
    scopes: tuple[Scope, ...]
    ratios: tuple[float, ...]
    penalties: tuple[float, ...]
    timed: int
    repeats: int
    warmup: int
    only: frozenset[str] = frozenset()  # names of contenders; empty for all


def trained(name: str, recipe: FlowRecipe, steps: int | None, run: Path, device: str, budget: Budget) -> Bench:
    """A transformer of a recipe, trained if its run has no pipeline yet."""
    if not (run / "pipeline" / "model_index.json").is_file():
        recipe.train(run, steps=steps, device=device, resume=run.exists())
    subject = flow_subject(
        name,
        load_flow(run / "pipeline", resolved_device(device)),
        size=recipe.image_size,
        num_inference_steps=recipe.sampling.num_inference_steps,
    )
    if budget.judged == 0 or name == "photographs":  # no classifier knows these
        return Bench(subject=subject, judge=None, card={})
    real = real_images(
        recipe.evaluation, recipe.training_images, folder=recipe.folder, run=run, device=resolved_device(device)
    )
    card = {
        "extractor": real.extractor.name,
        "reference": real.name,
        "images_each_seed": budget.judged,
        "floor": real.floor(budget.judged),
    }
    return Bench(subject=subject, judge=Judge(extractor=real.extractor, reference=real.statistics), card=card)


def cifar10(folder: Path) -> FlowRecipe:
    """The longer run: CIFAR-10 by class, from pixels stored as JPEG, judged by a CIFAR-10 classifier."""
    loaders = _module(folder / "loaders.py")

    def images(_: Path) -> ImageDataset:
        with np.load(folder / "cifar10/cifar10_jpegq75_full.npz") as arrays:
            held = {name: arrays[name] for name in ("blob_train", "off_train", "y_train")}
        pixels = np.stack([np.asarray(loaders.jpeg(held, i, "_train")) for i in range(len(held["y_train"]))])
        return ImageDataset(
            name="CIFAR-10-JPEG (quality 75)",
            source=StoredPixels(pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()),
            labels=torch.from_numpy(held["y_train"].astype(np.int64)),
            class_names=tuple(str(i) for i in range(10)),
            flip=True,
        )

    def extractor(_: Path, device: str) -> FeatureExtractor:
        place = resolved_device(device)
        weights = {name: w.to(place) for name, w in load_file(folder / "cifar_resnet/resnet56.safetensors").items()}
        mean, std = (
            torch.tensor(v, device=place)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        return FeatureExtractor(
            function=lambda x: loaders.cifar_resnet(weights, (x - mean) / std, feats=True),
            name="ResNet-56 of CIFAR-10",
            weights_hash="akamaster resnet56",
            device=place,
        )

    base = dito_photographs()
    return replace(
        base,
        name="cifar10",
        network=lambda: small_flux(channels=3, num_classes=10, num_layers=2, num_single_layers=6, num_heads=6),
        dataset=images,
        training=replace(base.training, max_steps=100_000, batch_size=128, learning_rate=1e-3),
        evaluation=FeatureEvaluation(num_samples=2000, extractor=extractor),
    )


class TimeAndClass(nn.Module):
    """What the published DiT of MNIST is conditioned on, where diffusers' blocks look for theirs."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("frequencies", weights["time_emb.0.half_emb"])
        self.first = _linear(weights["time_emb.1.weight"], weights["time_emb.1.bias"])
        self.second = _linear(weights["time_emb.3.weight"], weights["time_emb.3.bias"])
        self.labels = nn.Embedding.from_pretrained(weights["label_emb.weight"])

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        """The sum of both embeddings."""
        angle = timestep[:, None].float() * self.frequencies
        hidden = functional.relu(self.first(torch.cat([angle.sin(), angle.cos()], -1)))
        return self.second(hidden) + self.labels(class_labels)


def published_dit(weights: dict[str, Tensor]) -> DiTTransformer2DModel:
    """The class-conditional DiT of MNIST (28 x 28, 49 tokens, three blocks, four heads of 64) as diffusers' own.

    The same function in other parameters: the affine part of a LayerNorm goes into the modulation after it, scores
    divided by 7 instead of 8 into the queries, the two layers of its patch embedding into one.
    """
    width, patch, heads = 64, 4, 4
    model = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=width,
        in_channels=1,
        num_layers=1,
        sample_size=28,
        patch_size=patch,
        num_embeds_ada_norm=10,
    )
    model.transformer_blocks = nn.ModuleList(
        BasicTransformerBlock(
            width,
            heads,
            width,
            num_embeds_ada_norm=10,
            attention_bias=True,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
        for _ in range(3)
    )
    embedding = TimeAndClass(weights)
    for index, block in enumerate(model.transformer_blocks):
        own = {
            name.removeprefix(f"dits.{index}."): w for name, w in weights.items() if name.startswith(f"dits.{index}")
        }
        parts = [part for half in ("1", "2") for part in _modulation(own, half)]
        block.norm1.emb, block.norm1.silu, block.norm1.norm.eps = embedding, nn.Identity(), 1e-5
        block.norm1.linear = _linear(*(torch.cat(part) for part in zip(*parts, strict=True)))
        block.attn1.to_q = _linear(own["wq.weight"] * 8 / 7, own["wq.bias"] * 8 / 7)
        block.attn1.to_k = _linear(own["wk.weight"], own["wk.bias"])
        block.attn1.to_v = _linear(own["wv.weight"], own["wv.bias"])
        block.attn1.to_out[0] = _linear(own["lv.weight"], own["lv.bias"])
        layers = [_linear(own[f"ff.{layer}.weight"], own[f"ff.{layer}.bias"]) for layer in (0, 2)]
        block.ff = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    last = weights["patch_emb.weight"]
    model.pos_embed.proj.weight.data = torch.einsum("oi,i...->o...", last, weights["conv.weight"])
    model.pos_embed.proj.bias.data = last @ weights["conv.bias"] + weights["patch_emb.bias"]
    model.pos_embed.pos_embed = weights["patch_pos_emb"]
    model.norm_out.eps = 1e-5
    model.proj_out_1 = _linear(torch.zeros(2 * width, width), torch.cat([weights["ln.bias"], weights["ln.weight"] - 1]))
    model.proj_out_2 = _linear(weights["linear.weight"], weights["linear.bias"])
    return model.eval().requires_grad_(False)


def _modulation(own: dict[str, Tensor], half: str) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of shift, scale and gate: (w n + b)(1 + gamma) + beta = n (1 + scale) + shift."""
    w, b = own[f"ln{half}.weight"], own[f"ln{half}.bias"]
    (gamma, gamma_0), (beta, beta_0), gate = (
        (own[f"{name}{half}.weight"], own[f"{name}{half}.bias"]) for name in ("gamma", "beta", "alpha")
    )
    shift = b[:, None] * gamma + beta, b * (1 + gamma_0) + beta_0
    return [shift, (w[:, None] * gamma, w * (1 + gamma_0) - 1), gate]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def mnist_dit(folder: Path, budget: Budget, device: str) -> Bench:
    """A DiT of digits that nobody here trained: 50 steps of DDIM, judged by a classifier of MNIST."""
    loaders, place = _module(folder / "loaders.py"), resolved_device(device)
    weights = load_file(folder / "mnist_dit/mnist_dit_classcond.safetensors")
    network = published_dit(weights)
    example = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    time, label = torch.tensor([30, 900]), torch.tensor([3, 8])
    found = network(example, timestep=time, class_labels=label).sample
    torch.testing.assert_close(found, loaders.mnist_dit(weights, example, time, label), rtol=1e-4, atol=1e-4)
    network.to(place)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")

    @torch.no_grad()
    def draw(seed: int, steps: int, count: int) -> Tensor:
        scheduler.set_timesteps(steps, device=place)
        images: list[Tensor] = []
        for numbers in (range(start, min(start + 100, count)) for start in range(0, count, 100)):
            x, labels = image_noise(seed, numbers, (1, 28, 28), place), torch.tensor(numbers, device=place) % 10
            for timestep in scheduler.timesteps:
                noise = network(x, timestep=timestep.expand(len(x)), class_labels=labels).sample
                x = scheduler.step(noise, timestep, x).prev_sample
            images.append(unit_images(x))
        return torch.cat(images)

    subject = Subject(name="mnist_dit", transformer=network, draw=draw, num_inference_steps=50, cell=(8, 8))
    card = {"weights": "mnist_dit_classcond.safetensors (Franfee/DM-DiT-DDPM-MNIST, MIT)"}
    if budget.judged == 0:
        return Bench(subject=subject, judge=None, card=card)
    classifier = {
        name: w.to(place) for name, w in load_file(folder / "mnist/classifier_selftrained.safetensors").items()
    }
    extractor = FeatureExtractor(
        function=lambda x: loaders.small_clf(classifier, x, feats=True),
        name="small classifier of MNIST",
        weights_hash="classifier_selftrained.safetensors",
        device=place,
    )
    with np.load(folder / "mnist/mnist.npz") as arrays:
        digits = torch.from_numpy(arrays["x_test"])[:, None].float() / 255
    features = torch.cat([part.cpu() for part in extractor.batches(digits)])
    card |= {
        "extractor": extractor.name,
        "reference": "MNIST (test)",
        "images_each_seed": budget.judged,
        "floor": frechet_floor(features, num_images=budget.judged, generator=torch.Generator().manual_seed(0)),
    }
    reference = FeatureStatistics.from_features(features)
    return Bench(subject=subject, judge=Judge(extractor=extractor, reference=reference), card=card)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_pipeline(path: str, prompts: Path, preset: Preset, device: str, dtype: torch.dtype) -> Bench:
    """A pipeline of diffusers."""
    pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype).to(resolved_device(device))
    pipe.set_progress_bar_config(disable=True)
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    subject = pipeline_subject(
        "pipeline",
        pipe,
        [line for line in lines if line],
        num_inference_steps=preset.num_inference_steps,
        call=preset.call,
    )
    card = {"pipeline": type(pipe).__name__, "prompts": sum(map(bool, lines)), "call": preset.call}
    return Bench(subject=subject, judge=None, card=card)


def measured(bench: Bench, budget: Budget, interval: int, show: Callable[[Outcome], None]) -> list[Outcome]:
    """The table: quality of everyone, then the time of those who differ in it."""
    subject = bench.subject
    steps = subject.num_inference_steps
    shorter = sorted({max(1, round(share * steps)) for share in SHARES_OF_STEPS} - {steps}, reverse=True)
    general = [
        *shorter_contenders(shorter),
        *cached_contenders(subject.transformer, CACHE_THRESHOLDS),
        *extrapolated_contenders(subject.transformer, EXTRAPOLATED_EVERY),
    ]
    takes_cache = hasattr(subject.transformer, "enable_cache")
    groups = [
        _wanted(
            budget,
            reduction_contenders(
                subject.transformer,
                ratio=ratio,
                scope=scope,
                interval=interval,
                cache_threshold=STACKED_THRESHOLD if takes_cache else None,
            ),
        )
        for scope in budget.scopes
        for ratio in budget.ratios
    ]
    outcomes = compare(
        subject,
        [*general, *(one for group in groups for one in group)],
        seeds=budget.seeds,
        num_images=budget.images,
        judge=bench.judge,
        num_judged=budget.judged,
        judged=_is_judged,
        on_outcome=lambda outcome, _: show(outcome),
    )
    latencies: dict[tuple[Any, ...], float] = {}
    for group in (general, *groups):
        timed = [one for one in group if one.family not in UNTIMED]
        speed = compare_speed(subject, timed, count=budget.timed, repeats=budget.repeats, warmup=budget.warmup)
        latencies |= {(one.name, one.scope, one.ratio): _ratio(speed, one.name) for one in timed}
    return [replace(one, latency=latencies.get((one.name, one.scope, one.ratio), one.latency)) for one in outcomes]


def _wanted(budget: Budget, contenders: list[Contender]) -> list[Contender]:
    return [one for one in contenders if not budget.only or one.name in budget.only]


def _is_judged(contender: Contender) -> bool:
    at_ratio = contender.ratio is None or contender.ratio == JUDGED_RATIO
    return at_ratio and contender.name in JUDGED[contender.scope]


def _ratio(speed: Comparison, name: str) -> float:
    # CPU time is the steadier where other processes compete for the cores; it is blind to a GPU.
    return speed.ratio(name, clock="process" if speed.device == "cpu" else "wall").median


def penalised(
    bench: Bench, budget: Budget, interval: int, crops: dict[tuple[str, float, float], Picture]
) -> dict[str, list[LoadOutcome]]:
    """Both readings at every ratio and penalty; the middles of the first seed's images go into ``crops``."""
    settings = {
        "paper": TokenReductionConfig.paper(round_to=1),
        "default": TokenReductionConfig(round_to=1),
    }
    found: dict[str, list[LoadOutcome]] = {}
    for name, config in settings.items():

        def keep(outcome: LoadOutcome, images: Tensor, name: str = name) -> None:
            crops[name, outcome.ratio, outcome.penalty] = crop(bench.subject, images)

        found[name] = compare_penalties(
            bench.subject,
            replace(config, schedule=replace(config.schedule, interval=interval)),
            ratios=budget.ratios,
            penalties=budget.penalties,
            seeds=budget.seeds,
            num_images=budget.images,
            on_outcome=keep,
        )
    return found


def crop(subject: Subject, images: Tensor) -> Picture:
    """The middle 8 x 8 windows of the first images."""
    sizes = zip(images.shape[2:], subject.cell, strict=True)
    rows, columns = (slice(max(0, (size - 8 * window) // 2), (size + 8 * window) // 2) for size, window in sizes)
    return tile_images(2 * images[:CROPPED, :, rows, columns] - 1, columns=CROPPED)


def write_penalties(
    path: Path,
    bench: Bench,
    budget: Budget,
    found: dict[str, list[LoadOutcome]],
    crops: dict[tuple[str, float, float], Picture],
) -> Path:
    """The page of what the penalty does, in numbers and in pictures."""
    subject = bench.subject
    dense = crop(subject, subject.draw(budget.seeds[0], subject.num_inference_steps, budget.images))
    settings = [(name, ratio) for name in found for ratio in budget.ratios]
    grid = Grid(
        cells=(
            (dense, *(None for _ in budget.penalties[1:])),
            *(tuple(crops[name, ratio, value] for value in budget.penalties) for name, ratio in settings),
        ),
        row_labels=("dense", *(f"{name}, ratio {ratio:g}" for name, ratio in settings)),
        column_labels=tuple(f"penalty {value:g}" for value in budget.penalties),
        caption="The middle of the first images. *paper* reduces attention, *default* whole blocks.",
    )
    table = Table(
        columns=(
            "settings",
            "ratio",
            "penalty",
            "PSNR to the dense image, dB",
            "energy at window borders, dense = 1",
            "the same of latents",
            "Gini of drops",
            "most dropped token, share of steps",
        ),
        rows=tuple(
            (
                *(name, f"{one.ratio:g}", f"{one.penalty:g}"),
                *map(fmean, (one.psnr, one.blocking, one.latent_blocking)),
                *(one.gini, one.most),
            )
            for name, rows in found.items()
            for one in rows
        ),
        caption=f"Means over {len(budget.seeds)} seeds of {budget.images} images.",
    )
    section = Section(id="penalty", title="Frequency penalty", items=(table, grid))
    lead = f"What a penalty on tokens that were dropped often does to the images of {subject.name}."
    return write_page(Page(title=f"Frequency penalty: {subject.name}", lead=lead, sections=(section,)), path)


def show_outcome(outcome: Outcome) -> None:
    """As it comes."""
    where = "" if outcome.scope is None else f"{outcome.scope} {outcome.ratio:g}"
    print(f"  {outcome.name:24} {where:11} {outcome.mean_psnr:6.2f} dB  FLOPs {outcome.flops:.3f}", flush=True)


def print_table(outcomes: Sequence[Outcome]) -> None:
    """One block for each scope and ratio, the general ways above."""
    settings = list(dict.fromkeys((one.scope, one.ratio) for one in outcomes))
    for scope, ratio in settings:
        print("\nwithout reduction" if scope is None else f"\nscope {scope}, ratio {ratio:g}")
        print(
            f"  {'':24} {'PSNR':>6} {'+-':>5} {'by seed':>21} {'FLOPs':>6} {'time':>6} {'blocking':>8} {'Frechet':>8}"
        )
        for one in outcomes:
            if (one.scope, one.ratio) != (scope, ratio):
                continue
            seeds = " ".join(f"{value:.2f}" for value in one.psnr)
            time = "" if one.latency is None else f"{one.latency:.2f}"
            distance = "" if one.mean_frechet is None else f"{one.mean_frechet:.2f}"
            print(
                f"  {one.name:24} {one.mean_psnr:6.2f} {one.psnr_std:5.2f} {seeds:>21} {one.flops:6.3f} {time:>6} "
                f"{one.blocking:8.3f} {distance:>8}"
            )


def print_penalties(found: dict[str, list[LoadOutcome]]) -> None:
    """One line for each ratio and penalty."""
    for name, outcomes in found.items():
        print(f"\nfrequency penalty, {name}")
        print(f"  {'ratio':>5} {'penalty':>7} {'PSNR':>6} {'pixels':>6} {'latents':>7} {'Gini':>6} {'most':>6}")
        for one in outcomes:
            psnr, pixels, latents = map(fmean, (one.psnr, one.blocking, one.latent_blocking))
            print(
                f"  {one.ratio:5g} {one.penalty:7g} {psnr:6.2f} {pixels:6.3f} {latents:7.3f} {one.gini:6.3f} "
                f"{one.most:6.3f}"
            )


def print_targets(found: Sequence[Target]) -> None:
    """What was wanted, what was measured."""
    print("\ntargets")
    for one in found:
        verdict = "holds" if one.holds else "FAILS"
        print(f"  {verdict}  {one.claim}: {one.measured:.2f} +- {one.spread:.2f}, wanted {one.wanted:g}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=["digits", "photographs", "mnist_dit", "cifar10"])
    parser.add_argument("--runs", type=Path, default=Path("runs/dito_quality"), help="trained transformers")
    parser.add_argument("--data", type=Path, help="folder with MNIST and a DiT of it, and CIFAR-10")
    parser.add_argument("--train-steps", type=int, help="of transformers that are not trained yet")
    parser.add_argument("--pipeline", help="a pipeline of diffusers, instead of --sets")
    parser.add_argument("--prompts", type=Path, help="a prompt in each line")
    parser.add_argument("--preset", choices=list(PRESETS), default="flux_1024")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=4, help="for each seed")
    parser.add_argument("--judged", type=int, default=48, help="for each seed, for Frechet distances")
    parser.add_argument("--timed", type=int, default=2, help="images of a timed generation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pages", type=Path, help="where to put a page of the penalties, with crops")
    parser.add_argument("--quick", action="store_true", help="everything once, in small: that it runs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    chosen = parser.parse_args(argv)
    budget = Budget(
        seeds=tuple(chosen.seeds),
        images=chosen.images,
        judged=chosen.judged,
        scopes=SCOPES,
        ratios=tuple(chosen.ratios),
        penalties=PENALTIES,
        timed=chosen.timed,
        repeats=chosen.repeats,
        warmup=1,
    )
    if chosen.quick:
        small = {"seeds": (0,), "images": 1, "judged": 8, "scopes": ("block",), "ratios": (0.5,)}
        budget = replace(budget, **small, penalties=(0.0, 0.3), timed=1, repeats=3, warmup=0, only=QUICK)
    for bench in benches(parser, chosen, budget):
        started = datetime.now(UTC)
        print(f"{bench.subject.name}: {bench.card}\n{PUBLISHED}\n", flush=True)
        outcomes = measured(bench, budget, chosen.interval, show_outcome)
        crops: dict[tuple[str, float, float], Picture] = {}
        loads = penalised(bench, budget, chosen.interval, crops)
        if chosen.pages is not None:
            print(write_penalties(chosen.pages / f"penalty-{bench.subject.name}.html", bench, budget, loads, crops))
        reached = targets(outcomes)
        print_table(outcomes)
        print_penalties(loads)
        print_targets(reached)
        metrics = {
            "judge": bench.card,
            "outcomes": [asdict(one) for one in outcomes],
            "penalties": {name: [asdict(one) for one in found] for name, found in loads.items()},
            "targets": [{**asdict(one), "holds": one.holds} for one in reached],
        }
        settings = {
            **asdict(budget),
            "only": sorted(budget.only),
            "interval": chosen.interval,
            "steps": bench.subject.num_inference_steps,
            "device": chosen.device,
            "dtype": chosen.dtype,
            "quick": chosen.quick,
            "threads": torch.get_num_threads(),
        }
        name = f"dito-quality-{bench.subject.name}" + ("-quick" if chosen.quick else "")
        print(write_result(name, metrics, settings, seed=budget.seeds[0], started=started, folder=chosen.results))


def benches(parser: argparse.ArgumentParser, chosen: argparse.Namespace, budget: Budget) -> list[Bench]:
    """What was asked for."""
    if chosen.pipeline is not None:
        if chosen.prompts is None:
            parser.error("--pipeline needs --prompts FILE, with a prompt in each line")
        preset = PRESETS[chosen.preset]
        if chosen.quick:
            preset = Preset(num_inference_steps=3, call={"height": 64, "width": 64, "max_sequence_length": 16})
        return [from_pipeline(chosen.pipeline, chosen.prompts, preset, chosen.device, getattr(torch, chosen.dtype))]
    recipes: dict[str, tuple[Callable[[], FlowRecipe], int | None]] = {
        "digits": (dito_tiny, 2600),
        "photographs": (dito_photographs, None),
    }
    if chosen.data is not None:
        recipes["cifar10"] = (lambda: cifar10(chosen.data), None)
    wanted = chosen.sets or ["digits", "photographs"]
    if chosen.data is None and not set(wanted) <= recipes.keys():
        parser.error("--sets mnist_dit and --sets cifar10 need --data FOLDER")
    return [
        mnist_dit(chosen.data, budget, chosen.device)
        if name == "mnist_dit"
        else trained(
            name,
            recipes[name][0](),
            chosen.train_steps or recipes[name][1],
            chosen.runs / name,
            chosen.device,
            budget,
        )
        for name in wanted
    ]


if __name__ == "__main__":
    main()
