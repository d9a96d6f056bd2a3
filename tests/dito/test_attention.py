"""Attention of some rows to others, against sums written out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention
from torch import Tensor, nn

from wellposed.dito.attention import AttentionInputs, check_projection, joint_attention, parallel_attention, rotate

HEADS, DIM = 2, 4
WIDTH = HEADS * DIM


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def attn() -> Any:
    """With a text stream."""
    module = FluxAttention(
        query_dim=WIDTH, heads=HEADS, dim_head=DIM, added_kv_proj_dim=WIDTH, out_dim=WIDTH, bias=True,
        context_pre_only=False, processor=FluxAttnProcessor(),
    )  # fmt: skip
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed) * (0.5 if parameter.ndim > 1 else 1)
    return module.requires_grad_(False).eval()


def table(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of interleaved pairs."""
    angle = noise(rows, DIM // 2, seed=seed).repeat_interleave(2, 1)
    return angle.cos(), angle.sin()


def by_loops(attn: Any, queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for each sample, head and row, without positions or text."""
    output = torch.zeros_like(queries)
    for b in range(len(queries)):
        q = attn.norm_q(attn.to_q(queries[b]).unflatten(-1, (HEADS, DIM)))
        k = attn.norm_k(attn.to_k(keys[b]).unflatten(-1, (HEADS, DIM)))
        v = attn.to_v(keys[b]).unflatten(-1, (HEADS, DIM))
        for row in range(queries.shape[1]):
            for head in range(HEADS):
                weights = [
                    math.exp(
                        float(q[row, head] @ k[j, head]) / math.sqrt(DIM)
                        + (float(bias[b, j]) if bias is not None else 0)
                    )
                    for j in range(keys.shape[1])
                ]
                mean = sum(w * v[j, head] for j, w in enumerate(weights)) / sum(weights)
                output[b, row, head * DIM : (head + 1) * DIM] = mean
    return attn.to_out[0](output)


def test_some_queries_to_other_keys_by_loops(attn: Any) -> None:
    queries, keys, bias = noise(2, 3, WIDTH, seed=1), noise(2, 5, WIDTH, seed=2), noise(2, 5, seed=3)
    found = joint_attention(attn, AttentionInputs(queries=queries, keys=keys))
    torch.testing.assert_close(found, by_loops(attn, queries, keys))
    found = joint_attention(attn, AttentionInputs(queries=queries, keys=keys, key_bias=bias))
    torch.testing.assert_close(found, by_loops(attn, queries, keys, bias))


def test_a_subset_of_queries_is_a_subset_of_rows(attn: Any) -> None:
    """With dense keys a row's output does not depend on which other rows are computed; text is untouched."""
    x, text, positions = noise(2, 6, WIDTH, seed=1), noise(2, 3, WIDTH, seed=2), table(9, seed=3)
    whole, text_whole = attn(x, text, image_rotary_emb=positions)
    rows = [0, 2, 3, 5]
    kept = (positions[0][[0, 1, 2, *(3 + r for r in rows)]], positions[1][[0, 1, 2, *(3 + r for r in rows)]])
    given = AttentionInputs(queries=x[:, rows], keys=x, text=text, query_rotation=kept, key_rotation=positions)
    found, text_found = joint_attention(attn, given)
    torch.testing.assert_close(found, whole[:, rows])
    torch.testing.assert_close(text_found, text_whole)


@pytest.mark.parametrize("text_first", [True, False])
def test_a_key_of_log_size_weighs_as_many(attn: Any, text_first: bool) -> None:
    """log n on one key is the key n times; the text's keys weigh one."""
    keys, text, sizes = noise(1, 3, WIDTH, seed=1), noise(1, 2, WIDTH, seed=2), [1, 4, 2]
    repeated = keys.repeat_interleave(torch.tensor(sizes), 1)
    queries = noise(1, 4, WIDTH, seed=3)
    bias = torch.tensor([sizes], dtype=torch.float64).log()
    weighed = AttentionInputs(queries=queries, keys=keys, text=text, key_bias=bias)
    plain = AttentionInputs(queries=queries, keys=repeated, text=text)
    for found, expected in zip(
        joint_attention(attn, weighed, text_first=text_first),
        joint_attention(attn, plain, text_first=text_first),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_masked_key_is_as_good_as_absent(attn: Any, with_bias: bool) -> None:
    queries, keys, bias = noise(2, 3, WIDTH, seed=1), noise(2, 5, WIDTH, seed=2), noise(2, 5, seed=3)
    mask = torch.tensor([[True, False, True, True, False]]).expand(2, -1)
    seen = [0, 2, 3]
    given = AttentionInputs(queries=queries, keys=keys, mask=mask, key_bias=bias if with_bias else None)
    absent = AttentionInputs(queries=queries, keys=keys[:, seen], key_bias=bias[:, seen] if with_bias else None)
    torch.testing.assert_close(joint_attention(attn, given), joint_attention(attn, absent))


def test_the_texts_own_table(attn: Any) -> None:
    """Qwen-Image rotates each stream before it joins them; the same as one table for the whole."""
    x, text, positions = noise(1, 4, WIDTH, seed=1), noise(1, 3, WIDTH, seed=2), table(7, seed=3)
    of_text, of_image = (tuple(part[rows] for part in positions) for rows in (slice(3), slice(3, None)))
    joint = joint_attention(
        attn, AttentionInputs(queries=x, keys=x, text=text, query_rotation=positions, key_rotation=positions)
    )
    apart = AttentionInputs(
        queries=x, keys=x, text=text, query_rotation=of_image, key_rotation=of_image, text_rotation=of_text
    )
    for found, expected in zip(joint_attention(attn, apart), joint, strict=True):
        torch.testing.assert_close(found, expected)


def test_rotation_is_that_of_diffusers_with_a_table_for_each_sample() -> None:
    x, shared = noise(2, 5, HEADS, DIM).float(), tuple(part.float() for part in table(5, seed=1))
    expected = apply_rotary_emb(x, shared, sequence_dim=1)
    torch.testing.assert_close(rotate(x, shared), expected)
    rows = torch.tensor([[4, 0, 2], [1, 1, 3]])
    own = tuple(part[rows] for part in shared)
    for sample in range(2):
        alone = apply_rotary_emb(x[[sample], :3], tuple(part[rows[sample]] for part in shared), sequence_dim=1)
        torch.testing.assert_close(rotate(x[:, :3], own)[[sample]], alone)
    assert rotate(x, None) is x


def test_a_complex_table_is_the_same_rotation() -> None:
    x, (cos, sin) = noise(2, 5, HEADS, DIM).float(), (part.float() for part in table(5, seed=1))
    turned = torch.complex(cos[:, ::2], sin[:, ::2])
    torch.testing.assert_close(rotate(x, turned), rotate(x, (cos, sin)))
    torch.testing.assert_close(rotate(x, turned.expand(2, -1, -1)), rotate(x, (cos, sin)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotation_keeps_the_dtype(dtype: torch.dtype) -> None:
    x, positions = noise(1, 5, HEADS, DIM).to(dtype), table(5, seed=1)
    turned = torch.complex(positions[0][:, ::2], positions[1][:, ::2]).to(torch.complex64)
    assert rotate(x, positions).dtype == rotate(x, turned).dtype == dtype


@pytest.fixture(scope="module")
def parallel() -> Any:
    """FLUX.2's attention with the MLP inside."""
    module = Flux2ParallelSelfAttention(query_dim=WIDTH, heads=HEADS, dim_head=DIM, out_dim=WIDTH, mlp_ratio=2.0)
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed) * (0.5 if parameter.ndim > 1 else 1)
    return module.requires_grad_(False).eval()


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_in_parts_is_the_projection(parallel: Any, bias: bool) -> None:
    x, positions, rows = noise(2, 6, WIDTH, seed=1), table(6, seed=2), [1, 2, 5]
    original = parallel.to_qkv_mlp_proj
    if bias:
        parallel.to_qkv_mlp_proj = nn.Linear(WIDTH, original.out_features, dtype=torch.float64).requires_grad_(False)
    try:
        whole = parallel(x, image_rotary_emb=positions)
        given = AttentionInputs(
            queries=x[:, rows], keys=x, query_rotation=tuple(part[rows] for part in positions), key_rotation=positions
        )
        torch.testing.assert_close(parallel_attention(parallel, given), whole[:, rows])
        same = AttentionInputs(queries=x, keys=x, query_rotation=positions, key_rotation=positions)
        torch.testing.assert_close(parallel_attention(parallel, same), whole)
    finally:
        parallel.to_qkv_mlp_proj = original


class Wrapped(nn.Module):
    """Stands for an adapter or a quantised layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_layer_that_cannot_be_read_in_parts_is_refused_for_dense_keys_only(parallel: Any) -> None:
    x, original = noise(2, 6, WIDTH, seed=1), parallel.to_qkv_mlp_proj
    expected = parallel(x)
    parallel.to_qkv_mlp_proj = Wrapped(original)
    try:
        torch.testing.assert_close(parallel_attention(parallel, AttentionInputs(queries=x, keys=x)), expected)
        with pytest.raises(ValueError, match="one Wrapped, of which only a plain Linear.*keep_kv=False"):
            parallel_attention(parallel, AttentionInputs(queries=x[:, :2], keys=x))
    finally:
        parallel.to_qkv_mlp_proj = original


def test_weights_that_move_or_are_recast_are_refused() -> None:
    from diffusers.hooks import apply_layerwise_casting

    plain, cast, moved = (nn.Linear(2, 2) for _ in range(3))
    check_projection(plain)
    apply_layerwise_casting(cast, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=None)
    moved._hf_hook = SimpleNamespace()
    for layer in (cast, moved):
        with pytest.raises(ValueError, match="recast or moved when it is called"):
            check_projection(layer)
