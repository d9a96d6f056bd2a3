"""The image sets that published figures are measured on, from files the user has.

Nothing is downloaded. Every function says, when its files are missing, what to get and where it is expected. Figures
depend on details of the preparation, so each docstring says whose preparation is followed.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from wellposed.data.images import Framing, ImageDataset, PictureFiles, StoredPixels

__all__ = ["celeba64", "cifar10", "imagenet64"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_RECORD = 1 + 3 * 32 * 32
CIFAR10_HELP = (
    "download https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, unpack it, and pass the folder that holds "
    "cifar-10-batches-bin (or pass an .npz with the arrays images and labels)"
)

# Rows 57 to 185 and columns 25 to 153 of the aligned 178 x 218 pictures: 64 pixels to each side of (89, 121).
CELEBA_BOX = (89 - 64, 121 - 64, 89 + 64, 121 + 64)
CELEBA_SPLITS = {"train": 0, "valid": 1, "test": 2}
CELEBA_HELP = (
    "download img_align_celeba.zip and list_eval_partition.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, "
    "unpack the pictures, and pass the folder that holds img_align_celeba/ and list_eval_partition.txt"
)

IMAGENET_HELP = (
    "download the 64 x 64 npz files of ImageNet from https://image-net.org/download-images and pass the folder that "
    "holds train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz (or, of the older version, train_64x64/ "
    "and valid_64x64/ with PNG files)"
)


def cifar10(
    path: str | Path, *, split: Literal["train", "test"] = "train", flip: bool = False, seed: int = 0
) -> ImageDataset:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 in 10 classes.

    Args:
        path: the folder with the *binary* version (``data_batch_1.bin`` ... ``test_batch.bin``) or the folder above it;
            or an ``.npz`` of one split with uint8 ``images`` (n, 32, 32, 3) or (n, 3, 32, 32) and ``labels`` (n,). The
            version for Python consists of pickles, which are never loaded.
        split: which part; an ``.npz`` is taken to be that part.
        flip: mirror at random, see :class:`wellposed.data.images.ImageDataset`.
        seed: seed of the flips.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: files of another layout.
    """
    path = Path(path)
    if path.suffix == ".npz":
        pixels, labels = _cifar10_npz(path)
    else:
        pixels, labels = _cifar10_binary(path, split)
    return ImageDataset(
        name=f"CIFAR-10 ({split})",
        source=StoredPixels(pixels=pixels),
        labels=labels,
        class_names=CIFAR10_CLASSES,
        flip=flip,
        seed=seed,
    )


def celeba64(
    path: str | Path, *, split: Literal["train", "valid", "test"] = "train", flip: bool = False, seed: int = 0
) -> ImageDataset:
    """CelebA faces at 64 x 64: 162,770 training, 19,867 validation and 19,962 test pictures.

    The 128 x 128 square around (89, 121) of the aligned picture, reduced to 64 x 64 with Pillow's bilinear filter: the
    preparation of the DDIM code (arXiv 2010.02502, ``datasets/__init__.py``) and of OCM-DPM's
    (``interface/datasets/celeba.py``), whose reference statistics have "ddim" in their name. The central crop of 140
    pixels of the NCSN papers (arXiv 1907.05600) gives other images and another FID.

    Args:
        path: folder with ``img_align_celeba/*.jpg`` and ``list_eval_partition.txt``.
        split: which part.
        flip: mirror at random, as those codes do in training.
        seed: seed of the flips.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: an unknown split, or a partition file of another layout.
    """
    root = Path(path)
    partition, pictures = root / "list_eval_partition.txt", root / "img_align_celeba"
    if split not in CELEBA_SPLITS:
        raise ValueError(f'split is {split!r}; write split="train", "valid" or "test"')
    if not partition.is_file() or not pictures.is_dir():
        raise FileNotFoundError(f"CelebA is not in {str(root)!r}: {CELEBA_HELP}")
    rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    if any(len(row) != 2 or row[1] not in {"0", "1", "2"} for row in rows):
        raise ValueError(f"{str(partition)!r} should have lines such as '000001.jpg 0'; {CELEBA_HELP}")
    names = tuple(name for name, part in rows if int(part) == CELEBA_SPLITS[split])
    framing = Framing(size=64, box=CELEBA_BOX, resize_filter="bilinear")
    source = PictureFiles(root=pictures, names=names, framing=framing)
    return ImageDataset(name=f"CelebA 64x64 ({split})", source=source, flip=flip, seed=seed)


