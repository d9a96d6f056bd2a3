"""The networks that published RAE files hold, written out plainly in their own layouts, from their description."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu


def sine_cosine(width: int, side: int) -> Tensor:
    """(side^2, width): sines and cosines of the column, then of the row."""
    rows = []
    for row in range(side):
        for column in range(side):
            parts = []
            for place in (column, row):
                angles = [place / 10_000 ** (k / (width // 4)) for k in range(width // 4)]
                parts += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(parts)
    return torch.tensor(rows)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, heads, tokens, channels) each -> (batch, tokens, heads * channels)."""
    weight = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weight @ v).transpose(1, 2).flatten(2)


class Node(nn.Module):
    """A module that only holds named children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


# --- the decoder of RAE


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        inner = Node(query=nn.Linear(width, width), key=nn.Linear(width, width), value=nn.Linear(width, width))
        self.attention = Node(attention=inner, output=Node(dense=nn.Linear(width, width)))
        self.intermediate, self.output = Node(dense=nn.Linear(width, hidden)), Node(dense=nn.Linear(hidden, width))
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layernorm_before(x)
        parts = [getattr(self.attention.attention, name)(h) for name in ("query", "key", "value")]
        attended = attend(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts))
        x = x + self.attention.output.dense(attended)
        return x + self.output.dense(gelu(self.intermediate.dense(self.layernorm_after(x))))


class Decoder(nn.Module):
    def __init__(self, channels: int, width: int, layers: int, heads: int, hidden: int, side: int, patch: int) -> None:
        super().__init__()
        self.side, self.patch = side, patch
        self.decoder_embed = nn.Linear(channels, width)
        table = torch.cat([torch.zeros(1, width), sine_cosine(width, side)])
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_layers = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, patch * patch * 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, patches, channels) -> images in the encoder's normalisation."""
        first = self.trainable_cls_token.repeat(len(tokens), 1, 1)
        x = torch.cat([first, self.decoder_embed(tokens)], 1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        pixels = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        images = torch.empty(len(tokens), 3, self.side * self.patch, self.side * self.patch)
        for index in range(self.side**2):
            top, left = (self.patch * i for i in divmod(index, self.side))
            patch = pixels[:, index].unflatten(-1, (self.patch, self.patch, 3))
            images[:, :, top : top + self.patch, left : left + self.patch] = patch.permute(0, 3, 1, 2)
        return images


def published_latents(encoder: nn.Module, images: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """What RAE makes of images that have the encoder's size: DINOv2 with registers, ImageNet's normalisation."""
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tokens = encoder((images - shift) / scale, output_hidden_states=True).hidden_states[-1][:, 5:]
    tokens = layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return (tokens.transpose(1, 2).view(len(images), *mean.shape) - mean) / torch.sqrt(var + 1e-5)


def published_images(decoder: Decoder, latents: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tokens = (latents * torch.sqrt(var + 1e-5) + mean).flatten(2).transpose(1, 2)
    return decoder(tokens) * scale + shift


# --- DiT^DH


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Rotation(nn.Module):
    """Row angles for the first half of a head, column angles for the second; neighbouring channels are a plane."""

    def __init__(self, head_dim: int, side: int) -> None:
        super().__init__()
        half = head_dim // 2
        angles = torch.zeros(side * side, head_dim)
        for index in range(side * side):
            for axis, place in enumerate(divmod(index, side)):
                for pair in range(half // 2):
                    first = axis * half + 2 * pair
                    angles[index, first : first + 2] = place / 10_000 ** (2 * pair / half)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        plane = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turn = torch.complex(self.freqs_cos[:, ::2], self.freqs_sin[:, ::2])
        return torch.view_as_real(plane * turn).flatten(-2)


class DiTDHBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, hidden = heads, int(2 / 3 * 4 * width)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = Node(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = Node(w12=nn.Linear(width, 2 * hidden), w3=nn.Linear(hidden, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation) -> Tensor:
        width = x.shape[-1]
        change = self.adaLN_modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = (change[..., i * width : (i + 1) * width] for i in range(6))
        fused = self.attn.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = (
            fused[..., i * width : (i + 1) * width].unflatten(-1, (self.heads, -1)).transpose(1, 2) for i in range(3)
        )
        x = x + gate1 * self.attn.proj(attend(rotation(q), rotation(k), v))
        both = self.mlp.w12(self.norm2(x) * (1 + scale2) + shift2)
        half = both.shape[-1] // 2
        return x + gate2 * self.mlp.w3(silu(both[..., :half]) * both[..., half:])


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(256), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t[:, None] * self.W
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class DiTDH(nn.Module):
    def __init__(
        self,
        channels: int,
        side: int,
        widths: tuple[int, int],
        depths: tuple[int, int],
        heads: tuple[int, int],
        classes: int,
    ) -> None:
        super().__init__()
        (trunk, head), self.side, self.depth = widths, side, depths[0]
        self.x_embedder = Node(proj=nn.Conv2d(channels, head, 1))
        self.s_embedder = Node(proj=nn.Conv2d(channels, trunk, 1))
        self.s_projector = nn.Linear(trunk, head)
        self.t_embedder = TimeEmbedding(trunk)
        self.y_embedder = Node(embedding_table=nn.Embedding(classes + 1, trunk))
        self.pos_embed = nn.Parameter(sine_cosine(trunk, side)[None], requires_grad=False)
        self.enc_feat_rope = Rotation(trunk // heads[0], side)
        self.dec_feat_rope = Rotation(head // heads[1], side)
        self.blocks = nn.ModuleList(
            DiTDHBlock(width, count)
            for width, depth, count in zip(widths, depths, heads, strict=True)
            for _ in range(depth)
        )
        self.final_layer = Node(
            norm_final=RMSNorm(head),
            linear=nn.Linear(head, channels),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(head, 2 * head)),
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        def tokens(maps: Tensor) -> Tensor:
            return maps.flatten(2).transpose(1, 2)

        time = self.t_embedder(t)
        image = silu(time + self.y_embedder.embedding_table(labels))[:, None]
        s = tokens(self.s_embedder.proj(x)) + self.pos_embed
        for block in self.blocks[: self.depth]:
            s = block(s, image, self.enc_feat_rope)
        s = self.s_projector(silu(time[:, None] + s))
        h = tokens(self.x_embedder.proj(x))
        for block in self.blocks[self.depth :]:
            h = block(h, s, self.dec_feat_rope)
        change = self.final_layer.adaLN_modulation(s)
        shift, scale = change[..., : h.shape[-1]], change[..., h.shape[-1] :]
        v = self.final_layer.linear(self.final_layer.norm_final(h) * (1 + scale) + shift)
        return v.transpose(1, 2).unflatten(2, (self.side, self.side))


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random and none at its default: a bias or a norm that went astray must show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if not name.endswith("pos_embed"):
            scale = 1.0 if name.endswith(".W") else 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return network.eval()
