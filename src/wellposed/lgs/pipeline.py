"""Unconditional generation with the Lanczos sampler, spelled out."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import DDPMPipeline, DDPMScheduler, ImagePipelineOutput, UNet2DModel
from torch import Tensor

from wellposed.denoisers import refuse_guidance_embedding
from wellposed.lgs.jacobian import ProductMethod, linearize
from wellposed.lgs.reverse import standard_normal
from wellposed.lgs.scheduler import Generators, LanczosDDPMScheduler
from wellposed.saving import saved_class

__all__ = ["LanczosDDPMPipeline"]


@saved_class
class LanczosDDPMPipeline(DDPMPipeline):
    r"""``DDPMPipeline`` whose reverse steps have the full posterior covariance.

    The loop is in plain sight: linearise the network at x_t, step. Any DDPM-family scheduler is converted on the way
    in, so ``LanczosDDPMPipeline.from_pretrained("google/ddpm-cifar10-32")`` works as it is.

    Args:
        unet: the network.
        scheduler: a ``LanczosDDPMScheduler``, or one whose config it takes over.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _interrupt = False
    _num_timesteps = 0

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
        refuse_guidance_embedding(unet.config)
        if not isinstance(scheduler, LanczosDDPMScheduler):
            scheduler = LanczosDDPMScheduler.from_config(scheduler.config)  # pyright: ignore[reportAssignmentType]
        super().__init__(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 100,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        method: ProductMethod = "vjp",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images.

        Args:
            batch_size: how many.
            generator: one, or one per image: image i is then the same in any batch.
            num_inference_steps: reverse steps; each costs 1 + m forward passes.
            output_type: "pil", "np" or "pt" (batch, channels, height, width), all from [0, 1]; "latent" for the raw
                state.
            return_dict: whether to return an ``ImagePipelineOutput``.
            latents: x_T to start from, in place of a draw.
            method: how Jacobian products are computed.
            callback_on_step_end: called with (pipe, step, timestep, {"latents": x_s}) after every step; may return new
                latents in a dict.
            callback_on_step_end_tensor_inputs: what the callback wants to see.

        Raises:
            ValueError: for a list of generators of the wrong length, or latents of the wrong shape.
        """
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback tensor inputs can be {known}; got also {', '.join(sorted(unknown))}")
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        device = self._execution_device
        if isinstance(generator, Sequence) and len(generator) != batch_size:
            raise ValueError(f"got {len(generator)} generators for a batch of {batch_size}; pass one, or one per image")
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        blank = torch.empty(shape, device=device, dtype=self.unet.dtype)
        image = standard_normal(blank, generator) if latents is None else latents.to(device, self.unet.dtype)

        self.scheduler.set_timesteps(num_inference_steps)
        self._interrupt, self._num_timesteps = False, len(self.scheduler.timesteps)
        for index, t in enumerate(cast(Any, self).progress_bar(self.scheduler.timesteps)):
            if self.interrupt:
                continue
            image = self._step(image, t, generator, method)
            if callback_on_step_end is not None:
                image = callback_on_step_end(self, index, t, {"latents": image}).pop("latents", image)

        if output_type != "latent":
            image = (image / 2 + 0.5).clamp(0, 1)
        if output_type not in ("pt", "latent"):
            image = image.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=cast(Any, image)) if return_dict else (image,)

    def _step(self, image: Tensor, t: Tensor, generator: Generators, method: ProductMethod) -> Tensor:
        """Of its own, so that one step's graph is gone before the next one's is built."""
        if self.scheduler.settings.num_lanczos_steps == 0:
            return self.scheduler.step(self.unet(image, t).sample, t, image, generator=generator).prev_sample
        linear = linearize(lambda x: self.unet(x, t).sample, image, method=method, module=self.unet)
        return self.scheduler.step(linear.output, t, image, generator=generator, linearization=linear).prev_sample

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Reverse steps of the running call."""
        return self._num_timesteps
