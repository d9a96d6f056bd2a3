"""Every way to go wrong on the command line: one line that says what to do, an exit code, no traceback."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wellposed import cli
from wellposed.cli import main
from wellposed.recipes import RECIPES, DDPMRecipe, FeatureEvaluation, ScoreTable, recipe_named
from wellposed.recipes.lgs import lgs_tiny
from wellposed.recipes.text_recipe import TextRecipe, TextSets
from wellposed.recipes.udm import udm_tiny


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
    monkeypatch.setenv("WELLPOSED_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("wellposed: ")
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


@functools.cache
def small_tiny() -> DDPMRecipe:
    """lgs_tiny in seconds: the same run with fewer of everything."""
    from wellposed.recipes.digit_features import digit_features

    recipe = lgs_tiny()
    network = recipe.network().config
    return replace(
        recipe,
        network=lambda: type(recipe.network()).from_config(network, block_out_channels=(8, 8), attention_head_dim=4),
        training=replace(recipe.training, max_steps=3, batch_size=4, log_every=1),
        sampling=replace(recipe.sampling, step_counts=(2,), num_inference_steps=2, batch_size=4),
        evaluation=FeatureEvaluation(
            num_samples=8, extractor=lambda run, device: digit_features(run / "features", steps=5, device=device)
        ),
    )


@functools.cache
def small_text() -> TextRecipe:
    """udm_tiny in seconds: the same run on a few lines, with fewer of everything."""
    from wellposed.data.text import Corpus, pack
    from wellposed.data.tokenizers import byte_tokenizer

    def texts(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
        lines = [f"line {number}\n" for number in range(200)]
        corpus = Corpus(name="lines", read=lambda: lines, identity="lines")
        chosen = tokenizer or byte_tokenizer(special_tokens=("eos",))
        blocks = pack(corpus, chosen, block_length, wrap="eos")
        return TextSets(tokenizer=chosen, load_train=lambda: blocks, load_validation=lambda: blocks)

    recipe = udm_tiny()
    return replace(
        recipe,
        texts=texts,
        block_length=16,
        network=replace(recipe.network, num_layers=1, num_attention_heads=2, attention_head_dim=8, cond_dim=8),
        training=replace(recipe.training, max_steps=3, batch_size=4, checkpoint_every=2, log_every=1),
        sampling=replace(recipe.sampling, step_counts=(2,), num_inference_steps=2, batch_size=4),
        evaluation=replace(recipe.evaluation, num_samples=4, num_validation=4),
    )


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made here, before a test captures what is said: diffusers keeps the stderr that it finds when it is imported.
    for recipe in (small_tiny(), small_text()):
        monkeypatch.setitem(RECIPES, recipe.name, lambda recipe=recipe: recipe)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    small_tiny().train(run, device="cpu", progress=False)
    return run


@pytest.fixture
def trained(trained_once: Path, small_recipe: None, tmp_path: Path) -> Path:
    """A finished run of the small recipe in the folder ``run``."""
    return shutil.copytree(trained_once, tmp_path / "run")


def test_a_run_from_end_to_end(small_recipe: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "lgs_tiny", "--out", "run", "--device", "cpu", "--seed", "3"]) == 0
    assert "wellposed sample run" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["kind"], record["seed"], record["settings"]["steps"]) == ("train", 3, 3)
    assert main(["sample", "run", "--count", "3", "--device", "cpu"]) == 0
    assert "3 images" in capsys.readouterr().out
    assert (tmp_path / "run" / "samples" / "T0002_m3_seed0.png").is_file()
    assert main(["evaluate", "run", "--count", "4", "--steps", "3", "--num-lanczos-steps", "1", "--device", "cpu"]) == 0
    assert "Frechet distance" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["kind"] == "evaluate"
    assert {"network/loss", "Frechet distance T=3 m=1"} <= set(record["metrics"])
    assert "digit classifier" in record["notes"][0]
    assert main(["report", "run"]) == 0
    assert "Frechet distance T=3 m=1" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_of_text_from_end_to_end(small_recipe: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "udm_tiny", "--out", "run", "--device", "cpu", "--seed", "3"]) == 0
    assert "wellposed sample run" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["kind"], record["seed"], record["settings"]["steps"]) == ("train", 3, 3)
    assert {"network/loss", "validation/nelbo"} <= set(record["metrics"])
    assert main(["sample", "run", "--count", "2", "--device", "cpu", "--prompt", "line ____"]) == 0
    said = capsys.readouterr().out
    assert "--- 1\nline " in said
    assert "2 texts in" in said
    assert main(["sample", "run", "--count", "1", "--device", "cpu", "--prompt", "line ____"]) == 0
    (folder,) = (path for path in (tmp_path / "run" / "samples").iterdir() if path.is_dir())
    assert [path.name for path in folder.iterdir()] == ["00000.txt"]  # nothing of the two before
    assert main(["evaluate", "run", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "generative perplexity" in shown and "held-out perplexity" in shown
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert {"network/loss", "generative perplexity T=2", "entropy T=2"} <= set(record["metrics"])
    assert "5-gram" in record["notes"][0]
    assert main(["report", "run"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'alt="line plot of validation/nelbo over steps"' in page
    assert re.search(r"T0002_seed0_[0-9a-f]{8}\b", page)
    assert main(["sample", "run", "--num-lanczos-steps", "2"]) == 2
    assert "--num-lanczos-steps means nothing to udm_tiny; of its own it takes --prompt" in complaint(capsys)


def test_scores_keep_their_cards(small_recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other scores come beside the earlier ones, and the same ones in their place."""
    run = tmp_path / "run"
    (run / "pipeline").mkdir(parents=True)
    (run / "pipeline" / "model_index.json").touch()
    (run / "recipe.json").write_text('{"recipe": "lgs_tiny"}')

    def table(steps: int, value: float, how: str) -> ScoreTable:
        name = f"distance T={steps}"
        return ScoreTable(columns=(), rows=(), caption="", metrics={name: value}, cards=(f"{name}: {how}",))

    tables = [table(4, 1.0, "n = 10"), table(16, 2.0, "n = 10"), table(4, 3.0, "n = 20")]
    monkeypatch.setattr(type(small_tiny()), "evaluate", lambda self, run, **options: tables.pop(0))
    for _ in range(3):
        assert main(["evaluate", "run"]) == 0
    record = json.loads((run / "record.json").read_text())
    assert record["metrics"] == {"distance T=4": 3.0, "distance T=16": 2.0}
    assert sorted(record["notes"]) == ["distance T=16: n = 10", "distance T=4: n = 20"]


