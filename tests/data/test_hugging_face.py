from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wellposed.data.hugging_face import table_images

datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def table() -> Any:
    columns = {"img": [Image.fromarray(p) for p in PIXELS], "label": [1, 0, 1, 1]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict(columns, features=features)


def test_pictures_and_classes(table):
    dataset = table_images(table, 8, image_column="img", label_column="label")
    batch = dataset.batch([3, 1])
    np.testing.assert_array_equal(
        ((batch.images + 1) * 127.5).round().to(torch.uint8).numpy(), PIXELS[[3, 1]].transpose(0, 3, 1, 2)
    )
    assert batch.labels.tolist() == [1, 0]
    assert dataset.class_names == ("cat", "dog")
    assert table_images(table, 8, image_column="img").labels is None


def test_fingerprint_follows_the_table(table):
    base = table_images(table, 8, image_column="img")
    assert base.fingerprint() == table_images(table, 8, image_column="img").fingerprint()
    assert base.fingerprint() != table_images(table.select([0, 2]), 8, image_column="img").fingerprint()
    assert base.fingerprint() != table_images(table, 4, image_column="img").fingerprint()


def test_what_is_no_table_of_pictures(table):
    with pytest.raises(ValueError, match="split='train'"):
        table_images(datasets.DatasetDict({"train": table}), 8, image_column="img")
    with pytest.raises(ValueError, match="split='train'"):
        table_images(table.to_iterable_dataset(), 8, image_column="img")
    with pytest.raises(ValueError, match="no column 'image'; it has img, label"):
        table_images(table, 8)
    with pytest.raises(ValueError, match="holds no pictures"):
        table_images(table, 8, image_column="label")
