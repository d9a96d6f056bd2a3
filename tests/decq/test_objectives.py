"""The losses of both stages: their plainly written gradients, what each player sees, and exact resumes of both."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from wellposed.batches import ImageBatch, LatentBatch
from wellposed.decq.augmentation import augmented
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.discriminator import FrozenFeatureDiscriminator
from wellposed.decq.objectives import (
    discriminator_objective,
    latent_flow_objective,
    reconstruction_objective,
    training_times,
)
from wellposed.decq.perceptual import FeatureDistance, LayerOutputs
from wellposed.decq.scheduler import shifted_time
from wellposed.decq.transformer import DecQTransformer2DModel
from wellposed.evaluation.features import SmallConvNet
from wellposed.training import PlannedBatches, Player, StepContext, TrainingConfig, train

Build = Callable[..., AutoencoderDecQ]
BuildGenerator = Callable[..., DecQTransformer2DModel]

AUTOENCODER = {
    "encoder_num_hidden_layers": 2,
    "encoder_input_size": 28,
    "decoder_num_hidden_layers": 1,
    "condenser_layers": (0, 1),
    "noise_tau": 0.8,
}


def context(player: str, rows: range = range(3), batch_size: int = 3, step: int = 5) -> StepContext:
    return StepContext(player=player, step=step, seed=0, rows=rows, batch_size=batch_size, device=torch.device("cpu"))


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)
        return make()


def judge(**settings: Any) -> FrozenFeatureDiscriminator:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
    config = ViTConfig(**sizes, image_size=16, patch_size=4)
    return seeded(
        lambda: FrozenFeatureDiscriminator(
            ViTModel(config, add_pooling_layer=False), taps=(1, 0, 1), input_size=16, **settings
        )
    )


def distance() -> FeatureDistance:
    network = seeded(lambda: SmallConvNet(3, 10, width=8))
    return FeatureDistance(LayerOutputs(network, ["norms.0", "norms.1"], prepare=lambda x: 2 * x - 1))


@pytest.fixture
def batch() -> ImageBatch:
    generator = torch.Generator().manual_seed(2)
    return ImageBatch(images=2 * torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64) - 1)


class Recorder(nn.Module):
    """A judge that remembers what it was shown; its logits are the images' means, times a weight."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach())
        return self.weight * images.mean((1, 2, 3))


