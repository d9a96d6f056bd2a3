"""From raw pictures to training shards: nine filters, captions, a report (Lens, arXiv 2605.21573, section 3.1).

::

    report = curate("raw", "curated", CurationConfig(), tools=CurationTools(nsfw=nsfw_scorer(), captioner=captioner))
    print(report)
    for rejection in audit("curated"):
        print(rejection)

A corpus is cut into units, written down once. Every stage leaves one table a unit and one folder a stage
(:mod:`~wellposed.lens.curation_tables`), so a run may be killed at any moment: called again it does what is missing and
ends with the same shards, byte for byte.
"""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from safetensors.numpy import load_file

from wellposed.data.decoding import read_header
from wellposed.data.shards import CAPTIONING_FILE, ShardSample, write_shards
from wellposed.lens.curation_captions import CaptionWork, forget_failures
from wellposed.lens.curation_config import CurationConfig
from wellposed.lens.curation_engines import Engine, Work, do_all
from wellposed.lens.curation_pictures import decode_quietly
from wellposed.lens.curation_report import CurationReport, report_of
from wellposed.lens.curation_scorers import tool_name
from wellposed.lens.curation_sources import DamagedFile, SampleReader, list_samples
from wellposed.lens.curation_stages import CurationTools, UnitPictures, UnitWork, picture_stages, skipped_stages
from wellposed.lens.curation_tables import STAGES, CurationFolder, Record, audit, write_whole
from wellposed.lens.near_duplicates import duplicate_groups, kept_of_each

__all__ = ["CurationConfig", "CurationReport", "CurationTools", "audit", "curate", "report_of"]

MEASURED = STAGES[1:8]
COPIED_FORMATS = ("JPEG", "MPO", "WEBP")  # into shards, byte for byte

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def curate(
    source: str | Path,
    out: str | Path,
    config: CurationConfig | None = None,
    *,
    tools: CurationTools | None = None,
    workers: int = 1,
    caption_workers: int = 1,
    engine: Engine = "local",
    ray_options: Mapping[str, Any] = {},
    redo: bool = False,
    ask_again: bool = False,
    on_progress: Progress = lambda what, done, total: None,
) -> CurationReport:
    """Filter, caption and shard a corpus, or what is missing of that.

    Args:
        source: folder, parquet file or archive; see :func:`~wellposed.lens.curation_sources.list_samples`.
        out: folder of the curation, made if it is not there; not inside the source. One process at a time.
        config: settings.
        tools: scorers, embedder, captioner.
        workers: processes. With more than one, or on Ray, tools must be importable functions or records, and a script
            must call this below ``if __name__ == "__main__":``.
        caption_workers: processes that ask the captioner; each has its own rate limits and connections. With 1 it is
            this one, whatever the engine.
        engine: "local", or "ray" for a cluster whose machines see ``source`` and ``out`` under the same paths. With
            several local workers a picture that ends two of them, such as by a fault of a decoder, is found and
            rejected. With one, which is this process, and on Ray, which does again what a lost worker was at, such a
            picture ends the run; where it ends two runs in a row the third rejects it.
        ray_options: further arguments of Ray Data's ``map``, such as ``{"num_gpus": 1}``.
        redo: if ``out`` holds stages with other settings, remove them and all after them. What a captioner answered is
            kept in any case.
        ask_again: ask anew where an answer was no caption, such as a refusal. Where nobody was asked or nobody answered
            it is asked anew in any case.
        on_progress: see ``Progress``.

    Raises:
        FileNotFoundError: no source.
        ValueError: a source without samples; ``out`` holds something else, or stages with other settings.
        OSError: a file cannot be written, such as on a full disk; what was complete stays.
    """
    config, tools = config or CurationConfig(), tools or CurationTools()
    source, folder = Path(source).resolve(), CurationFolder(Path(out).resolve())
    plan = _planned(source, folder, config)
    _sweep(folder)
    units = range(plan["units"])
    work = UnitWork(folder=folder, source=source, config=config, tools=tools)
    captioning = CaptionWork(
        folder=folder,
        source=source,
        config=config,
        captioner=tools.captioner,
        before="duplicates" if work.embeds else "exposure",
        ask_again=ask_again,
    )
    _claim_stages(folder, _settings(config, tools, captioning), redo)

    def run(what: str, piece: Work, numbers: Sequence[int], total: int, *, processes: int, on: Engine = engine) -> None:
        done = total - len(numbers)
        on_progress(what, done, total)

        def count(number: int) -> None:
            nonlocal done
            done += 1
            on_progress(what, done, total)

        do_all(
            piece,
            numbers,
            notes=folder.notes,
            engine=on,
            workers=processes,
            ray_options=ray_options,
            on_done=count,
            on_crash=lambda lost: folder.add_event("a worker was killed", during=what, done_again=list(lost)),
            on_cause=lambda key: _blame(folder, key),
        )

    missing = [unit for unit in units if not work.is_done(unit)]
    run("filters", work, missing, len(units), processes=workers)
    if work.embeds:
        _drop_duplicates(folder, units, config)
    forget_failures(folder, units, all_of_them=ask_again)
    missing = [unit for unit in units if not folder.table("captions", unit).is_file()]
    asking: Engine = engine if caption_workers > 1 else "local"
    run("captions", captioning, missing, len(units), processes=caption_workers, on=asking)
    sharding = _ShardWork.of(folder, source, config, units)
    sharding.claim()
    missing = [shard for shard in range(sharding.count) if not sharding.path(shard).is_file()]
    run("shards", sharding, missing, sharding.count, processes=workers)
    report = report_of(folder.root)
    report.save(folder.root / "report.json")
    _tell_cost(folder, report.captions.spent)
    return report