def test_account_of_published_settings_and_of_a_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["account", "lens", "z-image"]) == 0
    shown = capsys.readouterr().out
    assert "0.1928 of the peak FLOP of z-image" in shown
    assert "Captioning is left out" in shown
    (trained / "history.json").write_text('{"accuracy": [[4, 0.25], [12, 0.75]]}')
    assert main(["account", "run", "run", "--to", "accuracy=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "samples until accuracy = 0.5" in shown
    assert "run took 1.0000 of the peak FLOP of run until accuracy = 0.5" in shown
    assert main(["report", "run"]) == 0
    assert "MFU" in (trained / "report.html").read_text()


def test_list_shows_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)
    assert "2605.22723" in shown and "2605.22765" in shown
    assert "5.21" in shown


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in ("demo", "train", "report"))])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "usage: wellposed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["--help", "list"])
def test_help_and_list_are_light(arguments: str) -> None:
    """They import the command line and nothing that computes, and so answer in a fraction of a second."""
    code = (
        f"import sys; from wellposed.cli import main; code = main([{arguments!r}])\n"
        "print(code, *sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code, *imported = done.stdout.splitlines()[-1].split()
    public = {name for name in imported if not name.startswith("_")}
    assert code == "0"
    assert public <= {"docstring_parser", "rich", "typeguard", "typing_extensions", "tyro", "wellposed"}


@pytest.mark.parametrize(
    "arguments", [["train"], ["train", "lgs_tiny", "--bogus", "1"], ["train", "lgs_tiny", "--steps", "x"]]
)
def test_misuse_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "help" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "lgs_tiny"], "no command 'trian'; did you mean train?"),
        (["train", "lgs_tny"], "no recipe 'lgs_tny'; did you mean lgs_tiny?"),
        (["report"], "no runs to report"),
        (["account"], "no runs to account for"),
        (["account", "lens", "--to", "GenEval"], "--to is 'GenEval'; write a metric and a number"),
    ],
)
def test_wrong_words(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in complaint(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "nowhere"], "nowhere does not exist; make a run with: wellposed train RECIPE --out nowhere"),
        (["evaluate", "."], "is no run folder"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["account", "lens", "nowhere"], "nowhere is neither the folder of a run nor a published setting"),
        (["train", "lgs_celeba64"], "celeba64.pth is missing: the CelebA 64x64 network of DDIM; get it from"),
        (["train", "lgs_imagenet64", "--steps", "5"], "imagenet64 is missing: ImageNet 64x64"),
        (["train", "lgs_tiny", "--steps", "0"], "steps is 0; give at least 1"),
        (["train", "lgs_tiny", "--device", "abacus"], "device 'abacus' is not to be had here"),
    ],
)
def test_wrong_paths_and_numbers(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert said in complaint(capsys)
    assert not Path("runs").exists()


def test_run_that_is_there_already(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "lgs_tiny", "--out", "run", "--device", "cpu"]) == 1
    assert "run already holds a run; add --resume" in complaint(capsys)
    assert main(["train", "lgs_tiny", "--out", "run", "--device", "cpu", "--resume", "--steps", "4"]) == 0
    capsys.readouterr()
    assert main(["train", "lgs_tiny", "--out", "run", "--device", "cpu", "--resume", "--seed", "1"]) == 1
    assert "belongs to another run" in complaint(capsys)


