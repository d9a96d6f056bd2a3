"""Curation: every plant found for the right reason, every clean picture kept; killed and resumed, the same shards."""

import errno
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wellposed.data.buckets import Size
from wellposed.data.shards import ShardedImages
from wellposed.lens.captioning import CaptionResult
from wellposed.lens.curation import CurationConfig, CurationTools, audit, curate, report_of
from wellposed.lens.curation_sources import SampleReader
from wellposed.lens.curation_stages import UnitPictures
from wellposed.lens.curation_tables import STAGES, CurationFolder

SPEC = importlib.util.spec_from_file_location("planted_corpus", Path(__file__).with_name("planted_corpus.py"))
assert SPEC and SPEC.loader
corpus = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(corpus)

SMALL = CurationConfig(unit_size=7, min_area=64**2, measured_area=64**2, samples_per_shard=3, captions_at_a_time=2)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here pulls a plug, and waiting for the disk takes ten times as long as everything else."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def shard_bytes(out):
    return {path.name: path.read_bytes() for path in sorted((out / "shards").glob("*.tar"))}


def tables(out):
    """What stages said, without what it cost."""
    found = {}
    for path in sorted(out.glob("[01]*/*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        for line in lines:
            line["facts"].pop("captioning", None)
        found[path.relative_to(out).as_posix()] = lines
    return found


def samples_of(out):
    samples = {}
    for path in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, end = member.name.split(".")
                samples.setdefault(key, {})[end] = archive.extractfile(member).read()
    by_source = {}
    for sample in samples.values():
        sample["json"] = json.loads(sample["json"])
        by_source[sample["json"]["source"]] = sample
    return by_source


class Captioner:
    """Says what it was shown, counts what it was asked, and fails where it is told to."""

    model = "a/model"

    def __init__(self, fails=(), text="a picture of {}", dies_after=None):
        self.fails, self.text, self.dies_after, self.asked = dict(fails), text, dies_after, []

    def __call__(self, requests):
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise ConnectionError("the captioner is gone")
        results = []
        for request in requests:
            self.asked.append(request.key)
            error = self.fails.get(request.key)
            text = None if error else self.text.format(request.metadata.get("caption", request.key))
            results.append(
                CaptionResult(key=request.key, text=text, error=error, cost=0.5, prompt_tokens=7, seconds=0.1)
            )
        return results


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    clean, plants = corpus.write_corpus(root / "raw")
    progress = []
    report = curate(
        root / "raw",
        root / "out",
        CurationConfig(unit_size=8, samples_per_shard=5),
        on_progress=lambda *what: progress.append(what),
    )
    return root / "raw", root / "out", clean, plants, report, progress


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Thirteen small pictures, three of which are rejected; and what curation makes of them when nothing goes wrong."""
    root = tmp_path_factory.mktemp("small")
    raw = root / "raw"
    raw.mkdir()
    for i in range(10):
        (raw / f"{i}.png").write_bytes(corpus.encoded(corpus.drawing(i, 80)))
        (raw / f"{i}.txt").write_text(f"drawing {i}\u2028of shapes")
    (raw / "0_again.webp").write_bytes(corpus.encoded(corpus.drawing(0, 80), "WEBP", quality=90))
    (raw / "5_broken.jpg").write_bytes(b"no picture")
    (raw / "7_tiny.png").write_bytes(corpus.encoded(corpus.drawing(20, 40)))
    curate(raw, root / "out", SMALL)
    return raw, root / "out"


def test_every_plant_is_found_for_the_right_reason_and_every_clean_picture_kept(planted):
    _, out, clean, plants, report, _ = planted
    assert {r.source: (r.stage, r.reason) for r in audit(out)} == plants
    assert sorted(samples_of(out)) == sorted(clean)
    assert report.samples == len(clean) + len(plants) and report.kept == len(clean)


def test_report_counts_what_the_plants_are(planted):
    _, out, clean, plants, report, _ = planted
    assert list(report.skipped) == ["nsfw", "aesthetics", "watermark"]
    assert [stage.name for stage in report.stages] == [name for name in STAGES if name not in report.skipped]
    seen = report.samples
    for stage in report.stages:
        reasons = [reason for where, reason in plants.values() if where == stage.name]
        assert dict(stage.rejected) == {reason: reasons.count(reason) for reason in reasons}
        assert (stage.seen, stage.kept) == (seen, seen - len(reasons))
        assert stage.seconds > 0 and stage.images_per_second > 0
        seen = stage.kept
    assert report.misnamed == 2 and report.unfinished == 0 and report.shards == -(-len(clean) // 5)
    assert report.captions.captions == len(clean)
    assert report.captions.words == {4: 14, 6: 1} and report.captions.mean_words == pytest.approx(62 / 15)
    assert report_of(out) == report
    saved = json.loads((out / "report.json").read_text())
    assert saved["kept"] == len(clean) and saved["captions"]["words"]["4"] == 14
    assert [stage["name"] for stage in saved["stages"]] == [stage.name for stage in report.stages]
    printed = str(report)
    for part in ("lying header 4", "nsfw         skipped: no scorer given", "near duplicate 3", "mean 4.1", "0-19"):
        assert part in printed


def test_progress_is_told(planted):
    *_, progress = planted
    assert [what for what in progress if what[0] == "filters"] == [("filters", done, 5) for done in range(6)]
    assert progress[-1] == ("shards", 3, 3)


def test_rejections_say_what_was_measured(planted):
    _, out, *_ = planted
    told = {rejection.source: str(rejection) for rejection in audit(out)}
    assert told["plants/tiny.png"] == "plants/tiny.png: resolution 90000: too small"
    assert told["plants/one_colour.png"] == "plants/one_colour.png: clarity 0: blurred or empty"
    assert "near duplicate (of clean/astronaut.png)" in told["plants/again.jpg"]
    assert "its .json cannot be read" in told["plants/broken_metadata.png"]


def test_shards_hold_the_files_as_they_were_or_without_loss(planted):
    raw, out, clean, *_ = planted
    samples = samples_of(out)
    for name in clean:
        content = (raw / name).read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            kind, shown = picture.format, picture.convert("RGB")
        end = {"JPEG": "jpg", "WEBP": "webp"}.get(kind, "png")
        assert set(samples[name]) == {end, "txt", "json"}
        if name == "clean/deep.png":
            expected = (np.asarray(Image.open(io.BytesIO(content))) >> 8).astype(np.uint8)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples[name]["png"])))[..., 0], expected)
        elif name == "clean/turned.png":
            upright = np.asarray(corpus.drawing(14).crop((0, 0, 400, 380)))
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples[name]["png"]))), upright)
        elif kind in ("PNG", "JPEG", "WEBP"):
            assert samples[name][end] == content
        else:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples[name]["png"]))), np.asarray(shown))


def test_shards_say_what_is_known_of_a_sample(planted):
    _, out, *_ = planted
    samples = samples_of(out)
    coffee, turned = samples["clean/coffee.jpg"], samples["clean/on_its_side.jpg"]
    assert coffee["txt"].decode() == "A picture of coffee."
    about = coffee["json"]
    assert about["captions"] == {"brief": "coffee", "dense": "A picture of coffee."}
    assert about["about"] == {"licence": "CC0"} and about["caption_style"] == "dense"
    assert sorted(about["quality"]) == ["clarity", "exposure", "information", "resolution"]
    assert (turned["json"]["width"], turned["json"]["height"]) == (400, 380)
    images = ShardedImages.open(out / "shards")
    assert len(images) == 15 and images.sizes.tolist().count([380, 400]) == 2


def test_a_second_run_finds_nothing_to_do(small, tmp_path):
    raw, clean_out = small
    out = tmp_path / "out"
    curate(raw, out, SMALL)
    assert shard_bytes(out) == shard_bytes(clean_out) and len(shard_bytes(out)) == 4
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "report.json"}
    curate(raw, out, SMALL, tools=CurationTools())
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("unit_size", [1, 100])
def test_units_do_not_matter(small, unit_size, tmp_path):
    raw, clean_out = small
    curate(raw, tmp_path, replace(SMALL, unit_size=unit_size))
    assert shard_bytes(tmp_path) == shard_bytes(clean_out)


# Killed: by the k-th time that a file has been written and not yet named, and at moments of the clock.


def run_in_a_fork(target, *, seconds=None):
    """Run in a process of its own, killed after some seconds; returns how it ended."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def killed_at_write(number, raw, out, **options):
    """Curate in another process that kills itself when it is about to name a file for the ``number``-th time."""

    def target():
        real, count = os.fsync, 0

        def fsync(descriptor):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        curate(raw, out, SMALL, **options)

    return run_in_a_fork(target)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_again_and_again_at_any_write_it_ends_with_the_same_shards(small, seed, tmp_path):
    raw, clean_out = small
    rng, ended = np.random.default_rng(seed), []
    while 0 not in ended:
        ended.append(killed_at_write(int(rng.integers(2, 16)), raw, tmp_path))
        assert ended[-1] in (0, -signal.SIGKILL)
    assert len(ended) > 2
    assert shard_bytes(tmp_path) == shard_bytes(clean_out)
    assert tables(tmp_path) == tables(clean_out)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_at_any_moment_it_ends_with_the_same_shards(small, seed, tmp_path):
    raw, clean_out = small
    rng = np.random.default_rng(seed)
    for _ in range(3):
        run_in_a_fork(lambda: curate(raw, tmp_path, SMALL), seconds=float(rng.uniform(0.02, 0.6)))
    curate(raw, tmp_path, SMALL)
    assert shard_bytes(tmp_path) == shard_bytes(clean_out)
    assert tables(tmp_path) == tables(clean_out)


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ("nsfw", "aesthetics", "watermark")])
def test_stopped_in_any_stage_it_goes_on_from_there(small, stage, tmp_path, monkeypatch):
    raw, clean_out = small
    real = CurationFolder.write_table

    def failing(folder, name, unit, records, seconds):
        if (name, unit) == (stage, 1):
            raise KeyboardInterrupt
        real(folder, name, unit, records, seconds)

    with monkeypatch.context() as patched:
        patched.setattr(CurationFolder, "write_table", failing)
        with pytest.raises(KeyboardInterrupt):
            curate(raw, tmp_path, SMALL)
    report = report_of(tmp_path)
    assert report.unfinished > 0 and "units are not finished" in str(report) and report.shards == 0
    assert list(audit(tmp_path)) == [r for r in audit(clean_out) if r in list(audit(tmp_path))]
    curate(raw, tmp_path, SMALL)
    assert shard_bytes(tmp_path) == shard_bytes(clean_out)
    assert tables(tmp_path) == tables(clean_out)


