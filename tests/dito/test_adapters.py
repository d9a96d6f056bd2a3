"""What is known of every block class, against what the blocks do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, LatteTransformer3DModel, SanaTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

from wellposed.dito.adapters import Rows, find_blocks, supported_blocks
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import apply_token_reduction, token_reduction
from wellposed.dito.matching import TokenCorrespondence

Host = Any

BLOCKS = {
    "flux": [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ],
    "flux2": ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2"],
    "pixart": ["transformer_blocks.0", "transformer_blocks.1"],
    "dit": ["transformer_blocks.0", "transformer_blocks.1"],
    "qwen": ["transformer_blocks.0", "transformer_blocks.1"],
    "z_image": ["layers.0", "layers.1"],
}


def settings(**fields: Any) -> TokenReductionConfig:
    return TokenReductionConfig(**{"round_to": 1, "end_dense_steps": 0, **fields})


# --- rows


def random_pairs(num_tokens: int, dropped: int, seed: int = 0) -> TokenCorrespondence:
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(2)])
    kept = order[:, dropped:]
    target = kept.gather(1, torch.randint(num_tokens - dropped, (2, dropped), generator=generator))
    return TokenCorrespondence.from_pairs(num_tokens, order[:, :dropped].contiguous(), target)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 4), (2, 1)])
@pytest.mark.parametrize("num_dropped", [0, 4])
def test_rows_around_the_image_by_loops(before: int, after: int, num_dropped: int) -> None:
    image, total = random_pairs(9, num_dropped), before + 9 + after
    rows = Rows.around(image, before, total)
    x = torch.randn(2, total, 3, generator=torch.Generator().manual_seed(1))
    reduced = rows.reduce(x, "prune")
    recovered = rows.recover(reduced)
    for sample in range(2):
        follows = {
            before + int(i): before + int(j) for i, j in zip(image.dropped[sample], image.target[sample], strict=True)
        }
        kept = [row for row in range(total) if row not in follows]
        assert torch.equal(reduced[sample], x[sample, kept])
        assert torch.equal(recovered[sample], x[sample, [follows.get(row, row) for row in range(total)]])
        expected = torch.stack([x[sample, i] - x[sample, j] for i, j in follows.items()]) if follows else x[0, :0]
        assert torch.equal(rows.own_minus_target(x).unflatten(0, (2, -1))[sample], expected)
    merged = rows.reduce(x, "merge")
    image_kept = slice(before, before + 9 - num_dropped)
    assert torch.equal(merged[:, :before], x[:, :before])
    torch.testing.assert_close(merged[:, image_kept], image.reduce(x[:, before : before + 9], how="merge"))
    assert rows.recover(reduced) is not x


def test_memory_of_rows_by_hand() -> None:
    alone, within = Rows.around(random_pairs(8, 3), 0, 8), Rows.around(random_pairs(8, 3), 2, 12)
    indices = 2 * (5 + 8 + 3)  # keep, recover_from, dropped of a batch of two
    assert alone.num_bytes() == 8 * indices + 4 * (indices + 2 * 3)
    whole = 2 * (9 + 12 + 3)
    assert within.num_bytes() == 8 * (indices + whole) + 4 * (whole + 2 * 3)


# --- blocks


def test_blocks_of_every_family_are_found(host: Host) -> None:
    blocks = find_blocks(host.model)
    assert [block.name for block in blocks] == BLOCKS[host.name]
    for block in blocks:
        assert host.model.get_submodule(block.name) is block.module
        assert type(block.module).__name__ in supported_blocks()
        for name, attn in block.attentions():
            assert host.model.get_submodule(name) is attn


def test_blocks_that_are_compiled_one_by_one_are_found(tiny: SimpleNamespace) -> None:
    model = tiny.hosts["flux"]().model
    inner = model.transformer_blocks[1]
    model.transformer_blocks[1] = torch.compile(inner, backend="eager")
    found = find_blocks(model)
    assert [block.name for block in found] == BLOCKS["flux"] and found[1].module is inner


def test_second_attention_is_found_where_there_is_one(tiny: SimpleNamespace) -> None:
    blocks = find_blocks(tiny.hosts["sd3"]().model)
    assert [len(block.attentions()) for block in blocks] == [2, 1, 1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: AuraFlowTransformer2DModel(
                num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=4, num_attention_heads=2,
                joint_attention_dim=4, caption_projection_dim=8, pos_embed_max_size=4, sample_size=4,
            ),
            "AuraFlowJointTransformerBlock, AuraFlowSingleTransformerBlock; token reduction supports FluxTransformerB",
        ),
        (
            lambda: SanaTransformer2DModel(
                num_layers=1, attention_head_dim=4, num_attention_heads=2, num_cross_attention_heads=2,
                cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=4, sample_size=4,
            ),
            "SanaTransformer2DModel has SanaTransformerBlock; token reduction supports",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential has no known transformer block; token reduction supports"),
    ],
    ids=["AuraFlow", "Sana", "Sequential"],
)  # fmt: skip
def test_other_blocks_are_refused_by_name(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_blocks(model())


def test_a_model_of_known_blocks_and_unknown_arrangement_is_refused_when_called() -> None:
    """Latte: the blocks are PixArt's, the tokens are a video's."""
    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, caption_channels=4, cross_attention_dim=8, video_length=2,
        norm_type="ada_norm_single", norm_elementwise_affine=False,
    )  # fmt: skip
    with token_reduction(model), torch.no_grad(), pytest.raises(ValueError, match="arrangement of the image tokens"):
        model(torch.zeros(1, 4, 2, 4, 4), timestep=torch.tensor([1]), encoder_hidden_states=torch.zeros(1, 3, 4))


def test_states_of_every_attention_are_what_the_block_gives_it(host: Host) -> None:
    """The adapter's norms are the block's own, in every block and to the last bit."""
    seen: dict[str, Tensor] = {}
    arguments: dict[str, dict[str, Any]] = {}

    def keep_states(name: str) -> Any:
        return lambda module, args, kwargs: seen.__setitem__(
            name, kwargs.get("hidden_states", args[0] if args else None)
        )

    def keep_arguments(name: str) -> Any:
        return lambda module, args, kwargs: arguments.__setitem__(name, {**named(module, args), **kwargs})

    blocks = find_blocks(host.model)
    for block in blocks:
        block.module.register_forward_pre_hook(keep_arguments(block.name), with_kwargs=True)
        for name, attn in block.attentions():
            attn.register_forward_pre_hook(keep_states(name), with_kwargs=True)
    host(0.3)
    for block in blocks:
        with torch.no_grad():
            states = block.adapter.attention_inputs(block.module, arguments[block.name])
        assert len(states) == len(block.attentions())
        for (name, _), x in zip(block.attentions(), states, strict=True):
            assert torch.equal(x, seen[name]), name


def named(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    import inspect

    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


def test_attention_gives_what_the_processor_gives(host: Host) -> None:
    """With all rows and no bias, in every block: the host's outputs, text included."""
    from wellposed.dito.attention import AttentionInputs

    calls: dict[str, tuple[dict[str, Any], Any]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, kwargs, output: calls.__setitem__(name, ({**named(module, args), **kwargs}, output))

    blocks = find_blocks(host.model)
    for block in blocks:
        for name, attn in block.attentions():
            attn.register_forward_hook(keep(name), with_kwargs=True)
    host(0.3)
    for block in blocks:
        for name, attn in block.attentions():
            arguments, expected = calls[name]
            x = arguments["hidden_states"]
            rotation = arguments.get(block.adapter.rotation) if block.adapter.rotation else None
            mask = arguments.get(block.adapter.key_masks[1]) if block.adapter.key_masks else None
            given = AttentionInputs(
                queries=x, keys=x.clone(), query_rotation=rotation, key_rotation=rotation, mask=mask
            )
            with torch.no_grad():
                found = block.adapter.attend(attn, arguments, given)
            assert type(found) is type(expected)
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_follow_the_rows_that_are_kept(host: Host, batch: int) -> None:
    """By loops, of the tables that the blocks are given."""
    adapter = find_blocks(host.model)[0].adapter
    if adapter.rotation is None:
        assert host.name in ("sd3", "pixart", "dit")
        return
    tables: list[Any] = []
    block = find_blocks(host.model)[0].module
    block.register_forward_pre_hook(
        lambda module, args, kwargs: tables.append({**named(module, args), **kwargs}[adapter.rotation]),
        with_kwargs=True,
    )
    host(0.3, batch=batch)
    pairs = random_pairs(24, 9)
    image = TokenCorrespondence(pairs.keep[:batch], pairs.recover_from[:batch], pairs.dropped[:batch])
    found = adapter.rotation_rows(image, tables[0])
    assert adapter.rotation_rows(image, None) is None
    if host.name == "qwen":
        assert found[1] is tables[0][1]  # the text's
        parts, full, text = [found[0]], [tables[0][0]], 0
    elif host.name == "z_image":
        parts, full, text = [found], [tables[0]], None
    else:
        parts, full, text = list(found), list(tables[0]), 5
    for shared, table in zip(parts, full, strict=True):
        part = shared if shared.ndim == 3 else shared[None]
        for sample in range(batch):
            keep = image.keep[sample].tolist()
            if text is None:  # image first, then the rest of the padded sequence
                expected = table[sample, keep + list(range(24, table.shape[1]))]
            else:
                expected = table[list(range(text)) + [text + row for row in keep]]
            assert torch.equal(part[sample], expected)


# --- calls and processors that are refused


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "pixart", "qwen"])
def test_masks_over_image_tokens_are_refused(name: str, scope: Any, tiny: SimpleNamespace) -> None:
    host = tiny.hosts[name]()
    given = host.arguments(0.0, 1)
    if name == "pixart":
        given["attention_mask"] = torch.ones(1, tiny.tokens)
    else:
        word = "attention_kwargs" if name == "qwen" else "joint_attention_kwargs"
        total = tiny.tokens + tiny.text
        given[word] = {"attention_mask": torch.zeros(1, 1, 1, total)}
    with (
        token_reduction(host.model, config=settings(scope=scope)),
        torch.no_grad(),
        pytest.raises(ValueError, match="mask over image tokens"),
    ):
        host.model(**given)


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_a_cache_of_reference_keys_is_refused(tiny: SimpleNamespace, scope: Any) -> None:
    host = tiny.hosts["flux2"]()
    given = {**host.arguments(0.0, 1), "kv_cache_mode": "extract", "num_ref_tokens": 12}
    with (
        token_reduction(host.model, config=settings(scope=scope)),
        torch.no_grad(),
        pytest.raises(ValueError, match="cached keys of reference images"),
    ):
        host.model(**given)


