"""Stages of a text-to-image run: spread over two ranks, one network in memory at a time, pictures learned by heart."""

import gc
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.recipes.test_lens import few, small_recipe
from wellposed.batches import TextImageBatch
from wellposed.data.bucketed import BucketedBatches
from wellposed.data.buckets import Buckets, Size
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes import t2i_stages
from wellposed.recipes.small_flux_vae import FluxVaeShape, small_flux_vae
from wellposed.recipes.t2i_draw import draw_prompts, load_lens
from wellposed.recipes.t2i_recipe import PretrainingStage, Source, TextToImageRecipe
from wellposed.training import Run

SPEC = importlib.util.spec_from_file_location("ranks", Path(__file__).parents[1] / "training" / "conftest.py")
assert SPEC is not None and SPEC.loader is not None
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)
on_ranks = ranks.on_ranks


def weights(folder: Path) -> dict[str, Tensor]:
    return LensTransformer2DModel.from_pretrained(folder).state_dict()


def short(sharding: str) -> TextToImageRecipe:
    """Two stages of two steps, the first with blocks computed again."""
    stages = [
        replace(
            stage,
            training=replace(stage.training, max_steps=2, checkpoint_every=1, warmup_steps=0, sharding=sharding),
        )
        for stage in small_recipe().stages
    ]
    return small_recipe(stages=(replace(stages[0], gradient_checkpointing=True), stages[1]), shown=())


# The network's output is a view of its last product. The loss changes nothing of it in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_spread_over_two_ranks_as_on_one(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """FSDP2: both stages, killed in the second and resumed, with frozen weights, averages and an export at each end."""
    one, two = tmp_path / "one", tmp_path / "two"
    short("ddp").train(one, device="cpu", progress=False)

    class Killed(Exception):
        pass

    def work() -> int:
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE="2")
        advance, recipe = Run.advance, short("fsdp2")

        def stop(self: Run, data: Any) -> None:
            if (two / "checkpoints" / "step_00000001").is_dir():
                raise Killed
            advance(self, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "advance", stop)
            with pytest.raises(Killed):
                recipe.train(two, device="cpu", progress=False)
        recipe.train(two, device="cpu", progress=False, resume=True)
        return 0

    on_ranks(2, work)
    for part in ("low/model", "model", "pipeline/transformer"):
        whole, spread = weights(one / part), weights(two / part)
        assert whole.keys() == spread.keys()
        for name, value in whole.items():
            torch.testing.assert_close(spread[name], value, rtol=0, atol=2e-5, msg=f"{part}: {name}")
    for folder in (Path(), Path("low")):
        used = [json.loads((run / folder / "usage.json").read_text()) for run in (one, two)]
        for name in ("steps", "samples", "counters", "model_flops"):
            assert used[0][name] == used[1][name], name


