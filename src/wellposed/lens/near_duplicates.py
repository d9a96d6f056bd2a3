"""Near duplicates: groups of pictures whose embeddings point the same way.

Two pictures are near duplicates if the cosine of their embeddings is above a threshold, and so are those that a chain
of such pairs joins: groups are the connected components of the graph of pairs, which know no order. Pairs are searched
by an index of faiss where it is installed (extra ``curate``), else by products of blocks; whichever found it, a pair
near the threshold is decided by one and the same sum in float64, so both give the same groups.
"""

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int64

from wellposed.lens.curation_config import EXACT_INDEX

__all__ = ["SearchBackend", "duplicate_groups", "kept_of_each", "similar_pairs"]

SearchBackend = Literal["auto", "faiss", "torch"]

# Above the rounding of a float32 product of unit vectors by far, below what tells pictures apart by far.
MARGIN = 1e-4
BLOCK = 2048


def duplicate_groups(
    vectors: Float32[np.ndarray, "n width"],
    threshold: float,
    *,
    backend: SearchBackend = "auto",
    index: str = EXACT_INDEX,
    probes: int = 16,
) -> Int64[np.ndarray, "n"]:
    """For each vector the smallest position in its group of near duplicates; its own if it is alone.

    Args:
        vectors: any lengths; one that is zero resembles nothing.
        threshold: pairs above this cosine are near duplicates.
        backend: who searches; "auto" takes faiss if it is there.
        index: faiss's name of an index; any but ``"Flat"`` misses some pairs and wants faiss.
        probes: lists of an inverted index that a search looks into.

    Raises:
        ImportError: faiss is asked for and missing.
        ValueError: an unknown backend, or an inexact index with torch; vectors that are not finite.
    """
    groups = np.arange(len(vectors))
    for pairs in similar_pairs(vectors, threshold, backend=backend, index=index, probes=probes):
        for one, other in pairs.tolist():
            roots = _root(groups, one), _root(groups, other)
            groups[max(roots)] = min(roots)
    for position in range(len(groups)):
        groups[position] = groups[groups[position]]
    return groups


def kept_of_each(groups: Int64[np.ndarray, "n"], areas: Int64[np.ndarray, "n"] | None = None) -> Int64[np.ndarray, "n"]:
    """For each vector the position of the one that stands for its group.

    Args:
        groups: of :func:`duplicate_groups`.
        areas: the largest stands for its group, the first of several; None takes the first of all.
    """
    if areas is None:
        return groups
    order = np.lexsort((np.arange(len(groups)), -areas))
    best = np.full(len(groups), -1)
    for position in order.tolist():
        if best[groups[position]] < 0:
            best[groups[position]] = position
    return best[groups]


def similar_pairs(
    vectors: Float32[np.ndarray, "n width"],
    threshold: float,
    *,
    backend: SearchBackend = "auto",
    index: str = EXACT_INDEX,
    probes: int = 16,
) -> Iterator[Int64[np.ndarray, "pairs 2"]]:
    """Pairs (i, j), i < j, whose cosine is above the threshold, in pieces and in no order; by ``"Flat"`` each once.

    Arguments and errors are those of :func:`duplicate_groups`.
    """
    if backend not in get_args(SearchBackend):
        raise ValueError(f"backend is {backend!r}; write one of {', '.join(get_args(SearchBackend))}")
    if not np.isfinite(vectors).all():
        raise ValueError("embeddings are not finite; the embedder divides by zero or overflows")
    if backend == "auto":
        backend = "faiss" if importlib.util.find_spec("faiss") or index != EXACT_INDEX else "torch"
    if backend == "torch" and index != EXACT_INDEX:
        raise ValueError(f"the index {index!r} is one of faiss; write index='Flat', or install wellposed[curate]")
    if len(vectors) < 2:
        return
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    found = _by_faiss(unit, threshold - MARGIN, index, probes) if backend == "faiss" else _by_blocks(unit, threshold)
    for first, second, cosines in found:
        # An inexact index may hold its vectors rounded.
        unsure = np.abs(cosines - threshold) <= MARGIN if index == EXACT_INDEX else np.ones(len(first), dtype=bool)
        above = cosines > threshold
        above[unsure] = _exact_cosines(vectors[first[unsure]], vectors[second[unsure]]) > threshold
        yield np.stack([first[above], second[above]], axis=1)


def _exact_cosines(first: Float32[np.ndarray, "n width"], second: Float32[np.ndarray, "n width"]) -> np.ndarray:
    one, other = first.astype(np.float64), second.astype(np.float64)
    return (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


Found = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Pieces of pairs: positions i, positions j > i, and cosines in float32."""


def _by_blocks(unit: Float32[np.ndarray, "n width"], threshold: float) -> Found:
    blocks = torch.from_numpy(unit).split(BLOCK)
    for row, rows in enumerate(blocks):
        for column in range(row, len(blocks)):
            cosines = rows @ blocks[column].T
            first, second = (cosines > threshold - MARGIN).nonzero(as_tuple=True)
            upper = second + column * BLOCK > first + row * BLOCK
            first, second = first[upper], second[upper]
            if len(first):
                yield (
                    (first + row * BLOCK).numpy(),
                    (second + column * BLOCK).numpy(),
                    cosines[first, second].numpy(),
                )


def _by_faiss(unit: Float32[np.ndarray, "n width"], floor: float, name: str, probes: int) -> Found:
    faiss: Any = _faiss()
    index = faiss.index_factory(unit.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(unit)
    index.add(unit)
    if hasattr(index, "nprobe"):
        index.nprobe = probes
    for start in range(0, len(unit), BLOCK):
        limits, cosines, second = index.range_search(unit[start : start + BLOCK], floor)
        first = np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits.astype(np.int64)))
        if name == EXACT_INDEX:
            wanted = second > first
        else:
            # One that does not find j from i may find i from j; that a pair comes twice does no harm.
            wanted, first, second = second != first, np.minimum(first, second), np.maximum(first, second)
        if wanted.any():
            yield first[wanted], second[wanted], cosines[wanted]


def _root(groups: np.ndarray, position: int) -> int:
    while groups[position] != position:
        groups[position] = groups[groups[position]]
        position = int(groups[position])
    return position


def _faiss() -> ModuleType:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("an index of faiss needs it: pip install 'wellposed[curate]'") from error
    return faiss
