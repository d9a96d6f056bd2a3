"""What a run used: time on devices, samples, model FLOPs. The loop keeps it for every run, over all its sessions."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from wellposed.training.data_plan import TrainingData
from wellposed.training.distributed import Workers
from wellposed.training.flops import Arithmetic, device_name, device_peak

__all__ = ["USAGE_FILE", "Usage", "UsageMeter", "read_usage", "usage_before"]

USAGE_FILE = "usage.json"

NO_AMOUNTS = ("device", "kind", "peak_source", "counters", "captioning")

# How much time a process may lose from the account that is killed between two checkpoints.
SECONDS_BETWEEN_WRITES = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a run has used so far.

    Time passes for everything the loop does: steps, checkpoints, samples drawn on the way. It does not pass between
    two sessions. Steps that a crash lost and the next session repeated cost their time twice and count once in all the
    rest, ``repeated_steps`` says how many they were.

    Attributes:
        device: name of the device, in the latest session if they differ.
        kind: "cuda", "cpu" or "mps".
        devices: how many of them, one for each process of the run.
        peak_flop_per_second: most FLOP/s of one of them in the run's arithmetic, see
            :func:`wellposed.training.flops.device_peak`.
        peak_source: "nominal" or "measured".
        seconds: wall-clock time.
        device_seconds: time x devices, summed over the sessions.
        peak_flop: what the devices could have computed at their peak: time x devices x peak, summed over the sessions.
        steps: steps done.
        repeated_steps: steps that were done again after a crash, as far as their first time was written down.
        samples: samples seen, with repetition over epochs.
        model_flops: FLOPs of forward and backward passes without what was computed twice; None if unknown.
        counters: further sums over the steps that the data offer, such as "caption_words" and "image_tokens".
        captioning: what the captions had cost before the run, by unit, such as "usd" and "device_hours"; empty if the
            data do not say.

    Raises:
        ValueError: a number that is negative or not finite.
    """

    device: str
    kind: str
    devices: int
    peak_flop_per_second: float | int
    peak_source: Literal["nominal", "measured"]
    seconds: float | int = 0.0
    device_seconds: float | int = 0.0
    peak_flop: float | int = 0.0
    steps: int = 0
    repeated_steps: int = 0
    samples: int = 0
    model_flops: float | int | None = 0.0
    counters: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    captioning: Mapping[str, float | int] = field(default_factory=dict[str, float | int])

    def __post_init__(self) -> None:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NO_AMOUNTS}
        known = {name: amount for name, amount in own.items() if amount is not None}
        _check_amounts({**known, **self.counters, **self.captioning})

    @property
    def device_hours(self) -> float:
        """Time x devices, in hours."""
        return self.device_seconds / 3600

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the devices could have computed; None if unknown."""
        return self.model_flops / self.peak_flop if self.model_flops is not None and self.peak_flop else None


def read_usage(path: Path) -> Usage:
    """Read a ``usage.json``.

    Raises:
        ValueError: it is none, or damaged.
        OSError: it cannot be read.
    """
    try:
        return Usage(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the account of a run ({error}); remove it, training writes another") from error


def usage_before(path: Path, at_checkpoint: Mapping[str, Any]) -> Usage | None:
    """What a run had used that goes on from a checkpoint: its time as last written, all else as of the checkpoint.

    Args:
        path: the run's ``usage.json``; damaged, it is passed over with a warning.
        at_checkpoint: what the checkpoint holds of it; empty if there is none, or none yet.
    """
    kept = Usage(**at_checkpoint) if at_checkpoint else None
    try:
        last = read_usage(path) if path.exists() else None
    except ValueError as error:
        logger.warning("%s", error)
        last = None
    if last is None:
        return kept
    steps = kept.steps if kept else 0
    return replace(
        last,
        steps=steps,
        repeated_steps=last.repeated_steps + max(0, last.steps - steps),
        samples=kept.samples if kept else 0,
        model_flops=kept.model_flops if kept else 0.0,
        counters=kept.counters if kept else {},
    )


class UsageMeter:
    """Keeps the account of one session of a run, on top of what earlier ones used. Every rank counts, the main writes.

    Data may offer two things beyond :class:`TrainingData`. ``counts_at(step, part, parts) -> Mapping[str, float]`` says
    what every ``parts``-th share of a step amounts to, beginning with number ``part``: "flops" are its model FLOPs,
    which are exact even where steps differ and take the place of the loop's own count; other names are the data's, and
    the same for all. Each rank asks for the shares that it has computed, and the sums are added up.
    ``captioning_cost`` maps units to amounts.

    Args:
        path: where ``usage.json`` is to be.
        workers: the processes of the run; each has a device of its own.
        data: what is trained on.
        arithmetic: how the run multiplies.
        before: what earlier sessions used.
        clock: seconds.
    """

    def __init__(
        self,
        path: Path,
        workers: Workers,
        data: TrainingData,
        arithmetic: Arithmetic,
        before: Usage | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._path, self._workers, self._clock = path, workers, clock
        self._counts_at: Callable[[int, int, int], Mapping[str, float]] | None = getattr(data, "counts_at", None)
        # The main rank's for all of them, so that all log the same.
        device, peak = workers.main_does(lambda: (device_name(workers.device), device_peak(workers.device, arithmetic)))
        hardware: dict[str, Any] = {
            "device": device,
            "kind": workers.device.type,
            "devices": workers.world_size,
            "peak_flop_per_second": peak.flop_per_second,
            "peak_source": peak.source,
            "captioning": dict(getattr(data, "captioning_cost", {})),
        }
        self._before = replace(before, **hardware) if before else Usage(**hardware)
        self._counted = self._asked = self._before
        self._started = self._written = clock()

    def count(self, step: int, samples: int, flops: float | int | None) -> None:
        """The step is done, number ``step`` from 0, with so many samples and model FLOPs over all ranks.

        Raises:
            ValueError: the data count something negative or not finite.
        """
        counts = self._counts_of(step)
        flops = counts.pop("flops", flops)
        done = self._counted
        counters = dict(done.counters)
        for name, amount in counts.items():
            counters[name] = counters.get(name, 0.0) + amount
        self._counted = replace(
            done,
            steps=done.steps + 1,
            samples=done.samples + samples,
            model_flops=None if flops is None or done.model_flops is None else done.model_flops + flops,
            counters=counters,
        )
        if self._clock() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()

    def _counts_of(self, step: int) -> dict[str, float]:
        own = self._counts_at(step, self._workers.rank, self._workers.world_size) if self._counts_at else {}
        if not own:
            return {}
        counts = self._workers.sum({name: torch.tensor(float(own[name]), dtype=torch.float64) for name in sorted(own)})
        # All of them see what is wrong with one.
        _check_amounts(counts, f"counts_at({step}) of the data says ")
        return counts

    def usage(self) -> Usage:
        """What the run has used until now."""
        seconds = self._clock() - self._started
        device_seconds = seconds * self._before.devices
        return replace(
            self._counted,
            seconds=self._before.seconds + seconds,
            device_seconds=self._before.device_seconds + device_seconds,
            peak_flop=self._before.peak_flop + device_seconds * self._before.peak_flop_per_second,
        )

    def rates(self) -> dict[str, float]:
        """For a line of metrics: samples/s and MFU since the last one, samples and seconds of the whole run."""
        now, last = self.usage(), self._asked
        self._asked = now
        per_second = (now.samples - last.samples) / (now.seconds - last.seconds)
        rates = {
            "samples_per_second": round(per_second, 3),
            "samples": now.samples,
            "seconds": round(now.seconds, 3),
        }
        if now.model_flops is not None and last.model_flops is not None:
            rates["mfu"] = (now.model_flops - last.model_flops) / (now.peak_flop - last.peak_flop)
        return rates

    def write(self) -> None:
        """Write ``usage.json``, whole or not at all. Where that fails the next time will do; no run is lost for it."""
        self._written = self._clock()
        if not self._workers.is_main:
            return
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(asdict(self.usage()), indent=2) + "\n", encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            logger.warning("%s cannot be written (%s); trying again later", self._path, error.strerror)

    def close(self) -> None:
        """The session is over. One that did nothing leaves the account alone."""
        if self._counted is not self._before:
            self.write()


def _check_amounts(amounts: Mapping[str, Any], whose: str = "") -> None:
    for name, amount in amounts.items():
        if not isinstance(amount, int | float) or not 0 <= amount < math.inf:
            raise ValueError(f"{whose}{name} is {amount}; an amount is a number >= 0")
