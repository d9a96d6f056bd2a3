"""Latents of an image set, computed once and kept in shards.

A folder holds ``index.json``, which says what the latents are of, and ``00000.safetensors``, ``00001.safetensors``, ...
with equally many images each (fewer in the last). Every file is written under another name and renamed: what is there
is whole, so that an interrupted run goes on with the first shard that is missing, and ranks write different shards.

An image that may be mirrored in training is encoded both ways; which of the two a batch has is a function of (seed,
image, epoch), as in :class:`wellposed.data.images.ImageDataset`.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wellposed.batches import LatentBatch
from wellposed.data.images import coin_flips

__all__ = ["LatentDataset", "LatentFormat", "LatentIndex", "write_latents"]

INDEX_FILE = "index.json"
MIRRORED = "mirrored_"
FIELDS = ("latents", "query_latents", "labels")

LatentFormat = Literal["float32", "bfloat16"]

Encode = Callable[[range, bool], LatentBatch]
"""(images, whether to mirror them) -> their latents."""


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """What a folder of latents holds.

    Attributes:
        name: of the image set.
        source: fingerprint of images and encoder.
        count: images.
        shard_size: images in a shard.
        mirrored: whether the mirrored images' latents are there too.
        dtype: name of the format in which latents are kept; they are read as float32.

    Raises:
        ValueError: no images, or none in a shard; an unknown format.
    """

    name: str
    source: str
    count: int
    shard_size: int
    mirrored: bool
    dtype: LatentFormat = "float32"

    def __post_init__(self) -> None:
        if self.count < 1 or self.shard_size < 1:
            raise ValueError(f"{self.count} images, {self.shard_size} in a shard; there must be at least 1 of each")
        if self.dtype not in get_args(LatentFormat):
            raise ValueError(f"dtype is {self.dtype!r}; write one of {', '.join(get_args(LatentFormat))}")

    @property
    def num_shards(self) -> int:
        """Files."""
        return -(-self.count // self.shard_size)

    def images(self, shard: int) -> range:
        """Positions of a shard's images in the set."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))


def write_latents(
    folder: str | Path,
    index: LatentIndex,
    encode: Encode,
    *,
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Encode a set, or what is missing of it; rank r writes shards r, r + world_size, ...

    Args:
        folder: made if it is not there.
        index: what is to be there.
        encode: the encoder.
        batch_size: images encoded at a time.
        rank: of this process.
        world_size: number of processes.
        on_progress: called with this rank's shards done, and all of them.

    Raises:
        ValueError: the folder holds latents of something else.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    _claim(root, index)
    mine = range(rank, index.num_shards, world_size)
    for done, shard in enumerate(mine):
        path = _shard_path(root, shard)
        if not path.is_file():
            _write_shard(path, _encoded(index, shard, encode, batch_size))
        on_progress(done + 1, len(mine))


def _claim(root: Path, index: LatentIndex) -> None:
    path = root / INDEX_FILE
    if path.is_file():
        found = _read_index(path)
        if found != index:
            held, wanted = asdict(found), asdict(index)
            others = [f"{what} {held[what]!r}, not {wanted[what]!r}" for what in held if held[what] != wanted[what]]
            raise ValueError(f"{root} holds other latents: {'; '.join(others)}; choose another folder or remove it")
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _encoded(index: LatentIndex, shard: int, encode: Encode, batch_size: int) -> dict[str, Tensor]:
    images, dtype = index.images(shard), getattr(torch, index.dtype)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(images.start, images.stop, batch_size):
        some = range(start, min(start + batch_size, images.stop))
        for prefix in ("", MIRRORED) if index.mirrored else ("",):
            batch = encode(some, bool(prefix))
            for name in FIELDS:
                value: Tensor | None = getattr(batch, name)
                if value is not None and (name != "labels" or not prefix):
                    kept = value if name == "labels" else value.to(dtype)
                    parts[prefix + name].append(kept.cpu())
    return {name: torch.cat(some) for name, some in parts.items()}


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, partial)
    partial.replace(path)


