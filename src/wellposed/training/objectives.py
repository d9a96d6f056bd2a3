"""Losses that more than one room trains with."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from wellposed.batches import ImageBatch
from wellposed.paths import GaussianPath, PredictionType, as_prediction_type
from wellposed.training.context import StepContext
from wellposed.training.players import Objective

__all__ = ["denoising_objective"]


def denoising_objective(
    path: GaussianPath,
    *,
    prediction_type: str = "epsilon",
    stratified: bool = True,
    timestep_scale: float = 1000.0,
) -> Objective:
    r"""The plain regression of a diffusion model, ``E || p(x_t, t) - target ||^2``, for images.

    With ``x_t = alpha_t x_0 + sigma_t eps``, the target is ``eps``, ``x_0``, ``alpha_t eps - sigma_t x_0`` or ``eps -
    x_0``, by prediction type. On a discrete path of N steps the index i is uniform on 0..N-1, t = (i + 1) / N, and the
    model is called with i (Ho et al., 2006.11239, eq. 14). On a continuous path t is uniform on (0, 1] and the model is
    called with ``timestep_scale t`` (flow matching, 2210.02747; diffusers' flow models expect 1000 t, Flux t itself).

    The batch is an ``ImageBatch``; its labels, where it has any, reach the model as ``class_labels``. The model is any
    module with diffusers' call, ``model(sample, timestep, class_labels=...)``, whose first output is the prediction.
    Where it has twice the channels (a learned variance) the first half is the prediction, the rest is left untrained.

    Args:
        path: the Gaussian path.
        prediction_type: what the model predicts.
        stratified: spread the times evenly over the batch, see ``StepContext.uniform``.
        timestep_scale: factor between t and what the model is called with, on a continuous path.
    """
    kind = as_prediction_type(prediction_type)

    def objective(
        models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_0 = batch.images
        t, timestep = _draw_times(path, context, stratified, timestep_scale)
        noise = context.normal(tuple(x_0.shape[1:])).to(x_0.dtype)
        x_t = path.add_noise(x_0, noise, t)
        cond: dict[str, Any] = {} if batch.labels is None else {"class_labels": batch.labels}
        output = models[context.player](x_t, timestep.to(context.device), **cond)
        prediction = (output if isinstance(output, Tensor) else output[0])[:, : x_0.shape[1]]
        target = _target(kind, x_0, noise, path, t)
        return torch.nn.functional.mse_loss(prediction.float(), target.float()), {}

    return objective


def _draw_times(
    path: GaussianPath, context: StepContext, stratified: bool, timestep_scale: float
) -> tuple[Float[Tensor, " rows"], Shaped[Tensor, " rows"]]:
    """Times in (0, 1], float64, and what the model is called with at them."""
    uniform = context.uniform(stratified=stratified)
    if path.num_train_timesteps is None:
        t = 1 - uniform
        return t, (timestep_scale * t).float()
    index = (uniform * path.num_train_timesteps).long()
    return (index + 1) / path.num_train_timesteps, index


def _target(
    prediction_type: PredictionType,
    x_0: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    path: GaussianPath,
    t: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The prediction of one who knows both the sample and the noise."""
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "flow_prediction":
            return noise - x_0
        case "v_prediction":
            alpha, sigma = (
                scale.to(x_0.device, x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))
                for scale in (path.alpha(t), path.sigma(t))
            )
            return alpha * noise - sigma * x_0