@pytest.mark.parametrize("write", [1, 20, -2])
def test_a_full_disk_loses_nothing(small, write, tmp_path, monkeypatch):
    raw, clean_out = small
    real, count = os.fsync, 0

    def counting(descriptor):
        nonlocal count
        count += 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counting)
    curate(raw, tmp_path / "counted", SMALL)
    last = write if write > 0 else count + write
    left = last

    def full(descriptor):
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be written \(.*No space left on device") as caught:
        curate(raw, tmp_path / "out", SMALL)
    assert caught.value.errno == errno.ENOSPC and str(tmp_path / "out") in str(caught.value.filename)
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]
    monkeypatch.setattr(os, "fsync", real)
    curate(raw, tmp_path / "out", SMALL)
    assert shard_bytes(tmp_path / "out") == shard_bytes(clean_out)


# Captions.


def test_a_captioner_is_asked_once_for_what_is_kept(small, tmp_path):
    raw, _ = small
    captioner = Captioner()
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner))
    assert len(captioner.asked) == len(set(captioner.asked)) == report.kept == 10
    assert report.captions.cost == 5 and report.captions.prompt_tokens == 70
    assert "cost 5" in str(report)
    cost = ShardedImages.open(tmp_path / "shards").captioning_cost
    assert (cost["cost"], cost["prompt_tokens"]) == (5, 70) and cost["hours"] > 0
    curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner))
    assert len(captioner.asked) == 10
    assert samples_of(tmp_path)["3.png"]["txt"].decode() == "a picture of drawing 3\u2028of shapes"


