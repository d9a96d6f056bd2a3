import gzip
import json
import sys
import zipfile
from types import ModuleType

import pytest

from wellposed.data import corpora
from wellposed.data.corpora import (
    detokenize,
    english_topics,
    fineweb,
    hub_text,
    lm1b,
    local_text,
    openwebtext,
    python_source,
    text8,
    wikitext,
)
from wellposed.data.text import pack
from wellposed.data.tokenizers import byte_tokenizer, text8_tokenizer


def write(root, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def parts(loader, *arguments):
    return [list(loader(*arguments, split)) for split in ("all", "train", "validation")]


@pytest.fixture
def hub(monkeypatch):
    """The library ``datasets`` at its door: what it is asked for, and rows as it gives them."""
    library = ModuleType("datasets")
    library.asked, library.rows = [], [{"text": f"document {i}", "id": i} for i in range(2500)]

    def load_dataset(*arguments, **settings):
        library.asked.append((*arguments, settings))
        return iter(library.rows)

    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def test_standard_library():
    everything, train, validation = parts(python_source)
    assert 300 < len(everything) < 1500
    assert 5e6 < sum(map(len, everything)) < 3e7
    assert sorted(train + validation) == sorted(everything)
    assert 0.04 < len(validation) / len(everything) < 0.2
    assert any("def dataclass(" in text for text in everything)
    assert list(python_source()) == train
    assert len({python_source(split).fingerprint() for split in ("all", "train", "validation")}) == 3


def test_what_is_left_out_is_not_entered(tmp_path, monkeypatch):
    write(tmp_path, **{f"{name}_dot_py": name for name in ("a", "pkg__b", "pkg__deep__c")})
    write(tmp_path, **{f"{name}__x_dot_py": "no" for name in corpora.LEFT_OUT}, notes_dot_txt="no")
    write(tmp_path, pkg__tests__deep__y_dot_py="no", **{"site-packages__torch__z_dot_py": "no"})
    entered = []
    walk = corpora.os.walk

    def watched(top):
        for here, folders, files in walk(top):
            entered.append(here)
            yield here, folders, files

    monkeypatch.setattr(corpora.os, "walk", watched)
    assert list(python_source("all", root=tmp_path)) == ["a", "pkg__b", "pkg__deep__c"]
    assert len(entered) == 3, "the root, pkg and pkg/deep"


def test_python_files_of_a_folder(tmp_path):
    write(tmp_path, **{f"m{i}_dot_py": f"x = {i}" for i in range(60)})
    everything, train, validation = (
        list(python_source(split, root=tmp_path)) for split in ("all", "train", "validation")
    )
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(everything) == sorted(f"x = {i}" for i in range(60))
    before = python_source("all", root=tmp_path).fingerprint()
    write(tmp_path, m3_dot_py="x = 33")
    assert python_source("all", root=tmp_path).fingerprint() != before
    write(tmp_path, broken_dot_py=b"\xff\xfe")
    assert "��" in list(python_source("all", root=tmp_path))
    with pytest.raises(FileNotFoundError, match="no Python source"):
        python_source("all", root=tmp_path / "none")


def test_topics():
    everything, train, validation = parts(english_topics)
    assert sum(map(len, everything)) > 3e5
    assert sorted(train + validation) == sorted(everything)
    assert validation
    assert english_topics().fingerprint() != english_topics("train").fingerprint()


def test_one_text_file_is_cut_at_a_line(tmp_path):
    lines = [f"line {i}: ä\r\n" for i in range(1000)]
    write(tmp_path, book_dot_txt="".join(lines))
    everything, train, validation = ("".join(part) for part in parts(local_text, tmp_path / "book.txt"))
    assert everything == "".join(lines)
    assert train + validation == everything
    assert train.endswith("\n")
    assert len(validation) / len(everything) == pytest.approx(0.1, abs=0.01)
    assert parts(local_text, tmp_path) == parts(local_text, tmp_path / "book.txt"), "a folder with one file"


@pytest.mark.parametrize("end", ["", "x", "xx", "xxx"])
def test_long_lines_and_letters_of_several_bytes_survive(tmp_path, monkeypatch, end):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 10)
    monkeypatch.setattr(corpora, "LONG_LINE_BYTES", 4)
    text = "日本語のテキスト" * 20 + "\nshort\n" + "é€" * 50 + end
    write(tmp_path, book_dot_txt=text)
    everything, train, validation = parts(local_text, tmp_path)
    assert "".join(everything) == "".join(train + validation) == text
    assert all(len(piece.encode()) <= 20 + 2 for piece in everything)
    assert train[-1]
    assert validation[0]


def test_large_files_come_in_pieces_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 100)
    lines = [f"this is line {i}\n" for i in range(200)]
    write(tmp_path, book_dot_txt="".join(lines))
    pieces = list(local_text(tmp_path))
    assert "".join(pieces) == "".join(lines)
    assert len(pieces) > 20
    assert all(piece.endswith("\n") for piece in pieces)


