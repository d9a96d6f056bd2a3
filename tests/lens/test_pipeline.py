"""LensPipeline from end to end, on a tiny GPT-OSS, a tiny FLUX.2 autoencoder and a tiny Lens: text to image."""

import gc
import inspect
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import GptOssForCausalLM

from wellposed.lens.guidance import guided_velocity
from wellposed.lens.latents import decode_tokens
from wellposed.lens.pipeline import LensPipeline, published_as_loadable
from wellposed.lens.scheduler import LensFlowMatchScheduler
from wellposed.lens.template import PUBLISHED_TEMPLATE
from wellposed.lens.text_encoder import encode_prompts
from wellposed.lens.transformer import LensTransformer2DModel

Pipes = Callable[..., LensPipeline]
TOGETHER = {"rtol": 1e-4, "atol": 1e-4}  # a batch multiplies other shapes
FIRST = "a red lighthouse at dusk"
SECOND = "夕暮れの赤い灯台、黒い岩に砕ける波"


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def tokens(pipe: LensPipeline, prompt: Any = FIRST, **call: Any) -> Tensor:
    small = {"height": 48, "width": 80, "num_inference_steps": 3, "output_type": "latent", "return_dict": False}
    number = 1 if isinstance(prompt, str) else len(prompt or call.get("prompt_embeds", [0]))
    generators = {"generator": seeds(*range(number * call.get("num_images_per_prompt", 1)))}
    return pipe(prompt, **{**small, **generators, **call})[0]


# --- the loop


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_call_is_the_written_out_loop(pipes: Pipes, scale: float, steps: int) -> None:
    """Encode, draw, Euler steps, guidance against no text."""
    pipe = pipes()
    drawn = torch.randn(1, 15, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        text = encode_prompts(pipe.text_encoder, pipe.tokenizer, [FIRST], taps=(0, 1, 2, 3))
        levels = LensFlowMatchScheduler()
        levels.set_timesteps(steps, num_tokens=15)
        x = drawn
        for t, dt in zip(levels.timesteps, levels.sigmas.diff(), strict=True):
            time = {"timestep": t[None] / 1000, "img_shapes": [(1, 3, 5)]}
            velocity = pipe.transformer(x, text.layers, text.mask, **time).sample
            if scale != 1:
                velocity = guided_velocity(velocity, pipe.transformer(x, None, **time).sample, scale)
            x = x + dt * velocity
    found = tokens(pipe, guidance_scale=scale, num_inference_steps=steps, generator=seeds(7))
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)
    again = tokens(pipe, guidance_scale=scale, num_inference_steps=steps, latents=drawn)
    assert torch.equal(again, found)


def test_guidance_of_one_never_runs_the_network_without_text(pipes: Pipes) -> None:
    pipe, lengths = pipes(), []
    pipe.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[1][0].shape[1]))
    plain = tokens(pipe, guidance_scale=1.0)
    assert len(lengths) == 3 and 0 not in lengths
    assert torch.equal(tokens(pipe, guidance_scale=1, negative_prompt="rain"), plain)
    lengths.clear()
    guided = tokens(pipe, guidance_scale=3.0)
    assert lengths == [lengths[0], 0] * 3
    assert (guided - plain).abs().max() > 1e-2


def test_blank_negative_prompts_are_text_that_is_masked(pipes: Pipes) -> None:
    """The published pipeline passes zeros under a mask; no tokens at all is the same and cheaper."""
    pipe = pipes()
    cheap = tokens(pipe, guidance_scale=4.0)
    for blank in ("", "  \n", ["\t"]):
        assert torch.equal(tokens(pipe, guidance_scale=4.0, negative_prompt=blank), cheap)
    embeds, mask, none, _ = pipe.encode_prompt(FIRST)
    assert none is not None and none.shape == (1, 4, 0, 64)
    masked = {"negative_prompt_embeds": torch.full_like(embeds, 9.0), "negative_prompt_embeds_mask": mask & False}
    torch.testing.assert_close(tokens(pipe, guidance_scale=4.0, **masked), cheap, **TOGETHER)
    empty = encode_prompts(pipe.text_encoder, pipe.tokenizer, [""], taps=(0, 1, 2, 3))
    encoded = tokens(pipe, guidance_scale=4.0, negative_prompt_embeds=empty.hidden_states)
    assert (encoded - cheap).abs().max() > 1e-2  # an empty prompt is not no text