def _planned(source: Path, folder: CurationFolder, config: CurationConfig) -> dict[str, Any]:
    """The plan in the folder; made, with the units, if there is none."""
    about = {"source": str(source), "unit_size": config.unit_size, "image_column": config.image_column}
    if (folder.root / "plan.json").is_file():
        plan = folder.read_plan()
        other = [f"{name} {plan[name]!r}, not {about[name]!r}" for name in about if plan[name] != about[name]]
        if other:
            raise ValueError(f"{folder.root} holds another curation: {'; '.join(other)}; choose another folder")
        return plan
    if source.is_dir() and folder.root.is_relative_to(source):
        raise ValueError(f"out is {str(folder.root)!r}, inside the source; choose a folder outside of {str(source)!r}")
    damaged: list[dict[str, str]] = []
    samples, units, unit = 0, 0, list[Record]()
    for found in list_samples(source, config.image_column):
        if isinstance(found, DamagedFile):
            damaged.append({"file": found.file, "error": found.error})
            continue
        unit.append(Record(key=f"{samples:010d}", address=found))
        samples += 1
        if len(unit) == config.unit_size:
            folder.write_unit(units, unit)
            units, unit = units + 1, []
    if unit:
        folder.write_unit(units, unit)
        units += 1
    if not samples:
        why = f": {damaged[0]['file']}: {damaged[0]['error']}" if damaged else ""
        raise ValueError(f"no samples in {str(source)!r}{why}; give a folder with pictures, .parquet or .tar files")
    plan = {**about, "samples": samples, "units": units, "damaged": damaged}
    write_whole(folder.root / "plan.json", json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
    return plan


def _settings(config: CurationConfig, tools: CurationTools, captioning: CaptionWork) -> dict[str, dict[str, Any]]:
    """What the outcome of each stage depends on, besides the stages before it."""
    settings: dict[str, dict[str, Any]] = {stage.name: dict(stage.settings) for stage in picture_stages(config, tools)}
    settings["duplicates"] = {
        "embedder": tool_name(tools.embedder),
        "duplicate_cosine": config.duplicate_cosine,
        "duplicate_index": config.duplicate_index,
        "duplicate_probes": config.duplicate_probes,
        "kept_duplicate": config.kept_duplicate,
    }
    settings["captions"] = captioning.settings
    return settings | {name: {"skipped": why} for name, why in skipped_stages(config, tools).items()}


def _claim_stages(folder: CurationFolder, settings: Mapping[str, Mapping[str, Any]], redo: bool) -> None:
    """Write down what each stage is made with; refuse, or remove, stages that were made with something else."""
    wanted = {name: json.loads(json.dumps(settings[name])) for name in STAGES}
    differing = next((name for name in STAGES if _is_made_otherwise(folder, name, wanted[name])), None)
    if differing is not None:
        stale = STAGES[STAGES.index(differing) :]
        if not redo and any(list(folder.stage(name).glob("*.jsonl")) for name in stale):
            held = folder.settings(differing) or {}
            changed = sorted(key for key in held | wanted[differing] if held.get(key) != wanted[differing].get(key))
            told = ", ".join(f"{key} {held.get(key)!r}, now {wanted[differing].get(key)!r}" for key in changed)
            raise ValueError(
                f"{folder.root} holds stages made with other settings, from {differing} ({told}) on; pass redo=True to "
                "make these anew, or choose another folder"
            )
        # The last first: a run that is killed here still finds that the first of them differs.
        for name in reversed(stale):
            if folder.stage(name).is_dir():
                shutil.rmtree(folder.stage(name))
    for name in STAGES:
        if folder.settings(name) is None:
            write_whole(folder.stage(name) / "stage.json", json.dumps(wanted[name], indent=2) + "\n")


def _is_made_otherwise(folder: CurationFolder, stage: str, wanted: Mapping[str, Any]) -> bool:
    held = folder.settings(stage)
    return held != wanted if held is not None else any(folder.stage(stage).glob("*.jsonl"))


def _drop_duplicates(folder: CurationFolder, units: Sequence[int], config: CurationConfig) -> None:
    """Compare all with all, and leave a table for each unit."""
    if all(folder.table("duplicates", unit).is_file() for unit in units):
        return
    start = time.perf_counter()
    records = {unit: [r for r in folder.read_table("exposure", unit) if r.kept] for unit in units}
    everyone = [record for unit in units for record in records[unit]]
    vectors = [load_file(folder.vectors(unit))["vectors"] for unit in units]
    groups = duplicate_groups(
        _stacked(vectors),
        config.duplicate_cosine,
        index=config.duplicate_index,
        probes=config.duplicate_probes,
    )
    areas = np.array([record.facts["resolution"] for record in everyone], dtype=np.int64)
    stands_for = kept_of_each(groups, areas if config.kept_duplicate == "largest" else None)
    seconds = (time.perf_counter() - start) / len(units)
    judged = (_compared(record, everyone[kept]) for record, kept in zip(everyone, stands_for.tolist(), strict=True))
    for unit in units:
        folder.write_table("duplicates", unit, list(islice(judged, len(records[unit]))), seconds)


def _compared(record: Record, kept: Record) -> Record:
    if record.key == kept.key:
        return record.judged()
    return record.judged({"duplicates": kept.key}, "near duplicate", f"of {kept.address}")


def _stacked(vectors: Sequence[Float32[np.ndarray, "_ _"]]) -> Float32[np.ndarray, "n width"]:
    """One array; units in which no picture could be embedded have rows of no width, which become zeros."""
    width = max((part.shape[1] for part in vectors), default=0)
    return np.concatenate([part if part.shape[1] else np.zeros((len(part), width), np.float32) for part in vectors])


@dataclass(frozen=True, kw_only=True)
class _ShardWork:
    """Writes a shard: a function from its number.

    Attributes:
        folder: of the curation.
        source: what was listed.
        config: settings.
        ends: for each unit, how many samples were kept up to and with it.
        digest: of what is to be in the shards.
        captions: which they have, by style and captioner.
    """

    folder: CurationFolder
    source: Path
    config: CurationConfig
    ends: tuple[int, ...]
    digest: str
    captions: str

    @classmethod
    def of(cls, folder: CurationFolder, source: Path, config: CurationConfig, units: Sequence[int]) -> "_ShardWork":
        digest = hashlib.sha256(f"{config.samples_per_shard} {config.caption_style}\n".encode())
        counts: list[int] = []
        for unit in units:
            kept = [record for record in folder.read_table("captions", unit) if record.kept]
            counts.append(len(kept))
            for record in kept:
                # All that is written: the picture and the metadata of the source by their hashes.
                digest.update(json.dumps([record.key, str(record.address), record.facts], sort_keys=True).encode())
        return cls(
            folder=folder,
            source=source,
            config=config,
            ends=tuple(accumulate(counts)),
            digest=digest.hexdigest(),
            captions=(folder.settings("captions") or {})["captions"],
        )

    @property
    def count(self) -> int:
        """Shards."""
        return -(-self.ends[-1] // self.config.samples_per_shard)

    def path(self, shard: int) -> Path:
        """Of a shard."""
        return self.folder.shards / f"{shard:05d}.tar"

    def claim(self) -> None:
        """Remove shards of other samples."""
        path = self.folder.root / "shards.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if held.get("digest") == self.digest:
            return
        for shard in sorted(self.folder.shards.glob("*.tar")):
            shard.unlink()
            shard.with_suffix(".npz").unlink(missing_ok=True)
        if held.get("captions", self.captions) != self.captions:
            (self.folder.shards / CAPTIONING_FILE).unlink(missing_ok=True)
        self.folder.shards.mkdir(parents=True, exist_ok=True)
        about = {"digest": self.digest, "captions": self.captions, "samples": self.ends[-1], "shards": self.count}
        write_whole(path, json.dumps(about) + "\n")

    def __call__(self, shard: int) -> None:
        """Write a shard.

        Raises:
            OSError: it cannot be written.
            ValueError: a picture is not what it was when it was filtered.
        """
        write_shards(
            self._samples(shard),
            self.folder.shards,
            samples_per_shard=self.config.samples_per_shard,
            first_shard=shard,
        )

    def _samples(self, shard: int) -> Iterator[ShardSample]:
        first = shard * self.config.samples_per_shard
        last = min(first + self.config.samples_per_shard, self.ends[-1])
        with SampleReader(self.source, self.config.image_column) as reader:
            pictures = UnitPictures(reader, self.config)
            for unit, end in enumerate(self.ends):
                start = self.ends[unit - 1] if unit else 0
                if start < last and end > first:
                    kept = [record for record in self.folder.read_table("captions", unit) if record.kept]
                    for record in kept[max(first - start, 0) : last - start]:
                        yield self._sample(record, pictures)

    def _sample(self, record: Record, pictures: UnitPictures) -> ShardSample:
        try:
            content, about = pictures.content(record), pictures.reader.metadata(record.address)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{record.address} cannot be put into a shard ({error}); restore it, or curate into another folder"
            ) from error
        held = about.get("captions")
        others = {style: text for style, text in held.items() if _is_text(text)} if isinstance(held, dict) else {}
        caption = record.facts["caption"]
        return ShardSample(
            key=record.key,
            picture=_shardable(content, record, self.config),
            caption=caption,
            captions=others | {self.config.caption_style: caption},
            metadata={
                "source": str(record.address),
                "caption_style": self.config.caption_style,
                "quality": {name: record.facts[name] for name in MEASURED if name in record.facts},
                "about": {name: value for name, value in about.items() if name not in ("caption", "captions")},
            },
        )


def _tell_cost(folder: CurationFolder, spent: Mapping[str, float]) -> None:
    """Write beside the shards what their captions cost, for whoever trains on them.

    Of captions that the source has nothing is known here; whoever knows may have written it there.
    """
    if not spent:
        return
    path, text = folder.shards / CAPTIONING_FILE, json.dumps(spent, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _shardable(content: bytes, record: Record, config: CurationConfig) -> bytes:
    """The bytes of a picture; encoded anew, without loss, where whoever reads shards would not take them."""
    kind, deep = record.facts["format"], "deep" in record.facts
    # Few readers turn a PNG file as its metadata say.
    if kind in COPIED_FORMATS or (kind == "PNG" and not deep and read_header(content).orientation == 1):
        return content
    encoded = io.BytesIO()
    decode_quietly(content, max_pixels=config.max_pixels).pixels.save(encoded, "PNG")
    return encoded.getvalue()


def _blame(folder: CurationFolder, key: str) -> None:
    folder.add_fatal_key(key)
    folder.add_event("a sample ended its process twice and is rejected", key=key)


def _sweep(folder: CurationFolder) -> None:
    """Remove what a killed run was writing; blame a sample at which two runs in a row were killed."""
    suspects, before = folder.suspects(), folder.root / "suspects.json"
    if before.is_file():
        for key in sorted(suspects.intersection(json.loads(before.read_bytes())) - folder.fatal_keys()):
            _blame(folder, key)
    if suspects:
        write_whole(before, json.dumps(sorted(suspects)))
    else:
        before.unlink(missing_ok=True)
    for pattern in (".*.*", "*/.*.*", "*/*/.*.*"):
        for path in folder.root.glob(pattern):
            path.unlink()
