"""Pictures whose every property is known: one handwritten digit, in one colour, at one place of a plain ground.

A :class:`DigitScene` says which of scikit-learn's handwritten digits is drawn (extra ``demo``), in which of eight inks,
at which of five places and on which of six grounds: 2,400 combinations. One sixth of them is held out: for each digit,
ink and place there is one ground that scenes of the training split never have, and the only one that scenes of the test
split have. The two splits share no handwriting either. Whoever draws what a test caption asks for has put it together,
not remembered it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from wellposed.data.bundled import digits

__all__ = [
    "ATTRIBUTES",
    "DigitScene",
    "SceneSplit",
    "attributes",
    "draw",
    "draw_all",
    "is_held_out",
    "random_scenes",
    "stable_number",
]

SceneSplit = Literal["train", "test"]

INKS: Mapping[str, tuple[int, int, int]] = {
    "red": (215, 20, 30),
    "green": (15, 125, 45),
    "blue": (25, 60, 215),
    "yellow": (255, 230, 0),
    "purple": (115, 15, 150),
    "orange": (255, 120, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
GROUNDS: Mapping[str, tuple[int, int, int]] = {
    "grey": (150, 150, 150),
    "brown": (125, 75, 40),
    "pink": (250, 160, 190),
    "turquoise": (70, 210, 200),
    "beige": (222, 196, 150),
    "lavender": (180, 165, 240),
}
# Where the centre of the digit is, in heights from above and in widths from the left. In a square picture a digit in a
# corner then keeps 1/32 of the side from the borders.
PLACES: Mapping[str, tuple[float, float]] = {
    "upper left": (9 / 32, 9 / 32),
    "upper right": (9 / 32, 23 / 32),
    "lower left": (23 / 32, 9 / 32),
    "lower right": (23 / 32, 23 / 32),
    "centre": (1 / 2, 1 / 2),
}

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "colour": tuple(INKS),
    "position": tuple(PLACES),
    "background": tuple(GROUNDS),
}
"""Names of the classes of each property of a scene."""

CELLS = 8
SMALLEST_SIDE = 2 * CELLS
# Grey level of the stored digits where the edge of a stroke is drawn. Lower, loops fill up; higher, strokes break.
EDGE_LEVEL = 0.4
GENTLEST_EDGE = 0.5 / EDGE_LEVEL  # less, and there would be ink where there is none


@dataclass(frozen=True, kw_only=True)
class DigitScene:
    """What a picture shows; its size is chosen when it is drawn.

    Attributes:
        digit: 0 to 9.
        colour: of the ink, one of ``ATTRIBUTES["colour"]``.
        position: of the digit in the picture, one of ``ATTRIBUTES["position"]``.
        background: colour of the ground, one of ``ATTRIBUTES["background"]``.
        handwriting: index into the handwritten digits of the split.
        split: "train" or "test" handwriting.

    Raises:
        ValueError: a property outside its list.
    """

    digit: int
    colour: str
    position: str
    background: str
    handwriting: int
    split: SceneSplit = "train"

    def __post_init__(self) -> None:
        if not 0 <= self.digit <= 9:
            raise ValueError(f"digit is {self.digit!r}; give 0 to 9")
        for name in ("colour", "position", "background"):
            if getattr(self, name) not in ATTRIBUTES[name]:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(ATTRIBUTES[name])}")
        if self.split not in get_args(SceneSplit):
            raise ValueError(f'split is {self.split!r}; write split="train" or split="test"')


def attributes(scene: DigitScene) -> dict[str, int]:
    """Class of each property, an index into the names of :data:`ATTRIBUTES`."""
    named = {name: ATTRIBUTES[name].index(getattr(scene, name)) for name in ("colour", "position", "background")}
    return {"digit": scene.digit, **named}


def is_held_out(scene: DigitScene) -> bool:
    """Whether the combination of its four properties is kept from training."""
    return _held_out_grounds()[scene.digit, scene.colour, scene.position] == scene.background


def draw(scene: DigitScene, height: int, width: int) -> UInt8[Tensor, "3 height width"]:
    """The picture of a scene; see :func:`draw_all`."""
    return draw_all([scene], height, width)[0]


def draw_all(scenes: Sequence[DigitScene], height: int, width: int) -> UInt8[Tensor, "scenes 3 height width"]:
    """Pictures of one size, of any shape.

    The digit's square has half of the shorter side. Its 8 x 8 grey levels, interpolated linearly and zero outside, are
    a field f over the picture; with k pixels to a cell, the share of ink in a pixel is

        (f - 0.4) max(5/4, 2 k / 3) + 1/2, between 0 and 1,

    so that strokes end within a pixel or two at every size.

    Args:
        scenes: what to draw, at least one.
        height: in pixels.
        width: in pixels.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: no scenes, a shorter side below 16, or a handwriting that is not in the split or of another digit.
    """
    if not scenes:
        raise ValueError("there are no scenes to draw; give at least one")
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"the picture has {height} x {width} pixels; a digit needs half of the shorter side and has 8 x 8 cells: "
            f"give at least {SMALLEST_SIDE}"
        )
    side = min(height, width) / 2
    places = [PLACES[scene.position] for scene in scenes]
    rows = _cell_weights(height, [y for y, _ in places], side)
    columns = _cell_weights(width, [x for _, x in places], side)
    field = rows @ torch.stack([_cells_of(scene) for scene in scenes]) @ columns.mT
    ink = ((field - EDGE_LEVEL) * max(GENTLEST_EDGE, 2 * side / CELLS / 3) + 0.5).clamp(0, 1)[:, None]
    colour, ground = (
        torch.tensor([table[name] for name in names], dtype=torch.float32)[:, :, None, None]
        for table, names in ((INKS, [s.colour for s in scenes]), (GROUNDS, [s.background for s in scenes]))
    )
    return (ground + (colour - ground) * ink).round().to(torch.uint8)


def random_scenes(count: int, *, split: SceneSplit = "train", seed: int = 0) -> tuple[DigitScene, ...]:
    """Scenes in random order, with the handwriting and the combinations of the split.

    Every combination comes once before any comes again, and among those still to come the next is one whose
    properties have come least often: any beginning of the sequence is balanced. Over all combinations of a split, every
    digit, ink and place comes equally often, and so do the three together; grounds, up to one.

    Args:
        count: how many.
        split: "train" has 2,000 combinations, "test" the 400 others.
        seed: of the order and of the handwriting.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: count below 1, or an unknown split.
    """
    if count < 1:
        raise ValueError(f"count is {count}; give at least 1")
    if split not in get_args(SceneSplit):
        raise ValueError(f'split is {split!r}; write split="train" or split="test"')
    generator = torch.Generator().manual_seed(stable_number("scenes", split, seed))
    combinations = _combinations(split)
    rounds = -(-count // len(combinations))
    order = np.concatenate([_balanced_order(combinations, generator) for _ in range(rounds)])[:count]
    _, labels = _handwriting(split)
    by_digit = [(labels == digit).nonzero().flatten().tolist() for digit in range(10)]
    choices = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return tuple(
        DigitScene(
            digit=digit,
            colour=ATTRIBUTES["colour"][colour],
            position=ATTRIBUTES["position"][position],
            background=ATTRIBUTES["background"][background],
            handwriting=by_digit[digit][int(choice * len(by_digit[digit]))],
            split=split,
        )
        for (digit, colour, position, background), choice in zip(combinations[order].tolist(), choices, strict=True)
    )


def stable_number(*parts: int | str) -> int:
    """63 bits that depend on every part, the same in every process and Python version."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@cache
