"""Pictures of prompts from a run's pipeline."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.lens.latents import Autoencoder
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.scheduler import LensFlowMatchScheduler
from wellposed.lens.text_encoder import LensTextEncoder, TextFeatures
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.lens_base import load_referring
from wellposed.recipes.loading import loaded_pipeline
from wellposed.recipes.run_folder import REFERENCE
from wellposed.recipes.t2i_recipe import T2ISamplingSettings
from wellposed.training.context import derived_seed

__all__ = ["draw_prompts", "lens_pipeline", "load_lens"]


def lens_pipeline(
    network: LensTransformer2DModel, autoencoder: Autoencoder, text_encoder: LensTextEncoder | None
) -> LensPipeline:
    """The pipeline of trained parts, silent; without text encoder it draws from features alone."""
    pipe = LensPipeline(
        scheduler=LensFlowMatchScheduler(),
        vae=autoencoder,
        text_encoder=cast(Any, text_encoder.model) if text_encoder else None,
        tokenizer=text_encoder.tokenizer if text_encoder else None,
        transformer=network,
        release="base",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_lens(pipeline: Path, device: torch.device) -> LensPipeline:
    """An exported pipeline, or one that refers to another, silent and ready to draw.

    Raises:
        ValueError: files that are missing or damaged.
    """
    refers = (pipeline / REFERENCE).is_file()
    pipe = load_referring(pipeline, device) if refers else loaded_pipeline(LensPipeline, pipeline)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_prompts(
    pipe: LensPipeline,
    prompts: Sequence[str],
    sampling: T2ISamplingSettings,
    *,
    seed: int,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    size: tuple[int, int] | None = None,
    text: Callable[[Sequence[str]], TextFeatures] | None = None,
) -> Iterator[Float[Tensor, "batch channels height width"]]:
    """Batches of pictures in [0, 1], one for each prompt; picture i depends on its prompt and on (``seed``, i) alone.

    Args:
        pipe: the pipeline, where it is to run.
        prompts: what to draw.
        sampling: everything that the other arguments leave open.
        seed: of the noise.
        num_inference_steps: T.
        guidance_scale: w.
        size: height and width.
        text: from prompts to features, for a pipeline without text encoder.
    """
    height, width = size or sampling.size
    for start in range(0, len(prompts), sampling.batch_size):
        some = list(prompts[start : start + sampling.batch_size])
        seeds = [derived_seed(seed, "picture", start + place) for place in range(len(some))]
        drawn = pipe(
            **_described(some, text),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps or sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale if guidance_scale is None else guidance_scale,
            generator=[torch.Generator(pipe.device).manual_seed(number) for number in seeds],
            output_type="pt",
            return_dict=False,
        )
        yield drawn[0].float()


def _described(prompts: list[str], text: Callable[[Sequence[str]], TextFeatures] | None) -> dict[str, Any]:
    if text is None:
        return {"prompt": prompts}
    found = text(prompts)
    return {"prompt_embeds": found.hidden_states, "prompt_embeds_mask": found.mask}
