"""Pre-training of Lens: the law of times, the loss in closed form, what has no gradient, FLOPs, pictures learned
by heart.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.lens.conftest import TINY
from wellposed.batches import TextImageBatch
from wellposed.lens.latents import encode_images
from wellposed.lens.objectives import (
    PackedImages,
    encoding,
    freeze_unread,
    loss_by_group,
    text_to_image_objective,
    training_flops,
    training_mu,
    training_times,
)
from wellposed.lens.scheduler import LensFlowMatchScheduler
from wellposed.lens.text_encoder import TextFeatures
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.training import StepContext
from wellposed.training.flops import FlopCounter
from wellposed.training.metrics import GroupLosses

Build = Callable[..., LensTransformer2DModel]

ROWS, COLUMNS, WORDS = 2, 3, 4


def context(rows: range = range(4), batch_size: int = 4, step: int = 0) -> StepContext:
    return StepContext(player="lens", step=step, seed=0, rows=rows, batch_size=batch_size, device=torch.device("cpu"))


def words(captions: Sequence[str]) -> TextFeatures:
    """Features that are a function of the caption, of as many words as it has."""
    states = torch.zeros(len(captions), 4, WORDS, TINY["enc_hidden_dim"])
    mask = torch.zeros(len(captions), WORDS, dtype=torch.bool)
    for row, caption in enumerate(captions):
        generator = torch.Generator().manual_seed(sum(map(ord, caption)))
        length = len(caption.split())
        states[row, :, :length] = torch.randn(4, length, TINY["enc_hidden_dim"], generator=generator)
        mask[row, :length] = True
    return TextFeatures(hidden_states=states, mask=mask)


def batch_of(captions: Sequence[str], **fields: Any) -> TextImageBatch:
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(len(captions), 3, 16 * ROWS, 16 * COLUMNS, generator=generator) * 2 - 1
    return TextImageBatch(images=images, captions=tuple(captions), **fields)


def tokens_of(batch: TextImageBatch, context: StepContext) -> PackedImages:
    """Tokens that are a function of the images."""
    tokens = batch.images.unflatten(2, (ROWS, 16)).unflatten(4, (COLUMNS, 16)).mean((3, 5)).flatten(2).mT
    return PackedImages(tokens.repeat(1, 1, 6)[..., :16], ROWS, COLUMNS)


def value_of(objective: Any, model: Any, batch: TextImageBatch, at: StepContext | None = None) -> tuple[float, Any]:
    with torch.no_grad():
        loss, metrics = objective({"lens": model}, batch, at or context())
    return float(loss), metrics


CAPTIONS = ("one", "two words", "now three words", "and these are four")


@pytest.mark.parametrize(("tokens", "mean"), [(256, 1.0), (1024, 1.06), (4096, 1.3), (4232, 1.310625)])
def test_mean_of_the_times(tokens: int, mean: float) -> None:
    assert training_mu(tokens) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("stratified", [True, False])
def test_times_are_logit_normal(stratified: bool) -> None:
    count = 4000
    t = training_times(context(range(count), count), 4096, std=0.7, stratified=stratified)
    logits = torch.logit(t)
    bound = 4 * 0.7 / math.sqrt(count)
    assert abs(float(logits.mean()) - 1.3) < (1e-3 if stratified else bound)
    assert abs(float(logits.std()) - 0.7) < (5e-3 if stratified else bound)


def test_shares_of_a_step_divide_the_quantiles() -> None:
    """Two halves of a batch have the times that the whole has, though the second may shift them by its own n."""
    whole = training_times(context(), 1024)
    halves = [training_times(context(range(start, 4, 2)), 1024) for start in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(), whole)
    shifted = torch.logit(training_times(context(range(1, 4, 2)), 4096)) - torch.logit(halves[1])
    assert shifted.tolist() == pytest.approx([0.24, 0.24], abs=1e-9)


def test_loss_of_a_network_that_says_zero() -> None:
    """An untrained network predicts no velocity: what is left is the mean of |eps - z|^2, with the step's own noise."""
    model = LensTransformer2DModel(**TINY)
    objective = text_to_image_objective(tokens_of, words)
    loss, metrics = value_of(objective, model, batch_of(CAPTIONS))
    own = context()
    own.uniform(stratified=True)
    noise = own.normal((ROWS * COLUMNS, 16))
    z = tokens_of(batch_of(CAPTIONS), own).tokens
    assert loss == pytest.approx(float((noise - z).square().mean()), rel=1e-6)
    assert float(metrics["unweighted"]) == pytest.approx(loss, rel=1e-6)


