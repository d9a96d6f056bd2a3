"""A folder of somebody's own pictures with captions, as a set to train on.

Nobody filters such a set but its owner: every picture is kept, blurred, dark, small or twice, and what cannot be
trained on is an error with its name, because in a set of thirty pictures each one counts. Pictures that look alike are
kept too, and a warning names them.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from wellposed.data.buckets import Buckets
from wellposed.data.shards import ShardedImages
from wellposed.lens.curation import CurationConfig, audit, curate
from wellposed.lens.curation_scorers import DctEmbedder
from wellposed.lens.curation_sources import SampleReader
from wellposed.lens.curation_stages import UnitPictures
from wellposed.lens.curation_tables import CurationFolder
from wellposed.lens.near_duplicates import duplicate_groups
from wellposed.lens.presets import TRAINING_BUCKETS

__all__ = ["LargestBase", "own_pictures", "published_buckets"]

STYLE = "own"
KEEP_ALL = CurationConfig(
    min_area=1,
    min_clarity=0.0,
    min_information=0.0,
    min_exposure=0.0,
    max_exposure=1.0,
    duplicate_cosine=1.0,
    caption_style=STYLE,
)
ALIKE = CurationConfig().duplicate_cosine
TOLERANCE = 0.1
MOST_NAMED = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LargestBase(Buckets):
    """Buckets of which a picture belongs to one alone: at the largest base that it is large enough for."""

    def choices(self, sizes: Int[np.ndarray, "images 2"]) -> Int[np.ndarray, "images bases"]:
        """See :meth:`Buckets.choices`."""
        numbers = super().choices(sizes)
        fits = numbers >= 0
        is_last = fits & (fits.cumsum(axis=1) == fits.sum(axis=1, keepdims=True))
        return np.where(is_last, numbers, np.int16(-1))


def published_buckets() -> LargestBase:
    """The 27 shapes of the published training for a set of any size.

    A picture is trained in one shape: at 1024 x 1024 or as much, if it is large enough, else at 768, else at 512. It
    may be enlarged by a tenth for that, which no eye sees; smaller ones are left out, with a warning. A share is one
    picture, so that no shape is ever too rare to fill one and nothing is repeated to that end.
    """
    return LargestBase(
        by_base=TRAINING_BUCKETS.by_base,
        batch_sizes=dict.fromkeys(TRAINING_BUCKETS.by_base, 1),
        tolerance=TOLERANCE,
    )


def own_pictures(source: Path, folder: Path, *, seed: int) -> ShardedImages:
    """The pictures in a folder with the captions beside them: ``name.txt``, or "caption" in ``name.json``.

    They are copied, byte for byte, so that a run goes on with what it began with.

    Args:
        source: the folder, with folders in it or without; or a ``.tar`` or ``.parquet`` file.
        folder: where the copies go; a second call finds them there.
        seed: of the set.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pictures; files that are none, pictures without a caption: all are named.
    """
    is_new = not (folder / "report.json").is_file()
    if is_new:
        curate(source, folder, KEEP_ALL)
    problems = [f"{damaged['file']} ({damaged['error']})" for damaged in CurationFolder(folder).read_plan()["damaged"]]
    problems += [_said(rejection.source, rejection.reason, rejection.details) for rejection in audit(folder)]
    if problems:
        shutil.rmtree(folder)  # it has a list of the files, which are about to change
        raise ValueError(
            f"{len(problems)} files in {source} cannot be trained on: {_some(problems)}. Write what a picture shows "
            "into a .txt of the same name (or a .json with a caption); mend or move away what is no picture"
        )
    if is_new and (groups := _alike(source, folder)):
        logger.warning(
            "%d groups of pictures in %s look the same, and count as often as they are there: %s",
            len(groups),
            source,
            _some([" = ".join(group) for group in groups]),
        )
    return ShardedImages.open(folder / "shards", upscale=True, seed=seed)


def _said(source: str, reason: str, details: str | None) -> str:
    return f"{source} ({reason}{f': {details}' if details else ''})"


def _some(texts: Sequence[str]) -> str:
    more = len(texts) - MOST_NAMED
    return "; ".join([*texts[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])])


def _alike(source: Path, folder: Path) -> list[list[str]]:
    """Files of pictures that are the same but for size and compression, group by group."""
    curated = CurationFolder(folder)
    units = range(curated.read_plan()["units"])
    records = [record for unit in units for record in curated.read_table("captions", unit)]
    embed = DctEmbedder()
    with SampleReader(source, KEEP_ALL.image_column) as reader:
        vectors = [embed([UnitPictures(reader, KEEP_ALL).measured(record)]) for record in records]
    groups = duplicate_groups(np.concatenate(vectors), ALIKE)
    members = [[str(records[i].address) for i in np.flatnonzero(groups == first)] for first in np.unique(groups)]
    return [names for names in members if len(names) > 1]
