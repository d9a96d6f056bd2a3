"""Captioned pictures in WebDataset shards: written whole, read at random.

A shard is a plain tar file. A sample with the key ``k`` is ``k.jpg`` (or ``.png``, ``.webp``: the original bytes),
``k.txt`` (its caption) and ``k.json`` (``width``, ``height``, ``words``, further ``captions`` by style, anything else),
so whatever reads WebDataset reads these shards, without this library and without an index.

Beside each ``x.tar`` lies an index ``x.npz`` with the place, the length and the checksum of every part, with sizes and
counts of words. By it any sample is one read away, and a set is planned, counted and checked without touching a
picture. Shards of other origin get theirs from :func:`index_shards`.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
import tarfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from wellposed.batches import TextImageBatch
from wellposed.data.buckets import Size, cover_and_crop
from wellposed.data.decoding import decode_picture
from wellposed.data.images import ResizeFilter, hashed_bits
from wellposed.data.shard_index import (
    FAULTS,
    PICTURE,
    SHARD_FORMATS,
    SHORT,
    SOUND,
    IndexEntry,
    Part,
    ShardIndex,
    captions_by_style,
    count_words,
    index_entry,
    json_object,
    partial_file,
    picture_header,
    scan_shard,
)

__all__ = ["CAPTIONING_FILE", "CaptionStyle", "ShardSample", "ShardedImages", "index_shards", "write_shards"]

logger = logging.getLogger(__name__)

CaptionStyle = str | Mapping[str, float] | None
"""Which caption of a picture is meant: None for the one in ``.txt``, a name of ``captions``, or shares of several."""

CAPTIONING_FILE = "captioning.json"
"""Beside the shards, where it is known: what their captions cost, a JSON object from units to amounts."""

KEY = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
LONGEST_KEY = 95  # a tar header has 100 bytes for a name
OWN_METADATA = ("width", "height", "words", "captions")
MOST_OPEN = 256  # shards; a process may often have no more than 1024 files open


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """A picture with what is said of it.

    Attributes:
        key: name of the sample, unique in its shard: letters, digits, ``_``, ``-`` and ``/``.
        picture: bytes of a JPEG, PNG or WebP file, written as they are.
        caption: what a trainer gets unless it asks for a style.
        captions: further captions, by style.
        metadata: further JSON values.

    Raises:
        ValueError: a key that cannot be the name of a file, an empty caption, or metadata under a name that the shard
            itself uses.
    """

    key: str
    picture: bytes
    caption: str
    captions: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key) or len(self.key) > LONGEST_KEY:
            raise ValueError(
                f"the key {self.key!r} cannot name the files of a sample; give 1 to {LONGEST_KEY} of the characters "
                "a-z, A-Z, 0-9, '_', '-' and '/'"
            )
        for style, caption in {"": self.caption, **self.captions}.items():
            if not _is_text(caption):
                which = f"caption {style!r}" if style else "caption"
                raise ValueError(
                    f"sample {self.key!r}: its {which} is {caption!r}; give a text or leave the sample out"
                )
        if taken := set(self.metadata) & set(OWN_METADATA):
            raise ValueError(f"sample {self.key!r}: metadata may not hold {sorted(taken)}, which the writer fills in")


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from careless JSON
        return False
    return True


def write_shards(
    samples: Iterable[ShardSample],
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    prefix: str = "",
    first_shard: int = 0,
) -> list[Path]:
    """Write samples into ``<folder>/<prefix>00000.tar`` and so on, each with its index.

    The same samples give the same bytes. A shard gets its name when it is complete and on the disk, so an interrupted
    writer is called again with the same samples: shards that are there are compared with them and kept.

    Args:
        samples: in the order in which they are to lie; consumed one at a time.
        folder: made if it is not there.
        samples_per_shard: of all but the last shard.
        prefix: of the names, such as the name of the source; several writers share a folder by different prefixes.
        first_shard: number of the first shard.

    Returns:
        The shards that hold the samples, those that were there already included.

    Raises:
        ValueError: ``samples_per_shard`` below 1, bytes that are no picture, a key twice in a shard, or a shard that is
            there and holds other samples.
        OSError: a shard could not be written (a full disk); those before it are complete.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; write at least 1")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    shards: list[Path] = []
    while (first := next(remaining, None)) is not None:
        path = root / f"{prefix}{first_shard + len(shards):05d}.tar"
        some = chain([first], islice(remaining, samples_per_shard - 1))
        if path.exists():
            _check_same(path, some)
        else:
            _write_shard(path, some, len(shards))
        shards.append(path)
    return shards


