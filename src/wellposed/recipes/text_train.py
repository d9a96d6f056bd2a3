"""From a text recipe to a run folder with a pipeline in it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from wellposed.batches import TextBatch
from wellposed.data.text import GivenMasks, PromptedText, TextDataset
from wellposed.data.tokenizers import pretrained_tokenizer
from wellposed.recipes.device import resolved_device
from wellposed.recipes.optimize import averaged_network, component_config, player, seeded_network, training_config
from wellposed.recipes.recipe import TrainedRun
from wellposed.recipes.run_folder import RunFolder, is_main_process, keep_settings, resolved_settings, start_run
from wellposed.recipes.text_draw import build_network, draw_texts, scheduler_of, token_model
from wellposed.recipes.text_recipe import TextRecipe, TextSets
from wellposed.recipes.text_sample import canvas_for, together, written
from wellposed.training import Callback, PlannedBatches, Run, train
from wellposed.training.context import derived_seed
from wellposed.training.data_plan import to_device
from wellposed.training.export import replaced_folder
from wellposed.training.metrics import MetricsFile
from wellposed.udm.kernels import kernel_named
from wellposed.udm.likelihood import LikelihoodBound, likelihood_bound
from wellposed.udm.objectives import token_objective
from wellposed.udm.pipeline import UniformDiffusionPipeline
from wellposed.udm.transformer import UniformDiffusionTransformerModel

__all__ = ["train_texts", "validation_bound"]

NUM_SHOWN = 4
PLAYER = "network"
SECONDS_BETWEEN_LOOKS = 0.5


def train_texts(
    recipe: TextRecipe,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train a recipe's network and leave a run folder; see ``Recipe.train``.

    At every checkpoint the pipeline is exported with the averaged weights, the bound on held-out texts goes to
    ``validation.jsonl``, and some texts are drawn.

    Raises:
        FileNotFoundError: files that the recipe needs are missing.
        OSError: a data set or a tokenizer of the hub that is not in the cache and cannot be fetched.
        ValueError: a folder in use, a checkpoint that does not fit.
        TrainingInterrupted: after Ctrl-C or SIGTERM; ``resume`` goes on from there.
    """
    resolved_device(device)
    for file in recipe.required_files():
        file.found_in(recipe.folder)
    run = start_run(out, recipe, resume=resume)
    sets = _sets(recipe, run)
    vocab_size = len(sets.tokenizer)
    network = seeded_network(lambda: build_network(recipe, vocab_size), seed)
    dataset = _with_prompts(recipe, sets.train, seed)
    max_steps = steps or recipe.training.max_steps
    settings = resolved_settings(
        recipe,
        seed=seed,
        steps=max_steps,
        device=device,
        dataset={"name": dataset.name, "sequences": len(dataset), "fingerprint": dataset.fingerprint()},
        vocab_size=vocab_size,
        parameters=sum(weights.numel() for weights in network.parameters()),
        architecture=component_config(network),
    )
    keep_settings(run, settings)
    if is_main_process():
        _keep_tokenizer(run, sets)
    objective = token_objective(
        kernel_named(recipe.kernel, vocab_size),
        head=recipe.head,
        loss=recipe.loss,
        knows_given=recipe.network.given_embedding,
    )
    result = train(
        player(PLAYER, network, objective, recipe.training),
        PlannedBatches(dataset=dataset, batch_size=recipe.training.batch_size, seed=seed, incomplete="wrap"),
        training_config(recipe.training, steps=max_steps, seed=seed, device=device, progress=progress),
        run.path,
        callbacks=[_ExportAndShow(recipe, run, sets, seed)],
        resume="auto",
    )
    return TrainedRun(folder=run.path, settings=settings, metrics={**result.metrics, **_last_validation(run)})


