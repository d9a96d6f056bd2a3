import json
import time

import pytest
import torch

from wellposed.evaluation.speed import Comparison, Timing, comparable_clock, saved_graph_bytes, time_calls


def timing(*seconds):
    return Timing(wall_times=seconds, process_times=tuple(2 * s for s in seconds), peak_bytes=None)


def test_calls_take_turns_and_warm_up():
    order = []
    comparison = time_calls({n: lambda n=n: order.append(n) for n in "abc"}, repeats=4, warmup=2)
    assert "".join(order) == "abc" * 6
    assert len(comparison.timings["b"].wall_times) == 4
    assert comparison.baseline == "a"


def test_the_two_clocks_measure_different_things():
    """Sleeping takes elapsed time and no processor time; bounds that a busy machine cannot break."""
    comparison = time_calls({"nothing": lambda: None, "sleep": lambda: time.sleep(0.03)}, repeats=4, warmup=0)
    asleep = comparison.timings["sleep"]
    assert min(asleep.wall_times) >= 0.03
    assert sum(asleep.process_times) < 0.5 * sum(asleep.wall_times)
    assert comparison.ratio("nothing").median == 1.0
    assert comparison.ratio("sleep").median > 1.0


def test_ratios_are_taken_within_rounds():
    """A machine that slows down threefold half-way leaves the ratio alone, which a ratio of medians would not."""
    comparison = Comparison(
        timings={"a": timing(1.0, 1.0, 3.0), "b": timing(2.0, 6.0, 6.0)}, baseline="a", device="cpu"
    )
    assert comparison.ratio("b").median == 2.0
    assert comparison.timings["b"].seconds().median == 6.0
    assert comparison.ratio("b", clock="process").median == 2.0


def test_record_is_json():
    comparison = Comparison(
        timings={"a": timing(1.0, 2.0, 3.0), "b": timing(2.0, 4.0, 6.0)}, baseline="a", device="cpu"
    )
    record = json.loads(json.dumps(comparison.to_dict()))
    assert record["calls"]["b"]["wall_ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert record["calls"]["a"]["process_seconds"] == {"median": 4.0, "low": 3.0, "high": 5.0}
    assert record["rounds"] == 3


def test_bad_input():
    for kwargs, message in (({"repeats": 2}, "repeats >= 3"), ({"baseline": "b"}, "'b' is none")):
        with pytest.raises(ValueError, match=message):
            time_calls({"a": lambda: None}, **kwargs)
    with pytest.raises(ValueError, match="empty"):
        time_calls({})


def test_saved_graph_counts_each_storage_once_and_no_parameter():
    linear = torch.nn.Linear(10, 20)
    x = torch.ones(5, 10, requires_grad=True)
    parameters = list(linear.parameters())
    # The linear map keeps its input (5 x 10); the sigmoid keeps its output (5 x 20), which the product keeps again.
    assert saved_graph_bytes(lambda: linear(x), exclude=parameters) == 4 * 50

    def twice_used():
        y = linear(x).sigmoid()
        return y * y

    assert saved_graph_bytes(twice_used, exclude=parameters) == 4 * (50 + 100)
    assert saved_graph_bytes(twice_used, exclude=[*parameters, x]) == 4 * 100
    assert saved_graph_bytes(twice_used) == 4 * (50 + 100 + 200)


def test_saved_graph_of_many_short_lived_tensors():
    """Tensors freed during the forward pass free their addresses; counting by address alone would miss some."""
    x = torch.ones(1000, requires_grad=True)

    def forward():
        for _ in range(10):
            (x * 1.0).exp()

    assert saved_graph_bytes(forward) == 10 * 4 * 1000


@pytest.mark.gpu
def test_memory_and_synchronisation_on_cuda():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    comparison = time_calls({"one": lambda: a @ a, "four": lambda: [a @ a for _ in range(4)]}, device=device)
    assert comparison.timings["one"].peak_bytes >= a.nbytes
    assert comparison.timings["four"].peak_bytes >= 4 * a.nbytes
    assert 3.0 < comparison.ratio("four").median < 5.0


def test_a_cpu_is_timed_by_one_thread_and_a_gpu_by_the_wall():
    threads = torch.get_num_threads()
    try:
        assert comparable_clock(torch.device("cuda")) == "wall" and torch.get_num_threads() == threads
        assert comparable_clock(torch.device("cpu")) == "process" and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
