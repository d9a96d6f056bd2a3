"""Where tokens sit, against what the models do with their latents."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wellposed.dito.geometry import token_grid

Host = Any


def row_major(rows: int, columns: int) -> list[list[int]]:
    return [[row, column] for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_latents_become_tokens_row_by_row(name: str, tiny: SimpleNamespace) -> None:
    """A latent that differs in the patch of one token changes that token, whatever the picture's shape."""
    host = tiny.without_positions(tiny.hosts[name]())
    latents = torch.zeros(24, 4, 8, 12)
    grid = token_grid({"hidden_states": latents}, host.model.config.patch_size)
    for token, (row, column) in enumerate(grid.coordinates.tolist()):
        latents[token, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    with torch.no_grad():
        tokens = host.model.pos_embed(latents)
        blank = host.model.pos_embed(torch.zeros(1, 4, 8, 12))
    assert torch.equal((tokens != blank).any(-1), torch.eye(24, dtype=torch.bool))
    assert grid.num_tokens == 24 and grid.movable.all()


def test_z_images_latents_become_tokens_row_by_row(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["z_image"]()
    given = host.arguments(0.0, 1)
    coordinates = token_grid(given, None).coordinates
    rows, columns = torch.arange(8) // 2, torch.arange(12) // 2
    named = (100 * rows[:, None] + columns).expand(4, 1, 8, 12).float()
    seen: list[Tensor] = []
    host.model.all_x_embedder["2-1"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        host.model(**{**given, "x": [named]})
    patches = seen[0].reshape(-1, 16)[: len(coordinates)]
    assert torch.equal(patches, (coordinates @ torch.tensor([100, 1]))[:, None].expand(-1, 16).float())


def test_a_larger_patch_of_z_image(tiny: SimpleNamespace) -> None:
    given = {"x": [torch.zeros(4, 2, 8, 12)], "patch_size": 4, "f_patch_size": 2}
    assert token_grid(given, None).coordinates.tolist() == row_major(2, 3)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_position_ids(batched: bool, dtype: torch.dtype) -> None:
    """FLUX and FLUX.2: the first column is the picture's number; references come after it, or not at all."""
    picture = torch.tensor([[0, row, column] for row, column in row_major(2, 3)])
    reference = torch.tensor([[1, row, column] for row, column in row_major(3, 2)])
    further = torch.tensor([[20, 0, 0]])
    ids = torch.cat([picture, reference, further]).to(dtype)
    grid = token_grid({"img_ids": ids[None] if batched else ids, "hidden_states": torch.zeros(1, 13, 4)}, None)
    assert grid.coordinates.tolist() == row_major(2, 3) + row_major(3, 2) + [[0, 0]]
    assert grid.movable.tolist() == [True] * 6 + [False] * 7


def test_position_ids_with_a_fourth_axis() -> None:
    ids = torch.tensor([[10, row, column, 0] for row, column in row_major(2, 2)])
    assert token_grid({"img_ids": ids}, None).coordinates.tolist() == row_major(2, 2)


def test_shapes_of_a_picture_and_its_references() -> None:
    """Qwen-Image: one list for each sample, the picture first; layers of a picture are references to each other."""
    shapes = [[(1, 2, 3), (1, 1, 2)]] * 2
    grid = token_grid({"img_shapes": shapes, "hidden_states": torch.zeros(2, 8, 4)}, 2)
    assert grid.coordinates.tolist() == row_major(2, 3) + row_major(1, 2)
    assert grid.movable.tolist() == [True] * 6 + [False] * 2
    assert token_grid({"img_shapes": [(1, 2, 2)]}, None).coordinates.tolist() == row_major(2, 2)
    layers = token_grid({"img_shapes": [[(2, 1, 2)]]}, None)
    assert layers.coordinates.tolist() == row_major(1, 2) * 2 and layers.movable.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"img_shapes": [[(1, 2, 2)], [(1, 4, 1)]]}, "pictures of one size"),
        ({"x": [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 4)]}, "pictures of one size"),
        ({"x": [[torch.zeros(4, 1, 8, 8)]]}, "omni mode"),
        ({"x": [torch.zeros(4, 3, 8, 8)]}, "not videos"),
        ({"hidden_states": torch.zeros(1, 16, 4)}, "neither img_ids nor img_shapes"),
        ({"hidden_states": torch.zeros(1, 4, 3, 8, 8)}, "neither img_ids nor img_shapes"),
        ({"x": torch.zeros(1, 4, 8, 8)}, "neither img_ids nor img_shapes"),
    ],
)
def test_other_arrangements_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_grid(given, None)


def test_every_family_says_where_its_tokens_are(host: Host, tiny: SimpleNamespace) -> None:
    config = host.model.config.get("patch_size")
    grid = token_grid(host.arguments(0.0, 2), config if isinstance(config, int) else None)
    rows, columns = (6, 6) if host.name == "dit" else (tiny.rows, tiny.columns)
    assert grid.coordinates.tolist() == row_major(rows, columns) and grid.movable.all()