def test_a_captioner_that_dies_is_not_paid_twice(small, tmp_path):
    raw, _ = small
    curate(raw, tmp_path / "straight", SMALL, tools=CurationTools(captioner=Captioner()))
    asked = []
    for dies_after in (0, 2, 2, 4, None):
        captioner = Captioner(dies_after=dies_after)
        try:
            curate(raw, tmp_path / "out", SMALL, tools=CurationTools(captioner=captioner))
        except ConnectionError:
            assert dies_after is not None
        asked += captioner.asked
    assert len(asked) == len(set(asked)) == 10
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "straight")


def test_half_a_line_in_the_journal_is_asked_for_again(small, tmp_path):
    raw, _ = small
    curate(raw, tmp_path / "straight", SMALL, tools=CurationTools(captioner=Captioner()))
    with pytest.raises(ConnectionError):
        curate(raw, tmp_path / "out", SMALL, tools=CurationTools(captioner=Captioner(dies_after=2)))
    (journal,) = (tmp_path / "out" / "answers").rglob("*.jsonl")
    assert journal.parent.name == "dense-Captioner-a-model"
    journal.write_bytes(journal.read_bytes()[:-9])
    captioner = Captioner()
    curate(raw, tmp_path / "out", SMALL, tools=CurationTools(captioner=captioner))
    assert len(captioner.asked) == 9
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "straight")
    assert all(json.loads(line) for line in journal.read_text(encoding="utf-8").split("\n")[:-1])


