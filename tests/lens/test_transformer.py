"""The network: published sizes, a plain second derivation of all of it, what padding and text may do, its shells."""

import math
import multiprocessing
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from wellposed.lens.transformer import LensTransformer2DModel, rotary_tables, rotate, rounded_timestep

Build = Callable[..., LensTransformer2DModel]
Inputs = Callable[..., dict[str, Any]]

BLOCK = {
    "attn.norm_q.weight": (64,),
    "attn.norm_k.weight": (64,),
    "attn.norm_added_q.weight": (64,),
    "attn.norm_added_k.weight": (64,),
    "attn.img_qkv.weight": (4608, 1536),
    "attn.img_qkv.bias": (4608,),
    "attn.txt_qkv.weight": (4608, 1536),
    "attn.txt_qkv.bias": (4608,),
    "attn.to_out.0.weight": (1536, 1536),
    "attn.to_out.0.bias": (1536,),
    "attn.to_add_out.weight": (1536, 1536),
    "attn.to_add_out.bias": (1536,),
    "img_mod.1.weight": (9216, 1536),
    "img_mod.1.bias": (9216,),
    "txt_mod.1.weight": (9216, 1536),
    "txt_mod.1.bias": (9216,),
    "img_norm1.weight": (1536,),
    "img_norm2.weight": (1536,),
    "txt_norm1.weight": (1536,),
    "txt_norm2.weight": (1536,),
    **{
        f"{stream}_mlp.{name}.weight": shape
        for stream in ("img", "txt")
        for name, shape in (("w1", (4096, 1536)), ("w2", (1536, 4096)), ("w3", (4096, 1536)))
    },
}
REST = {
    "time_text_embed.timestep_embedder.linear_1.weight": (1536, 256),
    "time_text_embed.timestep_embedder.linear_1.bias": (1536,),
    "time_text_embed.timestep_embedder.linear_2.weight": (1536, 1536),
    "time_text_embed.timestep_embedder.linear_2.bias": (1536,),
    **{f"txt_norm.{i}.weight": (2880,) for i in range(4)},
    "txt_in.weight": (1536, 11520),
    "txt_in.bias": (1536,),
    "img_in.weight": (1536, 128),
    "img_in.bias": (1536,),
    "norm_out.linear.weight": (3072, 1536),
    "norm_out.linear.bias": (3072,),
    "proj_out.weight": (128, 1536),
    "proj_out.bias": (128,),
}


@pytest.fixture(scope="module")
def published() -> LensTransformer2DModel:
    with torch.device("meta"):
        return LensTransformer2DModel().eval()


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_published_names_and_shapes(published: LensTransformer2DModel) -> None:
    expected = REST | {f"transformer_blocks.{i}.{name}": shape for i in range(48) for name, shape in BLOCK.items()}
    found = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    assert len(found) == 1264
    assert found == expected


def test_published_number_of_parameters(published: LensTransformer2DModel) -> None:
    sizes = {name: tensor.numel() for name, tensor in published.state_dict().items()}
    total = sum(sizes.values())
    assert total == 4_104_225_152
    assert round(total / 2**30, 3) == 3.822  # what is advertised as 3.8 billion
    assert sum(n for name, n in sizes.items() if name.startswith("transformer_blocks.7.")) == 84_971_776
    assert sum(n for name, n in sizes.items() if "_mod." in name) == 1_359_839_232
    assert sum(n for name, n in sizes.items() if "_mlp." in name) == 1_811_939_328
    assert sum(n for name, n in sizes.items() if ".attn." in name) == 906_571_776


def test_the_published_config_is_the_default(published: LensTransformer2DModel) -> None:
    fields = {name: value for name, value in published.config.items() if not name.startswith("_")}
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()} == {
        "patch_size": 2,
        "in_channels": 128,
        "out_channels": 32,
        "num_layers": 48,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "inner_dim": 1536,
        "enc_hidden_dim": 2880,
        "axes_dims_rope": [8, 28, 28],
        "gate_mlp": True,
        "rms_norm": True,
        "multi_layer_encoder_feature": True,
        "selected_layer_index": [5, 11, 17, 23],
    }


