"""Rates, measured with a clock that only sleeping moves, and by threads with a real one."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from wellposed.lens.rate_limit import RateLimit


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_no_minute_has_more_than_the_rate():
    clock = Clock()
    limit = RateLimit(30.0, clock=clock, sleep=clock.sleep)
    begun = []
    for _ in range(100):
        limit.take()
        begun.append(clock())
    assert begun == pytest.approx([100 + 2 * place for place in range(100)])
    assert all(sum(start <= moment < start + 60 for moment in begun) <= 30 for start in begun)


def test_time_without_requests_is_not_saved_up():
    clock = Clock()
    limit = RateLimit(60.0, clock=clock, sleep=clock.sleep)
    clock.sleep(1000.0)
    begun = []
    for _ in range(3):
        limit.take()
        begun.append(clock() - 1100)
    assert begun == pytest.approx([0, 1, 2])


def test_units_and_their_correction():
    clock = Clock()
    limit = RateLimit(600.0, clock=clock, sleep=clock.sleep)
    limit.take(1000.0)
    assert clock() == 100
    limit.take(10.0)
    assert clock() == pytest.approx(200)
    limit.correct(90.0)
    limit.take(50.0)
    assert clock() == pytest.approx(210)
    limit.correct(-50.0)
    limit.take()
    assert clock() == pytest.approx(210)


def test_no_limit_never_waits():
    slept: list[float] = []
    limit = RateLimit(None, sleep=slept.append)
    for _ in range(1000):
        limit.take(1e9)
        limit.correct(1e9)
    assert slept == []


def test_threads_share_one_rate():
    limit, begun, lock = RateLimit(6000.0), [], threading.Lock()

    def work(_: int) -> None:
        limit.take()
        with lock:
            begun.append(time.monotonic())

    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(31)))
    assert len(begun) == 31 and max(begun) - start >= 0.3
    begun.sort()
    assert all(moment - start >= 0.01 * place - 1e-3 for place, moment in enumerate(begun))


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="give a positive number, or None"):
        RateLimit(rate)
