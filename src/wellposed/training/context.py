"""What an objective knows about the step it is computed for, and where its random numbers come from."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["StepContext", "derived_seed"]

GOLDEN = (5**0.5 - 1) / 2


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same in every process and Python version."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """One share of one step's batch, as one player's objective sees it.

    All randomness is a function of (seed, player, step, row of the *global* batch). Whether a batch is computed whole,
    in shares on several ranks, or in shares one after the other, each row meets the same noise; results then differ by
    the rounding of sums only. Nothing has to be stored for an exact resume.

    Draw through :meth:`uniform`, :meth:`normal` or the two kinds of generator. Layers that draw from torch's global
    generator (dropout) are reproducible too, but differ with the number of shares: the loop seeds that generator from
    (seed, player, step, share) before each call of an objective.

    Attributes:
        player: name of the player whose loss is wanted; ``models[context.player]`` is its model.
        step: number of steps done before this one.
        seed: seed of the run.
        rows: positions of the share's samples in the global batch.
        batch_size: number of samples in the global batch.
        device: where the share lies and the models compute.
    """

    player: str
    step: int
    seed: int
    rows: range
    batch_size: int
    device: torch.device

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One generator per row, on ``device``. They advance with every draw."""
        return [
            torch.Generator(self.device).manual_seed(derived_seed(self.seed, self.player, self.step, row))
            for row in self.rows
        ]

    @cached_property
    def shared_generator(self) -> torch.Generator:
        """A CPU generator in the same state for every share of the step, for choices that all shares must agree on."""
        return torch.Generator().manual_seed(derived_seed(self.seed, self.player, self.step, "shared"))

    def normal(self, shape: tuple[int, ...]) -> Float[Tensor, "rows *shape"]:
        """Standard normal float32 numbers, ``shape`` of them for each row."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self, *, stratified: bool = False) -> Float[Tensor, " rows"]:
        """One number in [0, 1) for each row, float64 on the CPU.

        ``stratified`` spreads them evenly over the global batch, ``u_i = (u + p(i) / batch_size) mod 1`` with one
        common u: each is still uniform, and a mean over the batch of a function of them varies less (2107.00630). The
        permutation p keeps neighbours far apart, so that the rows of a share, which may be images of one size, are
        spread too.
        """
        if stratified:
            start = torch.rand((), generator=self.shared_generator, dtype=torch.float64)
            everyone = (start + _far_apart(self.batch_size).double() / self.batch_size) % 1
        else:
            everyone = torch.rand(self.batch_size, generator=self.shared_generator, dtype=torch.float64)
        return everyone[list(self.rows)]


def _far_apart(count: int) -> Int[Tensor, " count"]:
    """A permutation of 0, ..., count - 1 in which any few neighbours are spread over all of it: steps of about the
    golden section of count.
    """
    strides = (stride for stride in range(1, count + 1) if gcd(stride, count) == 1)
    stride = min(strides, key=lambda stride: abs(stride - GOLDEN * count))
    return torch.arange(count) * stride % count