def flops(rows: int, columns: int, text: int) -> int:
    """Counted at one and at two blocks, which is faster than at 48."""

    def of(num_layers: int) -> int:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            features = [torch.empty(1, text, 2880) for _ in range(4)]
            latents, shapes = torch.empty(1, rows * columns, 128), [(1, rows, columns)]
            LensTransformer2DModel(num_layers=num_layers)(latents, features, timestep=torch.empty(1), img_shapes=shapes)
        return counter.get_total_flops()

    one, two = of(1), of(2)
    return one + 47 * (two - one)


@pytest.mark.parametrize(("side", "published_flops"), [(512, 3.7e12), (768, 8.6e12), (1024, 1.70e13), (1440, 4.3e13)])
def test_cost_follows_the_formula(side: int, published_flops: float) -> None:
    """2 W (N + S) for the weights that act on a token, 4 (N + S)^2 d L for attention."""
    image, text = (side // 16) ** 2, 180
    found = flops(side // 16, side // 16, text)
    acting = 48 * (4 * 1536**2 + 3 * 1536 * 4096)
    length = image + text
    formula = 2 * acting * length + 4 * length**2 * 1536 * 48
    assert acting == pytest.approx(1.359e9, rel=1e-3)
    assert found == pytest.approx(formula, rel=5e-3)
    assert found == pytest.approx(published_flops, rel=0.02)
    # To the last operation: what acts once for a token, or once for a picture.
    once = 2 * (48 * 2 * 6 * 1536**2 + 256 * 1536 + 1536**2 + 2 * 1536**2)
    assert found == formula + once + 2 * (image * 2 * 128 * 1536 + text * 11520 * 1536)


def test_no_text_costs_what_the_tokens_say() -> None:
    with_text, without = flops(32, 32, 180), flops(32, 32, 0)
    assert without / with_text == pytest.approx(1024 / 1204, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# A second derivation


def plain_lens(
    state: dict[str, Tensor],
    x: Tensor,
    features: list[Tensor],
    mask: Tensor,
    t: Tensor,
    grid: tuple[int, int],
    axes: tuple[int, int, int],
) -> Tensor:
    """The whole network from its equations, one head at a time, with complex rotations and an explicit softmax."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    head = state["transformer_blocks.0.attn.norm_q.weight"].numel()
    width = state["img_in.weight"].shape[0]

    def linear(name: str, value: Tensor) -> Tensor:
        out = value @ state[f"{name}.weight"].T
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    def rms(name: str, value: Tensor, eps: float) -> Tensor:
        return value / (value.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]

    def block_norm(name: str, value: Tensor) -> Tensor:
        if f"{name}.weight" in state:
            return rms(name, value, 1e-6)
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(value: Tensor) -> Tensor:
        return value / (1 + (-value).exp())

    def mlp(name: str, value: Tensor) -> Tensor:
        if f"{name}.w1.weight" in state:
            return linear(f"{name}.w2", silu(linear(f"{name}.w1", value)) * linear(f"{name}.w3", value))
        hidden = linear(f"{name}.net.0.proj", value)
        inner = (2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)
        return linear(f"{name}.net.2", 0.5 * hidden * (1 + inner.tanh()))

    rows, columns = grid
    middle = max(rows // 2, columns // 2)
    places = [
        (0, i - (rows - rows // 2), j - (columns - columns // 2)) for i in range(rows) for j in range(columns)
    ] + [(middle + k,) * 3 for k in range(mask.shape[1])]
    turns = torch.tensor(
        [[place[a] * 10000 ** (-2 * k / d) for a, d in enumerate(axes) for k in range(d // 2)] for place in places],
        dtype=torch.float64,
    )
    turns = torch.polar(torch.ones_like(turns), turns)

    def turned(value: Tensor) -> Tensor:
        pairs = torch.complex(value[..., ::2], value[..., 1::2]) * turns
        return torch.stack([pairs.real, pairs.imag], -1).flatten(-2).to(value.dtype)

    # In float32 as published: at 1000 t = 900 the last bit of an angle is 6e-5.
    angles = 1000 * (t[:, None] * (-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).exp())
    sinusoids = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
    time = "time_text_embed.timestep_embedder.linear"
    e = linear(f"{time}_2", silu(linear(f"{time}_1", sinusoids)))

    h = linear("img_in", x)
    if len(features) > 1:
        c = linear("txt_in", torch.cat([rms(f"txt_norm.{i}", f, 1e-5) for i, f in enumerate(features)], -1))
    else:
        c = linear("txt_in", rms("txt_norm", features[0], 1e-5))
    visible = torch.cat([torch.ones(len(x), x.shape[1], dtype=torch.bool), mask], 1)
    for i in range(depth):
        name = f"transformer_blocks.{i}"
        changes = {s: linear(f"{name}.{s}_mod.1", silu(e)).view(len(x), 6, 1, width) for s in ("img", "txt")}

        def changed(stream: str, norm: str, value: Tensor, first: int, name: str = name, of: Any = changes) -> Tensor:
            return block_norm(f"{name}.{stream}_{norm}", value) * (1 + of[stream][:, first + 1]) + of[stream][:, first]

        image_qkv = linear(f"{name}.attn.img_qkv", changed("img", "norm1", h, 0)).chunk(3, -1)
        text_qkv = linear(f"{name}.attn.txt_qkv", changed("txt", "norm1", c, 0)).chunk(3, -1)
        heads: list[Tensor] = []
        for start in range(0, width, head):
            (iq, ik, iv), (tq, tk, tv) = (
                [part[..., start : start + head] for part in qkv] for qkv in (image_qkv, text_qkv)
            )
            q = torch.cat([rms(f"{name}.attn.norm_q", iq, 1e-6), rms(f"{name}.attn.norm_added_q", tq, 1e-6)], 1)
            k = torch.cat([rms(f"{name}.attn.norm_k", ik, 1e-6), rms(f"{name}.attn.norm_added_k", tk, 1e-6)], 1)
            scores = turned(q) @ turned(k).mT / head**0.5
            scores = scores.masked_fill(~visible[:, None], float("-inf"))
            heads.append(scores.softmax(-1) @ torch.cat([iv, tv], 1))
        image, text = torch.cat(heads, -1).split([h.shape[1], c.shape[1]], 1)
        h = h + changes["img"][:, 2] * linear(f"{name}.attn.to_out.0", image)
        c = c + changes["txt"][:, 2] * linear(f"{name}.attn.to_add_out", text)
        h = h + changes["img"][:, 5] * mlp(f"{name}.img_mlp", changed("img", "norm2", h, 3))
        c = c + changes["txt"][:, 5] * mlp(f"{name}.txt_mlp", changed("txt", "norm2", c, 3))
    scale, shift = linear("norm_out.linear", silu(e))[:, None].chunk(2, -1)
    centred = h - h.mean(-1, keepdim=True)
    h = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return linear("proj_out", h * (1 + scale) + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate_mlp": False, "rms_norm": False, "num_attention_heads": 3},
        {"multi_layer_encoder_feature": False, "axes_dims_rope": [8, 12, 12]},
    ],
)
@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_equal_to_a_plain_derivation(
    build_lens: Build, lens_inputs: Inputs, grid: tuple[int, int], fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = build_lens(**fields).to(dtype)
    arguments = lens_inputs(*grid, padded=2, dtype=dtype)
    if not model.config.multi_layer_encoder_feature:
        del arguments["encoder_hidden_states"][1:]
    with torch.no_grad():
        found = model(**arguments).sample
        expected = plain_lens(
            {name: tensor.to(dtype) for name, tensor in model.state_dict().items()},
            arguments["hidden_states"],
            arguments["encoder_hidden_states"],
            arguments["encoder_hidden_states_mask"],
            arguments["timestep"],
            grid,
            tuple(model.config.axes_dims_rope),
        )
    assert expected.abs().mean() > 0.1
    # In float64 what is left is the float32 of sinusoids and rotations.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 5e-6)


def test_an_untrained_network_says_zero(lens_inputs: Inputs, build_lens: Build) -> None:
    fields = {name: value for name, value in build_lens().config.items() if not name.startswith("_")}
    model = LensTransformer2DModel(**fields)
    assert not model(**lens_inputs()).sample.any()
    zero = {name for name, parameter in model.named_parameters() if not parameter.any() and name.endswith("weight")}
    assert {name.split(".", 2)[-1] if "blocks" in name else name for name in zero} == {
        "img_mod.1.weight",
        "txt_mod.1.weight",
        "norm_out.linear.weight",
        "proj_out.weight",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def angles_of(cos: Tensor, sin: Tensor, axis_start: int) -> Tensor:
    """Of the first pair of an axis, which turns by the position itself."""
    return torch.atan2(sin[:, axis_start], cos[:, axis_start])


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (65, 33), (1, 2)])
def test_places_of_image_and_text(published: LensTransformer2DModel, rows: int, columns: int) -> None:
    tables = published.pos_embed(rows, columns, 5, torch.device("cpu"))
    assert [table.dtype for table in tables] == [torch.float32] * 4
    image, text = tables[:2], tables[2:]
    wrap = 2 * torch.pi

    def turned_by(pair: tuple[Tensor, ...], axis_start: int, positions: Tensor) -> None:
        difference = (angles_of(*pair, axis_start) - positions) / wrap
        torch.testing.assert_close(difference, difference.round(), atol=1e-5, rtol=0)

    assert not angles_of(*image, 0).any()
    row = torch.arange(rows).sub(rows - rows // 2)
    column = torch.arange(columns).sub(columns - columns // 2)
    turned_by(image, 8, row.repeat_interleave(columns))
    turned_by(image, 36, column.repeat(rows))
    for axis_start in (0, 8, 36):
        turned_by(text, axis_start, max(rows // 2, columns // 2) + torch.arange(5))
    if rows == 65:
        assert (row.min(), row.max()) == (-33, 31)
    if rows == 64:
        assert (row.min(), row.max()) == (-32, 31)


def test_rotation_depends_on_differences_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 2, 32, generator=generator, dtype=torch.float64)

    def score(q_place: list[int], k_place: list[int]) -> Tensor:
        turned = [
            rotate(x, *rotary_tables(torch.tensor([place]).float(), (4, 14, 14)))
            for x, place in ((query, q_place), (key, k_place))
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score([1, 2, -3], [2, 0, 4]), score([5, -2, 1], [6, -4, 8]), atol=1e-5, rtol=0)
    assert (score([1, 2, -3], [2, 0, 4]) - score([1, 2, -3], [2, 1, 4])).abs().max() > 1e-2


def test_rotation_turns_neighbouring_channels() -> None:
    cos, sin = rotary_tables(torch.tensor([[1.0, 0.0, 0.0]]), (2, 2, 4))
    x = torch.arange(1.0, 9).view(1, 1, 1, 8)
    found = rotate(x, cos, sin).flatten()
    one = torch.tensor(1.0)
    torch.testing.assert_close(found[0], one.cos() - 2 * one.sin())
    torch.testing.assert_close(found[1], 2 * one.cos() + one.sin())
    assert torch.equal(found[2:], x.flatten()[2:])


def test_casts_leave_positions_exact(build_lens: Build, lens_inputs: Inputs) -> None:
    model = build_lens()
    before = model.pos_embed(5, 7, 9, torch.device("cpu"))
    model.to(torch.bfloat16)
    after = model.pos_embed(5, 7, 9, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not list(model.buffers())
    seen: list[Tensor] = []
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.extend(kwargs["image_rotary_emb"]), with_kwargs=True
    )
    model(**lens_inputs(5, 7, 9, dtype=torch.bfloat16))
    assert torch.equal(seen[0], torch.cat([before[0], before[2]]))
    assert torch.equal(seen[1], torch.cat([before[1], before[3]]))


# ---------------------------------------------------------------------------------------------------------------------
# Text that is padded, masked, or absent


def test_padding_changes_nothing(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens().double(), lens_inputs(dtype=torch.float64)
    short = model(**arguments).sample
    longer = [functional.pad(f, (0, 0, 0, 7), value=3.0) for f in arguments["encoder_hidden_states"]]
    mask = functional.pad(arguments["encoder_hidden_states_mask"], (0, 7))
    padded = {"encoder_hidden_states": longer, "encoder_hidden_states_mask": mask}
    torch.testing.assert_close(model(**arguments | padded).sample, short, rtol=1e-12, atol=1e-12)


def test_masked_text_has_exactly_no_effect(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens(), lens_inputs(padded=4)
    first = model(**arguments).sample
    for feature in arguments["encoder_hidden_states"]:
        feature[-1, -4:] = 100 * torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model(**arguments).sample, first)
    arguments["encoder_hidden_states"][0][0, -1] += 1
    assert not torch.equal(model(**arguments).sample[0], first[0])


def test_no_text_equals_masked_text(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens().double(), lens_inputs(dtype=torch.float64)
    arguments["encoder_hidden_states_mask"] = torch.zeros(2, 6)
    masked = model(**arguments).sample
    empty = {"encoder_hidden_states": [f[:, :0] for f in arguments["encoder_hidden_states"]]}
    none = model(**arguments | empty | {"encoder_hidden_states_mask": torch.zeros(2, 0)}).sample
    torch.testing.assert_close(none, masked, rtol=1e-12, atol=1e-12)
    absent = {"encoder_hidden_states": None, "encoder_hidden_states_mask": None}
    assert torch.equal(model(**arguments | absent).sample, none)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_a_mask_of_ones_is_left_out(build_lens: Build, lens_inputs: Inputs, kind: torch.dtype) -> None:
    model, arguments = build_lens(), lens_inputs()
    masks: list[Any] = []
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["encoder_hidden_states_mask"]), with_kwargs=True
    )
    ones = torch.ones(2, 6, dtype=kind)
    with_mask = model(**arguments | {"encoder_hidden_states_mask": ones}).sample
    without = model(**arguments | {"encoder_hidden_states_mask": None}).sample
    assert masks == [None, None]
    assert torch.equal(with_mask, without)


def test_samples_of_a_batch_do_not_mix(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens(), lens_inputs(padded=2)
    together = model(**arguments).sample
    for i in range(2):
        alone = {name: value[i : i + 1] for name, value in arguments.items() if name != "encoder_hidden_states"}
        alone["encoder_hidden_states"] = [f[i : i + 1] for f in arguments["encoder_hidden_states"]]
        torch.testing.assert_close(model(**alone).sample[0], together[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**arguments).sample, together)


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_official_rounding() -> None:
    t = torch.tensor([0.9942, 0.7672, 1.0, 0.25])
    assert rounded_timestep(t).tolist() == [0.99609375, 0.76953125, 1.0, 0.25]
    torch.testing.assert_close(rounded_timestep(t, torch.float32), t)


def test_time_is_rounded_only_on_request(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens().to(torch.bfloat16), lens_inputs(dtype=torch.bfloat16)
    # One number in bfloat16, and one after the official rounding.
    near, same_after_rounding = torch.tensor([0.7672, 0.7672]), torch.tensor([0.7661, 0.7661])
    assert torch.equal(near.bfloat16(), same_after_rounding.bfloat16())

    def call(t: Tensor, **options: Any) -> Tensor:
        return model(**arguments | {"timestep": t}, **options).sample

    assert not torch.equal(call(near), call(same_after_rounding))
    rounded = call(near, round_timestep=True)
    assert torch.equal(rounded, call(same_after_rounding, round_timestep=True))
    assert torch.equal(rounded, call(rounded_timestep(near)))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def test_exactly_the_text_side_of_the_last_block_is_dead(build_lens: Build, lens_inputs: Inputs) -> None:
    model = build_lens()
    model(**lens_inputs(padded=1)).sample.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    last = "transformer_blocks.1."
    none = {name.removeprefix(last) for name, gradient in gradients.items() if gradient is None}
    assert none == {
        *("attn.to_add_out.weight", "attn.to_add_out.bias", "txt_norm2.weight"),
        *(f"txt_mlp.w{i}.weight" for i in (1, 2, 3)),
    }
    width = 64
    live_rows = {
        "attn.norm_added_q": torch.zeros(32, dtype=torch.bool),
        "attn.txt_qkv": torch.arange(3 * width) >= width,  # all but the queries
        "txt_mod.1": torch.arange(6 * width) < 2 * width,  # shift and scale of attention
    }
    for name, gradient in gradients.items():
        module = name.removeprefix(last).rsplit(".", 1)[0]
        if gradient is None:
            continue
        if name.startswith(last) and module in live_rows:
            assert torch.equal(gradient.flatten(1).any(-1) if gradient.ndim > 1 else gradient != 0, live_rows[module])
        else:
            assert gradient.any(), name


def test_number_of_dead_parameters(published: LensTransformer2DModel) -> None:
    sizes = {name: tensor.numel() for name, tensor in published.transformer_blocks[47].state_dict().items()}
    dead = sum(sizes[f"attn.to_add_out.{kind}"] for kind in ("weight", "bias")) + sizes["txt_norm2.weight"]
    dead += sum(sizes[f"txt_mlp.w{i}.weight"] for i in (1, 2, 3)) + sizes["attn.norm_added_q.weight"]
    dead += sum(sizes[f"attn.txt_qkv.{kind}"] for kind in ("weight", "bias")) // 3
    dead += sum(sizes[f"txt_mod.1.{kind}"] for kind in ("weight", "bias")) * 4 // 6
    assert dead == 33_040_960


def test_gradient_checkpointing_changes_nothing(build_lens: Build, lens_inputs: Inputs) -> None:
    model = build_lens().train()
    gradients: list[dict[str, Tensor]] = []
    for _ in range(2):
        model.zero_grad()
        model(**lens_inputs(padded=2)).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Saved and loaded


@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_save_and_load(build_lens: Build, lens_inputs: Inputs, tmp_path: Path, shard: str) -> None:
    model = build_lens()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "10GB" else 8)
    again = LensTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(**lens_inputs(padded=2)).sample, model(**lens_inputs(padded=2)).sample)
    half, info = LensTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert info["missing_keys"] == []


# ---------------------------------------------------------------------------------------------------------------------
# What diffusers and others put around it


def test_attention_backends(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens(), lens_inputs(padded=2)
    expected = model(**arguments).sample
    assert set(model.attn_processors) == {f"transformer_blocks.{i}.attn.processor" for i in range(2)}
    with attention_backend("native"):  # restores diffusers' default, which the next line changes for every model
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=0)
        model.reset_attention_backend()
    model.fuse_qkv_projections()  # they always are
    assert torch.equal(model(**arguments).sample, expected)


def test_layerwise_casting_spares_ends_norms_and_time(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens().to(torch.bfloat16), lens_inputs(dtype=torch.bfloat16)
    expected = model(**arguments).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    small = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert {".".join(name.split(".")[2:-1]) for name in small} == {
        *("attn.img_qkv", "attn.txt_qkv", "attn.to_out.0", "attn.to_add_out", "img_mod.1", "txt_mod.1"),
        *(f"{stream}_mlp.w{i}" for stream in ("img", "txt") for i in (1, 2, 3)),
    }
    error = (model(**arguments).sample.float() - expected.float()).square().mean() / expected.float().square().mean()
    assert 0 < error < 0.05


def test_group_offloading(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens(), lens_inputs(padded=2)
    expected = model(**arguments).sample
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    torch.testing.assert_close(model(**arguments).sample, expected)


def test_first_block_cache_skips_the_other_blocks(build_lens: Build, lens_inputs: Inputs) -> None:
    model, arguments = build_lens(num_layers=4), lens_inputs(padded=2)
    ran: list[int] = []
    for index, block in enumerate(model.transformer_blocks):
        block.img_mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    expected = model(**arguments).sample
    ran.clear()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with torch.no_grad(), model.cache_context("text"):
        first, second = (model(**arguments).sample for _ in range(2))
        model(**arguments | {"hidden_states": 3 * arguments["hidden_states"].flip(1)})
    assert ran == [0, 1, 2, 3, 0, 0, 1, 2, 3]
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-4)
    model.disable_cache()
    torch.testing.assert_close(model(**arguments).sample, expected)


def test_lora_on_fused_projections(build_lens: Build, lens_inputs: Inputs, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, arguments = build_lens(), lens_inputs()
    expected = model(**arguments).sample
    targets = ["img_qkv", "txt_qkv", "to_out.0", "to_add_out"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = model(**arguments).sample
    assert (adapted - expected).abs().max() > 1e-3
    torch.testing.assert_close(model(**arguments, attention_kwargs={"scale": 0.0}).sample, expected)
    model.save_lora_adapter(tmp_path)
    model.delete_adapters("default")
    torch.testing.assert_close(model(**arguments).sample, expected)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(model(**arguments).sample, adapted)
    model.unload_lora()
    assert torch.equal(model(**arguments).sample, expected)


def test_the_token_layout_says_what_is_so(build_lens: Build, lens_inputs: Inputs) -> None:
    """Everything that it names is there, and attention is given what it says, image first."""
    model, arguments = build_lens(), lens_inputs(padded=2)
    block = model.transformer_blocks[1]
    layout = type(block).token_layout
    assert layout["order"] == "image, text"
    attn = getattr(block, layout["attention"])
    given: dict[str, Any] = {}
    block.register_forward_pre_hook(lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True)
    attn.register_forward_pre_hook(lambda _module, args: given.update(attention=args[0]))
    model(**arguments)
    cos, _sin = given[layout["rotation"]]
    assert cos.shape == (15 + 6, 32)
    assert (cos[:15, 0] == 1).all()  # frame 0
    assert given[layout["text_mask"]].shape == (2, 6)
    metadata = TransformerBlockRegistry.get(type(block))
    image = given[metadata.hidden_states_argument_name]
    attention_input = getattr(block, layout["attention_input"])(image, given[layout["condition"]])
    assert torch.equal(attention_input, given["attention"])
    assert getattr(attn, layout["image_qkv"])(given["attention"]).shape == (2, 15, 3 * attn.inner_dim)
    assert isinstance(getattr(attn, layout["text_qkv"]), torch.nn.Linear)
    outputs = block(**{name: value for name, value in given.items() if name != "attention"})
    assert outputs[metadata.return_hidden_states_index].shape == (2, 15, 64)
    assert outputs[metadata.return_encoder_hidden_states_index].shape == (2, 6, 64)


def on_one_of_two_ranks(rank: int, store: str, call: Callable[[], Tensor], answers: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads did not come along, and it would wait for them
    warnings.simplefilter("ignore", FutureWarning)  # diffusers' collectives have new names in torch
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    answers.put((rank, call().tolist()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("padded", [0, 3])
def test_context_parallel_plan(build_lens: Build, lens_inputs: Inputs, tmp_path: Path, padded: int) -> None:
    """Two ranks with half of the image and half of the text each compute what one computes."""
    model, arguments = build_lens(), lens_inputs(4, 4, padded=padded)
    with torch.no_grad():
        expected = model(**arguments).sample

    @torch.no_grad()
    def in_parallel() -> Tensor:
        config = ContextParallelConfig(ulysses_degree=2)
        mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
        config.setup(dist.get_rank(), 2, torch.device("cpu"), mesh)
        for block in model.transformer_blocks:
            block.attn.processor._parallel_config = ParallelConfig(context_parallel_config=config)
        apply_context_parallel(model, config, model._cp_plan)
        return model(**arguments).sample

    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    work = partial(on_one_of_two_ranks, store=str(tmp_path / "store"), call=in_parallel, answers=answers)
    processes = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; these children use nothing that the threads may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    found = dict(answers.get(timeout=20) for _ in processes)
    for process in processes:
        process.join(5)
    for rank in range(2):
        torch.testing.assert_close(torch.tensor(found[rank]), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_half_precision_is_refused(build_lens: Build, lens_inputs: Inputs, tmp_path: Path) -> None:
    model = build_lens().half()
    arguments = lens_inputs(dtype=torch.float16)
    with pytest.raises(ValueError, match="65504.*bfloat16"):
        model(**arguments)
    build_lens().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="65504"):
        LensTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_shapes": [(1, 3, 4)] * 2}, r"rows \* columns = 15"),
        ({"img_shapes": [(1, 3, 5), (1, 5, 3)]}, "all the same"),
        ({"img_shapes": [(3, 1, 5)] * 2}, r"\(1, rows, columns\)"),
        ({"img_shapes": None}, "img_shapes is None"),
        ({"hidden_states": torch.zeros(2, 15, 12)}, r"expected \(batch, tokens, 16\)"),
        ({"timestep": torch.tensor([300.0, 500.0])}, "divided by 1000"),
        ({"timestep": torch.tensor([0.5])}, "give 2 floating-point numbers"),
        ({"timestep": None}, "timestep is None"),
        ({"encoder_hidden_states": [torch.zeros(2, 6, 64)] * 3}, "3 tensors .* expected 4"),
        ({"encoder_hidden_states": [torch.zeros(2, 6, 60)] * 4}, r"of \(2, text, 64\)"),
        ({"encoder_hidden_states_mask": torch.ones(2, 5)}, r"has shape \(2, 5\); the text has \(2, 6\)"),
        ({"attention_kwargs": {"gamma": 1.0}}, "gamma.*scale"),
    ],
)
def test_bad_inputs(build_lens: Build, lens_inputs: Inputs, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_lens()(**lens_inputs() | change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axes_dims_rope": [8, 12, 14]}, "sum to attention_head_dim = 32"),
        ({"axes_dims_rope": [5, 13, 14]}, "even"),
        ({"axes_dims_rope": [16, 16]}, "three"),
        ({"num_layers": 0}, "at least 1"),
        ({"selected_layer_index": []}, "name layers"),
    ],
)
def test_bad_configurations(build_lens: Build, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_lens(**fields)
