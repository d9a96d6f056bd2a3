"""Do dense captions, several languages and several sizes do for a model what Lens says? Digit scenes, seeds.

Published (arXiv 2605.21573, section 5; curves without numbers): detailed captions before an even mixture before brief
ones, in GenEval against iterations; English captions alone carry over to Chinese, French, Japanese and Spanish, by the
text encoder; training at mixed sizes carries over to ratios and areas that were not among them.

Here everything is small, and the text encoder has random weights: what it can say of languages is only whether a model
follows those that it was trained on. The same pictures, seeds, steps and networks in all arms of a part:

(captions)    dense, half dense and half brief, brief captions; prompts are dense, of unseen combinations
(languages)   English alone, and five languages in equal shares; prompts in each
(sizes)       32 x 32 alone, 48 x 48 alone, both with other ratios, at equal operations; pictures of sizes seen by all,
              some and none: 1:2, 2:1, and 64 x 64

    python benchmarks/lens_captions.py --part captions --seeds 0 1 2
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from wellposed.data.bucketed import BucketedBatches
from wellposed.data.buckets import Buckets, Size
from wellposed.data.captioned_digits import captioned_digits
from wellposed.data.digit_captions import LANGUAGES
from wellposed.recipes.lens import TINY_NATIVE_SIZES, TINY_SHAPES, lens_tiny, tiny_autoencoder
from wellposed.recipes.lens_comparison import Arm, FollowingCurve, compare_following
from wellposed.recipes.small_gpt_oss import GptOssShape, small_gpt_oss
from wellposed.recipes.t2i_counts import CountedCaptions
from wellposed.recipes.t2i_recipe import TextToImageRecipe
from wellposed.report.record import write_result

STYLES = {"dense": "dense", "mixed": {"dense": 0.5, "brief": 0.5}, "brief": "brief"}
UNSEEN = ((24, 48), (48, 24), (64, 64))  # the last has 1.33 times the largest side; tokens of 8 pixels have no 1.4
OPERATIONS_OVER = 50  # steps
BASES = {base: tuple(Size(*size) for size in some) for base, some in TINY_SHAPES.items()}


def recipe_of(chosen: argparse.Namespace) -> TextToImageRecipe:
    """The first stage of ``lens_tiny``, every step in one share, measured in equal parts."""
    tiny = lens_tiny()
    assert tiny.evaluation is not None
    evaluation = replace(tiny.evaluation, num_samples=chosen.samples, guidance_scales=(1.0, 3.0), sizes=((32, 32),))
    recipe = replace(tiny, evaluation=evaluation, shown=())
    return of_length(with_buckets(recipe, Buckets(by_base={32: BASES[32]}, batch_sizes={32: 16})), chosen.steps, chosen)


def with_buckets(recipe: TextToImageRecipe, buckets: Buckets) -> TextToImageRecipe:
    stage = recipe.stages[0]
    training = replace(stage.training, batch_size=round(fmean(buckets.batch_sizes.values())))
    return replace(recipe, stages=(replace(stage, buckets=lambda: buckets, shares=1, training=training),))


def of_length(recipe: TextToImageRecipe, steps: int, chosen: argparse.Namespace) -> TextToImageRecipe:
    stage = recipe.stages[0]
    every = -(-steps // chosen.measurements)
    training = replace(stage.training, max_steps=steps, checkpoint_every=every, log_every=20)
    return replace(recipe, stages=(replace(stage, training=training),))


def captions_arms(chosen: argparse.Namespace, autoencoder: Any, text_encoder: Any) -> list[Arm]:
    recipe = recipe_of(chosen)
    return [
        Arm(name=name, recipe=recipe, corpus=captioned_digits(chosen.pictures, *TINY_NATIVE_SIZES, style=style))
        for name, style in STYLES.items()
    ]


def languages_arms(chosen: argparse.Namespace, autoencoder: Any, text_encoder: Any) -> list[Arm]:
    recipe = recipe_of(chosen)
    assert recipe.evaluation is not None
    evaluation = replace(recipe.evaluation, languages=LANGUAGES, guidance_scales=(3.0,))
    recipe = replace(recipe, evaluation=evaluation)
    return [
        Arm(name=name, recipe=recipe, corpus=captioned_digits(chosen.pictures, *TINY_NATIVE_SIZES, languages=languages))
        for name, languages in (("English", ("en",)), ("five languages", LANGUAGES))
    ]


def sizes_arms(chosen: argparse.Namespace, autoencoder: Any, text_encoder: Any) -> list[Arm]:
    """As many steps each as have the operations of the first's."""
    recipe = recipe_of(chosen)
    assert recipe.evaluation is not None
    sizes = ((32, 32), (48, 48), *UNSEEN)
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, sizes=sizes, guidance_scales=(3.0,)))
    corpus = captioned_digits(chosen.pictures, *TINY_NATIVE_SIZES)
    kinds = {
        "32 x 32": Buckets.fixed(Size(32, 32), batch_size=16),
        "48 x 48": Buckets.fixed(Size(48, 48), batch_size=12),
        "mixed sizes": Buckets(by_base=BASES, batch_sizes={32: 16, 48: 12}),
    }
    arms = [Arm(name=name, recipe=with_buckets(recipe, kind), corpus=corpus) for name, kind in kinds.items()]
    costs = [operations(arm, autoencoder, text_encoder) for arm in arms]
    lengths = [round(chosen.steps * costs[0] / cost) for cost in costs]
    return [replace(arm, recipe=of_length(arm.recipe, steps, chosen)) for arm, steps in zip(arms, lengths, strict=True)]


