r"""Low-rank adapters of Lens (LoRA, arXiv 2106.09685): a pair of matrices is trained beside a frozen one.

    W x + alpha / r B A x,

with A of r rows and random, and B of r columns and zero, so that an untrained adapter changes nothing. They are peft's,
through diffusers' own mixin (extra ``finetune``).

Query, key and value of a stream are one matrix in Lens, ``img_qkv`` or ``txt_qkv``, and have one pair. Files keep these
names: :func:`save_adapter` writes one under those that diffusers' pipelines look for and one under those that ComfyUI
does, neither of which splits or renames a matrix.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.transformer import LensTransformer2DModel, LensTransformerBlock

__all__ = [
    "ADAPTER_FILE",
    "COMFYUI_FILE",
    "AdapterOnly",
    "adapted_modules",
    "add_adapter",
    "load_adapter",
    "need_peft",
    "save_adapter",
]

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui_lora.safetensors"

NAME = "default"
ATTENTION = ("attn.img_qkv", "attn.txt_qkv", "attn.to_out.0", "attn.to_add_out")
MLPS = ("img_mlp", "txt_mlp")
UNREAD = ("attn.to_add_out", "txt_mlp")  # of the last block, whose text nothing reads


def need_peft() -> None:
    """Raise if there is no peft.

    Raises:
        ImportError: there is none; the message says how to get it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("low-rank adapters need peft: pip install 'wellposed[finetune]'")


def adapted_modules(network: LensTransformer2DModel, *, mlps: bool = False) -> list[str]:
    """Names of the matrices that get a pair: the projections of attention, in every block.

    Those of the last block that no loss reaches are left out; an adapter there would never have a gradient.

    Args:
        network: the network.
        mlps: also the matrices of the MLPs.
    """
    blocks = [cast(LensTransformerBlock, block) for block in network.transformer_blocks]
    parts = list(ATTENTION)
    if mlps:
        linear = (name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear))
        parts += [name for name in linear if name.startswith(MLPS)]
    everywhere = [(block, part) for block in range(len(blocks)) for part in parts]
    return [
        f"transformer_blocks.{block}.{part}"
        for block, part in everywhere
        if block < len(blocks) - 1 or not part.startswith(UNREAD)
    ]


def add_adapter(
    network: LensTransformer2DModel, *, rank: int = 64, alpha: float | int = 64, mlps: bool = False
) -> None:
    """Freeze a network and give it an adapter, in float32 whatever the network is in.

    A is drawn from torch's global generator, which the caller seeds.

    Args:
        network: changed in place.
        rank: r.
        alpha: scale of the adapter is alpha / r.
        mlps: see :func:`adapted_modules`.

    Raises:
        ImportError: peft is missing.
        ValueError: a rank below 1 or an alpha that is not positive; a network that has an adapter.
    """
    need_peft()
    from peft import LoraConfig

    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank is {rank} and alpha {alpha}; give a rank of at least 1 and a positive alpha")
    network.requires_grad_(False)
    names = adapted_modules(network, mlps=mlps)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=names), NAME)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class AdapterOnly(nn.Module):
    """The adapter of a network as a module of its own: a call is one of the network.

    The network is not among its parts, so whoever trains it moves, averages, shares and keeps the adapter alone: a
    checkpoint of 0.7 GB at rank 64, optimizer included, instead of 9. The network must be where it is to compute.

    Args:
        network: with an adapter.
    """

    _repeated_blocks: ClassVar[list[str]] = ["LensTransformerBlock"]

    def __init__(self, network: LensTransformer2DModel) -> None:
        super().__init__()
        self._held = (network,)  # in a tuple, where torch does not look for parts
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)

    @property
    def network(self) -> LensTransformer2DModel:
        """The network with its adapter."""
        return self._held[0]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """A call of the network."""
        return self.network(*arguments, **named)

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the network's blocks, as in diffusers."""
        self.network.compile_repeated_blocks(**options)
        self._orig_mod = self._held  # torch's own mark of a module that calls a compiled one


def save_adapter(network: LensTransformer2DModel, folder: str | Path) -> None:
    """Write the adapter twice: for ``load_lora_weights`` of ``LensPipeline``, and for ComfyUI's LoRA loader.

    Args:
        network: with an adapter.
        folder: made if it is not there.

    Raises:
        ImportError: peft is missing.
        ValueError: a network without adapter.
    """
    need_peft()
    from peft.utils import get_peft_model_state_dict

    config: Any = getattr(network, "peft_config", {}).get(NAME)
    if config is None:
        raise ValueError("the network has no adapter; give it one with add_adapter(network)")
    found = cast("Mapping[str, Tensor]", get_peft_model_state_dict(cast(Any, network), adapter_name=NAME))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    modules = sorted(name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight"))
    # Of peft's configuration no more than needed: releases do not know each other's fields.
    about = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": modules}
    LensPipeline.save_lora_weights(
        folder, cast(Any, state), weight_name=ADAPTER_FILE, transformer_lora_adapter_metadata=about
    )
    scales = {f"{name}.alpha": torch.tensor(float(config.lora_alpha)) for name in modules}
    save_file(
        {f"diffusion_model.{name}": tensor for name, tensor in {**state, **scales}.items()}, Path(folder) / COMFYUI_FILE
    )


def load_adapter(network: LensTransformer2DModel, folder: str | Path) -> None:
    """Give a network the adapter that :func:`save_adapter` wrote, in float32 as it was trained.

    diffusers alone would round it to what the network is in.

    Args:
        network: the one that the adapter was trained beside; changed in place.
        folder: with the files.

    Raises:
        ImportError: peft is missing.
        ValueError: a network that has an adapter.
        OSError: there is none.
    """
    need_peft()
    network.load_lora_adapter(str(folder), weight_name=ADAPTER_FILE, adapter_name=NAME)
    stored = load_file(Path(folder) / ADAPTER_FILE)
    for name, parameter in network.named_parameters():
        tensor = stored.get(f"transformer.{name.replace(f'.{NAME}.', '.')}")
        if tensor is not None:
            parameter.data = tensor.to(parameter.device)
