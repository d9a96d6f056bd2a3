"""Text to image, image to image and inpainting with Lens (arXiv 2605.21573)."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import GptOssForCausalLM, GptOssModel, PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3Model

from wellposed.lens.editing import first_step, picture_size, read_pictures, renoised, repainted_channels
from wellposed.lens.guidance import guided_velocity
from wellposed.lens.latents import SIDE, decode_tokens, encode_images
from wellposed.lens.presets import RELEASES, Release, Size, check_size, nearest_size, preset_size
from wellposed.lens.reasoner import enhance_prompts
from wellposed.lens.scheduler import LensFlowMatchScheduler, MuRule, shift_mu
from wellposed.lens.template import Conversation, template_of
from wellposed.lens.text_encoder import TAPS, encode_prompts, no_text
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.saving import saved_class

__all__ = ["LensPipeline", "LensPipelineOutput", "published_as_loadable"]

STRENGTH = 0.6  # of image-to-image where none is asked for

# Entries of published model_index.json files that name classes of the official package, and what loads them here.
PUBLISHED_CLASSES = {
    "LensGptOssEncoder": ["transformers", "GptOssForCausalLM"],
    "LensTransformer2DModel": ["wellposed", "LensTransformer2DModel"],
}


@dataclass
class LensPipelineOutput(ImagePipelineOutput):
    """What was generated.

    Attributes:
        images: as ``output_type`` asks.
        prompts: what was encoded, one for each prompt given: rewritten ones if there was a reasoner. None if features
            were given.
    """

    images: Any
    prompts: list[str] | None = None


def published_as_loadable(index: dict[str, Any]) -> dict[str, Any]:
    """A ``model_index.json`` with classes that exist in place of those of the official package.

    The published text encoder is GPT-OSS under another class name, its weights unchanged.
    """
    return {
        name: PUBLISHED_CLASSES.get(entry[1], entry) if isinstance(entry, list) and len(entry) == 2 else entry
        for name, entry in index.items()
    }


@saved_class
class LensPipeline(DiffusionPipeline, SanaLoraLoaderMixin):  # that mixin serves any network called "transformer"
    r"""Pictures of texts.

    ::

        pipe = LensPipeline.from_pretrained("path/to/Lens-Turbo", dtype=torch.bfloat16, release="turbo").to("cuda")
        image = pipe("a red lighthouse at dusk", aspect_ratio="16:9").images[0]
        image = pipe("the same by day", image=image, strength=0.5).images[0]               # image to image
        image = pipe("a ship on the horizon", image=image, mask_image=mask).images[0]      # inpainting, white is new

    On a small card, encode first: the text encoder is larger than everything else::

        features = pipe.encode_then_free("a red lighthouse at dusk")
        image = pipe.to("cuda")(**features).images[0]

    Published folders load although their ``model_index.json`` names a class that no library has, and their scheduler
    becomes a :class:`LensFlowMatchScheduler` of the same configuration.

    Args:
        scheduler: the time grid and the solver.
        vae: the autoencoder; in float32 its statistics are exact.
        text_encoder: GPT-OSS; None if features are given.
        tokenizer: GPT-OSS's; None likewise.
        transformer: the network.
        release: whose steps and guidance a call without either takes: "base", "rl" or "turbo".
        selected_layer_index: layers of the text encoder that are read; the transformer's, if there is one.

    Raises:
        ValueError: an unknown release.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _interrupt = False
    _num_timesteps = 0
    _guidance_scale: float | int = 1.0

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLFlux2 | AutoencoderKL,
        text_encoder: GptOssForCausalLM | GptOssModel | Qwen3ForCausalLM | Qwen3Model | None,
        tokenizer: PreTrainedTokenizerFast | None,
        transformer: LensTransformer2DModel,
        release: str = "rl",
        selected_layer_index: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if release not in RELEASES:
            raise ValueError(f"release is {release!r}; write one of {', '.join(map(repr, RELEASES))}")
        if type(scheduler) is FlowMatchEulerDiscreteScheduler:
            scheduler = cast(Any, LensFlowMatchScheduler.from_config(scheduler.config))
        self.register_modules(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )
        layers = TAPS if selected_layer_index is None else selected_layer_index
        layers = layers if transformer is None else transformer.config["selected_layer_index"]
        self.register_to_config(release=release, selected_layer_index=list(layers))
        halvings = 3 if vae is None else len(vae.config["block_out_channels"]) - 1
        self.vae_scale_factor = 2**halvings
        self.image_processor = VaeImageProcessor(vae_scale_factor=SIDE * self.vae_scale_factor, do_resize=False)

    @classmethod
    def load_config(cls, *arguments: Any, **more: Any) -> Any:
        """As in diffusers, with classes that exist, see :func:`published_as_loadable`."""
        loaded: Any = super().load_config(*arguments, **more)
        if isinstance(loaded, tuple):
            return published_as_loadable(loaded[0]), *loaded[1:]
        return published_as_loadable(loaded)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | int | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        base_resolution: int = 1024,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        template: Conversation | None = None,
        pad_to_multiple_of: int | None = None,
        reasoner: Callable[[str], str] | None = None,
        mu_rule: MuRule | None = None,
        as_published: bool = False,
    ) -> LensPipelineOutput | tuple[Any]:
        """Generates pictures.

        Args:
            prompt: one or several.
            negative_prompt: what to move away from, one for all or one for each. Blank ones throughout are no text at
                all: what the published pipeline's masked zeros amount to, with fewer tokens.
            image: one for all prompts or one for each; starts from it. PIL pictures are resized, others must fit.
            mask_image: where to paint (1, white); elsewhere the latents of ``image`` are kept, to the last bit.
            strength: share of the steps that are taken with an ``image``; 0.6, and 1 with a mask.
            height, width: pixels, multiples of 16; by default those of ``image``, or 1024 x 1024.
            aspect_ratio: one of the published shapes instead, width to height: "16:9".
            base_resolution: of that, 1024 or 1440.
            num_inference_steps: T; the release's own by default.
            sigmas: T levels before the shift, from 1 down, in place of even ones.
            guidance_scale: w; the release's own by default, 1 for none.
            num_images_per_prompt: pictures of each.
            generator: one, or one for each picture, which is then the same in any batch.
            latents: noise of the tokens, (pictures, tokens, channels), in place of a draw.
            prompt_embeds, prompt_embeds_mask: features (prompts, taps, length, width), and which positions are text
                (None: all), in place of ``prompt``.
            negative_prompt_embeds, negative_prompt_embeds_mask: likewise.
            output_type: "pil", "np", "pt" (from [0, 1]) or "latent" (normalised tokens).
            return_dict: False for a tuple.
            attention_kwargs: ``{"scale": s}`` scales LoRA layers.
            callback_on_step_end: called with (pipe, step, timestep, tensors) after each step; returns those that it
                changed. ``pipe._guidance_scale = 1.0`` in it ends guidance, ``pipe._interrupt = True`` sampling.
            callback_on_step_end_tensor_inputs: "latents", "prompt_embeds", "negative_prompt_embeds".
            template: the conversation that prompts are put into: date, limit, truncation. None: :func:`template_of`
                the tokenizer.
            pad_to_multiple_of: length of the text, 16 for a compiled transformer, which is traced anew for each.
            reasoner: rewrites prompts first (:mod:`wellposed.lens.reasoner`).
            mu_rule: "official" or "smooth" in place of the scheduler's own.
            as_published: precision of the published pipeline, for comparison with its pictures: times rounded in the
                network's precision, noise drawn, guided and accumulated in it, and pixels cut to bytes instead of
                rounded.

        Raises:
            ValueError: arguments that do not fit each other or the network; float16.
        """
        self._check_call(output_type, callback_on_step_end_tensor_inputs, image, mask_image, strength)
        settings = RELEASES[cast(Release, self.config["release"])]
        steps = settings.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = steps if sigmas is None else len(sigmas)
        self._guidance_scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        self._interrupt = False
        size = self._size(height, width, aspect_ratio, base_resolution, image)
        start = 0 if image is None else first_step(_default_strength(strength, mask_image), steps)
        device = self._execution_device

        prompts = None if prompt is None else enhance_prompts(_listed(prompt, "prompt"), reasoner)
        prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask = self.encode_prompt(
            prompts,
            negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_embeds_mask=negative_prompt_embeds_mask,
            template=template,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        features = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        features = {name: None if value is None else value.to(device) for name, value in features.items()}

        rows, columns = (length // self._token_side for length in size)
        dtype = self.transformer.dtype if as_published else torch.float32
        shape = (len(prompt_embeds), rows * columns, self.transformer.config["in_channels"])
        noise = _noise(shape, generator, latents, device, dtype)
        known = None if image is None else self._known_tokens(image, size, len(noise), num_images_per_prompt).to(noise)
        painted = None
        if mask_image is not None:
            mask = _for_each(read_pictures(mask_image, size, "L"), len(noise), num_images_per_prompt, "mask_image")
            painted = repainted_channels(mask, shape[2] // SIDE**2, self.vae_scale_factor).to(device)

        timesteps = self._lay_levels(steps, sigmas, shape[1], mu_rule, start, device)
        levels = self.scheduler.sigmas[start:].to(device, torch.float32)
        x = noise if known is None else renoised(known, noise, levels[0]).to(dtype)
        for index, t in enumerate(cast(Any, self).progress_bar(timesteps)):
            if self.interrupt:
                continue
            velocity = self._velocity(
                x,
                t,
                (rows, columns),
                (features["prompt_embeds"], prompt_embeds_mask),
                (features["negative_prompt_embeds"], negative_prompt_embeds_mask),
                attention_kwargs,
                as_published,
            )
            x = self.scheduler.step(velocity, t, x, generator=_first(generator), return_dict=False)[0]
            if known is not None and painted is not None:
                x = torch.where(painted, x, renoised(known, noise, levels[index + 1]).to(dtype))
            if callback_on_step_end is not None:
                tensors = {"latents": x, **features}
                wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                tensors |= callback_on_step_end(self, index, t, cast(Any, wanted)) or {}
                x = cast(Tensor, tensors.pop("latents"))
                features = tensors

        images = x if output_type == "latent" else self._finished(x, (rows, columns), output_type, as_published)
        self.maybe_free_model_hooks()
        return LensPipelineOutput(images=images, prompts=prompts) if return_dict else (images,)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        template: Conversation | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Text features of a call, by the names under which a call takes them.

        Nothing but text encoder and tokenizer is needed; masks come back on the CPU, where the transformer can look at
        them without waiting for the device. The arguments are those of a call; the negative pair is None without
        guidance, and has length 0 where all negative prompts are blank.

        Raises:
            ValueError: no prompts, or both prompts and features; negative ones of another number; no text encoder.
        """
        prompt_embeds, prompt_embeds_mask = self._features(
            prompt, prompt_embeds, prompt_embeds_mask, "prompt", template, pad_to_multiple_of
        )
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds_mask = None
        elif negative_prompt_embeds is None:
            negative = [""] if negative_prompt is None else _listed(negative_prompt, "negative_prompt")
            if any(text.strip() for text in negative):
                negative_prompt_embeds, negative_prompt_embeds_mask = self._features(
                    negative, None, None, "negative_prompt", template, pad_to_multiple_of
                )
            else:
                none = no_text(
                    len(negative),
                    num_taps=prompt_embeds.shape[1],
                    width=prompt_embeds.shape[3],
                    dtype=prompt_embeds.dtype,
                    device=prompt_embeds.device,
                )
                negative_prompt_embeds, negative_prompt_embeds_mask = none.hidden_states, none.mask.cpu()
        elif negative_prompt is not None:
            raise ValueError("got negative_prompt and negative_prompt_embeds; give one of them")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; give at least 1")
        number = len(prompt_embeds)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
        prompt_embeds_mask = prompt_embeds_mask.repeat_interleave(num_images_per_prompt, 0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds, negative_prompt_embeds_mask = (
                _for_each(given, number * num_images_per_prompt, num_images_per_prompt, "negative_prompt")
                for given in (
                    negative_prompt_embeds,
                    _mask_of(negative_prompt_embeds, negative_prompt_embeds_mask, "negative_prompt_embeds"),
                )
            )
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

    @torch.no_grad()
    def encode_then_free(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None, **encoding: Any
    ) -> dict[str, Tensor]:
        """Encodes, and lets the text encoder go; ``pipe(**features)`` then makes the pictures.

        The encoder is the largest part by far (13 GB in MXFP4, 40 GB unpacked, beside 8 GB). The pipeline itself may
        still be on the CPU, the encoder wherever it was loaded to.

        Args:
            prompt: as in a call.
            negative_prompt: likewise.
            encoding: further arguments of :meth:`encode_prompt`.
        """
        prompt_embeds, prompt_embeds_mask, negative, negative_mask = self.encode_prompt(
            prompt, negative_prompt, **encoding
        )
        self.register_modules(text_encoder=None)
        self.maybe_free_model_hooks()  # offloading keeps a list of models; it is written anew
        gc.collect()
        for backend in (torch.cuda, torch.xpu, torch.mps):
            if backend.is_available():
                backend.empty_cache()
        found = {
            "prompt_embeds": prompt_embeds,
            "prompt_embeds_mask": prompt_embeds_mask,
            "negative_prompt_embeds": negative,
            "negative_prompt_embeds_mask": negative_mask,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def guidance_scale(self) -> float | int:
        """w of the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network also runs without the text."""
        return self._guidance_scale != 1

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    @property
    def _token_side(self) -> int:
        return SIDE * self.vae_scale_factor

    def _check_call(
        self, output_type: str, wanted: Sequence[str], image: Any, mask_image: Any, strength: float | int | None
    ) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type is {output_type!r}; write "pil", "np", "pt" or "latent"')
        if unknown := set(wanted) - set(self._callback_tensor_inputs):
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback tensor inputs can be {known}; got also {', '.join(sorted(unknown))}")
        if image is None and (mask_image is not None or strength is not None):
            raise ValueError("mask_image and strength say what becomes of an image; give image too")
        if self.transformer.dtype == torch.float16:
            raise ValueError(
                "the transformer is in float16, whose range its activations leave; load it with dtype=torch.bfloat16, "
                "or torch.float32"
            )

    def _size(
        self, height: int | None, width: int | None, aspect_ratio: str | None, base_resolution: int, image: Any
    ) -> Size:
        if aspect_ratio is not None:
            if height is not None or width is not None:
                raise ValueError("got aspect_ratio and height or width; give one or the other")
            return preset_size(aspect_ratio, base_resolution)
        default = preset_size("1:1", base_resolution)
        if image is not None:
            default = nearest_size(*picture_size(image), self._token_side)
        height = default.height if height is None else height
        width = default.width if width is None else width
        return check_size(height, width, self._token_side)

    def _features(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        name: str,
        template: Conversation | None,
        pad_to_multiple_of: int | None,
    ) -> tuple[Tensor, Tensor]:
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give {name} or {name}_embeds, and not both")
        if embeds is not None:
            return embeds, _mask_of(embeds, mask, f"{name}_embeds")
        prompts = _listed(cast(Any, prompt), name)
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"there is no text encoder or no tokenizer to read {name} with; give {name}_embeds, or load the "
                "pipeline with both"
            )
        encoded = encode_prompts(
            self.text_encoder,
            self.tokenizer,
            prompts,
            template=template or template_of(self.tokenizer),
            taps=self.config["selected_layer_index"],
            pad_to_multiple_of=pad_to_multiple_of,
        )
        return encoded.hidden_states, encoded.mask.cpu()

    def _known_tokens(self, image: Any, size: Size, batch: int, num_images: int) -> Tensor:
        pictures = _for_each(read_pictures(image, size), batch, num_images, "image").to(self._execution_device)
        return encode_images(self.vae, 2 * pictures - 1)

    def _lay_levels(
        self,
        steps: int,
        sigmas: Sequence[float] | None,
        num_tokens: int,
        mu_rule: MuRule | None,
        start: int,
        device: torch.device,
    ) -> Tensor:
        """Sets the scheduler; the timesteps of the steps to take."""
        rule = self.scheduler.config.get("mu_rule", "official") if mu_rule is None else mu_rule
        mu = shift_mu(num_tokens, steps, rule)
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        self.scheduler.set_timesteps(sigmas=even if sigmas is None else list(sigmas), mu=mu, device=device)
        self.scheduler.set_begin_index(start)
        self._num_timesteps = steps - start
        return self.scheduler.timesteps[start:]

    def _velocity(
        self,
        x: Tensor,
        t: Tensor,
        grid: tuple[int, int],
        text: tuple[Tensor | None, Tensor | None],
        negative: tuple[Tensor | None, Tensor | None],
        attention_kwargs: dict[str, Any] | None,
        as_published: bool,
    ) -> Tensor:
        if t.ndim == 0:
            t = t.expand(len(x))
        time = t / self.scheduler.config["num_train_timesteps"]

        def predicted(features: tuple[Tensor | None, Tensor | None], context: str) -> Tensor:
            embeds, mask = features
            # Caches compare a step with the one before of the same name.
            with self.transformer.cache_context(context):
                velocity = self.transformer(
                    x.to(self.transformer.dtype),
                    None if embeds is None else list(embeds.unbind(1)),
                    mask,
                    timestep=time,
                    img_shapes=[(1, *grid)] * len(x),
                    attention_kwargs=attention_kwargs,
                    round_timestep=as_published,
                    return_dict=False,
                )[0]
            return velocity.to(x.dtype)

        conditional = predicted(text, "cond")
        if not self.do_classifier_free_guidance:
            return conditional
        return guided_velocity(conditional, predicted(negative, "uncond"), self.guidance_scale)

    def _finished(self, x: Tensor, grid: tuple[int, int], output_type: str, as_published: bool) -> Any:
        images = decode_tokens(self.vae, x, *grid).float().clamp(-1, 1)
        if output_type == "pil" and as_published:
            levels = (127.5 * (images + 1)).to(torch.uint8).movedim(1, -1).cpu().numpy()
            return [Image.fromarray(np.ascontiguousarray(level)) for level in levels]
        return self.image_processor.postprocess(images, output_type=output_type)


def _listed(texts: str | Sequence[str], name: str) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} is {texts!r}; give a string or a list of strings, at least one")
    return found


def _mask_of(embeds: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """On the CPU; everything is text where there is none."""
    if embeds.ndim != 4 or (mask is not None and mask.shape != (len(embeds), embeds.shape[2])):
        shape = None if mask is None else tuple(mask.shape)
        raise ValueError(
            f"{name} has shape {tuple(embeds.shape)} and its mask {shape}; expected (prompts, taps, length, width) and "
            "(prompts, length)"
        )
    whole = torch.ones(len(embeds), embeds.shape[2], dtype=torch.bool)
    return whole if mask is None else mask.bool().cpu()


def _for_each(given: Tensor, batch: int, num_images: int, name: str) -> Tensor:
    """One row for each picture, of one for all or one for each prompt."""
    if len(given) not in (1, batch // num_images):
        raise ValueError(f"got {len(given)} of {name} for {batch // num_images} prompts; give one, or one for each")
    return given.expand(batch, *given.shape[1:]) if len(given) == 1 else given.repeat_interleave(num_images, 0)


def _noise(
    shape: tuple[int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "batch tokens channels"]:
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"got {len(generator)} generators for {shape[0]} pictures; pass one, or one for each")
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if latents.shape != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}, noise of the packed tokens")
    return latents.to(device, dtype)


def _first(generator: torch.Generator | list[torch.Generator] | None) -> torch.Generator | None:
    """What a scheduler that draws is given; it takes one only."""
    return generator[0] if isinstance(generator, list) else generator


def _default_strength(strength: float | int | None, mask_image: Any) -> float | int:
    if strength is not None:
        return strength
    return STRENGTH if mask_image is None else 1.0