def test_shares_add_up(build_lens: Build) -> None:
    model = build_lens()
    objective = text_to_image_objective(tokens_of, words, caption_dropout=0.5)
    batch = batch_of(CAPTIONS)
    whole, _ = value_of(objective, model, batch)
    parts = [
        value_of(
            objective,
            model,
            TextImageBatch(images=batch.images[start::2], captions=batch.captions[start::2]),
            context(range(start, 4, 2)),
        )[0]
        for start in (0, 1)
    ]
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)


def test_weight_of_a_share(build_lens: Build) -> None:
    model, objective = build_lens(), text_to_image_objective(tokens_of, words)
    plain, _ = value_of(objective, model, batch_of(CAPTIONS))
    heavy, metrics = value_of(objective, model, batch_of(CAPTIONS, weight=2.5))
    assert heavy == pytest.approx(2.5 * plain, rel=1e-6)
    assert float(metrics["unweighted"]) == pytest.approx(plain, rel=1e-6)


def test_dropped_captions_are_no_text(build_lens: Build) -> None:
    """With nearly all captions dropped the loss no longer depends on what they say, and is that of no text at all."""
    model, batch = build_lens(), batch_of(CAPTIONS)
    dropping = text_to_image_objective(tokens_of, words, caption_dropout=1 - 1e-12)
    silent = text_to_image_objective(
        tokens_of,
        lambda captions: TextFeatures(
            hidden_states=torch.zeros(len(captions), 4, 0, TINY["enc_hidden_dim"]),
            mask=torch.zeros(len(captions), 0, dtype=torch.bool),
        ),
        caption_dropout=0.0,
    )
    dropped, _ = value_of(dropping, model, batch)
    other, _ = value_of(dropping, model, batch_of(CAPTIONS[::-1]))
    none, _ = value_of(silent, model, batch)
    assert dropped == other
    assert dropped == pytest.approx(none, rel=1e-5)


def test_share_of_dropped_captions() -> None:
    """A tenth, by a count of the masks that a network is shown."""
    seen: list[Tensor] = []

    class Recorder(LensTransformer2DModel):
        def forward(self, *arguments: Any, **more: Any) -> Any:
            seen.append(more["encoder_hidden_states_mask"].any(1))
            return super().forward(*arguments, **more)

    model = Recorder(**TINY)
    objective = text_to_image_objective(tokens_of, words)
    for step in range(30):
        value_of(objective, model, batch_of(CAPTIONS * 4), context(range(16), 16, step))
    dropped = float((~torch.cat(seen)).float().mean())
    assert abs(dropped - 0.1) < 4 * math.sqrt(0.09 / 480)


