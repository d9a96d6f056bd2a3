import math

import pytest
import torch

from wellposed.evaluation import neighbours as module
from wellposed.evaluation.neighbours import (
    neighbour_colour_difference,
    neighbour_label_agreement,
    token_neighbours,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def others(n):
    """Every item's neighbours are all the other items."""
    return torch.tensor([[j for j in range(n) if j != i] for i in range(n)])


@pytest.mark.parametrize("block_entries", [1, 300, 2**24])
def test_agrees_with_pair_by_pair_in_blocks_of_any_size(block_entries, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ENTRIES", block_entries)
    tokens = normal(23, 4, 6)
    similarity = torch.nn.functional.cosine_similarity(tokens[:, None], tokens[None], dim=3).mean(2)
    similarity.fill_diagonal_(-2)
    expected = similarity.argsort(dim=1, descending=True)[:, :5]
    assert torch.equal(token_neighbours(tokens, 5), expected)


def test_renumbered_items_have_renumbered_neighbours():
    tokens = normal(20, 3, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(order[token_neighbours(tokens[order], 4)], token_neighbours(tokens, 4)[order])


def test_lengths_rotations_and_order_of_tokens_do_not_matter():
    tokens = normal(20, 3, 5)
    expected = token_neighbours(tokens, 4)
    lengths = normal(20, 3, 1, seed=1).exp()
    rotation = torch.linalg.qr(normal(5, 5, seed=2)).Q
    assert torch.equal(token_neighbours(lengths * tokens @ rotation, 4), expected)
    assert torch.equal(token_neighbours(tokens[:, [2, 0, 1]], 4), expected)


def test_for_tokens_of_equal_length_most_similar_is_nearest():
    # A large part that all items share in a place is cancelled by the distance, and so must leave the ranking alone.
    tokens = torch.nn.functional.layer_norm(normal(30, 4, 16) + 3 * normal(1, 4, 16, seed=1), (16,))
    distances = torch.cdist(tokens.flatten(1), tokens.flatten(1)).fill_diagonal_(math.inf)
    assert torch.equal(token_neighbours(tokens, 6), distances.argsort(dim=1)[:, :6])


def test_places_count_unless_tokens_are_averaged():
    tokens = normal(6, 4, 8)
    moved = torch.cat([tokens, tokens.roll(1, dims=1)])
    twins = (torch.arange(12) + 6) % 12
    assert torch.equal(token_neighbours(moved.mean(1, keepdim=True), 1)[:, 0], twins)
    assert not torch.equal(token_neighbours(moved, 1)[:, 0], twins)


def test_low_precision_tokens_are_compared_in_float32():
    tokens = normal(60, 3, 8).bfloat16()
    assert torch.equal(token_neighbours(tokens, 20), token_neighbours(tokens.float(), 20))


def test_all_others_as_neighbours_are_chance():
    images, labels = normal(15, 3, 4, 4), torch.arange(15) % 4
    for contrast in (
        neighbour_colour_difference(images, others(15)),
        neighbour_label_agreement(labels, others(15)),
    ):
        assert contrast.neighbours.value == pytest.approx(contrast.all_pairs, rel=1e-12)
        assert contrast.ratio == pytest.approx(1.0, rel=1e-12)


def test_colour_difference_pair_by_pair():
    images, neighbours = normal(9, 3, 4, 5), token_neighbours(normal(9, 2, 3, seed=1), 2)
    colours = images.mean((2, 3)).tolist()
    per_item = torch.tensor(
        [sum(math.dist(colours[i], colours[j]) for j in row) / 2 for i, row in enumerate(neighbours.tolist())],
        dtype=torch.float64,
    )
    contrast = neighbour_colour_difference(images, neighbours)
    assert contrast.neighbours.value == pytest.approx(per_item.mean().item(), rel=1e-12)
    assert contrast.neighbours.standard_error == pytest.approx(per_item.std().item() / 3, rel=1e-10)


def test_tells_tokens_of_colour_from_tokens_of_class():
    labels = torch.arange(200) % 5
    hue = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 * math.pi
    images = torch.stack([hue.cos(), hue.sin(), 0 * hue], 1)[:, :, None, None] + 0.1 * normal(200, 3, 4, 4)
    by_colour = token_neighbours(images.mean((2, 3))[:, None], 5)
    by_class = token_neighbours((torch.eye(5).double()[labels] + 0.1 * normal(200, 5, seed=1))[:, None], 5)
    assert neighbour_colour_difference(images, by_colour).ratio < 0.1
    assert neighbour_colour_difference(images, by_class).ratio == pytest.approx(1.0, abs=0.15)
    assert neighbour_label_agreement(labels, by_class).neighbours.value > 0.99
    chance = neighbour_label_agreement(labels, by_colour)
    assert chance.all_pairs == pytest.approx(39 / 199, rel=1e-12)
    assert abs(chance.neighbours.value - chance.all_pairs) < 4 * chance.neighbours.standard_error
    assert "among neighbours" in str(chance)


def test_nothing_in_common_anywhere_has_no_ratio():
    contrast = neighbour_label_agreement(torch.arange(4), others(4))
    assert contrast.neighbours.value == contrast.all_pairs == 0
    assert math.isnan(contrast.ratio)


def test_bad_input():
    tokens = normal(5, 2, 3)
    for k in (0, 5):
        with pytest.raises(ValueError, match="5 items have 1 to 4 others"):
            token_neighbours(tokens, k)
    with pytest.raises(ValueError, match="NaN"):
        token_neighbours(tokens / 0, 2)
    with pytest.raises(ValueError, match="nothing to compare"):
        token_neighbours(tokens[:, :0], 2)
    labels = torch.arange(5)
    for wrong in (labels[:, None], others(5) + 1, others(5) - 1):
        with pytest.raises(ValueError, match="other items"):
            neighbour_label_agreement(labels, wrong)
    for wrong in (others(4), others(5)[:, :0]):
        with pytest.raises(ValueError, match="at least one for each"):
            neighbour_colour_difference(normal(5, 3, 2, 2), wrong)
