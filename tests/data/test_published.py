import numpy as np
import pytest
import torch
from PIL import Image

from wellposed.data.published import celeba64, cifar10, imagenet64


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_bytes(batch):
    return ((batch.images + 1) * 127.5).round().to(torch.uint8).numpy()


def write_cifar10(folder, images, labels):
    folder.mkdir(parents=True)
    records = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
    for i, part in enumerate(np.array_split(records, 5), start=1):
        (folder / f"data_batch_{i}.bin").write_bytes(part.tobytes())
    (folder / "test_batch.bin").write_bytes(records[:2].tobytes())


@pytest.mark.parametrize("above", [True, False])
def test_cifar10_binary(tmp_path, above):
    images, labels = noise(10, 3, 32, 32), np.arange(10, dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar10(folder, images, labels)
    path = tmp_path if above else folder
    train, test = cifar10(path), cifar10(path, split="test")
    assert (len(train), len(test)) == (10, 2)
    batch = train.batch([9, 3])
    np.testing.assert_array_equal(as_bytes(batch), images[[9, 3]])
    assert [train.class_names[k] for k in batch.labels] == ["truck", "cat"]


@pytest.mark.parametrize("channels_last", [True, False])
def test_cifar10_npz(tmp_path, channels_last):
    images, labels = noise(4, 3, 32, 32), np.array([3, 1, 4, 1])
    stored = images.transpose(0, 2, 3, 1) if channels_last else images
    np.savez(tmp_path / "cifar.npz", images=stored, labels=labels)
    batch = cifar10(tmp_path / "cifar.npz").batch(range(4))
    np.testing.assert_array_equal(as_bytes(batch), images)
    assert batch.labels.tolist() == [3, 1, 4, 1]


def test_cifar10_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin.*cifar-10-binary\.tar\.gz"):
        cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FileNotFoundError, match="pickled"):
        cifar10(tmp_path)
    write_cifar10(tmp_path / "cut", noise(10, 3, 32, 32), np.zeros(10, dtype=np.uint8))
    (tmp_path / "cut" / "data_batch_2.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="no multiple of 3073"):
        cifar10(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="no file"):
        cifar10(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", data=np.zeros(3))
    with pytest.raises(ValueError, match="arrays images and labels"):
        cifar10(tmp_path / "other.npz")
    np.savez(tmp_path / "shape.npz", images=noise(4, 28, 28, 3), labels=np.zeros(4))
    with pytest.raises(ValueError, match="expected uint8"):
        cifar10(tmp_path / "shape.npz")
    np.savez(tmp_path / "labels.npz", images=noise(2, 32, 32, 3), labels=np.array([0, 10]))
    with pytest.raises(ValueError, match="10 classes"):
        cifar10(tmp_path / "labels.npz")


def write_celeba(root):
    (root / "img_align_celeba").mkdir(parents=True)
    faces = noise(3, 218, 178, 3)
    for i, face in enumerate(faces, start=1):
        # Lossless, whatever the suffix says, so that the comparison can be exact.
        Image.fromarray(face).save(root / "img_align_celeba" / f"{i:06d}.jpg", format="PNG")
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 2\n000003.jpg 0\n")
    return faces


def test_celeba_is_cropped_around_the_published_centre(tmp_path):
    faces = write_celeba(tmp_path)
    train = celeba64(tmp_path)
    assert (len(train), len(celeba64(tmp_path, split="test"))) == (2, 1)
    crop = Image.fromarray(faces[2][121 - 64 : 121 + 64, 89 - 64 : 89 + 64])
    expected = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(as_bytes(train.batch([1]))[0], expected)


def test_celeba_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"img_align_celeba\.zip and list_eval_partition\.txt"):
        celeba64(tmp_path)
    write_celeba(tmp_path)
    with pytest.raises(ValueError, match="is empty"):
        celeba64(tmp_path, split="valid")
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg train\n")
    with pytest.raises(ValueError, match=r"'000001\.jpg 0'"):
        celeba64(tmp_path)


def test_imagenet_npz_batches(tmp_path):
    images, labels = noise(7, 3, 64, 64), np.array([1, 1000, 5, 6, 7, 8, 9])
    for i, part in enumerate(np.array_split(np.arange(7), 2), start=1):
        np.savez(tmp_path / f"train_data_batch_{i}.npz", data=images[part].reshape(len(part), -1), labels=labels[part])
    np.savez(tmp_path / "val_data.npz", data=images[:2].reshape(2, -1), labels=labels[:2], mean=np.zeros(12288))
    train = imagenet64(tmp_path)
    np.testing.assert_array_equal(as_bytes(train.batch(range(7))), images)
    assert train.batch(range(7)).labels.tolist() == [0, 999, 4, 5, 6, 7, 8]
    assert len(imagenet64(tmp_path, split="valid")) == 2


def test_imagenet_folder_of_pictures(tmp_path):
    images = noise(3, 64, 64, 3)
    (tmp_path / "train_64x64").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "train_64x64" / f"{i}.png")
    dataset = imagenet64(tmp_path)
    assert dataset.labels is None
    np.testing.assert_array_equal(as_bytes(dataset.batch([2, 0])), images[[2, 0]].transpose(0, 3, 1, 2))


def test_imagenet_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_data_batch_1\.npz"):
        imagenet64(tmp_path)
    np.savez(tmp_path / "train_data_batch_1.npz", data=noise(2, 3072), labels=np.array([1, 2]))
    with pytest.raises(ValueError, match="12288"):
        imagenet64(tmp_path)
    np.savez(tmp_path / "train_data_batch_1.npz", data=noise(2, 12288), labels=np.array([0, 2]))
    with pytest.raises(ValueError, match="labels from -1"):
        imagenet64(tmp_path)
    np.savez(tmp_path / "train_data_batch_1.npz", data=noise(2, 12288))
    with pytest.raises(ValueError, match="labels"):
        imagenet64(tmp_path)
