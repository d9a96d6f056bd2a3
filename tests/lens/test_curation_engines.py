"""Workers: one that is killed loses nothing, a sample that kills them loses only itself, a cluster does the same."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from wellposed.lens import curation_engines
from wellposed.lens.curation import CurationConfig, CurationTools, audit, curate
from wellposed.lens.curation_engines import do_all

SPEC = importlib.util.spec_from_file_location("planted_corpus", Path(__file__).with_name("planted_corpus.py"))
assert SPEC and SPEC.loader
corpus = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(corpus)

# What workers import: by the name of a file in a folder on the path, as a user's own module would be.
WORKERS = '''
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Work:
    """Leaves a file; dies on the way as often as told, after it has noted what it is at."""
    folder: Path
    deaths: dict
    cause: str = ""

    def __call__(self, number):
        (self.folder / "notes" / str(number)).write_text(self.cause)
        died = self.folder / f"died_{number}"
        before = len(died.read_text()) if died.is_file() else 0
        if before < self.deaths.get(number, 0) and not (self.folder / "blamed").is_file():
            died.write_text("x" * (before + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"done_{number}").write_text(str(os.getpid()))

def fails(number):
    if number == 3:
        raise OSError(28, "the disk is full")

@dataclass(frozen=True)
class DyingScorer:
    """Kills its process the first time that it is called."""
    mark: Path

    def __call__(self, pictures):
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return [5.0] * len(pictures)
        os.kill(os.getpid(), signal.SIGKILL)
'''

SMALL = CurationConfig(unit_size=4, min_area=64**2, measured_area=64**2, samples_per_shard=3)


@pytest.fixture
def workers(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "curation_workers.py").write_text(WORKERS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    import curation_workers

    yield curation_workers
    del sys.modules["curation_workers"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for i in range(8):
        (folder / f"{i}.png").write_bytes(corpus.encoded(corpus.drawing(i, 80)))
        (folder / f"{i}.txt").write_text(f"drawing {i}")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def shard_bytes(out):
    return {path.name: path.read_bytes() for path in sorted((out / "shards").glob("*.tar"))}


def run(work, numbers, folder, **options):
    told = {"done": [], "crashed": [], "blamed": []}

    def blame(note):
        (folder / "blamed").touch()
        told["blamed"].append(note)

    do_all(
        work,
        numbers,
        notes=folder / "notes",
        on_done=told["done"].append,
        on_crash=lambda lost: told["crashed"].append(list(lost)),
        on_cause=blame,
        **options,
    )
    assert not list((folder / "notes").iterdir())
    return told


def test_one_worker_is_this_process(tmp_path, workers):
    told = run(workers.Work(tmp_path, {}), range(3), tmp_path)
    assert told == {"done": [0, 1, 2], "crashed": [], "blamed": []}
    assert {(tmp_path / f"done_{n}").read_text() for n in range(3)} == {str(os.getpid())}


def test_work_that_cannot_travel_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be functions of a module or records such as ClassifierScorer"):
        do_all(lambda number: None, [1], notes=tmp_path / "notes", workers=2)
    with pytest.raises(ValueError, match="workers 0; write 'local' or 'ray', and at least 1"):
        do_all(print, [1], notes=tmp_path / "notes", workers=0)


def test_what_a_killed_worker_was_at_is_done_again(tmp_path, workers):
    told = run(workers.Work(tmp_path, {2: 1}), range(6), tmp_path, workers=2)
    assert sorted(told["done"]) == list(range(6)) and told["blamed"] == []
    assert len(told["crashed"]) == 1 and 2 in told["crashed"][0]
    assert str(os.getpid()) not in {(tmp_path / f"done_{n}").read_text() for n in range(6)}


@pytest.mark.slow
def test_a_sample_that_kills_three_workers_is_blamed(tmp_path, workers):
    told = run(workers.Work(tmp_path, {1: 99}, cause="0000000017"), range(4), tmp_path, workers=2)
    assert told["blamed"] == ["0000000017"] and sorted(told["done"]) == list(range(4))


@pytest.mark.slow
def test_crashes_without_a_cause_end_the_run(tmp_path, workers):
    with pytest.raises(RuntimeError, match="5 workers in a row were killed at piece 1, at no one sample"):
        run(workers.Work(tmp_path, {1: 99}), range(4), tmp_path, workers=2)


@pytest.mark.slow
def test_errors_of_workers_are_raised_here(tmp_path, workers):
    with pytest.raises(OSError, match="the disk is full"):
        run(workers.fails, range(8), tmp_path, workers=2)


def test_workers_that_never_start_end_the_run(tmp_path, monkeypatch):
    begun = []

    def broken(work, waiting, notes, workers, on_done):
        begun.append(list(waiting))
        return [waiting.popleft()]

    monkeypatch.setattr(curation_engines, "_until_broken", broken)
    with pytest.raises(RuntimeError, match=r"before they began anything.*__main__.*importable.*memory.*workers=1"):
        run(print, range(3), tmp_path, workers=2)
    assert begun == [[0, 1, 2]] * 2


@pytest.mark.slow
def test_a_script_without_its_guard_is_told_so(tmp_path, raw):
    script = tmp_path / "script.py"
    script.write_text(
        f"from wellposed.lens.curation import CurationConfig, curate\n"
        f"curate({str(raw)!r}, {str(tmp_path / 'out')!r}, CurationConfig(unit_size=1), workers=2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=400)
    assert done.returncode != 0 and "ended before they began anything" in done.stderr


@pytest.mark.parametrize("keys", ["aabbccdd", "aba", "abbcc"])
def test_many_samples_of_a_unit_may_be_blamed(tmp_path, monkeypatch, keys):
    """A worker dies at each of these samples, one after the other; only those where two died in a row are causes."""
    deaths = list(keys)

    def dying(work, waiting, notes, workers, on_done):
        number = waiting.popleft()
        if not deaths:
            on_done(number)
            (notes / str(number)).unlink(missing_ok=True)
            return []
        (notes / str(number)).write_text(deaths.pop(0))
        return [number]

    monkeypatch.setattr(curation_engines, "_until_broken", dying)
    deaths.insert(0, "")  # the one that makes it a suspect
    told = run(print, [7], tmp_path, workers=2)
    assert "".join(told["blamed"]) == {"aabbccdd": "abcd", "aba": "", "abbcc": "bc"}[keys] and told["done"] == [7]


def test_a_sample_at_which_two_runs_in_a_row_ended_is_rejected(tmp_path, raw, monkeypatch):
    """With one worker it is the run that ends; what it leaves then is written here by hand."""
    out = tmp_path / "out"

    def ends_at(key):
        with monkeypatch.context() as patched:
            patched.setattr(curation_engines, "_do_noted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                curate(raw, out, SMALL)
        (out / "working").mkdir(exist_ok=True)
        (out / "working" / "1").write_text(key)

    for key in ("0000000005", "", "0000000005", "0000000006", "0000000005", "0000000005"):
        ends_at(key)
        assert not (out / "fatal.txt").exists()
    report = curate(raw, out, SMALL)
    assert {r.source: r.reason for r in audit(out)} == {"5.png": "fatal", "broken.png": "not a picture"}
    assert report.kept == 7 and "a sample ended its process twice" in report.events[0]["what"]


def test_an_error_leaves_no_suspect(tmp_path, workers):
    with pytest.raises(OSError, match="the disk is full"):
        run(workers.fails, [3], tmp_path)
    assert not list((tmp_path / "notes").iterdir())


def test_a_curation_survives_a_killed_worker(tmp_path, raw, workers):
    tools = CurationTools(aesthetics=workers.DyingScorer(tmp_path / "died"))
    report = curate(raw, tmp_path / "out", SMALL, tools=tools, workers=2)
    assert (tmp_path / "died").is_file() and report.kept == 8 and report.unfinished == 0
    assert [event["what"] for event in report.events] == ["a worker was killed"]
    assert "a worker was killed" in str(report)
    curate(raw, tmp_path / "alone", SMALL, tools=tools)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "alone")


def test_a_sample_that_is_blamed_is_rejected_and_no_other(tmp_path, raw, monkeypatch):
    """Without the processes that it would kill."""
    from wellposed.lens import curation

    def blaming(piece, numbers, *, on_cause, **options):
        if not (tmp_path / "out" / "fatal.txt").is_file():
            on_cause("0000000005")
        do_all(piece, numbers, on_cause=on_cause, **options)

    monkeypatch.setattr(curation, "do_all", blaming)
    report = curate(raw, tmp_path / "out", SMALL)
    assert {r.source: r.reason for r in audit(tmp_path / "out")} == {"5.png": "fatal", "broken.png": "not a picture"}
    assert report.kept == 7 and report.events[0]["key"] == "0000000005"


INTERRUPTED = """
    import sys
    from wellposed.lens.curation import CurationConfig, curate
    from curation_workers import Slow

    if __name__ == "__main__":
        config = CurationConfig(unit_size=1, min_area=64**2, measured_area=64**2, samples_per_shard=3)
        curate({raw!r}, {out!r}, config, tools=Slow.tools(), workers=2,
               on_progress=lambda what, done, total: print(what, done, flush=True))
