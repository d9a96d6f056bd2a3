"""Stock pipelines around tiny real transformers: guidance, references, adapters, offloading."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
)
from torch import Tensor, nn

from wellposed.dito import attention
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import MatchEvent, TokenReduction, apply_token_reduction, token_reduction
from wellposed.dito.registry import hooks_of
from wellposed.dito.schedule import FixedInterval
from wellposed.hooks import full_covariance

Host = Any
Pipe = Any


def settings(**fields: Any) -> TokenReductionConfig:
    return TokenReductionConfig(**{"ratio": 0.5, "round_to": 1, "end_dense_steps": 0, **fields})


def modes(reduction: TokenReduction, context: str = "default") -> str:
    return "".join(record.mode[0] for record in reduction.steps if record.context == context)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape and expected.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- every pipeline


def test_generations_repeat_and_the_pipeline_is_left_as_it_was(pipe: Pipe, tiny: SimpleNamespace) -> None:
    dense = pipe()
    with token_reduction(pipe.pipe, config=settings(matcher=tiny.keeps_all())):
        assert_close(pipe(), dense, 1e-4)
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        first, steps = pipe(), list(reduction.steps)
        assert torch.equal(pipe(), first) and reduction.steps == steps
    assert first.isfinite().all() and not torch.equal(first, dense)
    assert torch.equal(pipe(), dense)
    assert {record.mode for record in steps} == {"match", "reduce"}
    contexts = {record.context for record in steps}
    assert contexts in ({"default"}, {"cond"}, {"cond", "uncond"})
    for context in contexts:
        assert "".join(record.mode[0] for record in steps if record.context == context) == "mrrrmr"


def test_the_last_step_is_dense_by_default(pipe: Pipe) -> None:
    with token_reduction(pipe.pipe, ratio=0.5, round_to=1) as reduction:
        pipe()
    assert all(modes(reduction, context).endswith("d") for context in {record.context for record in reduction.steps})


@pytest.mark.parametrize("name", ["flux", "sd3", "z_image"])
def test_sizes_one_after_the_other(name: str, tiny: SimpleNamespace) -> None:
    """Each picture is what it would be alone; the record and the memory are the last one's."""
    pipe = tiny.pipes[name]()
    sizes = [(64, 96), (96, 64), (64, 96)]
    alone = []
    for height, width in sizes:
        with token_reduction(pipe.pipe, config=settings()):
            alone.append(pipe(height=height, width=width))
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        for (height, width), expected in zip(sizes, alone, strict=True):
            assert torch.equal(pipe(height=height, width=width), expected)
            num_tokens = height * width // 16**2
            assert all(dropped.shape[1] == num_tokens for dropped in reduction.drop_counts().values())


def test_batches_one_after_the_other(tiny: SimpleNamespace) -> None:
    pipe = tiny.pipes["sd3"]()
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        first = pipe()
        pipe(**{name: x.expand(2, *x.shape[1:]) for name, x in pipe.arguments.items() if isinstance(x, Tensor)})
        assert all(len(dropped) == 4 for dropped in reduction.drop_counts().values())
        assert torch.equal(pipe(), first)
        assert len(reduction.steps) == 6


@pytest.mark.parametrize("stop_after", [2])
def test_an_interrupted_pipeline_starts_anew(pipe: Pipe, stop_after: int) -> None:
    def stop(pipeline: Any, step: int, *args: Any) -> dict[str, Any]:
        if step + 1 == stop_after:
            raise KeyboardInterrupt
        return {}

    with token_reduction(pipe.pipe, config=settings()) as reduction:
        expected = pipe(seed=3)
        names = pipe.pipe.__call__.__func__.__wrapped__.__code__.co_varnames
        if "callback_on_step_end" in names:
            with pytest.raises(KeyboardInterrupt):
                pipe(seed=4, callback_on_step_end=stop)
        else:  # DiT and PixArt have no such callback: their scheduler is stopped
            step = pipe.pipe.scheduler.step
            left = iter(range(stop_after - 1))

            def fail(*args: Any, **kwargs: Any) -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return step(*args, **kwargs)

            pipe.pipe.scheduler.step = fail
            with pytest.raises(KeyboardInterrupt):
                pipe(seed=4)
            pipe.pipe.scheduler.step = step
        assert torch.equal(pipe(seed=3), expected)
        per_branch = len(reduction.steps) / len({record.context for record in reduction.steps})
        assert per_branch == 6


