"""Lens pipelines that a run goes on from: their parts one at a time, and folders that refer to them.

A pipeline has 8 GB of network, 14 GB of text encoder and 0.3 GB of autoencoder. What a run trains goes into a folder
with a ``base.json`` that says where the rest lies and which weights it is expected to have; nothing is copied.
"""

import functools
import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from transformers import AutoTokenizer, GptOssConfig, PreTrainedTokenizerFast

from wellposed.lens.adapters import ADAPTER_FILE, load_adapter
from wellposed.lens.feature_cache import FeatureCache, FeatureKey, hash_checkpoint
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.template import PUBLISHED_TEMPLATE, PromptTemplate
from wellposed.lens.text_encoder import TAPS, LensTextEncoder
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.device import resolved_device
from wellposed.recipes.loading import loaded_pipeline
from wellposed.recipes.run_folder import REFERENCE, write_json

__all__ = ["BaseTextEncoder", "LensBase", "load_referring", "write_reference"]

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = PARTS[:-1]
HASHES = "hashes.json"  # in a run's folder of the text encoder
CAPTIONS_AT_A_TIME = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LensBase:
    """A Lens pipeline in a folder, published or our own.

    Attributes:
        folder: where it is.
        memo: a file that remembers hashes, so that 22 GB are read for them once; None for none.

    Raises:
        ValueError: a part is missing.
    """

    folder: Path
    memo: Path | None = None

    def __post_init__(self) -> None:
        names = ("model_index.json", *PARTS)
        if missing := [name for name in names if not (self.folder / name).exists()]:
            raise ValueError(
                f"{self.folder} is no complete Lens pipeline, it lacks {', '.join(missing)}; give the folder of one "
                f"with {', '.join(PARTS)}"
            )

    def network(self, dtype: torch.dtype) -> LensTransformer2DModel:
        """The network, in float32 or bfloat16."""
        return LensTransformer2DModel.from_pretrained(self.folder / "transformer", torch_dtype=dtype)

    def autoencoder(self) -> AutoencoderKLFlux2:
        """The autoencoder, in float32, in which its statistics are exact."""
        vae = AutoencoderKLFlux2.from_pretrained(self.folder / "vae", torch_dtype=torch.float32)
        return vae.eval().requires_grad_(False)

    def text_encoder(self, device: str) -> LensTextEncoder:
        """The text encoder, as it is stored: experts in MXFP4 stay that where the device can do it.

        Args:
            device: "auto", "cpu", "cuda", ...
        """
        return LensTextEncoder.from_pretrained(
            self.folder,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            taps=self.taps,
            head=False,
            dtype=self.text_dtype,
            device_map=str(resolved_device(device)),
        )

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the text encoder that the network reads."""
        config: Any = LensTransformer2DModel.load_config(self.folder / "transformer")
        return tuple(config.get("selected_layer_index", TAPS))

    @property
    def text_dtype(self) -> torch.dtype:
        """What the text encoder computes in: as it is stored."""
        stored = GptOssConfig.from_pretrained(self.folder / "text_encoder").dtype
        return stored if isinstance(stored, torch.dtype) else torch.bfloat16

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256 over weights and configurations of all parts, as they were when first asked for."""
        return self.hash_of(*WEIGHTS)

    def hash_of(self, *parts: str) -> str:
        """SHA-256 over weights and configurations of some parts."""
        return hash_checkpoint(*(self.folder / part for part in parts), memo=self.memo)


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseTextEncoder:
    """The text encoder of a pipeline, in memory only while it encodes.

    Attributes:
        base: the pipeline.
        device: where it encodes.
        tokenizer: its tokenizer.
        template: see ``LensTextEncoder``.
    """

    base: LensBase
    device: str
    tokenizer: PreTrainedTokenizerFast
    template: PromptTemplate = PUBLISHED_TEMPLATE

    @classmethod
    def of(cls, pipeline: Path, folder: Path, device: str) -> "BaseTextEncoder":
        """The one of the pipeline in a folder.

        Args:
            pipeline: its folder.
            folder: where hashes of its files are remembered.
            device: where it encodes.

        Raises:
            ValueError: a part of the pipeline is missing.
        """
        base = LensBase(pipeline, memo=folder / HASHES)
        # Hashed here, before anything is trained, and by the main rank before the others.
        logger.info("%s has the weights %s", pipeline, base.weights)
        return cls(base=base, device=device, tokenizer=AutoTokenizer.from_pretrained(pipeline / "tokenizer"))

    def load(self) -> LensTextEncoder:
        """The encoder; it is in memory for as long as the caller keeps it."""
        return self.base.text_encoder(self.device)

    def cache(self, folder: Path) -> FeatureCache:
        """Its features on disk."""
        weights = self.base.hash_of("text_encoder", "tokenizer")
        key = FeatureKey(weights=weights, template=self.template, taps=self.base.taps, dtype=self.base.text_dtype)
        return FeatureCache(folder=folder, key=key)

    def encode_then_free(self, captions: Sequence[str], folder: Path) -> None:
        """Keep the features of captions on disk; the encoder is loaded if one is new, once, and let go after the last.

        Args:
            captions: any of them twice.
            folder: of the features.
        """
        cache, different = self.cache(folder), list(dict.fromkeys(captions))
        load = functools.cache(self.load)
        for start in range(0, len(different), CAPTIONS_AT_A_TIME):
            cache.fetch(different[start : start + CAPTIONS_AT_A_TIME], load)
        load.cache_clear()
        gc.collect()
        for backend in (torch.cuda, torch.xpu, torch.mps):
            if backend.is_available():
                backend.empty_cache()


def write_reference(folder: Path, base: LensBase, dtype: torch.dtype) -> None:
    """Say in a folder which pipeline it refers to.

    Args:
        folder: with what was trained: an adapter, or a ``transformer``.
        base: the pipeline.
        dtype: of the network.
    """
    about = {"base": str(base.folder.resolve()), "weights": base.weights, "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / REFERENCE, about)


def load_referring(folder: Path, device: torch.device) -> LensPipeline:
    """The pipeline that a folder with a reference stands for: the base with what was trained in its place.

    Args:
        folder: with a ``base.json``.
        device: where the text encoder is loaded to.

    Raises:
        ValueError: the base is not where it was, or has other weights now; damaged files.
        ImportError: an adapter, and peft is missing.
    """
    about: dict[str, str] = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
    memo = folder.parent / "text_encoder" / HASHES
    try:
        base = LensBase(Path(about["base"]), memo=memo if memo.is_file() else None)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds only what was trained and takes the rest from a pipeline that is gone ({error}); put that "
            f"back, or write its new path into {folder / REFERENCE}"
        ) from error
    if base.weights != about["weights"]:
        raise ValueError(
            f"the weights in {base.folder} are not those that {folder} was trained with; put these back, or write "
            f"their new path into {folder / REFERENCE}"
        )
    dtype = getattr(torch, about["dtype"])
    own = folder / "transformer"
    network = LensTransformer2DModel.from_pretrained(own, torch_dtype=dtype) if own.is_dir() else base.network(dtype)
    if (folder / ADAPTER_FILE).is_file():
        load_adapter(network, folder)
    encoder = base.text_encoder(str(device))
    return loaded_pipeline(
        LensPipeline,
        base.folder,
        transformer=network,
        vae=base.autoencoder(),
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
    )