@pytest.mark.parametrize("fields", [{}, {"keep_kv": False, "recovery": "copy", "proportional_attention": True}])
def test_unknown_processors_are_refused_where_they_would_be_replaced(
    host: Host, tiny: SimpleNamespace, fields: dict[str, Any]
) -> None:
    for block in find_blocks(host.model):
        for _, attn in block.attentions():
            attn.processor = AttnProcessor()
    with pytest.raises(ValueError, match="this model has AttnProcessor"):
        apply_token_reduction(host.model, settings(**fields))


def with_ip_adapter(tiny: SimpleNamespace) -> Any:
    """Random weights of an image prompt in every dual-stream block of FLUX."""
    host = tiny.hosts["flux"]()
    for index, block in enumerate(host.model.transformer_blocks):
        processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(2,), scale=[1.0])
        for number, parameter in enumerate(processor.parameters()):
            parameter.data = 0.3 * tiny.noise(*parameter.shape, seed=10 * index + number)
        block.attn.set_processor(processor)
    image = tiny.noise(1, 2, 32, seed=50)

    def call(progress: float, batch: int = 1) -> Tensor:
        given = host.arguments(progress, batch)
        embeds = [image.expand(batch, -1, -1)]
        with torch.no_grad():
            kwargs = {"ip_hidden_states": embeds, "ip_adapter_masks": None}
            return host.model(**given, joint_attention_kwargs=kwargs, return_dict=False)[0]

    return host, call