# --- guidance


def test_named_contexts_of_guidance(tiny: SimpleNamespace) -> None:
    pipe = tiny.pipes["flux"]()
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        pipe(true_cfg_scale=3.0)
        assert modes(reduction, "cond") == modes(reduction, "uncond") == "mrrrmr"
        pipe()
        assert {record.context for record in reduction.steps} == {"cond"}
    events: list[MatchEvent] = []
    with token_reduction(pipe.pipe, config=settings(), observer=events.append):
        pipe(true_cfg_scale=3.0)
    assert {event.context for event in events} == {"cond", "uncond"}


def flux_with(tiny: SimpleNamespace, kind: Any, **parts: Any) -> Pipe:
    """Another pipeline around the same transformer, which never names its calls."""
    base = tiny.pipes["flux"]()
    components = {**base.pipe.components, "vae": tiny.vae(), **parts}
    pipe = kind(**{name: part for name, part in components.items() if name in kind.__init__.__code__.co_varnames})
    pipe.set_progress_bar_config(disable=True)
    small = {"height": 2 * tiny.rows, "width": 2 * tiny.columns}
    return type(base)(pipe, {**base.arguments, **small})


def picture(tiny: SimpleNamespace, seed: int = 40) -> Tensor:
    return tiny.noise(1, 3, 2 * tiny.rows, 2 * tiny.columns, seed=seed).tanh() / 2 + 0.5


def test_unnamed_calls_of_guidance(tiny: SimpleNamespace) -> None:
    """Two calls a step without contexts: two trajectories of the same name."""
    pipe = flux_with(tiny, FluxImg2ImgPipeline)
    call: dict[str, Any] = {"image": picture(tiny), "strength": 1.0, "true_cfg_scale": 3.0}
    dense = pipe(**call)
    with token_reduction(pipe.pipe, config=settings(matcher=tiny.keeps_all())):
        assert_close(pipe(**call), dense, 1e-4)
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        found = pipe(**call)
        assert modes(reduction) == "mmrrrrrrmmrr"
        assert torch.equal(pipe(**call), found)
        assert all(len(dropped) == 2 for dropped in reduction.drop_counts().values())


def test_img2img_after_txt2img(tiny: SimpleNamespace) -> None:
    """It begins in the middle of a generation, earlier than where the last one ended."""
    text = flux_with(tiny, tiny.pipes["flux"]().pipe.__class__)
    image = flux_with(tiny, FluxImg2ImgPipeline)
    image.pipe.transformer = text.pipe.transformer
    call = {"image": picture(tiny), "strength": 0.7}
    with token_reduction(text.pipe, config=settings()) as reduction:
        expected_text = text()
        expected = image(**call)
        assert modes(reduction) == "mrrrm"
        for _ in range(2):
            assert torch.equal(text(), expected_text)
            assert modes(reduction, "cond") == "mrrrmr"
            assert torch.equal(image(**call), expected)


def test_two_stage_solvers(tiny: SimpleNamespace) -> None:
    """Heun calls the model twice a step; both are steps of one trajectory."""
    pipe = tiny.pipes["sd3"]()
    pipe.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    dense = pipe()
    with token_reduction(pipe.pipe, config=settings(matcher=tiny.keeps_all())):
        assert_close(pipe(), dense, 1e-3)
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        found = pipe()
        assert modes(reduction) == "mrrrmrrrmrr"
        assert torch.equal(pipe(), found) and found.isfinite().all()


