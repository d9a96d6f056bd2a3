"""Recipes that teach a Lens somebody's own pictures: a low-rank adapter, or all weights.

The pictures lie in ``$WELLPOSED_DATA/lens/pictures``, each with a text of the same name beside it, and the pipeline to
go on from in ``$WELLPOSED_DATA/lens/base``::

    wellposed train lens_lora --out runs/mine
    wellposed sample runs/mine --prompt "..."

What those who fine-tune Lens elsewhere run into, and what is done here:

* *Memory.* All captions are encoded first, and the text encoder (13 GB) is let go before the network (8 GB in bfloat16
  under an adapter) is loaded. Blocks are computed again in the backward pass.
* *Noise.* Times follow the published law of training, logit-normal with mean mu(n), and not the shifted grid of
  inference, whose mu is another.
* *Guidance.* A tenth of the captions is dropped, so that the network keeps knowing pictures without text.
* *Sizes.* Every picture is trained in one of the published shapes and none is enlarged visibly; ``buckets.txt`` says
  which picture counts how often.
* *Compilation.* With ``training.compile`` texts are padded to multiples of 16, so that blocks are traced a few times
  and not once for each length.
* *Names.* Adapters come in two files, for diffusers and for ComfyUI; both keep ``img_qkv`` and ``txt_qkv`` whole.
* *Disk.* The run's pipeline is the adapter, or the network, and a reference to the rest. With an adapter a checkpoint
  holds that alone.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wellposed.recipes.recipe import RequiredFile, TrainingSettings
from wellposed.recipes.t2i_recipe import (
    LoraSettings,
    PretrainingStage,
    Source,
    T2ISamplingSettings,
    TextToImageRecipe,
)

__all__ = ["lens_full", "lens_lora", "with_adapter", "with_folders"]

PAPER = "2605.21573"
PICTURES, BASE = "lens/pictures", "lens/base"


def lens_lora() -> TextToImageRecipe:
    """An adapter of rank 64 for the projections of attention, learned in 1500 steps of four pictures.

    Memory, by arithmetic: 14 GB for the text encoder alone; then 8 GB for the network, 1 for the adapter with Adam's
    averages, and up to 5 for encoding and decoding of pictures.
    """
    return TextToImageRecipe(
        name="lens_lora",
        summary="a low-rank adapter that teaches a Lens your own captioned pictures; by arithmetic 14 GB of a GPU",
        paper=PAPER,
        expected="no figure: what it has learned is for you to judge, by the pictures that every checkpoint leaves",
        **_sources(PICTURES, BASE),
        stages=(
            PretrainingStage(
                name="adapter",
                buckets=_buckets,
                shares=4,
                training=TrainingSettings(
                    max_steps=1500,
                    batch_size=4,
                    learning_rate=1e-4,
                    warmup_steps=50,
                    ema_decay=None,
                    clip_norm=1.0,
                    precision="bf16",
                    checkpoint_every=250,
                    log_every=10,
                ),
                gradient_checkpointing=True,
                adapter=LoraSettings(rank=64, alpha=64),
            ),
        ),
        sampling=T2ISamplingSettings(size=(1024, 1024), num_inference_steps=50, guidance_scale=5.0, batch_size=1),
        caption_style="own",
        shown_captions=4,
    )


def lens_full() -> TextToImageRecipe:
    """All weights at a tenth of the adapter's rate, for sets of a thousand pictures and more.

    Memory, by arithmetic: 66 GB for weights, gradients and Adam's averages in float32, and 16 for its step. Several
    GPUs each hold all of it; ``sharding="fsdp2"`` in the training settings spreads it over them instead.
    """
    adapter = lens_lora()
    stage = adapter.stages[0]
    training = replace(stage.training, learning_rate=1e-5, max_steps=3000, checkpoint_every=1000)
    return replace(
        adapter,
        name="lens_full",
        summary="all weights of a Lens, taught your own captioned pictures; by arithmetic 82 GB, of one GPU or several",
        stages=(replace(stage, name="whole", training=training, adapter=None),),
    )


def with_folders(recipe: TextToImageRecipe, *, pictures: str | Path, base: str | Path) -> TextToImageRecipe:
    """The recipe with pictures and pipeline from other folders.

    Args:
        recipe: one of this page.
        pictures: the folder of pictures.
        base: the folder of the pipeline.
    """
    return replace(recipe, **_sources(str(Path(pictures).absolute()), str(Path(base).absolute())))


def with_adapter(recipe: TextToImageRecipe, adapter: LoraSettings) -> TextToImageRecipe:
    """The recipe with another rank, or beside the MLPs too."""
    return replace(recipe, stages=tuple(replace(stage, adapter=adapter) for stage in recipe.stages))


def _sources(pictures: str, base: str) -> dict[str, Any]:
    """Where everything comes from; paths below the data folder."""
    captioned = RequiredFile(
        path=pictures,
        what="the folder of your own pictures, each with its caption in a .txt file of the same name",
        source="your camera, your pen; a caption says in a sentence or more what there is to see",
    )
    pipeline = RequiredFile(
        path=base,
        what="the folder of a Lens pipeline, with transformer, text_encoder, tokenizer, vae and scheduler",
        source="a mirror of Lens-Base, or a run of lens_paper (its folder pipeline)",
    )
    return {
        "corpus": Source(get=partial(_pictures, pictures), what=f"your own pictures in {pictures}", files=(captioned,)),
        "autoencoder": Source(get=partial(_autoencoder, base), what=f"that of {base}", files=(pipeline,)),
        "text_encoder": Source(get=partial(_text_encoder, base), what=f"that of {base}", files=(pipeline,)),
    }


def _buckets() -> Any:
    from wellposed.recipes.own_pictures import published_buckets

    return published_buckets()


def _pictures(path: str, folder: Path, data: Path, recipe: TextToImageRecipe, seed: int, device: str) -> Any:
    from wellposed.recipes.own_pictures import STYLE, own_pictures

    if (recipe.caption_style, recipe.languages) != (STYLE, ("en",)):
        raise ValueError(
            f"{recipe.name} has captions of style {recipe.caption_style!r} in {', '.join(recipe.languages)}, but your "
            "own pictures have the one caption that lies beside each, whatever its style and language; leave "
            "with_captions out, and write those captions into the .txt files"
        )
    return own_pictures(data / path, folder, seed=seed)


def _autoencoder(path: str, folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    from wellposed.recipes.lens_base import LensBase

    return LensBase(data / path).autoencoder()


def _text_encoder(path: str, folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    from wellposed.recipes.lens_base import BaseTextEncoder

    return BaseTextEncoder.of(data / path, folder, device)