def _write_shard(path: Path, samples: Iterable[ShardSample], written: int) -> None:
    partial = partial_file(path)
    try:
        with partial.open("wb") as file:
            entries = _write_tar(file, path, samples)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        # Before the shard itself: a shard that is there has its index.
        ShardIndex.of(entries, size).write(path)
        partial.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the shard could not be written ({error}); {written} before it are complete, and the same call goes on "
            "with this one once the cause is removed",
            str(path),
        ) from error
    finally:
        for unfinished in (partial, partial_file(path.with_suffix(".npz"))):
            with suppress(FileNotFoundError):
                unfinished.unlink()


def _write_tar(file: io.BufferedWriter, path: Path, samples: Iterable[ShardSample]) -> list[IndexEntry]:
    entries: list[IndexEntry] = []
    keys: set[str] = set()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            if sample.key in keys:
                raise ValueError(f"{path}: the key {sample.key!r} comes twice; give every sample a key of its own")
            keys.add(sample.key)
            parts = {
                suffix: _add(tar, sample.key, suffix, content) for suffix, content in _members(sample, path).items()
            }
            entries.append(index_entry(sample.key, parts))
    return entries


def _add(tar: tarfile.TarFile, key: str, suffix: str, content: bytes) -> Part:
    member = tarfile.TarInfo(f"{key}.{suffix}")  # its time, owner and group are 0: the same samples, the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return Part(tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, content)


def _members(sample: ShardSample, path: Path) -> dict[str, bytes]:
    try:
        suffix, size = picture_header(sample.picture)
    except ValueError as error:
        raise ValueError(f"{path}: sample {sample.key!r}: {FAULTS[PICTURE]} ({error})") from error
    about: dict[str, Any] = {
        **sample.metadata,
        "width": size.width,
        "height": size.height,
        "words": count_words(sample.caption),
    }
    if sample.captions:
        about["captions"] = dict(sample.captions)
    written = json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return {suffix: sample.picture, "txt": sample.caption.encode(), "json": written.encode()}


def _check_same(path: Path, samples: Iterable[ShardSample]) -> None:
    """Consume what a shard is to hold; raises ValueError if it holds something else."""
    held = ShardIndex.read(path)
    given = 0
    for given, sample in enumerate(samples, start=1):
        picture, text, about = _members(sample, path).values()
        row = held.rows[given - 1] if given <= len(held.rows) else None
        if (
            row is None
            or held.keys[given - 1] != sample.key.encode()
            or int(row["picture_checksum"]) != zlib.crc32(picture)
            or int(row["text_checksum"]) != zlib.crc32(about, zlib.crc32(text))
        ):
            break
    else:
        if given == len(held.rows):
            return
    raise ValueError(
        f"{path} is there and holds {len(held.rows)} other samples than those given, which differ at sample {given} of "
        "this shard; write to another folder, prefix or first_shard, or remove the shard"
    )


