"""What happens to one unit of a corpus: each stage a function from records to judged records.

A unit needs nothing but its own table of the stage before, so units run in any order, in any process and on any
machine that sees the folder, and again after whatever stopped them.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from safetensors.numpy import save

from wellposed.data.decoding import BrokenPictureError, DecodedPicture
from wellposed.lens.captioning import Captioner
from wellposed.lens.curation_config import CurationConfig
from wellposed.lens.curation_pictures import clarity, decode_quietly, exposure, information, reduced
from wellposed.lens.curation_scorers import DctEmbedder, Embedder, Scorer, tool_name
from wellposed.lens.curation_sources import BrokenMetadataError, SampleReader
from wellposed.lens.curation_tables import CurationFolder, Record

__all__ = ["CurationTools", "Stage", "UnitPictures", "UnitWork", "picture_stages", "skipped_stages"]

PICTURES_AT_A_TIME = 16
CACHE_BYTES = 1 << 28
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "TIFF": (".tif", ".tiff"),
}


@dataclass(frozen=True, kw_only=True)
class CurationTools:
    """Models that look at pictures. A filter without its model is skipped, which the report says.

    Attributes:
        nsfw: probability that a picture is not safe for work; :func:`~wellposed.lens.curation_scorers.nsfw_scorer`.
        aesthetics: score from about 1 to 10; :class:`~wellposed.lens.curation_scorers.AestheticScorer`.
        watermark: probability of a watermark; :func:`~wellposed.lens.curation_scorers.watermark_scorer`.
        embedder: for near duplicates. The paper's is :class:`~wellposed.lens.curation_scorers.ClipEmbedder`; the one
            that needs no weights is ours.
        captioner: None takes the captions that the source has.
    """

    nsfw: Scorer | None = None
    aesthetics: Scorer | None = None
    watermark: Scorer | None = None
    embedder: Embedder = field(default_factory=DctEmbedder)
    captioner: Captioner | None = None


class UnitPictures:
    """The pictures of a unit, each decoded as often as needed and, in their reduced form, once.

    Args:
        reader: of their bytes.
        config: sizes.
    """

    def __init__(self, reader: SampleReader, config: CurationConfig) -> None:
        self.reader = reader
        self._config = config
        self._reduced: dict[str, Image.Image] = {}
        self._bytes = 0

    def content(self, record: Record) -> bytes:
        """The bytes of a picture.

        Raises:
            BrokenPictureError: they cannot be read, or are others than when they were first looked at.
        """
        try:
            content = self.reader.picture(record.address)
        except (OSError, ValueError, LookupError) as error:  # those of pyarrow are of these kinds
            raise BrokenPictureError("unreadable file", f"{type(error).__name__}: {error}") from error
        known = record.facts.get("sha256")
        if known is not None and known != hashlib.sha256(content).hexdigest():
            raise BrokenPictureError("changed meanwhile", "its bytes are others than when it was first read")
        return content

    def first_look(self, record: Record) -> tuple[DecodedPicture, str]:
        """A picture never seen before, and the hash of its bytes; raises BrokenPictureError."""
        content = self.content(record)
        decoded = self._decode(content, enough=self._config.measured_area)
        self._keep(record, reduced(decoded.pixels, self._config.measured_area))
        return decoded, hashlib.sha256(content).hexdigest()

    def measured(self, record: Record) -> Image.Image:
        """A picture reduced to the area on which measures are taken; raises BrokenPictureError."""
        if record.key not in self._reduced:
            area = self._config.measured_area
            picture = reduced(self._decode(self.content(record), enough=area).pixels, area)
            self._keep(record, picture)
            return picture
        return self._reduced[record.key]

    def whole(self, record: Record) -> Image.Image:
        """A picture in full size; raises BrokenPictureError."""
        return self._decode(self.content(record), enough=None).pixels

    def _decode(self, content: bytes, enough: int | None) -> DecodedPicture:
        return decode_quietly(content, max_pixels=self._config.max_pixels, enough=enough)

    def _keep(self, record: Record, picture: Image.Image) -> None:
        self._bytes += 3 * picture.width * picture.height
        if self._bytes <= CACHE_BYTES:
            self._reduced[record.key] = picture


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A filter.

    Attributes:
        name: one of ``STAGES``.
        settings: what its outcome depends on besides the pictures.
        judge: from records and their pictures to the same records, judged.
    """

    name: str
    settings: Mapping[str, Any]
    judge: Callable[[Sequence[Record], UnitPictures], Iterable[Record]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a number must keep to.

    Attributes:
        least: what is below is rejected.
        below: for this reason.
        most: what is above is rejected.
        above: for this reason.
    """

    least: int | float | None = None
    below: str = ""
    most: float | None = None
    above: str = ""

    def judged(self, record: Record, name: str, value: int | float) -> Record:
        """The record with the number among its facts."""
        reason = None
        if self.least is not None and value < self.least:
            reason = self.below
        elif self.most is not None and value > self.most:
            reason = self.above
        return record.judged({name: value}, reason)


def picture_stages(config: CurationConfig, tools: CurationTools) -> list[Stage]:
    """The filters that look at one picture at a time, in order, without those whose model is not given."""
    read = {"max_pixels": config.max_pixels, "measured_area": config.measured_area, "image_column": config.image_column}
    lit = Limits(least=config.min_exposure, below="too dark", most=config.max_exposure, above="too bright")
    return [
        Stage(name="readable", settings=read, judge=_readable),
        Stage(name="resolution", settings={"min_area": config.min_area}, judge=_large_enough(config.min_area)),
        *_scored("nsfw", tools.nsfw, Limits(most=config.max_nsfw, above="not safe for work")),
        *_scored("aesthetics", tools.aesthetics, Limits(least=config.min_aesthetics, below="not beautiful enough")),
        *_scored("watermark", tools.watermark, Limits(most=config.max_watermark, above="watermark")),
        _measured("clarity", lambda x: clarity(_grey(x)), Limits(least=config.min_clarity, below="blurred or empty")),
        _measured("information", lambda x: information(_grey(x)), Limits(least=config.min_information, below="blank")),
        _measured("exposure", lambda x: exposure(np.asarray(x)), lit),
    ]


def skipped_stages(config: CurationConfig, tools: CurationTools) -> dict[str, str]:
    """The stages that are left out, and why."""
    absent = {name: "no scorer given" for name in ("nsfw", "aesthetics", "watermark") if getattr(tools, name) is None}
    return absent | ({"duplicates": "duplicate_cosine is 1"} if config.duplicate_cosine == 1 else {})


@dataclass(frozen=True, kw_only=True)
class UnitWork:
    """All that is done to a unit before units are compared: a function from its number, to call anywhere.

    Attributes:
        folder: where tables go.
        source: what was listed.
        config: settings.
        tools: models.
    """

    folder: CurationFolder
    source: Path
    config: CurationConfig
    tools: CurationTools

    @property
    def stages(self) -> list[Stage]:
        """The filters."""
        return picture_stages(self.config, self.tools)

    @property
    def embeds(self) -> bool:
        """Whether near duplicates are looked for."""
        return self.config.duplicate_cosine < 1

    def is_done(self, unit: int) -> bool:
        """Whether nothing is left to do."""
        tables = [self.folder.table(stage.name, unit) for stage in self.stages]
        return all(table.is_file() for table in [*tables, *([self.folder.vectors(unit)] if self.embeds else [])])

    def __call__(self, unit: int) -> None:
        """Do what is missing.

        Raises:
            OSError: a file cannot be written.
            ValueError: a scorer or the embedder gives something else than it should.
        """
        records = self.folder.read_unit(unit)
        with SampleReader(self.source, self.config.image_column) as reader:
            pictures = UnitPictures(reader, self.config)
            for stage in self.stages:
                if self.folder.table(stage.name, unit).is_file():
                    judged = self.folder.read_table(stage.name, unit)
                else:
                    start = time.perf_counter()
                    judged = self._judged(stage, unit, records, pictures)
                    self.folder.write_table(stage.name, unit, judged, time.perf_counter() - start)
                records = [record for record in judged if record.kept]
            if self.embeds and not self.folder.vectors(unit).is_file():
                start = time.perf_counter()
                content = save({"vectors": _embedded(records, pictures, self.tools.embedder)})
                self.folder.write_vectors(unit, content, time.perf_counter() - start)

    def _judged(self, stage: Stage, unit: int, records: list[Record], pictures: UnitPictures) -> list[Record]:
        if stage.name != "readable":
            return list(stage.judge(records, pictures))
        # Only a picture never decoded before can end the process; whoever finds it dead looks here for the culprit.
        fatal = self.folder.fatal_keys()
        judged: list[Record] = []
        for record in records:
            if record.key in fatal:
                judged.append(record.judged(reason="fatal", details="the process that decoded it ended, twice"))
                continue
            self.folder.note(unit, record.key)
            judged += stage.judge([record], pictures)
        self.folder.note(unit, "")
        return judged


def _readable(records: Sequence[Record], pictures: UnitPictures) -> Iterator[Record]:
    for record in records:
        try:
            decoded, digest = pictures.first_look(record)
            pictures.reader.metadata(record.address)
        except BrokenPictureError as error:
            yield record.judged(reason=error.reason, details=str(error))
        except (BrokenMetadataError, OSError) as error:
            yield record.judged(reason="broken metadata", details=str(error))
        else:
            facts = {"format": decoded.kind, "width": decoded.width, "height": decoded.height, "sha256": digest}
            oddities = {"misnamed": _is_misnamed(record, decoded.kind), "deep": decoded.deep}
            yield record.judged(facts | {name: True for name, odd in oddities.items() if odd})


def _is_misnamed(record: Record, kind: str) -> bool:
    """Whether a picture in a file of its own is called like one of another format."""
    suffix = Path(record.address.file).suffix.lower()
    return record.address.place is None and suffix not in SUFFIXES.get(kind, (f".{kind.lower()}",))


def _large_enough(min_area: int) -> Callable[[Sequence[Record], UnitPictures], Iterator[Record]]:
    limits = Limits(least=min_area, below="too small")

    def judge(records: Sequence[Record], pictures: UnitPictures) -> Iterator[Record]:
        for record in records:
            yield limits.judged(record, "resolution", record.facts["width"] * record.facts["height"])

    return judge


def _scored(name: str, scorer: Scorer | None, limits: Limits) -> list[Stage]:
    if scorer is None:
        return []

    def judge(records: Sequence[Record], pictures: UnitPictures) -> Iterator[Record]:
        for start in range(0, len(records), PICTURES_AT_A_TIME):
            some = records[start : start + PICTURES_AT_A_TIME]
            seen, lost = _looked_at(some, pictures.whole)
            scores = [float(score) for score in scorer(list(seen.values()))] if seen else []
            if len(scores) != len(seen) or not np.isfinite(scores).all():
                raise ValueError(
                    f"the scorer of {name} gave {scores} for {len(seen)} pictures; expected a finite number each"
                )
            found = dict(zip(seen, scores, strict=True))
            yield from (lost.get(r.key) or limits.judged(r, name, found[r.key]) for r in some)

    return [Stage(name=name, settings={**asdict(limits), "scorer": tool_name(scorer)}, judge=judge)]


def _measured(name: str, measure: Callable[[Image.Image], float], limits: Limits) -> Stage:
    def judge(records: Sequence[Record], pictures: UnitPictures) -> Iterator[Record]:
        for record in records:
            try:
                yield limits.judged(record, name, measure(pictures.measured(record)))
            except BrokenPictureError as error:
                yield record.judged(reason=error.reason, details=str(error))

    return Stage(name=name, settings=asdict(limits), judge=judge)


def _embedded(records: Sequence[Record], pictures: UnitPictures, embedder: Embedder) -> Float32[np.ndarray, "n width"]:
    """One row for each record; of zeros, which resemble nothing, for one whose picture is gone."""
    rows: dict[str, np.ndarray] = {}
    for start in range(0, len(records), PICTURES_AT_A_TIME):
        seen, _ = _looked_at(records[start : start + PICTURES_AT_A_TIME], pictures.measured)
        if seen:
            vectors = np.asarray(embedder(list(seen.values())), dtype=np.float32)
            if vectors.ndim != 2 or len(vectors) != len(seen) or not np.isfinite(vectors).all():
                raise ValueError(
                    f"the embedder gave {vectors.shape} for {len(seen)} pictures; expected a finite row each"
                )
            rows |= zip(seen, vectors, strict=True)
    width = max((len(row) for row in rows.values()), default=0)
    return (
        np.stack([rows.get(r.key, np.zeros(width, np.float32)) for r in records])
        if records
        else np.zeros((0, 0), np.float32)
    )


def _looked_at(
    records: Sequence[Record], look: Callable[[Record], Image.Image]
) -> tuple[dict[str, Image.Image], dict[str, Record]]:
    """Pictures by key, and the records whose pictures are lost since they were first decoded."""
    seen: dict[str, Image.Image] = {}
    lost: dict[str, Record] = {}
    for record in records:
        try:
            seen[record.key] = look(record)
        except BrokenPictureError as error:
            lost[record.key] = record.judged(reason=error.reason, details=str(error))
    return seen, lost


def _grey(picture: Image.Image) -> UInt8[np.ndarray, "height width"]:
    return np.asarray(picture.convert("L"))