def _handwriting(split: SceneSplit) -> tuple[Float[Tensor, "n cells cells"], Int[Tensor, "n"]]:
    """Ink in each cell, 0 to 1, and the digits."""
    stored = digits(CELLS, split=split)
    batch = stored.batch(range(len(stored)))
    assert batch.labels is not None
    return (batch.images[:, 0] + 1) / 2, batch.labels


def _cells_of(scene: DigitScene) -> Float[Tensor, "cells cells"]:
    ink, labels = _handwriting(scene.split)
    if not 0 <= scene.handwriting < len(ink):
        raise ValueError(f"handwriting is {scene.handwriting}; the {scene.split} split has 0 to {len(ink) - 1}")
    if int(labels[scene.handwriting]) != scene.digit:
        raise ValueError(
            f"handwriting {scene.handwriting} of the {scene.split} split is a {int(labels[scene.handwriting])}, and "
            f"the scene's digit is {scene.digit}; take scenes from random_scenes"
        )
    return ink[scene.handwriting]


def _cell_weights(length: int, centres: Sequence[float], side: float) -> Float[Tensor, "scenes length cells"]:
    """How much of each cell is at each pixel of a row or column."""
    pixels = torch.arange(length) + 0.5
    middles = torch.tensor(centres)[:, None] * length
    in_cells = (pixels - middles) * (CELLS / side) + CELLS / 2
    return (1 - (in_cells[:, :, None] - torch.arange(CELLS) - 0.5).abs()).clamp_min(0)


@cache
def _held_out_grounds() -> Mapping[tuple[int, str, str], str]:
    """The one ground that each digit, ink and place has in the test split only."""
    triples = list(product(range(10), INKS, PLACES))
    # Dealt out in the order of their hashes: as irregular as a hash, and as even as a deal.
    triples.sort(key=lambda triple: stable_number("held out", *triple))
    grounds = ATTRIBUTES["background"]
    return {triple: grounds[i % len(grounds)] for i, triple in enumerate(triples)}


@cache
def _combinations(split: SceneSplit) -> np.ndarray:
    """Class indices of digit, ink, place and ground, one row for each combination of the split."""
    held_out = _held_out_grounds()
    names = ATTRIBUTES["colour"], ATTRIBUTES["position"], ATTRIBUTES["background"]
    rows = [
        (digit, *indices)
        for digit, *indices in product(range(10), *(range(len(some)) for some in names))
        if (held_out[digit, names[0][indices[0]], names[1][indices[1]]] == names[2][indices[2]]) == (split == "test")
    ]
    return np.array(rows)


def _balanced_order(combinations: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Rows in an order every beginning of which has each value of each column about equally often."""
    alike = np.zeros((len(combinations), len(combinations)), dtype=np.float32)
    for column in combinations.T:
        alike += (column[:, None] == column) * (column.max() + 1)
    # How often the values of a row have come, each divided by its share; the fraction breaks ties.
    come = torch.rand(len(combinations), generator=generator).numpy()
    order = np.empty(len(combinations), dtype=np.int64)
    for place in range(len(order)):
        order[place] = chosen = come.argmin()
        come += alike[chosen]
        come[chosen] = np.inf
    return order