# --- stage one: the autoencoder


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_gradient_is_that_of_the_plain_loss(build: Build, batch: ImageBatch, adversarial: bool) -> None:
    model, critic, perceptual = build(**AUTOENCODER).double().train(), judge().double().train(), distance().double()
    trained = [p for p in model.parameters() if p.requires_grad]
    objective = reconstruction_objective(
        perceptual=perceptual,
        perceptual_weight=0.7,
        discriminator="critic" if adversarial else None,
        adversarial_weight=0.3,
    )
    loss, metrics = objective({"autoencoder": model, "critic": critic}, batch, context("autoencoder"))
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)

    images, generators = (batch.images + 1) / 2, context("autoencoder").generators
    made = model(images, generator=generators).sample
    expected = (made - images).abs().mean() + 0.7 * perceptual(made, images).mean()
    if adversarial:
        judged = -critic.eval()(augmented(made, generators)).mean()
        last = model.decoder.decoder_pred.weight
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (expected, judged)]
        weight = norms[0] / (norms[1] + 1e-6)
        torch.testing.assert_close(metrics["adaptive_weight"], weight, rtol=1e-9, atol=0)
        expected = expected + 0.3 * weight.detach() * judged
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    plain = torch.autograd.grad(expected, trained, allow_unused=True)
    for ours, theirs in zip(gradients, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_the_adaptive_weight_has_a_limit(build: Build, batch: ImageBatch) -> None:
    model = build(**AUTOENCODER).double().train()
    objective = reconstruction_objective(discriminator="critic")
    for weight, limited in ((1e-2, False), (1e-9, True)):
        models = {"autoencoder": model, "critic": Recorder(weight)}
        _, metrics = objective(models, batch, context("autoencoder"))
        assert (float(metrics["adaptive_weight"]) == 1e4) == limited


def test_everything_but_the_encoder_learns(build: Build, batch: ImageBatch) -> None:
    model = build(**AUTOENCODER).double().train()
    objective = reconstruction_objective(perceptual=distance().double(), discriminator="critic")
    objective({"autoencoder": model, "critic": judge().double()}, batch, context("autoencoder"))[0].backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    key_biases = {f"condensers.condensers.{i}.attn.to_k.bias" for i in range(2)}
    assert idle - key_biases == {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}


def test_what_the_generator_shows_is_noisy_and_not_rounded(build: Build, batch: ImageBatch) -> None:
    model, recorder = build(**AUTOENCODER).double().train(), Recorder()
    reconstruction_objective(discriminator="critic")(
        {"autoencoder": model, "critic": recorder}, batch, context("autoencoder")
    )
    generators = context("autoencoder").generators
    noisy = model((batch.images + 1) / 2, generator=generators).sample
    torch.testing.assert_close(recorder.seen[0], augmented(noisy, generators), rtol=1e-10, atol=1e-12)


def test_the_discriminator_rests_while_the_generator_learns(build: Build, batch: ImageBatch) -> None:
    model, critic = build(**AUTOENCODER).double().train(), judge().double().train()
    before = {name: buffer.clone() for name, buffer in critic.named_buffers()}
    modes = {name: module.training for name, module in critic.named_modules()}
    reconstruction_objective(discriminator="critic")(
        {"autoencoder": model, "critic": critic}, batch, context("autoencoder")
    )
    assert all(torch.equal(buffer, before[name]) for name, buffer in critic.named_buffers())
    assert {name: module.training for name, module in critic.named_modules()} == modes
    assert critic.heads[0].training


def test_terms_begin_when_they_should(build: Build, batch: ImageBatch) -> None:
    models = {"autoencoder": build(**AUTOENCODER).double().train(), "critic": judge().double()}
    objective = reconstruction_objective(
        perceptual=distance().double(), perceptual_start=2, discriminator="critic", adversarial_start=4
    )
    names = [set(objective(models, batch, context("autoencoder", step=step))[1]) for step in range(6)]
    assert ["perceptual" in n for n in names] == [False] * 2 + [True] * 4
    assert ["adversarial" in n for n in names] == [False] * 4 + [True] * 2


# --- stage one: the discriminator


def test_the_discriminator_sees_fresh_clean_rounded_images(build: Build, batch: ImageBatch) -> None:
    model, recorder = build(**AUTOENCODER).double().train(), Recorder()
    models = {"autoencoder": model, "critic": recorder}
    discriminator_objective()(models, batch, context("critic"))
    assert model.training and model.condensers.training and not model.encoder.training
    images, generators = (batch.images + 1) / 2, context("critic").generators
    made = model.eval()(images).sample.clamp(0, 1)
    rounded = (made * 255).round() / 255
    assert (rounded - made).abs().max() > 1e-3
    for seen, expected in zip(recorder.seen, (images, rounded), strict=True):
        assert torch.equal(seen, augmented(expected, generators))


def test_the_hinge(build: Build, batch: ImageBatch) -> None:
    model = build(**AUTOENCODER).double()
    for weight in (0.1, 3.0, -3.0):
        recorder = Recorder(weight)
        loss, metrics = discriminator_objective()({"autoencoder": model, "critic": recorder}, batch, context("critic"))
        real, fake = (weight * seen.mean((1, 2, 3)) for seen in recorder.seen)
        expected = sum(max(0, 1 - r) + max(0, 1 + f) for r, f in zip(real.tolist(), fake.tolist(), strict=True)) / 6
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert metrics["real"].item() == pytest.approx(real.mean().item())
        assert metrics["fake"].item() == pytest.approx(fake.mean().item())


def test_shares_add_up_for_the_discriminator(build: Build, batch: ImageBatch) -> None:
    models = {"autoencoder": build(**AUTOENCODER).double().train(), "critic": judge().double().eval()}
    objective = discriminator_objective()
    whole, _ = objective(models, batch, context("critic"))
    parts = [
        objective(models, ImageBatch(images=batch.images[i : i + 1]), context("critic", range(i, i + 1)))[0]
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-8, atol=0)


def test_settings_that_do_not_fit_stage_one(build: Build, batch: ImageBatch) -> None:
    with pytest.raises(ValueError, match="adversarial_weight is -1"):
        reconstruction_objective(adversarial_weight=-1)
    with pytest.raises(ValueError, match="perceptual_start is -1"):
        reconstruction_objective(perceptual_start=-1)
    model = build(**AUTOENCODER).double()
    with pytest.raises(ValueError, match="no player is called 'critic'; this run has autoencoder"):
        reconstruction_objective(discriminator="critic")({"autoencoder": model}, batch, context("autoencoder"))
    larger = ImageBatch(images=functional.interpolate(batch.images, scale_factor=2))
    side = batch.images.shape[-1]
    with pytest.raises(ValueError, match=f"images are 3 x {2 * side} x .* makes of them 3 x {side} x .* image_size"):
        reconstruction_objective()({"autoencoder": model}, larger, context("autoencoder"))


# --- both players in the loop


class Pictures:
    """Eight images."""

    def __init__(self) -> None:
        self.images = 2 * torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, *, epoch: int = 0) -> ImageBatch:
        return ImageBatch(images=self.images[indices])

    def fingerprint(self) -> str:
        return "pictures"


