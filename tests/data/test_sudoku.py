import gzip

import numpy as np
import pytest
import torch

from wellposed.data import sudoku
from wellposed.data.sudoku import SudokuPuzzles, is_solution, make_sudoku, read_sudoku

PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
LARGE_SOLUTION = "".join(str((3 * (row % 3) + row // 3 + column) % 9 + 1) for row in range(9) for column in range(9))
LARGE_PUZZLE = "".join("." if i % 5 == 0 else digit for i, digit in enumerate(LARGE_SOLUTION))


def grid(text):
    return torch.tensor([int(letter) for letter in text.replace(".", "0")], dtype=torch.uint8)


def rows(puzzles):
    return {row.tobytes() for row in puzzles.numpy()}


def count_solutions(puzzle, side, most=2):
    """Plain backtracking, cell after cell in the order of fewest choices; another algorithm than the one tested."""
    box = int(side**0.5)
    cells = [int(value) for value in puzzle]

    def choices(place):
        row, column = divmod(place, side)
        seen = {cells[row * side + k] for k in range(side)} | {cells[k * side + column] for k in range(side)}
        top, left = row - row % box, column - column % box
        seen |= {cells[(top + i) * side + left + j] for i in range(box) for j in range(box)}
        return set(range(1, side + 1)) - seen

    def count(found):
        blanks = [(len(choices(place)), place) for place, value in enumerate(cells) if not value]
        if not blanks:
            return found + 1
        place = min(blanks)[1]
        for digit in choices(place):
            cells[place] = digit
            found = count(found)
            cells[place] = 0
            if found >= most:
                break
        return found

    return count(0)


@pytest.fixture(scope="module")
def small():
    return make_sudoku(400, seed=1)


@pytest.fixture(scope="module")
def large():
    return make_sudoku(60, side=9, bases=6, seed=1)


def test_puzzles_have_one_solution(small, large):
    for puzzles, side, n in ((small, 4, 400), (large, 9, 60)):
        assert len(puzzles) == len(rows(puzzles.puzzles)) == n, "no puzzle twice"
        assert is_solution(puzzles.solutions, puzzles.puzzles).all()
        assert all(count_solutions(puzzle, side) == 1 for puzzle in puzzles.puzzles.tolist())


def test_the_counter_of_the_tests_counts():
    assert count_solutions(grid(PUZZLE).tolist(), 4) == 1
    assert count_solutions([0] * 16, 4, most=1000) == 288
    assert count_solutions([1, 2, 3, 0, 0, 0, 0, 4, *[0] * 8], 4) == 0


def test_every_solved_small_grid_is_drawn(small):
    assert sudoku._all_small_grids().shape == (288, 16)
    seen = rows(make_sudoku(5000, seed=2).solutions)
    assert seen == rows(torch.from_numpy(sudoku._all_small_grids()))


def test_clues(small, large):
    assert (small.puzzles > 0).sum(1).unique().tolist() == [8]
    assert (large.puzzles > 0).sum(1).unique().tolist() == [34]
    fewest = make_sudoku(200, clues=1)
    counts = (fewest.puzzles > 0).sum(1)
    assert (int(counts.min()), int(counts.max()) <= 6) == (4, True), "4 x 4 needs four clues, and six can be minimal"
    for puzzle in fewest.puzzles[:40].tolist():
        for place in (i for i, clue in enumerate(puzzle) if clue):
            assert count_solutions([*puzzle[:place], 0, *puzzle[place + 1 :]], 4) == 2, "no clue is superfluous"
    assert (make_sudoku(3, side=9, clues=60).puzzles > 0).sum(1).tolist() == [60] * 3
    assert (make_sudoku(1, clues=16).puzzles > 0).all()


def test_images_are_images(large):
    """A symmetry keeps how often each number of clues comes up in a line; the images differ from what they show."""
    clues = (large.puzzles > 0).view(10, 6, 9, 9)
    for base in range(6):
        profiles = {
            tuple(sorted([tuple(sorted(c.sum(0).tolist())), tuple(sorted(c.sum(1).tolist()))])) for c in clues[:, base]
        }
        assert len(profiles) == 1
        assert len(rows(clues[:, base].flatten(1).to(torch.uint8))) == 10
    assert torch.equal(large.puzzles[:6], make_sudoku(6, side=9, seed=1).puzzles)


def test_moves_keep_lines_and_boxes():
    cells = sudoku._moved_cells(200, np.random.default_rng(0))
    assert (np.sort(cells, axis=1) == np.arange(81)).all()
    units = {tuple(sorted(unit)) for unit in sudoku._units(9).tolist()}
    assert all({tuple(sorted(move[list(unit)])) for unit in units} == units for move in cells)
    crossed = np.array([len({*(move[:9] // 9)}) == 9 for move in cells])
    assert 60 < crossed.sum() < 140, "every other one puts a column where a row was"
    assert len({move.tobytes() for move in cells}) == 200


def test_same_seed_same_puzzles(small, large):
    assert make_sudoku(400, seed=1).fingerprint() == small.fingerprint()
    assert make_sudoku(60, side=9, bases=6, seed=1).fingerprint() == large.fingerprint()
    assert make_sudoku(400, seed=2).fingerprint() != small.fingerprint()


def test_splits_share_nothing():
    train, validation = (make_sudoku(1000, split=split, seed=5) for split in ("train", "validation"))
    assert not rows(train.puzzles) & rows(validation.puzzles)
    both = make_sudoku(3000, seed=6)
    ours = sudoku._in_split(both.puzzles.numpy(), "validation")
    assert 0.07 < ours.mean() < 0.14
    assert (sudoku._in_split(both.puzzles.numpy(), "train") == ~ours).all()
    large = make_sudoku(2, side=9, clues=60, split="validation")
    assert sudoku._in_split(large.solutions.numpy(), "validation").all()


def test_without(small):
    other = make_sudoku(3000, seed=3)
    rest = other.without(small)
    assert rows(rest.puzzles) == rows(other.puzzles) - rows(small.puzzles)
    assert is_solution(rest.solutions, rest.puzzles).all()
    with pytest.raises(ValueError, match="every puzzle"):
        small.without(small)


def test_published_tokens(tmp_path):
    """164 tokens of 15: puzzle, SEP, solution, EOS; five special tokens, the blank, nine digits."""
    (tmp_path / "s.csv").write_text(f"quizzes,solutions\n{LARGE_PUZZLE.replace('.', '0')},{LARGE_SOLUTION}\n")
    puzzles = read_sudoku(tmp_path / "s.csv", layout="published")
    assert (puzzles.vocab_size, puzzles.block_length) == (15, 164)
    batch = puzzles.batch([0])
    words = ["PAD", "SEP", "MASK", "EOS", "UNK", *".123456789"]
    spelt = [words[token] for token in batch.tokens[0]]
    assert spelt == [*LARGE_PUZZLE, "SEP", *LARGE_SOLUTION, "EOS"]
    assert batch.given[0].tolist() == [True] * 82 + [False] * 81 + [True]
    published = read_sudoku(tmp_path / "s.csv", layout="published", predict_end=True).batch([0])
    assert published.given[0].tolist() == [True] * 82 + [False] * 82
    assert torch.equal(published.tokens, batch.tokens)


def test_grid_tokens(small):
    batch = small.batch([3, 0])
    assert (small.vocab_size, small.block_length) == (4, 16)
    assert torch.equal(batch.tokens, small.solutions[[3, 0]].long() - 1)
    assert torch.equal(batch.given, small.puzzles[[3, 0]] > 0)
    assert batch.valid is None


@pytest.mark.parametrize("layout", ["grid", "published"])
def test_tokens_lead_back_to_the_grids(layout, small, large):
    for made in (small, large):
        puzzles = SudokuPuzzles(name="p", puzzles=made.puzzles, solutions=made.solutions, layout=layout)
        tokens = puzzles.batch(range(len(puzzles))).tokens
        assert int(tokens.max()) < puzzles.vocab_size
        assert torch.equal(puzzles.grids(tokens), puzzles.solutions.long())
        free = ~puzzles.batch([0]).given[0]
        for strange in (-1, puzzles.vocab_size, *([0, 1, 5] if layout == "published" else [])):
            broken = tokens[:1].clone()
            broken[0, free.nonzero()[0]] = strange
            cells = puzzles.grids(broken)
            assert (cells == 0).sum() == 1
            assert not is_solution(cells, puzzles.puzzles[:1]).any()
        with pytest.raises(ValueError, match="this layout has"):
            puzzles.grids(tokens[:, 1:])


def test_only_solutions_are_solutions(large):
    solutions, puzzles = large.solutions, large.puzzles
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        wrong = solutions.clone()
        cells = torch.randint(81, (len(wrong), 1), generator=generator)
        wrong.scatter_(1, cells, wrong.gather(1, cells) % 9 + 1)
        assert not is_solution(wrong, torch.zeros_like(puzzles)).any()
    # Two rows of one band exchanged: still a grid, but of another puzzle.
    moved = solutions.view(-1, 9, 9)[:, [1, 0, *range(2, 9)]].flatten(1)
    assert is_solution(moved, torch.zeros_like(puzzles)).all()
    assert not is_solution(moved, puzzles).any()
    # Rows and columns alone do not make a grid: the boxes count.
    latin = torch.tensor([(row + column) % 9 + 1 for row in range(9) for column in range(9)])
    assert not is_solution(latin, torch.zeros_like(latin))
    shaped = is_solution(solutions.view(6, 10, 81), puzzles.view(6, 10, 81))
    assert shaped.shape == (6, 10)
    assert shaped.all()


def test_batch_follows_its_indices_alone(small):
    order = [7, 2, 7]
    together = small.batch(order, epoch=4)
    alone = [small.batch(torch.tensor([i])) for i in order]
    assert torch.equal(together.tokens, torch.cat([batch.tokens for batch in alone]))
    assert torch.equal(together.given, torch.cat([batch.given for batch in alone]))
    for indices, message in (([], "empty"), ([400], "0 to 399"), ([-1], "0 to 399")):
        with pytest.raises(ValueError, match=message):
            small.batch(indices)


def test_fingerprint_sees_what_a_batch_depends_on(small):
    def changed(**kwargs):
        return SudokuPuzzles(**{"name": "p", "puzzles": small.puzzles, "solutions": small.solutions, **kwargs})

    fewer = small.puzzles.clone()
    fewer[0, fewer[0].nonzero()[0]] = 0
    sets = [
        changed(),
        changed(puzzles=fewer),
        changed(puzzles=small.puzzles.flip(0), solutions=small.solutions.flip(0)),
        changed(layout="published"),
        changed(layout="published", predict_end=True),
    ]
    assert len({puzzles.fingerprint() for puzzles in sets}) == 5
    assert sets[0].fingerprint() == small.fingerprint()


@pytest.mark.parametrize("header", ["Puzzle,Solution", "quizzes,solutions", "source,question,answer,rating"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_files(tmp_path, header, suffix):
    filler = {"source": "book", "rating": "3"}
    cells = dict.fromkeys(("puzzle", "quizzes", "question"), PUZZLE) | dict.fromkeys(
        ("solution", "solutions", "answer"), SOLUTION
    )
    line = ",".join((cells | filler)[name.lower()] for name in header.split(","))
    lines = f"{header}\n{line}\n\n{line.replace(PUZZLE, PUZZLE.replace('0', '.'))}\n"
    file = tmp_path / f"s{suffix}"
    with gzip.open(file, "wt") if suffix.endswith("gz") else file.open("w") as out:
        out.write(lines)
    puzzles = read_sudoku(file)
    assert torch.equal(puzzles.puzzles, grid(PUZZLE).expand(2, -1))
    assert torch.equal(puzzles.solutions, grid(SOLUTION).expand(2, -1))
    assert len(read_sudoku(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has the columns none"),
        ("a,b\n1,2\n", "has the columns a, b"),
        ("puzzle,solution\n", "no puzzles below"),
        ("puzzle,solution\n123,123\n", "3 cells"),
        (f"puzzle,solution\n{PUZZLE},{SOLUTION}\n{PUZZLE}\n", "row 2 .* 0 characters"),
        (f"puzzle,solution\n{PUZZLE.replace('3', '5')},{SOLUTION}\n", "row 1 .* digits 0 to 4"),
        (f"puzzle,solution\n{PUZZLE.replace('3', '/')},{SOLUTION}\n", "row 1 .* digits 0 to 4"),
        (f"puzzle,solution\n{PUZZLE},{SOLUTION[::-1]}\n", "breaks a rule or a clue"),
        (f"puzzle,solution\n{PUZZLE},{PUZZLE}\n", "breaks a rule or a clue"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "s.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sudoku(tmp_path / "s.csv")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_sudoku(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 1, "clues": 17}, "at most 16"),
        ({"count": 1, "side": 9, "bases": 0}, "bases is 0"),
        ({"count": 1, "bases": 1}, "bases is for 9 x 9"),
        ({"count": 289, "clues": 16}, "found 288 puzzles"),
    ],
)
def test_what_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sudoku(**arguments)


def test_bad_grids(small):
    with pytest.raises(ValueError, match="25 cells"):
        is_solution(torch.zeros(25, dtype=torch.uint8), torch.zeros(25, dtype=torch.uint8))
    with pytest.raises(ValueError, match="one solution for each puzzle"):
        SudokuPuzzles(name="p", puzzles=small.puzzles[:0], solutions=small.solutions[:0])
    wrong = small.solutions.clone()
    wrong[5] = wrong[6]
    with pytest.raises(ValueError, match=r"solution 5 of 'p' .* 1 of 400"):
        SudokuPuzzles(name="p", puzzles=small.puzzles, solutions=wrong)
    # ValueErrors, or the errors of the executed annotations.
    for call in (lambda: make_sudoku(1, side=5), lambda: make_sudoku(1, split="test")):
        with pytest.raises(Exception, match="side|split"):
            call()