def test_failed_captions_are_reported_left_out_and_asked_again_on_demand(small, tmp_path):
    raw, _ = small
    fails = {"0000000002": "refused: it will not", "0000000004": "time: 60 s", "0000000012": "not sent: no money left"}
    captioner = Captioner(fails)
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner))
    assert report.captions.failures == {"refused": 1, "time": 1, "not sent": 1} and report.kept == 7
    assert report.captions.cost == 5
    rejected = {r.key: (r.reason, r.details) for r in audit(tmp_path) if r.stage == "captions"}
    assert rejected["0000000002"] == ("refused", "refused: it will not") and len(rejected) == 3
    assert not {"1.png", "3.png", "9.png"} & set(samples_of(tmp_path))

    # For whom nobody was asked is asked for in the next run; the others only on demand.
    captioner = Captioner({key: error for key, error in fails.items() if "not sent" not in error})
    assert curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner)).kept == 8
    assert captioner.asked == ["0000000012"]
    assert curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner)).kept == 8
    captioner = Captioner()
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner), ask_again=True)
    assert captioner.asked == ["0000000002", "0000000004"] and report.kept == 10
    curate(raw, tmp_path / "straight", SMALL, tools=CurationTools(captioner=Captioner()))
    assert shard_bytes(tmp_path) == shard_bytes(tmp_path / "straight")


def test_captions_are_found_under_their_style(small, tmp_path):
    """Shards that are curated anew, in another style, keep the first one; and their index is no picture."""
    raw, _ = small
    brief, dense = Captioner(text="brief {}"), Captioner(text="dense after {}")
    curate(raw, tmp_path / "a", replace(SMALL, caption_style="brief"), tools=CurationTools(captioner=brief))
    (first, *_) = ShardedImages.open(tmp_path / "a/shards", caption_style="brief").captions(range(10))
    assert first == "brief drawing 0\u2028of shapes"
    report = curate(tmp_path / "a/shards", tmp_path / "b", SMALL, tools=CurationTools(captioner=dense))
    assert report.samples == report.kept == 10
    for style, expected in (("brief", first), ("dense", f"dense after {first}"), (None, f"dense after {first}")):
        images = ShardedImages.open(tmp_path / "b/shards", caption_style=style)
        batch = images.batch([0, 9], Size(64, 64))
        assert batch.captions[0] == expected and batch.images.shape == (2, 3, 64, 64)


def test_a_journal_cut_within_a_letter_is_gone_on_with(small, tmp_path):
    raw, _ = small
    text = "一座灯塔 {}"
    with pytest.raises(ConnectionError):
        curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=Captioner(text=text, dies_after=4)))
    (journal,) = (tmp_path / "answers").rglob("*.jsonl")
    content = journal.read_bytes()
    journal.write_bytes(content[: content.rindex("灯".encode()) + 1])
    captioner = Captioner(text=text)
    assert curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner)).kept == 10
    assert len(captioner.asked) == 7


def test_where_nobody_answered_is_asked_anew_and_a_refusal_only_on_demand(small, tmp_path):
    raw, _ = small
    fails = {"0000000002": "no answer: it timed out", "0000000004": "refused: it will not"}
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=Captioner(fails)))
    assert report.kept == 8 and report.captions.cost == 5
    captioner = Captioner({"0000000004": "asked in vain"})
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=captioner))
    assert captioner.asked == ["0000000002"] and report.kept == 9
    assert report.captions.cost == 5.5 and report.captions.failures == {"refused": 1}, "both answers are paid for"
    # The stage made anew: the journal knows of the refusal, too.
    other = replace(SMALL, max_caption_words=400)
    report = curate(raw, tmp_path, other, tools=CurationTools(captioner=captioner), redo=True)
    assert captioner.asked == ["0000000002"] and report.captions.failures == {"refused": 1}
    report = curate(raw, tmp_path, other, tools=CurationTools(captioner=Captioner()), ask_again=True)
    assert report.kept == 10 and report.captions.cost == 6


