"""Honest ratios of running times on machines that are shared and noisy.

The callables take turns (a b c, a b c, ...), so that whatever slows the machine down meets all of them alike, and a
ratio is the median of the ratios within the rounds, not the ratio of two medians.
"""

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Clock", "Comparison", "Spread", "Timing", "comparable_clock", "saved_graph_bytes", "time_calls"]

Clock = Literal["wall", "process"]

CLOCKS: tuple[Clock, ...] = ("wall", "process")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two values."""
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return cls(median=middle, low=low, high=high)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Running times of one callable in seconds, one for each round.

    Attributes:
        wall_times: elapsed time.
        process_times: CPU time of this process, all threads together: steadier than elapsed time where other processes
            compete for the cores, and blind to what a GPU does.
        peak_bytes: most CUDA memory in use beyond what was in use before the call; None on a CPU.
    """

    wall_times: tuple[float, ...]
    process_times: tuple[float, ...]
    peak_bytes: int | None

    def times(self, clock: Clock) -> tuple[float, ...]:
        """All rounds by one clock."""
        return self.wall_times if clock == "wall" else self.process_times

    def seconds(self, clock: Clock = "wall") -> Spread:
        """Median and quartiles by one clock."""
        return Spread.of(self.times(clock))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What :func:`time_calls` measured.

    Attributes:
        timings: by name.
        baseline: the name that ratios refer to.
        device: where it ran.
    """

    timings: Mapping[str, Timing]
    baseline: str
    device: str

    def ratio(self, name: str, *, clock: Clock = "wall") -> Spread:
        """Time of ``name`` over time of the baseline, round by round."""
        times, base = self.timings[name].times(clock), self.timings[self.baseline].times(clock)
        return Spread.of([t / b for t, b in zip(times, base, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Seconds, ratios and memory as plain types, for JSON."""
        calls: dict[str, dict[str, Any]] = {}
        for name, timing in self.timings.items():
            calls[name] = {"peak_bytes": timing.peak_bytes}
            for clock in CLOCKS:
                calls[name][f"{clock}_seconds"] = asdict(timing.seconds(clock))
                calls[name][f"{clock}_ratio"] = asdict(self.ratio(name, clock=clock))
        rounds = len(self.timings[self.baseline].wall_times)
        return {"device": self.device, "baseline": self.baseline, "rounds": rounds, "calls": calls}


def comparable_clock(device: torch.device) -> Clock:
    """The clock by which ratios on a device mean something; on a CPU torch keeps to one thread from now on.

    Other processes share a CPU's cores, so that one thread and its CPU time are what can be compared. A GPU works
    beside this process, whose CPU time does not know of it.
    """
    if device.type == "cuda":
        return "wall"
    torch.set_num_threads(1)
    return "process"


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    baseline: str | None = None,
    device: torch.device = CPU,
) -> Comparison:
    """Time callables against each other, one call of each in every round.

    The garbage collector is held off while the clock runs. On CUDA every call is bracketed by a synchronisation.

    Args:
        calls: what to time, by name.
        repeats: rounds that count, at least 3.
        warmup: rounds before those, which pay for allocations, caches and compilation.
        baseline: the name that ratios refer to; the first one if None.
        device: where the callables work.

    Raises:
        ValueError: nothing to time, too few repeats, or an unknown baseline.
    """
    if not calls:
        raise ValueError("nothing to time: calls is empty")
    if repeats < 3 or warmup < 0:
        raise ValueError(f"repeats is {repeats} and warmup {warmup}; a spread takes repeats >= 3, and warmup >= 0")
    baseline = next(iter(calls)) if baseline is None else baseline
    if baseline not in calls:
        raise ValueError(f"the baseline {baseline!r} is none of the calls {sorted(calls)}")
    rounds: dict[str, list[_Measurement]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            measurement = _measure(call, device)
            if i >= warmup:
                rounds[name].append(measurement)
    return Comparison(
        timings={
            name: Timing(
                wall_times=tuple(m.wall for m in measurements),
                process_times=tuple(m.process for m in measurements),
                peak_bytes=max(m.peak_bytes for m in measurements) if device.type == "cuda" else None,
            )
            for name, measurements in rounds.items()
        },
        baseline=baseline,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def saved_graph_bytes(function: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``function()``, each storage counted once.

    Args:
        function: runs a forward pass with gradients enabled.
        exclude: tensors that exist anyway, such as ``model.parameters()``: their storages do not count.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # Holding the storages keeps an address from being freed and given to another tensor, which would then be missed.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in saved.values())


class _Measurement(NamedTuple):
    wall: float
    process: float
    peak_bytes: int


def _measure(call: Callable[[], object], device: torch.device) -> _Measurement:
    on_cuda = device.type == "cuda"
    before = 0
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        wall, process = time.perf_counter(), time.process_time()
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
        wall, process = time.perf_counter() - wall, time.process_time() - process
    finally:
        if collecting:
            gc.enable()
    peak = torch.cuda.max_memory_allocated(device) - before if on_cuda else 0
    return _Measurement(wall=wall, process=process, peak_bytes=peak)
