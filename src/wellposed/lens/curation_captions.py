"""The stage of captions: every answer is kept as soon as it is there, because answers cost money.

What a captioner answered, a failure too, is appended to a journal, a file a unit in a folder of its own for each style
and each captioner: its kind, and its ``identity``, a mapping of what its captions depend on, if it has one. A run that
was killed, or one with other thresholds, finds it there and asks only for the rest. The journal also says what the
answers cost and when they were worked on. A sample without a caption is rejected with the captioner's reason and never
reaches a shard.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from wellposed.data.decoding import BrokenPictureError
from wellposed.data.words import word_count
from wellposed.lens.captioning import (
    Captioner,
    CaptionRequest,
    CaptionResult,
    CaptionStatistics,
    MetadataCaptioner,
    TellingCaptioner,
)
from wellposed.lens.curation_config import CurationConfig
from wellposed.lens.curation_sources import SampleReader
from wellposed.lens.curation_stages import UnitPictures
from wellposed.lens.curation_tables import CurationFolder, Record, append_lines, read_lines

__all__ = ["CaptionWork", "StyledCaption", "caption_result", "forget_failures", "spent_on_captions"]

NOT_SENT, UNREADABLE = "not sent", "unreadable file"
# These reasons say nothing against a picture: nobody answered, or nobody was asked.
ASKED_ANEW = frozenset({NOT_SENT, "no answer", UNREADABLE})
LONGEST_NAME = 60  # of a model, in the name of a folder


@dataclass(frozen=True, kw_only=True)
class StyledCaption:
    """The caption of a style in the metadata of a sample, for :class:`~wellposed.lens.captioning.MetadataCaptioner`.

    Attributes:
        style: a name in the field ``captions``; if it has none of this name, the field ``caption`` is taken.
    """

    style: str

    def __call__(self, metadata: Mapping[str, Any]) -> str:
        """The caption; raises LookupError if there is none."""
        captions = metadata.get("captions")
        if isinstance(captions, dict) and self.style in captions:
            return captions[self.style]
        return metadata["caption"]


@dataclass(frozen=True, kw_only=True)
class CaptionWork:
    """Captions the samples of a unit: a function from its number.

    Attributes:
        folder: where tables and answers go.
        source: what was listed.
        config: style, lengths.
        captioner: None for the captions that the source has.
        before: the stage whose tables are read.
        ask_again: ask anew where an answer was no caption.
    """

    folder: CurationFolder
    source: Path
    config: CurationConfig
    captioner: Captioner | None
    before: str
    ask_again: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the outcome depends on. How often a captioner tries again, or what it may cost, is not among it."""
        identity = self._identity()
        settings = {"captions": self._name(), "max_caption_words": self.config.max_caption_words}
        return settings | ({} if identity is None else {"captioner": identity})

    def __call__(self, unit: int) -> None:
        """Caption what is not captioned yet, and leave the table.

        Raises:
            ValueError: the captioner gives other results than requests.
            OSError: a file cannot be written.
        """
        start = time.perf_counter()
        records = [record for record in self.folder.read_table(self.before, unit) if record.kept]
        journal = self._journal(unit)
        answers = [] if journal is None else journal.results()
        results = {result.key: result for result in answers if self._counts(result)}
        before = 0.0 if journal is None else _seconds(journal.spans())
        abouts: dict[str, str] = {}
        with SampleReader(self.source, self.config.image_column) as reader:
            pictures = UnitPictures(reader, self.config)
            missing = [record for record in records if record.key not in results]
            for first in range(0, len(missing), self._at_a_time()):
                found = self._ask(missing[first : first + self._at_a_time()], pictures, journal, abouts)
                results |= {result.key: result for result in found}
            judged = [self._judged(record, results[record.key], reader, abouts) for record in records]
        self.folder.write_table("captions", unit, judged, before + time.perf_counter() - start)

    def _name(self) -> str:
        """Style and captioner, as the name of a folder."""
        if self.captioner is None:
            return f"{self.config.caption_style}-of-the-source"
        kind: Any = self.captioner if hasattr(self.captioner, "__qualname__") else type(self.captioner)
        identity = self._identity() or {}
        model = identity.get("model", getattr(self.captioner, "model", None))
        parts = [self.config.caption_style, kind.__qualname__]
        if isinstance(model, str) and model:
            parts.append(model[-LONGEST_NAME:])
        if identity:
            parts.append(hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8])
        return re.sub(r"[^\w.]+", "-", "-".join(parts), flags=re.ASCII)

    def _identity(self) -> dict[str, Any] | None:
        """What the captioner's captions depend on, as far as it says so."""
        identity = getattr(self.captioner, "identity", None)
        return dict(identity) if isinstance(identity, Mapping) else None

    def _journal(self, unit: int) -> "_Journal | None":
        # Captions of the source are asked for anew: they cost nothing, and may have been mended meanwhile.
        if self.captioner is None or isinstance(self.captioner, MetadataCaptioner):
            return None
        return _Journal(_journals(self.folder, self._name()) / f"{unit:05d}.jsonl")

    def _counts(self, result: CaptionResult) -> bool:
        """Whether an answer from earlier stands."""
        return result.reason not in ASKED_ANEW and not (self.ask_again and result.text is None)

    def _at_a_time(self) -> int:
        wanted = self.captioner.at_a_time if isinstance(self.captioner, TellingCaptioner) else 1
        return max(self.config.captions_at_a_time, wanted)

    def _ask(
        self, records: Sequence[Record], pictures: UnitPictures, journal: "_Journal | None", abouts: dict[str, str]
    ) -> list[CaptionResult]:
        requests: list[CaptionRequest] = []
        lost: list[CaptionResult] = []
        for record in records:
            try:
                content, metadata = pictures.content(record), pictures.reader.metadata(record.address)
            except (BrokenPictureError, OSError, ValueError) as error:
                lost.append(CaptionResult(key=record.key, error=f"{UNREADABLE}: {error}"))
            else:
                requests.append(CaptionRequest(key=record.key, picture=content, metadata=metadata))
                abouts[record.key] = _hash_of(metadata)
        captioner = self.captioner or MetadataCaptioner(source=StyledCaption(style=self.config.caption_style))
        results = _answers(captioner, requests, journal) if requests else []
        if [result.key for result in results] != [request.key for request in requests]:
            raise ValueError(
                f"the captioner gave results for {[result.key for result in results]}, asked for "
                f"{[request.key for request in requests]}; expected one for each request, in their order"
            )
        return results + lost

    def _judged(self, record: Record, result: CaptionResult, reader: SampleReader, abouts: Mapping[str, str]) -> Record:
        words = 0 if result.text is None else word_count(result.text)
        facts = {"captions": words} | ({} if result.text is None else {"caption": result.text})
        if result.reason is not None:
            return record.judged(facts, result.reason, result.error)
        if not words:
            return record.judged(facts, "no words", f"the caption is {result.text!r}")
        if words > self.config.max_caption_words:
            return record.judged(facts, "too many words", f"{words}, the limit is {self.config.max_caption_words}")
        try:
            about = abouts.get(record.key) or _hash_of(reader.metadata(record.address))
        except (OSError, ValueError) as error:
            return record.judged(facts, UNREADABLE, f"{UNREADABLE}: {error}")
        return record.judged(facts | {"metadata": about})


