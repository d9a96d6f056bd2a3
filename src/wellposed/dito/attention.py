"""Attention with queries of some tokens and keys of others.

The processors of diffusers project queries, keys and values from one tensor and rotate them by one table that the batch
shares. Reduced queries over all keys, pairs that differ within a batch, and keys that weigh more than one token need
each of these apart. The projections, norms and output layers are called as modules, so that adapters and quantised
layers act as they always do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AttentionInputs", "check_projection", "joint_attention", "parallel_attention"]

Rotation = Tensor | tuple[Tensor, Tensor]
"""Rotary tables: (cos, sin) of interleaved pairs, or one complex table; of (rows, dim) or (batch, rows, dim)."""


@dataclass(frozen=True)
class AttentionInputs:
    """What a call of attention is given in place of one sequence.

    Attributes:
        queries: normalised states of the rows to compute.
        keys: normalised states of the rows to attend to.
        text: normalised states of a text stream with projections of its own, or None.
        query_rotation: of the joint sequence of queries, or of its image part where the text has its own table.
        key_rotation: likewise of the keys.
        text_rotation: of the text stream where it has a table of its own.
        mask: True where a key of the joint sequence may be attended to.
        key_bias: added to the scores of every row of ``keys``; a text stream's rows get 0.
    """

    queries: Float[Tensor, "batch queries channels"]
    keys: Float[Tensor, "batch keys channels"]
    text: Float[Tensor, "batch text text_channels"] | None = None
    query_rotation: Rotation | None = None
    key_rotation: Rotation | None = None
    text_rotation: Rotation | None = None
    mask: Tensor | None = None
    key_bias: Float[Tensor, "batch keys"] | None = None


def joint_attention(
    attn: Any, given: AttentionInputs, *, text_first: bool = True, fused: tuple[str, str] | None = None
) -> Any:
    """softmax(q k^T / sqrt(d) + bias) v with image and text in one sequence.

    Args:
        attn: an attention module of diffusers with ``to_q``, ``to_k``, ``to_v`` and, for text, ``add_q_proj``, ...
        given: see :class:`AttentionInputs`.
        text_first: the order of the joint sequence.
        fused: in their place, names of one projection of the image and one of the text to query, key and value.

    Returns:
        what the module itself returns: the image rows, and the text rows beside them if there is a text stream.

    Raises:
        ValueError: see :func:`check_projection`, where ``fused`` and queries and keys differ.
    """
    head_dim = attn.inner_dim // attn.heads
    if fused is None:
        query, key, value = attn.to_q(given.queries), attn.to_k(given.keys), attn.to_v(given.keys)
    else:
        query, key, value = _fused_projection(getattr(attn, fused[0]), given.queries, given.keys)
    query, key = _heads(query, head_dim, attn.norm_q), _heads(key, head_dim, attn.norm_k)
    value = _heads(value, head_dim, None)
    own_table = given.text_rotation is not None
    if own_table:
        query, key = rotate(query, given.query_rotation), rotate(key, given.key_rotation)
    num_text, key_bias = 0, given.key_bias
    if given.text is not None:
        num_text = given.text.shape[1]
        if key_bias is not None:
            key_bias = functional.pad(key_bias, (num_text, 0) if text_first else (0, num_text))
        if fused is None:
            projected = attn.add_q_proj(given.text), attn.add_k_proj(given.text), attn.add_v_proj(given.text)
        else:
            projected = getattr(attn, fused[1])(given.text).chunk(3, -1)
        text_query = _heads(projected[0], head_dim, attn.norm_added_q)
        text_key = _heads(projected[1], head_dim, attn.norm_added_k)
        text_value = _heads(projected[2], head_dim, None)
        if own_table:
            text_query, text_key = rotate(text_query, given.text_rotation), rotate(text_key, given.text_rotation)
        query = _in_order(text_query, query, text_first)
        key = _in_order(text_key, key, text_first)
        value = _in_order(text_value, value, text_first)
    if not own_table:
        query, key = rotate(query, given.query_rotation), rotate(key, given.key_rotation)
    attended = _attend(attn, query, key, value, given.mask, key_bias)
    if given.text is None:
        return _project_out(attn, attended)
    sizes = [num_text, attended.shape[1] - num_text]
    text, image = attended.split(sizes, 1) if text_first else reversed(attended.split(sizes[::-1], 1))
    if not getattr(attn, "context_pre_only", False):
        text = attn.to_add_out(text)
    return _project_out(attn, image), text


def parallel_attention(attn: Any, given: AttentionInputs) -> Tensor:
    """Attention and MLP whose input projections are one matrix (FLUX.2's single blocks).

    Where queries and keys differ, the rows of the matrix are read in parts, so that keys and values are computed for
    all tokens and queries and the MLP for some.

    Raises:
        ValueError: see :func:`check_projection`.
    """
    projection = attn.to_qkv_mlp_proj
    ends = (attn.inner_dim, 3 * attn.inner_dim)
    if given.keys is given.queries:
        query, pair, mlp = projection(given.queries).tensor_split(ends, -1)
    else:
        check_projection(projection)
        weight = projection.weight.tensor_split(ends)
        bias = (None,) * 3 if projection.bias is None else projection.bias.tensor_split(ends)
        query = functional.linear(given.queries, weight[0], bias[0])
        pair = functional.linear(given.keys, weight[1], bias[1])
        mlp = functional.linear(given.queries, weight[2], bias[2])
    key, value = pair.chunk(2, -1)
    mlp = attn.mlp_act_fn(mlp)
    query = rotate(_heads(query, attn.head_dim, attn.norm_q), given.query_rotation)
    key = rotate(_heads(key, attn.head_dim, attn.norm_k), given.key_rotation)
    attended = _attend(attn, query, key, _heads(value, attn.head_dim, None), given.mask, given.key_bias)
    return attn.to_out(torch.cat([attended, mlp], -1))


def check_projection(projection: Any) -> None:
    """Raise for a layer whose weights cannot be read in parts.

    Raises:
        ValueError: an adapter or a quantised layer, which has no such rows; weights that are recast or brought to the
            device only when the layer is called.
    """
    hooks = getattr(getattr(projection, "_diffusers_hook", None), "hooks", {})
    if type(projection) is not nn.Linear:
        reason = f"one {type(projection).__name__}, of which only a plain Linear can be computed in parts"
    elif hooks or hasattr(projection, "_hf_hook"):
        reason = "one Linear whose weights are recast or moved when it is called, so that they cannot be read in parts"
    else:
        return
    raise ValueError(
        f"this block's queries and keys are {reason}; use keep_kv=False, or fuse adapters into the weights and "
        "leave casting and offloading by layers away"
    )


def rotate(x: Float[Tensor, "batch rows heads dim"], table: Rotation | None) -> Float[Tensor, "batch rows heads dim"]:
    """Rotary embedding by a table of the batch or one for each sample."""
    if table is None:
        return x
    if isinstance(table, Tensor):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table.unsqueeze(-2)).flatten(3).type_as(x)
    cos, sin = (part.unsqueeze(-2) for part in table)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _heads(x: Tensor, head_dim: int, norm: nn.Module | None) -> Tensor:
    x = x.unflatten(-1, (-1, head_dim))
    return x if norm is None else norm(x)


def _fused_projection(projection: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if keys is queries:
        return projection(queries).chunk(3, -1)
    check_projection(projection)
    ends = (projection.out_features // 3,)
    weight = projection.weight.tensor_split(ends)
    bias = (None, None) if projection.bias is None else projection.bias.tensor_split(ends)
    key, value = functional.linear(keys, weight[1], bias[1]).chunk(2, -1)
    return functional.linear(queries, weight[0], bias[0]), key, value


def _in_order(text: Tensor, image: Tensor, text_first: bool) -> Tensor:
    return torch.cat([text, image] if text_first else [image, text], 1)


def _attend(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_bias: Tensor | None
) -> Tensor:
    mask = None if mask is None else mask[:, None, None, :]
    if key_bias is not None:
        bias = key_bias[:, None, None, :].to(query.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    processor = attn.processor
    attended = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=getattr(processor, "_attention_backend", None),
        parallel_config=getattr(processor, "_parallel_config", None),
    )
    return attended.flatten(2, 3).to(query.dtype)


def _project_out(attn: Any, attended: Tensor) -> Tensor:
    layers: Any = getattr(attn, "to_out", None)
    if layers is None:  # a single-stream block projects attention and MLP together
        return attended
    for layer in layers:
        attended = layer(attended)
    return attended
