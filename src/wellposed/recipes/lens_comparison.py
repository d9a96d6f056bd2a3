"""Text-to-image runs side by side: the same pictures, seeds and steps, other captions, languages or sizes."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from wellposed.batches import TextImageBatch
from wellposed.data.captioned_digits import CaptionedDigits, captioned_digits
from wellposed.evaluation.features import hash_weights
from wellposed.lens.objectives import encoding, text_to_image_objective
from wellposed.lens.text_encoder import LensTextEncoder
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.made_with import claim_folder
from wellposed.recipes.optimize import averaged_network
from wellposed.recipes.run_folder import write_json
from wellposed.recipes.stages import StageOptions
from wellposed.recipes.t2i_draw import draw_prompts, lens_pipeline
from wellposed.recipes.t2i_recipe import TextToImageRecipe
from wellposed.recipes.t2i_stages import NETWORK, Parts, pretraining_stage, text_features
from wellposed.training import Callback, Run, StepContext
from wellposed.training.usage import read_usage

__all__ = ["Arm", "FollowingCurve", "Measurement", "compare_following", "held_out_loss"]

CAPTIONS_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the runs compared.

    Attributes:
        name: of it.
        recipe: of one stage, with the evaluation by which it is measured along the way.
        corpus: what it is trained on.
    """

    name: str
    recipe: TextToImageRecipe
    corpus: CaptionedDigits


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How well a run does at one step.

    Attributes:
        steps: done.
        images: seen.
        words: of captions seen.
        seconds: of training alone, this machine's; captions were encoded before.
        model_flops: spent.
        loss: held out, with dense captions.
        following: share of pictures that show what their prompt says, by kind of picture and property.
    """

    steps: int
    images: int
    words: float
    seconds: float
    model_flops: float | None
    loss: float
    following: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class FollowingCurve:
    """A run, measured along the way.

    Attributes:
        arm: whose.
        seed: of weights, noise and order.
        measurements: at its checkpoints.
    """

    arm: str
    seed: int
    measurements: tuple[Measurement, ...] = field(default_factory=tuple[Measurement, ...])


def compare_following(
    arms: Sequence[Arm],
    autoencoder: Any,
    text_encoder: Any,
    folder: Path,
    *,
    seeds: Sequence[int],
    device: str = "cpu",
    on_curve: Callable[[FollowingCurve], None] = lambda curve: None,
) -> list[FollowingCurve]:
    """Train every arm with every seed; what is finished in the folder is taken from there.

    Args:
        arms: the runs.
        autoencoder: of all.
        text_encoder: of all.
        folder: of the runs.
        seeds: of each.
        device: where they run.
        on_curve: called after each.

    Raises:
        ValueError: the folder holds a run of the same name and seed that was made otherwise.
    """
    hashes = {"autoencoder": hash_weights(autoencoder), "text_encoder": hash_weights(text_encoder.model)}
    curves: list[FollowingCurve] = []
    for seed in seeds:
        for arm in arms:
            where = folder / f"{arm.name.replace(' ', '-')}-{seed}"
            claim_folder(where, {**arm.recipe.settings(), **hashes, "corpus": arm.corpus.fingerprint(), "seed": seed})
            kept = where / "curve.json"
            if not kept.is_file():
                parts = Parts(corpus=arm.corpus, autoencoder=autoencoder, text_encoder=text_encoder)
                _encode_captions(arm, text_encoder, folder / "features")
                measure = _Measure(arm.recipe, parts, where, folder / "judge", device)
                pretraining_stage(
                    arm.recipe,
                    arm.recipe.stages[0],
                    parts,
                    where,
                    StageOptions(seed=seed, device=device),
                    features=folder / "features",
                    callbacks=[measure],
                )
                write_json(kept, {"measurements": [asdict(one) for one in measure.found]})
            held = json.loads(kept.read_text(encoding="utf-8"))["measurements"]
            curve = FollowingCurve(arm=arm.name, seed=seed, measurements=tuple(Measurement(**one) for one in held))
            on_curve(curve)
            curves.append(curve)
    return curves


def _encode_captions(arm: Arm, text_encoder: LensTextEncoder, features: Path) -> None:
    """Every caption that may come up, so that no run pays for those of the next."""
    encode = text_features(text_encoder, features)
    training = arm.recipe.stages[0].training
    epochs = range(1 + training.max_steps * training.batch_size // len(arm.corpus))
    captions = sorted({text for epoch in epochs for text in arm.corpus.captions(range(len(arm.corpus)), epoch=epoch)})
    for start in range(0, len(captions), CAPTIONS_AT_A_TIME):
        encode(captions[start : start + CAPTIONS_AT_A_TIME])


class _Measure(Callback):
    """At every checkpoint, once; what was measured is kept beside the checkpoints.

    A run that died while it measured is measured at that checkpoint when it goes on, so that in the end it has it all.
    """

    def __init__(self, recipe: TextToImageRecipe, parts: Parts, folder: Path, judge: Path, device: str) -> None:
        assert recipe.evaluation is not None
        self.recipe, self.parts, self.folder = recipe, parts, folder
        self.judge = recipe.evaluation.judge(judge, 0, device)
        self.path = folder / "measured.json"
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.found = [Measurement(**one) for one in kept.get("measurements", [])]
        self.seconds = kept.get("seconds", 0.0)  # that measuring has taken, within the run's own time

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Draw, judge, note."""
        started = time.perf_counter()
        network = averaged_network(run, NETWORK, LensTransformer2DModel, self.folder)
        if network is None:
            return
        if all(one.steps != run.step for one in self.found):
            self.found.append(self._measured(run.step, network))
            self.seconds += time.perf_counter() - started
            write_json(self.path, {"seconds": self.seconds, "measurements": [asdict(one) for one in self.found]})
        write_json(self.folder / "history.json", self._history())

    def _measured(self, step: int, network: LensTransformer2DModel) -> Measurement:
        used = read_usage(self.folder / "usage.json")
        return Measurement(
            steps=step,
            images=used.samples,
            words=used.counters.get("caption_words", 0.0),
            seconds=used.seconds - self.seconds,
            model_flops=used.model_flops,
            loss=held_out_loss(network, self.parts, features=self.folder.parent / "features"),
            following=self._following(network),
        )

    def _history(self) -> dict[str, list[tuple[int, float]]]:
        """Scores by images seen, where ``wellposed account --to`` looks for them: of the first kind of picture."""
        kind = next(iter(self.found[0].following))
        scores = {"loss": [(one.images, one.loss) for one in self.found]}
        for name in self.found[0].following[kind]:
            scores[name] = [(one.images, one.following[kind][name]) for one in self.found]
        return scores

    def _following(self, network: LensTransformer2DModel) -> dict[str, dict[str, float]]:
        evaluation = self.recipe.evaluation
        assert evaluation is not None
        pipe = lens_pipeline(network, self.parts.autoencoder, cast(LensTextEncoder, self.parts.text_encoder))
        shares: dict[str, dict[str, float]] = {}
        for language in evaluation.languages:
            scenes, prompts, asked = evaluation.prompts(evaluation.num_samples, evaluation.styles[0], language, 0)
            for size in evaluation.sizes or (self.recipe.sampling.size,):
                for scale in evaluation.guidance_scales:
                    drawn = draw_prompts(pipe, prompts, self.recipe.sampling, seed=0, guidance_scale=scale, size=size)
                    found = self.judge(drawn, scenes, asked)
                    kind = f"{language}, {size[0]} x {size[1]}, w = {scale:g}"
                    shares[kind] = {name: one.share.value for name, one in found.scores.items()}
        return shares


def held_out_loss(
    network: LensTransformer2DModel,
    parts: Parts,
    *,
    features: Path | None,
    count: int = 256,
    size: tuple[int, int] = (32, 32),
) -> float:
    """Flow-matching loss on test scenes with dense English captions, at spread times, always with the same noise.

    Args:
        network: in evaluation mode.
        parts: autoencoder and text encoder.
        features: folder of text features, None to encode afresh.
        count: pictures.
        size: height and width.
    """
    held_out = captioned_digits(count, size, split="test", seed=1)
    objective = text_to_image_objective(
        encoding(parts.autoencoder, sample=False), text_features(parts.text_encoder, features), caption_dropout=0.0
    )
    total = 0.0
    for start in range(0, count, 64):
        rows = range(start, min(start + 64, count))
        context = StepContext(
            player=NETWORK, step=0, seed=0, rows=rows, batch_size=count, device=next(network.parameters()).device
        )
        images: TextImageBatch = held_out.batch(list(rows))
        models: Mapping[str, nn.Module] = {NETWORK: network}
        with torch.no_grad():
            loss, _ = objective(models, images, context)
        total += float(loss) * len(rows)
    return total / count
