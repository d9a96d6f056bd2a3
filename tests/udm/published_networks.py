"""The network that public checkpoints of discrete diffusion hold, written out plainly under its own names.

One class for MDLM, UDLM, DUO and the code of arXiv 2605.22765; the order in which parameters are registered is theirs,
for their averaged weights are a list in that order.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu


class Embedding(nn.Module):
    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding[x]


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, approximate="tanh")


class Times(nn.Module):
    def __init__(self, cond: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Rotary(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, heads, length, head_dim)."""
        angles = torch.arange(x.shape[2])[:, None] * self.inv_freq
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], -1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, cond: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), Gelu(), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(cond, 6 * width)

    def forward(self, x: Tensor, c: Tensor, rotary: Rotary) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale_1) + shift_1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = rotary(q) @ rotary(k).mT / math.sqrt(q.shape[-1])
        x = x + gate_1 * self.attn_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + gate_2 * self.mlp(self.norm2(x) * (1 + scale_2) + shift_2)


class Head(nn.Module):
    def __init__(self, width: int, rows: int, cond: int) -> None:
        super().__init__()
        self.norm_final = Norm(width)
        self.linear = nn.Linear(width, rows)
        self.adaLN_modulation = nn.Linear(cond, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DIT(nn.Module):
    def __init__(
        self,
        rows: int,
        *,
        width: int = 16,
        heads: int = 2,
        blocks: int = 2,
        cond: int = 12,
        fusion: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocab_embed = Embedding(width, rows)
        if fusion == "separate_linear":
            self.conditioning_vocab_embed = Embedding(width, rows)
            self.conditioning_input_proj = nn.Linear(2 * width + 1, width)
        if fusion == "shared_mlp":
            self.conditioning_input_mlp = nn.Sequential(
                nn.Linear(2 * width + 1, 4 * width), Gelu(), nn.Linear(4 * width, width)
            )
        self.sigma_map = Times(cond)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, cond) for _ in range(blocks))
        self.output_layer = Head(width, rows, cond)
        self.fusion = fusion
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            # None at its default: a bias or a norm that went astray must show.
            scale = 0.3 if parameter.ndim == 1 else 2 * parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale

    def forward(self, x: Tensor, sigma: Tensor, u: Tensor | None = None) -> Tensor:
        h = self.vocab_embed(x)
        if u is not None:
            match = (x == u).float()[..., None]
            if self.fusion == "separate_linear":
                h = self.conditioning_input_proj(torch.cat([h, self.conditioning_vocab_embed(u), match], -1))
            else:
                h = self.conditioning_input_mlp(torch.cat([h, self.vocab_embed(u), match], -1))
        c = silu(self.sigma_map(sigma.float()))
        for block in self.blocks:
            h = block(h, c, self.rotary_emb)
        return self.output_layer(h, c)


class Wrapped(nn.Module):
    """A child under a dotted name, as Lightning modules hold their networks."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def under(names: str, network: nn.Module) -> Any:
    """``under("diffusion.model.backbone", net)`` has ``diffusion.model.backbone.vocab_embed.embedding``."""
    for name in reversed(names.split(".")):
        network = Wrapped(**{name: network})
    return network
