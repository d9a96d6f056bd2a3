r"""Detail-condensing queries (arXiv 2605.22777): learned vectors that read a frozen encoder from the side.

K queries walk past the encoder's layers. At a tapped layer l, with patch tokens P at the input of block l,

    Q' = Q + CrossAttention(LN(Q), LN(P)),    Q'' = Q' + FFN(LN(Q')),

and never enter the encoder, so that its own tokens cannot change. Queries ask, patches answer: there is no attention
among queries and no mask.

A condenser of width d with an FFN of 4 d has 12 d^2 + 19 d parameters, 7,089,408 at d = 768. That the attention's
matrices are all d x d, that queries and patches have a norm each, and that every norm has weights follows from the
parameter table; heads, activation and initialisation are ours (docs/methods/decq.md).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "AbsorbedCondenserAttnProcessor",
    "Condenser",
    "CondenserAttention",
    "CondenserAttnProcessor",
    "DetailCondensers",
]

EPS = 1e-6
QUERY_STD = 0.02


class CondenserAttnProcessor:
    """Cross-attention as it is written down: keys and values of all tokens.

    2 N d^2 of its multiplications project the tokens.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "CondenserAttention",
        queries: Float[Tensor, "batch queries width"],
        tokens: Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch queries width"]:
        """What the queries take from the tokens."""
        query, key, value = (
            projection(inputs).unflatten(-1, (attn.heads, -1))
            for projection, inputs in ((attn.to_q, queries), (attn.to_k, tokens), (attn.to_v, tokens))
        )
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(attended.flatten(2))


class AbsorbedCondenserAttnProcessor:
    r"""The same function without a projection of the tokens.

    Scores are q_h . (W_k,h p + b_k,h) = (W_k,h^T q_h) . p + const: the key matrix moves to the few queries, and its
    bias, equal for all tokens, leaves the softmax as it is. Weights sum to one, so the value matrix moves behind the
    average: sum_n a_n (W_v,h p_n + b_v,h) = W_v,h (sum_n a_n p_n) + b_v,h. All heads together are K H queries of one
    head as wide as the tokens. Instead of 2 N d^2 multiplications that takes 2 K H N d + 2 K d^2: with K H < d, less.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "CondenserAttention",
        queries: Float[Tensor, "batch queries width"],
        tokens: Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch queries width"]:
        """What the queries take from the tokens."""
        heads, num_queries = attn.heads, queries.shape[1]
        query = attn.to_q(queries).unflatten(-1, (heads, -1))
        key_matrix = attn.to_k.weight.unflatten(0, (heads, -1)).to(query.dtype)
        absorbed = torch.einsum("bqhe,hed->bqhd", query, key_matrix).flatten(1, 2)
        # Tokens are one head that all of these queries share.
        shared = tokens.unsqueeze(2)
        means = dispatch_attention_fn(
            absorbed.unsqueeze(2),
            shared,
            shared,
            scale=query.shape[-1] ** -0.5,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        means = means.squeeze(2).unflatten(1, (num_queries, heads))
        value_matrix = attn.to_v.weight.unflatten(0, (heads, -1)).to(means.dtype)
        attended = torch.einsum("bqhd,hed->bqhe", means, value_matrix).flatten(2) + attn.to_v.bias
        return attn.to_out(attended)


class CondenserAttention(nn.Module, AttentionModuleMixin):
    """Projections of the cross-attention, all square and with biases.

    Args:
        width: d.
        heads: attention heads.
        num_queries: K; with K heads < d, tokens are not projected (:class:`AbsorbedCondenserAttnProcessor`).

    Raises:
        ValueError: heads that do not divide the width.
    """

    _default_processor_cls = CondenserAttnProcessor
    _available_processors: ClassVar[list[Any]] = [CondenserAttnProcessor, AbsorbedCondenserAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, width: int, heads: int, num_queries: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"condenser_num_heads is {heads}, which does not divide the encoder's width {width}; give one of its "
                "divisors, e.g. the encoder's own number of heads"
            )
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        cheaper = num_queries * heads < width
        self.processor: Any = AbsorbedCondenserAttnProcessor() if cheaper else CondenserAttnProcessor()

    def forward(
        self, queries: Float[Tensor, "batch queries width"], tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch queries width"]:
        """See the processors."""
        return self.processor(self, queries, tokens)

    def weights(
        self, queries: Float[Tensor, "batch queries width"], tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """How much each token counts; rows sum to one."""
        query, key = (
            projection(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, inputs in ((self.to_q, queries), (self.to_k, tokens))
        )
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)


class Condenser(nn.Module):
    """One tap: cross-attention, then an FFN, both behind a norm and beside a residual.

    Args:
        width: d, of queries and tokens.
        heads: attention heads.
        num_queries: K.
        mlp_ratio: hidden width of the FFN, in widths.
    """

    def __init__(self, width: int, heads: int, num_queries: int, mlp_ratio: float | int = 4.0) -> None:
        super().__init__()
        self.norm_queries = nn.LayerNorm(width, eps=EPS)
        self.norm_tokens = nn.LayerNorm(width, eps=EPS)
        self.attn = CondenserAttention(width, heads, num_queries)
        self.norm_ffn = nn.LayerNorm(width, eps=EPS)
        hidden = int(width * mlp_ratio)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, queries: Float[Tensor, "batch queries width"], tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch queries width"]:
        """The queries after this tap."""
        queries = queries + self.attn(self.norm_queries(queries), self.norm_tokens(tokens))
        return queries + self.ffn(self.norm_ffn(queries))

    def attention(
        self, queries: Float[Tensor, "batch queries width"], tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """Where the queries look."""
        return self.attn.weights(self.norm_queries(queries), self.norm_tokens(tokens))


class DetailCondensers(nn.Module):
    """The queries and their condensers, one for each tapped layer, in series.

    Args:
        num_queries: K, at least 1.
        layers: tapped layers, increasing; l stands for the input of block l, so that 0 is the patch embedding.
        width: d.
        heads: attention heads of each condenser.
        mlp_ratio: hidden width of their FFNs, in widths.

    Attributes:
        queries: the learned start, (K, d).
        condensers: one for each layer.
    """

    def __init__(
        self, num_queries: int, layers: Sequence[int], *, width: int, heads: int, mlp_ratio: float | int = 4.0
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.queries = nn.Parameter(QUERY_STD * torch.randn(num_queries, width))
        self.condensers = nn.ModuleList(Condenser(width, heads, num_queries, mlp_ratio) for _ in self.layers)

    def forward(
        self, hidden_states: Sequence[Float[Tensor, "batch tokens width"]]
    ) -> Float[Tensor, "batch queries width"]:
        """The query latents: what the last condenser leaves, with mean 0 and variance 1 over the width.

        Args:
            hidden_states: the tapped layers' tokens, in the order of ``layers``.
        """
        queries = self.start(hidden_states[0])
        for condenser, tokens in zip(self.condensers, hidden_states, strict=True):
            queries = condenser(queries, tokens)
        return functional.layer_norm(queries, queries.shape[-1:], eps=EPS)

    def start(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch queries width"]:
        """The learned queries, one copy for each image."""
        return self.queries.to(tokens.dtype).expand(len(tokens), -1, -1)
