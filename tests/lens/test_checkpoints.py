"""Weights under the published names, behind prefixes, in one file; quantised, incomplete and foreign ones refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wellposed.lens.checkpoints import inferred_config, published_names
from wellposed.lens.transformer import LensTransformer2DModel

Build = Callable[..., LensTransformer2DModel]
Inputs = Callable[..., dict[str, Any]]

TAPS = {"axes_dims_rope": [4, 14, 14], "selected_layer_index": [0, 1, 2, 3]}


def names(layers: int) -> list[str]:
    """Written out once more, as the published files have them."""
    linear = ("weight", "bias")
    block = [
        *(f"attn.{norm}.weight" for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")),
        *(f"attn.{p}.{k}" for p in ("img_qkv", "txt_qkv", "to_out.0", "to_add_out") for k in linear),
        *(f"{s}_mod.1.{k}" for s in ("img", "txt") for k in linear),
        *(f"{s}_norm{i}.weight" for s in ("img", "txt") for i in (1, 2)),
        *(f"{s}_mlp.w{i}.weight" for s in ("img", "txt") for i in (1, 2, 3)),
    ]
    assert len(block) == 26
    return [
        *(f"time_text_embed.timestep_embedder.linear_{i}.{k}" for i in (1, 2) for k in linear),
        *(f"txt_norm.{i}.weight" for i in range(4)),
        *(f"{p}.{k}" for p in ("txt_in", "img_in", "norm_out.linear", "proj_out") for k in linear),
        *(f"transformer_blocks.{i}.{name}" for i in range(layers) for name in block),
    ]


@pytest.fixture
def weights(build_lens: Build) -> dict[str, Tensor]:
    """Random ones of two blocks, under names that are not the network's own."""
    shapes = build_lens().state_dict()
    generator = torch.Generator().manual_seed(3)
    return {name: 0.2 * torch.randn(shapes[name].shape, generator=generator) for name in names(2)}


def test_published_weights_load_strictly_in_both_directions(
    build_lens: Build, lens_inputs: Inputs, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build_lens()
    assert model.load_state_dict(weights, strict=True)
    expected = model(**lens_inputs(padded=2)).sample
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.name == "diffusion_pytorch_model.safetensors"
    again = LensTransformer2DModel.from_single_file(file, **TAPS)
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(**lens_inputs(padded=2)).sample, expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "LensTransformer2DModel"


@pytest.mark.parametrize(
    "prefix", ["", "transformer.", "model.diffusion_model.", "diffusion_model.", "model.", "module.", "_orig_mod."]
)
def test_prefixes(
    build_lens: Build, lens_inputs: Inputs, weights: dict[str, Tensor], tmp_path: Path, prefix: str
) -> None:
    model = build_lens()
    model.load_state_dict(weights)
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "lens.safetensors")
    loaded = LensTransformer2DModel.from_single_file(tmp_path / "lens.safetensors", **TAPS)
    assert not loaded.training
    assert torch.equal(loaded(**lens_inputs()).sample, model(**lens_inputs()).sample)


def test_one_file_in_bfloat16(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "lens.safetensors")
    loaded = LensTransformer2DModel.from_single_file(tmp_path / "lens.safetensors", **TAPS)
    assert loaded.dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    wide = LensTransformer2DModel.from_single_file(tmp_path / "lens.safetensors", dtype=torch.float32, **TAPS)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    torch.testing.assert_close(wide.img_in.weight, weights["img_in.weight"].bfloat16().float())


@pytest.mark.parametrize(
    "fields", [{}, {"num_layers": 3, "num_attention_heads": 1}, {"gate_mlp": False, "rms_norm": False}]
)
def test_sizes_are_read_off_the_tensors(build_lens: Build, fields: dict[str, Any]) -> None:
    model = build_lens(**fields)
    found = inferred_config(model.state_dict(), "here")
    assert found == {name: model.config[name] for name in found} | {"inner_dim": model.img_in.out_features}


