"""Sudoku of 4 x 4, a task with a right answer: what the parameterisation, the kernel and revision are worth.

A puzzle is its grid, whose clues are given (K = 4). The published layout, puzzle and solution one after the other with
K = 15, is the recipe ``udm_sudoku`` and takes longer. Measured over seeds: the share of puzzles solved at equal numbers
of network evaluations, and for the absorbing kernels how often a position that was revealed is taken back.

    python benchmarks/udm_sudoku.py --seeds 0 1 2
"""

import argparse
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from wellposed.batches import TextBatch
from wellposed.data.sudoku import is_solution
from wellposed.data.tokenizers import character_tokenizer
from wellposed.recipes.index import recipe_named
from wellposed.recipes.run_folder import RunFolder
from wellposed.recipes.text_draw import load_pipeline, token_model
from wellposed.recipes.text_recipe import TextRecipe, TextSets
from wellposed.recipes.udm_comparison import CONTENDERS, run_folder, train_contender
from wellposed.report.record import write_result
from wellposed.training.context import derived_seed
from wellposed.udm.corrector import Corrector
from wellposed.udm.grids import alpha_grid
from wellposed.udm.kernels import TokenState, kernel_named
from wellposed.udm.remasking import Remasking
from wellposed.udm.sampler import sample, split_budget

LETTERS = "123456789!#$%&."

WAYS: dict[str, dict[str, Any]] = {
    "udm_denoiser": {"contender": "udm_denoiser"},
    "udm_loo": {"contender": "udm_loo"},
    "udm_loo, corrector": {"contender": "udm_loo", "corrector": Corrector(steps=2, k=2)},
    "udm_loo, confidence": {"contender": "udm_loo", "strategy": "confidence"},
    "audm": {"contender": "audm"},
    "reaudm": {"contender": "audm", "kernel": "refreshed_absorbing"},
    "audm, remasking": {"contender": "audm", "remasking": Remasking(schedule="rescale", eta=0.2)},
    "mdm": {"contender": "mdm"},
    "mdm, remasking": {"contender": "mdm", "remasking": Remasking(schedule="rescale", eta=0.2)},
}


def recipe(vocabulary: int) -> TextRecipe:
    """``udm_sudoku_tiny`` with the optimiser of the text benchmark, and with tokens that never occur."""
    base: Any = recipe_named("udm_sudoku_tiny")

    def puzzles(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
        sets = base.texts(folder, tokenizer, block_length)
        return replace(sets, tokenizer=tokenizer or character_tokenizer(LETTERS[:vocabulary], unknown="1"))

    return replace(
        base,
        texts=puzzles,
        training=replace(base.training, learning_rate=2e-3, warmup_steps=50, betas=(0.9, 0.95), ema_decay=0.98),
    )


def solve(network: Any, way: dict[str, Any], data: Any, steps: int, count: int, seed: int) -> dict[str, float]:
    """Share solved, network evaluations, and how often a revealed position was taken back, per free position."""
    trained = CONTENDERS[way["contender"]].kernel
    kernel = kernel_named(way.get("kernel", trained), network.config.vocab_size)
    batch: TextBatch = data.batch(list(range(count)))
    free = ~batch.given
    corrector = way.get("corrector")
    num_steps, corrected = split_budget(steps, corrector)
    plan = way["remasking"].plan(num_steps) if "remasking" in way else None
    taken_back = 0
    revealed = torch.zeros_like(free)

    def watch(index: int, state: TokenState) -> None:
        nonlocal taken_back, revealed
        now = ~kernel.open(state) & free
        taken_back += int((revealed & ~now).sum())
        revealed = now

    tokens, record = sample(
        token_model(network, kernel),
        kernel,
        batch,
        alpha_grid(num_steps) if plan is None else plan.alphas,
        corrector=corrector,
        corrected_steps=corrected,
        sigmas=None if plan is None else plan.sigmas,
        strategy=way.get("strategy", "ancestral"),
        generator=torch.Generator().manual_seed(derived_seed(seed, "sudoku")),
        on_step=watch,
    )
    solved = is_solution(data.grids(tokens), data.puzzles[:count]).double().mean()
    return {
        "solved": float(solved),
        "evaluations": record.evaluations,
        "taken_back": taken_back / int(free.sum()),
    }


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/udm_sudoku"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--vocabulary", type=int, choices=range(4, 16), default=4, help="15 is that of 9 x 9")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    base = recipe(chosen.vocabulary)
    data = base.sets().validation
    ways = {name: WAYS[name] for name in chosen.ways}
    found: dict[str, dict[str, list[dict[str, float]]]] = {way: {} for way in ways}
    for seed in chosen.seeds:
        for name in dict.fromkeys(way["contender"] for way in ways.values()):
            train_contender(base, name, chosen.out, steps=chosen.steps, seed=seed, device=chosen.device, progress=False)
        for name, way in ways.items():
            folder = RunFolder(run_folder(chosen.out, way["contender"], seed))
            network = load_pipeline(folder.pipeline, torch.device(chosen.device)).transformer
            for steps in chosen.evaluations:
                score = solve(network, way, data, steps, chosen.count, seed)
                found[name].setdefault(str(steps), []).append(score)
            line = "  ".join(
                f"{steps}: {100 * scores[-1]['solved']:.1f} % ({scores[-1]['taken_back']:.3f})"
                for steps, scores in found[name].items()
            )
            print(f"seed {seed}  {name:22} {line}", flush=True)
    settings = {name: value for name, value in vars(chosen).items() if name != "out"} | {"recipe": base.settings()}
    print(
        write_result(
            f"udm-sudoku4-k{chosen.vocabulary}", {"ways": found}, settings, seed=chosen.seeds[0], started=started
        )
    )


if __name__ == "__main__":
    main()