"""

SLOW = '''
class Slow:
    """Takes its time."""
    def __call__(self, pictures):
        time.sleep(0.2)
        return [5.0] * len(pictures)

    @staticmethod
    def tools():
        from wellposed.lens.curation import CurationTools
        return CurationTools(aesthetics=Slow())
'''


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_and_the_rest_is_done_later(tmp_path, raw, workers):
    """The whole group of processes is interrupted, as by a terminal."""
    module = tmp_path / "modules" / "curation_workers.py"
    module.write_text(WORKERS + SLOW)
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(INTERRUPTED.format(raw=str(raw), out=str(tmp_path / "out"))))
    environment = {**os.environ, "PYTHONPATH": str(module.parent)}
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    while process.stdout.readline().strip() != "filters 2":
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    for table in (tmp_path / "out").glob("*/*.jsonl"):
        assert all(json.loads(line) for line in table.read_text().splitlines())
    subprocess.run([sys.executable, script], check=True, env=environment, capture_output=True, timeout=120)
    curate(raw, tmp_path / "alone", SMALL)
    assert [path.name for path in (tmp_path / "out" / "shards").glob("*.tar")]
    assert len(shard_bytes(tmp_path / "out")) == len(shard_bytes(tmp_path / "alone"))


RAY = """
    import ray
    from wellposed.lens.curation import CurationConfig, curate

    if __name__ == "__main__":
        # On this machine alone: nothing is looked up, nothing listens to others.
        ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", configure_logging=False)
        config = CurationConfig(unit_size=4, min_area=64**2, measured_area=64**2, samples_per_shard=3)
        report = curate({raw!r}, {out!r}, config, workers=2, engine="ray")
        assert report.unfinished == 0
        assert curate({raw!r}, {out!r}, config, workers=2, engine="ray").kept == report.kept
"""


@pytest.mark.slow
def test_ray_does_the_same(tmp_path, raw):
    """In a process of its own: Ray looks for the address of its machine, which tests may not."""
    pytest.importorskip("ray")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RAY.format(raw=str(raw), out=str(tmp_path / "out"))))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    curate(raw, tmp_path / "alone", SMALL)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "alone")


def test_without_ray_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"wellposed\[scale\]"):
        do_all(print, [1], notes=tmp_path / "notes", engine="ray")
