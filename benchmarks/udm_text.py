"""Does the gap between uniform and masked diffusion close? Small language models on real text, three seeds.

Claims measured, on Python's standard library's own source in bytes (K = 257, blocks of 64), with one network and one
budget for all: (i) uniform diffusion with a leave-one-out head against a denoiser head; (ii) the absorbing
reformulation against masked diffusion; (iii) predictor-corrector and leave-one-out temperature on frozen networks, as
frontiers of generative perplexity (under an n-gram model of the training text) against token entropy.

    python benchmarks/udm_text.py --seeds 0 1 2              # trains what is missing, then measures
    python benchmarks/udm_text.py --train mdm audm --seeds 0  # trains these only
"""

import argparse
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from wellposed.evaluation.frontier import Frontier, compare
from wellposed.recipes.index import recipe_named
from wellposed.recipes.text_recipe import TextRecipe
from wellposed.recipes.udm_comparison import (
    CONTENDERS,
    WAYS,
    bounds,
    frontiers,
    judge_of,
    train_contender,
)
from wellposed.report.record import write_result

TEMPERATURES = (0.7, 0.85, 1.0)
PAIRS = (  # the first less the second: above zero, the second is better
    ("udm_denoiser", "udm_loo"),
    ("mdm", "audm"),
    ("udm_loo", "mdm"),
    ("udm_loo_denoiser_temperature", "udm_loo"),
    ("udm_loo", "udm_loo_corrector"),
    ("udm_loo", "udm_loo_random_corrector"),
    ("udm_loo", "udm_loo_geometric"),
    ("audm", "reaudm"),
    ("udm_loo_corrector", "mdm"),
    ("udm_loo_corrector_nucleus", "mdm_nucleus"),
)


def recipe() -> TextRecipe:
    """``udm_tiny`` in bytes: within the same minutes, byte pairs hardly get beyond unigrams."""
    base: Any = recipe_named("udm_tiny")
    return replace(
        base,
        block_length=64,
        network=replace(base.network, num_layers=3, given_embedding=False),
        training=replace(base.training, batch_size=32, learning_rate=2e-3, warmup_steps=50, betas=(0.9, 0.95)),
        sampling=replace(base.sampling, batch_size=128),
    )


def show_point(way: str, temperature: float, seed: int, score: Any) -> None:
    print(
        f"  {way:32} tau {temperature:.2f} seed {seed}: {score.value:9.2f} at entropy {score.entropy:.3f}", flush=True
    )


def gaps(found: dict[str, Frontier]) -> dict[str, Any]:
    """How far apart the curves of each pair lie, where they share entropies."""
    measured: dict[str, Any] = {}
    for first, second in PAIRS:
        if first not in found or second not in found:
            continue
        shared = found[first].seeds == found[second].seeds
        try:
            gap = compare(found[first], found[second], paired=shared)
        except ValueError as error:
            print(f"  {first} - {second}: {error}")
            continue
        measured[f"{first} - {second}"] = {
            "log_gap": gap.log_gap,
            "standard_error": gap.standard_error,
            "entropies": gap.entropy_range,
        }
        print(f"  {first} - {second}: {gap}")
    return measured


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/udm_text"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--train", nargs="+", choices=list(CONTENDERS), help="train these and stop")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--evaluations", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    base = recipe()
    wanted = chosen.train or list(dict.fromkeys(WAYS[way].contender for way in chosen.ways))
    for seed in chosen.seeds:
        for name in wanted:
            train_contender(base, name, chosen.out, steps=chosen.steps, seed=seed, device=chosen.device, progress=False)
            print(f"{name}, seed {seed}: trained", flush=True)
    if chosen.train:
        return
    trained = [name for name in CONTENDERS if (chosen.out / f"{name}-{chosen.seeds[0]}").is_dir()]
    held_out = {
        name: [
            bounds(base, name, chosen.out, steps=chosen.steps, seed=seed, device=chosen.device) for seed in chosen.seeds
        ]
        for name in trained
    }
    for name, values in held_out.items():
        print(f"{name:18} bound on held-out text: " + " ".join(f"{value:.4f}" for value in values), flush=True)
    judge, real = judge_of(base, chosen.out, wanted[0], chosen.seeds[0])
    print(f"real text: {real}")
    found = frontiers(
        base,
        chosen.ways,
        chosen.out,
        temperatures=TEMPERATURES,
        evaluations=chosen.evaluations,
        num_samples=chosen.samples,
        seeds=chosen.seeds,
        judge=judge,
        device=chosen.device,
        on_point=show_point,
    )
    metrics: dict[str, Any] = {
        "held_out_nats": held_out,
        "real": {"perplexity": real.value, "entropy": real.entropy},
        "frontiers": {name: frontier.to_dict() for name, frontier in found.items()},
        "gaps": gaps(found),
    }
    settings = {name: value for name, value in vars(chosen).items() if name not in ("out", "train")}
    settings |= {"recipe": base.settings(), "temperatures": TEMPERATURES, "threads": torch.get_num_threads()}
    name = f"udm-text-nfe{chosen.evaluations}"
    print(write_result(name, metrics, settings, seed=chosen.seeds[0], started=started))


if __name__ == "__main__":
    main()
