"""Names of encoders in old and new transformers, there and back."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.encoders import ENCODERS
from wellposed.decq.key_layouts import canonical, in_layout_of

Build = Callable[..., AutoencoderDecQ]

WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION = (
    (r"\.attention\.(q)_proj", r".attention.attention.query"),
    (r"\.attention\.(k)_proj", r".attention.attention.key"),
    (r"\.attention\.(v)_proj", r".attention.attention.value"),
    (r"\.attention\.o_proj", r".attention.output.dense"),
)
# What transformers 4 and its model files call the weights of each family, from what they are called now.
OLD_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "dinov2": ATTENTION,
    "dinov2_plain": ATTENTION,
    "dinov3": ((r"^encoder\.model\.layer\.", "encoder.layer."),),
    "siglip2": ((r"^encoder\.", "encoder.vision_model."),),
    "mae": (
        *ATTENTION,
        (r"^encoder\.layers\.", "encoder.encoder.layer."),
        (r"\.mlp\.fc1", ".intermediate.dense"),
        (r"\.mlp\.fc2", ".output.dense"),
    ),
}


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    if name.startswith("encoder."):
        for new, old in table:
            name = re.sub(new, old, name)
    return name


def test_every_family_has_its_old_names() -> None:
    assert set(OLD_NAMES) == set(ENCODERS)


@pytest.mark.parametrize("family", sorted(OLD_NAMES))
def test_both_directions(build: Build, family: str) -> None:
    new = list(build(encoder_type=family, num_queries=0).state_dict())
    old = [renamed(name, OLD_NAMES[family]) for name in new]
    assert len({canonical(name) for name in new}) == len(new)
    assert old != new and len(set(old)) == len(new)
    assert in_layout_of(new, dict(zip(old, new, strict=True))) == dict(zip(new, new, strict=True))
    assert in_layout_of(old, dict(zip(new, new, strict=True))) == dict(zip(old, new, strict=True))
    assert in_layout_of(new, dict(zip(new, new, strict=True))) == dict(zip(new, new, strict=True))


def test_names_of_nothing_else_change() -> None:
    decoder = "decoder.decoder_layers.0.attention.to_q.weight"
    assert canonical(decoder) == decoder
    assert in_layout_of(["a"], {"b": 1, "a": 2}) == {"b": 1, "a": 2}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", sorted(OLD_NAMES))
def test_old_files_load(
    build: Build, images: torch.Tensor, tmp_path: Path, family: str, low_cpu_mem_usage: bool
) -> None:
    model = build(encoder_type=family)
    for parameter in model.encoder.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    old = {renamed(name, OLD_NAMES[family]): value for name, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    again = AutoencoderDecQ.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for a, b in zip(model.encode(images, return_dict=False), again.encode(images, return_dict=False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "part", ["encoder.encoder.layer.1.attention.q_proj.weight", "condensers.queries", "_query_latents_std"]
)
def test_missing_weights_are_an_error(build: Build, tmp_path: Path, part: str, low_cpu_mem_usage: bool) -> None:
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights[part]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="would be random"):
        AutoencoderDecQ.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("old", [False, True])
def test_files_in_shards(build: Build, images: torch.Tensor, tmp_path: Path, old: bool) -> None:
    """Their names are renamed nowhere on the way: it works or is refused, and is random never."""
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    if not old:
        again = AutoencoderDecQ.from_pretrained(tmp_path)
        assert torch.equal(again.encode(images).latent, model.encode(images).latent)
        return
    index = tmp_path / f"{WEIGHTS}.index.json"
    for new, was in ATTENTION:
        pattern = new.replace("(", "").replace(")", "")
        index.write_text(re.sub(pattern, was, index.read_text()))
    for shard in shards:
        weights: dict[str, Any] = {renamed(n, ATTENTION): w for n, w in load_file(shard).items()}
        save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="as another version of transformers does, and is in several files"):
        AutoencoderDecQ.from_pretrained(tmp_path)
    # What the message says to do.
    save_file({n: w for shard in shards for n, w in load_file(shard).items()}, tmp_path / WEIGHTS, {"format": "pt"})
    for path in (index, *shards):
        path.unlink()
    again = AutoencoderDecQ.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images).latent, model.encode(images).latent)
