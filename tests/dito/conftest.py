"""Tiny real transformers of every supported family, and a call of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

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
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(ROWS).float(), torch.arange(COLUMNS).float())
    return grid


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
