import time
from dataclasses import replace

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
)
from torch.utils.flop_counter import FlopCounterMode

from wellposed.dito.adapters import find_blocks
from wellposed.dito.baselines import tomesd
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.forecast import (
    BlockFlops,
    block_flops,
    count_steps,
    forecast,
    interval_speed_up,
    recommend,
)
from wellposed.dito.hooks import apply_token_reduction
from wellposed.dito.schedule import FixedInterval, MatchingSteps, PMRInterval

MODES = (("attn", False), ("block", False), ("attn", True), ("block", True))

# Ideal speed-up of a Reduction step and, in brackets of the source, with one dense step in four, for each of MODES.
PUBLISHED = {
    "FLUX.1, 1024 px": {
        "shape": (4096, 512, 3072, 16.0),
        "shares": (0.20, 0.27, 0.53),
        0.25: ((1.16, 1.12), (1.35, 1.24), (1.08, 1.06), (1.24, 1.17)),
        0.50: ((1.35, 1.24), (1.98, 1.59), (1.17, 1.13), (1.63, 1.41)),
        0.75: ((1.55, 1.36), (3.46, 2.14), (1.29, 1.20), (2.37, 1.77)),
    },
    "FLUX.1, 2048 px": {
        "shape": (16384, 512, 3072, 16.0),
        "shares": (0.48, 0.17, 0.35),
        0.25: ((1.33, 1.23), (1.49, 1.33), (1.16, 1.12), (1.28, 1.20)),
        0.50: ((1.77, 1.49), (2.53, 1.83), (1.38, 1.26), (1.79, 1.50)),
    },
    "SD3-medium, 1024 px": {
        "shape": (4096, 333, 1536, 16.0),
        "shares": (0.33, 0.23, 0.45),
        0.25: ((1.23, 1.16), (1.41, 1.28), (1.11, 1.08), (1.26, 1.18)),
        0.50: ((1.50, 1.34), (2.19, 1.69), (1.25, 1.18), (1.70, 1.45)),
    },
    "FLUX.2-dev, 1024 px": {
        "shape": (4096, 512, 6144, 18.0),
        "shares": (0.10, 0.28, 0.62),
        0.50: ((1.24, 1.17), (1.89, 1.54), (1.12, 1.09), (1.62, 1.40)),
    },
    "PixArt, 1024 px": {
        "shape": (4096, 0, 1152, 16.0),
        "shares": (0.37, 0.21, 0.42),
        0.50: ((1.62, 1.40), (2.46, 1.80), (1.31, 1.22), (1.81, 1.51)),
    },
}
SPEED_UPS = [
    (model, ratio, scope, keep_kv, expected)
    for model, row in PUBLISHED.items()
    for ratio, values in row.items()
    if isinstance(ratio, float)
    for (scope, keep_kv), expected in zip(MODES, values, strict=True)
]


def meta(kind, **fields):
    with torch.device("meta"):
        return kind(**fields)


def flux_dev():
    return meta(FluxTransformer2DModel, guidance_embeds=True)


@pytest.mark.parametrize("model", PUBLISHED)
def test_shares_of_a_block(model):
    num_image, num_text, width, mlp = PUBLISHED[model]["shape"]
    block = BlockFlops.plain(width, mlp=mlp)
    rows = (num_image, num_image, num_text)
    parts = (block.whole.attention(*rows), block.attentions["attn"].linear(*rows), block.rest.linear(*rows))
    shares = [part / block.whole.total(*rows) for part in parts]
    assert shares == pytest.approx(PUBLISHED[model]["shares"], abs=0.006)  # 0.3246 stands there as 0.33
    assert sum(shares) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("model", "ratio", "scope", "keep_kv", "expected"), SPEED_UPS)
def test_ideal_speed_ups(model, ratio, scope, keep_kv, expected):
    num_image, num_text, width, mlp = PUBLISHED[model]["shape"]
    block = BlockFlops.plain(width, mlp=mlp)
    dense = block.total(num_image, num_text, scope=scope, keep_kv=keep_kv)
    kept = num_image - int(ratio * num_image)
    reduced = block.total(num_image, num_text, kept=kept, scope=scope, keep_kv=keep_kv)
    # Two decimals, some of which were rounded up: 1.7647 stands there as 1.77.
    assert (dense / reduced, interval_speed_up(dense, reduced, 4)) == pytest.approx(expected, abs=0.006)


