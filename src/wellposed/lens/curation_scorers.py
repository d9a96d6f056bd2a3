"""What looks at pictures in curation: scorers and embedders, those of the paper and one of ours.

A *scorer* is any function from pictures to numbers, an *embedder* one from pictures to vectors. Those here are small
records that name a model and load it where they are first called, once in each process: they travel to workers as
names. Each is loaded through transformers with its own preprocessing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from wellposed.weight_files import read_weights

__all__ = [
    "AestheticScorer",
    "ClassifierScorer",
    "ClipEmbedder",
    "DctEmbedder",
    "Embedder",
    "Scorer",
    "nsfw_scorer",
    "tool_name",
    "watermark_scorer",
]

HEAD_LAYERS = (0, 2, 4, 6, 8)
HEAD_HELP = "aesthetic_predictor_v2_5.pth of discus0434/aesthetic-predictor-v2-5, with scoring_head.0.weight to .8.bias"

THUMBNAIL, LUMA_WAVES, CHROMA_WAVES = 32, 16, 4


@runtime_checkable
class Scorer(Protocol):
    """Scores pictures: one finite number for each, in their order."""

    def __call__(self, pictures: Sequence[Image.Image], /) -> Sequence[float]:
        """The pictures are whole, upright and in RGB."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Embeds pictures: one row for each, in their order; what is alike points the same way."""

    def __call__(self, pictures: Sequence[Image.Image], /) -> Float32[np.ndarray, "n width"]:
        """The pictures are upright, in RGB and reduced to about the area on which measures are taken."""
        ...


def tool_name(tool: Any) -> str:
    """What identifies a scorer or an embedder between runs: the settings of a record, the name of anything else."""
    if is_dataclass(tool):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(tool))
    named = tool if hasattr(tool, "__qualname__") else type(tool)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True, kw_only=True)
class ClassifierScorer:
    """The probability that a picture belongs to some classes, by an image classifier of transformers.

    Attributes:
        model: name on the hub or a folder.
        labels: the classes, as its configuration has them; their probabilities are added.
        revision: of the repository; None for the newest.
        device: where it computes.
        dtype: name of torch's format in which it does.
    """

    model: str
    labels: tuple[str, ...]
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __call__(self, pictures: Sequence[Image.Image]) -> list[float]:
        """Probabilities in [0, 1].

        Raises:
            ValueError: the model has none of the labels.
            OSError: it cannot be loaded.
        """
        network, process = _loaded(
            "AutoModelForImageClassification", self.model, self.revision, self.device, self.dtype
        )
        names = {str(name).lower(): number for number, name in network.config.id2label.items()}
        missing = [label for label in self.labels if label.lower() not in names]
        if missing or not self.labels:
            raise ValueError(f"labels are {self.labels}; {self.model} has {', '.join(names)}")
        with torch.no_grad():
            shares = network(pixel_values=process(pictures)).logits.float().softmax(-1)
        return shares[:, [names[label.lower()] for label in self.labels]].sum(-1).tolist()


def nsfw_scorer(*, device: str = "cpu", dtype: str = "float32", revision: str | None = None) -> ClassifierScorer:
    """The classifier that the paper names, an EVA-02 of Freepik, whose classes are neutral, low, medium and high.

    Which of them count is not stated in the paper; here medium and high do. transformers loads it through timm.
    """
    return ClassifierScorer(
        model="Freepik/nsfw_image_detector", labels=("medium", "high"), device=device, dtype=dtype, revision=revision
    )


def watermark_scorer(*, device: str = "cpu", dtype: str = "float32", revision: str | None = None) -> ClassifierScorer:
    """A SigLIP2 fine-tuned to find watermarks. The paper says that it used one, not which."""
    return ClassifierScorer(
        model="prithivMLmods/Watermark-Detection-SigLIP2",
        labels=("Watermark",),
        device=device,
        dtype=dtype,
        revision=revision,
    )


