"""The networks that published checkpoints hold, written out plainly in their own layouts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(batch, channels, positions) each, channels head by head."""
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
    weight = torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("bhij,bhcj->bhci", weight.softmax(-1), v).flatten(1, 2)


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Node(nn.Module):
    """A module that only holds named children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class DDPMResnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs, eps=1e-6), conv3(inputs, outputs)
        self.temb_proj = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs, eps=1e-6), conv3(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.temb_proj(silu(time))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DDPMAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = attend(*(part(h).flatten(2) for part in (self.q, self.k, self.v)), heads=1)
        return x + self.proj_out(h.view_as(x))


class DDPMNetwork(nn.Module):
    """The layout of pytorch_diffusion, with the second head of Extended-Analytic-DPM where asked for."""

    def __init__(
        self, channels: int, mult: Sequence[int], blocks: int, attention: Sequence[bool], images: int, head: str | None
    ) -> None:
        super().__init__()
        time, widths = 4 * channels, [channels * m for m in mult]
        self.channels, self.head = channels, head
        self.temb = Node(dense=nn.ModuleList([nn.Linear(channels, time), nn.Linear(time, time)]))
        self.conv_in = conv3(images, channels)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        for level, out in enumerate(widths):
            stage = Node(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(blocks):
                stage.block.append(DDPMResnet(width, out, time))
                stage.attn.extend([DDPMAttention(out)] if attention[level] else [])
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                stage.downsample = Node(conv=nn.Conv2d(width, width, 3, stride=2))
                skips.append(width)
            self.down.append(stage)
        self.mid = Node(
            block_1=DDPMResnet(width, width, time), attn_1=DDPMAttention(width), block_2=DDPMResnet(width, width, time)
        )
        for level, out in reversed(list(enumerate(widths))):
            stage = Node(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(blocks + 1):
                stage.block.append(DDPMResnet(width + skips.pop(), out, time))
                stage.attn.extend([DDPMAttention(out)] if attention[level] else [])
                width = out
            if level:
                stage.upsample = Node(conv=conv3(width, width))
            self.up.insert(0, stage)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), conv3(width, images)
        if head:
            self.norm_out2, self.conv_out2 = nn.GroupNorm(32, width, eps=1e-6), conv3(width, images)
        if head == "complex":
            self.before_out = DDPMResnet(width, width, time)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
        time = self.temb.dense[1](silu(self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], 1))))

        def through(stage: Any, index: int, h: Tensor) -> Tensor:
            h = stage.block[index](h, time)
            return stage.attn[index](h) if len(stage.attn) else h

        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            for index in range(len(stage.block)):
                h = through(stage, index, h)
                skips.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample.conv(pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, time)), time)
        for stage in reversed(self.up):
            for index in range(len(stage.block)):
                h = through(stage, index, torch.cat([h, skips.pop()], 1))
            if hasattr(stage, "upsample"):
                h = stage.upsample.conv(interpolate(h, scale_factor=2.0))
        return self.conv_out(silu(self.norm_out(h)))


class ImprovedResnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, scale_shift: bool) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), conv3(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.3), conv3(outputs, outputs))
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, shift = self.in_layers(x), self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(x) + h


class ImprovedAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(32, channels), heads
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Head by head: the channels of one head's q, then its k, then its v, then the next head.
        fused = self.qkv(self.norm(x).flatten(2)).unflatten(1, (self.heads, 3, -1))
        q, k, v = (fused[:, :, part].flatten(1, 2) for part in range(3))
        return x + self.proj_out(attend(q, k, v, self.heads)).view_as(x)


class Resize(nn.Module):
    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        if up:
            self.conv = conv3(channels, channels)
        else:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0)) if hasattr(self, "conv") else self.op(x)


class ImprovedNetwork(nn.Module):
    """The layout of improved-diffusion."""

    def __init__(
        self,
        channels: int,
        mult: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        images: int,
        outputs: int,
        heads: int,
        scale_shift: bool,
        classes: int | None,
        head: str | None,
    ) -> None:
        super().__init__()
        time, widths = 4 * channels, [channels * m for m in mult]
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        if classes:
            self.label_emb = nn.Embedding(classes, time)
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv3(images, channels)])])
        self.output_blocks = nn.ModuleList()
        skips, width = [channels], channels
        for level, out in enumerate(widths):
            for _ in range(blocks):
                layers: list[nn.Module] = [ImprovedResnet(width, out, time, scale_shift)]
                layers += [ImprovedAttention(out, heads)] if attention[level] else []
                self.input_blocks.append(nn.ModuleList(layers))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Resize(width, up=False)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [
                ImprovedResnet(width, width, time, scale_shift),
                ImprovedAttention(width, heads),
                ImprovedResnet(width, width, time, scale_shift),
            ]
        )
        for level, out in reversed(list(enumerate(widths))):
            for index in range(blocks + 1):
                layers = [ImprovedResnet(width + skips.pop(), out, time, scale_shift)]
                layers += [ImprovedAttention(out, heads)] if attention[level] else []
                layers += [Resize(out, up=True)] if level and index == blocks else []
                self.output_blocks.append(nn.ModuleList(layers))
                width = out
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), conv3(width, outputs))
        if head == "simple":
            self.out2 = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), conv3(width, images))
        if head == "complex":
            resnet = ImprovedResnet(width, width, time, scale_shift)
            self.out2 = nn.Sequential(resnet, nn.GroupNorm(32, width), nn.SiLU(), conv3(width, images))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        time = time if labels is None else time + self.label_emb(labels)

        def through(layers: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in layers:
                h = layer(h, time) if isinstance(layer, ImprovedResnet) else layer(h)
            return h

        skips, h = [], x
        for layers in self.input_blocks:
            h = through(layers, h)
            skips.append(h)
        h = through(self.middle_block, h)
        for layers in self.output_blocks:
            h = through(layers, torch.cat([h, skips.pop()], 1))
        return self.out(h)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random and none at its default: a bias or a norm that went astray must show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return network.eval()
