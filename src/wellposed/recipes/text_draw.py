"""Networks of text recipes, the models that they are, and texts drawn with them."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.recipes.loading import loaded_pipeline
from wellposed.recipes.text_recipe import KernelName, TextRecipe, TextSamplingSettings
from wellposed.training.context import derived_seed
from wellposed.udm.corrector import Corrector
from wellposed.udm.draws import Truncation
from wellposed.udm.grids import alpha_grid
from wellposed.udm.kernels import Kernel, kernel_named
from wellposed.udm.models import NetworkModel
from wellposed.udm.pipeline import UniformDiffusionPipeline
from wellposed.udm.remasking import Remasking
from wellposed.udm.sampler import sample, split_budget
from wellposed.udm.scheduler import UniformDiffusionScheduler
from wellposed.udm.steps import SamplingRecord, SamplingSettings
from wellposed.udm.transformer import UniformDiffusionTransformerModel

__all__ = ["build_network", "draw_texts", "empty_canvas", "load_pipeline", "scheduler_of", "token_model"]


def build_network(recipe: TextRecipe, vocab_size: int) -> UniformDiffusionTransformerModel:
    """The network for a vocabulary, with random weights."""
    kernel = kernel_named(recipe.kernel, vocab_size)
    chosen = {name: value for name, value in asdict(recipe.network).items() if value is not None}
    if not kernel.has_noise_tokens:
        del chosen["absorbing_fusion"]
    masked = kernel.channel == "masked"
    return UniformDiffusionTransformerModel.of_size(
        chosen.pop("size"),
        vocab_size=vocab_size,
        prediction_kind=recipe.head,
        mask_token=masked,
        # What is masked says nothing about the time that the number of masks does not say too.
        time_conditioning=not masked,
        **chosen,
    )


def token_model(network: UniformDiffusionTransformerModel, kernel: Kernel) -> NetworkModel:
    """The network as what samplers and losses ask."""
    config: Any = network.config
    return NetworkModel(
        network=network,
        kind=config.prediction_kind,
        channel=kernel.channel,
        knows_given=config.given_embedding,
    )


def scheduler_of(recipe: TextRecipe, vocab_size: int) -> UniformDiffusionScheduler:
    """The recipe's way of sampling, as the pipeline keeps it. It has neither the confidence sampler nor remasking."""
    chosen = recipe.sampling
    return UniformDiffusionScheduler(
        kernel=chosen.kernel or recipe.kernel,
        prediction_kind=recipe.head,
        vocab_size=vocab_size,
        timestep_spacing=chosen.spacing,
        temperature=chosen.temperature,
        temper=chosen.temper,
        top_p=chosen.top_p,
        corrector_steps=chosen.corrector_steps,
        corrector_k=chosen.corrector_k,
        corrector_selection=chosen.corrector_selection,
    )


def load_pipeline(pipeline: Path, device: torch.device) -> UniformDiffusionPipeline:
    """An exported pipeline, ready to evaluate.

    Raises:
        ValueError: files that are missing or damaged.
    """
    loaded = loaded_pipeline(UniformDiffusionPipeline, pipeline)
    loaded.transformer.to(device).eval().requires_grad_(False)
    return loaded


def empty_canvas(count: int, length: int) -> TextBatch:
    """Sequences of which nothing is given."""
    return TextBatch(tokens=torch.zeros(count, length, dtype=torch.int64))


def draw_texts(
    network: UniformDiffusionTransformerModel,
    trained: KernelName,
    settings: TextSamplingSettings,
    canvas: TextBatch,
    *,
    num_inference_steps: int,
    seed: int,
) -> Iterator[tuple[Int[Tensor, "batch length"], SamplingRecord]]:
    """Batches of tokens on the CPU, and what each cost.

    Sequence i depends on (``seed``, i) and its canvas alone, not on the batch it is drawn in.

    Args:
        network: of the clean tokens.
        trained: name of the kernel that it was trained with.
        settings: how to sample.
        canvas: what is given of every sequence; the number of them.
        num_inference_steps: budget of network evaluations, those of a corrector included.
        seed: see above.

    Raises:
        ValueError: a budget below 1, or a way of sampling that does not suit the kernel.
    """
    device = next(network.parameters()).device
    config: Any = network.config
    kernel = kernel_named(settings.kernel or trained, config.vocab_size)
    model = token_model(network, kernel)
    corrector = None
    if settings.corrector_steps:
        corrector = Corrector(
            steps=settings.corrector_steps, k=settings.corrector_k, selection=settings.corrector_selection
        )
    steps, corrected = split_budget(num_inference_steps, corrector)
    if settings.remasking is None:
        alphas, sigmas = alpha_grid(steps, settings.spacing), None
    else:
        plan = Remasking(schedule=settings.remasking, eta=settings.eta).plan(steps)
        alphas, sigmas = plan.alphas, plan.sigmas
    for start in range(0, len(canvas.tokens), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        part = TextBatch(
            tokens=canvas.tokens[rows].to(device),
            given=None if canvas.given is None else canvas.given[rows].to(device),
            valid=None if canvas.valid is None else canvas.valid[rows].to(device),
        )
        numbers = range(start, start + len(part.tokens))
        tokens, record = sample(
            model,
            kernel,
            part,
            alphas,
            settings=SamplingSettings(
                temperature=settings.temperature,
                temper=settings.temper,
                truncation=Truncation(top_p=settings.top_p),
            ),
            corrector=corrector,
            corrected_steps=corrected,
            sigmas=sigmas,
            strategy=settings.strategy,
            generator=[torch.Generator(device).manual_seed(derived_seed(seed, "text", number)) for number in numbers],
        )
        yield tokens.cpu(), record