def test_the_published_sizes_need_no_words() -> None:
    with torch.device("meta"):
        model = LensTransformer2DModel(num_layers=1)
    found = {**model.config, **inferred_config(model.state_dict(), "here")}
    assert found == dict(model.config)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"transformer_blocks.0.attn.img_qkv.weight_scale": torch.ones(4)}, "img_qkv.weight_scale"),
        ({"transformer_blocks.0.attn.img_qkv.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "img_qkv.comfy_quant"),
        ({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "scaled_fp8"),
        ({"txt_in.weight": torch.zeros(64, 256, dtype=torch.float8_e4m3fn)}, "txt_in.weight in float8_e4m3fn"),
        ({"proj_out.weight": torch.zeros(16, 32, dtype=torch.uint8)}, "proj_out.weight in uint8"),
    ],
)
def test_quantised_files_are_refused_by_name(
    weights: dict[str, Tensor], tmp_path: Path, extra: dict[str, Tensor], message: str
) -> None:
    save_file(weights | extra, tmp_path / "lens.safetensors")
    with pytest.raises(ValueError, match=f"quantised .*{message}.*bfloat16.*enable_layerwise_casting"):
        LensTransformer2DModel.from_single_file(tmp_path / "lens.safetensors")


def test_missing_and_unknown_weights_of_a_file(weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "lens.safetensors"
    for name in ("transformer_blocks.1.txt_norm2.weight", "txt_in.bias"):
        save_file({key: tensor for key, tensor in weights.items() if key != name}, file)
        with pytest.raises(ValueError, match=f"lacks 1 weights, e.g. {name}"):
            LensTransformer2DModel.from_single_file(file, **TAPS)
    save_file(weights | {"guidance_in.weight": torch.zeros(2), "txt_in.beta": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="has unknown 2 weights, e.g. guidance_in.weight"):
        LensTransformer2DModel.from_single_file(file, **TAPS)
    save_file(weights | {"txt_in.bias": torch.zeros(65)}, file)
    with pytest.raises(ValueError, match=r"txt_in.bias .* has shape \(65,\), this configuration asks for \(64,\)"):
        LensTransformer2DModel.from_single_file(file, **TAPS)


@pytest.mark.parametrize(("change", "message"), [("lack", "lacks 1 weights, e.g. txt_in.bias"), ("add", "unknown 1")])
def test_missing_and_unknown_weights_of_a_folder(
    build_lens: Build, weights: dict[str, Tensor], tmp_path: Path, change: str, message: str
) -> None:
    build_lens().save_pretrained(tmp_path)
    if change == "lack":
        del weights["txt_in.bias"]
    else:
        weights["other.bias"] = torch.zeros(2)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        LensTransformer2DModel.from_pretrained(tmp_path)


def test_other_files(weights: dict[str, Tensor], tmp_path: Path) -> None:
    load = LensTransformer2DModel.from_single_file
    with pytest.raises(FileNotFoundError, match="no file at"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="from_pretrained"):
        load(tmp_path)
    (tmp_path / "lens.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match="GGUF files and pickles"):
        load(tmp_path / "lens.gguf")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no Lens transformer"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds 2 tensors 'img_in.weight'"):
        published_names(weights | {f"teacher.{name}": tensor for name, tensor in weights.items()}, "here")
    with pytest.raises(ValueError, match="no Lens transformer"):
        inferred_config({"img_in.weight": torch.zeros(64, 16)}, "here")


def test_half_precision_is_refused_or_widened(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "lens.safetensors")
    with pytest.raises(ValueError, match="65504"):
        LensTransformer2DModel.from_single_file(tmp_path / "lens.safetensors", **TAPS)
    with pytest.raises(ValueError, match="65504"):
        LensTransformer2DModel.from_single_file(tmp_path / "lens.safetensors", dtype=torch.float16, **TAPS)
    wide = LensTransformer2DModel.from_single_file(tmp_path / "lens.safetensors", dtype=torch.bfloat16, **TAPS)
    assert wide.dtype == torch.bfloat16