def test_the_formula_of_a_plain_block():
    width, num_image, num_text, kept = 8, 10, 3, 6
    rows, left = num_image + num_text, kept + num_text
    block = BlockFlops.plain(width)

    def total(scope, keep_kv):
        return block.total(num_image, num_text, kept=kept, scope=scope, keep_kv=keep_kv)

    linear, mlp, pair = 8 * width**2, 16 * width**2, 4 * width
    dense = (linear + mlp) * rows + pair * rows**2
    assert block.total(num_image, num_text, scope="attn", keep_kv=True) == dense
    assert total("attn", False) == linear * left + mlp * rows + pair * left**2
    assert total("block", False) == (linear + mlp) * left + pair * left**2
    assert total("attn", True) == linear // 2 * (left + rows) + mlp * rows + pair * left * rows
    assert total("block", True) == linear // 2 * (left + rows) + mlp * left + pair * left * rows


@pytest.mark.parametrize(
    ("kind", "fields", "plain", "text"),
    [
        (FluxTransformer2DModel, {"num_layers": 1, "num_single_layers": 1}, BlockFlops.plain(3072), 512),
        # SwiGLU of ratio 3: 2 x 3 in, 3 out.
        (Flux2Transformer2DModel, {"num_layers": 1, "num_single_layers": 1}, BlockFlops.plain(6144, mlp=18.0), 512),
        (
            SD3Transformer2DModel,
            {"num_layers": 2, "num_attention_heads": 24, "caption_projection_dim": 1536},
            BlockFlops.plain(1536),
            333,
        ),
    ],
)
def test_full_size_blocks_are_plain_blocks(kind, fields, plain, text):
    hosts = find_blocks(meta(kind, **fields))
    assert len(hosts) == 2
    for host in hosts:
        if getattr(host.module, "context_pre_only", False):
            continue  # SD3's last block ends the text stream
        whole = block_flops(host).whole
        assert replace(whole, fixed=0) == plain.whole
        # Modulation is per sample, and nothing beside thousands of rows.
        assert whole.fixed < 1e-3 * whole.total(4096, 4096, text)


class Counted(FlopCounterMode):
    """With the CPU's fused attention, which torch leaves out."""

    def __init__(self):
        def fused(query, key, value, *args, out_val=None, **kwargs):
            batch, heads, queries, width = query
            return 4 * batch * heads * queries * key[2] * width

        fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        super().__init__(display=False, custom_mapping={fused_attention: fused})


def counted(call):
    with Counted() as counter:
        call()
    return counter.get_total_flops()


def expected_of(host, config, *, steps=6):
    """The forecast of the tiny hosts' calls: tokens are 16 px wide."""
    rows, columns = (6, 6) if host.name == "dit" else (4, 6)
    return forecast(
        host.model,
        config,
        height=16 * rows,
        width=16 * columns,
        text_tokens=0 if host.name == "dit" else 5,
        batch_size=batch_of(host),
        num_inference_steps=steps,
    )


def batch_of(host):
    """Z-Image pads the captions of a batch to the longest, in parts of the model only."""
    return 1 if host.name == "z_image" else 2


def fixed_flops(host):
    """Modulation and conditioning of all blocks: once a sample."""
    return batch_of(host) * sum(block_flops(block).whole.fixed for block in find_blocks(host.model))


def counted_call(host, progress=0.0):
    total = counted(lambda: host(progress, batch=batch_of(host)))
    if host.name == "dit":  # asks the first block for its embedding of time and class a second time
        embedding = find_blocks(host.model)[0].module.norm1.emb
        layers = [layer for layer in embedding.modules() if isinstance(layer, torch.nn.Linear)]
        total -= batch_of(host) * sum(2 * layer.in_features * layer.out_features for layer in layers)
    return total


def test_dense_calls_take_what_is_forecast(host):
    measured = counted_call(host)
    for scope in ("attn", "block"):
        assert expected_of(host, TokenReductionConfig(scope=scope)).dense_flops == measured


@pytest.mark.parametrize(("scope", "keep_kv"), MODES)
def test_reduced_calls_take_what_is_forecast(host, scope, keep_kv):
    config = TokenReductionConfig(ratio=0.5, scope=scope, keep_kv=keep_kv, round_to=1, recovery="copy")
    found = expected_of(host, config)
    reduction = apply_token_reduction(host.model, config)
    matching, reduced = counted_call(host, 0.0), counted_call(host, 0.1)
    assert [record.mode for record in reduction.steps] == ["match", "reduce"]
    assert tuple(site.name for site in found.sites) == reduction.site_names
    assert matching == found.dense_flops + found.matching_flops
    # With dense keys a block's modulation is computed for the keys and again for the rest.
    twice = fixed_flops(host) if (scope, keep_kv) == ("block", True) else 0
    assert 0 <= reduced - found.reduced_flops <= twice
    assert found.reduced_flops < found.dense_flops


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("recovery", ["copy", "delta", "linear"])
def test_memory_is_what_is_kept(host, scope, recovery):
    schedule = FixedInterval(interval=2)
    config = TokenReductionConfig(ratio=0.5, scope=scope, round_to=4, recovery=recovery, schedule=schedule)
    found = expected_of(host, config)
    reduction = apply_token_reduction(host.model, config)
    for step in range(3):
        host(step / 10, batch=batch_of(host))
    assert found.offset_bytes == reduction.offset_bytes()
    assert (found.offset_bytes > 0) == (recovery != "copy")
    assert found.plan_bytes == reduction.plan_bytes()