def index_shards(
    folder: str | Path,
    *,
    decode: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the missing indexes of shards that were not written here; returns their number.

    Every byte is read once. Samples with faults are noted as such; whether they matter is up to
    :meth:`ShardedImages.open`.

    Args:
        folder: with ``.tar`` files.
        decode: every picture, once, so that none that cannot be decoded, or is shorter than its header says, comes up
            in training. Indexes that were made without are made anew.
        on_progress: called with the shards done, and all of them.

    Raises:
        FileNotFoundError: no shards.
        ValueError: a file that is no tar file.
    """
    shards = _shards(Path(folder))
    indexed = 0
    for done, path in enumerate(shards, start=1):
        held = ShardIndex.read(path) if path.with_suffix(".npz").is_file() else None
        if held is None or held.shard_bytes != path.stat().st_size or (decode and not held.decoded):
            scan_shard(path, decode=decode).write(path)
            indexed += 1
        on_progress(done, len(shards))
    return indexed


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedImages:
    """Captioned pictures in a folder of shards, as a set to train on; made by :meth:`open`.

    A batch is a function of its arguments alone, and any number of threads may ask for batches.

    Attributes:
        shards: the tar files.
        shard_numbers: for each sample, in which of them it is.
        rows: for each sample, what the index says.
        styles: share of each style of caption; the style ``""`` is the caption in ``.txt``.
        style_words: words of each sample's caption in each of these styles.
        crop: where pictures are cut to a bucket's ratio: in the middle, or anywhere.
        resize_filter: see :func:`wellposed.data.buckets.cover_and_crop`.
        upscale: whether a batch may be larger than its pictures.
        seed: seed of crops and styles. Those of image i in epoch e depend on (``seed``, i, e) alone.
        skipped: samples that were left out and why.
        captioning_cost: what the captions cost, by unit; empty if the folder does not say.
    """

    shards: tuple[Path, ...]
    shard_numbers: Int[np.ndarray, " samples"]
    rows: np.ndarray
    styles: Mapping[str, float]
    style_words: Int[np.ndarray, "samples styles"]
    crop: Literal["centre", "random"]
    resize_filter: ResizeFilter
    upscale: bool
    seed: int
    skipped: tuple[str, ...]
    captioning_cost: Mapping[str, float]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        caption_style: CaptionStyle = None,
        crop: Literal["centre", "random"] = "centre",
        resize_filter: ResizeFilter = "bicubic",
        upscale: bool = False,
        seed: int = 0,
        on_bad: Literal["raise", "skip"] = "raise",
    ) -> "ShardedImages":
        """The shards in a folder, in the order of their names.

        Args:
            folder: with ``.tar`` files and their indexes.
            caption_style: None for the captions in ``.txt``; a style, such as ``"dense"``; or shares of several, such
                as ``{"dense": 0.75, "brief": 0.25}``, of which one is drawn for each picture in each epoch.
            crop: ``"centre"`` or ``"random"``.
            resize_filter: of Pillow.
            upscale: allow batches larger than their pictures.
            seed: seed of crops and styles.
            on_bad: what to do about samples that cannot be trained on, as far as an index tells (a shard that ends
                early, no picture, no caption, sizes that disagree): raise, or leave them out, log and list them. What
                only decoding shows raises when the sample comes up, unless ``index_shards(folder, decode=True)`` has
                found it before.

        Raises:
            FileNotFoundError: no shards, or one without index.
            ValueError: a sample that cannot be trained on, an index of another file, shares that do not add up to 1,
                nothing left, or a damaged ``captioning.json``.
        """
        if crop not in ("centre", "random") or on_bad not in ("raise", "skip"):
            raise ValueError(f"crop is {crop!r} and on_bad {on_bad!r}; write 'centre' or 'random', 'raise' or 'skip'")
        styles = _style_shares(caption_style)
        shards = _shards(Path(folder))
        opened: list[_OpenShard] = []
        for path in shards:
            shard = _open_shard(path, tuple(styles))
            if shard.faults and on_bad == "raise":
                raise ValueError(f"{shard.faults[0]}. Or write on_bad='skip', which leaves out what has faults")
            opened.append(shard)
        skipped = tuple(fault for shard in opened for fault in shard.faults)
        if skipped:
            logger.warning("%s: %d samples or shards with faults, such as: %s", folder, len(skipped), skipped[0])
        counts = [len(shard.rows) for shard in opened]
        if not sum(counts):
            raise ValueError(f"{folder} has no sample to train on; faults: {len(skipped)}, such as: {skipped[:1]}")
        return cls(
            shards=tuple(shards),
            shard_numbers=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
            rows=np.concatenate([shard.rows for shard in opened]),
            styles=styles,
            style_words=np.concatenate([shard.style_words for shard in opened]),
            crop=crop,
            resize_filter=resize_filter,
            upscale=upscale,
            seed=seed,
            skipped=skipped,
            captioning_cost=_captioning_cost(Path(folder) / CAPTIONING_FILE),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def sizes(self) -> Int[np.ndarray, "samples 2"]:
        """Height and width of every picture as it is seen."""
        return np.stack([self.rows["height"], self.rows["width"]], axis=1)

    def batch(
        self, indices: Sequence[int] | Int[np.ndarray, " batch"] | Int[Tensor, " batch"], size: Size, *, epoch: int = 0
    ) -> TextImageBatch:
        """Pictures at ``indices``, reduced and cut to one size, float32 in [-1, 1] (v / 127.5 - 1), with captions.

        Args:
            indices: positions in [0, len(self)), in any order, repeats allowed.
            size: of all of them.
            epoch: which pass over the data; random crops and mixed captions depend on it.

        Raises:
            ValueError: no indices, or one outside the set; a picture that cannot be decoded, that is not what the index
                says, or too small.
        """
        positions = self._positions(indices)
        images = self._memory.empty(len(positions), 3, *size)
        for into, position, place in zip(images, positions.tolist(), self._places(positions, epoch), strict=True):
            picture = cover_and_crop(
                self._picture(position), size, place=place, resize_filter=self.resize_filter, upscale=self.upscale
            )
            # One picture after the other, while it is in the processor's cache.
            channels = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
            torch.div(torch.from_numpy(channels), 127.5, out=into).sub_(1)
        return TextImageBatch(images=images, captions=self.captions(positions, epoch=epoch))

    def captions(
        self, indices: Sequence[int] | Int[np.ndarray, " batch"] | Int[Tensor, " batch"], *, epoch: int = 0
    ) -> tuple[str, ...]:
        """Captions at ``indices``; those that :meth:`batch` has in that epoch."""
        positions = self._positions(indices)
        names = list(self.styles)
        drawn = self._drawn_styles(positions, epoch)
        return tuple(
            self._caption(position, names[style])
            for position, style in zip(positions.tolist(), drawn.tolist(), strict=True)
        )

    def words(self, *, epoch: int = 0) -> Int[np.ndarray, " samples"]:
        """Words of every caption of an epoch, as :mod:`wellposed.data.words` counts them."""
        everything = np.arange(len(self))
        return self.style_words[everything, self._drawn_styles(everything, epoch)]

    def word_histogram(self, width: int = 10) -> dict[int, int]:
        """Number of captions by the least number of words in a bin: from 0 to ``width`` - 1, and so on."""
        edges, counts = np.unique(self.words() // width * width, return_counts=True)
        return dict(zip(edges.tolist(), counts.tolist(), strict=True))

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on: pictures and texts by their checksums, styles, crops."""
        drawn = self.crop == "random" or len(self.styles) > 1
        about = [dict(self.styles), self.crop, self.resize_filter, self.upscale, self.seed if drawn else None]
        digest = hashlib.sha256(json.dumps(about).encode())
        for column in ("picture_checksum", "picture_bytes", "text_checksum", "text_bytes"):
            digest.update(np.ascontiguousarray(self.rows[column]).tobytes())
        return digest.hexdigest()

    def _positions(self, indices: Any) -> Int[np.ndarray, " batch"]:
        positions = np.asarray(indices, dtype=np.int64)
        if not len(positions) or positions.min() < 0 or positions.max() >= len(self):
            raise ValueError(f"indices are {positions.tolist()[:8]}...; give some of 0 to {len(self) - 1}")
        return positions

    def _places(self, positions: Int[np.ndarray, " batch"], epoch: int) -> list[tuple[float, float]]:
        if self.crop == "centre":
            return [(0.5, 0.5)] * len(positions)
        bits = hashed_bits(self.seed, torch.from_numpy(positions), epoch)
        halves = np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], axis=1) / 2.0**32
        return [(down, right) for down, right in halves.tolist()]

    def _drawn_styles(self, positions: Int[np.ndarray, " batch"], epoch: int) -> Int[np.ndarray, " batch"]:
        """Which style, by its place in ``styles``."""
        if len(self.styles) == 1:
            return np.zeros(len(positions), dtype=np.int64)
        uniform = (hashed_bits(self.seed + 1, torch.from_numpy(positions), epoch) >> np.uint64(11)) / 2.0**53
        borders = np.cumsum(list(self.styles.values()))[:-1]
        return np.searchsorted(borders, uniform, side="right")

    def _picture(self, position: int) -> Image.Image:
        row = self.rows[position]
        content = self._read(position, "picture")
        if zlib.crc32(content) != row["picture_checksum"]:
            raise ValueError(f"{self._name(position)}: its picture changed since it was indexed; copy the shard again")
        try:
            picture = decode_picture(content, formats=SHARD_FORMATS).pixels
        except ValueError as error:
            raise ValueError(f"{self._name(position)}: {FAULTS[PICTURE]} ({error})") from error
        if picture.size != (row["width"], row["height"]):
            raise ValueError(
                f"{self._name(position)}: its picture has {picture.height} x {picture.width} pixels, not "
                f"{row['height']} x {row['width']} as indexed; remove the index and call index_shards(folder)"
            )
        return picture

    def _caption(self, position: int, style: str) -> str:
        text, about = self._read(position, "text"), self._read(position, "about")
        if zlib.crc32(about, zlib.crc32(text)) != self.rows[position]["text_checksum"]:
            raise ValueError(f"{self._name(position)}: its texts changed since they were indexed; copy the shard again")
        return captions_by_style(json_object(about))[style] if style else text.decode()

    def _read(self, position: int, part: str) -> bytes:
        path = self.shards[self.shard_numbers[position]]
        place, length = int(self.rows[part][position]), int(self.rows[f"{part}_bytes"][position])
        content = self._opened(path).read(place, length)
        if len(content) < length:
            raise ValueError(f"{self._name(position)}: {FAULTS[SHORT]}")
        return content

    @cached_property
    def _memory(self) -> "_ReusedMemory":
        return _ReusedMemory()

    @cached_property
    def _opened(self) -> "Callable[[Path], _OpenFile]":
        """Kept open: to open a file for every sample is slow on a network's disks."""
        return lru_cache(maxsize=MOST_OPEN)(_OpenFile)

    def _name(self, position: int) -> str:
        path = self.shards[self.shard_numbers[position]]
        index = ShardIndex.read(path)
        return _sample_name(path, index.keys[index.rows["picture"] == self.rows["picture"][position]][0])


