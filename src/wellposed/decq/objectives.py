r"""The losses of both stages (arXiv 2605.22777; stage one is RAE's recipe, unchanged).

Stage one, over everything but the frozen encoder:

    L = |x - x'|_1 + w_p Perceptual(x, x') + w_a c L_G,    c = |grad_last (L1 + w_p Perceptual)| / |grad_last L_G|,

with ``last`` the decoder's last matrix, c a constant of at most 1e4, L_G = -mean D(T x'), T a random augmentation, and
D trained by the hinge loss on real images and on fresh reconstructions of the updated autoencoder in evaluation mode,
rounded to 8 bits (no latent noise): list the autoencoder before the discriminator. RAE takes w_p = 1, w_a = 0.75 and 16
epochs: LPIPS from the first, D's updates (``Player.start``) from the seventh, the adversarial term from the ninth.

Stage two, over the generator: flow matching on patches and queries at one shared time,

    L = mean_patches |v - (eps - z)|^2 + lambda mean_queries |v - (eps - z)|^2.
"""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from wellposed.batches import ImageBatch, LatentBatch
from wellposed.decq.augmentation import augmented
from wellposed.decq.scheduler import shifted_time
from wellposed.training import Objective, StepContext

__all__ = [
    "Reduction",
    "TimeLaw",
    "check_same_size",
    "discriminator_objective",
    "latent_flow_objective",
    "reconstruction_objective",
    "training_times",
]

TimeLaw = Literal["logit_normal", "uniform"]
Reduction = Literal["separate", "joint"]

LATEST_TIME = 0.999
LARGEST_ADVERSARIAL_WEIGHT = 1e4


