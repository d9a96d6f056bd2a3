import math

import numpy as np
import pytest
import torch
from PIL import Image

from wellposed.data.pictures import image_grid, save_image, save_image_grid


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_saved_is_what_was_there(tmp_path, channels):
    image = torch.randint(256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    save_image(image, tmp_path / "deep" / "a.png", metadata={"seed": 3, "recipe": "tiny"})
    with Image.open(tmp_path / "deep" / "a.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[channels]
        assert picture.text == {"seed": "3", "recipe": "tiny"}
        pixels = torch.from_numpy(np.array(picture)).view(5, 7, channels).permute(2, 0, 1)
    torch.testing.assert_close(pixels / 255, image, rtol=0, atol=1e-6)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"], "no partial file is left behind"


def test_grid_places_images_row_by_row():
    images = torch.arange(3).view(3, 1, 1, 1).expand(3, 1, 2, 2) / 4
    grid = image_grid(images, columns=2)
    assert grid.shape == (1, 2 + 2 + 2, 2 + 2 + 2)
    assert grid[0, 0].tolist() == [0.0, 0.0, 1.0, 1.0, 0.25, 0.25]
    assert grid[0, 4].tolist() == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert image_grid(images, columns=9).shape == (1, 2, 10)


def test_enlarged_pixels_are_squares(tmp_path):
    images = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    save_image_grid(images, tmp_path / "grid.png", columns=1, enlarge=3)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.array(picture)
    np.testing.assert_array_equal(pixels, np.kron([[0, 255], [255, 0]], np.ones((3, 3))))


def test_bad_input(tmp_path):
    image = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"\.png"):
        save_image(image, tmp_path / "a.jpg")
    for bad in (image - 1, image + 2, image * math.nan):
        with pytest.raises(ValueError, match="write"):
            save_image(bad, tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 channels"):
        save_image(torch.zeros(2, 2, 2), tmp_path / "a.png")
    with pytest.raises(ValueError, match="columns=0"):
        image_grid(image[None], columns=0)
    assert list(tmp_path.iterdir()) == []