def test_skip_layer_guidance(tiny: SimpleNamespace) -> None:
    """A third pass of half the batch at some steps has pairs of its own, and leaves those of the others alone."""
    pipe = tiny.pipes["sd3"]()
    plain = {"num_inference_steps": 8, "guidance_scale": 4.0}
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.7}
    dense = pipe(**plain, **skipping)
    with token_reduction(pipe.pipe, config=settings(matcher=tiny.keeps_all())):
        assert_close(pipe(**plain, **skipping), dense, 1e-3)
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        found = pipe(**plain, **skipping)
        of_both = [record for record in reduction.steps if record.step < 8]
        assert len(reduction.steps) == 8 + 4
        assert [record.mode[0] for record in of_both].count("m") == 2 + 1
        assert modes(reduction) == "mr" + "rm" + "rr" + "mr" + "rr" + "rr"
        assert torch.equal(pipe(**plain, **skipping), found)
        pipe(**plain)
        assert modes(reduction) == "mrrrmrrr"


# --- references, residuals


def test_tokens_of_a_reference_image_stay(tiny: SimpleNamespace) -> None:
    """FLUX Kontext: the reference's tokens follow the picture's; none is dropped, none is followed."""
    pipe = flux_with(tiny, FluxKontextPipeline)
    call = {"image": picture(tiny), "_auto_resize": False, "max_area": 96}
    events: list[MatchEvent] = []
    dense = pipe(**call)
    for scope in ("attn", "block"):
        with token_reduction(pipe.pipe, config=settings(scope=scope, matcher=tiny.keeps_all())):
            assert_close(pipe(**call), dense, 1e-4)
        with token_reduction(pipe.pipe, config=settings(scope=scope, ratio=0.25), observer=events.append) as reduction:
            assert pipe(**call).isfinite().all()
            for dropped in reduction.drop_counts().values():
                assert dropped.shape == (1, 2 * tiny.tokens)
                assert dropped[:, tiny.tokens :].sum() == 0 and dropped.sum() == 4 * 12
    assert all((event.correspondence.target < tiny.tokens).all() for event in events)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("scope", ["attn", "block"])
def test_references_of_qwen_image(tiny: SimpleNamespace, scope: Any, zero_cond_t: bool) -> None:
    """Also where reference tokens have a modulation of their own."""
    host = tiny.hosts["qwen"]()
    if zero_cond_t:
        host.model.zero_cond_t = True
        for block in host.model.transformer_blocks:
            block.zero_cond_t = True
    reference = tiny.noise(2, 8, 4, seed=60)

    def call(progress: float) -> Tensor:
        given = host.arguments(progress, 2)
        given["hidden_states"] = torch.cat([given["hidden_states"], reference], 1)
        given["img_shapes"] = [[(1, tiny.rows, tiny.columns), (1, 2, 4)]] * 2
        with torch.no_grad():
            return host.model(**given, return_dict=False)[0]

    dense = [call(progress) for progress in (0.0, 0.1)]
    with token_reduction(host.model, config=settings(scope=scope, matcher=tiny.keeps_all())):
        for progress, expected in zip((0.0, 0.1), dense, strict=True):
            assert_close(call(progress), expected, 1e-5)
    with token_reduction(host.model, config=settings(scope=scope)) as reduction:
        call(0.0)
        assert not torch.allclose(call(0.1), dense[1])
        for dropped in reduction.drop_counts().values():
            assert dropped[:, tiny.tokens :].sum() == 0 and dropped.sum() == 2 * 16


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own ControlNet uses it
@pytest.mark.parametrize("scope", ["attn", "block"])
def test_a_control_net(tiny: SimpleNamespace, scope: Any) -> None:
    """Its residuals are of full length, between the blocks, and its own blocks are no part of the model."""
    controlnet = FluxControlNetModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for seed, parameter in enumerate(controlnet.parameters()):
        parameter.data = 0.2 * tiny.noise(*parameter.shape, seed=seed)
    pipe = flux_with(tiny, FluxControlNetPipeline, controlnet=controlnet.eval())
    call = {"control_image": picture(tiny), "controlnet_conditioning_scale": 0.5}
    dense = pipe(**call)
    assert not torch.allclose(dense, pipe(**{**call, "controlnet_conditioning_scale": 0.0}))
    with token_reduction(pipe.pipe, config=settings(scope=scope, matcher=tiny.keeps_all())):
        assert_close(pipe(**call), dense, 1e-4)
    with token_reduction(pipe.pipe, config=settings(scope=scope)) as reduction:
        found = pipe(**call)
        assert found.isfinite().all() and modes(reduction) == "mrrrmr"
        assert not any("forward" in vars(module) for module in controlnet.modules())


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_residuals_of_a_control_net(name: str, tiny: SimpleNamespace) -> None:
    host = tiny.hosts[name]()
    word = "block_controlnet_hidden_states" if name == "sd3" else "controlnet_block_samples"

    def call(progress: float) -> Tensor:
        residuals = {word: [tiny.noise(2, tiny.tokens, 32, seed=70)]}
        with torch.no_grad():
            return host.model(**host.arguments(progress, 2), **residuals, return_dict=False)[0]

    dense = call(0.1)
    assert not torch.equal(dense, host(0.1))
    with token_reduction(host.model, config=settings(matcher=tiny.keeps_all())):
        call(0.0)
        assert_close(call(0.1), dense, 1e-5)