def test_a_folder_of_text_files(tmp_path):
    write(tmp_path, **{f"deep__{i}_dot_txt": f"text {i}" for i in range(80)}, readme_dot_md="no")
    everything, train, validation = parts(local_text, tmp_path)
    assert sorted(everything) == sorted(f"text {i}" for i in range(80))
    assert sorted(train + validation) == sorted(everything)
    assert not set(train) & set(validation)
    assert validation
    assert len({local_text(tmp_path, split).fingerprint() for split in ("all", "train", "validation")}) == 3


def test_rows_of_tables(tmp_path):
    rows = [f"document {i}\nwith é" for i in range(300)]
    json_lines = "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows)
    write(tmp_path / "plain", a_dot_jsonl=json_lines + "\n")
    write(tmp_path / "packed", a_dot_jsonl_dot_gz=gzip.compress(json_lines.encode()))
    for folder in ("plain", "packed"):
        everything, train, validation = parts(local_text, tmp_path / folder)
        assert everything == rows
        assert sorted(train + validation) == sorted(rows)
        assert 0.04 < len(validation) / 300 < 0.18
    other = local_text(tmp_path / "plain", column="body")
    assert other.fingerprint() != local_text(tmp_path / "plain").fingerprint()
    with pytest.raises(ValueError, match=r"line 1 of .* column 'body'; it has text, n"):
        list(other)


def test_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'data' is not installed")
    from pyarrow import parquet

    rows = [f"document {i}" for i in range(300)]
    parquet.write_table(pyarrow.table({"n": list(range(300)), "text": rows}), tmp_path / "a.parquet")
    assert list(local_text(tmp_path)) == list(local_text(tmp_path / "a.parquet")) == rows
    with pytest.raises(ValueError, match="no column 'body'; it has n, text"):
        list(local_text(tmp_path, column="body"))
    with pytest.raises(ValueError, match="no text in a column 'n'"):
        list(local_text(tmp_path, column="n"))