def reconstruction_objective(
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float | int = 1.0,
    perceptual_start: int = 0,
    discriminator: str | None = None,
    adversarial_weight: float | int = 0.75,
    adversarial_start: int = 0,
) -> Objective:
    """Stage one of the autoencoder.

    The adaptive weight compares gradients of the decoder's last matrix. Both are pulled back from the gradients of the
    *pixels*, which are then all that the backward pass needs: perceptual network and discriminator are differentiated
    once, not twice. It is each share's own, so with several ranks or shares it varies a little between them, as in the
    published code.

    Args:
        perceptual: (reconstructions, images), both in [0, 1] -> one distance for each, e.g. ``LPIPS``; None for none. A
            module is moved to the run's device; no weights of it are trained.
        perceptual_weight: w_p.
        perceptual_start: first step with the perceptual term.
        discriminator: name of the player that judges, in evaluation mode; None for no adversarial term.
        adversarial_weight: w_a.
        adversarial_start: first step with the adversarial term.

    Raises:
        ValueError: a negative weight or start; in training, images of another size than the autoencoder's.
    """
    for name, value in (
        ("perceptual_weight", perceptual_weight),
        ("perceptual_start", perceptual_start),
        ("adversarial_weight", adversarial_weight),
        ("adversarial_start", adversarial_start),
    ):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; give 0 or a positive number")

    def objective(
        models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        autoencoder = models[context.player]
        images = _unit(batch.images)
        judged = discriminator is not None and context.step >= adversarial_start
        with _recorded(cast(Any, autoencoder).decoder.decoder_pred) if judged else nullcontext([]) as last:
            reconstructions = _precise(autoencoder(images, generator=context.generators).sample)
        check_same_size(reconstructions, images)
        l1 = functional.l1_loss(reconstructions, images)
        metrics = {"l1": l1, "psnr": -10 * functional.mse_loss(reconstructions, images).log10()}
        faithful = l1
        if perceptual is not None and context.step >= perceptual_start:
            if isinstance(perceptual, nn.Module):
                perceptual.to(context.device)
            metrics["perceptual"] = perceptual(reconstructions, images).mean()
            faithful = faithful + perceptual_weight * metrics["perceptual"]
        if discriminator is None or not judged:
            return faithful, metrics
        # Before the discriminator runs: this frees what the perceptual network kept.
        of_faithful = torch.autograd.grad(faithful, reconstructions)[0]
        with _evaluating(_player(models, discriminator)) as judge:
            adversarial = -_precise(judge(augmented(reconstructions, context.generators))).mean()
        of_adversarial = torch.autograd.grad(adversarial, reconstructions)[0]
        norms = [_norm_at(last, reconstructions, pixels) for pixels in (of_faithful, of_adversarial)]
        balance = (norms[0] / (norms[1] + 1e-6)).clamp(0, LARGEST_ADVERSARIAL_WEIGHT)
        metrics |= {"adversarial": adversarial, "adaptive_weight": balance}
        total = faithful + adversarial_weight * balance * adversarial
        pixels = of_faithful + adversarial_weight * balance * of_adversarial
        return _with_gradient(total, reconstructions, pixels), metrics

    return objective


def check_same_size(reconstructions: Tensor, images: Tensor) -> None:
    """Raise ValueError where an autoencoder's images are not of the size of those that it encoded."""
    if reconstructions.shape != images.shape:
        given, out = (" x ".join(map(str, one.shape[1:])) for one in (images, reconstructions))
        raise ValueError(
            f"images are {given}, what the autoencoder makes of them {out}: give images of its config's image_size"
        )


def discriminator_objective(*, autoencoder: str = "autoencoder") -> Objective:
    """Stage one of the discriminator: the hinge loss, (mean relu(1 - D(T x)) + mean relu(1 + D(T x'))) / 2.

    Args:
        autoencoder: name of the player that reconstructs.
    """

    def objective(
        models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = _unit(batch.images)
        with _evaluating(_player(models, autoencoder)) as model, torch.no_grad():
            reconstructions = _precise(model(images).sample).clamp(0, 1)
        rounded = (reconstructions * 255).round() / 255
        judge = models[context.player]
        real = _precise(judge(augmented(images, context.generators)))
        fake = _precise(judge(augmented(rounded, context.generators)))
        loss = (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()) / 2
        return loss, {"real": real.mean(), "fake": fake.mean()}

    return objective


def latent_flow_objective(
    *,
    shift: float | int,
    query_weight: float | int = 1.0,
    reduction: Reduction = "separate",
    time_law: TimeLaw = "logit_normal",
    class_dropout: float | int = 0.1,
) -> Objective:
    """Stage two: flow matching on latents; the batch is a ``LatentBatch``.

    Args:
        shift: alpha of the time shift, see :func:`wellposed.decq.scheduler.dimension_shift`.
        query_weight: lambda.
        reduction: "separate" adds a mean over patches and a mean over queries, the literal reading, in which eight
            queries weigh as much as 256 patches; "joint" takes one mean over all tokens and ignores ``query_weight``.
        time_law: of t before the shift, see :func:`training_times`.
        class_dropout: share of labels that are forgotten, for classifier-free guidance.

    Raises:
        ValueError: an unknown reduction or law, a share outside [0, 1), a shift or weight out of range.
    """
    if not shift > 0 or not query_weight >= 0:
        raise ValueError(f"shift is {shift} and query_weight {query_weight}; give a positive number and at least 0")
    if reduction not in ("separate", "joint"):
        raise ValueError(f'reduction is {reduction!r}; write "separate" or "joint"')
    if time_law not in ("logit_normal", "uniform"):
        raise ValueError(f'time_law is {time_law!r}; write "logit_normal" or "uniform"')
    if not 0 <= class_dropout < 1:
        raise ValueError(f"class_dropout is {class_dropout}; give a share in [0, 1)")

    def objective(
        models: Mapping[str, nn.Module], batch: LatentBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        network = cast(Any, models[context.player])
        times = shifted_time(training_times(context.uniform(stratified=True), time_law), shift)
        forgotten = (context.uniform() < class_dropout).to(context.device)
        clean = [_precise(z) for z in (batch.latents, batch.query_latents) if z is not None]
        noise = [context.normal(tuple(z.shape[1:])).to(z.dtype) for z in clean]
        t = times.to(context.device, clean[0].dtype)
        labels = torch.zeros(len(t), dtype=torch.long, device=context.device) if batch.labels is None else batch.labels
        labels = torch.where(forgotten, network.null_class, labels)
        noisy = [_mixed(z, eps, t) for z, eps in zip(clean, noise, strict=True)]
        velocities = network(
            noisy[0], t, labels, query_hidden_states=noisy[1] if len(noisy) > 1 else None, return_dict=False
        )
        errors = [(_precise(v) - (eps - z)).square() for v, eps, z in zip(velocities, noise, clean, strict=True)]
        means = [error.mean() for error in errors]
        metrics = {"patches": means[0]}
        if len(means) == 1:
            return means[0], metrics
        metrics["queries"] = means[1]
        if reduction == "joint":
            loss = torch.stack([error.sum() for error in errors]).sum() / sum(error.numel() for error in errors)
        else:
            loss = means[0] + query_weight * means[1]
        return loss, metrics

    return objective


def training_times(uniform: Float[Tensor, " batch"], law: TimeLaw) -> Float[Tensor, " batch"]:
    """Times in [0, 0.999] from numbers that are uniform in [0, 1), before the shift.

    "logit_normal" is sigmoid of a standard normal number, truncated above, by its inverse distribution function.
    """
    if law == "uniform":
        return LATEST_TIME * uniform
    normal = torch.distributions.Normal(0.0, 1.0)
    largest = normal.cdf(torch.tensor(math.log(LATEST_TIME / (1 - LATEST_TIME)), dtype=uniform.dtype))
    return torch.sigmoid(normal.icdf((uniform * largest).clamp(min=torch.finfo(uniform.dtype).tiny)))


def _mixed(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (z.ndim - 1))
    return (1 - t) * z + t * noise


def _unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (images + 1) / 2


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _player(models: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in models:
        raise ValueError(f"no player is called {name!r}; this run has {', '.join(models)}")
    return models[name]


def _with_gradient(value: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    """``value``, whose gradient at ``inputs`` is already known."""
    carrier = (inputs * gradient.detach()).sum()
    return carrier + (value - carrier).detach()


@contextmanager
def _recorded(linear: nn.Module) -> Generator[list[tuple[Tensor, Tensor]]]:
    """What goes into the layer and what comes out of it, for each call."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0].detach(), output))

    handle = linear.register_forward_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


def _norm_at(calls: list[tuple[Tensor, Tensor]], outputs: Tensor, gradient: Tensor) -> Tensor:
    """Norm of the gradient of a recorded layer's matrix, by the gradient of what was made of its results.

    From the layer's inputs, because the matrix itself may be sharded and no part of the graph.
    """
    changes = torch.autograd.grad(outputs, [result for _, result in calls], gradient, retain_graph=True)
    of_calls = [
        _precise(change).flatten(0, -2).mT @ _precise(inputs).flatten(0, -2)
        for change, (inputs, _) in zip(changes, calls, strict=True)
    ]
    return torch.stack(of_calls).sum(0).norm()


@contextmanager
def _evaluating(model: nn.Module) -> Generator[nn.Module]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
