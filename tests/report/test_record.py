import json
import math
import socket
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

import wellposed
from wellposed.report import record as module
from wellposed.report.record import (
    Record,
    commit,
    load_records,
    machine,
    machine_slug,
    new_record,
    provenance,
    read_record,
    versions,
    write_record,
    write_result,
)


def a_record(**changes):
    content = {
        "name": "tiny",
        "kind": "train",
        "settings": {"steps": 3},
        "metrics": {"loss": 0.5},
        "seed": 0,
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 1, "memory_gib": 8.0, "gpu": None, "system": "Linux x86_64"},
        "versions": {"python": "3.11.1", "torch": "2.13.0"},
        "commit": {"hash": "0123456789abcdef", "dirty": True},
        "started": "2026-11-23T18:00:00+00:00",
        "seconds": 1.5,
        "notes": ("by hand",),
    }
    return Record(**(content | changes))


def test_writing_and_reading_is_the_identity(tmp_path):
    record = a_record(
        metrics={"frechet": {"lgs": [1.0, 2.5], "beta": [4, 5]}, "best": "lgs", "done": True, "none": None}
    )
    assert read_record(write_record(record, tmp_path / "record.json")) == record


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.25), 0.25),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([[1, 2]]), [[1, 2]]),
        ((1, 2), [1, 2]),
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "cpu"),
        (Path("/somewhere/on/a/disk/weights.safetensors"), "weights.safetensors"),
        ({25: 1.0}, {"25": 1.0}),
    ],
)
def test_settings_and_metrics_become_json(value, expected):
    record = a_record(metrics={"value": value}, settings={"value": value})
    for found in (record.metrics["value"], record.settings["value"]):
        assert found == expected
        assert type(found) is type(expected)
    json.dumps(record.metrics)


def test_what_is_not_finite_is_null_and_noted(tmp_path):
    values = {"kl": math.nan, "ratio": [1.0, np.float32("inf")], "t": torch.tensor([-math.inf])}
    record = a_record(metrics=values)
    assert record.metrics == {"kl": None, "ratio": [1.0, None], "t": [None]}
    assert record.notes == (
        "by hand",
        "metrics.kl was nan, written as null",
        "metrics.ratio[1] was inf, written as null",
        "metrics.t[0] was -inf, written as null",
    )
    path = write_record(record, tmp_path / "r.json")
    assert "NaN" not in path.read_text()
    assert read_record(path) == record


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int
    rate: float


def test_settings_may_be_a_dataclass():
    record = new_record(
        "tiny",
        "benchmark",
        settings=Settings(steps=2, rate=math.nan),
        metrics={"inner": Settings(steps=1, rate=0.5)},
        seed=None,
        started=datetime.now(UTC) - timedelta(seconds=2),
    )
    assert record.settings == {"steps": 2, "rate": None}
    assert record.metrics == {"inner": {"steps": 1, "rate": 0.5}}
    assert record.notes == ("settings.rate was nan, written as null",)
    assert 2 <= record.seconds < 60
    assert record.versions == versions()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "file name"),
        ({"name": ""}, "file name"),
        ({"seed": True}, "integer"),
        ({"started": "yesterday"}, "ISO 8601"),
        ({"started": "2026-11-23T18:00:00"}, "offset from UTC"),
        ({"seconds": -1.0}, ">= 0"),
        ({"seconds": math.nan}, ">= 0"),
        ({"metrics": {"a": {"b": object()}}}, r"metrics\.a\.b is a object"),
        ({"settings": {"a": {(1, 2): 3}}}, "strings or numbers as keys"),
    ],
)
def test_bad_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_record(**changes)


def test_a_start_without_time_zone_and_notes_as_one_string_are_refused():
    common = {"settings": {}, "metrics": {}, "seed": None}
    with pytest.raises(ValueError, match="no time zone"):
        new_record("a", "demo", started=datetime(2026, 1, 1), **common)
    with pytest.raises(ValueError, match="one string"):
        new_record("a", "demo", started=datetime.now(UTC), notes="one", **common)


