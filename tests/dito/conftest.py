"""Tiny real transformers of every supported family, a call of each, and pipelines around them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from wellposed.dito.matching import TokenCorrespondence, TokenWindows

ROWS, COLUMNS = 4, 6  # not square
TOKENS = ROWS * COLUMNS
TEXT = 5


@dataclass(frozen=True)
class Host:
    """A model of one family with random weights, and a call of it at a time of the generation in [0, 1], noise at 0."""

    name: str
    model: Any
    arguments: Callable[[float, int], dict[str, Any]]

    def __call__(self, progress: float = 0.0, *, batch: int = 2) -> Tensor:
        with torch.no_grad():
            output = self.model(**self.arguments(progress, batch), return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output

    def denoise(self, steps: int = 6, *, batch: int = 2) -> Tensor:
        """Outputs of a whole trajectory."""
        return torch.stack([self(i / steps, batch=batch) for i in range(steps)])


def _seeded(model: nn.Module) -> nn.Module:
    """Weights of a size at which every term of a block matters; initial ones have gates near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def _noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _drifting(progress: float, *shape: int) -> Tensor:
    """Inputs that change slowly over a generation, as a sampler's do."""
    return (1 - progress) * _noise(*shape, seed=1) + progress * _noise(*shape, seed=2)


def _ids() -> Tensor:
    return torch.cartesian_prod(torch.zeros(1), torch.arange(ROWS).float(), torch.arange(COLUMNS).float())


def flux() -> Host:
    """Two dual-stream, two single-stream blocks."""
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": _drifting(progress, batch, TOKENS, 4),
            "encoder_hidden_states": _noise(batch, TEXT, 8, seed=3),
            "pooled_projections": _noise(batch, 8, seed=4),
            "timestep": torch.full((batch,), 1 - progress),
            "img_ids": _ids(),
            "txt_ids": torch.zeros(TEXT, 3),
        }

    return Host("flux", _seeded(model), arguments)


def flux2() -> Host:
    """One dual-stream, two parallel single-stream blocks."""
    model = Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": _drifting(progress, batch, TOKENS, 4),
            "encoder_hidden_states": _noise(batch, TEXT, 8, seed=3),
            "timestep": torch.full((batch,), 1 - progress),
            "img_ids": torch.cat([_ids(), torch.zeros(TOKENS, 1)], 1),
            "txt_ids": torch.zeros(TEXT, 4),
        }

    return Host("flux2", _seeded(model), arguments)


def sd3() -> Host:
    """Three blocks, the first with a second attention; the last one drops the text."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": _drifting(progress, batch, 4, 2 * ROWS, 2 * COLUMNS),
            "encoder_hidden_states": _noise(batch, TEXT, 8, seed=3),
            "pooled_projections": _noise(batch, 8, seed=4),
            "timestep": torch.full((batch,), 1000 * (1 - progress)),
        }

    return Host("sd3", _seeded(model), arguments)


def pixart() -> Host:
    """Self-attention, then cross-attention."""
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=2 * COLUMNS,
        caption_channels=8,
        use_additional_conditions=False,
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": _drifting(progress, batch, 4, 2 * ROWS, 2 * COLUMNS),
            "encoder_hidden_states": _noise(batch, TEXT, 8, seed=3),
            "timestep": torch.full((batch,), 1000 * (1 - progress)),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return Host("pixart", _seeded(model), arguments)


def dit() -> Host:
    """Class-conditional blocks."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=2 * COLUMNS,
        num_embeds_ada_norm=1000,
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": _drifting(progress, batch, 4, 2 * COLUMNS, 2 * COLUMNS),
            "timestep": torch.full((batch,), int(999 * (1 - progress))),
            "class_labels": torch.arange(batch),
        }

    return Host("dit", _seeded(model), arguments)