@pytest.mark.parametrize("answered", [False, True])
def test_a_file_that_could_not_be_read_is_asked_for_in_the_next_run(answered, small, tmp_path, monkeypatch):
    """Be it that nobody was asked yet, or that there is an answer, which is not paid for again."""
    raw, _ = small
    tools = CurationTools(captioner=Captioner(dies_after=None if answered else 0))
    with nullcontext() if answered else pytest.raises(ConnectionError):
        curate(raw, tmp_path, SMALL, tools=tools)
    tools.captioner.dies_after = None
    whole, config = SampleReader.metadata, replace(SMALL, max_caption_words=400)

    def failing(reader, address):
        if address.file == "3.png":
            raise OSError("the network is gone")
        return whole(reader, address)

    with monkeypatch.context() as patched:
        patched.setattr(SampleReader, "metadata", failing)
        report = curate(raw, tmp_path, config, tools=tools, redo=True)
    assert report.kept == 9 and report.captions.failures == {"unreadable file": 1}
    report = curate(raw, tmp_path, config, tools=tools)
    assert report.kept == 10 and report.captions.failures == {} and report.captions.cost == 5
    assert len(tools.captioner.asked) == len(set(tools.captioner.asked)) == 10
    assert "3.png" in samples_of(tmp_path)


class IdentifiedCaptioner(Captioner):
    """With something that its captions depend on."""

    def __init__(self, asks_for, **options):
        super().__init__(**options)
        self.identity = {"model": "a/model", "asks_for": asks_for}


def test_captions_of_other_instructions_are_not_taken_for_these(small, tmp_path):
    raw, _ = small
    colours = IdentifiedCaptioner("colours", text="red")
    curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=colours))
    curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=colours))
    shapes = IdentifiedCaptioner("shapes", text="round")
    with pytest.raises(ValueError, match=r"from captions \(.*'asks_for': 'colours'.*now .*'shapes'.*pass redo=True"):
        curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=shapes))
    curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=shapes), redo=True)
    assert {sample["txt"] for sample in samples_of(tmp_path).values()} == {b"round"} and len(shapes.asked) == 10
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=colours), redo=True)
    assert {sample["txt"] for sample in samples_of(tmp_path).values()} == {b"red"} and len(colours.asked) == 10
    assert report.captions.cost == 5, "of these captions, not of the others"
    names = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert len(names) == 2 and all(name.startswith("dense-IdentifiedCaptioner-a-model-") for name in names)


class TellingCaptioner(Captioner):
    """Tells results backwards, and is interrupted after some."""

    at_a_time = 5

    def __init__(self, interrupted_after=None, **options):
        super().__init__(**options)
        self.calls, self.left = [], interrupted_after

    def ask(self, requests, on_result):
        self.calls.append(len(requests))
        results = []
        for request in reversed(requests):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            results += self([request])
            on_result(results[-1])
        return results[::-1]


def test_answers_are_kept_when_they_are_told(small, tmp_path):
    raw, _ = small
    first = TellingCaptioner(interrupted_after=3)
    with pytest.raises(KeyboardInterrupt):
        curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=first))
    assert first.calls == [5] and len(first.asked) == 3
    second = TellingCaptioner()
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=second))
    assert sorted(first.asked + second.asked) == sorted(set(first.asked + second.asked)) and report.kept == 10
    assert report.captions.cost == 5 and max(second.calls) <= 5
    curate(raw, tmp_path / "straight", SMALL, tools=CurationTools(captioner=Captioner()))
    assert shard_bytes(tmp_path) == shard_bytes(tmp_path / "straight")


def test_hours_are_those_of_the_clock_however_many_ask_at_a_time(small, tmp_path):
    raw, _ = small
    curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=Captioner()))
    spans = ((1000.0, 1030.0), (1020.0, 1050.0))  # of two units; then another run
    for journal, (began, ended) in zip(sorted((tmp_path / "answers").rglob("*.jsonl")), spans, strict=True):
        lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").split("\n")[:-1]]
        lines = [{**line, "began": began, "ended": ended} for line in lines]
        lines[-1] |= {"began": 2000.0, "ended": 2010.0}
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    captions = report_of(tmp_path).captions
    assert captions.elapsed_seconds == 60 and captions.request_seconds == pytest.approx(1.0)
    assert captions.spent["hours"] == pytest.approx(60 / 3600) and captions.spent["cost"] == 5


