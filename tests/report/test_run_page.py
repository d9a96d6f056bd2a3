import json
import os
import time
from datetime import UTC, datetime
from xml.etree import ElementTree

import pytest
import torch

from wellposed.report.pictures import tile_images
from wellposed.report.record import new_record, write_record
from wellposed.report.run_page import read_run, report_runs, text_picture


def make_run(folder, *, rate=0.001, frechet=3.25, steps=60):
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "model/loss": 1 / s, "model/grad_norm": 1.0, "samples_per_second": 9.5} for s in range(1, steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = new_record(
        "lgs_tiny",
        "train",
        settings={"optimizer": {"rate": rate, "betas": [0.9, 0.999]}, "compile": False},
        metrics={"frechet": {"25": frechet}},
        seed=7,
        started=datetime.now(UTC),
        notes=["a remark"],
    )
    write_record(record, folder / "record.json")
    (folder / "samples").mkdir()
    for step in (10, 50):
        content = tile_images(torch.zeros(4, 1, 8, 8), columns=2).data
        path = folder / "samples" / f"step-{step:06}.png"
        path.write_bytes(content)
        os.utime(path, (step, step))
    return folder


def test_the_page_of_two_runs_sets_them_side_by_side(tmp_path):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", rate=0.01, frechet=2.5)]
    out = report_runs(runs, tmp_path / "report.html")
    html = out.read_text()
    assert out == tmp_path / "report.html"
    assert "<title>Runs compared</title>" in html
    row = html.split("<code>frechet.25</code>")[1].split("</tr>")[0]
    assert "3.250" in row
    assert "2.500" in row
    settings = html.split('<section id="settings">')[1]
    for words in ("optimizer.rate", ">0.01<", "0.9, 0.999", "compile", "False", "a remark", ">7<"):
        assert words in settings, words
    assert html.count("data:image/svg+xml") == 1
    assert html.count("data:image/png") == 4
    assert html.index("step-000050") < html.index("step-000010")
    assert "<strong>Machine</strong>" in html
    assert str(tmp_path) not in html


def test_what_a_run_used_is_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    used = {
        "device": "NVIDIA A100-SXM4-80GB",
        "kind": "cuda",
        "devices": 8,
        "peak_flop_per_second": 312e12,
        "peak_source": "nominal",
        "seconds": 900.0,
        "device_seconds": 7200.0,
        "peak_flop": 7200 * 312e12,
        "steps": 10,
        "repeated_steps": 3,
        "samples": 400,
        "model_flops": 0.25 * 7200 * 312e12,
    }
    (folder / "usage.json").write_text(json.dumps(used))
    html = report_runs([folder, make_run(tmp_path / "other")], tmp_path / "r.html").read_text()
    section = html.split('<section id="efficiency">')[1].split("</section>")[0]
    for words in ("8 x NVIDIA A100-SXM4-80GB", "MFU", ">0.2500<", "3 steps were done again", "<code>run</code>"):
        assert words in section, words
    assert "<code>other</code>" not in section


def test_the_costs_of_two_runs_are_compared(tmp_path):
    runs = [make_run(tmp_path / name / "run") for name in ("a", "b")]
    for folder, hours in zip(runs, (1, 4), strict=True):
        used = {
            "device": "NVIDIA A100-SXM4-80GB",
            "kind": "cuda",
            "devices": 1,
            "peak_flop_per_second": 312e12,
            "peak_source": "nominal",
            "seconds": 3600.0 * hours,
            "device_seconds": 3600.0 * hours,
            "peak_flop": 3600 * 312e12 * hours,
            "samples": 400,
            "model_flops": 1e17,
        }
        (folder / "usage.json").write_text(json.dumps(used))
    section = report_runs(runs, tmp_path / "r.html").read_text().split('<section id="efficiency">')[1]
    section = section.split("</section>")[0]
    for words in (
        "utilisation",
        ">0.2500<",
        "all of them",
        "a/run took 0.2500 of the peak FLOP of b/run",
        "normalised",
    ):
        assert words in section, words


def test_losses_of_groups_are_a_picture_of_each_kind(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [
        {"step": s, "net/loss": 1 / s, "net/loss_t0": 2 / s, "net/loss_t0.25": 1 / s, "net/loss_4x6": 1 / s}
        for s in range(1, 9)
    ]
    del rows[3]["net/loss_t0"]  # no sample had that level
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = report_runs([folder], tmp_path / "r.html").read_text()
    found = [f"line plot of {name} over steps" for name in ("net/loss", "net/loss by noise level", "net/loss by size")]
    assert all(words in html for words in found)
    assert html.count("line plot of") == 3
    two = report_runs([folder, make_run(tmp_path / "other")], tmp_path / "r.html").read_text()
    assert "line plot of net/loss by size of run over steps" in two and "size of other" not in two


def test_pictures_of_stages_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    content = (folder / "samples" / "step-000010.png").read_bytes()
    for number, name in enumerate(("low/step_00000010", "high/step_00000020", "drawn/0000")):
        path = folder / "samples" / f"{name}.png"
        path.parent.mkdir()
        path.write_bytes(content)
        os.utime(path, (1000 + number, 1000 + number))
    names = [name for name, _ in read_run(folder).pictures]
    assert names == ["high/step_00000020", "low/step_00000010", "step-000050", "step-000010"]


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_is(tmp_path):
    folder = make_run(tmp_path / "young")
    (folder / "record.json").unlink()
    html = report_runs([folder], tmp_path / "r.html").read_text()
    assert "No record yet of <code>young</code>" in html
    assert 'id="curves"' in html
    assert 'id="metrics"' not in html


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    html = report_runs(runs, tmp_path / "r.html").read_text()
    assert "<code>a/run</code>" in html
    assert "<code>b/run</code>" in html


def test_without_logged_losses_there_is_no_curve(tmp_path):
    folder = make_run(tmp_path / "run", steps=1)
    assert 'id="curves"' not in report_runs([folder], tmp_path / "r.html").read_text()


def test_losses_that_are_not_numbers_do_not_stop_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "model/loss": null}\n{"step": 61, "model/loss": -1.0}\n{"step": 62, "other": 1}\n')
    assert 'id="curves"' in report_runs([folder], tmp_path / "r.html").read_text()


def test_only_the_latest_pictures_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    content = (folder / "samples" / "step-000010.png").read_bytes()
    now = time.time()
    for age, name in enumerate(["drawn-25", "step-000200", "step-000100", "step-000090", "step-000080"]):
        path = folder / "samples" / f"{name}.png"
        path.write_bytes(content)
        os.utime(path, (now + 100 - age, now + 100 - age))
    names = [name for name, _ in read_run(folder).pictures]
    assert names == ["drawn-25", "step-000200", "step-000100", "step-000090"]


def test_texts_and_what_checkpoints_measured_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    for path in folder.glob("samples/*.png"):
        path.unlink()
    for number, content in enumerate(["old", "older", "def f(x):\n    return x < 1 & 2\n"]):
        path = folder / "samples" / f"T{number:04}.txt"
        path.write_text(content)
        os.utime(path, (100 + number, 100 + number))
    (folder / "validation.jsonl").write_text(
        '{"step": 10, "validation/nelbo": 5.0}\n{"step": 20, "validation/nelbo": 4.0}'
    )
    assert [name for name, _ in read_run(folder).texts] == ["T0002", "T0001"]
    html = report_runs([folder], tmp_path / "r.html").read_text()
    assert 'alt="line plot of validation/nelbo over steps"' in html
    assert "return x &lt; 1 &amp; 2" in html
    assert "the last first: T0002, T0001." in html


def test_a_text_is_set_line_by_line():
    picture = text_picture("def f(x):\n    return x < 1\n\n" + "a" * 200 + "\x00")
    root = ElementTree.fromstring(picture.data)
    lines = [
        (element.text or "").replace("\N{NO-BREAK SPACE}", " ")
        for element in root.iter("{http://www.w3.org/2000/svg}text")
    ]
    assert lines == ["def f(x):", "    return x < 1", "", "a" * 72, "a" * 72, "a" * 56 + "\N{REPLACEMENT CHARACTER}"]
    assert (root.get("width"), root.get("height")) == (str(picture.width), str(picture.height))
    many = ElementTree.fromstring(text_picture("line\n" * 100).data)
    lines = [element.text for element in many.iter("{http://www.w3.org/2000/svg}text")]
    assert len(lines) == 48
    assert lines[-1] == "…"
    assert text_picture("").height > 0


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        report_runs([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="not a folder"):
        report_runs([tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"has no record\.json"):
        report_runs([tmp_path], tmp_path / "r.html")


def test_what_persists_in_a_run_is_drawn(tmp_path):
    """Two steps of a transformer of two blocks: one gap that has a value, and one that is longer than the run."""
    watched = {
        "ratio": 0.5,
        "gaps": [1, 2],
        "num_steps": 2,
        "sites": ["blocks.0", "blocks.1"],
        "pair_match_ratio": [[0.75], []],
        "persistence": [[0.9], []],
        "input_output_correlation": [0.5, None],
        "earlier_output_error": [[0.02], []],
        "output_error": [0.01, 0.01],
        "input_error": [0.1, 0.1],
        "random_error": [0.2, 0.2],
        "site_pair_match_ratio": {"blocks.0": [0.8, None], "blocks.1": [0.7, None]},
        "site_recovery_error": {"blocks.0": [0.02, None], "blocks.1": [0.02, None]},
    }
    folder = make_run(tmp_path / "run")
    (folder / "outputs.json").write_text(json.dumps({"attn": watched, "block": watched}))
    html = report_runs([folder, make_run(tmp_path / "other")], tmp_path / "r.html").read_text()
    section = html.split('<section id="persistence">')[1].split("</section>")[0]
    assert section.count("data:image/svg+xml") == 4
    assert "After 1 step 75% of the pairs would be chosen again" in section
    assert "2 times the error of new ones" in section
    assert "<strong>run</strong>" in section
    assert "<strong>other</strong>" not in section
    (folder / "outputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"outputs\.json is damaged"):
        read_run(folder)