def qwen() -> Host:
    """Dual-stream blocks with a rotary table for each stream and a text mask."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        mask = torch.ones(batch, TEXT, dtype=torch.bool)
        mask[-1, -2:] = False
        return {
            "hidden_states": _drifting(progress, batch, TOKENS, 4),
            "encoder_hidden_states": _noise(batch, TEXT, 8, seed=3),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.full((batch,), 1 - progress),
            "img_shapes": [[(1, ROWS, COLUMNS)]] * batch,
        }

    return Host("qwen", _seeded(model), arguments)


def z_image() -> Host:
    """Single-stream blocks; captions of different lengths, so that the batch is padded."""
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        pictures = _drifting(progress, batch, 4, 1, 2 * ROWS, 2 * COLUMNS)
        return {
            "x": list(pictures.unbind(0)),
            "t": torch.full((batch,), progress),
            "cap_feats": [_noise(TEXT + 30 * i, 8, seed=3 + i) for i in range(batch)],
        }

    return Host("z_image", _seeded(model), arguments)


FAMILIES = {"flux": flux, "flux2": flux2, "sd3": sd3, "pixart": pixart, "dit": dit, "qwen": qwen, "z_image": z_image}


@pytest.fixture(params=sorted(FAMILIES))
def host(request: pytest.FixtureRequest) -> Host:
    """One after the other."""
    return FAMILIES[request.param]()


# --- laws that hold for every family


class KeepsAll:
    """A matcher that drops nothing: every stage of a Reduction step runs, and nothing is lost."""

    def __call__(
        self,
        features: Tensor,
        windows: TokenWindows,
        num_reduced: int,
        *,
        generator: torch.Generator,
        penalty: Tensor | None = None,
    ) -> TokenCorrespondence:
        """No pairs."""
        nobody = torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
        return TokenCorrespondence.from_pairs(windows.num_tokens, nobody, nobody)


def without_positions(host: Host) -> Host:
    """The same model, to which every place of the picture is the same: equal tokens have equal outputs."""
    model = host.model
    if host.name in ("sd3", "pixart", "dit"):
        model.pos_embed.pos_embed = None
        return host
    rotary = model.rope_embedder if host.name == "z_image" else model.pos_embed
    tables = rotary.__call__ if host.name == "z_image" else rotary.forward

    def unturned(*args: Any, **kwargs: Any) -> Any:
        found = tables(*args, **kwargs)
        if isinstance(found, Tensor):
            return torch.ones_like(found)
        first, second = found
        return torch.ones_like(first), torch.ones_like(second) if second.is_complex() else torch.zeros_like(second)

    if isinstance(rotary, nn.Module):
        rotary.forward = unturned
    else:
        model.rope_embedder = unturned
    return host


def of_equal_windows(host: Host) -> Host:
    """The same calls, of pictures whose 2 x 2 windows of tokens hold one token four times."""

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        given = host.arguments(progress, batch)
        if isinstance(given.get("x"), list):
            return {**given, "x": [_repeated(picture) for picture in given["x"]]}
        x = given["hidden_states"]
        if x.ndim == 4:
            return {**given, "hidden_states": _repeated(x)}
        first_rows, first_columns = (torch.arange(size) // 2 * 2 for size in (ROWS, COLUMNS))
        grid = x.unflatten(1, (ROWS, COLUMNS))[:, first_rows][:, :, first_columns]
        return {**given, "hidden_states": grid.flatten(1, 2)}

    return replace(host, arguments=arguments)


def in_precision(host: Host, dtype: torch.dtype) -> Host:
    """The same model and calls in another precision; positions stay as they are."""
    for parameter in host.model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in host.model.buffers():
        buffer.data = buffer.data.to(dtype)

    def cast(value: Any) -> Any:
        if isinstance(value, list) and isinstance(value[0], Tensor):
            return [cast(one) for one in value]
        is_real = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(dtype) if is_real and value.shape[-1] != 3 else value

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        return {name: cast(value) for name, value in host.arguments(progress, batch).items()}

    return replace(host, arguments=arguments)


def _repeated(latents: Tensor) -> Tensor:
    """Latents of 2 x 2 to a token."""
    rows, columns = (torch.arange(size) // 4 * 4 + torch.arange(size) % 2 for size in latents.shape[-2:])
    return latents[..., rows, :][..., columns]


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is later than the last one, whatever timestep the model is told."""
    clock = iter(range(1000, 0, -1))
    monkeypatch.setattr("wellposed.dito.hooks.time_to_data", lambda arguments: float(next(clock)))


# --- pipelines


def tiny_vae(*, latent_channels: int = 1) -> AutoencoderKL:
    """Latents as large as the picture."""
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    return _seeded(vae)


NO_TEXT_MODELS = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


