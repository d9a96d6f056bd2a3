"""What is remembered between the steps of a generation, and which generation a call belongs to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import BaseState
from torch import Tensor

from wellposed.dito.adapters import Rows
from wellposed.dito.matching import TokenWindows
from wellposed.dito.schedule import Measurement

__all__ = ["Call", "ContextState", "Mode", "SiteState", "StepRecord", "Summary", "Trajectory", "time_to_data"]

Mode = Literal["dense", "match", "reduce"]

# Branches of guidance that are told apart. One more call of the same latents is taken for a new generation.
_MOST_BRANCHES = 4

# Latents of another picture differ by about sqrt(2) of their norm, a step that a timestep in half precision does not
# show by some percent.
_SAME_PICTURE = 0.5

# Differences of reciprocal times that are too small to tell a schedule by, timesteps in bfloat16 being off by 0.002.
_FINE = 0.01


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One call of the model.

    Attributes:
        context: name of the pipeline's cache context ("cond", "uncond"), or "default".
        step: index of the call in its context and generation.
        mode: "dense", "match" (dense, and pairs are chosen) or "reduce".
    """

    context: str
    step: int
    mode: Mode


@dataclass(eq=False)
class SiteState:
    """What one site keeps between the steps of one trajectory."""

    rows: Rows | None = None  # the pairs, in the site's sequence
    offset: Tensor | None = None  # o_i - o_m(i) of the Matching step, for delta recovery
    slope: Tensor | None = None  # its change in a step, for linear recovery
    previous: Tensor | None = None  # what the last Matching step would have copied, for the next slope
    matched_at: int = -1  # that step
    matching: int = -1  # which Matching step the pairs are of
    generator_state: Tensor | None = None  # before the destinations were drawn
    counts: Tensor | None = None
    reductions: int = 0  # Reduction steps so far
    uncounted: int = 0  # of them, those that are not in ``counts`` yet

    def settle(self) -> None:
        """Count the Reduction steps since the pairs were chosen, before other pairs take their place."""
        if self.uncounted and self.rows is not None:
            image = self.rows.image
            if self.counts is None:
                self.counts = torch.zeros_like(image.recover_from)
            # Not in place: what was counted under torch.inference_mode may be read, and added to, outside of it.
            self.counts = self.counts.scatter_add(1, image.dropped, torch.full_like(image.dropped, self.uncounted))
        self.reductions += self.uncounted
        self.uncounted = 0


@dataclass(eq=False)
class Summary:
    """What outlives a trajectory: the record of it."""

    steps: list[tuple[int, StepRecord]] = field(default_factory=list[tuple[int, StepRecord]])
    measured: list[Measurement] = field(default_factory=list[Measurement])
    counts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(eq=False)
class Trajectory:
    """The calls that belong to one generation, context and branch."""

    name: str
    windows: TokenWindows
    generator: torch.Generator
    summary: Summary
    sites: dict[str, SiteState]
    times: list[float] = field(default_factory=list[float])  # that were left at its calls, each once
    step: int = -1
    last_matching: int = -1
    matchings: int = 0
    factor: float = 1.0  # of the ratio, until the next Matching step
    elapsed: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    unread: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def ends_here(self) -> bool:
        """Whether this step is the last one, as far as a sampler's times tell.

        With m steps to go, this one included, times of flow matching obey 1/t = a/m + b whatever the shift and the
        number of steps, so that 1/t grows by (m + 2)/m times as much in this step as in the one before: by 3 in the
        last one, by 2 in the last but one. Evenly spaced times are the same with b = 0.
        """
        if self.times[-1] <= 0:
            return True
        if len(self.times) < 3:
            return len(self.times) == 2 and self.times[1] <= 1.5 * (self.times[0] - self.times[1])
        unit = 1000.0 if self.times[0] > 1 else 1.0  # some models count a thousand steps
        earlier, before, now = (unit / time for time in self.times[-3:])
        return before - earlier > _FINE and now - before > 2.4 * (before - earlier)

    def elapsed_since(self, step: int, like: Tensor) -> Tensor:
        """Steps since then, as a tensor: a compiled block must not be compiled anew for each number."""
        elapsed = self.step - step
        if elapsed not in self.elapsed:
            self.elapsed[elapsed] = torch.full((), elapsed, dtype=like.dtype, device=like.device)
        return self.elapsed[elapsed]

    def read_measurements(self) -> None:
        """Average over sites what the last Matching step has left there: one wait for the device."""
        if self.unread:
            pmr, error = (
                fmean(values) for values in torch.stack([torch.stack(pair) for pair in self.unread]).T.tolist()
            )
            self.summary.measured.append(Measurement(pmr=pmr, recovery_error=error))
            self.unread.clear()


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What is known of a call before it runs.

    Attributes:
        batch: the number of samples.
        remaining: see :func:`time_to_data`.
        latents: what is denoised; the first one's where samples are a list.
    """

    batch: int
    remaining: float
    latents: Tensor

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls of one generation have in common, whatever their batch."""
        return tuple(self.latents.shape[1:]), self.latents.dtype, self.latents.device


