"""Low-rank adapters: what they leave alone, and the two files that hold them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wellposed.lens.adapters import (
    ADAPTER_FILE,
    COMFYUI_FILE,
    AdapterOnly,
    adapted_modules,
    add_adapter,
    load_adapter,
    save_adapter,
)
from wellposed.lens.objectives import freeze_unread, training_flops
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.training.flops import FlopCounter
from wellposed.training.run import _is_compiled

pytest.importorskip("peft")

Build = Callable[..., LensTransformer2DModel]
Inputs = Callable[..., dict[str, Any]]


def said_something(network: LensTransformer2DModel) -> LensTransformer2DModel:
    """Its adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def test_an_untrained_adapter_changes_nothing(build_lens: Build, lens_inputs: Inputs) -> None:
    network, arguments = build_lens(), lens_inputs()
    expected = network(**arguments).sample
    add_adapter(network, rank=2, alpha=2)
    assert torch.equal(network(**arguments).sample, expected)


@pytest.mark.parametrize("mlps", [False, True])
def test_every_part_of_it_has_a_gradient(build_lens: Build, lens_inputs: Inputs, mlps: bool) -> None:
    """What no loss can reach has no pair, and what was there before is frozen."""
    network = build_lens()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    add_adapter(network, rank=2, mlps=mlps)
    network(**lens_inputs()).sample.square().mean().backward()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    assert all(weight.grad is not None for weight in trained.values())
    modules = adapted_modules(build_lens(), mlps=mlps)
    assert len(modules) == (2 * 4 - 1 if not mlps else 2 * 10 - 1 - 3)
    assert len(trained) == 2 * len(modules)
    assert "transformer_blocks.1.attn.to_add_out" not in modules
    held = {name.replace(".base_layer", ""): weight for name, weight in network.state_dict().items()}
    assert all(torch.equal(held[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("mlps", [False, True])
def test_flops_of_a_step(build_lens: Build, lens_inputs: Inputs, mlps: bool) -> None:
    """Frozen matrices have no gradient and pass one on, attention has the whole of its own. Counted, a step has less by
    what the first block's A would pass on to tokens that nobody asks for.
    """
    network = build_lens()
    rows, columns, text = 4, 6, 5
    add_adapter(network, rank=2, mlps=mlps)
    freeze_unread(network)
    counter = FlopCounter()
    with counter.forward():
        loss = network(**lens_inputs(rows, columns, text, batch=1)).sample.square().mean()
    with counter.backward():
        loss.backward()
    first = 2 * 2 * network.config["num_attention_heads"] * network.config["attention_head_dim"]  # of rank 2
    assert counter.flops == training_flops(network, rows * columns, text) - first * (rows * columns + text)


def test_numbers_of_the_published_network() -> None:
    """In a block two pairs of (1536 + 4608) and two of (1536 + 1536): 56 million in 48 blocks, of three here."""
    with torch.device("meta"):
        network = LensTransformer2DModel(num_layers=3)
        add_adapter(network)
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert trained == 64 * (3 * 2 * (1536 + 4608 + 1536 + 1536) - (1536 + 1536))


def test_files_give_back_what_was_trained(
    build_lens: Build, lens_inputs: Inputs, pipes: Callable[..., LensPipeline], tmp_path: Path
) -> None:
    network, arguments = build_lens(), lens_inputs()
    add_adapter(network, rank=3, alpha=6)
    trained = said_something(network)(**arguments).sample
    save_adapter(network, tmp_path)
    pipe = pipes()
    before = pipe.transformer(**arguments).sample
    pipe.load_lora_weights(tmp_path, weight_name=ADAPTER_FILE)
    assert torch.equal(pipe.transformer(**arguments).sample, trained)
    assert (trained - before).abs().max() > 0.1
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())
    torch.testing.assert_close(pipe.transformer(**arguments).sample, trained, rtol=1e-5, atol=1e-5)


def test_comfyui_s_file_by_comfyui_s_rule(build_lens: Build, lens_inputs: Inputs, tmp_path: Path) -> None:
    """W + alpha / rank B A, under the name of W behind ``diffusion_model.``: fused matrices stay whole."""
    network, arguments = build_lens(), lens_inputs()
    add_adapter(network, rank=3, alpha=6, mlps=True)
    trained = said_something(network)(**arguments).sample
    save_adapter(network, tmp_path)
    patches = load_file(tmp_path / COMFYUI_FILE)
    merged = build_lens()
    weights = {f"diffusion_model.{name}": weight for name, weight in merged.state_dict().items()}
    used: set[str] = set()
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        names = [f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.alpha"]
        if names[0] in patches:
            down, up, alpha = (patches[one] for one in names)
            weight.add_(up @ down, alpha=float(alpha) / len(down))
            used |= set(names)
    assert used == set(patches)
    assert "diffusion_model.transformer_blocks.0.attn.img_qkv.lora_B.weight" in used
    torch.testing.assert_close(merged(**arguments).sample, trained, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_float32_beside_any_weights(build_lens: Build, lens_inputs: Inputs, tmp_path: Path) -> None:
    def in_bfloat16() -> LensTransformer2DModel:
        if not (tmp_path / "network").is_dir():
            build_lens().save_pretrained(tmp_path / "network")
        return LensTransformer2DModel.from_pretrained(tmp_path / "network", torch_dtype=torch.bfloat16)

    network, arguments = in_bfloat16(), lens_inputs(dtype=torch.bfloat16)
    add_adapter(network, rank=2)
    said_something(network)
    save_adapter(network, tmp_path)
    again = in_bfloat16()
    load_adapter(again, tmp_path)

    def adapter(of: LensTransformer2DModel) -> dict[str, Tensor]:
        return {name: weight for name, weight in of.named_parameters() if "lora" in name}

    assert {weight.dtype for weight in adapter(again).values()} == {torch.float32}
    assert all(torch.equal(weight, adapter(network)[name]) for name, weight in adapter(again).items())
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**arguments).sample, network(**arguments).sample)


def test_the_adapter_alone_is_a_module(build_lens: Build, lens_inputs: Inputs) -> None:
    """It has nothing but its own numbers, which are the network's, and a call is one of the network."""
    network, arguments = build_lens(), lens_inputs()
    add_adapter(network, rank=2)
    alone = AdapterOnly(network)
    assert torch.equal(alone(**arguments).sample, network(**arguments).sample)
    assert all("lora" in name for name in alone.state_dict())
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in network.parameters()) / 10
    said_something(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(one is other for one, other in zip(alone.parameters(), trained, strict=True))
    assert alone.network is network


def test_compiling_it_compiles_the_network(build_lens: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    network, chosen = build_lens(), []
    monkeypatch.setattr(network, "compile_repeated_blocks", lambda **options: chosen.append(options), raising=False)
    add_adapter(network, rank=2)
    alone = AdapterOnly(network)
    names = list(alone.state_dict())
    alone.compile_repeated_blocks(fullgraph=True)
    assert chosen == [{"fullgraph": True}]
    assert list(alone.state_dict()) == names
    assert _is_compiled(alone), "the loop counts no operations while it is traced"


def test_bad_input(build_lens: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rank is 0 and alpha 64; give"):
        add_adapter(build_lens(), rank=0)
    with pytest.raises(ValueError, match=r"rank is 64 and alpha -1\.0"):
        add_adapter(build_lens(), alpha=-1.0)
    with pytest.raises(ValueError, match=r"has no adapter; give it one with add_adapter\(network\)"):
        save_adapter(build_lens(), tmp_path)
    with pytest.raises(OSError, match=ADAPTER_FILE):
        load_adapter(build_lens(), tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need peft: pip install 'wellposed\[finetune\]'"):
        add_adapter(build_lens())
