from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from wellposed.dito.adapters import Rows
from wellposed.dito.matching import TokenCorrespondence, TokenWindows
from wellposed.dito.trajectory import Call, ContextState, SiteState, Summary, Trajectory, time_to_data

WINDOWS = TokenWindows.of_coordinates(torch.cartesian_prod(torch.arange(2), torch.arange(2)))


def trajectory(name: str = "cond") -> Trajectory:
    return Trajectory(name=name, windows=WINDOWS, generator=torch.Generator(), summary=Summary(), sites={})


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (1, 4, 8)), generator=torch.Generator().manual_seed(seed))


class Calls:
    """A context's calls; trajectories are numbered in the order in which they began."""

    def __init__(self) -> None:
        self.settled = 0
        self.state = ContextState(self.settle)
        self.begun: list[Trajectory] = []

    def settle(self) -> None:
        self.settled += 1

    def start(self, branch: int) -> Trajectory:
        self.begun.append(trajectory(str(branch)))
        return self.begun[-1]

    def __call__(self, remaining: float, latents: Tensor, batch: int = 1) -> int:
        current = self.state.trajectory(Call(batch=batch, remaining=remaining, latents=latents), self.start)
        current.step += 1
        return self.begun.index(current)


def test_steps_of_one_generation_are_one_trajectory() -> None:
    calls = Calls()
    assert [calls(1 - i / 5, noise(i)) for i in range(5)] == [0] * 5
    assert calls.begun[0].times == [1, 0.8, 0.6, pytest.approx(0.4), pytest.approx(0.2)]


def test_time_that_goes_back_begins_a_generation_and_forgets_the_old_one() -> None:
    calls = Calls()
    found = [calls(remaining, noise(i)) for i, remaining in enumerate((1.0, 0.5, 1.0, 0.5, 0.9))]
    assert found == [0, 0, 1, 1, 2]
    assert list(calls.state.trajectories.values()) == [[calls.begun[2]]]


@pytest.mark.parametrize("num_branches", [2, 3, 4])
def test_calls_of_equal_latents_are_branches_of_guidance(num_branches: int) -> None:
    calls = Calls()
    found = [calls(1 - i / 4, noise(i)) for i in range(4) for _ in range(num_branches)]
    assert found == list(range(num_branches)) * 4
    assert [one.name for one in calls.begun] == [str(branch) for branch in range(num_branches)]


def test_a_branch_may_come_later_and_pause() -> None:
    """Guidance is often limited to some of the steps."""
    calls = Calls()
    found = []
    for step, is_guided in enumerate((False, True, False, True, False)):
        found += [calls(1 - step / 5, noise(step)) for _ in range(1 + is_guided)]
    assert found == [0, 0, 1, 0, 0, 1, 0]


