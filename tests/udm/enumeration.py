"""Discrete diffusion over a handful of sequences, by enumeration: what the room's tests compare the library with.

Nothing here uses the library. A channel is a matrix ``q[x_0, y]`` of one position, a state y of it is what is observed
there, and whole sequences are its Kronecker powers, with the last position running fastest.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch
from torch import Tensor


def uniform_channel(alpha: float, vocab_size: int) -> Tensor:
    """alpha [y = x_0] + (1 - alpha) / K; y is a token."""
    return alpha * torch.eye(vocab_size, dtype=torch.float64) + (1 - alpha) / vocab_size


def masked_channel(alpha: float, vocab_size: int) -> Tensor:
    """x_0 with probability alpha, else K, the mask."""
    eye = torch.eye(vocab_size, dtype=torch.float64)
    return torch.cat([alpha * eye, torch.full((vocab_size, 1), 1 - alpha, dtype=torch.float64)], 1)


def absorbing_channel(alpha: float, vocab_size: int) -> Tensor:
    """u uniform, x = x_0 with probability alpha, else u; y = K x + u."""
    q = torch.zeros(vocab_size, vocab_size, vocab_size, dtype=torch.float64)
    for x_0, u in itertools.product(range(vocab_size), repeat=2):
        q[x_0, x_0, u] += alpha / vocab_size
        q[x_0, u, u] += (1 - alpha) / vocab_size
    return q.flatten(1)


def power(matrix: Tensor, length: int) -> Tensor:
    """The same independently at each position."""
    return reduce(torch.kron, [matrix.contiguous()] * length)


def all_sequences(symbols: int, length: int) -> Tensor:
    """Every sequence, the last position running fastest."""
    return torch.tensor(list(itertools.product(range(symbols), repeat=length))).view(-1, length)


def index_of(sequences: Tensor, symbols: int) -> Tensor:
    """Where a sequence stands among all."""
    place = symbols ** torch.arange(sequences.shape[-1] - 1, -1, -1)
    return (sequences * place).sum(-1)


def law_of(sequences: Tensor, symbols: int) -> Tensor:
    """Frequencies of whole sequences."""
    counts = torch.bincount(index_of(sequences, symbols), minlength=symbols ** sequences.shape[-1])
    return counts.double() / len(sequences)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the absolute difference; the largest over leading dimensions."""
    return float((p - q).abs().sum(-1).max() / 2)


