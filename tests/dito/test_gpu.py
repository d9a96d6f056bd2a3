"""What only a CUDA device can show: half precision at its own kernels, transfers, memory, offloading."""

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import apply_token_reduction, token_reduction

pytestmark = pytest.mark.gpu

Host = Any

DEVICE = "cuda"


def settings(**fields: Any) -> TokenReductionConfig:
    return TokenReductionConfig(**{"ratio": 0.5, "round_to": 1, "end_dense_steps": 0, **fields})


def on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    return [on_device(one) for one in value] if isinstance(value, list) else value


def denoise(host: Host, steps: int = 4, batch: int = 2) -> Tensor:
    """On the device, from arguments made on the CPU; shapes of pictures stay plain numbers."""
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            given = {name: on_device(value) for name, value in host.arguments(step / steps, batch).items()}
            output = host.model(**given, return_dict=False)[0]
            outputs.append(torch.stack(output) if isinstance(output, list) else output)
    return torch.stack(outputs)


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_that_drop_nothing_change_nothing(
    host: Host, tiny: SimpleNamespace, scope: Any, dtype: torch.dtype
) -> None:
    host = tiny.in_precision(host, dtype)
    host.model.to(DEVICE)
    expected = denoise(host)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for fields in ({}, {"keep_kv": False, "recovery": "copy", "proportional_attention": True}):
        with token_reduction(host.model, config=settings(scope=scope, matcher=tiny.keeps_all(), **fields)):
            assert (denoise(host) - expected).abs().max() <= tolerance * expected.abs().max()
        with token_reduction(host.model, config=settings(scope=scope, **fields)) as reduction:
            assert denoise(host).isfinite().all()
            assert [record.mode for record in reduction.steps] == ["match", "reduce", "reduce", "reduce"]
    assert torch.equal(denoise(host), expected)


def test_destinations_are_the_cpus(tiny: SimpleNamespace) -> None:
    """They are drawn on the CPU: what is kept when every source is dropped does not depend on the device."""
    kept: list[list[Tensor]] = []
    for device in ("cpu", DEVICE):
        host = tiny.hosts["flux"]()
        host.model.to(device)
        events: list[Any] = []
        with token_reduction(host.model, config=settings(ratio=0.75), observer=events.append):
            denoise(host, 1) if device == DEVICE else host(0.0)
        kept.append([event.correspondence.keep.cpu() for event in events])
    assert len(kept[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_a_reduction_step_waits_for_the_device_once(tiny: SimpleNamespace, scope: Any) -> None:
    """To read its time; where tokens go is known by then."""
    host = tiny.hosts["flux"]()
    host.model.to(DEVICE)
    given = [{name: on_device(value) for name, value in host.arguments(step / 4, 2).items()} for step in range(4)]
    with token_reduction(host.model, config=settings(scope=scope)) as reduction, torch.no_grad():
        for step in range(3):
            host.model(**given[step])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                host.model(**given[3])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert reduction.steps[-1].mode == "reduce"
    with warnings.catch_warnings(record=True) as of_host, torch.no_grad():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        host.model(**given[3])
        torch.cuda.set_sync_debug_mode("default")
    waits = [sum("synchroniz" in str(warning.message) for warning in some) for some in (caught, of_host)]
    assert waits[0] == waits[1] + 1, waits


def test_memory_is_what_the_handle_says_and_given_back(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["dit"]()
    host.model.to(DEVICE)
    denoise(host, 1)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with token_reduction(host.model, config=settings(recovery="delta")) as reduction:
        denoise(host, 3)
        gc.collect()
        held = torch.cuda.memory_allocated() - before
        # The allocator rounds every tensor up to 512 bytes; latents of the last call are kept beside pairs and offsets.
        said = reduction.plan_bytes() + reduction.offset_bytes()
        assert said <= held <= said + 2 * 20 * 512 + 2**16
    del reduction
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**12


@pytest.mark.parametrize("name", ["flux", "sd3", "z_image"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offload(name: str, order: str, tiny: SimpleNamespace) -> None:
    pipe = tiny.pipes[name]()
    pipe.pipe.to(DEVICE)
    with token_reduction(pipe.pipe, config=settings()):
        expected = pipe().cpu()
    pipe = tiny.pipes[name]()
    if order == "before":
        reduction = apply_token_reduction(pipe.pipe, settings())
        pipe.pipe.enable_model_cpu_offload()
    else:
        pipe.pipe.enable_model_cpu_offload()
        reduction = apply_token_reduction(pipe.pipe, settings())
    for _ in range(2):
        torch.testing.assert_close(pipe().cpu(), expected, rtol=1e-3, atol=1e-3)
    assert sum(record.mode == "reduce" for record in reduction.steps) >= 4
    reduction.remove()
    assert pipe().isfinite().all()


@pytest.mark.parametrize("name", ["flux", "pixart", "sd3"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("scope", ["attn", "block"])
def test_sequential_offload(name: str, order: str, scope: Any, tiny: SimpleNamespace) -> None:
    """Weights come to the device module by module, blocks' own ones included."""
    pipe = tiny.pipes[name]()
    pipe.pipe.to(DEVICE)
    with token_reduction(pipe.pipe, config=settings(scope=scope)):
        expected = pipe().cpu()
    pipe = tiny.pipes[name]()
    if order == "before":
        reduction = apply_token_reduction(pipe.pipe, settings(scope=scope))
        pipe.pipe.enable_sequential_cpu_offload()
    else:
        pipe.pipe.enable_sequential_cpu_offload()
        reduction = apply_token_reduction(pipe.pipe, settings(scope=scope))
    torch.testing.assert_close(pipe().cpu(), expected, rtol=1e-3, atol=1e-3)
    reduction.remove()
    assert pipe().isfinite().all()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_group_offload(name: str, order: str, offload_type: str, use_stream: bool, tiny: SimpleNamespace) -> None:
    host = tiny.hosts[name]()
    host.model.to(DEVICE)
    with token_reduction(host.model, config=settings()):
        expected = denoise(host).cpu()
    host = tiny.hosts[name]()
    options = {
        "onload_device": torch.device(DEVICE),
        "offload_device": torch.device("cpu"),
        "offload_type": offload_type,
        "num_blocks_per_group": 1,
        "use_stream": use_stream,
    }
    if order == "before":
        reduction = apply_token_reduction(host.model, settings())
        host.model.enable_group_offload(**options)
    else:
        host.model.enable_group_offload(**options)
        reduction = apply_token_reduction(host.model, settings())
    for _ in range(2):
        torch.testing.assert_close(denoise(host).cpu(), expected, rtol=1e-3, atol=1e-3)
    reduction.remove()


def test_flux2_with_layers_that_move_is_refused_with_dense_keys(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux2"]()
    host.model.enable_group_offload(
        onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pytest.raises(ValueError, match="recast or moved when it is called"):
        apply_token_reduction(host.model, settings())
    with token_reduction(host.model, config=settings(keep_kv=False)):
        assert denoise(host).isfinite().all()
