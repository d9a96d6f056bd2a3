import pytest
import torch

from wellposed.training.context import StepContext, derived_seed


def context(rows=range(8), **changes):
    settings = {
        "player": "net",
        "step": 3,
        "seed": 0,
        "rows": rows,
        "batch_size": 8,
        "device": torch.device("cpu"),
    }
    return StepContext(**(settings | changes))


def draws(of):
    return [of.normal((2, 3)), of.uniform(), of.uniform(stratified=True), of.normal((1,))]


def test_a_row_meets_the_same_numbers_in_whatever_share_it_is():
    whole = draws(context())
    for part in range(4):
        for share, everything in zip(draws(context(range(part, 8, 4))), whole, strict=True):
            assert torch.equal(share, everything[part::4])


def test_numbers_differ_between_rows_draws_steps_players_and_seeds():
    values = [context().normal((1,)), *(context(**c).normal((1,)) for c in ({"step": 4}, {"player": "b"}, {"seed": 1}))]
    again = context()
    again.normal((1,))
    values.append(again.normal((1,)))
    flat = torch.cat(values).flatten()
    assert len(flat.unique()) == len(flat)


def test_uniform_numbers_are_uniform_and_stratified_ones_evenly_spread():
    many = 4096
    for stratified in (False, True):
        u = context(range(many), batch_size=many).uniform(stratified=stratified)
        assert u.dtype == torch.float64
        assert (u >= 0).all()
        assert (u < 1).all()
        counts = torch.histc(u.float(), bins=64, min=0, max=1)
        assert (counts == 64).sum() >= (62 if stratified else 0)  # rounding may move a number over a bin's edge
        assert counts.min() > 25
    # Each number by itself is uniform: over many steps, the first row's stratified number covers [0, 1).
    first = torch.stack([context(step=step).uniform(stratified=True)[0] for step in range(400)])
    assert torch.histc(first.float(), bins=8, min=0, max=1).min() > 25


def test_seeds_are_stable_and_depend_on_every_part():
    assert derived_seed(0, "a", 1) == 3975144308853378137  # runs of other days and machines resume with these
    seeds = {derived_seed(*parts) for parts in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a1"))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16, 48, 96, 128, 1707])
def test_strata_of_a_batch_are_all_there_and_those_of_a_share_far_apart(batch_size):
    u = context(range(batch_size), batch_size=batch_size).uniform(stratified=True)
    gaps = torch.diff(u.sort().values)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / batch_size))
    for size in (2, 4, 8, 24):
        for start in range(0, batch_size - size + 1, size):
            share = u[start : start + size].sort().values
            around = torch.diff(torch.cat([share, share[:1] + 1]))
            assert around.max() < 3.5 / size