@dataclass(frozen=True)
class Pipe:
    """A real pipeline around a tiny transformer, and a call of it that returns latents."""

    pipe: Any
    arguments: dict[str, Any]

    @property
    def transformer(self) -> Any:
        """Its model."""
        return self.pipe.transformer

    def __call__(self, *, seed: int = 0, **changes: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": 6, "output_type": "latent", "return_dict": False, **self.arguments, **changes}
        output = self.pipe(generator=generator, **options)[0]
        return torch.stack(list(output)) if isinstance(output, list) else torch.as_tensor(output)


def _pipe(pipe: Any, **arguments: Any) -> Pipe:
    pipe.set_progress_bar_config(disable=True)
    return Pipe(pipe, arguments)


def flux_pipe() -> Pipe:
    """Guidance in a second call, in a context of its own, with ``true_cfg_scale``."""
    pipe = FluxPipeline(
        transformer=flux().model, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT_MODELS
    )
    return _pipe(
        pipe,
        prompt_embeds=_noise(1, TEXT, 8, seed=3),
        pooled_prompt_embeds=_noise(1, 8, seed=4),
        negative_prompt_embeds=_noise(1, TEXT, 8, seed=5),
        negative_pooled_prompt_embeds=_noise(1, 8, seed=6),
        height=16 * ROWS,
        width=16 * COLUMNS,
    )


def flux2_pipe() -> Pipe:
    """Two contexts; the pipeline normalises latents by statistics that it reads off its VAE."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=1,
    )
    pipe = Flux2KleinPipeline(
        transformer=flux2().model,
        vae=_seeded(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    return _pipe(
        pipe,
        prompt_embeds=_noise(1, TEXT, 8, seed=3),
        negative_prompt_embeds=_noise(1, TEXT, 8, seed=5),
        height=2 * ROWS,
        width=2 * COLUMNS,
    )


def sd3_pipe() -> Pipe:
    """Guidance in one batch, and no contexts."""
    pipe = StableDiffusion3Pipeline(
        transformer=sd3().model,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_3=None,
        tokenizer_3=None,
        **NO_TEXT_MODELS,
    )
    return _pipe(
        pipe,
        prompt_embeds=_noise(1, TEXT, 8, seed=3),
        pooled_prompt_embeds=_noise(1, 8, seed=4),
        negative_prompt_embeds=_noise(1, TEXT, 8, seed=5),
        negative_pooled_prompt_embeds=_noise(1, 8, seed=6),
        height=16 * ROWS,
        width=16 * COLUMNS,
    )


def pixart_pipe() -> Pipe:
    """Guidance in one batch."""
    pipe = PixArtAlphaPipeline(
        transformer=pixart().model,
        vae=None,
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(1, TEXT)
    return _pipe(
        pipe,
        negative_prompt=None,
        prompt_embeds=_noise(1, TEXT, 8, seed=3),
        prompt_attention_mask=mask,
        negative_prompt_embeds=_noise(1, TEXT, 8, seed=5),
        negative_prompt_attention_mask=mask,
        height=16 * ROWS,
        width=16 * COLUMNS,
        use_resolution_binning=False,
    )


def dit_pipe() -> Pipe:
    """Square pictures, which the pipeline decodes."""
    pipe = DiTPipeline(transformer=dit().model, vae=tiny_vae(latent_channels=4), scheduler=DDIMScheduler())
    return _pipe(pipe, class_labels=[1, 2], output_type="np")


def qwen_pipe() -> Pipe:
    """Two contexts, pictures with a time axis of one frame."""
    pipe = QwenImagePipeline(
        transformer=qwen().model,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(1, TEXT, dtype=torch.long)
    return _pipe(
        pipe,
        prompt_embeds=_noise(1, TEXT, 8, seed=3),
        prompt_embeds_mask=mask,
        negative_prompt_embeds=_noise(1, TEXT, 8, seed=5),
        negative_prompt_embeds_mask=mask,
        height=16 * ROWS,
        width=16 * COLUMNS,
    )


def z_image_pipe() -> Pipe:
    """Guidance in one batch, as lists."""
    pipe = ZImagePipeline(
        transformer=z_image().model,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    return _pipe(
        pipe,
        prompt_embeds=[_noise(TEXT, 8, seed=3)],
        negative_prompt_embeds=[_noise(TEXT, 8, seed=5)],
        height=16 * ROWS,
        width=16 * COLUMNS,
    )


PIPES = {
    "flux": flux_pipe,
    "flux2": flux2_pipe,
    "sd3": sd3_pipe,
    "pixart": pixart_pipe,
    "dit": dit_pipe,
    "qwen": qwen_pipe,
    "z_image": z_image_pipe,
}


@pytest.fixture(params=sorted(PIPES))
def pipe(request: pytest.FixtureRequest) -> Pipe:
    """One after the other."""
    return PIPES[request.param]()


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Builders by family, and what tests of several modules share."""
    return SimpleNamespace(
        hosts=FAMILIES,
        pipes=PIPES,
        vae=tiny_vae,
        noise=_noise,
        keeps_all=KeepsAll,
        without_positions=without_positions,
        of_equal_windows=of_equal_windows,
        in_precision=in_precision,
        rows=ROWS,
        columns=COLUMNS,
        tokens=TOKENS,
        text=TEXT,
    )