def test_one_network_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage reads the weights that the one before has left; the trained network of that is gone."""
    train, held = t2i_stages.train, []

    def networks() -> int:
        gc.collect()
        return sum(type(found) is LensTransformer2DModel for found in gc.get_objects())

    def counted(*arguments: Any, **named: Any) -> Any:
        held.append(networks() - before)
        return train(*arguments, **named)

    before = networks()
    monkeypatch.setattr(t2i_stages, "train", counted)
    trained = short("ddp").train(tmp_path / "run", device="cpu", progress=False)
    assert held == [1, 1]
    assert trained.settings["network"]["num_layers"] == 2
    assert trained.metrics.keys() >= {"low/network/loss", "mixed/network/loss"}


def test_stages_that_cannot_be() -> None:
    recipe = small_recipe()
    with pytest.raises(ValueError, match="lens_tiny has 2 stages; give at least one, and one alone where the run goes"):
        replace(recipe, network=None)
    with pytest.raises(ValueError, match="lens_tiny has 0 stages"):
        replace(recipe, stages=())


def test_settings_of_a_stage_that_its_buckets_contradict() -> None:
    low, mixed = small_recipe().stages
    with pytest.raises(ValueError, match="'low' has training.samples_at_a_time = 2, but a rank computes a share"):
        replace(low, training=replace(low.training, samples_at_a_time=2))
    larger = replace(low, training=replace(low.training, batch_size=9))
    with pytest.raises(ValueError, match="'low' has training.batch_size = 9, but 2 shares of its buckets are 8 to 8"):
        larger.settings()
    with pytest.raises(ValueError, match="are 8 to 8 images; give one of these, or change shares"):
        small_recipe(stages=(larger, mixed)).settings()
    assert mixed.settings()["training"]["batch_size"] == 7, "between two shares of three and two of four"


SIDE = 16
CAPTIONS = ("the wall of a temple", "an astronaut smiles", "the face of a cat", "a rocket before lift-off")


class Pictures:
    """Four photographs with what they show."""

    def __init__(self) -> None:
        data = pytest.importorskip("skimage.data")
        china = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
        cut = (china[60:316, 220:476], data.astronaut()[:256, 96:352], data.chelsea()[20:276, 90:346])
        pictures = [*cut, data.rocket()[100:356, 180:436]]
        means = [picture.reshape(SIDE, 16, SIDE, 16, 3).mean((1, 3)) for picture in pictures]
        self.images = torch.from_numpy(np.stack(means)).movedim(-1, 1).float() / 127.5 - 1
        self.sizes = np.full((4, 2), SIDE)

    def __len__(self) -> int:
        return 4

    def captions(self, indices: Any, *, epoch: int = 0) -> tuple[str, ...]:
        return tuple(CAPTIONS[i] for i in indices)

    def batch(self, indices: Any, size: Size, *, epoch: int = 0) -> TextImageBatch:
        return TextImageBatch(images=self.images[list(indices)], captions=self.captions(indices))

    def fingerprint(self) -> str:
        return "four photographs"


def four() -> Buckets:
    return Buckets.fixed(Size(SIDE, SIDE), batch_size=4)


def trained_autoencoder(folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    settings = few(max_steps=300, batch_size=4, learning_rate=5e-3, final_learning_rate=1e-4, checkpoint_every=300)
    batches = BucketedBatches(dataset=corpus, buckets=four(), shares=1, seed=seed)
    shape = FluxVaeShape(block_out_channels=(16, 16), latent_channels=4, norm_num_groups=4)
    return small_flux_vae(folder, batches, shape, settings, seed=seed, device=device, shares=1)


def wider_network(autoencoder: Any, text_encoder: Any) -> LensTransformer2DModel:
    return LensTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        enc_hidden_dim=32,
        axes_dims_rope=(8, 12, 12),
        selected_layer_index=text_encoder.taps,
    )


@pytest.mark.slow
def test_four_photographs_by_heart(tmp_path: Path) -> None:
    """Through an autoencoder trained on the way, each caption draws its own photograph from noise."""
    training = few(max_steps=400, batch_size=4, learning_rate=5e-3, final_learning_rate=2e-4, checkpoint_every=400)
    stage = PretrainingStage(
        name="heart", buckets=four, shares=1, training=training, caption_dropout=0.0, sample_posterior=False
    )
    recipe = small_recipe(
        corpus=Source(get=lambda *_: Pictures(), what="four photographs"),
        autoencoder=Source(get=trained_autoencoder, what="trained"),
        network=wider_network,
        stages=(stage,),
        shown=(),
    )
    recipe.train(tmp_path / "run", device="cpu", progress=False)
    pipe = load_lens(tmp_path / "run" / "pipeline", torch.device("cpu"))
    sampling = replace(recipe.sampling, size=(SIDE, SIDE), num_inference_steps=20, guidance_scale=1.0)
    drawn = torch.cat(list(draw_prompts(pipe, CAPTIONS, sampling, seed=0)))
    true = (Pictures().images + 1) / 2
    psnr = -10 * (drawn[:, None] - true).square().mean((2, 3, 4)).log10()
    assert torch.equal(psnr.argmax(1), torch.arange(4))
    assert float(psnr.diagonal().min()) > 20, psnr
