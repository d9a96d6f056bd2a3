"""Class-conditional images from a generator on the latents of a representation autoencoder."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar, SupportsIndex, cast

import torch
from diffusers import AutoencoderRAE, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.scheduler import ShiftedFlowScheduler
from wellposed.decq.transformer import DecQTransformer2DModel
from wellposed.saving import saved_class

__all__ = ["DecQPipeline", "DecQPipelineOutput"]


@dataclass
class DecQPipelineOutput(BaseOutput):
    """What was generated.

    Attributes:
        images: as ``output_type`` asks; patch latents with "latent".
        query_latents: the queries that belong to them, with "latent" only, and where K > 0.
    """

    images: Any
    query_latents: Tensor | None = None


@saved_class
class DecQPipeline(DiffusionPipeline):
    r"""Images of classes, by flow matching on patch and query latents together.

    Guidance moves the velocity away from a worse one, on all tokens: v = v_worse + w (v - v_worse). The worse velocity
    is that of a ``guide`` (AutoGuidance, arXiv 2406.02507: a smaller network trained for a shorter time, on the same
    latents), or, without one, that of the generator without a class.

    Args:
        vae: the autoencoder; a plain RAE of diffusers is taken as one with K = 0.
        transformer: the generator.
        scheduler: the time grid and the solver.
        guide: the worse generator, or None.
        patch_decoder: a plain RAE of the same encoder, whose decoder makes images of the patches alone, or None.
        id2label: names of the classes, or None.
    """

    model_cpu_offload_seq = "transformer->vae->patch_decoder"
    # Offloaded in turn, generator and guide would travel in every step; the guide is small.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["guide"]
    _optional_components: ClassVar[list[str]] = ["guide", "patch_decoder"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "query_latents"]
    _interrupt = False
    _num_timesteps = 0
    _guidance_scale = 1.0

    def __init__(
        self,
        vae: AutoencoderDecQ | AutoencoderRAE,
        transformer: DecQTransformer2DModel,
        scheduler: ShiftedFlowScheduler,
        guide: DecQTransformer2DModel | None = None,
        patch_decoder: AutoencoderDecQ | AutoencoderRAE | None = None,
        id2label: dict[Any, str] | None = None,
    ) -> None:
        super().__init__()
        vae = AutoencoderDecQ.from_rae(vae) if isinstance(vae, AutoencoderRAE) else vae
        if isinstance(patch_decoder, AutoencoderRAE):
            patch_decoder = AutoencoderDecQ.from_rae(patch_decoder)
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, guide=guide, patch_decoder=patch_decoder
        )
        self.register_to_config(id2label=id2label)
        for name, network in (("transformer", transformer), ("guide", guide)):
            if network is not None and vae is not None:
                _check_same_latents(name, network, vae)
        if guide is not None and guide.config["num_classes"] != transformer.config["num_classes"]:
            raise ValueError(
                f"the guide knows {guide.config['num_classes']} classes, the transformer "
                f"{transformer.config['num_classes']}; they must agree"
            )
        if patch_decoder is not None and vae is not None:
            _check_patch_decoder(patch_decoder, vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: SupportsIndex | str | Sequence[SupportsIndex | str] | Tensor = 0,
        num_images_per_class: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float | int = 1.0,
        guidance_interval: tuple[float | int, float | int] = (0.0, 1.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        query_latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        discard_queries: bool = False,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DecQPipelineOutput | tuple[Any, ...]:
        """Generates images.

        Args:
            class_labels: class numbers, or names from ``id2label``.
            num_images_per_class: images of each.
            num_inference_steps: N of the scheduler's grid: with the published one, N points and N - 1 evaluations.
            guidance_scale: w; 1 for none.
            guidance_interval: times (low, high), after the shift, between which guidance acts.
            generator: one, or one for each image, which is then the same in any batch.
            latents: noise of the patches, (batch, C, h, w), in place of a draw.
            query_latents: noise of the queries, (batch, K, C).
            output_type: "pil", "np", "pt" (from [0, 1]), or "latent" for patch and query latents.
            return_dict: False for a tuple; with output_type="latent" of (latents, query latents).
            discard_queries: denoise patches and queries, then decode the patches with ``patch_decoder``.
            callback_on_step_end: called with (pipe, step, timestep, tensors) after every step of the solver; returns
                a dictionary of those that it changed.
            callback_on_step_end_tensor_inputs: which of "latents" and "query_latents" it wants.

        Raises:
            ValueError: unknown classes, shapes that do not fit, a guidance interval that is none, ``discard_queries``
                without a ``patch_decoder``.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type is {output_type!r}; write "pil", "np", "pt" or "latent"')
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback tensor inputs can be {known}; got also {', '.join(sorted(unknown))}")
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval is {guidance_interval}; give times 0 <= low <= high <= 1")
        if discard_queries and self.patch_decoder is None:
            raise ValueError(
                "discard_queries needs a decoder that was trained without queries; pass patch_decoder=a plain RAE of "
                "the same encoder to the pipeline"
            )
        device = self._execution_device
        labels = self._labels(class_labels, num_images_per_class, device)
        x = self._start(len(labels), generator, latents, query_latents, device)
        self._guidance_scale, self._interrupt = guidance_scale, False
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        for evaluation, t in enumerate(cast(Any, self).progress_bar(self.scheduler.timesteps)):
            if self.interrupt:
                continue
            guided = guidance_scale != 1 and low <= float(t) <= high
            velocity = self._velocity(x, t, labels, guidance_scale if guided else 1.0)
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
            step, of_step = divmod(evaluation, self.scheduler.order)
            if callback_on_step_end is not None and of_step == self.scheduler.order - 1:
                x = self._called_back(callback_on_step_end, step, t, x, callback_on_step_end_tensor_inputs)

        latent, queries = self.vae.unpack(x)
        if output_type == "latent":
            images: Any = latent
        else:
            images = self._decoded(latent, queries, discard_queries)
            images = self.image_processor.postprocess(
                images.clamp(0, 1), output_type=output_type, do_denormalize=[False] * len(images)
            )
            queries = None
        self.maybe_free_model_hooks()
        if return_dict:
            return DecQPipelineOutput(images=images, query_latents=queries)
        return (images, queries) if output_type == "latent" else (images,)

    def _velocity(self, x: Tensor, t: Tensor, labels: Tensor, scale: float | int) -> Tensor:
        if scale == 1:
            return self._predicted(self.transformer, x, t, labels, "alone")
        if self.guide is not None:
            worse = self._predicted(self.guide, x, t, labels, "guide")
            return worse + scale * (self._predicted(self.transformer, x, t, labels, "alone") - worse)
        null = torch.full_like(labels, self.transformer.null_class)
        both = self._predicted(self.transformer, torch.cat([x, x]), t, torch.cat([labels, null]), "with_null_class")
        good, worse = both.chunk(2)
        return worse + scale * (good - worse)

    def _predicted(self, network: DecQTransformer2DModel, x: Tensor, t: Tensor, labels: Tensor, context: str) -> Tensor:
        latent, queries = self.vae.unpack(x.to(network.dtype))
        # Caches compare a step with the one before of the same name, which must have had as many images.
        with network.cache_context(context):
            velocities = network(latent, t.expand(len(x)), labels, query_hidden_states=queries, return_dict=False)
        return self.vae.pack(*velocities).to(x.dtype)

    def _decoded(self, latent: Tensor, queries: Tensor | None, discard_queries: bool) -> Tensor:
        decoder = self.patch_decoder if discard_queries else self.vae
        latent = latent.to(decoder.dtype)
        if discard_queries:
            # The two share the encoder's tokens; statistics are each one's own.
            return decoder.decode(decoder.normalize_patches(self.vae.denormalize_patches(latent)), return_dict=False)[0]
        queries = None if queries is None else queries.to(decoder.dtype)
        return decoder.decode(latent, queries, return_dict=False)[0]

    def _start(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        query_latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Noise of all tokens, float32 whatever the network is in: 50 small steps add up."""
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"got {len(generator)} generators for {batch} images; pass one, or one for each image")
        config = self.transformer.config
        square = (batch, config.in_channels, config.sample_size, config.sample_size)
        row = (batch, config.num_queries, config.in_channels)
        drawn: list[Tensor | None] = []
        for what, given, shape in (("latents", latents, square), ("query_latents", query_latents, row)):
            if given is not None and given.shape != shape:
                raise ValueError(f"{what} must have shape {shape}, got {tuple(given.shape)}")
            if shape[1] == 0:
                drawn.append(None)
            elif given is not None:
                drawn.append(given.to(device, torch.float32))
            else:
                drawn.append(randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))
        return self.vae.pack(*cast(Any, drawn))

    def _labels(self, class_labels: Any, num_images: int, device: torch.device) -> Tensor:
        several = isinstance(class_labels, Iterable) and not isinstance(class_labels, str)
        asked: list[Any] = list(class_labels) if several else [class_labels]
        names = {name: int(number) for number, name in (self.config["id2label"] or {}).items()}
        known = self.transformer.config.num_classes
        numbers: list[int] = []
        for label in asked:
            if isinstance(label, str) and label not in names:
                raise ValueError(f"there is no class {label!r}; give a number below {known} or one of {list(names)}")
            try:
                number = names[label] if isinstance(label, str) else index(label)
            except TypeError:
                number = -1
            if not 0 <= number < known:
                raise ValueError(f"class {label} is none of 0 to {known - 1}")
            numbers += [number] * num_images
        if not numbers:
            raise ValueError("give at least one class label, and num_images_per_class at least 1")
        return torch.tensor(numbers, device=device)

    def _called_back(
        self, callback: Callable[..., dict[str, Any]], step: int, t: Tensor, x: Tensor, wanted: Sequence[str]
    ) -> Tensor:
        latent, queries = self.vae.unpack(x)
        tensors = {"latents": latent, "query_latents": queries}
        tensors |= callback(self, step, t, {name: tensors[name] for name in wanted}) or {}
        return self.vae.pack(tensors["latents"], tensors["query_latents"])

    @property
    def guidance_scale(self) -> float | int:
        """w of the running call."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the generator in the running call."""
        return self._num_timesteps


def _check_same_latents(name: str, network: DecQTransformer2DModel, vae: AutoencoderDecQ) -> None:
    latents = {
        "queries": (network.config["num_queries"], vae.num_query_tokens),
        "channels": (network.config["in_channels"], vae.latent_channels),
        "patches in a row": (network.config["sample_size"], vae.grid),
    }
    for what, (of_network, of_vae) in latents.items():
        if of_network != of_vae:
            raise ValueError(f"the {name} has {of_network} {what}, the autoencoder {of_vae}; they must agree")


def _check_patch_decoder(decoder: AutoencoderDecQ, vae: AutoencoderDecQ) -> None:
    fields = ("encoder_type", "encoder_hidden_size", "encoder_num_hidden_layers", "encoder_config")
    fields += ("num_summed_layers", "reshape_to_2d")
    reasons = [f"{name} {decoder.config[name]}, not {vae.config[name]}" for name in fields]
    reasons = [reason for name, reason in zip(fields, reasons, strict=True) if decoder.config[name] != vae.config[name]]
    if decoder.config["num_queries"]:
        reasons.insert(0, f"{decoder.config['num_queries']} queries, not 0")
    if decoder.latent_channels != vae.latent_channels:
        reasons.insert(0, f"{decoder.latent_channels} channels, not {vae.latent_channels}")
    if decoder.grid != vae.grid:
        reasons.insert(0, f"{decoder.grid} patches in a row, not {vae.grid}")
    if reasons:
        raise ValueError(
            f"patch_decoder must be a plain RAE on the patch latents of the autoencoder; it has {'; '.join(reasons)}"
        )
