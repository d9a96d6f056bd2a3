"""Pipelines as diffusers has them, with tiny real parts: the product that the scheduler uses is the guided Jacobian."""

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    VQModel,
)
from torch import Tensor, nn

from wellposed.hooks import full_covariance
from wellposed.lgs.jacobian import Linearization
from wellposed.schedulers import LanczosDDPMScheduler, LanczosFlowMatchScheduler

Combine = Callable[[Sequence[Tensor]], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def restless(model: nn.Module) -> nn.Module:
    """Weights that make every part of a transformer matter: as built, gates and output layers are nearly zero."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(index))
    return model.requires_grad_(False)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(tiny: SimpleNamespace, scheduler: Any = None, **unet: Any) -> StableDiffusionPipeline:
    return quiet(
        StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=None,
            tokenizer=None,
            unet=tiny.conditional_unet(**unet),
            scheduler=scheduler or DDPMScheduler(clip_sample=False, timestep_spacing="linspace", steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_3(tiny: SimpleNamespace) -> StableDiffusion3Pipeline:
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return quiet(
        StableDiffusion3Pipeline(
            transformer=restless(tiny.sd3()),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(),
            **dict.fromkeys(parts),
        )
    )


def flux(tiny: SimpleNamespace) -> FluxPipeline:
    vae = autoencoder()
    vae.register_to_config(latent_channels=1)  # four of them are packed to a token
    return quiet(
        FluxPipeline(
            transformer=restless(tiny.flux()),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        )
    )


def dit(tiny: SimpleNamespace) -> DiTPipeline:
    transformer = tiny.dit(out_channels=8)
    for block in transformer.transformer_blocks:  # the pipeline's null class is 1000
        block.norm1.emb.class_embedder.embedding_table = nn.Embedding(1001, 16)
    return quiet(
        DiTPipeline(transformer=restless(transformer), vae=autoencoder(), scheduler=DDIMScheduler(clip_sample=False))
    )


def pixart(tiny: SimpleNamespace) -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    ).eval()
    scheduler = DPMSolverMultistepScheduler()
    return quiet(
        PixArtAlphaPipeline(
            transformer=restless(transformer), vae=autoencoder(), scheduler=scheduler, tokenizer=None, text_encoder=None
        )
    )


class Watch:
    """Runs a pipeline in the block and keeps what its network was called with and what its scheduler multiplied by."""

    def __init__(self, pipe: Any, model: nn.Module, *, steps: int = 3, **options: Any) -> None:
        self.model = model
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[]]
        self.taken: list[tuple[Linearization, int]] = []
        self.noise_generator = torch.Generator().manual_seed(7)
        with full_covariance(pipe, num_lanczos_steps=2, generator=self.noise_generator) as scheduler:
            assert scheduler.network_calls is not None
            take = scheduler.network_calls.take

            def watched(mixed: Tensor) -> tuple[Linearization, int]:
                self.taken.append(take(mixed))
                self.calls.append([])
                return self.taken[-1]

            scheduler.network_calls.take = watched
            handle = model.register_forward_pre_hook(
                lambda _, args, kwargs: self.calls[-1].append((args, dict(kwargs))), with_kwargs=True
            )
            self.output = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(1), **options)[0]
            handle.remove()
            self.record = scheduler.record
        self.scheduler = scheduler

    def check_products(self, combine: Combine, *, tolerance: float = 1e-4) -> None:
        """At the first step with products: J^T v against autograd through the whole mixing."""
        linear, _ = self.taken[0]
        sample = linear.output
        v = normal(*sample.shape, seed=5)

        def guided(x: Tensor) -> Tensor:
            outputs = []
            for args, given in self.calls[0]:
                kwargs = dict(given)
                first = args[0] if args else kwargs.pop("hidden_states")
                again = torch.cat([x] * (len(first) // len(x)))
                outputs.append(self.model(again, *args[1:], **{**kwargs, "return_dict": False})[0])
            return combine(outputs)

        args, kwargs = self.calls[0][0]
        x = (args[0] if args else kwargs["hidden_states"])[: len(sample)].detach().clone().requires_grad_()
        expected = torch.autograd.grad(guided(x), x, v)[0]
        assert (linear.product(v) - expected).abs().max() <= tolerance * expected.abs().max()
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(guided(x).detach(), sample, rtol=1e-4, atol=1e-5)


def halves(scale: float, *, conditional_first: bool = False) -> Combine:
    def combine(outputs: Sequence[Tensor]) -> Tensor:
        first, second = outputs[0].chunk(2)
        cond, uncond = (first, second) if conditional_first else (second, first)
        return uncond + scale * (cond - uncond)

    return combine


@pytest.mark.parametrize("batch", [1, 2])
def test_stable_diffusion_with_guidance(tiny: SimpleNamespace, batch: int) -> None:
    pipe = stable_diffusion(tiny)
    watch = Watch(
        pipe,
        pipe.unet,
        prompt_embeds=normal(batch, 5, 16, seed=2),
        negative_prompt_embeds=normal(batch, 5, 16, seed=3),
        guidance_scale=5.0,
        output_type="latent",
        height=64 // 8,
        width=64 // 8,
    )
    watch.check_products(halves(5.0))
    assert watch.output.isfinite().all() and watch.record.products == (1, 2, 0)


def test_an_image_of_stable_diffusion_does_not_depend_on_its_batch(tiny: SimpleNamespace) -> None:
    pipe = stable_diffusion(tiny)
    prompts, negatives = normal(3, 5, 16, seed=2), normal(3, 5, 16, seed=3)

    def run(rows: list[int]) -> Tensor:
        with full_covariance(pipe, num_lanczos_steps=2):
            return pipe(
                prompt_embeds=prompts[rows],
                negative_prompt_embeds=negatives[rows],
                generator=[torch.Generator().manual_seed(row) for row in rows],
                num_inference_steps=3,
                output_type="latent",
                height=8,
                width=8,
            )[0]

    torch.testing.assert_close(run([1]), run([0, 1, 2])[1:2], rtol=0, atol=2e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_rescale_is_refused(tiny: SimpleNamespace, batch: int) -> None:
    pipe = stable_diffusion(tiny)
    with pytest.raises(ValueError, match="switch off guidance_rescale"), full_covariance(pipe):
        pipe(
            prompt_embeds=normal(batch, 5, 16, seed=2),
            negative_prompt_embeds=normal(batch, 5, 16, seed=3),
            guidance_rescale=0.7,
            guidance_scale=5.0,
            num_inference_steps=2,
            output_type="latent",
            height=8,
            width=8,
        )


def test_dit_draws_one_noise_for_the_doubled_batch(tiny: SimpleNamespace) -> None:
    pipe = dit(tiny)
    watch = Watch(pipe, pipe.transformer, class_labels=[1, 2], guidance_scale=4.0, output_type="pt")
    assert [copies for _, copies in watch.taken] == [2, 2]
    mix = halves(4.0, conditional_first=True)
    watch.check_products(lambda outputs: mix([outputs[0][:, :4]]))
    expected = torch.Generator().manual_seed(7)
    for _ in range(2):
        torch.randn(2, 4, 8, 8, generator=expected)
    assert torch.equal(watch.noise_generator.get_state(), expected.get_state())


def test_dit_without_guidance_and_with_one_generator_for_each_image(tiny: SimpleNamespace) -> None:
    pipe = dit(tiny)
    results = []
    for labels, seeds in (([1, 2], (3, 4)), ([2], (4,))):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with full_covariance(pipe, num_lanczos_steps=2, generator=generators):
            results.append(
                pipe(
                    class_labels=labels,
                    guidance_scale=4.0,
                    num_inference_steps=3,
                    generator=[torch.Generator().manual_seed(10 + seed) for seed in seeds],
                    output_type="pt",
                ).images
            )
    torch.testing.assert_close(torch.as_tensor(results[1]), torch.as_tensor(results[0])[1:], rtol=0, atol=2e-3)
    watch = Watch(pipe, pipe.transformer, class_labels=[1, 2], guidance_scale=1.0, output_type="pt")
    assert [copies for _, copies in watch.taken] == [1, 1]
    watch.check_products(lambda outputs: outputs[0][:, :4])


@pytest.mark.parametrize("batch", [1, 2])
def test_stable_diffusion_3(tiny: SimpleNamespace, batch: int) -> None:
    pipe = stable_diffusion_3(tiny)
    watch = Watch(
        pipe,
        pipe.transformer,
        prompt_embeds=normal(batch, 5, 32, seed=2),
        negative_prompt_embeds=normal(batch, 5, 32, seed=3),
        pooled_prompt_embeds=normal(batch, 64, seed=4),
        negative_pooled_prompt_embeds=normal(batch, 64, seed=5),
        guidance_scale=4.0,
        output_type="latent",
        height=8,
        width=8,
    )
    assert isinstance(watch.scheduler, LanczosFlowMatchScheduler) and watch.scheduler.config.shift == 3.0
    # sigma = 1 at the first step, where x_t says nothing of x_0: the floor, and no product.
    assert watch.record.products == (0, 2, 0)
    watch.check_products(halves(4.0))


def test_flux_with_packed_tokens_and_true_guidance_in_two_calls(tiny: SimpleNamespace) -> None:
    pipe = flux(tiny)
    options = {
        "prompt_embeds": normal(1, 5, 32, seed=2),
        "pooled_prompt_embeds": normal(1, 32, seed=3),
        "output_type": "latent",
        "height": 16,
        "width": 16,
    }
    watch = Watch(pipe, pipe.transformer, **options)
    watch.check_products(lambda outputs: outputs[0])
    guided = Watch(
        pipe,
        pipe.transformer,
        **options,
        negative_prompt_embeds=normal(1, 5, 32, seed=4),
        negative_pooled_prompt_embeds=normal(1, 32, seed=5),
        true_cfg_scale=3.0,
    )
    assert [len(calls) for calls in guided.calls] == [2, 2, 2]
    guided.check_products(lambda outputs: outputs[1] + 3.0 * (outputs[0] - outputs[1]))


def test_pixart_predicts_its_variance_too(tiny: SimpleNamespace) -> None:
    pipe = pixart(tiny)
    watch = Watch(
        pipe,
        pipe.transformer,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=normal(1, 5, 16, seed=2),
        prompt_attention_mask=torch.ones(1, 5),
        negative_prompt_embeds=normal(1, 5, 16, seed=3),
        negative_prompt_attention_mask=torch.ones(1, 5),
        guidance_scale=4.0,
        use_resolution_binning=False,
        output_type="latent",
        height=8,
        width=8,
    )
    watch.check_products(lambda outputs: halves(4.0)(outputs)[:, :4])


def test_latent_diffusion_hands_on_no_generator(tiny: SimpleNamespace) -> None:
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=8,
    ).eval()
    pipe = quiet(LDMPipeline(vqvae=vqvae, unet=tiny.unet(), scheduler=DDIMScheduler(clip_sample=False)))
    runs = [Watch(pipe, pipe.unet, output_type="pt") for _ in range(2)]
    runs[0].check_products(lambda outputs: outputs[0])
    assert torch.equal(torch.as_tensor(runs[0].output), torch.as_tensor(runs[1].output))


# --- whose scheduler it was


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(beta_schedule="scaled_linear", steps_offset=1),
        EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1),
        PNDMScheduler(steps_offset=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_that_do_not_clip_are_not_made_to(tiny: SimpleNamespace, scheduler: Any) -> None:
    pipe = stable_diffusion(tiny, scheduler)
    with full_covariance(pipe) as ours:
        assert isinstance(ours, LanczosDDPMScheduler)
        assert not ours.config.clip_sample and ours.settings.max_variance is None
        torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
        for key in ("timestep_spacing", "steps_offset", "prediction_type", "beta_schedule"):
            assert ours.config[key] == scheduler.config[key]
    assert pipe.scheduler is scheduler
    with full_covariance(pipe, clip_sample=True, timestep_spacing="linspace") as ours:
        assert ours.config.clip_sample and ours.config.timestep_spacing == "linspace"


def test_distilled_and_foreign_schedules_are_refused(tiny: SimpleNamespace) -> None:
    from diffusers import (
        CogVideoXDDIMScheduler,
        FlowMatchLCMScheduler,
        LCMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    )

    for scheduler, message in (
        (LCMScheduler(steps_offset=1), "distilled to few steps"),
        (TCDScheduler(steps_offset=1), "distilled to few steps"),
        (FlowMatchLCMScheduler(), "distilled to few steps"),
        (CogVideoXDDIMScheduler(steps_offset=1, clip_sample=False), "shifts its noise schedule"),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", steps_offset=1),
            "no alphas_cumprod",
        ),
        (DDPMScheduler(prediction_type="flow", steps_offset=1, clip_sample=False), "prediction_type 'flow'"),
    ):
        pipe = stable_diffusion(tiny, scheduler)
        with pytest.raises(ValueError, match=message), full_covariance(pipe):
            pass
        assert pipe.scheduler is scheduler and "forward" not in vars(pipe.unet)


# --- whose network it is


def test_networks_that_are_no_conditional_mean_are_refused(tiny: SimpleNamespace) -> None:
    with (
        pytest.raises(ValueError, match="time_cond_proj_dim"),
        full_covariance(stable_diffusion(tiny, time_cond_proj_dim=8)),
    ):
        pass
    pipe = stable_diffusion(tiny)
    fake = SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler, controlnet=nn.Identity())
    with pytest.raises(ValueError, match="ControlNet"), full_covariance(fake):
        pass


def test_caches_and_weights_that_move_are_refused(tiny: SimpleNamespace) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = flux(tiny)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"call transformer.disable_cache\(\)"), full_covariance(pipe):
        pass
    pipe.transformer.disable_cache()
    with full_covariance(pipe):
        pass
    pipe = stable_diffusion(tiny)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"unet\..* moves or recasts its weights"), full_covariance(pipe):
        pass
    pipe = stable_diffusion(tiny)
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pytest.raises(ValueError, match="moves or recasts its weights"), full_covariance(pipe):
        pass


def test_an_offloaded_pipeline_can_be_called_again_and_again(tiny: SimpleNamespace) -> None:
    """After every call diffusers takes accelerate's hooks off and puts them on again."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    options: dict[str, Any] = {
        "prompt_embeds": normal(1, 5, 16, seed=2),
        "negative_prompt_embeds": normal(1, 5, 16, seed=3),
        "num_inference_steps": 3,
        "output_type": "latent",
        "height": 8,
        "width": 8,
    }
    pipe = stable_diffusion(tiny)
    with full_covariance(pipe, num_lanczos_steps=2):
        expected = pipe(**options, generator=torch.Generator().manual_seed(0))[0]
    stock = pipe(**options, generator=torch.Generator().manual_seed(0))[0]
    cpu_offload_with_hook(pipe.unet, "cpu")
    with full_covariance(pipe, num_lanczos_steps=2) as scheduler:
        for _ in range(2):
            found = pipe(**options, generator=torch.Generator().manual_seed(0))[0]
            assert torch.equal(found, expected) and scheduler.record.products == (1, 2, 0)
            remove_hook_from_module(pipe.unet, recurse=True)
            cpu_offload_with_hook(pipe.unet, "cpu")
    assert torch.equal(pipe(**options, generator=torch.Generator().manual_seed(0))[0], stock)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(pipe(**options, generator=torch.Generator().manual_seed(0))[0], stock)


