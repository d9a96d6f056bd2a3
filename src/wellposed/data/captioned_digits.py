"""Digit scenes with their captions: a data set in memory, and the same as a folder of pictures to be curated.

Captions say as much as one wants them to (:mod:`wellposed.data.digit_captions`) about pictures that are the same
whatever they say, so that runs on one and on another style differ in nothing but the words.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from wellposed.batches import TextImageBatch
from wellposed.data.buckets import Size
from wellposed.data.digit_captions import LANGUAGES, STYLES, Language, Style, caption
from wellposed.data.digit_scenes import DigitScene, SceneSplit, draw, draw_all, random_scenes
from wellposed.data.images import hashed_bits
from wellposed.data.pictures import save_image

Indices = Sequence[int] | Int[Tensor, " batch"] | Int[np.ndarray, " batch"]

__all__ = ["CaptionedDigits", "caption_name", "captioned_digits", "write_captioned_folder"]


@dataclass(frozen=True, kw_only=True)
class CaptionedDigits:
    """Scenes, drawn and described when they are asked for.

    Attributes:
        name: what it is, for run records.
        scenes: what the pictures show.
        native_sizes: sizes of the pictures, dealt out over them in turn; a batch may be drawn at any other.
        style: of the captions; or a mixture, styles with their shares: which of them a picture has is then a function
            of (``seed``, picture, epoch).
        languages: of the captions; which of them a picture has is a function of (``seed``, picture).
        seed: of those choices.

    Raises:
        ValueError: no scenes, sizes or languages; an unknown style or language; shares that are not positive.
    """

    name: str
    scenes: tuple[DigitScene, ...]
    native_sizes: tuple[Size, ...]
    style: Style | Mapping[Style, float] = "dense"
    languages: tuple[Language, ...] = ("en",)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scenes or not self.native_sizes:
            raise ValueError(
                f"{self.name!r}: {len(self.scenes)} scenes and {len(self.native_sizes)} sizes; give at least one each"
            )
        if not self.languages or not set(self.languages) <= set(LANGUAGES):
            raise ValueError(f"languages are {self.languages!r}; give some of {', '.join(map(repr, LANGUAGES))}")
        shares = self._shares
        if not shares or not set(shares) <= set(STYLES) or min(shares.values()) <= 0:
            raise ValueError(
                f"style is {self.style!r}; write one of {', '.join(map(repr, STYLES))}, or several with positive "
                'shares: {"dense": 0.5, "brief": 0.5}'
            )

    def __len__(self) -> int:
        return len(self.scenes)

    @cached_property
    def sizes(self) -> Int[np.ndarray, "images 2"]:
        """Height and width of each picture."""
        return np.array([self.native_sizes[i % len(self.native_sizes)] for i in range(len(self))])

    def captions(self, indices: Indices, *, epoch: int = 0) -> tuple[str, ...]:
        """What is said of the pictures in an epoch; only a mixture of styles changes with it."""
        positions = torch.as_tensor(indices, dtype=torch.int64)
        styles = tuple(self._shares)
        ends = np.cumsum(list(self._shares.values()))
        at = _unit_interval(hashed_bits(self.seed, positions, epoch)) * ends[-1]
        style_of = np.searchsorted(ends, at, side="right").clip(max=len(styles) - 1)
        tongues = _unit_interval(hashed_bits(self.seed + 1, positions, 0)) * len(self.languages)
        chosen = zip(positions.tolist(), style_of.tolist(), tongues.astype(int).tolist(), strict=True)
        return tuple(
            caption(self.scenes[i], style=styles[style], language=self.languages[tongue]) for i, style, tongue in chosen
        )

    def batch(self, indices: Indices, size: Size | None = None, *, epoch: int = 0) -> TextImageBatch:
        """Pictures at ``indices`` with their captions.

        Args:
            indices: positions in [0, len(self)), in any order, repeats allowed.
            size: of all pictures of the batch; None for their own, which must then be one.
            epoch: which pass over the data.

        Raises:
            ValueError: no indices, or one outside the set; pictures of several sizes and no ``size``.
        """
        positions = torch.as_tensor(indices, dtype=torch.int64)
        if not len(positions):
            raise ValueError("indices is empty; ask for at least one picture")
        if int(positions.min()) < 0 or int(positions.max()) >= len(self):
            raise ValueError(
                f"indices span [{int(positions.min())}, {int(positions.max())}]; "
                f"{self.name!r} has pictures 0 to {len(self) - 1}"
            )
        height, width = size or self._common_size(positions)
        pixels = draw_all([self.scenes[i] for i in positions.tolist()], height, width)
        return TextImageBatch(images=pixels.float() / 127.5 - 1, captions=self.captions(positions, epoch=epoch))

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on."""
        about = [asdict(scene) for scene in self.scenes], self.native_sizes, self._shares, self.languages, self.seed
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    @property
    def _shares(self) -> Mapping[Style, float]:
        return {self.style: 1.0} if isinstance(self.style, str) else self.style

    def _common_size(self, positions: Int[Tensor, "batch"]) -> Size:
        sizes = {Size(*size) for size in self.sizes[positions.numpy()].tolist()}
        if len(sizes) > 1:
            raise ValueError(
                f"the pictures have {len(sizes)} sizes, {', '.join(f'{s.height} x {s.width}' for s in sorted(sizes))}; "
                "say which size the batch is to have: batch(indices, size)"
            )
        return sizes.pop()