@pytest.mark.parametrize("host", ["flux"], indirect=True)
@pytest.mark.parametrize(
    "config",
    [
        TokenReductionConfig(),
        TokenReductionConfig(schedule=FixedInterval(interval=2), warmup_steps=3),
        TokenReductionConfig(schedule=FixedInterval(interval=1), end_dense_steps=0),
        TokenReductionConfig(schedule=FixedInterval(interval=5), warmup_steps=9, end_dense_steps=4),
        TokenReductionConfig(schedule=MatchingSteps(steps=(0, 2, 7)), end_dense_steps=2, num_inference_steps=10),
        TokenReductionConfig(metric="input", rematch=True, recovery="copy", schedule=None, warmup_steps=0),
        TokenReductionConfig(metric="input", rematch=True, recovery="copy", schedule=FixedInterval(interval=3)),
    ],
)
def test_steps_are_counted_as_they_run(host, config):
    reduction = apply_token_reduction(host.model, replace(config, round_to=1, num_inference_steps=10))
    host.denoise(10, batch=1)
    modes = [record.mode for record in reduction.steps]
    counts = count_steps(config, 10)
    assert (counts.dense, counts.match, counts.reduce) == tuple(map(modes.count, ("dense", "match", "reduce")))


def test_the_mean_over_a_generation_is_that_of_its_steps():
    transformer = flux_dev()
    config = TokenReductionConfig(ratio=0.5, end_dense_steps=0)
    found = forecast(transformer, config, height=1024, width=1024, num_inference_steps=28)
    assert (found.steps.match, found.steps.reduce) == (7, 21)
    without_matching = interval_speed_up(found.dense_flops, found.reduced_flops, 4)
    share = found.matching_flops / found.dense_flops
    assert 1 / found.speed_up == pytest.approx(1 / without_matching + share / 4, rel=1e-12)
    assert share == pytest.approx(0.0148, abs=1e-4)
    measuring = replace(config, schedule=PMRInterval())
    again = forecast(transformer, measuring, height=1024, width=1024, num_inference_steps=28)
    assert again.matching_flops == 2 * found.matching_flops
    dense_end = forecast(transformer, TokenReductionConfig(ratio=0.5), height=1024, width=1024, num_inference_steps=28)
    assert (dense_end.steps.match, dense_end.steps.reduce, dense_end.steps.dense) == (7, 20, 1)


def test_pairs_of_every_step_cost_at_every_reduced_step():
    transformer = flux_dev()
    found = forecast(transformer, tomesd(0.5), height=1024, width=1024, num_inference_steps=10)
    plain = forecast(transformer, TokenReductionConfig.paper(ratio=0.5), height=1024, width=1024)
    assert found.reduced_flops == plain.reduced_flops + found.matching_flops
    assert found.speed_up == pytest.approx(found.dense_flops / found.reduced_flops, rel=1e-12)
    controlled = tomesd(0.5, dense_steps=FixedInterval(interval=5))
    mixed = forecast(transformer, controlled, height=1024, width=1024, num_inference_steps=10)
    assert (mixed.steps.match, mixed.steps.reduce) == (2, 8)
    expected = interval_speed_up(found.dense_flops, found.reduced_flops, 5)
    assert mixed.speed_up == pytest.approx(expected, rel=1e-12)