def test_one_negative_prompt_with_text_makes_all_encoded(pipes: Pipes) -> None:
    pipe = pipes()
    negative = pipe.encode_prompt([FIRST, SECOND], ["", "rain"])
    expected = encode_prompts(pipe.text_encoder, pipe.tokenizer, ["", "rain"], taps=(0, 1, 2, 3))
    assert torch.equal(negative[2], expected.hidden_states) and torch.equal(negative[3], expected.mask)
    together = tokens(pipe, [FIRST, SECOND], negative_prompt=["", "rain"], guidance_scale=4.0)
    alone = tokens(pipe, SECOND, negative_prompt="rain", guidance_scale=4.0, generator=seeds(1))
    torch.testing.assert_close(alone, together[1:], **TOGETHER)
    shared = tokens(pipe, [FIRST, SECOND], negative_prompt="rain", guidance_scale=4.0)
    torch.testing.assert_close(shared[1:], together[1:], **TOGETHER)
    assert (shared[0] - together[0]).abs().max() > 1e-3


def test_an_image_of_a_batch_can_be_made_alone(pipes: Pipes) -> None:
    pipe = pipes()
    together = tokens(pipe, [FIRST, SECOND, ""], guidance_scale=4.0)
    for index, prompt in enumerate((FIRST, SECOND, "")):
        alone = tokens(pipe, prompt, guidance_scale=4.0, generator=seeds(index))
        torch.testing.assert_close(alone, together[index : index + 1], **TOGETHER)
    several = tokens(pipe, [FIRST, SECOND], num_images_per_prompt=2, guidance_scale=4.0, generator=seeds(0, 5, 6, 1))
    torch.testing.assert_close(several[[0, 3]], together[:2], **TOGETHER)
    assert (several[0] - several[1]).abs().max() > 0.1
    assert torch.equal(tokens(pipe, (FIRST,)), tokens(pipe, FIRST))


def test_padding_of_the_text_changes_nothing(pipes: Pipes) -> None:
    pipe, lengths = pipes(), []
    plain = tokens(pipe)
    pipe.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[1][0].shape[1]))
    torch.testing.assert_close(tokens(pipe, pad_to_multiple_of=16), plain, **TOGETHER)
    assert {length % 16 for length in lengths} == {0}


