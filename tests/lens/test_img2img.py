"""Pictures as a start, and inpainting: what is kept is kept to the last bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wellposed.lens.editing import first_step, picture_size, read_pictures, renoised, repainted_channels
from wellposed.lens.latents import encode_images
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.presets import Size

Pipes = Callable[..., LensPipeline]
SIZE = Size(48, 80)
PROMPT = "a red lighthouse at dusk"


@pytest.fixture
def picture() -> Tensor:
    """In [0, 1], in steps of a byte."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (1, 3, *SIZE), generator=generator) / 255


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def tokens(pipe: LensPipeline, prompt: Any = PROMPT, **call: Any) -> Tensor:
    usual = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent", "return_dict": False}
    return pipe(prompt, **{"generator": seed(), **usual, **call})[0]


def encoded(pipe: LensPipeline, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return encode_images(pipe.vae, 2 * picture - 1)


# --- image to image


def test_strength_of_one_is_text_to_image_from_the_same_noise(pipes: Pipes, picture: Tensor) -> None:
    pipe = pipes()
    expected = tokens(pipe, height=48, width=80)
    assert torch.equal(tokens(pipe, image=picture, strength=1.0), expected)
    assert torch.equal(tokens(pipe, image=picture, strength=1, generator=None, latents=noise_of(expected)), expected)


def noise_of(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=seed())


@pytest.mark.parametrize(("strength", "taken"), [(0.25, 1), (0.5, 2), (0.74, 2), (0.75, 3), (None, 2)])
def test_a_share_of_the_steps_is_taken_from_the_noised_picture(
    pipes: Pipes, picture: Tensor, strength: float | None, taken: int
) -> None:
    pipe, inputs, times = pipes(), [], []
    hook = lambda _, args, kwargs: (inputs.append(args[0]), times.append(kwargs["timestep"]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(lambda *given: hook(*given) and None, with_kwargs=True)
    given = {} if strength is None else {"strength": strength}
    result = tokens(pipe, image=picture, guidance_scale=1.0, **given)
    assert len(inputs) == taken == pipe.num_timesteps
    sigma = pipe.scheduler.sigmas[4 - taken]
    assert 0 < sigma < 1
    torch.testing.assert_close(times[0], sigma[None])
    clean = encoded(pipe, picture)
    torch.testing.assert_close(inputs[0], (1 - sigma) * clean + sigma * noise_of(result))


def test_small_strength_keeps_the_picture(pipes: Pipes, picture: Tensor) -> None:
    pipe = pipes()
    clean = encoded(pipe, picture)
    distances = [
        (
            tokens(pipe, image=picture, strength=s, num_inference_steps=10, sigmas=[1 - i / 10 for i in range(10)])
            - clean
        )
        .square()
        .mean()
        .item()
        for s in (0.1, 0.5, 1.0)
    ]
    assert distances == sorted(distances) and distances[0] < 0.7 * distances[-1]


def test_each_prompt_may_have_its_picture(pipes: Pipes, picture: Tensor) -> None:
    pipe = pipes()
    pictures = torch.cat([picture, 1 - picture])
    together = tokens(pipe, [PROMPT, ""], image=pictures, generator=[seed(0), seed(1)])
    alone = tokens(pipe, "", image=pictures[1:], generator=seed(1))
    torch.testing.assert_close(alone, together[1:], rtol=1e-4, atol=1e-4)
    repeated = tokens(
        pipe, [PROMPT, ""], image=pictures, num_images_per_prompt=2, generator=[seed(n) for n in (0, 5, 1, 6)]
    )
    torch.testing.assert_close(repeated[[0, 2]], together, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got 3 of image for 2 prompts"):
        tokens(pipe, [PROMPT, ""], image=[picture] * 3)


def test_the_size_is_the_pictures(pipes: Pipes) -> None:
    pipe = pipes()
    call = {"num_inference_steps": 1, "strength": 1, "guidance_scale": 1.0}
    odd = Image.new("RGBA", (75, 51), (255, 0, 0, 9))
    assert pipe(PROMPT, image=odd, **call).images[0].size == (80, 48)
    assert pipe(PROMPT, image=odd, height=32, width=64, **call).images[0].size == (64, 32)
    with pytest.raises(ValueError, match="Arrays and tensors are not resized"):
        pipe(PROMPT, image=torch.zeros(3, 50, 80), **call)


@pytest.mark.parametrize(
    ("strength", "steps", "first"),
    [(1, 4, 0), (1.0, 50, 0), (0.58, 50, 21), (0.35, 20, 13), (0.3, 4, 3), (0.05, 20, 19)],
)
def test_first_step(strength: float, steps: int, first: int) -> None:
    assert first_step(strength, steps) == first


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, 0.24, float("nan")])
def test_strengths_that_are_none(strength: float) -> None:
    with pytest.raises(ValueError, match=r"give a share of at least 0.25, one step, and at most 1"):
        first_step(strength, 4)


# --- inpainting


@pytest.fixture
def mask() -> Tensor:
    """A patch that starts and ends within tokens."""
    found = torch.zeros(SIZE)
    found[20:37, 9:50] = 1
    return found


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_kept_is_the_autoencoding_to_the_last_bit(
    pipes: Pipes, picture: Tensor, mask: Tensor, strength: float
) -> None:
    pipe = pipes()
    clean = encoded(pipe, picture)
    painted = repainted_channels(mask[None, None], 4)
    result = tokens(pipe, image=picture, mask_image=mask, strength=strength)
    assert torch.equal(result[~painted], clean[~painted])
    assert (result[painted] - clean[painted]).abs().min() > 0
    assert 0 < painted.float().mean() < 0.6


def test_on_the_way_what_is_kept_is_on_the_line_from_picture_to_noise(
    pipes: Pipes, picture: Tensor, mask: Tensor
) -> None:
    pipe, seen = pipes(), []
    watch = lambda pipe, step, t, tensors: seen.append(tensors["latents"].clone()) or tensors  # noqa: E731
    result = tokens(pipe, image=picture, mask_image=mask, callback_on_step_end=watch)
    clean, noise = encoded(pipe, picture), noise_of(result)
    kept = ~repainted_channels(mask[None, None], 4)
    for latents, sigma in zip(seen, pipe.scheduler.sigmas[1:], strict=True):
        assert torch.equal(latents[kept], renoised(clean, noise, sigma)[kept])


def test_masks_of_all_and_of_nothing(pipes: Pipes, picture: Tensor) -> None:
    pipe = pipes()
    everything = tokens(pipe, image=picture, mask_image=torch.ones(SIZE))
    assert torch.equal(everything, tokens(pipe, height=48, width=80))
    half = tokens(pipe, image=picture, mask_image=torch.ones(SIZE), strength=0.5)
    assert torch.equal(half, tokens(pipe, image=picture, strength=0.5))
    nothing = tokens(pipe, image=picture, mask_image=torch.zeros(SIZE))
    assert torch.equal(nothing, encoded(pipe, picture))


def test_the_inside_knows_the_outside(pipes: Pipes, picture: Tensor, mask: Tensor) -> None:
    pipe = pipes()
    painted = repainted_channels(mask[None, None], 4)
    results = [tokens(pipe, image=one, mask_image=mask)[painted] for one in (picture, 1 - picture)]
    assert (results[0] - results[1]).abs().max() > 1e-2


def test_pictures_of_pixels_out_are_as_the_tokens_say(pipes: Pipes, picture: Tensor, mask: Tensor) -> None:
    pipe = pipes()
    nothing = tokens(pipe, image=picture, mask_image=0 * mask, output_type="pt")
    with torch.no_grad():
        around = pipe.vae.decode(pipe.vae.encode(2 * picture - 1).latent_dist.mode()).sample
    torch.testing.assert_close(nothing, (around.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-5)


def test_a_single_pixel_paints_its_latent_position_anew() -> None:
    """Row 1, column 2 of 6 x 10 positions: token (0, 1), lower left, in every channel."""
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 15, 16] = 0.5
    painted = repainted_channels(mask, 4)
    assert painted.shape == (1, 15, 16)
    assert painted.nonzero().tolist() == [[0, 1, 4 * channel + 2] for channel in range(4)]
    assert not repainted_channels(0.99 * mask, 4).any()


def test_renoising_is_exact_at_the_ends(picture: Tensor) -> None:
    clean, noise = picture[0], noise_of(picture[0])
    assert torch.equal(renoised(clean, noise, torch.tensor(0.0)), clean)
    assert torch.equal(renoised(clean, noise, torch.tensor(1.0)), noise)


# --- reading


def test_all_ways_of_giving_a_picture_are_one(picture: Tensor) -> None:
    data = (255 * picture[0]).round().byte()
    array = data.permute(1, 2, 0).numpy()
    ways = [
        picture,
        picture[0],
        data,
        array,
        array[None],
        array.astype(np.float32) / 255,
        Image.fromarray(array),
        [Image.fromarray(array)],
        (data[None],),
    ]
    for way in ways:
        assert picture_size(way) == SIZE
        torch.testing.assert_close(read_pictures(way, SIZE), picture, rtol=0, atol=1e-7)
    assert read_pictures([array, data], SIZE).shape == (2, 3, *SIZE)


def test_all_ways_of_giving_a_mask_are_one(mask: Tensor) -> None:
    data = (255 * mask).byte().numpy()
    ways = [mask, mask[None], mask[None, None], mask.bool(), data, data[..., None], data[None, ..., None], mask.numpy()]
    for way in [*ways, Image.fromarray(data), Image.fromarray(data).convert("RGB"), [Image.fromarray(data)]]:
        assert torch.equal(read_pictures(way, SIZE, "L"), mask[None, None])
    assert read_pictures(torch.stack([mask, mask]), SIZE, "L").shape == (2, 1, *SIZE)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ("photo.jpg", "a picture is str; give PIL pictures"),
        ([], "a picture is an empty list"),
        (torch.zeros(1, *SIZE), "3 channels of 48 x 80 pixels were expected"),
        (torch.full((3, *SIZE), -1.0), r"span \[-1, -1\]; give bytes"),
        (torch.full((3, *SIZE), 255.0), r"span \[255, 255\]"),
        (torch.full((3, *SIZE), float("nan")), "span"),
    ],
)
def test_what_is_no_picture(pictures: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pictures(pictures, SIZE)