def test_loss_by_noise_level_and_grid(build_lens: Build) -> None:
    """Over eight steps the losses of all levels, weighted by their rows, are the loss; so is that of the one grid."""
    model = build_lens()
    objective = text_to_image_objective(tokens_of, words, grids=[(ROWS, COLUMNS), (5, 5)])
    groups, losses, shares = GroupLosses(), [], defaultdict[str, float](float)
    for step in range(8):
        loss, metrics = value_of(objective, model, batch_of(CAPTIONS), context(step=step))
        values = {name: float(value) for name, value in metrics.items()}
        assert groups.split("lens", values) == {"unweighted": pytest.approx(loss, rel=1e-6)}
        for name, value in values.items():
            shares[name] += value / 8
        losses.append(loss)
    found = groups.take()
    assert found["lens/loss_2x3"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert "lens/loss_5x5" not in found
    levels = ("t0", "t0.25", "t0.5", "t0.75")
    assert sum(shares[f"rows_{level}"] for level in levels) == pytest.approx(1.0, abs=1e-6)
    mean = sum(found.get(f"lens/loss_{level}", 0.0) * shares[f"rows_{level}"] for level in levels)
    assert mean == pytest.approx(sum(losses) / 8, rel=1e-5)
    lines = [found, {"lens/loss": 1.0, "lens/loss_2x3": 0.0, "other/loss_t1": 1.0}]
    by_group = loss_by_group(lines, "lens")
    assert by_group["2x3"] == pytest.approx(found["lens/loss_2x3"] / 2)
    assert by_group.keys() == {name.removeprefix("lens/loss_") for name in found}


@pytest.mark.parametrize("changes", [{"caption_dropout": 1.0}, {"caption_dropout": -0.1}, {"time_std": 0.0}])
def test_settings_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give a share in"):
        text_to_image_objective(tokens_of, words, **changes)


def test_encoded_as_they_come(tiny_vae: Any) -> None:
    batch = batch_of(CAPTIONS)
    mode = encoding(tiny_vae, sample=False)(batch, context())
    assert (mode.rows, mode.columns) == (ROWS, COLUMNS)
    with torch.no_grad():
        assert torch.equal(mode.tokens, encode_images(tiny_vae, batch.images))
    drawn = encoding(tiny_vae)(batch, context())
    assert torch.equal(drawn.tokens, encoding(tiny_vae)(batch, context()).tokens)
    assert not torch.equal(drawn.tokens, mode.tokens)
    assert not drawn.tokens.requires_grad


def test_what_no_loss_reaches(build_lens: Build) -> None:
    """Exactly the frozen weights have no gradient; of the last block's other weights of the text, some have zeros."""
    model = build_lens()
    objective = text_to_image_objective(tokens_of, words)
    loss, _ = objective({"lens": model}, batch_of(CAPTIONS), context())
    loss.backward()
    unreached = {name for name, weight in model.named_parameters() if weight.grad is None}
    freeze_unread(model)
    assert unreached == {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert len(unreached) == 6  # to_add_out has a bias
    last: Any = model.transformer_blocks[-1]
    assert not last.attn.norm_added_q.weight.grad.any()
    assert not last.attn.txt_qkv.weight.grad.chunk(3)[0].any()
    assert not last.txt_mod[1].weight.grad.chunk(6)[2].any()
    assert last.txt_mod[1].weight.grad.chunk(6)[0].any()


@pytest.mark.parametrize("sizes", [(4, 6, 5), (2, 3, 0)])
def test_flops_are_three_times_those_of_a_forward(
    build_lens: Build, lens_inputs: Callable[..., Any], sizes: Any
) -> None:
    rows, columns, text = sizes
    model = build_lens()
    # The counter knows only some attention kernels.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**lens_inputs(rows, columns, text, batch=1))
    assert training_flops(model, rows * columns, text) == pytest.approx(3 * counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("grid", [(2, 3), (4, 6)])
def test_flops_of_a_training_step(build_lens: Build, lens_inputs: Callable[..., Any], grid: tuple[int, int]) -> None:
    """Counted, it has a few less: nobody asks for the gradient of what the first matrices read, nor for anything of
    the frozen ones that nothing reads.
    """
    model = build_lens()
    count = grid[0] * grid[1]
    freeze_unread(model)
    counter = FlopCounter()
    with counter.forward():
        loss = model(**lens_inputs(*grid, 5, batch=1)).sample.square().mean()
    with counter.backward():
        loss.backward()
    first = (model.img_in, model.time_text_embed.timestep_embedder.linear_1)
    unasked = 2 * sum(module.weight.numel() * tokens for module, tokens in zip(first, (count, 1), strict=True))  # pyright: ignore[reportArgumentType]
    assert counter.flops == training_flops(model, count, 5) - unasked


@pytest.mark.parametrize(("side", "flops"), [(512, 3.7e12), (768, 8.6e12), (1024, 1.70e13), (1440, 4.3e13)])
def test_flops_of_the_published_network(side: int, flops: float) -> None:
    with torch.device("meta"):
        model = LensTransformer2DModel()
    assert training_flops(model, (side // 16) ** 2, 180) == pytest.approx(3 * flops, rel=0.02)


def test_four_pictures_by_heart() -> None:
    """A network of 332 thousand parameters learns four targets by their captions and draws each from noise."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LensTransformer2DModel(**TINY)
        targets = torch.randn(4, 4, 16)
    freeze_unread(model)
    captions = ("a", "b", "c", "d")
    objective = text_to_image_objective(lambda batch, context: PackedImages(targets, 2, 2), words, caption_dropout=0.0)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 4e-3)
    losses: list[float] = []
    for step in range(200):
        loss, _ = objective({"lens": model}, batch_of(captions), context(step=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) / 20 < 0.1 * losses[0]
    scheduler = LensFlowMatchScheduler()
    scheduler.set_timesteps(20, num_tokens=4)
    features = words(captions)
    x = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            velocity = model(
                x, features.layers, features.mask, timestep=(timestep / 1000).expand(4), img_shapes=[(1, 2, 2)] * 4
            ).sample
            x = scheduler.step(velocity, timestep, x).prev_sample
    distances = (x[:, None] - targets[None]).square().mean((2, 3))
    assert torch.equal(distances.argmin(1), torch.arange(4))
    assert float(distances.diagonal().max()) < 0.15
