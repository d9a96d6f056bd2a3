"""The demo of the room udm: what a misread prediction costs, and what closes the gap to masked diffusion."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.demo.settings import DemoSettings
from wellposed.demo.stages import Stages
from wellposed.evaluation.frontier import Frontier
from wellposed.oracles import TokenOracle
from wellposed.paths import Linear
from wellposed.recipes.device import resolved_device
from wellposed.recipes.index import recipe_named
from wellposed.recipes.run_folder import RunFolder
from wellposed.recipes.text_draw import draw_texts, empty_canvas, load_pipeline
from wellposed.recipes.text_recipe import TextRecipe
from wellposed.recipes.udm import source_bytes
from wellposed.recipes.udm_comparison import (
    WAYS,
    bounds,
    frontiers,
    judge_of,
    run_folder,
    train_contender,
)
from wellposed.udm.grids import GridSpacing, alpha_grid
from wellposed.udm.kernels import Kernel, MaximalCoupling, TokenState, Uniform
from wellposed.udm.models import TableModel
from wellposed.udm.objectives import nelbo_density
from wellposed.udm.prediction import Prediction

__all__ = ["TEXT_WAYS", "text_frontiers", "text_study", "token_study"]

VOCABULARY, LENGTH = 4, 3
CONTENDERS = ("udm_denoiser", "udm_loo", "audm", "mdm")
TEXT_WAYS = (
    "udm_denoiser",
    "udm_loo",
    "audm",
    "udm_loo_corrector",
    "udm_loo_denoiser_temperature",
    "udm_loo_corrector_nucleus",
    "mdm",
    "mdm_nucleus",
)


def token_study(stages: Stages, settings: DemoSettings) -> dict[str, Any]:
    """Exact bound and exact samplers on a law over 4^3 sequences, for a model that is right and one misread."""

    def compute(folder: Path) -> dict[str, Any]:
        oracle = _random_law(stages.seed)
        alphas = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
        return {
            "alphas": alphas.tolist(),
            "density": {name: [_density(oracle, float(alpha), name) for alpha in alphas] for name in READINGS},
            "bound": {name: _integral(oracle, name) for name in READINGS},
            "entropy": oracle.entropy(),
            "steps": settings.token_steps,
            "distance": {name: [_distance(oracle, name, steps) for steps in settings.token_steps] for name in SAMPLERS},
        }

    chosen = {"steps": settings.token_steps, "vocabulary": VOCABULARY, "length": LENGTH}
    return dict(stages.run("tokens", "Exact bound and samplers on a small law of tokens", chosen, compute).metrics)


READINGS = ("leave_one_out", "denoiser")
"""What the plug-in bound is given: the posterior it asks for, or the denoiser read as one."""

SAMPLERS: Mapping[str, tuple[type[Kernel], bool, GridSpacing]] = {
    "udm_loo": (Uniform, False, "linear"),
    "udm_loo_geometric": (Uniform, False, "geometric"),
    "udm_misread": (Uniform, True, "linear"),
    "max_coupling": (MaximalCoupling, False, "linear"),
}
"""Kernel, whether the denoiser is plugged in where the leave-one-out posterior belongs, spacing."""


def _random_law(seed: int) -> TokenOracle:
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand((VOCABULARY,) * LENGTH, generator=generator, dtype=torch.float64) ** 4
    return TokenOracle.from_table(table / table.sum())


def _prediction(oracle: TokenOracle, kernel: Kernel, states: Tensor, alpha: Tensor, misread: bool) -> Prediction:
    """Exact; misread: the denoiser's numbers under the leave-one-out posterior's name."""
    state = TokenState(tokens=states)
    if not misread:
        return TableModel(oracle=oracle, kernel=kernel)(state, alpha)
    denoiser = TableModel(oracle=oracle, kernel=kernel, kind="denoiser")(state, alpha)
    return replace(denoiser, kind="leave_one_out")


def _density(oracle: TokenOracle, alpha: float, reading: str) -> float:
    """Expected density of the plug-in bound over all clean and noisy sequences, with alpha = 1 - t."""
    kernel, states = Uniform(VOCABULARY), oracle.sequences
    level = torch.full((len(states),), alpha, dtype=torch.float64)
    prediction = _prediction(oracle, kernel, states, level, reading == "denoiser")
    likelihood = kernel.likelihood(TokenState(tokens=states), level)
    index = oracle.sequences.T.expand(len(states), -1, -1)
    joint = likelihood.gather(-1, index).prod(1) * oracle.weights  # of (x_t, x_0)
    rows = prediction.rows(torch.ones_like(states, dtype=torch.bool))
    slope = torch.full((states.numel(),), -1.0, dtype=torch.float64)
    # A token's density depends on its own clean token alone: K evaluations serve all K^L clean sequences.
    each = [nelbo_density(kernel, rows, torch.full_like(rows.tokens, k), slope) for k in range(VOCABULARY)]
    by_token = torch.stack(each, -1).view(*states.shape, VOCABULARY)
    return float((joint * by_token.gather(-1, index).sum(1)).sum())


def _integral(oracle: TokenOracle, reading: str, points: int = 40) -> float:
    """Over t in [0, 1], by Gauss-Legendre after the substitution t = u^3 (10 - 15 u + 6 u^2), flat at both ends."""
    # Golub and Welsch: nodes and weights are those of the Jacobi matrix.
    off = torch.arange(1, points, dtype=torch.float64)
    off = off / (4 * off**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    u, weight = (nodes + 1) / 2, vectors[0] ** 2
    t, slope = u**3 * (10 - 15 * u + 6 * u**2), 30 * u**2 * (1 - u) ** 2
    return sum(
        float(w * s) * _density(oracle, 1 - float(each), reading) for each, s, w in zip(t, slope, weight, strict=True)
    )


def _distance(oracle: TokenOracle, sampler: str, steps: int) -> float:
    """Total variation between the data and what the chain gives, exactly: its law is pushed through every step."""
    make, misread, spacing = SAMPLERS[sampler]
    kernel, states = make(VOCABULARY), oracle.sequences
    law: Float[Tensor, " states"] = torch.full_like(oracle.weights, 1 / len(states))
    grid = alpha_grid(steps, spacing, schedule=Linear(eps=1e-3))
    index = states.T.expand(len(states), -1, -1)
    for alpha_t, alpha_s in pairwise(grid):
        before, after = alpha_t.expand(len(states)), alpha_s.expand(len(states))
        prediction = _prediction(oracle, kernel, states, before, misread)
        clean = (prediction if misread else prediction.to(kernel.plugs_in)).log_probs().exp()
        bridge = kernel.bridge(TokenState(tokens=states), clean, before, after)
        law = law @ bridge.gather(-1, index).prod(1)
    return float((law - oracle.weights).abs().sum() / 2)


def text_study(stages: Stages, settings: DemoSettings, *, device: str) -> dict[str, Any]:
    """Small language models on Python's own source: uniform with two heads, absorbing, masked; sampled in many ways."""
    folder = stages.folder / "text"
    base = _demo_recipe(settings)
    steps = settings.text_training_steps

    def train(where: Path) -> dict[str, Any]:
        for name in CONTENDERS:
            train_contender(base, name, folder, steps=steps, seed=stages.seed, device=device)
        return {name: bounds(base, name, folder, steps=steps, seed=stages.seed, device=device) for name in CONTENDERS}

    held_out = stages.run(
        "text",
        "Training four language models on Python's source",
        {"steps": steps, "files": settings.text_files, "validation": settings.text_validation},
        train,
    ).metrics

    def compute(where: Path) -> dict[str, Any]:
        judge, real = judge_of(base, folder, CONTENDERS[0], stages.seed)
        found = frontiers(
            base,
            TEXT_WAYS,
            folder,
            temperatures=settings.text_temperatures,
            evaluations=settings.text_evaluations,
            num_samples=settings.text_samples,
            seeds=(stages.seed,),
            judge=judge,
            device=device,
            on_point=lambda way, temperature, seed, score: stages.announce(
                f"  {way:>30}  temperature {temperature:.2f}  perplexity {score.value:8.1f}  "
                f"entropy {score.entropy:.3f}"
            ),
        )
        return {
            "real": {"perplexity": real.value, "entropy": real.entropy},
            "judge": judge.name,
            "frontiers": {name: frontier.to_dict() for name, frontier in found.items()},
            "texts": _texts(base, folder, settings, stages.seed, device),
        }

    chosen = {
        "training_steps": steps,
        "files": settings.text_files,
        "temperatures": settings.text_temperatures,
        "evaluations": settings.text_evaluations,
        "samples": settings.text_samples,
        "ways": TEXT_WAYS,
    }
    sampled = stages.run("frontiers", "Sampling the language models", chosen, compute).metrics
    return {"held_out": dict(held_out), **sampled}