def operations(arm: Arm, autoencoder: Any, text_encoder: Any) -> float:
    """Of a step, on average."""
    stage = arm.recipe.stages[0]
    planned = BucketedBatches(dataset=arm.corpus, buckets=stage.buckets(), shares=stage.shares)
    assert arm.recipe.network is not None
    network = arm.recipe.network(autoencoder, text_encoder)
    side = 2 ** len(autoencoder.config["block_out_channels"])
    counted = CountedCaptions(planned, network, text_encoder, side=side)
    return fmean(counted.counts_at(step)["flops"] for step in range(OPERATIONS_OVER))


PARTS = {"captions": captions_arms, "languages": languages_arms, "sizes": sizes_arms}


def parts_of(chosen: argparse.Namespace) -> tuple[Any, Any]:
    """One autoencoder and one text encoder for all."""
    corpus = captioned_digits(chosen.pictures, *TINY_NATIVE_SIZES, languages=LANGUAGES)
    folder = chosen.out / f"autoencoder-{chosen.autoencoder_steps}"
    autoencoder = tiny_autoencoder(folder, Path(), corpus, 0, "cpu", steps=chosen.autoencoder_steps)
    words = corpus.captions(range(len(corpus)))
    return autoencoder, small_gpt_oss(chosen.out / "text_encoder", words, GptOssShape(), seed=0)


def show(curve: FollowingCurve) -> None:
    for one in curve.measurements:
        for kind, shares in one.following.items():
            parts = "  ".join(f"{name} {share:4.0%}" for name, share in shares.items())
            print(
                f"  {curve.arm:14} seed {curve.seed}  step {one.steps:5}  loss {one.loss:.4f}  {kind:24} {parts}",
                flush=True,
            )


def over_seeds(values: Sequence[float]) -> list[float | None]:
    """Mean and standard error; None of one seed."""
    return [fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None]


def shown(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" +- {error:{form}}")


def summary(curves: Sequence[FollowingCurve]) -> dict[str, Any]:
    """Means over seeds at the last measurement."""
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(curve.arm for curve in curves):
        last = [curve.measurements[-1] for curve in curves if curve.arm == arm]
        found[arm] = {
            "loss": over_seeds([one.loss for one in last]),
            "words_per_caption": over_seeds([one.words / one.images for one in last]),
            "seconds": over_seeds([one.seconds for one in last]),
            "model_flops": last[0].model_flops,
            "following": {
                kind: {name: over_seeds([one.following[kind][name] for one in last]) for name in shares}
                for kind, shares in last[0].following.items()
            },
        }
    return found


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/lens_captions"))
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--autoencoder-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--measurements", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--no-result", action="store_true", help="only train what is missing")
    chosen = parser.parse_args()
    autoencoder, text_encoder = parts_of(chosen)
    for part in chosen.part:
        print(part)
        started = datetime.now(UTC)
        curves = compare_following(
            PARTS[part](chosen, autoencoder, text_encoder),
            autoencoder,
            text_encoder,
            chosen.out / part,
            seeds=chosen.seeds,
            on_curve=show,
        )
        found = summary(curves)
        for arm, values in found.items():
            print(f"{arm:14} loss {shown(*values['loss'], '.4f')}")
            for kind, shares in values["following"].items():
                print(f"  {kind:24}", "  ".join(f"{name} {shown(*of, '.1%')}" for name, of in shares.items()))
        if not chosen.no_result:
            settings = {name: value for name, value in vars(chosen).items() if not isinstance(value, Path)}
            settings["threads"] = torch.get_num_threads()
            metrics = {"summary": found, "curves": [asdict(curve) for curve in curves]}
            print(write_result(f"lens-{part}", metrics, settings, seed=chosen.seeds[0], started=started))


if __name__ == "__main__":
    main()