def imagenet64(
    path: str | Path, *, split: Literal["train", "valid"] = "train", flip: bool = False, seed: int = 0
) -> ImageDataset:
    """ImageNet at 64 x 64, in either of its two published versions.

    * ``.npz`` batches with arrays ``data`` (n, 12288) and ``labels`` 1..1000 (Chrabaszcz, Loshchilov and Hutter,
      arXiv 1707.08819): 1,281,167 images with classes, held in memory (16 GB for the training part). Classes are in
      the order of their ``map_clsloc.txt``, which is not the usual one of sorted WordNet ids.
    * Folders ``train_64x64`` and ``valid_64x64`` of PNG files (van den Oord et al., arXiv 1601.06759): 1,281,149 images
      without classes, read when asked for. OCM-DPM's code reads this version, so reference statistics that come with
      that line of work belong to it; the two versions are resized differently and their FIDs do not compare.

    Args:
        path: folder with one of the two.
        split: which part.
        flip: mirror at random.
        seed: seed of the flips.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: files of another layout.
    """
    root = Path(path)
    pattern, folder = {
        "train": ("train_data_batch_*.npz", root / "train_64x64"),
        "valid": ("val_data*.npz", root / "valid_64x64"),
    }[split]
    batches = sorted(root.glob(pattern))
    if batches:
        pixels, labels = _imagenet64_npz(batches)
        source, name = StoredPixels(pixels=pixels), f"ImageNet 64x64 npz ({split})"
    elif folder.is_dir():
        names = tuple(sorted(file.name for file in folder.glob("*.png")))
        source, labels = PictureFiles(root=folder, names=names, framing=Framing(size=64)), None
        name = f"ImageNet 64x64 png ({split})"
    else:
        raise FileNotFoundError(f"ImageNet 64x64 is not in {str(root)!r}: {IMAGENET_HELP}")
    return ImageDataset(name=name, source=source, labels=labels, flip=flip, seed=seed)


def _cifar10_binary(path: Path, split: str) -> tuple[UInt8[Tensor, "n 3 32 32"], Int[Tensor, "n"]]:
    folder = path / "cifar-10-batches-bin" if (path / "cifar-10-batches-bin").is_dir() else path
    names = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}[split]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = " (the version for Python that lies there is pickled, which is never loaded)"
        found_pickles = (folder / "data_batch_1").is_file() or (folder / "cifar-10-batches-py").is_dir()
        raise FileNotFoundError(
            f"no {', '.join(missing)} in {str(folder)!r}{pickled if found_pickles else ''}: {CIFAR10_HELP}"
        )
    raw = b"".join((folder / name).read_bytes() for name in names)
    if not raw or len(raw) % CIFAR10_RECORD:
        raise ValueError(
            f"the .bin files in {str(folder)!r} have {len(raw)} bytes, no multiple of {CIFAR10_RECORD}: {CIFAR10_HELP}"
        )
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, CIFAR10_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), _class_indices(records[:, 0].numpy(), 10, str(folder))


def _cifar10_npz(path: Path) -> tuple[UInt8[Tensor, "n 3 32 32"], Int[Tensor, "n"]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: {CIFAR10_HELP}")
    images, labels = _read_arrays(path, "images", "labels", CIFAR10_HELP)
    if images.ndim == 4 and images.shape[1:] == (32, 32, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{str(path)!r} has images {images.dtype} {images.shape} and labels {labels.shape}; "
            "expected uint8 (n, 32, 32, 3) or (n, 3, 32, 32), and (n,)"
        )
    return torch.from_numpy(np.ascontiguousarray(images)), _class_indices(labels, 10, str(path))


def _imagenet64_npz(batches: list[Path]) -> tuple[UInt8[Tensor, "n 3 64 64"], Int[Tensor, "n"]]:
    labels = [_read_arrays(batch, "labels", "labels", IMAGENET_HELP)[0] for batch in batches]
    # One allocation, filled batch by batch: joining the ten arrays would need the 16 GB twice.
    pixels = torch.empty(sum(len(part) for part in labels), 3, 64, 64, dtype=torch.uint8)
    start = 0
    for batch, part in zip(batches, labels, strict=True):
        data, _ = _read_arrays(batch, "data", "labels", IMAGENET_HELP)
        if data.dtype != np.uint8 or data.shape != (len(part), 3 * 64 * 64):
            raise ValueError(
                f"{str(batch)!r} has data {data.dtype} {data.shape} and {len(part)} labels; "
                "expected uint8 (n, 12288), which is n images of 3 x 64 x 64"
            )
        pixels[start : start + len(part)] = torch.from_numpy(data).view(-1, 3, 64, 64)
        start += len(part)
    return pixels, _class_indices(np.concatenate(labels).astype(np.int64) - 1, 1000, str(batches[0].parent))


def _read_arrays(path: Path, first: str, second: str, help_text: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[first], arrays[second]
    except (KeyError, ValueError, OSError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no .npz with arrays {first} and {second} ({error}): {help_text}") from error


def _class_indices(labels: np.ndarray, num_classes: int, where: str) -> Int[Tensor, "n"]:
    indices = torch.from_numpy(labels.astype(np.int64))
    if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < num_classes):
        raise ValueError(
            f"{where!r} has labels from {int(indices.min())} to {int(indices.max())}, counted from 0; "
            f"expected {num_classes} classes"
        )
    return indices