class ContextState(BaseState):
    """The trajectories of one cache context, by batch and by branch of guidance."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self.settle = settle
        self.trajectories: dict[int, list[Trajectory]] = {}
        self._forget()

    def _forget(self) -> None:
        self.trajectories.clear()
        self.latest: dict[int, tuple[Tensor, int]] = {}  # latents and branch of the calls at this time, by batch
        self.remaining = float("inf")
        self.kind: tuple[Any, ...] | None = None

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget pairs and outputs; the record of what happened stays with the root."""
        self.settle()
        self._forget()

    def trajectory(self, call: Call, start: Callable[[int], Trajectory]) -> Trajectory:
        """The one that a call belongs to.

        Time that goes back, or pictures of another size, begin a new generation, and what is left of earlier ones goes.
        Of several calls at one timestep,

        * one with the same latents is another branch of guidance;
        * one whose latents have changed a little is the next step: a two-stage solver's, or one too short for the
          timestep's precision, as many are at 2048 x 2048 in bfloat16;
        * one with other latents is a new generation if none has gone further, else another branch (a tile, say).

        A batch of another size is a trajectory of its own in the same generation, as in skip-layer guidance.
        """
        if call.remaining > self.remaining or call.kind != self.kind:
            self.reset()
        if call.remaining != self.remaining:
            self.latest.clear()
        branch = self._branch(call)
        branches = self.trajectories.setdefault(call.batch, [])
        if branch == len(branches):
            branches.append(start(branch))  # which may refuse the call: nothing of it is remembered then
        self.latest[call.batch] = call.latents.clone(), branch
        self.remaining, self.kind = call.remaining, call.kind
        current = branches[branch]
        if current.times[-1:] != [call.remaining]:
            current.times.append(call.remaining)
        return current

    def _branch(self, call: Call) -> int:
        if call.batch not in self.latest:
            return 0
        latents, branch = self.latest[call.batch]
        change = float((call.latents.float() - latents.float()).norm() / latents.float().norm().clamp_min(1e-12))
        if 0 < change < _SAME_PICTURE:
            return 0
        is_first_step = self.trajectories[call.batch][0].step == 0
        if (change > 0 and is_first_step) or branch + 1 == _MOST_BRANCHES:
            self.reset()
            return 0
        return branch + 1


def time_to_data(arguments: dict[str, Any]) -> float:
    """How much of a generation is left at this call, in the model's own unit; 0 is data.

    Reading it waits for the device once a step; Z-Image's time runs the other way.
    """
    for name in ("timestep", "t"):
        time = arguments.get(name)
        if time is not None:
            value = float(time.flatten()[0] if isinstance(time, Tensor) else time)
            return value if name == "timestep" else 1 - value
    raise ValueError("the call has neither timestep nor t, so that steps of a generation cannot be told apart")
