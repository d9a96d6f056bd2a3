"""Weights of Lens in one file: whose names they are under, what sizes they tell, and what cannot be read.

The released networks circulate as folders in diffusers' layout and as single safetensors files. Both carry the same
1264 names, the latter often behind a prefix (``model.diffusion_model.``, ``diffusion_model.``, ``transformer.``,
``model.``, ``module.``); the network proposed to diffusers has them too. Quantised repackagings keep other tensors
beside or in place of the weights and are refused by name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["check_names", "inferred_config", "published_names", "read_single_file"]

FIRST_TENSOR = "img_in.weight"

# What repackagings in few bits keep beside their weights: Comfy's mxfp8, nvfp4 and int8, scaled fp8, bitsandbytes.
QUANTISED = ("comfy_quant", "weight_scale", "weight_scale_2", "scale_weight", "input_scale", "absmax")
FULL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_single_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, another format, a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; load it with LensTransformer2DModel.from_pretrained")
    if not path.is_file():
        raise FileNotFoundError(f"no file at {str(path)!r}; give the path of a .safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is no safetensors file, or a damaged one ({error}); GGUF files and pickles (.ckpt, .pt) "
            "are not read: take the repackaging in bfloat16"
        ) from error


def published_names(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights under their published names, whatever stands before these.

    Args:
        state: tensors by name.
        where: what to call them in an error.

    Raises:
        ValueError: weights of another network, or quantised ones.
    """
    prefixes = [name.removesuffix(FIRST_TENSOR) for name in state if f".{name}".endswith(f".{FIRST_TENSOR}")]
    if len(prefixes) != 1:
        raise ValueError(
            f"{where!r} holds {len(prefixes)} tensors {FIRST_TENSOR!r}, one was expected: it is no Lens transformer"
        )
    named = {name.removeprefix(prefixes[0]): tensor for name, tensor in state.items()}
    marks = sorted(name for name in named if name.rsplit(".", 1)[-1] in QUANTISED)
    coded = sorted(name for name, tensor in named.items() if tensor.dtype not in FULL)
    if marks or coded:
        example = marks[0] if marks else f"{coded[0]} in {str(named[coded[0]].dtype).removeprefix('torch.')}"
        raise ValueError(
            f"{where!r} is quantised (it holds {example}), which this loader does not undo; take the repackaging in "
            "bfloat16, and for less memory call enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, "
            "compute_dtype=torch.bfloat16) or load a folder with a quantization_config of diffusers"
        )
    return named


def inferred_config(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """What the tensors tell of the configuration; the rest is as published.

    Args:
        state: weights under their published names.
        where: what to call them in an error.

    Raises:
        ValueError: weights of another network.
    """
    needed = ("proj_out.weight", "txt_in.weight", "transformer_blocks.0.attn.norm_q.weight")
    if absent := [name for name in needed if name not in state]:
        raise ValueError(f"{where!r} lacks {', '.join(absent)}: it is no Lens transformer")
    width, in_channels = state[FIRST_TENSOR].shape
    (head_dim,) = state["transformer_blocks.0.attn.norm_q.weight"].shape
    several = "txt_norm.0.weight" in state
    norm = state.get("txt_norm.0.weight" if several else "txt_norm.weight")
    if norm is None or width % head_dim:
        raise ValueError(f"{where!r} has no txt_norm, or heads that do not fit its width: it is no Lens transformer")
    return {
        "in_channels": in_channels,
        "out_channels": state["proj_out.weight"].shape[0] // 4,
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "inner_dim": width,
        "enc_hidden_dim": norm.shape[0],
        "gate_mlp": "transformer_blocks.0.img_mlp.w1.weight" in state,
        "rms_norm": "transformer_blocks.0.img_norm1.weight" in state,
        "multi_layer_encoder_feature": several,
    }


def check_names(missing: Sequence[str], unknown: Sequence[str], where: str) -> None:
    """Raise if anything is missing or unknown.

    Args:
        missing: names that the network has and ``where`` has not.
        unknown: names that ``where`` has and the network has not.
        where: what to call it in an error.

    Raises:
        ValueError: either is not empty.
    """
    if missing or unknown:
        parts = [
            f"{what} {len(names)} weights, e.g. {names[0]}"
            for what, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise ValueError(
            f"{where!r} {' and '.join(parts)}. Is it the whole transformer, and does its configuration say how it was "
            "built?"
        )