class _ReusedMemory:
    """Memory for batches, used again once nobody holds the batch or a part of it.

    The system hands out fresh memory page by page and filled with zeros, which takes an eighth of the time of decoding
    what is to lie there.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor with values of no meaning."""
        count = math.prod(shape)
        whole = self._taken(count)
        # An array object of its own, which torch holds until the last tensor in this memory is gone.
        lent = whole[:count]
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return torch.from_numpy(lent).view(shape)

    def _taken(self, count: int) -> np.ndarray:
        with self._lock:
            for place, free in enumerate(self._free):
                if len(free) >= count:
                    return self._free.pop(place)
            self._free.clear()  # batches have become larger
        return np.empty(count, dtype=np.float32)


class _OpenFile:
    """A file that any number of threads read from; it closes when the last of them is done and the cache forgot it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, place: int, length: int) -> bytes:
        """Without a position that threads would share; shorter than asked for at the end of the file."""
        return os.pread(self._descriptor, length, place)


class _OpenShard(NamedTuple):
    """What is found on opening a shard.

    Attributes:
        rows: of the samples to train on.
        style_words: words of their captions in the styles that were asked for.
        faults: one line for each other sample, or for the whole shard.
    """

    rows: np.ndarray
    style_words: Int[np.ndarray, "samples styles"]
    faults: tuple[str, ...]


def _open_shard(path: Path, styles: Sequence[str]) -> _OpenShard:
    index = ShardIndex.read(path)
    rows, size = index.rows, path.stat().st_size
    if size > index.shard_bytes:
        raise ValueError(f"the index beside {path} is of another file; call index_shards(folder), which replaces it")
    absent = np.zeros(len(rows), dtype=np.int32)
    columns = {"": rows["words"], **dict(zip(index.styles, index.style_words.T, strict=True))}
    words = np.stack([columns.get(style, absent) for style in styles], axis=1)
    ends = np.max([rows[part] + rows[f"{part}_bytes"] for part in ("picture", "text", "about")], axis=0)
    kinds = np.where(ends > size, SHORT, rows["fault"])
    sound = (kinds == SOUND) & (words > 0).all(1)
    faults: list[str] = []
    for i in np.flatnonzero(~sound).tolist():
        fault = FAULTS[kinds[i]] or _without_style(words[i].tolist(), styles, index.styles)
        faults.append(f"{_sample_name(path, index.keys[i])}: {fault}")
    if not (index.ended and size == index.shard_bytes) and SHORT not in kinds:
        faults.append(f"{path}: {FAULTS[SHORT]}")
    return _OpenShard(rows[sound], words[sound], tuple(faults))


def _without_style(words: Sequence[int], styles: Sequence[str], held: Sequence[str]) -> str:
    absent = next(style for style, count in zip(styles, words, strict=True) if not count)
    return f"it has no caption in the style {absent!r}; the shard has {', '.join(map(repr, held)) or 'none but .txt'}"


def _captioning_cost(path: Path) -> dict[str, float]:
    try:
        amounts = json_object(path.read_bytes()) if path.is_file() else {}
        return {unit: float(amount) for unit, amount in amounts.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not say what the captions cost ({error}); mend or remove it") from error


def _style_shares(caption_style: CaptionStyle) -> dict[str, float]:
    if not isinstance(caption_style, Mapping):
        return {caption_style or "": 1.0}
    shares = {style: float(share) for style, share in caption_style.items() if share}
    if not shares or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"caption_style is {dict(caption_style)}; give shares that add up to 1")
    return shares


def _sample_name(path: Path, key: bytes) -> str:
    return f"{path}: sample {key.decode()!r}"


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise FileNotFoundError(f"no shards in {str(folder)!r}; give a folder of .tar files")
    return shards