# --- adapters and quantised layers


class LowRank(nn.Module):
    """What PEFT puts in place of a linear layer."""

    def __init__(self, base: nn.Linear, seed: int, noise: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        for number, layer in enumerate((self.lora_A, self.lora_B)):
            layer.weight.data = 0.3 * noise(*layer.weight.shape, seed=seed + number)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class EightBits(nn.Module):
    """A linear layer whose weight is stored as integers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "net.2", "w1")


def replace_layers(model: nn.Module, make: Any, names: tuple[str, ...] = LAYERS) -> int:
    found = [name for name, module in model.named_modules() if name.endswith(names) and type(module) is nn.Linear]
    for number, name in enumerate(found):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        made = make(model.get_submodule(name), number)
        setattr(owner, child, made)  # also of a list: its children are attributes by number
    return len(found)


@pytest.mark.parametrize(("scope", "kind"), [("attn", "int8"), ("block", "lora")])
def test_adapters_and_quantised_layers(host: Host, tiny: SimpleNamespace, scope: Any, kind: str) -> None:
    """They are called as modules; nothing reads their weights."""
    plain = host.denoise(2)

    def make(layer: nn.Linear, number: int) -> nn.Module:
        return LowRank(layer, 2 * number, tiny.noise) if kind == "lora" else EightBits(layer)

    assert replace_layers(host.model, make) > 5
    host.model.eval().requires_grad_(False)
    expected = host.denoise(2)
    assert not torch.equal(expected, plain)
    with token_reduction(host.model, config=settings(scope=scope, matcher=tiny.keeps_all())):
        assert_close(host.denoise(2), expected, 2e-5)
    with token_reduction(host.model, config=settings(scope=scope)) as reduction:
        assert host.denoise(2).isfinite().all() and modes(reduction) == "mr"


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_an_adapter_on_flux2s_fused_projection(tiny: SimpleNamespace, scope: Any) -> None:
    """Keys of all tokens cannot be had from it alone: refused at the door, and when it is loaded later."""
    host = tiny.hosts["flux2"]()
    reduction = apply_token_reduction(host.model, settings(scope=scope))
    host.denoise(2)
    assert replace_layers(host.model, lambda layer, n: LowRank(layer, n, tiny.noise), ("to_qkv_mlp_proj",)) == 2
    with pytest.raises(ValueError, match="one LowRank, of which only a plain Linear.*keep_kv=False"):
        host(0.0)
    reduction.remove()
    with pytest.raises(ValueError, match="one LowRank, of which only a plain Linear.*keep_kv=False"):
        apply_token_reduction(host.model, settings(scope=scope))
    expected = host.denoise(2)
    for fields in ({}, {"proportional_attention": True}):
        config = settings(scope=scope, keep_kv=False, matcher=tiny.keeps_all(), **fields)
        with token_reduction(host.model, config=config):
            assert_close(host.denoise(2), expected, 2e-5)


def test_the_attention_back_end_is_the_hosts(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    host = tiny.hosts["flux"]()
    seen: list[Any] = []
    dispatch = attention.dispatch_attention_fn

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["backend"])
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", watched)
    for scope in ("attn", "block"):
        with token_reduction(host.model, config=settings(scope=scope)):
            host.denoise(2)
            host.model.set_attention_backend("_native_math")  # while it is on
            host.denoise(2)
        assert [str(getattr(name, "value", name)) for name in seen] == ["None"] * 4 + ["_native_math"] * 4
        seen.clear()
        assert all(block.attn.processor._attention_backend is not None for block in host.model.transformer_blocks)
        host.model.reset_attention_backend()


# --- weights that move or are recast, switched on before or after

ORDERS = [("attn", "after"), ("block", "before"), ("block", "after")]


@pytest.mark.parametrize(("scope", "order"), ORDERS)
def test_layerwise_casting(host: Host, tiny: SimpleNamespace, scope: Any, order: str) -> None:
    keep_kv = host.name != "flux2"
    config = settings(scope=scope, keep_kv=keep_kv, matcher=tiny.keeps_all())
    if order == "before":
        reduction = apply_token_reduction(host.model, config)
    host.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if order == "after":
        expected = host.denoise(2)
        reduction = apply_token_reduction(host.model, config)
        assert_close(host.denoise(2), expected, 2e-5)
        reduction.remove()
    else:
        found = host.denoise(2)
        reduction.remove()
        expected = host.denoise(2)
        assert_close(found, expected, 2e-5)
    with token_reduction(host.model, config=settings(scope=scope, keep_kv=keep_kv)) as reduction:
        assert not torch.equal(host.denoise(2)[1], expected[1]) and modes(reduction) == "mr"
    assert torch.equal(host.denoise(2), expected)


def test_layerwise_casting_of_flux2_is_refused_with_dense_keys(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux2"]()
    host.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="recast or moved when it is called.*keep_kv=False"):
        apply_token_reduction(host.model, settings())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("scope", "offload_type"), [("attn", "leaf_level"), ("block", "block_level")])
def test_group_offloading(host: Host, scope: Any, order: str, offload_type: str) -> None:
    if host.name == "dit":  # diffusers does not offer it there
        return
    keep_kv = host.name != "flux2" or offload_type == "block_level"
    config = settings(scope=scope, keep_kv=keep_kv)
    with token_reduction(host.model, config=config):
        expected = host.denoise(2)
    options = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "num_blocks_per_group": 1}
    if order == "before":
        reduction = apply_token_reduction(host.model, config)
        host.model.enable_group_offload(offload_type=offload_type, **options)
    else:
        host.model.enable_group_offload(offload_type=offload_type, **options)
        reduction = apply_token_reduction(host.model, config)
    assert torch.equal(host.denoise(2), expected)
    reduction.remove()
    names = {name for module in host.model.modules() for name in hooks_of(module)}
    assert not any("token_reduction" in name for name in names) and any("group_offload" in name for name in names)
    assert not torch.equal(host.denoise(2), expected)


@pytest.mark.parametrize(("scope", "order"), ORDERS)
def test_sequential_offloading(host: Host, scope: Any, order: str) -> None:
    """accelerate: weights are on the device only while their own module runs, and on "meta" otherwise."""
    keep_kv = host.name != "flux2"
    config = settings(scope=scope, keep_kv=keep_kv)
    dense = host.denoise(2)
    with token_reduction(host.model, config=config):
        expected = host.denoise(2)
    if order == "before":
        reduction = apply_token_reduction(host.model, config)
        cpu_offload(host.model, torch.device("cpu"), offload_buffers=True)
    else:
        cpu_offload(host.model, torch.device("cpu"), offload_buffers=True)
        reduction = apply_token_reduction(host.model, config)
    assert next(host.model.parameters()).is_meta
    assert torch.equal(host.denoise(2), expected)
    reduction.remove()
    assert torch.equal(host.denoise(2), dense)
    remove_hook_from_module(host.model, recurse=True)
    assert torch.equal(host.denoise(2), dense)


def test_sequential_offloading_of_flux2_is_refused_with_dense_keys(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux2"]()
    cpu_offload(host.model, torch.device("cpu"))
    with pytest.raises(ValueError, match="recast or moved when it is called.*keep_kv=False"):
        apply_token_reduction(host.model, settings())


def test_offloading_that_goes_away_under_it_is_said(tiny: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """accelerate puts back the forwards that it found, and ours are lost: nothing is reduced, which is said once."""
    host = tiny.hosts["pixart"]()  # whose blocks have weights of their own, so that they are wrapped themselves
    dense = host.denoise(2)
    cpu_offload(host.model, torch.device("cpu"), offload_buffers=True)
    with token_reduction(host.model, config=settings()):
        assert not torch.equal(host.denoise(2), dense)
        remove_hook_from_module(host.model, recurse=True)
        assert torch.equal(host.denoise(4)[::2], dense)
    assert sum("nothing is reduced" in record.getMessage() for record in caplog.records) == 1
    assert torch.equal(host.denoise(2), dense)


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offloading_is_renewed_after_every_call(name: str, order: str, tiny: SimpleNamespace) -> None:
    """What ``enable_model_cpu_offload`` does to the transformer, on this machine's only device."""
    pipe = tiny.pipes[name]()
    dense = pipe()
    with token_reduction(pipe.pipe, config=settings()):
        expected = pipe()
    if order == "before":
        reduction = apply_token_reduction(pipe.pipe, settings())
        cpu_offload_with_hook(pipe.transformer, "cpu")
    else:
        cpu_offload_with_hook(pipe.transformer, "cpu")
        reduction = apply_token_reduction(pipe.pipe, settings())
    for _ in range(2):
        assert torch.equal(pipe(), expected)
        remove_hook_from_module(pipe.transformer, recurse=True)
        cpu_offload_with_hook(pipe.transformer, "cpu")
    assert "mrrrmr" in (modes(reduction), modes(reduction, "cond"))
    reduction.remove()
    assert torch.equal(pipe(), dense)
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(pipe(), dense)
    assert not any("forward" in vars(module) for name, module in pipe.transformer.named_modules() if name)


# --- the other room


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_full_covariance_and_token_reduction_refuse_each_other(name: str, tiny: SimpleNamespace) -> None:
    pipe = tiny.pipes[name]()
    if name == "dit":
        pipe.pipe.scheduler.register_to_config(clip_sample=False)
    with (
        token_reduction(pipe.pipe),
        pytest.raises(ValueError, match="token reduction is on the transformer"),
        full_covariance(pipe.pipe),
    ):
        pass
    with full_covariance(pipe.pipe), pytest.raises(ValueError, match="leave the full_covariance block first"):
        apply_token_reduction(pipe.pipe)
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        pipe(num_inference_steps=2)
        assert modes(reduction) == "mr"


def test_schedules_of_one_step_are_dense(tiny: SimpleNamespace) -> None:
    """Distilled models: a single step has nothing to reuse."""
    pipe = tiny.pipes["flux"]()
    pipe.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    dense = pipe(num_inference_steps=1)
    with token_reduction(pipe.pipe, config=settings(schedule=FixedInterval(interval=2))) as reduction:
        for _ in range(3):
            assert torch.equal(pipe(num_inference_steps=1), dense)
            assert modes(reduction, "cond") == "m"