@dataclass
class _Journal:
    """The answers for a unit. As a context, what is kept within is on the disk at its end; threads may keep answers.

    Attributes:
        path: of the file, which need not be there.
    """

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _began: float = 0.0

    def __enter__(self) -> None:
        self._began = time.time()

    def __exit__(self, *raised: object) -> None:
        append_lines(self.path, [], sync=True)

    def keep(self, result: CaptionResult) -> None:
        """Add an answer, and since when it was worked on."""
        if result.reason == NOT_SENT and not (result.cost or result.prompt_tokens):
            return
        with self._lock:
            append_lines(self.path, [{**asdict(result), "began": self._began, "ended": time.time()}])

    def results(self) -> list[CaptionResult]:
        """The answers, in the order in which they came; of a request several where it was asked for anew."""
        names = [one.name for one in fields(CaptionResult)]
        return [CaptionResult(**{name: line[name] for name in names}) for line in read_lines(self.path)]

    def spans(self) -> list[tuple[float, float]]:
        """When answers were worked on: no two overlap."""
        return _merged((line["began"], line["ended"]) for line in read_lines(self.path) if "began" in line)


def _answers(captioner: Captioner, requests: Sequence[CaptionRequest], journal: _Journal | None) -> list[CaptionResult]:
    if journal is None:
        return list(captioner(requests))
    with journal:
        if isinstance(captioner, TellingCaptioner):
            return captioner.ask(requests, journal.keep)
        results = list(captioner(requests))
        for result in results:
            journal.keep(result)
        return results


def spent_on_captions(folder: CurationFolder) -> CaptionStatistics:
    """Tokens, cost and time of all that the captioner of a curation answered, in vain or not, in this and earlier runs.

    ``elapsed_seconds`` is the time in which at least one process waited for answers.
    """
    name = (folder.settings("captions") or {}).get("captions")
    spent, spans = CaptionStatistics(), list[tuple[float, float]]()
    for path in sorted(_journals(folder, name).glob("*.jsonl")) if name else ():
        journal = _Journal(path)
        spent += CaptionStatistics.of(journal.results(), elapsed_seconds=0.0)
        spans += journal.spans()
    return replace(spent, words={}, failures={}, elapsed_seconds=_seconds(_merged(spans)))


def _journals(folder: CurationFolder, name: str) -> Path:
    return folder.root / "answers" / name


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times without overlaps, in their order."""
    merged: list[tuple[float, float]] = []
    for began, ended in sorted(spans):
        if merged and began <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], ended)
        else:
            merged.append((began, ended))
    return merged


def _seconds(spans: Iterable[tuple[float, float]]) -> float:
    # A clock may have been put back meanwhile.
    return sum((max(0.0, ended - began) for began, ended in spans), 0.0)


def _hash_of(metadata: Mapping[str, Any]) -> str:
    """Of what a shard takes from the source besides a caption."""
    about = {name: value for name, value in metadata.items() if name != "caption"}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def caption_result(record: Record) -> CaptionResult:
    """What the stage of captions made of a record: a caption that it keeps, or the reason why there is none."""
    if record.reason is not None:
        return CaptionResult(key=record.key, error=record.reason)
    return CaptionResult(key=record.key, text=record.facts["caption"])


def forget_failures(folder: CurationFolder, units: Iterable[int], *, all_of_them: bool) -> int:
    """Remove the tables of units with samples that are to be asked for again; returns their number.

    Args:
        folder: of the curation.
        units: to look at.
        all_of_them: also those whose answer was no caption; otherwise those only for which nobody answered, or
            whose file could not be read when somebody was to be asked.
    """
    forgotten = 0
    for unit in units:
        if not folder.table("captions", unit).is_file():
            continue
        records = folder.read_table("captions", unit)
        if any(record.reason in ASKED_ANEW or (all_of_them and "caption" not in record.facts) for record in records):
            folder.table("captions", unit).unlink()
            forgotten += 1
    return forgotten