@dataclass(frozen=True, kw_only=True)
class LatentDataset:
    """Latents in a folder, as a set to train on.

    Attributes:
        folder: where they are.
        index: what they are.
        flip: take the mirrored ones with probability one half.
        seed: seed of the flips.
    """

    folder: Path
    index: LatentIndex
    flip: bool = False
    seed: int = 0

    @classmethod
    def open(cls, folder: str | Path, *, flip: bool = False, seed: int = 0) -> "LatentDataset":
        """The latents that :func:`write_latents` left.

        Raises:
            FileNotFoundError: there are none.
            ValueError: a damaged index, missing shards, or ``flip`` without mirrored latents.
        """
        root = Path(folder)
        if not (root / INDEX_FILE).is_file():
            raise FileNotFoundError(f"{root} holds no latents (no {INDEX_FILE}); write them with write_latents")
        index = _read_index(root / INDEX_FILE)
        missing = [shard for shard in range(index.num_shards) if not _shard_path(root, shard).is_file()]
        if missing:
            raise ValueError(
                f"{root} lacks {len(missing)} of {index.num_shards} shards, e.g. {_shard_path(root, missing[0]).name}; "
                "call write_latents again, which writes what is missing"
            )
        if flip and not index.mirrored:
            raise ValueError(f"{root} has no mirrored latents; write them with mirrored=True, or take flip=False")
        return cls(folder=root, index=index, flip=flip, seed=seed)

    @property
    def name(self) -> str:
        """Of the image set."""
        return self.index.name

    def __len__(self) -> int:
        return self.index.count

    def batch(self, indices: Sequence[int] | Int[Tensor, " batch"], *, epoch: int = 0) -> LatentBatch:
        """Latents at ``indices``, float32.

        Raises:
            ValueError: no indices, one outside the set, or a shard that cannot be read.
        """
        positions = torch.as_tensor(indices, dtype=torch.int64)
        if not len(positions) or int(positions.min()) < 0 or int(positions.max()) >= len(self):
            raise ValueError(f"indices are {positions.tolist()[:8]}...; give some of 0 to {len(self) - 1}")
        mirrored = coin_flips(self.seed, positions, epoch).tolist() if self.flip else [False] * len(positions)
        found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(positions) for name in FIELDS}
        rows = zip(positions.tolist(), mirrored, strict=True)
        by_shard: dict[int, list[tuple[int, int, bool]]] = defaultdict(list)
        for place, (position, flipped) in enumerate(rows):
            shard, row = divmod(position, self.index.shard_size)
            by_shard[shard].append((place, row, flipped))
        absent: set[str] = set(FIELDS)
        for shard, wanted in by_shard.items():
            absent &= self._read(shard, wanted, found)
        values = {name: None if name in absent else torch.stack(found[name]) for name in FIELDS}
        return LatentBatch(**{k: v.float() if v is not None and k != "labels" else v for k, v in values.items()})  # pyright: ignore[reportArgumentType]

    def _read(self, shard: int, wanted: list[tuple[int, int, bool]], into: dict[str, list[Tensor]]) -> set[str]:
        """Put rows of a shard in their places; returns the fields that it has not."""
        path = _shard_path(self.folder, shard)
        try:
            with safe_open(path, framework="pt") as held:
                present = set(held.keys())
                for name in FIELDS:
                    if name not in present:
                        continue
                    for place, row, flipped in wanted:
                        prefix = MIRRORED if flipped and name != "labels" else ""
                        into[name][place] = held.get_slice(prefix + name)[row]
        except (SafetensorError, OSError, IndexError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it and call write_latents again") from error
        return {name for name in FIELDS if name not in present}

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on."""
        about = [asdict(self.index), self.flip, self.seed if self.flip else None]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _shard_path(root: Path, shard: int) -> Path:
    return root / f"{shard:05d}.safetensors"


def _read_index(path: Path) -> LatentIndex:
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return LatentIndex(**held)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove the folder and write the latents again") from error
