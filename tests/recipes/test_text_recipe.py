"""Whole runs of text and puzzles in small: train, export, validate, sample, score, go on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wellposed.data.sudoku import make_sudoku
from wellposed.data.text import Corpus, pack
from wellposed.data.tokenizers import character_tokenizer, tokenizer_fingerprint, train_bpe
from wellposed.recipes.run_folder import RunFolder
from wellposed.recipes.text_draw import build_network, draw_texts, empty_canvas, load_pipeline
from wellposed.recipes.text_evaluate import score_texts, solved
from wellposed.recipes.text_recipe import (
    PromptSettings,
    TextRecipe,
    TextSets,
    TransformerSettings,
)
from wellposed.recipes.text_train import _keep_tokenizer, _sets
from wellposed.recipes.udm import udm_sudoku_tiny, udm_tiny, with_head, with_kernel, with_loss
from wellposed.udm.pipeline import UniformDiffusionPipeline

SMALL = TransformerSettings(num_layers=1, num_attention_heads=2, attention_head_dim=8, cond_dim=8, dropout=0.0)


def corpus(name: str, lines: Iterable[int]) -> Corpus:
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in lines]
    return Corpus(name=name, read=lambda: texts, identity=name)


def few_texts(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
    train, validation = corpus("train", range(200)), corpus("validation", range(200, 240))
    chosen = tokenizer or train_bpe(train, 280)
    return TextSets(
        tokenizer=chosen,
        load_train=lambda: pack(train, chosen, block_length, wrap="eos", shifted=True),
        load_validation=lambda: pack(validation, chosen, block_length, wrap="eos"),
    )


def small_text() -> TextRecipe:
    recipe = udm_tiny()
    return replace(
        recipe,
        texts=few_texts,
        block_length=16,
        network=SMALL,
        training=replace(recipe.training, max_steps=4, batch_size=8, checkpoint_every=4, log_every=1, warmup_steps=2),
        sampling=replace(recipe.sampling, step_counts=(2, 4), num_inference_steps=3, batch_size=4),
        evaluation=replace(recipe.evaluation, num_samples=6, num_validation=8),
    )


def few_puzzles(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
    return TextSets(
        tokenizer=tokenizer or character_tokenizer("1234", unknown="1"),
        load_train=lambda: make_sudoku(60, side=4, split="train"),
        load_validation=lambda: make_sudoku(10, side=4, split="validation"),
    )


def small_sudoku() -> TextRecipe:
    recipe = udm_sudoku_tiny()
    return replace(
        recipe,
        texts=few_puzzles,
        network=SMALL,
        training=replace(recipe.training, max_steps=2, batch_size=8, checkpoint_every=2, log_every=1),
        sampling=replace(recipe.sampling, step_counts=(2,), num_inference_steps=2, batch_size=4),
        evaluation=replace(recipe.evaluation, num_samples=12, num_validation=8),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small text recipe."""
    folder = tmp_path_factory.mktemp("text") / "run"
    small_text().train(folder, device="cpu", progress=False)
    return folder


