"""DecQPipeline: guidance, seeds, latents in and out, queries discarded, what is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderRAE, FirstBlockCacheConfig
from torch import Tensor

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.pipeline import DecQPipeline
from wellposed.decq.scheduler import ShiftedFlowScheduler
from wellposed.decq.transformer import DecQTransformer2DModel

BuildVae = Callable[..., AutoencoderDecQ]
BuildGenerator = Callable[..., DecQTransformer2DModel]
Pipes = Callable[..., DecQPipeline]
CHANNELS: dict[str, Any] = {"num_queries": None, "query_fusion": "channels", "query_bottleneck_dim": 6}
NAMES = {0: "lamp", 3: "boat"}


@pytest.fixture
def pipes(build: BuildVae, build_generator: BuildGenerator) -> Pipes:
    def pipeline(
        *, num_queries: int = 3, guide: bool = False, solver: dict[str, Any] | None = None, **parts: Any
    ) -> Any:
        vae = build(num_queries=num_queries)
        queries = (torch.full((1,), 0.3), torch.full((1,), 1.5)) if num_queries else ()
        vae.set_latent_statistics(torch.full((1,), -0.2), torch.full((1,), 0.7), *queries)
        sizes = {"in_channels": 64, "num_queries": num_queries}
        worse = build_generator(**sizes, num_layers=1) if guide else None
        scheduler = ShiftedFlowScheduler(**{"shift": 2.0, **(solver or {})})
        pipe = DecQPipeline(vae, build_generator(**sizes), scheduler, guide=worse, id2label=NAMES, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipeline


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def latents(pipe: DecQPipeline, *labels: int, **call: Any) -> Tensor:
    """All tokens of generated latents."""
    generator = {"generator": seeds(*range(len(labels)))} if "generator" not in call else {}
    given = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False, **generator, **call}
    return pipe.vae.pack(*pipe(list(labels), **given))


# --- what comes out


def test_every_output_type_says_the_same(pipes: Pipes) -> None:
    pipe = pipes()
    outputs = {
        kind: pipe([1, 3], num_inference_steps=4, generator=seeds(0, 1), output_type=kind)
        for kind in ("pt", "np", "pil", "latent")
    }
    images = outputs["pt"].images
    assert images.shape == (2, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    assert np.array_equal(outputs["np"].images, images.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in outputs["pil"].images] == [(64, 64)] * 2
    assert np.abs(np.stack(outputs["pil"].images) / 255 - outputs["np"].images).max() < 1 / 255
    code = outputs["latent"]
    assert outputs["pt"].query_latents is None
    with torch.no_grad():
        assert torch.equal(pipe.vae.decode(code.images, code.query_latents).sample.clamp(0, 1), images)
    as_tuple = pipe([1, 3], num_inference_steps=4, generator=seeds(0, 1), output_type="pt", return_dict=False)
    assert len(as_tuple) == 1 and torch.equal(as_tuple[0], images)


def test_an_image_of_a_batch_can_be_made_alone(pipes: Pipes) -> None:
    pipe = pipes(guide=True)
    together = latents(pipe, 1, 3, 0, guidance_scale=2.0)
    for index, label in enumerate((1, 3, 0)):
        alone = latents(pipe, label, guidance_scale=2.0, generator=seeds(index))
        torch.testing.assert_close(alone, together[index : index + 1], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_images_of_a_class_stand_together(pipes: Pipes) -> None:
    pipe = pipes()
    expected = latents(pipe, 3, 3, 0, 0)
    repeated = latents(pipe, 3, 0, num_images_per_class=2, generator=seeds(0, 1, 2, 3))
    named = pipe(["boat", np.int64(0)], 2, 4, generator=seeds(0, 1, 2, 3), output_type="latent", return_dict=False)
    assert torch.equal(repeated, expected)
    assert torch.equal(pipe.vae.pack(*named), expected)
    assert torch.equal(latents(pipe, 3, generator=seeds(0)), latents(pipe, 3))
    assert torch.equal(latents(pipe, *torch.tensor([3, 0])), latents(pipe, 3, 0))
    single = pipe("boat", num_inference_steps=4, generator=seeds(0), output_type="latent", return_dict=False)
    assert torch.equal(pipe.vae.pack(*single), latents(pipe, 3))


def test_noise_can_be_given(pipes: Pipes) -> None:
    pipe = pipes()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator) for shape in ((1, 64, 4, 4), (1, 3, 64))]
    drawn = latents(pipe, 2)
    assert torch.equal(latents(pipe, 2, latents=noise[0], query_latents=noise[1]), drawn)
    assert torch.equal(latents(pipe, 2, latents=noise[0], generator=None, query_latents=noise[1]), drawn)


def test_without_queries(pipes: Pipes) -> None:
    pipe = pipes(num_queries=0)
    output = pipe([1], num_inference_steps=4, generator=seeds(0), output_type="latent")
    assert output.query_latents is None
    images = pipe([1], num_inference_steps=4, generator=seeds(0), output_type="pt").images
    with torch.no_grad():
        assert torch.equal(pipe.vae.decode(output.images).sample.clamp(0, 1), images)


# --- steps


@pytest.mark.parametrize(
    ("solver", "points", "evaluations"),
    [
        ({}, 50, 49),
        ({"grid": "steps"}, 10, 10),
        ({"solver": "heun"}, 10, 18),
        ({"solver": "heun", "grid": "steps"}, 7, 14),
    ],
)
def test_what_a_number_of_steps_means(pipes: Pipes, solver: dict[str, Any], points: int, evaluations: int) -> None:
    pipe, times, steps = pipes(solver=solver), [], []
    pipe.transformer.register_forward_pre_hook(lambda _, args: times.append(float(args[1][0])))
    latents(pipe, 0, num_inference_steps=points, callback_on_step_end=lambda _, i, *__: steps.append(i))
    assert len(times) == evaluations == pipe.num_timesteps
    assert times[0] == 1.0 and sorted(times, reverse=True) == times
    assert steps == list(range(evaluations // pipe.scheduler.order))


def test_an_exact_velocity_brings_data_but_for_the_last_trace_of_noise(pipes: Pipes) -> None:
    pipe = pipes(solver={"shift": 6.9282})
    generator = torch.Generator().manual_seed(5)
    z, noise = (torch.randn(1, 19, 64, generator=generator) for _ in range(2))
    velocity = pipe.vae.unpack(noise - z)
    pipe.transformer.forward = lambda *_, **__: velocity
    start = dict(zip(("latents", "query_latents"), pipe.vae.unpack(noise), strict=True))
    last = latents(pipe, 0, num_inference_steps=50, **start)
    torch.testing.assert_close(last, (1 - 0.00689) * z + 0.00689 * noise, rtol=0, atol=1e-4)
    pipe.scheduler = ShiftedFlowScheduler(shift=6.9282, grid="steps")
    torch.testing.assert_close(latents(pipe, 0, num_inference_steps=50, **start), z, rtol=0, atol=1e-5)


# --- guidance


@pytest.mark.parametrize("guide", [False, True])
def test_scale_one_is_no_guidance(pipes: Pipes, guide: bool) -> None:
    plain, guided = pipes(), pipes(guide=guide)
    assert torch.equal(latents(guided, 1, 3, guidance_scale=1.0), latents(plain, 1, 3))
    assert (latents(guided, 1, 3, guidance_scale=1.5) - latents(plain, 1, 3)).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1.6, 7.5])
def test_a_guide_that_is_the_generator_changes_nothing(pipes: Pipes, scale: float) -> None:
    pipe = pipes()
    plain = latents(pipe, 1, 3)
    pipe.register_modules(guide=pipe.transformer)
    assert torch.equal(latents(pipe, 1, 3, guidance_scale=scale), plain)


@pytest.mark.parametrize("guide", [False, True])
def test_a_step_is_affine_in_the_scale(pipes: Pipes, guide: bool) -> None:
    pipe = pipes(guide=guide)
    none, one, three = (latents(pipe, 1, 3, guidance_scale=w, num_inference_steps=2) for w in (0.0, 1.0, 3.0))
    torch.testing.assert_close(three - none, 3 * (one - none), rtol=1e-3, atol=1e-3)
    # Zero is the worse one alone.
    network = pipe.guide if guide else pipe.transformer
    labels = [1, 3] if guide else [pipe.transformer.null_class] * 2
    pipe.register_modules(transformer=network, guide=None)
    pipe._labels = lambda *_: torch.tensor(labels)
    torch.testing.assert_close(latents(pipe, 1, 3, num_inference_steps=2), none, rtol=1e-4, atol=1e-4)


def test_guidance_acts_within_its_interval(pipes: Pipes) -> None:
    pipe, times = pipes(guide=True), []
    pipe.guide.register_forward_pre_hook(lambda _, args: times.append(float(args[1][0])))
    plain = latents(pipe, 1)
    outside = latents(pipe, 1, guidance_scale=3.0, guidance_interval=(0.0, 1e-6))
    assert torch.equal(outside, plain) and not times
    latents(pipe, 1, guidance_scale=3.0, guidance_interval=(0.5, 0.9))
    expected = [float(t) for t in pipe.scheduler.timesteps if 0.5 <= t <= 0.9]
    assert times == expected and 0 < len(expected) < len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("guide", [False, True])
def test_caches_of_steps_know_their_batch(pipes: Pipes, guide: bool) -> None:
    """Without a guide a guided step has twice the images of one outside the interval."""
    pipe = pipes(guide=guide)
    call = {"guidance_scale": 2.0, "guidance_interval": (0.5, 0.9), "num_inference_steps": 6}
    exact = latents(pipe, 1, 3, **call)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    for _ in range(2):
        torch.testing.assert_close(latents(pipe, 1, 3, **call), exact, rtol=1e-4, atol=1e-4)


# --- callbacks


def test_callbacks_see_and_change_tensors(pipes: Pipes) -> None:
    pipe, seen = pipes(), []

    def set_to_zero(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, sorted(tensors), pipe.guidance_scale))
        return {name: torch.zeros_like(value) for name, value in tensors.items()} if step == 2 else {}

    wanted = ["latents", "query_latents"]
    call = {"callback_on_step_end": set_to_zero, "callback_on_step_end_tensor_inputs": wanted}
    last = latents(pipe, 1, 3, guidance_scale=1.5, **call)
    assert seen == [(step, wanted, 1.5) for step in range(3)]
    assert not last.any()
    only_queries = latents(pipe, 1, 3, **{**call, "callback_on_step_end_tensor_inputs": ["query_latents"]})
    assert only_queries[:, :16].any() and not only_queries[:, 16:].any()


def test_an_interrupted_call_stops_and_returns(pipes: Pipes) -> None:
    pipe, calls = pipes(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))

    def stop(pipe: Any, step: int, *_: Any) -> None:
        pipe._interrupt = step == 1

    assert latents(pipe, 1, num_inference_steps=9, callback_on_step_end=stop).shape == (1, 19, 64)
    assert len(calls) == 2 and pipe.interrupt
    latents(pipe, 1, num_inference_steps=9)
    assert len(calls) == 2 + 8 and not pipe.interrupt


# --- patches without their queries


def plain_rae(sizes: dict[str, Any], vae: AutoencoderDecQ) -> AutoencoderRAE:
    """Of the same encoder, with a decoder and statistics of its own."""
    generator = torch.Generator().manual_seed(9)
    statistics = {
        "latents_mean": torch.randn(64, 4, 4, generator=generator),
        "latents_std": torch.rand(64, 4, 4, generator=generator) + 0.5,
    }
    rae = AutoencoderRAE(**sizes, **statistics).eval()
    rae.encoder.load_state_dict(vae.encoder.state_dict())
    return rae


def test_patches_are_decoded_as_the_plain_rae_decodes_them(pipes: Pipes, sizes: dict[str, Any]) -> None:
    pipe = pipes()
    rae = plain_rae(sizes, pipe.vae)
    with_decoder = pipes(patch_decoder=rae)
    code = pipe([1, 3], num_inference_steps=4, generator=seeds(0, 1), output_type="latent")
    call = {"num_inference_steps": 4, "generator": seeds(0, 1), "output_type": "pt"}
    images = with_decoder([1, 3], discard_queries=True, **call).images
    with torch.no_grad():
        patches = pipe.vae.denormalize_patches(code.images)
        theirs = rae.decode((patches - rae._latents_mean) / (rae._latents_std + 1e-5)).sample
    torch.testing.assert_close(images, theirs.clamp(0, 1), rtol=0, atol=1e-5)
    kept = with_decoder([1, 3], **{**call, "generator": seeds(0, 1)}).images
    assert (kept - images).abs().max() > 1e-2
    with pytest.raises(ValueError, match="trained without queries"):
        pipe([1], discard_queries=True)


def test_both_decoders_mean_the_same_patches(pipes: Pipes, sizes: dict[str, Any], images: Tensor) -> None:
    """Encoded by the one, handed over, and decoded by the other: a reconstruction of the other."""
    pipe = pipes()
    rae = plain_rae(sizes, pipe.vae)
    pipe = pipes(patch_decoder=rae)
    with torch.no_grad():
        decoded = pipe._decoded(pipe.vae.encode(images).latent, None, discard_queries=True)
        torch.testing.assert_close(decoded, rae(images).sample, rtol=0, atol=1e-5)


def test_a_plain_rae_may_be_the_autoencoder(sizes: dict[str, Any], build_generator: BuildGenerator) -> None:
    rae = AutoencoderRAE(**sizes).eval()
    pipe = DecQPipeline(rae, build_generator(in_channels=64, num_queries=0), ShiftedFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    code, images = (
        pipe([1], num_inference_steps=3, generator=seeds(0), output_type=kind).images for kind in ("latent", "pt")
    )
    with torch.no_grad():
        assert torch.equal(rae.decode(code).sample.clamp(0, 1), images)


# --- queries as channels of the patches


def test_queries_that_are_channels_are_generated_with_the_patches(
    build: BuildVae, build_generator: BuildGenerator, sizes: dict[str, Any], tmp_path: Path
) -> None:
    vae = build(**CHANNELS)
    vae.set_latent_statistics(torch.full((70, 1, 1), 0.3), torch.full((1,), 1.5))
    generator = build_generator(in_channels=70, num_queries=0)
    pipe = DecQPipeline(vae, generator, ShiftedFlowScheduler(shift=2.0))
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "generator": seeds(0, 1)}
    code = pipe([1, 3], **call, output_type="latent")
    assert code.images.shape == (2, 70, 4, 4) and code.query_latents is None
    call["generator"] = seeds(0, 1)
    images = pipe([1, 3], **call, output_type="pt").images
    with torch.no_grad():
        assert torch.equal(vae.decode(code.images).sample.clamp(0, 1), images)
    pipe.save_pretrained(tmp_path)
    again = DecQPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call["generator"] = seeds(0, 1)
    torch.testing.assert_close(again([1, 3], **call, output_type="pt").images, images, rtol=0, atol=1e-5)
    for fields, message in (
        ({"in_channels": 64, "num_queries": 0}, "64 channels, the autoencoder 70"),
        ({"in_channels": 70, "num_queries": 16}, "16 queries, the autoencoder 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DecQPipeline(vae, build_generator(**fields), ShiftedFlowScheduler())
    with pytest.raises(ValueError, match="it has 64 channels, not 70"):
        DecQPipeline(vae, generator, ShiftedFlowScheduler(), patch_decoder=plain_rae(sizes, vae))


# --- saved, placed, in other formats


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_saved_and_loaded(
    pipes: Pipes, sizes: dict[str, Any], tmp_path: Path, whole: bool, low_cpu_mem_usage: bool
) -> None:
    extra = {"guide": True, "patch_decoder": plain_rae(sizes, pipes().vae)} if whole else {}
    pipe = pipes(solver={"solver": "heun"}, **extra)
    pipe.save_pretrained(tmp_path)
    again = DecQPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    again.set_progress_bar_config(disable=True)
    assert [part is None for part in again.components.values()] == [part is None for part in pipe.components.values()]
    for name in ("vae", "transformer", *(("guide", "patch_decoder") if whole else ())):
        weights, copies = (getattr(one, name).state_dict() for one in (pipe, again))
        assert all(torch.equal(copies[key], value) for key, value in weights.items())
    call = {"num_inference_steps": 3, "guidance_scale": 1.6, "output_type": "pt", "discard_queries": whole}
    images = [one("boat", generator=seeds(0), **call).images for one in (pipe, again)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_half_precision(pipes: Pipes) -> None:
    pipe = pipes(guide=True)
    call = {"num_inference_steps": 4, "guidance_scale": 1.5, "output_type": "np"}
    exact = pipe([1], generator=seeds(0), **call).images
    pipe.to(torch.bfloat16)
    near = pipe([1], generator=seeds(0), **call).images
    assert near.dtype == np.float32
    assert 0 < np.abs(near - exact).max() < 0.1


def test_hooks_of_offloading_run_before_encode_and_decode(pipes: Pipes, images: Tensor) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls: list[str] = []

    class Recording(ModelHook):
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.name)
            return args, kwargs

    pipe = pipes(guide=True)
    for name in ("vae", "transformer", "guide"):
        add_hook_to_module(getattr(pipe, name), Recording(name))
    pipe([1], num_inference_steps=2, guidance_scale=2.0, output_type="pt")
    assert calls == ["guide", "transformer", "vae"]
    pipe.vae.encode(images)
    assert calls[3:] == ["vae"]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_offloaded_from_a_gpu(pipes: Pipes, sizes: dict[str, Any], how: str) -> None:
    call = {"num_inference_steps": 4, "guidance_scale": 1.5, "output_type": "pt"}
    pipe = pipes(guide=True).to("cuda")
    exact = pipe([1, 3], generator=seeds(0, 1), **call).images.cpu()
    pipe.to("cpu")
    if how == "model":
        pipe.enable_model_cpu_offload()
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
    for _ in range(2):
        images = pipe([1, 3], generator=seeds(0, 1), **call).images.cpu()
        torch.testing.assert_close(images, exact, rtol=0, atol=1e-3)


# --- refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": 5}, "none of 0 to 4"),
        ({"class_labels": -1}, "none of 0 to 4"),
        ({"class_labels": torch.tensor([0.5])}, "none of 0 to 4"),
        ({"class_labels": "cat"}, "no class 'cat'.*lamp"),
        ({"class_labels": []}, "at least one"),
        ({"num_images_per_class": 0}, "at least 1"),
        ({"guidance_interval": (0.8, 0.2)}, "low <= high"),
        ({"guidance_interval": (0.0, 1.1)}, "low <= high"),
        ({"output_type": "jpeg"}, '"pil", "np"'),
        ({"latents": torch.zeros(1, 64, 5, 5)}, r"latents must have shape \(1, 64, 4, 4\)"),
        ({"query_latents": torch.zeros(1, 2, 64)}, r"query_latents must have shape \(1, 3, 64\)"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
        ({"num_inference_steps": 1}, "at least 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "got also noise"),
    ],
)
def test_bad_calls(pipes: Pipes, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipes()(**call)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"num_queries": 2}, "has 2 queries, the autoencoder 3"),
        ({"in_channels": 32}, "has 32 channels, the autoencoder 64"),
        ({"sample_size": 5}, "has 5 patches in a row, the autoencoder 4"),
    ],
)
@pytest.mark.parametrize("role", ["transformer", "guide"])
def test_networks_on_other_latents(
    build: BuildVae, build_generator: BuildGenerator, role: str, network: dict[str, Any], message: str
) -> None:
    fitting = {"in_channels": 64}
    networks = {"transformer": build_generator(**fitting)}
    networks[role] = build_generator(**{**fitting, **network})
    with pytest.raises(ValueError, match=f"the {role} {message}"):
        DecQPipeline(vae=build(), scheduler=ShiftedFlowScheduler(), **networks)


def test_a_guide_of_other_classes(build: BuildVae, build_generator: BuildGenerator) -> None:
    with pytest.raises(ValueError, match="knows 4 classes, the transformer 5"):
        DecQPipeline(
            build(),
            build_generator(in_channels=64),
            ShiftedFlowScheduler(),
            guide=build_generator(in_channels=64, num_classes=4),
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "3 queries, not 0"),
        ({"num_queries": 0, "encoder_input_size": 70}, "5 patches in a row, not 4"),
        ({"num_queries": 0, "num_summed_layers": 2}, "num_summed_layers 2, not 1"),
        ({"num_queries": 0, "encoder_type": "dinov2_plain"}, "encoder_type dinov2_plain, not dinov2"),
    ],
)
def test_decoders_of_other_patches(build: BuildVae, pipes: Pipes, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipes(patch_decoder=build(**fields))
