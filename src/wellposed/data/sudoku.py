"""Sudoku of 4 x 4 and 9 x 9: read from files or made here, every puzzle with exactly one solution.

A grid is a row of 16 or 81 cells, read from the left and from above; 0 is a blank. The small puzzles are a task that a
CPU learns in minutes, the large ones the published one.
"""

import csv
import gzip
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer, UInt8
from torch import Tensor

from wellposed.batches import TextBatch

__all__ = ["SudokuLayout", "SudokuPuzzles", "is_solution", "make_sudoku", "read_sudoku"]

SudokuLayout = Literal["published", "grid"]

PUZZLE_COLUMNS = ("puzzle", "puzzles", "quiz", "quizzes", "question")
SOLUTION_COLUMNS = ("solution", "solutions", "answer")

# The published vocabulary: padding, separator, mask, end and unknown come before the blank and the digits.
SEPARATOR, END, BLANK = 1, 3, 5


@dataclass(frozen=True, kw_only=True)
class SudokuPuzzles:
    """Puzzles with their solutions, as sequences of tokens of which the puzzle is given.

    Layouts:

    * ``"grid"``: the solution alone, digit d as token d - 1, so K = 4 or 9 and the length is 16 or 81; given are the
      clues. The smallest form of the task: nothing has to be copied.
    * ``"published"``: puzzle, SEP, solution, EOS; 164 tokens of K = 15 for 9 x 9 (PAD 0, SEP 1, MASK 2, EOS 3, UNK 4,
      blank 5, digit d 5 + d), 34 tokens of K = 10 for 4 x 4. Given are the puzzle, SEP and EOS.

    Attributes:
        name: what it is, for run records.
        puzzles: 0 for a blank, else a digit.
        solutions: the filled grids.
        layout: see above.
        predict_end: in the published layout, leave EOS to the model, as the published code does: a constant counts
            among the predicted tokens then.

    Raises:
        ValueError: no puzzles, grids of another size, or a solution that breaks a rule or a clue.
    """

    name: str
    puzzles: UInt8[Tensor, "n cells"]
    solutions: UInt8[Tensor, "n cells"]
    layout: SudokuLayout = "grid"
    predict_end: bool = False

    def __post_init__(self) -> None:
        if self.layout not in ("grid", "published"):
            raise ValueError(f'layout is {self.layout!r}; write "grid" or "published"')
        if self.puzzles.shape != self.solutions.shape or not len(self.puzzles):
            raise ValueError(
                f"{self.name!r} has puzzles {tuple(self.puzzles.shape)} and solutions {tuple(self.solutions.shape)}; "
                "give one solution for each puzzle, and at least one"
            )
        # By pieces: a million puzzles have 243 million entries of rows, columns and boxes.
        pieces = zip(self.solutions.split(1 << 14), self.puzzles.split(1 << 14), strict=True)
        wrong = (~torch.cat([is_solution(*piece) for piece in pieces])).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"solution {first} of {self.name!r} ({_written(self.solutions[first])}) breaks a rule or a clue of "
                f"{_written(self.puzzles[first])}; {len(wrong)} of {len(self.puzzles)} do"
            )

    @property
    def side(self) -> int:
        """Cells in a row: 4 or 9."""
        return _side(self.puzzles.shape[1])

    @property
    def vocab_size(self) -> int:
        """K of the layout."""
        return self.side if self.layout == "grid" else BLANK + 1 + self.side

    @property
    def block_length(self) -> int:
        """Tokens of a sequence."""
        cells = self.puzzles.shape[1]
        return cells if self.layout == "grid" else 2 * cells + 2

    def __len__(self) -> int:
        return len(self.puzzles)

    def batch(self, indices: Sequence[int] | Int[Tensor, "batch"], *, epoch: int = 0) -> TextBatch:
        """The puzzles at ``indices`` with their solutions, as int64.

        Args:
            indices: positions in [0, len(self)), in any order, repeats allowed.
            epoch: which pass over the data; it changes nothing.

        Raises:
            ValueError: no indices, or one outside the set.
        """
        positions = torch.as_tensor(indices, dtype=torch.int64)
        if not len(positions):
            raise ValueError("indices is empty; ask for at least one puzzle")
        if int(positions.min()) < 0 or int(positions.max()) >= len(self):
            raise ValueError(
                f"indices span [{int(positions.min())}, {int(positions.max())}]; "
                f"{self.name!r} has puzzles 0 to {len(self) - 1}"
            )
        puzzles, solutions = (grids[positions].to(torch.int64) for grids in (self.puzzles, self.solutions))
        if self.layout == "grid":
            return TextBatch(tokens=solutions - 1, given=puzzles > 0)
        column = torch.ones(len(positions), 1, dtype=torch.int64)
        given = torch.ones(len(positions), self.block_length, dtype=torch.bool)
        given[:, puzzles.shape[1] + 1 :] = False
        given[:, -1] = not self.predict_end
        tokens = torch.cat([puzzles + BLANK, SEPARATOR * column, solutions + BLANK, END * column], dim=1)
        return TextBatch(tokens=tokens, given=given)

    def grids(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, "batch cells"]:
        """The filled grids that sequences of this layout hold, 0 where a token is no digit.

        Raises:
            ValueError: sequences of another length.
        """
        if tokens.shape[1] != self.block_length:
            raise ValueError(f"the sequences have {tokens.shape[1]} tokens; this layout has {self.block_length}")
        cells = self.puzzles.shape[1]
        digits = tokens + 1 if self.layout == "grid" else tokens[:, cells + 1 : 2 * cells + 1] - BLANK
        return digits.where((digits >= 1) & (digits <= self.side), 0)

    def fingerprint(self) -> str:
        """SHA-256 of the puzzles, the solutions and the layout."""
        digest = hashlib.sha256(f"{self.layout} {self.predict_end} {self.side}".encode())
        for grids in (self.puzzles, self.solutions):
            digest.update(grids.contiguous().numpy().data)
        return digest.hexdigest()

    def without(self, other: "SudokuPuzzles") -> "SudokuPuzzles":
        """Those puzzles that are not in ``other``.

        Raises:
            ValueError: all of them are.
        """
        taken = {row.tobytes() for row in other.puzzles.numpy()}
        kept = [i for i, row in enumerate(self.puzzles.numpy()) if row.tobytes() not in taken]
        if not kept:
            raise ValueError(f"every puzzle of {self.name!r} is in {other.name!r}")
        return replace(self, puzzles=self.puzzles[kept], solutions=self.solutions[kept])


