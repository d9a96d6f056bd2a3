"""Drawn images as files: one each, and a grid of the first ones."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.data.pictures import save_image, save_image_grid
from wellposed.recipes.ddpm_draw import grid_columns
from wellposed.recipes.recipe import OnProgress
from wellposed.training.export import replaced_folder

__all__ = ["KeptImages", "announced", "hash_of_prompts", "keep_images"]

MOST_IN_GRID = 100


@dataclass(frozen=True, kw_only=True)
class KeptImages:
    """Where they are.

    Attributes:
        folder: ``00000.png``, ``00001.png``, ...
        overview: the grid.
        seconds: wall-clock time of drawing and writing.
    """

    folder: Path
    overview: Path
    seconds: float


def keep_images(
    batches: Iterator[Float[Tensor, "_ channels height width"]],
    samples: Path,
    name: str,
    *,
    count: int,
    about: Mapping[str, str | int | float],
    about_each: Callable[[int], Mapping[str, str | int | float]] = lambda number: {},
    enlarge: int = 1,
    on_progress: OnProgress,
) -> KeptImages:
    """Write batches of images in [0, 1] as they come; they take the place of an earlier drawing once all are there.

    Args:
        batches: the images.
        samples: folder of the run's samples.
        name: of this drawing.
        count: images in all.
        about: written into every file.
        about_each: from an image's number to what is written into its own file besides.
        enlarge: factor of the grid.
        on_progress: called after every batch.
    """
    shown: list[Tensor] = []
    number = 0
    started = time.perf_counter()
    # What another network or count left is no part of this drawing.
    with replaced_folder(samples / name) as fresh:
        for images in batches:
            for image in images.cpu():
                metadata = {**about, **about_each(number), "number": number}
                save_image(image, fresh / f"{number:05d}.png", metadata=metadata)
                number += 1
            if len(shown) < MOST_IN_GRID:
                shown += images.cpu()
            on_progress("images", number, count)
    seconds = time.perf_counter() - started
    shown = shown[:MOST_IN_GRID]
    grid = samples / f"{name}.png"
    save_image_grid(torch.stack(shown), grid, columns=grid_columns(len(shown)), enlarge=enlarge, metadata=about)
    return KeptImages(folder=samples / name, overview=grid, seconds=round(seconds, 3))


def hash_of_prompts(prompts: Sequence[str]) -> str:
    """Short: what tells the drawings of some prompts from those of others."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:8]


def announced(batches: Iterator[Tensor], of: str, count: int, on_progress: OnProgress) -> Iterator[Tensor]:
    """Batches of images as they come, each of them told of.

    Args:
        batches: the images.
        of: what they are.
        count: images in all.
        on_progress: called before each batch is handed on.
    """
    done = 0
    for images in batches:
        done += len(images)
        on_progress(of, done, count)
        yield images