def test_training_leaves_a_whole_run(run: Path) -> None:
    settings = json.loads((run / "recipe.json").read_text())
    assert (settings["recipe"], settings["steps"], settings["kernel"], settings["head"]) == (
        *("udm_tiny", 4, "uniform"),
        "leave_one_out",
    )
    assert settings["vocab_size"] == 280
    assert settings["prompts"]["none"] == 0.5
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["network/loss"] > 0 for row in rows)
    (validation,) = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert validation["step"] == 4
    assert validation["validation/perplexity"] == pytest.approx(2.718281828459045 ** validation["validation/nelbo"])
    sheet = (run / "samples" / "step_00000004.txt").read_text()
    assert all(f"--- {number}\n" in sheet for number in range(4))
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_the_exported_pipeline_stands_alone(run: Path) -> None:
    pipeline = UniformDiffusionPipeline.from_pretrained(run / "pipeline")
    assert tokenizer_fingerprint(pipeline.tokenizer) == tokenizer_fingerprint(few_texts(run, None, 16).tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("def f____(x):", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert output.texts[0].startswith("def f")
    assert output.texts[0].endswith("(x):")


def test_texts_are_drawn_into_the_run(run: Path) -> None:
    drawn = small_text().sample(run, count=5, seed=1, steps=2, device="cpu")
    assert (drawn.count, drawn.evaluations, len(drawn.texts)) == (5, 2, 5)
    assert sorted(file.name for file in drawn.folder.iterdir()) == [f"{i:05d}.txt" for i in range(5)]
    assert (drawn.folder / "00003.txt").read_text() == drawn.texts[3]
    assert drawn.overview == run / "samples" / "T0002_seed1.txt"
    assert drawn.texts[0] in drawn.overview.read_text()
    assert drawn.texts[3] in drawn.told
    assert "5 texts in" in drawn.told
    again = small_text().sample(run, count=2, seed=1, steps=2, device="cpu")
    assert again.texts == drawn.texts[:2]
    assert small_text().sample(run, count=2, seed=2, steps=2, device="cpu").texts != again.texts


def test_prompts_stay_and_holes_are_filled(run: Path) -> None:
    continued = small_text().sample(run, count=2, prompt="def f7", device="cpu").texts
    assert all(text.startswith("def f7") for text in continued)
    assert continued[0] != continued[1]
    filled = small_text().sample(run, count=1, prompt="def ____(x):\n", device="cpu").texts[0]
    assert filled.startswith("def ") and filled.endswith("(x):\n")
    with pytest.raises(ValueError, match="more than length=16"):
        small_text().sample(run, prompt="def f(x): " * 20, device="cpu")


def test_scores_are_kept_with_their_samplers(run: Path, tmp_path: Path) -> None:
    recipe = small_text()
    told: list[tuple[str, int, int]] = []
    scores = score_texts(recipe, run, device="cpu", on_progress=lambda *what: told.append(what))
    assert [score.steps for score in scores] == [2, 4]
    assert told[:2] == [("T = 2", 4, 6), ("T = 2", 6, 6)]
    for score in scores:
        assert score.metric == "generative perplexity"
        assert score.value > 1 and score.real > 1
        assert score.entropy > 0 and score.real_entropy > 0
        assert score.card["judge"].startswith("5-gram")
    assert scores[0].perplexity == scores[1].perplexity
    # As at the last checkpoint: the same weights, sequences, times and noise.
    validation = json.loads((run / "validation.jsonl").read_text())
    assert scores[0].bound == pytest.approx(validation["validation/nelbo"])
    assert score_texts(recipe, run, device="cpu", resume=True) == scores
    colder = replace(recipe, sampling=replace(recipe.sampling, temperature=0.001))
    (other,) = score_texts(colder, run, steps=2, device="cpu", resume=True)
    assert other.value != scores[0].value
    assert len(json.loads((run / "scores.json").read_text())) == 3
    table = recipe.evaluate(run, device="cpu", resume=True)
    assert table.columns == ("T", "generative perplexity", "entropy", "evaluations", "seconds")
    assert len(table.rows) == len(table.cards) == 2
    assert table.metrics["generative perplexity T=4"] == scores[1].value
    assert table.metrics["held-out perplexity"] == scores[0].perplexity


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe = small_text()
    recipe = replace(recipe, network=replace(SMALL, dropout=0.1))
    recipe.train(tmp_path / "whole", steps=6, device="cpu", progress=False)
    recipe.train(tmp_path / "halves", steps=3, device="cpu", progress=False)

    def other_tokenizer(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
        assert tokenizer is not None, "the run has its tokenizer"
        return few_texts(folder, tokenizer, block_length)

    resumed = replace(recipe, texts=other_tokenizer)
    trained = resumed.train(tmp_path / "halves", steps=6, device="cpu", progress=False, resume=True)
    assert trained.metrics["validation/nelbo"] > 0
    whole, halves = (load_pipeline(tmp_path / name / "pipeline", torch.device("cpu")) for name in ("whole", "halves"))
    for name, weights in whole.transformer.state_dict().items():
        assert torch.equal(weights, halves.transformer.state_dict()[name]), name

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["network/loss"] for line in lines]

    assert losses("whole") == losses("halves")
    validations = (tmp_path / "halves" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in validations] == [3, 4, 6]


@pytest.mark.parametrize(
    "recipe",
    [
        with_kernel(small_text(), "masked"),
        with_loss(with_kernel(small_text(), "absorbing"), "cross_entropy"),
        with_kernel(small_text(), "refreshed_absorbing"),
        with_head(with_kernel(small_text(), "maximal_coupling"), "denoiser"),
        replace(small_text(), prompts=None, network=replace(SMALL, given_embedding=False, tie_word_embeddings=True)),
    ],
    ids=["masked", "absorbing", "refreshed", "maximal coupling", "without prompts"],
)
def test_every_kind_of_network_is_trained_and_sampled(recipe: TextRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe.train(run, steps=1, device="cpu", progress=False)
    kernel = json.loads((run / "pipeline" / "scheduler" / "scheduler_config.json").read_text())["kernel"]
    assert kernel == recipe.kernel
    (score,) = score_texts(recipe, run, steps=2, count=2, device="cpu")
    assert score.bound > 0


def test_texts_do_not_depend_on_their_batch() -> None:
    recipe = small_text()
    network = build_network(recipe, 280).eval().requires_grad_(False)
    with torch.no_grad():
        network.proj_out.weight.normal_(generator=torch.Generator().manual_seed(0))

    def texts(batch_size: int) -> torch.Tensor:
        settings = replace(recipe.sampling, batch_size=batch_size)
        canvas = empty_canvas(4, 16)
        return torch.cat(
            [t for t, _ in draw_texts(network, "uniform", settings, canvas, num_inference_steps=3, seed=1)]
        )

    assert torch.equal(texts(1), texts(3))


def test_a_corrector_stays_within_the_budget() -> None:
    recipe = small_text()
    network = build_network(recipe, 280).eval().requires_grad_(False)
    settings = replace(recipe.sampling, corrector_steps=2, corrector_k=3)
    ((_, record),) = draw_texts(network, "uniform", settings, empty_canvas(2, 16), num_inference_steps=9, seed=0)
    assert (record.evaluations, record.corrections) == (9, 4)


def test_puzzles_keep_their_clues_and_are_scored_by_their_rules(tmp_path: Path) -> None:
    recipe, run = small_sudoku(), tmp_path / "run"
    recipe.train(run, device="cpu", progress=False)
    drawn = recipe.sample(run, device="cpu")
    puzzles = few_puzzles(run, None, 16).validation.puzzles
    for text, puzzle in zip(drawn.texts, puzzles.tolist(), strict=False):
        assert len(text) == 16
        assert all(clue in (0, int(digit)) for clue, digit in zip(puzzle, text, strict=True))
    (score,) = score_texts(recipe, run, device="cpu")
    assert (score.metric, score.entropy, score.real) == ("puzzles solved", None, None)
    assert 0 <= score.value <= 1
    table = recipe.evaluate(run, device="cpu", resume=True)
    assert table.columns == ("T", "puzzles solved", "evaluations", "seconds")
    assert recipe.options == frozenset()


def test_solved_puzzles_are_counted() -> None:
    puzzles = make_sudoku(4, side=4, split="validation")
    right = puzzles.batch([0, 1, 2, 3, 0]).tokens
    assert solved(puzzles, right) == 1
    wrong = right.clone()
    wrong[1, :2] = wrong[1, :2].flip(0)
    wrong[4] = right[1]
    assert solved(puzzles, wrong) == pytest.approx(3 / 5)


def test_other_processes_take_the_main_ones_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    made = _sets(small_text(), run)
    _keep_tokenizer(run, made)
    monkeypatch.setenv("RANK", "1")
    read = _sets(small_text(), run)
    assert tokenizer_fingerprint(read.tokenizer) == tokenizer_fingerprint(made.tokenizer)
    assert read.train.fingerprint() == made.train.fingerprint()


def test_what_it_refuses(run: Path, tmp_path: Path) -> None:
    recipe = small_text()
    with pytest.raises(ValueError, match="steps is 0"):
        recipe.train(tmp_path, steps=0)
    with pytest.raises(ValueError, match="count is 0"):
        recipe.sample(run, count=0)
    with pytest.raises(ValueError, match="count is 0"):
        recipe.evaluate(run, count=0)
    with pytest.raises(ValueError, match="steps is 0"):
        recipe.sample(run, steps=0, device="cpu")
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        recipe.train(run, device="cpu")
    bad = tmp_path / "scores.json"
    for name in ("recipe.json", "pipeline"):
        (tmp_path / name).symlink_to(run / name)
    bad.write_text("[{}]")
    with pytest.raises(ValueError, match="is damaged"):
        recipe.evaluate(tmp_path, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(sharding: str, tmp_path: Path) -> None:
    """Under torchrun: the same losses, and a pipeline that is whole."""
    recipe = replace(small_text(), training=replace(small_text().training, samples_at_a_time=2))
    recipe.train(tmp_path / "one", device="cpu", progress=False)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from dataclasses import replace\nfrom test_text_recipe import small_text\nrecipe = small_text()\n"
        f"training = replace(recipe.training, samples_at_a_time=2, sharding={sharding!r})\n"
        f"replace(recipe, training=training).train({str(tmp_path / 'two')!r}, device='cpu', progress=False)\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["network/loss"] for line in lines]

    assert losses("two") == pytest.approx(losses("one"), rel=1e-4)
    one, two = (load_pipeline(tmp_path / name / "pipeline", torch.device("cpu")) for name in ("one", "two"))
    for name, weights in one.transformer.state_dict().items():
        torch.testing.assert_close(weights, two.transformer.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_prompts_are_drawn_for_training() -> None:
    from wellposed.recipes.text_train import _with_prompts

    recipe = replace(small_text(), prompts=PromptSettings(none=0.5, kinds=("prefix",)))
    sets = few_texts(Path(), None, 16)
    given = _with_prompts(recipe, sets.train, 0).batch(range(100)).given
    assert given is not None
    share = float(given.any(1).double().mean())
    assert 0.3 < share < 0.6
    assert _with_prompts(replace(recipe, prompts=None), sets.train, 0) is sets.train