def text_frontiers(text: Mapping[str, Any]) -> dict[str, Frontier]:
    """The frontiers of ``text_study``, out of its record."""
    return {name: Frontier.from_dict(record) for name, record in text["frontiers"].items()}


def _demo_recipe(settings: DemoSettings) -> TextRecipe:
    base: Any = recipe_named("udm_tiny")
    return replace(
        base,
        texts=partial(source_bytes, files=settings.text_files),
        block_length=64,
        network=replace(base.network, num_layers=2, given_embedding=False),
        training=replace(base.training, batch_size=32, ema_decay=0.98),
        sampling=replace(base.sampling, batch_size=128),
        evaluation=replace(base.evaluation, num_samples=settings.text_samples, num_validation=settings.text_validation),
    )


def _texts(base: TextRecipe, folder: Path, settings: DemoSettings, seed: int, device: str) -> dict[str, str]:
    """The first text of some ways, at the lowest temperature."""
    texts: dict[str, str] = {}
    for name in ("udm_denoiser", "udm_loo_corrector", "mdm"):
        way = WAYS[name]
        run = RunFolder(run_folder(folder, way.contender, seed))
        pipeline = load_pipeline(run.pipeline, resolved_device(device))
        tokens, _ = next(
            draw_texts(
                pipeline.transformer,
                "masked" if way.contender == "mdm" else "uniform",
                replace(base.sampling, temperature=min(settings.text_temperatures), **way.changes),
                empty_canvas(1, base.block_length),
                num_inference_steps=settings.text_evaluations,
                seed=seed,
            )
        )
        texts[name] = pipeline.tokenizer.decode(tokens[0])
    return texts