def test_one_graph_at_a_time(tiny: SimpleNamespace) -> None:
    pipe = stable_diffusion(tiny)
    alive: list[weakref.ref[Tensor]] = []
    at_once: list[int] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        gc.collect()
        at_once.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(output))

    pipe.unet.conv_in.register_forward_hook(count)
    with full_covariance(pipe, num_lanczos_steps=2):
        pipe(
            prompt_embeds=normal(1, 5, 16, seed=2),
            negative_prompt_embeds=normal(1, 5, 16, seed=3),
            num_inference_steps=4,
            output_type="latent",
            height=8,
            width=8,
        )
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 0
    assert at_once == [0, 0, 0, 0]


def test_a_wrapper_put_on_within_the_block_does_no_harm_afterwards(tiny: SimpleNamespace) -> None:
    pipe = stable_diffusion(tiny)
    x, text = normal(1, 4, 8, 8, seed=1), normal(1, 5, 16, seed=2)
    expected = pipe.unet(x, 5, text).sample
    with full_covariance(pipe) as scheduler:
        inner = pipe.unet.forward
        pipe.unet.forward = functools.partial(inner)
    assert torch.equal(pipe.unet(x, 5, text).sample, expected)
    assert scheduler.network_calls is not None and scheduler.network_calls.calls == []


