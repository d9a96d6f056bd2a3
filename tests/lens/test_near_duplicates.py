"""Groups of near duplicates: what they are by definition, whoever searches and in whatever order."""

import numpy as np
import pytest

from wellposed.lens import near_duplicates
from wellposed.lens.near_duplicates import duplicate_groups, kept_of_each, similar_pairs

THRESHOLD = 0.985
BACKENDS = ["torch", pytest.param("faiss", marks=pytest.mark.skipif("not have_faiss()"))]


def have_faiss():
    return near_duplicates.importlib.util.find_spec("faiss") is not None


def families(count, width=24, size=5, seed=0):
    """Vectors of any length in families of neighbours, shuffled; lone ones between them."""
    rng = np.random.default_rng(seed)
    parents = rng.normal(size=(count, width))
    children = parents.repeat(size, 0) + rng.normal(size=(count * size, width)) * rng.uniform(
        0.02, 0.2, (count * size, 1)
    )
    vectors = np.concatenate([children, rng.normal(size=(3 * count, width))]) * rng.uniform(0.1, 9, (8 * count, 1))
    return rng.permutation(vectors).astype(np.float32)


def by_definition(vectors, threshold):
    """Connected components, one vertex after the other, in float64."""
    exact = vectors.astype(np.float64)
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    near = unit @ unit.T > threshold
    groups = np.full(len(vectors), -1)
    for start in range(len(vectors)):
        reached = [start] if groups[start] < 0 else []
        while reached:
            groups[(one := reached.pop())] = start
            reached += [j for j in np.flatnonzero(near[one]).tolist() if groups[j] < 0]
    return groups


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_groups_are_the_connected_components(backend, block, monkeypatch):
    monkeypatch.setattr(near_duplicates, "BLOCK", block)
    vectors = families(30)
    groups = duplicate_groups(vectors, THRESHOLD, backend=backend)
    assert np.array_equal(groups, by_definition(vectors, THRESHOLD))
    assert 30 < len(np.unique(groups)) < len(vectors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_do_not_depend_on_the_order(backend):
    vectors = families(20, seed=1)
    groups = duplicate_groups(vectors, THRESHOLD, backend=backend)
    order = np.random.default_rng(2).permutation(len(vectors))
    shuffled = duplicate_groups(vectors[order], THRESHOLD, backend=backend)
    assert np.array_equal(groups[order][:, None] == groups[order], shuffled[:, None] == shuffled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_come_once_and_in_order(backend, monkeypatch):
    monkeypatch.setattr(near_duplicates, "BLOCK", 16)
    vectors = families(10, seed=3)
    pairs = [tuple(pair) for some in similar_pairs(vectors, 0.9, backend=backend) for pair in some.tolist()]
    exact = vectors.astype(np.float64)
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    assert sorted(pairs) == list(zip(*np.nonzero(np.triu(unit @ unit.T > 0.9, 1)), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_at_the_threshold_are_decided_in_float64(backend):
    """Angles a hair to both sides of the threshold, closer than float32 tells apart."""
    angles = np.arccos(THRESHOLD) + np.array([-3e-7, 3e-7])
    flat = np.stack([np.cos(angles), np.sin(angles)], 1)
    vectors = np.concatenate([[[1.0, 0.0]], flat * [1, 1], flat * [1, -1]]).astype(np.float32)
    exact = vectors.astype(np.float64)
    cosines = exact[1:, 0] / np.linalg.norm(exact[1:], axis=1)
    found = {tuple(p) for some in similar_pairs(vectors, THRESHOLD, backend=backend) for p in some.tolist()}
    assert {j for i, j in found if i == 0} == set((1 + np.flatnonzero(cosines > THRESHOLD)).tolist())


def test_chains_join_what_is_not_alike():
    angles = np.arange(40) * 0.15  # neighbours at cosine 0.9888, next but one at 0.955
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert np.array_equal(duplicate_groups(vectors, THRESHOLD, backend="torch"), np.zeros(40))
    assert np.array_equal(duplicate_groups(vectors, 0.99, backend="torch"), np.arange(40))


def test_zeros_resemble_nothing_and_identical_vectors_each_other():
    vectors = np.zeros((5, 3), np.float32)
    vectors[[1, 4]] = [1, 2, 3]
    assert duplicate_groups(vectors, THRESHOLD, backend="torch").tolist() == [0, 1, 2, 3, 1]
    assert duplicate_groups(vectors[:1], THRESHOLD).tolist() == [0]
    assert duplicate_groups(np.zeros((0, 0), np.float32), THRESHOLD).tolist() == []


def test_the_largest_or_the_first_stands_for_its_group():
    groups, areas = np.array([0, 1, 0, 1, 4, 0]), np.array([5, 7, 9, 7, 1, 9])
    assert kept_of_each(groups).tolist() == [0, 1, 0, 1, 4, 0]
    assert kept_of_each(groups, areas).tolist() == [2, 1, 2, 1, 4, 2]


@pytest.mark.skipif("not have_faiss()")
def test_an_inverted_index_finds_a_part_of_the_pairs_and_no_others():
    vectors = families(60, seed=5)
    exact = duplicate_groups(vectors, THRESHOLD)
    for probes in (2, 8):
        some = duplicate_groups(vectors, THRESHOLD, index="IVF8,Flat", probes=probes)
        assert np.all(exact[some] == exact)  # each of its groups lies in one true group
    assert np.array_equal(some, exact)  # all lists looked into


def test_an_index_of_faiss_is_not_asked_of_torch():
    with pytest.raises(ValueError, match=r"write index='Flat', or install wellposed\[curate\]"):
        duplicate_groups(families(2), THRESHOLD, backend="torch", index="IVF8,Flat")


def test_embeddings_that_are_not_finite_are_refused():
    vectors = families(2)
    vectors[3, 3] = np.nan
    with pytest.raises(ValueError, match="embeddings are not finite"):
        duplicate_groups(vectors, THRESHOLD)


@pytest.mark.skipif("have_faiss()")
def test_without_faiss_its_extra_is_named():
    with pytest.raises(ImportError, match=r"wellposed\[curate\]"):
        duplicate_groups(families(2), THRESHOLD, backend="faiss")