def test_local_text_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        local_text(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        local_text(tmp_path)
    write(tmp_path, one_dot_txt="one line")
    with pytest.raises(ValueError, match="too little text"):
        local_text(tmp_path, "validation")
    write(tmp_path, one_dot_jsonl='{"text": "x"}\nno json\n')
    with pytest.raises(ValueError, match="line 2 of .* is no JSON"):
        list(local_text(tmp_path / "one.jsonl"))
    write(tmp_path, two_dot_jsonl='["text"]\n')
    with pytest.raises(ValueError, match="no text in a column 'text'; it has list"):
        list(local_text(tmp_path / "two.jsonl"))
    write(tmp_path, a_dot_parquet="x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install wellposed\[data\]"):
        list(local_text(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["text8", "text8.zip", ""])
def test_text8(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpora, "TEXT8_BYTES", 1000)
    monkeypatch.setattr(corpora, "TEXT8_PARTS", {"train": (0, 900), "validation": (900, 950), "test": (950, 1000)})
    monkeypatch.setattr(corpora, "PIECE_BYTES", 300)
    content = "".join("abc xyz qrs"[i * i % 11] for i in range(1000))
    if name == "text8.zip":
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("text8", content)
    else:
        write(tmp_path, text8=content)
    read = {split: list(text8(tmp_path / name, split)) for split in ("train", "validation", "test")}
    assert "".join("".join(pieces) for pieces in read.values()) == content
    assert [sum(map(len, pieces)) for pieces in read.values()] == [900, 50, 50]
    blocks = pack(text8(tmp_path / name), text8_tokenizer(), 100, wrap="plain")
    assert text8_tokenizer().decode(blocks.batch(range(9)).tokens.flatten()) == content[:900]
    assert text8(tmp_path).fingerprint() != text8(tmp_path, "test").fingerprint()


def test_published_parts_of_text8():
    assert corpora.TEXT8_PARTS == {
        "train": (0, 90 * 10**6),
        "validation": (90 * 10**6, 95 * 10**6),
        "test": (95 * 10**6, 10**8),
    }


def test_text8_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mattmahoney\.net"):
        text8(tmp_path)
    write(tmp_path, text8="too short")
    with pytest.raises(ValueError, match="has 9 characters; text8 has 100000000"):
        text8(tmp_path)
    write(tmp_path, text8_dot_zip="no archive")
    with pytest.raises(ValueError, match="no archive with text8"):
        text8(tmp_path / "text8.zip")


def test_what_the_hub_is_asked_for(hub):
    """Making a corpus asks for nothing; every reading asks once."""
    calls = [
        (lm1b("test"), ("dvruette/lm1b", None), {"split": "test", "streaming": True}),
        (openwebtext(), ("Skylion007/openwebtext", None), {"split": "train", "streaming": True}),
        (
            openwebtext(streaming=False, revision="refs/convert/parquet"),
            ("Skylion007/openwebtext", None),
            {"split": "train[:-100000]", "streaming": False, "revision": "refs/convert/parquet"},
        ),
        (
            openwebtext("validation", streaming=False),
            ("Skylion007/openwebtext", None),
            {"split": "train[-100000:]", "streaming": False},
        ),
        (fineweb(), ("HuggingFaceFW/fineweb", "sample-10BT"), {"split": "train", "streaming": True}),
        (wikitext(size="103"), ("Salesforce/wikitext", "wikitext-103-raw-v1"), {"split": "train", "streaming": True}),
        (
            hub_text("some/set", split="x", config="c", revision="r", streaming=False),
            ("some/set", "c"),
            {"split": "x", "streaming": False, "revision": "r"},
        ),
    ]
    assert hub.asked == []
    for corpus, where, settings in calls:
        next(iter(corpus), None)
        assert hub.asked.pop() == (*where, {"revision": None, **settings})
        assert hub.asked == []


def test_rows_of_the_hub(hub):
    assert list(hub_text("a/b", split="train").first(2)) == ["document 0", "document 1"]
    with pytest.raises(ValueError, match="no text in a column 'body'; it has text, id"):
        list(hub_text("a/b", split="train", column="body"))


def test_held_out_pages_of_openwebtext(hub, monkeypatch):
    monkeypatch.setattr(corpora, "OPENWEBTEXT_HELD_OUT", 700)
    texts = [row["text"] for row in hub.rows]
    assert list(openwebtext()) == texts[:-700]
    assert list(openwebtext("validation")) == texts[-700:]
    assert openwebtext().fingerprint() == openwebtext(streaming=False).fingerprint()
    assert openwebtext().fingerprint() != openwebtext("validation").fingerprint()


def test_held_out_pages_of_fineweb(hub):
    train, validation = (list(fineweb(split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(row["text"] for row in hub.rows)
    assert 0 < len(validation) < 12
    assert fineweb().fingerprint() != fineweb("validation").fingerprint()


def test_articles_of_wikitext(hub):
    lines = ["", " = First Title = \n", "", " A line , it 's one . \n", " = = Section = = \n", " x = y \n"]
    lines += ["", " = A = \n", " Second \n"]
    hub.rows = [{"text": line} for line in lines]
    assert list(wikitext(spaced=True)) == ["".join(lines[:7]), "".join(lines[7:])]
    assert list(wikitext()) == ["= First Title =\nA line, it's one.\n= = Section = =\nx = y\n", "= A =\nSecond\n"]
    assert wikitext().fingerprint() != wikitext(spaced=True).fingerprint()


def test_sentences_of_lm1b(hub):
    hub.rows = [{"text": "He did n't say so ."}]
    assert list(lm1b()) == ["He did n't say so ."]
    assert list(lm1b(spaced=False)) == ["He didn't say so."]


def test_a_data_set_with_a_script(hub):
    def refuse(*arguments, **settings):
        raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")

    hub.load_dataset = refuse
    with pytest.raises(ValueError, match=r'revision="refs/convert/parquet"'):
        list(openwebtext())


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install wellposed\[data\]"):
        list(lm1b())


def test_the_library_itself(tmp_path):
    """The real ``load_dataset`` on a folder of this machine, streamed and not."""
    pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    rows = [f"document {i}" for i in range(20)]
    write(tmp_path, train_dot_jsonl="".join(json.dumps({"text": row}) + "\n" for row in rows))
    for streaming in (True, False):
        assert list(hub_text(str(tmp_path), split="train", streaming=streaming)) == rows
    assert list(hub_text(str(tmp_path), split="train[-3:]", streaming=False)) == rows[-3:]


@pytest.mark.parametrize(
    ("spaced", "text"),
    [
        ('It did n\'t , he said ; " not 1 @,@ 000 % ( or so ) . "', 'It didn\'t, he said; "not 1,000% (or so)."'),
        ("The state @-@ run firm 's 0 @.@ 7 km", "The state-run firm's 0.7 km"),
        ("What ? No ! We 've $ 5 and £ 3 .", "What? No! We've $5 and £3."),
        ("The boys ' ball [ sic ] : red .", "The boys' ball [sic]: red."),
        ("Nothing to do here", "Nothing to do here"),
        ("2 + 2 = 4 - 0 / 1", "2 + 2 = 4 - 0 / 1"),
    ],
)
def test_detokenized(spaced, text):
    assert detokenize(spaced) == text
    assert detokenize(text) == text


def test_a_corpus_is_read_again_from_the_start(tmp_path):
    write(tmp_path, a_dot_txt="a", b_dot_txt="b")
    corpus = local_text(tmp_path)
    assert list(corpus) == list(corpus) == ["a", "b"]
    assert pack(corpus, byte_tokenizer(), 2, wrap="plain").batch([0]).tokens.tolist() == [[97, 98]]


def test_unknown_splits(tmp_path):
    # ValueErrors, or the errors of the executed annotations.
    write(tmp_path, a_dot_txt="a")
    for call in (python_source, english_topics, openwebtext, fineweb):
        with pytest.raises(Exception, match="split"):
            call("dev")
    for call in (local_text, text8):
        with pytest.raises(Exception, match="split"):
            call(tmp_path, "dev")