def captioned_digits(
    count: int,
    *sizes: Size | tuple[int, int],
    split: SceneSplit = "train",
    style: Style | Mapping[Style, float] = "dense",
    languages: tuple[Language, ...] = ("en",),
    seed: int = 0,
) -> CaptionedDigits:
    """Random scenes with captions. Scenes depend on (count, split, seed) alone: style and languages change no picture.

    Args:
        count: pictures.
        sizes: height and width, one for all or several that take turns.
        split: "train" or "test", which share neither handwriting nor combinations.
        style: see :class:`CaptionedDigits`.
        languages: see :class:`CaptionedDigits`.
        seed: of the scenes, and of the choice of styles and languages.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: see :class:`CaptionedDigits` and :func:`wellposed.data.digit_scenes.random_scenes`.
    """
    return CaptionedDigits(
        name=f"captioned digits ({split})",
        scenes=random_scenes(count, split=split, seed=seed),
        native_sizes=tuple(Size(*size) for size in sizes),
        style=style,
        languages=languages,
        seed=seed,
    )


def write_captioned_folder(
    folder: str | Path,
    count: int,
    *,
    sizes: Sequence[Size | tuple[int, int]],
    split: SceneSplit = "train",
    seed: int = 0,
) -> None:
    """Write ``00000.png``, ``00001.png``, ... and beside each a ``.json`` with scene, size and all captions.

    The raw corpus of a run that starts at the curation of images: the pictures of ``captioned_digits(count, *sizes,
    split=split, seed=seed)``, the same bytes wherever they are written by the same libraries. ``captions`` in the
    sidecar has one for each style and language, by :func:`caption_name`. What is there already is kept; a second call
    goes on where the first was stopped.

    Args:
        folder: made if it is not there.
        count: pictures.
        sizes: height and width; several take turns.
        split: see :func:`captioned_digits`.
        seed: of the scenes.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: the folder holds pictures of other scenes; see :func:`captioned_digits`.
    """
    pictures = captioned_digits(count, *sizes, split=split, seed=seed)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for i, (scene, (height, width)) in enumerate(zip(pictures.scenes, pictures.sizes.tolist(), strict=True)):
        picture, sidecar = root / f"{i:05}.png", root / f"{i:05}.json"
        text = json.dumps(_described(scene, height, width), ensure_ascii=False, indent=2) + "\n"
        if not sidecar.is_file():
            save_image(draw(scene, height, width).float() / 255, picture)
            # Last, and renamed: a sidecar says that its picture is whole.
            partial = sidecar.with_name(f".{sidecar.name}.{os.getpid()}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(sidecar)
        elif sidecar.read_text(encoding="utf-8") != text or not picture.is_file():
            raise ValueError(
                f"{sidecar} describes another picture than the one to be written, or its picture is gone; choose "
                "another folder or remove this one"
            )


def caption_name(style: Style, language: Language) -> str:
    """What captions of a style and a language are called in metadata: "dense", and "dense_fr" for any but English."""
    return style if language == "en" else f"{style}_{language}"


def _described(scene: DigitScene, height: int, width: int) -> dict[str, Any]:
    captions = {
        caption_name(style, language): caption(scene, style=style, language=language)
        for style in STYLES
        for language in LANGUAGES
    }
    return {"scene": asdict(scene), "height": height, "width": width, "captions": captions}


def _unit_interval(bits: np.ndarray) -> np.ndarray:
    """The upper 53 of 64 bits as a number in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53
