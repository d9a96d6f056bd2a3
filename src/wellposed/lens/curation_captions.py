"""The stage of captions: every answer is kept as soon as it is there, because answers cost money.

What a captioner answered is appended to a journal, a file a unit in a folder of its own for each style, kind of
captioner and model. A run that was killed, or one with other thresholds, finds it there and asks only for the rest. A
sample without a caption is rejected with the captioner's reason and never reaches a shard.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wellposed.data.decoding import BrokenPictureError
from wellposed.data.words import word_count
from wellposed.lens.captioning import Captioner, CaptionRequest, CaptionResult, MetadataCaptioner
from wellposed.lens.curation_config import CurationConfig
from wellposed.lens.curation_sources import SampleReader
from wellposed.lens.curation_stages import UnitPictures
from wellposed.lens.curation_tables import CurationFolder, Record, read_lines

__all__ = ["CaptionWork", "StyledCaption", "caption_result", "forget_failures"]

NOT_SENT = "not sent"


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
    """

    folder: CurationFolder
    source: Path
    config: CurationConfig
    captioner: Captioner | None
    before: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the outcome depends on. How often a captioner tries again, or what it may cost, is not among it."""
        return {"captions": self._name(), "max_caption_words": self.config.max_caption_words}

    def __call__(self, unit: int) -> None:
        """Caption what is not captioned yet, and leave the table.

        Raises:
            ValueError: the captioner gives other results than requests.
            OSError: a file cannot be written.
        """
        start = time.perf_counter()
        records = [record for record in self.folder.read_table(self.before, unit) if record.kept]
        journal = self.folder.root / "answers" / self._name() / f"{unit:05d}.jsonl"
        # Captions of the source are asked for anew: they cost nothing, and may have been mended meanwhile.
        answers = read_lines(journal) if self.captioner else ()
        results = {answer["key"]: CaptionResult(**answer) for answer in answers}
        with SampleReader(self.source, self.config.image_column) as reader:
            pictures = UnitPictures(reader, self.config)
            missing = [record for record in records if record.key not in results]
            for first in range(0, len(missing), self.config.captions_at_a_time):
                found = self._ask(missing[first : first + self.config.captions_at_a_time], pictures)
                if self.captioner:
                    _append(journal, [result for result in found if result.text])
                results |= {result.key: result for result in found}
        judged = [self._judged(record, results[record.key]) for record in records]
        self.folder.write_table("captions", unit, judged, time.perf_counter() - start)

    def _name(self) -> str:
        """Style, captioner and model, as the name of a folder."""
        if self.captioner is None:
            return f"{self.config.caption_style}-of-the-source"
        kind: Any = self.captioner if hasattr(self.captioner, "__qualname__") else type(self.captioner)
        model = getattr(self.captioner, "model", None)
        parts = [self.config.caption_style, kind.__qualname__, *([model] if isinstance(model, str) else [])]
        return re.sub(r"[^\w.]+", "-", "-".join(parts), flags=re.ASCII)

    def _ask(self, records: Sequence[Record], pictures: UnitPictures) -> list[CaptionResult]:
        requests: list[CaptionRequest] = []
        lost: list[CaptionResult] = []
        for record in records:
            try:
                content, metadata = pictures.content(record), pictures.reader.metadata(record.address)
            except (BrokenPictureError, OSError, ValueError) as error:
                lost.append(CaptionResult(key=record.key, error=f"unreadable file: {error}"))
            else:
                requests.append(CaptionRequest(key=record.key, picture=content, metadata=metadata))
        captioner = self.captioner or MetadataCaptioner(source=StyledCaption(style=self.config.caption_style))
        results = list(captioner(requests)) if requests else []
        if [result.key for result in results] != [request.key for request in requests]:
            raise ValueError(
                f"the captioner gave results for {[result.key for result in results]}, asked for "
                f"{[request.key for request in requests]}; expected one for each request, in their order"
            )
        return results + lost

    def _judged(self, record: Record, result: CaptionResult) -> Record:
        words = 0 if result.text is None else word_count(result.text)
        spent = {
            name: value for name, value in asdict(result).items() if name not in ("key", "text", "error") and value
        }
        facts = {"captions": words, "captioning": spent} | ({} if result.text is None else {"caption": result.text})
        if result.reason is not None:
            return record.judged(facts, result.reason, result.error)
        if not words:
            return record.judged(facts, "no words", f"the caption is {result.text!r}")
        if words > self.config.max_caption_words:
            return record.judged(facts, "too many words", f"{words}, the limit is {self.config.max_caption_words}")
        return record.judged(facts)


def caption_result(record: Record) -> CaptionResult:
    """What a captioner said of a record that the stage of captions has judged."""
    text = record.facts.get("caption")
    error = None if text else record.details or record.reason or "no caption"
    return CaptionResult(key=record.key, text=text, error=error, **record.facts.get("captioning", {}))


def forget_failures(folder: CurationFolder, units: Iterable[int], *, all_of_them: bool) -> int:
    """Remove the tables of units with samples that are to be asked for again; returns their number.

    Args:
        folder: of the curation.
        units: to look at.
        all_of_them: also those whose caption failed; otherwise those only for which nobody was asked.
    """
    forgotten = 0
    for unit in units:
        if not folder.table("captions", unit).is_file():
            continue
        failed = [record for record in folder.read_table("captions", unit) if "caption" not in record.facts]
        if any(all_of_them or record.reason == NOT_SENT for record in failed):
            folder.table("captions", unit).unlink()
            forgotten += 1
    return forgotten


def _append(journal: Path, results: Sequence[CaptionResult]) -> None:
    if not results:
        return
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab") as file:
        # A run that was killed while it wrote left half a line.
        file.truncate(journal.read_bytes().rfind(b"\n") + 1)
        file.write("".join(json.dumps(asdict(result), ensure_ascii=False) + "\n" for result in results).encode())
        file.flush()
        os.fsync(file.fileno())