def is_solution(
    grids: Integer[Tensor, "*batch cells"], puzzles: Integer[Tensor, "*batch cells"]
) -> Bool[Tensor, "*batch"]:
    """Whether each grid has every digit once in each row, column and box, and keeps the clues of its puzzle.

    Args:
        grids: what is to be checked; any values.
        puzzles: 0 for a blank, else the clue.

    Raises:
        ValueError: grids that are neither 4 x 4 nor 9 x 9.
    """
    side = _side(grids.shape[-1])
    digits = torch.arange(1, side + 1, device=grids.device)
    units = grids.to(torch.int64)[..., torch.from_numpy(_units(side)).to(grids.device)]
    complete = (units.sort(-1).values == digits).flatten(-2).all(-1)
    return complete & ((puzzles == 0) | (puzzles == grids)).all(-1)


def read_sudoku(
    path: str | Path, *, layout: SudokuLayout = "grid", predict_end: bool = False, limit: int | None = None
) -> SudokuPuzzles:
    """Puzzles of a CSV file with a header, one puzzle and its solution in a line; other columns are ignored.

    A grid is a string of 16 or 81 characters, with 0 or . for a blank. The columns are called puzzle, quiz, quizzes or
    question, and solution, solutions or answer.

    Args:
        path: a ``.csv`` or ``.csv.gz``.
        layout: see :class:`SudokuPuzzles`.
        predict_end: see :class:`SudokuPuzzles`.
        limit: how many to read, from the first on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: columns of other names, a grid of another size or with other characters, a wrong solution.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}; give a .csv with a puzzle and its solution in each line")
    with gzip.open(file, "rt", newline="") if file.suffix == ".gz" else file.open(newline="") as lines:
        rows = csv.reader(lines)
        header = [name.strip().lower() for name in next(rows, [])]
        columns = [
            next((header.index(name) for name in names if name in header), None)
            for names in (PUZZLE_COLUMNS, SOLUTION_COLUMNS)
        ]
        if columns[0] is None or columns[1] is None:
            raise ValueError(
                f"{str(file)!r} has the columns {', '.join(header) or 'none'}; it needs one of "
                f"{', '.join(PUZZLE_COLUMNS)} and one of {', '.join(SOLUTION_COLUMNS)}"
            )
        puzzles, solutions = list[str](), list[str]()
        for row in rows:
            if limit is not None and len(puzzles) == limit:
                break
            if row:
                puzzles.append(row[columns[0]] if columns[0] < len(row) else "")
                solutions.append(row[columns[1]] if columns[1] < len(row) else "")
    if not puzzles:
        raise ValueError(f"{str(file)!r} has no puzzles below its header")
    return SudokuPuzzles(
        name=f"sudoku {file.name}",
        puzzles=_parsed(puzzles, str(file)),
        solutions=_parsed(solutions, str(file)),
        layout=layout,
        predict_end=predict_end,
    )


def make_sudoku(
    count: int,
    *,
    side: Literal[4, 9] = 4,
    clues: int | None = None,
    split: Literal["all", "train", "validation"] = "all",
    bases: int | None = None,
    layout: SudokuLayout = "grid",
    predict_end: bool = False,
    seed: int = 0,
) -> SudokuPuzzles:
    """Different puzzles with one solution each, made by taking digits out of solved grids as long as it stays unique.

    The solved grids of 4 x 4 are drawn uniformly out of all 288; thousands of puzzles take a second. Those of 9 x 9 are
    filled at random by backtracking, and a puzzle takes a fiftieth of a second; with ``bases``, only so many are made
    that way and the others are images of them under the symmetries of the rules (digits renamed, rows, columns, bands
    and stacks moved, the grid transposed: 1.2e12 images), at many thousands a second.

    Args:
        count: how many.
        side: 4 or 9.
        clues: digits left, 8 or 34 by default, and more where no further one can go.
        split: a tenth is for validation, by a hash of the puzzle for 4 x 4 and of the solved grid for 9 x 9 (of the one
            it is an image of). The two parts share none of these, whatever the seeds and counts.
        bases: how many to make by hand, for 9 x 9; all of them by default.
        layout: see :class:`SudokuPuzzles`.
        predict_end: see :class:`SudokuPuzzles`.
        seed: seed of everything drawn.

    Raises:
        ValueError: counts below 1, an unknown side or split, ``bases`` with 4 x 4, or more puzzles than could be found.
    """
    if side not in (4, 9):
        raise ValueError(f"side is {side}; write 4 or 9")
    if split not in ("all", "train", "validation"):
        raise ValueError(f'split is {split!r}; write "all", "train" or "validation"')
    if bases is not None and side == 4:
        raise ValueError("bases is for 9 x 9; 4 x 4 puzzles are quick to make one by one")
    clues = {4: 8, 9: 34}[side] if clues is None else clues
    for name, value, top in (("count", count, None), ("clues", clues, side * side), ("bases", bases, None)):
        if value is not None and (value < 1 or (top is not None and value > top)):
            raise ValueError(f"{name} is {value}; give at least 1{'' if top is None else f' and at most {top}'}")
    rng = np.random.default_rng(seed)
    if side == 4:
        puzzles, solutions = _small_puzzles(count, clues, split, rng)
    else:
        puzzles, solutions = _large_puzzles(min(count, bases or count), clues, split, rng)
        if len(puzzles) < count:
            puzzles, solutions = _images(puzzles, solutions, count, rng)
    return SudokuPuzzles(
        name=f"sudoku {side}x{side}, {clues} clues ({split})",
        puzzles=torch.from_numpy(puzzles),
        solutions=torch.from_numpy(solutions),
        layout=layout,
        predict_end=predict_end,
    )


def _side(cells: int) -> int:
    side = {16: 4, 81: 9}.get(cells)
    if side is None:
        raise ValueError(f"a grid has {cells} cells; give 16 (4 x 4) or 81 (9 x 9)")
    return side


def _written(grid: UInt8[Tensor, "cells"]) -> str:
    return "".join(str(int(digit)) for digit in grid)


def _parsed(rows: list[str], where: str) -> UInt8[Tensor, "n cells"]:
    cells = len(rows[0])
    _side(cells)
    wrong = next((number for number, row in enumerate(rows) if len(row) != cells or not row.isascii()), None)
    if wrong is not None:
        raise ValueError(f"row {wrong + 1} of {where!r} has a grid of {len(rows[wrong])} characters, not {cells}")
    characters = np.frombuffer("".join(rows).encode(), np.uint8).reshape(-1, cells)
    digits = np.where(characters == ord("."), 0, characters - np.uint8(ord("0")))
    outside = np.flatnonzero((digits > _side(cells)).any(1))
    if len(outside):
        raise ValueError(f"row {outside[0] + 1} of {where!r} has something else than digits 0 to {_side(cells)} and .")
    return torch.from_numpy(digits.astype(np.uint8))


@cache
def _units(side: int) -> np.ndarray:
    """The cells of each row, column and box."""
    box = 2 if side == 4 else 3
    cells = np.arange(side * side).reshape(side, side)
    boxes = cells.reshape(box, box, box, box).swapaxes(1, 2).reshape(side, side)
    return np.concatenate([cells, cells.T, boxes])


def _in_split(grids: np.ndarray, split: str) -> np.ndarray:
    if split == "all":
        return np.ones(len(grids), dtype=bool)
    for_validation = [hashlib.blake2b(grid.tobytes(), digest_size=8).digest()[0] % 10 == 0 for grid in grids]
    return np.asarray(for_validation) == (split == "validation")


@cache
def _all_small_grids() -> np.ndarray:
    rows = np.array(list(permutations(range(1, 5))), dtype=np.uint8)
    tops = np.array([[*a, *b] for a in rows for b in rows], dtype=np.uint8)
    # Halves whose two boxes and four columns have no digit twice, then the pairs of such halves that make a grid.
    halves = tops[[len({*t[[0, 1, 4, 5]]}) == 4 and len({*t[[2, 3, 6, 7]]}) == 4 for t in tops]]
    pairs = np.concatenate([np.repeat(halves, len(halves), 0), np.tile(halves, (len(halves), 1))], axis=1)
    grids = torch.from_numpy(pairs)
    return pairs[is_solution(grids, torch.zeros_like(grids)).numpy()]


def _small_puzzles(count: int, clues: int, split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    grids = _all_small_grids()
    bits = (1 << np.arange(16)).astype(np.int64)
    # Cells in which two grids differ, as 16 bits: a puzzle is unique if its clues meet every difference of its grid.
    differences = (grids[:, None] != grids[None]) @ bits
    np.fill_diagonal(differences, -1)
    found: dict[bytes, np.ndarray] = {}
    fruitless = 0
    while len(found) < count:
        size = max(256, 2 * (count - len(found)))
        which = rng.integers(len(grids), size=size)
        left = np.full(size, (1 << 16) - 1)
        for cell in rng.permuted(np.tile(np.arange(16), (size, 1)), axis=1).T:
            fewer = left & ~bits[cell]
            unique = ((differences[which] & fewer[:, None]) != 0).all(1)
            left = np.where(unique & (np.bitwise_count(left) > clues), fewer, left)
        puzzles = np.where(left[:, None] & bits, grids[which], 0).astype(np.uint8)
        before = len(found)
        for row in np.flatnonzero(_in_split(puzzles, split)):
            found.setdefault(puzzles[row].tobytes(), grids[which[row]])
        fruitless = fruitless + 1 if len(found) == before else 0
        if fruitless == 20:
            raise ValueError(f"found {len(found)} puzzles with {clues} clues and no more; ask for fewer than {count}")
    keys = list(found)[:count]
    puzzles = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16).copy()
    return puzzles, np.stack([found[key] for key in keys])


@cache
def _peers() -> list[list[int]]:
    units = _units(9)
    return [sorted({int(c) for unit in units if cell in unit for c in unit} - {cell}) for cell in range(81)]


def _large_puzzles(count: int, clues: int, split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # Python's own generator: drawing one small number at a time is most of what it does here.
    random_source = random.Random(int(rng.integers(1 << 62)))
    found: dict[bytes, np.ndarray] = {}
    while len(found) < count:
        solution = _solved([0x1FF] * 81, random_source)
        assert solution is not None
        grid = np.array([bits.bit_length() for bits in solution], dtype=np.uint8)
        if _in_split(grid[None], split)[0]:
            found[bytes(_dug(solution, clues, random_source))] = grid
    return np.stack([np.frombuffer(key, np.uint8) for key in found]), np.stack(list(found.values()))


def _dug(solution: list[int], clues: int, source: random.Random) -> list[int]:
    """Digits of a puzzle with this solution alone; a solution and its clues are one bit per digit here."""
    puzzle, left = list(solution), 81
    for cell in source.sample(range(81), 81):
        if left == clues:
            break
        bit, puzzle[cell] = puzzle[cell], 0
        # It is still unique if no other digit fits in the cell: the rest follows from this digit as it did before.
        if _other_digit_fits(puzzle, cell, bit, source):
            puzzle[cell] = bit
        else:
            left -= 1
    return [bits.bit_length() for bits in puzzle]


def _other_digit_fits(puzzle: list[int], cell: int, bit: int, source: random.Random) -> bool:
    candidates: list[int] | None = [0x1FF] * 81
    for place, clue in enumerate(puzzle):
        if clue:
            candidates = _placed(candidates, place, clue)
            assert candidates is not None
    candidates = _without_digit(candidates, cell, bit)
    return candidates is not None and _solved(candidates, source) is not None


def _solved(candidates: list[int], source: random.Random) -> list[int] | None:
    """One solution within the candidates, at random, or None. Digits are bits; a solved cell has one."""
    open_cells = [cell for cell in range(81) if candidates[cell] & (candidates[cell] - 1)]
    if not open_cells:
        return candidates
    cell = min(open_cells, key=lambda place: candidates[place].bit_count())
    digits = [1 << d for d in range(9) if candidates[cell] >> d & 1]
    source.shuffle(digits)
    for bit in digits:
        placed = _placed(list(candidates), cell, bit)
        if placed is not None:
            solution = _solved(placed, source)
            if solution is not None:
                return solution
    return None


def _placed(candidates: list[int], cell: int, bit: int) -> list[int] | None:
    """Write a digit into a cell, in place, with all that follows from it cell by cell; None for a contradiction."""
    if not candidates[cell] & bit:
        return None
    return _without_digit(candidates, cell, candidates[cell] & ~bit)


def _without_digit(candidates: list[int], cell: int, bits: int) -> list[int] | None:
    """Strike digits out of a cell, in place; where one digit is left, strike it out of the peers, and so on."""
    waiting = [(cell, bits)]
    while waiting:
        place, gone = waiting.pop()
        before = candidates[place]
        after = before & ~gone
        if after == before:
            continue
        if not after:
            return None
        candidates[place] = after
        if not after & (after - 1):
            waiting += [(peer, after) for peer in _peers()[place] if candidates[peer] & after]
    return candidates


def _images(
    puzzles: np.ndarray, solutions: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The puzzles, and random images of them in turn until there are ``count``."""
    base = np.arange(count) % len(puzzles)
    image = base != np.arange(count)
    cells = _moved_cells(count, rng)
    cells[~image] = np.arange(81)
    names = rng.permuted(np.tile(np.arange(1, 10, dtype=np.uint8), (count, 1)), axis=1)
    names[~image] = np.arange(1, 10)
    names = np.concatenate([np.zeros((count, 1), np.uint8), names], axis=1)
    rows = np.arange(count)[:, None]
    return names[rows, puzzles[base[:, None], cells]], names[rows, solutions[base[:, None], cells]]


def _moved_cells(count: int, rng: np.random.Generator) -> np.ndarray:
    """For each of ``count`` random symmetries, the cell that every cell comes from."""

    def lines() -> np.ndarray:
        bands = rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1)
        within = rng.permuted(np.tile(np.arange(3), (count * 3, 1)), axis=1).reshape(count, 3, 3)
        return (3 * bands[:, :, None] + within).reshape(count, 9)

    rows, columns = lines(), lines()
    cells = rows[:, :, None] * 9 + columns[:, None, :]
    transposed = rng.random(count) < 0.5
    return np.where(transposed[:, None, None], cells.swapaxes(1, 2), cells).reshape(count, 81)