def damaged(tmp_path, change):
    path = write_record(a_record(), tmp_path / "record.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("seed"), r"missing \['seed'\], unknown \[\]"),
        (lambda content: content.update(colour="red"), r"unknown \['colour'\]"),
        (lambda content: content.update(kind="party"), "kind is 'party'; write one of 'train'"),
        (lambda content: content.update(metrics=[1]), "metrics is a list"),
        (lambda content: content.update(started=None), "ISO 8601"),
        (lambda content: content.update(commit="abc"), "commit is a str"),
        (lambda content: content.update(seed=0.5), "seed is 0.5"),
        (lambda content: content.update(name=3), "name is 3"),
        (lambda content: content.update(notes="one"), "sequence of strings"),
        (lambda content: content.update(notes=[1]), "sequence of strings"),
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path, change, message):
    path = damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message) as refused:
        read_record(path)
    assert str(path) in str(refused.value)


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_record(tmp_path / "record.json")
    (tmp_path / "half.json").write_text('{"name": "ti')
    with pytest.raises(ValueError, match="is not JSON"):
        read_record(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_record(tmp_path / "list.json")


def test_records_of_a_folder_come_oldest_first(tmp_path):
    times = {"a": "2026-11-23T18:00:00+00:00", "b": "2026-11-23T18:30:00+02:00", "c": "2026-11-22T00:00:00+00:00"}
    for name, started in times.items():
        write_record(a_record(name=name, started=started), tmp_path / f"{name}.json")
    assert [record.name for record in load_records(tmp_path)] == ["c", "b", "a"]
    with pytest.raises(ValueError, match="not a folder"):
        load_records(tmp_path / "nowhere")


def test_a_result_is_named_by_date_name_and_machine(tmp_path):
    started = datetime.now(UTC)
    path = write_result("product-cost", {"ratio": 1.1}, {"batch": 4}, seed=0, started=started, folder=tmp_path)
    assert path == tmp_path / f"{started.date()}-product-cost-{machine_slug(machine())}.json"
    assert read_record(path).metrics == {"ratio": 1.1}
    assert read_record(path).kind == "benchmark"


def test_machine_says_what_it_is_and_not_where():
    found = machine()
    assert set(found) == {"cpu", "cores", "threads", "memory_gib", "gpu", "system"}
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert (found["gpu"] is None) == (not torch.cuda.is_available() and not torch.backends.mps.is_available())
    assert socket.gethostname() not in json.dumps(found)


@pytest.mark.parametrize(
    ("machine", "slug"),
    [
        ({"gpu": "NVIDIA H100 80GB HBM3", "cpu": "x", "cores": 16}, "nvidia-h100-80gb-hbm3"),
        ({"gpu": None, "cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 2}, "intel-xeon-2-cores"),
        ({"gpu": None, "cpu": "AMD EPYC 7B13 64-Core Processor", "cores": 8}, "amd-epyc-7b13-64-core-8-cores"),
        ({"gpu": None, "cpu": "", "cores": 4}, "unknown-4-cores"),
    ],
)
def test_machine_slugs(machine, slug):
    assert machine_slug(machine) == slug


def test_versions_are_those_that_run():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["wellposed"] == wellposed.__version__
    assert {"python", "diffusers", "transformers"} <= set(found)


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_source_and_says_if_it_was_changed(tmp_path, monkeypatch):
    source = tmp_path / "record.py"
    source.write_text("one")
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(module, "__file__", str(source))
    assert commit() is None, "the source is not tracked: this is another project's checkout"
    git(tmp_path, "add", "record.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    revision = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "result.json").write_text("{}")
    assert commit() == {"hash": revision, "dirty": False}
    source.write_text("two")
    assert commit() == {"hash": revision, "dirty": True}


def test_there_may_be_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_provenance_says_each_thing_once():
    same = a_record(name="other")
    elsewhere = a_record(machine=a_record().machine | {"gpu": "NVIDIA H100"}, commit=None)
    found = provenance([a_record(), same, elsewhere])
    assert found == (
        "**Machine**: a CPU; 2 cores, 1 in use by torch; 8 GiB of memory; no GPU; Linux x86_64.",
        "**Machine**: a CPU; 2 cores, 1 in use by torch; 8 GiB of memory; NVIDIA H100; Linux x86_64.",
        "**Versions**: python 3.11.1, torch 2.13.0.",
        "**Commit**: `0123456789ab`, with uncommitted changes.",
    )