def test_flux_at_full_size_without_weights():
    transformer = flux_dev().to(torch.bfloat16)
    config = TokenReductionConfig(ratio=0.5, recovery="delta")
    start = time.process_time()
    found = forecast(transformer, config, height=1024, width=1024)
    assert time.process_time() - start < 1
    assert len(found.sites) == 57
    # 57 blocks of 1.305 TFLOP, and embeddings that do not matter.
    assert found.dense_flops == pytest.approx(57 * 1.305e12, rel=1e-3)
    assert found.outside_share < 1e-3
    assert found.step_speed_up == pytest.approx(1.63, abs=0.005)
    # int64: keep and drop, recover from; int32: the same as rows of the flattened batch, and what is followed.
    assert found.plan_bytes == 57 * (8 * 2 * 4096 + 4 * (2 * 4096 + 2048))
    assert found.offset_bytes == 57 * 2048 * 3072 * 2
    # Its single-stream blocks project attention and MLP out together, outside of the attention module.
    attention = forecast(transformer, TokenReductionConfig.paper(ratio=0.5), height=1024, width=1024)
    assert 1.29 < attention.step_speed_up < 1.33 < PUBLISHED["FLUX.1, 1024 px"][0.5][0][0]
    assert attention.offset_bytes == 0
    text = str(found)
    assert "19 x transformer_blocks.0" in text and "TFLOP" in text and "684 MiB" in text
    (line,) = (line for line in text.splitlines() if line.startswith("38 x single_transformer_blocks.0"))
    assert line.split()[-6:] == ["4096", "->", "2048", "49.577", "30.481", "1.63x"]


def test_blocks_that_are_left_alone_lie_outside():
    transformer = flux_dev()
    size = {"height": 1024, "width": 1024}
    everything = forecast(transformer, TokenReductionConfig(ratio=0.5), **size)
    alone = {f"transformer_blocks.{index}": 0.0 for index in range(19)}
    some = forecast(transformer, TokenReductionConfig(ratio=0.5, block_ratios=alone), **size)
    assert len(some.sites) == 38
    assert some.dense_flops == everything.dense_flops
    assert some.outside_share == pytest.approx(1 / 3, abs=1e-3)
    nothing = forecast(transformer, TokenReductionConfig(ratio=0.0), **size)
    assert (nothing.sites, nothing.speed_up, nothing.outside_share) == ((), 1.0, 1.0)
    assert "1.00x" in str(nothing)


def test_batches_and_branches_multiply():
    transformer = flux_dev()
    one = forecast(transformer, TokenReductionConfig(), height=512, width=768)
    more = forecast(transformer, TokenReductionConfig(), height=512, width=768, batch_size=3, num_contexts=2)
    assert more.dense_flops == 3 * one.dense_flops
    assert more.plan_bytes == 6 * one.plan_bytes
    assert more.offset_bytes == 6 * one.offset_bytes
    assert more.speed_up == pytest.approx(one.speed_up, rel=1e-12)


def test_recommendations():
    transformer = flux_dev().to(torch.bfloat16)
    usual = recommend(transformer, height=1024, width=1024, num_inference_steps=28)
    assert usual.advised
    assert usual.config == TokenReductionConfig(ratio=0.5)
    assert usual.config.scope == "block" and usual.config.keep_kv
    assert any("fewer steps" in reason for reason in usual.reasons)
    few = recommend(transformer, height=1024, width=1024, num_inference_steps=4)
    assert few.config.schedule == FixedInterval(interval=2)
    assert few.advised and not any("fewer steps" in reason for reason in few.reasons)
    delta = 57 * 2048 * 3072 * 2
    roomy = recommend(transformer, height=1024, width=1024, memory_limit=delta)
    assert roomy.config.recovery == "delta" and roomy.forecast.offset_bytes == delta
    tight = recommend(transformer, height=1024, width=1024, memory_limit=delta - 1)
    assert tight.config.recovery == "copy" and tight.forecast.offset_bytes == 0
    assert sum("684 MiB of earlier outputs, more than the limit" in reason for reason in tight.reasons) == 1
    assert str(usual).startswith("Recommended:")


@pytest.mark.parametrize(
    ("size", "steps", "reason"), [(1024, 1, "1 of 1 steps are dense"), (256, 4, "768 rows"), (256, 28, "768 rows")]
)
def test_where_it_is_advised_against(size, steps, reason):
    found = recommend(flux_dev(), height=size, width=size, num_inference_steps=steps)
    assert not found.advised
    assert any(reason in text for text in found.reasons)
    assert str(found).startswith("Advised against")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 8, "width": 1024}, "a token is 16 px wide"),
        ({"height": 16, "width": 1024}, "does not fit"),
        ({"height": 64, "width": 64, "batch_size": 0}, "batch_size is 0"),
        ({"height": 64, "width": 64, "text_tokens": -1}, "text_tokens -1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        forecast(flux_dev(), TokenReductionConfig(), **arguments)


def test_models_that_are_not_supported_are_refused():
    unet = meta(
        UNet2DModel,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="supports FluxTransformerBlock"):
        forecast(unet, TokenReductionConfig(), height=64, width=64)


def test_nothing_to_recommend_at_ratio_zero():
    with pytest.raises(ValueError, match="choose one in"):
        recommend(flux_dev(), height=64, width=64, ratio=0.0)