def two_players(build: Build) -> list[Player]:
    """The discriminator begins in step 2, what it says counts from step 3."""
    adam = partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0)
    objective = reconstruction_objective(perceptual=distance(), discriminator="discriminator", adversarial_start=3)
    return [
        Player(name="autoencoder", model=build(**AUTOENCODER), objective=objective, optimizer=adam, ema_decay=0.9978),
        Player(name="discriminator", model=judge(), objective=discriminator_objective(), optimizer=adam, start=2),
    ]


def trained(build: Build, out: Path, *stops: int, **settings: Any) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    """All weights, buffers and averages after the last of the runs, and its metrics."""
    for steps in stops:
        players = two_players(build)
        config = TrainingConfig(max_steps=steps, device="cpu", progress=False, **settings)
        result = train(players, PlannedBatches(dataset=Pictures(), batch_size=4), config, out)
    states = {f"{p.name}.{name}": value for p in players for name, value in p.model.state_dict().items()}
    return {**states, **result.averages["autoencoder"].weights}, result.metrics


def test_two_players_resume_exactly(build: Build, tmp_path: Path) -> None:
    straight, metrics = trained(build, tmp_path / "straight", 5, gradient_accumulation=2)
    resumed, again = trained(build, tmp_path / "resumed", 2, 4, 5, gradient_accumulation=2)
    assert metrics == again
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    assert {"autoencoder/adaptive_weight", "autoencoder/perceptual", "discriminator/fake"} <= metrics.keys()
    for player in two_players(build):
        for name, parameter in player.model.named_parameters():
            if not name.startswith("backbone."):
                assert torch.equal(parameter, straight[f"{player.name}.{name}"]) != parameter.requires_grad, name


def test_the_discriminator_waits_for_its_start(build: Build, tmp_path: Path) -> None:
    weights, metrics = trained(build, tmp_path, 2)
    assert not any(name.startswith("discriminator/") for name in metrics)
    for name, value in judge().state_dict().items():
        assert torch.equal(value, weights[f"discriminator.{name}"])


def test_bfloat16_stays_finite(build: Build, tmp_path: Path) -> None:
    weights, metrics = trained(build, tmp_path, 4, precision="bf16")
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert all(torch.tensor(list(metrics.values())).isfinite())
    assert {value.dtype for value in weights.values()} == {torch.float32}


# --- stage two


def latents(count: int, *, queries: bool = True, seed: int = 0, labels: bool = True) -> LatentBatch:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return LatentBatch(
        latents=draw(count, 32, 4, 4),
        query_latents=draw(count, 3, 32) if queries else None,
        labels=torch.randint(5, (count,), generator=generator) if labels else None,
    )


def flow(**settings: Any) -> Any:
    return latent_flow_objective(**{"shift": 2.0, **settings})


def untrained(**sizes: Any) -> DecQTransformer2DModel:
    small = {"in_channels": 32, "hidden_size": 16, "num_attention_heads": 2, "head_hidden_size": 16}
    small |= {"head_num_attention_heads": 2, "num_layers": 1, "head_num_layers": 1, "num_classes": 5}
    return seeded(lambda: DecQTransformer2DModel(**{**small, "sample_size": 4, "num_queries": 3, **sizes}).double())


@pytest.mark.parametrize("queries", [True, False])
def test_an_untrained_network_pays_the_energy_of_the_velocity(queries: bool) -> None:
    batch, network = latents(4, queries=queries), untrained(num_queries=3 if queries else 0)
    at = context("net", range(4), 4)
    noise = [at.normal((32, 4, 4)), at.normal((3, 32))] if queries else [at.normal((32, 4, 4))]
    clean = [batch.latents, batch.query_latents] if queries else [batch.latents]
    energies = [(eps - z).square() for eps, z in zip(noise, clean, strict=True)]
    losses = {
        name: flow(reduction=name, query_weight=0.5)({"net": network}, batch, context("net", range(4), 4))
        for name in ("separate", "joint")
    }
    assert losses["separate"][1]["patches"].item() == pytest.approx(energies[0].mean().item(), rel=1e-10)
    separate = energies[0].mean() + (0.5 * energies[1].mean() if queries else 0)
    joint = torch.cat([energy.flatten() for energy in energies]).mean()
    assert losses["separate"][0].item() == pytest.approx(separate.item(), rel=1e-10)
    assert losses["joint"][0].item() == pytest.approx(joint.item(), rel=1e-10)