def test_what_a_user_knows_of_the_cost_is_left_alone(small, tmp_path):
    raw, _ = small
    curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=Captioner()))
    told = tmp_path / "shards" / "captioning.json"
    assert json.loads(told.read_text())["cost"] == 5
    curate(raw, tmp_path, SMALL, redo=True)
    assert not told.exists(), "it was that of other captions"
    told.write_text('{"hours": 7}')
    curate(raw, tmp_path, SMALL)
    curate(raw, tmp_path, replace(SMALL, min_clarity=400.0), redo=True)
    assert ShardedImages.open(tmp_path / "shards").captioning_cost == {"hours": 7}


def test_shards_follow_all_that_is_written_into_them(small, tmp_path):
    raw, _ = small
    mine, tools = copied(raw, tmp_path / "raw"), CurationTools(captioner=Captioner())
    curate(mine, tmp_path / "out", SMALL, tools=tools)
    (mine / "3.json").write_text(json.dumps({"licence": "CC0", "captions": {"brief": "shapes"}}))
    curate(mine, tmp_path / "out", replace(SMALL, max_caption_words=400), tools=tools, redo=True)
    about = samples_of(tmp_path / "out")["3.png"]["json"]
    assert about["about"] == {"licence": "CC0"} and about["captions"]["brief"] == "shapes"
    assert len(tools.captioner.asked) == 10


@pytest.mark.parametrize(
    ("text", "reason"), [("word " * 501, "too many words"), ("...", "no words"), ("一" * 501, "too many words")]
)
def test_captions_that_are_none_are_left_out(text, reason, small, tmp_path):
    raw, _ = small
    report = curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=Captioner(text=text)))
    assert dict(report.stages[-1].rejected) == {reason: 10} and report.shards == 0
    assert report.captions.failures == {reason: 10}, "they are no captions to the report either"
    assert report.captions.captions == 0 and report.captions.mean_words is None


def test_captioners_that_mix_up_their_results_are_refused(small, tmp_path):
    raw, _ = small

    def swapped(requests):
        return Captioner()(requests)[::-1]

    with pytest.raises(ValueError, match="expected one for each request, in their order"):
        curate(raw, tmp_path, SMALL, tools=CurationTools(captioner=swapped))


# Scorers.


def brightness(pictures):
    return [float(np.asarray(picture).mean()) for picture in pictures]


def test_scorers_judge_whole_pictures_and_their_limits_hold(small, tmp_path):
    raw, _ = small
    sizes = []

    def share_of_red(pictures):
        sizes.extend(picture.size for picture in pictures)
        return [float(np.asarray(picture)[..., 0].mean()) / 255 for picture in pictures]

    pixels = [np.asarray(corpus.drawing(i, 80)) for i in range(10)]
    red, bright = [one[..., 0].mean() / 255 for one in pixels], [float(one.mean()) for one in pixels]
    reddest = sorted(range(10), key=lambda i: red[i])[-2:]
    darkest = sorted(set(range(10)) - set(reddest), key=lambda i: bright[i])[:3]
    others = sorted(set(range(10)) - set(reddest) - set(darkest), key=lambda i: red[i])
    config = replace(
        SMALL,
        duplicate_cosine=1.0,
        max_nsfw=(red[reddest[0]] + max(red[i] for i in range(10) if i not in reddest)) / 2,
        min_aesthetics=(bright[darkest[-1]] + min(bright[i] for i in others)) / 2,
        max_watermark=(red[others[-1]] + red[others[-2]]) / 2,
    )
    tools = CurationTools(nsfw=share_of_red, aesthetics=brightness, watermark=share_of_red)
    report = curate(raw, tmp_path, config, tools=tools)
    assert list(report.skipped) == ["duplicates"] and set(sizes) == {(80, 80)}
    rejected = {stage: [] for stage in ("nsfw", "aesthetics", "watermark")}
    for rejection in audit(tmp_path):
        if rejection.stage in rejected and rejection.source != "0_again.webp":
            rejected[rejection.stage].append(int(rejection.source.removesuffix(".png")))
    assert rejected == {"nsfw": sorted(reddest), "aesthetics": sorted(darkest), "watermark": others[-1:]}


