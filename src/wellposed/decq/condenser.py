r"""Detail-condensing queries (arXiv 2605.22777): learned vectors that read a frozen encoder from the side.

K queries walk past the encoder's layers. At a tapped layer l, with patch tokens P at the input of block l,

    Q' = Q + CrossAttention(LN(Q), LN(P)),    Q'' = Q' + FFN(LN(Q')),

and never enter the encoder, so that its own tokens cannot change. Queries ask, patches answer: there is no attention
among queries and no mask.

A condenser of width d with an FFN of 4 d has 12 d^2 + 15 d parameters, 7,089,408 at d = 768. That the attention's
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
    "KeyProjection",
    "ValueProjection",
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


class KeyProjection(nn.Linear):
    """Keys of tokens; or, for queries, what takes the place of scores with keys.

    Both go through a call of the module, where offloading and casting prepare its weights, and nowhere else.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "batch rows ..."], absorb: bool = False
    ) -> Float[Tensor, "batch rows width"] | tuple[Float[Tensor, "batch rows heads width"], Tensor]:
        """Keys W x + b of tokens (batch, tokens, width).

        With ``absorb``, of queries q_h (batch, rows, heads, head_dim): vectors v and numbers c, (batch, rows, heads),
        with q_h . (W_h p + b_h) = v . p + c.
        """
        if not absorb:
            return super().forward(x)
        heads = x.shape[2]
        vectors = torch.einsum("bqhe,hed->bqhd", x, self.weight.unflatten(0, (heads, -1)))
        return vectors, torch.einsum("bqhe,he->bqh", x, self.bias.unflatten(0, (heads, -1)))


class ValueProjection(nn.Linear):
    """Values of tokens, or averages of values from averages of tokens."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "batch rows ..."], absorb: bool = False
    ) -> Float[Tensor, "batch rows ..."]:
        """Values W x + b of tokens (batch, tokens, width).

        With ``absorb``, W_h m_h + b_h of averages m_h (batch, rows, heads, width), (batch, rows, heads, head_dim).
        """
        if not absorb:
            return super().forward(x)
        heads = x.shape[2]
        matrix, bias = self.weight.unflatten(0, (heads, -1)), self.bias.unflatten(0, (heads, -1))
        return torch.einsum("bqhd,hed->bqhe", x, matrix) + bias


class AbsorbedCondenserAttnProcessor:
    r"""The same function without a projection of the tokens.

    Scores are q_h . (W_k,h p + b_k,h) = (W_k,h^T q_h) . p + q_h . b_k,h: the key matrix moves to the few queries.
    Weights sum to one, so the value matrix moves behind the average: sum_n a_n (W_v,h p_n + b_v,h) =
    W_v,h (sum_n a_n p_n) + b_v,h. All heads together are K H queries of one head as wide as the tokens. Instead of
    2 N d^2 + 2 K N d multiplications that takes 2 K d^2 + 2 K H N d: less while K < N d / ((H - 1) N + d), about d / H.

    Back ends are not asked: most of them refuse heads as wide as that, and K H x N scores are little.
    """

    def __call__(
        self,
        attn: "CondenserAttention",
        queries: Float[Tensor, "batch queries width"],
        tokens: Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch queries width"]:
        """What the queries take from the tokens."""
        query = attn.to_q(queries).unflatten(-1, (attn.heads, -1))
        vectors, constants = attn.to_k(query * query.shape[-1] ** -0.5, absorb=True)
        # The constants leave the softmax as it is; without them the bias would be a parameter that no graph has, which
        # data-parallel training and the resuming of an optimiser do not take.
        scores = vectors.flatten(1, 2) @ tokens.mT + constants.flatten(1).unsqueeze(-1)
        means = (torch.softmax(scores, dim=-1).to(tokens.dtype) @ tokens).unflatten(1, query.shape[1:3])
        return attn.to_out(attn.to_v(means, absorb=True).flatten(2))


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
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_k, self.to_v = KeyProjection(width, width), ValueProjection(width, width)
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
        bottleneck_dim: channels to which the query latents are reduced by one matrix; None leaves them d wide.

    Attributes:
        queries: the learned start, (K, d).
        condensers: one for each layer.
        bottleneck: that matrix, with a bias, or None.
    """

    def __init__(
        self,
        num_queries: int,
        layers: Sequence[int],
        *,
        width: int,
        heads: int,
        mlp_ratio: float | int = 4.0,
        bottleneck_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.queries = nn.Parameter(QUERY_STD * torch.randn(num_queries, width))
        self.condensers = nn.ModuleList(Condenser(width, heads, num_queries, mlp_ratio) for _ in self.layers)
        self.bottleneck = None if bottleneck_dim is None else nn.Linear(width, bottleneck_dim)

    def forward(
        self, hidden_states: Sequence[Float[Tensor, "batch tokens width"]]
    ) -> Float[Tensor, "batch queries channels"]:
        """The query latents, see :meth:`finish`.

        Args:
            hidden_states: the tapped layers' tokens, in the order of ``layers``.
        """
        queries = self.start(hidden_states[0])
        for condenser, tokens in zip(self.condensers, hidden_states, strict=True):
            queries = condenser(queries, tokens)
        return self.finish(queries)

    def start(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch queries width"]:
        """The learned queries, one copy for each image."""
        # A view of a parameter says that it requires a gradient under torch.no_grad too, where it can have none.
        return self.queries.to(tokens.dtype).repeat(len(tokens), 1, 1)

    def finish(self, queries: Float[Tensor, "batch queries width"]) -> Float[Tensor, "batch queries channels"]:
        """What the last condenser leaves, with mean 0 and variance 1 over the width; reduced, over what is left."""
        queries = functional.layer_norm(queries, queries.shape[-1:], eps=EPS)
        if self.bottleneck is None:
            return queries
        # Normalised again: the noise of training has one deviation, from which longer vectors would save themselves.
        reduced = self.bottleneck(queries)
        return functional.layer_norm(reduced, reduced.shape[-1:], eps=EPS)
