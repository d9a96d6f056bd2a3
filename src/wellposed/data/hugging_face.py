"""A table of the library ``datasets`` (extra ``data``) as an image set.

The table is loaded by the caller, from a folder, a file or the hub, so nothing here touches the network::

    table = datasets.load_dataset("uoft-cs/cifar10", split="train")
    dataset = table_images(table, 32, image_column="img", label_column="label")
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, Shaped
from PIL import Image
from torch import Tensor

from wellposed.data.images import Framing, ImageDataset, ResizeFilter

__all__ = ["TablePictures", "table_images"]


@dataclass(frozen=True, kw_only=True)
class TablePictures:
    """A column of pictures, decoded when they are read.

    Attributes:
        table: a ``datasets.Dataset``.
        column: the column with the pictures.
        framing: crop, size and filter.
    """

    table: Any
    column: str
    framing: Framing

    def __len__(self) -> int:
        return len(self.table)

    def read(self, indices: Int[Tensor, "batch"]) -> Shaped[Tensor, "batch channels height width"]:
        """Pixels at ``indices``, uint8."""
        pictures = self.table.select(indices.tolist())[self.column]
        return torch.from_numpy(np.stack([self.framing.apply(picture) for picture in pictures]))

    def fingerprint(self) -> str:
        """SHA-256 of framing, column and the table's own fingerprint."""
        # datasets hashes its tables itself (contents and every transformation) and keeps the hash under this name only.
        return hashlib.sha256(f"{self.framing} {self.column} {self.table._fingerprint}".encode()).hexdigest()


def table_images(
    table: Any,
    size: int,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    resize_filter: ResizeFilter = "bicubic",
    channels: Literal[1, 3] = 3,
    flip: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """The pictures of a ``datasets.Dataset``, each cut to its largest central square and resized.

    Args:
        table: one split, not streamed, with an ``Image`` column.
        size: side of the images, in pixels.
        image_column: name of that column.
        label_column: name of a column with classes, or None for an unlabelled set.
        resize_filter: resampling filter of Pillow, see :class:`wellposed.data.images.Framing`.
        channels: 3 for RGB, 1 for luma.
        flip: mirror at random, see :class:`wellposed.data.images.ImageDataset`.
        seed: seed of the flips.

    Raises:
        ValueError: a dictionary of splits or a stream instead of a table, a missing column, or one without pictures.
    """
    if not hasattr(table, "select") or not hasattr(table, "column_names") or isinstance(table, dict):
        raise ValueError(
            f"got a {type(table).__name__}; give one split as a table: datasets.load_dataset(..., split='train') "
            "without streaming=True"
        )
    for column in (image_column, *([label_column] if label_column else [])):
        if column not in table.column_names:
            raise ValueError(f"the table has no column {column!r}; it has {', '.join(table.column_names)}")
    framing = Framing(size=size, resize_filter=resize_filter, channels=channels)
    if len(table) and not isinstance(table[0][image_column], Image.Image):
        raise ValueError(
            f"the column {image_column!r} holds no pictures; write "
            f"table.cast_column({image_column!r}, datasets.Image()) first"
        )
    labels = None if label_column is None else torch.tensor(table[label_column][:], dtype=torch.int64)
    return ImageDataset(
        name=getattr(table.info, "dataset_name", None) or "table",
        source=TablePictures(table=table, column=image_column, framing=framing),
        labels=labels,
        class_names=() if label_column is None else tuple(getattr(table.features[label_column], "names", ())),
        flip=flip,
        seed=seed,
    )