def test_unknown_config_and_m_below_zero_change_nothing(tiny: SimpleNamespace) -> None:
    pipe = stable_diffusion(tiny)
    before = pipe.scheduler
    with (
        pytest.raises(ValueError, match="no config timestep_spaceing"),
        full_covariance(pipe, timestep_spaceing="leading"),
    ):
        pass
    with pytest.raises(ValueError, match="num_lanczos_steps must be >= 0"), full_covariance(pipe, num_lanczos_steps=-1):
        pass
    assert pipe.scheduler is before and "forward" not in vars(pipe.unet)


def test_networks_with_a_list_for_a_sample_are_refused() -> None:
    class OfLists(nn.Module):
        def forward(self, x: list[Tensor]) -> tuple[list[Tensor]]:
            return (x,)

    pipe = SimpleNamespace(transformer=OfLists(), scheduler=FlowMatchEulerDiscreteScheduler())
    with full_covariance(pipe), pytest.raises(ValueError, match="takes its sample as a list"):
        pipe.transformer([torch.zeros(1, 4)])


def test_half_precision_networks(tiny: SimpleNamespace) -> None:
    pipe = stable_diffusion(tiny)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "height": 8, "width": 8}
    prompts = {"prompt_embeds": normal(1, 5, 16, seed=2), "negative_prompt_embeds": normal(1, 5, 16, seed=3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.to(torch.bfloat16)
    half = {key: value.bfloat16() for key, value in prompts.items()}
    with full_covariance(pipe, num_lanczos_steps=2) as scheduler:
        latents = pipe(**half, **options, generator=torch.Generator().manual_seed(0))[0]
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    assert scheduler.record.products == (1, 2, 0)
    with pytest.raises(ValueError, match="finite differences in"), full_covariance(pipe, method="difference"):
        pipe(**half, **options)