@dataclass(frozen=True, kw_only=True)
class AestheticScorer:
    """The Aesthetic Predictor v2.5: five linear layers on the normalised feature of SigLIP, scores about 1 to 10.

    Attributes:
        head: file with the five layers, ``.pth`` as published or ``.safetensors``.
        model: the SigLIP, on the hub or in a folder.
        revision: see :class:`ClassifierScorer`.
        device: likewise.
        dtype: likewise; the head computes in float32.
    """

    head: Path
    model: str = "google/siglip-so400m-patch14-384"
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __call__(self, pictures: Sequence[Image.Image]) -> list[float]:
        """Scores.

        Raises:
            FileNotFoundError: no such head.
            ValueError: a head of another shape.
            OSError: the model cannot be loaded.
        """
        network, process = _loaded("SiglipVisionModel", self.model, self.revision, self.device, self.dtype)
        with torch.no_grad():
            features = network(pixel_values=process(pictures)).pooler_output.float()
            features = features / features.norm(dim=-1, keepdim=True)
            for weight, bias in _head(self.head, features.shape[-1]):
                features = torch.nn.functional.linear(features, weight.to(features), bias.to(features))
        return features[:, 0].tolist()


@dataclass(frozen=True, kw_only=True)
class ClipEmbedder:
    """CLIP's image features, those of ViT-L/14 in the paper.

    Attributes:
        model: on the hub or in a folder.
        revision: see :class:`ClassifierScorer`.
        device: likewise.
        dtype: likewise.
    """

    model: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __call__(self, pictures: Sequence[Image.Image]) -> Float32[np.ndarray, "n width"]:
        """Features as they come, of any length; raises OSError if the model cannot be loaded."""
        network, process = _loaded("CLIPVisionModelWithProjection", self.model, self.revision, self.device, self.dtype)
        with torch.no_grad():
            return network(pixel_values=process(pictures)).image_embeds.float().cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class DctEmbedder:
    """Ours, for want of CLIP: the slow waves of a thumbnail, which compression and changes of size leave alone.

    The picture is reduced to 32 x 32, whatever its ratio, and taken apart by a cosine transform in luma and in both
    differences of colour. Of luma 16 x 16 coefficients count without the mean, each times the square root of its
    frequency, so that they weigh about the same in photographs; of the differences 4 x 4.

    It finds the same picture encoded again, in another size, a little lighter or darker. It does not find crops,
    mirrored pictures, or another photograph of the same thing, which CLIP finds in part.
    """

    def __call__(self, pictures: Sequence[Image.Image]) -> Float32[np.ndarray, "n width"]:
        """Vectors of 287 numbers."""
        return np.stack([_slow_waves(picture) for picture in pictures])


def _slow_waves(picture: Image.Image) -> Float32[np.ndarray, "width"]:
    thumbnail = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.HAMMING, reducing_gap=2.0).convert("YCbCr")
    planes = np.asarray(thumbnail, dtype=np.float64).transpose(2, 0, 1) - 128.0
    position, wave = np.arange(THUMBNAIL) + 0.5, np.arange(LUMA_WAVES)[:, None]
    cosines = np.cos(np.pi / THUMBNAIL * position * wave) * np.sqrt(2 / THUMBNAIL)
    waves = cosines @ planes @ cosines.T
    luma = waves[0] * np.sqrt(np.hypot(wave, wave.T))
    chroma = waves[1:, :CHROMA_WAVES, :CHROMA_WAVES]
    return np.concatenate([luma.ravel()[1:], chroma.ravel()]).astype(np.float32)


@cache
def _loaded(kind: str, model: str, revision: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """A network, and the function that turns pictures into its input; loaded once in a process."""
    # Here: every worker imports this module, and few of them look at pictures with a network.
    import transformers

    network = (
        getattr(transformers, kind)
        .from_pretrained(model, revision=revision, dtype=getattr(torch, dtype))
        .eval()
        .to(device)
    )
    processor = transformers.AutoImageProcessor.from_pretrained(model, revision=revision, backend="pil")

    def process(pictures: Sequence[Image.Image]) -> Tensor:
        encoded: Any = processor(images=list(pictures), return_tensors="pt")
        return encoded["pixel_values"].to(device, network.dtype)

    return network, process


@cache
def _head(path: Path, width: int) -> list[tuple[Tensor, Tensor]]:
    tensors = read_weights(path, HEAD_HELP)
    try:
        layers = [(tensors[f"scoring_head.{n}.weight"], tensors[f"scoring_head.{n}.bias"]) for n in HEAD_LAYERS]
    except KeyError as error:
        raise ValueError(f"{str(path)!r} has no {error}; expected {HEAD_HELP}") from error
    if layers[0][0].shape[1] != width or layers[-1][0].shape[0] != 1:
        raise ValueError(
            f"{str(path)!r} goes from {layers[0][0].shape[1]} to {layers[-1][0].shape[0]} numbers, expected from "
            f"{width}, which is what the model gives, to 1"
        )
    return layers