def test_out_that_is_a_file(small_recipe: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").touch()
    assert main(["train", "lgs_tiny", "--out", "taken"]) == 1
    assert "taken is a file" in complaint(capsys)


def test_checkpoint_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    recipe = recipe_named("lgs_celeba64")
    torch.save({"conv_in.weight": torch.zeros(8, 3, 3, 3)}, recipe.folder / "celeba64.pth")
    assert main(["train", "lgs_celeba64", "--out", "run"]) == 1
    assert "is not of this network's architecture" in complaint(capsys)
    (tmp_path / "data" / "celeba64.pth").write_bytes(b"not a checkpoint at all")
    assert main(["train", "lgs_celeba64", "--out", "other"]) == 1
    assert "celeba64.pth" in complaint(capsys)


@pytest.mark.parametrize("damage", ["recipe", "weights", "half"])
def test_damaged_run(trained: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights = trained / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "recipe":
        (trained / "recipe.json").write_text("{")
        expected = "recipe.json is damaged"
    elif damage == "weights":
        weights.unlink()
        expected = "pipeline cannot be loaded"
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
        expected = "pipeline cannot be loaded"
    assert main(["sample", "run", "--device", "cpu"]) == 1
    assert expected in complaint(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "run", "--count", "0"], "count is 0"),
        (["sample", "run", "--steps", "5000"], "the number of reverse steps is 5000; give 1 to 1000"),
        (["sample", "run", "--num-lanczos-steps", "-1"], "num_lanczos_steps must be >= 0"),
        (["evaluate", "run", "--count", "1"], "needs at least 2 images"),
    ],
)
def test_settings_out_of_range(
    trained: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--device", "cpu"]) == 1
    assert said in complaint(capsys)


def test_flags_of_another_kind_of_run_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "run", "--prompt", "def f(x):"]) == 2
    assert "--prompt means nothing to lgs_tiny; of its own it takes --num-lanczos-steps" in complaint(capsys)


def test_unexpected_error_is_one_line_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise KeyError("a\nb")

    monkeypatch.setitem(RECIPES, "lgs_tiny", broken)
    assert main(["train", "lgs_tiny"]) == 1
    assert "unexpected KeyError" in complaint(capsys)
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(KeyError):
        main(["train", "lgs_tiny"])


def test_keyboard_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(RECIPES, "lgs_tiny", interrupted)
    assert main(["train", "lgs_tiny", "--out", "run"]) == 130
    assert "wellposed train lgs_tiny --out run --resume" in complaint(capsys)


def test_interrupted_training_saves_and_goes_on(
    small_recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wellposed.training.run import Run

    advance = Run.advance

    def interrupting(self: Run, data: object) -> None:
        advance(self, data)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "advance", interrupting)
    command = ["train", "lgs_tiny", "--out", "run", "--device", "cpu"]
    assert main(command) == 130
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wellposed: ")]
    assert said == [
        "wellposed: stopped at step 2 and saved; to go on: " + " ".join(["wellposed", *command, "--resume"])
    ]
    monkeypatch.setattr(Run, "advance", advance)
    assert main([*command, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["settings"]["steps"] == 3


@pytest.mark.slow
def test_the_installed_command_stops_at_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wellposed.cli", "train", "lgs_tiny", "--out", "run", "--device", "cpu"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "to go on: wellposed train lgs_tiny" in said.splitlines()[-1]
