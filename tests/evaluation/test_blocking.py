import pytest
import torch
from jaxtyping import TypeCheckError

from wellposed.evaluation.blocking import blocking, border_energy_ratio, gini


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def brute_force(image: torch.Tensor, cell: tuple[int, int]) -> float:
    across, inside = [], []
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            for down, right in ((1, 0), (0, 1)):
                if y + down < height and x + right < width:
                    squares = (image[:, y + down, x + right] - image[:, y, x]).square().tolist()
                    border = (y + down) % cell[0] == 0 if down else (x + right) % cell[1] == 0
                    (across if border else inside).extend(squares)
    return (sum(across) / len(across)) / (sum(inside) / len(inside))


@pytest.mark.parametrize(("shape", "cell"), [((3, 8, 8), (4, 4)), ((1, 9, 7), (2, 3)), ((2, 6, 10), (4, 2))])
def test_ratio_equals_pair_by_pair(shape: tuple[int, int, int], cell: tuple[int, int]) -> None:
    images = noise(3, *shape)
    expected = torch.tensor([brute_force(image, cell) for image in images], dtype=torch.float64)
    torch.testing.assert_close(border_energy_ratio(images, cell), expected, rtol=1e-12, atol=0)


def test_a_ramp_has_no_blocks_and_constant_cells_have_nothing_else() -> None:
    ramp = torch.arange(8.0, dtype=torch.float64)
    ramp = (ramp[:, None] + 2 * ramp).expand(1, 1, 8, 8)
    # Rows rise by 1 and columns by 2, so pairs of both directions must be weighed alike.
    torch.testing.assert_close(border_energy_ratio(ramp, (4, 4)), torch.ones(1, dtype=torch.float64))
    cells = noise(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert border_energy_ratio(cells, (4, 4)).isinf().all()
    assert border_energy_ratio(torch.full((2, 3, 8, 8), 0.3), (4, 4)).tolist() == [1.0, 1.0]


def test_blocking_is_relative_to_the_reference_and_blind_to_scale_and_offset() -> None:
    reference = noise(4, 3, 16, 16)
    assert blocking(reference, reference, (4, 4)).tolist() == [1.0] * 4
    torch.testing.assert_close(blocking(3 * reference + 1, reference, (4, 4)), torch.ones(4, dtype=torch.float64))
    jumps = noise(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    weak, strong = (blocking(reference + size * jumps, reference, (4, 4)) for size in (0.5, 2.0))
    assert (weak > 1).all() and (strong > weak).all()


@pytest.mark.parametrize("cell", [(1, 4), (4, 1), (8, 4), (4, 8)])
def test_cells_without_inside_or_border_are_refused(cell: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 x 2 pixels, and less than the image"):
        border_energy_ratio(noise(1, 1, 8, 8), cell)


def test_other_shapes_are_refused() -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        blocking(noise(1, 1, 8, 8), noise(1, 1, 8, 12), (4, 4))


def test_gini_equals_all_pairs() -> None:
    counts = torch.randint(0, 9, (5, 12), generator=torch.Generator().manual_seed(1))
    pairs = (counts[:, :, None] - counts[:, None]).abs().sum((1, 2)).double()
    torch.testing.assert_close(gini(counts), pairs / (2 * 12 * counts.sum(1)), rtol=1e-13, atol=0)


def test_gini_at_its_ends() -> None:
    assert gini(torch.full((7,), 3)).item() == pytest.approx(0.0, abs=1e-15)
    assert gini(torch.tensor([0, 0, 0, 5])).item() == pytest.approx(3 / 4)
    assert gini(torch.zeros(2, 4)).tolist() == [0.0, 0.0]
    for wrong in (torch.tensor([1, -1]), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="at least one count, and none below 0"):
            gini(wrong)
