"""What a curation did: counts, reasons, times, words, money and mishaps."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wellposed.lens.captioning import PUBLISHED_MEAN_WORDS, CaptionStatistics
from wellposed.lens.curation_captions import caption_result, spent_on_captions
from wellposed.lens.curation_tables import STAGES, CurationFolder, write_whole

__all__ = ["CurationReport", "StageCount", "report_of"]

WORDS_IN_A_BIN = 20


@dataclass(frozen=True, kw_only=True)
class StageCount:
    """What one stage did.

    Attributes:
        name: of the stage.
        seen: samples that came in.
        kept: samples that went on.
        rejected: how many for which reason.
        seconds: spent in it, over all workers.
    """

    name: str
    seen: int
    kept: int
    rejected: Mapping[str, int]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of one worker."""
        return self.seen / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class CurationReport:
    """What a curation did.

    Attributes:
        samples: in the source.
        units: that they were cut into.
        unfinished: units that some stage has not seen yet.
        stages: in order, without those that were skipped.
        skipped: stages that were left out, and why.
        shards: that were written.
        misnamed: pictures kept although their names end like another format's.
        captions: words, tokens, cost and failures of captions.
        events: crashes of workers, samples that caused them, files that could not be listed to their end.
    """

    samples: int
    units: int
    unfinished: int
    stages: tuple[StageCount, ...]
    skipped: Mapping[str, str]
    shards: int
    misnamed: int
    captions: CaptionStatistics
    events: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def kept(self) -> int:
        """Samples that the last stage kept."""
        return self.stages[-1].kept if self.stages else self.samples

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        values = {name: value for name, value in asdict(self).items() if name not in ("stages", "captions")}
        stages = [asdict(stage) | {"images_per_second": stage.images_per_second} for stage in self.stages]
        values |= {"kept": self.kept, "stages": stages, "captions": self.captions.to_json()}
        write_whole(Path(path), json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.samples} samples in {self.units} units, {self.kept} kept, {self.shards} shards"
        if self.unfinished:
            yield f"  {self.unfinished} units are not finished; curate again to go on"
        yield f"  {'stage':12} {'seen':>9} {'kept':>9} {'images/s':>9}  rejected"
        for stage in self.stages:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(stage.rejected.items()))
            speed = f"{stage.images_per_second:.0f}" if stage.seconds else "-"
            yield f"  {stage.name:12} {stage.seen:9} {stage.kept:9} {speed:>9}  {reasons or '-'}"
        for name, why in self.skipped.items():
            yield f"  {name:12} skipped: {why}"
        if self.misnamed:
            yield f"  {self.misnamed} pictures are in another format than their names say"
        if self.captions.captions:
            mean, middle = self.captions.mean_words, self.captions.percentile(50.0)
            yield f"  words: mean {mean:.1f} (published {PUBLISHED_MEAN_WORDS}), median {middle}"
            yield from (f"    {first:4}-{first + WORDS_IN_A_BIN - 1:<4} {n:9}" for first, n in self._bins())
        if self.captions.prompt_tokens or self.captions.cost:
            tokens = f"{self.captions.prompt_tokens} tokens read, {self.captions.completion_tokens} written"
            yield f"  captioning: {tokens}, cost {self.captions.cost:.4g}"
        yield from (f"  {json.dumps(event, ensure_ascii=False)}" for event in self.events)

    def _bins(self) -> list[tuple[int, int]]:
        bins: Counter[int] = Counter()
        for words, captions in self.captions.words.items():
            bins[words // WORDS_IN_A_BIN * WORDS_IN_A_BIN] += captions
        return sorted(bins.items())


def report_of(out: str | Path) -> CurationReport:
    """The report on what lies in a folder, also of a curation that is not finished.

    Raises:
        FileNotFoundError: no curation there.
    """
    folder = CurationFolder(Path(out))
    plan = folder.read_plan()
    units, skipped = range(plan["units"]), folder.skipped()
    stages: list[StageCount] = []
    unfinished: set[int] = set()
    misnamed = 0
    captions = CaptionStatistics()
    for name in (stage for stage in STAGES if stage not in skipped):
        seen, rejected = 0, Counter[str]()
        for unit in units:
            if not folder.table(name, unit).is_file():
                unfinished.add(unit)
                continue
            records = folder.read_table(name, unit)
            seen += len(records)
            rejected += Counter(record.reason for record in records if record.reason is not None)
            if name == "readable":
                misnamed += sum(1 for record in records if record.kept and "misnamed" in record.facts)
            if name == "captions":
                captions += CaptionStatistics.of(map(caption_result, records), elapsed_seconds=0.0)
        seconds = folder.seconds(name)
        if name == "captions":
            spent = spent_on_captions(folder)
            captions += spent if spent.elapsed_seconds else replace(spent, elapsed_seconds=seconds)
        stages.append(
            StageCount(name=name, seen=seen, kept=seen - rejected.total(), rejected=dict(rejected), seconds=seconds)
        )
    return CurationReport(
        samples=plan["samples"],
        units=len(units),
        unfinished=len(unfinished),
        stages=tuple(stages),
        skipped=skipped,
        shards=len(list(folder.shards.glob("*.tar"))),
        misnamed=misnamed,
        captions=captions,
        events=tuple({"what": "a file could not be listed to its end", **file} for file in plan["damaged"])
        + tuple(folder.read_events()),
    )