@pytest.mark.parametrize(("release", "calls", "scale"), [("base", 100, 5.0), ("rl", 40, 5.0), ("turbo", 4, 1.0)])
def test_releases_know_their_settings(pipes: Pipes, build_lens: Any, release: str, calls: int, scale: float) -> None:
    pipe, times = pipes(release=release, transformer=build_lens(num_layers=1)), []
    pipe.transformer.register_forward_pre_hook(lambda *_: times.append(0))
    pipe(FIRST, height=16, width=16, output_type="latent")
    assert (len(times), pipe.guidance_scale) == (calls, scale)
    assert pipe.num_timesteps == (calls if scale == 1 else calls // 2)


def test_levels_follow_size_steps_and_rule(pipes: Pipes, build_lens: Any) -> None:
    pipe = pipes(transformer=build_lens(num_layers=1))

    def stop(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = True
        return tensors

    found = {}
    for rule in (None, "smooth"):  # 4680 tokens, beyond the cliff
        size = {"height": 1040, "width": 1152, "guidance_scale": 1.0, "mu_rule": rule}
        tokens(pipe, **size, num_inference_steps=2, callback_on_step_end=stop)
        found[rule] = pipe.scheduler.sigmas[1].item()
    assert found[None] == pytest.approx(np.e**1.24885 / (np.e**1.24885 + 1), abs=1e-5)
    assert found["smooth"] > found[None] + 0.1
    tokens(pipe, sigmas=[1.0, 0.3], num_inference_steps=9)
    assert pipe.num_timesteps == 2


# --- what comes out


def test_every_output_type_says_the_same(pipes: Pipes) -> None:
    pipe = pipes()
    code = tokens(pipe)
    with torch.no_grad():
        images = (decode_tokens(pipe.vae, code, 3, 5).clamp(-1, 1) + 1) / 2
    pt, array = (tokens(pipe, output_type=kind) for kind in ("pt", "np"))
    assert pt.shape == (1, 3, 48, 80)
    torch.testing.assert_close(pt, images, rtol=0, atol=1e-6)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    call = {"height": 48, "width": 80, "num_inference_steps": 3, "generator": seeds(0)}
    pil = pipe(FIRST, **call)
    assert pil.prompts == [FIRST]
    assert np.array_equal(np.asarray(pil.images[0]), (array[0] * 255).round())


def test_published_bytes_are_cut_off(pipes: Pipes) -> None:
    pipe = pipes()
    as_published: Any = tokens(pipe, output_type="pil", as_published=True)
    code = tokens(pipe, as_published=True)
    with torch.no_grad():
        levels = (decode_tokens(pipe.vae, code, 3, 5).clamp(-1, 1) + 1) * 127.5
    assert np.array_equal(np.asarray(as_published[0]), levels[0].permute(1, 2, 0).numpy().astype(np.uint8))


def test_as_published_works_in_the_networks_precision(pipes: Pipes) -> None:
    """Noise drawn in bfloat16, times and latents rounded to it; otherwise noise and latents are float32."""
    pipe, given = pipes(), {}
    pipe.transformer.to(torch.bfloat16)
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    noise = {
        dtype: torch.randn(1, 15, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    ours = tokens(pipe, guidance_scale=4.0)
    assert ours.dtype == torch.float32 and given["round_timestep"] is False
    assert torch.equal(tokens(pipe, guidance_scale=4.0, latents=noise[torch.float32]), ours)
    published = tokens(pipe, guidance_scale=4.0, as_published=True)
    assert published.dtype == torch.bfloat16 and given["round_timestep"] is True
    assert torch.equal(tokens(pipe, guidance_scale=4.0, as_published=True, latents=noise[torch.bfloat16]), published)


# --- callbacks


def test_callbacks_see_and_change_tensors(pipes: Pipes) -> None:
    pipe, seen = pipes(), []

    def watch(pipe: LensPipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        seen.append((step, float(t), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    call = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": names, "guidance_scale": 2.0}
    changed = tokens(pipe, **call)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert all(found == sorted(names) for _, _, found in seen)
    assert torch.equal(tokens(pipe, **call, generator=seeds(9)), changed)  # step 1 forgot the noise
    with pytest.raises(ValueError, match="can be latents, prompt_embeds, negative_prompt_embeds; got also velocity"):
        tokens(pipe, callback_on_step_end_tensor_inputs=["velocity"])


def test_features_can_be_changed_on_the_way(pipes: Pipes) -> None:
    pipe = pipes()
    to_zero = lambda pipe, step, t, tensors: {"prompt_embeds": tensors["prompt_embeds"] * 0}  # noqa: E731
    changed = tokens(pipe, callback_on_step_end=to_zero, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert (changed - tokens(pipe)).abs().max() > 1e-3


def test_interrupt_and_an_early_end_of_guidance(pipes: Pipes) -> None:
    pipe, lengths = pipes(), []
    pipe.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[1][0].shape[1]))

    def stop(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step == 1
        return tensors

    def unguide(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 1.0
        return tensors

    tokens(pipe, guidance_scale=1.0, num_inference_steps=5, callback_on_step_end=stop)
    assert len(lengths) == 2
    lengths.clear()
    tokens(pipe, guidance_scale=1.0, num_inference_steps=5)
    assert len(lengths) == 5
    lengths.clear()
    tokens(pipe, guidance_scale=3.0, callback_on_step_end=unguide)
    assert [length == 0 for length in lengths] == [False, True, False, False]


# --- text


def test_features_replace_prompts(pipes: Pipes) -> None:
    pipe = pipes()
    expected = tokens(pipe, [FIRST, SECOND], negative_prompt="rain", guidance_scale=3.0)
    names = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
    for name, part in list(pipe.components.items()):  # only text is needed to encode
        if name in ("vae", "transformer"):
            setattr(pipe, name, None)
        else:
            assert part is not None
    features = dict(zip(names, pipe.encode_prompt([FIRST, SECOND], "rain"), strict=True))
    pipe = pipes(text_encoder=None, tokenizer=None)
    assert torch.equal(tokens(pipe, None, **features, guidance_scale=3.0), expected)
    one = {name: value[:1] for name, value in features.items()}
    both = tokens(pipe, None, **one, num_images_per_prompt=2, guidance_scale=3.0)
    torch.testing.assert_close(both[:1], expected[:1], **TOGETHER)
    with pytest.raises(ValueError, match="no text encoder or no tokenizer to read negative_prompt"):
        tokens(pipe, None, prompt_embeds=features["prompt_embeds"], negative_prompt="rain", guidance_scale=3.0)


def test_encode_prompt_is_written_as_tools_expect() -> None:
    source = inspect.getsource(inspect.unwrap(LensPipeline.encode_prompt))
    assert source.count("def ") == source.count("return ") == 1
    assert "return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask" in source


def test_encode_then_free_lets_go_of_the_encoder(pipes: Pipes) -> None:
    pipe = pipes()
    expected = tokens(pipe, negative_prompt="rain", guidance_scale=3.0)
    encoder = weakref.ref(pipe.text_encoder)
    features = pipe.encode_then_free(FIRST, "rain")
    gc.collect()
    assert pipe.text_encoder is None and encoder() is None
    assert torch.equal(tokens(pipe, None, **features, guidance_scale=3.0), expected)
    free = pipes().encode_then_free(FIRST, do_classifier_free_guidance=False)
    assert sorted(free) == ["prompt_embeds", "prompt_embeds_mask"]


def test_the_template_is_an_argument_and_names_what_it_cuts(pipes: Pipes) -> None:
    pipe = pipes()
    plain = tokens(pipe)
    later = tokens(pipe, template=replace(PUBLISHED_TEMPLATE, date="2027-01-01"))
    assert (later - plain).abs().max() > 1e-4
    with pytest.warns(UserWarning, match="cut off and not seen by the model: 'ea sea sea"):
        tokens(pipe, "sea " * 200)


def test_a_reasoner_rewrites_prompts_and_may_fail(pipes: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipes()
    call = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}

    def reasoner(prompt: str) -> str:
        if prompt == SECOND:
            raise OSError("gone")
        return f'"{prompt}, waves"'

    out = pipe([FIRST, SECOND], **call, reasoner=reasoner, generator=seeds(0, 1))
    assert out.prompts == [f"{FIRST}, waves", SECOND]
    assert "the reasoner failed" in caplog.text
    assert torch.equal(out.images, pipe([f"{FIRST}, waves", SECOND], **call, generator=seeds(0, 1)).images)


# --- saving, loading, moving


def test_published_folders_load(pipes: Pipes, tmp_path: Path) -> None:
    """Their index names a class that no library has, ours in diffusers, and the stock scheduler."""
    pipe = pipes()
    expected = tokens(pipe)
    pipe.save_pretrained(tmp_path)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "scheduler")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "text_encoder": ["transformers", "LensGptOssEncoder"],
        "transformer": ["diffusers", "LensTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    del index["release"], index["selected_layer_index"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    again = LensPipeline.from_pretrained(tmp_path, release="turbo")
    again.set_progress_bar_config(disable=True)
    assert type(again.text_encoder) is GptOssForCausalLM
    assert type(again.transformer) is LensTransformer2DModel
    assert type(again.scheduler) is LensFlowMatchScheduler and again.scheduler.config["use_dynamic_shifting"]
    assert again.config["release"] == "turbo" and again.config["selected_layer_index"] == [0, 1, 2, 3]
    assert torch.equal(tokens(again, guidance_scale=5.0), expected)
    bare = LensPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert bare.text_encoder is None
    assert published_as_loadable({"_class_name": "LensPipeline", "vae": ["diffusers", "X"]})["vae"] == [
        "diffusers",
        "X",
    ]


def test_dtypes(pipes: Pipes, tmp_path: Path) -> None:
    pipes().save_pretrained(tmp_path)
    pipe: Any = LensPipeline.from_pretrained(tmp_path, dtype={"default": torch.bfloat16, "vae": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.bn.running_mean.dtype == torch.float32
    assert tokens(pipe, output_type="pt").isfinite().all()
    with pytest.raises(ValueError, match="float16"):
        LensPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    features = pipe.encode_then_free(FIRST)
    pipe.transformer.to(torch.float16)
    with pytest.raises(ValueError, match=r"load it with dtype=torch.bfloat16"):
        tokens(pipe, None, **features)


def test_it_works_through_diffusers_attention_caches_and_offloading(pipes: Pipes) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = pipes()
    expected = tokens(pipe, guidance_scale=3.0)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(tokens(pipe, guidance_scale=3.0), expected, **TOGETHER)
    pipe.transformer.disable_cache()
    assert pipe.model_cpu_offload_seq == "text_encoder->transformer->vae"
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", exclude_modules=["text_encoder"]
    )
    assert torch.equal(tokens(pipe, guidance_scale=3.0), expected)


# --- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": []}, r"prompt is \[\]; give a string"),
        ({"prompt": None}, "give prompt or prompt_embeds, and not both"),
        ({"prompt_embeds": torch.zeros(1, 4, 2, 64)}, "give prompt or prompt_embeds, and not both"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 2, 64)}, r"expected \(prompts, taps, length, width\)"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 2.0}, "got 2 of negative_prompt for 1 prompts"),
        ({"negative_prompt": ["", ""], "guidance_scale": 2.0}, "got 2 of negative_prompt for 1 prompts"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 4, 2, 64), "guidance_scale": 2.0},
            "got negative_prompt and negative_prompt_embeds",
        ),
        ({"height": 50}, "Nearest: height=48, width=80"),
        ({"aspect_ratio": "1:1"}, "got aspect_ratio and height or width"),
        ({"aspect_ratio": "5:7", "height": None, "width": None}, "there is no preset '5:7'"),
        ({"generator": seeds(1, 2)}, "got 2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 16, 3, 5)}, "expected .*noise of the packed tokens"),
        ({"num_images_per_prompt": 0, "generator": None}, "num_images_per_prompt is 0"),
        ({"num_inference_steps": 0}, "num_steps 0; give at least 1"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"strength": 0.5}, "give image too"),
        ({"mask_image": torch.ones(48, 80)}, "give image too"),
    ],
)
def test_refusals(pipes: Pipes, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(pipes(), **{"prompt": FIRST, **call})


def test_an_unknown_release_is_refused(pipes: Pipes, tiny_vae: AutoencoderKLFlux2) -> None:
    with pytest.raises(ValueError, match="write one of 'base', 'rl', 'turbo'"):
        pipes(release="Lens-Turbo")