@dataclass(frozen=True, eq=False)
class World:
    """A law of clean sequences: ``table[x_1, ..., x_L]``."""

    table: Tensor

    @classmethod
    def random(cls, vocab_size: int, length: int, seed: int = 0) -> "World":
        """An arbitrary law without zeros, far from a product."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand((vocab_size,) * length, generator=generator, dtype=torch.float64).log().square() + 1e-2
        return cls(weights / weights.sum())

    @property
    def vocab_size(self) -> int:
        """K."""
        return self.table.shape[0]

    @property
    def length(self) -> int:
        """L."""
        return self.table.ndim

    @property
    def law(self) -> Tensor:
        """p(x_0), flat."""
        return self.table.flatten()

    @cached_property
    def sequences(self) -> Tensor:
        """Every clean sequence."""
        return all_sequences(self.vocab_size, self.length)

    def joint(self, channel: Tensor) -> Tensor:
        """p(x_0, y), (K^L, M^L)."""
        return self.law[:, None] * power(channel, self.length)

    def marginal(self, channel: Tensor) -> Tensor:
        """p(y)."""
        return self.joint(channel).sum(0)

    def denoiser(self, channel: Tensor) -> Tensor:
        """p(x_0 = k at i | y), (M^L, L, K); 0/0 where y is impossible."""
        return self._posterior(channel, leave_one_out=False)

    def leave_one_out(self, channel: Tensor) -> Tensor:
        """p(x_0 = k at i | y but for position i)."""
        return self._posterior(channel, leave_one_out=True)

    def _posterior(self, channel: Tensor, *, leave_one_out: bool) -> Tensor:
        length, symbols = self.length, channel.shape[1]
        joint = self.joint(channel).view([self.vocab_size] * length + [symbols] * length)
        positions = []
        for i in range(length):
            others = [j for j in range(length) if j != i]
            weight = joint.sum(others) if others else joint  # (K, y_1, ..., y_L)
            if leave_one_out:
                weight = weight.sum(1 + i, keepdim=True).expand_as(weight)
            weight = weight.reshape(self.vocab_size, -1)
            positions.append((weight / weight.sum(0)).T)
        return torch.stack(positions, 1)

    def entropy(self) -> float:
        """H(x_0)."""
        return float(-(self.law * self.law.log()).sum())


def uniform_path(alpha_t: float, alpha_s: float, vocab_size: int) -> Tensor:
    """q(x_s, x_t | x_0) of one position, (x_0, x_s, x_t), of the Markov chain of uniform corruption."""
    first, then = uniform_channel(alpha_s, vocab_size), uniform_channel(alpha_t / alpha_s, vocab_size)
    return first[:, :, None] * then[None]


def uniform_posterior_bridge(alpha_t: float, alpha_s: float, vocab_size: int) -> Tensor:
    """q(x_s | x_0, x_t) by Bayes, (x_0, x_t, x_s)."""
    path = uniform_path(alpha_t, alpha_s, vocab_size).transpose(1, 2)
    return path / path.sum(-1, keepdim=True)


def spread_numbers(count: int, dimensions: int) -> Tensor:
    """The corners of the unit cube and a Kronecker sequence in it."""
    if dimensions == 0:
        return torch.zeros(1, 0, dtype=torch.float64)
    corners = all_sequences(2, dimensions).double().clamp_max(1 - 2**-53)
    root = 2.0
    for _ in range(50):  # root^(d + 1) = root + 1
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -torch.arange(1, dimensions + 1, dtype=torch.float64)
    return torch.cat([corners, (0.5 + torch.arange(1, count + 1)[:, None] * steps) % 1])


Outcome = Callable[[Tensor, Tensor], Tensor]


def law_of_draws(outcome: Outcome, rows: int, numbers: int, *, outcomes: int, probes: int = 32) -> Tensor:
    """The exact law of something drawn from uniform numbers, (rows, outcomes), to about 1e-13.

    It must be a step function of each number once those before it are fixed. One number after the other, [0, 1) is cut
    where outcomes change, for some of a few values of the numbers still to come; cuts are found by bisection. What is
    missed (a step narrower than 1/16 between equal ones, a difference that no probe shows) gives a visibly wrong law.

    Args:
        outcome: from indices of rows (n,) and their numbers (n, numbers) to outcomes (n,).
        rows: how many different situations.
        numbers: how many uniform numbers a draw consumes.
        outcomes: they lie in [0, outcomes).
        probes: values of the numbers still to come.
    """
    row, prefix = torch.arange(rows), torch.zeros(rows, 0, dtype=torch.float64)
    weight = torch.ones(rows, dtype=torch.float64)
    for level in range(numbers):
        node, cut = _cuts(outcome, row, prefix, spread_numbers(probes, numbers - level - 1))
        nodes = torch.arange(len(row))
        starts, order = torch.cat([torch.zeros(len(nodes), dtype=torch.float64), cut]).sort()
        owners, inner = torch.cat([nodes, node])[order].sort(stable=True)
        starts = starts[inner]
        ends = torch.ones_like(starts)
        ends[:-1] = torch.where(owners[1:] == owners[:-1], starts[1:], 1.0)
        row, weight = row[owners], weight[owners] * (ends - starts)
        prefix = torch.cat([prefix[owners], ((starts + ends) / 2)[:, None]], 1)
    law = torch.zeros(rows * outcomes, dtype=torch.float64)
    return law.scatter_add(0, row * outcomes + outcome(row, prefix), weight).view(rows, outcomes)


def _cuts(outcome: Outcome, row: Tensor, prefix: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next number after each prefix makes a difference: indices of prefixes, and values."""

    def seen(node: Tensor, value: Tensor, probe: Tensor) -> Tensor:
        return outcome(row[node], torch.cat([prefix[node], value[:, None], rest[probe]], 1))

    def signature(node: Tensor, value: Tensor) -> Tensor:
        count = len(rest)
        probes = torch.arange(count).repeat(len(node))
        return seen(node.repeat_interleave(count), value.repeat_interleave(count), probes).view(-1, count)

    ladder = torch.tensor([0.0, *((i + 0.4321) / 16 for i in range(16)), 1 - 2**-53], dtype=torch.float64)
    nodes, steps = torch.arange(len(row)), len(ladder) - 1
    ends = signature(nodes.repeat_interleave(len(ladder)), ladder.repeat(len(nodes)))
    ends = ends.view(len(nodes), len(ladder), -1)
    at_low, at_high = ends[:, :-1].flatten(0, 1), ends[:, 1:].flatten(0, 1)
    node, low, high = nodes.repeat_interleave(steps), ladder[:-1].repeat(len(nodes)), ladder[1:].repeat(len(nodes))
    # Eighths instead of halves: a call costs more than its rows.
    inside = torch.arange(1, 8, dtype=torch.float64) / 8
    for _ in range(2):  # until there is one cut in an interval
        differ = (at_low != at_high).any(-1)
        node, low, high, at_low, at_high = (each[differ] for each in (node, low, high, at_low, at_high))
        points = low[:, None] + (high - low)[:, None] * inside
        at_points = signature(node.repeat_interleave(7), points.flatten()).view(len(node), 7, len(rest))
        points = torch.cat([low[:, None], points, high[:, None]], 1)
        ends = torch.cat([at_low[:, None], at_points, at_high[:, None]], 1)
        node, low, high = node.repeat_interleave(8), points[:, :-1].flatten(), points[:, 1:].flatten()
        at_low, at_high = ends[:, :-1].flatten(0, 1), ends[:, 1:].flatten(0, 1)
    differ, probe = (at_low != at_high).max(-1)
    node, low, high, at_low, probe = (each[differ] for each in (node, low, high, at_low, probe))
    at_low = at_low.gather(1, probe[:, None])
    for _ in range(12):  # then one probe that shows it will do
        points = low[:, None] + (high - low)[:, None] * inside
        at_points = seen(node.repeat_interleave(7), points.flatten(), probe.repeat_interleave(7)).view(-1, 7)
        points = torch.cat([low[:, None], points, high[:, None]], 1)
        before = (at_points == at_low).cummin(-1).values.sum(-1, keepdim=True)
        low, high = points.gather(1, before).squeeze(1), points.gather(1, before + 1).squeeze(1)
    return node, high


def gauss_legendre_times(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (0, 1) for integrands with a singular end: t = u^3 (10 - 15 u + 6 u^2)."""
    x, w = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(count))
    u = (x + 1) / 2
    return u**3 * (10 - 15 * u + 6 * u**2), w / 2 * 30 * u**2 * (1 - u) ** 2


def binomial(count: int, p: Tensor) -> Tensor:
    """Probabilities of 0..count successes for each p, (..., count + 1)."""
    k = torch.arange(count + 1, dtype=torch.float64)
    choose = math.lgamma(count + 1) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    return (choose + torch.special.xlogy(k, p[..., None]) + torch.special.xlog1py(count - k, -p[..., None])).exp()
