"""A limit on how much may begin in a minute, shared by threads, that lets wait instead of failing."""

import threading
import time
from collections.abc import Callable

__all__ = ["RateLimit"]


class RateLimit:
    """A token bucket that holds one request, so that requests are spread evenly.

    Whoever takes n units at a rate of r a minute keeps the next one waiting for 60 n / r seconds. In no minute do more
    than r units begin, but for the last request, which may reach beyond it; a bucket with room for a minute's units
    would let twice as many pass in its first one.

    Args:
        per_minute: units a minute; None for no limit.
        clock: seconds that only grow.
        sleep: waits for a number of seconds.

    Raises:
        ValueError: a rate that is not positive.
    """

    def __init__(
        self,
        per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if per_minute is not None and not per_minute > 0:
            raise ValueError(f"the rate is {per_minute} a minute; give a positive number, or None for no limit")
        self._seconds_each = 0.0 if per_minute is None else 60 / per_minute
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_at = clock()

    def take(self, units: float = 1.0) -> None:
        """Wait for one's turn, in the order of calls, and take units."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._free_at)
            self._free_at = turn + units * self._seconds_each
        if turn > now:
            self._sleep(turn - now)

    def correct(self, units: float) -> None:
        """Take further units without waiting, or give some back (negative): what was taken was a guess."""
        with self._lock:
            self._free_at += units * self._seconds_each
