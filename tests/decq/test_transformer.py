"""DiT^DH: published sizes, tokens that do not mix up, rotary patches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, attention_backend

from wellposed.decq.transformer import DecQTransformer2DModel, rotary_tables, rotate

Build = Callable[..., DecQTransformer2DModel]


def test_an_untrained_network_says_zero() -> None:
    network = DecQTransformer2DModel(
        sample_size=4, in_channels=8, num_queries=2, hidden_size=16, num_layers=1, num_attention_heads=2,
        head_hidden_size=16, head_num_layers=1, head_num_attention_heads=2, num_classes=3,
    )  # fmt: skip
    output = network(
        torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 3]), query_hidden_states=torch.randn(2, 2, 8)
    )
    assert not output.sample.any()
    assert not output.query_sample.any()


def test_every_input_reaches_both_outputs(build_generator: Build) -> None:
    network = build_generator().double()
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 32, 4, 4, generator=generator, dtype=torch.float64)
    queries = torch.randn(2, 3, 32, generator=generator, dtype=torch.float64)
    t, labels = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([1, 4])

    def call(p: torch.Tensor = patches, q: torch.Tensor = queries, time: torch.Tensor = t, c: torch.Tensor = labels):
        return network(p, time, c, query_hidden_states=q, return_dict=False)

    base = call()
    for changed in (call(p=patches + 0.1), call(q=queries + 0.1), call(time=t + 0.1), call(c=labels - 1)):
        assert all((a - b).abs().amax() > 1e-6 for a, b in zip(base, changed, strict=True))
    # An image's velocity is its own.
    alone = network(patches[:1], t[:1], labels[:1], query_hidden_states=queries[:1], return_dict=False)
    for a, b in zip(alone, base, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=1e-10, atol=1e-12)


def test_rotation_depends_on_differences_only() -> None:
    cos, sin = (table.double() for table in rotary_tables(5, 8, 100.0, torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    rotated_q, rotated_k = (rotate(x.expand(1, 25, 1, 8), cos, sin)[0, :, 0] for x in (query, key))
    scores = (rotated_q @ rotated_k.T).view(5, 5, 5, 5)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=1e-5, atol=1e-5)
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3


def test_queries_are_not_rotated() -> None:
    cos, sin = rotary_tables(2, 8, 100.0, torch.device("cpu"))
    states = torch.randn(1, 7, 2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(states, cos, sin)[:, 4:], states[:, 4:])


Inputs = dict[str, torch.Tensor]


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 32, 4, 4, generator=generator),
        "timestep": torch.tensor([0.2, 0.9]),
        "class_labels": torch.tensor([1, 5]),
        "query_hidden_states": torch.randn(2, 3, 32, generator=generator),
    }


def tokens(network: DecQTransformer2DModel, inputs: Inputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    given = {name: value.to(dtype) if value.ndim > 1 else value for name, value in inputs.items()}
    output = network(**given)
    return torch.cat([output.sample.flatten(2).transpose(1, 2), output.query_sample], dim=1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b).norm() / b.norm()).item()


def test_gradient_checkpointing_changes_nothing(build_generator: Build, inputs: Inputs) -> None:
    network, calls = build_generator().train(), []
    network.transformer_blocks[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    network.head_blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for _ in range(2):
        network.zero_grad()
        tokens(network, inputs).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
        network.enable_gradient_checkpointing()
    assert sorted(calls) == 3 * [0] + 3 * [1]
    for name, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient)


def test_positions_count_patches(build_generator: Build) -> None:
    """Sines and cosines of the column, then of the row, the first frequency being one."""
    positions = build_generator(sample_size=6).positions
    rows, columns = (grid.flatten() for grid in torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij"))
    torch.testing.assert_close(positions[:, 0], columns.sin())
    torch.testing.assert_close(positions[:, 6], columns.cos())
    torch.testing.assert_close(positions[:, 12], rows.sin())


def test_time_is_not_rounded_with_the_weights(build_generator: Build) -> None:
    """Neighbouring times of the published grid differ by less than bfloat16 can say."""
    half = build_generator().to(torch.bfloat16).time_embedding
    t = torch.tensor([0.9930, 0.9933])
    assert t[0].bfloat16() == t[1].bfloat16()
    a, b = half(t).float()
    assert (a - b).abs().max() > 0


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(build_generator: Build, inputs: Inputs, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    network = build_generator()
    network.save_pretrained(tmp_path)
    again = DecQTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(tokens(again, inputs), tokens(network, inputs))
    half = DecQTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, dtype=torch.bfloat16)
    assert 0 < relative(tokens(half, inputs, torch.bfloat16), tokens(network, inputs)) < 0.03


def test_streams_stay_whole_under_autocast(build_generator: Build, inputs: Inputs) -> None:
    network, seen = build_generator(), []
    exact = tokens(network, inputs)
    for block in (network.transformer_blocks[1], network.head_blocks[0]):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        near = tokens(network, inputs)
    assert seen == [torch.float32, torch.float32]
    assert 0 < relative(near, exact) < 0.02


def test_attention_backends(build_generator: Build, inputs: Inputs) -> None:
    network = build_generator()
    exact = tokens(network, inputs)
    assert len(network.attn_processors) == 3
    with attention_backend("native"):  # restores the default of all models, which the next line changes
        network.set_attention_backend("_native_math")
        torch.testing.assert_close(tokens(network, inputs), exact, rtol=1e-4, atol=1e-5)
        network.reset_attention_backend()
    network.fuse_qkv_projections()  # they always are
    assert torch.equal(tokens(network, inputs), exact)


def test_first_block_cache_skips_the_rest_of_the_trunk(build_generator: Build, inputs: Inputs) -> None:
    network, ran = build_generator(num_layers=3), []
    exact = tokens(network, inputs)
    for index, block in enumerate([*network.transformer_blocks, *network.head_blocks]):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    network.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with torch.no_grad(), network.cache_context("one"):
        for _ in range(2):
            torch.testing.assert_close(tokens(network, inputs), exact, rtol=1e-4, atol=1e-5)
        tokens(network, {**inputs, "timestep": inputs["timestep"].flip(0)})
    assert ran == [0, 1, 2, 3, 0, 3, 0, 1, 2, 3]
    network.disable_cache()
    assert torch.equal(tokens(network, inputs), exact)


def test_weights_kept_in_eight_bits(build_generator: Build, inputs: Inputs) -> None:
    network = build_generator()
    exact = tokens(network, inputs)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    small = {name for name, parameter in network.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    of_blocks = {".".join(name.split(".")[2:4]) for name in small if "_blocks." in name}
    assert of_blocks == {"attn.to_qkv", "attn.to_out", "mlp.proj_in", "mlp.proj_out"}
    assert not any(name.startswith(("time_", "class_", "norm", "modulation", "proj_out")) for name in small)
    assert 0 < relative(tokens(network, inputs), exact) < 0.1


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_offloaded_in_groups(build_generator: Build, inputs: Inputs, tmp_path: Path, offload_type: str) -> None:
    network, cpu = build_generator(), torch.device("cpu")
    exact = tokens(network, inputs)
    network.enable_group_offload(
        cpu, cpu, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert torch.equal(tokens(network, inputs), exact)


def test_lora(build_generator: Build, inputs: Inputs, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    network = build_generator()
    exact = tokens(network, inputs)
    targets = ["to_qkv", "to_out", "proj_in", "modulation"]
    network.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = tokens(network, inputs)
    assert (adapted - exact).abs().max() > 1e-3
    network.save_lora_adapter(tmp_path)
    network.disable_adapters()
    torch.testing.assert_close(tokens(network, inputs), exact)
    again = build_generator()
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(tokens(again, inputs), adapted)


@pytest.mark.compile
def test_blocks_compile(build_generator: Build, inputs: Inputs) -> None:
    network = build_generator()
    exact = tokens(network, inputs)
    network.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(tokens(network, inputs), exact)


@pytest.mark.compile
def test_the_whole_compiles(build_generator: Build, inputs: Inputs) -> None:
    network = build_generator()
    exact = tokens(network, inputs)
    network.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(tokens(network, inputs), exact)


def test_bad_inputs(build_generator: Build) -> None:
    network, plain = build_generator(), build_generator(num_queries=0)
    t, labels = torch.rand(1), torch.tensor([0])
    with pytest.raises(ValueError, match="patch latents"):
        network(torch.zeros(1, 32, 5, 5), t, labels, query_hidden_states=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="has queries"):
        network(torch.zeros(1, 32, 4, 4), t, labels)
    with pytest.raises(ValueError, match="leave them out"):
        plain(torch.zeros(1, 32, 4, 4), t, labels, query_hidden_states=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="multiple of four"):
        build_generator(hidden_size=20)
