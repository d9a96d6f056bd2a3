import io

import numpy as np
import pytest
import torch
from PIL import Image

from wellposed.report.pictures import image_grid, read_png, tile_images


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture.data)))


def test_tiles_hold_each_image_in_its_place():
    levels = torch.tensor([-1.0, 0.0, 1.0, -0.5, 0.5])
    picture = tile_images(levels.view(5, 1, 1, 1).expand(5, 3, 4, 6), columns=3, gap=2)
    found = pixels(picture)
    assert found.shape == (4 + 2 + 4, 3 * 6 + 2 * 2, 3)
    assert (picture.height, picture.width) == found.shape[:2]
    assert picture.pixelated
    corners = [found[y, x, 0] for y, x in [(0, 0), (0, 8), (0, 16), (6, 0), (6, 8)]]
    assert corners == [0, 128, 255, 64, 191]
    assert (found[4:6] == 255).all()
    assert (found[6:, 16:] == 255).all(), "a place without an image is paper"


def test_values_outside_are_clipped_and_colours_kept():
    image = torch.tensor([3.0, -9.0, float("nan")]).view(1, 3, 1, 1)
    assert pixels(tile_images(image, columns=1)).tolist() == [[[255, 0, 0]]]


def test_fewer_images_than_columns_make_a_narrow_tile():
    assert tile_images(torch.zeros(2, 1, 8, 8), columns=5, gap=1).width == 17


@pytest.mark.parametrize(
    ("images", "columns", "message"),
    [
        (torch.zeros(0, 1, 2, 2), 1, "at least one"),
        (torch.zeros(1, 2, 2, 2), 1, "one or three channels"),
        (torch.zeros(1, 1, 2, 2), 0, "columns is 0"),
    ],
)
def test_what_cannot_be_tiled_is_refused(images, columns, message):
    with pytest.raises(ValueError, match=message):
        tile_images(images, columns=columns)


def test_grid_sets_cells_in_rows_and_columns_with_labels_above():
    cells = [[torch.full((4, 1, 8, 8), value) for value in row] for row in [(-1.0, 0.0), (0.5, -0.5)]]
    picture = image_grid(cells, row_labels=["β̃", "LGS"], column_labels=["5", "10"], columns=2, cell_width=34)
    found = pixels(picture)[:, :, 0].astype(int)
    levels = [[0, 128], [191, 64]]
    side = 2 * (2 * 8 + 1)  # two images and a gap, enlarged twice
    for row in range(2):
        for column in range(2):
            top, left = 14 + 22 + 22 + row * (22 + side + 12), 14 + column * (side + 12)
            assert (found[top : top + 16, left : left + 16] == levels[row][column]).all()
    assert (found[14:36] < 200).any(), "labels of the columns"
    assert (found[36:58, :60] < 200).any(), "label of the first row"
    assert (found[:14] == 255).all()
    assert found.shape == (14 + 22 + 2 * (22 + side) + 12 + 14, 2 * side + 12 + 28)


def test_labels_and_cells_must_agree():
    cell = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="one label for each row"):
        image_grid([[cell]], row_labels=["a", "b"], column_labels=["c"], columns=1)
    with pytest.raises(ValueError, match=r"rows of \[1\] cells"):
        image_grid([[cell]], row_labels=["a"], column_labels=["c", "d"], columns=1)


def test_png_files_are_taken_as_they_are(tmp_path):
    path = tmp_path / "step-100.png"
    path.write_bytes(tile_images(torch.zeros(1, 1, 8, 8), columns=1).data)
    picture = read_png(path)
    assert picture.data == path.read_bytes()
    assert (picture.width, picture.height, picture.pixelated) == (8, 8, True)
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="not a readable PNG"):
        read_png(path)
    with pytest.raises(ValueError, match="not a readable PNG"):
        read_png(tmp_path / "none.png")