def test_the_network_sees_the_mixture_at_the_shifted_time(build_generator: BuildGenerator) -> None:
    """The loss by hand, from the same draws, through a network that says something."""
    batch, network = latents(4), build_generator().double()
    at = context("net", range(4), 4)
    u, _ = at.uniform(stratified=True), at.uniform()
    t = shifted_time(training_times(u, "uniform"), 2.0)
    eps, query_eps = at.normal((32, 4, 4)).double(), at.normal((3, 32)).double()
    s = t[:, None, None]
    noisy = (1 - s[..., None]) * batch.latents + s[..., None] * eps
    v, query_v = network(
        noisy, t, batch.labels, query_hidden_states=(1 - s) * batch.query_latents + s * query_eps, return_dict=False
    )
    expected = functional.mse_loss(v, eps - batch.latents)
    expected = expected + functional.mse_loss(query_v, query_eps - batch.query_latents)
    objective = flow(time_law="uniform", class_dropout=0.0)
    loss, _ = objective({"net": network}, batch, context("net", range(4), 4))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("reduction", ["separate", "joint"])
def test_shares_add_up(build_generator: BuildGenerator, reduction: str) -> None:
    batch, models = latents(6), {"net": build_generator().double()}
    objective = flow(reduction=reduction, class_dropout=0.4)
    whole, _ = objective(models, batch, context("net", range(6), 6))
    parts = []
    for part in range(3):
        rows = range(part, 6, 3)
        share = LatentBatch(
            latents=batch.latents[part::3], query_latents=batch.query_latents[part::3], labels=batch.labels[part::3]
        )
        parts.append(objective(models, share, context("net", rows, 6))[0])
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-9, atol=0)


def test_labels_are_forgotten_as_often_as_asked() -> None:
    seen = []

    class Zero(nn.Module):
        null_class = 5

        def forward(self, sample: Tensor, t: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor]:
            seen.append(labels)
            return (torch.zeros_like(sample),)

    count = 4000
    zeros = torch.zeros(count, 1, 1, 1)
    kept = torch.arange(count) % 5
    models = {"net": Zero()}
    for share in (0.0, 0.3):
        flow(class_dropout=share)(models, LatentBatch(latents=zeros, labels=kept), context("net", range(count), count))
        forgotten = seen[-1] == 5
        assert torch.equal(seen[-1][~forgotten], kept[~forgotten])
        assert forgotten.double().mean().item() == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)
    flow(class_dropout=0.0)(models, LatentBatch(latents=zeros), context("net", range(count), count))
    assert not seen[-1].any()


def test_times_have_the_law_of_their_definition() -> None:
    """Logit-normal, and all that is later than 0.999 thrown away: exactly, and against a sample."""
    u = (torch.arange(20001, dtype=torch.float64) + 0.5) / 20001
    t = training_times(u, "logit_normal")
    assert t.min() > 0 and t.max() <= 0.999 and bool((t.diff() > 0).all())
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    below = normal.cdf(torch.logit(t)) / normal.cdf(torch.logit(torch.tensor(0.999, dtype=torch.float64)))
    torch.testing.assert_close(below, u, rtol=0, atol=1e-12)

    sample = torch.sigmoid(torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    sample = sample[sample <= 0.999].sort().values
    empirical = torch.searchsorted(sample, t) / len(sample)
    assert (empirical - u).abs().max() < 1.63 / len(sample) ** 0.5  # Kolmogorov's bound at 1 %

    torch.testing.assert_close(training_times(u, "uniform"), 0.999 * u)
    assert training_times(torch.zeros(1, dtype=torch.float64), "logit_normal").item() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_dropout": 1.0}, r"share in \[0, 1\)"),
        ({"shift": 0}, "positive number"),
        ({"query_weight": -1}, "at least 0"),
    ],
)
def test_settings_that_do_not_fit_stage_two(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow(**settings)