def test_a_fifth_call_of_equal_latents_begins_a_generation() -> None:
    calls = Calls()
    assert [calls(1.0, noise(0)) for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    assert len(calls.state.trajectories[1]) == 2


def test_a_solvers_second_stage_is_the_next_step() -> None:
    """Heun's corrector calls at the time of the next predictor, with latents that are nearly the same."""
    calls = Calls()
    x = noise(0)
    found = [calls(1.0, x)]
    for step in range(1, 4):
        found += [calls(1 - step / 4, x + 0.01 * step), calls(1 - step / 4, x + 0.02 * step)]
    assert found == [0] * 7
    assert calls.begun[0].step == 6 and calls.begun[0].times == [1, 0.75, 0.5, 0.25]


def test_a_solvers_stages_keep_branches_apart() -> None:
    calls = Calls()
    x = noise(0)
    found = [calls(1.0, x), calls(1.0, x)]
    for latents in (0.9 * x, 0.91 * x):
        found += [calls(0.5, latents), calls(0.5, latents)]
    assert found == [0, 1] * 3


def test_steps_too_short_for_half_precision_are_steps() -> None:
    """FLUX at 2048 x 2048: of fifty timesteps in bfloat16, sixteen equal the one before."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 50, 50), mu=3.23)
    times = (scheduler.timesteps.to(torch.bfloat16) / 1000).tolist()
    assert len(set(times)) == 34 and times[0] == times[1] == times[2]
    calls = Calls()
    assert [calls(time, noise(0) + 0.01 * i) for i, time in enumerate(times)] == [0] * 50


def test_a_generation_that_was_stopped_after_its_first_call_leaves_nothing_behind() -> None:
    calls = Calls()
    assert [calls(1.0, noise(0)), calls(1.0, noise(1)), calls(0.5, noise(2))] == [0, 1, 1]


def test_other_pictures_at_later_steps_are_branches() -> None:
    """Tiles: each picture keeps its own pairs from its second step on."""
    calls = Calls()
    calls(1.0, noise(0))
    found = [calls(1 - step / 4, noise(tile)) for step in range(1, 4) for tile in (0, 1)]
    assert found == [0, 1] * 3


def test_another_batch_is_a_trajectory_of_the_same_generation() -> None:
    """Skip-layer guidance: a third pass, of half the batch, at some of the steps."""
    calls = Calls()
    found = []
    for step in range(4):
        found.append(calls(1 - step / 4, noise(step, 2, 4, 8), batch=2))
        if step in (1, 2):
            found.append(calls(1 - step / 4, noise(step, 1, 4, 8), batch=1))
    assert found == [0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, :2], lambda x: x.double(), lambda x: x.to("meta")],
    ids=["size", "dtype", "device"],
)
def test_another_size_dtype_or_device_begins_a_generation(change: Any) -> None:
    calls = Calls()
    calls(1.0, noise(0))
    assert calls(0.5, change(noise(0))) == 1
    assert list(calls.state.trajectories.values()) == [[calls.begun[1]]]


def test_latents_changed_in_place_are_new_latents() -> None:
    calls = Calls()
    x = noise(0)
    calls(1.0, x), calls(0.5, x)
    x *= 1.01
    assert calls(0.5, x) == 0


def test_reset_settles_first() -> None:
    calls = Calls()
    calls(1.0, noise(0))
    before = calls.settled
    calls.state.reset()
    assert calls.settled == before + 1 and not calls.state.trajectories
    assert calls(0.5, noise(0)) == 1


def ends(times: list[float]) -> list[int]:
    current = trajectory()
    found = []
    for i, time in enumerate(times):
        current.times.append(time)
        if current.ends_here():
            found.append(i)
    return found


@pytest.mark.parametrize("num_steps", [3, 4, 8, 20, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.16, 25.0])
@pytest.mark.parametrize("unit", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_step_is_seen_whatever_the_shift(num_steps: int, shift: float, unit: float, dtype: Any) -> None:
    t = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    times = (unit * shift * t / (1 + (shift - 1) * t)).to(dtype).double()
    distinct = list(dict.fromkeys(times.tolist()))
    found = ends(distinct)
    assert found[-1] == len(distinct) - 1
    if dtype == torch.float32 or num_steps > 4:  # of four steps that half precision rounds, the last but one may be too
        assert len(found) == 1


def test_the_last_of_two_steps_and_time_zero_are_seen() -> None:
    assert ends([1.0, 0.5]) == [1]
    assert ends([0.9, 0.6, 0.3, 0.0])[-1] == 3
    assert ends([1.0]) == []


def pairs(dropped: list[int], target: list[int]) -> Rows:
    image = TokenCorrespondence.from_pairs(4, torch.tensor([dropped]), torch.tensor([target]))
    return Rows.around(image, 2, 6)


def test_drops_are_counted_before_other_pairs_take_their_place() -> None:
    state = SiteState(rows=pairs([1, 2], [0, 3]))
    state.uncounted = 3
    state.settle()
    assert state.counts.tolist() == [[0, 3, 3, 0]] and state.reductions == 3
    state.rows, state.uncounted = pairs([0, 2], [1, 1]), 2
    state.settle()
    state.settle()
    assert state.counts.tolist() == [[2, 3, 5, 0]] and state.reductions == 5


def test_drops_counted_under_inference_mode_can_be_added_to_outside_of_it() -> None:
    with torch.inference_mode():
        state = SiteState(rows=pairs([1], [0]), uncounted=1)
        state.settle()
    state.uncounted = 1
    state.settle()
    assert state.counts.tolist() == [[0, 2, 0, 0]]


def test_measurements_are_means_over_sites_and_read_once() -> None:
    current = trajectory()
    current.unread = [(torch.tensor(0.5), torch.tensor(0.25)), (torch.tensor(1.0), torch.tensor(0.75))]
    current.read_measurements()
    current.read_measurements()
    assert [(one.pmr, one.recovery_error) for one in current.summary.measured] == [(0.75, 0.5)]


def test_elapsed_steps_are_one_tensor_for_each_number() -> None:
    current = trajectory()
    current.step = 5
    first = current.elapsed_since(2, torch.zeros(1, dtype=torch.bfloat16))
    assert first == 3 and first.dtype == torch.bfloat16
    current.step = 8
    assert current.elapsed_since(5, torch.zeros(1, dtype=torch.bfloat16)) is first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"timestep": torch.tensor([250.0, 250.0])}, 250),
        ({"timestep": torch.tensor(0.25)}, 0.25),
        ({"timestep": 7}, 7),
        ({"t": torch.tensor([0.25])}, 0.75),
        ({"timestep": None, "t": 0.25}, 0.75),
    ],
)
def test_time_to_data(arguments: dict[str, Any], expected: float) -> None:
    assert time_to_data(arguments) == expected


def test_a_call_without_time_is_refused() -> None:
    with pytest.raises(ValueError, match="neither timestep nor t"):
        time_to_data({"hidden_states": torch.zeros(1)})


def test_a_call_says_what_its_generation_has_in_common() -> None:
    one, two = (Call(batch=b, remaining=1.0, latents=torch.zeros(b, 4, 8)) for b in (1, 2))
    assert one.kind == two.kind != Call(batch=1, remaining=1.0, latents=torch.zeros(1, 2, 8)).kind


def test_the_tools_of_these_tests_are_what_they_say(tiny: SimpleNamespace) -> None:
    """``of_equal_windows`` repeats tokens window by window."""
    host = tiny.of_equal_windows(tiny.hosts["flux"]())
    tokens = host.arguments(0.0, 2)["hidden_states"].unflatten(1, (tiny.rows, tiny.columns))
    assert torch.equal(tokens[:, ::2, ::2], tokens[:, 1::2, 1::2])
    assert not torch.equal(tokens[:, ::2, ::2][:, :, :-1], tokens[:, ::2, ::2][:, :, 1:])
