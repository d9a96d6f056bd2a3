from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from wellposed.hooks import apply_token_reduction, full_covariance, remove_token_reduction
from wellposed.pipelines import LanczosDDPMPipeline


def ddpm(tiny: SimpleNamespace, **scheduler: Any) -> DDPMPipeline:
    pipe = DDPMPipeline(tiny.unet(), DDPMScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: DDPMPipeline, *, generator: Any = None, batch_size: int = 2) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    return pipe(batch_size=batch_size, num_inference_steps=4, generator=generator, output_type="pt").images


def raise_if(wanted: bool) -> None:
    if wanted:
        raise RuntimeError("stop")


def dit(tiny: SimpleNamespace) -> DiTPipeline:
    transformer = tiny.dit()
    with torch.no_grad():
        for index, parameter in enumerate(transformer.parameters()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
    )
    pipe = DiTPipeline(transformer=transformer, vae=vae.eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_m_0_is_the_stock_pipeline(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    expected = images(pipe)
    with full_covariance(pipe, num_lanczos_steps=0):
        torch.testing.assert_close(images(pipe), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_the_pipeline_bit_for_bit(tiny: SimpleNamespace, fails: bool) -> None:
    pipe = ddpm(tiny)
    before, scheduler, own = images(pipe), pipe.scheduler, dict(vars(pipe.unet))
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    outcome = pytest.raises(RuntimeError, match="stop") if fails else nullcontext()
    with outcome, full_covariance(pipe):
        images(pipe)
        raise_if(fails)
    assert pipe.scheduler is scheduler
    assert vars(pipe.unet).keys() == own.keys()
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags
    assert torch.equal(images(pipe), before)


def test_inside_the_block_images_change_and_the_record_counts(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    before = images(pipe)
    with full_covariance(pipe, num_lanczos_steps=2) as scheduler:
        inside = images(pipe)
        assert torch.equal(images(pipe), inside)
    assert not torch.equal(inside, before)
    # "leading" starts at t = 0.75, SNR 3e-3, where the covariance is taken for isotropic; the last step takes no noise.
    assert scheduler.record.products == (1, 2, 2, 0)
    assert scheduler.record.evaluations == 4 + 5


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_an_image_is_the_same_in_any_batch(tiny: SimpleNamespace, tol: float | None) -> None:
    pipe = ddpm(tiny)
    with full_covariance(pipe, tol=tol):
        batch = images(pipe, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4, 5)], batch_size=3)
        alone = images(pipe, generator=[torch.Generator().manual_seed(4)], batch_size=1)
    torch.testing.assert_close(batch[1:2], alone, atol=1e-4, rtol=0)


def test_works_under_inference_mode(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    with full_covariance(pipe, num_lanczos_steps=2):
        expected = images(pipe)
        with torch.inference_mode():
            assert torch.equal(images(pipe), expected)


def test_no_graph_outlives_a_step(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    with full_covariance(pipe) as scheduler:
        images(pipe)
        assert scheduler.network_calls is not None
        assert scheduler.network_calls.calls == []


@pytest.mark.parametrize("method", ["jvp", "difference"])
def test_other_products_run_in_stock_pipelines(tiny: SimpleNamespace, method: Any) -> None:
    pipe = ddpm(tiny)
    with full_covariance(pipe, num_lanczos_steps=1, method=method):
        assert images(pipe).isfinite().all()


def dit_latents(pipe: DiTPipeline, guidance_scale: float, **options: Any) -> list[Tensor]:
    """States that the scheduler returned, the doubled batch as it was."""
    states: list[Tensor] = []
    with full_covariance(pipe, generator=torch.Generator().manual_seed(7), **options) as scheduler:
        step = scheduler.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            states.append(output.prev_sample)
            return output

        scheduler.step = watched
        pipe(
            class_labels=[1, 2],
            guidance_scale=guidance_scale,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        )
    return states


def test_dit_draws_one_noise_for_both_halves_of_a_guided_batch(tiny: SimpleNamespace) -> None:
    # The null class of DiT is 1000; the tiny table ends before it.
    pipe = dit(tiny)
    pipe.transformer = wider_classes(pipe.transformer)
    states = dit_latents(pipe, 4.0)
    assert all(len(state) == 4 and torch.equal(state[:2], state[2:]) for state in states)
    again = dit_latents(pipe, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))


def wider_classes(transformer: nn.Module) -> nn.Module:
    for block in transformer.transformer_blocks:
        old = block.norm1.emb.class_embedder.embedding_table
        block.norm1.emb.class_embedder.embedding_table = nn.Embedding(1001, old.embedding_dim)
    return transformer.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: setattr(pipe, "scheduler", EDMEulerScheduler()), "alphas_cumprod"),
        (lambda pipe: pipe.unet.train() and setattr(pipe, "unet", None), "no denoising network"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(tiny: SimpleNamespace, change: Any, message: str) -> None:
    pipe = ddpm(tiny)
    change(pipe)
    with pytest.raises(ValueError, match=message), full_covariance(pipe):
        pass


def test_blocks_do_not_nest_and_the_own_pipeline_needs_none(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    with full_covariance(pipe), pytest.raises(ValueError, match="nest"), full_covariance(pipe):
        pass
    with (
        pytest.raises(ValueError, match="by itself"),
        full_covariance(LanczosDDPMPipeline(tiny.unet(), DDPMScheduler())),
    ):
        pass


def test_distilled_networks_are_refused(tiny: SimpleNamespace) -> None:
    pipe = SimpleNamespace(transformer=tiny.flux(guidance_embeds=True), scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="guidance_embeds"), full_covariance(pipe):
        pass


def test_dropout_is_refused(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    pipe.unet = tiny.unet(dropout=0.5).train()
    with pytest.raises(ValueError, match="eval"), full_covariance(pipe):
        images(pipe)


def test_token_reduction_is_refused_in_either_order(tiny: SimpleNamespace) -> None:
    pipe = dit(tiny)
    pipe.transformer = wider_classes(pipe.transformer)
    reduction = apply_token_reduction(pipe)
    with (
        pytest.raises(ValueError, match=r"token reduction is on the transformer.*remove_token_reduction\(pipe\)"),
        full_covariance(pipe),
    ):
        pass
    remove_token_reduction(pipe)
    with full_covariance(pipe, num_lanczos_steps=1, generator=torch.Generator().manual_seed(0)):
        with pytest.raises(ValueError, match="full_covariance differentiates this model"):
            apply_token_reduction(pipe)
        assert not reduction.steps
        pipe(class_labels=[1], num_inference_steps=2, output_type="pt")


def test_nan_in_the_model_is_an_error(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or inf"), full_covariance(pipe):
        images(pipe)