def validation_bound(
    recipe: TextRecipe, network: UniformDiffusionTransformerModel, validation: TextDataset, *, count: int, seed: int
) -> LikelihoodBound:
    """The bound on the first ``count`` held-out sequences, in nats a free token; times and noise are of the seed."""
    config: Any = network.config
    kernel = kernel_named(recipe.kernel, config.vocab_size)
    device = next(network.parameters()).device
    size = recipe.training.samples_at_a_time or recipe.sampling.batch_size

    def batches() -> Iterator[TextBatch]:
        for start in range(0, min(count, len(validation)), size):
            numbers = range(start, min(start + size, count, len(validation)))
            yield to_device(validation.batch(numbers), device)

    generator = torch.Generator().manual_seed(derived_seed(seed, "validation"))
    return likelihood_bound(token_model(network, kernel), kernel, batches(), generator=generator)


def _sets(recipe: TextRecipe, run: RunFolder) -> TextSets:
    """The data, tokenized by the one tokenizer that the run keeps.

    The main process makes it, and with it whatever is kept on disk; the others wait for it.
    """
    made = run.tokenizer / "tokenizer.json"
    if is_main_process() and not made.is_file():
        return recipe.sets()
    while not made.is_file():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return recipe.sets(pretrained_tokenizer(run.tokenizer))


def _keep_tokenizer(run: RunFolder, sets: TextSets) -> None:
    """For the other processes and for a resume; last, because the others take it for the sign that all is there."""
    _ = sets.train, sets.validation
    if not run.tokenizer.is_dir():
        with replaced_folder(run.tokenizer) as fresh:
            sets.tokenizer.save_pretrained(fresh)


def _with_prompts(recipe: TextRecipe, dataset: TextDataset, seed: int) -> TextDataset:
    if recipe.prompts is None:
        return dataset
    masks = GivenMasks(kinds=recipe.prompts.kinds, none=recipe.prompts.none, seed=seed)
    return PromptedText(dataset=dataset, masks=masks)


class _ExportAndShow(Callback):
    """At every checkpoint: the pipeline with the averaged weights, its bound on held-out texts, texts drawn with it."""

    def __init__(self, recipe: TextRecipe, run: RunFolder, sets: TextSets, seed: int) -> None:
        self.recipe, self.run, self.sets, self.seed = recipe, run, sets, seed

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export, measure, draw."""
        network = averaged_network(run, PLAYER, UniformDiffusionTransformerModel, self.run.path)
        if network is None:
            return
        recipe, tokenizer = self.recipe, self.sets.tokenizer
        scheduler = scheduler_of(recipe, len(tokenizer))
        with replaced_folder(self.run.pipeline) as fresh:
            UniformDiffusionPipeline(transformer=network, scheduler=scheduler, tokenizer=tokenizer).save_pretrained(
                fresh
            )
        bound = validation_bound(
            recipe, network, self.sets.validation, count=recipe.evaluation.num_validation, seed=self.seed
        )
        self._note(run.step, bound)
        canvas = canvas_for(recipe, tokenizer, NUM_SHOWN)
        drawn = draw_texts(
            network,
            recipe.kernel,
            recipe.sampling,
            canvas,
            num_inference_steps=recipe.sampling.num_inference_steps,
            seed=self.seed,
        )
        texts = [text for tokens, _ in drawn for text in written(tokenizer, tokens)]
        self.run.samples.mkdir(exist_ok=True)
        (self.run.samples / f"{path.name}.txt").write_text(together(texts), encoding="utf-8")

    def _note(self, step: int, bound: LikelihoodBound) -> None:
        file = MetricsFile(self.run.validation_file, step - 1)
        file.write({"step": step, "validation/nelbo": bound.total, "validation/perplexity": bound.perplexity})
        file.close()


def _last_validation(run: RunFolder) -> dict[str, float]:
    if not run.validation_file.is_file():
        return {}
    last: dict[str, float] = json.loads(run.validation_file.read_text(encoding="utf-8").splitlines()[-1])
    return {name: value for name, value in last.items() if name != "step"}