@pytest.mark.parametrize("scores", [[1.0], [float("nan")] * 4])
def test_scorers_that_give_something_else_are_refused(scores, small, tmp_path):
    raw, _ = small
    with pytest.raises(ValueError, match="the scorer of aesthetics gave"):
        curate(raw, tmp_path, SMALL, tools=CurationTools(aesthetics=lambda pictures: scores))


def test_embedders_that_give_something_else_are_refused(small, tmp_path):
    raw, _ = small
    with pytest.raises(ValueError, match="expected a finite row each"):
        curate(raw, tmp_path, SMALL, tools=CurationTools(embedder=lambda pictures: np.ones((1, 3), np.float32)))


# Settings.


def test_other_settings_are_refused_or_redone_from_the_stage_they_concern(small, tmp_path):
    raw, _ = small
    captioner = Captioner()
    tools = CurationTools(captioner=captioner)
    curate(raw, tmp_path, SMALL, tools=tools)
    stricter = replace(SMALL, min_clarity=400.0)
    with pytest.raises(ValueError, match=r"from clarity \(least 10.0, now 400.0\) on; pass redo=True"):
        curate(raw, tmp_path, stricter, tools=tools)
    early = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0[12]*/*.jsonl")}
    report = curate(raw, tmp_path, stricter, tools=tools, redo=True)
    assert 0 < report.kept < 10 and len(captioner.asked) == 10  # paid for once
    assert {path: path.stat().st_mtime_ns for path in early} == early
    curate(raw, tmp_path, SMALL, tools=tools, redo=True)
    curate(raw, tmp_path / "straight", SMALL, tools=CurationTools(captioner=Captioner()))
    assert shard_bytes(tmp_path) == shard_bytes(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"from nsfw \(.*skipped 'no scorer given', now None"):
        curate(raw, tmp_path, SMALL, tools=replace(tools, nsfw=brightness))


def test_killed_while_it_removes_stages_it_removes_the_rest(small, tmp_path, monkeypatch):
    raw, _ = small
    curate(raw, tmp_path / "out", SMALL)
    stricter = replace(SMALL, min_clarity=400.0)
    real, left = shutil.rmtree, 2

    def dying(path):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(path)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", dying)
        with pytest.raises(KeyboardInterrupt):
            curate(raw, tmp_path / "out", stricter, redo=True)
    curate(raw, tmp_path / "out", stricter, redo=True)
    curate(raw, tmp_path / "straight", stricter)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "straight")
    assert tables(tmp_path / "out") == tables(tmp_path / "straight")


def test_near_duplicates_stay_if_told(small, tmp_path):
    raw, _ = small
    report = curate(raw, tmp_path, replace(SMALL, duplicate_cosine=1.0, kept_duplicate="first"))
    assert report.skipped["duplicates"] == "duplicate_cosine is 1"
    # The copy has no caption, so that it goes all the same.
    assert [r.source for r in audit(tmp_path) if r.stage == "captions"] == ["0_again.webp"]


@pytest.mark.parametrize(("kept", "gone"), [("largest", "0.png"), ("first", "1.png")])
def test_the_largest_or_the_first_of_a_group_is_kept(kept, gone, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, side in (("0", 80), ("1", 120)):
        (raw / f"{name}.png").write_bytes(corpus.encoded(corpus.drawing(0, 160).resize((side, side))))
        (raw / f"{name}.txt").write_text("shapes")
    curate(raw, tmp_path / "out", replace(SMALL, unit_size=1, kept_duplicate=kept))
    assert [r.source for r in audit(tmp_path / "out")] == [gone]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit_size": 0}, "unit_size is 0; give at least 1"),
        ({"min_clarity": -1.0}, "min_clarity is -1.0; give at least 0"),
        ({"min_information": float("nan")}, "min_information is nan"),
        ({"max_nsfw": 1.5}, "max_nsfw is 1.5; give at most 1"),
        ({"min_exposure": 0.6, "max_exposure": 0.5}, "min_exposure 0.6 is not below max_exposure 0.5"),
        ({"duplicate_cosine": 1.01}, "duplicate_cosine is 1.01"),
        ({"caption_style": "very dense"}, "give one word, such as 'dense'"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CurationConfig(), **change)


# Sources.


def test_archives_and_shards_of_our_own_are_sources(small, tmp_path):
    _, clean_out = small
    report = curate(clean_out / "shards" / "00000.tar", tmp_path, SMALL)
    assert report.samples == report.kept == 3
    assert [s["txt"] for s in samples_of(tmp_path).values()] == [s["txt"] for s in samples_of(clean_out).values()][:3]


def test_damaged_archives_are_reported(small, tmp_path):
    _, clean_out = small
    raw = tmp_path / "raw"
    raw.mkdir()
    whole = (clean_out / "shards" / "00000.tar").read_bytes()
    (raw / "a.tar").write_bytes(whole)
    (raw / "b.tar").write_bytes(whole[: len(whole) // 2])
    report = curate(raw, tmp_path / "out", SMALL)
    (event,) = report.events
    assert event["file"] == "b.tar" and "left out from" in event["error"] and "b.tar" in str(report)
    assert report.stages[0].rejected == {} and report.samples >= 3


def test_parquet_tables_are_sources(small, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw, clean_out = small
    names = sorted(path.name for path in raw.iterdir() if path.suffix != ".txt")
    texts = [(raw / name).with_suffix(".txt") for name in names]
    rows = [
        {"picture": {"bytes": (raw / name).read_bytes()}, "caption": text.read_text() if text.is_file() else ""}
        for name, text in zip(names, texts, strict=True)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=5)
    curate(tmp_path / "x.parquet", tmp_path / "out", replace(SMALL, image_column="picture"))
    ours, folder = list(samples_of(tmp_path / "out").values()), list(samples_of(clean_out).values())
    assert [s["txt"] for s in ours] == [s["txt"] for s in folder]
    assert [s.get("png") for s in ours] == [s.get("png") for s in folder]


def copied(raw, folder):
    folder.mkdir()
    for path in raw.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_what_comes_later_does_not_belong_to_a_begun_curation(small, tmp_path, monkeypatch):
    raw, clean_out = small
    mine = copied(raw, tmp_path / "raw")
    with monkeypatch.context() as patched:
        patched.setattr(CurationFolder, "write_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            curate(mine, tmp_path / "out", SMALL)
    (mine / "00.png").write_bytes(corpus.encoded(corpus.drawing(30, 80)))
    curate(mine, tmp_path / "out", SMALL)
    assert shard_bytes(tmp_path / "out") == shard_bytes(clean_out)


def test_pictures_that_vanish_or_change_meanwhile_are_rejected(small, tmp_path, monkeypatch):
    raw, _ = small
    mine = copied(raw, tmp_path / "raw")
    real = UnitPictures.measured

    def forgetful(pictures, record):
        pictures._reduced.clear()
        return real(pictures, record)

    monkeypatch.setattr(UnitPictures, "measured", forgetful)
    shown = []

    def meddling(pictures):
        if not shown:
            (mine / "1.png").unlink()
            (mine / "2.png").write_bytes((mine / "3.png").read_bytes())
        shown.extend(pictures)
        return [5.0] * len(pictures)

    curate(mine, tmp_path / "out", replace(SMALL, unit_size=100), tools=CurationTools(aesthetics=meddling))
    found = {r.source: (r.stage, r.reason) for r in audit(tmp_path / "out")}
    assert found["1.png"] == ("clarity", "unreadable file")
    assert found["2.png"] == ("clarity", "changed meanwhile")
    assert "3.png" in samples_of(tmp_path / "out")


def test_pictures_that_change_before_they_are_put_into_shards_are_not_trained_on(small, tmp_path):
    raw, _ = small
    mine = copied(raw, tmp_path / "raw")
    curate(mine, tmp_path / "out", SMALL)
    (mine / "4.png").write_bytes((mine / "3.png").read_bytes())
    (tmp_path / "out" / "shards" / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"4.png cannot be put into a shard \(changed meanwhile"):
        curate(mine, tmp_path / "out", SMALL)


def test_bad_beginnings_are_refused(small, tmp_path):
    raw, clean_out = small
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no samples in"):
        curate(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        curate(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="inside the source; choose a folder outside"):
        curate(raw, raw / "out")
    with pytest.raises(ValueError, match="holds another curation: source .* unit_size 7, not 5"):
        curate(tmp_path / "none", clean_out, replace(SMALL, unit_size=5))
    for what in (audit, report_of):
        with pytest.raises(FileNotFoundError, match="holds no curation"):
            list(what(tmp_path / "none"))