def test_an_ip_adapter_is_refused_with_dense_keys_and_in_a_batch(tiny: SimpleNamespace) -> None:
    host, call = with_ip_adapter(tiny)
    with pytest.raises(ValueError, match="this model has FluxIPAdapterAttnProcessor. Unload the IP-Adapter"):
        apply_token_reduction(host.model)
    for scope in ("attn", "block"):
        with token_reduction(host.model, config=settings(scope=scope, keep_kv=False)):
            call(0.0, 2)
            with pytest.raises(ValueError, match="keep_kv=False with one image at a time"):
                call(0.1, 2)


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_an_ip_adapter_works_with_reduced_keys(tiny: SimpleNamespace, scope: Any) -> None:
    host, call = with_ip_adapter(tiny)
    expected = [call(progress) for progress in (0.0, 0.1)]
    with token_reduction(host.model, config=settings(scope=scope, keep_kv=False, matcher=tiny.keeps_all())):
        assert all(torch.equal(call(progress), out) for progress, out in zip((0.0, 0.1), expected, strict=True))
    with token_reduction(host.model, config=settings(scope=scope, keep_kv=False)) as reduction:
        found = [call(progress) for progress in (0.0, 0.1)]
        assert torch.equal(found[0], expected[0]) and not torch.equal(found[1], expected[1])
        assert found[1].isfinite().all() and reduction.steps[-1].mode == "reduce"


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "flux2"])
def test_fused_projections_are_refused_with_the_way_back(name: str, tiny: SimpleNamespace) -> None:
    host = tiny.hosts[name]()
    host.model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\)"):
        apply_token_reduction(host.model)
    host.model.unfuse_qkv_projections()
    with token_reduction(host.model, config=settings()) as reduction:
        host.denoise(2)
        assert reduction.steps[-1].mode == "reduce"


def test_fused_projections_work_with_reduced_keys(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    config = settings(keep_kv=False)
    with token_reduction(host.model, config=config):
        expected = host.denoise(2, batch=1)
    host.model.fuse_qkv_projections()
    with token_reduction(host.model, config=config):
        torch.testing.assert_close(host.denoise(2, batch=1), expected, rtol=1e-4, atol=1e-4)
